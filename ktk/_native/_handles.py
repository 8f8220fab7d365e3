"""Handles of the C library in the child of a fork, shared by both bindings.

close() waits for calls that other threads are inside of. Those threads do not come along into the child of a
fork, so what they had begun must not count there.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["watch"]


class Handle(Protocol):
    """What both bindings derive their classes from, as far as a fork is concerned."""

    def _forget_calls(self) -> None:
        """Nobody is inside a call of this handle."""


_handles: weakref.WeakSet[Handle] = weakref.WeakSet()


def watch(handle: Handle) -> None:
    """Tells `handle` in the child of each fork, for as long as it lives."""
    _handles.add(handle)


def _forget() -> None:
    for handle in list(_handles):
        handle._forget_calls()


os.register_at_fork(after_in_child=_forget)
