"""`Experts`, and the wrappers that inference engines use, against the reference."""

from __future__ import annotations

import functools
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktk
from ktk import BaseMoEWrapper, Experts, KExpertsCPUBuffer, KTMoEWrapper, generate_gpu_experts_masks
from ktk.config import LayerConfig
from ktk.errors import KtkArgumentError, KtkStateError
from ktk.layer import shared_cpu_infer
from reference.moe import Activation
from torch_layers import (
    METHOD_FORMATS,
    Weights,
    assert_matches,
    assert_wrapper_matches,
    batch,
    clean_buffers,
    form_of,
)

# Machines that run the tests may have a single CPU; more threads than CPUs is a test of the runtime.
pytestmark = pytest.mark.filterwarnings("ignore:NUMA node:RuntimeWarning")

SHAPE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 80,
    "moe_intermediate_size": 48,
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with clean_buffers():
        yield


def make_wrapper(layer_idx: int = 0, weights: Weights | None = None, **options: Any) -> BaseMoEWrapper:
    wrapper = KTMoEWrapper(
        **{
            "layer_idx": layer_idx,
            **SHAPE,
            "cpuinfer_threads": 2,
            "threadpool_count": 1,
            "chunked_prefill_size": 64,
            "method": "AMXINT8",
            **options,
        }
    )
    if weights is not None:
        wrapper.load_weights_from_tensors(*weights.matrices(), torch.arange(len(weights.gate)))
    return wrapper


# ---- Experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bf16", {}),
        ("int8", {}),
        ("int8", {"group_size": 128, "rotated": False}),
        ("int4", {}),
        ("int4", {"group_size": 0}),
        ("int4", {"group_size": 64, "rotated": False}),
        ("int4", {"group_size": 128}),
        ("fp8", {}),
    ],
)
def test_formats(name: str, options: dict[str, Any], weight_dtype: torch.dtype) -> None:
    weights = Weights.random(1, dtype=weight_dtype)
    reference = weights.reference(form_of(name, **options))
    with Experts.from_weights(
        *weights.matrices(), num_experts_per_tok=2, format=name, threads=2, **options
    ) as experts:
        assert experts.loaded
        assert experts.weight_bytes > 0
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x, ids, scores = batch(2, 7, dtype=dtype)
            result = experts(x, ids, scores)
            assert result.dtype == dtype
            assert_matches(result, reference, x, ids, scores)


def test_default_format_is_int4_with_groups_of_32() -> None:
    weights = Weights.random(1)
    with Experts.from_weights(*weights.matrices(), num_experts_per_tok=2, threads=1) as experts:
        assert (experts.config.format, experts.config.group_size) == ("int4", 32)


def test_isas_agree_in_integer_formats(isa: str) -> None:
    weights = Weights.random(1)
    x, ids, scores = batch(2, 5)
    results = []
    for name in (isa, "portable"):
        with Experts.from_weights(
            *weights.matrices(), num_experts_per_tok=2, format="int8", isa=name, threads=1
        ) as experts:
            assert experts.isa == name
            results.append(experts(x, ids, scores))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        (Activation(limit=0.5), {"swiglu_limit": 0.5}),
        (Activation(limit=0.7, alpha=1.702), {"swiglu_limit": 0.7, "swiglu_alpha": 1.702}),
    ],
)
def test_activations_and_biases(activation: Activation, options: dict[str, float]) -> None:
    weights = Weights.random(3, bias=True)
    reference = weights.reference(form_of("int8"), activation)
    x, ids, scores = batch(4, 6)
    with Experts.from_weights(
        *weights.matrices(), **weights.biases(), num_experts_per_tok=2, format="int8", threads=1, **options
    ) as experts:
        assert_matches(experts(x, ids, scores), reference, x, ids, scores)


def test_loading_again_replaces_weights_and_biases() -> None:
    first, second = Weights.random(3, bias=True), Weights.random(5)
    x, ids, scores = batch(4, 6)
    with Experts.from_weights(
        *first.matrices(), **first.biases(), num_experts_per_tok=2, format="int8", threads=1
    ) as experts:
        experts.load_tensors(*second.matrices())
        assert_matches(experts(x, ids, scores), second.reference(form_of("int8")), x, ids, scores)


