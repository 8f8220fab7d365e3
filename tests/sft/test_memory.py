"""What is kept between a forward and its backward, counted by the library and seen from outside."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from ktk import Experts
from ktk.errors import KtkArgumentError
from ktk.sft.native import TrainableExperts

TOKENS, TOP_K, HIDDEN, INNER, EXPERTS = 1024, 4, 512, 256, 8
TABLES_OF_A_ROW = 16


def make(form: str, rank: int = 8, hidden: int = HIDDEN, inner: int = INNER) -> TrainableExperts:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    layer = Experts.from_weights(
        normal(EXPERTS, inner, hidden),
        normal(EXPERTS, inner, hidden),
        normal(EXPERTS, hidden, inner),
        num_experts_per_tok=TOP_K,
        format=form,
        threads=1,
    )
    trainer = TrainableExperts(layer, lora_rank=rank, lora_alpha=16.0)
    if rank:
        trainer.set_lora({name: normal(*shape) for name, shape in trainer.lora_shapes().items()})
    return trainer


def inputs(tokens: int = TOKENS, hidden: int = HIDDEN) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    scores, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    return x, ids, scores


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize(("policy", "rank"), [("save", 8), ("save", 0), ("recompute", 8)])
def test_process_grows_by_what_the_formula_says(form: str, policy: Any, rank: int) -> None:
    """Four layers' worth of contexts, over a process that has run the layer before."""
    trainer = make(form, rank)
    x, ids, scores = inputs()
    output = torch.empty_like(x)

    def forward() -> Any:
        return trainer.forward(x, ids, scores, policy=policy, output=output)[1]

    forward().backward(output)
    before = resident_bytes()
    contexts = [forward() for _ in range(4)]
    grown = (resident_bytes() - before) / len(contexts)
    formula = 2 * TOKENS * HIDDEN + 4 * TOKENS * TOP_K * INNER if policy == "save" else 0
    tables = TABLES_OF_A_ROW * TOKENS * TOP_K
    for context in contexts:
        assert context.activation_bytes <= formula
        assert context.nbytes <= formula + 1.1 * tables
    # Whole pages, and what the allocator keeps of the tables.
    assert grown <= 1.02 * formula + 4 * tables
    if policy == "save" and (rank or form == "bf16"):
        assert contexts[0].activation_bytes == formula
        assert grown >= 0.95 * formula
    for context in contexts:
        context.backward(output)
        assert context.nbytes == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saved_forwards_let_go_of_their_tensors(asynchronous: bool) -> None:
    trainer = make("bf16", hidden=64, inner=32)
    for policy in ("save", "recompute"):
        # The arrays live as long as some tensor uses their memory.
        arrays = [tensor.float().numpy().copy() for tensor in inputs(10, 64)]
        arrays[1] = arrays[1].astype(np.int64)
        arrays.append(np.ones_like(arrays[0]))
        *read, gradient = [weakref.ref(array) for array in arrays]
        x, ids, scores, grad = map(torch.from_numpy, arrays)
        del arrays
        if asynchronous:
            _, context = trainer.submit_forward(x, ids, scores, policy=policy)
            trainer.sync()
        else:
            _, context = trainer.forward(x, ids, scores, policy=policy)
        assert context is not None
        del x, ids, scores
        gc.collect()
        # Computing again starts from the input; the routing is in the tables.
        kept = [reference() is not None for reference in read]
        assert kept == [policy == "recompute", False, False]
        if asynchronous:
            results = context.submit_backward(grad)
            trainer.sync()
        else:
            results = context.backward(grad)
        del grad
        gc.collect()
        assert gradient() is None and read[0]() is None
        assert torch.isfinite(results[0]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_are_refused(value: float) -> None:
    trainer = make("int8", hidden=64, inner=32)
    x, ids, scores = inputs(10, 64)
    _, context = trainer.forward(x, ids, scores, policy="save")
    assert context is not None
    grad = torch.ones_like(x)
    broken = grad.clone()
    broken[7, 3] = broken[9, 0] = value
    with pytest.raises(KtkArgumentError, match=r"NaN or infinity in 2 of 10 tokens, .* token 7: "):
        context.backward(broken)
    # Nothing is lost: the same forward takes a sound gradient.
    assert torch.isfinite(context.backward(grad)[0]).all()
