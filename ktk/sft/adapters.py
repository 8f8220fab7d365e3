"""Adapters of experts on disk.

Read: kt-kernel's ``fused_expert_lora.safetensors``; and, from PEFT's ``adapter_model.safetensors``,
adapters on each expert, on fused experts, and of ktk's own. Written: ``fused_expert_lora.safetensors``, or
one adapter an expert as PEFT names them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ktk.sft.errors import KTAMXConfigError
from ktk.sft.files import read_tensors, write_tensors
from ktk.sft.layer import KTMoELayerWrapper
from ktk.sft.lora_sources import split_rows
from ktk.sft.modules import moe_layers
from ktk.sft.native import LORA_NAMES, lora_shapes

__all__ = [
    "FUSED_FILE",
    "PEFT_FILE",
    "load_kt_moe_from_adapter",
    "load_lora_experts_from_adapter",
    "read_expert_adapters",
    "save_kt_moe_to_adapter",
    "save_lora_experts_to_adapter",
]

FUSED_FILE = "fused_expert_lora.safetensors"
PEFT_FILE = "adapter_model.safetensors"

_FUSED_KEY = re.compile(
    r"^(?:.*?\.)?layers\.(\d+)\.(?:\w+\.)?experts\.((?:gate|up|down)_lora_[ab])(?:\.weight)?$"
)
_EXPERT_KEY = re.compile(
    r"layers\.(\d+)\.\w+\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.lora_([AB])\.weight$"
)
_PARAMETER_KEY = re.compile(r"layers\.(\d+)\.\w+\.experts\.(base_layer\.)?lora_([AB])\.weight$")
_EXTRA_KEY = re.compile(r"layers\.(\d+)\.\w+\.lora_experts\.(\d+\.le_(?:gate|up|down)\.weight)$")
_PART = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def save_kt_moe_to_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    form: Literal["fused", "per_expert"] = "fused",
) -> Path:
    """Write the adapters of all experts.

    Parameters
    ----------
    model : torch.nn.Module
    path : path
        Folder; made if missing.
    form : {"fused", "per_expert"}, default "fused"
        ``"fused"``: ``fused_expert_lora.safetensors``, keys ``layers.{L}.experts.{gate,up,down}_lora_{a,b}``.
        ``"per_expert"``: added to ``adapter_model.safetensors`` with the names that PEFT gives to adapters
        on the linear layers of each expert.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    KTAMXConfigError
        If no layer has adapters.
    """
    folder = Path(path)
    found: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for name, layer in moe_layers(model):
        tensors = None if layer.core.lora is None else layer.core.lora.tensors()
        if tensors is None or layer.core.lora is None:
            continue
        metadata = {"lora_rank": str(layer.core.lora.rank), "lora_alpha": str(layer.core.lora.alpha)}
        for key, tensor in tensors.items():
            value = _full(tensor)
            if form == "fused":
                found[f"layers.{layer.layer_idx}.experts.{key}"] = value
                continue
            part, _, side = key.split("_")
            block = name.removeprefix("base_model.model.")
            for expert, one in enumerate(value):
                found[f"base_model.model.{block}.experts.{expert}.{part}_proj.lora_{side.upper()}.weight"] = (
                    one
                )
    if not found:
        raise KTAMXConfigError("no layer has adapters to save; call kt_adapt_peft_lora(model) first")
    if form == "fused":
        write_tensors(folder / FUSED_FILE, found, metadata)
        return folder / FUSED_FILE
    return _merge(folder / PEFT_FILE, found)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    # FSDP2 keeps parameters as pieces; all ranks take part in putting one together.
    whole = getattr(tensor, "full_tensor", None)
    return tensor.detach() if whole is None else whole().detach()


def _merge(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    old = read_tensors(path) if path.is_file() else {}
    write_tensors(path, {**old, **tensors})
    return path


def read_expert_adapters(
    path: str | os.PathLike[str],
) -> tuple[dict[int, dict[str, torch.Tensor]], float | None]:
    """Read the adapters of experts in a folder, whichever way they are stored.

    Returns
    -------
    layers : dict
        The six tensors by the number of the layer. Empty if the folder has none.
    alpha : float or None
        As its files say.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    KTAMXConfigError
        If adapters are incomplete.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder at {folder}")
    settings: dict[str, Any] = {}
    if (folder / "adapter_config.json").is_file():
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    alpha = settings.get("lora_alpha")
    if (folder / FUSED_FILE).is_file():
        from safetensors import safe_open

        found = _fused(read_tensors(folder / FUSED_FILE))
        with safe_open(folder / FUSED_FILE, framework="pt") as handle:
            alpha = (handle.metadata() or {}).get("lora_alpha", alpha)
        return _complete(found, folder / FUSED_FILE), None if alpha is None else float(alpha)
    if not (folder / PEFT_FILE).is_file():
        return {}, alpha
    tensors = read_tensors(folder / PEFT_FILE)
    found = _fused(tensors) or _per_expert(tensors, folder) or _on_parameters(tensors, settings)
    return _complete(found, folder / PEFT_FILE), alpha


