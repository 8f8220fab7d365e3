"""The arithmetic behind the figures; docs/benchmarking.md explains each."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ktk.bench.cases import Shape

__all__ = [
    "Bound",
    "Spread",
    "activation_bytes",
    "between",
    "bound_of",
    "operations",
    "relative_l2",
    "spread",
]


def operations(shape: Shape, tokens: int) -> int:
    """Operations of a forward: ``2 * 3 * H * I`` for each token and expert, additions included."""
    return 2 * shape.weights_of_expert * tokens * shape.top_k


def activation_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of a batch's input and output in bfloat16."""
    return 2 * 2 * tokens * shape.hidden_size


@dataclass(frozen=True)
class Bound:
    """The least time that a forward can take.

    Parameters
    ----------
    seconds : float
    limit : str
        What sets it: ``"operations"`` or ``"bytes"``.
    """

    seconds: float
    limit: str


def bound_of(operations: float, bytes_read: float, peak: float, bandwidth: float) -> Bound:
    """``max(operations / peak, bytes / bandwidth)``.

    Parameters
    ----------
    operations, bytes_read : float
        Work of one forward.
    peak, bandwidth : float
        Operations and bytes a second, positive.

    Returns
    -------
    Bound
    """
    by_operations, by_bytes = operations / peak, bytes_read / bandwidth
    if by_operations >= by_bytes:
        return Bound(by_operations, "operations")
    return Bound(by_bytes, "bytes")


@dataclass(frozen=True)
class Spread:
    """Least, middle and largest of several measurements."""

    min: float
    median: float
    max: float

    def scaled(self, factor: float) -> Spread:
        """Each times `factor`, which is positive."""
        return Spread(self.min * factor, self.median * factor, self.max * factor)


def spread(values: Iterable[float]) -> Spread:
    """The `Spread` of at least one value; `ValueError` for none."""
    found = list(values)
    if not found:
        raise ValueError("nothing was measured")
    return Spread(min(found), statistics.median(found), max(found))


def between(samples: Sequence[float]) -> list[float]:
    """Means of neighbours: what a rate was between two measurements of it. One less than `samples`."""
    return [(first + second) / 2 for first, second in itertools.pairwise(samples)]


def relative_l2(found: torch.Tensor, exact: torch.Tensor) -> float:
    """``|found - exact| / |exact|`` over all elements, in float64."""
    wide = exact.double()
    return float((found.double() - wide).norm() / wide.norm())