def test_shapes_of_the_batch() -> None:
    weights = Weights.random(1)
    with Experts.from_weights(
        *weights.matrices(), num_experts_per_tok=2, format="int8", threads=1
    ) as experts:
        x, ids, scores = batch(2, 6)
        expected = experts(x, ids, scores)
        assert torch.equal(
            experts(x.view(2, 3, 80), ids.view(2, 3, 2), scores.view(2, 3, 2)).view(6, 80), expected
        )
        assert torch.equal(experts(x, ids.to(torch.int32), scores.to(torch.float64)), expected)
        assert torch.equal(experts(x[0], ids[0], scores[0]), expected[0])
        strided = torch.stack([x, x], dim=-1)[..., 0], ids.T.contiguous().T, scores.T.contiguous().T
        assert not any(tensor.is_contiguous() for tensor in strided)
        assert torch.equal(experts(*strided), expected)
        fewer = experts(x, ids[:, :1], scores[:, :1])
        assert_matches(fewer, weights.reference(form_of("int8")), x, ids[:, :1], scores[:, :1])
        empty = experts(*batch(2, 0))
        assert empty.shape == (0, 80)


def test_result_is_a_new_tensor() -> None:
    weights = Weights.random(1)
    with Experts.from_weights(
        *weights.matrices(), num_experts_per_tok=2, format="int8", threads=1
    ) as experts:
        first = experts(*batch(2, 3))
        kept = first.clone()
        experts(*batch(3, 3))
        assert torch.equal(first, kept)


def test_batches_above_max_tokens_are_run_in_pieces() -> None:
    weights = Weights.random(1)
    inputs = batch(2, 23)
    results = []
    for max_tokens in (5, 64):
        with Experts.from_weights(
            *weights.matrices(), num_experts_per_tok=2, format="int8", threads=1, max_tokens=max_tokens
        ) as experts:
            results.append(experts(*inputs))
    assert torch.equal(*results)


def test_ids_outside_the_layer_contribute_nothing() -> None:
    weights = Weights.random(1)
    x, ids, scores = batch(2, 6)
    ids[0, 0], ids[1, 1], ids[2] = -1, 4, torch.tensor([2**40, -(2**40)])
    with Experts.from_weights(
        *weights.matrices(), num_experts_per_tok=2, format="int8", threads=1
    ) as experts:
        result = experts(x, ids, scores)
        assert not result[2].any()
        assert_matches(result, weights.reference(form_of("int8")), x, ids, scores)


def test_the_mask_is_obeyed_when_changed_in_place() -> None:
    weights = Weights.random(1)
    x, ids, scores = batch(2, 8)
    mask = torch.zeros(4, dtype=torch.bool)
    with Experts.from_weights(
        *weights.matrices(), num_experts_per_tok=2, format="int8", threads=1, gpu_experts_mask=mask
    ) as experts:
        for masked in ((), (1,), (0, 3), (0, 1, 2, 3), (2,)):
            mask.zero_()
            mask[list(masked)] = True
            assert_matches(
                experts(x, ids, scores), weights.reference(form_of("int8"), masked=masked), x, ids, scores
            )
        experts.gpu_experts_mask = torch.tensor([True, False, False, False])
        assert mask.tolist() == [True, False, False, False]


def test_closing() -> None:
    weights = Weights.random(1)
    experts = Experts.from_weights(*weights.matrices(), num_experts_per_tok=2, threads=1)
    assert "loaded" in repr(experts)
    with experts:
        pass
    experts.close()
    assert experts.closed
    assert "closed" in repr(experts)
    for call in (
        lambda: experts(*batch(2, 1)),
        lambda: experts.load_tensors(*weights.matrices()),
        lambda: experts.weight_bytes,
        lambda: experts.__enter__(),
    ):
        with pytest.raises(KtkStateError, match="closed"):
            call()


def test_without_weights() -> None:
    config = LayerConfig(num_experts=4, num_experts_per_tok=2, hidden_size=80, intermediate_size=48)
    with Experts(config, threads=1) as experts:
        assert not experts.loaded
        with pytest.raises(KtkStateError, match="no weights"):
            experts(*batch(2, 1))


