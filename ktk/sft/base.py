"""`BaseSFTMoEWrapper`: the experts of one layer, run forward and backward.

The base class checks, moves tensors between devices and keeps track of saved forwards; what computes is up to
the subclass, which makes the two tasks.
"""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ktk.config import checked_int
from ktk.errors import KtkArgumentError, KtkStateError
from ktk.runtime import CPUInfer
from ktk.sft.buffers import KExpertsSFTBuffer
from ktk.sft.native import BASE_NAMES, LORA_NAMES, Policy, lora_shapes

__all__ = [
    "BASE_NAMES",
    "LORA_NAMES",
    "BaseSFTMoEWrapper",
    "Gradients",
    "KExpertsSFTBuffer",
    "SavedForward",
    "lora_shapes",
]

_Result = TypeVar("_Result")


class SavedForward:
    """What a forward left for its backward: the native context and where its tensors came from.

    Usable once. Freed with the object, or with `close`.
    """

    def __init__(self, context: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.context = context
        self.device = device
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes of saved activations."""
        return 0 if self.context is None else int(self.context.nbytes)

    def take(self) -> Any:
        """The native context, for its only use."""
        context, self.context = self.context, None
        if context is None:
            raise KtkStateError(
                "the saved activations of this forward were used already or freed; a forward of ktk's "
                "experts "
                "has one backward. Run the forward again, or leave retain_graph out"
            )
        return context

    def close(self) -> None:
        """Free the activations now. Harmless when they are gone."""
        context, self.context = self.context, None
        if context is not None:
            context.close()


@dataclass
class Gradients:
    """Result of a backward.

    Parameters
    ----------
    hidden_states : torch.Tensor
        ``[T, H]`` in the dtype and on the device of the forward's input.
    expert_weights : torch.Tensor
        float32 ``[T, k]``.
    lora, base : dict
        By the names of `LORA_NAMES` and `BASE_NAMES`, on the CPU; empty where not asked for.
    """

    hidden_states: torch.Tensor
    expert_weights: torch.Tensor
    lora: dict[str, torch.Tensor] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)


class BaseSFTMoEWrapper(abc.ABC):
    """The experts of one layer for training.

    `run` and `run_backward` are the functional form that autograd uses: any number of forwards may wait for
    their backward, in any order. `forward` and `backward`, with their asynchronous halves, are for callers
    without autograd; they keep up to `max_cache_depth` forwards and take the latest first.

    Parameters
    ----------
    layer_idx, num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size : int
        Number of the layer, E, k, H and I.
    method : str
        A key of `ktk.sft.config.SFT_METHODS`.
    lora_rank : int, default 16
        r; 0 for no adapters.
    lora_alpha : float, default 32.0
        The adapters are scaled by ``lora_alpha / lora_rank``.
    lora_dropout : float, default 0.0
        As in PEFT: probability with which an element of an adapter's input is dropped.
    chunked_prefill_size : int, default 8192
        Most tokens in one forward.
    max_cache_depth : int, default 1
        Forwards of `forward` that may wait for `backward`.
    full_weight_grad : bool, default False
        Whether `backward` also writes gradients of the weights.
    cpu_infer : ktk.CPUInfer
        Threads, and the queue of the asynchronous halves.

    Raises
    ------
    KtkArgumentError
        If a number is out of range.
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
        max_cache_depth: int = 1,
        full_weight_grad: bool = False,
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
        self.max_cache_depth = checked_int("max_cache_depth", max_cache_depth, 1)
        self.full_weight_grad = full_weight_grad
        if not 0.0 <= self.lora_dropout < 1.0:
            raise KtkArgumentError(f"lora_dropout must be at least 0 and less than 1, got {lora_dropout}")
        self._saved: deque[SavedForward] = deque()
        self._pending: list[Any] = []
        self._lora: dict[str, torch.Tensor] = {}
        self._lora_grads: dict[str, torch.Tensor] = {}
        self._base_grads: dict[str, torch.Tensor] = {}

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

    # ---- functional form -------------------------------------------------------------------------------

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

    # ---- for callers without autograd ------------------------------------------------------------------

    @property
    def cached_forwards(self) -> int:
        """Forwards of `forward` that wait for their `backward`."""
        return len(self._saved)

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> torch.Tensor:
        """Run forward, and keep what `backward` needs unless `save_for_backward` is False; see `run`.

        Raises
        ------
        KtkStateError
            If `max_cache_depth` forwards wait for their backward already; `discard_saved` drops them.
        """
        if save_for_backward and len(self._saved) >= self.max_cache_depth:
            raise KtkStateError(
                f"layer {self.layer_idx} holds {len(self._saved)} forwards without backward, as many as "
                "max_cache_depth allows; call backward or discard_saved, or raise max_cache_depth"
            )
        policy: Policy = "save" if save_for_backward else "none"
        output, saved = self.run(hidden_states, expert_ids, weights, policy=policy, lora=self._lora or None)
        if saved is not None:
            self._saved.append(saved)
        return output

    def backward(
        self, grad_output: torch.Tensor, optimizer_grad_scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the latest saved forward backward.

        Gradients of the adapters and weights go to the tensors of `init_lora_weights` and
        `init_full_weight_grad_buffers`: they are written, or added to what is there if `.grad` of the
        parameters already is these tensors.

        Parameters
        ----------
        grad_output : torch.Tensor
            ``[T, H]``.
        optimizer_grad_scale : float, default 1.0
            Factor of the gradients of adapters and weights.

        Returns
        -------
        grad_hidden : torch.Tensor
            ``[T, H]``, like the forward's input.
        grad_weights : torch.Tensor
            float32 ``[T, k]``.

        Raises
        ------
        KtkStateError
            If there is no saved forward, or a parameter's `.grad` is some other tensor.
        """
        if not self._saved:
            raise KtkStateError(
                f"layer {self.layer_idx} has no saved forward; call forward with save_for_backward"
            )
        base_dtype = next(iter(self._base_grads.values())).dtype if self._base_grads else None
        accumulate = self._gradients_published()
        gradients = self.run_backward(
            self._saved.pop(),
            grad_output,
            lora=self._lora or None,
            want_lora=bool(self._lora_grads),
            base_dtype=base_dtype,
        )
        targets = {**self._lora_grads, **self._base_grads}
        for name, gradient in {**gradients.lora, **gradients.base}.items():
            if optimizer_grad_scale != 1.0:
                gradient.mul_(optimizer_grad_scale)
            if accumulate:
                targets[name].add_(gradient)
            else:
                targets[name].copy_(gradient)
        self._publish_gradients()
        return gradients.hidden_states, gradients.expert_weights

    def _gradients_published(self) -> bool:
        grads = [
            (tensor.grad, self._lora_grads[name])
            for name, tensor in self._lora.items()
            if name in self._lora_grads and isinstance(tensor, torch.nn.Parameter)
        ]
        states = {None if grad is None else grad is target for grad, target in grads}
        if states - {None, True} or len(states) > 1:
            raise KtkStateError(
                f"some adapter parameters of layer {self.layer_idx} have a .grad that is not the tensor "
                f"given to "
                "init_lora_weights; set all of them to None before backward"
            )
        return states == {True}

    def _publish_gradients(self) -> None:
        for name, tensor in self._lora.items():
            if name in self._lora_grads and isinstance(tensor, torch.nn.Parameter):
                tensor.grad = self._lora_grads[name]

    def release_authoritative_optimizer_grads(self) -> None:
        """Take `.grad` from the adapter parameters, so that the next `backward` starts anew."""
        for tensor in self._lora.values():
            if isinstance(tensor, torch.nn.Parameter):
                tensor.grad = None

    def discard_saved(self) -> None:
        """Drop every forward that waits for its backward."""
        while self._saved:
            self._saved.pop().close()

    def init_lora_weights(self, *tensors: torch.Tensor) -> None:
        """Set the six adapter tensors and, after them, the six tensors for their gradients.

        Parameters
        ----------
        *tensors : torch.Tensor
            Six or twelve, in the order of `LORA_NAMES`; used in place, kept alive.

        Raises
        ------
        KtkArgumentError
            If there are not six or twelve, or one has the wrong shape, dtype or layout.
        """
        if len(tensors) not in (6, 12):
            raise KtkArgumentError(
                f"init_lora_weights takes six adapter tensors ({', '.join(LORA_NAMES)}) and, after them, "
                f"as many "
                f"for gradients; got {len(tensors)}"
            )
        weights = dict(zip(LORA_NAMES, tensors[:6], strict=True))
        grads = dict(zip(LORA_NAMES, tensors[6:], strict=False))
        for name, grad in grads.items():
            if grad.shape != weights[name].shape or grad.dtype != weights[name].dtype:
                raise KtkArgumentError(
                    f"the gradient of {name} must be {weights[name].dtype} {list(weights[name].shape)}, got "
                    f"{grad.dtype} {list(grad.shape)}"
                )
        self.set_lora(weights)
        self._lora_grads = grads

    def update_lora_weights(self, *tensors: torch.Tensor) -> None:
        """Use other adapter tensors, or, without arguments, check the present ones again after a change."""
        self.set_lora(dict(zip(LORA_NAMES, tensors, strict=True)) if tensors else self._lora)

    def init_full_weight_grad_buffers(self, *tensors: torch.Tensor) -> None:
        """Set the three tensors, gate, up and down, that `backward` writes weight gradients to."""
        self._base_grads = dict(zip(BASE_NAMES, tensors, strict=True))

    # ---- asynchronous halves ---------------------------------------------------------------------------

    def _submit(self, work: Callable[[], _Result]) -> None:
        box: list[_Result] = []
        self._pending.append(box)
        self.cpu_infer.submit(lambda: box.append(work()))

    def _sync(self, what: str) -> Any:
        if not self._pending:
            raise KtkStateError(f"sync of layer {self.layer_idx} without a {what} before it")
        box = self._pending.pop(0)
        self.cpu_infer.sync(0)
        return box[0]

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> None:
        """`forward`, run by the queue's thread. The tensors must not change until `sync_forward`."""
        self.check_inputs(hidden_states, expert_ids, weights)
        self._submit(lambda: self.forward(hidden_states, expert_ids, weights, save_for_backward))

    def sync_forward(self) -> torch.Tensor:
        """Wait for `submit_forward`; its result. Raises what it raised."""
        result: torch.Tensor = self._sync("submit_forward")
        return result

    def submit_backward_async(self, grad_output: torch.Tensor, optimizer_grad_scale: float = 1.0) -> None:
        """`backward`, run by the queue's thread."""
        self._submit(lambda: self.backward(grad_output, optimizer_grad_scale))

    def sync_backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for `submit_backward_async`; its result. Raises what it raised."""
        result: tuple[torch.Tensor, torch.Tensor] = self._sync("submit_backward_async")
        return result

    def submit_forward_inference(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        cuda_stream: Any = None,
    ) -> None:
        """Submit a forward with adapters that keeps nothing for a backward. The inputs are copied."""
        x, ids, w = (tensor.detach().clone() for tensor in (hidden_states, expert_ids, weights))
        self.submit_forward(x, ids, w, save_for_backward=False)

    def sync_forward_inference(self, cuda_stream: Any = None) -> torch.Tensor:
        """Wait for `submit_forward_inference`; its result."""
        return self.sync_forward()

    def submit_backward_repack(self) -> None:
        """Do nothing: one copy of the weights serves both directions."""
        return

    def wait_backward_repack(self) -> None:
        """Do nothing, see `submit_backward_repack`."""
        return


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def named_lora(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Six tensors by the names of `LORA_NAMES`."""
    return dict(zip(LORA_NAMES, tensors, strict=True))
