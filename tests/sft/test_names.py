"""Names: the export list of kt-kernel's training package, and what importing does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ktk
import ktk.sft
from ktk.errors import KtkArgumentError, KtkError, KtkUnsupportedError

pytestmark = pytest.mark.any_binding


def run_alone(script: str, folder: Path) -> None:
    """In a process of its own, with the ktk of this one."""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder)


KT_KERNEL = [
    "KTConfig",
    "BaseSFTMoEWrapper",
    "KExpertsSFTBuffer",
    "AMXSFTMoEWrapper",
    "MOEArchConfig",
    "get_moe_arch_config",
    "get_moe_module",
    "move_non_experts_to_gpu",
    "get_expert_device",
    "KTAMXError",
    "KTAMXNotAvailableError",
    "KTAMXModelNotSupportedError",
    "KTAMXConfigError",
    "KTMoEFunction",
    "KTMoELayerWrapper",
    "extract_moe_weights",
    "load_experts_from_checkpoint_files",
    "load_experts_from_kt_weight_path",
    "INT8ExpertWeights",
    "kt_adapt_peft_lora",
    "get_kt_lora_params",
    "update_kt_lora_pointers",
    "sync_kt_lora_gradients",
    "save_lora_experts_to_adapter",
    "load_lora_experts_from_adapter",
    "save_kt_moe_to_adapter",
    "load_kt_moe_from_adapter",
    "LoRAExpertMLP",
    "LoRAExperts",
    "wrap_moe_layers_with_kt_wrapper",
    "build_kt_device_map",
    "build_kt_device_map_simplified",
    "get_kt_loading_kwargs",
    "load_kt_model",
    "KTActivationPolicy",
    "get_kt_trainable_params",
    "get_kt_named_trainable_params",
    "get_kt_rank_local_parameter_names",
    "get_activation_checkpoint_context_fn",
    "save_kt_adapter_artifacts",
    "load_kt_adapter_artifacts",
]


@pytest.mark.parametrize("name", KT_KERNEL)
def test_exported(name: str) -> None:
    value = getattr(ktk.sft, name)
    assert name in ktk.sft.__all__
    assert isinstance(value, type) or callable(value)
    assert value.__doc__


@pytest.mark.parametrize(
    "module", ["base", "amx", "arch", "autograd", "config", "layer", "lora", "weights", "wrapper"]
)
def test_modules_have_the_names_that_clients_import_from(module: str) -> None:
    __import__(f"ktk.sft.{module}")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'KTMissing'"):
        ktk.sft.KTMissing  # noqa: B018


def test_importing_ktk_loads_nothing_of_training(tmp_path: Path) -> None:
    script = (
        "import sys, ktk; ktk.KTMoEWrapper; ktk.Experts\n"
        "assert not [name for name in sys.modules if name.startswith(('ktk.sft', 'peft', "
        "'ktk.integrations'))]"
    )
    run_alone(script, tmp_path)


def test_importing_the_package_changes_no_setting(tmp_path: Path) -> None:
    script = (
        "import os, torch\n"
        "before = (torch.get_num_threads(), dict(os.environ))\n"
        "import ktk.sft; ktk.sft.KTConfig(num_threads=1, tp_enabled=True)\n"
        "assert before == (torch.get_num_threads(), dict(os.environ))\n"
        "import sys; assert 'peft' not in sys.modules"
    )
    run_alone(script, tmp_path)


def test_exceptions_are_the_projects() -> None:
    assert issubclass(ktk.sft.KTAMXError, KtkError)
    assert issubclass(ktk.sft.KTAMXConfigError, (ktk.sft.KTAMXError, KtkArgumentError))
    assert issubclass(ktk.sft.KTAMXConfigError, ValueError)
    for name in ("KTAMXNotAvailableError", "KTAMXModelNotSupportedError"):
        kind = getattr(ktk.sft, name)
        assert issubclass(kind, ktk.sft.KTAMXError) and issubclass(kind, KtkUnsupportedError)