def test_two_layers_of_different_shapes_at_once() -> None:
    small, large = Weights.random(1), Weights.random(2, experts=3, hidden=33, inner=130)
    layers = [
        (
            weights,
            Experts.from_weights(*weights.matrices(), num_experts_per_tok=2, format="int8", threads=threads),
        )
        for weights, threads in ((small, 1), (large, 2))
    ]
    failures: list[BaseException] = []

    def work(weights: Weights, experts: Experts, seed: int) -> None:
        try:
            count, _, hidden = weights.gate.shape
            reference = weights.reference(form_of("int8"))
            for step in range(5):
                inputs = batch(seed + step, 4, experts=count, hidden=hidden)
                assert_matches(experts(*inputs), reference, *inputs)
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(*layer, seed)) for seed in (10, 20) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for _, experts in layers:
        experts.close()


# ---- threads ---------------------------------------------------------------------------------------


def test_equal_settings_share_threads_and_others_coexist() -> None:
    first = shared_cpu_infer(2, 1)
    assert shared_cpu_infer(2, 1, [0]) is first
    assert shared_cpu_infer(3, 2, [0, 0]) is not first
    assert first.native_pool.thread_count == 2
    first.close()
    second = shared_cpu_infer(2, 1)
    assert second is not first
    assert not second.closed


def test_threads_go_with_their_last_user() -> None:
    wrapper = make_wrapper(cpuinfer_threads=3)
    reference = weakref.ref(wrapper.cpu_infer)
    del wrapper
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("threads", "subpools", "split"), [(5, 2, [3, 2]), (4, 3, [2, 1, 1]), (2, 2, [1, 1])]
)
def test_threads_are_split_evenly(
    threads: int, subpools: int, split: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("ktk.layer.CPUInfer", lambda config: made.append(config) or weakref.WeakSet())
    monkeypatch.setattr("ktk.layer._cpu_infers", {})
    shared_cpu_infer(threads, subpools)
    assert made[0].subpool_thread_count == split
    assert made[0].subpool_numa_map == []


def test_default_threads() -> None:
    assert shared_cpu_infer().native_pool.thread_count >= 1


@pytest.mark.parametrize(
    ("format", "options", "most"),
    [
        ("bf16", {}, 0.0025),
        ("int8", {}, 0.02),
        ("int8", {"group_size": 128, "rotated": False}, 0.0205),
        ("int4", {"group_size": 32}, 0.13),
        ("int4", {"group_size": 128}, 0.17),
        ("fp8", {}, 0.05),
    ],
)
def test_errors_of_gaussian_layers(format: str, options: dict[str, Any], most: float) -> None:
    """What docs/numerics.md promises of each format: the relative L2 distance from the float32 layer."""
    hidden, inner = 2048, 768
    generator = torch.Generator().manual_seed(11)
    gate, up = (torch.randn(1, inner, hidden, generator=generator).bfloat16() / hidden**0.5 for _ in range(2))
    down = torch.randn(1, hidden, inner, generator=generator).bfloat16() / inner**0.5
    # With a few tokens the error itself varies by two per cent.
    tokens = 64
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    exact = (torch.nn.functional.silu(x.float() @ gate[0].float().T) * (x.float() @ up[0].float().T)) @ down[
        0
    ].float().T
    with Experts.from_weights(
        gate, up, down, num_experts_per_tok=1, format=format, threads=2, **options
    ) as experts:
        ids, weights = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
        result = experts(x.float(), ids, weights)
    assert 0 < (result - exact).norm() / exact.norm() <= most


# ---- wrappers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHOD_FORMATS)
def test_methods(method: str, dtype: torch.dtype) -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights, method=method)
    assert isinstance(wrapper, BaseMoEWrapper)
    reference = weights.reference(METHOD_FORMATS[method])
    for tokens in (1, 9):
        x, ids, scores = batch(2, tokens, dtype=dtype)
        assert_wrapper_matches(wrapper.forward(x, ids, scores, 0), reference, x, ids, scores)


def test_arguments_by_position(tmp_path: Any) -> None:
    mask = torch.tensor([False, True, False, False])
    wrapper = KTMoEWrapper(
        3,
        4,
        2,
        80,
        48,
        mask,
        2,
        1,
        str(tmp_path),
        32,
        True,
        1,
        "AMXINT8",
        [0],
        "inference",
        0,
        16,
        32.0,
        1,
        0.5,
        1.5,
    )
    assert wrapper.layer_idx == 3
    assert wrapper.num_experts == 4
    assert wrapper.num_experts_per_tok == 2
    assert wrapper.hidden_size == 80
    assert wrapper.moe_intermediate_size == 48
    assert wrapper.gpu_experts_mask is mask
    assert wrapper.num_gpu_experts == 1
    assert wrapper.cpu_infer.native_pool.thread_count == 2
    assert wrapper.weight_path == str(tmp_path)
    assert wrapper.chunked_prefill_size == 32
    assert wrapper.cpu_save
    assert wrapper.max_deferred_experts_per_token == 1
    assert wrapper.method == "AMXINT8"
    assert wrapper.experts.config.swiglu_limit == 0.5
    assert wrapper.experts.config.swiglu_alpha == 1.5


