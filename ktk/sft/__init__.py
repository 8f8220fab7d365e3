"""Fine-tuning of mixture-of-experts models whose experts live in CPU memory.

`load_kt_model`, or `wrap_moe_layers_with_kt_wrapper` for a model that is loaded already, puts ktk in the
place of a model's experts; `kt_adapt_peft_lora` connects or adds adapters; then any PyTorch training loop
trains them. Importing `ktk` does not import this package.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF_NAME = {
    "AMXSFTMoEWrapper": "amx",
    "BaseSFTMoEWrapper": "base",
    "INT8ExpertWeights": "weights",
    "KExpertsSFTBuffer": "buffers",
    "KTAMXConfigError": "errors",
    "KTAMXDistributedError": "errors",
    "KTAMXError": "errors",
    "KTAMXModelNotSupportedError": "errors",
    "KTAMXNotAvailableError": "errors",
    "KTActivationPolicy": "config",
    "KTAdaptResult": "lora",
    "KTConfig": "config",
    "KTMoEFunction": "autograd",
    "KTMoELayerWrapper": "layer",
    "LoRAExpertMLP": "lora_experts",
    "LoRAExperts": "lora_experts",
    "MOEArchConfig": "arch",
    "SFT_METHODS": "config",
    "Transport": "transport",
    "build_kt_device_map": "wrapper",
    "build_kt_device_map_simplified": "wrapper",
    "extract_moe_weights": "weights",
    "failure_guard": "failure",
    "get_activation_checkpoint_context_fn": "checkpoint",
    "get_expert_device": "arch",
    "get_kt_loading_kwargs": "wrapper",
    "get_kt_lora_params": "lora",
    "get_kt_named_trainable_params": "lora",
    "get_kt_rank_local_parameter_names": "lora",
    "get_kt_trainable_params": "lora",
    "get_moe_arch_config": "arch",
    "get_moe_module": "arch",
    "hidden_kt_parameters": "lora",
    "kt_adapt_peft_lora": "lora",
    "load_experts_from_checkpoint_files": "weights",
    "load_experts_from_kt_weight_path": "weights",
    "load_kt_adapter_artifacts": "artifacts",
    "load_kt_model": "wrapper",
    "load_kt_moe_from_adapter": "adapters",
    "load_lora_experts_from_adapter": "adapters",
    "move_non_experts_to_gpu": "arch",
    "save_kt_adapter_artifacts": "artifacts",
    "save_kt_moe_to_adapter": "adapters",
    "save_lora_experts_to_adapter": "adapters",
    "sync_kt_lora_gradients": "lora",
    "update_kt_lora_pointers": "lora",
    "wrap_moe_layers_with_kt_wrapper": "wrapper",
}

__all__ = sorted(_MODULE_OF_NAME)  # noqa: PLE0605 - one list of names and modules


def __getattr__(name: str) -> Any:
    module = _MODULE_OF_NAME.get(name)
    if module is None:
        raise AttributeError(f"module 'ktk.sft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ktk.sft.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
