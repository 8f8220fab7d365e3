"""The binding through ctypes. What it exports is described in api.pyi."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

from ktk import _library
from ktk._native import _checks, _handles, _tasks
from ktk.errors import KtkError, error_from_status

if TYPE_CHECKING:
    from typing_extensions import Self

HEADER_ABI_VERSION = 1

DTYPE_F32 = 0
DTYPE_BF16 = 1
DTYPE_F16 = 2
DTYPE_F8_E4M3 = 3
FORMAT_BF16 = 0
FORMAT_INT8 = 1
FORMAT_INT4 = 2
FORMAT_FP8 = 3
PART_GATE_UP_WEIGHT = 0
PART_GATE_UP_SCALE = 1
PART_GATE_UP_FACTORS = 2
PART_DOWN_WEIGHT = 3
PART_DOWN_SCALE = 4
PART_DOWN_FACTORS = 5
PART_GATE_BIAS = 6
PART_UP_BIAS = 7
PART_DOWN_BIAS = 8
PROBE_PRODUCT = 0
PROBE_READ = 1
PROBE_COPY = 2
POLICY_NONE = 0
POLICY_SAVE = 1
POLICY_RECOMPUTE = 2

_OK = 0
_ERR_ARGUMENT = 1


class PoolConfig(ctypes.Structure):
    """`ktk_pool_config`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("subpool_count", c_int32),
        ("subpool_numa_map", POINTER(c_int32)),
        ("subpool_thread_count", POINTER(c_int32)),
        ("bind_threads", c_int32),
        ("spin_ns", c_int64),
    )


class MoeConfig(ctypes.Structure):
    """`ktk_moe_config`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("layer_index", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("max_tokens", c_int32),
        ("format", c_int32),
        ("group_size", c_int32),
        ("strict", c_int32),
        ("swiglu_limit", c_float),
        ("swiglu_alpha", c_float),
        ("isa", c_char_p),
        ("gpu_experts_mask", POINTER(c_uint8)),
        ("rotated", c_int32),
    )


class ExpertWeights(ctypes.Structure):
    """`ktk_expert_weights`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("dtype", c_int32),
        ("gate", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("gate_bias", POINTER(c_float)),
        ("up_bias", POINTER(c_float)),
        ("down_bias", POINTER(c_float)),
        ("gate_scale", POINTER(c_float)),
        ("up_scale", POINTER(c_float)),
        ("down_scale", POINTER(c_float)),
    )


class ForwardArgs(ctypes.Structure):
    """`ktk_forward_args`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("top_k", c_int32),
        ("num_tokens", POINTER(c_int32)),
        ("expert_ids", POINTER(c_int64)),
        ("expert_weights", POINTER(c_float)),
        ("input", c_void_p),
        ("output", c_void_p),
        ("input_dtype", c_int32),
        ("output_dtype", c_int32),
        ("incremental", c_int32),
    )


class ProbeConfig(ctypes.Structure):
    """`ktk_probe_config`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("kind", c_int32),
        ("format", c_int32),
        ("isa", c_char_p),
        ("bytes", c_size_t),
    )


class SftConfig(ctypes.Structure):
    """`ktk_sft_config`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("lora_rank", c_int32),
        ("lora_scale", c_float),
        ("lora_dropout", c_float),
        ("skip_lora", c_int32),
    )


class LoraTensors(ctypes.Structure):
    """`ktk_lora_tensors`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("dtype", c_int32),
        ("gate_a", c_void_p),
        ("gate_b", c_void_p),
        ("up_a", c_void_p),
        ("up_b", c_void_p),
        ("down_a", c_void_p),
        ("down_b", c_void_p),
    )


class SftContextConfig(ctypes.Structure):
    """`ktk_sft_context_config`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("policy", c_int32),
        ("dropout", c_int32),
        ("seed", c_int64),
    )


class BackwardArgs(ctypes.Structure):
    """`ktk_backward_args`."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("grad_output_dtype", c_int32),
        ("grad_output", c_void_p),
        ("grad_input", c_void_p),
        ("grad_input_dtype", c_int32),
        ("lora_dtype", c_int32),
        ("grad_expert_weights", POINTER(c_float)),
        ("gate_a", c_void_p),
        ("gate_b", c_void_p),
        ("up_a", c_void_p),
        ("up_b", c_void_p),
        ("down_a", c_void_p),
        ("down_b", c_void_p),
        ("base_dtype", c_int32),
        ("accumulate", c_int32),
        ("gate", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "ktk_pool_config": PoolConfig,
    "ktk_moe_config": MoeConfig,
    "ktk_expert_weights": ExpertWeights,
    "ktk_forward_args": ForwardArgs,
    "ktk_probe_config": ProbeConfig,
    "ktk_sft_config": SftConfig,
    "ktk_lora_tensors": LoraTensors,
    "ktk_sft_context_config": SftContextConfig,
    "ktk_backward_args": BackwardArgs,
}

TASK_FN = ctypes.CFUNCTYPE(c_int32, c_void_p)

_Handle = c_void_p
_STATUS = c_int32
_UINTPTR = c_size_t

PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ktk_last_error": (c_char_p, ()),
    "ktk_version": (c_char_p, ()),
    "ktk_abi_version": (c_int32, ()),
    "ktk_isa_count": (c_int32, ()),
    "ktk_isa_name": (c_char_p, (c_int32,)),
    "ktk_isa_check": (_STATUS, (c_char_p,)),
    "ktk_isa_default": (_STATUS, (POINTER(c_char_p),)),
    "ktk_isa_kernel": (_STATUS, (c_char_p, c_int32, c_int32, POINTER(c_char_p))),
    "ktk_machine_json": (_STATUS, (c_char_p, c_size_t, POINTER(c_size_t))),
    "ktk_pool_create": (_STATUS, (POINTER(PoolConfig), POINTER(_Handle))),
    "ktk_pool_destroy": (_STATUS, (_Handle,)),
    "ktk_pool_threads": (_STATUS, (_Handle, POINTER(c_int32), POINTER(c_int32))),
    "ktk_pool_warnings": (c_char_p, (_Handle,)),
    "ktk_set_num_threads": (_STATUS, (c_int32,)),
    "ktk_get_num_threads": (_STATUS, (POINTER(c_int32),)),
    "ktk_moe_create": (_STATUS, (POINTER(MoeConfig), _Handle, POINTER(_Handle))),
    "ktk_moe_destroy": (_STATUS, (_Handle,)),
    "ktk_moe_pack_expert": (_STATUS, (_Handle, c_int32, POINTER(ExpertWeights))),
    "ktk_moe_part_bytes": (_STATUS, (_Handle, c_int32, POINTER(c_size_t))),
    "ktk_moe_export_part": (_STATUS, (_Handle, c_int32, c_int32, c_void_p, c_size_t)),
    "ktk_moe_import_part": (_STATUS, (_Handle, c_int32, c_int32, c_void_p, c_size_t)),
    "ktk_moe_weight_bytes": (_STATUS, (_Handle, POINTER(c_size_t))),
    "ktk_moe_isa": (_STATUS, (_Handle, POINTER(c_char_p))),
    "ktk_moe_forward": (_STATUS, (_Handle, POINTER(ForwardArgs))),
    "ktk_moe_unpack_expert": (
        _STATUS,
        (_Handle, c_int32, POINTER(c_float), POINTER(c_float), POINTER(c_float)),
    ),
    "ktk_sft_create": (_STATUS, (POINTER(SftConfig), _Handle, POINTER(_Handle))),
    "ktk_sft_destroy": (_STATUS, (_Handle,)),
    "ktk_sft_set_lora": (_STATUS, (_Handle, POINTER(LoraTensors))),
    "ktk_sft_context_create": (_STATUS, (_Handle, POINTER(SftContextConfig), POINTER(_Handle))),
    "ktk_sft_context_destroy": (_STATUS, (_Handle,)),
    "ktk_sft_context_size": (_STATUS, (_Handle, POINTER(c_int32), POINTER(c_size_t), POINTER(c_size_t))),
    "ktk_sft_forward": (_STATUS, (_Handle, POINTER(ForwardArgs))),
    "ktk_sft_backward": (_STATUS, (_Handle, POINTER(BackwardArgs))),
    "ktk_queue_create": (_STATUS, (_Handle, POINTER(_Handle))),
    "ktk_queue_destroy": (_STATUS, (_Handle,)),
    "ktk_queue_submit": (_STATUS, (_Handle, TASK_FN, c_void_p)),
    "ktk_queue_submit_forward": (_STATUS, (_Handle, _Handle, POINTER(ForwardArgs))),
    "ktk_queue_submit_sft_forward": (_STATUS, (_Handle, _Handle, POINTER(ForwardArgs))),
    "ktk_queue_submit_sft_backward": (_STATUS, (_Handle, _Handle, POINTER(BackwardArgs))),
    "ktk_queue_sync": (_STATUS, (_Handle, c_int32)),
    "ktk_queue_submit_forward_with_cuda_stream": (
        _STATUS,
        (_Handle, _UINTPTR, _Handle, POINTER(ForwardArgs)),
    ),
    "ktk_queue_submit_with_cuda_stream": (_STATUS, (_Handle, _UINTPTR, TASK_FN, c_void_p)),
    "ktk_queue_sync_with_cuda_stream": (_STATUS, (_Handle, _UINTPTR, c_int32)),
    "ktk_queue_pending": (_STATUS, (_Handle, POINTER(c_int64))),
    "ktk_trace_start": (_STATUS, (c_int64, POINTER(_Handle))),
    "ktk_trace_stop": (_STATUS, (_Handle,)),
    "ktk_trace_json": (_STATUS, (_Handle, c_char_p, c_size_t, POINTER(c_size_t))),
    "ktk_trace_write": (_STATUS, (_Handle, c_char_p)),
    "ktk_trace_destroy": (_STATUS, (_Handle,)),
    "ktk_probe_create": (_STATUS, (POINTER(ProbeConfig), _Handle, POINTER(_Handle))),
    "ktk_probe_destroy": (_STATUS, (_Handle,)),
    "ktk_probe_variants": (_STATUS, (_Handle, POINTER(c_int32))),
    "ktk_probe_variant_name": (_STATUS, (_Handle, c_int32, POINTER(c_char_p))),
    "ktk_probe_run": (_STATUS, (_Handle, c_int32, c_int64, POINTER(c_double), POINTER(c_double))),
}


