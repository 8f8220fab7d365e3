"""`KTConfig`: the settings of fine-tuning.

Every setting has two names, with and without the prefix ``kt_``, and falls back to an environment variable,
``ACCELERATE_KT_`` and its name without the prefix in capitals. Making a configuration changes nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ktk.sft.errors import KTAMXConfigError

__all__ = [
    "ENVIRONMENT_PREFIX",
    "SFT_METHODS",
    "KTActivationPolicy",
    "KTConfig",
    "SFTMethod",
    "sft_method",
]

ENVIRONMENT_PREFIX = "ACCELERATE_KT_"


@dataclass(frozen=True)
class SFTMethod:
    """What a method name stands for.

    Parameters
    ----------
    name : str
        As given to ``KTMoEWrapper(mode="sft", method=...)``.
    format : str
        Weight format of the experts.
    skip_lora : bool
        Whether adapters are left out of both forward and backward.
    group_size : int, optional
        Input columns a scale unless the caller names others; default: that of the format.
    """

    name: str
    format: str
    skip_lora: bool = False
    group_size: int | None = None


# kt-kernel's group methods have groups of 128 unless told otherwise. Those with a 1 have a smallest value
# beside the scale, as all groups of int4 have an offset here; INT4_1, with one a row, gets the widest groups.
_METHODS = (
    SFTMethod("AMXBF16_SFT", "bf16"),
    SFTMethod("AMXINT8_SFT", "int8"),
    SFTMethod("INT8_SFT", "int8"),
    SFTMethod("AMXINT4_SFT", "int4"),
    SFTMethod("AMXFP8_SFT", "fp8"),
    SFTMethod("AMXINT4_1_SFT", "int4", group_size=128),
    SFTMethod("AMXINT4_KGroup_SFT", "int4", group_size=128),
    SFTMethod("AMXINT4_1KGroup_SFT", "int4", group_size=128),
)

SFT_METHODS: Mapping[str, SFTMethod] = MappingProxyType(
    {
        method.name + suffix: dataclasses.replace(method, name=method.name + suffix, skip_lora=bool(suffix))
        for method in _METHODS
        for suffix in ("", "_SkipLoRA")
    }
)
"""Training methods by name. All run on every instruction set."""

BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        method.format: method.name.removesuffix("_SFT")
        for method in _METHODS
        if method.name.startswith("AMX") and method.group_size is None
    }
)
"""`kt_backend` of each weight format."""


def sft_method(name: str) -> SFTMethod:
    """Look a training method up; ``"AMXINT8"`` is taken for ``"AMXINT8_SFT"``.

    Raises
    ------
    KTAMXConfigError
        If there is no such method; the message lists those there are.
    """
    for candidate in (name, f"{name}_SFT", f"{name.removesuffix('_SkipLoRA')}_SFT_SkipLoRA"):
        if candidate in SFT_METHODS:
            return SFT_METHODS[candidate]
    if name == "BF16":
        return SFT_METHODS["AMXBF16_SFT"]
    raise KTAMXConfigError(f"unknown training method {name!r}; valid methods: {', '.join(SFT_METHODS)}")


@dataclass(frozen=True)
class KTActivationPolicy:
    """What is kept of a forward for its backward.

    Parameters
    ----------
    cpu : {"retain", "recompute"}, default "retain"
        ``"retain"`` keeps gate and up of every routed row and the layer's input, 2TH + 4TkI bytes for T
        tokens with k experts each. ``"recompute"`` keeps routing tables and computes the rest again.
    gpu : {"retain", "recompute"}, default "retain"
        What the rest of the model does; ktk takes note of it and does nothing about it. Use the model's own
        gradient checkpointing.
    """

    cpu: Literal["retain", "recompute"] = "retain"
    gpu: Literal["retain", "recompute"] = "retain"

    def __post_init__(self) -> None:
        for name in ("cpu", "gpu"):
            if getattr(self, name) not in ("retain", "recompute"):
                raise KTAMXConfigError(
                    f"kt_activation_policy.{name} must be retain or recompute, got {getattr(self, name)!r}"
                )

    @classmethod
    def of(cls, value: Any) -> KTActivationPolicy:
        """Make one of None, a policy, a mapping, ``"retain"``, or ``"cpu=recompute,gpu=retain"``."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            parts = value.split(",")
            if all("=" in part for part in parts):
                value = dict(part.strip().split("=", 1) for part in parts)
            else:
                return cls(cpu=value)  # type: ignore[arg-type]
        if isinstance(value, Mapping) and set(value) <= {"cpu", "gpu"}:
            return cls(**value)
        raise KTAMXConfigError(
            f"kt_activation_policy must be retain, recompute, or a mapping with cpu and gpu; got {value!r}"
        )

    @property
    def native(self) -> Literal["save", "recompute"]:
        """The policy of the native backend."""
        return "save" if self.cpu == "retain" else "recompute"


