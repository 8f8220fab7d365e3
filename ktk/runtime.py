"""Threads and time: a worker pool over the NUMA nodes, and a queue of tasks that run on it in order."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from ktk import _native
from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CPUInfer",
    "ForwardTask",
    "WorkerPoolConfig",
    "default_threads",
    "get_num_threads",
    "runtime_info",
    "set_num_threads",
    "show_runtime",
]


def default_threads() -> int:
    """Threads of a pool for which nobody names a number.

    Returns
    -------
    int
        KTK_NUM_THREADS from the environment, if it is set; else the physical cores that this process may use,
        or fewer where a quota of the container is lower.

    Raises
    ------
    KtkArgumentError
        If KTK_NUM_THREADS is no number, or less than 1.
    """
    wanted = os.environ.get("KTK_NUM_THREADS", "").strip()
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise KtkArgumentError(f"KTK_NUM_THREADS must be a number of at least 1, got {wanted!r}")
        return int(wanted)
    machine = json.loads(_native.machine_json())
    threads: int = sum(node["physical_cores"] for node in machine["nodes"])
    if machine["cpu_quota"]:
        threads = min(threads, math.ceil(machine["cpu_quota"]))
    return max(threads, 1)


def set_num_threads(num_threads: int | None) -> None:
    """Limit the threads of each pool of this process that work at a time.

    It holds for existing pools, from their next parallel section on, and for those made later; the threads
    beyond the limit sleep. A pool never has more threads than it was made with. Over several NUMA nodes the
    threads are spread in proportion, at least one on each; with fewer threads than subpools, the calling
    thread works alone. Results are the same bits whatever the number.

    Parameters
    ----------
    num_threads : int or None
        At least 1. None lifts the limit; so does a number that is not below what `get_num_threads` returns
        without a limit.

    Raises
    ------
    KtkArgumentError
        If `num_threads` is less than 1.
    TypeError
        If it is no int.
    """
    if num_threads is None:
        _native.set_num_threads(0)
        return
    if not isinstance(num_threads, bool) and isinstance(num_threads, int) and num_threads < 1:
        raise KtkArgumentError(f"num_threads must be at least 1, or None for no limit, got {num_threads}")
    _native.set_num_threads(num_threads)


def get_num_threads() -> int:
    """Most threads of a pool that may work at a time.

    Returns
    -------
    int
        What `set_num_threads` set. Without a limit: the usable CPUs, or the threads of the largest pool made
        so far, whichever is more.
    """
    return _native.get_num_threads()


@dataclass
class WorkerPoolConfig:
    """Threads of a worker pool: how many, and on which NUMA nodes.

    Fields may be set one after the other; they are checked where the configuration is used.

    Parameters
    ----------
    subpool_count : int, default 1
        Number of subpools. A layer is split over them along its intermediate size.
    subpool_numa_map : sequence of int, optional
        NUMA node of each subpool; default: the first nodes that have usable CPUs.
    subpool_thread_count : sequence of int, optional
        Threads of each subpool, each at least 1; default: 1 each.
    bind_threads : bool, default True
        Binds each thread to one CPU of its node, where the node has enough of them.
    spin_ns : int, optional
        Nanoseconds that an idle thread waits actively before it sleeps; default: the library's choice.
    """

    subpool_count: int = 1
    subpool_numa_map: Sequence[int] = field(default_factory=list)
    subpool_thread_count: Sequence[int] = field(default_factory=list)
    bind_threads: bool = True
    spin_ns: int | None = None

    @classmethod
    def from_threads(cls, threads: int) -> WorkerPoolConfig:
        """One subpool on each NUMA node with usable CPUs, and `threads` split over them.

        The split is as even as possible; the first nodes take the remainder. With fewer threads than nodes,
        only the first nodes get a subpool.

        Parameters
        ----------
        threads : int
            Threads in all, at least 1.

        Returns
        -------
        WorkerPoolConfig

        Raises
        ------
        KtkArgumentError
            If `threads` is less than 1.
        TypeError
            If it is no int.
        """
        if isinstance(threads, bool) or not isinstance(threads, int):
            raise TypeError(f"threads must be an int, got {type(threads).__name__}")
        if threads < 1:
            raise KtkArgumentError(f"threads must be at least 1, got {threads}")
        nodes = nodes_with_cpus()[:threads]
        share, remainder = divmod(threads, len(nodes))
        return cls(
            subpool_count=len(nodes),
            subpool_numa_map=nodes,
            subpool_thread_count=[share + (index < remainder) for index in range(len(nodes))],
        )

    def make_pool(self) -> _native.Pool:
        """Starts the threads.

        Returns
        -------
        ktk._native.Pool

        Raises
        ------
        KtkArgumentError
            If the lists do not have `subpool_count` elements, a thread count is less than 1, or a node does
            not exist; the message names the nodes that do.
        """
        count = self.subpool_count
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"subpool_count must be an int, got {type(count).__name__}")
        if count < 1:
            raise KtkArgumentError(f"subpool_count must be at least 1, got {count}")
        nodes = _one_each("subpool_numa_map", self.subpool_numa_map, count) or None
        threads = _one_each("subpool_thread_count", self.subpool_thread_count, count) or [1] * count
        return _native.Pool(threads, nodes, self.bind_threads, -1 if self.spin_ns is None else self.spin_ns)


def _one_each(name: str, values: Sequence[int], count: int) -> list[int]:
    chosen = list(values)
    if chosen and len(chosen) != count:
        raise KtkArgumentError(f"{name} has {len(chosen)} elements; subpool_count = {count} needs {count}")
    return chosen


def nodes_with_cpus() -> list[int]:
    """NUMA nodes with CPUs that the process may use, in order; [0] where none is known."""
    nodes = json.loads(_native.machine_json())["nodes"]
    return [node["id"] for node in nodes if node["cpus_allowed"]] or [0]


@dataclass(frozen=True)
class ForwardTask:
    """One batch through one layer, for `CPUInfer.submit`.

    Pointers are addresses (`data_ptr()`). The memory behind them belongs to the caller; it is read and
    written when the task runs, and again each time a CUDA graph that captured the task is replayed.

    Parameters
    ----------
    moe : ktk._native.Moe
        The layer.
    num_tokens_ptr : int
        int32 [1], the number of tokens in the batch, read when the task runs.
    top_k : int
        Columns of the expert ids and weights.
    expert_ids_ptr : int
        int64 [num_tokens, top_k]; ids outside the layer contribute nothing.
    expert_weights_ptr : int
        float32 [num_tokens, top_k].
    input_ptr : int
        [num_tokens, hidden_size] in `input_dtype`.
    input_dtype : int
        `ktk._native.DTYPE_F32`, `DTYPE_BF16` or `DTYPE_F16`.
    output_ptr : int
        [num_tokens, hidden_size] in `output_dtype`.
    output_dtype : int
        As `input_dtype`.
    incremental : bool, default False
        Adds to what the output holds.
    """

    moe: _native.Moe
    num_tokens_ptr: int
    top_k: int
    expert_ids_ptr: int
    expert_weights_ptr: int
    input_ptr: int
    input_dtype: int
    output_ptr: int
    output_dtype: int
    incremental: bool = False

    def _arguments(self) -> tuple[Any, ...]:
        return (
            self.moe,
            self.num_tokens_ptr,
            self.top_k,
            self.expert_ids_ptr,
            self.expert_weights_ptr,
            self.input_ptr,
            self.input_dtype,
            self.output_ptr,
            self.output_dtype,
            self.incremental,
        )


Task = ForwardTask | Callable[[], Any] | tuple[Any, ...]


def _as_function(task: Callable[[], Any] | tuple[Any, ...]) -> Callable[[], Any]:
    if not isinstance(task, tuple):
        return task
    if len(task) != 2 or not callable(task[0]) or not isinstance(task[1], tuple):
        raise TypeError("a task given as a tuple must be (function, tuple of arguments)")
    return functools.partial(task[0], *task[1])


class CPUInfer:
    """A worker pool, and a thread that runs tasks on it in the order of submission.

    Threads that are idle sleep. The threads stop when this object and every layer on its pool are gone, or
    with `close`, or at the end of a `with` block.

    Parameters
    ----------
    config : int or WorkerPoolConfig, optional
        An int is a number of threads, split evenly over the NUMA nodes that have usable CPUs (see
        `WorkerPoolConfig.from_threads`). The thread that calls a layer directly takes part as one of them.
        Default: `default_threads()`, which is KTK_NUM_THREADS or the physical cores.

    Raises
    ------
    KtkArgumentError
        If a number of threads is less than 1, or a NUMA node does not exist.
    KtkSystemError
        If the system grants no more threads.

    Warns
    -----
    RuntimeWarning
        Once, if there are more threads than CPUs or threads cannot be bound; everything works, but slower.

    Examples
    --------
    >>> with CPUInfer(2) as cpu:
    ...     cpu.submit(lambda: None)
    ...     cpu.sync()
    """

    def __init__(self, config: int | WorkerPoolConfig | None = None) -> None:
        self._pool: _native.Pool | None = None
        self._queue: _native.Queue | None = None
        if not isinstance(config, WorkerPoolConfig):
            config = WorkerPoolConfig.from_threads(default_threads() if config is None else config)
        pool = config.make_pool()
        if pool.warnings:
            warnings.warn(pool.warnings.strip().replace("\n", "; "), RuntimeWarning, stacklevel=2)
        self._queue = _native.Queue(pool)
        self._pool = pool

    @property
    def native_pool(self) -> _native.Pool:
        """The worker pool, for layers to be made on. Raises `KtkStateError` when closed."""
        if self._pool is None:
            raise KtkStateError("this CPUInfer is closed; make a new one")
        return self._pool

    @property
    def native_queue(self) -> _native.Queue:
        """The task queue. Raises `KtkStateError` when closed."""
        if self._queue is None:
            raise KtkStateError("this CPUInfer is closed; make a new one")
        return self._queue

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._queue is None

    def submit(self, task: Task) -> None:
        """Puts a task at the end of the queue and returns at once.

        Parameters
        ----------
        task : ForwardTask, callable, or tuple
            A callable runs without arguments on the thread of the queue; a tuple is `(function, arguments)`
            with the arguments as a tuple. What it returns is dropped; what it raises is raised by `sync`.

        Raises
        ------
        TypeError
            If the task is of another kind.
        KtkArgumentError
            If a pointer of a forward is null or misaligned, or a size is out of the layer's limits.
        KtkStateError
            If this object or the layer is closed.
        """
        queue = self.native_queue
        if isinstance(task, ForwardTask):
            queue.submit_forward(*task._arguments())
        else:
            queue.submit(_as_function(task))

    def sync(self, allow_n_pending: int = 0) -> None:
        """Waits until at most `allow_n_pending` tasks are left.

        Parameters
        ----------
        allow_n_pending : int, default 0
            Tasks that may still be waiting or running.

        Raises
        ------
        Exception
            The first failure since the last `sync`: the exception object that a callable raised, or a
            `KtkError` of a forward, whose output is filled with NaN.
        """
        self.native_queue.sync(allow_n_pending)

    def submit_with_cuda_stream(self, stream: int | None, task: Task) -> None:
        """Like `submit`, when the work that is now in a CUDA stream is done.

        May be captured in a CUDA graph. Callables are kept until this object closes, since a graph may replay
        them: pass one object again rather than a new one each time.

        Parameters
        ----------
        stream : int or None
            A `cudaStream_t`, as `torch.cuda.Stream.cuda_stream` gives it. None or 0 is the default stream, or
            the order of the host where no CUDA run time is loaded.
        task : ForwardTask, callable, or tuple
            As for `submit`.

        Raises
        ------
        KtkSystemError
            If the CUDA run time refuses, or is not there and `stream` is not 0.
        """
        queue = self.native_queue
        if isinstance(task, ForwardTask):
            queue.submit_forward_with_cuda_stream(stream, *task._arguments())
        else:
            queue.submit_with_cuda_stream(stream, _as_function(task))

    def sync_with_cuda_stream(self, stream: int | None, allow_n_pending: int = 0) -> None:
        """Makes a CUDA stream wait until at most `allow_n_pending` tasks are left; the host goes on.

        A failure of a task in that wait is raised by the next `sync`. Without a CUDA run time this is `sync`.

        Parameters
        ----------
        stream : int or None
            As for `submit_with_cuda_stream`.
        allow_n_pending : int, default 0
            As for `sync`.
        """
        self.native_queue.sync_with_cuda_stream(stream, allow_n_pending)

    def close(self) -> None:
        """Runs what is pending, raises its first failure if there is one, and ends the queue.

        The worker threads end too, or with the last layer that uses them. Closing again does nothing.
        """
        queue, self._queue = self._queue, None
        if queue is None:
            return
        try:
            queue.sync()
        finally:
            queue.close()
            self._pool = None

    def __enter__(self) -> Self:
        self.native_queue  # noqa: B018 - raises when closed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._pool is None or self._queue is None:
            return "<CPUInfer: closed>"
        pool = self._pool
        return f"<CPUInfer: {pool.thread_count} threads in {pool.subpool_count} subpools>"


FORMAT_NAMES = {
    "bf16": _native.FORMAT_BF16,
    "int8": _native.FORMAT_INT8,
    "int4": _native.FORMAT_INT4,
    "fp8": _native.FORMAT_FP8,
}
SHOWN_ROWS = (1, 8, 64)
"""Tokens per expert for which `runtime_info` names the kernels: decoding, a small batch, prefill."""


def runtime_info() -> dict[str, Any]:
    """What the library was built for, what this machine can run, and what would be chosen.

    Returns
    -------
    dict
        `version`, `binding`, `library` (path), `abi_version`, `default_isa` (None if KTK_ISA names one that
        cannot run here; then `default_isa_reason` says why), `isas` (name to `runnable`, `reason` and
        `kernels`, which maps each format to the kernel for each number of rows), and `machine` (CPU, NUMA
        nodes, huge pages, CUDA).
    """
    isas: dict[str, Any] = {}
    for name in _native.isa_names():
        try:
            _native.isa_check(name)
        except KtkUnsupportedError as error:
            isas[name] = {"runnable": False, "reason": str(error), "kernels": {}}
            continue
        kernels = {
            format_name: {rows: _native.isa_kernel(name, code, rows) for rows in SHOWN_ROWS}
            for format_name, code in FORMAT_NAMES.items()
        }
        isas[name] = {"runnable": True, "reason": "", "kernels": kernels}
    info: dict[str, Any] = {
        "version": _native.version(),
        "binding": _native.binding,
        "library": str(_native.library_path),
        "abi_version": _native.abi_version(),
        "default_isa": None,
        "default_isa_reason": "",
        "isas": isas,
        "machine": json.loads(_native.machine_json()),
    }
    try:
        info["default_isa"] = _native.isa_default()
    except KtkUnsupportedError as error:
        info["default_isa_reason"] = str(error)
    return info


def show_runtime(file: TextIO | None = None) -> None:
    """Writes `runtime_info` as text.

    Parameters
    ----------
    file : text file, optional
        Where to write; default: standard output.
    """
    info = runtime_info()
    machine = info["machine"]
    lines = [
        f"ktk {info['version']}, {info['binding']} binding of {info['library']} (ABI {info['abi_version']})",
        f"CPU: {machine['cpu_model']}, {len(machine['cpus_allowed'])} usable CPUs",
        f"instruction set: {info['default_isa'] or info['default_isa_reason']}",
    ]
    for name, isa in info["isas"].items():
        if not isa["runnable"]:
            lines.append(f"  {name}: {isa['reason']}")
            continue
        lines.append(f"  {name}:")
        for format_name, kernels in isa["kernels"].items():
            chosen = ", ".join(f"{rows} rows {kernel}" for rows, kernel in kernels.items())
            lines.append(f"    {format_name}: {chosen}")
    (sys.stdout if file is None else file).write("\n".join(lines) + "\n")
