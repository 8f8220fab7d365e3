"""Configuration of a layer, and the one table of weight formats and method names."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ktk.errors import KtkArgumentError

__all__ = ["FORMATS", "METHODS", "FormatInfo", "LayerConfig", "format_info", "format_of_method"]

MAX_SIZE = 65536
"""Largest hidden and intermediate size, in elements, that the native library takes."""

MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """What the Python layer knows about one weight format.

    Parameters
    ----------
    name : str
        Name for users and file headers: ``"bf16"``, ``"int8"``, ``"int4"``, ``"fp8"``.
    code : int
        Value of the C enumeration ``ktk_format``.
    group_sizes : tuple of int
        Allowed input columns of a group. 0 stands for one scale a row, or for no scales at all in bf16.
    default_group_size : int
        Used where the caller names none.
    rotates : bool
        Whether columns may be rotated before they are quantised, which layers do unless told otherwise.
    """

    name: str
    code: int
    group_sizes: tuple[int, ...]
    default_group_size: int
    rotates: bool


# int4 defaults to groups of 32: one outlier then costs the accuracy of 32 weights and not of a whole row,
# which is what makes per-row int4 lose so much, and multipliers and offsets add half a bit to each weight.
# For int8, a rotation spreads what is large, so that groups of 512 bring the error of a layer below 0.02, and
# sums need a scale only every 512 columns. fp8 has the blocks of 128 that checkpoints come with.
FORMATS: Mapping[str, FormatInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
            FormatInfo(name="bf16", code=0, group_sizes=(0,), default_group_size=0, rotates=False),
            FormatInfo(
                name="int8",
                code=1,
                group_sizes=(0, 32, 64, 128, 256, 512),
                default_group_size=512,
                rotates=True,
            ),
            FormatInfo(
                name="int4", code=2, group_sizes=(0, 32, 64, 128), default_group_size=32, rotates=True
            ),
            FormatInfo(name="fp8", code=3, group_sizes=(128,), default_group_size=128, rotates=False),
        )
    }
)
"""Weight formats by name."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "AMXINT4": "int4",
        "AMXINT8": "int8",
        "BF16": "bf16",
        "FP8": "fp8",
        "MOE_INT4": "int4",
        "MOE_INT8": "int8",
    }
)
"""Weight format of each method of `ktk.KTMoEWrapper`. The names are historical: all run on every instruction
set."""

METHOD_GROUP_SIZES: Mapping[str, int] = MappingProxyType({"MOE_INT4": 0, "MOE_INT8": 0})
"""Group size of the methods that do not have the default one of their format."""

INTERMEDIATE_GROUP = 128
"""Columns of the intermediate that share a scale in int8 and int4. NUMA shards are cut between groups."""

ROTATED_INTERMEDIATE_GROUP = 256
"""The same where columns are rotated."""

_BF16_FIRST = "its checkpoints are not read; convert the experts to bfloat16 first"
_METHODS_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "RAWINT4": f"AMXINT4, with groups of 32, is the nearest; {_BF16_FIRST}",
        "GPTQ_INT4": f"AMXINT4 with group_size=128 is the nearest; {_BF16_FIRST}",
        "SYCL_GPTQ_INT4": f"AMXINT4 with group_size=128 is the nearest; {_BF16_FIRST}",
        "FP8_PERCHANNEL": f"FP8 is the nearest, with scales for 128 columns; {_BF16_FIRST}",
        "MXFP4": f"AMXINT4, with groups of 32, is the nearest; {_BF16_FIRST}",
        "MXFP8": f"FP8, with scales for 128 columns, is the nearest; {_BF16_FIRST}",
        "LLAMAFILE": "use any method with the checkpoint that the GGUF file was made from",
    }
)
"""Methods of kt-kernel that are not here, and what to do."""


def format_info(name: str) -> FormatInfo:
    """Look a weight format up.

    Parameters
    ----------
    name : str
        ``"bf16"``, ``"int8"``, ``"int4"`` or ``"fp8"``.

    Returns
    -------
    FormatInfo

    Raises
    ------
    KtkArgumentError
        If there is no such format; the message lists those there are.
    """
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise KtkArgumentError(
            f"unknown weight format {name!r}; valid formats: {', '.join(FORMATS)}"
        ) from None


def format_of_method(method: str) -> str:
    """Weight format of a method name of the compatible wrapper.

    Parameters
    ----------
    method : str
        A key of `METHODS`.

    Returns
    -------
    str
        A key of `FORMATS`.

    Raises
    ------
    KtkArgumentError
        If there is no such method; the message lists those there are, and for a method of kt-kernel says
        what to use in its place.
    """
    try:
        return METHODS[method]
    except (KeyError, TypeError):
        pass
    if isinstance(method, str) and method in _METHODS_ELSEWHERE:
        raise KtkArgumentError(f"ktk has no method {method!r}: {_METHODS_ELSEWHERE[method]}")
    if isinstance(method, str) and "_SFT" in method:
        raise KtkArgumentError(f"method {method!r} is for training; pass mode='sft' with it")
    raise KtkArgumentError(f"unknown method {method!r}; valid methods: {', '.join(METHODS)}")