def _load() -> ctypes.CDLL:
    library = _library.load_library()
    for name, (result, arguments) in PROTOTYPES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise ImportError(
                f"{_library.library_path()} does not export {name}; it is no libktk.so of this version"
            ) from None
        function.restype = result
        function.argtypes = arguments
    return library


_lib = _load()


def _check(status: int) -> None:
    # ctypes calls on the thread of its caller, so this reads the message of the call that failed.
    if status != _OK:
        raise error_from_status(status, (_lib.ktk_last_error() or b"").decode("utf-8", "replace"))


def _pointer(kind: type[Any], address: int) -> Any:
    return ctypes.cast(address, POINTER(kind)) if address else None


def _forward_args(
    num_tokens_ptr: int,
    top_k: int,
    expert_ids_ptr: int,
    expert_weights_ptr: int,
    input_ptr: int,
    input_dtype: int,
    output_ptr: int,
    output_dtype: int,
    incremental: bool,
) -> ForwardArgs:
    args = ForwardArgs()
    args.struct_size = ctypes.sizeof(args)
    args.num_tokens = _pointer(c_int32, _checks.pointer("num_tokens_ptr", num_tokens_ptr, 4))
    args.top_k = _checks.int32("top_k", top_k)
    args.expert_ids = _pointer(c_int64, _checks.pointer("expert_ids_ptr", expert_ids_ptr, 8))
    args.expert_weights = _pointer(c_float, _checks.pointer("expert_weights_ptr", expert_weights_ptr, 4))
    args.input_dtype = _checks.dtype("input_dtype", input_dtype)
    args.input = _checks.pointer("input_ptr", input_ptr, _checks.DTYPE_BYTES[args.input_dtype])
    args.output_dtype = _checks.dtype("output_dtype", output_dtype)
    args.output = _checks.pointer("output_ptr", output_ptr, _checks.DTYPE_BYTES[args.output_dtype])
    args.incremental = _checks.flag("incremental", incremental)
    return args


def _address(name: str, value: int, dtype: int) -> int | None:
    return _checks.optional_pointer(name, value, _checks.DTYPE_BYTES[dtype]) or None


def _backward_args(
    grad_output_ptr: int,
    grad_output_dtype: int,
    grad_input_ptr: int,
    grad_input_dtype: int,
    grad_expert_weights_ptr: int,
    lora_dtype: int,
    gate_a_ptr: int,
    gate_b_ptr: int,
    up_a_ptr: int,
    up_b_ptr: int,
    down_a_ptr: int,
    down_b_ptr: int,
    base_dtype: int,
    gate_ptr: int,
    up_ptr: int,
    down_ptr: int,
    accumulate: bool,
) -> BackwardArgs:
    args = BackwardArgs()
    args.struct_size = ctypes.sizeof(args)
    args.grad_output_dtype = _checks.dtype("grad_output_dtype", grad_output_dtype)
    alignment = _checks.DTYPE_BYTES[args.grad_output_dtype]
    args.grad_output = _checks.pointer("grad_output_ptr", grad_output_ptr, alignment)
    args.grad_input_dtype = _checks.dtype("grad_input_dtype", grad_input_dtype)
    args.grad_input = _address("grad_input_ptr", grad_input_ptr, args.grad_input_dtype)
    args.grad_expert_weights = _pointer(
        c_float, _checks.optional_pointer("grad_expert_weights_ptr", grad_expert_weights_ptr, 4)
    )
    args.lora_dtype = _checks.dtype("lora_dtype", lora_dtype)
    args.gate_a = _address("gate_a_ptr", gate_a_ptr, args.lora_dtype)
    args.gate_b = _address("gate_b_ptr", gate_b_ptr, args.lora_dtype)
    args.up_a = _address("up_a_ptr", up_a_ptr, args.lora_dtype)
    args.up_b = _address("up_b_ptr", up_b_ptr, args.lora_dtype)
    args.down_a = _address("down_a_ptr", down_a_ptr, args.lora_dtype)
    args.down_b = _address("down_b_ptr", down_b_ptr, args.lora_dtype)
    args.base_dtype = _checks.dtype("base_dtype", base_dtype)
    args.gate = _address("gate_ptr", gate_ptr, args.base_dtype)
    args.up = _address("up_ptr", up_ptr, args.base_dtype)
    args.down = _address("down_ptr", down_ptr, args.base_dtype)
    args.accumulate = _checks.flag("accumulate", accumulate)
    return args


def version() -> str:
    return str(_lib.ktk_version().decode())


def abi_version() -> int:
    return int(_lib.ktk_abi_version())


def isa_names() -> list[str]:
    return [_lib.ktk_isa_name(index).decode() for index in range(_lib.ktk_isa_count())]


def isa_check(name: str) -> None:
    _check(_lib.ktk_isa_check(_checks.text("name", name)))


def isa_default() -> str:
    name = c_char_p()
    _check(_lib.ktk_isa_default(byref(name)))
    return (name.value or b"").decode()


