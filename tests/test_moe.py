"""The forward against the reference: every output within the bound that docs/numerics.md derives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk import _native
from ktk.errors import KtkArgumentError, KtkStateError
from layers import (
    FORMATS,
    SLOW_ISAS,
    WIDE_FORMATS,
    NativeLayer,
    Options,
    pool_of,
    runnable_isas,
    same_bits,
    thresholds,
)
from reference.activation import activate
from reference.moe import Activation, Bounded, Layer, output_tolerance
from reference.packing import ExpertWeights, Format
from reference.rounding import BF16, F16, F32, Array, F32Array
from strategies import (
    DTYPES,
    ROUTINGS,
    Shape,
    activations,
    make_input,
    make_routing,
    make_weights,
    seeds,
    shapes,
)

pytestmark = pytest.mark.any_binding

ISAS = runnable_isas()


def assert_within(actual: Array, expected: Bounded) -> None:
    """Every output within the bound of the reference; NaN never."""
    tolerance = output_tolerance(expected, actual.dtype)
    largest = 65504.0 if actual.dtype == F16 else np.inf
    value = np.where(np.abs(actual.astype(np.float64)) == np.inf, np.nan, actual.astype(np.float64))
    overflow = np.isnan(value) & (np.abs(expected.value) + tolerance > largest)
    wrong = ~((np.abs(value - expected.value) <= tolerance) | overflow)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        excess = np.abs(value - expected.value) / tolerance
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.size} outputs are off, up to {np.nanmax(excess):.3g} times the "
            f"tolerance; first at {row}, {column}: {actual[row, column]} instead of "
            f"{expected.value[row, column]} +- {tolerance[row, column]:.3g}"
        )


def check_against_reference(
    actual: Array,
    reference: Layer,
    x: Array,
    ids: npt.NDArray[np.int64],
    weights: F32Array,
    previous: Array | None = None,
    shards: int = 1,
) -> None:
    """Within the bound, and for the integer formats also bit for bit."""
    assert_within(actual, reference.forward(x, ids, weights, previous, shards))
    if reference.form.integer:
        with np.errstate(over="ignore"):
            exact = reference.forward_integer(x, ids, weights, activate, previous, shards).astype(
                actual.dtype
            )
        differ = actual.astype(np.float32) != exact.astype(np.float32)
        assert not differ.any(), f"{int(differ.sum())} of {differ.size} outputs are not the promised bits"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_forward_matches_the_reference(form: Format, isa: str) -> None:
    slow = isa in SLOW_ISAS
    largest = 140 if slow else 390

    @settings(max_examples=15 if slow else 30)
    @given(
        shape=shapes(largest, 20 if slow else 70),
        routing=st.sampled_from(ROUTINGS),
        masked=st.sets(st.integers(0, 5)),
        activation=activations,
        dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
        biases=st.booleans(),
        shards=st.integers(1, 3),
        incremental=st.booleans(),
        strict=st.booleans(),
        seed=seeds,
    )
    def check(
        shape: Shape,
        routing: str,
        masked: set[int],
        activation: Activation,
        dtypes: tuple[np.dtype[np.generic], ...],
        biases: bool,
        shards: int,
        incremental: bool,
        strict: bool,
        seed: int,
    ) -> None:
        rng = np.random.default_rng(seed)
        hidden_here = tuple(sorted(expert for expert in masked if expert < shape.experts))
        experts = [
            make_weights(rng, shape.hidden, shape.intermediate, dtypes[0], biases, spread=0.5)
            for _ in range(shape.experts)
        ]
        x = make_input(rng, shape.batch, shape.hidden, dtypes[1])
        ids, weights = make_routing(rng, routing, shape.batch, shape.experts, shape.top_k)
        previous = make_input(rng, shape.batch, shape.hidden, dtypes[2]) if incremental else None
        options = Options(activation, hidden_here, strict, isa)
        with pool_of(*[1] * shards) as pool, NativeLayer(pool, experts, form, options) as layer:
            actual = layer.forward(x, ids, weights, dtypes[2], previous)
        reference = Layer(experts, form, activation, hidden_here)
        check_against_reference(actual, reference, x, ids, weights, previous, shards)

    check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_both_sides_of_every_dispatch_threshold(form: Format, isa: str, strict: bool) -> None:
    rng = np.random.default_rng(31)
    experts = [make_weights(rng, 96, 160) for _ in range(2)]
    reference = Layer(experts, form)
    counts = {*range(1, 18), 33}
    for rows in thresholds(isa, form.kind):
        counts |= {rows - 1, rows, rows + 1}
    with pool_of(2) as pool, NativeLayer(pool, experts, form, Options(strict=strict, isa=isa)) as layer:
        for count in sorted(counts):
            x = make_input(rng, count + 1, 96, BF16)
            ids = np.ones((count + 1, 1), np.int64)
            ids[count // 2] = 0
            weights = rng.random((count + 1, 1)).astype(np.float32)
            check_against_reference(layer.forward(x, ids, weights), reference, x, ids, weights)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", [FORMATS[i] for i in (0, 1, 2, 3, 5, 7, 9, 12)], ids=str)
def test_sizes_past_the_blocks_inside_kernels(form: Format, isa: str) -> None:
    """Kernels block K, panels and the rows of an expert; here each is longer than a block, with a tail."""
    rng = np.random.default_rng(45)
    options = Options(isa=isa, max_tokens=1100)
    with pool_of(2) as pool:
        for hidden, intermediate, rows in (
            (1110, 150, 19),
            (150, 1110, 19),
            (33, 20, 513),
            (17, 18, 1045),
            # Whole powers of two of steps, whose rows lie apart.
            (2048, 30, 35),
            (30, 2048, 35),
        ):
            experts = [make_weights(rng, hidden, intermediate)]
            x = make_input(rng, rows, hidden, BF16)
            ids, weights = np.zeros((rows, 1), np.int64), rng.random((rows, 1)).astype(np.float32)
            with NativeLayer(pool, experts, form, options) as layer:
                actual = layer.forward(x, ids, weights)
            check_against_reference(actual, Layer(experts, form), x, ids, weights)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", WIDE_FORMATS, ids=str)
def test_rows_of_several_wide_groups(form: Format, isa: str) -> None:
    """Neither size is a multiple of 64, and both have several groups of weights and of activations."""
    rng = np.random.default_rng(46)
    experts = [make_weights(rng, 1100, 590, BF16)]
    reference = Layer(experts, form)
    for threads in ((2,), (1, 1)):
        with pool_of(*threads) as pool, NativeLayer(pool, experts, form, Options(isa=isa)) as layer:
            for rows in (1, 19):
                x = make_input(rng, rows, 1100, BF16)
                ids, weights = np.zeros((rows, 1), np.int64), rng.random((rows, 1)).astype(np.float32)
                actual = layer.forward(x, ids, weights)
                check_against_reference(actual, reference, x, ids, weights, shards=len(threads))


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[1], FORMATS[3], FORMATS[9]], ids=str)
def test_batches_of_several_hundred(form: Format) -> None:
    rng = np.random.default_rng(32)
    experts = [make_weights(rng, 72, 136) for _ in range(5)]
    with pool_of(2) as pool, NativeLayer(pool, experts, form, Options(max_tokens=700)) as layer:
        for batch in (0, 1, 255, 256, 257, 700):
            x = make_input(rng, batch, 72, BF16)
            ids, weights = make_routing(rng, "mixed", batch, 5, 3)
            actual = layer.forward(x, ids, weights, BF16)
            check_against_reference(actual, Layer(experts, form), x, ids, weights)


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[1], FORMATS[3], FORMATS[9]], ids=str)
def test_experts_of_any_number_of_rows_overlap(form: Format) -> None:
    """Where rows fill tiles, gather, gate/up and down are one section of units that wait for one another."""
    isa = "amx_emulated"
    if isa not in ISAS:
        pytest.skip("no emulated tiles in this build")
    rng = np.random.default_rng(47)
    experts = [make_weights(rng, 40, 270) for _ in range(9)]
    rows = (1, 16, 1, 17, 2, 70, 15, 33, 1)
    ids = rng.permutation(np.repeat(np.arange(9), rows))[:, None].astype(np.int64)
    x, weights = make_input(rng, ids.size, 40, BF16), rng.random((ids.size, 1)).astype(np.float32)
    reference = Layer(experts, form)
    for shards in ((1,), (3,), (6,)), ((1, 1), (2, 1)):
        outputs = []
        for threads in shards:
            with pool_of(*threads) as pool, NativeLayer(pool, experts, form, Options(isa=isa)) as layer:
                outputs += [layer.forward(x, ids, weights) for _ in range(3)]
        check_against_reference(outputs[0], reference, x, ids, weights, shards=len(shards[0]))
        assert all(same_bits(output, outputs[0]) for output in outputs)


def test_overlapping_units_on_one_thread_of_several_shards() -> None:
    """Units of one shard never wait for those of another: a thread that runs all of them finishes."""
    if "amx_emulated" not in ISAS:
        pytest.skip("no emulated tiles in this build")
    rng = np.random.default_rng(48)
    experts = [make_weights(rng, 72, 300) for _ in range(3)]
    ids, weights = np.arange(96)[:, None] % 3, np.ones((96, 1), np.float32)
    x = make_input(rng, 96, 72, BF16)
    with pool_of(1, 1) as pool, NativeLayer(pool, experts, FORMATS[0], Options(isa="amx_emulated")) as layer:
        expected = layer.forward(x, ids.astype(np.int64), weights)
        _native.set_num_threads(1)
        try:
            assert same_bits(layer.forward(x, ids.astype(np.int64), weights), expected)
        finally:
            _native.set_num_threads(0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_long_rows(form: Format) -> None:
    rng = np.random.default_rng(33)
    experts = [make_weights(rng, 3001, 40), make_weights(rng, 3001, 40)]
    x = make_input(rng, 3, 3001)
    ids, weights = make_routing(rng, "distinct", 3, 2, 2)
    with pool_of(2) as pool, NativeLayer(pool, experts, form) as layer:
        check_against_reference(layer.forward(x, ids, weights), Layer(experts, form), x, ids, weights)
    experts = [make_weights(rng, 40, 3001)]
    x, ids, weights = make_input(rng, 3, 40), np.zeros((3, 1), np.int64), np.ones((3, 1), np.float32)
    with pool_of(1, 1) as pool, NativeLayer(pool, experts, form) as layer:
        check_against_reference(
            layer.forward(x, ids, weights), Layer(experts, form), x, ids, weights, shards=2
        )


@pytest.mark.parametrize("isa", ISAS)
def test_largest_integer_sums(isa: str) -> None:
    """All products at their extreme and of one sign, over the longest row: sums reach 2**30."""
    hidden = 65536
    ones = np.ones((1, hidden), np.float32)
    experts = [ExpertWeights(ones, -ones, np.ones((hidden, 1), np.float32))]
    rows = 9
    x = np.ones((rows, hidden), np.float32)
    x[1::2] = -1
    ids, weights = np.zeros((rows, 1), np.int64), np.ones((rows, 1), np.float32)
    activation = Activation(limit=2.0)
    with pool_of(1) as pool:
        for form in (FORMATS[1], FORMATS[2], FORMATS[3], FORMATS[5]):
            with NativeLayer(pool, experts, form, Options(activation, isa=isa)) as layer:
                reference = Layer(experts, form, activation)
                check_against_reference(layer.forward(x, ids, weights), reference, x, ids, weights)


RANGE_ACTIVATIONS = (Activation(), Activation(7.0), Activation(7.0, 1.702), Activation(0.0, 0.5))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", RANGE_ACTIVATIONS, ids=str)
def test_activation_over_its_whole_range(isa: str, activation: Activation) -> None:
    """One neuron, so that the input is the gate, and int8 loses no more than fp32 does."""
    steps = np.exp2(np.linspace(-40, 60, 101))
    points = np.concatenate([np.linspace(-110, 110, 881), steps, -steps, [0.0, -0.0]]).astype(np.float32)
    one = np.ones((1, 1), np.float32)
    x, ids = points[:, None], np.zeros((points.size, 1), np.int64)
    weights = np.ones((points.size, 1), np.float32)
    with pool_of(2) as pool:
        for up, up_bias in ((1.0, 0.0), (0.0, 1.0)):
            experts = [ExpertWeights(one, one * np.float32(up), one, up_bias=np.array([up_bias], np.float32))]
            for form in (FORMATS[0], FORMATS[1]):
                options = Options(activation, isa=isa, max_tokens=points.size)
                with NativeLayer(pool, experts, form, options) as layer:
                    actual = layer.forward(x, ids, weights)
                check_against_reference(actual, Layer(experts, form, activation), x, ids, weights)


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[1], FORMATS[6]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_contribution_gives_zeros_or_what_was_there(form: Format, dtype: np.dtype[np.generic]) -> None:
    rng = np.random.default_rng(35)
    experts = [make_weights(rng, 50, 30) for _ in range(3)]
    x = make_input(rng, 4, 50)
    weights = np.ones((4, 2), np.float32)
    previous = make_input(rng, 4, 50, dtype)
    with pool_of(1, 1) as pool, NativeLayer(pool, experts, form, Options(masked=(1,))) as layer:
        for ids in (np.full((4, 2), -1), np.full((4, 2), 3), np.full((4, 2), 1), np.full((4, 2), 2**62)):
            assert (layer.forward(x, ids.astype(np.int64), weights, dtype) == 0).all()
            kept = layer.forward(x, ids.astype(np.int64), weights, dtype, previous)
            assert (kept == previous).all()


def test_mask_is_read_at_each_forward() -> None:
    rng = np.random.default_rng(36)
    experts = [make_weights(rng, 50, 30) for _ in range(2)]
    x, ids = make_input(rng, 1, 50), np.array([[0, 1]], np.int64)
    weights = np.ones((1, 2), np.float32)
    with pool_of(1) as pool, NativeLayer(pool, experts, FORMATS[1], Options(masked=(0,))) as layer:
        for masked in ((0,), (), (1,), (0, 1)):
            layer.mask[:] = 0
            layer.mask[list(masked)] = 1
            reference = Layer(experts, FORMATS[1], masked=masked)
            check_against_reference(layer.forward(x, ids, weights), reference, x, ids, weights)


def test_masked_experts_need_no_weights() -> None:
    rng = np.random.default_rng(37)
    experts = [make_weights(rng, 50, 30) for _ in range(2)]
    x, ids = make_input(rng, 1, 50), np.array([[0, 1]], np.int64)
    weights = np.ones((1, 2), np.float32)
    with (
        pool_of(1) as pool,
        NativeLayer(pool, experts, FORMATS[3], Options(masked=(1,)), load=False) as layer,
    ):
        layer.pack(0, experts[0])
        reference = Layer(experts, FORMATS[3], masked=(1,))
        check_against_reference(layer.forward(x, ids, weights), reference, x, ids, weights)
        layer.mask[1] = 0
        with pytest.raises(KtkStateError, match="1"):
            layer.forward(x, ids, weights)


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[1]], ids=str)
def test_fewer_columns_than_the_layer_allows(form: Format) -> None:
    rng = np.random.default_rng(38)
    experts = [make_weights(rng, 50, 30) for _ in range(4)]
    with pool_of(1) as pool, NativeLayer(pool, experts, form, Options(top_k=3)) as layer:
        for top_k in (1, 2, 3):
            x = make_input(rng, 5, 50)
            ids, weights = make_routing(rng, "distinct", 5, 4, top_k)
            check_against_reference(layer.forward(x, ids, weights), Layer(experts, form), x, ids, weights)
        ids, weights = make_routing(rng, "distinct", 5, 4, 4)
        with pytest.raises(KtkArgumentError):
            layer.forward(x, ids, weights)


def test_more_tokens_than_the_layer_allows() -> None:
    rng = np.random.default_rng(39)
    experts = [make_weights(rng, 50, 30)]
    with pool_of(1) as pool, NativeLayer(pool, experts, FORMATS[1], Options(max_tokens=4)) as layer:
        ids, weights = np.zeros((5, 1), np.int64), np.ones((5, 1), np.float32)
        x = make_input(rng, 5, 50)
        with pytest.raises(KtkArgumentError, match="4"):
            layer.forward(x, ids, weights)
        actual = layer.forward(x[:4], ids[:4], weights[:4])
        check_against_reference(actual, Layer(experts, FORMATS[1]), x[:4], ids[:4], weights[:4])


@pytest.mark.parametrize("isa", ISAS)
def test_outputs_past_the_range_of_f16_become_infinite(isa: str) -> None:
    experts = [make_weights(np.random.default_rng(40), 50, 30, biases=True)]
    x, ids = make_input(np.random.default_rng(41), 2, 50), np.zeros((2, 1), np.int64)
    weights = np.full((2, 1), 3e7, np.float32)
    with pool_of(1) as pool, NativeLayer(pool, experts, FORMATS[1], Options(isa=isa)) as layer:
        actual = layer.forward(x, ids, weights, F16)
        check_against_reference(actual, Layer(experts, FORMATS[1]), x, ids, weights)
        assert np.isinf(actual.astype(np.float32)).any()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_two_layers_of_different_shapes_alive_at_once(form: Format) -> None:
    rng = np.random.default_rng(42)
    small = [make_weights(rng, 33, 65) for _ in range(2)]
    large = [make_weights(rng, 200, 300, biases=True) for _ in range(5)]
    batches = []
    for experts, hidden in ((small, 33), (large, 200)):
        x = make_input(rng, 9, hidden)
        batches.append((x, *make_routing(rng, "duplicates", 9, len(experts), 2)))
    with (
        pool_of(2) as pool,
        pool_of(1, 1) as other,
        NativeLayer(pool, small, form) as first,
        NativeLayer(pool, large, form, Options(Activation(7.0, 1.702))) as second,
        NativeLayer(other, large, form, Options(Activation(7.0, 1.702))) as third,
    ):
        alone = [first.forward(*batches[0]), second.forward(*batches[1]), third.forward(*batches[1])]
        for _ in range(2):
            assert same_bits(third.forward(*batches[1]), alone[2])
            assert same_bits(first.forward(*batches[0]), alone[0])
            assert same_bits(second.forward(*batches[1]), alone[1])
    check_against_reference(alone[0], Layer(small, form), *batches[0])
    reference = Layer(large, form, Activation(7.0, 1.702))
    check_against_reference(alone[1], reference, *batches[1])
    check_against_reference(alone[2], reference, *batches[1], shards=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_incremental_adds_before_the_rounding(dtype: np.dtype[np.generic]) -> None:
    rng = np.random.default_rng(43)
    experts = [make_weights(rng, 64, 64) for _ in range(3)]
    x = make_input(rng, 6, 64)
    ids, weights = make_routing(rng, "distinct", 6, 3, 3)
    with pool_of(1) as pool, NativeLayer(pool, experts, FORMATS[1]) as layer:
        first = layer.forward(x, ids[:, :1], weights[:, :1], dtype)
        second = layer.forward(x, ids[:, 1:], weights[:, 1:], dtype, first)
        reference = Layer(experts, FORMATS[1])
        check_against_reference(first, reference, x, ids[:, :1], weights[:, :1])
        check_against_reference(second, reference, x, ids[:, 1:], weights[:, 1:], first)


def test_f32_of_the_three_dtypes_is_one_value() -> None:
    """bf16 and f16 inputs are read exactly, so the same values give the same bits in all dtypes."""
    rng = np.random.default_rng(44)
    experts = [make_weights(rng, 64, 64)]
    shared = (rng.integers(-128, 128, (3, 64)) / 64).astype(np.float32)
    ids, weights = np.zeros((3, 1), np.int64), np.ones((3, 1), np.float32)
    with pool_of(1) as pool:
        for form in FORMATS:
            with NativeLayer(pool, experts, form) as layer:
                outputs = [layer.forward(shared.astype(dtype), ids, weights, F32) for dtype in DTYPES]
            assert same_bits(outputs[0], outputs[1]) and same_bits(outputs[0], outputs[2])
