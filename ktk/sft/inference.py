"""Running a model with an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ktk.sft.adapters import FUSED_FILE, load_kt_moe_from_adapter
from ktk.sft.config import BACKENDS, KTConfig
from ktk.sft.errors import KTAMXConfigError
from ktk.sft.lora import kt_adapt_peft_lora
from ktk.sft.wrapper import wrap_moe_layers_with_kt_wrapper

__all__ = ["with_adapter"]


def with_adapter(model: Any, path: str | os.PathLike[str]) -> Any:
    """Put an adapter on a model whose experts ktk has packed.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As `ktk.integrations.transformers.load_model` returns it; changed in place.
    path : path
        Folder with PEFT's files, or with ``fused_expert_lora.safetensors``.

    Returns
    -------
    transformers.PreTrainedModel or peft.PeftModel
        In evaluation mode.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    KTAMXConfigError
        If it holds no adapter, or one of another model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder at {folder}")
    peft_files = (folder / "adapter_config.json").is_file()
    if not peft_files and not (folder / FUSED_FILE).is_file():
        raise KTAMXConfigError(f"{folder} has neither adapter_config.json nor {FUSED_FILE}: it is no adapter")
    layers = [module._ktk_layer for module in model.modules() if hasattr(module, "_ktk_layer")]
    config = KTConfig(
        backend=BACKENDS[layers[0].config.format],
        model_max_length=layers[0].config.max_tokens,
        train_mode="lora",
    )
    wrap_moe_layers_with_kt_wrapper(model, config)
    if peft_files:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
        kt_adapt_peft_lora(model, config)
    else:
        load_kt_moe_from_adapter(model, folder)
    return model.eval()
