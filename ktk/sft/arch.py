"""What is where in a model with experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktk.sft.errors import KTAMXModelNotSupportedError

__all__ = [
    "MOEArchConfig",
    "MoEBlock",
    "find_moe_blocks",
    "get_expert_device",
    "get_moe_arch_config",
    "get_moe_module",
    "move_non_experts_to_gpu",
]


@dataclass(frozen=True, kw_only=True)
class MOEArchConfig:
    """Names and sizes of the experts of an architecture.

    Parameters
    ----------
    moe_layer_attr : str
        Attribute of a decoder layer that holds the block: ``"mlp"``.
    router_attr, experts_attr : str
        Attributes of the block.
    weight_names : tuple of str
        gate, up and down of one expert, as checkpoints name them.
    expert_num, num_experts_per_tok, intermediate_size, hidden_size : int
        E, k, I and H.
    has_shared_experts : bool
    router_type : str
        For information: ktk calls the model's own router.
    layers_prefix : str
        Name of the list of decoder layers.
    """

    moe_layer_attr: str = "mlp"
    router_attr: str = "gate"
    experts_attr: str = "experts"
    weight_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_num: int
    num_experts_per_tok: int
    intermediate_size: int
    hidden_size: int
    has_shared_experts: bool = False
    router_type: str = "generic"
    layers_prefix: str = "model.layers"


_KNOWN: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("DeepseekV2", "DeepseekV3"), {"router_type": "deepseek_gate"}),
    (("Qwen2Moe", "Qwen3Moe"), {"router_type": "linear"}),
    (
        ("Qwen3VLMoe", "Qwen3_5Moe", "Qwen2VLMoe"),
        {"router_type": "linear", "layers_prefix": "model.language_model.layers"},
    ),
    (("Glm4Moe",), {"router_type": "glm4_moe_gate"}),
    (
        ("Mixtral",),
        {"router_type": "linear", "moe_layer_attr": "block_sparse_moe", "weight_names": ("w1", "w3", "w2")},
    ),
)
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_INNER = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_dim", "intermediate_size")


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def get_moe_arch_config(config: Any) -> MOEArchConfig:
    """Describe the experts of a model.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model; for models of text and images, that of the text is looked into.

    Returns
    -------
    MOEArchConfig
        Of a known architecture (Qwen2-MoE, Qwen3-MoE, Qwen-VL-MoE, DeepSeek-V2 and V3, GLM-4-MoE, Mixtral),
        or made from the sizes that the configuration names.

    Raises
    ------
    KTAMXModelNotSupportedError
        If the configuration names no experts.
    """
    text = getattr(config, "text_config", None) or config
    names = " ".join(getattr(config, "architectures", None) or [type(config).__name__])
    sizes: dict[str, Any] = {
        "expert_num": _first(text, _EXPERTS),
        "num_experts_per_tok": _first(text, _TOP_K),
        "intermediate_size": _first(text, _INNER),
        "hidden_size": _first(text, ("hidden_size",)),
    }
    missing = [name for name, value in sizes.items() if value is None]
    if missing:
        raise KTAMXModelNotSupportedError(
            f"{names} is no mixture of experts that ktk can train: its configuration has no "
            f"{', '.join(missing)}"
        )
    shared = _first(text, ("n_shared_experts", "shared_expert_intermediate_size", "num_shared_experts"))
    known = next((fields for keys, fields in _KNOWN if any(key in names for key in keys)), {})
    return MOEArchConfig(**sizes, has_shared_experts=shared is not None, **known)


@dataclass(frozen=True)
class MoEBlock:
    """A block of router and experts within a model.

    Parameters
    ----------
    name : str
        Of the block, as `named_modules` gives it.
    parent : torch.nn.Module
        Module whose attribute it is.
    module : torch.nn.Module
    fused : bool
        Whether the experts are one module with the interface of transformers 5; else a `torch.nn.ModuleList`.
    """

    name: str
    parent: nn.Module
    module: nn.Module
    fused: bool

    @property
    def experts(self) -> Any:
        """The experts."""
        return self.module.experts

    @property
    def layer_idx(self) -> int:
        """Number of the decoder layer; 0 if the name has none."""
        return max((int(part) for part in self.name.split(".") if part.isdigit()), default=0)


def _is_fused(module: Any) -> bool:
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts"))


def _is_list(module: Any) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    expert: Any = module[0]
    return all(hasattr(expert, n) for n in ("gate_proj", "up_proj", "down_proj")) or all(
        hasattr(expert, n) for n in ("w1", "w3", "w2")
    )


def find_moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """Blocks of a model whose experts ktk can take over, in the model's order."""
    found = []
    for name, module in model.named_modules():
        experts = module._modules.get("experts")
        if experts is None or not (_is_fused(experts) or _is_list(experts)):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        found.append(MoEBlock(name, parent, module, _is_fused(experts)))
    return found


def get_moe_module(layer: nn.Module, moe_config: MOEArchConfig) -> nn.Module | None:
    """The block of a decoder layer; None if the layer is dense."""
    for name in (moe_config.moe_layer_attr, "mlp", "block_sparse_moe", "feed_forward"):
        block = getattr(layer, name, None)
        if isinstance(block, nn.Module) and hasattr(block, moe_config.experts_attr):
            return block
    return None


def _is_expert_parameter(name: str) -> bool:
    return ".experts." in f".{name}"


def get_expert_device(model: nn.Module, moe_config: MOEArchConfig | None = None) -> torch.device:
    """Device of the experts: where their parameters are; the CPU once ktk has them."""
    for name, parameter in model.named_parameters():
        if _is_expert_parameter(name):
            return parameter.device
    return torch.device("cpu")


def move_non_experts_to_gpu(
    model: nn.Module, moe_config: MOEArchConfig | None = None, device: str | torch.device = "cuda:0"
) -> None:
    """Move every parameter and buffer outside of experts to `device`."""
    moved: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        inside = _is_expert_parameter(f"{name}.x")
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is None or inside or _is_expert_parameter(f"{name}.{key}"):
                    continue
                # Tensors that are shared, as embedding and head may be, stay shared.
                if id(tensor) not in moved:
                    value = tensor.detach().to(device)
                    parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if parameter else value
                store[key] = moved[id(tensor)]
