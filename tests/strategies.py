"""Hypothesis strategies: shapes with tails, routings, weights.

Hypothesis draws sizes, kinds and a seed; the arrays themselves come from NumPy's generator, which keeps an
example small enough to shrink.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from reference.moe import Activation
from reference.packing import ExpertWeights
from reference.rounding import BF16, F16, F32, Array, F32Array

settings.register_profile(
    "ktk",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ktk")

DTYPES = (F32, BF16, F16)

ROUTINGS = ("distinct", "one_expert", "duplicates", "invalid", "none", "mixed")

#: Around every size that a tile, a k step, a group, an activation group or a pair of tiles ends at.
_EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257, 300, 384, 385)


def sizes(most: int) -> st.SearchStrategy[int]:
    """Dimensions from 1 to `most`, half of them next to a block edge."""
    return st.one_of(st.sampled_from([e for e in _EDGES if e <= most]), st.integers(1, most))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of one batch."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    batch: int


@st.composite
def shapes(draw: st.DrawFn, most: int = 260, most_batch: int = 48, least_batch: int = 0) -> Shape:
    """Layer sizes up to `most`, batches of `least_batch` to `most_batch`."""
    experts = draw(st.integers(1, 6))
    return Shape(
        hidden=draw(sizes(most)),
        intermediate=draw(sizes(most)),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        batch=draw(st.one_of(st.sampled_from((least_batch, 1, 2)), st.integers(least_batch, most_batch))),
    )


activations = st.builds(
    Activation,
    limit=st.sampled_from((0.0, 0.0, 0.5, 7.0)),
    alpha=st.sampled_from((0.0, 0.0, 1.702, 0.25)),
)

seeds = st.integers(0, 2**32 - 1)


def make_weights(
    rng: np.random.Generator,
    hidden: int,
    intermediate: int,
    dtype: np.dtype[np.generic] = F32,
    biases: bool = False,
    spread: float = 0.0,
) -> ExpertWeights:
    """Gaussian expert, normalised by fan-in.

    Parameters
    ----------
    rng : numpy.random.Generator
    hidden, intermediate : int
    dtype : numpy.dtype
        F32, BF16 or F16.
    biases : bool
        Whether it has the three biases.
    spread : float
        Standard deviation, in powers of two, of a factor on each row; the default, 0, gives none.
    """

    def matrix(rows: int, columns: int) -> Array:
        values = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        values *= np.exp2(spread * rng.standard_normal((rows, 1)))
        return values.astype(np.float32).astype(dtype)

    def bias(rows: int) -> F32Array | None:
        return rng.standard_normal(rows).astype(np.float32) if biases else None

    return ExpertWeights(
        matrix(intermediate, hidden),
        matrix(intermediate, hidden),
        matrix(hidden, intermediate),
        bias(intermediate),
        bias(intermediate),
        bias(hidden),
    )


def make_input(rng: np.random.Generator, batch: int, hidden: int, dtype: np.dtype[np.generic] = F32) -> Array:
    """Gaussian rows, shape (batch, hidden), a few of them far larger, far smaller, or zero."""
    x = rng.standard_normal((batch, hidden))
    x *= rng.choice([1.0, 1.0, 1.0, 1.0, 30.0, 1e-3, 0.0], (batch, 1))
    return x.astype(np.float32).astype(dtype)


def make_routing(
    rng: np.random.Generator, kind: str, batch: int, experts: int, top_k: int
) -> tuple[npt.NDArray[np.int64], F32Array]:
    """Expert ids int64 and routing weights float32, both of shape (batch, top_k).

    Kinds: `distinct` experts within a token; `one_expert` for all tokens; `duplicates` within a token;
    `invalid` mixes in ids below 0 and past the last; `none` has nothing else; `mixed` draws a kind a token.
    """
    ids = np.empty((batch, top_k), np.int64)
    outside = np.array([-1, -1, experts, experts + 7, 2**31, -(2**40), 2**63 - 1, -(2**63)], np.int64)
    for token in range(batch):
        chosen = ROUTINGS[rng.integers(len(ROUTINGS) - 1)] if kind == "mixed" else kind
        if chosen == "one_expert":
            ids[token] = -1
            ids[token, rng.integers(top_k)] = experts // 2
        elif chosen == "duplicates":
            ids[token] = rng.integers(experts, size=top_k)
        elif chosen == "none":
            ids[token] = rng.choice(outside, top_k)
        else:
            ids[token] = rng.permutation(experts)[:top_k]
            if chosen == "invalid":
                hidden = rng.random(top_k) < 0.5
                ids[token, hidden] = rng.choice(outside, int(hidden.sum()))
    weights = rng.standard_normal((batch, top_k)).astype(np.float32)
    return ids, weights
