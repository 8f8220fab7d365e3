"""The reference itself, against plain arithmetic that models nothing."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from reference.activation import activate, exponential
from reference.moe import Activation, Bounded, Layer, output_tolerance, shards_of
from reference.packing import PART_NAMES, ExpertWeights, Format, pack, unpack_weight
from reference.quantise import QuantisedMatrix, quantise_int4, quantise_int8, quantise_symmetric8
from reference.rotation import hadamard, rotate, rotate_with_bound
from reference.rounding import BF16, F16, F32, U32, fma32, round_bf16, round_to, ulp
from strategies import make_routing, make_weights

pytestmark = pytest.mark.any_binding

FORMATS = (
    Format(0),
    Format(1),
    Format(1, 128),
    Format(2),
    Format(2, 32),
    Format(2, 64),
    Format(2, 128),
    Format(1, 512, rotated=True),
    Format(1, rotated=True),
    Format(2, 32, rotated=True),
    Format(2, 128, rotated=True),
)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_round_to_agrees_with_conversion(dtype: np.dtype[np.generic]) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(dtype).astype(np.float64)
    assert np.array_equal(round_to(values, dtype), expected, equal_nan=True)


def test_ulp_is_the_gap_to_the_next_number() -> None:
    values = np.array([1.0, 1.5, 2.0, 0.0, 2.0**-126, 2.0**-140], np.float32)
    assert np.array_equal(ulp(values, F32), np.nextafter(values, np.float32(np.inf)).astype(float) - values)


def test_fma_is_rounded_once() -> None:
    rng = np.random.default_rng(2)
    a, b, c = rng.standard_normal((3, 2000)).astype(np.float32)
    near = rng.integers(-2, 3, 2000) * 2.0**-23
    c[:1000] = (-(a * b) * (1 + near))[:1000]
    c[1000::2] *= np.float32(2.0**-30)
    for x, y, z, result in zip(a, b, c, fma32(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        gap = abs(exact - Fraction(float(result)))
        for direction in (np.inf, -np.inf):
            assert gap <= abs(exact - Fraction(float(np.nextafter(result, np.float32(direction)))))


def test_symmetric8_rows() -> None:
    values = np.array(
        [[1.0, -2.0, 0.5], [0, 0, 0], [np.nan, 1, 2], [np.inf, 1, 2], [2.0**-101, 0, 0], [3e38, -3e38, 0]],
        np.float32,
    )
    q, scale = quantise_symmetric8(values)
    assert q.tolist() == [[64, -127, 32], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [127, -127, 0]]
    assert np.isnan(scale[2:4]).all()
    assert scale[[0, 1, 4]].tolist() == [np.float32(2) / np.float32(127), 0, 0]


def test_int4_uses_the_whole_range_on_the_side_of_the_largest_value() -> None:
    matrix = quantise_int4(np.array([[-4.0, 3.5, 1.0, 4.0], [2.0, -1.0, 0.5, 1.9]], np.float32), 0)
    assert matrix.scale[:, 0].tolist() == [0.5, -0.25]
    assert matrix.q.tolist() == [[-8, 7, 2, 7], [-8, 4, -2, -8]]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_fitted_groups_are_better_than_their_range(group: int) -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((64, 3 * group)).astype(np.float32)
    blocks = weights.reshape(-1, group).astype(np.float64)
    step = np.ptp(blocks, axis=1, keepdims=True) / 15
    plain = (np.rint((blocks - blocks.min(axis=1, keepdims=True)) / step)) * step
    plain += blocks.min(axis=1, keepdims=True)
    fitted = quantise_int4(weights, group).values()
    assert np.linalg.norm(fitted - weights) < 0.98 * np.linalg.norm(plain - blocks)


def test_groups_keep_their_own_step_and_place() -> None:
    # 225 steps wide with steps of 15; the second group is 30 wide with steps of 2 and lies above zero.
    wide, narrow = np.arange(32) % 16 * 15 - 112, np.arange(32) % 16 * 2 + 7
    matrix = quantise_int4(np.concatenate([wide, narrow]).astype(np.float32)[None], 32)
    assert matrix.factors is not None and matrix.factors.tolist() == [[[15, 16], [2, 135]]]
    assert matrix.scale.tolist() == [[1.0]]
    assert matrix.q.tolist() == [np.concatenate([wide, narrow]).tolist()]


def test_weights_of_a_group_stay_within_a_byte() -> None:
    rng = np.random.default_rng(4)
    weights = (rng.standard_t(1.5, (50, 160)) * 10.0 ** rng.uniform(-8, 8, (50, 1))).astype(np.float32)
    for group in (32, 64, 128):
        matrix = quantise_int4(weights, group)
        assert matrix.factors is not None
        multiplier, offset = matrix.factors.astype(int).transpose(2, 0, 1)
        assert (
            (multiplier >= 1).all() and (multiplier <= 15).all() and (15 * multiplier + offset <= 255).all()
        )
        assert np.abs(matrix.values() - weights).max() <= 15 * matrix.scale.max()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("rows,columns", [(1, 1), (16, 64), (37, 150), (17, 31)])
def test_tiles_hold_every_weight_where_the_layout_says(form: Format, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows * columns)
    weights = make_weights(rng, columns, rows)
    steps, blocks = -(-columns // form.k_step), -(-rows // 16)
    tiles = pack(weights, form)["gate_up_weight"].reshape(blocks, steps, 2, -1)
    for half, source in enumerate((weights.gate, weights.up)):
        stored = unpack_weight(np.ascontiguousarray(tiles[:, :, half]), rows, columns, form)
        matrix = form.quantise(source)
        if isinstance(matrix, QuantisedMatrix):
            expected = matrix.q + 128 if matrix.codes is None else matrix.codes
            assert np.array_equal(stored, expected)
        else:
            assert np.array_equal(stored.astype(np.float32), matrix)


def test_shards_are_whole_groups_and_cover_everything() -> None:
    for size in (1, 127, 128, 129, 384, 400, 1000):
        for count in (1, 2, 3, 5):
            cuts = shards_of(size, count)
            assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
            assert (cuts[0].start, cuts[-1].stop) == (0, size)
            assert all(cut.start % 128 == 0 or cut.start == size for cut in cuts)
            widths = [-(-(cut.stop - cut.start) // 128) for cut in cuts]
            assert max(widths) - min(widths) <= 1 and widths == sorted(widths, reverse=True)
    assert shards_of(1000, 2, 256) == [slice(0, 512), slice(512, 1000)]
    assert shards_of(300, 3, 256) == [slice(0, 256), slice(256, 300), slice(300, 300)]


def test_a_rotation_is_the_hadamard_matrix_and_its_own_inverse() -> None:
    matrix = hadamard()
    assert (matrix == matrix.T).all() and (matrix @ matrix == 64 * np.eye(64)).all()
    rng = np.random.default_rng(11)
    for columns in (1, 63, 64, 65, 128, 200):
        x = rng.standard_normal((7, columns)).astype(np.float32)
        whole = columns // 64 * 64
        wanted = x.astype(np.float64)
        for start in range(0, whole, 64):
            wanted[:, start : start + 64] = wanted[:, start : start + 64] @ matrix / 8
        turned = rotate(x)
        assert np.abs(turned - wanted).max() < 1e-6
        assert np.array_equal(turned[:, whole:], x[:, whole:])
        assert np.abs(rotate(turned) - x).max() < 1e-6
        value, error = rotate_with_bound(x.astype(np.float64), np.zeros(x.shape))
        assert (np.abs(turned - value) <= error).all() and np.array_equal(error == 0, turned == x)
    # Powers of two are exact, so that the inverse is too.
    exact = rng.integers(-8, 9, (5, 192)).astype(np.float32)
    assert np.array_equal(rotate(rotate(exact)), exact)


def test_a_rotation_keeps_products() -> None:
    rng = np.random.default_rng(12)
    x, w = rng.standard_normal((2, 9, 200)).astype(np.float32)
    plain = x.astype(np.float64) @ w.astype(np.float64).T
    turned = rotate(x).astype(np.float64) @ rotate(w).astype(np.float64).T
    assert np.abs(turned - plain).max() < 1e-5


def test_butterflies_are_taken_in_order_of_distance() -> None:
    """By one row whose sums are rounded differently in another order."""
    row = (np.random.default_rng(13).standard_normal(64) * 10.0 ** np.arange(-3, 3).repeat(11)[:64]).astype(
        np.float32
    )
    expected = [np.float32(0.125) * value for value in row]
    for distance in (1, 2, 4, 8, 16, 32):
        for low in (index for index in range(64) if not index & distance):
            a, b = expected[low], expected[low + distance]
            expected[low], expected[low + distance] = a + b, a - b
    assert rotate(row[None])[0].tolist() == [float(value) for value in expected]


def _error(form: Format, outliers: int) -> float:
    """Relative L2 error of a Gaussian layer, with `outliers` columns of the input 60 times as large."""
    rng = np.random.default_rng(14)
    hidden, inner, rows = 1024, 768, 16
    expert = make_weights(rng, hidden, inner)
    x = rng.standard_normal((rows, hidden)).astype(np.float32)
    x[:, rng.choice(hidden, outliers, replace=False)] *= 60
    ids, weights = np.zeros((rows, 1), np.int64), np.ones((rows, 1), np.float32)
    exact = _plain([expert], x.astype(np.float64), ids, weights, Activation())
    found = Layer([expert], form).forward_integer(x, ids, weights, activate)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_rotated_groups_of_512_are_better_than_plain_groups_of_128() -> None:
    error = _error(Format(1, 512, rotated=True), 0)
    assert error < 0.02 and error < _error(Format(1, 128), 0)


@pytest.mark.parametrize("form", [Format(1, 512), Format(1, 128), Format(2, 32), Format(2, 128)], ids=str)
def test_outliers_cost_less_where_columns_are_rotated(form: Format) -> None:
    assert _error(Format(form.kind, form.group, rotated=True), 4) < 0.9 * _error(form, 4)


def test_groups_of_down_are_those_of_the_intermediate_at_most() -> None:
    expert = ExpertWeights(*(np.ones(shape, np.float32) for shape in ((700, 600), (700, 600), (600, 700))))
    for form, gate_groups, down_groups in (
        (Format(1, 512), 2, 6),
        (Format(1, 512, rotated=True), 2, 3),
        (Format(1, 128, rotated=True), 5, 6),
        (Format(1, 0, rotated=True), 1, 1),
    ):
        parts = pack(expert, form)
        size = 2 if form.group else 4
        assert parts["gate_up_scale"].size == 44 * gate_groups * 2 * 16 * size
        assert parts["down_scale"].size == 38 * down_groups * 16 * size


def _plain(experts, x, ids, weights, activation):  # type: ignore[no-untyped-def]
    out = np.zeros(x.shape)
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            if not 0 <= ids[token, slot] < len(experts):
                continue
            expert = experts[ids[token, slot]]
            gate = expert.gate.astype(float) @ x[token]
            up = expert.up.astype(float) @ x[token]
            if activation.limit:
                gate = np.minimum(gate, activation.limit)
                up = np.clip(up, -activation.limit, activation.limit)
            slope = activation.alpha or 1.0
            z = gate / (1 + np.exp(-slope * gate)) * (up + 1 if activation.alpha else up)
            out[token] += weights[token, slot] * (expert.down.astype(float) @ z)
    return out


# Relative L2 errors of Gaussian data: what a format costs, and so how far from plain arithmetic a correct
# model of it must be.
_LEVELS = {"bf16": 0.0045, "int8-row": 0.024, "int8-128": 0.021, "int4-row": 0.22, "int4-32": 0.14}
_LEVELS |= {"int4-64": 0.16, "int4-128": 0.18, "fp8": 0.055}
_LEVELS |= {"int8-512-rotated": 0.02, "int8-row-rotated": 0.02}
_LEVELS |= {"int4-32-rotated": 0.14, "int4-128-rotated": 0.18}


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_error_level_of_each_format(form: Format) -> None:
    rng = np.random.default_rng(5)
    experts = [make_weights(rng, 256, 384) for _ in range(4)]
    x = rng.standard_normal((8, 256)).astype(np.float32)
    ids, weights = make_routing(rng, "invalid", 8, 4, 2)
    for activation in (Activation(), Activation(1.5, 1.702)):
        plain = _plain(experts, x, ids, weights, activation)
        modelled = Layer(experts, form, activation).forward(x, ids, weights)
        distance = np.linalg.norm(modelled.value - plain) / np.linalg.norm(plain)
        assert 0.4 * _LEVELS[str(form)] < distance < _LEVELS[str(form)]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_bounds_are_a_few_steps_of_the_output_type(form: Format) -> None:
    rng = np.random.default_rng(6)
    experts = [make_weights(rng, 256, 384) for _ in range(4)]
    x = rng.standard_normal((8, 256)).astype(np.float32)
    ids, weights = make_routing(rng, "distinct", 8, 4, 2)
    expected = Layer(experts, form).forward(x, ids, weights)
    typical = ulp(np.sqrt(np.mean(expected.value**2)), BF16)
    # A rotated value may be off by what 64 others are, over 8.
    most = 2 if not form.integer else 1 if form.rotated else 0.5
    assert np.median(output_tolerance(expected, BF16)) < most * typical
    assert np.max(output_tolerance(expected, BF16)) < 6 * typical


@pytest.mark.parametrize("form", [f for f in FORMATS if f.integer], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_both_models_of_the_integer_formats_agree(form: Format, shards: int) -> None:
    rng = np.random.default_rng(7)
    experts = [make_weights(rng, 100, 300, biases=True) for _ in range(3)]
    x = rng.standard_normal((6, 100)).astype(np.float32)
    ids, weights = make_routing(rng, "duplicates", 6, 3, 2)
    layer = Layer(experts, form)
    previous = rng.standard_normal((6, 100)).astype(np.float32)
    bounded = layer.forward(x, ids, weights, previous, shards)
    exact = layer.forward_integer(x, ids, weights, activate, previous, shards)
    assert (np.abs(exact - bounded.value) <= bounded.error).all()


def test_quantised_weights_are_within_half_a_step() -> None:
    weights = make_weights(np.random.default_rng(8), 130, 40)
    int8 = quantise_int8(weights.gate, 0)
    assert (np.abs(int8.values() - weights.gate) <= int8.scale * (0.5 + 1e-4)).all()
    grouped = quantise_int8(weights.gate, 32)
    steps = np.repeat(grouped.scale, 32, axis=1)[:, :130]
    # A scale that bf16 rounded down leaves the largest weight up to 127 * 2**-9 steps outside.
    assert (np.abs(grouped.values() - weights.gate) <= steps * (0.5 + 127 * 2.0**-9)).all()
    int4 = quantise_int4(weights.gate, 32)
    assert int4.codes is not None and int4.factors is not None
    steps = np.repeat(int4.scale * int4.factors[:, :, 0], 32, axis=1)[:, :130]
    outside = (int4.codes == 0) | (int4.codes == 15)
    assert (np.abs(int4.values() - weights.gate) <= steps * (0.5 + 1e-4))[~outside].all()


def test_parts_are_named_in_the_order_of_the_abi() -> None:
    parts = pack(make_weights(np.random.default_rng(9), 20, 10), Format(2, 32))
    assert tuple(parts) == PART_NAMES
    assert round_bf16(np.array([1 + U32], np.float32))[0] == 1


def test_exponential_is_within_two_steps() -> None:
    x = np.concatenate([np.linspace(-87.3, 88.7, 200_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    x = np.clip(x, np.float32(-87.3), np.float32(88.7))
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exponential(x) - exact) / ulp(exact, F32)).max() <= 2


def test_activation_is_within_its_bound() -> None:
    rng = np.random.default_rng(10)
    gate = (rng.standard_normal(100_000) * np.exp2(rng.integers(-10, 7, 100_000))).astype(np.float32)
    up = rng.standard_normal(gate.size).astype(np.float32)
    nothing = np.zeros(gate.size)
    experts = [make_weights(rng, 1, 1)]
    for activation in (Activation(), Activation(7.0), Activation(7.0, 1.702), Activation(0.0, 0.25)):
        layer = Layer(experts, Format(1), activation)
        expected = layer.activate(Bounded(gate.astype(float), nothing), Bounded(up.astype(float), nothing))
        assert (np.abs(activate(gate, up, activation) - expected.value) <= expected.error).all()
