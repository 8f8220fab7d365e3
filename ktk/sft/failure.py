"""News of failures among ranks, wherever the others wait."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ktk.sft.errors import KTAMXDistributedError

__all__ = [
    "GRACE_S",
    "POLL_S",
    "FailureBoard",
    "current_board",
    "failure_guard",
    "is_distributed",
    "make_current",
]

POLL_S = 0.5
GRACE_S = 10.0

_FAILURE = "failure"


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class FailureBoard:
    """Where a rank writes that it failed, and where each looks whether another did.

    Every rank serves a key-value store from a thread of PyTorch's, which answers as long as the process is
    there, whatever its other threads wait for. Rank 0 watches the stores of all others and they watch that of
    rank 0, in which failures are written. All ranks must make one at the same time.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Of all ranks, for tensors on the CPU.

    Attributes
    ----------
    failure : str or None
        The last failure within a `failure_guard` that is known here, the end of a rank included.
    lost : str or None
        A rank whose process is gone, in a `failure_guard` or not.
    """

    def __init__(self, group: Any) -> None:
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        self.group = group
        self.failure: str | None = None
        self.lost: str | None = None
        self.posted = False
        host = _own_address(self.rank)
        self._own = TCPStore(host, 0, None, True, wait_for_workers=False)
        addresses: list[tuple[str, int]] = [("", 0)] * ranks
        dist.all_gather_object(addresses, (host, self._own.port), group=group)
        watched = range(1, ranks) if self.rank == 0 else range(1)
        self._others = {
            rank: TCPStore(addresses[rank][0], addresses[rank][1], None, False) for rank in watched
        }
        self._board = self._own if self.rank == 0 else self._others[0]
        # A rank that ends from here on is missed by those that watch it, and not waited for by them.
        dist.barrier(group=group)
        self.tell(_guards.depth > 0)
        watch = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
        watch.start()
        _watches.add(watch)

    def post(self, text: str) -> None:
        """Write a failure of this rank."""
        self.posted = True
        # Without rank 0 there is no board, and all ranks notice that.
        with suppress(RuntimeError):
            self._board.set(_FAILURE, text)

    def tell(self, guarded: bool) -> None:
        """Tell those that watch this rank whether it is in a `failure_guard`, where its end is a failure."""
        for store in self._others.values():
            with suppress(RuntimeError):
                store.set(_guarded_key(self.rank), str(int(guarded)))

    def look(self) -> str | None:
        """Look now; the last failure, or what rank is gone; or None."""
        for rank, store in list(self._others.items()):
            try:
                store.check([_FAILURE])
            except RuntimeError as error:
                self._others.pop(rank, None)
                self._lose(rank, error)
        # Of a store that is gone `_lose` has told.
        with suppress(RuntimeError):
            if self._board.check([_FAILURE]):
                self.failure = self._board.get(_FAILURE).decode()
        return self.failure or self.lost

    def _lose(self, rank: int, error: Exception) -> None:
        self.lost = f"rank {rank} is gone ({error})"
        key = _guarded_key(rank)
        if not self._own.check([key]) or self._own.get(key) != b"1":
            return
        if self.rank != 0:
            self.failure = self.failure or self.lost
        elif not self._own.check([_FAILURE]):
            # What a rank has written before its end says more.
            self._own.set(_FAILURE, self.lost)


def _guarded_key(rank: int) -> str:
    return f"guarded-{rank}"


def _own_address(rank: int) -> str:
    """Where other ranks reach this one: the address from which it reaches that of rank 0."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if rank == 0:
        return master
    family, kind, protocol, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # Of a datagram socket this only chooses the interface; nothing is sent.
        probe.connect(address)
        return str(probe.getsockname()[0])


class _Guards:
    """How many `failure_guard` this process is in."""

    depth = 0


_guards = _Guards()
_boards: list[FailureBoard] = []
_ending = threading.Event()
_watches: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _stop_watches() -> None:
    # The interpreter ends threads that run on, and inside of a store that would abort the process.
    _ending.set()
    for watch in list(_watches):
        watch.join(POLL_S)


def make_current(board: FailureBoard) -> None:
    """Use this board in `failure_guard` from now on."""
    _boards[:] = [board]


def current_board() -> FailureBoard | None:
    """The board of the last model that was wrapped."""
    return _boards[-1] if _boards else None


def _watch(found: weakref.ref[FailureBoard]) -> None:
    since: float | None = None
    while (board := found()) is not None:
        board.look()
        concerned = _guards.depth > 0 and board is current_board() and not board.posted
        if not concerned or board.failure is None:
            since = None
        elif since is None:
            since = time.monotonic()
        elif time.monotonic() - since > GRACE_S:
            _end(board.rank, board.failure)
        del board
        if _ending.wait(POLL_S):
            return


def _end(rank: int, failure: str) -> None:
    text = (
        f"ktk: rank {rank} was still within failure_guard {GRACE_S:.0f} s after another rank failed, and no "
        f"exception reaches what it waits for; the process ends. The failure: {failure}\n"
    )
    # Past Python's buffers, whose locks the main thread may hold.
    os.write(2, text.encode())
    os._exit(1)


@contextmanager
def failure_guard() -> Iterator[None]:
    """Tell the other ranks when the block fails, and end it when another rank does.

    The others raise at their next exchange with the experts, or in the one they wait in. A rank that is still
    within its block 10 s later waits elsewhere, as in a collective on a GPU, which no exception can end: its
    process then ends with status 1 and the failure on standard error. A rank whose process ends within the
    block, without an exception, has failed too.

    Raises
    ------
    BaseException
        What the block raised.
    """
    _guards.depth += 1
    if _guards.depth == 1 and (board := current_board()) is not None:
        board.tell(True)
    try:
        yield
    except BaseException as error:
        board = current_board()
        if board is not None and not isinstance(error, KTAMXDistributedError):
            board.post(f"rank {board.rank}: {type(error).__name__}: {error}")
        raise
    finally:
        _guards.depth -= 1
        if _guards.depth == 0 and (board := current_board()) is not None:
            board.tell(False)
