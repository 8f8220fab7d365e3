"""Mixture-of-experts layers on the CPU, for PyTorch and transformers.

Importing `ktk` is cheap: PyTorch and the native library are loaded when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ktk.errors import (
    KtkArgumentError,
    KtkError,
    KtkInternalError,
    KtkMemoryError,
    KtkStateError,
    KtkSystemError,
    KtkUnsupportedError,
)

if TYPE_CHECKING:
    from ktk.buffers import KExpertsCPUBuffer
    from ktk.experts import BaseMoEWrapper, Experts, KTMoEWrapper, generate_gpu_experts_masks
    from ktk.profiling import profile
    from ktk.runtime import (
        CPUInfer,
        ForwardTask,
        WorkerPoolConfig,
        get_num_threads,
        runtime_info,
        set_num_threads,
        show_runtime,
    )

    __version__: str

__all__ = [
    "BaseMoEWrapper",
    "CPUInfer",
    "Experts",
    "ForwardTask",
    "KExpertsCPUBuffer",
    "KTMoEWrapper",
    "KtkArgumentError",
    "KtkError",
    "KtkInternalError",
    "KtkMemoryError",
    "KtkStateError",
    "KtkSystemError",
    "KtkUnsupportedError",
    "WorkerPoolConfig",
    "__version__",
    "generate_gpu_experts_masks",
    "get_include",
    "get_library",
    "get_num_threads",
    "profile",
    "runtime_info",
    "set_num_threads",
    "show_runtime",
]

_MODULE_OF_NAME = {
    "BaseMoEWrapper": "ktk.experts",
    "CPUInfer": "ktk.runtime",
    "Experts": "ktk.experts",
    "ForwardTask": "ktk.runtime",
    "KExpertsCPUBuffer": "ktk.buffers",
    "KTMoEWrapper": "ktk.experts",
    "WorkerPoolConfig": "ktk.runtime",
    "generate_gpu_experts_masks": "ktk.experts",
    "get_num_threads": "ktk.runtime",
    "profile": "ktk.profiling",
    "runtime_info": "ktk.runtime",
    "set_num_threads": "ktk.runtime",
    "show_runtime": "ktk.runtime",
}


def get_include() -> str:
    """Folder of `ktk.h`, for the include path of a compiler.

    Returns
    -------
    str

    Raises
    ------
    ImportError
        If ktk is imported from its source tree.
    """
    from ktk._library import include_path

    return str(include_path())


def get_library() -> str:
    """Path of the shared library `libktk.so`, for a linker or `dlopen`.

    Returns
    -------
    str
        The file that KTK_LIBRARY names, if it is set; else the installed one.

    Raises
    ------
    ImportError
        If there is no such file.
    """
    from ktk._library import library_path

    return str(library_path())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        value: Any = metadata.version("ktk")
    elif name in _MODULE_OF_NAME:
        value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    else:
        raise AttributeError(f"module 'ktk' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