def test_own_arguments() -> None:
    assert make_wrapper(method="AMXINT4").experts.config.group_size == 32
    config = make_wrapper(method="AMXINT4", group_size=64, strict=True, isa="portable").experts.config
    assert (config.group_size, config.rotated, config.strict, config.isa) == (64, True, True, "portable")
    assert not make_wrapper(method="AMXINT4", rotated=False).experts.config.rotated
    assert make_wrapper(method="AMXINT4", group_size=0).experts.config.group_size == 0


def test_the_first_experts_on_the_gpu() -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights, num_gpu_experts=2)
    assert wrapper.gpu_experts_mask.tolist() == [True, True, False, False]
    assert wrapper.num_gpu_experts == 2
    x, ids, scores = batch(2, 8)
    assert_wrapper_matches(
        wrapper.forward(x, ids, scores), weights.reference(form_of("int8"), masked=(0, 1)), x, ids, scores
    )
    wrapper.gpu_experts_mask.copy_(torch.tensor([False, False, False, True]))
    assert wrapper.num_gpu_experts == 1
    assert_wrapper_matches(
        wrapper.forward(x, ids, scores), weights.reference(form_of("int8"), masked=(3,)), x, ids, scores
    )


def test_mask_and_number_together() -> None:
    mask = torch.tensor([False, True, False, True])
    assert make_wrapper(gpu_experts_mask=mask, num_gpu_experts=2).num_gpu_experts == 2
    assert make_wrapper(gpu_experts_mask=mask).num_gpu_experts == 2
    assert make_wrapper(num_gpu_experts=None).num_gpu_experts == 0
    with pytest.raises(KtkArgumentError, match="num_gpu_experts"):
        make_wrapper(gpu_experts_mask=mask, num_gpu_experts=3)


def test_map_from_slots_to_experts() -> None:
    weights = Weights.random(1)
    for order in ([2, 0, 3, 1], [1, 1, 0, 2]):
        wrapper = make_wrapper()
        wrapper.load_weights_from_tensors(*weights.matrices(), torch.tensor(order))
        x, ids, scores = batch(2, 8)
        reference = weights.reference(form_of("int8"), order=order)
        assert_wrapper_matches(wrapper.forward(x, ids, scores), reference, x, ids, scores)


def test_inputs_are_copied_on_submission() -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights)
    x, ids, scores = batch(2, 5)
    originals = x.clone(), ids.clone(), scores.clone()
    started, go = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        go.wait(60)

    wrapper.cpu_infer.submit(hold)
    started.wait(60)
    wrapper.submit_forward(x, ids, scores, 0)
    x.fill_(9.0)
    ids.fill_(-1)
    scores.zero_()
    go.set()
    result = wrapper.sync_forward(x, 0)
    assert_wrapper_matches(result, weights.reference(form_of("int8")), *originals)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_kinds_of_ids(ids_dtype: torch.dtype) -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights)
    x, ids, scores = batch(2, 5)
    ids[0, 1], ids[2, 0], ids[3] = -1, 7, -5
    result = wrapper.forward(x, ids.to(ids_dtype), scores, None)
    assert_wrapper_matches(result, weights.reference(form_of("int8")), x, ids, scores)
    assert not result[3].any()


def test_slots_and_the_shared_result() -> None:
    weights = Weights.random(1)
    layers = [make_wrapper(index, weights) for index in range(3)]
    inputs = batch(2, 5)
    results = [layer.forward(*inputs) for layer in layers]
    buffers = KExpertsCPUBuffer.get_buffer(inputs[0], 2)
    assert results[0] is results[2]
    assert [buffers[6].index(results[0]), results[1] is buffers[6][1]] == [0, True]
    assert torch.equal(results[0], results[1])
    for slot in range(2):
        assert torch.equal(buffers[0][slot], inputs[0])
        assert torch.equal(buffers[1][slot], inputs[1])
        assert torch.equal(buffers[3][slot], inputs[2])