def isa_kernel(isa: str, format: int, rows: int) -> str:
    kernel = c_char_p()
    encoded = _checks.text("isa", isa)
    _check(
        _lib.ktk_isa_kernel(
            encoded, _checks.int32("format", format), _checks.int32("rows", rows), byref(kernel)
        )
    )
    return (kernel.value or b"").decode()


def _json(write: Callable[..., int], *handle: int) -> str:
    # The text may grow between two calls: that of the machine if the CUDA run time is loaded meanwhile.
    capacity = 16384
    needed = c_size_t()
    while True:
        buffer = ctypes.create_string_buffer(capacity)
        status = write(*handle, buffer, capacity, byref(needed))
        if status == _ERR_ARGUMENT and needed.value > capacity:
            capacity = needed.value
            continue
        _check(status)
        return buffer.value.decode()


def machine_json() -> str:
    return _json(_lib.ktk_machine_json)


def set_num_threads(num_threads: int) -> None:
    _check(_lib.ktk_set_num_threads(_checks.int32("num_threads", num_threads)))


def get_num_threads() -> int:
    count = c_int32()
    _check(_lib.ktk_get_num_threads(byref(count)))
    return count.value


class _Native:
    """A handle of the C library: who may use it, and when it may go."""

    _kind = ""
    _name = ""  # in the C library, where it is not the kind
    _handle: int | None = None

    def __init__(self) -> None:
        self._forget_calls()
        _handles.watch(self)

    def _forget_calls(self) -> None:
        self._calls = 0
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        return self._handle is None

    @contextmanager
    def _open(self) -> Iterator[int]:
        # Counted calls keep close() of another thread from freeing a handle that is in use.
        with self._lock:
            handle = self._handle
            self._calls += handle is not None
        if handle is None:
            raise _checks.closed(self._kind)
        try:
            yield handle
        finally:
            with self._lock:
                self._calls -= 1

    def _adopt(self, handle: c_void_p) -> None:
        self._handle = handle.value

    def _destroy(self) -> None:
        if self._handle is None:
            return
        with self._lock:
            handle, self._handle = self._handle, None
        if not handle:
            return
        while self._calls:
            time.sleep(0.0002)
        status = getattr(_lib, f"ktk_{self._name or self._kind.lower()}_destroy")(handle)
        if status != _OK:
            self._handle = handle
        _check(status)

    def close(self) -> None:
        self._destroy()

    def __enter__(self) -> Self:
        if self._handle is None:
            raise _checks.closed(self._kind)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Pool(_Native):
    _kind = "Pool"
    _abandoned = False

    def __init__(
        self,
        subpool_thread_count: Sequence[int],
        subpool_numa_map: Sequence[int] | None = None,
        bind_threads: bool = True,
        spin_ns: int = -1,
    ) -> None:
        self.close()
        super().__init__()
        threads = _checks.int32_list("subpool_thread_count", subpool_thread_count)
        nodes = None
        if subpool_numa_map is not None:
            nodes = _checks.int32_list("subpool_numa_map", subpool_numa_map)
            _checks.same_length("subpool_thread_count", threads, "subpool_numa_map", nodes)
        config = PoolConfig()
        config.struct_size = ctypes.sizeof(config)
        config.bind_threads = _checks.flag("bind_threads", bind_threads)
        config.spin_ns = _checks.int64("spin_ns", spin_ns)
        config.subpool_count = _checks.int32("len(subpool_thread_count)", len(threads))
        config.subpool_thread_count = (c_int32 * len(threads))(*threads)
        if nodes is not None:
            config.subpool_numa_map = (c_int32 * len(nodes))(*nodes)
        handle = c_void_p()
        _check(_lib.ktk_pool_create(byref(config), byref(handle)))
        self._adopt(handle)

    def __del__(self) -> None:
        # In a reference cycle the collector may finalise a pool before its layers; the last of them frees it
        # then.
        self._abandoned = True
        self._release()

    def _release(self) -> None:
        if self._abandoned:
            try:
                self._destroy()
            except KtkError:
                return

    def _threads(self) -> tuple[int, int]:
        subpools, threads = c_int32(), c_int32()
        with self._open() as handle:
            _check(_lib.ktk_pool_threads(handle, byref(subpools), byref(threads)))
        return subpools.value, threads.value

    @property
    def subpool_count(self) -> int:
        return self._threads()[0]

    @property
    def thread_count(self) -> int:
        return self._threads()[1]

    @property
    def warnings(self) -> str:
        with self._open() as handle:
            return str(_lib.ktk_pool_warnings(handle).decode())


class _PoolMember(_Native):
    """A handle that needs its pool for as long as it lives."""

    _pool: Pool | None = None

    def close(self) -> None:
        self._destroy()
        self._pool = None

    def __del__(self) -> None:
        try:
            self._destroy()
        except KtkError:
            return
        if self._pool is not None:
            self._pool._release()


