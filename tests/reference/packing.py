"""The packed parts of one expert, byte for byte as `docs/formats.md` lays them out."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from .quantise import (
    BlockScaled,
    QuantisedMatrix,
    int4_codes,
    quantise_fp8,
    quantise_int4,
    quantise_int8,
)
from .rotation import rotate
from .rounding import BF16, Array, F32Array, round_bf16, to_f32

U8Array = npt.NDArray[np.uint8]

FORMAT_BF16, FORMAT_INT8, FORMAT_INT4, FORMAT_FP8 = 0, 1, 2, 3

PART_NAMES = (
    "gate_up_weight",
    "gate_up_scale",
    "gate_up_factors",
    "down_weight",
    "down_scale",
    "down_factors",
    "gate_bias",
    "up_bias",
    "down_bias",
)

TILE_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Format:
    """Weight format of a layer.

    Attributes
    ----------
    kind : int
        FORMAT_BF16, FORMAT_INT8, FORMAT_INT4 or FORMAT_FP8.
    group : int
        INT8, INT4: input columns of a group, 0 for one scale a row and no groups; FP8: 128; 0 otherwise.
    rotated : bool
        INT8, INT4: whether columns are rotated before they are quantised.
    """

    kind: int
    group: int = 0
    rotated: bool = False

    @property
    def integer(self) -> bool:
        """Whether weights and activations are integers."""
        return self.kind in (FORMAT_INT8, FORMAT_INT4)

    @property
    def scale_group(self) -> int:
        """Input columns that share a weight scale, 0 for the whole row; INT4 has integer factors instead."""
        return 0 if self.kind == FORMAT_INT4 else self.group

    @property
    def input_group(self) -> int:
        """Columns of the layer's input that share a scale, 0 for the whole row."""
        return max(self.scale_group, 128) if self.scale_group else 0

    @property
    def z_group(self) -> int:
        """Columns of the intermediate that share a scale, and the unit that NUMA shards are cut in."""
        return 256 if self.rotated else 128

    @property
    def down(self) -> Format:
        """Format of the down projection: no group is wider than those of the intermediate."""
        return dataclasses.replace(self, group=min(self.group, self.z_group))

    @property
    def k_step(self) -> int:
        """Input columns of one tile."""
        return 64 if self.integer else 32

    def __str__(self) -> str:
        if self.kind == FORMAT_BF16:
            return "bf16"
        if self.kind == FORMAT_FP8:
            return "fp8"
        name = "int8" if self.kind == FORMAT_INT8 else "int4"
        return f"{name}-{self.group or 'row'}{'-rotated' if self.rotated else ''}"

    def quantise(self, weights: Array) -> QuantisedMatrix | F32Array:
        """Weights as the products see them: a `QuantisedMatrix`, or bf16 values kept as fp32."""
        if self.kind == FORMAT_BF16:
            return round_bf16(weights)
        if self.kind == FORMAT_FP8:
            return quantise_fp8(to_f32(weights)).values()
        values = self.rows(weights)
        if self.kind == FORMAT_INT8:
            return quantise_int8(values, self.group)
        return quantise_int4(values, self.group)

    def rows(self, values: Array) -> F32Array:
        """Rows in fp32 as they are quantised: rotated or not."""
        return rotate(to_f32(values)) if self.rotated else to_f32(values)


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """One expert as a checkpoint holds it.

    Attributes
    ----------
    gate, up : ndarray of float32, bfloat16 or float16, shape (I, H)
    down : same dtype, shape (H, I)
    gate_bias, up_bias, down_bias : ndarray of float32, shapes (I,), (I,), (H,), or None
    """

    gate: Array
    up: Array
    down: Array
    gate_bias: F32Array | None = None
    up_bias: F32Array | None = None
    down_bias: F32Array | None = None

    @property
    def hidden_size(self) -> int:
        return int(self.gate.shape[1])

    @property
    def intermediate_size(self) -> int:
        return int(self.gate.shape[0])


