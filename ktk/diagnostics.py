"""What ktk finds on this machine: the report of ``python -m ktk doctor``.

Only the standard library is imported here, and the native library is loaded in child processes alone: a
library that is missing, does not load, or dies of an illegal instruction becomes a line of the report instead
of its end.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["collect", "exit_code", "main", "render"]

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "typer", "rich", "peft", "accelerate", "Cython")
# Row counts at which kernels are asked for; every threshold of the dispatch lies below the largest.
ROWS = (*range(1, 65), 96, 128, 256, 512)
FORMAT_NAMES = ("bf16", "int8", "int4", "fp8")
CPU_FLAGS = re.compile(r"^(avx|avx2|fma|f16c|avx512\w*|avx_vnni\w*|amx_\w+)$")
CHILD_TIMEOUT_S = 120


def _guarded(probe: Callable[[], Any]) -> Any:
    """Run a probe; whatever goes wrong becomes ``{"error": ...}``."""
    try:
        return probe()
    except Exception as error:  # noqa: BLE001 - a report is wanted whatever fails
        return {"error": f"{type(error).__name__}: {error}"}


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace").strip()


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = sorted(flag for flag in fields.get("flags", "").split() if CPU_FLAGS.match(flag))
    return {
        "model": fields.get("model name", platform.processor() or "unknown"),
        "architecture": platform.machine(),
        "logical_cpus": os.cpu_count(),
        "flags": flags,
    }


def _cpu_list(text: str) -> list[int]:
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _compact(cpus: Iterable[int]) -> str:
    """Write CPU numbers as ranges: 0-3,8."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _numa() -> list[dict[str, Any]]:
    nodes = []
    for path in sorted(
        glob.glob("/sys/devices/system/node/node[0-9]*"), key=lambda p: int(p.rsplit("node", 1)[1])
    ):
        memory = re.search(r"MemTotal:\s+(\d+) kB", _read(f"{path}/meminfo"))
        nodes.append(
            {
                "node": int(path.rsplit("node", 1)[1]),
                "cpus": _compact(_cpu_list(_read(f"{path}/cpulist"))),
                "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
            }
        )
    return nodes


def _affinity() -> dict[str, Any]:
    allowed = os.sched_getaffinity(0)
    quota = None
    for path in ("/sys/fs/cgroup/cpu.max",):
        if os.path.exists(path):
            limit, period = _read(path).split()
            quota = None if limit == "max" else round(int(limit) / int(period), 2)
    return {"allowed_cpus": _compact(allowed), "count": len(allowed), "cgroup_cpus": quota}


def _memory() -> dict[str, Any]:
    info = dict(re.findall(r"^(\w+):\s+(\d+)", _read("/proc/meminfo"), re.MULTILINE))
    report: dict[str, Any] = {
        "total_gib": round(int(info["MemTotal"]) / 2**20, 1),
        "available_gib": round(int(info["MemAvailable"]) / 2**20, 1),
        "huge_pages_reserved": int(info.get("HugePages_Total", 0)),
        "huge_page_kib": int(info.get("Hugepagesize", 0)),
    }
    choice = "/sys/kernel/mm/transparent_hugepage/enabled"
    if os.path.exists(choice):
        match = re.search(r"\[(\w+)\]", _read(choice))
        report["transparent_huge_pages"] = match[1] if match else None
    return report


