"""Fixtures of the whole suite.

The suite runs once under each binding: `KTK_BINDING=cython pytest` and `KTK_BINDING=ctypes pytest`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Of Python 3.12 and newer, in processes that fork on purpose: an option of the interpreter.
FORK_IS_MEANT = "-Wignore:This process (pid=:DeprecationWarning"

# `python -m pytest` puts the working folder first, where the package lies without its native library.
# An editable install does not need the entry either.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]


def python_path(*folders: Path) -> str:
    """PYTHONPATH of a process in any folder that finds `folders` first, and then what this one finds."""
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.pathsep.join([*map(str, folders), *map(os.path.abspath, inherited)])


if "PYTHONPATH" in os.environ:
    os.environ["PYTHONPATH"] = python_path()

# Threads of PyTorch that wait actively take the cores from the test that runs beside this one. Read when it
# is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ktk import _native  # noqa: E402
from layers import runnable_isas  # noqa: E402


def pytest_report_header() -> list[str]:
    return [
        f"ktk: {_native.binding} binding of {_native.library_path}",
        f"ktk: built for {', '.join(_native.isa_names())}; runnable: {', '.join(runnable_isas())}",
    ]


@pytest.fixture(params=runnable_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that can run here, the emulated one included."""
    return str(request.param)


@pytest.fixture(scope="session")
def binding() -> str:
    """Name of the binding under test, which is the one that KTK_BINDING asked for."""
    wanted = os.environ.get("KTK_BINDING")
    assert wanted in (None, "", _native.binding)
    return _native.binding


@pytest.fixture(scope="session")
def pool() -> Iterator[_native.Pool]:
    """Two unbound threads in one subpool, which sleep when they have nothing to do."""
    with _native.Pool([2], bind_threads=False, spin_ns=0) as pool:
        yield pool
