"""Where `libktk.so` and `ktk.h` lie: in a wheel, in an editable install, or where the user says."""

from __future__ import annotations

import ctypes
import os
from importlib import resources
from pathlib import Path

__all__ = ["include_path", "library_path", "load_library"]


def _installed(*parts: str) -> Path:
    # In an editable install the files of one package lie in different folders, so paths relative to
    # __file__ would be wrong; the package's own loader knows.
    resource = resources.files("ktk") / "_native"
    for part in parts:
        resource = resource / part
    if not resource.is_file():
        raise ImportError(
            f"{'/'.join(('ktk', '_native', *parts))} is missing from {resources.files('ktk')}: ktk was "
            "imported from its source tree, or was not built. Install it with `pip install .` and start "
            "Python in another folder, or install it with `pip install --no-build-isolation -e .`"
        )
    return Path(str(resource))


def library_path() -> Path:
    """Path of the shared library: that in KTK_LIBRARY, or else the installed one.

    Raises
    ------
    ImportError
        If KTK_LIBRARY names no file, or ktk is not installed with its library.
    """
    override = os.environ.get("KTK_LIBRARY")
    if not override:
        return _installed("libktk.so")
    if not Path(override).is_file():
        raise ImportError(
            f"KTK_LIBRARY names {override!r}, which is no file; unset it or give the path of a libktk.so"
        )
    return Path(override).resolve()


def include_path() -> Path:
    """Folder of `ktk.h`, for compilers."""
    return _installed("include", "ktk.h").parent


def load_library() -> ctypes.CDLL:
    """Loads the shared library, or finds it loaded.

    Raises
    ------
    ImportError
        If the file is missing, or the loader refuses it.
    """
    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the native library of ktk cannot be loaded: {error}") from error
