"""`KTConfig`: spellings, environment, defaults, refusals."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from ktk import KTMoEWrapper
from ktk.sft.config import SFT_METHODS, KTActivationPolicy, KTConfig, sft_method
from ktk.sft.errors import KTAMXConfigError

pytestmark = pytest.mark.any_binding

SEED_NAMES = [
    "backend",
    "num_threads",
    "tp_enabled",
    "threadpool_count",
    "weight_path",
    "expert_checkpoint_path",
    "num_gpu_experts",
    "skip_expert_loading",
    "share_backward_bb",
    "max_cache_depth",
    "model_max_length",
    "lora_rank",
    "lora_alpha",
    "use_lora_experts",
    "lora_expert_num",
    "lora_expert_intermediate_size",
    "checkpoint_files",
    "sharded_metadata",
    "wrap_fn",
    "wrap_kwargs",
]

VALUES: dict[str, tuple[str, Any]] = {
    "backend": ("AMXINT8", "AMXINT8"),
    "num_threads": ("3", 3),
    "tp_enabled": ("true", True),
    "threadpool_count": ("2", 2),
    "weight_path": ("/weights", "/weights"),
    "non_expert_weight_path": ("/rest", "/rest"),
    "expert_weight_format": ("int8", "int8"),
    "weight_lifecycle": ("ephemeral", "ephemeral"),
    "expert_checkpoint_path": ("/experts", "/experts"),
    "num_gpu_experts": ("0", 0),
    "skip_expert_loading": ("no", False),
    "share_backward_bb": ("0", False),
    "share_cache_pool": ("1", True),
    "force_fused_expert_lora": ("on", True),
    "max_cache_depth": ("5", 5),
    "model_max_length": ("4096", 4096),
    "lora_rank": ("32", 32),
    "lora_alpha": ("24.5", 24.5),
    "lora_dropout": ("0.25", 0.25),
    "train_mode": ("hybrid", "hybrid"),
    "full_weight_grad": ("yes", True),
    "use_lora_experts": ("True", True),
    "lora_expert_num": ("3", 3),
    "lora_expert_intermediate_size": ("96", 96),
}


OBJECTS = ["activation_policy", "checkpoint_files", "sharded_metadata", "wrap_fn", "wrap_kwargs"]


def test_fields_are_those_of_kt_kernel() -> None:
    names = {field.name for field in dataclasses.fields(KTConfig)}
    assert names >= {f"kt_{name}" for name in OBJECTS}
    assert {f"kt_{name}" for name in SEED_NAMES} <= names
    assert {f"kt_{name}" for name in VALUES} <= names
    assert all(name.startswith("kt_") for name in names)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("prefix", ["", "kt_"])
def test_both_spellings_are_set_and_read(name: str, prefix: str) -> None:
    text, value = VALUES[name]
    for given in (text, value):
        config = KTConfig(**{prefix + name: given})
        assert getattr(config, name) == getattr(config, f"kt_{name}") == value


@pytest.mark.parametrize("name", VALUES)
def test_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = VALUES[name]
    monkeypatch.setenv(f"ACCELERATE_KT_{name.upper()}", text)
    assert getattr(KTConfig(), name) == value


def test_an_argument_counts_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_KT_LORA_RANK", "8")
    assert KTConfig(lora_rank=4).kt_lora_rank == 4
    monkeypatch.setenv("ACCELERATE_KT_LORA_RANK", "")
    assert KTConfig().kt_lora_rank is None


def test_defaults() -> None:
    config = KTConfig()
    assert (config.kt_backend, config.kt_train_mode, config.kt_lora_dropout) == ("AMXBF16", "lora", 0.0)
    assert config.lora_alpha_of(8) == 16.0 and KTConfig(lora_alpha=3).lora_alpha_of(8) == 3.0
    assert config.kt_activation_policy == KTActivationPolicy("retain", "retain")
    assert config.method.format == "bf16" and config.trains_lora
    assert not KTConfig(train_mode="full").trains_lora
    assert not KTConfig(backend="AMXINT8_SFT_SkipLoRA").trains_lora
    assert KTConfig(full_weight_grad=True).kt_train_mode == "full"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rnak": 8}, "unknown setting 'lora_rnak'; did you mean 'lora_rank'"),
        ({"kt_modelmax_length": 8}, "did you mean 'kt_model_max_length'"),
        ({"zzz": 8}, "unknown setting 'zzz'; settings are kt_backend"),
        ({"lora_rank": 8, "kt_lora_rank": 16}, "kt_lora_rank is given twice, as 8 and 16"),
        ({"lora_rank": 0}, "kt_lora_rank must be between 1 and 256, got 0"),
        ({"lora_rank": 257}, "between 1 and 256"),
        ({"lora_rank": "many"}, "kt_lora_rank must be an integer, got 'many'"),
        ({"lora_rank": True}, "must be an integer"),
        ({"lora_rank": 2.5}, "must be an integer"),
        ({"lora_dropout": 1.0}, "less than 1"),
        ({"lora_dropout": float("nan")}, "between 0.0 and 1.0"),
        ({"tp_enabled": "perhaps"}, "kt_tp_enabled must be true or false"),
        ({"num_gpu_experts": 2}, "kt_num_gpu_experts must be between 0 and 0"),
        ({"backend": "AMXINT3"}, "unknown training method 'AMXINT3'"),
        ({"weight_path": 3}, "kt_weight_path must be a string, got int"),
        ({"weight_lifecycle": "brief"}, "must be one of persistent, ephemeral"),
        ({"train_mode": "full", "backend": "AMXINT8"}, "must be bf16; got int8"),
        ({"activation_policy": "sometimes"}, "must be retain or recompute"),
        ({"activation_policy": {"tpu": "retain"}}, "a mapping with cpu and gpu"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KTAMXConfigError, match=message):
        KTConfig(**settings)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="did you mean 'lora_rank'"):
        KTConfig().lora_rnk  # noqa: B018


def test_sources() -> None:
    config = KTConfig(lora_rank=4)
    assert KTConfig.from_object(config) is config
    assert KTConfig.from_object({"enabled": True, "lora_rank": 4}) == config
    assert KTConfig.from_object(SimpleNamespace(kt_config={"kt_lora_rank": 4})) == config
    assert KTConfig.from_object(SimpleNamespace(_kt_config=config)) is config
    assert KTConfig.from_object(SimpleNamespace(config=SimpleNamespace(kt_config=config))) is config
    assert KTConfig.from_object(None) == KTConfig()
    assert KTConfig(**config.to_dict()) == config
    with pytest.raises(KTAMXConfigError, match="got int"):
        KTConfig.from_object(3)


def test_activation_policy() -> None:
    assert KTConfig(activation_policy="recompute").kt_activation_policy.native == "recompute"
    policy = KTConfig(activation_policy="cpu=recompute,gpu=retain").kt_activation_policy
    assert (policy.cpu, policy.gpu) == ("recompute", "retain")
    assert KTConfig(activation_policy={"cpu": "retain"}).kt_activation_policy.native == "save"


@pytest.mark.parametrize("base", ["AMXBF16_SFT", "AMXINT8_SFT", "INT8_SFT", "AMXINT4_SFT", "AMXFP8_SFT"])
def test_methods(base: str) -> None:
    assert not SFT_METHODS[base].skip_lora
    assert SFT_METHODS[f"{base}_SkipLoRA"].skip_lora
    assert SFT_METHODS[base].format == SFT_METHODS[f"{base}_SkipLoRA"].format
    assert sft_method(base.removesuffix("_SFT")) is SFT_METHODS[base]
    assert sft_method(f"{base.removesuffix('_SFT')}_SkipLoRA") is SFT_METHODS[f"{base}_SkipLoRA"]


#: Of kt-kernel's `KTMoEWrapper` with mode "sft".
KT_KERNEL_INT4 = ["AMXINT4_1_SFT", "AMXINT4_KGroup_SFT", "AMXINT4_1KGroup_SFT"]


@pytest.mark.parametrize("suffix", ["", "_SkipLoRA"])
@pytest.mark.parametrize("name", KT_KERNEL_INT4)
def test_int4_methods_of_kt_kernel(name: str, suffix: str) -> None:
    sizes: dict[str, Any] = {
        "layer_idx": 0,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "cpuinfer_threads": 1,
        "mode": "sft",
        "method": name + suffix,
    }
    for given, columns in (({}, 128), ({"group_size": 32, "zero_point": True}, 32)):
        wrapper: Any = KTMoEWrapper(**sizes, **given)
        assert (wrapper.experts.config.format, wrapper.experts.config.groups) == ("int4", columns)
        assert wrapper.experts.config.rotated
        assert wrapper.trains_lora == (not suffix)
        wrapper.close()
    method = KTConfig(backend=name.removesuffix("_SFT")).method
    assert (method.format, method.group_size) == ("int4", 128)


def test_expert_weight_format_overrides_the_backend() -> None:
    assert KTConfig(expert_weight_format="int4").method.format == "int4"
    assert KTConfig(backend="INT8_SFT", expert_weight_format="int8").method.name == "INT8_SFT"