def _cuda() -> dict[str, Any]:
    """Ask the driver itself, so that neither PyTorch nor a toolkit is needed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"available": False, "why_not": f"no CUDA driver: {error}"}
    if status := driver.cuInit(0):
        return {"available": False, "why_not": f"cuInit failed with {status}"}
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, len(name), index)
        names.append(name.value.decode(errors="replace"))
    return {
        "available": count.value > 0,
        "driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "devices": names,
    }


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _ktk() -> dict[str, Any]:
    return {
        "version": importlib.metadata.version("ktk"),
        "path": str(Path(__file__).resolve().parent),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("KTK_")},
    }


def _system() -> dict[str, Any]:
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip(),
    }


def _kernel_ranges(kernel: Callable[[int], str]) -> list[dict[str, Any]]:
    """Row counts that share a kernel, as ranges; the last one is open (``max_rows`` None)."""
    ranges: list[dict[str, Any]] = []
    for index, rows in enumerate(ROWS):
        name = kernel(rows)
        if not ranges or ranges[-1]["kernel"] != name:
            ranges.append({"min_rows": rows, "max_rows": None, "kernel": name})
            if len(ranges) > 1:
                ranges[-2]["max_rows"] = ROWS[index - 1]
    return ranges


def _child_native() -> dict[str, Any]:
    """Describe the native library; runs in a child process."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from ktk import _native
    report: dict[str, Any] = {
        "version": _native.version(),
        "abi_version": _native.abi_version(),
        "binding": _native.binding,
        "library": str(_native.library_path),
        "warnings": [str(item.message) for item in caught],
        "default_isa": _guarded(_native.isa_default),
    }
    isas = []
    for name in _native.isa_names():
        entry: dict[str, Any] = {"name": name, "runnable": True, "why_not": None}
        try:
            _native.isa_check(name)
        except NotImplementedError as error:
            entry |= {"runnable": False, "why_not": str(error)}
        kernels = {}
        for code, form in enumerate(FORMAT_NAMES):
            kernels[form] = _guarded(partial(_kernel_ranges, partial(_native.isa_kernel, name, code)))
        isas.append(entry | {"kernels": kernels})
    return report | {"isas": isas, "machine": _guarded(lambda: json.loads(_native.machine_json()))}


def _child_selftest(isa: str) -> dict[str, Any]:
    """Self-test one instruction set; runs in a child process."""
    import hashlib
    import warnings

    warnings.simplefilter("ignore")
    from ktk import selftest

    began = time.perf_counter()
    outcomes = selftest.run(isa)
    return {
        "isa": isa,
        "passed": all(outcome.passed for outcome in outcomes),
        "seconds": round(time.perf_counter() - began, 3),
        "tolerance": selftest.TOLERANCE,
        "cases": [
            {
                "case": outcome.case.name,
                "error": outcome.error,
                "passed": outcome.passed,
                "sha256": hashlib.sha256(outcome.output.tobytes()).hexdigest(),
            }
            for outcome in outcomes
        ],
    }


