"""`Experts`: the experts of one layer, their weights and their forward."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktk import _native, ops
from ktk.buffers import BufferLifetimes, KExpertsCPUBuffer, stream_address, to_device, to_host
from ktk.config import MAX_INT32, LayerConfig, checked_int
from ktk.errors import KtkArgumentError, KtkStateError
from ktk.runtime import CPUInfer, WorkerPoolConfig, default_threads, nodes_with_cpus
from ktk.weights.checkpoint import CheckpointLayer, ExpertWeights
from ktk.weights.kt_kernel import KTKernelLayer, layer_of, open_weights
from ktk.weights.packed import PackedFile, PackedLayer, PackedWriter
from ktk.weights.stored import StoredLayout

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Experts", "checked_mask", "shared_cpu_infer"]


_DTYPE_CODES = {
    torch.float32: _native.DTYPE_F32,
    torch.bfloat16: _native.DTYPE_BF16,
    torch.float16: _native.DTYPE_F16,
}
_BIAS_PARTS = (_native.PART_GATE_BIAS, _native.PART_UP_BIAS, _native.PART_DOWN_BIAS)

_cpu_infers: weakref.WeakValueDictionary[Hashable, CPUInfer] = weakref.WeakValueDictionary()
_cpu_infers_lock = threading.Lock()


def shared_cpu_infer(
    threads: int | None = None, threadpool_count: int | None = None, numa_nodes: Sequence[int] | None = None
) -> CPUInfer:
    """Thread pool of this process for the given settings.

    Equal settings give the same object for as long as anyone holds it; different ones coexist.

    Parameters
    ----------
    threads : int, optional
        Threads in all; default: KTK_NUM_THREADS, or the physical cores that the process may use. Split over
        the subpools as evenly as possible; the first ones take the remainder.
    threadpool_count : int, optional
        Number of subpools; default: as many as `numa_nodes`, or one for each NUMA node with CPUs.
    numa_nodes : sequence of int, optional
        NUMA node of each subpool; default: the first nodes with CPUs, if there are as many as subpools;
        otherwise as `WorkerPoolConfig` has it.

    Returns
    -------
    CPUInfer

    Raises
    ------
    KtkArgumentError
        If there are fewer threads than subpools, or not one node for each subpool, or a node does not exist.
    """
    threads = default_threads() if threads is None else checked_int("cpuinfer_threads", threads, 1)
    nodes = None if numa_nodes is None else [checked_int("a NUMA node", node, 0) for node in numa_nodes]
    if threadpool_count is None and nodes is None:
        config = WorkerPoolConfig.from_threads(threads)
    else:
        count = checked_int(
            "threadpool_count", len(nodes or ()) if threadpool_count is None else threadpool_count, 1
        )
        if nodes is not None and len(nodes) != count:
            raise KtkArgumentError(
                f"numa_nodes must name one node for each of the {count} subpools (threadpool_count), "
                f"got {nodes}"
            )
        if threads < count:
            raise KtkArgumentError(
                f"cpuinfer_threads must be at least threadpool_count ({count}), one thread a subpool; "
                f"got {threads}"
            )
        share, remainder = divmod(threads, count)
        if nodes is None:
            found_nodes = nodes_with_cpus()
            nodes = found_nodes[:count] if len(found_nodes) >= count else []
        config = WorkerPoolConfig(
            subpool_count=count,
            subpool_numa_map=nodes,
            subpool_thread_count=[share + (index < remainder) for index in range(count)],
        )
    key = (tuple(config.subpool_numa_map), tuple(config.subpool_thread_count))
    with _cpu_infers_lock:
        found = _cpu_infers.get(key)
        if found is None or found.closed:
            found = CPUInfer(config)
            _cpu_infers[key] = found
        return found


def checked_mask(mask: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    if mask is None:
        return torch.zeros(num_experts, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"gpu_experts_mask must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.device.type != "cpu" or mask.dtype != torch.bool or tuple(mask.shape) != (num_experts,):
        raise KtkArgumentError(
            f"gpu_experts_mask must be a bool tensor of shape [{num_experts}] on the CPU, got {mask.dtype} "
            f"{list(mask.shape)} on {mask.device}"
        )
    return mask if mask.is_contiguous() else mask.contiguous()


def _checked_map(
    physical_to_logical_map: torch.Tensor | Sequence[int] | None, slots: int, logical: int, what: str
) -> list[int]:
    """Logical expert of each slot, as plain ints."""
    if physical_to_logical_map is None:
        if slots != logical:
            raise KtkArgumentError(
                f"{what} has {logical} experts and the layer {slots}; give physical_to_logical_map to say "
                "which goes where"
            )
        return list(range(slots))
    if isinstance(physical_to_logical_map, torch.Tensor):
        if physical_to_logical_map.is_floating_point() or physical_to_logical_map.dtype == torch.bool:
            raise KtkArgumentError(
                f"physical_to_logical_map must be int64, got {physical_to_logical_map.dtype}"
            )
        if physical_to_logical_map.dim() != 1:
            raise KtkArgumentError(
                f"physical_to_logical_map must have the shape [{slots}], "
                f"got {list(physical_to_logical_map.shape)}"
            )
        values = physical_to_logical_map.tolist()
    else:
        values = list(physical_to_logical_map)
    if len(values) != slots:
        raise KtkArgumentError(f"physical_to_logical_map must have {slots} elements, got {len(values)}")
    return [
        checked_int(f"physical_to_logical_map[{slot}]", v, 0, logical - 1) for slot, v in enumerate(values)
    ]


class Experts:
    """The experts of one mixture-of-experts layer, packed in one weight format and run on the CPU.

    For each token t, the result is the sum over its experts e of ``weight[t, e] * down_e(act(gate_e(x_t),
    up_e(x_t)))``. Use it as a context manager, or `close` it, to free the weights at a known time.

    Parameters
    ----------
    config : LayerConfig
        Shapes, format and activation.
    cpu_infer : CPUInfer, optional
        Threads to run on; default: those of `shared_cpu_infer` for the next three arguments.
    threads : int, optional
        Threads in all; default: the physical cores that the process may use.
    threadpool_count : int, optional
        Subpools, one a NUMA node; default: one for each node that has CPUs.
    numa_nodes : sequence of int, optional
        NUMA node of each subpool.
    gpu_experts_mask : torch.Tensor, optional
        bool ``[num_experts]`` on the CPU. Experts that are True contribute nothing here. The tensor itself is
        used: changes in place count from the next forward on.

    Attributes
    ----------
    config : LayerConfig
    cpu_infer : CPUInfer
    handle : int
        Number that ``torch.ops.ktk.moe_forward`` takes for this layer.

    Raises
    ------
    KtkArgumentError
        If an argument is out of range.
    KtkUnsupportedError
        If the CPU cannot run the instruction set that was asked for.
    KtkMemoryError
        If the weights do not fit.

    Examples
    --------
    >>> import torch
    >>> gate, up = torch.randn(2, 4, 64, 32)
    >>> down = torch.randn(4, 32, 64)
    >>> with Experts.from_weights(gate, up, down, num_experts_per_tok=2, format="int8", threads=1) as experts:
    ...     y = experts(torch.randn(3, 32), torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.full((3, 2), 0.5))
    >>> y.shape
    torch.Size([3, 32])
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        cpu_infer: CPUInfer | None = None,
        threads: int | None = None,
        threadpool_count: int | None = None,
        numa_nodes: Sequence[int] | None = None,
        gpu_experts_mask: torch.Tensor | None = None,
    ) -> None:
        self._moe: _native.Moe | None = None
        if not isinstance(config, LayerConfig):
            raise TypeError(f"config must be a ktk.config.LayerConfig, got {type(config).__name__}")
        self.config = config
        self._mask = checked_mask(gpu_experts_mask, config.num_experts)
        self.cpu_infer = cpu_infer or shared_cpu_infer(threads, threadpool_count, numa_nodes)
        self._moe = _native.Moe(
            self.cpu_infer.native_pool,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            max_tokens=config.max_tokens,
            format=config.format_code,
            group_size=config.groups,
            strict=config.strict,
            swiglu_limit=config.swiglu_limit,
            swiglu_alpha=config.swiglu_alpha,
            isa=config.isa,
            gpu_experts_mask_ptr=self._mask.data_ptr(),
            layer_index=config.layer_idx,
            rotated=config.rotates,
        )
        # Logical expert of each slot; None until weights are loaded, and while a load has failed half-way.
        self._logical: list[int] | None = None
        self._logical_experts = 0
        self._bias = False
        self.lifetimes = BufferLifetimes()
        self.handle = ops.register_layer(self)

    @classmethod
    def from_weights(
        cls,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        *,
        num_experts_per_tok: int,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        gate_scale: torch.Tensor | None = None,
        up_scale: torch.Tensor | None = None,
        down_scale: torch.Tensor | None = None,
        cpu_infer: CPUInfer | None = None,
        threads: int | None = None,
        threadpool_count: int | None = None,
        numa_nodes: Sequence[int] | None = None,
        gpu_experts_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Self:
        """Make a layer of weights in memory.

        Parameters
        ----------
        gate, up : torch.Tensor
            ``[E, I, H]``, bfloat16, float16, float32, or float8_e4m3fn with scales.
        down : torch.Tensor
            ``[E, H, I]`` of the same dtype.
        num_experts_per_tok : int
            k.
        gate_bias, up_bias, down_bias : torch.Tensor, optional
            ``[E, I]``, ``[E, I]``, ``[E, H]``.
        gate_scale, up_scale, down_scale : torch.Tensor, optional
            Of weights in float8_e4m3fn, see `load_tensors`.
        cpu_infer, threads, threadpool_count, numa_nodes, gpu_experts_mask
            As for the class.
        **options
            Other fields of `LayerConfig`: ``format``, ``group_size``, ``rotated``, ``max_tokens`` and so on.

        Returns
        -------
        Experts

        Raises
        ------
        KtkArgumentError
            If shapes or dtypes are wrong, or a weight is not finite.
        """
        if not isinstance(gate, torch.Tensor):
            raise TypeError(f"gate must be a torch.Tensor, got {type(gate).__name__}")
        if gate.dim() != 3:
            raise KtkArgumentError(f"gate must have the shape [E, I, H], got {list(gate.shape)}")
        num_experts, inner, hidden = gate.shape
        config = LayerConfig(
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden,
            intermediate_size=inner,
            **options,
        )
        layer = cls(
            config,
            cpu_infer=cpu_infer,
            threads=threads,
            threadpool_count=threadpool_count,
            numa_nodes=numa_nodes,
            gpu_experts_mask=gpu_experts_mask,
        )
        layer.load_tensors(
            gate,
            up,
            down,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down_bias,
            gate_scale=gate_scale,
            up_scale=up_scale,
            down_scale=down_scale,
        )
        return layer

    @classmethod
    def from_packed(
        cls,
        path: str | os.PathLike[str],
        *,
        layer_idx: int | None = None,
        cpu_infer: CPUInfer | None = None,
        threads: int | None = None,
        threadpool_count: int | None = None,
        numa_nodes: Sequence[int] | None = None,
        gpu_experts_mask: torch.Tensor | None = None,
        **overrides: Any,
    ) -> Self:
        """Make a layer of a packed file; shapes, format and activation come from its header.

        Parameters
        ----------
        path : path
            The file.
        layer_idx : int, optional
            Which of its layers; may be left out if it holds only one.
        cpu_infer, threads, threadpool_count, numa_nodes, gpu_experts_mask
            As for the class.
        **overrides
            Fields of `LayerConfig` that say how to run: ``max_tokens``, ``strict``, ``isa``,
            ``num_experts_per_tok``.

        Returns
        -------
        Experts

        Raises
        ------
        KtkArgumentError
            If the file is damaged or foreign, or the layer is not in it or not named.
        """
        with PackedFile(path) as file:
            if layer_idx is None:
                if len(file.layers) > 1:
                    raise KtkArgumentError(
                        f"{path} holds layers {sorted(file.layers)}; choose one with layer_idx"
                    )
                layer_idx = next(iter(file.layers))
            layer = cls(
                file.layer(layer_idx).config(**overrides),
                cpu_infer=cpu_infer,
                threads=threads,
                threadpool_count=threadpool_count,
                numa_nodes=numa_nodes,
                gpu_experts_mask=gpu_experts_mask,
            )
            layer._load_packed(file, None)
        return layer

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        layer_idx: int,
        num_experts_per_tok: int,
        cpu_infer: CPUInfer | None = None,
        threads: int | None = None,
        threadpool_count: int | None = None,
        numa_nodes: Sequence[int] | None = None,
        gpu_experts_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Self:
        """Make a layer of a Hugging Face checkpoint or of kt-kernel's weights, packing one expert at a time;
        shapes come from its tensors.

        Parameters
        ----------
        path : path
            Directory of the checkpoint, see `ktk.weights.Checkpoint`, or of kt-kernel's weights, see
            `ktk.weights.KTKernelWeights`; the latter also set the format and group size, unless given, and
            make a layer that is not rotated, unless ``rotated=True`` or another format is.
        layer_idx : int
            Which of its layers.
        num_experts_per_tok : int
            k.
        cpu_infer, threads, threadpool_count, numa_nodes, gpu_experts_mask
            As for the class.
        **options
            Other fields of `LayerConfig`.

        Returns
        -------
        Experts

        Raises
        ------
        KtkArgumentError
            If the checkpoint has no such layer, or cannot be read.
        KtkUnsupportedError
            If its experts are quantised.
        """
        with open_weights(path, layer_idx, options.get("format")) as weights:
            source = layer_of(weights, layer_idx, options.get("format"))
            if isinstance(source, KTKernelLayer):
                options.setdefault("format", source.format)
                if options["format"] == source.format:
                    stored = StoredLayout.of_kt_kernel(source)
                    options["group_size"], options["rotated"] = stored.complete(
                        options.get("group_size"), options.get("rotated")
                    )
            config = LayerConfig(
                num_experts=source.num_experts,
                num_experts_per_tok=num_experts_per_tok,
                hidden_size=source.hidden_size,
                intermediate_size=source.intermediate_size,
                layer_idx=layer_idx,
                **options,
            )
            layer = cls(
                config,
                cpu_infer=cpu_infer,
                threads=threads,
                threadpool_count=threadpool_count,
                numa_nodes=numa_nodes,
                gpu_experts_mask=gpu_experts_mask,
            )
            layer._pack_all(layer._reader(source), source.num_experts, source.bias, None, None, str(path))
        return layer

    # ---- state ---------------------------------------------------------------------------------------

    @property
    def native(self) -> _native.Moe:
        """Handle of the native layer.

        Raises
        ------
        KtkStateError
            If the layer is closed.
        """
        if self._moe is None:
            raise KtkStateError(f"layer {self.config.layer_idx} is closed; make a new one")
        return self._moe

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._moe is None

    @property
    def loaded(self) -> bool:
        """Whether all experts have weights."""
        return self._logical is not None

    @property
    def isa(self) -> str:
        """Instruction set that the layer runs on."""
        return self.native.isa

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights, all experts."""
        return self.native.weight_bytes

    @property
    def gpu_experts_mask(self) -> torch.Tensor:
        """bool ``[num_experts]``, read at each forward. Assignment copies into it."""
        return self._mask

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: torch.Tensor | None) -> None:
        self._mask.copy_(checked_mask(mask, self.config.num_experts))

    def ready(self) -> _native.Moe:
        moe = self.native
        if self._logical is None:
            raise KtkStateError(
                f"layer {self.config.layer_idx} has no weights, or loading them failed; load them first"
            )
        return moe

    def close(self) -> None:
        """Wait for work of the layer that is pending, then free its weights. Harmless when closed already."""
        moe, self._moe = self._moe, None
        if moe is not None:
            moe.close()

    def __enter__(self) -> Self:
        self.native  # noqa: B018 - raises when closed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Pending tasks read the staging buffers and the mask, which must not go before the native layer does.
        if getattr(self, "_moe", None) is not None:
            self.close()

    def __repr__(self) -> str:
        config = self.config
        state = "closed" if self.closed else "loaded" if self.loaded else "without weights"
        return (
            f"<{type(self).__name__} {state}: layer {config.layer_idx}, {config.num_experts} experts, "
            f"{config.num_experts_per_tok} a token, hidden {config.hidden_size}, intermediate "
            f"{config.intermediate_size}, {config.format}>"
        )

    # ---- weights -------------------------------------------------------------------------------------

    def load_tensors(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        *,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        gate_scale: torch.Tensor | None = None,
        up_scale: torch.Tensor | None = None,
        down_scale: torch.Tensor | None = None,
        physical_to_logical_map: torch.Tensor | Sequence[int] | None = None,
        save_to: str | os.PathLike[str] | None = None,
        source: str = "tensors",
    ) -> None:
        """Quantise and pack weights, replacing those the layer has.

        Parameters
        ----------
        gate, up : torch.Tensor
            ``[E, I, H]``, bfloat16, float16, float32, or float8_e4m3fn with scales. Experts on other devices,
            or that are not contiguous, are copied one at a time.
        down : torch.Tensor
            ``[E, H, I]`` of the same dtype.
        gate_bias, up_bias, down_bias : torch.Tensor, optional
            ``[E, I]``, ``[E, I]``, ``[E, H]``, floating point. Those left out are zero.
        gate_scale, up_scale, down_scale : torch.Tensor, optional
            For weights in float8_e4m3fn, and needed there: what each block of 128 by 128 weights is
            multiplied with, floating point ``[E, ceil(I / 128), ceil(H / 128)]``, the same, and
            ``[E, ceil(H / 128), ceil(I / 128)]``. A layer of format fp8 takes weights and scales as they are.
        physical_to_logical_map : torch.Tensor or sequence of int, optional
            int64 ``[E]``: slot p holds expert ``map[p]``. Default: the identity.
        save_to : path, optional
            Packed file to write on the way, with the experts in logical order.
        source : str, default "tensors"
            Recorded in that file.

        Raises
        ------
        KtkArgumentError
            If shapes or dtypes are wrong, or a weight is not finite. In the latter case the layer is left
            without weights.
        """
        config = self.config
        shapes = {
            "gate": (gate, (config.num_experts, config.intermediate_size, config.hidden_size)),
            "up": (up, (config.num_experts, config.intermediate_size, config.hidden_size)),
            "down": (down, (config.num_experts, config.hidden_size, config.intermediate_size)),
            "gate_bias": (gate_bias, (config.num_experts, config.intermediate_size)),
            "up_bias": (up_bias, (config.num_experts, config.intermediate_size)),
            "down_bias": (down_bias, (config.num_experts, config.hidden_size)),
        }
        codes = isinstance(gate, torch.Tensor) and gate.dtype == torch.float8_e4m3fn
        blocks_in, blocks_out = -(-config.hidden_size // 128), -(-config.intermediate_size // 128)
        scales = {
            "gate_scale": (gate_scale, (config.num_experts, blocks_out, blocks_in)),
            "up_scale": (up_scale, (config.num_experts, blocks_out, blocks_in)),
            "down_scale": (down_scale, (config.num_experts, blocks_in, blocks_out)),
        }
        for name, (tensor, _) in scales.items():
            if (tensor is not None) != codes:
                raise KtkArgumentError(
                    f"{name} and weights of float8_e4m3fn belong together: pass all three scales with such "
                    f"weights and none with others, got {'no ' if tensor is None else ''}{name} and gate of "
                    f"{getattr(gate, 'dtype', type(gate).__name__)}"
                )
        for name, (tensor, shape) in (shapes | scales).items():
            matrix = not name.endswith(("bias", "scale"))
            if tensor is None and not matrix:
                continue
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tuple(tensor.shape) != shape:
                raise KtkArgumentError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype not in _DTYPE_CODES and not (matrix and codes):
                raise KtkArgumentError(f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}")
            if tensor.device.type == "meta":
                raise KtkArgumentError(f"{name} is on the meta device and has no values; load it first")
            if matrix and tensor.dtype != gate.dtype:
                raise KtkArgumentError(
                    f"{name} must have the dtype of gate ({gate.dtype}), got {tensor.dtype}"
                )

        def expert(logical: int) -> ExpertWeights:
            return ExpertWeights(
                gate=gate[logical],
                up=up[logical],
                down=down[logical],
                gate_bias=None if gate_bias is None else gate_bias[logical],
                up_bias=None if up_bias is None else up_bias[logical],
                down_bias=None if down_bias is None else down_bias[logical],
                gate_scale=None if gate_scale is None else gate_scale[logical],
                up_scale=None if up_scale is None else up_scale[logical],
                down_scale=None if down_scale is None else down_scale[logical],
            )

        bias = not (gate_bias is None and up_bias is None and down_bias is None)
        self._pack_all(expert, config.num_experts, bias, physical_to_logical_map, save_to, source)

    def load_packed(
        self,
        path: str | os.PathLike[str],
        *,
        physical_to_logical_map: torch.Tensor | Sequence[int] | None = None,
    ) -> None:
        """Load the weights of this layer from a packed file, replacing those the layer has.

        Parameters
        ----------
        path : path
            The file. It must hold a layer with the number, shapes, format and activation of this one.
        physical_to_logical_map : torch.Tensor or sequence of int, optional
            int64 ``[E]``: slot p holds expert ``map[p]`` of the file. Default: the identity.

        Raises
        ------
        KtkArgumentError
            If the file is damaged or foreign, or made for another layer; the message says what differs.
        """
        with PackedFile(path) as file:
            self._load_packed(file, physical_to_logical_map)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        physical_to_logical_map: torch.Tensor | Sequence[int] | None = None,
        save_to: str | os.PathLike[str] | None = None,
    ) -> None:
        """Quantise and pack the weights of this layer from a Hugging Face checkpoint, one expert at a time.

        Weights that kt-kernel has quantised keep their codes where this layer has the same format and is not
        rotated, and their scales too where it has one a row, see `ktk.weights.KTKernelLayer`.

        Parameters
        ----------
        path : path
            Directory of the checkpoint, see `ktk.weights.Checkpoint`, or of kt-kernel's weights, see
            `ktk.weights.KTKernelWeights`.
        physical_to_logical_map : torch.Tensor or sequence of int, optional
            int64 ``[E]``: slot p holds expert ``map[p]`` of the checkpoint. Default: the identity.
        save_to : path, optional
            Packed file to write on the way, with the experts in logical order.

        Raises
        ------
        KtkArgumentError
            If the checkpoint cannot be read, or its shapes differ from those of this layer.
        KtkUnsupportedError
            If its experts are quantised.
        """
        with open_weights(path, self.config.layer_idx, self.config.format) as weights:
            source = layer_of(weights, self.config.layer_idx, self.config.format)
            for name in ("hidden_size", "intermediate_size"):
                if getattr(source, name) != getattr(self.config, name):
                    parts = getattr(source, "parts", 0)
                    raise KtkArgumentError(
                        f"layer {self.config.layer_idx} of {path} has {name} {getattr(source, name)}"
                        f"{f', in {parts} NUMA parts,' if parts else ''} and this layer "
                        f"{getattr(self.config, name)}"
                    )
            self._pack_all(
                self._reader(source),
                source.num_experts,
                source.bias,
                physical_to_logical_map,
                save_to,
                str(path),
            )

    def _reader(
        self, source: CheckpointLayer | KTKernelLayer
    ) -> Callable[[int], ExpertWeights | Mapping[str, Any]]:
        """What reads an expert for `_pack`."""
        if not isinstance(source, KTKernelLayer):
            return source.expert
        header = PackedLayer.from_config(self.config, bias=False)

        def read(expert: int) -> ExpertWeights | Mapping[str, Any]:
            return source.packed(expert, header) or source.expert(expert)

        return read

    def save(self, path: str | os.PathLike[str], *, source: str = "") -> None:
        """Write the packed weights to a file that `from_packed` and `load_packed` read.

        Parameters
        ----------
        path : path
            The file to make or replace; it is put in place only when whole.
        source : str, default ""
            Recorded in the file.

        Raises
        ------
        KtkStateError
            If the layer has no weights, or holds some expert of the model in no slot.
        OSError
            If the file cannot be written.
        """
        self.ready()
        assert self._logical is not None
        slots = {logical: slot for slot, logical in reversed(list(enumerate(self._logical)))}
        if len(slots) != self._logical_experts:
            raise KtkStateError(
                f"layer {self.config.layer_idx} holds only experts {sorted(slots)} of its model, and a "
                "packed file needs all; pack it from the original weights with save_to"
            )
        header = PackedLayer.from_config(self.config, bias=self._bias, num_experts=len(slots))
        with PackedWriter(path, [header], source=source) as writer:
            for logical, slot in sorted(slots.items()):
                self._export(writer, header, slot, logical)

    def _export(self, writer: PackedWriter, header: PackedLayer, slot: int, logical: int) -> None:
        for part in header.parts:
            buffer = np.empty(part.nbytes, dtype=np.uint8)
            self.native.export_part(slot, part.code, int(buffer.ctypes.data), part.nbytes)
            writer.write(header.layer_idx, logical, part.name, buffer)

    def _pack_all(
        self,
        read: Callable[[int], ExpertWeights | Mapping[str, Any]],
        logical_experts: int,
        bias: bool,
        physical_to_logical_map: torch.Tensor | Sequence[int] | None,
        save_to: str | os.PathLike[str] | None,
        source: str,
    ) -> None:
        slots = _checked_map(physical_to_logical_map, self.config.num_experts, logical_experts, source)
        self.native  # noqa: B018 - raises when closed
        clear_bias = self._bias and not bias
        self._logical = None
        self._bias = self._bias or bias

        def pack_slots(writer: PackedWriter | None, header: PackedLayer | None) -> None:
            unwritten = set(range(logical_experts))
            if writer is not None and header is not None:
                # Experts of the file that no slot is to hold pass through the first slot.
                for logical in sorted(unwritten - set(slots)):
                    self._pack(0, read(logical), clear_bias)
                    self._export(writer, header, 0, logical)
            for slot, logical in enumerate(slots):
                self._pack(slot, read(logical), clear_bias)
                if writer is not None and header is not None and logical in unwritten:
                    self._export(writer, header, slot, logical)
                    unwritten.discard(logical)

        if save_to is None:
            pack_slots(None, None)
        else:
            header = PackedLayer.from_config(self.config, bias=bias, num_experts=logical_experts)
            with PackedWriter(save_to, [header], source=source) as writer:
                pack_slots(writer, header)
        self._bias = bias
        self._logical, self._logical_experts = slots, logical_experts

    def _pack(self, slot: int, weights: ExpertWeights | Mapping[str, Any], clear_bias: bool) -> None:
        if isinstance(weights, Mapping):
            for part in PackedLayer.from_config(self.config, bias=False).parts:
                data = np.ascontiguousarray(weights[part.name])
                self.native.import_part(slot, part.code, int(data.ctypes.data), data.nbytes)
            if clear_bias:
                self._import_zero_bias(slot)
            return
        if self.config.format != "fp8":
            weights = weights.dequantised()
        dtype = weights.gate.dtype

        def usable(tensor: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
            tensor = tensor.detach().to(device="cpu", dtype=wanted).contiguous()
            # A tensor that lies in a file may start at any byte.
            return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor

        matrices = [usable(tensor, dtype) for tensor in (weights.gate, weights.up, weights.down)]
        biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
        scales = (weights.gate_scale, weights.up_scale, weights.down_scale)
        others = [None if other is None else usable(other, torch.float32) for other in (*biases, *scales)]
        self.native.pack_expert(
            slot,
            _native.DTYPE_F8_E4M3 if dtype == torch.float8_e4m3fn else _DTYPE_CODES[dtype],
            *(tensor.data_ptr() for tensor in matrices),
            *(0 if other is None else other.data_ptr() for other in others),
        )
        if clear_bias:
            self._import_zero_bias(slot)

    def update_expert(self, slot: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        """Replace the weights of one loaded expert; its biases stay.

        Parameters
        ----------
        slot : int
            0 .. ``config.num_experts`` - 1.
        gate, up, down : torch.Tensor
            ``[I, H]``, ``[I, H]``, ``[H, I]``, bfloat16, float16 or float32 of one dtype.

        Raises
        ------
        KtkArgumentError
            If there is no such slot, a tensor has the wrong shape or dtype, or a weight is not finite; in the
            last case the expert has no weights any more.
        KtkStateError
            If the layer is closed or has no weights.
        """
        moe = self.ready()
        inner, hidden = self.config.intermediate_size, self.config.hidden_size
        slot = checked_int("slot", slot, 0, self.config.num_experts - 1)
        for name, tensor, shape in (
            ("gate", gate, (inner, hidden)),
            ("up", up, (inner, hidden)),
            ("down", down, (hidden, inner)),
        ):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tuple(tensor.shape) != shape or tensor.dtype not in _DTYPE_CODES or tensor.dtype != gate.dtype:
                raise KtkArgumentError(
                    f"{name} must have the shape {list(shape)} and the dtype of gate, a floating-point one, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        weights = ExpertWeights(gate=gate, up=up, down=down)
        if self._bias:
            biases = torch.empty(inner), torch.empty(inner), torch.empty(hidden)
            for part, bias in zip(_BIAS_PARTS, biases, strict=True):
                moe.export_part(slot, part, bias.data_ptr(), bias.nbytes)
            weights = dataclasses.replace(
                weights, gate_bias=biases[0], up_bias=biases[1], down_bias=biases[2]
            )
        self._pack(slot, weights, False)

    def _import_zero_bias(self, slot: int) -> None:
        inner, hidden = self.config.intermediate_size, self.config.hidden_size
        for part, rows in zip(_BIAS_PARTS, (inner, inner, hidden), strict=True):
            zeros = np.zeros(rows, dtype=np.float32)
            self.native.import_part(slot, part, int(zeros.ctypes.data), zeros.nbytes)

    def _load_packed(
        self, file: PackedFile, physical_to_logical_map: torch.Tensor | Sequence[int] | None
    ) -> None:
        config = self.config
        header = file.layer(config.layer_idx)
        wanted = PackedLayer.from_config(config, bias=header.bias, num_experts=header.num_experts)
        for name in (
            "format",
            "group_size",
            "rotated",
            "hidden_size",
            "intermediate_size",
            "swiglu_limit",
            "swiglu_alpha",
        ):
            if getattr(header, name) != getattr(wanted, name):
                raise KtkArgumentError(
                    f"{file.path} was packed with {name} {getattr(header, name)}, and this layer has "
                    f"{getattr(wanted, name)}; pack the weights again or change the layer"
                )
        slots = _checked_map(physical_to_logical_map, config.num_experts, header.num_experts, str(file.path))
        moe = self.native
        clear_bias = self._bias and not header.bias
        self._logical = None
        self._bias = self._bias or header.bias
        for part in header.parts:
            if moe.part_bytes(part.code) != part.nbytes:
                raise KtkArgumentError(
                    f"part {part.name} of {file.path} has {part.nbytes} bytes an expert, and this library "
                    f"wants {moe.part_bytes(part.code)}; pack the weights again"
                )
            for slot, logical in enumerate(slots):
                address = file.address(config.layer_idx, logical, part)
                try:
                    moe.import_part(slot, part.code, address, part.nbytes)
                except KtkArgumentError as error:
                    raise KtkArgumentError(
                        f"{file.path}: part {part.name} of expert {logical} of layer {config.layer_idx}: "
                        f"{error}"
                    ) from error
            file.release_pages()
        if clear_bias:
            for slot in range(config.num_experts):
                self._import_zero_bias(slot)
        self._bias = header.bias
        self._logical, self._logical_experts = slots, header.num_experts

    # ---- forward -------------------------------------------------------------------------------------

    def forward(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts on a batch. Batches above ``config.max_tokens`` are run in pieces.

        On CUDA tensors the work is put in the order of the current stream and the call returns at once; a
        failure is raised by a later call.

        Parameters
        ----------
        hidden_states : torch.Tensor
            ``[..., H]``, float32, bfloat16 or float16, on the CPU or a CUDA device.
        expert_ids : torch.Tensor
            int32 or int64 ``[..., k]`` on the same device; k at most ``config.num_experts_per_tok``. Ids
            outside 0 .. E-1, and those masked as on the GPU, contribute nothing.
        expert_weights : torch.Tensor
            Floating point ``[..., k]`` on the same device.

        Returns
        -------
        torch.Tensor
            A new tensor like `hidden_states`. It has no gradient: a backward pass through it raises.

        Raises
        ------
        KtkArgumentError
            If a tensor has the wrong shape, dtype or device.
        KtkStateError
            If the layer is closed or has no weights.
        """
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled()
            and any(getattr(tensor, "requires_grad", False) for tensor in (hidden_states, expert_weights))
        ):
            return ops.moe_forward(hidden_states, expert_ids, expert_weights, self.handle)
        return self.run(hidden_states, expert_ids, expert_weights)

    __call__ = forward

    def run(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """`forward` without a look at gradients: what ``torch.ops.ktk.moe_forward`` calls."""
        moe = self.ready()
        flat, ids, weights = self.checked(hidden_states, expert_ids, expert_weights)
        output = torch.empty_like(flat, memory_format=torch.contiguous_format)
        tokens, step = flat.shape[0], self.config.max_tokens
        if flat.is_cuda:
            for begin in range(0, tokens, step):
                piece = slice(begin, begin + step)
                self._run_on_stream(moe, flat[piece], ids[piece], weights[piece], output[piece])
        else:
            # Addresses and not slices: making a slice costs about as much as a small forward.
            flat = flat.contiguous()
            ids = ids.to(torch.int64).contiguous()
            weights = weights.to(torch.float32).contiguous()
            code, top_k = _DTYPE_CODES[flat.dtype], ids.shape[1]
            row_bytes = flat.shape[1] * flat.element_size()
            addresses = (ids.data_ptr(), weights.data_ptr(), flat.data_ptr(), output.data_ptr())
            for begin in range(0, tokens, step):
                num_tokens = ctypes.c_int32(min(step, tokens - begin))
                moe.forward(
                    ctypes.addressof(num_tokens),
                    top_k,
                    addresses[0] + begin * top_k * 8,
                    addresses[1] + begin * top_k * 4,
                    addresses[2] + begin * row_bytes,
                    code,
                    addresses[3] + begin * row_bytes,
                    code,
                )
        return output if output.shape == hidden_states.shape else output.view(hidden_states.shape)

    def _run_on_stream(
        self,
        moe: _native.Moe,
        flat: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        queue = self.cpu_infer.native_queue
        # Waits for nothing; raises what failed in an earlier call.
        queue.sync(MAX_INT32)
        code = _DTYPE_CODES[flat.dtype]
        with torch.cuda.device(flat.device):
            stream = stream_address(None, flat.device)
            buffers = KExpertsCPUBuffer.get_buffer(
                flat, ids.shape[1], owner=("stream", stream), transfer_dtype=flat.dtype
            )
            to_host(flat, buffers.inputs[0])
            to_host(ids, buffers.immediate_ids[0])
            to_host(weights, buffers.weights[0])
            queue.submit_forward_with_cuda_stream(
                stream,
                moe,
                buffers.batch_size[0].data_ptr(),
                ids.shape[1],
                buffers.immediate_ids[0].data_ptr(),
                buffers.weights[0].data_ptr(),
                buffers.inputs[0].data_ptr(),
                code,
                buffers.outputs[0].data_ptr(),
                code,
            )
            try:
                queue.sync_with_cuda_stream(stream, 0)
                to_device(buffers.outputs[0], output)
            finally:
                self.lifetimes.hold_for_stream(buffers, queue.pending)

    def checked(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three tensors as ``[B, H]``, ``[B, k]``, ``[B, k]``, or an exception that says what is
        wrong."""
        config = self.config
        for name, tensor in (
            ("hidden_states", hidden_states),
            ("expert_ids", expert_ids),
            ("expert_weights", expert_weights),
        ):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if hidden_states.dim() < 1 or hidden_states.shape[-1] != config.hidden_size:
            raise KtkArgumentError(
                f"hidden_states must have the shape [..., {config.hidden_size}], "
                f"got {list(hidden_states.shape)}"
            )
        if hidden_states.dtype not in _DTYPE_CODES:
            raise KtkArgumentError(
                f"hidden_states must be float32, bfloat16 or float16, got {hidden_states.dtype}"
            )
        if not (hidden_states.is_cpu or hidden_states.is_cuda):
            raise KtkArgumentError(
                f"hidden_states must be on the CPU or a CUDA device, got {hidden_states.device}"
            )
        if expert_ids.dtype not in (torch.int32, torch.int64):
            raise KtkArgumentError(f"expert_ids must be int32 or int64, got {expert_ids.dtype}")
        if not expert_weights.is_floating_point():
            raise KtkArgumentError(f"expert_weights must be floating point, got {expert_weights.dtype}")
        if expert_ids.shape != expert_weights.shape:
            raise KtkArgumentError(
                "expert_ids and expert_weights must have the same shape, got "
                f"{list(expert_ids.shape)} and {list(expert_weights.shape)}"
            )
        if expert_ids.dim() < 1 or not 1 <= expert_ids.shape[-1] <= config.num_experts_per_tok:
            raise KtkArgumentError(
                f"expert_ids must have 1 to {config.num_experts_per_tok} (num_experts_per_tok) columns, "
                f"got the shape {list(expert_ids.shape)}"
            )
        flat, ids, weights = hidden_states.detach(), expert_ids, expert_weights.detach()
        if flat.dim() != 2:
            flat = flat.reshape(-1, config.hidden_size)
        if ids.dim() != 2:
            ids = ids.reshape(-1, ids.shape[-1])
            weights = weights.reshape(-1, weights.shape[-1])
        if ids.shape[0] != flat.shape[0]:
            raise KtkArgumentError(
                f"hidden_states has {flat.shape[0]} tokens and expert_ids {ids.shape[0]}; they must agree"
            )
        if not (expert_ids.device == expert_weights.device == hidden_states.device):
            raise KtkArgumentError(
                f"expert_ids ({expert_ids.device}) and expert_weights ({expert_weights.device}) must be on "
                f"the device of hidden_states ({hidden_states.device})"
            )
        return flat, ids, weights