def test_captured_batch_sizes_keep_one_output_address() -> None:
    KTMoEWrapper.set_capture_batch_sizes([1, 4])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 4]
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights)
    addresses: dict[int, set[int]] = {}
    for step, tokens in enumerate([1, 4, 2, 1, 5, 4, 1]):
        inputs = batch(step, tokens)
        result = wrapper.forward(*inputs)
        assert_wrapper_matches(result, weights.reference(form_of("int8")), *inputs)
        addresses.setdefault(tokens, set()).add(result.data_ptr())
    assert len(addresses[1]) == len(addresses[4]) == 1
    KTMoEWrapper.clear_buffer_cache()
    KTMoEWrapper.clear_sft_buffer_cache()
    assert KExpertsCPUBuffer.capture_buffers == {}


def test_no_tokens() -> None:
    wrapper = make_wrapper(weights=Weights.random(1), max_deferred_experts_per_token=1)
    result = wrapper.forward(*batch(2, 0))
    assert result.shape == (0, 80)
    assert BaseMoEWrapper._layer_has_pending_deferred[0] is False


def test_a_higher_rank_batch() -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights)
    x, ids, scores = batch(2, 6)
    result = wrapper.forward(x.view(2, 3, 80), ids, scores)
    assert result.shape == (6, 80)
    assert_wrapper_matches(result, weights.reference(form_of("int8")), x, ids, scores)


def test_a_batch_above_the_chunk_size() -> None:
    wrapper = make_wrapper(weights=Weights.random(1), chunked_prefill_size=4)
    with pytest.raises(ValueError, match="chunked_prefill_size"):
        wrapper.forward(*batch(2, 5))
    wrapper.forward(*batch(2, 4))


def test_two_models_of_different_shapes_at_once() -> None:
    small, large = Weights.random(1), Weights.random(2, experts=6, hidden=130, inner=33)
    first = make_wrapper(0, small)
    second = make_wrapper(
        0,
        large,
        num_experts=6,
        num_experts_per_tok=3,
        hidden_size=130,
        moe_intermediate_size=33,
        cpuinfer_threads=1,
    )
    for step in range(3):
        a, b = batch(step, 4), batch(step + 10, 4, experts=6, top_k=3, hidden=130)
        first.submit_forward(*a)
        second.submit_forward(*b)
        assert_wrapper_matches(first.sync_forward(a[0]), small.reference(form_of("int8")), *a)
        assert_wrapper_matches(second.sync_forward(b[0]), large.reference(form_of("int8")), *b)


def test_two_models_of_equal_shapes_at_once() -> None:
    weights = Weights.random(1), Weights.random(2)
    wrappers = [
        make_wrapper(0, each, model=name) for each, name in zip(weights, ("draft", "target"), strict=True)
    ]
    inputs = batch(3, 4), batch(4, 4)
    for wrapper, each in zip(wrappers, inputs, strict=True):
        wrapper.submit_forward(*each)
    for wrapper, each, expected in zip(wrappers, inputs, weights, strict=True):
        assert_wrapper_matches(wrapper.sync_forward(each[0]), expected.reference(form_of("int8")), *each)


def test_synchronising_out_of_order() -> None:
    weights = Weights.random(1)
    first, second = make_wrapper(0, weights), make_wrapper(2, weights)
    inputs = batch(3, 4)
    with pytest.raises(KtkStateError, match="without submit_forward"):
        first.sync_forward(inputs[0])
    first.submit_forward(*inputs)
    second.submit_forward(*inputs)
    with pytest.raises(KtkStateError, match="another layer"):
        first.sync_forward(inputs[0])
    assert_wrapper_matches(second.sync_forward(inputs[0]), weights.reference(form_of("int8")), *inputs)
    assert_wrapper_matches(first.forward(*inputs), weights.reference(form_of("int8")), *inputs)


def test_synchronising_with_another_batch() -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights)
    inputs = batch(3, 4)
    wrapper.submit_forward(*inputs)
    for wrong in (torch.zeros(3, 80), inputs[0].float(), torch.zeros(80, 4, dtype=torch.bfloat16), None):
        with pytest.raises(KtkArgumentError, match="submitted"):
            wrapper.sync_forward(wrong)
    assert_wrapper_matches(wrapper.sync_forward(inputs[0]), weights.reference(form_of("int8")), *inputs)