def _padded(values: npt.NDArray[np.generic], rows: int, columns: int, fill: int) -> npt.NDArray[np.generic]:
    out = np.full((rows, columns), fill, values.dtype)
    out[: values.shape[0], : values.shape[1]] = values
    return out


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def pack_weight(matrix: QuantisedMatrix | BlockScaled | F32Array, form: Format) -> U8Array:
    """Tiles of one matrix, shape (row blocks, k steps, bytes of a tile)."""
    k_step = form.k_step
    if isinstance(matrix, BlockScaled):
        rows, columns = matrix.codes.shape
        stored = _padded(matrix.codes, _round_up(rows, TILE_ROWS), _round_up(columns, k_step), 0)
        quads8 = stored.reshape(stored.shape[0] // 16, 16, stored.shape[1] // 32, 8, 4)
        ordered = np.ascontiguousarray(quads8.transpose(0, 2, 3, 1, 4))
        return ordered.reshape(*ordered.shape[:2], -1).view(np.uint8)
    if isinstance(matrix, np.ndarray):
        rows, columns = matrix.shape
        padded = _padded(matrix, _round_up(rows, TILE_ROWS), _round_up(columns, k_step), 0)
        halves = padded.astype(BF16).view(np.uint16)
        tiles = halves.reshape(halves.shape[0] // 16, 16, halves.shape[1] // 32, 16, 2)
        ordered = np.ascontiguousarray(tiles.transpose(0, 2, 3, 1, 4))
        return ordered.reshape(*ordered.shape[:2], -1).view(np.uint8)
    rows, columns = matrix.q.shape
    whole = _round_up(rows, TILE_ROWS), _round_up(columns, k_step)
    if matrix.codes is None:
        stored = _padded((matrix.q + 128).astype(np.uint8), *whole, 128)
    else:
        stored = _padded(matrix.codes, *whole, 8)
    if matrix.factors is not None:
        multiplier, offset = matrix.factors[:, -1].astype(np.float32).T
        zeros = np.zeros((rows, 1), np.float32)
        stored[:rows, columns:] = int4_codes(zeros, multiplier, offset - np.float32(128))[0].astype(np.uint8)
    blocks = stored.reshape(stored.shape[0] // 16, 16, stored.shape[1] // 64, 64)
    if form.kind == FORMAT_INT8:
        quads = blocks.reshape(*blocks.shape[:3], 16, 4)
        ordered = np.ascontiguousarray(quads.transpose(0, 2, 3, 1, 4))
        return ordered.reshape(*ordered.shape[:2], -1)
    halves4 = blocks.reshape(*blocks.shape[:3], 2, 8, 4)
    nibbles = (halves4[:, :, :, 0] | (halves4[:, :, :, 1] << 4)).astype(np.uint8)
    ordered = np.ascontiguousarray(nibbles.transpose(0, 2, 3, 1, 4))
    return ordered.reshape(*ordered.shape[:2], -1)


def _by_row_block(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """(rows, groups) to (row blocks, groups, 16), rows past the end zero."""
    padded = _padded(values, _round_up(values.shape[0], TILE_ROWS), values.shape[1], 0)
    return padded.reshape(-1, TILE_ROWS, values.shape[1]).transpose(0, 2, 1)


def _factors(matrix: QuantisedMatrix) -> U8Array:
    """(row blocks, groups, 2: multiplier and offset, 16), rows past the end 1 and 120."""
    assert matrix.factors is not None
    rows = _round_up(matrix.factors.shape[0], TILE_ROWS)
    planes = [_padded(matrix.factors[:, :, i], rows, matrix.factors.shape[1], (1, 120)[i]) for i in (0, 1)]
    return np.stack([_by_row_block(plane) for plane in planes], axis=2).astype(np.uint8)


def _bytes(values: npt.NDArray[np.generic]) -> U8Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _stored_scale(matrix: QuantisedMatrix | BlockScaled) -> npt.NDArray[np.generic]:
    if isinstance(matrix, BlockScaled):
        return matrix.scale
    return matrix.scale.astype(BF16) if matrix.group else matrix.scale


def pack(weights: ExpertWeights, form: Format) -> dict[str, U8Array]:
    """All parts of one expert as flat bytes, keyed by `PART_NAMES`; empty where the format has none."""

    def quantise(matrix: Array, form: Format) -> QuantisedMatrix | BlockScaled | F32Array:
        return quantise_fp8(to_f32(matrix)) if form.kind == FORMAT_FP8 else form.quantise(matrix)

    gate, up = (quantise(matrix, form) for matrix in (weights.gate, weights.up))
    down = quantise(weights.down, form.down)
    parts = {name: np.zeros(0, np.uint8) for name in PART_NAMES}
    parts["gate_up_weight"] = _bytes(np.stack([pack_weight(gate, form), pack_weight(up, form)], axis=2))
    parts["down_weight"] = _bytes(pack_weight(down, form))
    if isinstance(gate, (QuantisedMatrix, BlockScaled)):
        assert not isinstance(up, np.ndarray) and not isinstance(down, np.ndarray)
        pair = [_by_row_block(_stored_scale(matrix)) for matrix in (gate, up)]
        parts["gate_up_scale"] = _bytes(np.stack(pair, axis=2))
        parts["down_scale"] = _bytes(_by_row_block(_stored_scale(down)))
        if form.kind == FORMAT_INT4 and form.group:
            assert isinstance(gate, QuantisedMatrix) and isinstance(up, QuantisedMatrix)
            assert isinstance(down, QuantisedMatrix)
            parts["gate_up_factors"] = _bytes(np.stack([_factors(gate), _factors(up)], axis=2))
            parts["down_factors"] = _bytes(_factors(down))
    for name, bias, rows in (
        ("gate_bias", weights.gate_bias, weights.intermediate_size),
        ("up_bias", weights.up_bias, weights.intermediate_size),
        ("down_bias", weights.down_bias, weights.hidden_size),
    ):
        parts[name] = _bytes(np.zeros(rows, np.float32) if bias is None else bias.astype(np.float32))
    return parts


def unpack_weight(tiles: U8Array, rows: int, columns: int, form: Format) -> npt.NDArray[np.generic]:
    """Stored integers as uint8, or weights as bfloat16, shape (rows, columns), from the tiles of one matrix.

    Written index by index from the layout's definition, so that it does not share a mistake with
    `pack_weight`.
    """
    k_step = form.k_step
    steps = -(-columns // k_step)
    row_block, n = np.divmod(np.arange(rows), 16)
    step, k = np.divmod(np.arange(columns), k_step)
    if form.kind == FORMAT_BF16:
        flat = tiles.reshape(-1, steps, 1024)[:, :, :].reshape(-1).view(np.uint16)
        within = (k // 2) * 32 + (k % 2)
        index = (row_block[:, None] * steps + step) * 512 + within + n[:, None] * 2
        return flat[index].view(BF16)
    if form.kind == FORMAT_FP8:
        within = (k // 4) * 64 + (k % 4)
        index = (row_block[:, None] * steps + step) * 512 + within + n[:, None] * 4
        return tiles.reshape(-1)[index]
    if form.kind == FORMAT_INT8:
        within = (k // 4) * 64 + (k % 4)
        index = (row_block[:, None] * steps + step) * 1024 + within + n[:, None] * 4
        return tiles.reshape(-1)[index]
    low = k % 32
    within = (low // 4) * 64 + (low % 4)
    index = (row_block[:, None] * steps + step) * 512 + within + n[:, None] * 4
    shift = np.where(k >= 32, 4, 0).astype(np.uint8)
    return (tiles.reshape(-1)[index] >> shift) & np.uint8(15)
