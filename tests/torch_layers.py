"""Layers of random weights as PyTorch tensors, and the reference for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ktk.buffers import KExpertsCPUBuffer
from ktk.config import FORMATS
from ktk.experts import BaseMoEWrapper
from reference.moe import Activation, Layer, output_tolerance
from reference.packing import ExpertWeights, Format
from reference.rounding import Array

PLAIN = Activation()

METHOD_FORMATS = {
    "AMXINT4": Format(2, 32, rotated=True),
    "AMXINT8": Format(1, 512, rotated=True),
    "BF16": Format(0),
}


def to_numpy(tensor: torch.Tensor) -> Array:
    """Values of a CPU tensor, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@dataclasses.dataclass
class Weights:
    """gate and up [E, I, H], down [E, H, I], biases [E, I], [E, I], [E, H] or None."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @classmethod
    def random(
        cls,
        seed: int,
        experts: int = 4,
        hidden: int = 80,
        inner: int = 48,
        dtype: torch.dtype = torch.bfloat16,
        bias: bool = False,
    ) -> Weights:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

        gate, up, down = (
            draw(experts, inner, hidden),
            draw(experts, inner, hidden),
            draw(experts, hidden, inner),
        )
        biases = (draw(experts, inner), draw(experts, inner), draw(experts, hidden)) if bias else ()
        return cls(gate.to(dtype), up.to(dtype), down.to(dtype), *biases)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.gate, self.up, self.down

    def biases(self) -> dict[str, torch.Tensor | None]:
        return {"gate_bias": self.gate_bias, "up_bias": self.up_bias, "down_bias": self.down_bias}

    def expert(self, index: int) -> ExpertWeights:
        def bias(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else to_numpy(tensor[index])

        return ExpertWeights(
            *(to_numpy(matrix[index]) for matrix in self.matrices()),
            gate_bias=bias(self.gate_bias),
            up_bias=bias(self.up_bias),
            down_bias=bias(self.down_bias),
        )

    def reference(
        self,
        form: Format,
        activation: Activation = PLAIN,
        masked: tuple[int, ...] = (),
        order: list[int] | None = None,
    ) -> Layer:
        """Reference layer; slot p holds expert `order[p]`."""
        order = list(range(len(self.gate))) if order is None else order
        return Layer([self.expert(index) for index in order], form, activation, masked)


def form_of(name: str, group_size: int | None = None, rotated: bool | None = None) -> Format:
    """Format of the reference for a format name of ktk, with ktk's defaults."""
    info = FORMATS[name]
    group = info.default_group_size if group_size is None else group_size
    return Format(info.code, group, info.rotates if rotated is None else rotated)


def batch(
    seed: int,
    tokens: int,
    experts: int = 4,
    top_k: int = 2,
    hidden: int = 80,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, expert ids (distinct within a token) and weights of a batch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, ids = torch.topk(scores, top_k, dim=-1)
    return x, ids, weights


def assert_matches(
    actual: torch.Tensor, layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """`actual` within the bound of the reference for its dtype."""
    expected = layer.forward(to_numpy(x), to_numpy(ids.to(torch.int64)), to_numpy(weights.to(torch.float32)))
    result = to_numpy(actual)
    difference = np.abs(result.astype(np.float64) - expected.value)
    assert not np.isnan(difference).any()
    assert (difference <= output_tolerance(expected, result.dtype)).all()


def assert_wrapper_matches(
    actual: torch.Tensor, layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """As `assert_matches`, for wrappers, which hand bfloat16 to the layer whatever the dtype of `x`."""
    assert actual.dtype == x.dtype
    assert_matches(actual.to(torch.bfloat16), layer, x.to(torch.bfloat16), ids, weights)


@contextmanager
def clean_buffers() -> Iterator[None]:
    """Nothing cached before and after."""

    def reset() -> None:
        KExpertsCPUBuffer.set_capture_batch_sizes([])
        KExpertsCPUBuffer.clear_buffer_cache()
        BaseMoEWrapper._layer_has_pending_deferred.clear()

    reset()
    yield
    reset()


__all__ = [
    "METHOD_FORMATS",
    "Weights",
    "assert_matches",
    "assert_wrapper_matches",
    "batch",
    "clean_buffers",
    "form_of",
    "to_numpy",
]
