"""What is measured: shapes of layers, weight formats, and the data for them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from ktk.config import FORMATS, checked_int, format_info
from ktk.errors import KtkArgumentError

__all__ = [
    "BATCHES",
    "SHAPES",
    "FormatChoice",
    "GaussianWeights",
    "Shape",
    "parse_batches",
    "parse_formats",
    "parse_shapes",
    "routes",
]

BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
"""Tokens of a forward: from one stream's decoding to a prefill."""


@dataclass(frozen=True)
class Shape:
    """The experts of one layer of a model.

    Parameters
    ----------
    name : str
    hidden_size, intermediate_size : int
        H and I.
    num_experts : int
        E.
    top_k : int
        Experts of a token.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def weights_of_expert(self) -> int:
        """Elements of gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size

    def fitting(self, num_experts: int) -> Shape:
        """The same with at most `num_experts`, and at least as many as a token needs."""
        return replace(self, num_experts=max(min(self.num_experts, num_experts), self.top_k))


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("dsv3", 7168, 2048, 256, 8),  # DeepSeek-V3
            Shape("qwen3", 2048, 768, 128, 8),  # Qwen3-30B-A3B
            Shape("mixtral", 4096, 14336, 8, 2),  # Mixtral-8x7B
            Shape("awkward", 2880, 1440, 32, 4),  # as gpt-oss-20b, with half its I: no multiple of 64
        )
    }
)
"""Shapes by name."""


def parse_shapes(text: str) -> list[Shape]:
    """Read a list of shapes.

    Parameters
    ----------
    text : str
        Names of `SHAPES`, or ``HxIxExK`` as in ``2048x768x128x8``, with commas between them.

    Returns
    -------
    list of Shape

    Raises
    ------
    KtkArgumentError
        If one is neither, or not a possible layer.
    """
    shapes = []
    for word in _words(text, "shape"):
        if word in SHAPES:
            shapes.append(SHAPES[word])
            continue
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", word)
        if match is None:
            raise KtkArgumentError(
                f"unknown shape {word!r}; valid shapes: {', '.join(SHAPES)}, or HxIxExK as in 2048x768x128x8"
            )
        hidden, intermediate, experts, top_k = map(int, match.groups())
        for name, value in (("H", hidden), ("I", intermediate), ("E", experts)):
            checked_int(f"{name} of shape {word}", value, 1)
        checked_int(f"K of shape {word}", top_k, 1, experts)
        shapes.append(Shape(word, hidden, intermediate, experts, top_k))
    return shapes


@dataclass(frozen=True)
class FormatChoice:
    """A weight format as `ktk bench` names it: ``bf16``, ``int8-g512``, ``int4-row``, ``int8-g128-plain``.

    Parameters
    ----------
    name : str
    format : str
        A key of `ktk.config.FORMATS`.
    group_size : int
        Input columns a scale, 0 for one scale a row or none.
    rotated : bool, default False
        Whether columns are rotated before they are quantised.
    """

    name: str
    format: str
    group_size: int
    rotated: bool = False

    @property
    def code(self) -> int:
        """Value of the C enumeration ``ktk_format``."""
        return format_info(self.format).code


def _format_choices() -> dict[str, FormatChoice]:
    choices = {}
    for info in FORMATS.values():
        for group in sorted(info.group_sizes, reverse=True):
            ending = "" if len(info.group_sizes) == 1 else f"-g{group}" if group else "-row"
            choices[info.name + ending] = FormatChoice(info.name + ending, info.name, group, info.rotates)
    return choices


FORMAT_CHOICES: Mapping[str, FormatChoice] = MappingProxyType(_format_choices())
"""All formats and group sizes by name, rotated where the format rotates."""

PLAIN = "-plain"
"""Ending of a name of `FORMAT_CHOICES`, or of a format, for columns that are not rotated."""

_DEFAULT_NAMES = {
    info.name: name
    for info in FORMATS.values()
    for name, choice in FORMAT_CHOICES.items()
    if (choice.format, choice.group_size) == (info.name, info.default_group_size)
}


