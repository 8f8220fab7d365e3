"""How much memory a run takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ktk.sft.arch import find_moe_blocks, get_moe_arch_config
from ktk.sft.run_config import RunConfig

__all__ = ["FORMULA", "MemoryEstimate", "estimate_memory"]

FORMULA = (
    "process + 1.02 * packed experts + other weights + 16 bytes * trained parameters "
    "+ layers * (2TH + 4TkI) + (18 d H + 4 S heads) * T * all layers + 12 T vocabulary"
)
"""T tokens a forward, S tokens a sequence, d bytes an activation. The layers' term is 0 for activation:
recompute; with gradient checkpointing it and the next count for one layer, plus d * T * H for each."""

# Bits of one weight with its scales: a bf16 scale for every 32 weights of int4, a float32 for every row of
# int8, one for every 128 weights of fp8.
_BITS = {"bf16": 16.0, "int8": 8.02, "int4": 4.5, "fp8": 8.25}


@dataclass(frozen=True)
class MemoryEstimate:
    """Terms of `FORMULA` in bytes."""

    process: int
    experts: int
    others: int
    trained: int
    saved: int
    graph: int
    logits: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(vars(self).values())


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def estimate_memory(config: RunConfig) -> MemoryEstimate:
    """Memory of a run at its peak, without loading the model.

    Parameters
    ----------
    config : RunConfig

    Returns
    -------
    MemoryEstimate
        Its `process` is what this process, with PyTorch and transformers, takes now.
    """
    # What a run loads beside them, so that its size is in `process`.
    import peft  # noqa: F401
    import transformers

    import ktk.sft.train  # noqa: F401

    settings: Any = transformers.AutoConfig.from_pretrained(config.model, local_files_only=True)
    with torch.device("meta"):
        loader: Any = transformers.AutoModelForCausalLM
        model = loader.from_config(settings)
    arch = get_moe_arch_config(settings)
    text = getattr(settings, "text_config", None) or settings
    blocks = find_moe_blocks(model)
    expert_names = tuple(f"{block.name}.experts." for block in blocks)
    experts = others = adapted = 0
    for name, parameter in model.named_parameters():
        if name.startswith(expert_names):
            experts += parameter.numel()
        else:
            others += parameter.numel()
            module = name.removesuffix(".weight").rpartition(".")[2]
            if module in config.target_modules and parameter.dim() == 2:
                adapted += config.rank * sum(parameter.shape)
    e, h, i = arch.expert_num, arch.hidden_size, arch.intermediate_size
    # gate and up share A in PEFT's adapters on fused experts.
    adapted += len(blocks) * e * config.rank * ((h + 2 * i) + (i + h))
    dtype = config.dtype if config.dtype != "auto" else str(getattr(settings, "dtype", None) or "float32")
    width = 2 if "16" in dtype else 4
    tokens, layers = config.tokens, text.num_hidden_layers
    saved = len(blocks) * (2 * tokens * h + 4 * tokens * arch.num_experts_per_tok * i)
    if config.activation == "recompute":
        saved = 0
    graph_layer = tokens * (18 * width * h + 4 * config.context * text.num_attention_heads)
    graph = layers * graph_layer
    if config.gradient_checkpointing:
        saved //= max(1, len(blocks))
        graph = graph_layer + layers * width * tokens * h
    return MemoryEstimate(
        process=_resident_bytes(),
        experts=int(1.02 * experts * _BITS[config.format] / 8),
        others=others * width,
        trained=16 * adapted,
        saved=saved,
        graph=graph,
        logits=12 * tokens * text.vocab_size,
    )
