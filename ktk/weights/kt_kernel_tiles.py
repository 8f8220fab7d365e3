"""kt-kernel's tiles of INT8 and INT4 codes, and ktk's.

A matrix in a file of kt-kernel: rows are cut into blocks of 64 (INT8) or 128 (INT4), and within one columns
into blocks of 3584; the last one of either may be shorter. A block is a grid of tiles of 32 rows by 64 (INT8)
or 128 (INT4) columns, its rows of tiles one after the other. A tile is two halves of 16 rows. A half has 16
lines of 64 bytes: 4 columns of each of the 16 rows side by side. INT8 codes are two's complement. A byte of
INT4 holds the codes of two columns, k of the first 64 in its low nibble and k + 64 in its high one, both
two's complement.

A half of an INT8 tile is a tile of ktk, and so is, with its nibbles dealt out anew, half of the columns of an
INT4 one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ktk.errors import KtkArgumentError

__all__ = ["BLOCKING", "TILE_ROWS", "codes_of", "kt_kernel_tiles", "panels_of_codes", "panels_of_tiles"]

U8Array = npt.NDArray[np.uint8]
I8Array = npt.NDArray[np.int8]

TILE_ROWS = 32
"""Rows of one tile of kt-kernel."""

_COLUMN_BLOCK = 3584
_TILE_BYTES = 2048
_STEP = 64
_OFFSET = {"int8": 128, "int4": 8}


@dataclass(frozen=True)
class Blocking:
    """Sizes of kt-kernel's blocks and tiles for one format."""

    bits: int
    row_block: int
    tile_columns: int


BLOCKING = {
    "int8": Blocking(bits=8, row_block=64, tile_columns=64),
    "int4": Blocking(bits=4, row_block=128, tile_columns=128),
}


def kt_kernel_tiles(raw: U8Array, rows: int, columns: int, format: str) -> U8Array:
    """kt-kernel's tiles by place, ``[rows / 32, columns / tile_columns, 2048]``."""
    blocking = BLOCKING[format]
    step = blocking.tile_columns
    tiles = np.empty((rows // TILE_ROWS, columns // step, _TILE_BYTES), np.uint8)
    for row in range(0, rows, blocking.row_block):
        height = min(blocking.row_block, rows - row)
        for column in range(0, columns, _COLUMN_BLOCK):
            width = min(_COLUMN_BLOCK, columns - column)
            begin = (row * columns + column * height) * blocking.bits // 8
            block = raw[begin : begin + height * width * blocking.bits // 8]
            tiles[
                row // TILE_ROWS : (row + height) // TILE_ROWS, column // step : (column + width) // step
            ] = block.reshape(height // TILE_ROWS, width // step, _TILE_BYTES)
    return tiles


def panels_of_tiles(tiles: U8Array, format: str, label: str) -> U8Array:
    """ktk's tiles of kt-kernel's: ``[rows / 16, columns / 64, bytes of a tile]``."""
    high, wide, _ = tiles.shape
    if format == "int8":
        codes = tiles.reshape(high, wide, 2, 1024).transpose(0, 2, 1, 3).reshape(2 * high, wide, 1024)
        panels: U8Array = codes ^ np.uint8(0x80)
        if not panels.all():
            raise KtkArgumentError(
                f"{label} holds the code -128, and codes of INT8 are -127 to 127; the file is damaged, "
                "convert the layer again"
            )
        return panels
    # From two's complement to a distance from -8, both nibbles at once.
    halves = (tiles ^ np.uint8(0x88)).reshape(high, wide, 2, 16, 64).transpose(0, 2, 1, 3, 4)
    panels = np.empty((high, 2, wide, 2, 8, 64), np.uint8)
    panels[:, :, :, 0] = (halves[..., :8, :] & 15) | (halves[..., 8:, :] << 4)
    panels[:, :, :, 1] = (halves[..., :8, :] >> 4) | (halves[..., 8:, :] & 0xF0)
    return panels.reshape(2 * high, 2 * wide, 512)


def codes_of(panels: U8Array, format: str) -> I8Array:
    """Codes ``[rows, columns]`` of ktk's tiles."""
    high, steps, _ = panels.shape
    if format == "int4":
        panels = np.concatenate([panels & 15, panels >> 4], axis=2)
    lines = panels.reshape(high, steps, 16, 16, 4).transpose(0, 3, 1, 2, 4)
    stored = lines.reshape(16 * high, _STEP * steps).astype(np.int16)
    codes: I8Array = (stored - _OFFSET[format]).astype(np.int8)
    return codes


def panels_of_codes(codes: I8Array, format: str) -> U8Array:
    """ktk's tiles of codes ``[rows, columns]``."""
    rows, columns = codes.shape
    stored = (codes.astype(np.int16) + _OFFSET[format]).astype(np.uint8)
    lines = stored.reshape(rows // 16, 16, columns // _STEP, 16, 4).transpose(0, 2, 3, 1, 4)
    panels: U8Array = lines.reshape(rows // 16, columns // _STEP, 1024)
    if format == "int4":
        panels = panels[..., :512] | (panels[..., 512:] << np.uint8(4))
    return panels
