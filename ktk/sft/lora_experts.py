"""Small dense experts beside the model's own, trained whole."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

__all__ = ["LoRAExpertMLP", "LoRAExperts"]


class LoRAExpertMLP(nn.Module):
    """One dense expert: ``le_down(silu(le_gate(x)) * le_up(x))``. `le_down` starts at zero.

    Parameters
    ----------
    hidden_size, intermediate_size : int
    dtype : torch.dtype, optional
    """

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.le_gate = nn.Linear(hidden_size, intermediate_size, bias=False, dtype=dtype)
        self.le_up = nn.Linear(hidden_size, intermediate_size, bias=False, dtype=dtype)
        self.le_down = nn.Linear(intermediate_size, hidden_size, bias=False, dtype=dtype)
        nn.init.zeros_(self.le_down.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output for ``[..., H]``, like it."""
        x = hidden_states.to(self.le_gate.weight.dtype)
        output = self.le_down(nn.functional.silu(self.le_gate(x)) * self.le_up(x))
        return cast(torch.Tensor, output.to(hidden_states.dtype))


class LoRAExperts(nn.ModuleList):
    """Mean of a few `LoRAExpertMLP`, for every token.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
    dtype : torch.dtype, optional
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(LoRAExpertMLP(hidden_size, intermediate_size, dtype) for _ in range(num_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mean output for ``[..., H]``, like it."""
        return torch.stack([expert(hidden_states) for expert in self]).mean(0)
