"""Whole models of transformers with their experts in ktk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ktk.errors import KtkArgumentError, KtkUnsupportedError
from ktk.integrations import transformers as integration
from ktk.integrations.transformers import Activation, Options
from reference.packing import Format
from tiny_models import CONFIGS, checkpoint, load, make_config, oracle

pytestmark = pytest.mark.any_binding

FORMS = {
    "bf16": (Options(format="bf16", threads=2), Format(0)),
    "int8": (Options(format="int8", threads=2), Format(1, 512, rotated=True)),
    "int8-row": (Options(format="int8", group_size=0, rotated=False, threads=2), Format(1)),
    "int4": (Options(format="int4", threads=2), Format(2, 32, rotated=True)),
    "int4-symmetric-64": (
        Options(format="int4", group_size=64, rotated=False, threads=2),
        Format(2, 64),
    ),
}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_logits_are_those_of_eager_up_to_the_format(
    architecture: str, form: str, tokens: torch.Tensor
) -> None:
    """The format's own effect is what the reference shows in the same model.

    ktk may differ from the reference by the order of fp32 sums, which later layers see as a rounding of an
    activation that falls to the other side here and there. One such step is at most twice what rounding
    itself did to that element, so no logit moves by more than the format's effect, and all but a few by far
    less.
    """
    options, reference_form = FORMS[form]
    eager = logits(load(architecture, "eager"), tokens)
    modelled = logits(oracle(architecture, reference_form), tokens)
    got = logits(integration.load_model(checkpoint(architecture), options, dtype=torch.float32), tokens)
    effect = (modelled - eager).abs()
    deviation = (got - modelled).abs()
    assert 0 < effect.max() < 0.5 * eager.abs().max()
    assert deviation.max() <= effect.max()
    assert deviation.mean() <= 0.1 * effect.mean()
    assert (got - eager).abs().max() <= 2 * effect.max()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_three_ways_in_give_the_same_bits(architecture: str, tokens: torch.Tensor) -> None:
    streamed = integration.load_model(checkpoint(architecture), dtype=torch.float32)
    attached = integration.attach(load(architecture, "eager"))
    integration.register()
    by_name = load(architecture, "ktk")
    assert integration.layers_of(by_name) == {}
    wanted = logits(streamed, tokens)
    assert torch.equal(logits(attached, tokens), wanted)
    assert torch.equal(logits(by_name, tokens), wanted)
    assert len(integration.layers_of(by_name)) == 2


@pytest.mark.parametrize("architecture", CONFIGS)
def test_experts_are_no_tensors_of_the_model(architecture: str, tmp_path: Path) -> None:
    model = integration.load_model(checkpoint(architecture), Options(format="int8"), dtype=torch.float32)
    layers = integration.layers_of(model)
    assert len(layers) == 2
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert not [name for name in names if ".experts." in name]
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    whole = sum(p.numel() for p in load(architecture, "eager").parameters())
    experts = sum(
        layer.config.num_experts * layer.config.hidden_size * layer.config.intermediate_size * 3
        for layer in layers.values()
    )
    left = sum(p.numel() for p in model.parameters())
    biases = whole - left - experts
    assert biases == (0 if architecture != "gpt_oss" else 2 * 4 * (2 * 96 + 72))
    for save in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(KtkUnsupportedError, match="would lack them"):
            save()
    assert not list(tmp_path.glob("*.safetensors"))


def test_batch_of_different_lengths_continues_each_prompt() -> None:
    model = integration.load_model(
        checkpoint("qwen3_moe"), Options(format="int8", strict=True), dtype=torch.float32
    )
    prompts = [list(b"the first prompt"), list(b"another")]
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(torch.tensor([p]), **arguments)[0, len(p) :] for p in prompts]
    padded = torch.tensor([prompts[0], [0] * 9 + prompts[1]])
    mask = torch.tensor([[1] * 16, [0] * 9 + [1] * 7])
    together = model.generate(padded, attention_mask=mask, **arguments)[:, 16:]
    assert torch.equal(together, torch.stack(alone))


def test_packed_folder_is_written_once_and_read_after(tmp_path: Path, tokens: torch.Tensor) -> None:
    folder = tmp_path / "packed"
    options = Options(format="int4", group_size=64)
    calls: list[tuple[int, int]] = []
    first = integration.load_model(
        checkpoint("mixtral"),
        options,
        dtype=torch.float32,
        packed=folder,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 2), (2, 2)]
    files = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(files) == 2
    second = integration.load_model(checkpoint("mixtral"), options, dtype=torch.float32, packed=folder)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == files
    assert torch.equal(logits(first, tokens), logits(second, tokens))
    with pytest.raises(KtkArgumentError, match="group_size"):
        integration.load_model(checkpoint("mixtral"), Options(format="int4", group_size=32), packed=folder)
    with pytest.raises(KtkArgumentError, match="rotated True, and this layer has False"):
        integration.load_model(checkpoint("mixtral"), Options(format="int4", rotated=False), packed=folder)
    # What is left open is as the files have it.
    third = integration.load_model(
        checkpoint("mixtral"), Options(format="int4"), dtype=torch.float32, packed=folder
    )
    assert torch.equal(logits(third, tokens), logits(first, tokens))


def test_every_dtype_of_the_rest(tokens: torch.Tensor) -> None:
    wanted = logits(load("qwen3_moe", "eager"), tokens)
    for dtype in (torch.bfloat16, torch.float16):
        got = logits(integration.load_model(checkpoint("qwen3_moe"), dtype=dtype), tokens)
        assert got.dtype == dtype
        assert (got.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_unsupported_activation_is_refused_before_anything_is_taken(tokens: torch.Tensor) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_config(
        make_config("mixtral", hidden_act="gelu"), experts_implementation="eager"
    )
    before = logits(model, tokens)
    with pytest.raises(KtkUnsupportedError, match="MixtralExperts"):
        integration.attach(model)
    assert torch.equal(logits(model, tokens), before)


def test_model_without_experts_is_refused() -> None:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(KtkArgumentError, match="LlamaForCausalLM"):
        integration.attach(transformers.LlamaForCausalLM(config))


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        integration.load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("module_name", "class_name", "config", "expected"),
    [
        ("gpt_oss", "GptOssExperts", {"swiglu_limit": 7.0}, Activation(7.0, 1.702)),
        (
            "minimax_m3_vl",
            "MiniMaxM3VLExperts",
            {"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
            Activation(7.0, 1.702),
        ),
        ("deepseek_v4", "DeepseekV4Experts", {"swiglu_limit": 10.0}, Activation(10.0, 0.0)),
        ("qwen3_moe", "Qwen3MoeExperts", {}, Activation()),
    ],
)
def test_activation_is_found_by_its_values(
    module_name: str, class_name: str, config: dict[str, float], expected: Activation
) -> None:
    settings = transformers.PreTrainedConfig()
    sizes = {"num_experts": 2, "num_local_experts": 2, "hidden_size": 8, "moe_intermediate_size": 8}
    for name, value in {
        **sizes,
        "intermediate_size": 8,
        "hidden_act": "silu",
        "swiglu_alpha": 1.702,
        **config,
    }.items():
        setattr(settings, name, value)
    module_path = f"transformers.models.{module_name}.modeling_{module_name}"
    __import__(module_path)
    module = getattr(sys.modules[module_path], class_name)(settings)
    assert integration.activation_of(module) == expected


def test_gradients_are_refused_at_the_backward_pass() -> None:
    model = integration.load_model(checkpoint("qwen3_moe"), dtype=torch.float32)
    output = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    with pytest.raises(KtkUnsupportedError, match="no gradient"):
        output.sum().backward()


def test_compiled_model_has_no_graph_break(tokens: torch.Tensor) -> None:
    model = integration.load_model(checkpoint("mixtral"), dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=tokens, use_cache=False).logits
    assert torch.equal(got, logits(model, tokens))


def test_importing_ktk_imports_no_transformers() -> None:
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; import ktk, json;"
        "print(json.dumps([n for n in ('transformers', 'torch', 'ktk.sft') if n in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []
