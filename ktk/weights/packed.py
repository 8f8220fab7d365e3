"""The packed file: experts in the layout the kernels read, in a self-describing safetensors file.

A file holds one or more layers. Each part of a layer (`PackedLayer.parts`) is one tensor
``layers.<layer>.experts.<part>`` whose first dimension is the logical expert; the others spell out the tiles,
which do not depend on the number of NUMA nodes, threads or the instruction set. The metadata holds what a
reader needs to know besides: layout version, shapes, weight format, activation, and where the weights came
from.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from ktk.config import LayerConfig, checked_int, format_info
from ktk.errors import KtkArgumentError, KtkStateError

__all__ = [
    "LAYOUT_VERSION",
    "PackedFile",
    "PackedLayer",
    "PackedWriter",
    "PartSpec",
    "discard_packed",
    "find_packed",
    "packed_path",
]

LAYOUT_VERSION = 3
"""Version of the tensor names, tile layouts and metadata. A reader refuses any other."""

_KIND = "ktk"
_DTYPE_BYTES = {"BF16": 2, "F32": 4, "U8": 1}
_MAX_HEADER_BYTES = 100_000_000
_TILE_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """One part of every expert of a layer.

    Parameters
    ----------
    name : str
        Last piece of the tensor's name, such as ``"gate_up.weight"``.
    code : int
        Value of the C enumeration ``ktk_part``.
    dtype : str
        safetensors dtype: ``"BF16"``, ``"F32"`` or ``"U8"``.
    shape : tuple of int
        Of one expert.
    """

    name: str
    code: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return prod(self.shape) * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """Header of one layer in a packed file. Values are checked on construction, as by `LayerConfig`.

    Parameters
    ----------
    layer_idx : int
        Number of the layer within its model.
    num_experts, num_experts_per_tok, hidden_size, intermediate_size : int
        E (logical experts), k, H and I.
    format : str
        A key of `ktk.config.FORMATS`.
    group_size : int
        Input columns of a group; 0 for one scale a row or no scales.
    rotated : bool, default False
        Whether columns were rotated before they were quantised. Files without this entry are of layers that
        are not.
    swiglu_limit, swiglu_alpha : float
        Activation, see `LayerConfig`.
    bias : bool
        Whether the experts have biases.
    """

    layer_idx: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    format: str
    group_size: int
    rotated: bool = False
    swiglu_limit: float
    swiglu_alpha: float
    bias: bool

    def __post_init__(self) -> None:
        """Check the values by making a layer configuration of them."""
        self.config()

    @classmethod
    def from_config(cls, config: LayerConfig, *, bias: bool, num_experts: int | None = None) -> PackedLayer:
        """Header for the weights of a layer.

        Parameters
        ----------
        config : LayerConfig
            Of the layer.
        bias : bool
            Whether its experts have biases.
        num_experts : int, optional
            Logical experts, where they differ from the layer's slots.
        """
        return cls(
            layer_idx=config.layer_idx,
            num_experts=config.num_experts if num_experts is None else num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            format=config.format,
            group_size=config.groups,
            rotated=config.rotates,
            swiglu_limit=config.swiglu_limit,
            swiglu_alpha=config.swiglu_alpha,
            bias=bias,
        )

    def config(self, **overrides: Any) -> LayerConfig:
        """Layer configuration with this header's values.

        Parameters
        ----------
        **overrides
            Fields of `LayerConfig` to set otherwise, such as ``max_tokens``.
        """
        values = {**asdict(self), **overrides}
        del values["bias"]
        return LayerConfig(**values)

    @property
    def parts(self) -> tuple[PartSpec, ...]:
        """Parts of every expert in file order: those of large elements first, so that all stay aligned."""
        hidden, inner = self.hidden_size, self.intermediate_size
        k_step = 32 if self.format in ("bf16", "fp8") else 64
        tile = {"bf16": (16, 16, 2), "int8": (16, 16, 4), "int4": (8, 16, 4), "fp8": (8, 16, 4)}[self.format]
        weight_dtype = "BF16" if self.format == "bf16" else "U8"

        def blocks(size: int, step: int) -> int:
            return -(-size // step)

        rows_in, rows_out = blocks(inner, _TILE_ROWS), blocks(hidden, _TILE_ROWS)
        parts = [
            PartSpec(
                name="gate_up.weight",
                code=0,
                dtype=weight_dtype,
                shape=(rows_in, blocks(hidden, k_step), 2, *tile),
            ),
            PartSpec(
                name="down.weight", code=3, dtype=weight_dtype, shape=(rows_out, blocks(inner, k_step), *tile)
            ),
        ]
        last: list[PartSpec] = []
        if self.format != "bf16":
            grouped = self.group_size > 0
            groups_in = blocks(hidden, self.group_size) if grouped else 1
            groups_out = blocks(inner, self.config().down_groups) if grouped else 1
            factors = grouped and self.format == "int4"
            scales_in, scales_out = (1, 1) if factors else (groups_in, groups_out)
            scale_dtype = "BF16" if grouped and self.format == "int8" else "F32"
            for name, code, shape in (
                ("gate_up.scale", 1, (rows_in, scales_in, 2, _TILE_ROWS)),
                ("down.scale", 4, (rows_out, scales_out, _TILE_ROWS)),
            ):
                parts.append(PartSpec(name=name, code=code, dtype=scale_dtype, shape=shape))
            if factors:
                # Of each group: multipliers, then offsets.
                pairs_in, pairs_out = (
                    (rows_in, groups_in, 2, 2, _TILE_ROWS),
                    (rows_out, groups_out, 2, _TILE_ROWS),
                )
                last.append(PartSpec(name="gate_up.factors", code=2, dtype="U8", shape=pairs_in))
                last.append(PartSpec(name="down.factors", code=5, dtype="U8", shape=pairs_out))
        if self.bias:
            parts.append(PartSpec(name="gate.bias", code=6, dtype="F32", shape=(inner,)))
            parts.append(PartSpec(name="up.bias", code=7, dtype="F32", shape=(inner,)))
            parts.append(PartSpec(name="down.bias", code=8, dtype="F32", shape=(hidden,)))
        return (*parts, *last)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one packed expert."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class _Region:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _tensor_name(layer_idx: int, part: PartSpec) -> str:
    return f"layers.{layer_idx}.experts.{part.name}"


def _plan(layers: Sequence[PackedLayer]) -> dict[str, _Region]:
    """Tensors of a file that holds `layers`, in file order, with byte offsets into the data."""
    regions: dict[str, _Region] = {}
    offset = 0
    for layer in layers:
        for part in layer.parts:
            name = _tensor_name(layer.layer_idx, part)
            end = offset + layer.num_experts * part.nbytes
            regions[name] = _Region(part.dtype, (layer.num_experts, *part.shape), offset, end)
            offset = end
    return regions


def packed_path(directory: str | os.PathLike[str], format: str, layer_idx: int) -> Path:
    """Name of the packed file of one layer.

    Parameters
    ----------
    directory : path
        Where the layers of a model are kept.
    format : str
        A key of `ktk.config.FORMATS`.
    layer_idx : int
        Number of the layer.

    Returns
    -------
    pathlib.Path
        ``<directory>/ktk-<format>-layer<5 digits>.safetensors``.
    """
    return Path(directory) / f"ktk-{format_info(format).name}-layer{layer_idx:05d}.safetensors"


def find_packed(path: str | os.PathLike[str], format: str, layer_idx: int) -> Path | None:
    """Find the packed file that holds a layer.

    Parameters
    ----------
    path : path
        A packed file, or a directory with one file a layer (`packed_path`) or one for all,
        ``ktk-<format>.safetensors``.
    format : str
        A key of `ktk.config.FORMATS`.
    layer_idx : int
        Number of the layer.

    Returns
    -------
    pathlib.Path or None
        `path` itself if it is a file; None if the directory has none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for candidate in (packed_path(path, format, layer_idx), path / f"ktk-{format}.safetensors"):
        if candidate.is_file():
            return candidate
    return None