def test_buffers_dropped_while_their_task_waits() -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights)
    go = threading.Event()
    wrapper.cpu_infer.submit(lambda: go.wait(60))
    inputs = batch(3, 4)
    wrapper.submit_forward(*inputs)
    KTMoEWrapper.clear_buffer_cache()
    KExpertsCPUBuffer.get_buffer(torch.empty(7, 80, dtype=torch.bfloat16), 2)
    go.set()
    assert_wrapper_matches(wrapper.sync_forward(inputs[0]), weights.reference(form_of("int8")), *inputs)


def test_a_failed_task_is_raised_once_and_the_layer_goes_on() -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights)
    inputs = batch(3, 4)

    def fail() -> None:
        raise ZeroDivisionError("in a task")

    wrapper.cpu_infer.submit(fail)
    with pytest.raises(ZeroDivisionError, match="in a task"):
        wrapper.forward(*inputs)
    assert_wrapper_matches(wrapper.forward(*inputs), weights.reference(form_of("int8")), *inputs)


def test_nothing_keeps_a_deleted_layer_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads of its own: other tests of this process may keep a layer that shares the default ones.
    monkeypatch.setattr(ktk.layer, "_cpu_infers", weakref.WeakValueDictionary())
    wrapper = make_wrapper(weights=Weights.random(1), max_deferred_experts_per_token=1)
    wrapper.submit_forward(*batch(3, 4))
    references = [weakref.ref(wrapper), weakref.ref(wrapper.experts), weakref.ref(wrapper.cpu_infer)]
    del wrapper
    # The forward may still run, and its thread lets go of the layer when it has ended.
    deadline = time.monotonic() + 10
    while any(reference() is not None for reference in references) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    assert [reference() for reference in references] == [None] * 3


def test_closing_a_wrapper() -> None:
    wrapper = make_wrapper(weights=Weights.random(1))
    wrapper.submit_forward(*batch(3, 4))
    wrapper.close()
    wrapper.close()
    with pytest.raises(KtkStateError, match="closed"):
        wrapper.forward(*batch(3, 4))


# ---- deferred experts ------------------------------------------------------------------------------


def test_deferred_experts_arrive_with_the_next_layer() -> None:
    models = [Weights.random(seed) for seed in range(3)]
    layers = [
        make_wrapper(index, weights, max_deferred_experts_per_token=deferred)
        for index, (weights, deferred) in enumerate(zip(models, (1, 1, 0), strict=True))
    ]
    for seed in range(3):
        inputs = [batch(10 * seed + index, 5) for index in range(3)]
        split = [
            layer.select_deferred_experts(ids, scores, 2 - layer.max_deferred_experts_per_token)
            for layer, (_, ids, scores) in zip(layers, inputs, strict=True)
        ]
        results = [layer.forward(*each, 0).clone() for layer, each in zip(layers, inputs, strict=True)]
        assert [BaseMoEWrapper._layer_has_pending_deferred[index] for index in range(3)] == [
            True,
            True,
            False,
        ]

        def alone(index: int, ids: torch.Tensor, inputs: Any = inputs) -> torch.Tensor:
            x, _, scores = inputs[index]
            return layers[index].experts(x.float(), ids, scores)

        assert any((deferred >= 0).any() for _, deferred in split[:2])
        for index in range(3):
            expected = alone(index, split[index][0])
            if index:
                expected = expected + alone(index - 1, split[index - 1][1])
            torch.testing.assert_close(results[index].float(), expected, rtol=2**-7, atol=1e-2)


def test_deferral_is_not_mixed_up_between_models() -> None:
    weights = Weights.random(1)
    first = make_wrapper(0, weights, max_deferred_experts_per_token=1)
    other = make_wrapper(1, Weights.random(2, hidden=96), hidden_size=96)
    later = make_wrapper(1, weights, cpuinfer_threads=1)
    first.forward(*batch(1, 4))
    inputs = batch(2, 4, hidden=96)
    assert_wrapper_matches(
        other.forward(*inputs), Weights.random(2, hidden=96).reference(form_of("int8")), *inputs
    )
    # The same shapes and the next number, but other threads: there is no order between the two queues.
    inputs = batch(3, 4)
    assert_wrapper_matches(later.forward(*inputs), weights.reference(form_of("int8")), *inputs)


