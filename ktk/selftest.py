"""Self-test of the installed library: every weight format on one instruction set, against NumPy.

The reference computes in float64 from operands that are quantised as `docs/numerics.md` says, so what is left
between it and the library is the rounding of sums and of the exponential. It is for finding out whether an
installation computes correctly; the test suite's oracle goes much deeper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ktk import _native

__all__ = ["Case", "Outcome", "run"]

F32 = npt.NDArray[np.float32]

# One intermediate element that falls to the other side of a rounding step moves an output by about 1e-3 of
# the largest one; a wrong lane, scale or tail moves it by more than 1e-1.
TOLERANCE = 4e-3
# Sizes that are no multiple of any block, and row counts on both sides of every kernel's threshold.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 84, 148, 4, 2
TOKENS = (1, 3, 70)
ACTIVATION_GROUP = 128


@dataclass(frozen=True)
class Case:
    """One weight format; `group_size` and `asymmetric` as in the layer's configuration."""

    name: str
    format: int
    group_size: int = 0
    asymmetric: bool = False


CASES = (
    Case("bf16", _native.FORMAT_BF16),
    Case("int8", _native.FORMAT_INT8),
    Case("int4 row", _native.FORMAT_INT4),
    Case("int4 g32", _native.FORMAT_INT4, 32),
    Case("int4 g32 asym", _native.FORMAT_INT4, 32, True),
)


@dataclass(frozen=True)
class Outcome:
    """Result of one case: largest error relative to the largest output, and the output for comparisons."""

    case: Case
    error: float
    passed: bool
    output: F32


def to_bf16(x: F32) -> F32:
    """Round to bfloat16, nearest even, keeping float32 storage. NaN is not expected."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    values: F32 = rounded.view(np.float32)
    return values


def round_trip_int8(x: F32, group: int) -> F32:
    """Quantise to int8 with one scale per `group` elements of the last axis, and back."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], group):
        part = x[..., start : start + group]
        amax = np.abs(part).max(-1, keepdims=True)
        scale = (amax / np.float32(127)).astype(np.float32)
        inverse = np.divide(np.float32(127), amax, where=amax > 0, out=np.zeros_like(amax))
        out[..., start : start + group] = np.rint(part * inverse) * scale
    return out


def round_trip_int4(w: F32, group: int, asymmetric: bool) -> F32:
    """Quantise to int4 with one scale per `group` columns (0: per row), and back."""
    out = np.empty_like(w)
    step = group or w.shape[-1]
    for start in range(0, w.shape[-1], step):
        part = w[..., start : start + step]
        if asymmetric:
            low = np.minimum(part.min(-1, keepdims=True), np.float32(0))
            high = np.maximum(part.max(-1, keepdims=True), np.float32(0))
            scale = to_bf16((high - low) / np.float32(15))
            inverse = (np.float32(1) / scale).astype(np.float32)
            zero = np.clip(np.rint(-low * inverse), 0, 15)
            quantised = np.clip(np.rint(part * inverse) + zero, 0, 15) - zero
        else:
            at = np.abs(part).argmax(-1)[..., None]
            scale = (np.take_along_axis(part, at, -1) / np.float32(-8)).astype(np.float32)
            if group:
                scale = to_bf16(scale)
            quantised = np.clip(np.rint(part * (np.float32(1) / scale).astype(np.float32)), -8, 7)
        out[..., start : start + step] = quantised * scale
    return out


def weights(case: Case, w: F32) -> F32:
    """Return the values that the packed form of `w` stands for."""
    if case.format == _native.FORMAT_BF16:
        return to_bf16(w)
    if case.format == _native.FORMAT_INT8:
        return round_trip_int8(w, w.shape[-1])
    return round_trip_int4(w, case.group_size, case.asymmetric)


def reference(
    case: Case, x: F32, ids: npt.NDArray[np.int64], route: F32, gate: F32, up: F32, down: F32
) -> F32:
    """Forward of a layer in float64: x [B, H], ids, route [B, k], gate, up [E, I, H], down [E, H, I]."""
    float_format = case.format == _native.FORMAT_BF16
    x = to_bf16(x) if float_format else round_trip_int8(x, x.shape[-1])
    y = np.zeros(x.shape, np.float64)
    for expert in range(gate.shape[0]):
        tokens, slots = np.nonzero(ids == expert)
        rows = x[tokens].astype(np.float64)
        g = rows @ weights(case, gate[expert]).astype(np.float64).T
        u = rows @ weights(case, up[expert]).astype(np.float64).T
        z = (g / (1 + np.exp(-g)) * u).astype(np.float32)
        z = to_bf16(z) if float_format else round_trip_int8(z, ACTIVATION_GROUP)
        out = z.astype(np.float64) @ weights(case, down[expert]).astype(np.float64).T
        np.add.at(y, tokens, route[tokens, slots, None] * out)
    return y.astype(np.float32)


def run(isa: str) -> list[Outcome]:
    """Run every case on one instruction set.

    Parameters
    ----------
    isa : str
        Name of a runnable instruction set.

    Returns
    -------
    list of Outcome
        One for each case, over all batch sizes; `output` is the concatenated fp32 output.

    Raises
    ------
    KtkUnsupportedError
        This CPU or build cannot run `isa`.
    """
    random = np.random.default_rng(20)
    gate, up = (random.normal(0, 0.3, (EXPERTS, INTERMEDIATE, HIDDEN)).astype(np.float32) for _ in range(2))
    down = random.normal(0, 0.3, (EXPERTS, HIDDEN, INTERMEDIATE)).astype(np.float32)
    batches = []
    for tokens in TOKENS:
        x = random.normal(0, 1, (tokens, HIDDEN)).astype(np.float32)
        ids = np.array([random.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)], np.int64)
        batches.append((x, ids, random.uniform(0.2, 1, (tokens, TOP_K)).astype(np.float32)))

    outcomes = []
    with _native.Pool([2], bind_threads=False) as pool:
        for case in CASES:
            layer = _native.Moe(
                pool,
                num_experts=EXPERTS,
                top_k=TOP_K,
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                max_tokens=max(TOKENS),
                format=case.format,
                group_size=case.group_size,
                asymmetric=case.asymmetric,
                isa=isa,
            )
            with layer:
                for expert in range(EXPERTS):
                    pointers: list[Any] = [w[expert].ctypes.data for w in (gate, up, down)]
                    layer.pack_expert(expert, _native.DTYPE_F32, *pointers)
                got, expected = [], []
                for x, ids, route in batches:
                    out = np.full(x.shape, np.nan, np.float32)
                    rows = np.array([len(x)], np.int32)
                    layer.forward(
                        rows.ctypes.data,
                        TOP_K,
                        ids.ctypes.data,
                        route.ctypes.data,
                        x.ctypes.data,
                        _native.DTYPE_F32,
                        out.ctypes.data,
                        _native.DTYPE_F32,
                    )
                    got.append(out)
                    expected.append(reference(case, x, ids, route, gate, up, down))
            output, wanted = np.concatenate(got), np.concatenate(expected)
            error = float(np.abs(output - wanted).max() / np.abs(wanted).max())
            outcomes.append(Outcome(case, error, error <= TOLERANCE, output))
    return outcomes
