"""The file that describes a run of ``ktk sft``."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktk.config import FORMATS
from ktk.sft.errors import KTAMXConfigError

__all__ = ["RunConfig", "read_run_config"]

_DTYPES = ("auto", "float32", "bfloat16")
_POLICIES = ("retain", "recompute")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A LoRA fine-tune of a Hugging Face checkpoint.

    Parameters
    ----------
    model : str
        Folder of the checkpoint.
    text : str
        UTF-8 text to train on; the last twentieth of it is held out.
    output : str
        Folder for the adapter, checkpoints, `report.json`, the plot and the trace.
    format : str, default "bf16"
        Weight format of the experts: bf16, int8, int4 or fp8.
    dtype : str, default "auto"
        Of everything but the experts: auto, float32 or bfloat16.
    rank : int, default 8
    alpha : float, default 16.0
    target_modules : list of str, default q_proj, k_proj, v_proj, o_proj
        Linear layers that get adapters beside the experts; an empty list for none.
    steps : int, default 100
        Optimizer steps.
    batch : int, default 4
        Sequences a forward.
    gradient_accumulation : int, default 1
        Forwards a step.
    context : int, default 256
        Tokens a sequence.
    learning_rate : float, default 1e-3
        At its highest; it rises for a tenth of the steps and falls to zero along half a cosine.
    gradient_norm : float, default 1.0
        Gradients are scaled down to this norm.
    activation : str, default "retain"
        retain or recompute, see `ktk.sft.KTActivationPolicy`.
    gradient_checkpointing : bool, default False
        Of the whole model.
    threads : int, optional
        For the experts; default: the physical cores that the process may use.
    seed : int, default 0
    save_every : int, default 50
        Steps between checkpoints.
    trace_steps : int, default 0
        Steps at the end of which a trace is written; 0 for none.
    plot : bool, default True
        Draw the losses, if matplotlib is there.
    """

    model: str
    text: str
    output: str
    format: str = "bf16"
    dtype: str = "auto"
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    steps: int = 100
    batch: int = 4
    gradient_accumulation: int = 1
    context: int = 256
    learning_rate: float = 1e-3
    gradient_norm: float = 1.0
    activation: str = "retain"
    gradient_checkpointing: bool = False
    threads: int | None = None
    seed: int = 0
    save_every: int = 50
    trace_steps: int = 0
    plot: bool = True

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))
        for name, choices in (("format", tuple(FORMATS)), ("dtype", _DTYPES), ("activation", _POLICIES)):
            if getattr(self, name) not in choices:
                raise KTAMXConfigError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.rank > 256:
            raise KTAMXConfigError(f"rank must be at most 256, got {self.rank}")

    @property
    def tokens(self) -> int:
        """Tokens of one forward."""
        return self.batch * self.context


_NOT_POSITIVE = ("seed", "trace_steps")


def _checked(one: dataclasses.Field[Any], value: Any) -> Any:
    kind = str(one.type)
    if kind == "int | None" and value is None:
        return None
    if kind.startswith("tuple"):
        if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
            return tuple(value)
        raise KTAMXConfigError(f"{one.name} must be a list of names, got {value!r}")
    if kind == "bool":
        if isinstance(value, bool):
            return value
        raise KTAMXConfigError(f"{one.name} must be true or false, got {value!r}")
    if kind == "str":
        if isinstance(value, (str, os.PathLike)) and str(value):
            return str(value)
        raise KTAMXConfigError(f"{one.name} must be a text, got {value!r}")
    # YAML takes 1e-3 for a text: its numbers need a point.
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise KTAMXConfigError(f"{one.name} must be a number, got {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise KTAMXConfigError(f"{one.name} must be a number, got {value!r}")
    if kind.startswith("int"):
        if value != int(value):
            raise KTAMXConfigError(f"{one.name} must be a whole number, got {value!r}")
        value = int(value)
    else:
        value = float(value)
    if not (value >= 0 if one.name in _NOT_POSITIVE else value > 0) or value == float("inf"):
        least = "at least 0" if one.name in _NOT_POSITIVE else "positive"
        raise KTAMXConfigError(f"{one.name} must be {least}, got {value!r}")
    return value


def read_run_config(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML file with the fields of `RunConfig`; relative paths in it start at its folder.

    Parameters
    ----------
    path : path
    changes : mapping, optional
        Fields that count more than those of the file.

    Raises
    ------
    FileNotFoundError
        If the file, the model or the text is not there.
    KTAMXConfigError
        If a field is unknown, missing, or out of range.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no configuration at {file}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise KTAMXConfigError(f"{file} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise KTAMXConfigError(f"{file} must hold fields and values, as 'model: path/to/checkpoint'")
    fields = {one.name: one for one in dataclasses.fields(RunConfig)}
    for name in content:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; fields are {', '.join(fields)}"
            raise KTAMXConfigError(f"{file}: unknown field {name!r}{hint}")
    content = {**content, **(changes or {})}
    missing = [name for name in ("model", "text", "output") if not content.get(name)]
    if missing:
        raise KTAMXConfigError(f"{file} lacks {', '.join(missing)}")
    for name in ("model", "text", "output"):
        place = Path(str(content[name])).expanduser()
        content[name] = str(place if place.is_absolute() else file.parent / place)
    config = RunConfig(**content)
    if not Path(config.model).is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {config.model} (model)")
    if not Path(config.text).is_file():
        raise FileNotFoundError(f"{file}: there is no file {config.text} (text)")
    return config