def checked_int(name: str, value: object, low: int, high: int = MAX_INT32) -> int:
    """`value` as an int within `low` .. `high`; `KtkArgumentError` or `TypeError` naming it otherwise."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got bool")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if not low <= number <= high:
        limits = f"at least {low}" if high == MAX_INT32 else f"between {low} and {high}"
        raise KtkArgumentError(f"{name} must be {limits}, got {number}")
    return number


def _checked_float(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not math.isfinite(number) or number < 0:
        raise KtkArgumentError(f"{name} must be finite and at least 0 (0 switches it off), got {number}")
    return number


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Shapes, weight format and activation of one layer of experts. Values are checked on construction.

    Parameters
    ----------
    num_experts : int
        Experts of the layer, E.
    num_experts_per_tok : int
        Most experts a token is routed to, k; at most `num_experts`.
    hidden_size : int
        H, 1 to 65536.
    intermediate_size : int
        I of one expert, 1 to 65536.
    format : str, default "int4"
        A key of `FORMATS`.
    group_size : int, optional
        Input columns of a group: 32, 64 or 128, in int8 also 256 or 512, or 0 for one scale a row and no
        groups. Default: 32 for int4, 512 for int8. fp8: 128. bf16: 0. Groups of the down projection are no
        wider than `intermediate_group`.
    rotated : bool, optional
        int8, int4: whether columns of weights and activations are multiplied with an orthonormal Hadamard
        matrix, 64 at a time, before they are quantised, which spreads outliers. Default: True for these, and
        False, the only value, for bf16 and fp8.
    swiglu_limit : float, default 0.0
        If positive, gate is cut to at most this and up to within plus or minus this before the activation.
    swiglu_alpha : float, default 0.0
        If positive, ``gate * sigmoid(alpha * gate) * (up + 1)`` replaces ``silu(gate) * up``.
    max_tokens : int, default 4096
        Most tokens in one native forward; sizes scratch memory.
    strict : bool, default False
        One kernel family for all batch sizes, so that a token's bits do not depend on the batch it is in.
    isa : str, optional
        Instruction set; default: the best that runs here, or the environment variable ``KTK_ISA``.
    layer_idx : int, default 0
        Number of the layer within its model.

    Raises
    ------
    KtkArgumentError
        If a value is out of range; the message names it.
    TypeError
        If a value has the wrong Python type.
    """

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    format: str = "int4"
    group_size: int | None = None
    rotated: bool | None = None
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 0.0
    max_tokens: int = 4096
    strict: bool = False
    isa: str | None = None
    layer_idx: int = 0

    def __post_init__(self) -> None:
        """Check and normalise every field."""
        info = format_info(self.format)
        values: dict[str, Any] = {
            "num_experts": checked_int("num_experts", self.num_experts, 1),
            "num_experts_per_tok": checked_int("num_experts_per_tok", self.num_experts_per_tok, 1),
            "hidden_size": checked_int("hidden_size", self.hidden_size, 1, MAX_SIZE),
            "intermediate_size": checked_int("intermediate_size", self.intermediate_size, 1, MAX_SIZE),
            "max_tokens": checked_int("max_tokens", self.max_tokens, 1),
            "layer_idx": checked_int("layer_idx", self.layer_idx, 0),
            "swiglu_limit": _checked_float("swiglu_limit", self.swiglu_limit),
            "swiglu_alpha": _checked_float("swiglu_alpha", self.swiglu_alpha),
        }
        if values["num_experts_per_tok"] > values["num_experts"]:
            raise KtkArgumentError(
                f"num_experts_per_tok must be at most num_experts ({values['num_experts']}), "
                f"got {values['num_experts_per_tok']}"
            )
        group_size = info.default_group_size if self.group_size is None else self.group_size
        values["group_size"] = checked_int("group_size", group_size, 0)
        if values["group_size"] not in info.group_sizes:
            allowed = ", ".join(str(size) for size in info.group_sizes)
            raise KtkArgumentError(
                f"group_size of format {info.name} must be one of {allowed}, got {group_size}"
            )
        values["rotated"] = info.rotates if self.rotated is None else self.rotated
        if not isinstance(values["rotated"], bool):
            raise TypeError(f"rotated must be a bool or None, got {type(self.rotated).__name__}")
        if values["rotated"] and not info.rotates:
            rotating = ", ".join(other.name for other in FORMATS.values() if other.rotates)
            raise KtkArgumentError(
                f"rotated must be False or None in format {info.name}, whose columns are never rotated, got "
                f"True; formats that rotate: {rotating}"
            )
        values["strict"] = bool(self.strict)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def format_code(self) -> int:
        """Value of the C enumeration ``ktk_format``."""
        return FORMATS[self.format].code

    @property
    def groups(self) -> int:
        """`group_size` as an int (never None once constructed)."""
        assert self.group_size is not None
        return self.group_size

    @property
    def rotates(self) -> bool:
        """`rotated` as a bool (never None once constructed)."""
        assert self.rotated is not None
        return self.rotated

    @property
    def intermediate_group(self) -> int:
        """Columns of the intermediate that share a scale where it is quantised, and that NUMA shards hold in
        one piece: 256 if `rotated`, else 128."""
        return ROTATED_INTERMEDIATE_GROUP if self.rotated else INTERMEDIATE_GROUP

    @property
    def down_groups(self) -> int:
        """Group size of the down projection: `group_size`, but at most `intermediate_group` columns; 0 as
        there."""
        return min(self.groups, self.intermediate_group)
