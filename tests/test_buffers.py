"""The cache of staging buffers: which calls share buffers, and for how long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ktk import KExpertsCPUBuffer
from ktk.buffers import BufferLifetimes
from ktk.errors import KtkArgumentError
from torch_layers import clean_buffers


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with clean_buffers():
        yield


def hidden(tokens: int, size: int = 16, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(tokens, size, dtype=dtype)


def addresses(buffers: tuple[list[torch.Tensor], ...]) -> list[int]:
    return [tensor.data_ptr() for tensors in buffers for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_seven_lists_of_two_slots(dtype: torch.dtype) -> None:
    buffers = KExpertsCPUBuffer.get_buffer(hidden(5, 24, dtype), 3)
    assert isinstance(buffers, tuple)
    assert [len(tensors) for tensors in buffers] == [KExpertsCPUBuffer.buffer_depth] * 7
    inputs, immediate, deferred, weights, outputs, batch_size, device_outputs = buffers
    for slot in range(2):
        assert (inputs[slot].dtype, inputs[slot].shape) == (torch.bfloat16, (5, 24))
        assert (immediate[slot].dtype, immediate[slot].shape) == (torch.int64, (5, 3))
        assert (deferred[slot].dtype, deferred[slot].shape) == (torch.int64, (5, 3))
        assert torch.equal(deferred[slot], torch.full((5, 3), -1))
        assert (weights[slot].dtype, weights[slot].shape) == (torch.float32, (5, 3))
        assert (outputs[slot].dtype, outputs[slot].shape) == (torch.bfloat16, (5, 24))
        assert batch_size[slot].dtype == torch.int32
        assert batch_size[slot].tolist() == [5]
        assert (device_outputs[slot].dtype, device_outputs[slot].shape) == (dtype, (5, 24))
        host = (inputs, immediate, deferred, weights, outputs, batch_size)
        assert all(tensors[slot].device.type == "cpu" for tensors in host)
        assert all(tensors[slot].is_pinned() == torch.cuda.is_available() for tensors in host)
    assert len(set(addresses(buffers))) == 14


def test_captured_sizes_keep_their_addresses() -> None:
    KExpertsCPUBuffer.set_capture_batch_sizes([2, 4])
    assert KExpertsCPUBuffer.get_capture_batch_sizes() == [2, 4]
    two, four = (addresses(KExpertsCPUBuffer.get_buffer(hidden(tokens), 2)) for tokens in (2, 4))
    for tokens in (1, 2, 3, 4, 7):
        KExpertsCPUBuffer.get_buffer(hidden(tokens), 2)
    assert addresses(KExpertsCPUBuffer.get_buffer(hidden(2), 2)) == two
    assert addresses(KExpertsCPUBuffer.get_buffer(hidden(4), 2)) == four
    assert sorted(key[0] for key in KExpertsCPUBuffer.capture_buffers) == [2, 4]
    KExpertsCPUBuffer.set_capture_batch_sizes([])
    assert addresses(KExpertsCPUBuffer.get_buffer(hidden(2), 2)) == two


def test_one_temporary_set_that_is_replaced() -> None:
    first = KExpertsCPUBuffer.get_buffer(hidden(3), 2)
    assert KExpertsCPUBuffer.get_buffer(hidden(3), 2) is first
    assert KExpertsCPUBuffer.temp_bs == 3
    assert KExpertsCPUBuffer.temp_buffer is first
    second = KExpertsCPUBuffer.get_buffer(hidden(5), 2)
    assert KExpertsCPUBuffer.temp_bs == 5
    assert KExpertsCPUBuffer.temp_buffer is second
    assert KExpertsCPUBuffer.get_buffer(hidden(3), 2) is not first
    assert KExpertsCPUBuffer.capture_buffers == {}


def test_clearing_drops_everything() -> None:
    KExpertsCPUBuffer.set_capture_batch_sizes([2])
    captured, temporary = (KExpertsCPUBuffer.get_buffer(hidden(tokens), 2) for tokens in (2, 3))
    KExpertsCPUBuffer.clear_buffer_cache()
    assert KExpertsCPUBuffer.capture_buffers == {}
    assert KExpertsCPUBuffer.temp_buffer == ()
    assert KExpertsCPUBuffer.temp_bs == 0
    assert KExpertsCPUBuffer.get_capture_batch_sizes() == [2]
    assert KExpertsCPUBuffer.get_buffer(hidden(2), 2) is not captured
    assert KExpertsCPUBuffer.get_buffer(hidden(3), 2) is not temporary


@pytest.mark.parametrize("captured", [False, True])
def test_everything_that_shapes_a_set_tells_it_apart(captured: bool) -> None:
    KExpertsCPUBuffer.set_capture_batch_sizes([4] if captured else [])
    variants = {
        "plain": (hidden(4), 2, {}),
        "hidden": (hidden(4, 32), 2, {}),
        "top_k": (hidden(4), 3, {}),
        "dtype": (hidden(4, dtype=torch.float32), 2, {}),
        "device": (torch.empty(4, 16, dtype=torch.bfloat16, device="meta"), 2, {}),
        "owner": (hidden(4), 2, {"owner": "other model"}),
        "transfer": (hidden(4), 2, {"transfer_dtype": torch.float32}),
    }
    sets = {name: KExpertsCPUBuffer.get_buffer(x, k, **extra) for name, (x, k, extra) in variants.items()}
    assert len({id(buffers) for buffers in sets.values()}) == len(variants)
    # Models of different shapes that take turns find their buffers again.
    for name, (x, k, extra) in variants.items():
        assert KExpertsCPUBuffer.get_buffer(x, k, **extra) is sets[name]
    assert sets["hidden"].inputs[0].shape == (4, 32)
    assert sets["top_k"].weights[0].shape == (4, 3)
    assert sets["dtype"].device_outputs[0].dtype == torch.float32
    assert sets["device"].device_outputs[0].device.type == "meta"
    assert sets["transfer"].inputs[0].dtype == torch.float32


def test_no_tokens() -> None:
    buffers = KExpertsCPUBuffer.get_buffer(hidden(0), 2)
    assert buffers.inputs[0].shape == (0, 16)
    assert buffers.batch_size[0].tolist() == [0]


@pytest.mark.parametrize(
    ("x", "k", "error", "words"),
    [
        (torch.empty(4), 2, KtkArgumentError, "hidden_states"),
        (torch.empty(1, 4, 8), 2, KtkArgumentError, "hidden_states"),
        ([[0.0]], 2, TypeError, "hidden_states"),
        (torch.empty(4, 8), 0, KtkArgumentError, "num_experts_per_tok"),
        (torch.empty(4, 8), 1.5, TypeError, "num_experts_per_tok"),
    ],
)
def test_wrong_arguments(x: torch.Tensor, k: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        KExpertsCPUBuffer.get_buffer(x, k)


def test_wrong_capture_sizes() -> None:
    with pytest.raises(KtkArgumentError, match="capture batch size"):
        KExpertsCPUBuffer.set_capture_batch_sizes([1, -1])
    with pytest.raises(TypeError, match="capture batch size"):
        KExpertsCPUBuffer.set_capture_batch_sizes(["1"])  # type: ignore[list-item]


def test_buffers_outlive_the_tasks_that_use_them() -> None:
    lifetimes = BufferLifetimes()
    sets = [KExpertsCPUBuffer.get_buffer(hidden(tokens), 2) for tokens in (1, 2, 3)]
    for pending, buffers in zip((1, 2, 2), sets, strict=True):
        lifetimes.hold_for_task(buffers, pending)
    # Two of three tasks are unfinished: the sets of the last two are held.
    assert list(lifetimes._queued) == sets[1:]
    lifetimes.hold_for_task(sets[0], 0)
    assert list(lifetimes._queued) == []
