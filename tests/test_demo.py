"""The shipped model, its training script, and ``ktk demo``."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from ktk import demo
from ktk.cli import main
from ktk.cli.demo import _score
from ktk.demo.train import read_corpus

pytestmark = pytest.mark.any_binding


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    return json.loads((demo.model_dir() / "training.json").read_text())


def test_model_is_small_and_the_one_that_was_trained(log: dict[str, Any]) -> None:
    folder = demo.model_dir()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8 * 2**20
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == log["model_sha256"]
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.model_type == "qwen3_moe" and config.vocab_size == 256


def test_token_ids_are_bytes() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_dir())
    text = "".join(map(chr, range(0x250))) + "\u2014 \U0001f600  two  spaces\n\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    every = [tokenizer.convert_ids_to_tokens(index) for index in range(256)]
    assert len(set(every)) == 256


def test_held_out_text_is_macbeth() -> None:
    text = demo.held_out_text().decode()
    assert len(text) == 32768
    assert "When shall we three meet again?" in text


def test_perplexity_is_the_recorded_one(log: dict[str, Any]) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        demo.model_dir(), dtype=torch.float32, experts_implementation="eager"
    )
    text = torch.frombuffer(bytearray(demo.held_out_text()), dtype=torch.uint8).long()
    _, nats = _score(model.eval(), text[: 63 * 512 + 1], 512)
    assert math.exp(nats) == pytest.approx(log["heldout"]["sample"], rel=1e-4)


def test_demo_tells_a_story_and_compares_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--windows", "2", "-n", "40", "--threads", "2"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["experts"]: row for row in report["rows"]}
    assert list(rows) == ["eager", "bf16", "int8", "int4", "fp8"]
    sizes = [rows[form]["packed_bytes"] for form in ("bf16", "int8", "int4")]
    assert sizes[0] > 1.8 * sizes[1] > 2.8 * sizes[2]
    assert rows["eager"]["largest_logit_difference"] is None
    medians = [rows[form]["median_logit_difference"] for form in ("bf16", "int8", "int4")]
    assert medians == sorted(medians)
    for form, most in (("bf16", 0.002), ("int8", 0.01), ("int4", 0.04), ("fp8", 0.02)):
        assert rows[form]["perplexity"] == pytest.approx(rows["eager"]["perplexity"], rel=most)
        assert rows[form]["decode_tokens_per_s"] > 0 and rows[form]["prefill_tokens_per_s"] > 0
    assert len(report["text"].encode()) == 40
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert report["prompt"] + report["text"] in out
    assert "perplexity" in out and "\u2026" not in out


def test_text_has_the_manner_of_a_play(capsys: pytest.CaptureFixture[str]) -> None:
    """Most words are of the text that the model has not seen, and speakers are announced as there."""
    assert (
        main(
            [
                "run",
                str(demo.model_dir()),
                "-p",
                "ROMEO.\n",
                "-n",
                "120",
                "-t",
                "0.5",
                "--dtype",
                "float32",
                "--json",
            ]
        )
        == 0
    )
    text = json.loads(capsys.readouterr().out)["texts"][0]
    known = set("".join(c if c.isalpha() else " " for c in demo.held_out_text().decode().lower()).split())
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    assert sum(word in known for word in words) > 0.6 * len(words)


def test_training_is_reproducible(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question:\r\n\r\n\r\n" * 80)
    # In a process of its own, because the script forbids PyTorch every algorithm that is not deterministic.
    code = f"""if True:
        import pathlib, torch
        from ktk.demo.train import Schedule, train
        schedule = Schedule(steps=3, batch=2, context=16, warmup_steps=1)
        folder = pathlib.Path({str(tmp_path)!r})
        for name in ("first", "second"):
            train(folder / "text.txt", folder / name, schedule, torch.device("cpu"))
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    first, second = (
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("first", "second")
    )
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    assert first["data"]["train_bytes"] + first["data"]["held_out_bytes"] == 80 * 44 - 1
    files = {file.name for file in (tmp_path / "first").iterdir()}
    assert files == {file.name for file in demo.model_dir().iterdir()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        folders = (tmp_path / "first", demo.model_dir())
        made, shipped = (json.loads((folder / name).read_text()) for folder in folders)
        for settings in (made, shipped):
            settings.pop("transformers_version", None)
            settings.pop("max_position_embeddings", None)
        assert made == shipped


def test_other_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "other.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(__file__, "text.txt")
    with pytest.raises(SystemExit, match="SHA-256"):
        read_corpus(archive)
