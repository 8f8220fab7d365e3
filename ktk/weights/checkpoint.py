"""Reader of mixture-of-experts checkpoints in the safetensors layout of Hugging Face, one expert at a time.

Two storage styles are understood. One tensor a projection and expert: ``gate_proj``/``up_proj``/``down_proj``
(Qwen, DeepSeek and most others) or ``w1``/``w3``/``w2`` (Mixtral). Fused tensors for all experts:
``gate_up_proj`` and ``down_proj``, either as ``[E, out, in]`` or as ``[E, in, out]``; with biases, gate and
up alternate, as in GPT-OSS. Of the first style also fp8 as in DeepSeek-V3: e4m3 weights with a tensor
``weight_scale_inv`` of a float32 scale for each block of 128 by 128.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ktk.config import checked_int
from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError

__all__ = ["Checkpoint", "CheckpointLayer", "ExpertWeights"]

_INDEX = "model.safetensors.index.json"
_EXPERTS = r"^(?P<base>.*?)layers\.(?P<layer>\d+)\.(?P<block>(?:[a-z_]+\.)?)experts\."
_SINGLE = re.compile(
    _EXPERTS + r"(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<leaf>\w+)$"
)
_FUSED = re.compile(
    _EXPERTS + r"(?P<projection>gate_up_proj|down_proj)(?P<leaf>\.weight|_bias|_blocks|_scales|)$"
)
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SCALE_BLOCK = 128
"""Rows and columns of a block of float8_e4m3fn weights that share a scale."""


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """Weights of one expert, as in the checkpoint.

    Parameters
    ----------
    gate, up : torch.Tensor
        ``[I, H]``, bfloat16, float16, float32 or float8_e4m3fn.
    down : torch.Tensor
        ``[H, I]``, of the same dtype.
    gate_bias, up_bias, down_bias : torch.Tensor, optional
        ``[I]``, ``[I]``, ``[H]``.
    gate_scale, up_scale, down_scale : torch.Tensor, optional
        float8_e4m3fn only: float32, what each block of 128 by 128 weights is multiplied with,
        ``[ceil(I / 128), ceil(H / 128)]``, the same, ``[ceil(H / 128), ceil(I / 128)]``.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_scale: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None

    def dequantised(self) -> ExpertWeights:
        """The same with weights in float32, where they are float8_e4m3fn; else itself."""
        if self.gate_scale is None or self.up_scale is None or self.down_scale is None:
            return self
        return ExpertWeights(
            gate=dequantise(self.gate, self.gate_scale),
            up=dequantise(self.up, self.up_scale),
            down=dequantise(self.down, self.down_scale),
            gate_bias=self.gate_bias,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
        )