def _setting(default: Any, kind: str, **limits: Any) -> Any:
    return field(default=default, metadata={"kind": kind, **limits})


@dataclass(init=False)
class KTConfig:
    """Settings of fine-tuning.

    Keywords are the names of the fields, with or without ``kt_``. A field that is not given takes the value
    of its environment variable, then the default.

    Parameters
    ----------
    kt_backend : str, default "AMXBF16"
        A key of `SFT_METHODS`, its ending ``_SFT`` optional: the format of the experts.
    kt_num_threads : int, optional
        Threads for the experts; default: the physical cores that the process may use.
    kt_tp_enabled : bool, default False
        Spread a layer over several subpools, one a NUMA node.
    kt_threadpool_count : int, default 1
        Subpools, if `kt_tp_enabled`.
    kt_weight_path : str, optional
        Folder of packed weights (``ktk-*.safetensors``), read in place of packing the checkpoint again, or
        of weights that kt-kernel has quantised in the format of `kt_backend`.
    kt_non_expert_weight_path : str, optional
        Checkpoint of everything but the experts; default: the model's.
    kt_expert_weight_format : {"bf16", "int8", "int4", "fp8"}, optional
        Format of the experts; default: what `kt_backend` says.
    kt_weight_lifecycle : {"persistent", "ephemeral"}, default "persistent"
        What becomes of the files in `kt_weight_path`. ``"ephemeral"``: each layer's file is removed once its
        weights are in memory, and none is written, so that weights prepared in ``/dev/shm`` do not take
        memory twice; a file that holds several layers stays.
    kt_expert_checkpoint_path : str, optional
        Checkpoint to read the experts from; default: the model's.
    kt_num_gpu_experts : int, default 0
        Must be 0 in training.
    kt_skip_expert_loading : bool, default True
        Load the model without its experts, which ktk reads by itself.
    kt_share_backward_bb, kt_share_cache_pool : bool
        Without effect: there is one copy of the weights, and saved activations are as large as what was
        routed.
    kt_force_fused_expert_lora : bool, default False
        Use adapters of ktk's own even where PEFT has put some on each expert.
    kt_max_cache_depth : int, default 2
        Forwards of one wrapper that may wait for their backward when it is used without autograd.
    kt_model_max_length : int, default 8192
        Most tokens of one forward of a layer, over all sequences of the batch and all ranks.
    kt_activation_policy : KTActivationPolicy or str, optional
        What is kept between forward and backward; default: retain.
    kt_lora_rank : int, optional
        Rank of ktk's own adapters; default: that of the PEFT configuration, or 16.
    kt_lora_alpha : float, optional
        Default: twice the rank.
    kt_lora_dropout : float, default 0.0
    kt_train_mode : {"lora", "full", "hybrid"}, default "lora"
        Train adapters, the weights themselves (bf16 only), or both.
    kt_full_weight_grad : bool, default False
        Older name of `kt_train_mode` ``"full"``.
    kt_use_lora_experts : bool, default False
        Add small dense experts beside the model's own, see `ktk.sft.LoRAExperts`.
    kt_lora_expert_num : int, default 2
    kt_lora_expert_intermediate_size : int, default 1024
    kt_checkpoint_files : list of str, optional
        Files of the checkpoint; default: those of `kt_expert_checkpoint_path`.
    kt_sharded_metadata : dict, optional
        The checkpoint's index; default: read from the checkpoint.
    kt_wrap_fn, kt_wrap_kwargs
        Called, with the model and these keywords, in place of `ktk.sft.wrap_moe_layers_with_kt_wrapper`.

    Raises
    ------
    KTAMXConfigError
        If a name is unknown (the message suggests one) or a value is out of range.
    """

    kt_backend: str = _setting("AMXBF16", "str")
    kt_num_threads: int | None = _setting(None, "int", low=1)
    kt_tp_enabled: bool = _setting(False, "bool")
    kt_threadpool_count: int = _setting(1, "int", low=1)
    kt_weight_path: str | None = _setting(None, "str")
    kt_non_expert_weight_path: str | None = _setting(None, "str")
    kt_expert_weight_format: str | None = _setting(None, "str", choices=tuple(BACKENDS))
    kt_weight_lifecycle: str = _setting("persistent", "str", choices=("persistent", "ephemeral"))
    kt_expert_checkpoint_path: str | None = _setting(None, "str")
    kt_num_gpu_experts: int = _setting(0, "int", low=0, high=0)
    kt_skip_expert_loading: bool = _setting(True, "bool")
    kt_share_backward_bb: bool = _setting(True, "bool")
    kt_share_cache_pool: bool = _setting(False, "bool")
    kt_force_fused_expert_lora: bool = _setting(False, "bool")
    kt_max_cache_depth: int = _setting(2, "int", low=1)
    kt_model_max_length: int = _setting(8192, "int", low=1)
    kt_activation_policy: Any = _setting(None, "any")  # noqa: RUF009
    kt_lora_rank: int | None = _setting(None, "int", low=1, high=256)
    kt_lora_alpha: float | None = _setting(None, "float")
    kt_lora_dropout: float = _setting(0.0, "float", low=0.0, high=1.0)
    kt_train_mode: str = _setting("lora", "str", choices=("lora", "full", "hybrid"))
    kt_full_weight_grad: bool = _setting(False, "bool")
    kt_use_lora_experts: bool = _setting(False, "bool")
    kt_lora_expert_num: int = _setting(2, "int", low=1)
    kt_lora_expert_intermediate_size: int = _setting(1024, "int", low=1)
    kt_checkpoint_files: list[str] | None = _setting(None, "any")  # noqa: RUF009
    kt_sharded_metadata: dict[str, Any] | None = _setting(None, "any")  # noqa: RUF009
    kt_wrap_fn: Any = _setting(None, "any")  # noqa: RUF009
    kt_wrap_kwargs: dict[str, Any] | None = _setting(None, "any")  # noqa: RUF009

    def __init__(self, **settings: Any) -> None:
        given = _canonical(settings)
        for one in dataclasses.fields(self):
            value = given[one.name] if given.get(one.name) is not None else _from_environment(one)
            setattr(self, one.name, one.default if value is None else _checked(one, value))
        self.kt_activation_policy = KTActivationPolicy.of(self.kt_activation_policy)
        method = sft_method(self.kt_backend)
        if self.kt_full_weight_grad and self.kt_train_mode == "lora":
            self.kt_train_mode = "full"
        self.kt_full_weight_grad = self.kt_train_mode != "lora"
        if self.kt_full_weight_grad and (self.kt_expert_weight_format or method.format) != "bf16":
            raise KTAMXConfigError(
                f"kt_train_mode {self.kt_train_mode} trains the weights themselves, which must be bf16; got "
                f"{self.kt_expert_weight_format or method.format}. Use kt_train_mode lora, or kt_backend "
                f"AMXBF16"
            )
        if self.kt_lora_dropout == 1.0:
            raise KTAMXConfigError("kt_lora_dropout must be less than 1, got 1.0")

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no attribute: the spelling without the prefix.
        full = f"kt_{name}"
        if not name.startswith("_") and full in _FIELDS:
            return object.__getattribute__(self, full)
        raise AttributeError(f"KTConfig has no setting {name!r}{_suggestion(name)}")

    @property
    def method(self) -> SFTMethod:
        """The training method, its format replaced by `kt_expert_weight_format` where that is given."""
        found = sft_method(self.kt_backend)
        if self.kt_expert_weight_format in (None, found.format):
            return found
        name = BACKENDS[self.kt_expert_weight_format]
        return sft_method(name + ("_SkipLoRA" if found.skip_lora else ""))

    @property
    def trains_lora(self) -> bool:
        """Whether adapters are trained."""
        return self.kt_train_mode != "full" and not self.method.skip_lora

    def lora_alpha_of(self, rank: int) -> float:
        """`kt_lora_alpha`, or twice the rank."""
        return 2.0 * rank if self.kt_lora_alpha is None else self.kt_lora_alpha

    @classmethod
    def from_object(cls, source: Any) -> KTConfig:
        """Take settings from wherever they are.

        Parameters
        ----------
        source : KTConfig, mapping, object or None
            A mapping may have the key ``enabled``, which is dropped; an object holds one of these as
            ``kt_config``, ``_kt_config`` or ``config``. None: everything from the environment.

        Returns
        -------
        KTConfig

        Raises
        ------
        KTAMXConfigError
            If there are no settings in it, or one is unknown.
        """
        if source is None:
            return cls()
        if isinstance(source, cls):
            return source
        if isinstance(source, Mapping):
            return cls(**{key: value for key, value in source.items() if key != "enabled"})
        for name in ("kt_config", "_kt_config", "config"):
            held = getattr(source, name, None)
            if held is not None and held is not source:
                return cls.from_object(held)
        raise KTAMXConfigError(
            f"expected a KTConfig, a mapping, or an object with kt_config; got {type(source).__name__}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Settings by name with prefix; the policy as a mapping."""
        return dataclasses.asdict(self)


_FIELDS: dict[str, dataclasses.Field[Any]] = {one.name: one for one in dataclasses.fields(KTConfig)}


def _suggestion(name: str) -> str:
    known = [*_FIELDS, *(full.removeprefix("kt_") for full in _FIELDS)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; settings are {', '.join(_FIELDS)}"


def _canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        full = name if name in _FIELDS else f"kt_{name}"
        if full not in _FIELDS:
            raise KTAMXConfigError(f"unknown setting {name!r}{_suggestion(name)}")
        if full in found and found[full] != value:
            raise KTAMXConfigError(f"{full} is given twice, as {found[full]!r} and {value!r}")
        found[full] = value
    return found


def _from_environment(one: dataclasses.Field[Any]) -> Any:
    if one.metadata["kind"] == "any" and one.name != "kt_activation_policy":
        return None
    text = os.environ.get(ENVIRONMENT_PREFIX + one.name.removeprefix("kt_").upper())
    return text or None


def _checked(one: dataclasses.Field[Any], value: Any) -> Any:
    kind, about = one.metadata["kind"], f"{one.name} must be"
    if kind == "any":
        return value
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if str(value).strip().lower() in ("1", "true", "yes", "on"):
            return True
        if str(value).strip().lower() in ("0", "false", "no", "off"):
            return False
        raise KTAMXConfigError(f"{about} true or false, got {value!r}")
    if kind == "str":
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str):
            raise KTAMXConfigError(f"{about} a string, got {type(value).__name__}")
        if choices := one.metadata.get("choices"):
            text = text.lower()
            if text not in choices:
                raise KTAMXConfigError(f"{about} one of {', '.join(choices)}, got {value!r}")
        return text
    try:
        if isinstance(value, bool):
            raise ValueError
        number: int | float = float(value) if kind == "float" else int(value)
        if kind == "int" and number != float(value):
            raise ValueError
    except (TypeError, ValueError):
        raise KTAMXConfigError(
            f"{about} {'a number' if kind == 'float' else 'an integer'}, got {value!r}"
        ) from None
    low, high = one.metadata.get("low"), one.metadata.get("high")
    if (low is not None and not number >= low) or (high is not None and not number <= high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise KTAMXConfigError(f"{about} {limits}, got {value!r}")
    return number
