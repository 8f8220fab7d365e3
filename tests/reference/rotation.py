"""The rotation of columns: blocks of 64 times the Hadamard matrix over 8, which is its own inverse."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .rounding import U32, F32Array, F64Array

#: Columns that a rotation mixes.
BLOCK = 64


def rotate(values: F32Array) -> F32Array:
    """Rows with each whole block of 64 columns rotated, in the very fp32 operations that layers promise.

    Parameters
    ----------
    values : ndarray of float32, shape (..., n)

    Returns
    -------
    ndarray of float32, shape (..., n)
        The last ``n % 64`` columns are those of `values`.
    """
    out = np.array(values, np.float32)
    blocks = out.shape[-1] // BLOCK
    whole = out[..., : blocks * BLOCK]
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        mixed = whole * np.float32(0.125)
        for distance in (1, 2, 4, 8, 16, 32):
            pairs = mixed.reshape(*out.shape[:-1], blocks * BLOCK // (2 * distance), 2, distance)
            low, high = pairs[..., 0, :], pairs[..., 1, :]
            mixed = np.stack([low + high, low - high], axis=-2)
    whole[...] = mixed.reshape(whole.shape)
    return out


def hadamard(size: int = BLOCK) -> npt.NDArray[np.float64]:
    """Sylvester's Hadamard matrix: 1 or -1 by the parity of the bits that row and column share."""
    index = np.arange(size)
    shared = index[:, None] & index[None, :]
    parity = np.array([int(bits).bit_count() % 2 for bits in shared.reshape(-1)])
    return np.where(parity, -1.0, 1.0).reshape(size, size)


def _in_blocks(values: F64Array) -> F64Array:
    """Whole blocks of the last axis, shape (..., blocks, 64)."""
    blocks = values.shape[-1] // BLOCK
    return values[..., : blocks * BLOCK].reshape(*values.shape[:-1], blocks, BLOCK)


def _with_blocks(values: F64Array, blocks: F64Array) -> F64Array:
    """`values` with other whole blocks."""
    whole = values.shape[-1] // BLOCK * BLOCK
    out = values.copy()
    out[..., :whole] = blocks.reshape(*values.shape[:-1], whole)
    return out


def rotated64(values: F64Array) -> F64Array:
    """`values` rotated along the last axis in float64."""
    return _with_blocks(values, _in_blocks(values) @ (hadamard() / 8))


def mean_of_blocks(values: F64Array) -> F64Array:
    """The mean of each whole block of 64 columns in its columns; the others as they are."""
    blocks = _in_blocks(values)
    return _with_blocks(values, np.broadcast_to(blocks.mean(axis=-1, keepdims=True), blocks.shape))


def rotate_with_bound(value: F64Array, error: F64Array) -> tuple[F64Array, F64Array]:
    """Rotated float64 values, and how far fp32 operations on numbers within `error` of `value` may be off.

    Each of the six additions that lead to a result rounds a sum of some of the block, so that all of them
    together are off by no more than six units of the sum of all magnitudes, over 8.
    """
    carried = _in_blocks(error).sum(axis=-1, keepdims=True) / 8
    magnitude = _in_blocks(np.abs(value)).sum(axis=-1, keepdims=True) / 8 + carried
    off = carried + 6 * U32 * (1 + 8 * U32) * magnitude + BLOCK * 2.0**-149
    return rotated64(value), _with_blocks(error, np.broadcast_to(off, _in_blocks(error).shape))
