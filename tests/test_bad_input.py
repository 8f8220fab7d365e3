"""What a caller may get wrong: every case is an exception that names the value, and the layer goes on
working."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ktk import BaseMoEWrapper, Experts, KTMoEWrapper
from ktk.config import FORMATS, METHOD_GROUP_SIZES, METHODS, LayerConfig, format_info, format_of_method
from ktk.errors import KtkArgumentError, KtkError, KtkStateError
from ktk.layer import shared_cpu_infer
from torch_layers import Weights, assert_wrapper_matches, batch, clean_buffers, form_of

pytestmark = pytest.mark.filterwarnings("ignore:NUMA node:RuntimeWarning")

CONFIG: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 80,
    "intermediate_size": 48,
}
WRAPPER: dict[str, Any] = {
    "layer_idx": 0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 80,
    "moe_intermediate_size": 48,
    "cpuinfer_threads": 1,
    "threadpool_count": 1,
    "chunked_prefill_size": 8,
    "method": "AMXINT8",
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with clean_buffers():
        yield


@pytest.fixture(scope="module")
def wrapper() -> BaseMoEWrapper:
    made = KTMoEWrapper(**WRAPPER)
    made.load_weights_from_tensors(*Weights.random(1).matrices(), torch.arange(4))
    return made


def assert_still_works(wrapper: BaseMoEWrapper) -> None:
    inputs = batch(5, 6)
    assert_wrapper_matches(wrapper.forward(*inputs), Weights.random(1).reference(form_of("int8")), *inputs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in CONFIG for value in (0, -1)),
        ("num_experts_per_tok", 5),
        ("hidden_size", 65537),
        ("intermediate_size", 65537),
        ("num_experts", 2**31),
        ("layer_idx", -1),
        ("max_tokens", 0),
        ("format", "int5"),
        ("format", None),
        ("group_size", 16),
        ("group_size", -32),
        ("group_size", 256),
        ("swiglu_limit", -1.0),
        ("swiglu_limit", float("nan")),
        ("swiglu_alpha", float("inf")),
    ],
)
def test_values_of_a_configuration(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        LayerConfig(**{**CONFIG, name: value})
    assert isinstance(caught.value, KtkArgumentError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts", 4.0),
        ("hidden_size", "80"),
        ("num_experts", True),
        ("swiglu_limit", "x"),
        ("max_tokens", None),
        ("rotated", 1),
        ("rotated", "yes"),
    ],
)
def test_types_of_a_configuration(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        LayerConfig(**{**CONFIG, name: value})


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_groups_where_there_are_none(format: str) -> None:
    with pytest.raises(KtkArgumentError, match="group_size"):
        LayerConfig(**CONFIG, format=format, group_size=32 if format == "bf16" else 16)


def test_defaults_of_the_formats() -> None:
    chosen = {name: LayerConfig(**CONFIG, format=name) for name in FORMATS}
    groups = {name: config.groups for name, config in chosen.items()}
    assert groups == {"bf16": 0, "int8": 512, "int4": 32, "fp8": 128}
    assert {name: config.rotated for name, config in chosen.items()} == {
        "bf16": False,
        "int8": True,
        "int4": True,
        "fp8": False,
    }


def test_rotated_layers() -> None:
    for name in ("bf16", "fp8"):
        with pytest.raises(
            KtkArgumentError, match=f"rotated must be False or None in format {name}, .*int8, int4"
        ):
            LayerConfig(**CONFIG, format=name, rotated=True)
        assert LayerConfig(**CONFIG, format=name, rotated=False).rotated is False
    for rotated, columns in ((True, 256), (False, 128)):
        for group, down in ((0, 0), (32, 32), (128, 128), (256, columns), (512, columns)):
            config = LayerConfig(**CONFIG, format="int8", group_size=group, rotated=rotated)
            assert (config.rotates, config.intermediate_group) == (rotated, columns)
            assert (config.groups, config.down_groups) == (group, down)


def test_tables_of_formats_and_methods() -> None:
    assert dict(METHODS) == {
        "AMXINT4": "int4",
        "AMXINT8": "int8",
        "BF16": "bf16",
        "FP8": "fp8",
        "MOE_INT4": "int4",
        "MOE_INT8": "int8",
    }
    assert set(METHODS.values()) == set(FORMATS)
    for name in FORMATS:
        assert format_info(name).name == name
    with pytest.raises(KtkArgumentError, match="AMXINT4, AMXINT8, BF16"):
        format_of_method("FP4")
    with pytest.raises(KtkArgumentError, match="bf16, int8, int4"):
        format_info("fp4")


#: Of kt-kernel's `KTMoEWrapper`.
KT_KERNEL_METHODS = [
    "AMXINT4",
    "AMXINT8",
    "BF16",
    "FP8",
    "FP8_PERCHANNEL",
    "GPTQ_INT4",
    "LLAMAFILE",
    "MOE_INT4",
    "MOE_INT8",
    "MXFP4",
    "MXFP8",
    "RAWINT4",
    "SYCL_GPTQ_INT4",
]


@pytest.mark.parametrize("name", KT_KERNEL_METHODS)
def test_methods_of_kt_kernel(name: str) -> None:
    """Each is there, or the message says what to use."""
    if name in METHODS:
        made = KTMoEWrapper(**{**WRAPPER, "method": name})
        assert made.experts.config.format == METHODS[name]
        if name.startswith("MOE_"):
            assert made.experts.config.groups == 0
        made.close()
        return
    with pytest.raises(KtkArgumentError, match=rf"ktk has no method '{name}': .*(bfloat16|checkpoint)"):
        KTMoEWrapper(**{**WRAPPER, "method": name})


def test_training_methods_need_the_mode() -> None:
    with pytest.raises(KtkArgumentError, match="'AMXINT8_SFT' is for training; pass mode='sft'"):
        KTMoEWrapper(**{**WRAPPER, "method": "AMXINT8_SFT"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "NOPE"}, "AMXINT4, AMXINT8, BF16"),
        ({"method": None}, "AMXINT4, AMXINT8, BF16"),
        ({"mode": "nope"}, "inference, sft"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"hidden_size": -3}, "hidden_size"),
        ({"moe_intermediate_size": 0}, "intermediate_size"),
        ({"chunked_prefill_size": 0}, "chunked_prefill_size"),
        ({"layer_idx": -1}, "layer_idx"),
        ({"cpuinfer_threads": 0}, "cpuinfer_threads"),
        ({"threadpool_count": 0}, "threadpool_count"),
        ({"threadpool_count": 2}, "threadpool_count"),
        ({"threadpool_count": 2, "cpuinfer_threads": 2, "numa_nodes": [0]}, "numa_nodes"),
        ({"numa_nodes": [99]}, "99"),
        ({"numa_nodes": [-1]}, "NUMA"),
        ({"max_deferred_experts_per_token": 3}, "max_deferred_experts_per_token"),
        ({"max_deferred_experts_per_token": -1}, "max_deferred_experts_per_token"),
        ({"num_gpu_experts": 5}, "num_gpu_experts"),
        ({"num_gpu_experts": -1}, "num_gpu_experts"),
        ({"gpu_experts_mask": torch.zeros(3, dtype=torch.bool)}, "gpu_experts_mask"),
        ({"gpu_experts_mask": torch.zeros(4)}, "gpu_experts_mask"),
        ({"gpu_experts_mask": torch.zeros(1, 4, dtype=torch.bool)}, "gpu_experts_mask"),
        ({"gpu_experts_mask": torch.zeros(4, dtype=torch.bool, device="meta")}, "gpu_experts_mask"),
        ({"swiglu_limit": -1.0}, "swiglu_limit"),
        ({"group_size": 16}, "group_size"),
    ],
)
def test_arguments_of_the_factory(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KTMoEWrapper(**{**WRAPPER, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 4.0}, "num_experts"),
        ({"gpu_experts_mask": [False] * 4}, "gpu_experts_mask"),
        ({"cpuinfer_threads": "2"}, "cpuinfer_threads"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_types_of_the_factory(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        KTMoEWrapper(**{**WRAPPER, **options})


def test_an_instruction_set_that_does_not_exist() -> None:
    with pytest.raises(KtkError, match="avx9000"):
        KTMoEWrapper(**{**WRAPPER, "isa": "avx9000"})


def test_a_numa_node_that_does_not_exist() -> None:
    for _ in range(2):
        with pytest.raises(KtkArgumentError, match="4711"):
            shared_cpu_infer(1, 1, [4711])
    assert shared_cpu_infer(1, 1, [0]).native_pool.thread_count == 1


def changed(index: int, change: Callable[[torch.Tensor], Any]) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        inputs: list[Any] = list(batch(5, 6))
        inputs[index] = change(inputs[index])
        return tuple(inputs)

    return make


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (changed(0, lambda x: x[:, :79]), KtkArgumentError, "hidden_states"),
        (changed(0, lambda x: x.to(torch.float64)), KtkArgumentError, "hidden_states"),
        (changed(0, lambda x: x.to(torch.int32)), KtkArgumentError, "hidden_states"),
        (changed(0, lambda x: x.to("meta")), KtkArgumentError, "hidden_states"),
        (changed(0, lambda x: x[:5]), KtkArgumentError, "tokens"),
        (changed(0, lambda x: x[0, 0]), KtkArgumentError, "hidden_states"),
        (changed(0, lambda x: x.tolist()), TypeError, "hidden_states"),
        (changed(0, lambda x: None), TypeError, "hidden_states"),
        (changed(1, lambda ids: ids.float()), KtkArgumentError, "expert_ids"),
        (changed(1, lambda ids: ids.to(torch.int16)), KtkArgumentError, "expert_ids"),
        (changed(1, lambda ids: ids[:3]), KtkArgumentError, "same shape"),
        (changed(1, lambda ids: ids.to("meta")), KtkArgumentError, "device"),
        (changed(2, lambda weights: weights.to(torch.int64)), KtkArgumentError, "expert_weights"),
        (changed(2, lambda weights: weights[:, :1]), KtkArgumentError, "same shape"),
        (changed(2, lambda weights: weights.to("meta")), KtkArgumentError, "device"),
        (changed(2, lambda weights: weights.tolist()), TypeError, "expert_weights"),
        (lambda: batch(5, 6, top_k=3), KtkArgumentError, "num_experts_per_tok"),
    ],
)
def test_batches(
    wrapper: BaseMoEWrapper, make: Callable[[], tuple[Any, ...]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        wrapper.experts(*make())
    with pytest.raises(error, match=words):
        wrapper.forward(*make())
    assert_still_works(wrapper)


def test_batches_for_the_wrapper_alone(wrapper: BaseMoEWrapper) -> None:
    x, ids, scores = batch(5, 6)
    with pytest.raises(KtkArgumentError, match="2 columns"):
        wrapper.forward(x, ids[:, :1], scores[:, :1])
    with pytest.raises(KtkArgumentError, match="chunked_prefill_size"):
        wrapper.forward(*batch(5, 9))
    with pytest.raises(KtkStateError, match="submit_forward"):
        wrapper.sync_forward(x)
    assert_still_works(wrapper)


def replaced(**tensors: Callable[[torch.Tensor], Any]) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        weights = Weights.random(1)
        return tuple(
            tensors.get(name, lambda tensor: tensor)(getattr(weights, name))
            for name in ("gate", "up", "down")
        )

    return make


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (replaced(gate=lambda w: w[:3]), KtkArgumentError, "gate must have the shape"),
        (replaced(up=lambda w: w[:, :40]), KtkArgumentError, "up must have the shape"),
        (replaced(down=lambda w: w.transpose(1, 2)), KtkArgumentError, "down must have the shape"),
        (replaced(gate=lambda w: w[0]), KtkArgumentError, "gate must have the shape"),
        (replaced(up=lambda w: w.float()), KtkArgumentError, "up must have the dtype of gate"),
        (replaced(gate=lambda w: w.double()), KtkArgumentError, "gate must be"),
        (replaced(down=lambda w: w.to(torch.int8)), KtkArgumentError, "down must be"),
        (replaced(down=lambda w: w.to("meta")), KtkArgumentError, "meta"),
        (replaced(down=lambda w: None), TypeError, "down"),
    ],
)
def test_weights(
    wrapper: BaseMoEWrapper, make: Callable[[], tuple[Any, ...]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        wrapper.load_weights_from_tensors(*make(), torch.arange(4))
    # What was loaded before is untouched.
    assert_still_works(wrapper)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite(method: str, value: float) -> None:
    weights = Weights.random(1)
    weights.down[2, 5, 7] = value
    made = KTMoEWrapper(**{**WRAPPER, "method": method})
    with pytest.raises(KtkArgumentError, match="NaN or infinity"):
        made.load_weights_from_tensors(*weights.matrices(), torch.arange(4))
    with pytest.raises(KtkStateError, match="failed"):
        made.forward(*batch(5, 2))
    made.load_weights_from_tensors(*Weights.random(1).matrices(), torch.arange(4))
    inputs = batch(5, 2)
    form = form_of(METHODS[method], METHOD_GROUP_SIZES.get(method))
    assert_wrapper_matches(made.forward(*inputs), Weights.random(1).reference(form), *inputs)


def test_biases() -> None:
    weights = Weights.random(1, bias=True)
    with Experts(LayerConfig(**CONFIG, format="int8"), threads=1) as experts:
        for name, wrong in (
            ("gate_bias", torch.zeros(4, 47)),
            ("up_bias", torch.zeros(4, 48, dtype=torch.int32)),
            ("down_bias", torch.zeros(80)),
        ):
            with pytest.raises(KtkArgumentError, match=name):
                experts.load_tensors(*weights.matrices(), **{**weights.biases(), name: wrong})
        bad = {**weights.biases(), "up_bias": torch.full((4, 48), float("nan"))}
        with pytest.raises(KtkArgumentError, match="NaN or infinity"):
            experts.load_tensors(*weights.matrices(), **bad)
        experts.load_tensors(*weights.matrices(), **weights.biases())


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (torch.arange(3), "4 elements"),
        (torch.arange(4).float(), "int64"),
        (torch.tensor([True, False, True, False]), "int64"),
        (torch.arange(4).view(2, 2), "shape"),
        (torch.tensor([0, 1, 2, 4]), r"physical_to_logical_map\[3\]"),
        (torch.tensor([0, -1, 2, 3]), r"physical_to_logical_map\[1\]"),
    ],
)
def test_maps(wrapper: BaseMoEWrapper, order: torch.Tensor, words: str) -> None:
    with pytest.raises(KtkArgumentError, match=words):
        wrapper.load_weights_from_tensors(*Weights.random(1).matrices(), order)
    assert_still_works(wrapper)


def test_memory_layouts_that_are_copied(wrapper: BaseMoEWrapper) -> None:
    weights = Weights.random(1)
    strided = [matrix.transpose(1, 2).contiguous().transpose(1, 2) for matrix in weights.matrices()]
    assert not any(matrix.is_contiguous() for matrix in strided)
    wrapper.load_weights_from_tensors(*strided, torch.arange(4))
    assert_still_works(wrapper)
    x, ids, scores = batch(5, 6)
    wide = torch.cat([x, x], dim=1)
    result = wrapper.forward(wide[:, :80], ids.T.contiguous().T, scores)
    assert_wrapper_matches(result, weights.reference(form_of("int8")), x, ids, scores)


def test_nan_in_a_token_reaches_that_token_only(wrapper: BaseMoEWrapper) -> None:
    x, ids, scores = batch(5, 6)
    expected = wrapper.forward(x, ids, scores).clone()
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[2, 11] = value
        result = wrapper.forward(bad, ids, scores)
        assert result[2].isnan().any()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(result[others], expected[others])


def test_a_configuration_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="LayerConfig"):
        Experts(CONFIG)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gate"):
        Experts.from_weights(None, None, None, num_experts_per_tok=1)  # type: ignore[arg-type]
    with pytest.raises(KtkArgumentError, match="gate"):
        Experts.from_weights(torch.zeros(3), torch.zeros(3), torch.zeros(3), num_experts_per_tok=1)
