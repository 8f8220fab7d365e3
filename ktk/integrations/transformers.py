"""ktk in transformers 5: ``experts_implementation="ktk"``.

transformers keeps all experts of a layer in one module and lets their forward be chosen by name. `register`
adds ``"ktk"`` to those names through the public interface; nothing of transformers is replaced. Three ways
in:

- `load_model` builds a model whose experts go from the checkpoint to the packed form one by one, without ever
  being tensors of the model. This is what ``ktk run`` does.
- `attach` takes the experts out of a model that is already in memory, layer by layer.
- ``from_pretrained(..., experts_implementation="ktk")`` after `register`: each layer is taken out at its
  first forward, with the default `Options`.

In all three the experts' parameters are gone from the model afterwards. ktk computes forwards only.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ktk.config import LayerConfig
from ktk.errors import KtkArgumentError, KtkUnsupportedError
from ktk.layer import Experts, shared_cpu_infer
from ktk.runtime import CPUInfer, WorkerPoolConfig
from ktk.weights import Checkpoint, CheckpointLayer, discard_packed, find_packed, packed_path
from ktk.weights.stored import stored_layout

__all__ = [
    "IMPLEMENTATION",
    "Activation",
    "Options",
    "activation_of",
    "attach",
    "expert_modules",
    "layers_of",
    "load_model",
    "register",
]

IMPLEMENTATION = "ktk"
"""Name under which the experts are registered."""

Progress = Callable[[int, int], None]

_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
_LAYER = "_ktk_layer"
_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model's experts are packed and run.

    Parameters
    ----------
    format : str, default "bf16"
        ``"bf16"``, ``"int8"`` or ``"int4"``.
    group_size : int, optional
        int8, int4: input columns of a group, 32 (default of int4), 64 or 128, in int8 also 256 or 512 (its
        default); 0: one scale a row and no groups. Packed files and weights of kt-kernel bring their own
        default.
    rotated : bool, optional
        int8, int4: whether columns are rotated before they are quantised, see `ktk.config.LayerConfig`.
        Default: True for these, unless packed files or weights of kt-kernel are not.
    strict : bool, default False
        One kernel family for all batch sizes.
    isa : str, optional
        Instruction set; default: the best that runs here, or the environment variable ``KTK_ISA``.
    threads : int, WorkerPoolConfig or CPUInfer, optional
        Worker threads of the model's layers, which share one pool. Default: one for each physical core that
        this process may use.
    max_tokens : int, default 4096
        Most tokens in one native forward; sizes scratch memory.
    """

    format: str = "bf16"
    group_size: int | None = None
    rotated: bool | None = None
    strict: bool = False
    isa: str | None = None
    threads: int | WorkerPoolConfig | CPUInfer | None = None
    max_tokens: int = 4096


@dataclass(frozen=True)
class Activation:
    """Gated activation of an experts module.

    Parameters
    ----------
    limit, alpha : float
        ``swiglu_limit`` and ``swiglu_alpha`` of `ktk.config.LayerConfig`; 0 switches them off.
    """

    limit: float = 0.0
    alpha: float = 0.0


def register() -> None:
    """Make ``experts_implementation="ktk"`` known to transformers. Calling it again does nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def expert_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of all experts in `model` that use transformers' interface, in the model's order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        # What the interface sets on each module; a shared or dense MLP has none of it.
        if all(
            hasattr(module, flag) for flag in ("has_gate", "is_transposed", "is_concatenated", "num_experts")
        )
    ]


def layers_of(model: nn.Module) -> dict[str, Experts]:
    """ktk layer of every experts module that has one, by the module's name."""
    return {
        name: getattr(module, _LAYER) for name, module in expert_modules(model) if hasattr(module, _LAYER)
    }


def _gate_up(gate: torch.Tensor, up: torch.Tensor, concatenated: bool) -> torch.Tensor:
    return torch.cat([gate, up], -1) if concatenated else torch.stack([gate, up], -1).flatten(-2)


