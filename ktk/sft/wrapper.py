"""Putting ktk into a whole model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ktk.config import LayerConfig
from ktk.errors import KtkUnsupportedError
from ktk.layer import Experts, shared_cpu_infer
from ktk.sft.amx import AMXSFTMoEWrapper
from ktk.sft.arch import (
    MOEArchConfig,
    MoEBlock,
    find_moe_blocks,
    get_moe_arch_config,
    move_non_experts_to_gpu,
)
from ktk.sft.config import KTConfig
from ktk.sft.dist_utils import RankZeroRunner
from ktk.sft.errors import KTAMXConfigError, KTAMXModelNotSupportedError
from ktk.sft.layer import KTMoELayerWrapper
from ktk.sft.transport import Transport, is_distributed, world
from ktk.sft.weights import extract_moe_weights
from ktk.weights.packed import discard_packed, find_packed
from ktk.weights.stored import stored_layout

__all__ = [
    "build_kt_device_map",
    "build_kt_device_map_simplified",
    "get_kt_loading_kwargs",
    "load_kt_model",
    "wrap_moe_layers_with_kt_wrapper",
]

Progress = Callable[[int, int], None]


def wrap_moe_layers_with_kt_wrapper(
    model: Any, kt_plugin: Any = None, *, progress: Progress | None = None
) -> list[AMXSFTMoEWrapper | None]:
    """Take the experts out of a model and run them in ktk from now on, forward and backward.

    Layer by layer, experts are packed and their parameters dropped, so that at most one layer is held
    twice; with `kt_train_mode` ``"full"`` or ``"hybrid"`` the parameters stay, to be trained.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. Its experts are tensors in bfloat16, float16 or float32, or have been read by
        `load_kt_model` already.
    kt_plugin : KTConfig or what `KTConfig.from_object` takes, optional
    progress : callable, optional
        Called with the number of layers done and of all, after each.

    Returns
    -------
    list of AMXSFTMoEWrapper
        One a layer, in the model's order; None on a rank that does not hold the experts. Also kept as
        `model._kt_wrappers`.

    Raises
    ------
    KTAMXModelNotSupportedError
        If the model has no experts that ktk can train, or they have biases or an unknown activation.
    """
    config = KTConfig.from_object(kt_plugin)
    if config.kt_wrap_fn is not None:
        custom: list[AMXSFTMoEWrapper | None] = config.kt_wrap_fn(model, **(config.kt_wrap_kwargs or {}))
        return custom
    blocks = find_moe_blocks(model)
    if not blocks:
        raise KTAMXModelNotSupportedError(
            f"{type(model).__name__} has no experts that ktk can train: it looks for blocks with `experts` "
            f"of "
            "transformers 5, or a list of experts with a router beside it"
        )
    transport = Transport() if is_distributed() else None
    wrappers = []
    for done, block in enumerate(blocks, start=1):
        layer = _wrap_block(model, block, config, transport)
        setattr(block.parent, block.name.rpartition(".")[2], layer)
        wrappers.append(layer.wrapper)
        if progress is not None:
            progress(done, len(blocks))
    model._kt_wrappers = wrappers
    model.__dict__["_kt_config"] = config
    if not config.kt_full_weight_grad and hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save
    return wrappers  # type: ignore[return-value]


def _refuse_to_save(*arguments: Any, **keywords: Any) -> None:
    raise KtkUnsupportedError(
        "the experts of this model are packed by ktk and no longer parameters, so a saved copy would lack "
        "them; save "
        "the adapters (PEFT's save_pretrained, or ktk.sft.save_kt_moe_to_adapter)"
    )


def _wrap_block(
    model: Any, block: MoEBlock, config: KTConfig, transport: Transport | None
) -> KTMoELayerWrapper:
    experts = block.experts
    packed = getattr(experts, "_ktk_layer", None)
    if packed is not None and config.kt_full_weight_grad:
        raise KTAMXConfigError(
            f"kt_train_mode {config.kt_train_mode} needs the weights as parameters; load the model with "
            "from_pretrained, and then call wrap_moe_layers_with_kt_wrapper"
        )
    arch = _arch_of(model, block, packed)
    wrapper = None
    if transport is None or transport.rank == 0:
        wrapper = _make_wrapper(block, packed, arch, config, 1 if transport is None else transport.world_size)
    runner = None
    if transport is not None:
        runner = RankZeroRunner(
            wrapper,
            layer_idx=block.layer_idx,
            num_experts=arch.expert_num,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.intermediate_size,
            transport=transport,
        )
    return KTMoELayerWrapper(
        block.module,
        wrapper,
        moe_config=arch,
        layer_idx=block.layer_idx,
        full_weight_grad=config.kt_full_weight_grad,
        runner=runner,
        policy=config.kt_activation_policy.native,
    )


def _arch_of(model: Any, block: MoEBlock, packed: Experts | None) -> MOEArchConfig:
    """Sizes from the tensors where there are some: a configuration may name several that look alike."""
    experts = block.experts
    if packed is not None:
        sizes = (packed.config.num_experts, packed.config.hidden_size, packed.config.intermediate_size)
    elif not block.fused:
        gate = next(p for n, p in experts[0].named_parameters() if "gate_proj" in n or "w1" in n)
        sizes = (len(experts), gate.shape[1], gate.shape[0])
    elif "down_proj" in experts._parameters:
        count, first, second = experts.down_proj.shape
        sizes = (count, second, first) if experts.is_transposed else (count, first, second)
    else:
        named = get_moe_arch_config(model.config)
        sizes = (named.expert_num, named.hidden_size, named.intermediate_size)
    return MOEArchConfig(
        expert_num=sizes[0],
        hidden_size=sizes[1],
        intermediate_size=sizes[2],
        num_experts_per_tok=_top_k(model, block, sizes[0]),
    )


def _top_k(model: Any, block: MoEBlock, experts: int) -> int:
    gate = block.module._modules.get("gate") or block.module._modules.get("router")
    for owner in (gate, block.module, getattr(block.experts, "config", None)):
        for name in ("top_k", "num_experts_per_tok"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and 0 < value <= experts:
                return value
    try:
        return min(experts, get_moe_arch_config(model.config).num_experts_per_tok)
    except (AttributeError, KTAMXModelNotSupportedError):
        return experts


def _make_wrapper(
    block: MoEBlock, packed: Experts | None, arch: MOEArchConfig, config: KTConfig, ranks: int
) -> AMXSFTMoEWrapper:
    if packed is None:
        packed = _pack(block, arch, config, ranks)
    return AMXSFTMoEWrapper(
        packed,
        method=config.method.name,
        lora_rank=0,
        max_cache_depth=config.kt_max_cache_depth,
        full_weight_grad=config.kt_full_weight_grad,
    )


def _pack(block: MoEBlock, arch: MOEArchConfig, config: KTConfig, ranks: int) -> Experts:
    limit, alpha = 0.0, 0.0
    if block.fused:
        from ktk.integrations.transformers import activation_of

        activation = activation_of(block.experts)
        limit, alpha = activation.limit, activation.alpha
    method = config.method
    stored = stored_layout(config.kt_weight_path, block.layer_idx, method.format)
    if stored is not None and stored.kt_kernel and method.group_size is not None:
        # A method with groups of its own packs the model's weights.
        stored = None
    group_size, rotated = (method.group_size, None) if stored is None else stored.complete(method.group_size)
    layer = LayerConfig(
        num_experts=arch.expert_num,
        num_experts_per_tok=arch.num_experts_per_tok,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        format=method.format,
        group_size=group_size,
        rotated=rotated,
        swiglu_limit=limit,
        swiglu_alpha=alpha,
        max_tokens=config.kt_model_max_length * ranks,
        layer_idx=block.layer_idx,
    )
    experts = Experts(layer, cpu_infer=_cpu_infer(config))
    file = None
    if config.kt_weight_path is not None and Path(config.kt_weight_path).exists():
        file = find_packed(config.kt_weight_path, layer.format, layer.layer_idx)
    if file is not None:
        experts.load_packed(file)
        if config.kt_weight_lifecycle == "ephemeral":
            discard_packed(file.parent, layer.format, layer.layer_idx)
    elif stored is not None and config.kt_weight_path is not None:
        experts.load_checkpoint(config.kt_weight_path)
    elif config.kt_expert_checkpoint_path is not None:
        experts.load_checkpoint(config.kt_expert_checkpoint_path)
    else:
        experts.load_tensors(*extract_moe_weights(block.module))
    return experts


def _cpu_infer(config: KTConfig) -> Any:
    return shared_cpu_infer(
        config.kt_num_threads, config.kt_threadpool_count if config.kt_tp_enabled else None
    )


def build_kt_device_map(
    config: Any, kt_plugin: Any = None, device: str | torch.device = "cuda:0"
) -> dict[str, str]:
    """Where the parts of a model go: routed experts on the CPU, all else on `device`.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    kt_plugin : optional
        As for `wrap_moe_layers_with_kt_wrapper`.
    device : str or torch.device, default "cuda:0"

    Returns
    -------
    dict
        Module name to device, the longest match counting, as ``device_map`` of ``from_pretrained``.
    """
    KTConfig.from_object(kt_plugin)
    arch = get_moe_arch_config(config)
    text = getattr(config, "text_config", None) or config
    found = build_kt_device_map_simplified(config, kt_plugin, device)
    dense = set(getattr(text, "mlp_only_layers", None) or ()) | set(
        range(getattr(text, "first_k_dense_replace", 0) or 0)
    )
    for layer in range(text.num_hidden_layers):
        prefix = f"{arch.layers_prefix}.{layer}"
        found[prefix] = str(device)
        if layer not in dense:
            found[f"{prefix}.{arch.moe_layer_attr}.{arch.experts_attr}"] = "cpu"
    return found


def build_kt_device_map_simplified(
    config: Any, kt_plugin: Any = None, device: str | torch.device = "cuda:0"
) -> dict[str, str]:
    """As `build_kt_device_map`, without an entry for each layer: for a model that is loaded without
    experts."""
    arch = get_moe_arch_config(config)
    root = arch.layers_prefix.rpartition(".")[0]
    names = (f"{root}.embed_tokens", arch.layers_prefix, f"{root}.norm", f"{root}.rotary_emb", "lm_head")
    return dict.fromkeys(names, str(device))


def get_kt_loading_kwargs(
    config: Any = None, kt_plugin: Any = None, model_args: Any = None, **keywords: Any
) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` for a model that ktk is to wrap: everything on the CPU, nothing split.

    Parameters
    ----------
    config, kt_plugin, model_args
        A `torch_dtype` or `dtype` of `model_args` is kept. Taken for compatibility otherwise.
    **keywords
        Added to the result.
    """
    dtype = None
    for name in ("compute_dtype", "torch_dtype", "dtype"):
        dtype = dtype or getattr(model_args, name, None)
    return {"dtype": dtype or "auto", "device_map": None, "low_cpu_mem_usage": True, **keywords}


