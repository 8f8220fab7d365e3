"""The experts of one layer as functions: forward and backward of tensors on any device.

`FunctionalExperts` checks, moves tensors between devices and hands out what a forward saved; what computes is
up to the subclass, which makes the two tasks.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ktk.config import checked_int
from ktk.errors import KtkArgumentError
from ktk.runtime import CPUInfer
from ktk.sft.buffers import KExpertsSFTBuffer
from ktk.sft.native import Policy
from ktk.sft.saved import Gradients, SavedForward

__all__ = ["FunctionalExperts"]


class FunctionalExperts(abc.ABC):
    """`run` and `run_backward` of the experts of one layer: the form that autograd uses.

    Any number of forwards may wait for their backward, in any order. Parameters are those of
    `BaseSFTMoEWrapper`.
    """

    def __init__(
        self,
        *,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        method: str,
        cpu_infer: CPUInfer,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        chunked_prefill_size: int = 8192,
    ) -> None:
        self.layer_idx = layer_idx
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.method = method
        self.cpu_infer = cpu_infer
        self.lora_rank = checked_int("lora_rank", lora_rank, 0, 256)
        self.lora_alpha = float(lora_alpha)
        self.lora_dropout = float(lora_dropout)
        self.chunked_prefill_size = checked_int("chunked_prefill_size", chunked_prefill_size, 1)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise KtkArgumentError(f"lora_dropout must be at least 0 and less than 1, got {lora_dropout}")

    # ---- what a subclass makes -------------------------------------------------------------------------

    @abc.abstractmethod
    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Load the weights from where the layer was told they are."""

    @abc.abstractmethod
    def set_lora(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Use these six adapter tensors, in place, from now on."""

    @abc.abstractmethod
    def update_base_weights(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        """Replace the weights of all experts: gate and up ``[E, I, H]``, down ``[E, H, I]``."""

    @abc.abstractmethod
    def configure_lora(self, rank: int, alpha: float, dropout: float = 0.0) -> None:
        """Change rank, alpha and dropout of the adapters; the weights stay as they are."""

    @abc.abstractmethod
    def _make_forward_task(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        policy: Policy,
        with_lora: bool,
        dropout_seed: int | None,
    ) -> Callable[[], tuple[torch.Tensor, Any]]:
        """What computes the forward of CPU tensors: returns the output and the native context or None."""

    @abc.abstractmethod
    def _make_backward_task(
        self,
        context: Any,
        grad_output: torch.Tensor,
        grad_lora: Mapping[str, torch.Tensor] | None,
        grad_base: Mapping[str, torch.Tensor] | None,
        accumulate: bool,
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """What computes the backward of a context: returns gradients of hidden states and weights."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the weights and every saved forward."""

    @property
    def trains_lora(self) -> bool:
        """Whether adapters take part in forward and backward."""
        return True

    # ---- forward and backward --------------------------------------------------------------------------

    def run(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        *,
        policy: Policy = "none",
        lora: Mapping[str, torch.Tensor] | None = None,
        dropout_seed: int | None = None,
    ) -> tuple[torch.Tensor, SavedForward | None]:
        """Run the experts forward.

        Parameters
        ----------
        hidden_states : torch.Tensor
            ``[T, H]``, bfloat16, float32 or float16 (computed in float32), on any device. T may be 0.
        expert_ids : torch.Tensor
            Integer ``[T, k]``. Ids outside 0 .. E-1 contribute nothing.
        expert_weights : torch.Tensor
            Floating point ``[T, k]``.
        policy : {"none", "save", "recompute"}, default "none"
            What to keep for a backward.
        lora : mapping, optional
            The six adapter tensors, used in place. Default: run without adapters.
        dropout_seed : int, optional
            Default: no dropout.

        Returns
        -------
        output : torch.Tensor
            ``[T, H]``, like `hidden_states`.
        saved : SavedForward or None
            None with policy ``"none"``.

        Raises
        ------
        KtkArgumentError
            If a shape or dtype is wrong, or there are more tokens than `chunked_prefill_size`.
        """
        self.check_inputs(hidden_states, expert_ids, expert_weights)
        if lora is not None:
            self.set_lora(lora)
        device, dtype = hidden_states.device, hidden_states.dtype
        hidden, ids, weights = self._to_cpu(hidden_states, expert_ids, expert_weights, policy)
        task = self._make_forward_task(hidden, ids, weights, policy, lora is not None, dropout_seed)
        output, context = task()
        saved = None if context is None else SavedForward(context, device, dtype)
        return output.to(device=device, dtype=dtype), saved

    def run_backward(
        self,
        saved: SavedForward,
        grad_output: torch.Tensor,
        *,
        lora: Mapping[str, torch.Tensor] | None = None,
        want_lora: bool = False,
        base_dtype: torch.dtype | None = None,
    ) -> Gradients:
        """Run the experts backward.

        Parameters
        ----------
        saved : SavedForward
            Of `run`; used up.
        grad_output : torch.Tensor
            ``[T, H]``.
        lora : mapping, optional
            The adapter tensors of that forward; None if it had none.
        want_lora : bool, default False
            Whether to compute gradients of the adapters, in their dtype.
        base_dtype : torch.dtype, optional
            If given, compute gradients of the weights in this dtype, bfloat16 or float32.

        Returns
        -------
        Gradients

        Raises
        ------
        KtkStateError
            If `saved` was used before.
        KtkArgumentError
            If the gradient has the wrong shape, or holds NaN or infinity.
        """
        context = saved.take()
        if lora is not None:
            self.set_lora(lora)
        grad_lora = {}
        if want_lora and lora is not None:
            make = torch.empty_like if self.trains_lora else torch.zeros_like
            grad_lora = {name: make(tensor) for name, tensor in lora.items()}
        grad_base: dict[str, torch.Tensor] = {}
        if base_dtype is not None:
            e, i, h = self.num_experts, self.moe_intermediate_size, self.hidden_size
            shapes = {"gate": (e, i, h), "up": (e, i, h), "down": (e, h, i)}
            grad_base = {name: torch.empty(shape, dtype=base_dtype) for name, shape in shapes.items()}
        gradient = grad_output.detach().to(device="cpu", dtype=_compute_dtype(saved.dtype)).contiguous()
        try:
            grad_hidden, grad_weights = self._make_backward_task(
                context, gradient, (self.trains_lora and grad_lora) or None, grad_base or None, False
            )()
        finally:
            context.close()
        return Gradients(
            hidden_states=grad_hidden.to(device=saved.device, dtype=saved.dtype),
            expert_weights=grad_weights.to(saved.device),
            lora=grad_lora,
            base=grad_base,
        )

    def check_inputs(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> None:
        """Raise `KtkArgumentError` or `TypeError` if the layer cannot run these tensors."""
        named = {
            "hidden_states": hidden_states,
            "expert_ids": expert_ids,
            "expert_weights": expert_weights,
        }
        for name, tensor in named.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.hidden_size:
            raise KtkArgumentError(
                f"layer {self.layer_idx}: hidden_states must have the shape [tokens, {self.hidden_size}], "
                f"got {list(hidden_states.shape)}"
            )
        if hidden_states.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise KtkArgumentError(
                f"hidden_states must be bfloat16, float16 or float32, got {hidden_states.dtype}"
            )
        tokens = hidden_states.shape[0]
        if expert_ids.shape != expert_weights.shape or expert_ids.dim() != 2 or len(expert_ids) != tokens:
            raise KtkArgumentError(
                f"expert_ids and expert_weights must both have the shape [{tokens}, k], got "
                f"{list(expert_ids.shape)} and {list(expert_weights.shape)}"
            )
        if not 1 <= expert_ids.shape[1] <= self.num_experts_per_tok:
            raise KtkArgumentError(
                f"expert_ids must have 1 to {self.num_experts_per_tok} (num_experts_per_tok) columns, got "
                f"{expert_ids.shape[1]}"
            )
        if expert_ids.dtype not in (torch.int32, torch.int64):
            raise KtkArgumentError(f"expert_ids must be int32 or int64, got {expert_ids.dtype}")
        if not expert_weights.is_floating_point():
            raise KtkArgumentError(f"expert_weights must be floating point, got {expert_weights.dtype}")
        if tokens > self.chunked_prefill_size:
            raise KtkArgumentError(
                f"layer {self.layer_idx} got {tokens} tokens, and its limit is {self.chunked_prefill_size} "
                "(kt_model_max_length, or chunked_prefill_size of the wrapper); raise it, or make the "
                "batch smaller"
            )

    def _to_cpu(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, policy: Policy
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = _compute_dtype(hidden.dtype)
        hidden, ids, weights = hidden.detach(), ids.detach(), weights.detach()
        if hidden.device.type == "cpu":
            return (
                hidden.to(dtype).contiguous(),
                ids.to(torch.int64).contiguous(),
                weights.to(torch.float32).contiguous(),
            )
        staging = KExpertsSFTBuffer.get_buffer(len(hidden), self.hidden_size, ids.shape[1], dtype)
        staging.input.copy_(hidden, non_blocking=True)
        staging.expert_ids.copy_(ids, non_blocking=True)
        staging.weights.copy_(weights, non_blocking=True)
        torch.cuda.current_stream(hidden.device).synchronize()
        if policy == "recompute":
            # A context that computes again reads its inputs later, when the staging set holds another batch.
            return staging.input.clone(), staging.expert_ids.clone(), staging.weights.clone()
        return staging.input, staging.expert_ids, staging.weights


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype
