"""Whole models: losses and gradients of ktk against the same model in eager PyTorch with PEFT."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint

from ktk.sft import autograd, kt_adapt_peft_lora
from ktk.sft.modules import moe_layers
from sft.models import batch, draw_adapters, eager, lora_config, pair, trained, with_peft, wrap

pytestmark = pytest.mark.any_binding

ARCHITECTURES = ("qwen3_moe", "mixtral", "deepseek_v3")

# Experts multiply bfloat16 numbers, the eager model float32: a few roundings of 2^-9 each, one after the
# other.
TOLERANCE = 8 * 2.0**-8


def gradients(model: Any, data: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**(data or batch())).loss.backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def assert_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        difference = (actual[name].float() - wanted.float()).norm()
        assert difference <= tolerance * wanted.float().norm() + 1e-7, (name, difference, wanted.norm())


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.equal(actual[name], wanted), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_peft(architecture: str) -> None:
    reference, model = pair(architecture)
    assert trained(reference).keys() == trained(model).keys()
    data = batch()
    assert abs(model(**data).loss.item() - reference(**data).loss.item()) < TOLERANCE
    assert_close(gradients(model), gradients(reference), TOLERANCE)


def test_recompute_gives_the_gradients_of_retain() -> None:
    _, retain = pair("qwen3_moe")
    _, recompute = pair("qwen3_moe", activation_policy="recompute")
    assert_same(gradients(recompute), gradients(retain))


@pytest.mark.parametrize("architecture", ["glm4_moe", "qwen2_moe", "deepseek_v2"])
def test_other_architectures(architecture: str) -> None:
    reference, model = pair(architecture)
    assert_close(gradients(model), gradients(reference), TOLERANCE)


def test_all_parameters_are_in_the_module_tree() -> None:
    reference, model = pair("qwen3_moe")
    count = sum(p.numel() for p in trained(reference).values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    named = dict(model.named_parameters())
    assert not [name for name in named if "gate_up_proj" in name or "down_proj" in name]
    experts = [p for name, p in named.items() if "experts" in name]
    assert experts and all(p.requires_grad for p in experts)


# ---- checkpointing, accumulation, precision, compilation ------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_gradient_checkpointing_changes_no_bit(reentrant: bool, policy: str) -> None:
    _, model = pair("qwen3_moe", activation_policy=policy)
    model.enable_input_require_grads()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model), expected)
    model(**batch())
    gc.collect()
    assert not autograd._saved_of_token


def test_checkpointing_the_block_alone_repeats_its_dropout() -> None:
    model = wrap(eager("qwen3_moe"), lora_dropout=0.5)
    kt_adapt_peft_lora(model)
    layer = moe_layers(model)[0][1]
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 8, 72)

    def run(reentrant: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        inputs = x.clone().requires_grad_()
        output = layer(inputs) if reentrant is None else checkpoint(layer, inputs, use_reentrant=reentrant)
        # What follows draws too: were the seed not restored, the layer would see another mask.
        (output * torch.rand_like(output)).sum().backward()
        assert inputs.grad is not None
        return output.detach(), inputs.grad

    expected = run(None)
    for reentrant in (True, False):
        for actual, wanted in zip(run(reentrant), expected, strict=True):
            assert torch.equal(actual, wanted)
    other = run(None)[0]
    assert torch.equal(other, expected[0])
    torch.manual_seed(6)
    assert not torch.equal(layer(x), expected[0])
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_accumulation_follows_pytorchs_rules() -> None:
    _, model = pair("mixtral")
    first, second = (gradients(model, batch(seed)) for seed in (1, 2))
    model.zero_grad(set_to_none=True)
    losses = [model(**batch(seed)).loss for seed in (1, 2)]
    # Several forwards wait at once, and their backwards come in any order.
    for loss in reversed(losses):
        loss.backward()
    summed = {name: second[name] + first[name] for name in first}
    assert_same({name: p.grad for name, p in trained(model).items() if p.grad is not None}, summed)
    model.zero_grad(set_to_none=False)
    model(**batch(1)).loss.backward()
    assert_same({name: p.grad for name, p in trained(model).items() if p.grad is not None}, first)


def test_hooks_and_foreign_gradients_are_respected() -> None:
    _, model = pair("qwen3_moe")
    name, parameter = next((n, p) for n, p in trained(model).items() if "experts" in n)
    expected = gradients(model)[name]
    parameter.grad = torch.ones_like(parameter)
    seen = []
    handle = parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
    model(**batch()).loss.backward()
    handle.remove()
    assert torch.equal(seen[0], expected)
    assert torch.equal(parameter.grad, torch.ones_like(parameter) + expected)


def test_autocast() -> None:
    reference, model = pair("qwen3_moe")
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(reference)
        actual = gradients(model)
    assert_close(actual, expected, 4 * TOLERANCE)
    assert all(gradient.dtype == torch.float32 for gradient in actual.values())


def error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients, over the norm of them all."""
    difference = sum(
        (actual[name].double() - wanted.double()).square().sum() for name, wanted in expected.items()
    )
    norm = sum(wanted.double().square().sum() for wanted in expected.values())
    return float(torch.as_tensor(difference / norm).sqrt())


