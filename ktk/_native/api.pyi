"""What both bindings export, and the only place where it is described. `ktk._native` has the same names.

Pointers are addresses as integers (`data_ptr()` of a tensor). The memory behind them belongs to the caller
and must be contiguous, of the size that the shapes say, and aligned to its type. Calls release the GIL while
they work.

Every call may raise `TypeError` for an argument of the wrong type, `KtkArgumentError` for a wrong value, and,
on a closed object, `KtkStateError`. Objects close when they are collected, at the end of a `with` block, or
by `close`, which may be called again.
"""

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, SupportsFloat

from typing_extensions import Self

DTYPE_F32: Final = 0
DTYPE_BF16: Final = 1
DTYPE_F16: Final = 2
DTYPE_F8_E4M3: Final = 3
FORMAT_BF16: Final = 0
FORMAT_INT8: Final = 1
FORMAT_INT4: Final = 2
FORMAT_FP8: Final = 3
PART_GATE_UP_WEIGHT: Final = 0
PART_GATE_UP_SCALE: Final = 1
PART_GATE_UP_FACTORS: Final = 2
PART_DOWN_WEIGHT: Final = 3
PART_DOWN_SCALE: Final = 4
PART_DOWN_FACTORS: Final = 5
PART_GATE_BIAS: Final = 6
PART_UP_BIAS: Final = 7
PART_DOWN_BIAS: Final = 8
PROBE_PRODUCT: Final = 0
PROBE_READ: Final = 1
PROBE_COPY: Final = 2
POLICY_NONE: Final = 0
POLICY_SAVE: Final = 1
POLICY_RECOMPUTE: Final = 2

def version() -> str:
    """Version of the library."""

def abi_version() -> int:
    """Version of the C ABI, `KTK_ABI_VERSION`."""

def isa_names() -> list[str]:
    """Instruction sets that the library was built for, best first; emulated ones come last."""

def isa_check(name: str) -> None:
    """Returns if this CPU can run an instruction set; else `KtkUnsupportedError` names what is missing."""

def isa_default() -> str:
    """Instruction set of layers that name none: KTK_ISA if it is set, else the best runnable one.

    Raises `KtkUnsupportedError` if KTK_ISA names one that cannot run here.
    """

def isa_kernel(isa: str, format: int, rows: int) -> str:
    """Name of the kernel for an expert with `rows` tokens, for weights of FORMAT_`format`."""

def machine_json() -> str:
    """JSON object: CPU model, NUMA nodes and their usable CPUs, affinity, huge pages, CUDA run time."""

def set_num_threads(num_threads: int) -> None:
    """Most threads of each pool of the process that take part in its work; 0 lifts the limit."""

def get_num_threads() -> int:
    """The limit; without one, the usable CPUs or the threads of the largest pool, whichever is more."""

