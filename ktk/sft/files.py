"""Files that appear only when they are whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ktk.errors import KtkArgumentError

__all__ = ["read_tensors", "replaced_folder", "sync_folder", "write_json", "write_tensors"]


def sync_folder(path: Path) -> None:
    """Make renames within a folder last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place at the end of the block, or is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync_file(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file. Tensors that share memory are written each by itself."""
    ready = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with _replaced(path) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    KtkArgumentError
        If it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise KtkArgumentError(f"{path} cannot be read as safetensors: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    with _replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` at the end of the block, or is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
        sync_folder(temporary)
        temporary.chmod(0o755)
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.replace(old / "content")
        temporary.replace(path)
        sync_folder(path.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
