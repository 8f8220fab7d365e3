"""The native forward with adapters and its way back, against float64 with bounds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk import _native
from layers import FORMATS, NativeLayer, Options, pool_of, runnable_isas
from native_sft import (
    BF16_FORMAT,
    POLICIES,
    SOME_FORMATS,
    Case,
    NativeGradients,
    NativeTrainer,
    assert_within,
    check,
    make_adapters,
    run,
)
from reference.moe import Activation, Layer
from reference.packing import Format
from reference.rounding import BF16, F32, Array
from reference.sft import LORA_NAMES, UB, Gradients, Trainer, dropout_factors
from strategies import ROUTINGS, activations, make_input, make_routing, make_weights, seeds, sizes

pytestmark = pytest.mark.any_binding


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("form", SOME_FORMATS, ids=str)
def test_formats_ranks_shards_policies(form: Format, rank: int, shards: int, policy: int) -> None:
    threads = (2,) if shards == 1 else (1,) * shards
    case = Case(form, rank=rank, threads=threads, policy=policy, intermediate=300, seed=rank + shards)
    check(case)
    check(dataclasses.replace(case, skip_lora=True))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_isa(form: Format, isa: str) -> None:
    check(Case(form, isa, rank=8, batch=40))
    check(Case(form, isa, rank=33, threads=(1, 1), policy=_native.POLICY_RECOMPUTE, dropout=0.25))
    check(Case(form, isa, rank=0, routing="one_expert"))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_shapes_with_tails(form: Format) -> None:
    @settings(max_examples=12)
    @given(
        hidden=sizes(200),
        intermediate=sizes(300),
        experts=st.integers(1, 5),
        batch=st.integers(0, 40),
        rank=st.one_of(st.integers(0, 20), st.sampled_from((31, 32, 33, 64, 65))),
        threads=st.sampled_from(((1,), (2,), (1, 1), (1, 1, 1))),
        policy=st.sampled_from(POLICIES),
        routing=st.sampled_from(ROUTINGS),
        activation=activations,
        dropout=st.sampled_from((0.0, 0.0, 0.1, 0.5)),
        dtypes=st.tuples(*[st.sampled_from((F32, BF16))] * 3),
        isa=st.sampled_from(runnable_isas()),
        seed=seeds,
        data=st.data(),
    )
    def shape(hidden, intermediate, experts, batch, rank, threads, policy, routing, activation, dropout,  # type: ignore[no-untyped-def]
              dtypes, isa, seed, data) -> None:  # fmt: skip
        check(
            Case(
                form,
                isa,
                rank,
                threads,
                policy,
                activation,
                dropout if rank else 0.0,
                False,
                hidden,
                intermediate,
                experts,
                data.draw(st.integers(1, experts)),
                batch,
                routing,
                *dtypes,
                base=form.kind == _native.FORMAT_BF16,
                seed=seed,
            )
        )

    shape()


@pytest.mark.parametrize("rank", [127, 255, 256])
def test_large_ranks(rank: int, isa: str) -> None:
    check(Case(isa=isa, rank=rank, hidden=64, intermediate=80, experts=2, batch=9))


@pytest.mark.parametrize("form", [BF16_FORMAT, Format(_native.FORMAT_INT8)], ids=str)
def test_more_rows_than_one_pass_and_one_block(form: Format) -> None:
    check(
        Case(
            form, hidden=48, intermediate=64, experts=2, top_k=1, batch=1100, routing="one_expert", base=False
        )
    )


@pytest.mark.parametrize("threads", [(3,), (1, 2)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_sums_made_by_turns(threads: tuple[int, ...], dropout: float, isa: str) -> None:
    """With many rows an expert, workers add to the same gradients of the input, in runs of 256 columns, and
    gate and up are computed 256 neurons at a time."""
    case = Case(
        isa=isa, hidden=600, intermediate=40, experts=3, top_k=2, batch=60, threads=threads, dropout=dropout
    )
    check(case)
    check(dataclasses.replace(case, hidden=80, intermediate=300))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_base_weights(policy: int, shards: int, isa: str) -> None:
    threads = (2,) if shards == 1 else (1,) * shards
    check(Case(isa=isa, policy=policy, threads=threads, base=True, intermediate=272))
    check(Case(isa=isa, rank=0, policy=policy, threads=threads, base=True, activation=Activation(7.0, 1.702)))


def test_the_reference_agrees_with_finite_differences() -> None:
    rng = np.random.default_rng(5)
    hidden, inner, experts, rank = 6, 10, 2, 3
    activation = Activation(0.9, 1.702)
    weights_of = [make_weights(rng, hidden, inner, BF16, biases=True) for _ in range(experts)]
    layer = Layer(weights_of, BF16_FORMAT, activation)
    adapters = make_adapters(rng, experts, hidden, inner, rank, dropout=0.3, seed=11)
    x = rng.standard_normal((3, hidden)).astype(np.float32).astype(BF16)
    ids = np.array([[0, 1], [1, 1], [0, -1]])
    weights = rng.standard_normal((3, 2)).astype(np.float32)
    grad = rng.standard_normal((3, hidden)).astype(np.float32).astype(BF16)

    def loss(x, weights, tensors, base) -> float:  # type: ignore[no-untyped-def]
        total = 0.0
        for token in range(3):
            for slot in range(2):
                e = ids[token, slot]
                if e < 0:
                    continue
                where = np.array([token])

                def branch(name, source, projection):  # type: ignore[no-untyped-def]
                    mask = dropout_factors(11, e, projection, where, source.size, 0.3)[0]  # noqa: B023
                    a, b = tensors[f"{name}_lora_a"][e], tensors[f"{name}_lora_b"][e]  # noqa: B023
                    return base[name][e] @ source + adapters.scale * (b @ (a @ (source * mask)))  # noqa: B023

                g = branch("gate", x[token], 0) + weights_of[e].gate_bias
                u = branch("up", x[token], 1) + weights_of[e].up_bias
                g, u = np.minimum(g, np.float32(0.9)), np.clip(u, -np.float32(0.9), np.float32(0.9))
                z = g / (1 + np.exp(-float(np.float32(1.702)) * g)) * (u + 1)
                y = branch("down", z, 2) + weights_of[e].down_bias
                total += weights[token, slot] * (y @ grad[token].astype(np.float64))
        return total

    tensors = {name: values.astype(np.float64) for name, values in adapters.tensors.items()}
    base = {
        name: np.stack([getattr(expert, name).astype(np.float64) for expert in weights_of])
        for name in ("gate", "up", "down")
    }
    arguments = [x.astype(np.float64), weights.astype(np.float64), tensors, base]
    expected = Trainer(layer, adapters).backward(x, ids, weights, grad, base=True)

    def compare(name: str, array: Array, value: Array) -> None:
        for index in rng.permutation(array.size)[:12]:
            position = np.unravel_index(index, array.shape)
            kept = array[position]
            sides = []
            for step in (1e-5, -1e-5):
                array[position] = kept + step
                sides.append(loss(*arguments))
            array[position] = kept
            slope = (sides[0] - sides[1]) / 2e-5
            assert slope == pytest.approx(value[position], rel=1e-6, abs=1e-8), (name, position)

    compare("input", arguments[0], expected.input.value)
    compare("weights", arguments[1], expected.weights.value)
    for name in LORA_NAMES:
        compare(name, tensors[name], expected.lora[name].value)
    for name in base:
        compare(name, base[name], expected.base[name].value)


def _parts(gradients: NativeGradients, expected: Gradients):  # type: ignore[no-untyped-def]
    yield "grad_input", gradients.input, expected.input.value
    yield "grad_expert_weights", gradients.weights, expected.weights.value
    for name in expected.lora:
        yield name, gradients.lora[name], expected.lora[name].value


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gradients_are_within_bf16_rounding_of_the_stored_weights(form: Format, isa: str) -> None:
    """As a whole and not only element by element: no gradient passes more than 12 roundings to bf16, each of
    which moves it by at most UB / sqrt(3) in the mean."""
    case = Case(form, isa, hidden=256, intermediate=256, batch=32, routing="distinct", seed=3)
    _, gradients, reference, (x, ids, weights, grad) = run(case)
    expected = reference.backward(x, ids, weights, grad)
    for name, actual, value in _parts(gradients, expected):
        error = np.linalg.norm(actual - value) / np.linalg.norm(value)
        assert error < np.sqrt(12 / 3) * UB, name


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_accumulation_adds_before_the_rounding(dtype: np.dtype, isa: str) -> None:
    rng = np.random.default_rng(2)
    experts = [make_weights(rng, 64, 96) for _ in range(3)]
    adapters = make_adapters(rng, 3, 64, 96, 8, dtype)
    x = make_input(rng, 12, 64, BF16)
    ids, weights = make_routing(rng, "one_expert", 12, 3, 2)
    grad = rng.standard_normal((12, 64)).astype(np.float32)
    before = {
        name: rng.standard_normal(tensor.shape).astype(np.float32).astype(dtype)
        for name, tensor in adapters.tensors.items()
    }
    shapes = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    base_before = {
        name: rng.standard_normal((3, *shape)).astype(np.float32).astype(dtype)
        for name, shape in shapes.items()
    }
    with pool_of(2) as pool, NativeLayer(pool, experts, BF16_FORMAT, Options(isa=isa)) as layer:
        trainer = NativeTrainer(layer, adapters)
        _, saved = trainer.forward(x, ids, weights)
        lora = {name: values.copy() for name, values in before.items()}
        base = {name: values.copy() for name, values in base_before.items()}
        saved.backward(grad, lora=lora, base=base, accumulate=True)
    expected = Trainer(Layer(experts, BF16_FORMAT), adapters).backward(x, ids, weights, grad, base=True)
    for name in LORA_NAMES:
        assert_within(name, lora[name], expected.lora[name], previous=before[name])
        assert (lora[name][[0, 2]] == before[name][[0, 2]]).all(), "experts without tokens keep theirs"
    for name in shapes:
        assert_within(name, base[name], expected.base[name], previous=base_before[name])
        assert (base[name][[0, 2]] == base_before[name][[0, 2]]).all()


def test_experts_without_tokens_get_zeros() -> None:
    _, gradients, _, _ = run(Case(routing="one_expert", base=True))
    for values in (*gradients.lora.values(), *gradients.base.values()):
        assert (values[[0, 1, 3]] == 0).all()
        assert (values[2] != 0).any()


def test_no_contribution_has_no_gradient() -> None:
    output, gradients, _, _ = run(Case(routing="none", base=True))
    for values in (
        output,
        gradients.input,
        gradients.weights,
        *gradients.lora.values(),
        *gradients.base.values(),
    ):
        assert (values == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_zero_tokens(policy: int) -> None:
    output, gradients, _, _ = run(Case(batch=0, base=True), policy)
    assert output.shape == gradients.input.shape == (0, 96)
    for values in (*gradients.lora.values(), *gradients.base.values()):
        assert (values == 0).all()


def test_masked_experts_contribute_no_gradient() -> None:
    rng = np.random.default_rng(9)
    experts = [make_weights(rng, 64, 96) for _ in range(3)]
    adapters = make_adapters(rng, 3, 64, 96, 4)
    x = make_input(rng, 10, 64, BF16)
    ids, weights = make_routing(rng, "distinct", 10, 3, 3)
    grad = rng.standard_normal((10, 64)).astype(np.float32)
    options = Options(masked=(1,))
    with pool_of(2) as pool, NativeLayer(pool, experts, BF16_FORMAT, options, load=False) as layer:
        for index in (0, 2):
            layer.pack(index, experts[index])
        _, saved = NativeTrainer(layer, adapters).forward(x, ids, weights)
        gradients = saved.backward(grad)
    expected = Trainer(Layer(experts, BF16_FORMAT, masked=(1,)), adapters).backward(x, ids, weights, grad)
    assert (gradients.weights[ids == 1] == 0).all()
    assert (gradients.lora["down_lora_a"][1] == 0).all()
    for name, actual, _ in _parts(gradients, expected):
        value = expected.lora.get(name, expected.input if name == "grad_input" else expected.weights)
        assert_within(name, actual, value)
