"""Rounding primitives; all of them round to nearest, ties to even."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)

Array = npt.NDArray[np.generic]
F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]

#: Unit roundoff of fp32: a correctly rounded operation has a relative error of at most this.
U32 = 2.0**-24

_SIGNIFICAND_BITS = {F32: 24, BF16: 8, F16: 11}
_MIN_EXPONENT = {F32: -126, BF16: -126, F16: -14}
_LARGEST = {F32: (2.0 - 2.0**-23) * 2.0**127, BF16: (2.0 - 2.0**-7) * 2.0**127, F16: 65504.0}


def ulp(values: npt.ArrayLike, dtype: np.dtype[np.generic]) -> F64Array:
    """Distance between neighbouring numbers of `dtype` around each value.

    Parameters
    ----------
    values : array_like
        Finite numbers.
    dtype : numpy.dtype
        F32, BF16 or F16.

    Returns
    -------
    ndarray of float64
        Same shape as `values`; for subnormal values the spacing of the subnormals.
    """
    magnitude = np.abs(np.asarray(values, np.float64))
    exponent = np.frexp(np.where(magnitude == 0, 1.0, magnitude))[1] - 1
    exponent = np.where(magnitude == 0, _MIN_EXPONENT[dtype], exponent)
    exponent = np.maximum(exponent, _MIN_EXPONENT[dtype])
    return np.asarray(np.ldexp(1.0, exponent - (_SIGNIFICAND_BITS[dtype] - 1)), np.float64)


def round_to(values: npt.ArrayLike, dtype: np.dtype[np.generic]) -> F64Array:
    """Round float64 values once to the grid of `dtype`, keeping float64 as the container.

    Values past the largest finite number by half a step or more become infinite. NaN and infinities pass.
    """
    with np.errstate(invalid="ignore"):
        exact = np.asarray(values, np.float64)
    finite = np.isfinite(exact)
    safe = np.where(finite, exact, 0.0)
    step = ulp(safe, dtype)
    rounded = np.rint(safe / step) * step
    rounded = np.where(np.abs(rounded) > _LARGEST[dtype], np.copysign(np.inf, safe), rounded)
    return np.where(finite, rounded, exact)


def to_f32(values: Array) -> F32Array:
    """Read fp32, bf16 or f16 values as fp32, which is exact."""
    if values.dtype not in (F32, BF16, F16):
        raise TypeError(f"expected float32, bfloat16 or float16, got {values.dtype}")
    return values.astype(np.float32)


def round_bf16(values: Array) -> F32Array:
    """Round fp32, bf16 or f16 values to bf16, kept as fp32."""
    with np.errstate(over="ignore"):
        return to_f32(values).astype(BF16).astype(np.float32)


def fma32(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> F32Array:
    """Fused multiply-add of fp32 numbers, rounded once.

    The product of two fp32 numbers is exact in float64. The sum is rounded to odd there, which makes the
    second rounding, to fp32, the only one that counts.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        addend = np.asarray(c, np.float32).astype(np.float64)
        total = np.asarray(product + addend)
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        inexact = np.isfinite(total) & np.isfinite(error) & (error != 0)
        even = (total.view(np.uint64) & np.uint64(1)) == 0
        toward = np.nextafter(total, np.copysign(np.inf, error))
        return np.asarray(np.where(inexact & even, toward, total), np.float64).astype(np.float32)
