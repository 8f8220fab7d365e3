"""What passes between a forward and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ktk.errors import KtkStateError
from ktk.sft.native import LORA_NAMES

__all__ = ["Gradients", "SavedForward", "named_lora"]


class SavedForward:
    """What a forward left for its backward: the native context and where its tensors came from.

    Usable once. Freed with the object, or with `close`.
    """

    def __init__(self, context: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.context = context
        self.device = device
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes of saved activations."""
        return 0 if self.context is None else int(self.context.nbytes)

    def take(self) -> Any:
        """The native context, for its only use."""
        context, self.context = self.context, None
        if context is None:
            raise KtkStateError(
                "the saved activations of this forward were used already or freed; a forward of ktk's "
                "experts has one backward. Run the forward again, or leave retain_graph out"
            )
        return context

    def close(self) -> None:
        """Free the activations now. Harmless when they are gone."""
        context, self.context = self.context, None
        if context is not None:
            context.close()


@dataclass
class Gradients:
    """Result of a backward.

    Parameters
    ----------
    hidden_states : torch.Tensor
        ``[T, H]`` in the dtype and on the device of the forward's input.
    expert_weights : torch.Tensor
        float32 ``[T, k]``.
    lora, base : dict
        By the names of `LORA_NAMES` and `BASE_NAMES`, on the CPU; empty where not asked for.
    """

    hidden_states: torch.Tensor
    expert_weights: torch.Tensor
    lora: dict[str, torch.Tensor] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)


def named_lora(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Six tensors by the names of `LORA_NAMES`."""
    return dict(zip(LORA_NAMES, tensors, strict=True))
