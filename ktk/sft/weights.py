"""Weights of experts: taken out of a model, read from a checkpoint, and kept as parameters where they are
trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktk.errors import KtkArgumentError
from ktk.layer import Experts
from ktk.sft.arch import MOEArchConfig
from ktk.sft.errors import KTAMXModelNotSupportedError
from ktk.sft.lora_sources import interleave_rows, split_rows
from ktk.weights import Checkpoint, find_packed
from ktk.weights.kt_kernel import stored_group_size

__all__ = [
    "FusedWeights",
    "INT8ExpertWeights",
    "ListWeights",
    "extract_moe_weights",
    "list_projections",
    "load_experts_from_checkpoint_files",
    "load_experts_from_kt_weight_path",
]


def list_projections(experts: nn.ModuleList) -> dict[str, list[Any]]:
    """The linear layers of a list of experts, by gate, up and down."""
    names = ("gate_proj", "up_proj", "down_proj") if hasattr(experts[0], "gate_proj") else ("w1", "w3", "w2")
    return {
        part: [getattr(expert, name) for expert in experts]
        for part, name in zip(("gate", "up", "down"), names, strict=True)
    }


class FusedWeights:
    """Weights of fused experts as the model's own two parameters, ``gate_up_proj`` and ``down_proj``.

    Parameters
    ----------
    module : torch.nn.Module
        Has the parameters.
    concatenated, transposed : bool
        As transformers stores them: rows of gate and up follow each other or alternate; ``[E, in, out]`` in
        place of ``[E, out, in]``.
    """

    def __init__(self, module: Any, concatenated: bool, transposed: bool) -> None:
        self._module, self._concatenated, self._transposed = module, concatenated, transposed

    def parameters(self) -> tuple[torch.Tensor, ...]:
        return (self._module.gate_up_proj, self._module.down_proj)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate and up ``[E, I, H]`` and down ``[E, H, I]``, as views."""
        gate_up, down = (tensor.detach() for tensor in self.parameters())
        if self._transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return (*split_rows(gate_up, self._concatenated), down)

    def gradients(self, base: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        gate_up, down = interleave_rows(base["gate"], base["up"], self._concatenated), base["down"]
        if self._transposed:
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        return gate_up, down


class ListWeights:
    """Weights of a list of experts as the parameters of their linear layers."""

    def __init__(self, experts: nn.ModuleList) -> None:
        self._layers = list_projections(experts)

    def parameters(self) -> tuple[torch.Tensor, ...]:
        return tuple(layer.weight for part in ("gate", "up", "down") for layer in self._layers[part])

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate and up ``[E, I, H]`` and down ``[E, H, I]``, copied together."""
        gate, up, down = (
            torch.stack([layer.weight.detach() for layer in self._layers[part]])
            for part in ("gate", "up", "down")
        )
        return gate, up, down

    def gradients(self, base: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(gradient for part in ("gate", "up", "down") for gradient in base[part].unbind())


def extract_moe_weights(
    moe_module: Any, moe_config: MOEArchConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of a block's experts.

    Parameters
    ----------
    moe_module : torch.nn.Module
        A block with `experts`: fused, in any of the forms of transformers 5, or a `torch.nn.ModuleList`.
    moe_config : MOEArchConfig, optional
        Not needed; taken for compatibility.

    Returns
    -------
    gate, up : torch.Tensor
        ``[E, I, H]``; views of the parameters where these are fused.
    down : torch.Tensor
        ``[E, H, I]``.

    Raises
    ------
    KTAMXModelNotSupportedError
        If the experts have biases, which have no gradient here, or no weights of these names.
    """
    experts = moe_module.experts
    if isinstance(experts, nn.ModuleList):
        for found in list_projections(experts).values():
            if getattr(found[0], "bias", None) is not None:
                raise KTAMXModelNotSupportedError("experts with biases cannot be trained")
        return ListWeights(experts).matrices()
    if getattr(experts, "has_bias", False):
        raise KTAMXModelNotSupportedError(
            f"{type(experts).__name__} has biases, and ktk trains experts without; run it for inference only"
        )
    if not hasattr(experts, "gate_up_proj") or not hasattr(experts, "down_proj"):
        raise KTAMXModelNotSupportedError(
            f"{type(experts).__name__} has no gate_up_proj and down_proj, or its weights are gone already"
        )
    return FusedWeights(experts, experts.is_concatenated, experts.is_transposed).matrices()


def load_experts_from_checkpoint_files(
    checkpoint_files: Sequence[str | os.PathLike[str]],
    sharded_metadata: Mapping[str, Any] | None = None,
    layers_prefix: str | None = None,
    moe_config: MOEArchConfig | None = None,
    layer_idx: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the experts of one layer from the files of a checkpoint.

    Parameters
    ----------
    checkpoint_files : sequence of path
        One file, or files of one folder.
    sharded_metadata, layers_prefix, moe_config
        Not needed, names and shapes come from the files; taken for compatibility.
    layer_idx : int, default 0

    Returns
    -------
    gate, up : torch.Tensor
        bfloat16 ``[E, I, H]``.
    down : torch.Tensor
        bfloat16 ``[E, H, I]``.

    Raises
    ------
    KtkArgumentError
        If the files are of several folders, or hold no experts of the layer.
    KtkUnsupportedError
        If the experts are quantised in another form than fp8 with blocks of 128 by 128.
    """
    paths = [Path(file) for file in checkpoint_files]
    folders = {path.parent for path in paths}
    if len(folders) != 1:
        raise KtkArgumentError(f"checkpoint_files must be of one folder, got {sorted(map(str, folders))}")
    with Checkpoint(paths[0] if len(paths) == 1 else folders.pop()) as checkpoint:
        layer = checkpoint.layer(layer_idx)
        experts = [expert.dequantised() for expert in layer.experts()]
    gate, up, down = (
        torch.stack([getattr(expert, part).to(torch.bfloat16) for expert in experts])
        for part in ("gate", "up", "down")
    )
    return gate, up, down


@dataclass(frozen=True)
class INT8ExpertWeights:
    """Experts of a layer that are quantised already, in a packed file or as kt-kernel quantised them.

    Parameters
    ----------
    path : pathlib.Path
        The packed file, or the folder of kt-kernel's weights.
    layer_idx : int
    format : str
    group_size : int, optional
        Of kt-kernel's weights: what a layer, not rotated, should have to hold them as they are. None for a
        packed file.
    """

    path: Path
    layer_idx: int
    format: str = "int8"
    group_size: int | None = None

    def load_into(self, experts: Experts) -> None:
        """Load them; `experts` must have the layer's shapes and, for a packed file, its format."""
        if self.group_size is None:
            experts.load_packed(self.path)
        else:
            experts.load_checkpoint(self.path)


def load_experts_from_kt_weight_path(
    kt_weight_path: str | os.PathLike[str], layer_idx: int, weight_format: str = "int8"
) -> INT8ExpertWeights:
    """Find the quantised experts of one layer, as ``ktk run --packed`` or kt-kernel's converter writes them.

    Parameters
    ----------
    kt_weight_path : path
        A packed file, a folder of them, or a folder of kt-kernel's weights (`ktk.weights.KTKernelWeights`).
    layer_idx : int
    weight_format : str, default "int8"

    Raises
    ------
    FileNotFoundError
        If there is nothing at `kt_weight_path`.
    KtkArgumentError
        If the layer is not there in this format, or is incomplete.
    """
    path = Path(kt_weight_path)
    if not path.exists():
        raise FileNotFoundError(f"kt_weight_path {path} does not exist")
    packed = find_packed(path, weight_format, layer_idx)
    if packed is not None:
        return INT8ExpertWeights(Path(packed), layer_idx, weight_format)
    stored = stored_group_size(path, layer_idx, weight_format)
    if stored is None:
        raise KtkArgumentError(
            f"{path} has no packed {weight_format} experts of layer {layer_idx}; leave kt_weight_path out "
            "to pack the checkpoint"
        )
    return INT8ExpertWeights(path, layer_idx, weight_format, stored)
