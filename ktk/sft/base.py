"""`BaseSFTMoEWrapper`: the experts of one layer, run forward and backward without autograd."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ktk.config import checked_int
from ktk.errors import KtkArgumentError, KtkStateError
from ktk.runtime import CPUInfer
from ktk.sft.buffers import KExpertsSFTBuffer
from ktk.sft.functional import FunctionalExperts
from ktk.sft.native import BASE_NAMES, LORA_NAMES, Policy, lora_shapes
from ktk.sft.saved import Gradients, SavedForward, named_lora

__all__ = [
    "BASE_NAMES",
    "LORA_NAMES",
    "BaseSFTMoEWrapper",
    "Gradients",
    "KExpertsSFTBuffer",
    "SavedForward",
    "lora_shapes",
    "named_lora",
]

_Result = TypeVar("_Result")


class BaseSFTMoEWrapper(FunctionalExperts):
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
        super().__init__(
            layer_idx=layer_idx,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            method=method,
            cpu_infer=cpu_infer,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            chunked_prefill_size=chunked_prefill_size,
        )
        self.max_cache_depth = checked_int("max_cache_depth", max_cache_depth, 1)
        self.full_weight_grad = full_weight_grad
        self._saved: deque[SavedForward] = deque()
        self._pending: list[Any] = []
        self._lora: dict[str, torch.Tensor] = {}
        self._lora_grads: dict[str, torch.Tensor] = {}
        self._base_grads: dict[str, torch.Tensor] = {}

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
                "given to init_lora_weights; set all of them to None before backward"
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
                f"as many for gradients; got {len(tensors)}"
            )
        weights = named_lora(tensors[:6])
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
