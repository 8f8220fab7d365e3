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
KT_SCRIPT = SCRIPT.with_name("sft_kt.py")


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
        (form, rank) for form in ("bf16", "int8-g512", "fp8") for rank in (0, 8)
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


#: Stands for kt-kernel: the same calls over pointers, done by PyTorch.
KT_KERNEL = """
import ctypes, types
import torch
from sft import eager

__version__, __cpu_variant__ = "0", "test"


def tensor(pointer, *shape, dtype=torch.bfloat16):
    count = torch.Size(shape).numel() * dtype.itemsize
    buffer = (ctypes.c_uint8 * count).from_address(pointer)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


class Config:
    def __init__(self, experts, top_k, hidden, inner):
        self.sizes = experts, top_k, hidden, inner


class Layer:
    def __init__(self, config):
        self.config = config

    def load_weights_task(self):
        return lambda: None

    def forward_sft_task(self, count, top_k, ids, scores, x, output, save):
        c = self.config
        (e, k, h, i), r = c.sizes, c.lora_rank
        t = int(tensor(count, 1, dtype=torch.int32))

        def run():
            sides = {"a": (e, r, h), "b": (e, i, r)}
            shapes = {f"{n}_lora_{s}": v for n in ("gate", "up") for s, v in sides.items()}
            shapes |= {"down_lora_a": (e, r, i), "down_lora_b": (e, h, r)}
            leaf = lambda v: v.float().requires_grad_()
            self.lora = {n: leaf(tensor(getattr(c, n), *v)) for n, v in shapes.items()}
            wide = tensor(c.gate_proj, e, i, h), tensor(c.up_proj, e, i, h), tensor(c.down_proj, e, h, i)
            self.x = leaf(tensor(x, t, h))
            self.scores = leaf(tensor(scores, t, k, dtype=torch.float32).clone())
            chosen = tensor(ids, t, k, dtype=torch.int64)
            with torch.enable_grad():
                weights = [w.float() for w in wide]
                self.y = eager(weights, self.lora, c.lora_alpha / r, self.x, chosen, self.scores)
            tensor(output, t, h).copy_(self.y.detach())

        return run

    def backward_task(self, grad, grad_x, *rest):
        def run():
            t, h = self.y.shape
            self.y.backward(tensor(grad, t, h).float())
            tensor(grad_x, t, h).copy_(self.x.grad)
            for pointer, name in zip(rest, self.lora):
                tensor(pointer, *self.lora[name].shape).copy_(self.lora[name].grad)
            tensor(rest[6], *self.scores.shape, dtype=torch.float32).copy_(self.scores.grad)

        return run


class CPUInfer:
    backend_ = None

    def __init__(self, pool):
        pass

    def submit(self, task):
        task()

    def sync(self):
        pass


moe = types.SimpleNamespace(MOESFTConfig=Config, AMXBF16_SFT_MOE=Layer)
kt_kernel_ext = types.SimpleNamespace(moe=moe, CPUInfer=CPUInfer, WorkerPoolConfig=types.SimpleNamespace)
"""


@pytest.mark.slow
def test_beside_kt_kernel(tmp_path: Path) -> None:
    """Both sides get the same layer and batches; a class that is missing is a line of the report."""
    (tmp_path / "kt_kernel.py").write_text(KT_KERNEL)
    output = tmp_path / "kt.json"
    command = [sys.executable, str(KT_SCRIPT), "--site", str(tmp_path), "--output", str(output)]
    command += ["--shapes", "128x96x6x2", "--tokens", "16,40", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(
        command,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path != str(ROOT))},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bf16, int8 = json.loads(output.read_text())["layers"]
    for errors in (bf16["errors"], bf16["ktk_errors"]):
        assert set(errors) == {"output", "grad_input", "grad_expert_weights", "grad_down_lora_b"}
        # The stand-in's gradient of the routing weights is exact.
        assert all(0 <= error < 0.02 for error in errors.values()), errors
        assert errors["output"] > 0 and errors["grad_input"] > 0
    assert [cell["tokens"] for cell in bf16["cells"]] == [16, 40]
    for cell in bf16["cells"]:
        for name in ("forward_ms", "backward_ms", "ktk_forward_ms", "ktk_backward_ms", "ktk_speed_over_peer"):
            assert 0 < cell[name]["min"] <= cell[name]["median"] <= cell[name]["max"]
    assert int8["failed"] == "RuntimeError: its test build has no AMXInt8_SFT_MOE" and not int8["cells"]
    assert done.stdout.count("times as fast") == 2
