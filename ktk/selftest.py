"""Self-test of the installed library: every weight format on one instruction set, against NumPy.

The reference reads the packed weights back, holds them against the ones they were made from, and computes in
float64 from them and from activations quantised as `docs/numerics.md` says, so that what is left between it
and the library is the rounding of sums and of the exponential. It is for finding out whether an installation
computes correctly; the test suite's oracle goes much deeper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ktk import _native
from ktk.config import INTERMEDIATE_GROUP, ROTATED_INTERMEDIATE_GROUP

__all__ = ["Case", "Outcome", "run"]

F32 = npt.NDArray[np.float32]

# One intermediate element that falls to the other side of a rounding step moves an output by about 1e-3 of
# the largest one; a wrong lane, scale or tail moves it by more than 1e-1.
TOLERANCE = 4e-3
# Sizes that are no multiple of any block, and row counts on both sides of every kernel's threshold.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 84, 148, 4, 2
TOKENS = (1, 3, 70)
ROTATION = 64


@dataclass(frozen=True)
class Case:
    """One weight format; `group_size` and `rotated` as in the layer's configuration."""

    name: str
    format: int
    group_size: int = 0
    rotated: bool = False

    @property
    def intermediate_group(self) -> int:
        """Columns of the intermediate that share a scale."""
        return ROTATED_INTERMEDIATE_GROUP if self.rotated else INTERMEDIATE_GROUP

    def rows(self, x: F32) -> F32:
        """Rows of a matrix or of activations as they are quantised."""
        return rotate(x) if self.rotated else x


CASES = (
    Case("bf16", _native.FORMAT_BF16),
    Case("int8 row", _native.FORMAT_INT8),
    Case("int8 g128", _native.FORMAT_INT8, 128),
    Case("int8 g512 rotated", _native.FORMAT_INT8, 512, rotated=True),
    Case("int4 row", _native.FORMAT_INT4),
    Case("int4 g32", _native.FORMAT_INT4, 32),
    Case("int4 g128", _native.FORMAT_INT4, 128),
    Case("int4 g32 rotated", _native.FORMAT_INT4, 32, rotated=True),
    Case("fp8", _native.FORMAT_FP8, 128),
)
# Largest relative L2 distance of the packed weights, Gaussian, from the ones they were made from.
PACKING_ERROR = {"bf16": 0.002, "int8 row": 0.01, "int8 g128": 0.01, "int4 row": 0.15, "int4 g32": 0.09}
PACKING_ERROR |= {"int4 g128": 0.1, "fp8": 0.03, "int8 g512 rotated": 0.01, "int4 g32 rotated": 0.09}
FLOAT_FORMATS = (_native.FORMAT_BF16, _native.FORMAT_FP8)


@dataclass(frozen=True)
class Outcome:
    """Result of one case: largest error relative to the largest output, and the output for comparisons.

    It passed when that error is small, and when the packed weights are near the ones they were made from.
    """

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


def rotate(x: F32) -> F32:
    """Each whole block of 64 columns times the Hadamard matrix over 8."""
    out: F32 = x.copy()
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < ROTATION:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    for start in range(0, x.shape[-1] - ROTATION + 1, ROTATION):
        columns = slice(start, start + ROTATION)
        out[..., columns] = x[..., columns] @ (matrix / np.float32(8))
    return out


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


