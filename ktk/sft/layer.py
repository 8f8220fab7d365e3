"""The modules that stand in a model: its experts, run by ktk, and the block around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ktk.errors import KtkUnsupportedError
from ktk.sft.arch import MOEArchConfig
from ktk.sft.autograd import Runner, run_experts
from ktk.sft.base import BaseSFTMoEWrapper
from ktk.sft.errors import KTAMXConfigError, KTAMXModelNotSupportedError
from ktk.sft.lora_sources import FusedLoRA, LoRASource, Sizes
from ktk.sft.weights import FusedWeights, ListWeights

__all__ = ["ExpertsCore", "KTExpertList", "KTExperts", "KTMoELayerWrapper"]

_FUSED_NAMES = ("gate_up_proj", "down_proj")


class _TrainedWeights(Protocol):
    def parameters(self) -> tuple[torch.Tensor, ...]: ...
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def gradients(self, base: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]: ...


class ExpertsCore:
    """What runs the experts of a layer, whichever module they are in.

    Parameters
    ----------
    runner : Runner
        The layer's wrapper, or what reaches it on another rank.
    wrapper : BaseSFTMoEWrapper or None
        None on ranks that do not hold the experts.
    sizes : Sizes
    layer_idx : int
    policy : {"save", "recompute"}
    """

    def __init__(
        self,
        runner: Runner,
        wrapper: BaseSFTMoEWrapper | None,
        sizes: Sizes,
        layer_idx: int,
        policy: Literal["save", "recompute"] = "save",
    ) -> None:
        self.runner, self.wrapper, self.sizes, self.layer_idx = runner, wrapper, sizes, layer_idx
        self.policy = policy
        self.lora: LoRASource | None = None
        self.base: _TrainedWeights | None = None
        self._base_state: tuple[Any, ...] = ()

    def adopt(self, lora: LoRASource | None) -> None:
        """Use these adapters from now on."""
        self.lora = lora
        if lora is not None and self.wrapper is not None:
            self.wrapper.configure_lora(lora.rank, lora.alpha, lora.dropout)

    def train_base(self, base: _TrainedWeights) -> None:
        """Train the weights, which are these parameters; they are packed already."""
        self.base = base
        self._base_state = self._state()

    def _state(self) -> tuple[Any, ...]:
        assert self.base is not None
        return tuple((tensor.data_ptr(), tensor._version) for tensor in self.base.parameters())

    def pack_base(self, force: bool = False) -> None:
        """Pack the weights again if an optimizer has changed the parameters since."""
        if self.base is None or self.wrapper is None:
            return
        state = self._state()
        if force or state != self._base_state:
            self.wrapper.update_base_weights(*self.base.matrices())
            self._base_state = state

    def run(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, training: bool
    ) -> torch.Tensor:
        """Experts' output for hidden states ``[..., H]``, ids and weights ``[..., k]``; like hidden
        states."""
        self.pack_base()
        lora = None if self.lora is None else self.lora.tensors()
        dropout = training and self.lora is not None and self.lora.dropout > 0.0
        flat = hidden.reshape(-1, hidden.shape[-1])
        output: torch.Tensor = run_experts(
            self.runner,
            flat,
            ids.reshape(-1, ids.shape[-1]),
            weights.reshape(-1, weights.shape[-1]),
            lora=lora,
            base=self.base,
            policy=self.policy,
            dropout_seed=_draw_seed if dropout else None,
        )
        return output.reshape(hidden.shape)


def _draw_seed() -> int:
    # From PyTorch's generator, whose state gradient checkpointing restores before it computes again.
    return int(torch.randint(2**62, (1,)).item())


def _placeholder(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of this shape that occupies one element: for PEFT to see sizes and dtype."""
    return nn.Parameter(torch.zeros(1, dtype=dtype).expand(shape), requires_grad=False)


