"""Packed parts: equal to the reference's bytes, portable between layers, refused when they are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk import _native
from ktk.errors import KtkArgumentError, KtkStateError
from layers import (
    FORMATS,
    PART_CODES,
    WIDE_FORMATS,
    NativeLayer,
    Options,
    pool_of,
    runnable_isas,
    same_bits,
)
from reference.packing import PART_NAMES, ExpertWeights, Format, pack
from reference.rounding import BF16, F16, F32
from strategies import DTYPES, make_input, make_routing, make_weights, seeds, sizes

GOLDEN = Path(__file__).parent / "golden"

INT8, INT4_32, INT8_128, INT8_512 = FORMATS[1], FORMATS[3], FORMATS[7], FORMATS[9]


@pytest.fixture(scope="module")
def one_pool() -> Iterator[_native.Pool]:
    with pool_of(2) as pool:
        yield pool


def assert_parts_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in PART_NAMES:
        assert actual[name].size == expected[name].size, name
        different = np.nonzero(actual[name] != expected[name])[0]
        if different.size:
            first = int(different[0])
            raise AssertionError(
                f"{name}: {different.size} of {expected[name].size} bytes differ, first at {first}: "
                f"{int(actual[name][first])} instead of {int(expected[name][first])}"
            )


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packing_gives_the_reference_bytes(one_pool: _native.Pool, form: Format, isa: str) -> None:
    @settings(max_examples=12)
    @given(
        hidden=sizes(200),
        intermediate=sizes(200),
        dtype=st.sampled_from(DTYPES),
        biases=st.booleans(),
        spread=st.sampled_from((0.0, 2.0)),
        seed=seeds,
    )
    def check(
        hidden: int, intermediate: int, dtype: np.dtype[np.generic], biases: bool, spread: float, seed: int
    ) -> None:
        weights = make_weights(np.random.default_rng(seed), hidden, intermediate, dtype, biases, spread)
        with NativeLayer(one_pool, [weights], form, Options(isa=isa)) as layer:
            assert_parts_equal(layer.export(0), pack(weights, form))

    check()


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", WIDE_FORMATS, ids=str)
def test_rows_of_several_wide_groups(form: Format, dtype: np.dtype[np.generic], isa: str) -> None:
    """Neither size is a multiple of 64: the last columns are not rotated, and the last groups are short."""
    rng = np.random.default_rng(22)
    weights = make_weights(rng, 1100, 590, dtype, spread=1.0)
    for threads in ((2,), (1, 1)):
        with pool_of(*threads) as pool, NativeLayer(pool, [weights], form, Options(isa=isa)) as layer:
            assert_parts_equal(layer.export(0), pack(weights, form))


def _special(kind: str) -> ExpertWeights:
    rng = np.random.default_rng(11)
    weights = make_weights(rng, 150, 70)
    for matrix in (weights.gate, weights.up, weights.down):
        if kind == "zero rows":
            matrix[::3] = 0
        elif kind == "zero groups":
            matrix[:, 32:64] = 0
            matrix[1, :] = 0
            matrix[1, 3] = 1
        elif kind == "negative zeros":
            matrix[::2] = -0.0
        elif kind == "all zero":
            matrix[:] = 0
        elif kind == "tiny":
            matrix *= np.float32(2.0**-120)
        elif kind == "around the threshold":
            matrix *= np.exp2(rng.integers(-104, -96, (matrix.shape[0], 1))).astype(np.float32)
        elif kind == "subnormal":
            matrix *= np.float32(2.0**-133)
        elif kind == "huge":
            matrix *= np.float32(2.0**124)
        elif kind == "ties":
            matrix[:] = rng.integers(-16, 17, matrix.shape) / np.float32(2)
        elif kind == "equal extremes":
            matrix[:] = rng.choice([-1.0, 1.0], matrix.shape)
        elif kind == "one sign":
            np.abs(matrix, out=matrix)
            matrix[::2] *= -1
        elif kind == "one outlier":
            matrix[:, 5] = 1000
    return weights


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        "zero rows",
        "zero groups",
        "negative zeros",
        "all zero",
        "tiny",
        "around the threshold",
        "subnormal",
        "huge",
        "ties",
        "equal extremes",
        "one sign",
        "one outlier",
    ],
)
def test_packing_of_special_values(one_pool: _native.Pool, form: Format, kind: str) -> None:
    weights = _special(kind)
    with NativeLayer(one_pool, [weights], form) as layer:
        assert_parts_equal(layer.export(0), pack(weights, form))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("threads", [(1, 1), (1, 1, 1)], ids=lambda t: f"{len(t)} shards")
def test_parts_do_not_depend_on_the_shards(form: Format, threads: tuple[int, ...]) -> None:
    rng = np.random.default_rng(12)
    with pool_of(*threads) as pool:
        for intermediate in (40, 200, 417):
            weights = make_weights(rng, 90, intermediate, biases=True)
            with NativeLayer(pool, [weights], form) as layer:
                parts = layer.export(0)
                assert_parts_equal(parts, pack(weights, form))
                layer.load(0, parts)
                assert_parts_equal(layer.export(0), parts)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_imported_layer_computes_the_same_bits(form: Format) -> None:
    rng = np.random.default_rng(13)
    experts = [make_weights(rng, 100, 300, biases=index == 1) for index in range(3)]
    x = make_input(rng, 5, 100)
    ids, weights = make_routing(rng, "distinct", 5, 3, 2)
    with (
        pool_of(1, 1) as pool,
        NativeLayer(pool, experts, form) as packed,
        NativeLayer(pool, experts, form, load=False) as loaded,
    ):
        for index in (2, 0, 1):
            loaded.load(index, pack(experts[index], form))
        assert same_bits(packed.forward(x, ids, weights), loaded.forward(x, ids, weights))
        assert packed.moe.weight_bytes == loaded.moe.weight_bytes > 0


def test_packing_again_replaces_the_expert(one_pool: _native.Pool) -> None:
    rng = np.random.default_rng(14)
    first, second = make_weights(rng, 70, 50, biases=True), make_weights(rng, 70, 50)
    with NativeLayer(one_pool, [first], INT4_32) as layer:
        layer.pack(0, second)
        assert_parts_equal(layer.export(0), pack(second, INT4_32))


@pytest.mark.parametrize("form", [FORMATS[0], INT8, INT8_128, INT8_512, FORMATS[2], INT4_32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_weights_that_are_not_finite_are_refused(
    one_pool: _native.Pool, form: Format, dtype: np.dtype[np.generic], matrix: str
) -> None:
    rng = np.random.default_rng(15)
    good = make_weights(rng, 70, 50, dtype)
    ids, routing = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    x = make_input(rng, 1, 70)
    with NativeLayer(one_pool, [good], form) as layer:
        before = layer.forward(x, ids, routing)
        for value in (np.nan, np.inf, -np.inf):
            for position in ((0, 0), (-1, -1), (20, 33)):
                bad = make_weights(rng, 70, 50, dtype)
                getattr(bad, matrix)[position] = value
                with pytest.raises(KtkArgumentError, match="NaN"):
                    layer.pack(0, bad)
        with pytest.raises(KtkStateError):
            layer.forward(x, ids, routing)
        layer.pack(0, good)
        assert same_bits(layer.forward(x, ids, routing), before)


def test_scales_that_would_overflow_are_refused(one_pool: _native.Pool) -> None:
    weights = make_weights(np.random.default_rng(16), 70, 50)
    weights.up[3, 4], weights.up[3, 5] = 3e38, -3e38
    with pytest.raises(KtkArgumentError), NativeLayer(one_pool, [weights], INT4_32):
        pass
    weights.up[3, 5] = 3.4e38
    with pytest.raises(KtkArgumentError), NativeLayer(one_pool, [weights], FORMATS[0]):
        pass
    weights.up[3] = 1e38
    NativeLayer(one_pool, [weights], INT8_128).moe.close()
    for form in (INT8_512, FORMATS[11]):
        # Of 64 equal weights a rotation makes one that is 8 times as large.
        with pytest.raises(KtkArgumentError), NativeLayer(one_pool, [weights], form):
            pass


@pytest.mark.parametrize("form", [FORMATS[0], INT8, INT8_128, FORMATS[2], INT4_32], ids=str)
def test_parts_that_are_not_finite_are_refused(one_pool: _native.Pool, form: Format) -> None:
    weights = make_weights(np.random.default_rng(17), 70, 50, biases=True)
    parts = pack(weights, form)
    with NativeLayer(one_pool, [weights], form) as layer:
        for name, part in parts.items():
            if not part.size or not name.endswith(("_scale", "_bias")):
                continue
            dtype = BF16 if name.endswith("_scale") and form.scale_group else F32
            for value in (np.nan, np.inf, -np.inf):
                bad = part.copy()
                bad.view(dtype)[7] = value
                with pytest.raises(KtkArgumentError):
                    layer.load(0, {name: bad})
        layer.load(0, parts)
        assert_parts_equal(layer.export(0), parts)


@pytest.mark.parametrize("name", ["gate_up_factors", "down_factors"])
@pytest.mark.parametrize("multiplier, offset", [(0, 8), (16, 16), (17, 1), (1, 241), (255, 255)])
def test_factors_that_leave_a_byte_are_refused(
    one_pool: _native.Pool, name: str, multiplier: int, offset: int
) -> None:
    weights = make_weights(np.random.default_rng(21), 70, 50)
    good = pack(weights, INT4_32)[name]
    with NativeLayer(one_pool, [weights], INT4_32) as layer:
        bad = good.copy().reshape(-1, 2, 16)
        bad[-1, :, 5] = multiplier, offset
        with pytest.raises(KtkArgumentError, match=f"multiplier {multiplier} with offset {offset}"):
            layer.load(0, {name: bad.reshape(-1)})
        bad[-1, :, 5] = 17, 0
        layer.load(0, {name: bad.reshape(-1)})


@pytest.mark.parametrize("form", [FORMATS[0], INT8_128, INT4_32], ids=str)
def test_wrong_arguments_of_parts(one_pool: _native.Pool, form: Format) -> None:
    weights = make_weights(np.random.default_rng(18), 70, 50)
    parts = pack(weights, form)
    with NativeLayer(one_pool, [weights, weights], form) as layer:
        moe = layer.moe
        for name, part in parts.items():
            code = PART_CODES[name]
            room = np.zeros(part.size + 64, np.uint8)
            for size in {max(part.size - 1, 0), part.size + 1} - {part.size}:
                with pytest.raises(KtkArgumentError):
                    moe.import_part(0, code, room.ctypes.data, size)
                with pytest.raises(KtkArgumentError):
                    moe.export_part(0, code, room.ctypes.data, size)
            if part.size:
                for expert in (-1, 2, 2**31 - 1):
                    with pytest.raises(KtkArgumentError):
                        moe.import_part(expert, code, room.ctypes.data, part.size)
                    with pytest.raises(KtkArgumentError):
                        moe.export_part(expert, code, room.ctypes.data, part.size)
                with pytest.raises(KtkArgumentError):
                    moe.import_part(0, code, 0, part.size)
                with pytest.raises(KtkArgumentError):
                    moe.export_part(0, code, 0, part.size)
        for code in (-1, len(PART_NAMES)):
            with pytest.raises(KtkArgumentError):
                moe.part_bytes(code)
        assert_parts_equal(layer.export(1), parts)


def test_a_partly_imported_expert_does_not_count_as_loaded(one_pool: _native.Pool) -> None:
    rng = np.random.default_rng(19)
    weights = make_weights(rng, 70, 50)
    parts = pack(weights, INT4_32)
    x, ids, routing = make_input(rng, 1, 70), np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    required = [name for name in PART_NAMES if parts[name].size and not name.endswith("_bias")]
    with NativeLayer(one_pool, [weights], INT4_32, load=False) as layer:
        for name in required:
            with pytest.raises(KtkStateError):
                layer.forward(x, ids, routing)
            layer.load(0, {name: parts[name]})
        assert np.isfinite(layer.forward(x, ids, routing)).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": 48},
        {"group_size": -32},
        {"group_size": 16, "format": _native.FORMAT_INT8},
        {"group_size": 384, "format": _native.FORMAT_INT8},
        {"group_size": 1024, "format": _native.FORMAT_INT8},
        {"group_size": 256, "format": _native.FORMAT_INT4},
        {"rotated": True, "format": _native.FORMAT_BF16},
        {"rotated": True, "group_size": 128, "format": _native.FORMAT_FP8},
        {"group_size": 32, "format": _native.FORMAT_BF16},
        {"group_size": 0, "format": _native.FORMAT_FP8},
        {"group_size": 64, "format": _native.FORMAT_FP8},
        {"format": 4},
        {"format": -1},
        {"num_experts": 0},
        {"top_k": 0},
        {"top_k": 5},
        {"hidden_size": 0},
        {"hidden_size": 65537},
        {"intermediate_size": -1},
        {"intermediate_size": 65537},
        {"max_tokens": 0},
        {"swiglu_limit": float("nan")},
        {"swiglu_alpha": float("nan")},
    ],
    ids=str,
)
def test_wrong_layers_are_refused(one_pool: _native.Pool, wrong: dict[str, object]) -> None:
    good = {
        "num_experts": 4,
        "top_k": 2,
        "hidden_size": 64,
        "intermediate_size": 32,
        "max_tokens": 8,
        "format": _native.FORMAT_INT4,
    }
    with pytest.raises(KtkArgumentError):
        _native.Moe(one_pool, **{**good, **wrong})  # type: ignore[arg-type]
    _native.Moe(one_pool, **good).close()  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_layout_has_not_drifted(one_pool: _native.Pool, form: Format) -> None:
    with np.load(GOLDEN / "source.npz") as source:
        weights = ExpertWeights(**{name: source[name] for name in source.files})
    with np.load(GOLDEN / f"{form}.npz") as stored:
        golden = {name: stored[name] for name in PART_NAMES}
    assert_parts_equal(pack(weights, form), golden)
    with NativeLayer(one_pool, [weights], form) as layer:
        assert_parts_equal(layer.export(0), golden)
    with NativeLayer(one_pool, [weights], form, load=False) as layer:
        layer.load(0, golden)
        assert_parts_equal(layer.export(0), golden)


def test_f16_weights_are_read_exactly(one_pool: _native.Pool) -> None:
    halves = make_weights(np.random.default_rng(20), 60, 40, F16)
    halves.gate[0, :4] = [2.0**-24, -(2.0**-24), 65504.0, 6.1e-5]
    with NativeLayer(one_pool, [halves], INT8) as layer:
        assert_parts_equal(layer.export(0), pack(halves, INT8))
