"""What must not change a bit, and what must stay within a token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers import FORMATS, SLOW_ISAS, NativeLayer, Options, pool_of, runnable_isas, same_bits, thresholds
from reference.moe import Activation
from reference.packing import ExpertWeights, Format
from reference.rounding import BF16, F16, F32
from strategies import DTYPES, Shape, make_input, make_routing, make_weights, seeds, shapes

pytestmark = pytest.mark.any_binding

ISAS = runnable_isas()
INTEGER_FORMATS = tuple(form for form in FORMATS if form.integer)


def _batch(rng: np.random.Generator, experts: int, hidden: int, batch: int, top_k: int, kind: str = "mixed"):  # type: ignore[no-untyped-def]
    return make_input(rng, batch, hidden), *make_routing(rng, kind, batch, experts, top_k)


def _experts(rng: np.random.Generator, count: int, hidden: int, intermediate: int) -> list[ExpertWeights]:
    return [make_weights(rng, hidden, intermediate, biases=True) for _ in range(count)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_threads_and_repeats_change_no_bit(form: Format, isa: str) -> None:
    rng = np.random.default_rng(51)
    experts = _experts(rng, 4, 130, 270)
    batches = [_batch(rng, 4, 130, size, 3) for size in (1, 5, 40)]
    expected = None
    for threads in (1, 2, 3, 5):
        with pool_of(threads) as pool, NativeLayer(pool, experts, form, Options(isa=isa)) as layer:
            outputs = [layer.forward(*batch) for _ in range(3) for batch in batches]
        if expected is None:
            expected = outputs[: len(batches)]
        for index, output in enumerate(outputs):
            assert same_bits(output, expected[index % len(batches)])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_threads_of_a_shard_change_no_bit(form: Format) -> None:
    rng = np.random.default_rng(52)
    experts = _experts(rng, 3, 70, 300)
    batch = _batch(rng, 3, 70, 7, 2)
    outputs = []
    for threads in ((1, 1), (2, 1), (1, 3)):
        with pool_of(*threads) as pool, NativeLayer(pool, experts, form) as layer:
            outputs += [layer.forward(*batch), layer.forward(*batch)]
    assert all(same_bits(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_sums_made_by_turns_change_no_bit(form: Format, isa: str) -> None:
    """With many rows an expert, workers share sums: in runs of 512 columns, then of 256 and by passes."""
    rng = np.random.default_rng(61)
    experts = _experts(rng, 3, 600, 40)
    batches = [_batch(rng, 3, 600, size, 2) for size in (60, 850)]
    expected: dict[int, list[np.ndarray]] = {}
    options = Options(isa=isa, max_tokens=850)
    for threads in ((1,), (3,), (1, 1), (2, 3)):
        with pool_of(*threads) as pool, NativeLayer(pool, experts, form, options) as layer:
            outputs = [layer.forward(*batch) for batch in batches]
        known = expected.setdefault(len(threads), outputs)
        assert all(same_bits(output, other) for output, other in zip(outputs, known, strict=True))
    if form.integer:
        options = dataclasses.replace(options, isa="portable")
        with pool_of(1) as pool, NativeLayer(pool, experts, form, options) as layer:
            for batch, output in zip(batches, expected[1], strict=True):
                assert same_bits(layer.forward(*batch), output)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_position_in_the_batch_changes_no_bit(form: Format, isa: str) -> None:
    rng = np.random.default_rng(53)
    experts = _experts(rng, 3, 100, 140)
    x, ids, weights = _batch(rng, 3, 100, 37, 2)
    with pool_of(2) as pool, NativeLayer(pool, experts, form, Options(isa=isa)) as layer:
        expected = layer.forward(x, ids, weights)
        for _ in range(3):
            order = rng.permutation(37)
            moved = layer.forward(x[order], ids[order], weights[order])
            assert same_bits(moved, expected[order])


def _strict_choices(form: Format) -> tuple[bool, ...]:
    return (False, True) if form.integer else (True,)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form,strict", [(f, s) for f in FORMATS for s in _strict_choices(f)], ids=str)
def test_batch_size_changes_no_bit(form: Format, strict: bool, isa: str) -> None:
    """Integer formats always, bf16 in strict mode: one row alone gives what it gives among others."""

    @settings(max_examples=8 if isa in SLOW_ISAS else 20)
    @given(shape=shapes(140 if isa in SLOW_ISAS else 300, 40, 2), seed=seeds)
    def check(shape: Shape, seed: int) -> None:
        rng = np.random.default_rng(seed)
        experts = _experts(rng, shape.experts, shape.hidden, shape.intermediate)
        x, ids, weights = _batch(rng, shape.experts, shape.hidden, max(shape.batch, 2), shape.top_k)
        with pool_of(2) as pool, NativeLayer(pool, experts, form, Options(isa=isa, strict=strict)) as layer:
            expected = layer.forward(x, ids, weights)
            for token in {0, x.shape[0] // 2, x.shape[0] - 1}:
                one = slice(token, token + 1)
                assert same_bits(layer.forward(x[one], ids[one], weights[one]), expected[one])
            half = slice(0, x.shape[0] // 2)
            assert same_bits(layer.forward(x[half], ids[half], weights[half]), expected[half])

    check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dispatch_thresholds_change_no_bit(form: Format, isa: str) -> None:
    """Rows of one expert, one fewer than a threshold and more than it, in strict mode for bf16."""
    rng = np.random.default_rng(54)
    experts = _experts(rng, 1, 96, 130)
    edges = sorted({*range(1, 18), 33} | {r + d for r in thresholds(isa, form.kind) for d in (-1, 0, 1)})
    x = make_input(rng, edges[-1], 96)
    ids, weights = np.zeros((edges[-1], 1), np.int64), rng.random((edges[-1], 1)).astype(np.float32)
    with (
        pool_of(2) as pool,
        NativeLayer(pool, experts, form, Options(isa=isa, strict=not form.integer)) as layer,
    ):
        singles = np.concatenate(
            [layer.forward(x[i : i + 1], ids[:1], weights[i : i + 1]) for i in range(edges[-1])]
        )
        for rows in edges:
            if rows > 0:
                assert same_bits(layer.forward(x[:rows], ids[:rows], weights[:rows]), singles[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_order_of_the_experts_of_a_token_changes_no_bit(form: Format, isa: str) -> None:
    rng = np.random.default_rng(55)
    experts = _experts(rng, 6, 80, 100)
    x, ids, weights = _batch(rng, 6, 80, 12, 4, "distinct")
    with pool_of(2) as pool, NativeLayer(pool, experts, form, Options(isa=isa)) as layer:
        expected = layer.forward(x, ids, weights)
        for _ in range(4):
            order = np.argsort(rng.random(ids.shape), axis=1)
            moved_ids, moved_weights = (np.take_along_axis(a, order, axis=1) for a in (ids, weights))
            assert same_bits(layer.forward(x, moved_ids, moved_weights), expected)


@pytest.mark.parametrize("form", INTEGER_FORMATS, ids=str)
def test_integer_formats_give_the_same_bits_on_every_isa(form: Format) -> None:
    @settings(max_examples=25)
    @given(
        shape=shapes(200, 40),
        activation=st.sampled_from((Activation(), Activation(7.0, 1.702))),
        dtype=st.sampled_from(DTYPES),
        shards=st.integers(1, 2),
        seed=seeds,
    )
    def check(
        shape: Shape, activation: Activation, dtype: np.dtype[np.generic], shards: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        experts = _experts(rng, shape.experts, shape.hidden, shape.intermediate)
        batch = _batch(rng, shape.experts, shape.hidden, shape.batch, shape.top_k)
        outputs = []
        with pool_of(*[1] * shards) as pool:
            for isa in ISAS:
                with NativeLayer(pool, experts, form, Options(activation, isa=isa)) as layer:
                    outputs.append(layer.forward(*batch, dtype))
        for isa, output in zip(ISAS, outputs, strict=True):
            assert same_bits(output, outputs[0]), f"{isa} differs from {ISAS[0]}"

    check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("activation", [Activation(), Activation(7.0, 1.702)], ids=["silu", "clamped"])
def test_nan_and_infinity_stay_in_their_row(form: Format, isa: str, activation: Activation) -> None:
    rng = np.random.default_rng(56)
    experts = _experts(rng, 3, 100, 200)
    x, ids, weights = _batch(rng, 3, 100, 20, 2, "distinct")
    poisoned = x.copy()
    rows = {3: np.nan, 8: np.inf, 9: -np.inf, 19: np.nan}
    for row, value in rows.items():
        poisoned[row, row * 5] = value
    others = [row for row in range(20) if row not in rows]
    for dtype in (F32, BF16, F16):
        with pool_of(2) as pool, NativeLayer(pool, experts, form, Options(activation, isa=isa)) as layer:
            expected = layer.forward(x, ids, weights, dtype)
            actual = layer.forward(poisoned, ids, weights, dtype)
        assert same_bits(actual[others], expected[others])
        for row, value in rows.items():
            # A clamp may make something finite of an infinite gate in bf16; nothing makes it of NaN, and the
            # integer formats lose the row's scale to either.
            if form.integer or np.isnan(value):
                assert np.isnan(actual[row].astype(np.float32)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", [form for form in FORMATS if form.rotated], ids=str)
def test_rows_that_a_rotation_makes_infinite_give_nan(form: Format, isa: str) -> None:
    rng = np.random.default_rng(62)
    experts = _experts(rng, 2, 100, 70)
    x, ids, weights = _batch(rng, 2, 100, 5, 2, "distinct")
    with pool_of(1) as pool, NativeLayer(pool, experts, form, Options(isa=isa)) as layer:
        expected = layer.forward(x, ids, weights)
        x[3, :64] = 1e38
        actual = layer.forward(x, ids, weights)
    assert np.isnan(actual[3]).all()
    others = [0, 1, 2, 4]
    assert same_bits(actual[others], expected[others])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("alpha", [0.0, 1.702])
@pytest.mark.parametrize("lost", ["gate", "up"])
def test_clamp_keeps_nan(isa: str, alpha: float, lost: str) -> None:
    """The difference of two infinities in one projection alone, while the clamp makes the other finite."""
    same, opposite = np.ones((1, 2), np.float32), np.array([[1, -1]], np.float32)
    down = np.ones((2, 1), np.float32)
    expert = ExpertWeights(opposite, same, down) if lost == "gate" else ExpertWeights(same, opposite, down)
    x = np.full((1, 2), np.inf, np.float32)
    options = Options(Activation(7.0, alpha), isa=isa)
    with pool_of(1) as pool, NativeLayer(pool, [expert], FORMATS[0], options) as layer:
        assert np.isnan(layer.forward(x, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_nan_routing_weight_stays_in_its_row(form: Format, isa: str) -> None:
    rng = np.random.default_rng(57)
    experts = _experts(rng, 2, 60, 70)
    x, ids, weights = _batch(rng, 2, 60, 6, 2, "distinct")
    with pool_of(2) as pool, NativeLayer(pool, experts, form, Options(isa=isa)) as layer:
        expected = layer.forward(x, ids, weights)
        weights[2, 1] = np.nan
        actual = layer.forward(x, ids, weights)
    assert np.isnan(actual[2]).all()
    others = [0, 1, 3, 4, 5]
    assert same_bits(actual[others], expected[others])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_a_row_gives_does_not_depend_on_earlier_batches(form: Format) -> None:
    """Scratch is reused: a large batch with NaN in it leaves nothing behind."""
    rng = np.random.default_rng(58)
    experts = _experts(rng, 3, 100, 200)
    large, small = _batch(rng, 3, 100, 60, 2), _batch(rng, 3, 100, 3, 2)
    large[0][:] = np.nan
    with pool_of(2) as pool, NativeLayer(pool, experts, form) as layer:
        expected = layer.forward(*small)
        layer.forward(*large)
        assert same_bits(layer.forward(*small), expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_flushing_subnormals_in_the_caller_changes_no_bit(form: Format) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(60)
    experts = [make_weights(rng, 60, 70)]
    x, ids = make_input(rng, 6, 60), np.zeros((6, 1), np.int64)
    weights = np.full((6, 1), 2.0**-128, np.float32)
    with pool_of(2) as pool, NativeLayer(pool, experts, form) as layer:
        expected = layer.forward(x, ids, weights)
        try:
            torch.set_flush_denormal(True)
            actual = layer.forward(x, ids, weights)
        finally:
            torch.set_flush_denormal(False)
    assert same_bits(actual, expected)
    assert ((np.abs(expected) < 2.0**-126) & (expected != 0)).any()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_shards_change_only_the_last_bits(form: Format) -> None:
    """Scales do not depend on the shards, so only the fp32 sum over I is cut differently."""
    rng = np.random.default_rng(59)
    experts = _experts(rng, 3, 90, 400)
    batch = _batch(rng, 3, 90, 8, 2, "distinct")
    outputs = []
    for threads in ((1,), (1, 1), (1, 1, 1), (1, 1, 1, 1, 1)):
        with pool_of(*threads) as pool, NativeLayer(pool, experts, form) as layer:
            outputs.append(layer.forward(*batch).astype(np.float64))
    scale = np.abs(outputs[0]).max()
    for output in outputs[1:]:
        assert np.abs(output - outputs[0]).max() <= 2.0**-18 * scale
