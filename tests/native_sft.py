"""Native fine-tuning from NumPy arrays, for tests that compare it with `reference.sft`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ktk import _native
from layers import DTYPE_CODES, FORMATS, NativeLayer, Options, pool_of
from reference.moe import Activation, Bounded, Layer
from reference.packing import Format
from reference.rounding import BF16, F32, Array, F32Array
from reference.sft import LORA_NAMES, Adapters, Trainer, tolerance
from strategies import make_input, make_routing, make_weights

POLICIES = (_native.POLICY_SAVE, _native.POLICY_RECOMPUTE)

#: Written into gradients before they are computed, so that one left unwritten shows.
UNWRITTEN = 1.2345e4


def make_adapters(
    rng: np.random.Generator,
    experts: int,
    hidden: int,
    intermediate: int,
    rank: int,
    dtype: np.dtype[np.generic] = BF16,
    scale: float = 2.0,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Adapters:
    """Gaussian adapters whose products are about half as large as those of the weights."""
    shapes = {
        "gate_lora_a": (rank, hidden),
        "gate_lora_b": (intermediate, rank),
        "up_lora_a": (rank, hidden),
        "up_lora_b": (intermediate, rank),
        "down_lora_a": (rank, intermediate),
        "down_lora_b": (hidden, rank),
    }
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal((experts, *shape)) / np.sqrt(shape[1])
        if name.endswith("b"):
            values *= 0.5 / scale
        tensors[name] = values.astype(np.float32).astype(dtype)
    return Adapters(tensors, scale, dropout, seed)


@dataclasses.dataclass
class NativeGradients:
    input: Array
    weights: F32Array
    lora: dict[str, Array]
    base: dict[str, Array]


class NativeTrainer:
    """`ktk._native.Sft` over NumPy arrays.

    Parameters
    ----------
    layer : NativeLayer
    adapters : Adapters, optional
    skip_lora : bool
    """

    def __init__(self, layer: NativeLayer, adapters: Adapters | None = None, skip_lora: bool = False) -> None:
        self.layer = layer
        self.adapters = adapters
        self.rank = 0 if adapters is None else adapters.tensors["gate_lora_a"].shape[1]
        self.sft = _native.Sft(
            layer.moe,
            lora_rank=self.rank,
            lora_scale=1.0 if adapters is None else adapters.scale,
            lora_dropout=0.0 if adapters is None else adapters.dropout,
            skip_lora=skip_lora,
        )
        if adapters is not None:
            dtype = adapters.tensors["gate_lora_a"].dtype
            pointers = [adapters.tensors[name].ctypes.data for name in LORA_NAMES]
            self.sft.set_lora(DTYPE_CODES[dtype], *pointers)

    def forward(
        self,
        x: Array,
        ids: npt.NDArray[np.int64],
        weights: F32Array,
        policy: int = _native.POLICY_SAVE,
        dtype: np.dtype[np.generic] = F32,
    ) -> tuple[Array, Saved]:
        """Output, and what the backward needs."""
        x, ids, weights = (np.ascontiguousarray(array) for array in (x, ids, weights))
        adapters = self.adapters
        seed = None if adapters is None else adapters.seed
        context = _native.SftContext(self.sft, policy, seed is not None, seed or 0)
        count = np.array([x.shape[0]], np.int32)
        output = np.full((x.shape[0], self.layer.hidden_size), UNWRITTEN, dtype)
        context.forward(
            count.ctypes.data,
            ids.shape[1],
            ids.ctypes.data,
            weights.ctypes.data,
            x.ctypes.data or 64,
            DTYPE_CODES[x.dtype],
            output.ctypes.data or 64,
            DTYPE_CODES[output.dtype],
        )
        return output, Saved(self, context, x, ids)


@dataclasses.dataclass
class Saved:
    """A context, and the input that recomputation reads."""

    trainer: NativeTrainer
    context: _native.SftContext
    x: Array
    ids: npt.NDArray[np.int64]

    def backward(
        self,
        grad: Array,
        dtype: np.dtype[np.generic] = F32,
        lora: Mapping[str, Array] | None = None,
        base: Mapping[str, Array] | None = None,
        accumulate: bool = False,
    ) -> NativeGradients:
        """Gradients; those of adapters are made here if they are not given."""
        trainer = self.trainer
        grad = np.ascontiguousarray(grad)
        if lora is None:
            lora = {}
            if trainer.adapters is not None:
                tensors = trainer.adapters.tensors
                lora = {name: np.full(tensors[name].shape, UNWRITTEN, F32) for name in LORA_NAMES}
        grad_input = np.full(grad.shape, UNWRITTEN, dtype)
        grad_weights = np.full(self.ids.shape, UNWRITTEN, F32)
        keywords: dict[str, int | bool] = {"accumulate": accumulate}
        for name, tensor in lora.items():
            keywords[f"{name.replace('_lora', '')}_ptr"] = tensor.ctypes.data
            keywords["lora_dtype"] = DTYPE_CODES[tensor.dtype]
        for name, tensor in (base or {}).items():
            keywords[f"{name}_ptr"] = tensor.ctypes.data
            keywords["base_dtype"] = DTYPE_CODES[tensor.dtype]
        self.context.backward(
            grad.ctypes.data or 64,
            DTYPE_CODES[grad.dtype],
            grad_input.ctypes.data or 64,
            DTYPE_CODES[grad_input.dtype],
            grad_weights.ctypes.data or 64,
            **keywords,
        )
        return NativeGradients(grad_input, grad_weights, dict(lora), dict(base or {}))


def assert_within(
    name: str,
    actual: Array,
    expected: Bounded,
    dtype: np.dtype[np.generic] | None = None,
    previous: Array | None = None,
) -> None:
    """`actual` differs from `expected`, rounded to its type, by no more than the bound."""
    value = expected.value if previous is None else expected.value + previous.astype(np.float64)
    limit = tolerance(expected, dtype or actual.dtype, previous)
    difference = np.abs(actual.astype(np.float64) - value)
    bad = ~(difference <= limit)
    if bad.any():
        worst = np.unravel_index(np.nanargmax(np.where(bad, difference / limit, 0)), bad.shape)
        raise AssertionError(
            f"{name}: {bad.sum()} of {bad.size} values are off; at {worst} got {actual[worst]}, expected "
            f"{value[worst]} within {limit[worst]}"
        )


BF16_FORMAT = Format(_native.FORMAT_BF16)
SOME_FORMATS = (
    *(form for form in FORMATS if form.group in (0, 32) and not form.rotated),
    Format(_native.FORMAT_INT4, 128),
    Format(_native.FORMAT_FP8, 128),
    Format(_native.FORMAT_INT8, 512, rotated=True),
    Format(_native.FORMAT_INT4, 32, rotated=True),
)
PLAIN = Activation()


@dataclasses.dataclass(frozen=True)
class Case:
    """One forward and backward; what is left out is drawn from the seed."""

    form: Format = BF16_FORMAT
    isa: str | None = None
    rank: int = 8
    threads: tuple[int, ...] = (2,)
    policy: int = _native.POLICY_SAVE
    activation: Activation = PLAIN
    dropout: float = 0.0
    skip_lora: bool = False
    hidden: int = 96
    intermediate: int = 160
    experts: int = 4
    top_k: int = 2
    batch: int = 24
    routing: str = "mixed"
    adapter_dtype: np.dtype = BF16
    input_dtype: np.dtype = BF16
    output_dtype: np.dtype = F32
    base: bool = False
    seed: int = 0


def run(case: Case, policy: int | None = None) -> tuple[Array, NativeGradients, Trainer, tuple[Array, ...]]:
    """Output, gradients, the reference and its arguments (x, ids, weights, grad)."""
    rng = np.random.default_rng(case.seed)
    experts = [make_weights(rng, case.hidden, case.intermediate, biases=True) for _ in range(case.experts)]
    x = make_input(rng, case.batch, case.hidden, case.input_dtype)
    ids, weights = make_routing(rng, case.routing, case.batch, case.experts, case.top_k)
    grad = rng.standard_normal((case.batch, case.hidden)).astype(np.float32).astype(case.input_dtype)
    adapters: Adapters | None = None
    if case.rank:
        adapters = make_adapters(
            rng,
            case.experts,
            case.hidden,
            case.intermediate,
            case.rank,
            case.adapter_dtype,
            dropout=case.dropout,
            seed=case.seed if case.dropout else None,
        )
    base = None
    if case.base:
        inner, hidden = case.intermediate, case.hidden
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        base = {name: np.full((case.experts, *shape), UNWRITTEN, F32) for name, shape in shapes.items()}
    options = Options(isa=case.isa, activation=case.activation, max_tokens=max(case.batch, 1))
    with pool_of(*case.threads) as pool, NativeLayer(pool, experts, case.form, options) as layer:
        trainer = NativeTrainer(layer, adapters, case.skip_lora)
        output, saved = trainer.forward(
            x, ids, weights, case.policy if policy is None else policy, case.output_dtype
        )
        lora = {} if case.skip_lora else None
        gradients = saved.backward(grad, case.output_dtype, lora, base)
    used = None if case.skip_lora else adapters
    reference = Trainer(Layer(experts, case.form, case.activation), used)
    return output, gradients, reference, (x, ids, weights, grad)


def check(case: Case) -> None:
    output, gradients, reference, (x, ids, weights, grad) = run(case)
    shards = len(case.threads)
    assert_within("output", output, reference.forward(x, ids, weights, shards))
    expected = reference.backward(x, ids, weights, grad, shards, case.base)
    assert_within("grad_input", gradients.input, expected.input)
    assert_within("grad_expert_weights", gradients.weights, expected.weights)
    for name, value in expected.lora.items():
        assert_within(name, gradients.lora[name], value)
    for name, value in expected.base.items():
        assert_within(name, gradients.base[name], value)
