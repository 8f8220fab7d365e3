"""Tiny models for training, in eager PyTorch and in ktk."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from ktk.sft import KTConfig, kt_adapt_peft_lora, wrap_moe_layers_with_kt_wrapper
from tiny_models import CONFIGS
from tiny_models import make_config as make

CONFIGS.update(
    {
        "qwen2_moe": {
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 3,
        },
        "glm4_moe": {
            "moe_intermediate_size": 40,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "head_dim": 16,
        },
        "deepseek_v2": {**CONFIGS["deepseek_v3"], "topk_method": "greedy"},
    }
)
EXPERT_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def eager(architecture: str, **changes: Any) -> Any:
    """A random model whose weights are exact in bfloat16, in float32."""
    torch.manual_seed(sum(architecture.encode()))
    model: Any = transformers.AutoModelForCausalLM.from_config(
        make(architecture, **changes), experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            value = noise * 0.1 if parameter.dim() > 1 else parameter + noise * 0.05
            parameter.copy_(value.bfloat16())
    return model.train()


def wrap(model: Any, **settings: Any) -> Any:
    """The model with its experts in ktk."""
    wrap_moe_layers_with_kt_wrapper(
        model, KTConfig(**{"num_threads": 2, "model_max_length": 512, **settings})
    )
    return model


def lora_config(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": EXPERT_TARGETS,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **changes})


def with_peft(model: Any, seed: int = 0, **changes: Any) -> Any:
    """PEFT's adapters, their B drawn too, so that all gradients are of one order."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, lora_config(**changes))
    if hasattr(adapted.get_base_model(), "_kt_wrappers"):
        kt_adapt_peft_lora(adapted)
    draw_adapters(adapted, seed)
    return adapted


def draw_adapters(model: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def pair(architecture: str, **settings: Any) -> tuple[Any, Any]:
    """The same model with PEFT's adapters in eager PyTorch and in ktk."""
    model = eager(architecture)
    return with_peft(copy.deepcopy(model)), with_peft(wrap(model, **settings))


def batch(
    seed: int = 0, rows: int = 2, columns: int = 24, vocabulary: int = 256, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids.clone()}


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
