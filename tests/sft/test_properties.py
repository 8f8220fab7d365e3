"""What holds for any dropout seed, routing, order of contexts, split into micro-batches and adapter."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktk
from ktk.sft import kt_adapt_peft_lora, load_kt_moe_from_adapter, save_kt_moe_to_adapter
from ktk.sft.modules import moe_layers
from layers import NativeLayer, pool_of, same_bits
from native_sft import (
    BF16_FORMAT,
    POLICIES,
    SOME_FORMATS,
    Case,
    NativeGradients,
    NativeTrainer,
    assert_within,
    make_adapters,
    run,
)
from reference.moe import Layer
from reference.packing import ExpertWeights, Format
from reference.rounding import BF16, F32, Array, F32Array
from reference.sft import LORA_NAMES, Adapters, Trainer
from sft.models import eager, wrap
from strategies import ROUTINGS, make_input, make_weights, seeds

pytestmark = pytest.mark.any_binding

HIDDEN, INNER, EXPERTS, RANK, TOP_K = 48, 80, 4, 6, 3

IdArray = npt.NDArray[np.int64]

#: Of 64 bits with a sign, those next to the edges of 32 and of the sign most of all.
dropout_seeds = st.one_of(
    st.sampled_from((0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63))),
    st.integers(-(2**63), 2**63 - 1),
)

some_formats = st.sampled_from(SOME_FORMATS)

some_threads = st.sampled_from(((1,), (2,), (1, 1), (1, 1, 1)))


@st.composite
def routings(draw: st.DrawFn, least: int = 0, most: int = 14) -> IdArray:
    """Expert ids ``[tokens, k]``, drawn one by one so that they shrink: duplicates, and ids of no expert.

    The experts that a batch draws from may be one or few, which leaves the others without tokens.
    """
    used = draw(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True))
    ids = st.sampled_from([*used, *used, -1, EXPERTS, 2**62])
    rows = draw(st.lists(st.lists(ids, min_size=TOP_K, max_size=TOP_K), min_size=least, max_size=most))
    return np.array(rows, np.int64).reshape(-1, TOP_K)


@functools.cache
def experts_of(seed: int) -> tuple[ExpertWeights, ...]:
    rng = np.random.default_rng(seed)
    return tuple(make_weights(rng, HIDDEN, INNER) for _ in range(EXPERTS))


@functools.cache
def adapters_of(seed: int, dtype: Any = BF16) -> Adapters:
    return make_adapters(np.random.default_rng(seed), EXPERTS, HIDDEN, INNER, RANK, dtype)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What goes into one forward and backward."""

    x: Array
    ids: IdArray
    weights: F32Array
    grad: F32Array

    @classmethod
    def of(cls, ids: IdArray, seed: int) -> Batch:
        rng = np.random.default_rng(seed)
        x = make_input(rng, len(ids), HIDDEN, BF16)
        weights = rng.standard_normal(ids.shape).astype(np.float32)
        return cls(x, ids, weights, rng.standard_normal((len(ids), HIDDEN)).astype(np.float32))

    @property
    def arguments(self) -> tuple[Array, IdArray, F32Array]:
        return self.x, self.ids, self.weights


def assert_same(first: NativeGradients, second: NativeGradients) -> None:
    assert same_bits(first.input, second.input)
    assert same_bits(first.weights, second.weights)
    for name in LORA_NAMES:
        assert same_bits(first.lora[name], second.lora[name]), name


# ---- against the reference -----------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    ids=routings(),
    form=some_formats,
    threads=some_threads,
    policy=st.sampled_from(POLICIES),
    dropout=st.sampled_from((0.0, 0.05, 0.5, 0.95)),
    dropout_seed=dropout_seeds,
    seed=seeds,
)
def test_any_routing_and_dropout_seed(
    ids: IdArray,
    form: Format,
    threads: tuple[int, ...],
    policy: int,
    dropout: float,
    dropout_seed: int,
    seed: int,
) -> None:
    """The reference has the mask of every (seed, expert, projection, token, feature): a mask that is off in
    one place is off by a whole product."""
    batch = Batch.of(ids, seed)
    adapters = adapters_of(seed % 3)
    if dropout:
        adapters = dataclasses.replace(adapters, dropout=dropout, seed=dropout_seed)
    experts = experts_of(seed % 3)
    with pool_of(*threads) as pool, NativeLayer(pool, experts, form) as layer:
        output, saved = NativeTrainer(layer, adapters).forward(*batch.arguments, policy)
        gradients = saved.backward(batch.grad)
    reference, shards = Trainer(Layer(experts, form), adapters), len(threads)
    assert_within("output", output, reference.forward(*batch.arguments, shards))
    expected = reference.backward(*batch.arguments, batch.grad, shards)
    assert_within("grad_input", gradients.input, expected.input)
    assert_within("grad_expert_weights", gradients.weights, expected.weights)
    for name, value in expected.lora.items():
        assert_within(name, gradients.lora[name], value)
    idle = np.setdiff1d(np.arange(EXPERTS), ids)
    assert all((gradients.lora[name][idle] == 0).all() for name in LORA_NAMES)
    assert (gradients.weights[(ids < 0) | (ids >= EXPERTS)] == 0).all()