def dequantise(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 weights of float8_e4m3fn `codes` ``[rows, columns]`` with a scale for each block of 128 by
    128."""
    rows, columns = codes.shape
    spread = scale.repeat_interleave(SCALE_BLOCK, 0)[:rows].repeat_interleave(SCALE_BLOCK, 1)[:, :columns]
    return codes.to(torch.float32) * spread


@dataclass(frozen=True)
class _Index:
    """Which shard holds which tensor, and which tensors are experts."""

    shards: dict[str, Path]
    layers: dict[int, dict[str, str]]


class Checkpoint:
    """A checkpoint directory. Tensors are read, memory-mapped, when asked for.

    Parameters
    ----------
    path : path
        Directory with ``model.safetensors.index.json``, or with ``*.safetensors`` files; or one such file.

    Attributes
    ----------
    path : pathlib.Path

    Raises
    ------
    KtkArgumentError
        If there are no safetensors files, or none with experts, or the index names a file that is missing.
    FileNotFoundError
        If `path` does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no checkpoint at {self.path}")
        self._index = _read_index(str(self.path.resolve()), _stamp(self.path))
        self._open: dict[Path, Any] | None = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts, ascending."""
        return tuple(sorted(self._index.layers))

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Contents of ``config.json``; empty if there is none."""
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        if not file.is_file():
            return {}
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}

    def layer(self, layer_idx: int) -> CheckpointLayer:
        """Experts of one layer.

        Raises
        ------
        KtkArgumentError
            If the layer has none; the message lists those that do.
        KtkUnsupportedError
            If its weights are quantised in another form than fp8 with blocks of 128 by 128.
        """
        names = self._index.layers.get(layer_idx)
        if names is None:
            raise KtkArgumentError(
                f"{self.path} has no experts in layer {layer_idx}; it has them in {self.layers}"
            )
        return CheckpointLayer(self, layer_idx, names)

    def _handle(self, name: str) -> Any:
        if self._open is None:
            raise KtkStateError(f"the checkpoint {self.path} is closed; open it again")
        shard = self._index.shards[name]
        handle = self._open.get(shard)
        if handle is None:
            try:
                handle = safe_open(shard, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise KtkArgumentError(f"{shard} cannot be read as safetensors: {error}") from error
            self._open[shard] = handle
        return handle

    def _slice(self, name: str) -> Any:
        try:
            return self._handle(name).get_slice(name)
        except SafetensorError as error:
            raise KtkArgumentError(f"{self._index.shards[name]} has no tensor {name}: {error}") from error

    def close(self) -> None:
        """Close the files. Harmless when closed already."""
        self._open = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class CheckpointLayer:
    """Experts of one layer of a `Checkpoint`; made by `Checkpoint.layer`.

    Attributes
    ----------
    layer_idx, num_experts, hidden_size, intermediate_size : int
    bias : bool
        Whether the experts have biases.
    block_scales : bool
        Whether the weights are float8_e4m3fn with a scale for each block of 128 by 128.
    """

    def __init__(self, checkpoint: Checkpoint, layer_idx: int, names: dict[str, str]) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self.layer_idx = layer_idx
        quantised = sorted(key for key in names if key.endswith("?"))
        if quantised:
            raise KtkUnsupportedError(
                f"layer {layer_idx} of {checkpoint.path} is quantised (tensor {names[quantised[0]]}); "
                "convert the experts to bfloat16 first"
            )
        self._fused = "gate_up_proj" in names
        self.bias = "gate_up_proj_bias" in names or "0.gate_proj.bias" in names
        self.block_scales = "0.gate_proj.scale" in names
        if self.block_scales:
            self._check_blocks()
        if self._fused:
            self._require("down_proj")
            inner2, down = self._shape("gate_up_proj"), self._shape("down_proj")
            if len(inner2) != 3 or len(down) != 3:
                raise self._bad_shapes(inner2, down)
            self.num_experts = inner2[0]
            # [E, 2I, H] with [E, H, I], or both the other way round; one of the two always fits, never both.
            if (inner2[1], inner2[2]) == (2 * down[2], down[1]):
                self._transposed = False
                self.hidden_size, self.intermediate_size = down[1], down[2]
            elif (inner2[2], inner2[1]) == (2 * down[1], down[2]):
                self._transposed = True
                self.hidden_size, self.intermediate_size = down[2], down[1]
            else:
                raise self._bad_shapes(inner2, down)
            if down[0] != self.num_experts:
                raise self._bad_shapes(inner2, down)
        else:
            experts = sorted({int(key.split(".")[0]) for key in names})
            if experts != list(range(len(experts))):
                raise KtkArgumentError(
                    f"layer {layer_idx} of {checkpoint.path} has experts {experts}; some are missing"
                )
            self.num_experts = len(experts)
            gate = self._shape("0.gate_proj")
            if len(gate) != 2:
                raise self._bad_shapes(gate, self._shape("0.down_proj"))
            self.intermediate_size, self.hidden_size = gate

    def _check_blocks(self) -> None:
        settings = self._checkpoint.config.get("quantization_config")
        block = settings.get("weight_block_size") if isinstance(settings, dict) else None
        if block is not None and list(block) != [SCALE_BLOCK, SCALE_BLOCK]:
            raise KtkUnsupportedError(
                f"{self._checkpoint.path} has fp8 weights in blocks of {block}; ktk reads blocks of "
                f"{SCALE_BLOCK} by {SCALE_BLOCK}, convert the experts to bfloat16 first"
            )

    def _require(self, key: str) -> str:
        try:
            return self._names[key]
        except KeyError:
            raise KtkArgumentError(
                f"layer {self.layer_idx} of {self._checkpoint.path} lacks the tensor of {key} of its experts"
            ) from None

    def _shape(self, key: str) -> list[int]:
        return list(self._checkpoint._slice(self._require(key)).get_shape())

    def _bad_shapes(self, first: list[int], down: list[int]) -> KtkArgumentError:
        return KtkArgumentError(
            f"layer {self.layer_idx} of {self._checkpoint.path} has experts of shapes that do not go "
            f"together: gate/up {first}, down {down}"
        )

    def _read(self, key: str, expert: int | None, shape: tuple[int, ...] | None) -> torch.Tensor:
        name = self._require(key)
        view = self._checkpoint._slice(name)
        tensor: torch.Tensor = view[:] if expert is None else view[expert]
        if tensor.dtype not in _DTYPES and not (self.block_scales and tensor.dtype == torch.float8_e4m3fn):
            raise KtkUnsupportedError(
                f"{name} is {tensor.dtype}; experts must be bfloat16, float16 or float32, or float8_e4m3fn "
                "with a weight_scale_inv"
            )
        if shape is not None and tuple(tensor.shape) != shape:
            raise KtkArgumentError(f"{name} should have the shape {list(shape)}, got {list(tensor.shape)}")
        return tensor

    def expert(self, expert: int) -> ExpertWeights:
        """Read one expert.

        Parameters
        ----------
        expert : int
            Logical expert, 0 to ``num_experts - 1``.

        Returns
        -------
        ExpertWeights

        Raises
        ------
        KtkArgumentError
            If there is no such expert, or a tensor is missing or has a shape unlike those of expert 0.
        KtkUnsupportedError
            If the weights are not bfloat16, float16, float32, or fp8 with block scales.
        """
        checked_int("expert", expert, 0, self.num_experts - 1)
        hidden, inner = self.hidden_size, self.intermediate_size
        if not self._fused:

            def bias(projection: str, rows: int) -> torch.Tensor | None:
                return self._read(f"{expert}.{projection}.bias", None, (rows,)) if self.bias else None

            def scale(projection: str, rows: int, columns: int) -> torch.Tensor | None:
                if not self.block_scales:
                    return None
                blocks = (-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))
                return self._read(f"{expert}.{projection}.scale", None, blocks).to(torch.float32)

            return ExpertWeights(
                gate=self._read(f"{expert}.gate_proj", None, (inner, hidden)),
                up=self._read(f"{expert}.up_proj", None, (inner, hidden)),
                down=self._read(f"{expert}.down_proj", None, (hidden, inner)),
                gate_bias=bias("gate_proj", inner),
                up_bias=bias("up_proj", inner),
                down_bias=bias("down_proj", hidden),
                gate_scale=scale("gate_proj", inner, hidden),
                up_scale=scale("up_proj", inner, hidden),
                down_scale=scale("down_proj", hidden, inner),
            )
        gate_up = self._read("gate_up_proj", expert, None)
        down = self._read("down_proj", expert, None)
        if self._transposed:
            gate_up, down = gate_up.T, down.T
        if not self.bias:
            return ExpertWeights(gate=gate_up[:inner], up=gate_up[inner:], down=down)
        gate_up_bias = self._read("gate_up_proj_bias", expert, (2 * inner,))
        return ExpertWeights(
            gate=gate_up[0::2],
            up=gate_up[1::2],
            down=down,
            gate_bias=gate_up_bias[0::2],
            up_bias=gate_up_bias[1::2],
            down_bias=self._read("down_proj_bias", expert, (hidden,)),
        )

    def experts(self) -> Iterator[ExpertWeights]:
        """All experts in order, each read when it is asked for."""
        for expert in range(self.num_experts):
            yield self.expert(expert)


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted([*path.glob("*.safetensors"), path / _INDEX]) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())