def _fused(tensors: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _FUSED_KEY.match(key):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    return found


def _per_expert(tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    gathered: dict[int, dict[str, dict[int, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        if match := _EXPERT_KEY.search(key):
            name = f"{_PART[match[3]]}_lora_{match[4].lower()}"
            gathered.setdefault(int(match[1]), {}).setdefault(name, {})[int(match[2])] = tensor
    found: dict[int, dict[str, torch.Tensor]] = {}
    for layer, names in gathered.items():
        for name, experts in names.items():
            if sorted(experts) != list(range(len(experts))):
                raise KTAMXConfigError(
                    f"{folder}: layer {layer} has {name} of experts {sorted(experts)} only; ktk needs all "
                    f"of them"
                )
            found.setdefault(layer, {})[name] = torch.stack([experts[index] for index in range(len(experts))])
    return found


def _on_parameters(
    tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[int, dict[str, torch.Tensor]]:
    """PEFT's adapters on fused parameters; gate and up share A."""
    gathered: dict[int, dict[bool, dict[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        if match := _PARAMETER_KEY.search(key):
            gathered.setdefault(int(match[1]), {}).setdefault(match[2] is not None, {})[match[3]] = tensor
    rank = settings.get("r")
    if gathered and not rank:
        raise KTAMXConfigError("adapters on fused experts need adapter_config.json with their rank, r")
    found: dict[int, dict[str, torch.Tensor]] = {}
    for layer, pairs in gathered.items():
        factors = [_factors(pair, int(rank or 1)) for pair in pairs.values()]
        if len(factors) != 2:
            raise KTAMXConfigError(
                f"layer {layer} has adapters on one of gate_up_proj and down_proj only; load them with PEFT"
            )
        # The names say which is inside the other, not which is which; sizes do: H to 2I, and I to H.
        (a, b), (down_a, down_b) = (
            factors if factors[0][1].shape[1] == 2 * factors[1][0].shape[2] else factors[::-1]
        )
        gate, up = split_rows(b, True)
        found[layer] = {
            "gate_lora_a": a,
            "gate_lora_b": gate,
            "up_lora_a": a,
            "up_lora_b": up,
            "down_lora_a": down_a,
            "down_lora_b": down_b,
        }
    return found


def _factors(pair: Mapping[str, torch.Tensor], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[E, r, in]`` and B ``[E, out, r]`` of PEFT's ``[rE, in]`` and ``[out, rE]``."""
    experts = pair["A"].shape[0] // rank
    a = pair["A"].reshape(experts, rank, pair["A"].shape[-1])
    return a, pair["B"].reshape(pair["B"].shape[0], rank, experts).permute(2, 0, 1)


def _complete(layers: dict[int, dict[str, torch.Tensor]], path: Path) -> dict[int, dict[str, torch.Tensor]]:
    for layer, tensors in layers.items():
        missing = [name for name in LORA_NAMES if name not in tensors]
        if missing:
            raise KTAMXConfigError(f"{path}: the adapters of layer {layer} lack {', '.join(missing)}")
    return layers


def load_kt_moe_from_adapter(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Load the adapters of all experts. Layers without adapters get some of ktk's own.

    Everything is checked before the first parameter is changed.

    Parameters
    ----------
    model : torch.nn.Module
        Wrapped.
    path : path
        Folder with ``fused_expert_lora.safetensors`` or PEFT's ``adapter_model.safetensors``.

    Returns
    -------
    int
        Number of layers that were loaded; 0 if the folder has no adapters of experts.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    KTAMXConfigError
        If the adapters are of another model: other layers, experts or sizes; or of another rank.
    """
    found, alpha = read_expert_adapters(path)
    layers = {layer.layer_idx: layer for _, layer in moe_layers(model)}
    if not found:
        return 0
    if set(found) != set(layers):
        raise KTAMXConfigError(
            f"{os.fspath(path)} has adapters for the experts of layers {sorted(found)}, and the model has "
            f"experts in "
            f"layers {sorted(layers)}: they are of another model"
        )
    for index, tensors in found.items():
        _check_fits(layers[index], tensors, Path(path))
    for index, tensors in found.items():
        layer = layers[index]
        rank = tensors["gate_lora_a"].shape[1]
        if layer.core.lora is None:
            scale_alpha = 2.0 * rank if alpha is None else float(alpha)
            layer.inner_experts.add_fused_lora(rank, scale_alpha, 0.0, tensors["gate_lora_a"].dtype)
        assert layer.core.lora is not None
        layer.core.lora.load(tensors)
        layer.inner_experts.drop_placeholders()
    return len(found)


def _check_fits(layer: KTMoELayerWrapper, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    sizes = layer.core.sizes
    rank = tensors["gate_lora_a"].shape[1]
    have = layer.core.lora
    if have is not None and have.rank != rank:
        raise KTAMXConfigError(
            f"{path} has adapters of rank {rank}, and those of layer {layer.layer_idx} have rank "
            f"{have.rank}; set "
            f"kt_lora_rank to {rank}"
        )
    shapes = lora_shapes(sizes.num_experts, sizes.hidden_size, sizes.intermediate_size, rank)
    for name, shape in shapes.items():
        got = tuple(tensors[name].shape)
        if got != shape:
            raise KTAMXConfigError(
                f"{path}: {name} of layer {layer.layer_idx} has the shape {list(got)}, and the model needs "
                f"{list(shape)}: it is of another model"
            )
        if not torch.isfinite(tensors[name]).all():
            raise KTAMXConfigError(f"{path}: {name} of layer {layer.layer_idx} holds NaN or infinity")


def save_lora_experts_to_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path | None:
    """Add the extra experts to ``adapter_model.safetensors``; None if the model has none.

    Keys are ``base_model.model.{layer}.lora_experts.{e}.le_{gate,up,down}.weight``.
    """
    found = {}
    for name, layer in moe_layers(model):
        extra = layer._modules.get("lora_experts")
        if extra is None:
            continue
        block = name.removeprefix("base_model.model.")
        for key, parameter in extra.named_parameters():
            found[f"base_model.model.{block}.lora_experts.{key}"] = _full(parameter)
    return _merge(Path(path) / PEFT_FILE, found) if found else None


def load_lora_experts_from_adapter(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Load the extra experts from ``adapter_model.safetensors``; the number of layers that were loaded.

    Raises
    ------
    KTAMXConfigError
        If the file has extra experts of other layers or sizes than the model, or has none for a model with
        some.
    """
    file = Path(path) / PEFT_FILE
    found: dict[int, dict[str, torch.Tensor]] = {}
    if file.is_file():
        for key, tensor in read_tensors(file).items():
            if match := _EXTRA_KEY.search(key):
                found.setdefault(int(match[1]), {})[match[2]] = tensor
    layers = {
        layer.layer_idx: layer._modules["lora_experts"]
        for _, layer in moe_layers(model)
        if layer._modules.get("lora_experts") is not None
    }
    if set(found) != set(layers):
        raise KTAMXConfigError(
            f"{file} has extra experts for layers {sorted(found)}, and the model has some in "
            f"{sorted(layers)}; set "
            "kt_use_lora_experts as it was in training"
        )
    for index, tensors in found.items():
        module = layers[index]
        assert module is not None
        have = {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
        got = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if have != got:
            raise KTAMXConfigError(
                f"{file}: the extra experts of layer {index} have the shapes {got}, not {have}"
            )
    for index, tensors in found.items():
        module = layers[index]
        assert module is not None
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                parameter.copy_(tensors[key])
    return len(found)
