"""Adapters on disk: every form written is read back bit by bit, and what does not fit is refused whole."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ktk.sft import (
    KTAMXConfigError,
    kt_adapt_peft_lora,
    load_kt_adapter_artifacts,
    load_kt_moe_from_adapter,
    load_lora_experts_from_adapter,
    save_kt_adapter_artifacts,
    save_kt_moe_to_adapter,
    save_lora_experts_to_adapter,
)
from ktk.sft.base import LORA_NAMES
from ktk.sft.modules import moe_layers
from sft.models import batch, draw_adapters, eager, trained, with_peft, wrap

pytestmark = pytest.mark.any_binding


def adapted(seed: int = 0, **settings: Any) -> Any:
    """A model with adapters of ktk's own."""
    model = wrap(eager("qwen3_moe"), **{"lora_rank": 4, "lora_alpha": 8, **settings})
    kt_adapt_peft_lora(model)
    draw_adapters(model, seed)
    return model


def six(model: Any) -> dict[int, dict[str, torch.Tensor]]:
    found = {}
    for _, layer in moe_layers(model):
        assert layer.core.lora is not None
        tensors = layer.core.lora.tensors()
        assert tensors is not None
        found[layer.layer_idx] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return found


def assert_same(actual: Any, expected: Any) -> None:
    assert actual.keys() == expected.keys()
    for layer, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(actual[layer][name], tensor), (layer, name)


def test_the_fused_file_has_the_keys_of_kt_kernel(tmp_path: Path) -> None:
    model = adapted()
    path = save_kt_moe_to_adapter(model, tmp_path)
    assert path == tmp_path / "fused_expert_lora.safetensors"
    tensors = load_file(path)
    assert tensors.keys() == {f"layers.{layer}.experts.{name}" for layer in (0, 1) for name in LORA_NAMES}
    assert tensors["layers.1.experts.down_lora_b"].shape == (6, 72, 4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", ["fused", "per_expert"])
def test_round_trip(form: Any, tmp_path: Path) -> None:
    model, other = adapted(1), adapted(2)
    save_kt_moe_to_adapter(model, tmp_path, form=form)
    assert load_kt_moe_from_adapter(other, tmp_path) == 2
    assert_same(six(other), six(model))
    again = tmp_path / "again"
    save_kt_moe_to_adapter(other, again, form=form)
    for file in tmp_path.glob("*.safetensors"):
        first, second = load_file(file), load_file(again / file.name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_file_of_kt_kernel(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "gate_lora_a": (6, 4, 72),
        "gate_lora_b": (6, 40, 4),
        "up_lora_a": (6, 4, 72),
        "up_lora_b": (6, 40, 4),
    }
    shapes |= {"down_lora_a": (6, 4, 40), "down_lora_b": (6, 72, 4)}
    tensors = {
        f"layers.{layer}.experts.{name}": torch.randn(shape, generator=generator).bfloat16()
        for layer in (0, 1)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "fused_expert_lora.safetensors")
    model = wrap(eager("qwen3_moe"))
    load_kt_moe_from_adapter(model, tmp_path)
    found = six(model)
    for key, tensor in tensors.items():
        layer, name = int(key.split(".")[1]), key.split(".")[3]
        assert torch.equal(found[layer][name], tensor)
    core = moe_layers(model)[0][1].core
    assert core.lora is not None and (core.lora.rank, core.lora.alpha) == (4, 8.0)


def test_peft_saves_and_loads_adapters_on_fused_experts(tmp_path: Path) -> None:
    source = eager("qwen3_moe")
    model = with_peft(wrap(copy.deepcopy(source)), seed=4)
    model.save_pretrained(tmp_path)
    expected = model(**batch()).logits
    # In plain transformers and PEFT ...
    plain = PeftModel.from_pretrained(copy.deepcopy(source), tmp_path)
    assert (plain(**batch()).logits - expected).abs().max() < 0.05 * expected.abs().max()
    # ... and in ktk, as what they were or as adapters of ktk's own.
    again = PeftModel.from_pretrained(wrap(copy.deepcopy(source)), tmp_path, is_trainable=True)
    kt_adapt_peft_lora(again)
    assert torch.equal(again(**batch()).logits, expected)
    assert trained(again).keys() == trained(model).keys()
    own = wrap(copy.deepcopy(source))
    assert load_kt_moe_from_adapter(own, tmp_path) == 2
    assert_same(six(own), six(model))


def test_an_adapter_trained_elsewhere(tmp_path: Path) -> None:
    source = eager("mixtral")
    plain = with_peft(copy.deepcopy(source), seed=5)
    plain.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(wrap(source), tmp_path)
    kt_adapt_peft_lora(model)
    expected = plain(**batch()).logits
    assert (model(**batch()).logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_peft_carries_adapters_of_ktk(tmp_path: Path) -> None:
    source = eager("qwen3_moe")
    model = with_peft(wrap(copy.deepcopy(source)), seed=6, target_parameters=None)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.mlp.experts.gate_lora_a" in keys
    again = with_peft(wrap(copy.deepcopy(source)), seed=7, target_parameters=None)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    own = wrap(source)
    assert load_kt_moe_from_adapter(own, tmp_path) == 2
    assert_same(six(own), six(model))


def test_extra_experts_join_peft_file(tmp_path: Path) -> None:
    settings = {"use_lora_experts": True, "lora_expert_intermediate_size": 16}
    source = eager("qwen3_moe")
    model = with_peft(wrap(copy.deepcopy(source), **settings), target_parameters=None)
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    save_kt_adapter_artifacts(model, tmp_path)
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert {key for key in after if "lora_experts" in key} == {
        f"base_model.model.model.layers.{layer}.mlp.lora_experts.{expert}.le_{part}.weight"
        for layer in (0, 1)
        for expert in (0, 1)
        for part in ("gate", "up", "down")
    }
    again = with_peft(wrap(copy.deepcopy(source), **settings), seed=9, target_parameters=None)
    assert load_kt_adapter_artifacts(again, tmp_path) == 2
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    without = with_peft(wrap(source), target_parameters=None)
    with pytest.raises(KTAMXConfigError, match="kt_use_lora_experts"):
        load_lora_experts_from_adapter(without, tmp_path)
    assert save_lora_experts_to_adapter(without, tmp_path / "none") is None


def test_manifest_shows_a_damaged_copy(tmp_path: Path) -> None:
    source = eager("qwen3_moe")
    model = with_peft(wrap(copy.deepcopy(source)), target_parameters=None)
    model.save_pretrained(tmp_path)
    save_kt_adapter_artifacts(model, tmp_path)
    manifest = json.loads((tmp_path / "kt_adapter_manifest.json").read_text())
    fused = tmp_path / "fused_expert_lora.safetensors"
    assert manifest["version"] == 1 and manifest["files"].keys() == {fused.name}
    assert manifest["files"][fused.name] == {
        "size": fused.stat().st_size,
        "sha256": hashlib.sha256(fused.read_bytes()).hexdigest(),
    }
    again = with_peft(wrap(source), seed=9, target_parameters=None)
    whole = fused.read_bytes()
    for broken in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        fused.write_bytes(broken)
        with pytest.raises(KTAMXConfigError, match="changed, or copied in part"):
            load_kt_adapter_artifacts(again, tmp_path)
    fused.unlink()
    with pytest.raises(KTAMXConfigError, match="copied in part"):
        load_kt_adapter_artifacts(again, tmp_path)
    fused.write_bytes(whole)
    for text, message in (("{", "is damaged"), ('{"version": 2, "files": {}}', "has version 2")):
        (tmp_path / "kt_adapter_manifest.json").write_text(text)
        with pytest.raises(KTAMXConfigError, match=message):
            load_kt_adapter_artifacts(again, tmp_path)
    (tmp_path / "kt_adapter_manifest.json").unlink()
    assert load_kt_adapter_artifacts(again, tmp_path) == 2
    assert_same(six(again), six(model))


def test_extra_experts_alone(tmp_path: Path) -> None:
    settings = {"use_lora_experts": True, "lora_expert_intermediate_size": 16}
    model, other = adapted(1, **settings), adapted(2, **settings)
    save_lora_experts_to_adapter(model, tmp_path)
    assert load_lora_experts_from_adapter(other, tmp_path) == 2
    for (_, one), (_, two) in zip(moe_layers(model), moe_layers(other), strict=True):
        for first, second in zip(one.lora_experts.parameters(), two.lora_experts.parameters(), strict=True):
            assert torch.equal(first, second)


# ---- refusals -----------------------------------------------------------------------------------------


def damaged(tmp_path: Path, change: Any) -> Path:
    save_kt_moe_to_adapter(adapted(1), tmp_path)
    file = tmp_path / "fused_expert_lora.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return tmp_path


def drop(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def put(key: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("layers.0.experts.up_lora_b"), "layer 0 lack up_lora_b"),
        (
            put("layers.1.experts.down_lora_a", torch.zeros(6, 4, 41)),
            r"down_lora_a of layer 1 .* another model",
        ),
        (put("layers.1.experts.gate_lora_a", torch.zeros(7, 4, 72)), "another model"),
        (put("layers.1.experts.gate_lora_b", torch.full((6, 40, 4), torch.nan)), "NaN"),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if ".1." in key],
            r"layers \[0\], and the model has experts in layers \[0, 1\]",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(change: Any, message: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, change)
    model = adapted(2)
    before = six(model)
    with pytest.raises(KTAMXConfigError, match=message):
        load_kt_moe_from_adapter(model, path)
    assert_same(six(model), before)


def test_another_rank(tmp_path: Path) -> None:
    save_kt_moe_to_adapter(adapted(1, lora_rank=8), tmp_path)
    with pytest.raises(
        KTAMXConfigError, match="rank 8, and those of layer 0 have rank 4; set kt_lora_rank to 8"
    ):
        load_kt_moe_from_adapter(adapted(2), tmp_path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    save_kt_moe_to_adapter(adapted(1), tmp_path)
    file = tmp_path / "fused_expert_lora.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_kt_moe_from_adapter(adapted(2), tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    model = adapted()
    assert load_kt_moe_from_adapter(model, tmp_path) == 0
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        load_kt_moe_from_adapter(model, tmp_path / "missing")
    with pytest.raises(KTAMXConfigError, match="kt_adapt_peft_lora"):
        save_kt_moe_to_adapter(wrap(eager("qwen3_moe")), tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(1)
    file = save_kt_moe_to_adapter(model, tmp_path)
    before = file.read_bytes()

    def fail(*arguments: Any, **keywords: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("ktk.sft.files.save_file", fail)
    draw_adapters(model, 5)
    with pytest.raises(OSError, match="disk full"):
        save_kt_moe_to_adapter(model, tmp_path)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
