"""Adapters that PEFT has put on experts that ktk runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ktk.sft.errors import KTAMXConfigError
from ktk.sft.layer import KTExpertList, KTMoELayerWrapper
from ktk.sft.lora_sources import LoRASource, ParameterLoRA, PerExpertLoRA
from ktk.sft.weights import list_projections

__all__ = ["lora_of_peft"]


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
            f"PEFT adapts only some of the experts of layer {layer.layer_idx}; ktk needs gate, up and down of all "
            f"(lacking: {', '.join(lacking)})"
        )
    for found in projections.values():
        for one in found:
            if getattr(one, "lora_variant", None) or any(
                isinstance(value, nn.Module) and value is not None for value in [getattr(one, "lora_bias_", None)]
            ):
                raise KTAMXConfigError("adapters of experts must be plain LoRA, without DoRA or other variants")
    return PerExpertLoRA(projections)
