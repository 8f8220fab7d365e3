"""Writes experts as kt-kernel does, byte by byte from the description of its layout. For tests of the reader.

The place of every weight is worked out by itself, in plain loops over indices and with no tile operations,
so that nothing of the reader is repeated here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

F32Array = npt.NDArray[np.float32]
I8Array = npt.NDArray[np.int8]

ROW_BLOCK = {"int8": 64, "int4": 128}
TILE_COLUMNS = {"int8": 64, "int4": 128}
COLUMN_BLOCK = 3584


@dataclasses.dataclass
class Quantised:
    """Codes ``[rows, columns]`` and one scale a row, of one NUMA part of a matrix."""

    codes: I8Array
    scales: F32Array

    def values(self, fmt: str) -> F32Array:
        """What kt-kernel's products stand for: int4 is held as 16 times its code."""
        steps = self.codes.astype(np.float32) * np.float32(1 if fmt == "int8" else 16)
        return steps * self.scales[:, None]


def quantise(matrix: F32Array, fmt: str) -> Quantised:
    """By kt-kernel's rules: amax / 127, or amax / 112 with codes rounded to int8 and then to 16ths."""
    amax = np.abs(matrix).max(axis=1)
    scales = (amax / np.float32(127 if fmt == "int8" else 112)).astype(np.float32)
    inverse = np.where(scales > 0, np.float32(1) / np.where(scales > 0, scales, 1), 0).astype(np.float32)
    steps = np.clip(np.rint(matrix * inverse[:, None]), -128, 127).astype(np.int32)
    if fmt == "int4":
        steps = np.sign(steps) * ((np.abs(steps) + 8) // 16)
    return Quantised(steps.astype(np.int8), scales)


def encode(codes: I8Array, fmt: str) -> npt.NDArray[np.uint8]:
    """The bytes of a ``_quant_.kt`` file."""
    rows, columns = codes.shape
    n, k = np.indices(codes.shape)
    block_row, block_column = n // ROW_BLOCK[fmt] * ROW_BLOCK[fmt], k // COLUMN_BLOCK * COLUMN_BLOCK
    height = np.minimum(ROW_BLOCK[fmt], rows - block_row)
    width = np.minimum(COLUMN_BLOCK, columns - block_column)
    wide = TILE_COLUMNS[fmt]
    # Weights before the block, before the row of tiles in it, before the tile in that.
    place = block_row * columns + block_column * height
    place += (n - block_row) // 32 * 32 * width
    place += (k - block_column) // wide * wide * 32
    byte = place if fmt == "int8" else place // 2
    half, line, column = n % 32 // 16, k % 64 // 4, k % 4
    byte = byte + half * 1024 + line * 64 + n % 16 * 4 + column
    raw = np.zeros(codes.size if fmt == "int8" else codes.size // 2, np.uint8)
    stored = codes.astype(np.int16)
    if fmt == "int8":
        raw[byte] = (stored & 0xFF).astype(np.uint8)
        return raw
    high = k % 128 >= 64
    np.bitwise_or.at(raw, byte[~high], (stored[~high] & 15).astype(np.uint8))
    np.bitwise_or.at(raw, byte[high], ((stored[high] & 15) << 4).astype(np.uint8))
    return raw


@dataclasses.dataclass
class StoredLayer:
    """Experts that were quantised part by part: ``parts[n][expert][projection]``."""

    fmt: str
    parts: list[list[dict[str, Quantised]]]

    @classmethod
    def of(
        cls, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, fmt: str, parts: int = 1
    ) -> StoredLayer:
        """Quantise gate and up ``[E, I, H]`` and down ``[E, H, I]`` for a number of NUMA parts."""
        arrays = {"gate": gate, "up": up, "down": down}
        found = []
        for part in range(parts):
            experts = []
            for expert in range(len(gate)):
                one = {}
                for name, tensor in arrays.items():
                    matrix = tensor[expert].float().numpy()
                    piece = np.array_split(matrix, parts, axis=1 if name == "down" else 0)[part]
                    one[name] = quantise(np.ascontiguousarray(piece), fmt)
                experts.append(one)
            found.append(experts)
        return cls(fmt, found)

    def values(self, projection: str) -> torch.Tensor:
        """Float32 weights of all experts, ``[E, rows, columns]``."""
        axis = 1 if projection == "down" else 0
        experts = [
            np.concatenate([part[expert][projection].values(self.fmt) for part in self.parts], axis=axis)
            for expert in range(len(self.parts[0]))
        ]
        return torch.from_numpy(np.stack(experts))

    def pieces(self) -> Iterator[tuple[int, int, str, Quantised]]:
        for number, experts in enumerate(self.parts):
            for expert, one in enumerate(experts):
                for projection, matrix in one.items():
                    yield number, expert, projection, matrix

    def write_files(self, root: Path, layer_idx: int) -> Path:
        """A folder of ``.kt`` files; returns the layer's folder."""
        folder = root / f"_layer_{layer_idx}"
        for number, expert, projection, matrix in self.pieces():
            place = folder / f"_numa_{number}"
            place.mkdir(parents=True, exist_ok=True)
            raw = encode(matrix.codes, self.fmt)
            stem = f"{self.fmt.upper()}_{projection}_{expert}"
            (place / f"{stem}_{raw.nbytes}Byte_quant_.kt").write_bytes(raw.tobytes())
            (place / f"{stem}_{matrix.scales.nbytes}Byte_scale_.kt").write_bytes(matrix.scales.tobytes())
        return folder

    def write_merged(self, file: Path, layer_idx: int) -> None:
        """One safetensors file, as kt-kernel's converter merges them."""
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors(layer_idx), file)

    def tensors(self, layer_idx: int) -> dict[str, torch.Tensor]:
        tensors = {}
        for number, expert, projection, matrix in self.pieces():
            name = f"blk.{layer_idx}.ffn_{projection}_exps.{expert}.numa.{number}"
            tensors[f"{name}.weight"] = torch.from_numpy(encode(matrix.codes, self.fmt).view(np.int8))
            tensors[f"{name}.scale"] = torch.from_numpy(matrix.scales)
        return tensors
