"""``ktk sft`` and ``ktk run --adapter``: a whole fine-tune, interrupted and not, and files that are wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ktk.demo
from ktk.cli import main
from ktk.sft.errors import KTAMXConfigError
from ktk.sft.memory import estimate_memory
from ktk.sft.run_config import read_run_config
from ktk.sft.train import Corpus, fine_tune

pytestmark = [pytest.mark.any_binding, pytest.mark.filterwarnings("ignore::UserWarning")]

SETTINGS: dict[str, Any] = {
    "model": str(ktk.demo.model_dir()),
    "text": str(ktk.demo.fine_tuning_text()),
    "steps": 8,
    "batch": 2,
    "context": 48,
    "learning_rate": 3e-3,
    "rank": 4,
    "threads": 2,
    "save_every": 3,
    "dtype": "float32",
}


def write(folder: Path, name: str = "run.yaml", **changes: Any) -> Path:
    settings = {**SETTINGS, "output": "out", **changes}
    file = folder / name
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items() if value is not ...]
    file.write_text("\n".join(lines))
    return file


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, trace_steps=2)
    assert main(["sft", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["losses"]) == 8 and report["held_out_after"] < report["held_out_before"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    estimate = estimate_memory(read_run_config(file))
    assert estimate.experts > 0 and estimate.trained == 16 * report["trained_parameters"]
    prompt = ["--prompt", "Alice ", "-n", "12", "--json", "--format", "bf16"]
    model = SETTINGS["model"]
    assert main(["run", model, *prompt, "--adapter", str(tmp_path / "out" / "adapter")]) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert adapted["adapter"] and adapted["texts"][0]
    fused = tmp_path / "fused"
    fused.mkdir()
    name = "fused_expert_lora.safetensors"
    (fused / name).write_bytes((tmp_path / "out" / "adapter" / name).read_bytes())
    assert main(["run", model, *prompt, "--adapter", str(fused)]) == 0
    assert json.loads(capsys.readouterr().out)["texts"]
    assert main(["run", model, *prompt, "--adapter", str(tmp_path)]) == 1
    assert "it is no adapter" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantised_experts(format: str, tmp_path: Path) -> None:
    report = fine_tune(read_run_config(write(tmp_path, format=format, steps=4, plot=False)))
    assert report["held_out_after"] < report["held_out_before"] and report["plot"] is None


def test_killed_and_resumed(tmp_path: Path) -> None:
    whole = fine_tune(read_run_config(write(tmp_path, "whole.yaml", output="whole", gradient_accumulation=2)))
    file = write(tmp_path, gradient_accumulation=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "ktk", "sft", str(file)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "checkpoint-3").is_dir():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # What a kill in the middle of writing leaves is no checkpoint.
    (tmp_path / "out" / "checkpoint-7").mkdir(exist_ok=True)
    (tmp_path / "out" / "checkpoint-7" / "trained.safetensors").write_bytes(b"half")
    again = fine_tune(read_run_config(file), resume=True)
    assert again["losses"] == whole["losses"] and again["held_out_after"] == whole["held_out_after"]
    name = "adapter/adapter_model.safetensors"
    first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "out" / name)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    fine_tune(read_run_config(write(tmp_path, steps=4, plot=False)))
    with pytest.raises(ValueError, match=r"trained other parameters: .* differ, the first is"):
        fine_tune(read_run_config(write(tmp_path, rank=8)), resume=True)


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    assert main(["sft", str(file), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_bytes"] == sum(found["bytes"].values()) and "2TH + 4TkI" in found["formula"]
    tokens, layers = 96, 5
    assert found["bytes"]["saved"] == layers * (2 * tokens * 192 + 4 * tokens * 2 * 128)
    assert not (tmp_path / "out").exists()
    assert main(["sft", str(file), "--dry-run"]) == 0
    assert "total" in capsys.readouterr().out
    recompute = estimate_memory(read_run_config(write(tmp_path, "b.yaml", activation="recompute")))
    assert recompute.saved == 0
    less = estimate_memory(read_run_config(write(tmp_path, "c.yaml", gradient_checkpointing=True)))
    assert less.graph < found["bytes"]["graph"]
    assert less.experts > estimate_memory(read_run_config(write(tmp_path, "d.yaml", format="int4"))).experts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stesp": 3}, "unknown field 'stesp'; did you mean 'steps'"),
        ({"zzz": 3}, "unknown field 'zzz'; fields are model"),
        ({"text": ...}, "lacks text"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": "many"}, "steps must be a number, got 'many'"),
        ({"plot": 1}, "plot must be true or false"),
        ({"rank": 300}, "rank must be at most 256"),
        ({"format": "int3"}, "format must be one of bf16, int8, int4"),
        ({"target_modules": "q_proj"}, "must be a list of names"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_files_that_are_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(KTAMXConfigError, match=message):
        read_run_config(write(tmp_path, **changes))


def test_things_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(tmp_path / "none.yaml")]) == 1
    assert "no configuration at" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.txt \(text\)"):
        read_run_config(write(tmp_path, text="nothing.txt"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere \(model\)"):
        read_run_config(write(tmp_path, model="nowhere"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(KTAMXConfigError, match="is not YAML"):
        read_run_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(KTAMXConfigError, match="must hold fields"):
        read_run_config(tmp_path / "list.yaml")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="has 5 tokens, and needs 98"):
        fine_tune(read_run_config(write(tmp_path, text="short.txt")))
    (tmp_path / "latin.txt").write_bytes(b"\xff" * 500)
    with pytest.raises(ValueError, match="is not UTF-8"):
        fine_tune(read_run_config(write(tmp_path, text="latin.txt")))


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_text(file.read_text() + "\ngradient_norm: 1e-3\n")
    assert read_run_config(file).gradient_norm == 1e-3


def test_batches_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    from ktk.cli.generate import ByteTokenizer

    config = read_run_config(write(tmp_path))
    corpus = Corpus.read(config, ByteTokenizer())
    assert torch.equal(corpus.batch(config, 3), corpus.batch(config, 3))
    assert not torch.equal(corpus.batch(config, 3), corpus.batch(config, 4))
    text = Path(config.text).read_bytes()
    assert bytes(corpus.train.tolist()) + bytes(corpus.held_out.tolist()) == text