# The layers of a model are usually loaded one after the other, each opening the same directory; the index of
# a large model takes a noticeable part of a second to read. The stamp makes a changed directory a different
# entry.
@functools.lru_cache(maxsize=2)
def _read_shards(path: str, stamp: tuple[tuple[str, int, int], ...]) -> dict[str, Path]:
    root = Path(path)
    index = root / _INDEX
    shards: dict[str, Path] = {}
    if root.is_dir() and index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {name: root / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KtkArgumentError(
                f"{index} is not an index of a safetensors checkpoint: {error!r}"
            ) from error
        missing = sorted({str(file) for file in set(shards.values()) if not file.is_file()})
        if missing:
            raise KtkArgumentError(
                f"{index} names {missing[0]}, which is missing, and {len(missing) - 1} more"
            )
    else:
        files = sorted(root.glob("*.safetensors")) if root.is_dir() else [root]
        if not files:
            raise KtkArgumentError(
                f"{root} has no *.safetensors files, so it is neither a checkpoint nor packed weights"
            )
        for file in files:
            try:
                with safe_open(file, framework="pt", device="cpu") as handle:
                    shards.update(dict.fromkeys(handle.keys(), file))
            except (SafetensorError, OSError) as error:
                raise KtkArgumentError(f"{file} cannot be read as safetensors: {error}") from error
    return shards


def shards_of(path: Path) -> dict[str, Path]:
    """Which file holds which tensor of a folder of safetensors, or of one file.

    Raises
    ------
    KtkArgumentError
        If there are none, a file cannot be read, or the index names one that is missing.
    """
    return _read_shards(str(path.resolve()), _stamp(path))


@functools.lru_cache(maxsize=2)
def _read_index(path: str, stamp: tuple[tuple[str, int, int], ...]) -> _Index:
    root = Path(path)
    shards = _read_shards(path, stamp)
    return _Index(shards, _expert_layers(root, shards))


def _expert_layers(root: Path, shards: dict[str, Path]) -> dict[int, dict[str, str]]:
    """Tensor names of each layer's experts under a common spelling; keys that end in ``?`` mark quantised
    tensors."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in shards:
        match = _SINGLE.match(name) or _FUSED.match(name)
        if match is None:
            continue
        layers = found.setdefault(match["base"], {})
        projection = _PROJECTIONS.get(match["projection"], match["projection"])
        if match.re is _SINGLE:
            leaf = {"weight": "", "bias": ".bias", "weight_scale_inv": ".scale"}.get(match["leaf"], ".?")
            key = f"{match['expert']}.{projection}{leaf}"
        else:
            key = projection + {".weight": "", "": "", "_bias": "_bias"}.get(match["leaf"], "?")
        layers.setdefault(int(match["layer"]), {})[key] = name
    if not found:
        raise KtkArgumentError(f"{root} has no tensors of mixture-of-experts layers")
    # Next to the model's own layers there may be others of the same names, as those that predict further
    # tokens.
    return max(found.values(), key=len)
