"""The gated activation as the fixed sequence of fp32 operations that docs/numerics.md gives.

Beside `moe.Layer.forward_integer` this makes a model of the integer formats that is right to the last bit, on
every instruction set.
"""

from __future__ import annotations

import numpy as np

from .moe import Activation
from .rounding import F32Array, fma32

_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def _power_of_two(exponent: F32Array) -> F32Array:
    """2**exponent for whole numbers from -126 to 127, exact."""
    return np.exp2(exponent.astype(np.float64)).astype(np.float32)


def exponential(x: F32Array) -> F32Array:
    """fp32 exponential of values held within -87.3 .. 88.7; NaN stays NaN."""
    f32 = np.float32
    nan = np.isnan(x)
    x = np.minimum(f32(88.7), np.maximum(f32(-87.3), np.where(nan, f32(0), x)))
    whole = np.rint(x * f32(1.44269504))
    r = fma32(whole, f32(-0.693359375), x)
    r = fma32(whole, f32(2.12194440e-4), r)
    y = np.full_like(x, f32(_TAYLOR[0]))
    for coefficient in _TAYLOR[1:]:
        y = fma32(y, r, f32(coefficient))
    half = np.rint(whole * f32(0.5))
    y = y * _power_of_two(half) * _power_of_two(whole - half)
    return np.where(nan, f32(np.nan), y).astype(np.float32)


def activate(gate: F32Array, up: F32Array, activation: Activation) -> F32Array:
    """Intermediate of fp32 `gate` and `up`, elementwise; NaN in either gives NaN."""
    f32 = np.float32
    if activation.limit > 0:
        most = f32(activation.limit)
        gate = np.where(np.isnan(gate), gate, np.minimum(gate, most))
        up = np.where(np.isnan(up), up, np.clip(up, -most, most))
    slope = f32(-activation.alpha if activation.alpha > 0 else -1.0)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        swish = gate / (f32(1) + exponential(gate * slope))
        return np.asarray(swish * (up + f32(1) if activation.alpha > 0 else up), np.float32)
