# What both bindings export, and the only place where it is described. `ktk._native` has the same names.

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, SupportsFloat

from typing_extensions import Self

DTYPE_F32: Final = 0
DTYPE_BF16: Final = 1
DTYPE_F16: Final = 2
FORMAT_BF16: Final = 0
FORMAT_INT8: Final = 1
FORMAT_INT4: Final = 2
PART_GATE_UP_WEIGHT: Final = 0
PART_GATE_UP_SCALE: Final = 1
PART_GATE_UP_ZERO: Final = 2
PART_DOWN_WEIGHT: Final = 3
PART_DOWN_SCALE: Final = 4
PART_DOWN_ZERO: Final = 5
PART_GATE_BIAS: Final = 6
PART_UP_BIAS: Final = 7
PART_DOWN_BIAS: Final = 8

def version() -> str: ...
def abi_version() -> int: ...
def isa_names() -> list[str]: ...
def isa_check(name: str) -> None: ...
def isa_default() -> str: ...
def isa_kernel(isa: str, format: int, rows: int) -> str: ...
def machine_json() -> str: ...

class Pool:
    def __init__(
        self,
        subpool_thread_count: Sequence[int],
        subpool_numa_map: Sequence[int] | None = None,
        bind_threads: bool = True,
        spin_ns: int = -1,
    ) -> None: ...
    @property
    def subpool_count(self) -> int: ...
    @property
    def thread_count(self) -> int: ...
    @property
    def warnings(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Moe:
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
        asymmetric: bool = False,
        strict: bool = False,
        swiglu_limit: SupportsFloat = 0.0,
        swiglu_alpha: SupportsFloat = 0.0,
        isa: str | None = None,
        gpu_experts_mask_ptr: int = 0,
        layer_index: int = 0,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def closed(self) -> bool: ...
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
    ) -> None: ...
    def part_bytes(self, part: int) -> int: ...
    def export_part(self, expert: int, part: int, ptr: int, bytes: int) -> None: ...
    def import_part(self, expert: int, part: int, ptr: int, bytes: int) -> None: ...
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
    ) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Queue:
    def __init__(self, pool: Pool) -> None: ...
    @property
    def pending(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def submit(self, function: Callable[[], Any]) -> None: ...
    def submit_with_cuda_stream(self, stream: int | None, function: Callable[[], Any]) -> None: ...
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
    ) -> None: ...
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
    ) -> None: ...
    def sync(self, allow_n_pending: int = 0) -> None: ...
    def sync_with_cuda_stream(self, stream: int | None, allow_n_pending: int = 0) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
