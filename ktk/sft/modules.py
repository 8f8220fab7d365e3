"""Finding ktk's layers in a model."""

from __future__ import annotations

from torch import nn

from ktk.sft.layer import KTMoELayerWrapper

__all__ = ["moe_layers"]


def moe_layers(model: nn.Module) -> list[tuple[str, KTMoELayerWrapper]]:
    """Name and layer of every `KTMoELayerWrapper`, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, KTMoELayerWrapper)]