def test_bfloat16_model_is_as_exact_as_an_eager_one() -> None:
    source = eager("qwen3_moe")
    exact = gradients(with_peft(copy.deepcopy(source)))
    rounded = with_peft(copy.deepcopy(source).to(torch.bfloat16))
    model = with_peft(wrap(source.to(torch.bfloat16)))
    assert model(**batch()).logits.dtype == torch.bfloat16
    assert error(gradients(model), exact) <= 1.5 * error(gradients(rounded), exact)


def test_float16_hidden_states() -> None:
    model = wrap(eager("qwen3_moe"))
    layer = moe_layers(model)[0][1]
    x = torch.randn(2, 8, 72)
    ids = torch.randint(6, (16, 3))
    weights = torch.rand(16, 3)
    half = x.half().requires_grad_()
    output = layer.experts(half.view(16, 72), ids, weights.half())
    assert output.dtype == torch.float16
    output.sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.float16


# Of the compiler, about itself.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_model() -> None:
    _, model = pair("qwen3_moe")
    expected = gradients(model)
    layers = moe_layers(model)
    for _, layer in layers:
        layer.compile(backend="aot_eager")
    assert_close(gradients(model), expected, 1e-5)


def test_only_the_router_is_trained() -> None:
    source = eager("qwen3_moe")
    reference, model = copy.deepcopy(source), wrap(source)
    for one in (reference, model):
        one.requires_grad_(False)
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("mlp.gate" in name)
    assert_close(gradients(model), gradients(reference), TOLERANCE)


# ---- whose adapters ---------------------------------------------------------------------------------


def test_adapters_of_ktk_beside_those_of_peft() -> None:
    model = wrap(eager("qwen3_moe"), lora_rank=8, lora_alpha=4)
    adapted = with_peft(model, target_parameters=None)
    names = {name for name in trained(adapted) if "experts" in name}
    assert len(names) == 12
    assert "base_model.model.model.layers.0.mlp.experts.gate_lora_a.default" in names
    core = moe_layers(adapted)[0][1].core
    assert core.lora is not None and (core.lora.rank, core.lora.alpha) == (8, 4.0)
    found = gradients(adapted)
    assert all(found[name].abs().sum() > 0 for name in names)


def test_fresh_adapters_of_ktk_change_nothing() -> None:
    source = eager("qwen3_moe")
    model = wrap(copy.deepcopy(source))
    before = model(**batch()).logits
    result = kt_adapt_peft_lora(model)
    assert torch.equal(model(**batch()).logits, before)
    assert len(result.named_optimizer_parameters) == 12
    assert result.placeholder_names == [
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    ]
    assert kt_adapt_peft_lora(model).placeholder_names == []


def test_rank_and_alpha_come_from_peft() -> None:
    model = with_peft(wrap(eager("qwen3_moe")), target_parameters=None, r=2, lora_alpha=6)
    core = moe_layers(model)[0][1].core
    assert core.lora is not None and (core.lora.rank, core.lora.alpha) == (2, 6.0)


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_one_fused_parameter_alone(target: str) -> None:
    source = eager("qwen3_moe")
    settings = {"target_parameters": [f"mlp.experts.{target}"]}
    reference = with_peft(copy.deepcopy(source), **settings)
    model = with_peft(wrap(source), **settings)
    assert_close(gradients(model), gradients(reference), TOLERANCE)


def test_parameters_of_different_rank_and_scale() -> None:
    source = eager("qwen3_moe")
    reference = with_peft(copy.deepcopy(source))
    model = get_peft_model(wrap(source), lora_config())
    for one in (reference, model):
        for layer in one.get_base_model().model.layers:
            down = layer.mlp.experts
            assert down.parameter_name == "down_proj"
            down.update_layer("default", r=2, lora_alpha=3, config=lora_config())
    kt_adapt_peft_lora(model)
    for one in (reference, model):
        draw_adapters(one)
    assert_close(gradients(model), gradients(reference), TOLERANCE)