class Moe(_PoolMember):
    _kind = "Moe"

    def __init__(
        self,
        pool: Pool,
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        max_tokens: int,
        format: int,
        group_size: int = 0,
        strict: bool = False,
        swiglu_limit: SupportsFloat = 0.0,
        swiglu_alpha: SupportsFloat = 0.0,
        isa: str | None = None,
        gpu_experts_mask_ptr: int = 0,
        layer_index: int = 0,
        rotated: bool = False,
    ) -> None:
        self.close()
        super().__init__()
        _checks.instance("pool", pool, Pool)
        config = MoeConfig()
        config.struct_size = ctypes.sizeof(config)
        config.layer_index = _checks.int32("layer_index", layer_index)
        config.num_experts = _checks.int32("num_experts", num_experts)
        config.top_k = _checks.int32("top_k", top_k)
        config.hidden_size = _checks.int32("hidden_size", hidden_size)
        config.intermediate_size = _checks.int32("intermediate_size", intermediate_size)
        config.max_tokens = _checks.int32("max_tokens", max_tokens)
        config.format = _checks.int32("format", format)
        config.group_size = _checks.int32("group_size", group_size)
        config.strict = _checks.flag("strict", strict)
        config.swiglu_limit = _checks.number("swiglu_limit", swiglu_limit)
        config.swiglu_alpha = _checks.number("swiglu_alpha", swiglu_alpha)
        config.isa = None if isa is None else _checks.text("isa", isa)
        config.gpu_experts_mask = _pointer(
            c_uint8, _checks.optional_pointer("gpu_experts_mask_ptr", gpu_experts_mask_ptr, 1)
        )
        config.rotated = _checks.flag("rotated", rotated)
        handle = c_void_p()
        with pool._open() as pool_handle:
            _check(_lib.ktk_moe_create(byref(config), pool_handle, byref(handle)))
        self._adopt(handle)
        self._pool = pool

    @property
    def isa(self) -> str:
        name = c_char_p()
        with self._open() as handle:
            _check(_lib.ktk_moe_isa(handle, byref(name)))
        return (name.value or b"").decode()

    @property
    def weight_bytes(self) -> int:
        size = c_size_t()
        with self._open() as handle:
            _check(_lib.ktk_moe_weight_bytes(handle, byref(size)))
        return size.value

    def pack_expert(
        self,
        expert: int,
        dtype: int,
        gate_ptr: int,
        up_ptr: int,
        down_ptr: int,
        gate_bias_ptr: int = 0,
        up_bias_ptr: int = 0,
        down_bias_ptr: int = 0,
        gate_scale_ptr: int = 0,
        up_scale_ptr: int = 0,
        down_scale_ptr: int = 0,
    ) -> None:
        index = _checks.int32("expert", expert)
        weights = ExpertWeights()
        weights.struct_size = ctypes.sizeof(weights)
        weights.dtype = _checks.weight_dtype("dtype", dtype)
        alignment = _checks.WEIGHT_DTYPE_BYTES[weights.dtype]
        weights.gate = _checks.pointer("gate_ptr", gate_ptr, alignment)
        weights.up = _checks.pointer("up_ptr", up_ptr, alignment)
        weights.down = _checks.pointer("down_ptr", down_ptr, alignment)
        weights.gate_bias = _pointer(c_float, _checks.optional_pointer("gate_bias_ptr", gate_bias_ptr, 4))
        weights.up_bias = _pointer(c_float, _checks.optional_pointer("up_bias_ptr", up_bias_ptr, 4))
        weights.down_bias = _pointer(c_float, _checks.optional_pointer("down_bias_ptr", down_bias_ptr, 4))
        weights.gate_scale = _pointer(c_float, _checks.optional_pointer("gate_scale_ptr", gate_scale_ptr, 4))
        weights.up_scale = _pointer(c_float, _checks.optional_pointer("up_scale_ptr", up_scale_ptr, 4))
        weights.down_scale = _pointer(c_float, _checks.optional_pointer("down_scale_ptr", down_scale_ptr, 4))
        with self._open() as handle:
            _check(_lib.ktk_moe_pack_expert(handle, index, byref(weights)))

    def part_bytes(self, part: int) -> int:
        size = c_size_t()
        index = _checks.int32("part", part)
        with self._open() as handle:
            _check(_lib.ktk_moe_part_bytes(handle, index, byref(size)))
        return size.value

    def export_part(self, expert: int, part: int, ptr: int, bytes: int) -> None:
        expert_index, part_index = _checks.int32("expert", expert), _checks.int32("part", part)
        buffer, size = _checks.pointer("ptr", ptr, 1), _checks.size("bytes", bytes)
        with self._open() as handle:
            _check(_lib.ktk_moe_export_part(handle, expert_index, part_index, buffer, size))

    def import_part(self, expert: int, part: int, ptr: int, bytes: int) -> None:
        expert_index, part_index = _checks.int32("expert", expert), _checks.int32("part", part)
        buffer, size = _checks.pointer("ptr", ptr, 1), _checks.size("bytes", bytes)
        with self._open() as handle:
            _check(_lib.ktk_moe_import_part(handle, expert_index, part_index, buffer, size))

    def forward(
        self,
        num_tokens_ptr: int,
        top_k: int,
        expert_ids_ptr: int,
        expert_weights_ptr: int,
        input_ptr: int,
        input_dtype: int,
        output_ptr: int,
        output_dtype: int,
        incremental: bool = False,
    ) -> None:
        args = _forward_args(
            num_tokens_ptr,
            top_k,
            expert_ids_ptr,
            expert_weights_ptr,
            input_ptr,
            input_dtype,
            output_ptr,
            output_dtype,
            incremental,
        )
        with self._open() as handle:
            _check(_lib.ktk_moe_forward(handle, byref(args)))

    def unpack_expert(self, expert: int, gate_ptr: int = 0, up_ptr: int = 0, down_ptr: int = 0) -> None:
        index = _checks.int32("expert", expert)
        gate = _pointer(c_float, _checks.optional_pointer("gate_ptr", gate_ptr, 4))
        up = _pointer(c_float, _checks.optional_pointer("up_ptr", up_ptr, 4))
        down = _pointer(c_float, _checks.optional_pointer("down_ptr", down_ptr, 4))
        with self._open() as handle:
            _check(_lib.ktk_moe_unpack_expert(handle, index, gate, up, down))


