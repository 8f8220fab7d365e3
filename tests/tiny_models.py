"""Small random checkpoints of several architectures, and their experts computed by the reference."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from reference.moe import Activation, Layer
from reference.packing import ExpertWeights, Format

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_shared_experts": 1,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "rope_parameters": _PLAIN_ROPE,
        "swiglu_limit": 0.5,
    },
}
"""What each architecture sets besides the common sizes."""

# Older releases of transformers 5 take neither constant from the configuration.
_GPT_OSS_LIMIT = 0.5 if hasattr(transformers.GptOssConfig(), "swiglu_alpha") else 7.0

ACTIVATIONS = {"gpt_oss": Activation(limit=_GPT_OSS_LIMIT, alpha=1.702)}
"""Activations other than silu(gate) * up."""


def make_config(architecture: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model."""
    return transformers.AutoConfig.for_model(architecture, **{**_COMMON, **CONFIGS[architecture], **changes})


@functools.cache
def checkpoint(architecture: str) -> Path:
    """Return the folder of a random checkpoint whose weights are exact in bfloat16, stored in float32."""
    torch.manual_seed(sum(architecture.encode()))
    model: Any = transformers.AutoModelForCausalLM.from_config(make_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            value = noise * 0.1 if parameter.dim() > 1 else parameter + noise * 0.05
            parameter.copy_(value.bfloat16())
    # Kept for the whole run: several tests read it.
    folder = Path(tempfile.mkdtemp(prefix=f"ktk-{architecture}-"))
    model.save_pretrained(folder)
    return folder


def load(architecture: str, experts_implementation: str) -> Any:
    """Load a tiny checkpoint with transformers alone, in float32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(architecture), dtype=torch.float32, experts_implementation=experts_implementation
    )
    return model.eval()


def oracle(architecture: str, form: Format) -> Any:
    """Load a tiny checkpoint with its experts computed by the NumPy reference in `form`."""
    layers: dict[int, Layer] = {}

    def experts_of(module: Any) -> list[ExpertWeights]:
        fused = module.gate_up_proj.transpose(1, 2) if module.is_transposed else module.gate_up_proj
        down = module.down_proj.transpose(1, 2) if module.is_transposed else module.down_proj
        half = fused.shape[1] // 2

        def split(t: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
            parts = (t[:half], t[half:]) if module.is_concatenated else (t[0::2], t[1::2])
            return parts[0].detach().numpy(), parts[1].detach().numpy()

        out = []
        for index in range(module.num_experts):
            gate, up = split(fused[index])
            biases = (None, None, None)
            if module.has_bias:
                biases = (
                    *split(module.gate_up_proj_bias[index]),
                    module.down_proj_bias[index].detach().numpy(),
                )
            out.append(ExpertWeights(gate, up, down[index].detach().numpy(), *biases))
        return out

    def forward(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        layer = layers.get(id(module))
        if layer is None:
            layer = Layer(experts_of(module), form, ACTIVATIONS.get(architecture, Activation()))
            layers[id(module)] = layer
        out = layer.forward(hidden.numpy(), ids.numpy(), weights.numpy().astype(np.float32))
        return torch.from_numpy(out.value.astype(np.float32))

    name = f"oracle-{architecture}-{form}"
    ALL_EXPERTS_FUNCTIONS.register(name, forward)
    return load(architecture, name)
