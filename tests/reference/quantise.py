"""Scale rules of the quantised formats.

Every rule works on the last axis and is written in the very fp32 operations that the formats promise; a value
is one NumPy float32 operation away from its neighbours wherever a rounding is meant.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from .rounding import F32Array, fma32, round_bf16

#: Largest magnitude below which a group counts as all zero.
TINY = np.float32(2.0**-100)

I8Array = npt.NDArray[np.int8]


def groups_of(length: int, group: int) -> list[slice]:
    """Slices of `group` elements over `length`, the last one possibly short; 0 means one slice over all."""
    step = group if group > 0 else length
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def quantise_symmetric8(values: F32Array) -> tuple[I8Array, F32Array]:
    """Quantise each row to -127 .. 127 with the scale amax / 127.

    Parameters
    ----------
    values : ndarray of float32, shape (..., n)

    Returns
    -------
    q : ndarray of int8, shape (..., n)
    scale : ndarray of float32, shape (...)
        NaN (and q 0) where a value of the row is not finite; 0 (and q 0) where all magnitudes are below
        2**-100.
    """
    with np.errstate(all="ignore"):
        amax = np.max(np.abs(values), axis=-1)
        finite = np.isfinite(amax)
        usable = finite & (amax >= TINY)
        inverse = np.float32(127) / np.where(usable, amax, np.float32(1))
        scaled = np.where(usable[..., None], values, np.float32(0)) * inverse[..., None]
        scale = np.where(usable, amax / np.float32(127), np.float32(0))
        scale = np.where(finite, scale, np.float32(np.nan))
    return np.rint(scaled).astype(np.int8), scale.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class QuantisedMatrix:
    """A weight matrix after quantisation.

    Attributes
    ----------
    q : ndarray of int16, shape (rows, columns)
        The integers that scales multiply: -127 .. 127 (INT8), -128 .. 127 (INT4).
    scale : ndarray of float32, shape (rows, groups)
    group : int
        Columns a scale covers, 0 for the whole row.
    codes : ndarray of uint8, shape (rows, columns), optional
        INT4: what is stored for `q`, 0 .. 15.
    factors : ndarray of uint8, shape (rows, groups of factors, 2), optional
        INT4 with groups: multiplier and offset, ``q = multiplier * code + offset - 128``.
    """

    q: npt.NDArray[np.int16]
    scale: F32Array
    group: int
    codes: npt.NDArray[np.uint8] | None = None
    factors: npt.NDArray[np.uint8] | None = None

    def values(self) -> npt.NDArray[np.float64]:
        """Exact values that the integers stand for, shape (rows, columns)."""
        out = self.q.astype(np.float64)
        for index, columns in enumerate(groups_of(self.q.shape[1], self.group)):
            out[:, columns] *= self.scale[:, index : index + 1].astype(np.float64)
        return out


def quantise_int8(weights: F32Array, group: int) -> QuantisedMatrix:
    """INT8 weights: bf16 scales for groups of `group` columns, or one fp32 scale a row when `group` is 0."""
    rows, columns = weights.shape
    if group == 0:
        q, scale = quantise_symmetric8(weights)
        return QuantisedMatrix(q.astype(np.int16), scale[:, None], 0)
    whole = np.zeros((rows, columns), np.int16)
    scales = np.zeros((rows, len(groups_of(columns, group))), np.float32)
    for index, part in enumerate(groups_of(columns, group)):
        scale = round_bf16(quantise_symmetric8(weights[:, part])[1])
        scaled = weights[:, part] * _inverse(scale)[:, None]
        whole[:, part] = np.clip(np.rint(scaled), -127, 127).astype(np.int16)
        scales[:, index] = scale
    return QuantisedMatrix(whole, scales, group)


def _inverse(scale: F32Array) -> F32Array:
    """1 / scale in fp32, and 0 for 0."""
    return np.where(scale == 0, np.float32(0), np.float32(1) / np.where(scale == 0, np.float32(1), scale))


def int4_codes(values: F32Array, multiplier: F32Array, offset: F32Array) -> tuple[F32Array, F32Array]:
    """Codes 0 .. 15 of (rows, n) in units of the row's scale, and how far each is off."""
    above = values - offset[:, None]
    scaled = above * (np.float32(1) / multiplier)[:, None]
    codes = np.rint(np.clip(scaled, np.float32(0), np.float32(15)))
    return codes, above - multiplier[:, None] * codes