class _LayerMember(_Native):
    """A handle that needs its layer, or the adapters of one, for as long as it lives."""

    _owner: Any = None

    def close(self) -> None:
        self._destroy()
        self._owner = None

    def __del__(self) -> None:
        try:
            self._destroy()
        except KtkError:
            return


class Sft(_LayerMember):
    _kind = "Sft"

    def __init__(
        self,
        moe: Moe,
        *,
        lora_rank: int = 0,
        lora_scale: SupportsFloat = 1.0,
        lora_dropout: SupportsFloat = 0.0,
        skip_lora: bool = False,
    ) -> None:
        self.close()
        super().__init__()
        _checks.instance("moe", moe, Moe)
        config = SftConfig()
        config.struct_size = ctypes.sizeof(config)
        config.lora_rank = _checks.int32("lora_rank", lora_rank)
        config.lora_scale = _checks.number("lora_scale", lora_scale)
        config.lora_dropout = _checks.number("lora_dropout", lora_dropout)
        config.skip_lora = _checks.flag("skip_lora", skip_lora)
        handle = c_void_p()
        with moe._open() as moe_handle:
            _check(_lib.ktk_sft_create(byref(config), moe_handle, byref(handle)))
        self._adopt(handle)
        self._owner = moe

    def set_lora(
        self,
        dtype: int,
        gate_a_ptr: int,
        gate_b_ptr: int,
        up_a_ptr: int,
        up_b_ptr: int,
        down_a_ptr: int,
        down_b_ptr: int,
    ) -> None:
        tensors = LoraTensors()
        tensors.struct_size = ctypes.sizeof(tensors)
        tensors.dtype = _checks.dtype("dtype", dtype)
        alignment = _checks.DTYPE_BYTES[tensors.dtype]
        tensors.gate_a = _checks.pointer("gate_a_ptr", gate_a_ptr, alignment)
        tensors.gate_b = _checks.pointer("gate_b_ptr", gate_b_ptr, alignment)
        tensors.up_a = _checks.pointer("up_a_ptr", up_a_ptr, alignment)
        tensors.up_b = _checks.pointer("up_b_ptr", up_b_ptr, alignment)
        tensors.down_a = _checks.pointer("down_a_ptr", down_a_ptr, alignment)
        tensors.down_b = _checks.pointer("down_b_ptr", down_b_ptr, alignment)
        with self._open() as handle:
            _check(_lib.ktk_sft_set_lora(handle, byref(tensors)))


class SftContext(_LayerMember):
    _kind = "SftContext"
    _name = "sft_context"

    def __init__(self, sft: Sft, policy: int, dropout: bool = False, seed: int = 0) -> None:
        self.close()
        super().__init__()
        _checks.instance("sft", sft, Sft)
        config = SftContextConfig()
        config.struct_size = ctypes.sizeof(config)
        config.policy = _checks.int32("policy", policy)
        config.dropout = _checks.flag("dropout", dropout)
        config.seed = _checks.int64("seed", seed)
        handle = c_void_p()
        with sft._open() as sft_handle:
            _check(_lib.ktk_sft_context_create(sft_handle, byref(config), byref(handle)))
        self._adopt(handle)
        self._owner = sft

    def _size(self) -> tuple[int, int, int]:
        tokens, activations, tables = c_int32(), c_size_t(), c_size_t()
        with self._open() as handle:
            _check(_lib.ktk_sft_context_size(handle, byref(tokens), byref(activations), byref(tables)))
        return tokens.value, activations.value, tables.value

    @property
    def num_tokens(self) -> int:
        return self._size()[0]

    @property
    def activation_bytes(self) -> int:
        return self._size()[1]

    @property
    def table_bytes(self) -> int:
        return self._size()[2]

    def forward(
        self,
        num_tokens_ptr: int,
        top_k: int,
        expert_ids_ptr: int,
        expert_weights_ptr: int,
        input_ptr: int,
        input_dtype: int,
        output_ptr: int,
        output_dtype: int,
        incremental: bool = False,
    ) -> None:
        args = _forward_args(
            num_tokens_ptr,
            top_k,
            expert_ids_ptr,
            expert_weights_ptr,
            input_ptr,
            input_dtype,
            output_ptr,
            output_dtype,
            incremental,
        )
        with self._open() as handle:
            _check(_lib.ktk_sft_forward(handle, byref(args)))

    def backward(
        self,
        grad_output_ptr: int,
        grad_output_dtype: int,
        grad_input_ptr: int,
        grad_input_dtype: int,
        grad_expert_weights_ptr: int,
        *,
        lora_dtype: int = 0,
        gate_a_ptr: int = 0,
        gate_b_ptr: int = 0,
        up_a_ptr: int = 0,
        up_b_ptr: int = 0,
        down_a_ptr: int = 0,
        down_b_ptr: int = 0,
        base_dtype: int = 0,
        gate_ptr: int = 0,
        up_ptr: int = 0,
        down_ptr: int = 0,
        accumulate: bool = False,
    ) -> None:
        args = _backward_args(
            grad_output_ptr,
            grad_output_dtype,
            grad_input_ptr,
            grad_input_dtype,
            grad_expert_weights_ptr,
            lora_dtype,
            gate_a_ptr,
            gate_b_ptr,
            up_a_ptr,
            up_b_ptr,
            down_a_ptr,
            down_b_ptr,
            base_dtype,
            gate_ptr,
            up_ptr,
            down_ptr,
            accumulate,
        )
        with self._open() as handle:
            _check(_lib.ktk_sft_backward(handle, byref(args)))


