"""Bytes between rank 0 and the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from ktk.sft.errors import KTAMXDistributedError
from ktk.sft.failure import POLL_S, FailureBoard, current_board, is_distributed, make_current

__all__ = ["Transport", "average_gradients", "is_distributed", "world"]

_CPU = torch.device("cpu")


def world() -> tuple[int, int]:
    """This rank and the number of ranks; 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all ranks; a gradient that is None counts as zero."""
    if not is_distributed():
        return
    board = current_board()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        # NCCL cannot reduce what is in CPU memory, where adapters of experts are.
        group = board.group if board is not None and parameter.grad.device == _CPU else None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(dist.get_world_size())


class Transport:
    """Moves bytes between rank 0 and the others. Replace it to place experts otherwise.

    What the ranks tell each other goes over gloo, which can be watched, and which notices when a rank is
    gone. Tensors on GPUs go over NCCL if the process group has it, and only when every rank is known to be
    there: a collective of NCCL that lacks a rank waits on the GPU, and can only be aborted. All ranks must
    make one at the same time.

    Parameters
    ----------
    timeout_s : float, default 1800
        Longest wait for a rank that says nothing.
    bulk : {"nccl", "gloo"}, optional
        Backend of a second group for tensors: on GPUs with NCCL, on the CPU with gloo. Default: NCCL if the
        default process group has it, else none.
    """

    def __init__(self, timeout_s: float = 1800.0, bulk: Literal["nccl", "gloo"] | None = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if bulk is None and torch.cuda.is_available() and "cuda:nccl" in dist.get_backend_config():
            bulk = "nccl"
        # Groups of their own: exchanges must not get between the collectives of DDP or FSDP.
        timeout = timedelta(seconds=timeout_s)
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        self._bulk = None if bulk is None else dist.new_group(backend=bulk, timeout=timeout)
        self._bulk_kind = "cuda" if bulk == "nccl" else "cpu"
        self._timeout_s = timeout_s
        self._board = FailureBoard(self._control)
        make_current(self._board)

    def takes(self, device: torch.device) -> bool:
        """Whether tensors of this device can be exchanged there; all others pass through CPU memory."""
        return self._bulk is not None and device.type == self._bulk_kind

    def _wait(self, works: Sequence[Any]) -> None:
        """Wait for all, looking every half second whether some rank has failed meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        pause, next_look = 1e-5, time.monotonic() + POLL_S
        for work in works:
            while not work.is_completed():
                now = time.monotonic()
                if now >= next_look:
                    next_look = now + POLL_S
                    if self._board.failure is not None:
                        raise KTAMXDistributedError(f"another rank failed: {self._board.failure}")
                    if self._board.lost is not None:
                        raise KTAMXDistributedError(
                            f"rank {self.rank} lost another rank at the experts: {self._board.lost}"
                        )
                    if now > deadline:
                        raise KTAMXDistributedError(
                            f"rank {self.rank} waited {self._timeout_s:.0f} s for another rank at the experts"
                        )
                time.sleep(pause)
                pause = min(pause * 1.5, 1e-3)
            try:
                work.wait()
            except RuntimeError as error:
                failure = self._board.look() or str(error)
                raise KTAMXDistributedError(
                    f"rank {self.rank} lost another rank at the experts: {failure}"
                ) from error

    def all_gather(self, header: torch.Tensor) -> torch.Tensor:
        """Header ``[n]`` of every rank, on the CPU; ``[world_size, n]``."""
        parts = [torch.empty_like(header) for _ in range(self.world_size)]
        self._wait([dist.all_gather(parts, header, group=self._control, async_op=True)])
        return torch.stack(parts)

    def all_gather_text(self, text: str) -> list[str]:
        """A text of every rank."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, text, group=self._control)
        return [str(part) for part in parts]

    def to_rank_zero(
        self, payload: torch.Tensor, sizes: Sequence[int], device: torch.device
    ) -> list[torch.Tensor]:
        """Send uint8 `payload` to rank 0; there, the payload of every rank, whose sizes are `sizes`.

        All ranks are about to send: they have met in `all_gather`. `device`: the CPU, or on every rank one
        that the transport `takes`.
        """
        nothing = [0] * self.world_size
        sent = [payload.numel(), *nothing[1:]]
        received = self._exchange(payload, sent, list(sizes) if self.rank == 0 else nothing, device)
        return list(received.split(list(sizes))) if self.rank == 0 else []

    def from_rank_zero(
        self, payloads: Sequence[torch.Tensor] | None, size: int, device: torch.device
    ) -> torch.Tensor:
        """On rank 0, send each rank its payload; returns this rank's, of `size` bytes, on `device`."""
        if self.takes(device):
            # Rank 0 may compute for long, or fail, before it sends.
            self.all_gather(torch.zeros(1, dtype=torch.int64))
        nothing = [0] * self.world_size
        if payloads is None:
            data, sent = torch.empty(0, dtype=torch.uint8), nothing
        else:
            data, sent = torch.cat(list(payloads)), [payload.numel() for payload in payloads]
        return self._exchange(data, sent, [size, *nothing[1:]], device)

    def _exchange(
        self, data: torch.Tensor, sent: list[int], received: list[int], device: torch.device
    ) -> torch.Tensor:
        # One collective with sizes for each rank, and not sends and receives: under gloo only collectives can
        # be watched while they wait.
        group = self._bulk if self.takes(device) else self._control
        mine = data.to(device).contiguous()
        result = torch.empty(sum(received), dtype=torch.uint8, device=device)
        self._wait([dist.all_to_all_single(result, mine, received, sent, group=group, async_op=True)])
        return result