def _fit_int4_group(values: F32Array) -> tuple[F32Array, F32Array]:
    """Multiplier 1 .. 15 and offset -128 .. 127 of each row, by search; `values` in units of its scale."""
    low = np.minimum(values.min(axis=1), np.float32(0))
    high = np.maximum(values.max(axis=1), np.float32(0))
    best = [np.zeros_like(low), np.zeros_like(low), np.full_like(low, np.inf)]

    def keep_better(multiplier: F32Array, offset: F32Array) -> None:
        offset = np.clip(offset, np.float32(-128), np.float32(127) - np.float32(15) * multiplier)
        error = np.zeros_like(low)
        for column in int4_codes(values, multiplier, offset)[1].T:
            error = fma32(column, column, error)
        better = error < best[2]
        for kept, tried in zip(best, (multiplier, offset, error), strict=True):
            kept[better] = tried[better]

    span = np.rint((high - low) * (np.float32(1) / np.float32(15)))
    for less in (0, 1):
        multiplier = np.clip(span - np.float32(less), np.float32(1), np.float32(15))
        middle = np.rint((low + high) * np.float32(0.5) - np.float32(7.5) * multiplier)
        for move in (0, -3, 3):
            keep_better(multiplier, middle + np.float32(move))
    multiplier, middle = best[0].copy(), best[1].copy()
    for move in (-1, 1):
        keep_better(multiplier, middle + np.float32(move))
    return best[0], best[1]


def _int4_row_scales(weights: F32Array, group: int) -> F32Array:
    """Scales under which the widest group spans 15 multipliers and the largest weight fits a byte."""
    widest = np.zeros(weights.shape[0], np.float32)
    for part in groups_of(weights.shape[1], group):
        block = weights[:, part]
        low = np.minimum(block.min(axis=1), np.float32(0))
        widest = np.maximum(widest, np.maximum(block.max(axis=1), np.float32(0)) - low)
    largest = quantise_symmetric8(weights)[1]
    steps = widest * (np.float32(1) / np.float32(225))
    return np.where(largest == 0, np.float32(0), np.maximum(steps, largest))


def quantise_int4(weights: F32Array, group: int) -> QuantisedMatrix:
    """INT4 weights: one fp32 scale a row, and for groups of `group` columns integer factors under it."""
    rows, columns = weights.shape
    slices = groups_of(columns, group)
    multiplier = np.ones((rows, len(slices)), np.float32)
    offset = np.full((rows, len(slices)), -8, np.float32)
    codes = np.zeros((rows, columns), np.uint8)
    q = np.zeros((rows, columns), np.int16)
    if group == 0:
        extreme = np.take_along_axis(weights, np.argmax(np.abs(weights), axis=1)[:, None], axis=1)[:, 0]
        scale = np.where(np.abs(extreme) >= TINY, extreme / np.float32(-8), np.float32(0)).astype(np.float32)
    else:
        scale = _int4_row_scales(weights, group)
    values = weights * _inverse(scale)[:, None]
    for index, part in enumerate(slices):
        if group > 0:
            multiplier[:, index], offset[:, index] = _fit_int4_group(values[:, part])
        of_part, _ = int4_codes(values[:, part], multiplier[:, index], offset[:, index])
        codes[:, part] = of_part.astype(np.uint8)
        q[:, part] = (multiplier[:, [index]] * of_part + offset[:, [index]]).astype(np.int16)
    factors = np.stack([multiplier, offset + 128], axis=2).astype(np.uint8) if group else None
    return QuantisedMatrix(q, scale[:, None], 0, codes, factors)


@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A weight matrix in e4m3 with scales along its rows.

    Attributes
    ----------
    codes : ndarray of uint8, shape (rows, columns)
    scale : ndarray of float32, shape (rows, ceil(columns / 128))
    """

    codes: npt.NDArray[np.uint8]
    scale: F32Array

    def values(self) -> F32Array:
        """The weights that they stand for: code times scale, rounded to bf16 and kept as fp32."""
        out = e4m3_values(self.codes)
        for index, columns in enumerate(groups_of(self.codes.shape[1], 128)):
            out[:, columns] *= self.scale[:, index : index + 1]
        return round_bf16(out)


def e4m3_values(codes: npt.NDArray[np.uint8]) -> F32Array:
    """Values of finite e4m3 codes: a sign, 4 bits of exponent with a bias of 7, 3 of mantissa."""
    exponent, mantissa = (codes >> 3) & 15, (codes & 7) / 8.0
    magnitude = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


def e4m3_codes(values: F32Array) -> npt.NDArray[np.uint8]:
    """Nearest e4m3 codes, ties to the even one, of values within plus or minus 448."""
    finite = e4m3_values(np.arange(127, dtype=np.uint8)).astype(np.float64)
    magnitude = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(finite, magnitude), 1, 126)
    low, high = magnitude - finite[above - 1], finite[above] - magnitude
    up = (low > high) | ((low == high) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    return (code | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def quantise_fp8(weights: F32Array) -> BlockScaled:
    """e4m3 weights with an fp32 scale, amax / 448, for every 128 columns of a row."""
    slices = groups_of(weights.shape[1], 128)
    codes = np.zeros(weights.shape, np.uint8)
    scale = np.zeros((weights.shape[0], len(slices)), np.float32)
    largest = np.float32(448)
    for index, part in enumerate(slices):
        amax = np.abs(weights[:, part]).max(axis=1)
        usable = amax >= TINY
        divisor = np.where(usable, amax, np.float32(1))
        scale[:, index] = np.where(usable, amax / largest, np.float32(0))
        inverse = np.where(usable, largest / divisor, np.float32(0))
        codes[:, part] = e4m3_codes(np.clip(weights[:, part] * inverse[:, None], -largest, largest))
    return BlockScaled(codes, scale)
