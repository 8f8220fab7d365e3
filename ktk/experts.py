"""What inference engines use: a factory of layers, and layers that submit work and fetch its results."""

from __future__ import annotations

import abc
import os
import sys
import weakref
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ktk import _native
from ktk.buffers import BufferSet, KExpertsCPUBuffer, on_stream, stream_address, to_device, to_host
from ktk.config import MAX_INT32, METHOD_GROUP_SIZES, LayerConfig, checked_int, format_of_method
from ktk.errors import KtkArgumentError, KtkStateError
from ktk.layer import Experts, checked_mask
from ktk.runtime import CPUInfer
from ktk.weights.packed import find_packed, packed_path
from ktk.weights.stored import complete_layout

__all__ = ["AMXMoEWrapper", "BaseMoEWrapper", "Experts", "KTMoEWrapper", "generate_gpu_experts_masks"]


def generate_gpu_experts_masks(activation_freq: torch.Tensor, num_gpu_experts: int) -> torch.Tensor:
    """Choose the experts that go to the GPU: the most used ones of the whole model.

    Parameters
    ----------
    activation_freq : torch.Tensor
        How often each expert is used, ``[num_layers, num_experts]``, any real dtype and device.
    num_gpu_experts : int
        Experts on the GPU over all layers together. Cut to 0 .. ``num_layers * num_experts``.

    Returns
    -------
    torch.Tensor
        bool ``[num_layers, num_experts]`` on the CPU, True for the GPU. Among experts used equally often the
        first ones are taken.

    Raises
    ------
    KtkArgumentError
        If `activation_freq` is not two-dimensional.
    """
    if not isinstance(activation_freq, torch.Tensor):
        raise TypeError(f"activation_freq must be a torch.Tensor, got {type(activation_freq).__name__}")
    if activation_freq.dim() != 2:
        raise KtkArgumentError(
            "activation_freq must have the shape [num_layers, num_experts], "
            f"got {list(activation_freq.shape)}"
        )
    flat = activation_freq.detach().cpu().reshape(-1)
    count = min(max(checked_int("num_gpu_experts", num_gpu_experts, -MAX_INT32), 0), flat.numel())
    chosen = torch.sort(flat, descending=True, stable=True).indices[:count]
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(activation_freq.shape)


