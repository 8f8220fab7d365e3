"""Fifty steps of training in ktk beside fifty in eager PyTorch with PEFT.

The two differ by the roundings of bfloat16 inside the experts, which training carries on. How much that may
be is measured, not chosen: the eager model is also trained with its experts' inputs, outputs, or both
rounded to bfloat16, and ktk may differ from the exact curve by three times what the worst of these did up
to then. Routers are drawn wide: where two experts have nearly equal scores, a rounding changes the choice,
and with it the curve by a jump.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sft.models import batch, eager, with_peft, wrap

pytestmark = pytest.mark.any_binding

STEPS = 50
FACTOR = 3.0


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """bfloat16 in both directions."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def round_experts(model: Any, inputs: bool, outputs: bool) -> Any:
    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None and inputs:
            experts.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:]))
        if experts is not None and outputs:
            experts.register_forward_hook(lambda _, __, output: rounded(output))
    return model


def curve(model: Any) -> torch.Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(STEPS):
        loss = model(**batch(step % 4, rows=2, columns=8)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_loss_curve(architecture: str) -> None:
    source = eager(architecture)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "mlp.gate" in name:
                parameter.mul_(8)
    exact = curve(with_peft(copy.deepcopy(source)))
    kinds = ((True, True), (True, False), (False, True))
    noisy = torch.stack([curve(with_peft(round_experts(copy.deepcopy(source), *kind))) for kind in kinds])
    actual = curve(with_peft(wrap(source)))
    assert exact[-4:].mean() < exact[:4].mean() - 0.2
    band = FACTOR * (noisy - exact).abs().amax(0).cummax(0).values + 2.0**-9
    difference = (actual - exact).abs()
    assert (difference <= band).all(), (difference / band).max()
