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
        Zero points, 0 for the symmetric formats.
    group : int
        Columns a scale covers, 0 for the whole row.
    """

    q: npt.NDArray[np.int16]
    scale: F32Array
    zero: npt.NDArray[np.int16]
    group: int

    def centred(self) -> npt.NDArray[np.int16]:
        """Integers with the zero point taken off, shape (rows, columns)."""
        out = self.q.copy()
        for index, columns in enumerate(groups_of(self.q.shape[1], self.group)):
            out[:, columns] -= self.zero[:, index : index + 1]
        return out

    def values(self) -> npt.NDArray[np.float64]:
        """Exact values that the integers stand for, shape (rows, columns)."""
        out = self.centred().astype(np.float64)
        for index, columns in enumerate(groups_of(self.q.shape[1], self.group)):
            out[:, columns] *= self.scale[:, index : index + 1].astype(np.float64)
        return out


def quantise_int8(weights: F32Array) -> QuantisedMatrix:
    """INT8 weights: one scale a row."""
    q, scale = quantise_symmetric8(weights)
    zero = np.zeros((weights.shape[0], 1), np.int16)
    return QuantisedMatrix(q.astype(np.int16), scale[:, None], zero, 0)


def _int4_symmetric_block(block: F32Array, per_row: bool) -> tuple[npt.NDArray[np.int16], F32Array]:
    """Quantise (rows, n) with one scale a row of the block."""
    magnitude = np.abs(block)
    extreme = np.take_along_axis(block, np.argmax(magnitude, axis=1)[:, None], axis=1)[:, 0]
    scale = extreme / np.float32(-8)
    if not per_row:
        scale = round_bf16(scale)
    usable = np.abs(extreme) >= TINY
    scale = np.where(usable, scale, np.float32(0))
    inverse = np.float32(1) / np.where(usable, scale, np.float32(1))
    q = np.clip(np.rint(block * inverse[:, None]), -8, 7)
    return np.where(usable[:, None], q, 0).astype(np.int16), scale.astype(np.float32)


def _int4_asymmetric_block(
    block: F32Array,
) -> tuple[npt.NDArray[np.int16], F32Array, npt.NDArray[np.int16]]:
    """Quantise (rows, n) with one scale and one zero point a row of the block."""
    low = np.minimum(np.float32(0), block.min(axis=1))
    high = np.maximum(np.float32(0), block.max(axis=1))
    with np.errstate(over="ignore"):
        spread = high - low
    usable = np.abs(block).max(axis=1) >= TINY
    scale = np.where(usable, round_bf16(spread / np.float32(15)), np.float32(0)).astype(np.float32)
    inverse = np.float32(1) / np.where(usable, scale, np.float32(1))
    zero = np.clip(np.rint(-low * inverse), 0, 15)
    q = np.clip(np.rint(block * inverse[:, None]) + zero[:, None], 0, 15)
    zero = np.where(usable, zero, 0).astype(np.int16)
    return np.where(usable[:, None], q, 0).astype(np.int16), scale, zero


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
        if asymmetric:
            q[:, part], scale[:, index], zero[:, index] = _int4_asymmetric_block(weights[:, part])
        else:
            q[:, part], scale[:, index] = _int4_symmetric_block(weights[:, part], group == 0)
    return QuantisedMatrix(q, scale, zero, group)