class _HoldsPlaceholders(nn.Module):
    """Keeps parameters that stand for packed weights out of moves, casts and saved states."""

    core: ExpertsCore

    def _placeholders(self) -> list[tuple[nn.Module, str]]:
        """Modules and names of the placeholders that are registered."""
        raise NotImplementedError

    def drop_placeholders(self) -> None:
        """Unregister them: nobody has to count, broadcast or shard them. They remain as plain attributes."""
        for module, name in self._placeholders():
            tensor = module._parameters.pop(name)
            module.__dict__[name] = tensor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        held = [(module, name, module._parameters.pop(name)) for module, name in self._placeholders()]
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for module, name, tensor in held:
                assert tensor is not None
                dtype = fn(torch.zeros(1, dtype=tensor.dtype)).dtype
                module._parameters[name] = _placeholder(tensor.shape, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise KtkUnsupportedError("experts in ktk cannot be copied; load the model again")


class KTExperts(_HoldsPlaceholders):
    """Fused experts, called as ``experts(hidden_states, expert_ids, expert_weights)``.

    In place of the weights there are placeholders of their names and shapes until `drop_placeholders`, so
    that PEFT's ``target_parameters`` finds them; or, where the weights are trained, the model's own
    parameters.

    Parameters
    ----------
    core : ExpertsCore
    original : torch.nn.Module
        The model's experts.
    train_weights : bool, default False
        Whether the weights stay parameters.
    """

    def __init__(self, core: ExpertsCore, original: Any, train_weights: bool = False) -> None:
        super().__init__()
        self.core = core
        self.is_transposed = bool(original.is_transposed)
        self.concatenated = bool(getattr(original, "is_concatenated", True))
        self.num_experts = core.sizes.num_experts
        self.train(original.training)
        self._full = train_weights
        for name, shape in self._shapes().items():
            parameter = original._parameters.get(name)
            if train_weights:
                assert parameter is not None
                self.register_parameter(name, parameter.requires_grad_(True))
            else:
                dtype = _dtype_of(original)
                self.register_parameter(name, _placeholder(torch.Size(shape), dtype))
        if train_weights:
            core.train_base(FusedWeights(self, self.concatenated, self.is_transposed))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        sizes = self.core.sizes
        e, h, i = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
        if self.is_transposed:
            return {"gate_up_proj": (e, h, 2 * i), "down_proj": (e, i, h)}
        return {"gate_up_proj": (e, 2 * i, h), "down_proj": (e, h, i)}

    def _placeholders(self) -> list[tuple[nn.Module, str]]:
        return [] if self._full else [(self, name) for name in _FUSED_NAMES if name in self._parameters]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for _, name in self._placeholders():
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        for _, name in self._placeholders():
            if prefix + name in missing:
                missing.remove(prefix + name)

    def add_fused_lora(
        self, rank: int, alpha: float, dropout: float, dtype: torch.dtype, adapter_name: str = "default"
    ) -> None:
        """Add adapters of ktk's own."""
        self.core.adopt(FusedLoRA(self, self.core.sizes, rank, alpha, dropout, dtype, adapter_name))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts: hidden ``[T, H]``, ids and weights ``[T, k]``; returns ``[T, H]``."""
        if "parametrizations" in self._modules:
            raise KTAMXConfigError(
                "PEFT adapts these experts by itself, which would add to weights that are not there; call "
                "ktk.sft.kt_adapt_peft_lora(model) after get_peft_model"
            )
        return self.core.run(hidden_states, top_k_index, top_k_weights, self.training)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        sizes = self.core.sizes
        return (
            f"{sizes.num_experts} experts, hidden {sizes.hidden_size}, intermediate {sizes.intermediate_size}"
        )


def _dtype_of(module: nn.Module) -> torch.dtype:
    found = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return found or getattr(getattr(module, "config", None), "dtype", None) or torch.get_default_dtype()


class KTExpertList(_HoldsPlaceholders, nn.ModuleList):
    """A list of experts whose linear layers keep their names and shapes, and none of their weights.

    PEFT finds the linear layers and adapts each expert by itself.
    """

    def __init__(self, core: ExpertsCore, original: nn.ModuleList, train_weights: bool = False) -> None:
        super().__init__(list(original))
        self.core = core
        self._full = train_weights
        if train_weights:
            core.train_base(ListWeights(self))
            return
        for layer in self._linears():
            weight = layer._parameters["weight"]
            layer._parameters["weight"] = _placeholder(weight.shape, weight.dtype)

    def _linears(self) -> list[Any]:
        found = []
        for expert in self:
            for name in ("gate_proj", "up_proj", "down_proj", "w1", "w3", "w2"):
                layer = expert._modules.get(name)
                if layer is not None:
                    found.append(getattr(layer, "base_layer", layer))
        return found

    def _placeholders(self) -> list[tuple[nn.Module, str]]:
        if self._full:
            return []
        return [(layer, "weight") for layer in self._linears() if "weight" in layer._parameters]


class KTMoELayerWrapper(nn.Module):
    """The block of router, experts and shared experts, its experts run by ktk.

    It has the submodules and parameters of the block that it replaces, under their names and in their
    order, and calls that block's own forward: its router, and whatever else it does, is the model's. Only a
    block whose experts are a `torch.nn.ModuleList` is run here: its own router, then the experts, then its
    shared experts.

    Parameters
    ----------
    original_moe : torch.nn.Module
        The block. Its `experts` are replaced.
    wrapper : BaseSFTMoEWrapper or None
        The experts, packed; None on a rank that does not hold them.
    lora_params : mapping, optional
        Six tensors to start ktk's own adapters from. Default: no adapters yet.
    moe_config : MOEArchConfig, optional
        Sizes, where there is no wrapper.
    hidden_size : int, optional
        H; default: the wrapper's.
    layer_idx : int, default 0
    lora_experts : torch.nn.Module, optional
        Added to the output: `ktk.sft.LoRAExperts`.
    full_weight_grad : bool, default False
        Train the weights.
    runner : Runner, optional
        Default: the wrapper.
    policy : {"save", "recompute"}, default "save"

    Raises
    ------
    KTAMXModelNotSupportedError
        If the router of a block with a list of experts is not a module that returns ids and weights.
    """

    def __init__(
        self,
        original_moe: Any,
        wrapper: BaseSFTMoEWrapper | None,
        lora_params: Mapping[str, torch.Tensor] | None = None,
        moe_config: MOEArchConfig | None = None,
        hidden_size: int | None = None,
        layer_idx: int = 0,
        lora_experts: nn.Module | None = None,
        full_weight_grad: bool = False,
        *,
        runner: Runner | None = None,
        policy: Literal["save", "recompute"] = "save",
    ) -> None:
        super().__init__()
        sizes = _sizes(wrapper, moe_config)
        if runner is None and wrapper is None:
            raise KTAMXConfigError("a rank without experts needs a runner that reaches them")
        core = ExpertsCore(runner or wrapper, wrapper, sizes, layer_idx, policy)  # type: ignore[arg-type]
        experts = original_moe.experts
        self._as_list = isinstance(experts, nn.ModuleList)
        new: Any = (KTExpertList if self._as_list else KTExperts)(core, experts, full_weight_grad)
        if self._as_list:
            _check_router(original_moe)
        # One set of submodules under two names: what is replaced in this module (by PEFT, say) is replaced
        # for the forward of the original block too. Past nn.Module's bookkeeping, or it would be a child.
        self.__dict__["_block"] = original_moe
        for store in ("_modules", "_parameters", "_buffers"):
            self.__dict__[store] = original_moe.__dict__[store]
        self.experts = new
        if lora_experts is not None:
            self.lora_experts = lora_experts
        self.core, self.layer_idx, self.hidden_size = core, layer_idx, hidden_size or sizes.hidden_size
        self.training = original_moe.training
        if lora_params is not None:
            rank = lora_params["gate_lora_a"].shape[1]
            alpha = wrapper.lora_alpha if wrapper is not None else 2.0 * rank
            new.add_fused_lora(rank, alpha, 0.0, lora_params["gate_lora_a"].dtype)
            core.lora.load(lora_params)  # type: ignore[union-attr]

    @property
    def wrapper(self) -> BaseSFTMoEWrapper | None:
        """The experts; None on a rank that does not hold them."""
        return self.core.wrapper

    @property
    def inner_experts(self) -> Any:
        """The `KTExperts` or `KTExpertList`, inside of what PEFT may have put around it."""
        experts: Any = self.experts
        while not isinstance(experts, (KTExperts, KTExpertList)):
            experts = experts.base_layer
        return experts

    def train(self, mode: bool = True) -> KTMoELayerWrapper:
        """Set training mode, of the original block too."""
        super().train(mode)
        self.__dict__["_block"].training = mode
        return self

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block; arguments and result are those of the block that was replaced."""
        if self._as_list:
            result: Any = self._run_list(hidden_states)
        else:
            result = self.__dict__["_block"].forward(hidden_states, *args, **kwargs)
        extra = self._modules.get("lora_experts")
        if extra is None:
            return result
        if isinstance(result, tuple):
            return (result[0] + extra(hidden_states).reshape(result[0].shape), *result[1:])
        return result + extra(hidden_states).reshape(result.shape)

    def _run_list(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate: Any = self.gate
        ids, weights = _routing(gate(hidden_states))
        output = self.core.run(hidden_states, ids, weights, self.training)
        for name in ("shared_experts", "shared_expert"):
            shared = self._modules.get(name)
            if shared is not None:
                value = shared(hidden_states)
                scale = self._modules.get("shared_expert_gate")
                output = output + (value if scale is None else torch.sigmoid(scale(hidden_states)) * value)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Refuse: packed weights cannot be copied."""
        raise KtkUnsupportedError("experts in ktk cannot be copied; load the model again")


def _sizes(wrapper: BaseSFTMoEWrapper | None, config: MOEArchConfig | None) -> Sizes:
    if wrapper is not None:
        return Sizes(wrapper.num_experts, wrapper.hidden_size, wrapper.moe_intermediate_size)
    if config is None:
        raise KTAMXConfigError("a rank without experts needs moe_config to know their sizes")
    return Sizes(config.expert_num, config.hidden_size, config.intermediate_size)


def _check_router(block: Any) -> None:
    gate = block._modules.get("gate")
    if gate is None or isinstance(gate, nn.Linear):
        raise KTAMXModelNotSupportedError(
            f"{type(block).__name__} has a list of experts, and a router that only gives scores: how "
            f"experts are "
            "chosen is in the block's own forward. Use the model of transformers 5, whose experts are one "
            "module"
        )


def _routing(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights among what a router returns: the only integer tensor, and the last float one like
    it."""
    tensors = [tensor for tensor in result if isinstance(tensor, torch.Tensor)]
    ids = [tensor for tensor in tensors if not tensor.is_floating_point()]
    weights = [t for t in tensors if t.is_floating_point() and ids and t.shape == ids[0].shape]
    if len(ids) != 1 or not weights:
        raise KTAMXModelNotSupportedError("the router returns no ids with weights of the same shape")
    return ids[0], weights[-1]
