"""Reader of the quantised weights of kt-kernel: folders of ``.kt`` files, and the safetensors they are merged
into.

What the files hold, one matrix of an expert and NUMA part at a time:

- ``_layer_<L>/_numa_<n>/<INT8 or INT4>_<gate, up or down>_<expert>_<bytes>Byte_quant_.kt`` has the codes and
  ``..._<bytes>Byte_scale_.kt`` one float32 scale for each output row. Merged, they are flat tensors named
  ``blk.<L>.ffn_<projection>_exps.<expert>.numa.<n>.weight`` and ``.scale``.
- Part n of N has the n-th I / N rows of gate and up, and the n-th I / N columns of down, which therefore has
  N scales for each of its rows.
- An INT8 code stands for ``code * scale``, one of INT4 for ``16 * code * scale``.

`ktk.weights.kt_kernel_tiles` has the order of the bytes. Loading is a matter of moving them, and nothing is
quantised again where the layer has one scale a row as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from ktk.config import checked_int
from ktk.errors import KtkArgumentError, KtkUnsupportedError
from ktk.weights.checkpoint import Checkpoint, CheckpointLayer, ExpertWeights, shards_of
from ktk.weights.kt_kernel_tiles import (
    BLOCKING,
    TILE_ROWS,
    codes_of,
    kt_kernel_tiles,
    panels_of_codes,
    panels_of_tiles,
)
from ktk.weights.packed import PackedLayer

__all__ = ["KTKernelLayer", "KTKernelWeights", "layer_of", "open_weights", "stored_group_size"]

U8Array = npt.NDArray[np.uint8]
F32Array = npt.NDArray[np.float32]

PROJECTIONS = ("gate", "up", "down")

_LAYER = re.compile(r"^_layer_(\d+)$")
_PART = re.compile(r"^_numa_(\d+)$")
_FILE = re.compile(
    r"^(?P<kind>[A-Z0-9_]+?)_(?P<projection>gate|up|down)_(?P<expert>\d+)_(?P<bytes>\d+)Byte_"
    r"(?P<leaf>quant|scale|mins)_?\.kt$"
)
_TENSOR = re.compile(
    r"^blk\.(?P<layer>\d+)\.ffn_(?P<projection>gate|up|down)_exps\.(?P<expert>\d+)\."
    r"(?:numa\.(?P<part>\d+)\.)?(?P<leaf>weight|scale|qzeros)$"
)
_LEAVES = {"quant": "weight", "scale": "scale", "weight": "weight"}

_MANIFEST = "kt-weight-manifest.json"
_LAYOUT = "kt-int8-n32-k64-vnni-v1"
_KINDS = {"INT8": "int8", "INT4": "int4"}


@dataclass(frozen=True)
class _Piece:
    """One stored array: codes or scales of one matrix of one expert and part."""

    label: str
    nbytes: int
    read: Callable[[], U8Array]


_Key = tuple[int, str, int, str]
"""Part, projection, expert, "weight" or "scale"."""


class KTKernelWeights:
    """Weights that kt-kernel has quantised, of all layers of a model.

    Parameters
    ----------
    path : path
        Folder with ``_layer_<L>`` folders of ``.kt`` files, or with merged safetensors; or one safetensors
        file.

    Attributes
    ----------
    path : pathlib.Path

    Raises
    ------
    FileNotFoundError
        If `path` does not exist.
    KtkArgumentError
        If there are no such weights, or a safetensors file or the manifest is damaged.
    KtkUnsupportedError
        If the manifest names another layout.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no weights at {self.path}")
        self._folders = _layer_folders(self.path)
        if self._folders:
            _check_manifest(self.path / _MANIFEST)
        self._shards = {} if self._folders else shards_of(self.path)
        self._tensors: dict[int, list[re.Match[str]]] = {}
        for name in self._shards:
            if match := _TENSOR.match(name):
                self._tensors.setdefault(int(match["layer"]), []).append(match)
        self._open: dict[Path, Any] = {}
        if not self._folders and not self._tensors:
            raise KtkArgumentError(
                f"{self.path} has no weights of kt-kernel: expected folders _layer_<number>, or safetensors "
                "with tensors blk.<layer>.ffn_up_exps.<expert>.numa.<part>.weight"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, ascending."""
        return tuple(sorted(self._folders or self._tensors))

    def formats(self, layer_idx: int) -> tuple[str, ...]:
        """Formats that a layer is there in, of ``"int8"`` and ``"int4"``; none if it is not there."""
        if layer_idx in self._folders:
            return tuple(
                name
                for kind, name in _KINDS.items()
                if any(self._folders[layer_idx].glob(f"_numa_*/{kind}_*_quant_.kt"))
            )
        return (self.layer(layer_idx).format,) if layer_idx in self._tensors else ()

    def layer(self, layer_idx: int, format: str | None = None) -> KTKernelLayer:
        """Experts of one layer.

        Parameters
        ----------
        layer_idx : int
        format : {"int8", "int4"}, optional
            Which to read of a layer that is there in both; not looked at otherwise.

        Raises
        ------
        KtkArgumentError
            If the layer is not there, or a file is missing, or sizes do not go together.
        KtkUnsupportedError
            If it is in a format of kt-kernel that ktk does not read.
        """
        if layer_idx not in self.layers:
            raise KtkArgumentError(f"{self.path} has no layer {layer_idx}; it has {self.layers}")
        if self._folders:
            kind, pieces = _pieces_of_folder(self._folders[layer_idx], format)
        else:
            kind, pieces = None, self._pieces_of_tensors(layer_idx)
        return KTKernelLayer(f"layer {layer_idx} of {self.path}", layer_idx, kind, pieces)

    def _pieces_of_tensors(self, layer_idx: int) -> dict[_Key, _Piece]:
        pieces: dict[_Key, _Piece] = {}
        for match in self._tensors[layer_idx]:
            name = match.string
            if match["part"] is None:
                raise KtkUnsupportedError(
                    f"{self.path} has {name}, experts of kt-kernel's AWQ converter, which ktk does not read; "
                    "load the checkpoint that they were made from"
                )
            key = (int(match["part"]), match["projection"], int(match["expert"]), match["leaf"])
            pieces[key] = self._tensor(name, match["leaf"])
        return pieces

    def _tensor(self, name: str, leaf: str) -> _Piece:
        shard = self._shards[name]
        if shard not in self._open:
            self._open[shard] = _open_shard(shard)
        view = self._open[shard].get_slice(name)
        allowed = ("F32",) if leaf == "scale" else ("I8", "U8")
        if view.get_dtype() not in allowed:
            raise KtkArgumentError(
                f"{name} of {shard} should be {' or '.join(allowed)}, got {view.get_dtype()}; convert the "
                "weights again"
            )
        count = int(np.prod(view.get_shape(), dtype=np.int64))

        def read() -> U8Array:
            array: U8Array = self._open[shard].get_tensor(name).numpy().reshape(-1).view(np.uint8)
            return array

        return _Piece(f"{name} of {shard}", count * (4 if leaf == "scale" else 1), read)

    def close(self) -> None:
        """Close the files. Harmless when closed already."""
        self._open.clear()

    def __enter__(self) -> KTKernelWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _open_shard(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise KtkArgumentError(f"{shard} cannot be read as safetensors: {error}") from error


def _check_manifest(file: Path) -> None:
    """Refuse a layout of the future; sizes and names are checked on the files themselves."""
    if not file.is_file():
        return
    try:
        layout = json.loads(file.read_text(encoding="utf-8"))["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise KtkArgumentError(f"{file} is not a manifest of kt-kernel: {error!r}; copy it again") from error
    if layout != _LAYOUT:
        raise KtkUnsupportedError(
            f"{file} has the layout {layout!r}, and ktk reads {_LAYOUT!r}; load the checkpoint that the "
            "weights were made from"
        )


def _layer_folders(path: Path) -> dict[int, Path]:
    if not path.is_dir():
        return {}
    found = {}
    for entry in path.iterdir():
        if (match := _LAYER.match(entry.name)) and entry.is_dir():
            found[int(match[1])] = entry
    return found


def _pieces_of_folder(folder: Path, wanted: str | None) -> tuple[str, dict[_Key, _Piece]]:
    """Format and files of one layer."""
    found: dict[str, dict[_Key, _Piece]] = {}
    others: list[Path] = []
    for part in sorted(folder.iterdir()):
        number = _PART.match(part.name)
        if number is None or not part.is_dir():
            continue
        for file in sorted(part.iterdir()):
            match = _FILE.match(file.name)
            if match is None:
                # Copies for kt-kernel's backward, and files of other programs.
                continue
            if match["kind"] not in _KINDS or match["leaf"] not in _LEAVES:
                others.append(file)
                continue
            key = (int(number[1]), match["projection"], int(match["expert"]), _LEAVES[match["leaf"]])
            pieces = found.setdefault(_KINDS[match["kind"]], {})
            if key in pieces:
                raise KtkArgumentError(
                    f"{file} and {pieces[key].label} are the same matrix in two sizes; remove those of the "
                    "older conversion"
                )
            pieces[key] = _file_piece(file, int(match["bytes"]))
    if not found and others:
        raise KtkUnsupportedError(
            f"{others[0]} is in a layout that ktk does not read; it reads files of INT8 and INT4. Load the "
            "checkpoint that they were made from"
        )
    if not found:
        raise KtkArgumentError(
            f"{folder} has no weights: expected files such as _numa_0/INT8_up_0_<bytes>Byte_quant_.kt; "
            "convert the layer again"
        )
    if len(found) > 1 and wanted not in found:
        raise KtkArgumentError(
            f"{folder} has the layer in {' and '.join(sorted(found))}; choose one with format, got {wanted!r}"
        )
    chosen = wanted if wanted in found else next(iter(found))
    assert chosen is not None
    return chosen, found[chosen]


def _file_piece(file: Path, nbytes: int) -> _Piece:
    def read() -> U8Array:
        actual = file.stat().st_size
        if actual != nbytes:
            raise KtkArgumentError(
                f"{file} should have the {nbytes} bytes of its name, got {actual}; copy or convert it again"
            )
        return np.fromfile(file, dtype=np.uint8)

    return _Piece(str(file), nbytes, read)


@dataclass(frozen=True)
class _Matrix:
    """One matrix of an expert, all parts together.

    Parameters
    ----------
    panels : ndarray of uint8
        ktk's tiles, ``[rows / 16, columns / 64, bytes of a tile]``.
    scales : ndarray of float32
        ``[parts of the columns, rows]``: what codes are multiplied with.
    """

    panels: U8Array
    scales: F32Array


class KTKernelLayer:
    """Experts of one layer; made by `KTKernelWeights.layer`.

    Attributes
    ----------
    layer_idx, num_experts, hidden_size, intermediate_size : int
    format : str
        ``"int8"`` or ``"int4"``.
    parts : int
        NUMA parts, which the intermediate dimension was cut into when it was quantised.
    bias : bool
        False.
    """

    bias = False

    def __init__(self, label: str, layer_idx: int, kind: str | None, pieces: dict[_Key, _Piece]) -> None:
        self._label = label
        self._pieces = pieces
        self.layer_idx = layer_idx
        self.parts = 1 + max(part for part, *_ in pieces)
        self.num_experts = 1 + max(expert for _, _, expert, _ in pieces)
        for part in range(self.parts):
            if not any(key[0] == part for key in pieces):
                raise KtkArgumentError(
                    f"{label} has {self.parts} NUMA parts, and part {part} is missing; convert the layer "
                    "again"
                )
            for projection in PROJECTIONS:
                for expert in range(self.num_experts):
                    for leaf in ("weight", "scale"):
                        self._piece(part, projection, expert, leaf)
        self.hidden_size = self._piece(0, "down", 0, "scale").nbytes // 4
        rows = self._piece(0, "gate", 0, "scale").nbytes // 4
        self.intermediate_size = rows * self.parts
        self.format = kind or self._guess_format(rows)
        blocking = BLOCKING[self.format]
        if rows == 0 or self.hidden_size == 0 or rows % TILE_ROWS or self.hidden_size % TILE_ROWS:
            raise self._bad_sizes(f"{TILE_ROWS} rows")
        if rows % blocking.tile_columns or self.hidden_size % blocking.tile_columns:
            raise self._bad_sizes(f"{blocking.tile_columns} columns")
        codes = rows * self.hidden_size * blocking.bits // 8
        for (_, projection, _, leaf), piece in pieces.items():
            rows_of = self.hidden_size if projection == "down" else rows
            wanted = codes if leaf == "weight" else 4 * rows_of
            if piece.nbytes != wanted:
                raise KtkArgumentError(
                    f"{piece.label} should have {wanted} bytes in a layer of hidden size {self.hidden_size}, "
                    f"intermediate size {self.intermediate_size} and {self.parts} NUMA parts, got "
                    f"{piece.nbytes}; convert the layer again"
                )

    def _guess_format(self, rows: int) -> str:
        codes = self._piece(0, "gate", 0, "weight").nbytes
        return "int4" if 2 * codes == rows * self.hidden_size else "int8"

    def _bad_sizes(self, unit: str) -> KtkArgumentError:
        return KtkArgumentError(
            f"{self._label} has hidden size {self.hidden_size} and {self.intermediate_size} rows of gate in "
            f"{self.parts} NUMA parts, which do not make whole tiles of {unit}; it is damaged, convert it "
            "again"
        )

    def _piece(self, part: int, projection: str, expert: int, leaf: str) -> _Piece:
        try:
            return self._pieces[part, projection, expert, leaf]
        except KeyError:
            raise KtkArgumentError(
                f"{self._label} lacks the {leaf} of the {projection} projection of expert {expert} in NUMA "
                f"part {part}, of {self.num_experts} experts and {self.parts} parts; convert the layer again"
            ) from None

    @property
    def group_size(self) -> int:
        """Group size that holds these weights best, in a layer that is not rotated: 0, one scale a row, for a
        single part, which is exact.

        With several parts a row of down has a scale for each, to which groups come closer: those of int8
        round them to bf16, those of int4 to one of 16 multiples of a scale.
        """
        if self.parts == 1:
            return 0
        return 128 if self.intermediate_size // self.parts % 128 == 0 else 64

    def _matrix(self, expert: int, projection: str) -> _Matrix:
        panels, scales = [], []
        inner = self.intermediate_size // self.parts
        down = projection == "down"
        rows, columns = (self.hidden_size, inner) if down else (inner, self.hidden_size)
        for part in range(self.parts):
            piece = self._piece(part, projection, expert, "weight")
            tiles = kt_kernel_tiles(piece.read(), rows, columns, self.format)
            panels.append(panels_of_tiles(tiles, self.format, piece.label))
            scale = self._piece(part, projection, expert, "scale")
            values = scale.read().view(np.float32)
            if not (np.isfinite(values) & (values >= 0)).all():
                raise KtkArgumentError(
                    f"{scale.label} holds a scale that is negative or not finite; convert the layer again"
                )
            scales.append(values * np.float32(16) if self.format == "int4" else values)
        if down:
            return _Matrix(np.concatenate(panels, axis=1), np.stack(scales))
        return _Matrix(np.concatenate(panels), np.concatenate(scales)[None])

    def expert(self, expert: int) -> ExpertWeights:
        """Read one expert as float32: ``code * scale``, rounded once.

        Parameters
        ----------
        expert : int
            Logical expert, 0 to ``num_experts - 1``.

        Raises
        ------
        KtkArgumentError
            If there is no such expert, or a file is damaged.
        """
        checked_int("expert", expert, 0, self.num_experts - 1)

        def values(projection: str) -> torch.Tensor:
            matrix = self._matrix(expert, projection)
            codes = codes_of(matrix.panels, self.format).astype(np.float32)
            return torch.from_numpy(codes * _per_column(matrix.scales, codes.shape[1]))

        return ExpertWeights(gate=values("gate"), up=values("up"), down=values("down"))

    def packed(self, expert: int, header: PackedLayer) -> dict[str, npt.NDArray[Any]] | None:
        """Parts of one expert as `header` lays them out, made without going through floating point.

        Parameters
        ----------
        expert : int
            Logical expert.
        header : PackedLayer
            Of a layer of the same sizes.

        Returns
        -------
        dict or None
            By name of the part; None if a layer of this header cannot hold the codes as they are: another
            format, rotated columns, or groups that cross the edge of a NUMA part.

        Raises
        ------
        KtkArgumentError
            If there is no such expert, or a file is damaged.
        """
        checked_int("expert", expert, 0, self.num_experts - 1)
        # Codes of rotated columns are not those of the columns themselves.
        if header.format != self.format or header.rotated:
            return None
        group, down_group = header.group_size, header.config().down_groups
        inner = self.intermediate_size // self.parts
        if group and self.parts > 1 and inner % down_group:
            return None
        gate, up, down = (self._matrix(expert, projection) for projection in PROJECTIONS)
        groups_in = -(-self.hidden_size // group) if group else 1
        groups_out = -(-self.intermediate_size // down_group) if group else 1
        part_of_group = np.arange(groups_out) * down_group // inner

        def by_panel(values: npt.NDArray[Any], groups: int) -> npt.NDArray[Any]:
            panels: npt.NDArray[Any] = values.reshape(groups, -1, 16).transpose(1, 0, 2)
            return panels

        both = np.stack([gate.scales.reshape(-1, 16), up.scales.reshape(-1, 16)], axis=1)[:, None]
        parts: dict[str, npt.NDArray[Any]] = {}
        if group and self.format == "int8":
            parts["gate_up.scale"] = _bf16_bits(np.repeat(both, groups_in, axis=1))
            parts["down.scale"] = _bf16_bits(by_panel(down.scales[part_of_group], groups_out))
        else:
            largest = down.scales.max(axis=0)
            multipliers = np.ones(down.scales.shape, np.uint8)
            if group:
                largest, multipliers = _multiples(down.scales)
            down = _rescaled(down, (multipliers * largest).astype(np.float32), self.format)
            parts["gate_up.scale"] = both
            parts["down.scale"] = by_panel(largest, 1)
            if group:
                ones = np.ones((len(gate.panels), groups_in, 2, 16), np.uint8)
                parts["gate_up.factors"] = _factors(ones)
                parts["down.factors"] = _factors(by_panel(multipliers[part_of_group], groups_out))
        parts["gate_up.weight"] = np.stack([gate.panels, up.panels], axis=2)
        parts["down.weight"] = down.panels
        return parts


def _per_column(scales: F32Array, columns: int) -> F32Array:
    """Scales ``[rows, columns]`` of those of parts, or ``[rows, 1]``."""
    return scales.T if len(scales) == 1 else np.repeat(scales.T, columns // len(scales), axis=1)


def _rescaled(matrix: _Matrix, scales: F32Array, format: str) -> _Matrix:
    """The same with other scales of its parts; codes become those of the nearest values."""
    if (matrix.scales == scales).all():
        return matrix
    # A part without a scale has no codes either.
    ratio = (matrix.scales / np.where(scales == 0, 1, scales)).astype(np.float32)
    codes = codes_of(matrix.panels, format)
    rounded = np.rint(codes * _per_column(ratio, codes.shape[1]))
    most = 127 if format == "int8" else 7
    return _Matrix(panels_of_codes(np.clip(rounded, -most, most).astype(np.int8), format), scales)


def _multiples(scales: F32Array) -> tuple[F32Array, U8Array]:
    """One scale a row and, for each part, the multiple of it, 1 to 16, that comes closest to its scale.

    Of the scales that are the largest one divided by 1 to 16, the one whose multiples come closest is taken,
    the first among equals; it is exact where all are equal. A multiple is never so small that the code 7
    would have to become 8.
    """
    largest = scales.max(axis=0)
    ratio = scales / np.where(largest == 0, np.float32(1), largest)

    def multiples(count: Any) -> Any:
        wanted = ratio * count
        return np.clip(np.maximum(np.rint(wanted), np.ceil(wanted * (14 / 15))), 1, 16)

    best = np.full(largest.shape, np.inf, np.float32)
    steps = np.ones(largest.shape, np.float32)
    for count in range(1, 17):
        error = np.abs(multiples(count) / count - ratio).max(axis=0)
        steps = np.where(error < best, np.float32(count), steps)
        best = np.minimum(best, error)
    return largest / steps, multiples(steps).astype(np.uint8)


def _factors(multipliers: U8Array) -> U8Array:
    """Multipliers and the offsets that put code 8 at zero, beside each other before the last axis."""
    return np.stack([multipliers, 128 - 8 * multipliers], axis=-2).astype(np.uint8)


def _bf16_bits(scales: F32Array) -> npt.NDArray[Any]:
    whole = torch.from_numpy(np.ascontiguousarray(scales))
    bits: npt.NDArray[Any] = whole.to(torch.bfloat16).view(torch.int16).numpy()
    return bits


def open_weights(
    path: str | os.PathLike[str], layer_idx: int, format: str | None = None
) -> Checkpoint | KTKernelWeights:
    """Open whichever weights are at a path: a Hugging Face checkpoint or those of kt-kernel.

    Parameters
    ----------
    path : path
        Folder or file.
    layer_idx : int
        The layer that is wanted.
    format : str, optional
        Format that it is wanted in: where a folder has both, a checkpoint is preferred to ``.kt`` files that
        are in another one.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    KtkArgumentError
        If there are neither.
    """
    root = Path(path)
    folders = _layer_folders(root)
    if folders:
        weights = KTKernelWeights(root)
        if format is None or format in weights.formats(layer_idx):
            return weights
        try:
            return Checkpoint(root)
        except KtkArgumentError:
            return weights
    if root.exists() and any(name.startswith("blk.") and _TENSOR.match(name) for name in shards_of(root)):
        return KTKernelWeights(root)
    return Checkpoint(root)


def layer_of(
    weights: Checkpoint | KTKernelWeights, layer_idx: int, format: str | None
) -> CheckpointLayer | KTKernelLayer:
    """A layer of what `open_weights` returned."""
    if isinstance(weights, KTKernelWeights):
        return weights.layer(layer_idx, format)
    return weights.layer(layer_idx)


def stored_group_size(path: str | os.PathLike[str] | None, layer_idx: int, format: str) -> int | None:
    """Group size that a layer, not rotated, should have to hold kt-kernel's weights at `path` as they are.

    Returns
    -------
    int or None
        None if there are no such weights of this layer in this format.

    Raises
    ------
    KtkArgumentError
        If they are incomplete, or sizes do not go together.
    """
    if not path or format not in BLOCKING or not Path(path).exists():
        return None
    try:
        weights = open_weights(path, layer_idx, format)
    except KtkArgumentError:
        # Whoever loads from there says what is wrong.
        return None
    with weights:
        if not isinstance(weights, KTKernelWeights) or format not in weights.formats(layer_idx):
            return None
        return weights.layer(layer_idx, format).group_size
