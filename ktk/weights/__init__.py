"""Weights on disk: readers of model checkpoints and of kt-kernel's weights, and the packed file of ktk."""

from __future__ import annotations

from ktk.weights.checkpoint import Checkpoint, CheckpointLayer, ExpertWeights
from ktk.weights.kt_kernel import KTKernelLayer, KTKernelWeights
from ktk.weights.packed import (
    LAYOUT_VERSION,
    PackedFile,
    PackedLayer,
    PackedWriter,
    discard_packed,
    find_packed,
    packed_path,
)

__all__ = [
    "LAYOUT_VERSION",
    "Checkpoint",
    "CheckpointLayer",
    "ExpertWeights",
    "KTKernelLayer",
    "KTKernelWeights",
    "PackedFile",
    "PackedLayer",
    "PackedWriter",
    "discard_packed",
    "find_packed",
    "packed_path",
]
