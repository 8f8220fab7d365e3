"""Staging buffers between a model's tensors and the CPU experts."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch

from ktk.config import checked_int
from ktk.errors import KtkArgumentError

__all__ = [
    "BufferLifetimes",
    "BufferSet",
    "KExpertsCPUBuffer",
    "on_stream",
    "stream_address",
    "to_device",
    "to_host",
]


class _Lists(NamedTuple):
    inputs: list[torch.Tensor]
    immediate_ids: list[torch.Tensor]
    deferred_ids: list[torch.Tensor]
    weights: list[torch.Tensor]
    outputs: list[torch.Tensor]
    batch_size: list[torch.Tensor]
    device_outputs: list[torch.Tensor]


class BufferSet(_Lists):
    """Seven lists of tensors, one tensor a slot in each, and who is using which slot.

    Attributes
    ----------
    inputs, immediate_ids, deferred_ids, weights, outputs, batch_size, device_outputs : list of torch.Tensor
        As `KExpertsCPUBuffer.get_buffer` describes them.
    deferred_by : list
        For each slot, the layer whose deferred experts write its output and have not been added up yet, or
        None.
    submitted_by : list
        For each slot, the layer that submitted work into it and has not fetched the result, or None.
    """

    deferred_by: list[object]
    submitted_by: list[object]

    def __new__(cls, *lists: list[torch.Tensor]) -> BufferSet:
        """Make a set whose slots are all free."""
        self = super().__new__(cls, *lists)
        self.deferred_by = [None] * len(self.inputs)
        self.submitted_by = [None] * len(self.inputs)
        return self


_Key = tuple[Hashable, ...]


class KExpertsCPUBuffer:
    """Cache of staging buffers, shared by all layers whose tensors have the same shapes.

    A set is found by everything that shapes it: batch size, hidden size, experts per token, dtype, device. A
    batch size in `capture_bs` keeps its set until `clear_buffer_cache`, at stable addresses, so that CUDA
    graphs captured over it can be replayed. For any other batch size there is one temporary set, replaced
    when another such batch size comes. State is held by the class and is not synchronised between threads.

    Attributes
    ----------
    capture_bs : list of int
        Batch sizes whose buffers are kept.
    capture_buffers : dict
        The kept sets. Keys are tuples that start with the batch size.
    temp_bs : int
        Batch size of the latest temporary set, 0 if there is none.
    temp_buffer : tuple
        The latest temporary set, empty if there is none.
    buffer_depth : int
        Slots in each list. Two, so that deferred work can write the next layer's output while this one is
        read.
    """

    capture_bs: ClassVar[list[int]] = []
    capture_buffers: ClassVar[dict[_Key, BufferSet]] = {}
    temp_bs: ClassVar[int] = 0
    temp_buffer: ClassVar[BufferSet | tuple[()]] = ()
    buffer_depth: ClassVar[int] = 2

    # One temporary set for each shape apart from the batch size: models of different shapes that take turns
    # would otherwise throw each other's buffers away on every layer.
    _temporary: ClassVar[dict[_Key, tuple[int, BufferSet]]] = {}

    @classmethod
    def get_buffer(
        cls,
        hidden_states: torch.Tensor,
        num_experts_per_tok: int,
        *,
        owner: Hashable = None,
        transfer_dtype: torch.dtype = torch.bfloat16,
    ) -> BufferSet:
        """Find or make the buffers for a batch.

        Parameters
        ----------
        hidden_states : torch.Tensor
            ``[B, H]``; its shape, dtype and device are used, never its values.
        num_experts_per_tok : int
            k.
        owner : hashable, optional
            Callers with different owners never share a set.
        transfer_dtype : torch.dtype, default torch.bfloat16
            Dtype of the input and output buffers on the host.

        Returns
        -------
        BufferSet
            A tuple of seven lists, each `buffer_depth` long: input ``[B, H]`` in `transfer_dtype`; immediate
            expert ids int64 ``[B, k]``; deferred expert ids int64 ``[B, k]``, filled with -1; weights float32
            ``[B, k]``; output ``[B, H]`` in `transfer_dtype`; batch size int32 ``[1]``, filled with B; output
            ``[B, H]`` with the dtype and on the device of `hidden_states`. All but the last are on the host,
            in pinned memory where CUDA is available.

        Raises
        ------
        KtkArgumentError
            If `hidden_states` is not two-dimensional or `num_experts_per_tok` not positive.
        TypeError
            If `hidden_states` is not a tensor.
        """
        if not isinstance(hidden_states, torch.Tensor):
            raise TypeError(f"hidden_states must be a torch.Tensor, got {type(hidden_states).__name__}")
        if hidden_states.dim() != 2:
            raise KtkArgumentError(
                f"hidden_states must have the shape [B, H], got {list(hidden_states.shape)}"
            )
        top_k = checked_int("num_experts_per_tok", num_experts_per_tok, 1)
        batch, hidden = hidden_states.shape
        shape: _Key = (hidden, top_k, hidden_states.dtype, hidden_states.device, transfer_dtype, owner)
        key: _Key = (batch, *shape)
        captured = cls.capture_buffers.get(key)
        if captured is not None:
            return captured
        if batch in cls.capture_bs:
            captured = cls._allocate(hidden_states, top_k, transfer_dtype)
            cls.capture_buffers[key] = captured
            return captured
        bs, buffers = cls._temporary.get(shape, (-1, None))
        if buffers is None or bs != batch:
            # The old set goes before the new one is made, so that the cache never holds both.
            if buffers is not None and cls.temp_buffer is buffers:
                cls.temp_bs, cls.temp_buffer = 0, ()
            cls._temporary.pop(shape, None)
            buffers = None
            buffers = cls._allocate(hidden_states, top_k, transfer_dtype)
            cls._temporary[shape] = (batch, buffers)
        cls.temp_bs, cls.temp_buffer = batch, buffers
        return buffers

    @classmethod
    def _allocate(cls, hidden_states: torch.Tensor, top_k: int, transfer_dtype: torch.dtype) -> BufferSet:
        batch, hidden = hidden_states.shape
        pinned = torch.cuda.is_available()

        def host(shape: tuple[int, ...], dtype: torch.dtype, value: int = 0) -> list[torch.Tensor]:
            return [
                torch.full(shape, value, dtype=dtype, device="cpu", pin_memory=pinned)
                for _ in range(cls.buffer_depth)
            ]

        return BufferSet(
            host((batch, hidden), transfer_dtype),
            host((batch, top_k), torch.int64),
            host((batch, top_k), torch.int64, -1),
            host((batch, top_k), torch.float32),
            host((batch, hidden), transfer_dtype),
            host((1,), torch.int32, batch),
            [
                torch.zeros((batch, hidden), dtype=hidden_states.dtype, device=hidden_states.device)
                for _ in range(cls.buffer_depth)
            ],
        )

    @classmethod
    def set_capture_batch_sizes(cls, capture_bs: Iterable[int]) -> None:
        """Name the batch sizes whose buffers are kept.

        Parameters
        ----------
        capture_bs : iterable of int
            Replaces the list so far. Sets kept for other sizes stay, because graphs may point into them.

        Raises
        ------
        KtkArgumentError
            If a size is negative.
        """
        cls.capture_bs = [checked_int("capture batch size", size, 0) for size in capture_bs]

    @classmethod
    def get_capture_batch_sizes(cls) -> list[int]:
        """Batch sizes whose buffers are kept, in the order they were given."""
        return list(cls.capture_bs)

    @classmethod
    def clear_buffer_cache(cls) -> None:
        """Drop all kept and temporary sets. Layers hold on to those that a CUDA graph captured over them."""
        cls.capture_buffers = {}
        cls._temporary = {}
        cls.temp_bs, cls.temp_buffer = 0, ()


class BufferLifetimes:
    """Keeps the buffer sets of one layer alive for as long as the device or the task queue may touch them.

    The cache drops a temporary set when another batch size comes, while tasks that read it may still wait in
    a queue, or copies from it on a stream. A graph reads the sets it was captured over for as long as it
    exists.
    """

    def __init__(self) -> None:
        self._queued: deque[BufferSet] = deque()
        self._streamed: deque[tuple[BufferSet, torch.cuda.Event]] = deque()
        self._captured: dict[int, BufferSet] = {}

    def hold_for_task(self, buffers: BufferSet, pending: int) -> None:
        """Keep `buffers` until the task just queued has run; `pending` tasks of the queue are unfinished.

        Tasks run in order, so of the sets held only the last `pending` can still be in use.
        """
        self._queued.append(buffers)
        while len(self._queued) > pending:
            self._queued.popleft()

    def hold_for_stream(self, buffers: BufferSet, pending: int) -> None:
        """Keep `buffers` until the current stream has got here, or for good if it is being captured."""
        if torch.cuda.is_current_stream_capturing():
            self._captured[id(buffers)] = buffers
            return
        event = torch.cuda.Event()
        event.record()
        if self._streamed and self._streamed[-1][0] is buffers:
            self._streamed.pop()
        self._streamed.append((buffers, event))
        # Deferred work outlives the event of its own layer, but not a moment at which nothing is pending.
        while len(self._streamed) > 1 and pending == 0 and self._streamed[0][1].query():
            self._streamed.popleft()


def stream_address(stream: Any, device: torch.device) -> int:
    """`stream` as a ``cudaStream_t``: an int, a `torch.cuda.Stream`, or None for the current one."""
    if stream is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return checked_int("cuda_stream", getattr(stream, "cuda_stream", stream), 0, 2**64 - 1)


def to_host(source: torch.Tensor, target: torch.Tensor) -> None:
    # The device converts before the copy: a copy that also converts is not asynchronous.
    target.copy_(source.to(target.dtype), non_blocking=True)


def to_device(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.dtype == target.dtype:
        target.copy_(source, non_blocking=True)
    else:
        target.copy_(source.to(target.device, non_blocking=True))


@contextlib.contextmanager
def on_stream(stream: int, device: torch.device) -> Iterator[None]:
    """Make `stream` current for copies on a CUDA device; do nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        if stream == torch.cuda.current_stream(device).cuda_stream:
            yield
            return
        chosen = (
            torch.cuda.ExternalStream(stream, device=device) if stream else torch.cuda.default_stream(device)
        )
        with torch.cuda.stream(chosen):
            yield
