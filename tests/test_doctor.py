"""The report of ``python -m ktk doctor``, above all where something is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import python_path
from ktk import _native, diagnostics, selftest
from layers import runnable_isas


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in another folder than the source tree's."""
    return subprocess.run(
        [sys.executable, "-m", "ktk", "doctor", *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_report_describes_library_and_machine(report: dict[str, Any], binding: str) -> None:
    native = report["native"]
    assert native["binding"] == binding
    assert native["version"] == _native.version()
    assert native["library"] == str(_native.library_path)
    assert native["default_isa"] == _native.isa_default()
    assert [entry["name"] for entry in native["isas"]] == _native.isa_names()
    for entry in native["isas"]:
        assert entry["runnable"] == (entry["why_not"] is None)
    assert native["machine"]["nodes"]
    assert report["numa"][0]["cpus"]
    assert report["affinity"]["count"] == len(os.sched_getaffinity(0))
    assert report["versions"]["torch"]
    assert set(report["cuda"]) >= {"available"}


def test_kernel_ranges_agree_with_the_library(report: dict[str, Any]) -> None:
    for entry in report["native"]["isas"]:
        if not entry["runnable"]:
            continue
        for code, form in enumerate(("bf16", "int8", "int4", "fp8")):
            ranges = entry["kernels"][form]
            assert ranges[0]["min_rows"] == 1 and ranges[-1]["max_rows"] is None
            for part in ranges:
                for rows in {part["min_rows"], part["max_rows"] or 512}:
                    assert _native.isa_kernel(entry["name"], code, rows) == part["kernel"]


def test_self_test_covers_every_runnable_isa_and_format(report: dict[str, Any]) -> None:
    assert [test["isa"] for test in report["selftest"]] == list(runnable_isas())
    for test in report["selftest"]:
        assert test["passed"]
        assert [case["case"] for case in test["cases"]] == [case.name for case in selftest.CASES]


def test_text_has_a_line_for_everything(report: dict[str, Any]) -> None:
    text = diagnostics.render(report)
    for name in _native.isa_names():
        assert name in text
    assert "ktk works here." in text
    assert f"Kernels on {_native.isa_default()} (default)" in text


def test_it_prints_when_the_library_does_not_load(tmp_path: Path) -> None:
    done = doctor("--json", KTK_BINDING="ctypes", KTK_LIBRARY=str(tmp_path / "missing.so"))
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert "missing.so" in report["native"]["error"]
    assert not report["healthy"] and report["selftest"] == []
    assert report["cpu"]["model"]
    text = diagnostics.render(report)
    assert "does not load" in text and "does NOT work" in text


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_it_prints_when_the_library_kills_the_process(tmp_path: Path) -> None:
    source, library = tmp_path / "bad.c", tmp_path / "bad.so"
    source.write_text('__attribute__((constructor)) static void die(void) { __asm__ volatile("ud2"); }\n')
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    done = doctor("--json", KTK_BINDING="ctypes", KTK_LIBRARY=str(library))
    assert done.returncode == 1
    assert "SIGILL" in json.loads(done.stdout)["native"]["error"]


def test_it_prints_when_the_default_isa_cannot_run() -> None:
    done = doctor(KTK_ISA="no_such_isa")
    assert done.returncode == 1
    assert "no_such_isa" in done.stdout


def test_it_needs_neither_pytorch_nor_the_command_line_packages(tmp_path: Path) -> None:
    for name in ("torch", "typer", "rich", "transformers", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken')\n")
    done = doctor(PYTHONPATH=python_path(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ktk works here." in done.stdout


def test_self_test_finds_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    true = selftest.round_trip_int8
    monkeypatch.setattr(selftest, "to_bf16", lambda x: x * np.float32(1.01))
    monkeypatch.setattr(selftest, "round_trip_int8", lambda x, group: true(x, group) * np.float32(1.01))
    assert not any(outcome.passed for outcome in selftest.run(_native.isa_default()))


def test_self_test_finds_weights_packed_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    true = selftest.stored_weights

    def swapped(*arguments: Any) -> tuple[selftest.F32, selftest.F32, selftest.F32]:
        gate, up, down = true(*arguments)
        return up, gate, down

    monkeypatch.setattr(selftest, "stored_weights", swapped)
    outcomes = selftest.run(_native.isa_default())
    assert not any(outcome.passed for outcome in outcomes)


def test_differing_bits_of_integer_formats_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(expression: str) -> dict[str, Any]:
        digest = "a" if "first" in expression else "b"
        case = {"case": "int8", "error": 0.0, "passed": True, "sha256": digest}
        return {"isa": "x", "passed": True, "cases": [case]}

    monkeypatch.setattr(diagnostics, "_in_child", child)
    isas = [{"name": name, "runnable": True} for name in ("first", "second")]
    results = diagnostics._selftest({"isas": isas})
    assert [result["passed"] for result in results] == [True, False]


def test_a_failing_probe_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no such file")

    monkeypatch.setattr(diagnostics, "_cpu", broken)
    report = diagnostics.collect(selftest=False)
    assert report["cpu"] == {"error": "RuntimeError: no such file"}
    assert "no such file" in diagnostics.render(report)
