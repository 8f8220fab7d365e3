"""`KTMoEFunction`: the experts as one node of PyTorch's graph.

Gradients are outputs of the node, so `.grad`, accumulation, hooks and gradient checkpointing follow PyTorch's
rules. What a forward saves belongs to the node: it lives as long as a token tensor that the node saves in the
ordinary way. Checkpointing that drops saved tensors thereby frees the activations, and one that computes the
layer again brings a new token.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ktk.errors import KtkStateError
from ktk.sft.native import LORA_NAMES
from ktk.sft.saved import Gradients, SavedForward, named_lora

__all__ = ["BaseWeights", "KTMoEFunction", "Runner", "run_experts"]


class Runner(Protocol):
    """What computes a layer: a `BaseSFTMoEWrapper`, or one on another rank."""

    def run(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        *,
        policy: Literal["none", "save", "recompute"] = "none",
        lora: Mapping[str, torch.Tensor] | None = None,
        dropout_seed: int | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Forward, see `BaseSFTMoEWrapper.run`."""

    def run_backward(
        self,
        saved: Any,
        grad_output: torch.Tensor,
        *,
        lora: Mapping[str, torch.Tensor] | None = None,
        want_lora: bool = False,
        base_dtype: torch.dtype | None = None,
    ) -> Gradients:
        """Backward, see `BaseSFTMoEWrapper.run_backward`."""


class BaseWeights(Protocol):
    """The weights of a layer as parameters, and how gradients of gate, up and down become theirs."""

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """The parameters."""

    def gradients(self, base: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Gradients in the order of `parameters`."""


_tokens = itertools.count(1)
_saved_of_token: dict[int, Any] = {}


def _forget(key: int) -> None:
    saved = _saved_of_token.pop(key, None)
    if saved is not None:
        saved.close()


def _token(saved: SavedForward) -> torch.Tensor:
    """A tensor that stands for `saved`, which is freed with the tensor's memory."""
    key = next(_tokens)
    owner = np.array([key], dtype=np.int64)
    _saved_of_token[key] = saved
    weakref.finalize(owner, _forget, key)
    return torch.from_numpy(owner)


def _redeem(token: torch.Tensor) -> Any:
    saved = _saved_of_token.pop(int(token.item()), None)
    if saved is None:
        raise KtkStateError(
            "the saved activations of this forward were used already or freed; a forward of ktk's experts "
            "has "
            "one backward. Leave retain_graph out, and keep hooks that copy saved tensors away from these "
            "layers"
        )
    return saved


class KTMoEFunction(torch.autograd.Function):
    """Experts of one layer, with gradients for hidden states, routing weights, adapters and weights.

    ``apply(hidden_states, expert_ids, expert_weights, runner, policy, dropout_seed, num_lora, base,
    *tensors)``: hidden states ``[T, H]``, ids and weights ``[T, k]``; `tensors` are the six adapter
    tensors, if `num_lora` is 6, and then the parameters of `base`. Returns ``[T, H]``. Use `run_experts`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        runner: Runner,
        policy: Literal["save", "recompute"],
        dropout_seed: int | None,
        num_lora: int,
        base: BaseWeights | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """Run forward and save what `backward` needs."""
        # Here and not before: gradients leave this node on the adapters' own device then, and wait for no
        # thread of autograd but the one that runs this layer. FSDP reduces what is there when a layer ends.
        adapters = tuple(tensor.to("cpu").contiguous() for tensor in tensors[:num_lora])
        output, saved = runner.run(
            hidden_states,
            expert_ids,
            expert_weights,
            policy=policy,
            lora=named_lora(adapters) if adapters else None,
            dropout_seed=dropout_seed,
        )
        ctx.runner, ctx.num_lora, ctx.base = runner, num_lora, base
        ctx.weights_dtype = expert_weights.dtype
        ctx.devices = [tensor.device for tensor in tensors]
        ctx.base_dtype = tensors[num_lora].dtype if base is not None else None
        # With recompute, the context reads the input again: saving it lets autograd notice a change in place.
        inputs = (hidden_states,) if policy == "recompute" else ()
        ctx.save_for_backward(_token(saved), *adapters, *inputs)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        """Run backward."""
        token, *others = ctx.saved_tensors
        adapters = others[: ctx.num_lora]
        grads = ctx.runner.run_backward(
            _redeem(token),
            grad_output,
            lora=named_lora(adapters) if adapters else None,
            want_lora=any(ctx.needs_input_grad[8 : 8 + ctx.num_lora]),
            base_dtype=ctx.base_dtype if any(ctx.needs_input_grad[8 + ctx.num_lora :]) else None,
        )
        lora: tuple[Any, ...] = (None,) * ctx.num_lora
        if grads.lora:
            lora = tuple(
                grads.lora[name].to(device)
                for name, device in zip(LORA_NAMES, ctx.devices[: ctx.num_lora], strict=True)
            )
        base: tuple[Any, ...] = (None,) * (len(ctx.needs_input_grad) - 8 - ctx.num_lora)
        if grads.base:
            base = tuple(
                gradient.to(device)
                for gradient, device in zip(
                    ctx.base.gradients(grads.base), ctx.devices[ctx.num_lora :], strict=True
                )
            )
        return (
            grads.hidden_states,
            None,
            grads.expert_weights.to(ctx.weights_dtype),
            *(None,) * 5,
            *lora,
            *base,
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_experts(
    runner: Runner,
    hidden_states: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    *,
    lora: Mapping[str, torch.Tensor] | None = None,
    base: BaseWeights | None = None,
    policy: Literal["save", "recompute"] = "save",
    dropout_seed: Callable[[], int | None] | None = None,
) -> torch.Tensor:
    """Run the experts of a layer, as a node of the graph if anything needs a gradient.

    Parameters
    ----------
    runner : Runner
    hidden_states : torch.Tensor
        ``[T, H]``.
    expert_ids, expert_weights : torch.Tensor
        ``[T, k]``.
    lora : mapping, optional
        The six adapter tensors, on any device. They may be the result of other operations, as `torch.stack`.
    base : BaseWeights, optional
        The weights, where they are trained.
    policy : {"save", "recompute"}, default "save"
    dropout_seed : callable, optional
        Gives the seed of the adapters' dropout; asked once a forward. Default: no dropout.

    Returns
    -------
    torch.Tensor
        ``[T, H]``.
    """
    adapters = () if lora is None else tuple(lora[name] for name in LORA_NAMES)
    weights = () if base is None else base.parameters()
    seed = None if dropout_seed is None else dropout_seed()
    inputs = (hidden_states, expert_weights, *adapters, *weights)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        held = None if lora is None else {name: t.to("cpu").contiguous() for name, t in lora.items()}
        output, _ = runner.run(hidden_states, expert_ids, expert_weights, lora=held, dropout_seed=seed)
        return output
    result: torch.Tensor = KTMoEFunction.apply(  # type: ignore[no-untyped-call]
        hidden_states,
        expert_ids,
        expert_weights,
        runner,
        policy,
        seed,
        len(adapters),
        base,
        *adapters,
        *weights,
    )
    return result