def load_kt_model(
    config: Any = None,
    model_args: Any = None,
    finetuning_args: Any = None,
    kt_plugin: Any = None,
    model_name_or_path: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    **keywords: Any,
) -> Any:
    """Load a checkpoint for fine-tuning, its experts in ktk.

    The experts go from the checkpoint to the packed form one at a time and are never tensors of the model,
    unless they are trained themselves. Everything else is frozen or not as PEFT or the caller decides.

    Parameters
    ----------
    config : transformers.PreTrainedConfig, optional
        Default: that of the checkpoint.
    model_args, finetuning_args : optional
        Objects with settings, as LLaMA-Factory has them: `model_name_or_path` and `compute_dtype` are read.
    kt_plugin : KTConfig or what `KTConfig.from_object` takes, optional
    model_name_or_path : path, optional
        Folder of the checkpoint.
    progress : callable, optional
        Called with the number of layers done and of all.
    **keywords
        Passed to ``from_pretrained``.

    Returns
    -------
    transformers.PreTrainedModel
        In training mode; on the GPU of LOCAL_RANK apart from its experts, if CUDA is there.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    KTAMXConfigError
        If no folder is named.
    KTAMXModelNotSupportedError
        If the model has no experts that ktk can train.
    """
    from ktk.integrations import transformers as integration

    settings = KTConfig.from_object(kt_plugin)
    path = model_name_or_path or getattr(model_args, "model_name_or_path", None)
    if path is None:
        raise KTAMXConfigError("load_kt_model needs model_name_or_path, the folder of a checkpoint")
    if not Path(path).is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {os.fspath(path)}")
    loading = get_kt_loading_kwargs(config, settings, model_args, **keywords)
    loading.pop("low_cpu_mem_usage")
    loading.pop("device_map")
    method = settings.method
    rank, ranks = world()
    options = integration.Options(
        format=method.format,
        group_size=method.group_size,
        threads=_cpu_infer(settings),
        max_tokens=settings.kt_model_max_length * ranks,
    )
    whole = settings.kt_full_weight_grad or not settings.kt_skip_expert_loading
    if whole:
        import transformers

        loader: Any = transformers.AutoModelForCausalLM
        model = loader.from_pretrained(path, local_files_only=True, **loading)
    else:
        model = integration.load_model(
            path,
            options,
            packed=settings.kt_weight_path,
            keep_packed=settings.kt_weight_lifecycle == "persistent",
            progress=progress,
            load_experts=rank == 0,
            **loading,
        )
    wrap_moe_layers_with_kt_wrapper(model, settings, progress=progress if whole else None)
    if torch.cuda.is_available():
        move_non_experts_to_gpu(model, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    model.config.use_cache = False
    model.train()
    return model
