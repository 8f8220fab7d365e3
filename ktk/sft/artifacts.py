"""What an adapter's folder holds beside PEFT's own files, and a list of it that shows a damaged copy."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ktk.sft.adapters import (
    FUSED_FILE,
    load_kt_moe_from_adapter,
    load_lora_experts_from_adapter,
    save_kt_moe_to_adapter,
    save_lora_experts_to_adapter,
)
from ktk.sft.errors import KTAMXConfigError
from ktk.sft.files import write_json
from ktk.sft.modules import moe_layers

__all__ = ["MANIFEST_FILE", "load_kt_adapter_artifacts", "save_kt_adapter_artifacts"]

MANIFEST_FILE = "kt_adapter_manifest.json"
"""``{"version": 1, "files": {name: {"size": bytes, "sha256": hexadecimal}}}`` of what ktk wrote."""

_VERSION = 1


def save_kt_adapter_artifacts(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what a folder with PEFT's files lacks: fused adapters of experts, and extra experts.

    Files that PEFT has written into the folder are kept. `MANIFEST_FILE` comes last and lists what was
    written here; where nothing was, there is none.
    """
    manifest = Path(path) / MANIFEST_FILE
    manifest.unlink(missing_ok=True)
    written = []
    if any(layer.core.lora is not None for _, layer in moe_layers(model)):
        written.append(save_kt_moe_to_adapter(model, path))
    extra = save_lora_experts_to_adapter(model, path)
    files = {file.name: _fingerprint(file) for file in (*written, extra) if file is not None}
    if files:
        write_json(manifest, {"version": _VERSION, "files": files})


def load_kt_adapter_artifacts(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Load what `save_kt_adapter_artifacts` wrote; the number of layers whose adapters were loaded.

    Raises
    ------
    KTAMXConfigError
        If a file is not what the folder's manifest says; folders without one are taken as they are.
    """
    _check_manifest(Path(path))
    layers = 0
    own = [layer for _, layer in moe_layers(model) if layer.core.lora is not None]
    if (Path(path) / FUSED_FILE).is_file() and all(hasattr(layer.core.lora, "adapter_name") for layer in own):
        layers = load_kt_moe_from_adapter(model, path)
    if any("lora_experts" in layer._modules for _, layer in moe_layers(model)):
        load_lora_experts_from_adapter(model, path)
    return layers


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _check_manifest(folder: Path) -> None:
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        version, files = content["version"], dict(content["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise KTAMXConfigError(
            f"{manifest} is damaged ({error!r}); copy the adapter's folder again"
        ) from None
    if version != _VERSION:
        raise KTAMXConfigError(f"{manifest} has version {version!r}, and this ktk reads version {_VERSION}")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or _fingerprint(file) != expected:
            raise KTAMXConfigError(
                f"{file} is not what {MANIFEST_FILE} beside it says: it was changed, or copied in part. Copy "
                f"the adapter's folder again, or remove {MANIFEST_FILE} if the change was meant"
            )
