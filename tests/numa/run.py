#!/usr/bin/env python3
"""Boot machines with several NUMA nodes in an emulator, and check there where ktk puts threads and memory.

    tests/numa/run.py [--python .venv/bin/python] [--log FILE] [--kernel VMLINUZ --modules FOLDER]

Debian's kernel runs under qemu-system-x86_64 without hardware support, with this machine's files mounted
read-only, so that the ktk checked is the one installed for the given Python. Machines: one node, for
reference; two nodes; four, one of which has no CPUs and one no memory. In each, the kernel is asked page by
page (move_pages) where packed weights and scratch lie. Needs qemu-system-x86 and a C compiler, and apt-get
and dpkg-deb if no kernel is named.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Node:
    """A NUMA node of a machine to be emulated; memory in MiB, 0 for none."""

    cpus: tuple[int, ...]
    memory: int


@dataclass(frozen=True)
class Machine:
    """What to boot, the nodes that each pool has its subpools on, and the nodes that pools must refuse."""

    name: str
    nodes: tuple[Node, ...]
    pools: tuple[tuple[int, ...], ...]
    refused: tuple[int, ...]


MACHINES = (
    Machine("one node", (Node((0, 1, 2, 3, 4, 5), 3072),), ((0,), (0, 0), (0, 0, 0)), (1,)),
    Machine(
        "two nodes",
        (Node((0, 1, 2), 1536), Node((3, 4, 5), 1536)),
        ((0,), (1,), (0, 1), (1, 0), (0, 0), (0, 1, 0)),
        (2,),
    ),
    Machine(
        "four nodes",
        # Linux numbers nodes with CPUs first.
        (Node((0, 1), 1024), Node((2, 3), 1024), Node((4, 5), 0), Node((), 1024)),
        ((0,), (0, 1), (1, 0), (0, 1, 2), (2, 1), (2,)),
        (3, 4),
    ),
)
THREADS_EACH = 2


class Failure(Exception):
    """Something the emulated machine did not do."""


# ---- kernel and first process --------------------------------------------------------------------------


def debian_kernel(folder: Path) -> tuple[Path, Path]:
    """Kernel image and modules of Debian's current kernel package, downloaded once into `folder`."""
    if not list(folder.glob("boot/vmlinuz-*")):
        depends = subprocess.run(
            ["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=True
        ).stdout
        package = re.search(r"Depends: (linux-image-\S+)", depends)
        if package is None:
            raise Failure("apt-cache knows no linux-image-amd64; run apt-get update, or name --kernel")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package[1]], cwd=folder, check=True)
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        archive.unlink()
    (kernel,) = folder.glob("boot/vmlinuz-*")
    (modules,) = folder.glob("lib/modules/*")
    return kernel, modules


def module_order(modules: Path, wanted: tuple[str, ...]) -> list[Path]:
    """The wanted modules after those that they need."""
    files = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:  # built into the kernel, or there already
            return
        needs = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for need in needs[1].decode().split(",") if needs else []:
            if need:
                visit(need)
        order.append(path)

    for name in wanted:
        visit(name)
    return order


def initramfs(folder: Path, modules: list[Path]) -> Path:
    """An archive with tests/numa/init.c as the first process, and modules for it to load."""
    init = folder / "init"
    subprocess.run(["cc", "-O1", "-Wall", "-static", "-o", init, HERE / "init.c"], check=True)
    entries: list[tuple[str, int, bytes]] = [("root", 0o040755, b""), ("init", 0o100755, init.read_bytes())]
    entries += [(path.name, 0o100644, path.read_bytes()) for path in modules]
    entries += [("modules", 0o100644, "".join(f"/{path.name}\n" for path in modules).encode())]
    entries += [("TRAILER!!!", 0, b"")]
    archive = b""
    for number, (name, mode, data) in enumerate(entries):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive += b"\0" * (-len(archive) % 4) + data
        archive += b"\0" * (-len(archive) % 4)
    path = folder / "initramfs.gz"
    path.write_bytes(gzip.compress(archive, 1))
    return path


# ---- one machine ---------------------------------------------------------------------------------------


