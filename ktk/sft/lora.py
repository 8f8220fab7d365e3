"""Adapters of the experts of a whole model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ktk.sft.adapters import (
    load_kt_moe_from_adapter,
    load_lora_experts_from_adapter,
    save_kt_moe_to_adapter,
    save_lora_experts_to_adapter,
)
from ktk.sft.config import KTConfig
from ktk.sft.errors import KTAMXConfigError
from ktk.sft.layer import KTExperts, KTMoELayerWrapper
from ktk.sft.lora_experts import LoRAExpertMLP, LoRAExperts
from ktk.sft.modules import moe_layers
from ktk.sft.transport import average_gradients

__all__ = [
    "KTAdaptResult",
    "LoRAExpertMLP",
    "LoRAExperts",
    "get_kt_lora_params",
    "get_kt_named_trainable_params",
    "get_kt_rank_local_parameter_names",
    "get_kt_trainable_params",
    "hidden_kt_parameters",
    "kt_adapt_peft_lora",
    "load_kt_moe_from_adapter",
    "load_lora_experts_from_adapter",
    "save_kt_moe_to_adapter",
    "save_lora_experts_to_adapter",
    "sync_kt_lora_gradients",
    "update_kt_lora_pointers",
]


@dataclass(frozen=True)
class KTAdaptResult:
    """What `kt_adapt_peft_lora` did.

    Parameters
    ----------
    named_optimizer_parameters : list
        Name and parameter of everything in the experts that is trained.
    placeholder_names : list of str
        Parameters that stood for packed weights and are gone from the model.
    """

    named_optimizer_parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    placeholder_names: list[str] = field(default_factory=list)


def kt_adapt_peft_lora(model: nn.Module, kt_config: Any = None) -> KTAdaptResult:
    """Connect the adapters of a model's experts; call it after ``get_peft_model``, or in its place.

    PEFT's adapters on experts are used where there are any, on fused experts (``target_parameters``) and on
    the linear layers of each expert. Other layers get adapters of ktk's own, if the configuration trains
    adapters. Calling it again connects what has been added since, and changes nothing else.

    Parameters
    ----------
    model : torch.nn.Module
        Wrapped by `wrap_moe_layers_with_kt_wrapper`, with or without PEFT around it.
    kt_config : KTConfig or what `KTConfig.from_object` takes, optional
        Default: that of wrapping.

    Returns
    -------
    KTAdaptResult

    Raises
    ------
    KTAMXConfigError
        If the model is not wrapped, or PEFT's adapters are such that ktk cannot run them.
    """
    layers = moe_layers(model)
    if not layers:
        raise KTAMXConfigError(
            f"{type(model).__name__} has no layers of ktk; call wrap_moe_layers_with_kt_wrapper(model) first"
        )
    config = _config(model, kt_config)
    gone: list[str] = []
    for name, layer in layers:
        _adapt_layer(layer, model, config)
        _add_lora_experts(layer, config)
        experts = layer.inner_experts
        gone += [f"{name}.experts.{key}" for _, key in experts._placeholders()]
        experts.drop_placeholders()
        if layer.core.base is not None:
            for parameter in layer.core.base.parameters():
                parameter.requires_grad_(True)
    return KTAdaptResult(get_kt_named_trainable_params(model), gone)


def _config(model: nn.Module, given: Any) -> KTConfig:
    if given is not None:
        return KTConfig.from_object(given)
    for module in model.modules():
        found = module.__dict__.get("_kt_config")
        if found is not None:
            return KTConfig.from_object(found)
    return KTConfig()


def _adapt_layer(layer: KTMoELayerWrapper, model: nn.Module, config: KTConfig) -> None:
    experts = layer.inner_experts
    skip = layer.wrapper is not None and getattr(layer.wrapper, "skip_lora", False)
    found = None
    # Adapters of PEFT can only be there if PEFT was imported; ktk's own do not need it.
    if "peft" in sys.modules and config.trains_lora and not skip and not config.kt_force_fused_expert_lora:
        from ktk.integrations.peft import lora_of_peft

        found = lora_of_peft(layer, experts)
    if found is not None:
        if layer.core.lora is None or found.parameters().keys() != layer.core.lora.parameters().keys():
            layer.core.adopt(found)
        return
    if layer.core.lora is None and config.trains_lora and not skip:
        if not isinstance(experts, KTExperts):
            raise KTAMXConfigError(
                f"the experts of layer {layer.layer_idx} are a list, which PEFT adapts: name their linear "
                f"layers in "
                "target_modules of its LoraConfig"
            )
        peft = _peft_config(model)
        rank = config.kt_lora_rank or getattr(peft, "r", None) or 16
        alpha = config.kt_lora_alpha
        if alpha is None:
            same_rank = peft is not None and peft.r == rank
            alpha = float(peft.lora_alpha) if same_rank else config.lora_alpha_of(rank)
        if peft is None:
            experts.add_fused_lora(rank, alpha, config.kt_lora_dropout, torch.float32)
        else:
            from ktk.integrations.peft import KTLoraLayer

            adapter: Any = model.active_adapter
            layer.experts = KTLoraLayer(experts, adapter, rank, alpha, config.kt_lora_dropout, torch.float32)


def _peft_config(model: Any) -> Any:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return None
    active = getattr(model, "active_adapter", None)
    return configs.get(active if isinstance(active, str) else "default")


def _add_lora_experts(layer: KTMoELayerWrapper, config: KTConfig) -> None:
    if not config.kt_use_lora_experts or "lora_experts" in layer._modules:
        return
    layer.lora_experts = LoRAExperts(
        config.kt_lora_expert_num, layer.hidden_size, config.kt_lora_expert_intermediate_size
    )


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for _, layer in moe_layers(model):
        prefix = f"kt.layers.{layer.layer_idx}.experts"
        if layer.core.lora is not None:
            for name, parameter in layer.core.lora.parameters().items():
                yield f"{prefix}.fused_lora.{name}", parameter
        if layer.core.base is not None:
            experts = layer.inner_experts
            owned = {id(p): name for name, p in experts.named_parameters()}
            for weight in layer.core.base.parameters():
                assert isinstance(weight, nn.Parameter)
                yield f"{prefix}.base.{owned[id(weight)]}", weight
        extra = layer._modules.get("lora_experts")
        if extra is not None:
            for name, parameter in extra.named_parameters():
                yield f"kt.layers.{layer.layer_idx}.lora_experts.{name}", parameter


def get_kt_named_trainable_params(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of everything in the experts that is trained.

    The parameters are in the model's own tree too, under other names.
    """
    return [(name, parameter) for name, parameter in _named(model) if parameter.requires_grad]