class BaseMoEWrapper(abc.ABC):
    """One layer behind the interface that inference engines use: submit a batch, do other work, fetch the
    result.

    Calls come in pairs of `submit_forward` and `sync_forward`; a backend adds how weights are loaded. Layers
    whose tensors have equal shapes share staging buffers, so results are valid until another layer uses the
    same slot.

    Parameters
    ----------
    experts : Experts
        The layer.
    weight_path : path
        Where weights are read from and, with `cpu_save`, written to; may be empty.
    chunked_prefill_size : int
        Most tokens in one batch.
    cpu_save : bool
        Whether packed weights are written to `weight_path` when a layer is packed.
    max_deferred_experts_per_token : int
        Experts of each token, those with the lowest weights, whose contribution arrives with the next layer's
        result.
    method : str
        Name that the layer was asked for by.
    model : hashable, optional
        Layers of different models never share buffers, nor deferred work. Only needed if two models whose
        tensors have equal shapes are run at the same time.

    Attributes
    ----------
    experts : Experts
    layer_idx, num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size : int
    chunked_prefill_size, max_deferred_experts_per_token : int
    cpu_infer : CPUInfer
    weight_path, method : str
    cpu_save : bool
    """

    _layer_has_pending_deferred: ClassVar[dict[int, bool]] = {}
    """Whether each layer deferred work in its last call: a view for clients, of whichever model ran last.
    What
    decides is kept with the buffers, because the deferred work of two models lies in different ones."""

    def __init__(
        self,
        experts: Experts,
        *,
        weight_path: str | os.PathLike[str] | None,
        chunked_prefill_size: int,
        cpu_save: bool,
        max_deferred_experts_per_token: int,
        method: str,
        model: Hashable = None,
    ) -> None:
        config = experts.config
        self.experts = experts
        self.layer_idx = config.layer_idx
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.hidden_size = config.hidden_size
        self.moe_intermediate_size = config.intermediate_size
        self.chunked_prefill_size = chunked_prefill_size
        self.cpu_infer = experts.cpu_infer
        self.weight_path = os.fspath(weight_path or "")
        self.cpu_save = bool(cpu_save)
        self.max_deferred_experts_per_token = checked_int(
            "max_deferred_experts_per_token", max_deferred_experts_per_token, 0, config.num_experts_per_tok
        )
        self.method = method
        self._model = model
        # Marks of this layer in the buffers, which outlive it: they must not keep it, or its threads, alive.
        self._token = object()
        self._deferred_token = (config.layer_idx, weakref.ref(experts.cpu_infer))
        # Buffers, slot and whether work was deferred, between submit_forward and sync_forward.
        self._submitted: tuple[BufferSet, int, bool] | None = None

    @property
    def gpu_experts_mask(self) -> torch.Tensor:
        """bool ``[num_experts]`` on the CPU: experts that run elsewhere. Changes in place are obeyed."""
        return self.experts.gpu_experts_mask

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: torch.Tensor) -> None:
        self.experts.gpu_experts_mask = mask

    @property
    def num_gpu_experts(self) -> int:
        """Number of experts that are masked as on the GPU."""
        return int(self.experts.gpu_experts_mask.sum())

    @property
    def moe(self) -> _native.Moe:
        """Handle of the native layer."""
        return self.experts.native

    @abc.abstractmethod
    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """Load the layer from tensors in memory."""

    @abc.abstractmethod
    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Load the layer from `weight_path`."""

    def select_deferred_experts(
        self, expert_ids: torch.Tensor, expert_scores: torch.Tensor, protected_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split each token's experts into those to run now and those to run during the next layer.

        The `protected_k` experts with the highest scores of each token are protected, and an expert that any
        token of the batch protects is run now for all of them, since its weights are read anyway.

        Parameters
        ----------
        expert_ids : torch.Tensor
            Integer ``[B, k]``; entries outside 0 .. E-1 are in neither result.
        expert_scores : torch.Tensor
            ``[B, k]``, on the same device.
        protected_k : int
            0 defers all, k or more none.

        Returns
        -------
        immediate_ids, deferred_ids : torch.Tensor
            Like `expert_ids`, with -1 in the places that the other one holds.

        Raises
        ------
        KtkArgumentError
            If the shapes differ or `protected_k` is negative.
        """
        if expert_ids.shape != expert_scores.shape or expert_ids.dim() != 2:
            raise KtkArgumentError(
                "expert_ids and expert_scores must have the shape [B, k], got "
                f"{list(expert_ids.shape)} and {list(expert_scores.shape)}"
            )
        top_k = expert_ids.shape[1]
        protected_k = min(checked_int("protected_k", protected_k, 0), top_k)
        valid = (expert_ids >= 0) & (expert_ids < self.num_experts)
        # Fixed shapes throughout, so that a CUDA graph can hold it; ids of no expert share the last place.
        places = torch.where(valid, expert_ids, self.num_experts).to(torch.int64)
        protected = torch.zeros(self.num_experts + 1, dtype=torch.bool, device=expert_ids.device)
        best = torch.topk(expert_scores, protected_k, dim=-1).indices
        protected.index_fill_(0, places.gather(1, best).reshape(-1), True)
        now = protected[places] & valid
        nothing = torch.full_like(expert_ids, -1)
        return torch.where(now, expert_ids, nothing), torch.where(valid & ~now, expert_ids, nothing)

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: Any = None,
    ) -> None:
        """Start a batch. The arguments are copied, and may be overwritten as soon as the call, or on CUDA
        tensors the stream, has passed.

        Parameters
        ----------
        hidden_states : torch.Tensor
            ``[..., H]``, float32, bfloat16 or float16; handed to the layer in bfloat16.
        topk_ids : torch.Tensor
            int32 or int64 ``[..., k]`` on the same device. Ids below 0, out of range, or masked contribute
            nothing.
        topk_weights : torch.Tensor
            Floating point ``[..., k]`` on the same device.
        cuda_stream : int or torch.cuda.Stream, optional
            Stream for CUDA tensors; None is the current one. Not used for CPU tensors.

        Raises
        ------
        KtkArgumentError
            If there are more tokens than `chunked_prefill_size`, or a tensor has the wrong shape, dtype or
            device.
        KtkStateError
            If the layer has no weights.
        """
        moe = self.experts.ready()
        flat, ids, weights = self.experts.checked(hidden_states, topk_ids, topk_weights)
        tokens, top_k = flat.shape[0], self.num_experts_per_tok
        if ids.shape[1] != top_k:
            raise KtkArgumentError(
                f"topk_ids must have {top_k} columns, got the shape {list(topk_ids.shape)}"
            )
        if tokens > self.chunked_prefill_size:
            raise KtkArgumentError(
                f"a batch of {tokens} tokens is above chunked_prefill_size ({self.chunked_prefill_size}); "
                "split it or make the layer with a larger one"
            )
        queue = self.cpu_infer.native_queue
        on_device = flat.device.type == "cuda"
        if on_device:
            # Waits for nothing; raises what failed in an earlier call.
            queue.sync(MAX_INT32)
        buffers = KExpertsCPUBuffer.get_buffer(flat, top_k, owner=self._model)
        slot = self.layer_idx % len(buffers.inputs)
        next_slot = (slot + 1) % len(buffers.inputs)
        if not on_device and buffers.submitted_by[slot] is not None:
            # Work whose result was never fetched may still be reading what is about to be overwritten.
            buffers.submitted_by[slot] = None
            queue.sync(0)
        deferring = self.max_deferred_experts_per_token > 0
        incremental = buffers.deferred_by[slot] == (self.layer_idx - 1, self._deferred_token[1])
        stream = stream_address(cuda_stream, flat.device) if on_device else 0

        def submit(expert_ids: torch.Tensor, output: torch.Tensor, add: bool) -> None:
            arguments = (
                moe,
                buffers.batch_size[slot].data_ptr(),
                top_k,
                expert_ids.data_ptr(),
                buffers.weights[slot].data_ptr(),
                buffers.inputs[slot].data_ptr(),
                _native.DTYPE_BF16,
                output.data_ptr(),
                _native.DTYPE_BF16,
                add,
            )
            if on_device:
                queue.submit_forward_with_cuda_stream(stream, *arguments)
            else:
                queue.submit_forward(*arguments)
                self.experts.lifetimes.hold_for_task(buffers, queue.pending)

        with on_stream(stream, flat.device):
            immediate = ids.to(torch.int64)
            deferred = None
            if deferring:
                immediate, deferred = self.select_deferred_experts(
                    immediate, weights, top_k - self.max_deferred_experts_per_token
                )
            to_host(flat, buffers.inputs[slot])
            to_host(weights, buffers.weights[slot])
            to_host(immediate, buffers.immediate_ids[slot])
            if deferred is not None:
                to_host(deferred, buffers.deferred_ids[slot])
            if tokens > 0:
                submit(buffers.immediate_ids[slot], buffers.outputs[slot], incremental)
                if deferred is not None:
                    submit(buffers.deferred_ids[slot], buffers.outputs[next_slot], False)
        deferring = deferring and tokens > 0
        buffers.deferred_by[slot] = None
        if deferring:
            buffers.deferred_by[next_slot] = self._deferred_token
        elif buffers.deferred_by[next_slot] == self._deferred_token:
            buffers.deferred_by[next_slot] = None
        BaseMoEWrapper._layer_has_pending_deferred[self.layer_idx] = deferring
        buffers.submitted_by[slot] = self._token
        self._submitted = (buffers, slot, deferring)

    def sync_forward(self, hidden_states: torch.Tensor, cuda_stream: Any = None) -> torch.Tensor:
        """Fetch the result of the batch that `submit_forward` started.

        Parameters
        ----------
        hidden_states : torch.Tensor
            The batch that was submitted, or one of the same shape, dtype and device; its values are not read.
        cuda_stream : int or torch.cuda.Stream, optional
            As for `submit_forward`.

        Returns
        -------
        torch.Tensor
            ``[B, H]`` with the dtype and on the device of `hidden_states`. It is a shared buffer, overwritten
            by the next batch in the same slot: use it or copy it before.

        Raises
        ------
        KtkStateError
            If nothing was submitted, or another layer has used the slot since.
        KtkArgumentError
            If `hidden_states` does not match what was submitted.
        KtkError
            If a task failed. For CUDA tensors, a later call raises it, and the result is NaN.
        """
        if self._submitted is None:
            raise KtkStateError(f"sync_forward of layer {self.layer_idx} without submit_forward before it")
        buffers, slot, deferred = self._submitted
        result = buffers.device_outputs[slot]
        if (
            not isinstance(hidden_states, torch.Tensor)
            or hidden_states.numel() != result.numel()
            or hidden_states.shape[-1] != self.hidden_size
            or hidden_states.dtype != result.dtype
            or hidden_states.device != result.device
        ):
            got = (
                f"{hidden_states.dtype} {list(hidden_states.shape)} on {hidden_states.device}"
                if isinstance(hidden_states, torch.Tensor)
                else type(hidden_states).__name__
            )
            raise KtkArgumentError(
                f"the batch submitted to layer {self.layer_idx} was {result.dtype} {list(result.shape)} on "
                f"{result.device}; sync_forward got {got}"
            )
        self._submitted = None
        if buffers.submitted_by[slot] is not self._token:
            raise KtkStateError(
                f"the buffers of layer {self.layer_idx} were used by another layer of the same shapes "
                "between its submit_forward and sync_forward; call them in pairs, or give the wrappers of "
                "each model their own model="
            )
        buffers.submitted_by[slot] = None
        queue = self.cpu_infer.native_queue
        allowed = 1 if deferred else 0
        if result.device.type == "cuda":
            stream = stream_address(cuda_stream, result.device)
            with on_stream(stream, result.device):
                try:
                    queue.sync_with_cuda_stream(stream, allowed)
                    to_device(buffers.outputs[slot], result)
                finally:
                    self.experts.lifetimes.hold_for_stream(buffers, queue.pending)
            return result
        try:
            queue.sync(allowed)
        except BaseException:
            buffers.deferred_by[:] = [None] * len(buffers.deferred_by)
            raise
        return result.copy_(buffers.outputs[slot])

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: Any = None,
    ) -> torch.Tensor:
        """`submit_forward`, then `sync_forward`."""
        self.submit_forward(hidden_states, topk_ids, topk_weights, cuda_stream)
        return self.sync_forward(hidden_states, cuda_stream)

    def close(self) -> None:
        """Wait for work of the layer that is pending, then free its weights. Harmless when closed already."""
        self._submitted = None
        self.experts.close()

    @staticmethod
    def set_capture_batch_sizes(capture_bs: list[int]) -> None:
        """Name the batch sizes whose buffers keep their addresses, see `KExpertsCPUBuffer`."""
        KExpertsCPUBuffer.set_capture_batch_sizes(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """Batch sizes whose buffers keep their addresses."""
        return KExpertsCPUBuffer.get_capture_batch_sizes()

    @staticmethod
    def clear_buffer_cache() -> None:
        """Drop all buffers that no pending work and no captured CUDA graph of a living layer needs."""
        KExpertsCPUBuffer.clear_buffer_cache()


class AMXMoEWrapper(BaseMoEWrapper):
    """Backend of all methods, on every instruction set; made by `KTMoEWrapper`."""

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """Quantise and pack weights; with `cpu_save`, also write them to `weight_path`.

        Parameters
        ----------
        gate_proj, up_proj : torch.Tensor
            ``[E, I, H]``, bfloat16, float16 or float32.
        down_proj : torch.Tensor
            ``[E, H, I]`` of the same dtype.
        physical_to_logical_map_cpu : torch.Tensor, optional
            int64 ``[E]``: slot p holds expert ``map[p]``. Default: the identity.

        Raises
        ------
        KtkArgumentError
            If shapes or dtypes are wrong, a weight is not finite, or `cpu_save` has no `weight_path`.
        """
        self.experts.load_tensors(
            gate_proj,
            up_proj,
            down_proj,
            physical_to_logical_map=physical_to_logical_map_cpu,
            save_to=self._save_path(),
        )

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Load the layer from `weight_path`: a packed file, a directory of them, a Hugging Face checkpoint,
        or weights that kt-kernel has quantised.

        The latter two are packed expert by expert; with `cpu_save`, packed weights are written beside them.

        Parameters
        ----------
        physical_to_logical_map_cpu : torch.Tensor, optional
            int64 ``[E]``: slot p holds expert ``map[p]``. Default: the identity.

        Raises
        ------
        FileNotFoundError
            If `weight_path` does not exist.
        KtkArgumentError
            If it holds neither, or a file is damaged or made for another layer.
        KtkUnsupportedError
            If the checkpoint is quantised.
        """
        if not self.weight_path:
            raise KtkArgumentError(
                "load_weights needs weight_path: a packed file, a directory of them, or a checkpoint"
            )
        path = Path(self.weight_path)
        if not path.exists():
            raise FileNotFoundError(f"weight_path {path} does not exist")
        packed = find_packed(path, self.experts.config.format, self.layer_idx)
        if packed is not None:
            self.experts.load_packed(packed, physical_to_logical_map=physical_to_logical_map_cpu)
            return
        others = sorted(file.name for file in path.glob("ktk-*.safetensors"))
        if others and len(others) == len(list(path.glob("*.safetensors"))):
            raise KtkArgumentError(
                f"{path} has no packed weights of layer {self.layer_idx} in format "
                f"{self.experts.config.format}; it has {others[0]} and {len(others) - 1} more"
            )
        self.experts.load_checkpoint(
            path, physical_to_logical_map=physical_to_logical_map_cpu, save_to=self._save_path()
        )

    def _save_path(self) -> Path | None:
        if not self.cpu_save:
            return None
        if not self.weight_path:
            raise KtkArgumentError(
                "cpu_save=True needs weight_path, the directory to write packed weights to"
            )
        path = Path(self.weight_path)
        if path.suffix == ".safetensors":
            return path
        return packed_path(path, self.experts.config.format, self.layer_idx)


class KTMoEWrapper:
    """Factory of layers, under the name and with the arguments that inference engines use.

    ``KTMoEWrapper(...)`` returns a `BaseMoEWrapper`. Arguments may be given by position in the order below.

    Parameters
    ----------
    layer_idx : int
        Number of the layer within its model.
    num_experts : int
        E.
    num_experts_per_tok : int
        k, at most `num_experts`.
    hidden_size : int
        H.
    moe_intermediate_size : int
        I of one expert.
    gpu_experts_mask : torch.Tensor, optional
        bool ``[E]`` on the CPU, True for experts that run on the GPU and contribute nothing here. Changes in
        place are obeyed. Default: none, or the first `num_gpu_experts`.
    cpuinfer_threads : int, optional
        Threads in all; default: the physical cores that the process may use.
    threadpool_count : int, optional
        Subpools, one a NUMA node; default: one for each node that has CPUs.
    weight_path : path, optional
        Packed weights, checkpoint, or weights of kt-kernel for `load_weights`; directory for `cpu_save`.
    chunked_prefill_size : int, default 4096
        Most tokens in one batch.
    cpu_save : bool, default False
        Write packed weights to `weight_path` when a layer is packed.
    max_deferred_experts_per_token : int, optional
        Experts of each token that arrive with the next layer's result; default 0. Must be 0 on the last
        layer.
    method : str, default "AMXINT4"
        ``"AMXINT4"``, ``"AMXINT8"``, ``"BF16"``, ``"FP8"``, or ``"MOE_INT8"`` and ``"MOE_INT4"``, with one
        scale a row. AMXINT4 uses groups of 32 unless `group_size` says otherwise.
    numa_nodes : sequence of int, optional
        NUMA node of each subpool; default: 0, 1, 2 ...
    mode : str, default "inference"
        ``"inference"``; ``"sft"`` makes a `ktk.sft.AMXSFTMoEWrapper` in place of a `BaseMoEWrapper`.
    num_gpu_experts : int, default 0
        The first experts, as many as this, run on the GPU. Not together with a mask that has another number.
    lora_rank, lora_alpha, lora_dropout, max_cache_depth, zero_point, full_weight_grad
        For mode ``"sft"``, see `ktk.sft.BaseSFTMoEWrapper`. Without effect otherwise, and `zero_point` in
        both: groups of int4 always have an offset.
    swiglu_limit, swiglu_alpha : float, default 0.0
        Activation, see `ktk.config.LayerConfig`.
    group_size : int, optional
        See `ktk.config.LayerConfig`; 0 with AMXINT4 is one scale a row. Default, if `weight_path` has packed
        weights of this layer in the format of `method`, or weights of kt-kernel: what holds them as they are.
    rotated : bool, optional
        See `ktk.config.LayerConfig`. Default, if `weight_path` has such weights: as they are, which is False
        for those of kt-kernel.
    strict, isa
        See `ktk.config.LayerConfig`.
    cpu_infer : CPUInfer, optional
        Threads to use, in place of those that `cpuinfer_threads`, `threadpool_count` and `numa_nodes`
        describe.
    model : hashable, optional
        See `BaseMoEWrapper`.

    Raises
    ------
    KtkArgumentError
        If a value is out of range, or the mode or method is unknown; the message names the value.
    KtkUnsupportedError
        If the CPU cannot run the instruction set.
    """

    def __new__(  # type: ignore[misc]
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | os.PathLike[str] | None = None,
        chunked_prefill_size: int = 4096,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str = "AMXINT4",
        numa_nodes: Sequence[int] | None = None,
        mode: str = "inference",
        num_gpu_experts: int | None = 0,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        max_cache_depth: int = 1,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
        *,
        group_size: int | None = None,
        rotated: bool | None = None,
        strict: bool = False,
        isa: str | None = None,
        cpu_infer: CPUInfer | None = None,
        model: Hashable = None,
        lora_dropout: float = 0.0,
        zero_point: bool = False,
        full_weight_grad: bool = False,
    ) -> BaseMoEWrapper:
        """Check the arguments and make the wrapper of the method."""
        if mode == "sft":
            # Loaded here, so that importing ktk does not load what only training needs.
            from ktk.sft.amx import make_sft_wrapper

            return make_sft_wrapper(  # type: ignore[return-value]
                layer_idx=layer_idx,
                num_experts=num_experts,
                num_experts_per_tok=num_experts_per_tok,
                hidden_size=hidden_size,
                moe_intermediate_size=moe_intermediate_size,
                method=method,
                cpuinfer_threads=cpuinfer_threads,
                threadpool_count=threadpool_count,
                weight_path=weight_path,
                chunked_prefill_size=chunked_prefill_size,
                numa_nodes=numa_nodes,
                num_gpu_experts=num_gpu_experts or 0,
                gpu_experts_mask=gpu_experts_mask,
                lora_rank=lora_rank,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                max_cache_depth=max_cache_depth,
                group_size=group_size,
                rotated=rotated,
                full_weight_grad=full_weight_grad,
                swiglu_limit=swiglu_limit,
                swiglu_alpha=swiglu_alpha,
                isa=isa,
                cpu_infer=cpu_infer,
            )
        if mode != "inference":
            raise KtkArgumentError(f"unknown mode {mode!r}; valid modes: inference, sft")
        weight_format = format_of_method(method)
        if group_size is None:
            group_size = METHOD_GROUP_SIZES.get(method)
        group_size, rotated = complete_layout(weight_path, layer_idx, weight_format, group_size, rotated)
        config = LayerConfig(
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            intermediate_size=moe_intermediate_size,
            format=weight_format,
            group_size=group_size,
            rotated=rotated,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
            max_tokens=checked_int("chunked_prefill_size", chunked_prefill_size, 1),
            strict=strict,
            isa=isa,
            layer_idx=layer_idx,
        )
        deferred = checked_int(
            "max_deferred_experts_per_token",
            max_deferred_experts_per_token or 0,
            0,
            config.num_experts_per_tok,
        )
        on_gpu = checked_int("num_gpu_experts", num_gpu_experts or 0, 0, config.num_experts)
        if gpu_experts_mask is None:
            gpu_experts_mask = torch.arange(config.num_experts) < on_gpu
        elif on_gpu and on_gpu != int(checked_mask(gpu_experts_mask, config.num_experts).sum()):
            raise KtkArgumentError(
                f"num_gpu_experts is {on_gpu}, and gpu_experts_mask has {int(gpu_experts_mask.sum())}; give "
                "one of them"
            )
        experts = Experts(
            config,
            cpu_infer=cpu_infer,
            threads=cpuinfer_threads,
            threadpool_count=threadpool_count,
            numa_nodes=numa_nodes,
            gpu_experts_mask=gpu_experts_mask,
        )
        return AMXMoEWrapper(
            experts,
            weight_path=weight_path,
            chunked_prefill_size=config.max_tokens,
            cpu_save=cpu_save,
            max_deferred_experts_per_token=deferred,
            method=method,
            model=model,
        )

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Iterable[int]) -> None:
        """Name the batch sizes whose buffers keep their addresses, see `KExpertsCPUBuffer`."""
        KExpertsCPUBuffer.set_capture_batch_sizes(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """Batch sizes whose buffers keep their addresses."""
        return KExpertsCPUBuffer.get_capture_batch_sizes()

    @staticmethod
    def clear_buffer_cache() -> None:
        """Drop all buffers that no pending work and no captured CUDA graph of a living layer needs."""
        KExpertsCPUBuffer.clear_buffer_cache()

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Drop the staging buffers of training."""
        module = sys.modules.get("ktk.sft.buffers")
        if module is not None:
            module.KExpertsSFTBuffer.clear_cache()
