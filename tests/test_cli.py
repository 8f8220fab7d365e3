"""The command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import python_path
from ktk import _native
from ktk.cli import main
from tiny_models import checkpoint

RUN = ["run", "--max-new-tokens", "6", "--threads", "2"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = main([*RUN, *arguments, "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_run_generates_and_reports(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, str(checkpoint(architecture)), "--prompt", "Hello", "--format", "int8")
    assert report["new_tokens"] == 6
    assert report["prompt_tokens"] == 5
    assert report["layers"] == 2
    assert report["threads"] == 2
    assert report["isa"] == _native.isa_default()
    assert report["packed_bytes"] > 0
    assert report["prefill_tokens_per_s"] > 0 and report["decode_tokens_per_s"] > 0
    assert len(report["texts"]) == 1


def test_batch_and_single_prompts_give_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(checkpoint("qwen3_moe"))
    batch = run_json(capsys, model, "-p", "first prompt", "-p", "two")
    assert batch["prompt_tokens"] == 15
    for prompt, text in zip(batch["prompts"], batch["texts"], strict=True):
        assert run_json(capsys, model, "-p", prompt)["texts"] == [text]


def test_sampling_repeats_with_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint("mixtral")), "-p", "x", "-t", "1.5", "-n", "24"]
    first, again, other = (
        run_json(capsys, *arguments, "--seed", seed)["texts"][0] for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_formats_differ_in_size(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        run_json(capsys, str(checkpoint("mixtral")), "-p", "x", "--format", form)["packed_bytes"]
        for form in ("bf16", "int8", "int4", "fp8")
    ]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[0] > sizes[3]


def test_int4_options(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(
        capsys,
        str(checkpoint("mixtral")),
        "-p",
        "x",
        "--format",
        "int4",
        "--group-size",
        "64",
        "--no-rotated",
    )
    assert (report["group_size"], report["rotated"]) == (64, False)


@pytest.mark.parametrize("isa", ["portable", _native.isa_default()])
def test_isa_is_taken(isa: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, str(checkpoint("mixtral")), "-p", "x", "--isa", isa)["isa"] == isa


def test_packed_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint("mixtral")), "-p", "x", "--packed", str(tmp_path / "packed")]
    first = run_json(capsys, *arguments)
    assert len(list((tmp_path / "packed").iterdir())) == 2
    assert run_json(capsys, *arguments)["texts"] == first["texts"]


def test_text_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(checkpoint("mixtral"))
    expected = run_json(capsys, model, "-p", "x")["texts"][0]
    assert main([*RUN, model, "-p", "x"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("x" + expected)
    for word in ("int8", "tokens/s", "MixtralForCausalLM", _native.isa_default()):
        assert word in out
    assert main([*RUN, model, "-p", "x", "-p", "y"]) == 0
    assert "x" + expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{model}"], 2, "--prompt"),
        (["{model}", "-p", ""], 1, "prompt is empty"),
        (["/nowhere", "-p", "x"], 1, "/nowhere"),
        (["{model}", "-p", "x", "--format", "int3"], 2, "int3"),
        (["{model}", "-p", "x", "--format", "int4", "--group-size", "48"], 1, "group_size"),
        (["{model}", "-p", "x", "--format", "bf16", "--group-size", "32"], 1, "group_size"),
        (["{model}", "-p", "x", "--format", "bf16", "--rotated"], 1, "rotated must be False"),
        (["{model}", "-p", "x", "--isa", "mmx"], 1, "mmx"),
        (["{model}", "-p", "x", "--threads", "0"], 2, "--threads"),
        (["{empty}", "-p", "x"], 1, "config.json"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"{model}": str(checkpoint("mixtral")), "{empty}": str(tmp_path)}
    assert main(["run", *(places.get(argument, argument) for argument in arguments)]) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("run", "demo", "doctor"):
        assert command in out


def test_doctor_is_a_command_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--no-selftest"]) == 0
    assert json.loads(capfd.readouterr().out)["selftest"] == []


def test_missing_command_line_packages_are_explained(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ImportError('No module named typer')\n")
    done = subprocess.run(
        [sys.executable, "-m", "ktk", "demo"],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": python_path(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'ktk[cli]'" in done.stderr and "doctor" in done.stderr
