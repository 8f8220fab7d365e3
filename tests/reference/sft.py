"""Forward with adapters and the way back of an MoE layer, in float64 with bounds.

Beside every number stands the largest difference that an implementation may show which rounds where
docs/numerics.md says. Roundings to bf16 count as independent: the sum of n errors, each at most c_i, exceeds
CONFIDENCE * sqrt(sum c_i ** 2) with a probability below 1e-13 (Hoeffding), and `product` uses that or the sum
of the c_i, whichever is less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .moe import CONFIDENCE, Bounded, IdArray, Layer, _Expert, _values
from .rotation import mean_of_blocks, rotate_with_bound, rotated64
from .rounding import BF16, F32, U32, Array, F32Array, F64Array, round_bf16, to_f32, ulp

#: Unit roundoff of bf16.
UB = 2.0**-8

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")

_U64 = (1 << 64) - 1


def exact(values: npt.ArrayLike) -> Bounded:
    """Numbers without an error."""
    value = np.asarray(values, np.float64)
    return Bounded(value, np.zeros_like(value))


def rounded(a: Bounded) -> Bounded:
    """After a rounding to bf16."""
    return Bounded(a.value, a.error + UB * (np.abs(a.value) + a.error) + 2.0**-134)


def times(a: Bounded, b: Bounded) -> Bounded:
    """Elementwise product, rounded to fp32."""
    value = a.value * b.value
    error = np.abs(a.value) * b.error + a.error * np.abs(b.value) + a.error * b.error
    return Bounded(value, error + U32 * (np.abs(value) + error) + 2.0**-149)


def plus(a: Bounded, b: Bounded) -> Bounded:
    """Elementwise sum, rounded to fp32."""
    value = a.value + b.value
    error = a.error + b.error
    return Bounded(value, error + U32 * (np.abs(value) + error))


def product(a: Bounded, b: Bounded, rotated: bool = False) -> Bounded:
    """a @ b with fp32 sums in any order; rotated after that, if `rotated`.

    A rotated result has the errors of 64 others, each over 8. Their sources are those of the operands, which
    are independent: of `b` 64 times as many, and of `a` as many, times the rotated columns of `b`.
    """
    terms = a.value.shape[1]
    size_a, size_b = np.abs(a.value), np.abs(b.value)
    magnitude = (size_a + a.error) @ (size_b + b.error)
    linear = size_a @ b.error + a.error @ (size_b + b.error)
    sums = min(terms, CONFIDENCE * np.sqrt(terms)) * U32 * magnitude
    sums = sums + terms * 2.0**-126 + 2.0**-126 * (size_a.sum(1)[:, None] + size_b.sum(0)[None, :])
    value, squares = a.value @ b.value, b.error**2
    if rotated:
        exactly = np.zeros_like(value)
        linear = rotate_with_bound(exactly, linear)[1]
        value, sums = rotate_with_bound(value, sums)
        size_b, squares = np.abs(rotated64(b.value)), mean_of_blocks(squares)
    spread = CONFIDENCE * np.sqrt(size_a**2 @ squares + a.error**2 @ (size_b**2 + squares))
    return Bounded(value, np.minimum(linear, spread) + sums)


def transposed(a: Bounded) -> Bounded:
    return Bounded(a.value.T, a.error.T)


def taken(a: Bounded, rows: npt.NDArray[np.intp]) -> Bounded:
    return Bounded(a.value[rows], a.error[rows])


def _mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _U64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _U64
    return x ^ (x >> 31)


def dropout_factors(
    seed: int, expert: int, projection: int, tokens: npt.NDArray[np.intp], features: int, share: float
) -> F64Array:
    """What an element of an adapter's input is multiplied with: 0 or 1 / (1 - share).

    Parameters
    ----------
    seed, expert : int
    projection : int
        0 gate, 1 up, 2 down.
    tokens : ndarray of int, shape (n,)
    features : int
    share : float

    Returns
    -------
    ndarray of float64, shape (n, features)
    """
    share = float(np.float32(share))
    key = _mix64((seed & _U64) ^ _mix64(int(expert) * 3 + projection))
    threshold = int(np.rint(share * 2**24))
    feature = np.arange(features, dtype=np.uint32)
    out = np.empty((len(tokens), features))
    for index, token in enumerate(tokens):
        row = _mix64(key ^ _mix64(int(token)))
        with np.errstate(over="ignore"):
            x = feature + np.uint32(row & 0xFFFFFFFF)
            x ^= x >> np.uint32(16)
            x *= np.uint32(0x21F0AAAD)
            x ^= np.uint32(row >> 32)
            x ^= x >> np.uint32(15)
            x *= np.uint32(0x735A2D97)
            x ^= x >> np.uint32(15)
        out[index] = (x >> np.uint32(8)) >= threshold
    return out * float(np.float32(1.0 / (1.0 - share)))


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of all experts, and how they are applied."""

    tensors: Mapping[str, Array]
    scale: float
    dropout: float = 0.0
    seed: int | None = None

    def of(self, name: str, expert: int) -> Bounded:
        """One matrix, as the products read it: rounded to bf16."""
        return exact(round_bf16(self.tensors[name][expert]))