def discard_packed(path: str | os.PathLike[str], format: str, layer_idx: int) -> None:
    """Remove the file of one layer from a directory of packed files, if there is one.

    Files that hold several layers, and a `path` that is a file, stay.
    """
    if Path(path).is_dir():
        packed_path(path, format, layer_idx).unlink(missing_ok=True)


class PackedWriter:
    """Writes a packed file piece by piece, and puts it in place only when it is whole.

    The data go to a temporary file beside the target, which is flushed to disk and renamed over it when the
    ``with`` block ends without an exception; until then, and for good otherwise, the target is untouched.

    Parameters
    ----------
    path : path
        The file to make or replace. Its directory is made if missing.
    layers : sequence of PackedLayer
        What the file will hold; sets all offsets, so that pieces may come in any order.
    source : str, default ""
        Where the weights came from, for people who find the file.

    Raises
    ------
    KtkArgumentError
        If there are no layers, or two with the same number.
    OSError
        If the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], layers: Sequence[PackedLayer], *, source: str = ""
    ) -> None:
        if not layers:
            raise KtkArgumentError("a packed file needs at least one layer, got none")
        self._layers = {layer.layer_idx: layer for layer in layers}
        if len(self._layers) != len(layers):
            raise KtkArgumentError(
                f"layers of a packed file need different numbers, got {[layer.layer_idx for layer in layers]}"
            )
        self.path = Path(path)
        self._regions = _plan(layers)
        self._missing = {
            (layer.layer_idx, part.name, expert)
            for layer in layers
            for part in layer.parts
            for expert in range(layer.num_experts)
        }
        header: dict[str, Any] = {
            "__metadata__": {
                "format": _KIND,
                "ktk_layout_version": str(LAYOUT_VERSION),
                "ktk_layers": json.dumps([asdict(layer) for layer in layers]),
                "ktk_source": source,
            }
        }
        for name, region in self._regions.items():
            header[name] = {
                "dtype": region.dtype,
                "shape": list(region.shape),
                "data_offsets": [region.begin, region.end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        # Data that start on a cache line keep every part of the file on one.
        text += b" " * (-(8 + len(text)) % 64)
        self._data_begin = 8 + len(text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.tmp")
        self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._write_all(len(text).to_bytes(8, "little") + text, 0)
        except BaseException:
            self.abort()
            raise

    def _write_all(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self._fd, view, offset)
            view = view[written:]
            offset += written

    def write(self, layer_idx: int, expert: int, part: str, data: Any) -> None:
        """Write one part of one expert.

        Parameters
        ----------
        layer_idx : int
            One of the layers given on construction.
        expert : int
            Logical expert.
        part : str
            Name of a `PartSpec` of the layer.
        data : contiguous buffer
            Exactly the bytes of the part.

        Raises
        ------
        KtkArgumentError
            If there is no such layer, expert or part, or the size is wrong.
        KtkStateError
            If the file is closed.
        """
        if self._fd < 0:
            raise KtkStateError(f"the writer of {self.path} is closed; make a new one")
        layer = self._layers.get(layer_idx)
        spec = next((spec for spec in layer.parts if spec.name == part), None) if layer else None
        if layer is None or spec is None:
            raise KtkArgumentError(f"{self.path} was not planned to have part {part!r} of layer {layer_idx}")
        checked_int("expert", expert, 0, layer.num_experts - 1)
        view = memoryview(data).cast("B")
        if view.nbytes != spec.nbytes:
            raise KtkArgumentError(f"part {part} of an expert has {spec.nbytes} bytes, got {view.nbytes}")
        begin = self._regions[_tensor_name(layer_idx, spec)].begin
        self._write_all(view, self._data_begin + begin + expert * spec.nbytes)
        self._missing.discard((layer_idx, part, expert))

    def commit(self) -> None:
        """Flush the file to disk and put it in place of the target.

        Raises
        ------
        KtkStateError
            If a part was never written; nothing is put in place then.
        """
        if self._fd < 0:
            raise KtkStateError(f"the writer of {self.path} is closed; make a new one")
        if self._missing:
            layer_idx, part, expert = min(self._missing)
            self.abort()
            raise KtkStateError(
                f"{self.path} was not written: part {part} of expert {expert} of layer {layer_idx} is "
                f"missing, and {len(self._missing) - 1} more"
            )
        try:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            os.replace(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise
        # The rename itself lives in the directory. Some file systems cannot flush one; the data are safe by
        # now.
        with contextlib.suppress(OSError):
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def abort(self) -> None:
        """Drop what was written; the target stays as it was. Harmless after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.abort()


