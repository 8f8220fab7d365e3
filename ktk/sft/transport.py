"""Bytes between rank 0 and the others, and news of failures among them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ktk.sft.errors import KTAMXDistributedError

__all__ = ["FailureBoard", "Transport", "average_gradients", "failure_guard", "is_distributed", "world"]

_POLL_S = 0.5


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world() -> tuple[int, int]:
    """This rank and the number of ranks; 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all ranks; a gradient that is None counts as zero."""
    if not is_distributed():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(dist.get_world_size())


class FailureBoard:
    """Where a rank writes that it failed, and all ranks look: a key-value store that rank 0 serves."""

    _KEY = "failure"

    def __init__(self) -> None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        rank, port = dist.get_rank(), [0]
        self._store: Any = None
        if rank == 0:
            self._store = TCPStore(host, 0, None, True, wait_for_workers=False)
            port[0] = self._store.port
        dist.broadcast_object_list(port, src=0)
        if rank != 0:
            self._store = TCPStore(host, port[0], None, False)

    def post(self, text: str) -> None:
        """Write a failure."""
        self._store.set(self._KEY, text)

    def read(self) -> str | None:
        """The last failure that was written, or that the store is gone, and rank 0 with it; or None."""
        try:
            return self._store.get(self._KEY).decode() if self._store.check([self._KEY]) else None
        except dist.DistError as error:
            return f"rank 0 is gone ({error})"


_boards: list[FailureBoard] = []


@contextmanager
def failure_guard() -> Iterator[None]:
    """Tell the other ranks when the block fails; they raise at their next exchange, or in the one they wait
    in.

    Raises
    ------
    BaseException
        What the block raised.
    """
    try:
        yield
    except BaseException as error:
        if is_distributed() and not isinstance(error, KTAMXDistributedError):
            for board in _boards[-1:]:
                board.post(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        raise


class Transport:
    """Moves bytes between rank 0 and the others. Replace it to place experts otherwise.

    Parameters
    ----------
    timeout_s : float, default 1800
        Longest wait for a rank that says nothing.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # A group of its own: exchanges must not get between the collectives of DDP or FSDP.
        self._group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        self._timeout_s = timeout_s
        self._board = FailureBoard()
        _boards[:] = [self._board]
        backend = dist.get_backend(self._group)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
        )

    def _wait(self, works: Sequence[Any]) -> None:
        """Wait for all, looking every half second whether some rank has failed meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        pause, next_look = 1e-5, time.monotonic() + _POLL_S
        for work in works:
            while not work.is_completed():
                now = time.monotonic()
                if now >= next_look:
                    next_look = now + _POLL_S
                    if (failure := self._board.read()) is not None:
                        raise KTAMXDistributedError(f"another rank failed: {failure}")
                    if now > deadline:
                        raise KTAMXDistributedError(
                            f"rank {self.rank} waited {self._timeout_s:.0f} s for another rank at the experts"
                        )
                time.sleep(pause)
                pause = min(pause * 1.5, 1e-3)
            try:
                work.wait()
            except RuntimeError as error:
                failure = self._board.read() or str(error)
                raise KTAMXDistributedError(
                    f"rank {self.rank} lost another rank at the experts: {failure}"
                ) from error

    def all_gather(self, header: torch.Tensor) -> torch.Tensor:
        """Header ``[n]`` of every rank, int64 ``[world_size, n]`` on the CPU."""
        mine = header.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        self._wait([dist.all_gather(parts, mine, group=self._group, async_op=True)])
        return torch.stack(parts).cpu()

    def all_gather_text(self, text: str) -> list[str]:
        """A text of every rank."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, text, group=self._group)
        return [str(part) for part in parts]

    def to_rank_zero(self, payload: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send uint8 `payload` to rank 0; there, the payload of every rank, whose sizes are `sizes`."""
        nothing = [0] * self.world_size
        sent = [payload.numel(), *nothing[1:]]
        received = self._exchange(payload, sent, list(sizes) if self.rank == 0 else nothing)
        return list(received.split(list(sizes))) if self.rank == 0 else []

    def from_rank_zero(self, payloads: Sequence[torch.Tensor] | None, size: int) -> torch.Tensor:
        """On rank 0, send each rank its payload; returns this rank's, of `size` bytes."""
        nothing = [0] * self.world_size
        if payloads is None:
            data, sent = torch.empty(0, dtype=torch.uint8), nothing
        else:
            data, sent = torch.cat(list(payloads)), [payload.numel() for payload in payloads]
        return self._exchange(data, sent, [size, *nothing[1:]])

    def _exchange(self, data: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        # One collective with sizes for each rank, and not sends and receives: under gloo only collectives can
        # be watched while they wait.
        mine = data.to(self.device).contiguous()
        result = torch.empty(sum(received), dtype=torch.uint8, device=self.device)
        self._wait([dist.all_to_all_single(result, mine, received, sent, group=self._group, async_op=True)])
        return result