class Pool:
    """Worker threads in subpools, each on one NUMA node.

    Parameters
    ----------
    subpool_thread_count : sequence of int
        Threads of each subpool, at least 1.
    subpool_numa_map : sequence of int, optional
        NUMA node of each subpool; default: the first nodes with usable CPUs.
    bind_threads : bool
        Binds each thread to one CPU where the node has enough of them.
    spin_ns : int
        Nanoseconds of active waiting before an idle thread sleeps; negative: the library's default.
    """

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
    def thread_count(self) -> int:
        """Threads of all subpools, the caller's included."""
    @property
    def warnings(self) -> str:
        """What creation had to give up, one line each; empty if nothing."""
    @property
    def closed(self) -> bool: ...
    def close(self) -> None:
        """Ends the threads. Raises `KtkStateError` while a layer or queue of the pool is open."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Moe:
    """The experts of one layer, packed for one instruction set; it keeps its pool alive.

    Parameters
    ----------
    pool : Pool
        Runs the layer and says how it is split.
    num_experts, top_k, hidden_size, intermediate_size, max_tokens : int
        E, most experts a token, H, I, and most tokens in one forward.
    format : int
        A FORMAT_ constant.
    group_size : int
        INT8, INT4: groups of 32, 64 or 128 input columns, INT8 also of 256 or 512, or 0 for one scale a row
        and no groups. FP8: 128. Else 0.
    strict : bool
        One family of kernels, so that results do not depend on the batch size.
    swiglu_limit, swiglu_alpha : float
        Clamp and slope of the activation; 0: none.
    isa : str, optional
        Instruction set; default: `isa_default()`.
    gpu_experts_mask_ptr : int
        uint8 or bool [E], read at each forward and kept by the caller while the layer lives: non-zero
        experts contribute nothing. 0: none.
    layer_index : int
        For messages and traces.
    rotated : bool
        INT8, INT4: columns are rotated before they are quantised.
    """

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
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights, all experts."""
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
        gate_scale_ptr: int = 0,
        up_scale_ptr: int = 0,
        down_scale_ptr: int = 0,
    ) -> None:
        """Quantises and packs one expert: gate and up [I, H], down [H, I]; biases float32, 0: none.

        DTYPE_F8_E4M3 is for FORMAT_FP8: weights as they are, with float32 scales of blocks of 128 by 128,
        [ceil(I / 128), ceil(H / 128)] and [ceil(H / 128), ceil(I / 128)]; other dtypes have none, 0.

        Raises `KtkArgumentError` if a weight is not finite; the expert then counts as not loaded.
        """
    def part_bytes(self, part: int) -> int:
        """Size of one PART_ of one packed expert; 0 where the format has no such part."""
    def export_part(self, expert: int, part: int, ptr: int, bytes: int) -> None:
        """Copies a packed part to `ptr`; `bytes` must be `part_bytes(part)`."""
    def import_part(self, expert: int, part: int, ptr: int, bytes: int) -> None:
        """Copies a packed part from `ptr`. Raises `KtkArgumentError` if a scale or bias is not finite."""
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
        """Runs one batch: int32 [1], int64 and float32 [B, top_k], input and output [B, H].

        `incremental` adds to the output. Raises `KtkStateError` if a routed expert is not loaded.
        """
    def unpack_expert(self, expert: int, gate_ptr: int = 0, up_ptr: int = 0, down_ptr: int = 0) -> None:
        """Writes the dequantised weights of one expert: float32 [I, H], [I, H], [H, I]; 0: not wanted.

        Rotated columns are rotated back.
        """
    def close(self) -> None:
        """Waits until nothing of the layer is pending, then frees it."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Sft:
    """Adapters for a layer, and its way back; it keeps the layer alive.

    Parameters
    ----------
    moe : Moe
    lora_rank : int
        r, 0 to 256; 0: no adapters.
    lora_scale : float
        Factor of the adapters' products, alpha / r.
    lora_dropout : float
        Share of elements of the adapters' inputs that is dropped, at least 0 and below 1.
    skip_lora : bool
        Adapters are neither added nor differentiated.
    """

    def __init__(
        self,
        moe: Moe,
        *,
        lora_rank: int = 0,
        lora_scale: SupportsFloat = 1.0,
        lora_dropout: SupportsFloat = 0.0,
        skip_lora: bool = False,
    ) -> None: ...
    @property
    def closed(self) -> bool: ...
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
        """Adapters, float32 or bfloat16, kept by the caller: A [E, r, H], [E, r, H], [E, r, I], B [E, I, r],
        [E, I, r], [E, H, r]. Read in place by each forward and backward.
        """
    def close(self) -> None:
        """Its contexts can only be closed from then on."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class SftContext:
    """One forward and what its backward needs. Any number may be open, in any order.

    Parameters
    ----------
    sft : Sft
    policy : int
        POLICY_NONE: no backward follows; POLICY_SAVE: input, gate and up are kept; POLICY_RECOMPUTE: the
        forward runs again in the backward, and its input stays unchanged until then.
    dropout : bool
        Whether elements are dropped, by `seed`.
    seed : int
        Any int64.
    """

    def __init__(self, sft: Sft, policy: int, dropout: bool = False, seed: int = 0) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def num_tokens(self) -> int:
        """Tokens of the forward; `KtkStateError` before it."""
    @property
    def activation_bytes(self) -> int:
        """Bytes of input, gate and up that are kept; 0 after the backward."""
    @property
    def table_bytes(self) -> int:
        """Bytes of routing tables that are kept; 0 after the backward."""
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
        """As `Moe.forward`, with the adapters; once for each context. Input float32 or bfloat16."""
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
        """Gradients of a sum whose gradient by the output [B, H] is given; once for each context.

        Pointers of 0 are not computed: input [B, H], weights float32 [B, top_k], adapters in the shapes of
        `Sft.set_lora`, base weights [E, I, H], [E, I, H], [E, H, I] (FORMAT_BF16 only). `accumulate` adds to
        those of adapters and base weights. Raises `KtkStateError` if the policy or the context's past do not
        allow it.
        """
    def close(self) -> None:
        """Waits for its forward or backward, then frees what it keeps."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Queue:
    """A thread that runs tasks in the order of submission; it keeps its pool alive."""

    def __init__(self, pool: Pool) -> None: ...
    @property
    def pending(self) -> int:
        """Tasks submitted and not yet finished."""
    @property
    def closed(self) -> bool: ...
    def submit(self, function: Callable[[], Any]) -> None:
        """Calls `function` on the thread of the queue; what it raises is raised by `sync`."""
    def submit_with_cuda_stream(self, stream: int | None, function: Callable[[], Any]) -> None:
        """As `submit`, when `stream` gets there; capturable: the queue keeps the callable."""
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
        """Runs `moe.forward` later. A failure fills the output with NaN and is raised by `sync`."""
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
        """As `submit_forward`, when `stream` gets there; capturable in a CUDA graph."""
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
        """Runs `context.forward` later. A failure fills the output with NaN and is raised by `sync`."""
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
        """Runs `context.backward` later. A failure fills the gradients of input and weights with NaN and is
        raised by `sync`.
        """
    def sync(self, allow_n_pending: int = 0) -> None:
        """Waits until at most so many tasks are left, and raises the first failure since the last `sync`.

        That is the exception object of a callable; if a forward failed too, its error is the context.
        """
    def sync_with_cuda_stream(self, stream: int | None, allow_n_pending: int = 0) -> None:
        """Makes the stream wait; failures in that wait are raised by the next `sync`."""
    def close(self) -> None:
        """Runs what is pending, then ends the thread. A failure that nobody asked for is dropped."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Trace:
    """What the threads of all pools and queues do between creation and `stop`.

    Parameters
    ----------
    spans_per_thread : int
        Latest spans that each thread keeps, 40 bytes each; 0: the library's default.
    """

    def __init__(self, spans_per_thread: int = 0) -> None: ...
    @property
    def closed(self) -> bool: ...
    def stop(self) -> None:
        """Ends the recording; again: does nothing."""
    def json(self) -> str:
        """The stopped trace for Chrome's trace viewer or Perfetto; `KtkStateError` while it runs."""
    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes `json()` to a file, which appears when it is complete."""
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Probe:
    """What the machine can do at most on the threads of a pool; it keeps its pool alive.

    Parameters
    ----------
    pool : Pool
        Runs the probe.
    kind : int
        PROBE_PRODUCT: multiplications of a weight format, operands in registers. PROBE_READ: loads.
        PROBE_COPY: loads and stores.
    format : int
        PROBE_PRODUCT: a FORMAT_ constant. Else 0.
    bytes : int
        PROBE_READ and PROBE_COPY: memory to read, several times the last-level cache; rounded up to whole
        chunks of 2 MiB for each thread. PROBE_PRODUCT: 0.
    isa : str, optional
        Instruction set; default: `isa_default()`.
    """

    def __init__(
        self, pool: Pool, *, kind: int, format: int = 0, bytes: int = 0, isa: str | None = None
    ) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def variants(self) -> list[str]:
        """Names of the ways to do the work. The machine's rate is that of the fastest."""
    def run(self, variant: int, repeats: int = 1) -> tuple[float, float]:
        """Runs a variant on all threads; returns the work done and the seconds that it took.

        PROBE_PRODUCT: each thread makes `repeats` rounds of its loop, and work is in operations, a
        multiplication and an addition being two. Otherwise all memory is gone through `repeats` times, and
        work is in bytes read, or read plus written.
        """
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
