"""The benchmark of fine-tuning runs to its end and reports what it says. No speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

SCRIPT = ROOT / "tests" / "bench" / "sft.py"
PEFT_SCRIPT = SCRIPT.with_name("sft_peft.py")


def run(folder: Path, *arguments: str, script: Path = SCRIPT) -> str:
    """Run it away from the source tree, as against an installed ktk."""
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--threads", "1", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path != str(ROOT))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_report(tmp_path: Path) -> None:
    report: dict[str, Any] = json.loads(run(tmp_path, "--json", "--eager", "--output", "sft.json"))
    assert report == json.loads((tmp_path / "sft.json").read_text())
    assert report["schema"] == "ktk-bench-sft-1"
    assert [(cell["format"], cell["rank"]) for cell in report["cells"]] == [
        (form, rank) for form in ("bf16", "int8-g128", "fp8") for rank in (0, 8)
    ]
    for cell in report["cells"]:
        for name in ("fraction", "forward_fraction", "backward_fraction", "forward_ms", "gops"):
            assert 0 < cell[name]["min"] <= cell[name]["median"] <= cell[name]["max"], name
        assert cell["saved_bytes"] <= 2 * 64 * 256 + 4 * 64 * 2 * 192
        assert (cell["stages"] > 0) == (cell["rank"] > 0)
        assert cell["eager_ms"] > 0


def test_table(tmp_path: Path) -> None:
    head, line, *rows = run(tmp_path, "--recompute").splitlines()
    assert head.startswith("layer") and set(line) == {"-"} and len(rows) == 6
    assert rows[0].startswith("256x192x8x2 bf16") and "%" in rows[0]


def test_peft_report(tmp_path: Path) -> None:
    """All sides compute the same block."""
    report: dict[str, Any] = json.loads(run(tmp_path, "--json", "--output", "peft.json", script=PEFT_SCRIPT))
    assert report == json.loads((tmp_path / "peft.json").read_text())
    assert report["schema"] == "ktk-bench-sft-peft-1"
    (cell,) = report["cells"]
    assert list(cell["sides"]) == ["ktk", "fused bf16", "linear bf16", "fused fp32", "linear fp32"]
    for name, side in cell["sides"].items():
        assert len(side["forward_s"]) == len(side["backward_s"]) == report["rounds"] == 1
        assert side["ratio"]["median"] > 0
        # A few roundings of 2^-9 in bf16, of 2^-24 in fp32.
        limit = 1e-5 if name.endswith("fp32") else 0.02
        assert side["output_error"] < limit and side["gradient_error"] < limit, name
    assert cell["sides"]["ktk"]["ratio"]["max"] == 1


@pytest.mark.parametrize("wrong", [("--ranks", "8,x"), ("--ranks", "512"), ("--policy", "x")])
def test_bad_arguments(wrong: tuple[str, str]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *wrong], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr.splitlines()[-1]
