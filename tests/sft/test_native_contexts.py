"""Contexts of the native fine-tuning, what never changes a bit, and misuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import ktk
from ktk import _native
from ktk.errors import KtkArgumentError, KtkStateError
from layers import DTYPE_CODES, FORMATS, NativeLayer, Options, pool_of, same_bits
from native_sft import (
    BF16_FORMAT,
    POLICIES,
    SOME_FORMATS,
    Case,
    NativeGradients,
    NativeTrainer,
    Saved,
    make_adapters,
    run,
)
from reference.packing import Format
from reference.rotation import rotate
from reference.rounding import BF16, F32, Array
from reference.sft import LORA_NAMES, dropout_factors
from strategies import make_input, make_routing, make_weights

HIDDEN, INNER, EXPERTS, RANK, BATCH = 64, 96, 3, 4, 10


@pytest.fixture
def layer(pool: _native.Pool):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    experts = [make_weights(rng, HIDDEN, INNER) for _ in range(EXPERTS)]
    with NativeLayer(pool, experts, BF16_FORMAT, Options(max_tokens=64)) as made:
        yield made


def batch(seed: int = 0, count: int = BATCH) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    x = make_input(rng, count, HIDDEN, BF16)
    ids, weights = make_routing(rng, "distinct", count, EXPERTS, 2)
    return x, ids, weights, rng.standard_normal((count, HIDDEN)).astype(np.float32)


def adapters(seed: int = 0, **options):  # type: ignore[no-untyped-def]
    return make_adapters(np.random.default_rng(seed), EXPERTS, HIDDEN, INNER, RANK, **options)


def assert_same(first: NativeGradients, second: NativeGradients) -> None:
    assert same_bits(first.input, second.input)
    assert same_bits(first.weights, second.weights)
    for name in first.lora:
        assert same_bits(first.lora[name], second.lora[name]), name
    for name in first.base:
        assert same_bits(first.base[name], second.base[name]), name


# ---- what changes no bit ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", SOME_FORMATS, ids=str)
def test_threads_repeats_and_policies_change_no_bit(form: Format, isa: str) -> None:
    # A float32 input that bf16 does not hold: one policy keeps its rounding, the other the input itself.
    case = Case(form, isa, threads=(1,), dropout=0.2, input_dtype=F32, intermediate=300)
    case = dataclasses.replace(case, base=form.kind == _native.FORMAT_BF16)
    output, gradients, *_ = run(case)
    for threads in ((1,), (2,), (3,)):
        for policy in POLICIES:
            again, repeated, *_ = run(dataclasses.replace(case, threads=threads, policy=policy))
            assert same_bits(again, output)
            assert_same(repeated, gradients)


@pytest.mark.parametrize("form", [BF16_FORMAT, Format(_native.FORMAT_INT8)], ids=str)
def test_threads_of_a_shard_change_no_bit(form: Format) -> None:
    case = Case(form, threads=(1, 1), intermediate=300)
    output, gradients, *_ = run(case)
    again, repeated, *_ = run(dataclasses.replace(case, threads=(2, 1)))
    assert same_bits(again, output)
    assert_same(repeated, gradients)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_skip_lora_is_the_forward_of_inference(form: Format, isa: str) -> None:
    rng = np.random.default_rng(4)
    experts = [make_weights(rng, HIDDEN, INNER, biases=True) for _ in range(EXPERTS)]
    x, ids, weights, _ = batch()
    with pool_of(2) as pool, NativeLayer(pool, experts, form, Options(isa=isa)) as made:
        plain = made.forward(x, ids, weights)
        for trainer in (NativeTrainer(made), NativeTrainer(made, adapters(), skip_lora=True)):
            for policy in (_native.POLICY_NONE, *POLICIES):
                output, _ = trainer.forward(x, ids, weights, policy)
                assert same_bits(output, plain)


def test_contexts_live_in_any_number_and_order(layer: NativeLayer) -> None:
    trainer = NativeTrainer(layer, adapters())
    batches = [batch(seed, 5 + seed) for seed in range(6)]
    alone = []
    for x, ids, weights, grad in batches:
        alone.append(trainer.forward(x, ids, weights)[1].backward(grad))
    saved = [
        trainer.forward(x, ids, weights, POLICIES[index % 2])[1]
        for index, (x, ids, weights, _) in enumerate(batches)
    ]
    for index in (3, 0, 5, 1, 4, 2):
        assert_same(saved[index].backward(batches[index][3]), alone[index])


def test_a_gradient_beyond_bf16_reaches_that_token_only(isa: str) -> None:
    rng = np.random.default_rng(6)
    experts = [make_weights(rng, HIDDEN, INNER) for _ in range(EXPERTS)]
    x, ids, weights, grad = batch()
    with pool_of(2) as pool, NativeLayer(pool, experts, BF16_FORMAT, Options(isa=isa)) as made:
        trainer = NativeTrainer(made, adapters())
        clean = trainer.forward(x, ids, weights)[1].backward(grad)
        for value in (3.4e38, -3.4e38):  # finite, and infinity once rounded
            broken = grad.copy()
            broken[3, 7] = value
            found = trainer.forward(x, ids, weights)[1].backward(broken)
            others = np.arange(BATCH) != 3
            assert same_bits(found.input[others], clean.input[others])
            assert same_bits(found.weights[others], clean.weights[others])
            assert not np.isfinite(found.input[3]).any()
            for name in ("down_lora_b", "gate_lora_a"):
                assert not np.isfinite(found.lora[name][ids[3]]).all(), name
                idle = np.setdiff1d(np.arange(EXPERTS), ids[3])
                assert same_bits(found.lora[name][idle], clean.lora[name][idle]), name


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_refused(
    pool: _native.Pool, dtype: np.dtype[np.generic], value: float
) -> None:
    rng = np.random.default_rng(6)
    hidden, count = 1088, 50  # more than is looked at in one go, in either direction
    x = make_input(rng, count, hidden, BF16)
    ids, weights = make_routing(rng, "distinct", count, EXPERTS, 2)
    grad = rng.standard_normal((count, hidden)).astype(dtype)
    experts = [make_weights(rng, hidden, INNER) for _ in range(EXPERTS)]
    with NativeLayer(pool, experts, BF16_FORMAT, Options(max_tokens=64)) as made:
        trainer = NativeTrainer(made)
        expected = trainer.forward(x, ids, weights)[1].backward(grad)
        _, saved = trainer.forward(x, ids, weights)
        for first, column in ((0, 0), (31, 511), (44, 512), (44, hidden - 1)):
            broken = grad.copy()
            broken[first, column] = broken[45, column] = value
            with pytest.raises(KtkArgumentError, match=f"in 2 of {count} tokens, .* token {first}: "):
                saved.backward(broken)
        # Nothing is lost: the same forward takes a sound gradient.
        assert_same(saved.backward(grad), expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_adapters_that_are_not_finite_are_not_taken(layer: NativeLayer, dtype: np.dtype[np.generic]) -> None:
    x, ids, weights, _ = batch()
    trainer = NativeTrainer(layer, adapters(dtype=dtype))
    expected, _ = trainer.forward(x, ids, weights)
    for name in LORA_NAMES:
        broken = adapters(dtype=dtype)
        broken.tensors[name][2, -1, -1] = np.nan
        pointers = [broken.tensors[each].ctypes.data for each in LORA_NAMES]
        with pytest.raises(KtkArgumentError, match=f"{name} holds NaN or infinity, first in expert 2"):
            trainer.sft.set_lora(DTYPE_CODES[dtype], *pointers)
        assert same_bits(trainer.forward(x, ids, weights)[0], expected)


# ---- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [BF16_FORMAT, Format(_native.FORMAT_INT8)], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_saved_bytes(form: Format, shards: int) -> None:
    rng = np.random.default_rng(0)
    experts = [make_weights(rng, HIDDEN, 300) for _ in range(EXPERTS)]
    x, ids, weights, grad = batch()
    ids = ids.copy()
    ids[0, 0] = -1
    rows = int((ids >= 0).sum())
    tuned = make_adapters(rng, EXPERTS, HIDDEN, 300, RANK)
    with pool_of(*[1] * shards) as pool, NativeLayer(pool, experts, form) as made:
        trainer = NativeTrainer(made, tuned)
        _, saved = trainer.forward(x, ids, weights)
        assert saved.context.activation_bytes == 2 * BATCH * HIDDEN + 4 * rows * 300
        assert saved.context.num_tokens == BATCH
        assert 0 < saved.context.table_bytes <= 16 * BATCH * 2 + 12 * EXPERTS
        _, cheap = trainer.forward(x, ids, weights, _native.POLICY_RECOMPUTE)
        assert cheap.context.activation_bytes == 0
        assert cheap.context.table_bytes == saved.context.table_bytes
        saved.backward(grad)
        assert saved.context.activation_bytes == saved.context.table_bytes == 0


# ---- dropout ---------------------------------------------------------------------------------------


def test_dropout_masks_have_their_share_and_no_pattern() -> None:
    tokens = np.arange(512)
    kept = dropout_factors(3, 1, 0, tokens, 512, 0.3) > 0
    deviation = 6 * np.sqrt(0.3 * 0.7 / kept.size)
    assert abs(kept.mean() - 0.7) < deviation
    for other in (
        dropout_factors(4, 1, 0, tokens, 512, 0.3),
        dropout_factors(3, 2, 0, tokens, 512, 0.3),
        dropout_factors(3, 1, 1, tokens, 512, 0.3),
        dropout_factors(3, 1, 0, tokens + 1, 512, 0.3),
        np.roll(kept, 1, axis=1),
    ):
        both = np.corrcoef(kept.ravel(), (other > 0).ravel())[0, 1]
        assert abs(both) < 6 / np.sqrt(kept.size)


def test_dropout_is_off_without_a_seed_and_differs_between_seeds(layer: NativeLayer) -> None:
    x, ids, weights, _ = batch()
    plain = NativeTrainer(layer, adapters()).forward(x, ids, weights)[0]
    off = NativeTrainer(layer, adapters(dropout=0.5)).forward(x, ids, weights)[0]
    one, again, two = (
        NativeTrainer(layer, adapters(dropout=0.5, seed=seed)).forward(x, ids, weights)[0]
        for seed in (1, 1, 2)
    )
    assert same_bits(plain, off)
    assert same_bits(one, again)
    assert not same_bits(one, plain)
    assert not same_bits(one, two)


# ---- misuse ----------------------------------------------------------------------------------------


def saved_of(layer: NativeLayer, policy: int = _native.POLICY_SAVE) -> tuple[Saved, Array]:
    x, ids, weights, grad = batch()
    return NativeTrainer(layer, adapters()).forward(x, ids, weights, policy)[1], grad


@pytest.mark.parametrize("policy", POLICIES)
def test_a_second_backward(layer: NativeLayer, policy: int) -> None:
    saved, grad = saved_of(layer, policy)
    saved.backward(grad)
    with pytest.raises(KtkStateError, match="has had its backward"):
        saved.backward(grad)


def test_a_second_forward(layer: NativeLayer) -> None:
    saved, _ = saved_of(layer)
    x, ids, weights, _ = batch()
    output = np.empty((BATCH, HIDDEN), F32)
    count = np.array([BATCH], np.int32)
    with pytest.raises(KtkStateError, match="has had its forward"):
        saved.context.forward(
            count.ctypes.data, 2, ids.ctypes.data, weights.ctypes.data, x.ctypes.data, _native.DTYPE_BF16,
            output.ctypes.data, _native.DTYPE_F32,
        )  # fmt: skip


def test_a_backward_before_the_forward(layer: NativeLayer) -> None:
    trainer = NativeTrainer(layer, adapters())
    x, ids, _, grad = batch()
    context = _native.SftContext(trainer.sft, _native.POLICY_SAVE)
    with pytest.raises(KtkStateError, match="no forward yet"):
        Saved(trainer, context, x, ids).backward(grad)
    with pytest.raises(KtkStateError, match="no forward yet"):
        context.num_tokens  # noqa: B018 - raises


def test_a_backward_without_a_policy_for_it(layer: NativeLayer) -> None:
    saved, grad = saved_of(layer, _native.POLICY_NONE)
    with pytest.raises(KtkStateError, match="policy is none"):
        saved.backward(grad)


def test_closed_contexts_adapters_and_layers(pool: _native.Pool) -> None:
    rng = np.random.default_rng(1)
    experts = [make_weights(rng, HIDDEN, INNER) for _ in range(EXPERTS)]
    with NativeLayer(pool, experts, BF16_FORMAT) as made:
        first, grad = saved_of(made)
        second, _ = saved_of(made)
        third, _ = saved_of(made)
        first.context.close()
        first.context.close()
        with pytest.raises(KtkStateError, match="SftContext is closed"):
            first.backward(grad)
        second.trainer.sft.close()
        with pytest.raises(KtkStateError, match="adapters of this context are closed"):
            second.backward(grad)
    with pytest.raises(KtkStateError, match="layer is closed"):
        third.backward(grad)
    third.context.close()


def test_forward_without_its_adapters(layer: NativeLayer) -> None:
    trainer = NativeTrainer(layer, adapters())
    trainer.sft = _native.Sft(layer.moe, lora_rank=RANK)
    x, ids, weights, _ = batch()
    with pytest.raises(KtkStateError, match="adapters are not set"):
        trainer.forward(x, ids, weights)


@pytest.mark.parametrize("name", LORA_NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_adapters_that_are_not_finite(layer: NativeLayer, name: str, value: float) -> None:
    tuned = adapters(dtype=F32)
    x, ids, weights, grad = batch()
    trainer = NativeTrainer(layer, tuned)
    _, saved = trainer.forward(x, ids, weights)
    tuned.tensors[name][1, 2, 3] = value
    with pytest.raises(KtkArgumentError, match=f"{name} of expert 1 holds NaN"):
        trainer.forward(x, ids, weights)
    with pytest.raises(KtkArgumentError, match=f"{name} of expert 1 holds NaN"):
        saved.backward(grad)


def test_values_of_a_configuration(layer: NativeLayer) -> None:
    for options, words in (
        ({"lora_rank": -1}, "lora_rank -1"),
        ({"lora_rank": 257}, "lora_rank 257"),
        ({"lora_rank": 4, "lora_scale": float("nan")}, "lora_scale"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_rank": 4, "lora_dropout": float("nan")}, "lora_dropout"),
    ):
        with pytest.raises(KtkArgumentError, match=words):
            _native.Sft(layer.moe, **options)  # type: ignore[arg-type]
    trainer = NativeTrainer(layer, adapters())
    with pytest.raises(KtkArgumentError, match="policy 3"):
        _native.SftContext(trainer.sft, 3)
    with pytest.raises(KtkArgumentError, match="lora_rank is 0"):
        _native.Sft(layer.moe).set_lora(_native.DTYPE_F32, *[64] * 6)
    with pytest.raises(KtkArgumentError, match="dtype 2"):
        trainer.sft.set_lora(_native.DTYPE_F16, *[64] * 6)
    with pytest.raises(TypeError, match="moe"):
        _native.Sft(trainer.sft)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sft"):
        _native.SftContext(layer.moe, 1)  # type: ignore[arg-type]


def test_gradients_that_nobody_trains(pool: _native.Pool) -> None:
    rng = np.random.default_rng(1)
    experts = [make_weights(rng, HIDDEN, INNER) for _ in range(EXPERTS)]
    x, ids, weights, grad = batch()
    lora = {name: np.empty(t.shape, F32) for name, t in adapters().tensors.items()}
    with NativeLayer(pool, experts, Format(_native.FORMAT_INT8)) as made:
        for trainer in (NativeTrainer(made), NativeTrainer(made, adapters(), skip_lora=True)):
            _, saved = trainer.forward(x, ids, weights)
            with pytest.raises(KtkArgumentError, match="trains no adapters"):
                saved.backward(grad, lora=lora)
            with pytest.raises(KtkArgumentError, match="format bf16"):
                saved.backward(grad, lora={}, base={"up": np.empty((EXPERTS, INNER, HIDDEN), F32)})
            saved.backward(grad, lora={})


def test_more_tokens_than_the_layer_allows(layer: NativeLayer) -> None:
    x, ids, weights, _ = batch(count=65)
    with pytest.raises(KtkArgumentError, match="65 tokens"):
        NativeTrainer(layer, adapters()).forward(x, ids, weights)


def test_failures_on_the_queue_fill_outputs_with_nan(pool: _native.Pool) -> None:
    rng = np.random.default_rng(1)
    experts = [make_weights(rng, HIDDEN, INNER) for _ in range(EXPERTS)]
    x, ids, weights, grad = batch()
    tuned = adapters(dtype=F32)
    count = np.array([BATCH], np.int32)
    output, grad_input = np.zeros((2, BATCH, HIDDEN), F32)
    grad_weights = np.zeros(ids.shape, F32)
    forward = (
        count.ctypes.data, 2, ids.ctypes.data, weights.ctypes.data, x.ctypes.data, _native.DTYPE_BF16,
        output.ctypes.data, _native.DTYPE_F32,
    )  # fmt: skip
    backward = (grad.ctypes.data, 0, grad_input.ctypes.data, 0, grad_weights.ctypes.data)
    with NativeLayer(pool, experts, BF16_FORMAT) as made, _native.Queue(pool) as queue:
        trainer = NativeTrainer(made, tuned)
        expected = trainer.forward(x, ids, weights)
        context = _native.SftContext(trainer.sft, _native.POLICY_SAVE)
        queue.submit_sft_forward(context, *forward)
        queue.submit_sft_backward(context, *backward)
        queue.sync()
        assert same_bits(output, expected[0])
        assert same_bits(grad_input, expected[1].backward(grad).input)
        queue.submit_sft_backward(context, *backward)
        with pytest.raises(KtkStateError, match="has had its backward"):
            queue.sync()
        assert np.isnan(grad_input).all() and np.isnan(grad_weights).all()
        tuned.tensors["up_lora_b"][:] = np.nan
        queue.submit_sft_forward(_native.SftContext(trainer.sft, _native.POLICY_SAVE), *forward)
        with pytest.raises(KtkArgumentError, match="up_lora_b"):
            queue.sync()
        assert np.isnan(output).all()


# ---- weights and traces ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_unpacked_weights_are_the_stored_ones(form: Format, shards: int, isa: str) -> None:
    rng = np.random.default_rng(8)
    expert = make_weights(rng, 70, 300)
    with pool_of(*[1] * shards) as pool, NativeLayer(pool, [expert], form, Options(isa=isa)) as made:
        for name in ("gate", "up", "down"):
            weights = getattr(expert, name)
            found = np.full(weights.shape, np.nan, F32)
            made.moe.unpack_expert(0, **{f"{name}_ptr": found.ctypes.data})
            stored = (form.down if name == "down" else form).quantise(weights)
            values = stored if isinstance(stored, np.ndarray) else stored.values()
            values = values.astype(np.float32)
            assert (found == (rotate(values) if form.rotated else values)).all(), name


def test_every_stage_is_traced(layer: NativeLayer) -> None:
    x, ids, weights, grad = batch()
    with ktk.profile() as trace:
        NativeTrainer(layer, adapters(dropout=0.1, seed=1)).forward(x, ids, weights)[1].backward(grad)
    found = {stage.stage for stage in trace.summary.stages}
    assert found >= {
        "lora_pack",
        "lora_input",
        "gate_up",
        "lora_middle",
        "down",
        "forward",
        "backward",
        "grad_input",
        "grad_lora_input",
        "grad_down",
        "grad_lora_middle",
        "grad_gate_up",
        "grad_lora",
    }
