"""Checks of arguments on their way into the C library, shared by both bindings.

The C library checks everything that it can see. What it cannot see is caught here: Python types, numbers that
do not fit the C type, null or misaligned pointers, and handles that are closed. Wrong types raise
`TypeError`, wrong values `KtkArgumentError`.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable
from typing import Any

from ktk.errors import KtkArgumentError, KtkStateError

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
SIZE_MAX = 2**64 - 1

DTYPE_BYTES = {0: 4, 1: 2, 2: 2}
_DTYPE_NAMES = "DTYPE_F32 (0), DTYPE_BF16 (1) or DTYPE_F16 (2)"
WEIGHT_DTYPE_BYTES = {**DTYPE_BYTES, 3: 1}
_WEIGHT_DTYPE_NAMES = "DTYPE_F32 (0), DTYPE_BF16 (1), DTYPE_F16 (2) or DTYPE_F8_E4M3 (3)"


def integer(name: str, value: object) -> int:
    """`value` as an int. Takes NumPy's integers, refuses bool and float."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got bool")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def bounded(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int within `low` .. `high`."""
    number = integer(name, value)
    if not low <= number <= high:
        raise KtkArgumentError(f"{name} must be between {low} and {high}, got {number}")
    return number


def int32(name: str, value: object) -> int:
    """`value` as an int that fits int32_t."""
    return bounded(name, value, -INT32_MAX - 1, INT32_MAX)


def int64(name: str, value: object) -> int:
    """`value` as an int that fits int64_t."""
    return bounded(name, value, -INT64_MAX - 1, INT64_MAX)


def size(name: str, value: object) -> int:
    """`value` as an int that fits size_t."""
    return bounded(name, value, 0, SIZE_MAX)


def flag(name: str, value: object) -> bool:
    """`value` as a bool; integers 0 and 1 are taken too."""
    if isinstance(value, bool):
        return value
    return bool(bounded(name, value, 0, 1))


def number(name: str, value: object) -> float:
    """`value` as a float."""
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    return float(value)  # type: ignore[arg-type]


def dtype(name: str, value: object) -> int:
    """`value` as one of the DTYPE_ constants."""
    code = integer(name, value)
    if code not in DTYPE_BYTES:
        raise KtkArgumentError(f"{name} must be {_DTYPE_NAMES}, got {code}")
    return code


def weight_dtype(name: str, value: object) -> int:
    """`value` as one of the DTYPE_ constants of weights that are to be packed."""
    code = integer(name, value)
    if code not in WEIGHT_DTYPE_BYTES:
        raise KtkArgumentError(f"{name} must be {_WEIGHT_DTYPE_NAMES}, got {code}")
    return code


def pointer(name: str, value: object, alignment: int) -> int:
    """`value` as an address that is not null and is a multiple of `alignment` bytes."""
    address = integer(name, value)
    if address == 0:
        raise KtkArgumentError(f"{name} is a null pointer; pass the data_ptr() of a tensor that has storage")
    if not 0 < address <= SIZE_MAX:
        raise KtkArgumentError(f"{name} must be an address between 1 and {SIZE_MAX}, got {address}")
    if address % alignment:
        raise KtkArgumentError(
            f"{name} must be aligned to {alignment} bytes, got address {address:#x}; pass a contiguous "
            "tensor of the right dtype"
        )
    return address


def optional_pointer(name: str, value: object, alignment: int) -> int:
    """As `pointer`, but 0 stands for none and is let through."""
    address = integer(name, value)
    return address and pointer(name, address, alignment)


def stream(value: object) -> int:
    """A CUDA stream as an address; None counts as stream 0."""
    return 0 if value is None else bounded("stream", value, 0, SIZE_MAX)


def text(name: str, value: object) -> bytes:
    """A str as the bytes of a C string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if "\0" in value:
        raise KtkArgumentError(f"{name} must not contain a null character, got {value!r}")
    return value.encode()


def path(value: object) -> bytes:
    """The path of a file as the bytes of a C string."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"path must be a str or os.PathLike, got {type(value).__name__}")
    encoded = os.fsencode(value)
    if b"\0" in encoded:
        raise KtkArgumentError(f"path must not contain a null character, got {value!r}")
    return encoded


def int32_list(name: str, values: object) -> list[int]:
    """A sequence of ints that fit int32_t, with at least one element."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of ints, got {type(values).__name__}")
    numbers = [int32(f"{name}[{index}]", value) for index, value in enumerate(values)]
    if not numbers:
        raise KtkArgumentError(f"{name} must have at least one element, got none")
    return numbers


def same_length(name: str, values: list[int], other_name: str, others: list[int]) -> None:
    """Two lists that belong together have the same number of elements."""
    if len(values) != len(others):
        raise KtkArgumentError(
            f"{name} has {len(values)} elements and {other_name} {len(others)}; both need one for each "
            "subpool"
        )


def function(value: object) -> Callable[[], Any]:
    """A task that can be called without arguments."""
    if not callable(value):
        raise TypeError(f"a task must be callable, got {type(value).__name__}")
    return value


def instance(name: str, value: object, cls: type) -> None:
    """`value` is an object of the binding that is in use."""
    if not isinstance(value, cls):
        raise TypeError(f"{name} must be a ktk._native.{cls.__name__}, got {type(value).__name__}")


def closed(kind: str) -> KtkStateError:
    """The exception for a call on a closed handle of the class `kind`."""
    return KtkStateError(f"this {kind} is closed; make a new one")


def own_task(call: str) -> KtkStateError:
    """The exception for a call that would wait for the task that makes it."""
    return KtkStateError(f"Queue.{call} was called by a task of the same queue, and would wait for itself")