def _run_task_function(context: int) -> int:
    try:
        return _tasks.run_task(context)
    except BaseException:  # noqa: BLE001 - ctypes would print it and go on
        return 1


_run_task = TASK_FN(_run_task_function)
_open_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


class Queue(_PoolMember):
    _kind = "Queue"

    def __init__(self, pool: Pool) -> None:
        self.close()
        super().__init__()
        _checks.instance("pool", pool, Pool)
        self._tasks = _tasks.QueueTasks()
        handle = c_void_p()
        with pool._open() as pool_handle:
            _check(_lib.ktk_queue_create(pool_handle, byref(handle)))
        self._adopt(handle)
        self._pool = pool
        _open_queues.add(self)

    def _destroy(self) -> None:
        if self._handle is None:
            return
        if self._tasks.on_own_thread():
            raise _checks.own_task("close")
        super()._destroy()

    def close(self) -> None:
        super().close()
        self._tasks = _tasks.QueueTasks()

    def _finish(self, status: int) -> None:
        # Without a native failure only that of a callable is raised; with both, the native one is its
        # context.
        try:
            _check(status)
        except KtkError:
            failure = self._tasks.take_failure()
            if failure is None:
                raise
            raise failure  # noqa: B904 - the chaining is meant
        failure = self._tasks.take_failure()
        if failure is not None:
            raise failure

    @property
    def pending(self) -> int:
        count = c_int64()
        with self._open() as handle:
            _check(_lib.ktk_queue_pending(handle, byref(count)))
        return count.value

    def submit(self, function: Callable[[], Any]) -> None:
        _checks.function(function)
        with self._open() as handle:
            key = self._tasks.add(function)
            status = _lib.ktk_queue_submit(handle, _run_task, key)
            if status != _OK:
                self._tasks.discard(key)
            _check(status)

    def submit_with_cuda_stream(self, stream: int | None, function: Callable[[], Any]) -> None:
        address = _checks.stream(stream)
        _checks.function(function)
        with self._open() as handle:
            key = self._tasks.add_replayable(function)
            _check(_lib.ktk_queue_submit_with_cuda_stream(handle, address, _run_task, key))

    def submit_forward(
        self,
        moe: Moe,
        num_tokens_ptr: int,
        top_k: int,
        expert_ids_ptr: int,
        expert_weights_ptr: int,
        input_ptr: int,
        input_dtype: int,
        output_ptr: int,
        output_dtype: int,
        incremental: bool = False,
    ) -> None:
        _checks.instance("moe", moe, Moe)
        args = _forward_args(
            num_tokens_ptr,
            top_k,
            expert_ids_ptr,
            expert_weights_ptr,
            input_ptr,
            input_dtype,
            output_ptr,
            output_dtype,
            incremental,
        )
        with self._open() as handle, moe._open() as layer:
            _check(_lib.ktk_queue_submit_forward(handle, layer, byref(args)))

    def submit_forward_with_cuda_stream(
        self,
        stream: int | None,
        moe: Moe,
        num_tokens_ptr: int,
        top_k: int,
        expert_ids_ptr: int,
        expert_weights_ptr: int,
        input_ptr: int,
        input_dtype: int,
        output_ptr: int,
        output_dtype: int,
        incremental: bool = False,
    ) -> None:
        address = _checks.stream(stream)
        _checks.instance("moe", moe, Moe)
        args = _forward_args(
            num_tokens_ptr,
            top_k,
            expert_ids_ptr,
            expert_weights_ptr,
            input_ptr,
            input_dtype,
            output_ptr,
            output_dtype,
            incremental,
        )
        with self._open() as handle, moe._open() as layer:
            _check(_lib.ktk_queue_submit_forward_with_cuda_stream(handle, address, layer, byref(args)))

    def submit_sft_forward(
        self,
        context: SftContext,
        num_tokens_ptr: int,
        top_k: int,
        expert_ids_ptr: int,
        expert_weights_ptr: int,
        input_ptr: int,
        input_dtype: int,
        output_ptr: int,
        output_dtype: int,
        incremental: bool = False,
    ) -> None:
        _checks.instance("context", context, SftContext)
        args = _forward_args(
            num_tokens_ptr,
            top_k,
            expert_ids_ptr,
            expert_weights_ptr,
            input_ptr,
            input_dtype,
            output_ptr,
            output_dtype,
            incremental,
        )
        with self._open() as handle, context._open() as context_handle:
            _check(_lib.ktk_queue_submit_sft_forward(handle, context_handle, byref(args)))

    def submit_sft_backward(
        self,
        context: SftContext,
        grad_output_ptr: int,
        grad_output_dtype: int,
        grad_input_ptr: int,
        grad_input_dtype: int,
        grad_expert_weights_ptr: int,
        *,
        lora_dtype: int = 0,
        gate_a_ptr: int = 0,
        gate_b_ptr: int = 0,
        up_a_ptr: int = 0,
        up_b_ptr: int = 0,
        down_a_ptr: int = 0,
        down_b_ptr: int = 0,
        base_dtype: int = 0,
        gate_ptr: int = 0,
        up_ptr: int = 0,
        down_ptr: int = 0,
        accumulate: bool = False,
    ) -> None:
        _checks.instance("context", context, SftContext)
        args = _backward_args(
            grad_output_ptr,
            grad_output_dtype,
            grad_input_ptr,
            grad_input_dtype,
            grad_expert_weights_ptr,
            lora_dtype,
            gate_a_ptr,
            gate_b_ptr,
            up_a_ptr,
            up_b_ptr,
            down_a_ptr,
            down_b_ptr,
            base_dtype,
            gate_ptr,
            up_ptr,
            down_ptr,
            accumulate,
        )
        with self._open() as handle, context._open() as context_handle:
            _check(_lib.ktk_queue_submit_sft_backward(handle, context_handle, byref(args)))

    def sync(self, allow_n_pending: int = 0) -> None:
        allowed = _checks.int32("allow_n_pending", allow_n_pending)
        with self._open() as handle:
            if self._tasks.on_own_thread():
                raise _checks.own_task("sync")
            self._finish(_lib.ktk_queue_sync(handle, allowed))

    def sync_with_cuda_stream(self, stream: int | None, allow_n_pending: int = 0) -> None:
        address = _checks.stream(stream)
        allowed = _checks.int32("allow_n_pending", allow_n_pending)
        with self._open() as handle:
            if self._tasks.on_own_thread():
                raise _checks.own_task("sync_with_cuda_stream")
            self._finish(_lib.ktk_queue_sync_with_cuda_stream(handle, address, allowed))