def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    weights = Weights.random(1)
    layers = [make_wrapper(0, weights, max_deferred_experts_per_token=2), make_wrapper(1, weights)]
    inputs = batch(1, 4)
    for layer in layers:
        layer.forward(*inputs)
    layers[0].forward(*inputs)

    def fail() -> None:
        raise ZeroDivisionError

    layers[0].cpu_infer.submit(fail)
    with pytest.raises(ZeroDivisionError):
        layers[0].forward(*inputs)
    assert_wrapper_matches(layers[1].forward(*inputs), weights.reference(form_of("int8")), *inputs)


def test_all_deferred() -> None:
    weights = Weights.random(1)
    layers = [make_wrapper(0, weights, max_deferred_experts_per_token=2), make_wrapper(1, weights)]
    x, ids, scores = batch(1, 4)
    assert not layers[0].forward(x, ids, scores).any()
    nothing = torch.full_like(ids, -1)
    assert_wrapper_matches(
        layers[1].forward(x, nothing, scores), weights.reference(form_of("int8")), x, ids, scores
    )


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    tokens, top_k = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    ids = draw(
        st.lists(
            st.lists(st.integers(-2, 5), min_size=top_k, max_size=top_k), min_size=tokens, max_size=tokens
        )
    )
    order = draw(st.permutations(range(tokens * top_k)))
    scores = torch.tensor(order, dtype=torch.float32).view(tokens, top_k)
    return torch.tensor(ids, dtype=torch.int64).view(tokens, top_k), scores, draw(st.integers(0, top_k + 1))


@functools.cache
def _selecting_wrapper() -> BaseMoEWrapper:
    return make_wrapper()


@settings(max_examples=60)
@given(case=routings())
def test_selection_of_deferred_experts(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    ids, scores, protected_k = case
    immediate, deferred = _selecting_wrapper().select_deferred_experts(ids, scores, protected_k)
    protected = {
        int(expert)
        for row, values in zip(ids.tolist(), scores.tolist(), strict=True)
        for _, expert in sorted(zip(values, row, strict=True), reverse=True)[:protected_k]
    }
    for row, now, later in zip(ids.tolist(), immediate.tolist(), deferred.tolist(), strict=True):
        for expert, first, second in zip(row, now, later, strict=True):
            valid = 0 <= expert < 4
            assert first == (expert if valid and expert in protected else -1)
            assert second == (expert if valid and expert not in protected else -1)


def test_selection_keeps_the_dtype_of_ids() -> None:
    wrapper = make_wrapper()
    ids, scores = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32), torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    immediate, deferred = wrapper.select_deferred_experts(ids, scores, 1)
    assert immediate.dtype == deferred.dtype == torch.int32
    assert immediate.tolist() == [[0, 1], [-1, 1]]
    assert deferred.tolist() == [[-1, -1], [2, -1]]
    with pytest.raises(KtkArgumentError, match="protected_k"):
        wrapper.select_deferred_experts(ids, scores, -1)
    with pytest.raises(KtkArgumentError, match="expert_scores"):
        wrapper.select_deferred_experts(ids, scores[:1], 1)


# ---- masks, modes, names ---------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    freq=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4),
    count=st.integers(-1, 14),
)
def test_masks_take_the_most_used_experts_of_all_layers(freq: list[list[int]], count: int) -> None:
    tensor = torch.tensor(freq, dtype=torch.float32)
    masks = generate_gpu_experts_masks(tensor, count)
    assert masks.dtype == torch.bool
    assert masks.shape == tensor.shape
    assert masks.device.type == "cpu"
    assert int(masks.sum()) == min(max(count, 0), tensor.numel())
    if masks.any() and not masks.all():
        assert tensor[masks].min() >= tensor[~masks].max()


def test_masks_take_the_first_of_equals() -> None:
    assert generate_gpu_experts_masks(torch.ones(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]
    with pytest.raises(KtkArgumentError, match="activation_freq"):
        generate_gpu_experts_masks(torch.ones(3), 1)
    with pytest.raises(TypeError, match="activation_freq"):
        generate_gpu_experts_masks([[1.0]], 1)  # type: ignore[arg-type]


def test_modes() -> None:
    with pytest.raises(ValueError, match="inference, sft"):
        make_wrapper(mode="train")


def test_public_names() -> None:
    assert ktk.Experts is Experts
    assert ktk.KTMoEWrapper is KTMoEWrapper
    with pytest.raises(TypeError):
        BaseMoEWrapper(None)  # type: ignore[abstract,arg-type,call-arg]