def unpack(tiles: npt.NDArray[np.uint8], bits: int, rows: int, columns: int) -> npt.NDArray[np.integer[Any]]:
    """Stored weights of one projection, [rows, columns], from its tiles of 16, 8 or 4 bits a weight."""
    panels = -(-rows // 16)
    flat = tiles.reshape(panels, -1)
    if bits == 4:
        halves = flat.reshape(panels, -1, 8, 16, 4)
        values = np.stack([halves & 15, halves >> 4], axis=2)  # [panel, step, half, quad, neuron, 4]
        ordered = values.transpose(0, 4, 1, 2, 3, 5)
    else:
        values = flat.view(np.uint16 if bits == 16 else np.uint8).reshape(panels, -1, 16, 32 // bits)
        ordered = values.transpose(0, 2, 1, 3)
    return np.ascontiguousarray(ordered).reshape(panels * 16, -1)[:rows, :columns]


def stored_weights(layer: _native.Moe, case: Case, expert: int) -> tuple[F32, F32, F32]:
    """Read gate, up and down of a packed expert back, as the values that they stand for: in a rotated case of
    rotated columns."""

    def part(code: int) -> npt.NDArray[np.uint8]:
        buffer = np.empty(layer.part_bytes(code), np.uint8)
        layer.export_part(expert, code, buffer.ctypes.data, buffer.nbytes)
        return buffer

    def values(
        weight: npt.NDArray[np.uint8],
        scale: npt.NDArray[np.uint8],
        factors: npt.NDArray[np.uint8],
        rows: int,
        columns: int,
        group: int,
    ) -> F32:
        bits = {_native.FORMAT_BF16: 16, _native.FORMAT_INT4: 4}.get(case.format, 8)
        stored = unpack(weight, bits, rows, columns)
        if bits == 16:
            wide: F32 = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return wide
        group = group or columns
        of_column = np.arange(columns) // group

        def by_weight(packed: npt.NDArray[np.generic]) -> F32:  # [panel, group, 16] to [rows, columns]
            expanded = packed.reshape(-1, -(-columns // group), 16).transpose(0, 2, 1)
            spread: F32 = expanded.reshape(-1, expanded.shape[2])[:rows, of_column].astype(np.float32)
            return spread

        if case.format == _native.FORMAT_FP8:
            exponent, mantissa = (stored >> 3) & 15, (stored & 7).astype(np.float32)
            normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
            magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), normal)
            signed = np.where(stored >> 7, -magnitude, magnitude).astype(np.float32)
            return to_bf16(signed * by_weight(scale.view(np.float32)))
        if factors.size:  # [panel, group, 2: multiplier, offset, 16]
            multiplier, offset = (factors.reshape(-1, 2, 16)[:, i].reshape(-1) for i in (0, 1))
            of_row = scale.view(np.float32).reshape(-1)[:rows, None]
            scaled: F32 = (by_weight(multiplier) * stored + by_weight(offset) - 128) * of_row
            return scaled
        if case.group_size:
            scale = (scale.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.uint8)
        result: F32 = (stored - np.float32(2 ** (bits - 1))) * by_weight(scale.view(np.float32))
        return result

    def halves(code: int, unit: int) -> list[npt.NDArray[np.uint8]]:  # gate and up alternate
        packed = part(code)
        pairs = packed.reshape(-1, 2, unit) if packed.size else packed.reshape(0, 2, unit)
        return [np.ascontiguousarray(pairs[:, which]).reshape(-1) for which in (0, 1)]

    tile_bytes = 512 if case.format in (_native.FORMAT_INT4, _native.FORMAT_FP8) else 1024
    scale_bytes = 2 if case.group_size and case.format == _native.FORMAT_INT8 else 4
    weight = halves(_native.PART_GATE_UP_WEIGHT, tile_bytes)
    scale = halves(_native.PART_GATE_UP_SCALE, 16 * scale_bytes)
    factors = halves(_native.PART_GATE_UP_FACTORS, 32)
    gate, up = (
        values(weight[i], scale[i], factors[i], INTERMEDIATE, HIDDEN, case.group_size) for i in (0, 1)
    )
    down = (
        part(_native.PART_DOWN_WEIGHT),
        part(_native.PART_DOWN_SCALE),
        part(_native.PART_DOWN_FACTORS),
    )
    group = min(case.group_size, case.intermediate_group)
    return gate, up, values(*down, HIDDEN, INTERMEDIATE, group)


def reference(
    case: Case, x: F32, ids: npt.NDArray[np.int64], route: F32, experts: list[tuple[F32, F32, F32]]
) -> F32:
    """Forward of a layer in float64: x [B, H], ids, route [B, k], experts (gate, up [I, H], down [H, I]) as
    `stored_weights` returns them."""
    float_format = case.format in FLOAT_FORMATS
    grouped = case.group_size and case.format == _native.FORMAT_INT8
    input_group = max(case.group_size, INTERMEDIATE_GROUP) if grouped else x.shape[-1]
    x = to_bf16(x) if float_format else round_trip_int8(case.rows(x), input_group)
    y = np.zeros(x.shape, np.float64)
    for expert, (gate, up, down) in enumerate(experts):
        tokens, slots = np.nonzero(ids == expert)
        rows = x[tokens].astype(np.float64)
        g = rows @ gate.astype(np.float64).T
        u = rows @ up.astype(np.float64).T
        z = (g / (1 + np.exp(-g)) * u).astype(np.float32)
        z = to_bf16(z) if float_format else round_trip_int8(case.rows(z), case.intermediate_group)
        np.add.at(y, tokens, route[tokens, slots, None] * (z.astype(np.float64) @ down.astype(np.float64).T))
    return y.astype(np.float32)


def packing_error(stored: list[tuple[F32, F32, F32]], given: list[tuple[F32, F32, F32]]) -> float:
    """Relative L2 distance, the largest of all matrices."""
    return max(
        float(np.linalg.norm(s - w) / np.linalg.norm(w))
        for expert, originals in zip(stored, given, strict=True)
        for s, w in zip(expert, originals, strict=True)
    )


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
                isa=isa,
                rotated=case.rotated,
            )
            with layer:
                for expert in range(EXPERTS):
                    pointers: list[Any] = [w[expert].ctypes.data for w in (gate, up, down)]
                    layer.pack_expert(expert, _native.DTYPE_F32, *pointers)
                given = [(case.rows(gate[e]), case.rows(up[e]), case.rows(down[e])) for e in range(EXPERTS)]
                experts = [stored_weights(layer, case, expert) for expert in range(EXPERTS)]
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
                    expected.append(reference(case, x, ids, route, experts))
            output, wanted = np.concatenate(got), np.concatenate(expected)
            error = float(np.abs(output - wanted).max() / np.abs(wanted).max())
            packed = packing_error(experts, given) <= PACKING_ERROR[case.name]
            outcomes.append(Outcome(case, error, packed and error <= TOLERANCE, output))
    return outcomes
