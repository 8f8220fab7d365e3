"""Where the adapters of a layer live, and how they become the six tensors of the native backend.

Each source makes the tensors by ordinary differentiable operations, so that gradients find their way back to
whatever the parameters are: ktk's own, PEFT's on fused experts, or PEFT's on each expert.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktk.sft.errors import KTAMXConfigError
from ktk.sft.native import LORA_NAMES, lora_shapes

__all__ = ["FusedLoRA", "LoRASource", "ParameterLoRA", "PerExpertLoRA", "interleave_rows", "split_rows"]


@dataclass(frozen=True)
class Sizes:
    """E, H and I of a layer."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


class LoRASource(abc.ABC):
    """The adapters of a layer.

    Attributes
    ----------
    rank : int
    alpha, dropout : float
    """

    rank: int
    alpha: float
    dropout: float

    @abc.abstractmethod
    def tensors(self) -> dict[str, torch.Tensor] | None:
        """The six tensors, where the parameters are; None while the adapters are switched off."""

    @abc.abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by a name that is unique within the layer."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy six tensors into the parameters."""
        raise KTAMXConfigError(
            f"{type(self).__name__} cannot take fused adapter tensors; load the adapter with PEFT"
        )


def split_rows(fused: torch.Tensor, concatenated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of gate and of up in a fused ``[E, 2I, ...]``; they follow each other, or alternate."""
    if concatenated:
        gate, up = fused.chunk(2, dim=1)
        return gate, up
    return fused[:, 0::2], fused[:, 1::2]


def interleave_rows(gate: torch.Tensor, up: torch.Tensor, concatenated: bool) -> torch.Tensor:
    """The inverse of `split_rows`."""
    return torch.cat([gate, up], 1) if concatenated else torch.stack([gate, up], 2).flatten(1, 2)


class FusedLoRA(LoRASource):
    """ktk's own adapters: six parameters of the experts module, named ``gate_lora_a.default`` and so on.

    A is drawn as `torch.nn.Linear` draws its weight, B is zero.

    Parameters
    ----------
    module : torch.nn.Module
        Gets the parameters, in six `torch.nn.ParameterDict` keyed by adapter name: the names that PEFT saves.
    sizes : Sizes
    rank : int
    alpha, dropout : float
    dtype : torch.dtype, default torch.float32
    adapter_name : str, default "default"
    """

    def __init__(
        self,
        module: nn.Module,
        sizes: Sizes,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:
        self.rank, self.alpha, self.dropout, self.adapter_name = rank, alpha, dropout, adapter_name
        self._module = module
        shapes = lora_shapes(sizes.num_experts, sizes.hidden_size, sizes.intermediate_size, rank)
        for name, shape in shapes.items():
            value = torch.zeros(shape, dtype=dtype)
            if name.endswith("_a"):
                for expert in value:
                    nn.init.kaiming_uniform_(expert, a=5**0.5)
            module.add_module(name, nn.ParameterDict({adapter_name: nn.Parameter(value)}))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self._module, name)[self.adapter_name] for name in LORA_NAMES}

    def tensors(self) -> dict[str, torch.Tensor] | None:
        if getattr(self._module, "disable_adapters", False):
            return None
        return {name: _usable(tensor) for name, tensor in self.parameters().items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(tensors[name])


class ParameterLoRA(LoRASource):
    """PEFT's adapters on fused experts (``target_parameters``): one `ParamWrapper` a parameter.

    gate and up share one A, and B has the rows of both. A parameter that is not adapted counts as an
    adapter of zeros.

    Parameters
    ----------
    wrappers : mapping
        The `ParamWrapper` of ``gate_up_proj`` and of ``down_proj``; one may be missing.
    sizes : Sizes
    concatenated : bool
        Whether rows of gate and up follow each other, or alternate.
    """

    def __init__(self, wrappers: Mapping[str, Any], sizes: Sizes, concatenated: bool) -> None:
        self._wrappers, self._sizes, self._concatenated = dict(wrappers), sizes, concatenated
        self._adapter = _one_adapter(list(wrappers.values()))
        self.rank = max(int(wrapper.r[self._adapter]) for wrapper in wrappers.values())
        self._scale = max(float(wrapper.scaling[self._adapter]) for wrapper in wrappers.values())
        self.alpha, self.dropout = self._scale * self.rank, 0.0
        # PyTorch allots a parameter's memory anew when it is moved; absent ones are made when first asked
        # for.
        self._zeros: dict[str, torch.Tensor] = {}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{part}": getattr(wrapper, part)[self._adapter].weight
            for name, wrapper in self._wrappers.items()
            for part in ("lora_A", "lora_B")
        }

    def tensors(self) -> dict[str, torch.Tensor] | None:
        wrappers = list(self._wrappers.values())
        if any(wrapper.merged for wrapper in wrappers):
            raise KTAMXConfigError(
                "PEFT has merged these adapters into placeholders; unmerge them, the weights are in ktk"
            )
        if any(wrapper.disable_adapters or not wrapper.active_adapters for wrapper in wrappers):
            return None
        if _one_adapter(wrappers) != self._adapter:
            raise KTAMXConfigError(
                f"the active adapter changed from {self._adapter!r} to {_one_adapter(wrappers)!r}; call "
                "kt_adapt_peft_lora(model) again"
            )
        found: dict[str, torch.Tensor] = {}
        if (wrapper := self._wrappers.get("gate_up_proj")) is not None:
            a, b = self._factors(wrapper)
            gate_b, up_b = split_rows(b, self._concatenated)
            found |= {"gate_lora_a": a, "up_lora_a": a, "gate_lora_b": gate_b, "up_lora_b": up_b}
        if (wrapper := self._wrappers.get("down_proj")) is not None:
            found["down_lora_a"], found["down_lora_b"] = self._factors(wrapper)
        dtype = next(iter(found.values())).dtype
        return {
            name: _usable(found[name]) if name in found else self._zero(name, dtype) for name in LORA_NAMES
        }

    def _factors(self, wrapper: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[E, r, in]`` and B ``[E, out, r]``, in the common rank and scale."""
        weight_a = wrapper.lora_A[self._adapter].weight
        weight_b = wrapper.lora_B[self._adapter].weight
        experts = self._sizes.num_experts
        a = weight_a.reshape(experts, -1, weight_a.shape[-1])
        b = weight_b.reshape(weight_b.shape[0], -1, experts).permute(2, 0, 1)
        scale = float(wrapper.scaling[self._adapter])
        if scale != self._scale:
            b = b * (scale / self._scale)
        missing = self.rank - a.shape[1]
        if missing:
            a = nn.functional.pad(a, (0, 0, 0, missing))
            b = nn.functional.pad(b, (0, missing))
        return a, b

    def _zero(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        found = self._zeros.get(name)
        if found is None or found.dtype != dtype:
            sizes = self._sizes
            shapes = lora_shapes(sizes.num_experts, sizes.hidden_size, sizes.intermediate_size, self.rank)
            found = self._zeros[name] = torch.zeros(shapes[name], dtype=dtype)
        return found


class PerExpertLoRA(LoRASource):
    """PEFT's adapters on the linear layers of each expert of a `torch.nn.ModuleList`.

    Parameters
    ----------
    layers : mapping
        For gate, up and down, PEFT's layer of each expert. All experts must be adapted alike.
    """

    def __init__(self, layers: Mapping[str, Sequence[Any]]) -> None:
        self._layers = {name: list(found) for name, found in layers.items()}
        everything = [layer for found in self._layers.values() for layer in found]
        self._adapter = _one_adapter(everything)
        settings = {
            (int(layer.r[self._adapter]), float(layer.scaling[self._adapter]), _dropout(layer, self._adapter))
            for layer in everything
        }
        if len(settings) != 1:
            raise KTAMXConfigError(
                f"all experts of a layer need the same rank, scale and dropout, got {sorted(settings)}"
            )
        self.rank, scale, self.dropout = settings.pop()
        self.alpha = scale * self.rank

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{expert}.{name}.{part}": getattr(layer, part)[self._adapter].weight
            for name, found in self._layers.items()
            for expert, layer in enumerate(found)
            for part in ("lora_A", "lora_B")
        }

    def tensors(self) -> dict[str, torch.Tensor] | None:
        first = self._layers["gate"][0]
        if first.merged:
            raise KTAMXConfigError(
                "PEFT has merged these adapters into placeholders; unmerge them, the weights are in ktk"
            )
        if first.disable_adapters or not first.active_adapters:
            return None
        return {
            f"{name}_lora_{part[-1].lower()}": _usable(
                torch.stack([getattr(layer, part)[self._adapter].weight for layer in self._layers[name]])
            )
            for name in ("gate", "up", "down")
            for part in ("lora_A", "lora_B")
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, found in self._layers.items():
                for expert, layer in enumerate(found):
                    layer.lora_A[self._adapter].weight.copy_(tensors[f"{name}_lora_a"][expert])
                    layer.lora_B[self._adapter].weight.copy_(tensors[f"{name}_lora_b"][expert])


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in (torch.bfloat16, torch.float32):
        raise KTAMXConfigError(f"adapters of experts must be bfloat16 or float32, got {tensor.dtype}")
    return tensor


def _one_adapter(layers: Sequence[Any]) -> str:
    names = {tuple(layer.active_adapters) for layer in layers}
    if len(names) != 1 or len(next(iter(names))) != 1:
        raise KTAMXConfigError(
            f"the experts of a layer run with one adapter at a time, active are {sorted(names)}; use "
            f"set_adapter"
        )
    return str(next(iter(names))[0])


def _dropout(layer: Any, adapter: str) -> float:
    return float(getattr(layer.lora_dropout[adapter], "p", 0.0))