class Trace(_Native):
    _kind = "Trace"

    def __init__(self, spans_per_thread: int = 0) -> None:
        spans = _checks.int64("spans_per_thread", spans_per_thread)
        self.close()
        super().__init__()
        handle = c_void_p()
        _check(_lib.ktk_trace_start(spans, byref(handle)))
        self._adopt(handle)

    def __del__(self) -> None:
        try:
            self._destroy()
        except KtkError:
            return

    def stop(self) -> None:
        with self._open() as handle:
            _check(_lib.ktk_trace_stop(handle))

    def json(self) -> str:
        with self._open() as handle:
            return _json(_lib.ktk_trace_json, handle)

    def write(self, path: str | os.PathLike[str]) -> None:
        encoded = _checks.path(path)
        with self._open() as handle:
            _check(_lib.ktk_trace_write(handle, encoded))


class Probe(_PoolMember):
    _kind = "Probe"

    def __init__(
        self, pool: Pool, *, kind: int, format: int = 0, bytes: int = 0, isa: str | None = None
    ) -> None:
        self.close()
        super().__init__()
        _checks.instance("pool", pool, Pool)
        config = ProbeConfig()
        config.struct_size = ctypes.sizeof(config)
        config.kind = _checks.int32("kind", kind)
        config.format = _checks.int32("format", format)
        config.bytes = _checks.size("bytes", bytes)
        config.isa = None if isa is None else _checks.text("isa", isa)
        handle = c_void_p()
        with pool._open() as pool_handle:
            _check(_lib.ktk_probe_create(byref(config), pool_handle, byref(handle)))
        self._adopt(handle)
        self._pool = pool

    @property
    def variants(self) -> list[str]:
        count, name, names = c_int32(), c_char_p(), []
        with self._open() as handle:
            _check(_lib.ktk_probe_variants(handle, byref(count)))
            for variant in range(count.value):
                _check(_lib.ktk_probe_variant_name(handle, variant, byref(name)))
                names.append((name.value or b"").decode())
        return names

    def run(self, variant: int, repeats: int = 1) -> tuple[float, float]:
        index, rounds = _checks.int32("variant", variant), _checks.int64("repeats", repeats)
        work, seconds = c_double(), c_double()
        with self._open() as handle:
            _check(_lib.ktk_probe_run(handle, index, rounds, byref(work), byref(seconds)))
        return work.value, seconds.value


def _finish_queues() -> None:
    # A callable that starts after the interpreter began to shut down could not take the GIL any more.
    for queue in list(_open_queues):
        handle = queue._handle
        if handle is not None:
            _lib.ktk_queue_sync(handle, 0)


atexit.register(_finish_queues)
