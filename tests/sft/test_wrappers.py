"""The wrapper of one layer without autograd, and wrappers of whole models: kt-kernel's calls, and bad
input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ktk
from kt_kernel_files import StoredLayer
from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError
from ktk.sft import (
    AMXSFTMoEWrapper,
    KExpertsSFTBuffer,
    KTAMXConfigError,
    KTAMXModelNotSupportedError,
    KTAMXNotAvailableError,
    KTConfig,
    build_kt_device_map,
    build_kt_device_map_simplified,
    extract_moe_weights,
    get_expert_device,
    get_kt_loading_kwargs,
    get_moe_arch_config,
    get_moe_module,
    kt_adapt_peft_lora,
    load_experts_from_checkpoint_files,
    load_experts_from_kt_weight_path,
    load_kt_model,
    move_non_experts_to_gpu,
    update_kt_lora_pointers,
    wrap_moe_layers_with_kt_wrapper,
)
from ktk.sft.base import lora_shapes
from ktk.sft.modules import moe_layers
from ktk.weights import packed_path
from sft.models import batch, draw_adapters, eager, lora_config, trained, with_peft, wrap
from tiny_models import checkpoint, make_config
from torch_layers import Weights
from torch_layers import batch as tokens

SIZES: dict[str, Any] = {
    "layer_idx": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 80,
    "moe_intermediate_size": 48,
    "cpuinfer_threads": 2,
    "chunked_prefill_size": 64,
    "mode": "sft",
}


def make(method: str = "AMXBF16_SFT", **changes: Any) -> AMXSFTMoEWrapper:
    settings = {**SIZES, "method": method, "lora_rank": 4, "lora_alpha": 8.0, **changes}
    wrapper: Any = ktk.KTMoEWrapper(**settings)
    assert isinstance(wrapper, AMXSFTMoEWrapper)
    wrapper.load_weights_from_tensors(*Weights.random(1).matrices())
    return wrapper


def adapters(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = lora_shapes(4, 80, 48, 4).values()
    return [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in shapes]


def started(**changes: Any) -> tuple[AMXSFTMoEWrapper, list[torch.Tensor], list[torch.Tensor]]:
    wrapper = make(**changes)
    weights, grads = adapters(), [torch.full_like(one, 7.0) for one in adapters()]
    wrapper.init_lora_weights(*weights, *grads)
    return wrapper, weights, grads


@pytest.mark.parametrize("method", ["AMXBF16_SFT", "AMXINT8_SFT", "INT8_SFT", "AMXINT4_SFT", "AMXFP8_SFT"])
def test_forward_and_backward_of_every_method(method: str) -> None:
    wrapper, _, grads = started(method=method)
    x, ids, w = tokens(2, 9)
    output = wrapper.forward(x, ids, w)
    assert output.shape == x.shape and output.dtype == x.dtype
    grad_x, grad_w = wrapper.backward(torch.ones_like(output))
    assert grad_x.shape == x.shape and grad_w.shape == w.shape and grad_w.dtype == torch.float32
    # What was in the buffers is gone.
    assert all(torch.isfinite(grad).all() and not (grad == 7.0).all() for grad in grads)


def test_skip_lora_leaves_adapters_alone() -> None:
    plain = make()
    wrapper, _, grads = started(method="AMXBF16_SFT_SkipLoRA")
    x, ids, w = tokens(2, 9)
    assert torch.equal(wrapper.forward(x, ids, w), plain.forward(x, ids, w))
    mine, theirs = (one.backward(torch.ones(9, 80)) for one in (wrapper, plain))
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    assert all((grad == 0).all() for grad in grads)


def test_gradients_of_parameters_accumulate_until_released() -> None:
    wrapper = make()
    weights = [nn.Parameter(one) for one in adapters()]
    grads = [torch.full_like(one, 7.0) for one in weights]
    wrapper.init_lora_weights(*weights, *grads)
    x, ids, w = tokens(2, 9)

    def run(scale: float = 1.0) -> None:
        wrapper.forward(x, ids, w)
        wrapper.backward(torch.ones_like(x), optimizer_grad_scale=scale)

    run()
    once = [one.clone() for one in grads]
    assert all(parameter.grad is grad for parameter, grad in zip(weights, grads, strict=True))
    run()
    assert all(torch.equal(grad, 2 * one) for grad, one in zip(grads, once, strict=True))
    wrapper.release_authoritative_optimizer_grads()
    assert all(parameter.grad is None for parameter in weights)
    run(0.5)
    assert all(torch.equal(grad, 0.5 * one) for grad, one in zip(grads, once, strict=True))
    weights[0].grad = torch.zeros_like(weights[0])
    wrapper.forward(x, ids, w)
    with pytest.raises(KtkStateError, match="not the tensor given to"):
        wrapper.backward(torch.ones_like(x))


def test_asynchronous_halves() -> None:
    wrapper, _, _ = started()
    x, ids, w = tokens(2, 9)
    expected = wrapper.forward(x, ids, w)
    expected_grads = wrapper.backward(torch.ones_like(x))
    wrapper.submit_forward(x, ids, w)
    assert torch.equal(wrapper.sync_forward(), expected)
    wrapper.submit_backward_repack()
    wrapper.wait_backward_repack()
    wrapper.submit_backward_async(torch.ones_like(x))
    for actual, wanted in zip(wrapper.sync_backward(), expected_grads, strict=True):
        assert torch.equal(actual, wanted)
    changing = x.clone()
    wrapper.submit_forward_inference(changing, ids, w)
    changing.zero_()
    assert torch.equal(wrapper.sync_forward_inference(), expected)
    assert wrapper.cached_forwards == 0
    with pytest.raises(KtkStateError, match="without a submit_forward"):
        wrapper.sync_forward()
    wrapper.submit_backward_async(torch.ones_like(x))
    with pytest.raises(KtkStateError, match="no saved forward"):
        wrapper.sync_backward()


def test_depth_of_saved_forwards() -> None:
    wrapper, _, _ = started(max_cache_depth=2)
    x, ids, w = tokens(2, 5)
    wrapper.forward(x, ids, w)
    wrapper.forward(2 * x, ids, w)
    with pytest.raises(KtkStateError, match="2 forwards without backward"):
        wrapper.forward(x, ids, w)
    wrapper.forward(x, ids, w, save_for_backward=False)
    second = wrapper.backward(torch.ones_like(x))[1]
    first = wrapper.backward(torch.ones_like(x))[1]
    assert not torch.equal(first, second)
    with pytest.raises(KtkStateError, match="no saved forward"):
        wrapper.backward(torch.ones_like(x))
    wrapper.forward(x, ids, w)
    wrapper.discard_saved()
    assert wrapper.cached_forwards == 0


def test_gradients_of_the_weights() -> None:
    wrapper = make(full_weight_grad=True)
    grads = [torch.full(shape, 3.0) for shape in ((4, 48, 80), (4, 48, 80), (4, 80, 48))]
    wrapper.init_full_weight_grad_buffers(*grads)
    x, ids, w = tokens(2, 5)
    ids %= 2
    output = wrapper.forward(x, ids, w)
    wrapper.backward(torch.ones_like(output))
    idle = [e for e in range(4) if e not in ids]
    assert idle and all((grad[e] == 0).all() for grad in grads for e in idle)
    assert all(grad.abs().sum() > 0 for grad in grads)
    other = Weights.random(5).matrices()
    wrapper.update_base_weights(*other)
    fresh = make()
    fresh.load_weights_from_tensors(*other)
    assert torch.equal(wrapper.forward(x, ids, w), fresh.forward(x, ids, w))


def test_weights_from_disk(tmp_path: Path) -> None:
    wrapper = make(weight_path=tmp_path)
    wrapper.experts.save(packed_path(tmp_path, "bf16", 3))
    again: Any = ktk.KTMoEWrapper(**{**SIZES, "method": "AMXBF16_SFT", "weight_path": tmp_path})
    again.load_weights()
    x, ids, w = tokens(2, 5)
    assert torch.equal(again.forward(x, ids, w), wrapper.forward(x, ids, w))
    found = load_experts_from_kt_weight_path(tmp_path, 3, "bf16")
    found.load_into(again.experts)
    with pytest.raises(KtkArgumentError, match="no packed int8 experts of layer 3"):
        load_experts_from_kt_weight_path(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_experts_from_kt_weight_path(tmp_path / "none", 3)
    with pytest.raises(KtkArgumentError, match="needs weight_path"):
        make().load_weights()


# ---- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "AMXINT3_SFT"}, "unknown training method 'AMXINT3_SFT'; valid methods: AMXBF16_SFT"),
        ({"lora_rank": 300}, "lora_rank must be between 0 and 256"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and less than 1"),
        ({"max_cache_depth": 0}, "max_cache_depth must be at least 1"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KtkArgumentError, match=message):
        make(**change)


def test_experts_on_a_gpu_are_refused() -> None:
    with pytest.raises(KTAMXNotAvailableError, match="all on the CPU"):
        make(num_gpu_experts=1)


def replaced(index: int, tensor: torch.Tensor) -> list[torch.Tensor]:
    found = adapters()
    found[index] = tensor
    return found


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            replaced(0, torch.zeros(4, 5, 80, dtype=torch.bfloat16)),
            r"gate_lora_a must have the shape \[4, 4, 80\]",
        ),
        (replaced(1, torch.zeros(4, 48, 4, dtype=torch.float16)), "must be float32 or bfloat16"),
        (replaced(1, torch.zeros(4, 48, 4)), "of one dtype"),
        (replaced(5, torch.zeros(4, 4, 80, dtype=torch.bfloat16).transpose(1, 2)), "must be contiguous"),
        (replaced(2, torch.full((4, 4, 80), torch.nan, dtype=torch.bfloat16)), "up_lora_a holds NaN"),
        (adapters()[:5], "takes six adapter tensors"),
    ],
)
def test_bad_adapters(tensors: list[torch.Tensor], message: str) -> None:
    with pytest.raises(KtkArgumentError, match=message):
        make().init_lora_weights(*tensors)


def test_an_adapter_that_becomes_nan_is_noticed() -> None:
    wrapper, weights, _ = started()
    x, ids, w = tokens(2, 5)
    wrapper.forward(x, ids, w, save_for_backward=False)
    weights[3].view(-1)[5] = torch.nan
    with pytest.raises(KtkArgumentError, match="up_lora_b"):
        wrapper.forward(x, ids, w)


def test_bad_batches() -> None:
    wrapper, _, _ = started()
    x, ids, w = tokens(2, 65)
    with pytest.raises(KtkArgumentError, match=r"got 65 tokens, and its limit is 64 .*kt_model_max_length"):
        wrapper.forward(x, ids, w)
    x, ids, w = tokens(2, 5)
    for bad, message in (
        ((x[:, :-1], ids, w), r"shape \[tokens, 80\]"),
        ((x.double(), ids, w), "got torch.float64"),
        ((x, ids[:4], w), r"shape \[5, k\]"),
        ((x, ids.float(), w), "int32 or int64"),
        ((x, ids, ids), "floating point"),
        ((x, ids.repeat(1, 2), w.repeat(1, 2)), "1 to 2"),
    ):
        with pytest.raises(KtkArgumentError, match=message):
            wrapper.forward(*bad)
    with pytest.raises(TypeError, match=r"hidden_states must be a torch\.Tensor, got list"):
        wrapper.forward([1.0], ids, w)  # type: ignore[arg-type]


def test_bad_gradients_and_a_context_used_twice() -> None:
    wrapper, _, _ = started()
    x, ids, w = tokens(2, 5)
    _, saved = wrapper.run(x, ids, w, policy="save")
    assert saved is not None
    wrapper.run_backward(saved, torch.ones_like(x))
    with pytest.raises(KtkStateError, match="used already or freed"):
        wrapper.run_backward(saved, torch.ones_like(x))
    wrapper.forward(x, ids, w)
    with pytest.raises(KtkArgumentError, match="NaN or infinity in 5 of 5 tokens"):
        wrapper.backward(torch.full_like(x, torch.nan))
    wrapper.forward(x, ids, w)
    with pytest.raises(KtkArgumentError, match=r"the shape \[5, 80\] of the output"):
        wrapper.backward(torch.ones(4, 80))


def test_no_tokens() -> None:
    wrapper, _, grads = started()
    x, ids, w = tokens(2, 5)
    output = wrapper.forward(x[:0], ids[:0], w[:0])
    assert output.shape == (0, 80)
    grad_x, grad_w = wrapper.backward(output)
    assert grad_x.shape == (0, 80) and grad_w.shape == (0, 2)
    assert all((grad == 0).all() for grad in grads)


def test_use_after_close() -> None:
    wrapper, _, _ = started()
    x, ids, w = tokens(2, 5)
    _, saved = wrapper.run(x, ids, w, policy="save")
    wrapper.close()
    wrapper.close()
    assert saved is not None
    with pytest.raises(KtkStateError, match="closed"):
        wrapper.forward(x, ids, w)
    with pytest.raises(KtkStateError, match="closed"):
        wrapper.run_backward(saved, torch.ones_like(x))


def test_a_graph_used_twice_and_a_changed_input() -> None:
    model = with_peft(wrap(eager("qwen3_moe")))
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(KtkStateError, match=r"one backward\. Leave retain_graph out"):
        loss.backward()
    layer = moe_layers(wrap(eager("qwen3_moe"), activation_policy="recompute"))[0][1]
    x = torch.randn(4, 72, requires_grad=True) * 1
    output = layer.experts(x, torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, 3))
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_adapters_changed_between_forward_and_backward() -> None:
    model = with_peft(wrap(eager("qwen3_moe")), target_parameters=None)
    loss = model(**batch()).loss
    with torch.no_grad():
        next(p for name, p in trained(model).items() if "gate_lora_a" in name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_calls_in_the_wrong_order() -> None:
    from peft import get_peft_model

    with pytest.raises(KTAMXConfigError, match="call wrap_moe_layers_with_kt_wrapper"):
        kt_adapt_peft_lora(eager("qwen3_moe"))
    model = get_peft_model(wrap(eager("qwen3_moe")), lora_config())
    with pytest.raises(KTAMXConfigError, match="kt_adapt_peft_lora"):
        model(**batch())
    with pytest.raises(KTAMXModelNotSupportedError, match="no experts that ktk can train"):
        wrap_moe_layers_with_kt_wrapper(nn.Linear(2, 2))
    with pytest.raises(KTAMXModelNotSupportedError, match="biases"):
        wrap(eager("gpt_oss"))
    with pytest.raises(KtkUnsupportedError, match="save the adapters"):
        wrap(eager("qwen3_moe")).save_pretrained("nowhere")
    with pytest.raises(KtkUnsupportedError, match="cannot be copied"):
        copy.deepcopy(wrap(eager("qwen3_moe")))


# ---- whole models -------------------------------------------------------------------------------------


def test_wrapping_releases_the_weights_and_keeps_order() -> None:
    source = eager("qwen3_moe")
    order = [name for name, _ in source.named_modules() if not name.endswith("act_fn")]
    wrappers = wrap_moe_layers_with_kt_wrapper(source, {"num_threads": 2})
    assert source._kt_wrappers == wrappers and len(wrappers) == 2
    assert [name for name, _ in source.named_modules() if not name.endswith("act_fn")] == order
    assert {w.layer_idx for w in wrappers if w is not None} == {0, 1}
    experts = moe_layers(source)[0][1].experts
    assert experts.gate_up_proj.shape == (6, 80, 72)
    assert experts.gate_up_proj.untyped_storage().nbytes() <= 4
    assert not any("gate_up_proj" in key for key in source.state_dict())
    source.to(torch.bfloat16)
    assert experts.gate_up_proj.dtype == torch.bfloat16
    assert experts.gate_up_proj.untyped_storage().nbytes() <= 4
    source.load_state_dict(source.state_dict())


def test_two_models_of_different_sizes() -> None:
    first = with_peft(wrap(eager("qwen3_moe")))
    second = with_peft(wrap(eager("mixtral", hidden_size=48, num_attention_heads=2)))
    losses = [model(**batch()).loss for model in (first, second)]
    for loss in losses:
        loss.backward()
    assert all(p.grad is not None for model in (first, second) for p in trained(model).values())


@pytest.mark.parametrize("train_mode", ["lora", "full"])
def test_load_kt_model(train_mode: str) -> None:
    source = checkpoint("qwen3_moe")
    model = load_kt_model(model_name_or_path=source, kt_plugin={"num_threads": 2, "train_mode": train_mode})
    assert model.training and len(model._kt_wrappers) == 2
    reference = wrap(eager("qwen3_moe"))
    # With CUDA the model is on the GPU.
    output = model(**batch(device=model.device))
    assert output.logits.shape == reference(**batch()).logits.shape
    output.loss.backward()


def test_load_kt_model_keeps_packed_files(tmp_path: Path) -> None:
    settings = {"num_threads": 2, "weight_path": str(tmp_path), "backend": "AMXINT8"}
    first = load_kt_model(model_name_or_path=checkpoint("qwen3_moe"), kt_plugin=settings)
    assert len(list(tmp_path.glob("ktk-*.safetensors"))) == 2
    again = load_kt_model(model_name_or_path=checkpoint("qwen3_moe"), kt_plugin=settings)
    data = batch(device=first.device)
    assert torch.equal(first(**data).logits, again(**data).logits)


def test_ephemeral_files_are_used_up(tmp_path: Path) -> None:
    settings = {"num_threads": 2, "weight_path": str(tmp_path), "backend": "AMXINT8"}
    source = checkpoint("qwen3_moe")
    first = load_kt_model(model_name_or_path=source, kt_plugin=settings)
    packed_path(tmp_path, "int8", 1).unlink()
    (tmp_path / "other").write_text("stays")
    again = load_kt_model(model_name_or_path=source, kt_plugin={**settings, "weight_lifecycle": "ephemeral"})
    # Layer 0 was loaded from its file, layer 1 packed from the checkpoint, and neither left one.
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    data = batch(device=first.device)
    assert torch.equal(first(**data).logits, again(**data).logits)


def test_ephemeral_files_of_a_model_in_memory(tmp_path: Path) -> None:
    source = eager("qwen3_moe")
    expected = wrap(copy.deepcopy(source), backend="AMXINT8")
    for index, wrapper in enumerate(expected._kt_wrappers):
        wrapper.experts.save(packed_path(tmp_path, "int8", index))
    model = wrap(source, backend="AMXINT8", weight_path=str(tmp_path), weight_lifecycle="ephemeral")
    assert not list(tmp_path.iterdir())
    assert torch.equal(model(**batch()).logits, expected(**batch()).logits)


@pytest.mark.parametrize("parts", [1, 2])
def test_models_take_kt_kernel_weights(tmp_path: Path, parts: int) -> None:
    """In memory and from a checkpoint: the experts of the files, and not those of the model."""
    inner = 64 * parts
    source = eager("qwen3_moe", hidden_size=64, moe_intermediate_size=inner)
    source.save_pretrained(tmp_path / "model")
    wanted = []
    for index in range(2):
        other = Weights.random(index, experts=6, hidden=64, inner=inner)
        StoredLayer.of(*other.matrices(), "int8", parts).write_files(tmp_path / "kt", index)
        with ktk.Experts.from_checkpoint(
            tmp_path / "kt", layer_idx=index, num_experts_per_tok=3, threads=1
        ) as experts:
            assert experts.config.groups == (0 if parts == 1 else 64)
            experts.save(tmp_path / "wanted")
        wanted.append((tmp_path / "wanted").read_bytes())
    settings = {"backend": "AMXINT8", "weight_path": str(tmp_path / "kt"), "num_threads": 2}
    model = wrap(source, **settings)
    loaded = load_kt_model(model_name_or_path=tmp_path / "model", kt_plugin=settings)
    for made in (model, loaded):
        for index, wrapper in enumerate(made._kt_wrappers):
            wrapper.experts.save(tmp_path / "saved")
            assert (tmp_path / "saved").read_bytes() == wanted[index]
    assert not list((tmp_path / "kt").glob("*.safetensors"))
    data = batch(device=loaded.device)
    assert torch.equal(loaded(**data).logits, model.to(loaded.device)(**data).logits)


def test_load_kt_model_refuses() -> None:
    with pytest.raises(KTAMXConfigError, match="needs model_name_or_path"):
        load_kt_model()
    with pytest.raises(FileNotFoundError, match="no checkpoint directory"):
        load_kt_model(model_name_or_path="/nowhere")


def test_full_weights_follow_an_explicit_call() -> None:
    model = wrap(eager("qwen3_moe"), train_mode="full")
    before = model(**batch()).logits.detach()
    for parameter in (
        moe_layers(model)[0][1].experts.gate_up_proj,
        moe_layers(model)[0][1].experts.down_proj,
    ):
        # Past the counter that says that a tensor has changed.
        parameter.data.zero_()
    update_kt_lora_pointers(model)
    assert not torch.equal(model(**batch()).logits, before)


class Gate(nn.Module):
    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden) * 0.1)
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        scores = (x.reshape(-1, x.shape[-1]) @ self.weight.T).softmax(-1)
        weights, ids = scores.topk(self.top_k)
        return ids, weights, None


class Expert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class ListBlock(nn.Module):
    """As models that come with their own code have it: a list of experts, and a router that chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(32, 4, 2)
        self.experts = nn.ModuleList(Expert(32, 24) for _ in range(4))
        self.shared_experts = Expert(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights, _ = self.gate(x)
        flat = x.reshape(-1, 32)
        output = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == index)
            output = output.index_add(0, rows, expert(flat[rows]) * weights[rows, slots, None])
        return output.view(x.shape) + self.shared_experts(x)


class ListModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": ListBlock()}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["mlp"](x)  # type: ignore[index]
        return x


def list_model() -> Any:
    torch.manual_seed(0)
    model = ListModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def adapted_list(model: Any, tmp: Any = None) -> Any:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]))
    if hasattr(model, "_kt_wrappers"):
        kt_adapt_peft_lora(adapted)
    draw_adapters(adapted)
    return adapted


def test_adapters_on_each_expert_of_a_list(tmp_path: Path) -> None:
    source = list_model()
    reference, model = adapted_list(copy.deepcopy(source)), adapted_list(wrap(copy.deepcopy(source)))
    assert trained(reference).keys() == trained(model).keys()
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    for one in (reference, model):
        one(x).square().sum().backward()
    for name, parameter in trained(reference).items():
        other = trained(model)[name]
        assert parameter.grad is not None and other.grad is not None
        assert (other.grad - parameter.grad).norm() <= 0.04 * parameter.grad.norm() + 1e-6, name
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(wrap(copy.deepcopy(source)), tmp_path)
    kt_adapt_peft_lora(again)
    assert torch.equal(again(x), model(x))


def test_full_training_of_a_list() -> None:
    source = list_model()
    reference, model = copy.deepcopy(source), wrap(source, train_mode="full")
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    for one in (reference, model):
        one(x).square().sum().backward()
    for (name, parameter), other in zip(reference.named_parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        assert (other.grad - parameter.grad).norm() <= 0.04 * parameter.grad.norm() + 1e-6, name


def test_a_list_whose_router_only_scores() -> None:
    model = list_model()
    model.layers[0]["mlp"].gate = nn.Linear(32, 4)
    with pytest.raises(KTAMXModelNotSupportedError, match="router that only gives scores"):
        wrap(model)


def test_only_some_experts_adapted() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(wrap(list_model()), LoraConfig(target_modules=["gate_proj", "up_proj"]))
    with pytest.raises(KTAMXConfigError, match="gate, up and down of all"):
        kt_adapt_peft_lora(model)


# ---- what is where ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "experts", "top_k", "inner", "shared"),
    [
        ("qwen3_moe", 6, 3, 40, False),
        ("mixtral", 4, 2, 96, False),
        ("deepseek_v3", 8, 2, 40, True),
        ("qwen2_moe", 6, 3, 40, True),
        ("glm4_moe", 8, 2, 40, True),
    ],
)
def test_arch(architecture: str, experts: int, top_k: int, inner: int, shared: bool) -> None:
    model = eager(architecture)
    arch = get_moe_arch_config(model.config)
    assert (arch.expert_num, arch.num_experts_per_tok) == (experts, top_k)
    assert (arch.intermediate_size, arch.hidden_size, arch.has_shared_experts) == (inner, 72, shared)
    layers = model.get_submodule(arch.layers_prefix)
    block = get_moe_module(layers[-1], arch)
    assert block is not None and block.experts is not None
    gate, up, down = extract_moe_weights(block, arch)
    assert gate.shape == up.shape == (experts, inner, 72) and down.shape == (experts, 72, inner)
    dense = [layer for layer in layers if get_moe_module(layer, arch) is None]
    assert len(dense) == (1 if architecture in ("deepseek_v3", "glm4_moe") else 0)


