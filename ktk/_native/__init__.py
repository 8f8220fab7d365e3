"""The C library, through the binding that fits this installation.

`KTK_BINDING` names the binding, `cython` or `ctypes`. Without it Cython is taken, and ctypes with one warning
where the extension module cannot be imported. Both have the same names, checks and exceptions, described in
`api.pyi`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING

from ktk import _library

if TYPE_CHECKING:
    from types import ModuleType

    from ktk._native.api import (
        DTYPE_BF16,
        DTYPE_F8_E4M3,
        DTYPE_F16,
        DTYPE_F32,
        FORMAT_BF16,
        FORMAT_FP8,
        FORMAT_INT4,
        FORMAT_INT8,
        PART_DOWN_BIAS,
        PART_DOWN_FACTORS,
        PART_DOWN_SCALE,
        PART_DOWN_WEIGHT,
        PART_GATE_BIAS,
        PART_GATE_UP_FACTORS,
        PART_GATE_UP_SCALE,
        PART_GATE_UP_WEIGHT,
        PART_UP_BIAS,
        POLICY_NONE,
        POLICY_RECOMPUTE,
        POLICY_SAVE,
        PROBE_COPY,
        PROBE_PRODUCT,
        PROBE_READ,
        Moe,
        Pool,
        Probe,
        Queue,
        Sft,
        SftContext,
        Trace,
        abi_version,
        get_num_threads,
        isa_check,
        isa_default,
        isa_kernel,
        isa_names,
        machine_json,
        set_num_threads,
        version,
    )

__all__ = [
    "DTYPE_BF16",
    "DTYPE_F8_E4M3",
    "DTYPE_F16",
    "DTYPE_F32",
    "FORMAT_BF16",
    "FORMAT_FP8",
    "FORMAT_INT4",
    "FORMAT_INT8",
    "PART_DOWN_BIAS",
    "PART_DOWN_SCALE",
    "PART_DOWN_WEIGHT",
    "PART_DOWN_FACTORS",
    "PART_GATE_BIAS",
    "PART_GATE_UP_SCALE",
    "PART_GATE_UP_WEIGHT",
    "PART_GATE_UP_FACTORS",
    "PART_UP_BIAS",
    "PROBE_COPY",
    "PROBE_PRODUCT",
    "PROBE_READ",
    "POLICY_NONE",
    "POLICY_RECOMPUTE",
    "POLICY_SAVE",
    "Moe",
    "Pool",
    "Probe",
    "Queue",
    "Sft",
    "SftContext",
    "Trace",
    "abi_version",
    "get_num_threads",
    "isa_check",
    "isa_default",
    "isa_kernel",
    "isa_names",
    "machine_json",
    "set_num_threads",
    "version",
    "binding",
    "library_path",
]

library_path = _library.library_path()
"""Path of the shared library in use."""


def _import_cython() -> ModuleType:
    if os.environ.get("KTK_LIBRARY"):
        raise ImportError("KTK_LIBRARY needs the ctypes binding; set KTK_BINDING=ctypes or unset KTK_LIBRARY")
    # The extension finds this copy by its name, wherever the installation has put the two files.
    _library.load_library()
    return importlib.import_module("ktk._native._cython")


def _import_binding() -> tuple[str, ModuleType]:
    wanted = os.environ.get("KTK_BINDING", "")
    if wanted not in ("", "cython", "ctypes"):
        raise ImportError(f"KTK_BINDING must be 'cython' or 'ctypes', got {wanted!r}")
    if wanted == "ctypes" or (not wanted and os.environ.get("KTK_LIBRARY")):
        return "ctypes", importlib.import_module("ktk._native._ctypes")
    try:
        return "cython", _import_cython()
    except ImportError as error:
        if wanted:
            raise
        reason = error
    try:
        module = importlib.import_module("ktk._native._ctypes")
    except ImportError as error:
        raise error from reason
    warnings.warn(
        f"ktk uses its ctypes binding, because the extension module cannot be imported: {reason}. "
        "Set KTK_BINDING=ctypes to use it without this warning.",
        RuntimeWarning,
        stacklevel=3,
    )
    return "ctypes", module


def _check_abi(module: ModuleType) -> None:
    built_for, found = module.HEADER_ABI_VERSION, module.abi_version()
    if built_for != found:
        raise ImportError(
            f"{library_path} has ABI version {found}, but this ktk was built for version {built_for}; "
            "reinstall ktk, or unset KTK_LIBRARY if it names the library of another installation"
        )


if os.environ.get("KTK_TRACE"):
    from ktk import _process_trace
else:
    _process_trace = None  # type: ignore[assignment]

binding, _module = _import_binding()
"""Name of the binding in use, and its module."""

_check_abi(_module)
if not TYPE_CHECKING:
    globals().update({name: getattr(_module, name) for name in __all__ if name not in globals()})

if _process_trace is not None:
    _process_trace.start(_module)