def activation_of(module: Any) -> Activation:
    """Find out which activation an experts module computes, by calling it.

    Limits and factors have different names in different models, and a class may do something of its own with
    them, so names only give candidates; the one that reproduces the module's values on a grid is taken.

    Parameters
    ----------
    module : torch.nn.Module
        An experts module; its parameters are not used.

    Returns
    -------
    Activation

    Raises
    ------
    KtkUnsupportedError
        ktk has no activation that gives the module's values.
    """
    sources = (module, getattr(module, "config", None))
    names = ("limit", "swiglu_limit", "alpha", "swiglu_alpha")
    found = [getattr(source, name, None) for source in sources for name in names]
    numbers = sorted({float(v) for v in found if isinstance(v, (int, float)) and 0 < v < float("inf")})
    reach = 2 * max([6.0, *numbers])
    # Models are built under a default dtype and device of their own.
    gate = torch.linspace(-reach, reach, 101, dtype=torch.float32, device="cpu").repeat_interleave(21)
    up = torch.linspace(-reach, reach, 21, dtype=torch.float32, device="cpu").repeat(101)
    problem = "its values are those of no activation that ktk has"
    try:
        with torch.no_grad(), torch.device("cpu"):
            wanted = module._apply_gate(_gate_up(gate, up, module.is_concatenated)).float()
    except Exception as error:  # noqa: BLE001 - arbitrary code of a model; the cause is shown
        problem = f"calling it failed with {error!r}"
    else:
        for limit in (0.0, *numbers):
            g = gate.clamp(max=limit) if limit else gate
            u = up.clamp(-limit, limit) if limit else up
            for alpha in (0.0, *numbers):
                got = g * torch.sigmoid(alpha * g) * (u + 1) if alpha else torch.nn.functional.silu(g) * u
                if torch.allclose(got, wanted, rtol=1e-4, atol=1e-5):
                    return Activation(limit, alpha)
    raise KtkUnsupportedError(
        f"the activation of {type(module).__name__} (act_fn {getattr(module, 'act_fn', None)}) is not "
        f"supported: {problem}; supported are silu(gate) * up, with a limit or not, and "
        'gate * sigmoid(alpha * gate) * (up + 1). Use experts_implementation="eager" for this model'
    )


def _check_supported(name: str, module: Any) -> None:
    problem = None
    if not module.has_gate:
        problem = "has no gate"
    elif getattr(module, "has_post_expert_norm", False):
        problem = "normalises each expert's output"
    elif getattr(module, "_is_expert_parallel", False):
        problem = "is split over processes"
    if problem is not None:
        raise KtkUnsupportedError(
            f"{name or type(module).__name__} {problem}, which ktk does not support; use "
            'experts_implementation="eager"'
        )


def _sizes(module: Any) -> tuple[int, int, int]:
    """Experts, hidden size and intermediate size of a module whose parameters are there, on any device."""
    experts, first, second = module.down_proj.shape
    return (experts, second, first) if module.is_transposed else (experts, first, second)


def _top_k(module: Any, experts: int) -> int:
    for name in _TOP_K_NAMES:
        value = getattr(getattr(module, "config", None), name, None)
        if isinstance(value, int) and 0 < value <= experts:
            return value
    return experts


def _layer_number(name: str) -> int | None:
    numbers = _LAYER_NUMBER.findall(name)
    return int(numbers[-1]) if numbers else None


def _layer_config(name: str, module: Any, sizes: tuple[int, int, int], options: Options) -> LayerConfig:
    _check_supported(name, module)
    activation = activation_of(module)
    experts, hidden, intermediate = sizes
    return LayerConfig(
        num_experts=experts,
        num_experts_per_tok=_top_k(module, experts),
        hidden_size=hidden,
        intermediate_size=intermediate,
        format=options.format,
        group_size=options.group_size,
        rotated=options.rotated,
        swiglu_limit=activation.limit,
        swiglu_alpha=activation.alpha,
        max_tokens=options.max_tokens,
        strict=options.strict,
        isa=options.isa,
        layer_idx=_layer_number(name) or 0,
    )


