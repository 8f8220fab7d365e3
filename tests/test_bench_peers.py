"""The adapter that runs ktk beside other libraries: its packing, its processes, its report. No speed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import ROOT
from ktk.bench.report import load_peers

pytestmark = pytest.mark.any_binding

SCRIPT = ROOT / "tests" / "bench" / "peers.py"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ktk_bench_peers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def nibbles(words: torch.Tensor) -> torch.Tensor:
    places = torch.arange(8) * 4
    return (words[..., None] >> places) & 15


def test_int4_packings_come_near_the_weights(peers: ModuleType) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    words, scales = peers.pack_offset_int4(weight, 32)
    assert words.shape == (24, 32) and scales.shape == (24, 8)
    codes = nibbles(words).view(24, 256).float() - 8
    back = codes.view(24, 8, 32) * scales.float()[:, :, None]
    assert float((back.view(24, 256) - weight.float()).abs().max()) <= 0.51 * float(scales.float().max())

    words, scales = peers.pack_gptq_int4(weight, 128)
    assert words.shape == (32, 24) and scales.shape == (2, 24)
    codes = nibbles(words.T).reshape(24, 256).float() - 8
    back = codes.view(24, 2, 128) * scales.T.float()[:, :, None]
    # The largest code is 7, and the scale such that the largest weight is 7.5.
    assert float((back.view(24, 256) - weight.float()).abs().max()) <= 0.52 * float(scales.float().max())


def test_processes_that_end_are_described(peers: ModuleType) -> None:
    assert peers.describe_exit(-4) == "died of SIGILL"
    assert peers.describe_exit(3) == "exited with 3"


def run(tmp_path: Path, *arguments: str, site: Path | None = None) -> tuple[dict[str, Any], str]:
    output = tmp_path / "peers.json"
    command = [sys.executable, str(SCRIPT), "--shapes", "64x128x6x2", "--batches", "1,8", "--rounds", "2"]
    command += ["--cell-s", "0.0001", "--footprint-gb", "0.0001", "--threads", "1", "--output", str(output)]
    if site is not None:
        command += ["--site", str(site)]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return load_peers(output), done.stdout


@pytest.mark.slow
def test_pytorch_beside_ktk(tmp_path: Path) -> None:
    report, printed = run(tmp_path, "--peers", "torch_loop,torch_grouped")
    assert [(cell["peer"], cell["tokens"]) for cell in report["cells"]] == [
        ("torch_loop", 1),
        ("torch_loop", 8),
        ("torch_grouped", 1),
        ("torch_grouped", 8),
    ]
    for entry in report["peers"]:
        assert 0 < entry["relative_l2"] < 0.02 and 0 < entry["ktk_relative_l2"] < 0.01
    for cell in report["cells"]:
        for name in ("ms", "ktk_ms", "fraction", "ktk_fraction", "ktk_speed_over_peer"):
            assert 0 < cell[name]["min"] <= cell[name]["median"] <= cell[name]["max"]
        assert cell["ktk_format"] == "bf16"
    assert printed.count("times as fast") == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "timeout_s", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "200", "died of SIGILL"),
        ("raise RuntimeError('not on this CPU')", "200", "RuntimeError: not on this CPU"),
        ("import time; time.sleep(600)", "2", "no answer within 2 s"),
    ],
    ids=["dies", "refuses", "hangs"],
)
def test_a_peer_that_fails_is_a_line_of_the_report(
    body: str, timeout_s: str, reason: str, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "kt_kernel.py").write_text(body + "\n")
    report, _ = run(tmp_path, "--peers", "kt_bf16", "--timeout-s", timeout_s, site=site)
    (cell,) = report["cells"]
    assert cell["failed"] == report["peers"][0]["failed"] == reason
    assert json.loads((tmp_path / "peers.json").read_text()) == report


def test_the_command_list_parses() -> None:
    script = ROOT / "tests" / "bench" / "device.sh"
    listed = subprocess.run([str(script), "list"], check=True, capture_output=True, text=True).stdout
    commands = listed.splitlines()
    assert commands[0].endswith(" build") and commands[-1].endswith(" draw")
    assert all(line.startswith("tests/bench/device.sh ") for line in commands)
    assert subprocess.run([str(script)], capture_output=True).returncode == 2


def test_the_defaults_are_known(peers: ModuleType) -> None:
    from ktk.bench.cases import FORMAT_CHOICES

    assert {peer.ktk_format for peer in peers.PEERS.values()} <= set(FORMAT_CHOICES)