def boot(machine: Machine, kernel: Path, archive: Path, python: str, folder: Path) -> dict[str, Any]:
    """What guest.py reports from an emulated machine."""
    plan = json.dumps({"pools": machine.pools, "threads_each": THREADS_EACH, "refused": machine.refused})
    script = folder / "guest.sh"
    paths = os.environ.get("PYTHONPATH", "")
    script.write_text(
        "export PATH=/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 "
        f"PYTHONPATH={shlex.quote(paths)}\n"
        f"cd /tmp && exec {shlex.quote(python)} {shlex.quote(str(HERE / 'guest.py'))} {shlex.quote(plan)}\n"
    )
    memory = sum(node.memory for node in machine.nodes)
    cpus = sum(len(node.cpus) for node in machine.nodes)
    command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-nodefaults", "-no-reboot"]
    command += ["-display", "none", "-serial", "stdio", "-m", str(memory), "-smp", str(cpus)]
    for index, node in enumerate(machine.nodes):
        described = f"node,nodeid={index}"
        if node.memory:
            command += ["-object", f"memory-backend-ram,id=memory{index},size={node.memory}M"]
            described += f",memdev=memory{index}"
        command += ["-numa", ",".join([described, *(f"cpus={cpu}" for cpu in node.cpus)])]
    command += ["-kernel", str(kernel), "-initrd", str(archive)]
    command += ["-append", f"console=ttyS0 quiet panic=-1 KTK_GUEST_COMMAND={script}"]
    command += ["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]
    process = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
    )
    for line in process.stdout.splitlines():
        if line.startswith("REPORT "):
            return dict(json.loads(line[len("REPORT ") :]))
    raise Failure(f"{machine.name}: no report\n{process.stdout}{process.stderr}")


# ---- what is expected ----------------------------------------------------------------------------------


def cpu_list(text: str) -> set[int]:
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