def test_adapters_can_be_switched_off() -> None:
    source = eager("qwen3_moe")
    plain = wrap(copy.deepcopy(source))
    model = with_peft(wrap(source))
    data = batch()
    with torch.no_grad():
        expected, adapted = plain(**data).logits, model(**data).logits
        with model.disable_adapter():
            switched_off = model(**data).logits
        again = model(**data).logits
    assert torch.equal(switched_off, expected)
    assert not torch.equal(adapted, expected) and torch.equal(adapted, again)


def test_skip_lora_methods() -> None:
    source = eager("qwen3_moe")
    plain = wrap(copy.deepcopy(source))
    model = with_peft(wrap(source, backend="AMXBF16_SFT_SkipLoRA"), target_parameters=None)
    assert not [name for name in trained(model) if "experts" in name]
    for one in (plain, model):
        for name, parameter in one.named_parameters():
            if "lora_" in name:
                torch.nn.init.zeros_(parameter)
    data = batch()
    assert torch.equal(model(**data).logits, plain(**data).logits)
    assert gradients(model)


def test_extra_experts() -> None:
    model = wrap(
        eager("qwen3_moe"), use_lora_experts=True, lora_expert_num=3, lora_expert_intermediate_size=16
    )
    before = model(**batch()).logits
    kt_adapt_peft_lora(model)
    assert torch.equal(model(**batch()).logits, before)
    extra = moe_layers(model)[0][1].lora_experts
    assert [tuple(p.shape) for p in extra[0].parameters()] == [(16, 72), (16, 72), (72, 16)]
    for expert in extra:
        torch.nn.init.ones_(expert.le_down.weight)
    x = torch.randn(2, 3, 72)
    mean = sum(e.le_down(torch.nn.functional.silu(e.le_gate(x)) * e.le_up(x)) for e in extra) / 3
    assert torch.allclose(extra(x), mean, atol=1e-6)
    assert not torch.equal(model(**batch()).logits, before)
    found = gradients(model)
    assert found["model.layers.0.mlp.lora_experts.2.le_gate.weight"].abs().sum() > 0


# ---- the weights themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_full_training(architecture: str) -> None:
    source = eager(architecture)
    reference, model = copy.deepcopy(source), wrap(source, train_mode="full")
    kt_adapt_peft_lora(model)
    assert trained(reference).keys() == trained(model).keys()
    assert_close(gradients(model), gradients(reference), TOLERANCE)
    for one in (reference, model):
        torch.optim.AdamW(one.parameters(), lr=1e-2).step()
    # The experts of the next forward are those that the optimizer has left.
    data = batch(3)
    expected = reference(**data).loss
    assert abs(model(**data).loss.item() - expected.item()) < TOLERANCE
    assert_close(gradients(model, data), gradients(reference, data), 4 * TOLERANCE)
    assert model.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_every_kind_of_optimizer_step_is_noticed(options: dict[str, bool]) -> None:
    model = wrap(eager("qwen3_moe"), train_mode="full")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    before = model(**batch()).loss
    before.backward()
    optimizer.step()
    assert model(**batch()).loss.item() < before.item() - 0.01


def test_hybrid_training() -> None:
    model = with_peft(wrap(eager("qwen3_moe"), train_mode="hybrid"), target_parameters=None)
    names = set(trained(model))
    assert any(name.endswith("experts.base_layer.gate_up_proj") for name in names)
    assert any("experts.gate_lora_a" in name for name in names)
    found = gradients(model)
    assert all(found[name].abs().sum() > 0 for name in names)


# ---- what is kept -------------------------------------------------------------------------------------


def test_activations_are_freed() -> None:
    _, model = pair("qwen3_moe")
    assert not autograd._saved_of_token
    output = model(**batch())
    assert len(autograd._saved_of_token) == 2
    output.loss.backward()
    assert not autograd._saved_of_token
    output = model(**batch())
    assert len(autograd._saved_of_token) == 2
    del output
    gc.collect()
    assert not autograd._saved_of_token
    with torch.no_grad():
        model(**batch())
    assert not autograd._saved_of_token


def test_saved_bytes() -> None:
    _, model = pair("qwen3_moe")
    output = model(**batch())
    tokens, k, hidden, inner = 48, 3, 72, 40
    for saved in autograd._saved_of_token.values():
        assert saved.nbytes <= 2 * tokens * hidden + 4 * tokens * k * inner + 64 * tokens * k + 4096
    del output