def get_kt_trainable_params(model: nn.Module) -> list[nn.Parameter]:
    """Parameters in the experts that are trained."""
    return [parameter for _, parameter in get_kt_named_trainable_params(model)]


def get_kt_lora_params(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the experts' adapters."""
    return [parameter for name, parameter in _named(model) if ".base." not in name]


def get_kt_rank_local_parameter_names(model: nn.Module) -> list[str]:
    """Parameters that only this rank has: none. Adapters are on every rank and averaged like all others."""
    return []


def update_kt_lora_pointers(model: nn.Module) -> None:
    """Pack trained weights again now, and not at the next forward. Not needed for adapters."""
    for _, layer in moe_layers(model):
        layer.core.pack_base(force=True)


@contextmanager
def hidden_kt_parameters(model: nn.Module) -> Iterator[None]:
    """Take what is trained of the experts and lies in CPU memory out of the module tree for the block.

    `torch.nn.parallel.DistributedDataParallel` refuses a model whose parameters are on several kinds of
    devices, and NCCL cannot reduce gradients in CPU memory. Made in this block it looks after all other
    parameters; call `sync_kt_lora_gradients` before each step of the optimizer. FSDP2 has `ignored_params`
    for the same purpose.

    Parameters
    ----------
    model : torch.nn.Module
        With its adapters connected by `kt_adapt_peft_lora`.
    """
    hidden = {id(parameter) for parameter in get_kt_trainable_params(model) if parameter.device.type == "cpu"}
    changed = []
    for module in model.modules():
        held = {name: p for name, p in module._parameters.items() if id(p) in hidden}
        if held:
            changed.append((module, list(module._parameters), held))
            for name in held:
                del module._parameters[name]
    try:
        yield
    finally:
        for module, names, held in changed:
            # In the order that they had, which is that of optimizers and saved states.
            everything = {**module._parameters, **held}
            ordered = {name: everything.pop(name) for name in names if name in everything}
            module._parameters.clear()
            module._parameters.update({**ordered, **everything})


def sync_kt_lora_gradients(model: nn.Module) -> None:
    """Average the gradients of the experts over all ranks, where DDP or FSDP does not do it. Alone:
    nothing."""
    average_gradients(get_kt_trainable_params(model))
