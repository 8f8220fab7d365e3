"""Runs inside the emulated machine: where threads, packed weights and scratch are, and what comes out.

Uses the installed ktk and NumPy. Prints one line of JSON for run.py, which knows what the machine was
made of.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

import ktk
from ktk import _native
from ktk.errors import KtkArgumentError

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 768, 8, 4
FORMATS = {
    "bf16": (_native.FORMAT_BF16, 0),
    "int8": (_native.FORMAT_INT8, 0),
    "int4": (_native.FORMAT_INT4, 64),
}
PACKED_PARTS = range(_native.PART_GATE_UP_WEIGHT, _native.PART_DOWN_FACTORS + 1)
PAGE = os.sysconf("SC_PAGE_SIZE")
MOVE_PAGES = 279  # x86-64


def nodes_of_pages(start: int, end: int) -> dict[int, int]:
    """Pages of a range on each node, asked from the kernel page by page; pages never touched are left out."""
    libc = ctypes.CDLL(None, use_errno=True)
    addresses = range(start, end, PAGE)
    pages = (ctypes.c_void_p * len(addresses))(*addresses)
    status = (ctypes.c_int * len(addresses))()
    if libc.syscall(MOVE_PAGES, 0, ctypes.c_ulong(len(addresses)), pages, None, status, 0) != 0:
        raise OSError(ctypes.get_errno(), "move_pages")
    found: dict[int, int] = {}
    for node in status:
        if node >= 0:
            found[node] = found.get(node, 0) + 1
    return found


def placed_ranges() -> dict[int, tuple[int, int]]:
    """Mappings that prefer a node, by their first address: the node and the address past the end."""
    ends = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = line.split()[0].split("-")
        ends[int(first, 16)] = int(last, 16)
    found = {}
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        match = re.match(r"([0-9a-f]+) prefer[^:]*:(\d+)", line)
        if match:
            found[int(match[1], 16)] = (int(match[2]), ends[int(match[1], 16)])
    return found


def placed_bytes() -> dict[str, dict[str, int]]:
    """Touched bytes on each node, for each node that memory was asked on."""
    found: dict[str, dict[str, int]] = {}
    for start, (wanted, end) in placed_ranges().items():
        on = found.setdefault(str(wanted), {})
        for node, pages in nodes_of_pages(start, end).items():
            on[str(node)] = on.get(str(node), 0) + pages * PAGE
    return found


def growth(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {
        wanted: {node: bytes - before.get(wanted, {}).get(node, 0) for node, bytes in on.items()}
        for wanted, on in after.items()
    }


def threads() -> dict[str, str]:
    """CPUs that each thread of a pool or queue may run on."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("ktk-"):
            status = (task / "status").read_text()
            found[name] = re.search(r"Cpus_allowed_list:\s*(\S+)", status)[1]  # type: ignore[index]
    return found


def drawn(tokens: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(tokens)
    ids = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
    return ids, rng.random((tokens, TOP_K), np.float32), rng.standard_normal((tokens, HIDDEN), np.float32)


@functools.cache
def matrices() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    return tuple(rng.standard_normal((EXPERTS, *shape), np.float32) for shape in shapes)


def layer(pool: _native.Pool, format: str) -> _native.Moe:
    code, group = FORMATS[format]
    moe = _native.Moe(
        pool,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        max_tokens=64,
        format=code,
        group_size=group,
    )
    for expert in range(EXPERTS):
        moe.pack_expert(expert, _native.DTYPE_F32, *(matrix[expert].ctypes.data for matrix in matrices()))
    return moe


def outputs(cpu: ktk.CPUInfer, moe: _native.Moe) -> str:
    """A hash of the outputs for one token, a few and many, computed in the order of the queue."""
    digest = hashlib.sha256()
    for tokens in (1, 5, 40):
        ids, weights, x = drawn(tokens)
        count, y = np.array([tokens], np.int32), np.full((tokens, HIDDEN), np.nan, np.float32)
        pointers = [array.ctypes.data for array in (count, ids, weights, x, y)]
        counts, rest = pointers[0], pointers[1:4]
        cpu.submit(
            ktk.ForwardTask(moe, counts, TOP_K, *rest, _native.DTYPE_F32, pointers[4], _native.DTYPE_F32)
        )
        cpu.sync()
        assert np.isfinite(y).all()
        digest.update(y.tobytes())
    return digest.hexdigest()


def placed(nodes: list[int], threads_each: int) -> dict[str, Any]:
    """What a pool with a subpool on each of `nodes` puts where, and what it computes."""
    config = ktk.WorkerPoolConfig(len(nodes), nodes, [threads_each] * len(nodes))
    report: dict[str, Any] = {"nodes": nodes, "formats": {}}
    with ktk.CPUInfer(config) as cpu:
        pool = cpu.native_pool
        report["warnings"] = pool.warnings
        for format in FORMATS:
            before = placed_bytes()
            moe = layer(pool, format)
            loaded = placed_bytes()
            hashed = outputs(cpu, moe)
            report["threads"] = threads()
            report["formats"][format] = {
                "packed_bytes": EXPERTS * sum(moe.part_bytes(part) for part in PACKED_PARTS),
                "weights": growth(before, loaded),
                "scratch": growth(loaded, placed_bytes()),
                "outputs": hashed,
            }
            moe.close()
    return report


def refusals(nodes: list[int]) -> dict[str, str]:
    found = {}
    for node in nodes:
        try:
            ktk.WorkerPoolConfig(1, [node], [1]).make_pool()
        except KtkArgumentError as error:
            found[str(node)] = str(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=json.loads)
    plan = parser.parse_args().plan
    report = {
        "machine": json.loads(_native.machine_json()),
        "isa": _native.isa_default(),
        "binding": _native.binding,
        "version": _native.version(),
        "default_nodes": list(
            ktk.WorkerPoolConfig.from_threads(ktk.runtime.default_threads()).subpool_numa_map
        ),
        "placed": [placed(nodes, plan["threads_each"]) for nodes in plan["pools"]],
        "refusals": refusals(plan["refused"]),
    }
    print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