def parse_formats(text: str) -> list[FormatChoice]:
    """Read a list of formats.

    Parameters
    ----------
    text : str
        Names of `FORMAT_CHOICES`, or of `ktk.config.FORMATS` for the group size that layers have by default,
        with commas between them. With ``-plain`` behind it, a format that rotates does not.

    Returns
    -------
    list of FormatChoice

    Raises
    ------
    KtkArgumentError
        If there is no such format.
    """
    choices: dict[str, FormatChoice] = {}
    for word in _words(text, "format"):
        base = word.removesuffix(PLAIN)
        choice = FORMAT_CHOICES.get(_DEFAULT_NAMES.get(base, base))
        if choice is not None and base != word:
            choice = replace(choice, name=choice.name + PLAIN, rotated=False) if choice.rotated else None
        if choice is None:
            rotating = " and ".join(info.name for info in FORMATS.values() if info.rotates)
            raise KtkArgumentError(
                f"unknown format {word!r}; valid formats: {', '.join(FORMAT_CHOICES)}; names of {rotating} "
                f"also with {PLAIN} behind them, for columns that are not rotated"
            )
        choices[choice.name] = choice
    return list(choices.values())


def parse_batches(text: str, name: str = "batch") -> list[int]:
    """Read positive numbers with commas between them; `KtkArgumentError` for anything else."""
    numbers = []
    for word in _words(text, name):
        if not word.isdecimal() or int(word) < 1:
            raise KtkArgumentError(f"a {name} must be a number of at least 1, got {word!r}")
        numbers.append(checked_int(name, int(word), 1))
    return numbers


def _words(text: str, what: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise KtkArgumentError(
            f"a {what} is missing in {text!r}; give at least one, with commas between them"
        )
    return list(dict.fromkeys(words))


class GaussianWeights:
    """Weights of any number of experts, cut from two pools of normal numbers at an offset each.

    Every matrix has entries of variance 1 / columns, so that activations keep their size. Experts overlap in
    their values but not in what they compute, and take no memory of their own.

    Parameters
    ----------
    shape : Shape
    seed : int, default 1
    """

    _SLACK = 1 << 20
    # Prime, so that matrices rarely share an offset.
    _STRIDE = 293_003

    def __init__(self, shape: Shape, seed: int = 1) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        size = shape.hidden_size * shape.intermediate_size
        normal = torch.randn(size + self._SLACK, generator=generator)
        self._into = (normal * shape.hidden_size**-0.5).bfloat16()
        self._out_of = (normal * shape.intermediate_size**-0.5).bfloat16()

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate and up [I, H] and down [H, I] of an expert: bfloat16, contiguous, not to be written to."""
        h, i = self.shape.hidden_size, self.shape.intermediate_size

        def cut(pool: torch.Tensor, which: int, rows: int, columns: int) -> torch.Tensor:
            offset = (3 * expert + which) * self._STRIDE % self._SLACK
            return pool[offset : offset + h * i].view(rows, columns)

        return cut(self._into, 0, i, h), cut(self._into, 1, i, h), cut(self._out_of, 2, h, i)


def routes(
    shape: Shape, tokens: int, seed: int, *, skewed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of a batch, and their weights.

    Even routing draws the experts of each token without preference. Skewed routing gives expert 0 to a
    quarter of the tokens (rounded up) and draws the rest among the others, so that both have ``tokens *
    top_k`` rows.

    Parameters
    ----------
    shape : Shape
    tokens : int
    seed : int
    skewed : bool, default False

    Returns
    -------
    ids, weights : torch.Tensor
        int64 and float32 [tokens, top_k]; the ids of a token differ, its weights sum to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, shape.num_experts, generator=generator)
    if skewed and shape.num_experts > shape.top_k:
        hot = torch.zeros(tokens, dtype=torch.bool)
        hot[torch.randperm(tokens, generator=generator)[: math.ceil(tokens / 4)]] = True
        scores[:, 0] = torch.where(hot, 2.0, -1.0)
    ids = scores.topk(shape.top_k, dim=1).indices.contiguous()
    weights = torch.rand(tokens, shape.top_k, generator=generator) + 0.1
    return ids, (weights / weights.sum(1, keepdim=True)).contiguous()