def _in_child(expression: str) -> dict[str, Any]:
    """Evaluate a function of this module in a fresh interpreter and return its result."""
    # The parent of this very package goes first, so that a folder named ktk in the working directory cannot
    # stand in for it; the finder of an editable install still comes before all of them.
    parent = str(Path(__file__).resolve().parent.parent)
    code = (
        f"import sys; sys.path[0] = {parent!r}\n"
        "import json; from ktk import diagnostics\n"
        f"print(json.dumps(diagnostics.{expression}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise RuntimeError(f"the process was killed by {name} while loading or running the native library")
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise RuntimeError(last[-1].strip() if last else f"the process ended with status {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def _selftest(native: dict[str, Any]) -> list[dict[str, Any]]:
    """Self-test each runnable instruction set, and hold their integer results against each other."""
    results: list[dict[str, Any]] = []
    for entry in native["isas"]:
        if entry["runnable"]:
            name = entry["name"]
            result = _guarded(partial(_in_child, f"_child_selftest({name!r})"))
            results.append({"isa": name, "passed": False} | result)
    # Sums of the integer formats are exact, so every instruction set must give the same bits.
    first: dict[str, str] = {}
    for result in results:
        for case in result.get("cases", ()):
            if (
                case["case"].startswith("int")
                and first.setdefault(case["case"], case["sha256"]) != case["sha256"]
            ):
                case["passed"] = result["passed"] = False
                case["error_text"] = "bits differ from the first instruction set's"
    return results


def collect(selftest: bool = True) -> dict[str, Any]:
    """Gather the report.

    Parameters
    ----------
    selftest : bool, default True
        Whether to compute one small layer in every format on every runnable instruction set (about a second
        each).

    Returns
    -------
    dict
        JSON-ready. A probe that failed has ``{"error": message}`` in place of its result. The entry
        ``"healthy"`` is False when the native library does not load, or a self-test fails or was left out
        with it.
    """
    report: dict[str, Any] = {
        "ktk": _guarded(_ktk),
        "system": _guarded(_system),
        "versions": _guarded(_versions),
        "cpu": _guarded(_cpu),
        "numa": _guarded(_numa),
        "affinity": _guarded(_affinity),
        "memory": _guarded(_memory),
        "cuda": _guarded(_cuda),
        "native": _guarded(lambda: _in_child("_child_native()")),
    }
    native = report["native"]
    loads = "error" not in native and "error" not in (native["default_isa"] or "")
    report["selftest"] = _guarded(lambda: _selftest(native)) if loads and selftest else []
    tests = report["selftest"]
    report["healthy"] = loads and isinstance(tests, list) and all(test["passed"] for test in tests)
    return report


def exit_code(report: dict[str, Any]) -> int:
    """Return 0 for a healthy installation, else 1."""
    return 0 if report["healthy"] else 1


def _render_ranges(ranges: Any) -> str:
    if isinstance(ranges, dict):
        return str(ranges.get("error"))
    parts = []
    for entry in ranges:
        low, high = entry["min_rows"], entry["max_rows"]
        rows = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        parts.append(f"{rows}: {entry['kernel']}")
    return ", ".join(parts)


def _short_reason(message: str) -> str:
    """Cut what the heading of the list says already."""
    match = re.search(r"\bit (lacks .*?)(;|$)", message)
    return match[1] if match else message


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_flat(item) for item in value) or "none"
    return "none" if value is None else str(value)


def render(report: dict[str, Any]) -> str:
    """Write the report as text, one finding a line."""
    lines: list[str] = []

    def section(title: str) -> None:
        lines.extend(([""] if lines else []) + [title])

    def row(label: str, value: Any) -> None:
        lines.append(f"  {label:<22} {value}")

    for title, key in (
        ("ktk", "ktk"),
        ("System", "system"),
        ("Packages", "versions"),
        ("CPU", "cpu"),
        ("Affinity", "affinity"),
        ("Memory", "memory"),
        ("CUDA", "cuda"),
    ):
        section(title)
        content = report[key]
        for label, value in content.items():
            if title == "Packages" and value is None:
                value = "not installed"
            row(label.replace("_", " "), _flat(value))
    section("NUMA nodes")
    if isinstance(report["numa"], dict):
        row("error", report["numa"]["error"])
    else:
        for node in report["numa"]:
            row(f"node {node['node']}", f"CPUs {node['cpus'] or 'none'}, {node['memory_gib']} GiB")
    section("Native library")
    native = report["native"]
    if "error" in native:
        row("does not load", native["error"])
    else:
        for label in ("version", "abi_version", "binding", "library", "warnings", "default_isa"):
            row(label.replace("_", " "), _flat(native[label]))
        section("Instruction sets (built into this library, best first)")
        for entry in native["isas"]:
            row(entry["name"], "runs here" if entry["runnable"] else f"no: {_short_reason(entry['why_not'])}")
        for entry in native["isas"]:
            if entry["runnable"]:
                chosen = " (default)" if entry["name"] == native["default_isa"] else ""
                section(f"Kernels on {entry['name']}{chosen}, by the tokens of one expert")
                for form, ranges in entry["kernels"].items():
                    row(form, _render_ranges(ranges))
    section("Self-test against NumPy")
    tests = report["selftest"]
    if isinstance(tests, dict):
        row("error", tests["error"])
    elif not tests:
        row("not run", "the native library does not load" if "error" in native else "left out")
    else:
        for test in tests:
            if "error" in test:
                row(test["isa"], f"FAILED: {test['error']}")
                continue
            for case in test["cases"]:
                verdict = "ok" if case["passed"] else "FAILED " + case.get("error_text", "")
                row(f"{test['isa']}, {case['case']}", f"{verdict:<8} largest error {case['error']:.1e}")
    lines.extend(["", "ktk works here." if report["healthy"] else "ktk does NOT work here; see above."])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the ``doctor`` command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Command line without the program's and the command's name. Default: ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status: 0 if the library loads and every self-test passes, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="ktk doctor", description="Describe this machine and this installation, and test it."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-selftest", action="store_true", help="leave the self-test out")
    options = parser.parse_args(arguments)
    report = collect(selftest=not options.no_selftest)
    sys.stdout.write((json.dumps(report, indent=1) if options.json else render(report)) + "\n")
    return exit_code(report)


if __name__ == "__main__":
    sys.exit(main())