class Checks:
    """Counts what holds, and keeps what does not."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []

    def that(self, holds: bool, text: str) -> None:
        if holds:
            self.passed += 1
        else:
            self.failed.append(text)


def check(machine: Machine, report: dict[str, Any], reference: dict[str, Any], checks: Checks) -> None:
    """Hold a report against the machine it comes from, and against that of the machine with one node."""
    seen = {node["id"]: node for node in report["machine"]["nodes"]}
    for index, node in enumerate(machine.nodes):
        found = seen.get(index, {"cpus_online": None, "memory_bytes": 0})
        checks.that(
            tuple(found["cpus_online"] or ()) == node.cpus, f"{machine.name}: CPUs of node {index}: {found}"
        )
        checks.that(
            bool(found["memory_bytes"]) == bool(node.memory), f"{machine.name}: memory of node {index}"
        )
    with_cpus = [index for index, node in enumerate(machine.nodes) if node.cpus]
    checks.that(
        report["default_nodes"] == with_cpus, f"{machine.name}: subpools on {report['default_nodes']}"
    )
    for refused in machine.refused:
        message = report["refusals"].get(str(refused), "")
        right = "no CPUs" if refused < len(machine.nodes) else "does not exist"
        checks.that(
            f"node {refused}" in message and right in message, f"{machine.name}: {refused}: {message!r}"
        )

    outputs = {
        len(pool["nodes"]): {name: part["outputs"] for name, part in pool["formats"].items()}
        for pool in reference["placed"]
    }
    for pool in report["placed"]:
        where = f"{machine.name}, subpools on {pool['nodes']}"
        check_threads(machine, pool, where, checks)
        for name, part in pool["formats"].items():
            check_memory(machine, pool["nodes"], part, f"{where}, {name}", checks)
            checks.that(
                part["outputs"] == outputs[len(pool["nodes"])][name],
                f"{where}, {name}: outputs differ from one node",
            )


def check_threads(machine: Machine, pool: dict[str, Any], where: str, checks: Checks) -> None:
    most = max(
        pool["nodes"].count(node) * THREADS_EACH - len(machine.nodes[node].cpus)
        for node in set(pool["nodes"])
    )
    checks.that(bool(pool["warnings"]) == (most > 0), f"{where}: warnings {pool['warnings']!r}")
    taken: list[int] = []
    for subpool, node in enumerate(pool["nodes"]):
        # The queue's thread is worker 0 of subpool 0.
        names = [f"ktk-{subpool}-{worker}" for worker in range(THREADS_EACH)]
        if subpool == 0:
            names[0] = "ktk-queue"
        fits = pool["nodes"].count(node) * THREADS_EACH <= len(machine.nodes[node].cpus)
        for name in names:
            cpus = cpu_list(pool["threads"].get(name, "999"))
            checks.that(cpus <= set(machine.nodes[node].cpus), f"{where}: {name} runs on {cpus}")
            if fits:
                checks.that(len(cpus) == 1, f"{where}: {name} is not bound to one CPU but to {cpus}")
                taken += cpus
    checks.that(len(taken) == len(set(taken)), f"{where}: threads share CPUs {sorted(taken)}")


def check_memory(
    machine: Machine, nodes: list[int], part: dict[str, Any], where: str, checks: Checks
) -> None:
    # A node without memory cannot be preferred; what belongs there lies wherever the kernel sees fit.
    fit = [node for node in nodes if machine.nodes[node].memory]
    for kind in ("weights", "scratch"):
        for wanted, found in part[kind].items():
            remote = {node: size for node, size in found.items() if node != wanted and size != 0}
            checks.that(not remote, f"{where}: {kind} for node {wanted} lie on {remote}")
    for node in set(fit):
        size = part["weights"].get(str(node), {}).get(str(node), 0)
        share = part["packed_bytes"] * nodes.count(node) / len(nodes)
        checks.that(
            size >= share, f"{where}: {size} bytes of weights on node {node}, expected at least {share:.0f}"
        )


def describe(machine: Machine, report: dict[str, Any]) -> str:
    lines = [f"{machine.name}: ktk {report['version']}, {report['binding']} binding, {report['isa']}"]
    for index, node in enumerate(machine.nodes):
        cpus = " ".join(map(str, node.cpus)) or "none"
        lines.append(f"  node {index}: CPUs {cpus}; {node.memory} MiB")
    for refused, message in report["refusals"].items():
        lines.append(f"  node {refused} refused: {message}")
    for pool in report["placed"]:
        lines.append(f"  subpools on nodes {pool['nodes']}: threads {pool['threads']}")
        if pool["warnings"]:
            lines.append(f"    warnings: {pool['warnings']}")
        for name, part in pool["formats"].items():
            sizes = f"weights {part['weights']}, new scratch {part['scratch']}"
            lines.append(f"    {name}: {sizes}, outputs {part['outputs'][:16]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--python", default=sys.executable, help="for which ktk is installed; default: this one"
    )
    parser.add_argument("--log", type=Path, help="file for what was found; default: standard output alone")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "numa", help="folder for the kernel")
    parser.add_argument("--kernel", type=Path, help="a kernel image; default: Debian's, downloaded")
    parser.add_argument("--modules", type=Path, help="folder with its modules (*.ko)")
    options = parser.parse_args()
    if shutil.which("qemu-system-x86_64") is None:
        parser.error("qemu-system-x86_64 is not installed (Debian: qemu-system-x86)")
    if (options.kernel is None) != (options.modules is None):
        parser.error("--kernel and --modules go together")

    build: Path = options.build.absolute()
    build.mkdir(parents=True, exist_ok=True)
    kernel, modules = (options.kernel, options.modules) if options.kernel else debian_kernel(build / "kernel")
    archive = initramfs(build, module_order(modules, ("virtio_pci", "9pnet_virtio", "9p")))
    python = str(Path(options.python).absolute())
    checks, log = Checks(), [f"kernel {modules.name}, emulated CPUs"]
    reports: list[dict[str, Any]] = []
    print(log[0], flush=True)
    for machine in MACHINES:
        begin = time.monotonic()
        reports.append(boot(machine, kernel, archive, python, build))
        check(machine, reports[-1], reports[0], checks)
        log.append(describe(machine, reports[-1]))
        print(f"{log[-1]}\n  ({time.monotonic() - begin:.0f} s)", flush=True)
    log.append(f"{checks.passed} checks passed, {len(checks.failed)} failed")
    log += checks.failed
    print("\n".join(log[len(MACHINES) + 1 :]))
    if options.log is not None:
        options.log.write_text("\n".join(log) + "\n")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
