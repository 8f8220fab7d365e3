"""The operators of `torch.ops.ktk`, and the module that uses them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch

from ktk import Experts
from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError
from ktk.nn import MoEExperts
from ktk.ops import moe_forward
from torch_layers import Weights, batch


@pytest.fixture
def experts() -> Iterator[Experts]:
    with Experts.from_weights(
        *Weights.random(1).matrices(), num_experts_per_tok=2, format="int8", threads=1
    ) as layer:
        yield layer


def test_operator_is_the_forward(experts: Experts) -> None:
    inputs = batch(2, 5)
    expected = experts(*inputs)
    assert torch.equal(torch.ops.ktk.moe_forward(*inputs, experts.handle), expected)
    assert torch.equal(moe_forward(*inputs, experts.handle), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_opcheck(experts: Experts, tokens: int, dtype: torch.dtype) -> None:
    inputs = batch(2, tokens, dtype=dtype)
    torch.library.opcheck(torch.ops.ktk.moe_forward.default, (*inputs, experts.handle))


def test_opcheck_with_more_dimensions(experts: Experts) -> None:
    x, ids, scores = batch(2, 6)
    arguments = (x.view(2, 3, 80), ids.view(2, 3, 2).int(), scores.view(2, 3, 2), experts.handle)
    torch.library.opcheck(torch.ops.ktk.moe_forward.default, arguments)


def test_compiled_without_graph_breaks(experts: Experts) -> None:
    module = MoEExperts(experts)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = torch.nn.Linear(80, 4, dtype=torch.bfloat16)
            self.experts = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores, ids = torch.topk(self.router(x).float().softmax(-1), 2, dim=-1)
            return x + self.experts(x, ids, scores)

    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (4, 7, 1):
            x = batch(tokens, tokens)[0]
            assert torch.equal(compiled(x), block(x))


def test_layer_compiled_directly(experts: Experts) -> None:
    compiled = torch.compile(lambda *inputs: experts(*inputs) * 2, fullgraph=True, backend="aot_eager")
    inputs = batch(2, 5)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), experts(*inputs) * 2)


def test_export(experts: Experts) -> None:
    inputs = batch(2, 5)
    program = torch.export.export(MoEExperts(experts), inputs)
    assert torch.equal(program.module()(*inputs), experts(*inputs))


def test_no_gradient_is_an_error_and_not_a_zero(experts: Experts) -> None:
    x, ids, scores = batch(2, 5, dtype=torch.float32)
    for tensor in (x, scores):
        tensor.requires_grad_(True)
        result = experts(x, ids, scores)
        assert result.requires_grad
        with pytest.raises(KtkUnsupportedError, match="no gradient"):
            result.sum().backward()
        with torch.no_grad():
            assert torch.equal(experts(x, ids, scores), result)
        tensor.requires_grad_(False)


def test_handles_of_layers_that_are_gone(experts: Experts) -> None:
    inputs = batch(2, 5)
    other = Experts.from_weights(
        *Weights.random(2).matrices(), num_experts_per_tok=2, format="int8", threads=1
    )
    handle = other.handle
    assert handle != experts.handle
    other.close()
    with pytest.raises(KtkStateError, match="closed"):
        torch.ops.ktk.moe_forward(*inputs, handle)
    del other
    gc.collect()
    with pytest.raises(KtkStateError, match="handle"):
        torch.ops.ktk.moe_forward(*inputs, handle)


def test_wrong_arguments(experts: Experts) -> None:
    x, ids, scores = batch(2, 5)
    with pytest.raises(KtkArgumentError, match="hidden_states"):
        torch.ops.ktk.moe_forward(x[:, :3], ids, scores, experts.handle)
    with pytest.raises(KtkArgumentError, match="same shape"):
        torch.ops.ktk.moe_forward(x, ids[:, :1], scores, experts.handle)
    torch.ops.ktk.moe_forward(x, ids, scores, experts.handle)


def test_module(experts: Experts, tmp_path) -> None:  # type: ignore[no-untyped-def]
    weights = Weights.random(1)
    inputs = batch(2, 5)
    module = MoEExperts.from_weights(*weights.matrices(), num_experts_per_tok=2, format="int8", threads=1)
    assert torch.equal(module(*inputs), experts(*inputs))
    assert "num_experts=4" in repr(module)
    assert not list(module.parameters())
    assert module.state_dict() == {}
    module.experts.save(tmp_path / "layer.safetensors")
    loaded = MoEExperts.from_packed(tmp_path / "layer.safetensors", threads=1)
    assert torch.equal(loaded(*inputs), experts(*inputs))
    with pytest.raises(KtkUnsupportedError, match="copied"):
        copy.deepcopy(module)
