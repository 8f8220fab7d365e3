"""The MoE layer.

`forward` computes in float64 on exactly quantised weights and activations, and returns beside every output a
bound of what the fp32 operations of any ISA may differ by. `forward_integer` repeats the integer formats
operation by operation in fp32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .packing import ExpertWeights, Format
from .quantise import TINY, QuantisedMatrix, groups_of, quantise_symmetric8
from .rotation import rotate, rotate_with_bound
from .rounding import BF16, F32, U32, Array, F32Array, F64Array, fma32, round_bf16, round_to, to_f32, ulp

#: Relative error of the fp32 activation function, in units of U32: 4 for the exponential (two steps), one
#: each for 1 + e, the division and the product, and one for the terms of second order.
ACTIVATION_ERROR = 8

#: The exponential of anything larger is that of this, which is finite.
EXPONENTIAL_END = 88.7

#: n independent errors, each at most a unit, sum to at most n units, and to more than CONFIDENCE * sqrt(n)
#: with a probability below 1e-13. bf16 sums of many terms use whichever is less.
CONFIDENCE = 8.0

IdArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Activation:
    """Gated activation: silu, clamped when `limit` is positive, in the alpha form when `alpha` is."""

    limit: float = 0.0
    alpha: float = 0.0


@dataclasses.dataclass(frozen=True)
class Bounded:
    """Values in float64 and the largest difference an implementation may show, elementwise."""

    value: F64Array
    error: F64Array


@dataclasses.dataclass(frozen=True)
class _Expert:
    gate: QuantisedMatrix | F32Array
    up: QuantisedMatrix | F32Array
    down: QuantisedMatrix | F32Array
    gate_bias: F32Array
    up_bias: F32Array
    down_bias: F32Array


def _values(matrix: QuantisedMatrix | F32Array) -> F64Array:
    return matrix.values() if isinstance(matrix, QuantisedMatrix) else matrix.astype(np.float64)


def _quantised_groups(values: F32Array, group: int) -> tuple[npt.NDArray[np.int8], F32Array]:
    """Integers (rows, n) and scales (rows, groups)."""
    slices = groups_of(values.shape[1], group)
    q = np.zeros(values.shape, np.int8)
    scale = np.zeros((values.shape[0], len(slices)), np.float32)
    for index, part in enumerate(slices):
        q[:, part], scale[:, index] = quantise_symmetric8(values[:, part])
    return q, scale


def shards_of(intermediate_size: int, count: int, group: int = 128) -> list[slice]:
    """Columns of the intermediate that each NUMA shard owns: whole groups, the first shards take the rest."""
    blocks = -(-intermediate_size // group)
    base, rest = divmod(blocks, count)
    out, start = [], 0
    for shard in range(count):
        end = start + (base + (shard < rest)) * group
        out.append(slice(min(start, intermediate_size), min(end, intermediate_size)))
        start = end
    return out


def segments_of(columns: slice, weight_group: int, input_group: int) -> list[slice]:
    """Runs of `columns` with one weight scale and one input scale; a group of 0 is all columns."""
    edges = {columns.start, columns.stop}
    for size in (weight_group, input_group):
        if size:
            edges.update(edge for edge in range(0, columns.stop, size) if edge > columns.start)
    return [slice(start, stop) for start, stop in itertools.pairwise(sorted(edges))]


class Layer:
    """An MoE layer over quantised experts.

    Parameters
    ----------
    experts : sequence of ExpertWeights
        All of one shape.
    form : Format
    activation : Activation
    masked : sequence of int
        Experts that contribute nothing.
    """

    def __init__(
        self,
        experts: Sequence[ExpertWeights],
        form: Format,
        activation: Activation = Activation(),
        masked: Sequence[int] = (),
    ) -> None:
        self.form = form
        self.activation = activation
        self.masked = frozenset(masked)
        self.hidden_size = experts[0].hidden_size
        self.intermediate_size = experts[0].intermediate_size
        self.experts = [self._load(expert) for expert in experts]

    def _load(self, weights: ExpertWeights) -> _Expert:
        def bias(values: F32Array | None, rows: int) -> F32Array:
            return np.zeros(rows, np.float32) if values is None else values

        return _Expert(
            self.form.quantise(weights.gate),
            self.form.quantise(weights.up),
            self.form.down.quantise(weights.down),
            bias(weights.gate_bias, self.intermediate_size),
            bias(weights.up_bias, self.intermediate_size),
            bias(weights.down_bias, self.hidden_size),
        )

    def contributions(self, ids: IdArray) -> list[tuple[int, npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
        """(expert, rows, slots) in the order of summation: ascending expert id, then ascending slot."""
        out = []
        for expert in range(len(self.experts)):
            if expert in self.masked:
                continue
            for slot in range(ids.shape[1]):
                rows = np.nonzero(ids[:, slot] == expert)[0]
                if rows.size:
                    out.append((expert, rows, np.full(rows.size, slot, np.intp)))
        return out

    # ---- float64 with bounds ----------------------------------------------------------------------

    def _matmul(
        self, x: Bounded, matrix: QuantisedMatrix | F32Array, bias: F32Array, input_group: int = 0
    ) -> Bounded:
        """x @ matrix.T + bias; the error of `x` and of the fp32 sums carried along."""
        weight = _values(matrix)
        magnitude = np.abs(x.value) @ np.abs(weight).T
        value = x.value @ weight.T
        if self.form.integer:
            # For each segment the integer sum to fp32 and the product of the scales; and an addition each.
            columns = slice(0, weight.shape[1])
            assert isinstance(matrix, QuantisedMatrix)
            additions = 2 + len(segments_of(columns, matrix.group, input_group))
        else:
            additions = min(weight.shape[1], int(CONFIDENCE * np.sqrt(weight.shape[1])))
        error = x.error @ np.abs(weight).T
        if not self.form.integer:
            # Which way an ambiguous rounding of the input falls is independent of its weight.
            error = np.minimum(error, CONFIDENCE * np.sqrt(x.error**2 @ (weight**2).T))
        error = error * (1 + additions * U32) + (additions * U32) * magnitude
        if not self.form.integer:
            # bf16 instructions may read subnormal operands, and write subnormal sums, as zero.
            flushed = 2.0**-126 * (np.abs(weight).sum(axis=1) + np.abs(x.value).sum(axis=1)[:, None])
            error = error + flushed + weight.shape[1] * 2.0**-126
        value = value + bias
        return Bounded(value, error + U32 * np.abs(value) + U32 * error + 2.0**-149)

    def activate(self, gate: Bounded, up: Bounded) -> Bounded:
        """Intermediate of `gate` and `up`, with their errors carried along."""
        limit, alpha = self.activation.limit, self.activation.alpha
        g, u = gate.value, up.value
        if limit > 0:
            g = np.where(np.isnan(g), g, np.minimum(g, np.float32(limit)))
            u = np.clip(u, -float(np.float32(limit)), float(np.float32(limit)))
        slope = float(np.float32(alpha)) if alpha > 0 else 1.0
        with np.errstate(over="ignore"):
            half = g / (1 + np.exp(-slope * g))
            share = 1 / (1 + np.exp(slope * g))
        if alpha > 0:
            u = u + 1
        value = half * u
        # Whatever the slope, |d/dg (g sigmoid(slope g))| < 1.1. Rounding slope * g costs the exponential
        # |slope g| units, of which the denominator feels the exponential's share; rounding up + 1 costs one.
        half_error = 1.1 * gate.error
        relative = ACTIVATION_ERROR + (1 + np.abs(slope * g) * share if alpha > 0 else 0.0)
        error = half_error * (np.abs(u) + up.error) + np.abs(half) * up.error + relative * U32 * np.abs(value)
        # Past the end of the exponential's range a quotient stands where a number near zero should.
        past = (-slope * g > EXPONENTIAL_END - 1) * np.abs(g) * (1.001 * np.exp(-EXPONENTIAL_END))
        return Bounded(value, error + past * np.abs(u) + 2.0**-149)

    def rotated(self, z: Bounded) -> Bounded:
        """Columns times the rotation, if the layer has one."""
        return Bounded(*rotate_with_bound(z.value, z.error)) if self.form.rotated else z

    def _requantise(self, z: Bounded) -> Bounded:
        """Intermediate as the down product reads it; an ambiguous rounding counts with its whole step."""
        z = self.rotated(z)
        low, high = z.value - z.error, z.value + z.error
        if not self.form.integer:
            middle, bottom, top = (round_to(v, BF16) for v in (z.value, low, high))
            return Bounded(middle, np.maximum(np.abs(top - middle), np.abs(middle - bottom)))
        value = np.zeros_like(z.value)
        error = np.zeros_like(z.value)
        for part in groups_of(z.value.shape[1], self.form.z_group):
            v, lo, hi = z.value[:, part], low[:, part], high[:, part]
            middle, _ = self._scaled(v, np.abs(v).max(axis=1))
            least = np.maximum(np.maximum(np.abs(v) - z.error[:, part], 0).max(axis=1), 0)
            most = (np.abs(v) + z.error[:, part]).max(axis=1)
            corners = []
            for bound in (lo, hi):
                for amax_q in (least, most):
                    q = self._steps(bound, amax_q)
                    for amax_s in (least, most):
                        corners.append(q * self._scale(amax_s))
            bottom, top = np.min(corners, axis=0), np.max(corners, axis=0)
            value[:, part] = middle
            error[:, part] = np.maximum(np.maximum(top - middle, middle - bottom), 0)
        return Bounded(value, error)

    @staticmethod
    def _scale(amax: F64Array) -> F64Array:
        scale = round_to(amax / 127, F32)
        return np.where(amax < float(TINY), 0.0, scale)[:, None]

    @staticmethod
    def _steps(values: F64Array, amax: F64Array) -> F64Array:
        usable = amax >= float(TINY)
        inverse = round_to(127 / np.where(usable, amax, 1.0), F32)[:, None]
        q = np.clip(np.rint(round_to(values * inverse, F32)), -127, 127)
        return np.where(usable[:, None], q, 0.0)

    def _scaled(self, values: F64Array, amax: F64Array) -> tuple[F64Array, F64Array]:
        q = self._steps(values, amax)
        return q * self._scale(amax), q

    def _quantised_input(self, x: Array) -> tuple[npt.NDArray[np.int8], F32Array]:
        """Integers (B, H) and scales (B, groups)."""
        return _quantised_groups(self.form.rows(x), self.form.input_group)

    def _input(self, x: Array) -> Bounded:
        if self.form.integer:
            q, scale = self._quantised_input(x)
            value = q.astype(np.float64)
            for index, part in enumerate(groups_of(x.shape[1], self.form.input_group)):
                value[:, part] *= scale[:, index : index + 1].astype(np.float64)
        else:
            value = round_bf16(x).astype(np.float64)
        return Bounded(value, np.zeros_like(value))

    def forward(
        self, x: Array, ids: IdArray, weights: F32Array, previous: Array | None = None, shards: int = 1
    ) -> Bounded:
        """Layer output before its rounding to the output type.

        Parameters
        ----------
        x : ndarray of float32, bfloat16 or float16, shape (B, H)
            Finite values.
        ids : ndarray of int64, shape (B, k)
            Outside 0 .. E-1: contributes nothing.
        weights : ndarray of float32, shape (B, k)
        previous : ndarray, shape (B, H), optional
            What an incremental forward adds to.
        shards : int
            NUMA shards, each of which adds one partial sum.

        Returns
        -------
        Bounded
            Shape (B, H).
        """
        rows = x.shape[0]
        value = np.zeros((rows, self.hidden_size))
        error = np.zeros_like(value)
        magnitude = np.zeros_like(value)
        terms = np.zeros((rows, 1))
        quantised = self._input(x)
        for expert_id, where, slot in self.contributions(ids):
            expert = self.experts[expert_id]
            part = Bounded(quantised.value[where], quantised.error[where])
            gate = self._matmul(part, expert.gate, expert.gate_bias, self.form.input_group)
            up = self._matmul(part, expert.up, expert.up_bias, self.form.input_group)
            z = self._requantise(self.activate(gate, up))
            y = self._matmul(z, expert.down, expert.down_bias, self.form.z_group)
            w = weights[where, slot].astype(np.float64)[:, None]
            value[where] += w * y.value
            error[where] += np.abs(w) * y.error
            magnitude[where] += np.abs(w) * (np.abs(y.value) + y.error)
            if shards > 1:
                # Partial sums of shards may cancel; what they sum to is bounded by the sum of magnitudes.
                magnitude[where] += np.abs(w) * (np.abs(z.value) @ np.abs(_values(expert.down)).T)
            terms[where] += 1
        error = error + (terms + shards) * U32 * magnitude + 2.0**-149
        if previous is not None:
            value = value + previous.astype(np.float64)
            error = error + U32 * np.abs(value)
        return Bounded(value, error)

    # ---- the integer formats, fp32 operation by operation ------------------------------------------

    def _integer_matmul(
        self,
        q: npt.NDArray[np.int8],
        scale: F32Array,
        scale_group: int,
        matrix: QuantisedMatrix,
        columns: slice,
    ) -> F32Array:
        """fp32 sums over the segments of `columns` in ascending order, before the bias."""
        weight = matrix.q.astype(np.float64)
        total = np.zeros((q.shape[0], weight.shape[0]), np.float32)
        for part in segments_of(columns, matrix.group, scale_group):
            exact = q[:, part].astype(np.float64) @ weight[:, part].T
            by = scale[:, [part.start // scale_group if scale_group else 0]]
            if matrix.group:
                with np.errstate(invalid="ignore", over="ignore", under="ignore"):
                    by = by * matrix.scale[None, :, part.start // matrix.group]
            total = fma32(exact.astype(np.float32), by, total)
        if matrix.group:
            return total
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            return total * matrix.scale[None, :, 0]

    def forward_integer(
        self,
        x: Array,
        ids: IdArray,
        weights: F32Array,
        activate: Callable[[F32Array, F32Array, Activation], F32Array],
        previous: Array | None = None,
        shards: int = 1,
    ) -> F32Array:
        """Layer output of an integer format in fp32, before its rounding to the output type.

        Parameters
        ----------
        x, ids, weights, previous, shards
            As in `forward`; rows may hold NaN and infinities.
        activate : callable
            (gate, up, Activation) to the intermediate, all float32: the one stage whose bits the caller
            supplies.

        Returns
        -------
        ndarray of float32, shape (B, H)
        """
        if not self.form.integer:
            raise ValueError("the order of sums in bf16 belongs to the ISA")
        rows = x.shape[0]
        z_group = self.form.z_group
        cuts = shards_of(self.intermediate_size, shards, z_group)
        partial = np.zeros((shards, rows, self.hidden_size), np.float32)
        q, scale = self._quantised_input(x)
        every = slice(0, self.hidden_size)
        for expert_id, where, slot in self.contributions(ids):
            expert = self.experts[expert_id]
            assert isinstance(expert.gate, QuantisedMatrix) and isinstance(expert.up, QuantisedMatrix)
            assert isinstance(expert.down, QuantisedMatrix)
            gate, up = (
                self._integer_matmul(q[where], scale[where], self.form.input_group, matrix, every) + bias
                for matrix, bias in ((expert.gate, expert.gate_bias), (expert.up, expert.up_bias))
            )
            z = activate(gate, up, self.activation)
            zq, z_scale = _quantised_groups(rotate(z) if self.form.rotated else z, z_group)
            for shard, columns in enumerate(cuts):
                y = self._integer_matmul(zq, z_scale, z_group, expert.down, columns)
                if shard == 0:
                    y = y + expert.down_bias
                partial[shard, where] = fma32(weights[where, slot][:, None], y, partial[shard, where])
        total = partial[0]
        for shard in range(1, shards):
            total = total + partial[shard]
        return total if previous is None else total + to_f32(previous)


def output_tolerance(expected: Bounded, dtype: np.dtype[np.generic]) -> F64Array:
    """Largest difference between `expected.value` and an output rounded to `dtype`."""
    return expected.error + 0.5 * ulp(np.abs(expected.value) + expected.error, dtype)
