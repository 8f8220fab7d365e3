"""KTK_TRACE=FILE: a trace of the whole process, written when it exits.

Imported before the binding, so that its exit handler runs after the binding's, which waits for queues.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

_running: list[tuple[Any, str, int]] = []


def _path() -> str:
    named = os.environ["KTK_TRACE"]
    path = Path(named.replace("%p", str(os.getpid()))).absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise ImportError(
            f"KTK_TRACE names {named!r}, which cannot be written: it is a folder, or there is no folder "
            f"{path.parent}; give the path of a file, where %p stands for the number of the process"
        )
    return str(path)


def start(binding: ModuleType) -> None:
    """Begins the trace that KTK_TRACE asks for.

    Parameters
    ----------
    binding : module
        The binding in use.

    Raises
    ------
    ImportError
        If the file could not be written.
    """
    path = _path()
    _running.append((binding.Trace(), path, os.getpid()))


@atexit.register
def _finish() -> None:
    # A child of fork has nothing of its own to write, and would replace what the parent writes.
    for trace, path, process in _running:
        if process == os.getpid():
            trace.stop()
            trace.write(path)
