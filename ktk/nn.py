"""A `torch.nn.Module` of experts."""

from __future__ import annotations

import os
from typing import Any

import torch

from ktk.errors import KtkUnsupportedError
from ktk.layer import Experts

__all__ = ["MoEExperts"]


class MoEExperts(torch.nn.Module):
    """The experts of one layer as a module, to stand where a model has its own.

    The packed weights belong to the native library: they are neither parameters nor in the state dict, do not
    move with `to`, and have no gradient.

    Parameters
    ----------
    experts : Experts
        The layer. The module does not close it.

    Attributes
    ----------
    experts : Experts
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self._handle = experts.handle

    @classmethod
    def from_weights(
        cls,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        *,
        num_experts_per_tok: int,
        **options: Any,
    ) -> MoEExperts:
        """Pack weights and wrap the layer; arguments as for `Experts.from_weights`."""
        return cls(Experts.from_weights(gate, up, down, num_experts_per_tok=num_experts_per_tok, **options))

    @classmethod
    def from_packed(cls, path: str | os.PathLike[str], **options: Any) -> MoEExperts:
        """Load a packed file and wrap the layer; arguments as for `Experts.from_packed`."""
        return cls(Experts.from_packed(path, **options))

    def forward(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts, as `Experts.forward` does.

        Parameters
        ----------
        hidden_states : torch.Tensor
            ``[..., H]``, float32, bfloat16 or float16, on the CPU or a CUDA device.
        expert_ids : torch.Tensor
            int32 or int64 ``[..., k]``.
        expert_weights : torch.Tensor
            Floating point ``[..., k]``.

        Returns
        -------
        torch.Tensor
            A new tensor like `hidden_states`.
        """
        if torch.compiler.is_compiling():
            compiled: torch.Tensor = torch.ops.ktk.moe_forward(
                hidden_states, expert_ids, expert_weights, self._handle
            )
            return compiled
        return self.experts.forward(hidden_states, expert_ids, expert_weights)

    def extra_repr(self) -> str:
        """Shapes and format, for `repr`."""
        config = self.experts.config
        return (
            f"num_experts={config.num_experts}, num_experts_per_tok={config.num_experts_per_tok}, "
            f"hidden_size={config.hidden_size}, intermediate_size={config.intermediate_size}, "
            f"format={config.format}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> MoEExperts:
        """Refuse: the packed weights live in the native library, where they cannot be copied."""
        raise KtkUnsupportedError("a MoEExperts module cannot be copied; build another from the same weights")
