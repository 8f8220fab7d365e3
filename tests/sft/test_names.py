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


#: What else of kt-kernel's training package its clients call or read.
MEMBERS = {
    "AMXSFTMoEWrapper": [
        "forward",
        "backward",
        "submit_forward",
        "sync_forward",
        "submit_backward_async",
        "sync_backward",
        "submit_forward_inference",
        "sync_forward_inference",
        "submit_backward_repack",
        "wait_backward_repack",
        "load_weights",
        "init_lora_weights",
        "update_lora_weights",
        "update_base_weights",
        "init_full_weight_grad_buffers",
        "release_authoritative_optimizer_grads",
    ],
    "KExpertsSFTBuffer": ["get_buffer", "clear_cache"],
    "KTMoEFunction": ["apply", "forward", "backward"],
    "KTMoELayerWrapper": ["forward", "wrapper"],
    "LoRAExperts": ["forward"],
    "KTConfig": ["from_object", "method"],
}


@pytest.mark.parametrize(("name", "member"), [(name, one) for name, all_ in MEMBERS.items() for one in all_])
def test_members(name: str, member: str) -> None:
    assert hasattr(getattr(ktk.sft, name), member)


@pytest.mark.parametrize("base", ["AMXBF16", "AMXINT8", "AMXINT4", "AMXFP8"])
def test_methods_of_the_factory(base: str) -> None:
    sizes = {"layer_idx": 0, "num_experts": 2, "num_experts_per_tok": 1, "hidden_size": 64}
    for suffix in ("_SFT", "_SFT_SkipLoRA"):
        wrapper = ktk.KTMoEWrapper(
            **sizes,
            moe_intermediate_size=32,
            cpuinfer_threads=1,
            chunked_prefill_size=8,
            method=base + suffix,
            mode="sft",
        )
        assert isinstance(wrapper, ktk.sft.AMXSFTMoEWrapper)
        assert (wrapper.method, wrapper.lora_rank, wrapper.lora_alpha) == (base + suffix, 16, 32.0)
        assert (wrapper.lora_dropout, wrapper.max_cache_depth, wrapper.full_weight_grad) == (0.0, 1, False)
        wrapper.close()


@pytest.mark.parametrize(
    "module",
    [
        "amx",
        "arch",
        "artifacts",
        "autograd",
        "base",
        "checkpoint",
        "config",
        "dist_utils",
        "layer",
        "lora",
        "weights",
        "wrapper",
    ],
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