# ---- bit for bit ---------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    form=some_formats,
    routing=st.sampled_from(ROUTINGS),
    threads=some_threads,
    rank=st.sampled_from((1, 8, 17)),
    dropout=st.sampled_from((0.0, 0.3)),
    batch=st.integers(0, 30),
    dtype=st.sampled_from((F32, BF16)),
    seed=seeds,
)
def test_recompute_gives_the_bits_of_save(
    form: Format,
    routing: str,
    threads: tuple[int, ...],
    rank: int,
    dropout: float,
    batch: int,
    dtype: np.dtype[np.generic],
    seed: int,
) -> None:
    case = Case(
        form,
        rank=rank,
        threads=threads,
        routing=routing,
        dropout=dropout,
        batch=batch,
        input_dtype=dtype,
        adapter_dtype=dtype,
        hidden=HIDDEN,
        intermediate=INNER,
        seed=seed,
    )
    (first, saved, *_), (second, computed, *_) = (run(case, policy) for policy in POLICIES)
    assert same_bits(first, second)
    assert_same(saved, computed)


@settings(max_examples=50)
@given(ids=routings(least=1), form=some_formats, dropout_seed=dropout_seeds, seed=seeds, data=st.data())
def test_the_order_of_a_tokens_experts_changes_no_bit(
    ids: IdArray, form: Format, dropout_seed: int, seed: int, data: st.DataObject
) -> None:
    """Of distinct experts; gradients of routing weights go with their slots."""
    distinct = np.array([data.draw(st.permutations(range(EXPERTS)))[:TOP_K] for _ in ids], np.int64)
    ids = np.where(ids == -1, -1, distinct)
    order = np.array([data.draw(st.permutations(range(TOP_K))) for _ in ids])
    batch = Batch.of(ids, seed)
    turned = dataclasses.replace(
        batch, ids=np.take_along_axis(ids, order, 1), weights=np.take_along_axis(batch.weights, order, 1)
    )
    adapters = dataclasses.replace(adapters_of(0), dropout=0.25, seed=dropout_seed)
    with pool_of(2) as pool, NativeLayer(pool, experts_of(0), form) as layer:
        trainer = NativeTrainer(layer, adapters)
        found = []
        for each in (batch, turned):
            output, saved = trainer.forward(*each.arguments)
            found.append((output, saved.backward(each.grad)))
    (first, expected), (second, gradients) = found
    assert same_bits(first, second)
    expected.weights = np.take_along_axis(expected.weights, order, 1)
    assert_same(gradients, expected)


@settings(max_examples=40)
@given(
    batches=st.lists(st.tuples(routings(most=6), st.sampled_from(POLICIES), dropout_seeds), max_size=6),
    data=st.data(),
)
def test_contexts_live_and_die_in_any_order(
    batches: list[tuple[IdArray, int, int]], data: st.DataObject
) -> None:
    """Forwards, backwards and contexts that are given up, in any order that has a forward first."""
    with pool_of(2) as pool, NativeLayer(pool, experts_of(1), BF16_FORMAT) as layer:
        # Each has adapters of its own, which its context keeps while others come and go.
        trainers, inputs, alone = [], [], []
        for index, (ids, policy, dropout_seed) in enumerate(batches):
            adapters = dataclasses.replace(adapters_of(index), dropout=0.5, seed=dropout_seed)
            trainers.append(NativeTrainer(layer, adapters))
            inputs.append(Batch.of(ids, index))
            output, saved = trainers[-1].forward(*inputs[-1].arguments, policy)
            alone.append((output, saved.backward(inputs[-1].grad)))
        live: dict[int, Any] = {}
        waiting = list(range(len(batches)))
        while waiting or live:
            forward = bool(waiting) and (not live or data.draw(st.booleans(), label="forward"))
            if forward:
                index = waiting.pop(data.draw(st.integers(0, len(waiting) - 1), label="which"))
                output, live[index] = trainers[index].forward(*inputs[index].arguments, batches[index][1])
                assert same_bits(output, alone[index][0])
                continue
            index = data.draw(st.sampled_from(sorted(live)), label="which")
            saved = live.pop(index)
            if data.draw(st.booleans(), label="give up"):
                saved.context.close()
            else:
                assert_same(saved.backward(inputs[index].grad), alone[index][1])


