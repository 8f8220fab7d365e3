"""Adapters that PEFT has put on experts that ktk runs."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ktk.sft.errors import KTAMXConfigError
from ktk.sft.layer import KTExpertList, KTExperts, KTMoELayerWrapper
from ktk.sft.lora_sources import FusedLoRA, LoRASource, ParameterLoRA, PerExpertLoRA
from ktk.sft.native import LORA_NAMES
from ktk.sft.weights import list_projections

__all__ = ["KTLoraLayer", "lora_of_peft"]


class KTLoraLayer(nn.Module, BaseTunerLayer):
    """ktk's own adapters as a layer of PEFT, which then saves, loads, freezes and switches them.

    Parameters
    ----------
    base_layer : KTExperts
    adapter_name : str
    rank : int
    alpha, dropout : float
    dtype : torch.dtype
    """

    adapter_layer_names = LORA_NAMES
    other_param_names = ()

    def __init__(
        self,
        base_layer: KTExperts,
        adapter_name: str,
        rank: int,
        alpha: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        core = base_layer.core
        core.adopt(FusedLoRA(self, core.sizes, rank, alpha, dropout, dtype, adapter_name))
        self.train(base_layer.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts, see `ktk.sft.layer.KTExperts`."""
        result: torch.Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
        return result


def lora_of_peft(layer: KTMoELayerWrapper, experts: Any) -> LoRASource | None:
    """Adapters that PEFT has put on the experts of a layer; None if there are none.

    Parameters
    ----------
    layer : KTMoELayerWrapper
        Its `experts` may be wrapped by PEFT; the wrappers then call ktk.
    experts : KTExperts or KTExpertList
        What is inside.

    Raises
    ------
    KTAMXConfigError
        If only some experts or projections are adapted, or in a way that is no plain LoRA.
    """
    if isinstance(experts, KTExpertList):
        return _per_expert(layer, experts)
    wrappers: dict[str, Any] = {}
    outer: Any = layer.experts
    while outer is not experts:
        if isinstance(outer, KTLoraLayer):
            return None
        if outer.parameter_name not in ("gate_up_proj", "down_proj"):
            raise KTAMXConfigError(f"PEFT adapts {outer.parameter_name} of experts, which ktk does not know")
        wrappers[outer.parameter_name] = outer
        outer = outer.base_layer
    if not wrappers:
        return None
    for wrapper in wrappers.values():
        # PEFT's own forward would add the adapters to weights that are not there.
        wrapper.forward = experts.forward
    return ParameterLoRA(wrappers, layer.core.sizes, experts.concatenated)


def _per_expert(layer: KTMoELayerWrapper, experts: KTExpertList) -> PerExpertLoRA | None:
    projections = list_projections(experts)
    adapted = {part: [hasattr(one, "lora_A") for one in found] for part, found in projections.items()}
    flags = [flag for found in adapted.values() for flag in found]
    if not any(flags):
        return None
    if not all(flags):
        lacking = [part for part, found in adapted.items() if not all(found)]
        raise KTAMXConfigError(
            f"PEFT adapts only some of the experts of layer {layer.layer_idx}; ktk needs gate, up and down "
            f"of all "
            f"(lacking: {', '.join(lacking)})"
        )
    for found in projections.values():
        for one in found:
            if getattr(one, "lora_variant", None) or any(
                isinstance(value, nn.Module) and value is not None
                for value in [getattr(one, "lora_bias_", None)]
            ):
                raise KTAMXConfigError(
                    "adapters of experts must be plain LoRA, without DoRA or other variants"
                )
    return PerExpertLoRA(projections)
