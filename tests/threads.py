"""How many threads this process has.

The kernel wakes whoever joins a thread before it takes the thread out of `/proc`, so a count taken right
after a join may still hold it: the two functions below wait for that.
"""

from __future__ import annotations

import os
import time


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settled_threads(still_seconds: float = 0.02) -> int:
    """The count once no thread has ended for `still_seconds`."""
    count = count_threads()
    deadline = time.monotonic() + still_seconds
    while time.monotonic() < deadline:
        time.sleep(0.001)
        now = count_threads()
        if now < count:
            deadline = time.monotonic() + still_seconds
        count = now
    return count


def no_more_threads_than(before: int, patience_seconds: float = 10.0) -> bool:
    """Whether the count falls to `before` in time."""
    deadline = time.monotonic() + patience_seconds
    while count_threads() > before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
