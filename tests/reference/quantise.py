"""Scale rules of the quantised formats.

Every rule works on the last axis and is written in the very fp32 operations that the formats promise; a value
is one NumPy float32 operation away from its neighbours wherever a rounding is meant.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from .rounding import F32Array, round_bf16

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
        Stored integers without their storage offset: -127 .. 127 (INT8), -8 .. 7 (INT4 symmetric),
        0 .. 15 (INT4 asymmetric).
    scale : ndarray of float32, shape (rows, groups)
    zero : ndarray of int16, shape (rows, groups)
        Zero points in sixteenths, 0 for the symmetric formats.
    group : int
        Columns a scale covers, 0 for the whole row.
    """

    q: npt.NDArray[np.int16]
    scale: F32Array
    zero: npt.NDArray[np.int16]
    group: int

    def centred(self) -> npt.NDArray[np.float64]:
        """Integers with the zero point taken off, exact, shape (rows, columns)."""
        out = self.q.astype(np.float64)
        for index, columns in enumerate(groups_of(self.q.shape[1], self.group)):
            out[:, columns] -= self.zero[:, index : index + 1] / 16
        return out

    def values(self) -> npt.NDArray[np.float64]:
        """Exact values that the integers stand for, shape (rows, columns)."""
        out = self.centred()
        for index, columns in enumerate(groups_of(self.q.shape[1], self.group)):
            out[:, columns] *= self.scale[:, index : index + 1].astype(np.float64)
        return out


def quantise_int8(weights: F32Array, group: int) -> QuantisedMatrix:
    """INT8 weights: bf16 scales for groups of `group` columns, or one fp32 scale a row when `group` is 0."""
    rows, columns = weights.shape
    zero = np.zeros((rows, len(groups_of(columns, group))), np.int16)
    if group == 0:
        q, scale = quantise_symmetric8(weights)
        return QuantisedMatrix(q.astype(np.int16), scale[:, None], zero, 0)
    whole = np.zeros((rows, columns), np.int16)
    scales = np.zeros(zero.shape, np.float32)
    for index, part in enumerate(groups_of(columns, group)):
        scale = round_bf16(quantise_symmetric8(weights[:, part])[1])
        scaled = weights[:, part] * _inverse(scale)[:, None]
        whole[:, part] = np.clip(np.rint(scaled), -127, 127).astype(np.int16)
        scales[:, index] = scale
    return QuantisedMatrix(whole, scales, zero, group)


def _inverse(scale: F32Array) -> F32Array:
    """1 / scale in fp32, and 0 for 0."""
    return np.where(scale == 0, np.float32(0), np.float32(1) / np.where(scale == 0, np.float32(1), scale))


def _codes(block: F32Array, scale: F32Array, zero: F32Array, lowest: int) -> F32Array:
    """Codes lowest .. lowest + 15 of (rows, n); `zero` in sixteenths."""
    scaled = block * _inverse(scale)[:, None] + (zero * np.float32(0.0625))[:, None]
    return np.rint(np.clip(scaled, np.float32(lowest), np.float32(lowest + 15))).astype(np.float32)


def _zero_point(level: F32Array, value: F32Array, inverse: F32Array) -> F32Array:
    """Sixteenths, 0 .. 240, that put code `level` at `value`."""
    return np.clip(np.rint((level - value * inverse) * np.float32(16)), 0, 240).astype(np.float32)


def _summed(values: F32Array) -> F32Array:
    """Sum over the last axis, in fp32 and in ascending order."""
    total = np.zeros(values.shape[0], np.float32)
    for column in range(values.shape[1]):
        total = total + values[:, column]
    return total


def _fit_int4_group(
    block: F32Array, group: int, asymmetric: bool
) -> tuple[npt.NDArray[np.int16], F32Array, npt.NDArray[np.int16]]:
    """Codes, scale and zero point (rows, n), (rows,), (rows,) by alternating least squares."""
    count = np.float32(block.shape[1])
    lowest = 0 if asymmetric else -8
    low = np.minimum(block.min(axis=1), np.float32(0))
    high = np.maximum(block.max(axis=1), np.float32(0))
    extreme = np.where(high > -low, high, low)
    with np.errstate(all="ignore"):
        spread = (high - low) / np.float32(15) if asymmetric else extreme / np.float32(-8)
        start = spread * np.float32(1 if group == 32 else 0.953125)
        start = np.where(np.abs(extreme) < TINY, np.float32(0), start).astype(np.float32)
        scale = round_bf16(start)
        zero = np.zeros_like(scale)
        if asymmetric:
            middle = (low + high) * np.float32(0.5)
            zero = np.where(scale == 0, zero, _zero_point(np.float32(7.5), middle, _inverse(scale)))
        value_sum = _summed(block)
        for _ in range(3):
            q = _codes(block, scale, zero, lowest)
            codes, squares, products = _summed(q), _summed(q * q), _summed(block * q)
            if asymmetric:
                covariance = count * products - codes * value_sum
                variance = count * squares - codes * codes
            else:
                covariance, variance = products, squares
            fitted = np.where(variance > 0, covariance / np.where(variance > 0, variance, 1), 0)
            fitted = round_bf16(fitted.astype(np.float32))
            ratio = fitted * _inverse(scale)
            sound = (ratio > 0.25) & (ratio < 4)
            scale = np.where(sound, fitted, scale)
            if asymmetric:
                moved = _zero_point(codes / count, value_sum / count, _inverse(scale))
                zero = np.where(sound, moved, zero)
    return _codes(block, scale, zero, lowest).astype(np.int16), scale, zero.astype(np.int16)


def _int4_rows(block: F32Array) -> tuple[npt.NDArray[np.int16], F32Array]:
    """Quantise with one fp32 scale a row."""
    extreme = np.take_along_axis(block, np.argmax(np.abs(block), axis=1)[:, None], axis=1)[:, 0]
    scale = np.where(np.abs(extreme) >= TINY, extreme / np.float32(-8), np.float32(0)).astype(np.float32)
    return _codes(block, scale, np.zeros_like(scale), -8).astype(np.int16), scale


def quantise_int4(weights: F32Array, group: int, asymmetric: bool) -> QuantisedMatrix:
    """INT4 weights: bf16 scales for groups of `group` columns, or one fp32 scale a row when `group` is 0."""
    if asymmetric and group == 0:
        raise ValueError("asymmetric INT4 needs groups")
    rows, columns = weights.shape
    slices = groups_of(columns, group)
    q = np.zeros((rows, columns), np.int16)
    scale = np.zeros((rows, len(slices)), np.float32)
    zero = np.zeros((rows, len(slices)), np.int16)
    for index, part in enumerate(slices):
        if group == 0:
            q[:, part], scale[:, index] = _int4_rows(weights[:, part])
        else:
            block = weights[:, part]
            q[:, part], scale[:, index], zero[:, index] = _fit_int4_group(block, group, asymmetric)
    return QuantisedMatrix(q, scale, zero, group)


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