def test_arch_of_a_dense_model() -> None:
    import transformers

    with pytest.raises(KTAMXModelNotSupportedError, match="no expert_num, num_experts_per_tok"):
        get_moe_arch_config(transformers.LlamaConfig())


def test_arch_of_text_and_images() -> None:
    import transformers

    config = transformers.AutoConfig.for_model("qwen3_vl_moe")
    arch = get_moe_arch_config(config)
    assert arch.expert_num == config.text_config.num_experts
    assert arch.layers_prefix in ("model.language_model.layers", "model.layers")


def test_a_model_of_text_and_images() -> None:
    import transformers

    rope = {"rope_type": "default", "mrope_section": [2, 2, 4], "mrope_interleaved": True}
    config = transformers.AutoConfig.for_model(
        "qwen3_vl_moe",
        text_config={
            **make_config("qwen3_moe").to_dict(),
            "model_type": "qwen3_vl_moe_text",
            "rope_parameters": {**rope, "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 72,
            "deepstack_visual_indexes": [0],
        },
    )
    torch.manual_seed(0)
    kind: Any = transformers.Qwen3VLMoeForConditionalGeneration
    source = kind._from_config(config, experts_implementation="eager").train()
    reference, model = copy.deepcopy(source), wrap(source, train_mode="full")
    ids = batch()["input_ids"]
    assert get_moe_arch_config(model.config).layers_prefix == "model.language_model.layers"
    assert len(model._kt_wrappers) == 2
    for one in (reference, model):
        one(input_ids=ids, labels=ids).loss.backward()
    for (name, parameter), other in zip(reference.named_parameters(), model.parameters(), strict=True):
        if parameter.grad is not None:
            assert other.grad is not None
            assert (other.grad - parameter.grad).norm() <= 0.04 * parameter.grad.norm() + 1e-6, name


def test_device_maps() -> None:
    config = make_config("deepseek_v3")
    found = build_kt_device_map(config, None, "cuda:1")
    assert found["model.embed_tokens"] == found["lm_head"] == found["model.layers.2"] == "cuda:1"
    assert "model.layers.0.mlp.experts" not in found
    assert found["model.layers.1.mlp.experts"] == "cpu"
    assert "model.layers.1" not in build_kt_device_map_simplified(config)
    assert get_kt_loading_kwargs(revision="x") == {
        "dtype": "auto",
        "device_map": None,
        "low_cpu_mem_usage": True,
        "revision": "x",
    }


def test_devices() -> None:
    model = eager("qwen3_moe")
    assert get_expert_device(model) == torch.device("cpu")
    move_non_experts_to_gpu(model, device="meta")
    kinds = {name: p.device.type for name, p in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "experts" in name} == {"cpu"}
    assert {kind for name, kind in kinds.items() if "experts" not in name} == {"meta"}


def test_experts_of_checkpoint_files() -> None:
    folder = checkpoint("mixtral")
    gate, up, down = load_experts_from_checkpoint_files(sorted(folder.glob("*.safetensors")), layer_idx=1)
    assert (
        gate.dtype == torch.bfloat16 and gate.shape == up.shape == (4, 96, 72) and down.shape == (4, 72, 96)
    )
    with pytest.raises(KtkArgumentError, match="of one folder"):
        load_experts_from_checkpoint_files(["/a/x.safetensors", "/b/y.safetensors"])


def test_staging_sets_are_apart_by_shape() -> None:
    KExpertsSFTBuffer.clear_cache()
    small = KExpertsSFTBuffer.get_buffer(4, 16, 2, torch.bfloat16, pin_memory=False)
    other = KExpertsSFTBuffer.get_buffer(4, 32, 2, torch.bfloat16, pin_memory=False)
    assert small.input.shape == (4, 16) and other.input.shape == (4, 32)
    assert small.bsz.item() == 4 and small.expert_ids.dtype == torch.int64
    again = KExpertsSFTBuffer.get_buffer(2, 16, 2, torch.bfloat16, pin_memory=False)
    assert again.input.data_ptr() == small.input.data_ptr() and again.bsz.item() == 2
    grown = KExpertsSFTBuffer.get_buffer(9, 16, 2, torch.bfloat16, pin_memory=False)
    assert grown.weights.shape == (9, 2) and grown.grad_weights.dtype == torch.float32
    ktk.KTMoEWrapper.clear_sft_buffer_cache()
    assert not KExpertsSFTBuffer._sets


def test_an_own_function_for_wrapping() -> None:
    called = []
    config = KTConfig(wrap_fn=lambda model, **kw: called.append(kw) or [], wrap_kwargs={"a": 1})
    assert wrap_moe_layers_with_kt_wrapper(nn.Linear(1, 1), config) == []
    assert called == [{"a": 1}]
