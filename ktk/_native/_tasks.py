"""Python callables as tasks of a native queue, shared by both bindings.

The C library gets one function and a number; the number stands for a callable here. A number that is no
longer known is harmless, which a pointer to a freed object would not be: a CUDA graph may be replayed after
its queue is gone.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["QueueTasks", "run_task"]

_keys = itertools.count(1)
# A task that waits to run is alive whatever happens to its queue's Python object; one that may be replayed
# is not, since its closure often refers to the queue.
_waiting: dict[int, tuple[QueueTasks, Callable[[], Any]]] = {}
_replayable: weakref.WeakValueDictionary[int, QueueTasks] = weakref.WeakValueDictionary()


class QueueTasks:
    """The callables of one queue, and the exceptions that they raised."""

    def __init__(self) -> None:
        self._failures: deque[BaseException] = deque()
        self._functions: dict[int, Callable[[], Any]] = {}
        self._key_of_function: dict[object, int] = {}
        self._running_thread: int | None = None

    def add(self, function: Callable[[], Any]) -> int:
        """Number for a callable that runs once."""
        key = next(_keys)
        _waiting[key] = (self, function)
        return key

    def add_replayable(self, function: Callable[[], Any]) -> int:
        """Number for a callable that may run any number of times, for as long as this object lives.

        Equal callables share one number, so that submitting the same one again takes no more memory.
        """
        try:
            hash(function)
            identity: object = function
        except TypeError:
            identity = id(function)
        key = self._key_of_function.get(identity)
        if key is None:
            key = self._key_of_function[identity] = next(_keys)
            self._functions[key] = function
            _replayable[key] = self
        return key

    def discard(self, key: int) -> None:
        """Forgets a callable whose submission failed."""
        _waiting.pop(key, None)

    def take_failure(self) -> BaseException | None:
        """The first exception since the last call; later ones are dropped, as the C library does."""
        first = None
        while self._failures:
            failure = self._failures.popleft()
            first = failure if first is None else first
        return first

    def on_own_thread(self) -> bool:
        """Whether the caller is itself a task of this queue."""
        # Without a task the module is not needed: the interpreter may be ending, and have cleared it.
        return self._running_thread is not None and self._running_thread == threading.get_ident()

    def _run(self, function: Callable[[], Any]) -> None:
        self._running_thread = threading.get_ident()
        try:
            function()
        except BaseException as failure:  # noqa: BLE001 - sync raises it where somebody can handle it
            self._failures.append(failure)
        finally:
            self._running_thread = None


def run_task(key: int) -> int:
    """Runs the callable behind a number; called on the thread of the queue.

    Returns 0 also when the callable raised: the exception object waits in its `QueueTasks`, and a status
    could only repeat that without its type. Any other value says that the number is unknown.
    """
    once = _waiting.pop(key, None)
    if once is not None:
        once[0]._run(once[1])
        return 0
    queue_tasks = _replayable.get(key)
    if queue_tasks is None:
        return 1
    queue_tasks._run(queue_tasks._functions[key])
    return 0