@dataclasses.dataclass
class Gradients:
    """What a backward returns; adapters and base weights by name, for all experts."""

    input: Bounded
    weights: Bounded
    lora: dict[str, Bounded]
    base: dict[str, Bounded]


@dataclasses.dataclass
class _Pass:
    """One expert's part of a forward."""

    expert: int
    where: npt.NDArray[np.intp]
    slot: npt.NDArray[np.intp]
    gate: Bounded
    up: Bounded
    inputs: list[Bounded]  # of the adapters of gate and up
    middles: list[Bounded]  # those through A, times the scale


class Trainer:
    """A layer with adapters.

    Parameters
    ----------
    layer : Layer
    adapters : Adapters, optional
    """

    def __init__(self, layer: Layer, adapters: Adapters | None = None) -> None:
        self.layer = layer
        self.adapters = adapters

    # ---- forward ------------------------------------------------------------------------------

    def _dropped(self, expert: int, projection: int, tokens: npt.NDArray[np.intp], x: Bounded) -> Bounded:
        adapters = self.adapters
        assert adapters is not None
        if adapters.seed is None or adapters.dropout == 0:
            return x
        mask = dropout_factors(adapters.seed, expert, projection, tokens, x.value.shape[1], adapters.dropout)
        return rounded(times(x, exact(mask)))

    def _scaled(self, a: Bounded, factor: npt.ArrayLike) -> Bounded:
        return rounded(times(a, exact(np.broadcast_to(factor, a.value.shape))))

    def _passes(self, x: Array, ids: IdArray) -> list[_Pass]:
        layer, adapters = self.layer, self.adapters
        quantised = layer._input(x)
        plain = exact(round_bf16(x))
        out = []
        for index, where, slot in self._contributions(ids):
            expert = layer.experts[index]
            part = taken(quantised, where)
            gate = layer._matmul(part, expert.gate, expert.gate_bias)
            up = layer._matmul(part, expert.up, expert.up_bias)
            inputs, middles = [], []
            if adapters is not None:
                scale = float(np.float32(adapters.scale))
                for projection, name in enumerate(("gate", "up")):
                    source = self._dropped(index, projection, where, taken(plain, where))
                    through = product(source, transposed(adapters.of(f"{name}_lora_a", index)))
                    middle = self._scaled(through, scale)
                    added = product(middle, transposed(adapters.of(f"{name}_lora_b", index)))
                    inputs.append(source)
                    middles.append(middle)
                    if projection == 0:
                        gate = plus(gate, added)
                    else:
                        up = plus(up, added)
            out.append(_Pass(index, where, slot, gate, up, inputs, middles))
        return out

    def _contributions(self, ids: IdArray) -> list[tuple[int, npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
        """(expert, tokens, slots), all rows of an expert together."""
        out = []
        for expert in range(len(self.layer.experts)):
            where, slot = np.nonzero(ids == expert)
            if expert not in self.layer.masked and where.size:
                out.append((expert, where, slot))
        return out

    def forward(self, x: Array, ids: IdArray, weights: F32Array, shards: int = 1) -> Bounded:
        """Output before its rounding to the output type, shape (B, H)."""
        layer, adapters = self.layer, self.adapters
        value = np.zeros((x.shape[0], layer.hidden_size))
        error = np.zeros_like(value)
        magnitude = np.zeros_like(value)
        terms = np.zeros((x.shape[0], 1))
        for part in self._passes(x, ids):
            expert = layer.experts[part.expert]
            z = layer.activate(part.gate, part.up)
            y = layer._matmul(layer._requantise(z), expert.down, expert.down_bias, layer.form.z_group)
            size = np.abs(layer.rotated(z).value) @ np.abs(_values(expert.down)).T
            if adapters is not None:
                middle = self._down_middle(part, rounded(z))
                added = product(
                    self._scaled(middle, float(np.float32(adapters.scale))),
                    transposed(adapters.of("down_lora_b", part.expert)),
                )
                y = plus(y, added)
            w = weights[part.where, part.slot].astype(np.float64)[:, None]
            np.add.at(value, part.where, w * y.value)
            np.add.at(error, part.where, np.abs(w) * y.error)
            np.add.at(magnitude, part.where, np.abs(w) * (np.abs(y.value) + y.error + (shards > 1) * size))
            np.add.at(terms, part.where, 1)
        return Bounded(value, error + (terms + shards) * U32 * magnitude + 2.0**-149)

    def _down_middle(self, part: _Pass, z: Bounded) -> Bounded:
        adapters = self.adapters
        assert adapters is not None
        source = self._dropped(part.expert, 2, part.where, z)
        return product(source, transposed(adapters.of("down_lora_a", part.expert)))

    # ---- backward -----------------------------------------------------------------------------

    def activation_gradient(self, gate: Bounded, up: Bounded) -> tuple[Bounded, Bounded, Bounded]:
        """The intermediate, and its derivatives by gate and up."""
        limit = float(np.float32(self.layer.activation.limit))
        alpha = float(np.float32(self.layer.activation.alpha))
        g, u = gate.value, up.value
        g_error, u_error = gate.error, up.error
        g_pass, u_pass = np.ones_like(g), np.ones_like(u)
        g_unsure, u_unsure = np.zeros_like(g), np.zeros_like(u)
        if limit > 0:
            g_pass, u_pass = (g <= limit) * 1.0, (np.abs(u) <= limit) * 1.0
            g_unsure = (np.abs(g - limit) <= g_error) * 1.0
            u_unsure = (np.abs(np.abs(u) - limit) <= u_error) * 1.0
            g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
        slope = alpha if alpha > 0 else 1.0
        if alpha > 0:
            u = u + 1
        with np.errstate(over="ignore"):
            sigmoid = 1 / (1 + np.exp(-slope * g))
        rest = 1 - sigmoid
        swish = g * sigmoid
        derivative = sigmoid * (1 + slope * g * rest)
        # |swish'| < 1.1 and |swish''| <= slope / 2. The fp32 operations cost at most 16 units, plus those
        # that rounding slope * g costs the exponential.
        units = 16 + 2 * np.abs(slope * g)
        swish_error = 1.1 * g_error + units * U32 * np.abs(swish) + 2.0**-126
        derivative_error = 0.5 * slope * g_error + units * U32 * (np.abs(derivative) + sigmoid) + 2.0**-126
        z = times(Bounded(swish, swish_error), Bounded(u, u_error + U32 * np.abs(u)))
        by_gate = times(Bounded(u, u_error + U32 * np.abs(u)), Bounded(derivative, derivative_error))
        by_up = Bounded(swish, swish_error)
        return (
            z,
            Bounded(
                by_gate.value * g_pass, by_gate.error + g_unsure * (np.abs(by_gate.value) + by_gate.error)
            ),
            Bounded(by_up.value * u_pass, by_up.error + u_unsure * (np.abs(by_up.value) + by_up.error)),
        )

    def _stored(self, expert: _Expert, name: str) -> Bounded:
        """A weight as the transposed product reads it: grouped scales make a rounding to bf16."""
        matrix = getattr(expert, name)
        weight = exact(_values(matrix))
        return rounded(weight) if self.layer.form.integer and self.layer.form.scale_group else weight

    def backward(
        self,
        x: Array,
        ids: IdArray,
        weights: F32Array,
        grad: Array,
        shards: int = 1,
        base: bool = False,
    ) -> Gradients:
        """Gradients of a sum whose gradient by the output is `grad`, before their roundings."""
        layer, adapters = self.layer, self.adapters
        row_scaled = layer.form.integer and not layer.form.scale_group
        grad_output = exact(round_bf16(grad))
        experts, hidden, inner = len(layer.experts), layer.hidden_size, layer.intermediate_size
        grad_input = exact(np.zeros((x.shape[0], hidden)))
        magnitude = np.zeros_like(grad_input.value)
        grad_weights = exact(np.zeros(ids.shape))
        lora: dict[str, Bounded] = {}
        if adapters is not None:
            lora = {name: exact(np.zeros(adapters.tensors[name].shape)) for name in LORA_NAMES}
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        by_base = {n: exact(np.zeros((experts, *shape))) for n, shape in shapes.items()} if base else {}
        plain = exact(round_bf16(x))

        def put(target: Bounded, index: int, gradient: Bounded) -> None:
            target.value[index], target.error[index] = gradient.value, gradient.error

        for part in self._passes(x, ids):
            index, where = part.expert, part.where
            expert = layer.experts[index]
            w = weights[where, part.slot].astype(np.float64)[:, None]
            out = taken(grad_output, where)
            z, by_gate, by_up = self.activation_gradient(rounded(part.gate), rounded(part.up))
            # A rotation is its own inverse: gradients of rotated columns go back through it.
            turned = layer.form.rotated
            dz = product(rounded(out) if row_scaled else out, self._stored(expert, "down"), turned)
            if adapters is not None:
                scale = float(np.float32(adapters.scale))
                through = product(out, adapters.of("down_lora_b", index))
                added = product(self._scaled(through, scale), adapters.of("down_lora_a", index))
                mask = exact(np.ones_like(added.value))
                if adapters.seed is not None and adapters.dropout:
                    mask = exact(dropout_factors(adapters.seed, index, 2, where, inner, adapters.dropout))
                dz = plus(dz, times(added, mask))
            dot = times(dz, z)
            with_bias = product(out, exact(expert.down_bias[:, None]))
            total = dot.value.sum(1) + with_bias.value[:, 0]
            sizes = np.abs(dot.value).sum(1) + dot.error.sum(1)
            spread = np.minimum(dot.error.sum(1), CONFIDENCE * np.sqrt((dot.error**2).sum(1)))
            grad_weights.value[where, part.slot] = total
            sizes += np.abs(with_bias.value[:, 0]) + with_bias.error[:, 0]
            grad_weights.error[where, part.slot] = (
                spread + with_bias.error[:, 0] + (inner + shards) * U32 * sizes
            )
            weighted = times(exact(np.broadcast_to(w, dz.value.shape)), dz)
            d_gate = rounded(times(weighted, by_gate))
            d_up = rounded(times(weighted, by_up))
            gradient = plus(
                product(d_gate, self._stored(expert, "gate"), turned),
                product(d_up, self._stored(expert, "up"), turned),
            )
            size = np.abs(d_gate.value) @ np.abs(_values(expert.gate)) + np.abs(d_up.value) @ np.abs(
                _values(expert.up)
            )
            if adapters is not None:
                z_dropped = self._dropped(index, 2, where, rounded(z))
                middle = product(z_dropped, transposed(adapters.of("down_lora_a", index)))
                small = self._scaled(middle, scale * w)
                put(lora["down_lora_b"], index, product(transposed(out), small))
                small = self._scaled(through, scale * w)
                put(lora["down_lora_a"], index, product(transposed(small), z_dropped))
                for projection, (name, d) in enumerate((("gate", d_gate), ("up", d_up))):
                    back = self._scaled(product(d, adapters.of(f"{name}_lora_b", index)), scale)
                    added = product(back, adapters.of(f"{name}_lora_a", index))
                    if adapters.seed is not None and adapters.dropout:
                        mask = dropout_factors(
                            adapters.seed, index, projection, where, hidden, adapters.dropout
                        )
                        added = times(added, exact(mask))
                    gradient = plus(gradient, added)
                    put(
                        lora[f"{name}_lora_a"],
                        index,
                        product(transposed(back), part.inputs[projection]),
                    )
                    put(lora[f"{name}_lora_b"], index, product(transposed(d), part.middles[projection]))
            if base:
                inputs = taken(plain, where)
                put(by_base["gate"], index, product(transposed(d_gate), inputs))
                put(by_base["up"], index, product(transposed(d_up), inputs))
                put(by_base["down"], index, product(transposed(out), self._scaled(z, w)))
            np.add.at(grad_input.value, where, gradient.value)
            np.add.at(grad_input.error, where, gradient.error)
            np.add.at(magnitude, where, np.abs(gradient.value) + gradient.error + (shards > 1) * size)
        count = ids.shape[1] + shards + 2
        grad_input = Bounded(grad_input.value, grad_input.error + count * U32 * magnitude)
        return Gradients(grad_input, grad_weights, lora, by_base)


def tolerance(expected: Bounded, dtype: np.dtype[np.generic], previous: Array | None = None) -> F64Array:
    """Largest difference between `expected.value`, plus what it was added to, and the stored number."""
    value, error = expected.value, expected.error
    if previous is not None:
        value = value + to_f32(previous).astype(np.float64)
        error = error + U32 * (np.abs(value) + error)
    return error + 0.5 * ulp(np.abs(value) + error, dtype)


__all__ = [
    "BF16",
    "F32",
    "LORA_NAMES",
    "Adapters",
    "Gradients",
    "Trainer",
    "dropout_factors",
    "tolerance",
]
