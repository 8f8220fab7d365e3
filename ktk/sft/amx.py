"""`AMXSFTMoEWrapper`: training on the native backend, on every instruction set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ktk.config import LayerConfig
from ktk.errors import KtkArgumentError, KtkStateError
from ktk.layer import Experts
from ktk.runtime import CPUInfer
from ktk.sft.base import BaseSFTMoEWrapper
from ktk.sft.config import SFTMethod, sft_method
from ktk.sft.errors import KTAMXNotAvailableError
from ktk.sft.native import Policy, TrainableExperts
from ktk.weights.packed import find_packed
from ktk.weights.stored import complete_layout

__all__ = ["AMXSFTMoEWrapper", "make_sft_wrapper"]


class AMXSFTMoEWrapper(BaseSFTMoEWrapper):
    """Training wrapper of a `ktk.Experts`.

    Parameters
    ----------
    experts : Experts
        The layer; its format must be that of `method`. Closed with the wrapper.
    method : str, default "AMXBF16_SFT"
        A key of `ktk.sft.config.SFT_METHODS`.
    weight_path : path, optional
        What `load_weights` reads: packed files, a checkpoint, or weights that kt-kernel has quantised.
    **options
        `lora_rank`, `lora_alpha`, `lora_dropout`, `max_cache_depth`, `full_weight_grad`: see
        `BaseSFTMoEWrapper`.

    Raises
    ------
    KtkArgumentError
        If the format is not that of the method, or an option is out of range.
    """

    def __init__(
        self,
        experts: Experts,
        *,
        method: str = "AMXBF16_SFT",
        weight_path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        config = experts.config
        self._method: SFTMethod = sft_method(method)
        if config.format != self._method.format:
            raise KtkArgumentError(
                f"method {method} needs experts in {self._method.format}, and these are in {config.format}"
            )
        super().__init__(
            layer_idx=config.layer_idx,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.intermediate_size,
            method=self._method.name,
            chunked_prefill_size=config.max_tokens,
            cpu_infer=experts.cpu_infer,
            **options,
        )
        self.experts = experts
        self.weight_path = None if weight_path is None else Path(weight_path)
        self._native: TrainableExperts | None = None
        self._plain: TrainableExperts | None = None
        self._lora_state: tuple[tuple[int, int], ...] | None = None

    @property
    def skip_lora(self) -> bool:
        """Whether the method leaves adapters out."""
        return self._method.skip_lora

    @property
    def trains_lora(self) -> bool:
        """Whether adapters take part in forward and backward."""
        return not self.skip_lora

    @property
    def native(self) -> TrainableExperts:
        """The native backend with adapters, made when it is first needed."""
        if self._native is None:
            self.experts.ready()
            self._native = TrainableExperts(
                self.experts,
                lora_rank=self.lora_rank,
                lora_alpha=self.lora_alpha,
                lora_dropout=self.lora_dropout,
                skip_lora=self.skip_lora,
            )
        return self._native

    @property
    def plain(self) -> TrainableExperts:
        """The native backend without adapters, over the same weights."""
        if self._plain is None:
            self.experts.ready()
            self._plain = TrainableExperts(self.experts)
        return self._plain

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Load from `weight_path`: packed files of this layer, a checkpoint, or weights of kt-kernel.

        Raises
        ------
        FileNotFoundError
            If there is nothing at `weight_path`.
        KtkArgumentError
            If there is no `weight_path`, or what is there does not fit.
        """
        if self.weight_path is None:
            raise KtkArgumentError("load_weights needs weight_path: packed files or a checkpoint")
        if not self.weight_path.exists():
            raise FileNotFoundError(f"weight_path {self.weight_path} does not exist")
        packed = find_packed(self.weight_path, self.experts.config.format, self.layer_idx)
        if packed is not None:
            self.experts.load_packed(packed, physical_to_logical_map=physical_to_logical_map_cpu)
        else:
            self.experts.load_checkpoint(
                self.weight_path, physical_to_logical_map=physical_to_logical_map_cpu
            )

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """Pack gate and up ``[E, I, H]`` and down ``[E, H, I]``, bfloat16, float16 or float32."""
        self.experts.load_tensors(
            gate_proj, up_proj, down_proj, physical_to_logical_map=physical_to_logical_map_cpu
        )

    def configure_lora(self, rank: int, alpha: float, dropout: float = 0.0) -> None:
        """Change rank, alpha and dropout of the adapters; the packed weights are used again.

        Raises
        ------
        KtkStateError
            If a forward waits for its backward.
        """
        if self._saved:
            raise KtkStateError(f"layer {self.layer_idx} has forwards without backward; run or discard them")
        if not 0 <= rank <= 256:
            raise KtkArgumentError(f"lora_rank must be between 0 and 256, got {rank}")
        self.lora_rank, self.lora_alpha, self.lora_dropout = rank, float(alpha), float(dropout)
        self._native, self._lora, self._lora_state = None, {}, None

    def set_lora(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Use these six adapter tensors, in place, from now on. The native backend checks them.

        Raises
        ------
        KtkArgumentError
            If there are no adapters in this layer, or a tensor has the wrong shape, dtype or layout, or is
            not finite.
        """
        if self.lora_rank == 0:
            raise KtkArgumentError(f"layer {self.layer_idx} was made without adapters (lora_rank 0)")
        # Tensors of inference mode cannot change in place, and have no counter of changes.
        state = tuple(
            (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)
            for tensor in tensors.values()
        )
        self._lora = dict(tensors)
        # Reading every value to look for NaN is worth it once after a change, not in each forward.
        if state != self._lora_state:
            self.native.set_lora({name: tensor.detach() for name, tensor in tensors.items()})
            self._lora_state = state

    def update_base_weights(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        """Pack the weights of all experts again, one at a time."""
        native = self.plain
        for expert in range(self.num_experts):
            parts = (part[expert].detach().to("cpu") for part in (gate, up, down))
            native.update_base(expert, *parts)

    def _make_forward_task(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        policy: Policy,
        with_lora: bool,
        dropout_seed: int | None,
    ) -> Callable[[], tuple[torch.Tensor, Any]]:
        native = self.native if with_lora else self.plain
        return lambda: native.forward(
            hidden_states, expert_ids, expert_weights, policy=policy, dropout_seed=dropout_seed
        )

    def _make_backward_task(
        self,
        context: Any,
        grad_output: torch.Tensor,
        grad_lora: Mapping[str, torch.Tensor] | None,
        grad_base: Mapping[str, torch.Tensor] | None,
        accumulate: bool,
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        return lambda: context.backward(
            grad_output, grad_lora=grad_lora, grad_base=grad_base, accumulate=accumulate
        )

    def close(self) -> None:
        """Free the weights and every saved forward. Harmless when closed already."""
        self.discard_saved()
        self._native = self._plain = None
        self.experts.close()


def make_sft_wrapper(
    *,
    layer_idx: int,
    num_experts: int,
    num_experts_per_tok: int,
    hidden_size: int,
    moe_intermediate_size: int,
    method: str = "AMXBF16_SFT",
    cpuinfer_threads: int | None = None,
    threadpool_count: int | None = None,
    weight_path: str | os.PathLike[str] | None = None,
    chunked_prefill_size: int = 8192,
    numa_nodes: Sequence[int] | None = None,
    num_gpu_experts: int = 0,
    gpu_experts_mask: torch.Tensor | None = None,
    lora_rank: int = 16,
    lora_alpha: float = 32.0,
    lora_dropout: float = 0.0,
    max_cache_depth: int = 1,
    group_size: int | None = None,
    rotated: bool | None = None,
    full_weight_grad: bool = False,
    swiglu_limit: float = 0.0,
    swiglu_alpha: float = 0.0,
    isa: str | None = None,
    cpu_infer: CPUInfer | None = None,
) -> AMXSFTMoEWrapper:
    """Make the wrapper of a layer that has no weights yet: ``KTMoEWrapper(mode="sft", ...)``.

    Raises
    ------
    KTAMXConfigError
        If the method is unknown.
    KTAMXNotAvailableError
        If experts are to be on the GPU, or this build lacks the method's format.
    KtkArgumentError
        If a value is out of range.
    """
    kind = sft_method(method)
    if num_gpu_experts or (gpu_experts_mask is not None and bool(gpu_experts_mask.any())):
        raise KTAMXNotAvailableError(
            "experts that are trained are all on the CPU; leave num_gpu_experts and gpu_experts_mask out"
        )
    # kt-kernel's callers pass a group size with every method, and mean the group methods.
    columns = group_size if kind.format == "int4" else None
    if columns is None:
        columns = kind.group_size
    columns, rotated = complete_layout(weight_path, layer_idx, kind.format, columns, rotated)
    config = LayerConfig(
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        hidden_size=hidden_size,
        intermediate_size=moe_intermediate_size,
        format=kind.format,
        group_size=columns,
        rotated=rotated,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        max_tokens=chunked_prefill_size,
        isa=isa,
        layer_idx=layer_idx,
    )
    experts = Experts(
        config,
        cpu_infer=cpu_infer,
        threads=cpuinfer_threads,
        threadpool_count=threadpool_count,
        numa_nodes=numa_nodes,
    )
    return AMXSFTMoEWrapper(
        experts,
        method=method,
        weight_path=weight_path,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        max_cache_depth=max_cache_depth,
        full_weight_grad=full_weight_grad,
    )