def _tensors_of(module: Any) -> dict[str, Any]:
    """Weights and biases of a module as the arguments of `Experts.load_tensors`; all are views."""

    def halves(fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if module.is_concatenated:
            gate, up = fused.chunk(2, dim=1)
            return gate, up
        return fused[:, 0::2], fused[:, 1::2]

    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gate, up = halves(gate_up)
    tensors = {"gate": gate, "up": up, "down": down}
    if module.has_bias:
        gate_bias, up_bias = halves(module.gate_up_proj_bias.detach())
        tensors |= {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": module.down_proj_bias.detach()}
    return tensors


def _strip(module: nn.Module) -> None:
    for name in _PARAMETERS:
        if name in module._parameters:
            delattr(module, name)


def _cpu_infer(threads: int | WorkerPoolConfig | CPUInfer | None) -> CPUInfer:
    if isinstance(threads, CPUInfer):
        return threads
    return CPUInfer(threads) if isinstance(threads, WorkerPoolConfig) else shared_cpu_infer(threads)


def _install(module: nn.Module, layer: Experts) -> None:
    _strip(module)
    # Past nn.Module's own bookkeeping, which has no place for it.
    object.__setattr__(module, _LAYER, layer)
    module.register_state_dict_pre_hook(_refuse_state)


def _refuse_state(module: nn.Module, prefix: str, keep_vars: bool) -> NoReturn:
    raise KtkUnsupportedError(
        f"the weights of {prefix.rstrip('.')} are packed by ktk and no longer parameters, so a saved copy "
        "would lack them; save the model before ktk takes them, or copy the original checkpoint"
    )


def _take_over(name: str, module: nn.Module, options: Options, cpu: CPUInfer) -> Experts:
    """Pack the experts that a module holds, and drop its parameters."""
    layer = Experts(_layer_config(name, module, _sizes(module), options), cpu_infer=cpu)
    layer.load_tensors(**_tensors_of(module))
    _install(module, layer)
    return layer


def _experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward of an experts module: hidden [T, H], ids and weights [T, k]; returns [T, H] like hidden."""
    layer = getattr(self, _LAYER, None)
    if layer is None:
        options = Options()
        layer = _take_over("", self, options, _cpu_infer(options.threads))
    result: torch.Tensor = layer(hidden_states, top_k_index, top_k_weights)
    return result


def attach(model: Any, options: Options | None = None, *, progress: Progress | None = None) -> Any:
    """Take the experts out of a model in memory, and run them in ktk from now on.

    Layer by layer, the experts are packed and their parameters deleted, so that at most one layer is held
    twice.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place. Of any dtype among float32, bfloat16 and float16; the experts may be on any device.
    options : Options, optional
        How to pack and run them.
    progress : callable, optional
        Called with the number of layers done and of all layers, after each.

    Returns
    -------
    transformers.PreTrainedModel
        `model`, with ``experts_implementation="ktk"``; it can no longer be saved.

    Raises
    ------
    KtkArgumentError
        The model has no experts that use transformers' interface.
    KtkUnsupportedError
        ktk lacks the activation, or the form of the experts.
    """
    options = options or Options()
    found = expert_modules(model)
    modules = [(name, module) for name, module in found if not hasattr(module, _LAYER)]
    if not found:
        raise KtkArgumentError(
            f"{type(model).__name__} has no experts that transformers lets another library run"
        )
    # Before the first one is taken: a model half of whose layers are gone would be of no use.
    for name, module in modules:
        _layer_config(name, module, _sizes(module), options)
    register()
    cpu = _cpu_infer(options.threads)
    for done, (name, module) in enumerate(modules, start=1):
        _take_over(name, module, options, cpu)
        if progress is not None:
            progress(done, len(modules))
    model.set_experts_implementation(IMPLEMENTATION)
    return model


def _model_class(config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    try:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise KtkUnsupportedError(
            f"transformers {transformers.__version__} has no language model for {type(config).__name__} "
            f"(architectures {getattr(config, 'architectures', None)})"
        ) from None


@dataclass(frozen=True)
class _Found:
    """An experts module whose weights the checkpoint has one by one."""

    name: str
    module: Any
    config: LayerConfig


def _matches(module: Any, source: CheckpointLayer) -> bool:
    """Whether the reader's view of the checkpoint is what the module would have loaded."""
    sizes = (source.num_experts, source.hidden_size, source.intermediate_size)
    # The reader takes gate and up of fused tensors to alternate if and only if there are biases.
    return (
        sizes == _sizes(module)
        and source.bias == module.has_bias
        and module.is_concatenated != module.has_bias
    )


def load_model(
    path: str | os.PathLike[str],
    options: Options | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    packed: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    load_experts: bool = True,
    keep_packed: bool = True,
    **keywords: Any,
) -> Any:
    """Load a checkpoint with its experts in ktk.

    The model is built without experts, everything else is loaded by transformers, and the experts go from the
    checkpoint to the packed form one at a time. Checkpoints whose experts are stored in an uncommon way are
    loaded whole and then treated as by `attach`.

    Parameters
    ----------
    path : path
        Directory of a Hugging Face checkpoint in safetensors.
    options : Options, optional
        How to pack and run the experts.
    dtype : torch.dtype or str, default "auto"
        Of everything but the experts. "auto": as in the checkpoint.
    packed : path, optional
        Packed file, or directory of packed files (`ktk.weights.find_packed`) or of kt-kernel's weights in
        the format of `options`. Layers found there are loaded from it; if it is a directory, or does not
        exist, the others are packed from the checkpoint and written there.
    progress : callable, optional
        Called with the number of layers done and of all layers, after each.
    load_experts : bool, default True
        False leaves the experts out: for a process that others run them for.
    keep_packed : bool, default True
        False removes each layer's packed file once it is loaded, and writes none: for files in memory, as in
        ``/dev/shm``. A file that holds several layers stays.
    **keywords
        Passed to ``from_pretrained``, as ``attn_implementation``.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode, with ``experts_implementation="ktk"``; it cannot be saved.

    Raises
    ------
    KtkArgumentError
        The checkpoint has no experts, or cannot be read, or packed files do not fit it or `options`.
    KtkUnsupportedError
        ktk lacks the activation or the form of the experts, or transformers the architecture.
    FileNotFoundError
        There is nothing at `path`.
    """
    options = options or Options()
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {root}")
    register()
    config = transformers.AutoConfig.from_pretrained(root, local_files_only=True)
    base = _model_class(config)
    taken: list[_Found] = []

    with Checkpoint(root) as checkpoint:

        def build(self: Any, *arguments: Any, **kw: Any) -> None:
            base.__init__(self, *arguments, **kw)
            taken.clear()
            for name, module in expert_modules(self):
                number = _layer_number(name)
                if number in checkpoint.layers and _matches(module, checkpoint.layer(number)):
                    taken.append(_Found(name, module, _layer_config(name, module, _sizes(module), options)))
                    _strip(module)
                    # Nothing of it is left to initialise, and the model's own code would look for it.
                    taken[-1].module._is_hf_initialized = True

        # transformers finds features of a model class in the source of the module it says it is from.
        members = {
            "__init__": build,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "_keys_to_ignore_on_load_unexpected": [
                *(base._keys_to_ignore_on_load_unexpected or ()),
                r"\.experts\.",
            ],
        }
        skeleton: Any = type(base.__name__, (base,), members)
        model = skeleton.from_pretrained(
            root,
            config=config,
            dtype=dtype,
            experts_implementation=IMPLEMENTATION,
            local_files_only=True,
            **keywords,
        )
        if not load_experts:
            return model.eval()
        cpu = _cpu_infer(options.threads)
        for done, found in enumerate(taken, start=1):
            _install(found.module, _load_layer(found.config, options, root, packed, cpu, keep_packed))
            if progress is not None:
                progress(done, len(taken))
    rest = [name for name, module in expert_modules(model) if not hasattr(module, _LAYER)]
    if rest and packed is not None:
        raise KtkUnsupportedError(
            f"experts of {root} are stored in a way that ktk cannot read one by one ({rest[0]}), and packed "
            "files need that; leave the packed path out"
        )
    if rest or not taken:
        attach(model, options, progress=progress)
    model.eval()
    return model


def _load_layer(
    config: LayerConfig,
    options: Options,
    root: Path,
    packed: str | os.PathLike[str] | None,
    cpu: CPUInfer,
    keep_packed: bool,
) -> Experts:
    stored = stored_layout(packed, config.layer_idx, config.format)
    if stored is not None:
        group_size, rotated = stored.complete(options.group_size, options.rotated)
        config = dataclasses.replace(config, group_size=group_size, rotated=rotated)
    layer = Experts(config, cpu_infer=cpu)
    if packed is None:
        layer.load_checkpoint(root)
        return layer
    file = find_packed(packed, config.format, config.layer_idx)
    if file is not None:
        layer.load_packed(file)
        if not keep_packed:
            discard_packed(packed, config.format, config.layer_idx)
    elif stored is not None:
        layer.load_checkpoint(packed)
    else:
        own = packed_path(packed, config.format, config.layer_idx)
        layer.load_checkpoint(root, save_to=own if keep_packed else None)
    return layer
