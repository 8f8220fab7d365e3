"""Checkpoints of a training run: all of it, or nothing, and the last whole one to go on from."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ktk.errors import KtkArgumentError
from ktk.sft.files import read_tensors, replaced_folder, write_json, write_tensors

__all__ = [
    "get_activation_checkpoint_context_fn",
    "last_checkpoint",
    "load_training_state",
    "save_training_state",
]

_NAME = re.compile(r"^checkpoint-(\d+)$")
_STATE = "training_state.json"


def get_activation_checkpoint_context_fn() -> Callable[[], tuple[Any, Any]]:
    """A ``context_fn`` for `torch.utils.checkpoint.checkpoint`.

    Its contexts do nothing: ktk's layers need no help under gradient checkpointing of either kind.
    """

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), contextlib.nullcontext()

    return contexts


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters(remove_duplicate=True) if p.requires_grad}


def save_training_state(
    folder: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    *,
    extra: dict[str, Any] | None = None,
    save_adapter: Callable[[Path], None] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``checkpoint-{step}``: trained parameters, optimizer, schedule, random generators and position.

    The folder appears when it is whole. Older ones beyond `keep` are then removed.

    Parameters
    ----------
    folder : path
        Where checkpoints are.
    step : int
        Optimizer steps done.
    model, optimizer, scheduler
    extra : dict, optional
        Anything that JSON can hold, as the position within the epoch.
    save_adapter : callable, optional
        Called with the checkpoint's folder, to add an adapter that other programs read.
    keep : int, default 2

    Returns
    -------
    pathlib.Path
    """
    root = Path(folder)
    path = root / f"checkpoint-{step}"
    with replaced_folder(path) as temporary:
        write_tensors(temporary / "trained.safetensors", _trained(model))
        generators = {
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }
        torch.save(generators, temporary / "optimizer.pt")
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        random_state = random.getstate()
        state = {
            "step": step,
            "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
            "python": [random_state[0], list(random_state[1]), random_state[2]],
            "extra": extra or {},
        }
        if save_adapter is not None:
            save_adapter(temporary)
        write_json(temporary / _STATE, state)
    for old in sorted(_checkpoints(root))[:-keep]:
        shutil.rmtree(root / f"checkpoint-{old}", ignore_errors=True)
    return path


def _checkpoints(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [
        int(m[1]) for entry in root.iterdir() if (m := _NAME.match(entry.name)) and (entry / _STATE).is_file()
    ]


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint with the most steps in `folder`; None if there is none."""
    steps = _checkpoints(Path(folder))
    return Path(folder) / f"checkpoint-{max(steps)}" if steps else None


def load_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Go on from a checkpoint of `save_training_state`.

    Parameters
    ----------
    path : path
        The folder ``checkpoint-{step}``.
    model, optimizer, scheduler
        Made as for the run that wrote it.

    Returns
    -------
    dict
        ``step``, and ``extra`` as it was given.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint.
    KtkArgumentError
        If it is of a model that trains other parameters.
    """
    folder = Path(path)
    if not (folder / _STATE).is_file():
        raise FileNotFoundError(f"no checkpoint of training at {folder}")
    state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    tensors = read_tensors(folder / "trained.safetensors")
    trained = _trained(model)
    have = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if have != got:
        differing = sorted(name for name in {*have, *got} if have.get(name) != got.get(name))
        raise KtkArgumentError(
            f"{folder} is of a run that trained other parameters: {len(differing)} differ, the first is "
            f"{differing[0]} with {got.get(differing[0])} there and {have.get(differing[0])} here"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    return {"step": state["step"], "extra": state["extra"]}