class PackedFile:
    """A packed file, memory-mapped. Use it as a context manager, or `close` it.

    Parameters
    ----------
    path : path
        The file.

    Attributes
    ----------
    path : pathlib.Path
    layers : mapping of int to PackedLayer
        Header of each layer, by number.
    source : str
        Where the weights came from.

    Raises
    ------
    KtkArgumentError
        If the file is not a packed file, is cut short, has another layout version, or contradicts itself.
    FileNotFoundError
        If there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            metadata, tensors, self._data_begin = self._read_header(file.read, size)
            self.layers: Mapping[int, PackedLayer] = MappingProxyType(self._read_layers(metadata))
            self.source = metadata.get("ktk_source", "")
            self._regions = _plan(list(self.layers.values()))
            self._check_tensors(tensors)
            data_bytes = max(region.end for region in self._regions.values())
            if size != self._data_begin + data_bytes:
                problem = (
                    "is cut short" if size < self._data_begin + data_bytes else "has bytes after its end"
                )
                raise KtkArgumentError(
                    f"{self.path} {problem}: it has {size} bytes and its header says "
                    f"{self._data_begin + data_bytes}; write it again"
                )
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes: np.ndarray[Any, Any] | None = np.frombuffer(self._map, dtype=np.uint8)

    def _foreign(self, why: str) -> KtkArgumentError:
        return KtkArgumentError(
            f"{self.path} is not a packed file of ktk ({why}); make one with save() of ktk.Experts, or "
            "load_weights_from_tensors with cpu_save=True"
        )

    def _read_header(self, read: Any, size: int) -> tuple[dict[str, str], dict[str, Any], int]:
        head = read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
            raise self._foreign("no safetensors header")
        if 8 + length > size:
            raise KtkArgumentError(
                f"{self.path} is cut short or not a packed file of ktk: it has {size} bytes and its header "
                f"alone would need {8 + length}"
            )
        try:
            header = json.loads(read(length))
        except ValueError:
            raise self._foreign("its header is not JSON") from None
        if not isinstance(header, dict):
            raise self._foreign("its header is not a JSON object")
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != _KIND:
            raise self._foreign("a safetensors file without the metadata of ktk")
        version = metadata.get("ktk_layout_version")
        if version != str(LAYOUT_VERSION):
            raise KtkArgumentError(
                f"{self.path} has layout version {version}, and this ktk reads version {LAYOUT_VERSION}; "
                "pack the weights again"
            )
        return metadata, header, 8 + length

    def _read_layers(self, metadata: dict[str, str]) -> dict[int, PackedLayer]:
        try:
            entries = json.loads(metadata["ktk_layers"])
            names = {field.name for field in fields(PackedLayer)}
            layers = [
                PackedLayer(**{name: {"rotated": False, **entry}[name] for name in names})
                for entry in entries
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise KtkArgumentError(
                f"{self.path} has a damaged description of its layers: {error!r}"
            ) from error
        if not layers:
            raise KtkArgumentError(f"{self.path} has no layers")
        return {layer.layer_idx: layer for layer in layers}

    def _check_tensors(self, tensors: dict[str, Any]) -> None:
        for name, region in self._regions.items():
            expected = {
                "dtype": region.dtype,
                "shape": list(region.shape),
                "data_offsets": [region.begin, region.end],
            }
            if tensors.get(name) != expected:
                raise KtkArgumentError(
                    f"{self.path} contradicts itself: tensor {name} should be {expected}, "
                    f"got {tensors.get(name)}"
                )
        extra = tensors.keys() - self._regions.keys()
        if extra:
            raise KtkArgumentError(
                f"{self.path} has tensors that no layer accounts for, such as {min(extra)}"
            )

    def layer(self, layer_idx: int) -> PackedLayer:
        """Header of a layer.

        Raises
        ------
        KtkArgumentError
            If the file does not hold it; the message lists those it holds.
        """
        try:
            return self.layers[layer_idx]
        except KeyError:
            raise KtkArgumentError(
                f"{self.path} has no layer {layer_idx}; it has {sorted(self.layers)}"
            ) from None

    def address(self, layer_idx: int, expert: int, part: PartSpec) -> int:
        """Address of one part of one expert in the mapping.

        Parameters
        ----------
        layer_idx : int
            A key of `layers`.
        expert : int
            Logical expert.
        part : PartSpec
            One of the parts of the layer.

        Returns
        -------
        int
            Of ``part.nbytes`` readable bytes, valid until `close`.

        Raises
        ------
        KtkArgumentError
            If there is no such layer or expert.
        KtkStateError
            If the file is closed.
        """
        if self._bytes is None:
            raise KtkStateError(f"{self.path} is closed; open it again")
        checked_int("expert", expert, 0, self.layer(layer_idx).num_experts - 1)
        begin = self._regions[_tensor_name(layer_idx, part)].begin
        return int(self._bytes.ctypes.data) + self._data_begin + begin + expert * part.nbytes

    def release_pages(self) -> None:
        """Let go of the pages read so far, so that they count as file cache and not as memory of the
        process."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the file. Harmless when closed already."""
        self._bytes = None
        if self._map is not None:
            self._map.close()
            self._map = None

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
