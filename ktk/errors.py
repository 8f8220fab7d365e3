"""Exceptions of ktk.

Each one is a `KtkError` and also the built-in exception that is nearest in meaning, so that code which knows
nothing of ktk can catch it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = [
    "KtkArgumentError",
    "KtkError",
    "KtkInternalError",
    "KtkMemoryError",
    "KtkStateError",
    "KtkSystemError",
    "KtkUnsupportedError",
    "error_from_status",
]


class KtkError(Exception):
    """Base of every exception that ktk raises by itself."""


class KtkArgumentError(KtkError, ValueError):
    """A value given by the caller is wrong."""


class KtkUnsupportedError(KtkError, NotImplementedError):
    """This CPU, or this build of ktk, cannot do what was asked."""


class KtkMemoryError(KtkError, MemoryError):
    """An allocation failed."""


class KtkSystemError(KtkError, OSError):
    """The operating system or the CUDA run time refused."""


class KtkStateError(KtkError, RuntimeError):
    """The object is closed, or not in a state that allows the call."""


class KtkInternalError(KtkError, RuntimeError):
    """A defect of ktk."""


STATUS_ERRORS: Mapping[int, type[KtkError]] = MappingProxyType(
    {
        1: KtkArgumentError,
        2: KtkUnsupportedError,
        3: KtkMemoryError,
        4: KtkSystemError,
        5: KtkStateError,
        6: KtkInternalError,
    }
)
"""Exception class of each `ktk_status` other than `KTK_OK`."""


def error_from_status(status: int, message: str) -> KtkError:
    """Exception for a failed call of the C library.

    Parameters
    ----------
    status : int
        A `ktk_status` other than `KTK_OK`; an unknown one counts as a defect of ktk.
    message : str
        What `ktk_last_error` says. If empty, the message names the status.

    Returns
    -------
    KtkError
        Of the class that `STATUS_ERRORS` gives, ready to be raised.
    """
    return STATUS_ERRORS.get(status, KtkInternalError)(
        message or f"the native library failed with status {status} and left no message"
    )