@settings(max_examples=40)
@given(
    micro=st.lists(routings(most=8), min_size=1, max_size=4),
    dtype=st.sampled_from((F32, BF16)),
    form=some_formats,
    seed=seeds,
)
def test_accumulation_over_micro_batches(
    micro: list[IdArray], dtype: np.dtype[np.generic], form: Format, seed: int
) -> None:
    """Added in float32, before the rounding: to a float32 gradient it is PyTorch's sum bit for bit."""
    adapters = adapters_of(2, dtype)
    shapes = {name: tensor.shape for name, tensor in adapters.tensors.items()}
    total = {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
    reference = Trainer(Layer(experts_of(2), form), adapters)
    with pool_of(2) as pool, NativeLayer(pool, experts_of(2), form) as layer:
        trainer = NativeTrainer(layer, adapters)
        for index, ids in enumerate(micro):
            batch = Batch.of(ids, seed + index)
            before = {name: tensor.copy() for name, tensor in total.items()}
            trainer.forward(*batch.arguments)[1].backward(batch.grad, lora=total, accumulate=True)
            single = trainer.forward(*batch.arguments)[1].backward(batch.grad).lora
            expected = reference.backward(*batch.arguments, batch.grad).lora
            for name in LORA_NAMES:
                if dtype == F32:
                    assert np.array_equal(total[name], before[name] + single[name]), name
                assert_within(name, total[name], expected[name], previous=before[name])


# ---- wrappers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrapper() -> Any:
    made: Any = ktk.KTMoEWrapper(
        layer_idx=0,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        cpuinfer_threads=2,
        chunked_prefill_size=64,
        mode="sft",
        method="AMXINT8_SFT",
        lora_rank=RANK,
        lora_alpha=2.0 * RANK,
        max_cache_depth=4,
    )
    experts = experts_of(0)
    made.load_weights_from_tensors(
        *(torch.from_numpy(np.stack([getattr(e, name) for e in experts])) for name in ("gate", "up", "down"))
    )
    yield made
    made.close()


@settings(max_examples=40)
@given(micro=st.lists(routings(least=1, most=6), min_size=1, max_size=4), scale=st.sampled_from((1.0, 0.5)))
def test_published_gradients_add_up(wrapper: Any, micro: list[IdArray], scale: float) -> None:
    """`backward` of the wrapper: the latest forward first, into the tensors that `.grad` are."""
    tensors = [torch.from_numpy(adapters_of(0, F32).tensors[name].copy()) for name in LORA_NAMES]
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
    buffers = [torch.full_like(tensor, 7.0) for tensor in tensors]
    wrapper.init_lora_weights(*parameters, *buffers)
    named = dict(zip(LORA_NAMES, parameters, strict=True))
    batches = [Batch.of(ids, index) for index, ids in enumerate(micro)]
    inputs = [
        (torch.from_numpy(b.x.astype(np.float32)), torch.from_numpy(b.ids), torch.from_numpy(b.weights))
        for b in batches
    ]
    for each in inputs:
        wrapper.forward(*each)
    total = [torch.zeros_like(tensor) for tensor in tensors]
    for each, batch in reversed(list(zip(inputs, batches, strict=True))):
        grad = torch.from_numpy(batch.grad)
        hidden, weights = wrapper.backward(grad, optimizer_grad_scale=scale)
        alone = wrapper.run(*each, policy="recompute", lora=named)[1]
        gradients = wrapper.run_backward(alone, grad, lora=named, want_lora=True)
        assert torch.equal(hidden, gradients.hidden_states)
        assert torch.equal(weights, gradients.expert_weights)
        for sum_, gradient in zip(total, gradients.lora.values(), strict=True):
            sum_ += gradient * scale
    for parameter, sum_, buffer in zip(parameters, total, buffers, strict=True):
        assert parameter.grad is buffer
        assert torch.equal(buffer, sum_)


# ---- adapters on disk ------------------------------------------------------------------------------------


@functools.cache
def adapted(rank: int) -> tuple[Any, Any]:
    """Two models with adapters of one rank."""
    models = []
    for _ in range(2):
        model = wrap(eager("qwen3_moe"), lora_rank=rank, lora_alpha=2 * rank)
        kt_adapt_peft_lora(model)
        models.append(model)
    return models[0], models[1]


def tensors_of(model: Any) -> list[torch.Tensor]:
    found = []
    for _, layer in moe_layers(model):
        assert layer.core.lora is not None
        tensors = layer.core.lora.tensors()
        assert tensors is not None
        found.extend(tensors[name] for name in LORA_NAMES)
    return found


@settings(max_examples=20)
@given(rank=st.sampled_from((1, 4, 7)), form=st.sampled_from(("fused", "per_expert")), seed=seeds)
def test_adapters_come_back_bit_by_bit(rank: int, form: Any, seed: int) -> None:
    """Any finite values: of all magnitudes, subnormal, and zeros of both signs."""
    source, target = adapted(rank)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for tensor in tensors_of(source):
            wide = torch.iinfo(torch.int16 if tensor.element_size() == 2 else torch.int32)
            bits = torch.from_numpy(rng.integers(wide.min, wide.max, tensor.shape, endpoint=True))
            values = bits.to(torch.int16 if tensor.element_size() == 2 else torch.int32).view(tensor.dtype)
            tensor.copy_(torch.where(values.isfinite(), values, -0.0))
    expected = [tensor.detach().clone() for tensor in tensors_of(source)]
    with tempfile.TemporaryDirectory() as folder:
        save_kt_moe_to_adapter(source, Path(folder), form=form)
        assert load_kt_moe_from_adapter(target, Path(folder)) == 2
    integer = torch.int16 if expected[0].element_size() == 2 else torch.int32
    for actual, wanted in zip(tensors_of(target), expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual.detach().view(integer), wanted.view(integer))
