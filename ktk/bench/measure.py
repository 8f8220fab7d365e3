"""The clock: layers, probes and kernels by turns on the same threads."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ktk import _native
from ktk.bench import figures
from ktk.bench.cases import BATCHES, FormatChoice, GaussianWeights, Shape, routes
from ktk.bench.figures import Spread, spread
from ktk.bench.probes import Clock, CopyProbe, PeakProbe, ReadProbe, footprint_of_machine
from ktk.config import checked_int
from ktk.errors import KtkArgumentError
from ktk.profiling import profile
from ktk.runtime import WorkerPoolConfig, default_threads

__all__ = ["SCHEMA", "Batch", "Layers", "Options", "run"]

SCHEMA = "ktk-bench-1"

# Tokens over which errors are taken, and experts for a token that may be among them.
ERROR_TOKENS = 64
ERROR_EXPERTS = 2
# Distinct routings that a batch cycles through.
SMALL_BATCH, SMALL_ROUTES, LARGE_ROUTES = 64, 32, 3
PACKING_ROUNDS = 3
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}
# CPUs that others may use without a cell being waited for or measured again.
QUIET_CPUS = 0.1
PROFILED_S = 0.1
# With fewer experts than this for each of a token's, layers are too alike in what they read to use only one.
FEW_EXPERTS = 8

_WEIGHT_PARTS = (
    _native.PART_GATE_UP_WEIGHT,
    _native.PART_GATE_UP_SCALE,
    _native.PART_GATE_UP_FACTORS,
    _native.PART_DOWN_WEIGHT,
    _native.PART_DOWN_SCALE,
    _native.PART_DOWN_FACTORS,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and for how long.

    Parameters
    ----------
    shapes : sequence of Shape
    formats : sequence of FormatChoice
    batches : sequence of int, default `BATCHES`
        Tokens of a forward.
    threads : sequence of int, optional
        Pools to measure with, one after the other; default: one of `ktk.runtime.default_threads`.
    isa : str, optional
        Instruction set; default: that of layers.
    num_experts : int, optional
        Most experts of a layer; default: as many as `memory_bytes` holds in bf16.
    memory_bytes : int, optional
        For packed weights; default: half of what is available.
    footprint_bytes : int, optional
        Packed weights that forwards rotate through, at least; default: several times the last-level cache.
    rounds : int, default 7
        Pairs of probes and forwards, at least 1.
    cell_s : float, default 0.5
        Seconds of forwards in one cell, about; each round has at least one forward.
    most_cell_s : float, default 10.0
        Rounds end early after this many seconds.
    most_call_s : float, default 30.0
        Cells are left out whose forward would take longer, as the smaller batch predicts.
    patience_s : float, default 0.0
        Seconds that a cell may wait for other processes to leave the CPUs alone, and be measured again if
        they did not; the attempt that they disturbed least is kept.
    clock : str, default "wall"
        ``"cpu"`` takes the time that the thread had a CPU, for a machine that others use too. Only with one
        thread: several wait for each other.
    skewed, errors, packing, stages : bool, default True
        Whether to measure these too.
    """

    shapes: Sequence[Shape]
    formats: Sequence[FormatChoice]
    batches: Sequence[int] = BATCHES
    threads: Sequence[int] | None = None
    isa: str | None = None
    num_experts: int | None = None
    memory_bytes: int | None = None
    footprint_bytes: int | None = None
    rounds: int = 7
    cell_s: float = 0.5
    most_cell_s: float = 10.0
    most_call_s: float = 30.0
    patience_s: float = 0.0
    clock: str = "wall"
    skewed: bool = True
    errors: bool = True
    packing: bool = True
    stages: bool = True

    def __post_init__(self) -> None:
        for name in ("shapes", "formats", "batches"):
            if not getattr(self, name):
                raise KtkArgumentError(f"{name} is empty; name at least one")
        for value in (*self.batches, self.rounds, *(self.threads or ())):
            checked_int("batches, rounds and threads", value, 1)
        if self.clock not in CLOCKS:
            raise KtkArgumentError(f"clock must be one of {', '.join(CLOCKS)}, got {self.clock!r}")
        if self.clock == "cpu" and set(self.threads or ()) != {1}:
            raise KtkArgumentError(f"the cpu clock needs threads to be 1, got {self.threads}")
        if not self.patience_s >= 0:
            raise KtkArgumentError(f"patience_s must not be negative, got {self.patience_s}")
        for name in ("cell_s", "most_cell_s", "most_call_s"):
            if not getattr(self, name) > 0:
                raise KtkArgumentError(f"{name} must be positive, got {getattr(self, name)}")


Progress = Callable[[int, int, str], None]


def run(
    options: Options,
    *,
    progress: Progress | None = None,
    on_part: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure everything that `options` name.

    Parameters
    ----------
    options : Options
    progress : callable, optional
        Called as ``progress(done, total, what)``, in cells.
    on_part : callable, optional
        Called with the report so far, after each format of a shape.

    Returns
    -------
    dict
        The report, ready for JSON; docs/benchmarking.md describes it.

    Raises
    ------
    KtkArgumentError
        If an option is out of range.
    KtkUnsupportedError
        If the CPU cannot run the instruction set.
    KtkMemoryError
        If there is not enough memory.
    """
    threads = list(options.threads or [default_threads()])
    isa = _native.isa_default() if options.isa is None else options.isa
    _native.isa_check(isa)
    limit = options.memory_bytes or available_memory_bytes() // 2
    footprint = options.footprint_bytes or footprint_of_machine()
    clock = CLOCKS[options.clock]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "ktk": _native.version(),
        "torch": torch.__version__,
        "binding": _native.binding,
        "began": _utc_now(),
        "machine": _machine(),
        "load_average": {"before": list(os.getloadavg())},
        "isa": isa,
        "rounds": options.rounds,
        "clock": options.clock,
        "footprint_bytes": footprint,
        "probes": [],
        "cells": [],
        "errors": [],
        "packing": [],
    }
    batches = sorted(options.batches)
    total = len(threads) * len(options.shapes) * len(options.formats) * len(batches)
    done = itertools.count(1)

    def step(what: str) -> None:
        if progress is not None:
            progress(next(done), total, what)

    def tell(what: str) -> None:
        if progress is not None:
            progress(0, total, what)

    with torch.inference_mode(), _torch_threads():
        for count in threads:
            torch.set_num_threads(count)
            with WorkerPoolConfig.from_threads(count).make_pool() as pool:
                tell("probes")
                with (
                    ReadProbe(pool, isa, footprint, clock=clock) as read,
                    _Peaks(pool, options.formats, isa, clock) as peaks,
                ):
                    report["probes"].append(_probe_entry(count, read, peaks))
                    for shape in options.shapes:
                        fitted = shape.fitting(
                            min(
                                options.num_experts or shape.num_experts,
                                limit // (2 * shape.weights_of_expert),
                            )
                        )
                        bench = _ShapeBench(fitted, pool, isa, options, footprint, limit)
                        for choice in options.formats:
                            name = f"{shape.name} {choice.name}, {count} threads"
                            tell(f"packing {name}")
                            entry = {"shape": shape.name, "format": choice.name, "threads": count}
                            if options.errors:
                                report["errors"].append({**entry, **bench.error(choice)})
                            with bench.layers(choice) as layers:
                                if options.packing:
                                    report["packing"].append({**entry, **bench.packing(layers)})
                                previous: dict[str, Any] | None = None
                                for tokens in batches:
                                    tell(f"{name}, {tokens} tokens")
                                    cell = bench.cell(layers, tokens, read, peaks[choice.format], previous)
                                    report["cells"].append({**entry, **cell})
                                    previous = cell if "skipped" not in cell else previous
                                    step(f"{name}, {tokens} tokens")
                            report["probes"][-1] = _probe_entry(count, read, peaks)
                            report["load_average"]["after"] = list(os.getloadavg())
                            report["ended"] = _utc_now()
                            if on_part is not None:
                                on_part(report)
    return report


@contextmanager
def _torch_threads() -> Iterator[None]:
    """PyTorch's number of threads is as before after the block."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Peaks(dict[str, PeakProbe]):
    """The peak probe of each format, closed at the end of a `with` block."""

    def __init__(self, pool: _native.Pool, formats: Sequence[FormatChoice], isa: str, clock: Clock) -> None:
        super().__init__()
        for choice in formats:
            if choice.format not in self:
                self[choice.format] = PeakProbe(pool, choice.format, isa, clock=clock)

    def __enter__(self) -> _Peaks:
        return self

    def __exit__(self, *_: object) -> None:
        for probe in self.values():
            probe.close()


def _probe_entry(threads: int, read: ReadProbe, peaks: _Peaks) -> dict[str, Any]:
    def variants(probe: ReadProbe | PeakProbe, unit: float) -> dict[str, Any]:
        rates = zip(probe.names, probe.best_of_variant, strict=True)
        return {"chosen": probe.name, "variants": {name: round(rate / unit, 4) for name, rate in rates}}

    return {
        "threads": threads,
        "read_gbs": variants(read, 1e9),
        "peak_gops": {name: variants(probe, 1e9) for name, probe in peaks.items()},
    }


class Layers:
    """Layers of one shape and format with equal weights, which forwards rotate through.

    Parameters
    ----------
    pool : ktk._native.Pool
    shape : Shape
    choice : FormatChoice
    weights : GaussianWeights
    max_tokens : int
    count : int
        Number of layers.
    isa : str, optional
    """

    def __init__(
        self,
        pool: _native.Pool,
        shape: Shape,
        choice: FormatChoice,
        weights: GaussianWeights,
        max_tokens: int,
        count: int,
        isa: str | None = None,
    ) -> None:
        self.shape, self.choice, self.weights = shape, choice, weights
        self.moes: list[_native.Moe] = []
        try:
            for index in range(count):
                moe = _native.Moe(
                    pool,
                    num_experts=shape.num_experts,
                    top_k=shape.top_k,
                    hidden_size=shape.hidden_size,
                    intermediate_size=shape.intermediate_size,
                    max_tokens=max_tokens,
                    format=choice.code,
                    group_size=choice.group_size,
                    rotated=choice.rotated,
                    isa=isa,
                    layer_index=index,
                )
                self.moes.append(moe)
                for expert in range(shape.num_experts):
                    self.pack(moe, expert, weights.matrices(expert))
        except BaseException:
            self.close()
            raise

    @staticmethod
    def pack(moe: _native.Moe, expert: int, matrices: Sequence[torch.Tensor]) -> None:
        """Pack one expert from bfloat16 matrices."""
        moe.pack_expert(expert, _native.DTYPE_BF16, *(matrix.data_ptr() for matrix in matrices))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one packed expert: weights, scales and factors."""
        return expert_bytes(self.moes[0])

    def close(self) -> None:
        """Free the weights."""
        for moe in self.moes:
            moe.close()

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def expert_bytes(moe: _native.Moe) -> int:
    """Bytes of one packed expert of a layer: weights, scales and factors."""
    return sum(moe.part_bytes(part) for part in _WEIGHT_PARTS)


class Batch:
    """A batch of bfloat16 tokens, with several routings to cycle through.

    Parameters
    ----------
    shape : Shape
    tokens : int
    skewed : bool, default False
        See `ktk.bench.cases.routes`.
    """

    def __init__(self, shape: Shape, tokens: int, *, skewed: bool = False) -> None:
        self.shape, self.tokens = shape, tokens
        generator = torch.Generator().manual_seed(tokens)
        self.input = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
        self.output = torch.empty_like(self.input)
        self.count = torch.tensor([tokens], dtype=torch.int32)
        number = SMALL_ROUTES if tokens <= SMALL_BATCH else LARGE_ROUTES
        self.routes = [routes(shape, tokens, 1000 * tokens + index, skewed=skewed) for index in range(number)]
        self.distinct = [len(ids.unique()) for ids, _ in self.routes]

    def distinct_experts(self, call: int) -> int:
        """Experts that the routing of a call activates."""
        return self.distinct[call % len(self.routes)]

    def forward(self, moe: _native.Moe, call: int) -> None:
        """Run one forward, with the routing whose turn it is."""
        ids, weights = self.routes[call % len(self.routes)]
        moe.forward(
            self.count.data_ptr(),
            self.shape.top_k,
            ids.data_ptr(),
            weights.data_ptr(),
            self.input.data_ptr(),
            _native.DTYPE_BF16,
            self.output.data_ptr(),
            _native.DTYPE_BF16,
        )


@dataclass
class _Timed:
    """Rounds of one batch: seconds a call, and the bound of each round."""

    seconds: list[float] = field(default_factory=list)
    bounds: list[figures.Bound] = field(default_factory=list)
    calls: int = 0

    def fractions(self) -> Spread:
        pairs = zip(self.bounds, self.seconds, strict=True)
        return spread(bound.seconds / seconds for bound, seconds in pairs)


@dataclass
class _Rounds:
    """One attempt at a cell: each batch's rounds, the rates around them, CPUs that others used meanwhile."""

    timed: list[_Timed]
    peaks: list[float]
    reads: list[float]
    others: float | None


class _ShapeBench:
    """Everything that is measured of one shape on one pool."""

    def __init__(
        self, shape: Shape, pool: _native.Pool, isa: str, options: Options, footprint: int, limit: int
    ) -> None:
        self.shape, self.pool, self.isa, self.options = shape, pool, isa, options
        self.footprint, self.limit = footprint, limit
        self.clock = CLOCKS[options.clock]
        self.weights = GaussianWeights(shape)
        self._exact: tuple[Batch, torch.Tensor] | None = None

    def layers(self, choice: FormatChoice) -> Layers:
        """As many layers as the footprint asks for and memory holds."""
        one = Layers(self.pool, self.shape, choice, self.weights, max(self.options.batches), 1, self.isa)
        size = one.moes[0].weight_bytes
        wanted = math.ceil(self.footprint / size)
        if self.shape.num_experts < FEW_EXPERTS * self.shape.top_k:
            wanted = max(wanted, 2)
        more = max(min(wanted, self.limit // size), 1) - 1
        if more:
            try:
                rest = Layers(
                    self.pool, self.shape, choice, self.weights, max(self.options.batches), more, self.isa
                )
            except BaseException:
                one.close()
                raise
            one.moes += rest.moes
        return one

    def error(self, choice: FormatChoice) -> dict[str, Any]:
        """Relative L2 error of a small batch against float32 on the same bfloat16 weights and inputs."""
        small = self.shape.fitting(ERROR_EXPERTS * self.shape.top_k)
        if self._exact is None:
            batch = Batch(small, ERROR_TOKENS)
            self._exact = batch, reference(small, self.weights, batch)
        batch, exact = self._exact
        with Layers(self.pool, small, choice, self.weights, ERROR_TOKENS, 1, self.isa) as layers:
            batch.forward(layers.moes[0], 0)
        return {"tokens": ERROR_TOKENS, "relative_l2": figures.relative_l2(batch.output, exact)}

    def packing(self, layers: Layers) -> dict[str, Any]:
        """Speed of quantising and packing from bfloat16, beside that of copying as much."""
        source_bytes = 2 * self.shape.weights_of_expert
        count = max(1, min(self.shape.num_experts, self.footprint // source_bytes))
        # Matrices of their own, so that they come from memory as those of a checkpoint do.
        sources = [[m.clone() for m in self.weights.matrices(e)] for e in range(count)]
        moved = count * (source_bytes + layers.expert_bytes)
        rates, copies = [], []
        with CopyProbe(self.pool, self.isa, self.footprint // 2, clock=self.clock) as copy:
            copies.append(copy.rate())
            for _ in range(PACKING_ROUNDS):
                began = self.clock()
                for expert, matrices in enumerate(sources):
                    layers.pack(layers.moes[0], expert, matrices)
                rates.append(moved / (self.clock() - began))
                copies.append(copy.rate())
            name = copy.name
        pairs = zip(rates, figures.between(copies), strict=True)
        return {
            "experts": count,
            "gbs": asdict(spread(rates).scaled(1e-9)),
            "copy": name,
            "copy_gbs": asdict(spread(copies).scaled(1e-9)),
            "fraction_of_copy": asdict(spread(rate / copy_rate for rate, copy_rate in pairs)),
        }

    def cell(
        self,
        layers: Layers,
        tokens: int,
        read: ReadProbe,
        peak: PeakProbe,
        previous: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Time one batch size; `previous` is the cell of the batch size before."""
        options, shape = self.options, self.shape
        about = {
            "tokens": tokens,
            "experts": shape.num_experts,
            "layers": len(layers.moes),
            "expert_bytes": layers.expert_bytes,
        }
        if previous is not None and previous["tokens"] >= SMALL_BATCH:
            predicted = previous["ms"]["median"] / 1e3 * tokens / previous["tokens"]
            if predicted > options.most_call_s:
                return {**about, "skipped": f"a forward would take about {predicted:.0f} s"}
        batch = Batch(shape, tokens)
        batches = [batch]
        # Below that, a quarter of the tokens is one token.
        if options.skewed and tokens >= 8 and shape.num_experts > shape.top_k:
            batches.append(Batch(shape, tokens, skewed=True))
        calls = itertools.count()
        best: _Rounds | None = None
        attempts = 0

        def run(which: Batch) -> int:
            call = next(calls)
            which.forward(layers.moes[call % len(layers.moes)], call)
            return call

        run(batch)
        began = self.clock()
        run(batch)
        once = self.clock() - began
        calls_of_round = max(1, math.ceil(options.cell_s / options.rounds / once))
        if calls_of_round > 1:
            for _ in layers.moes:
                run(batch)

        deadline = time.perf_counter() + options.patience_s
        while True:
            _wait_until_quiet(deadline)
            attempt = self._rounds(layers, batches, run, calls_of_round, read, peak)
            attempts += 1
            if best is None or (attempt.others or 0.0) < (best.others or 0.0):
                best = attempt
            if (best.others or 0.0) <= QUIET_CPUS or time.perf_counter() >= deadline:
                break
        timed, peaks, reads = best.timed, best.peaks, best.reads
        cell = {
            **about,
            "distinct_experts": sum(batch.distinct) / len(batch.distinct),
            "operations": figures.operations(shape, tokens),
            **self._timing(layers, batch, timed[0], max(peaks), max(reads)),
            "peak_gops": asdict(spread(peaks).scaled(1e-9)),
            "read_gbs": asdict(spread(reads).scaled(1e-9)),
            "cpus_used_by_others": best.others,
            "attempts": attempts,
        }
        if len(batches) > 1:
            pairs = zip(timed[0].seconds, timed[1].seconds, strict=True)
            cell["skewed"] = {
                **self._timing(layers, batches[1], timed[1], max(peaks), max(reads)),
                "distinct_experts": sum(batches[1].distinct) / len(batches[1].distinct),
                "time_ratio": asdict(spread(skewed / even for even, skewed in pairs)),
            }
        if options.stages:
            cell["stages"] = self._stages(run, batch, once)
        return cell

    def _rounds(
        self,
        layers: Layers,
        batches: Sequence[Batch],
        run: Callable[[Batch], int],
        calls_of_round: int,
        read: ReadProbe,
        peak: PeakProbe,
    ) -> _Rounds:
        """Probes and forwards by turns."""
        options, tokens = self.options, batches[0].tokens
        work = calls_of_round * figures.operations(self.shape, tokens)
        activations = calls_of_round * figures.activation_bytes(self.shape, tokens)
        timed = [_Timed() for _ in batches]
        usage = _CpuUsage()
        peaks, reads = [peak.rate()], [read.rate()]
        began = time.perf_counter()
        for done in range(options.rounds):
            if done and time.perf_counter() - began > options.most_cell_s:
                break
            for which, result in zip(batches, timed, strict=True):
                distinct = 0
                start = self.clock()
                for _ in range(calls_of_round):
                    distinct += which.distinct_experts(run(which))
                seconds = self.clock() - start
                peaks.append(peak.rate())
                reads.append(read.rate())
                bound = figures.bound_of(
                    work,
                    distinct * layers.expert_bytes + activations,
                    (peaks[-2] + peaks[-1]) / 2,
                    (reads[-2] + reads[-1]) / 2,
                )
                result.seconds.append(seconds / calls_of_round)
                result.bounds.append(figures.Bound(bound.seconds / calls_of_round, bound.limit))
                result.calls += calls_of_round
        return _Rounds(timed, peaks, reads, usage.others())

    def _timing(
        self, layers: Layers, batch: Batch, timed: _Timed, peak: float, bandwidth: float
    ) -> dict[str, Any]:
        distinct = sum(batch.distinct) / len(batch.distinct)
        weight_bytes = distinct * layers.expert_bytes
        work = figures.operations(self.shape, batch.tokens)
        best = figures.bound_of(
            work, weight_bytes + figures.activation_bytes(self.shape, batch.tokens), peak, bandwidth
        )
        times = spread(timed.seconds)
        return {
            "calls": timed.calls,
            "rounds": len(timed.seconds),
            "ms": asdict(times.scaled(1e3)),
            "limit": max(("operations", "bytes"), key=[bound.limit for bound in timed.bounds].count),
            "bound_ms": asdict(spread(bound.seconds * 1e3 for bound in timed.bounds)),
            "fraction": asdict(timed.fractions()),
            "fraction_of_best": best.seconds / times.min,
            "gops": work / times.median / 1e9,
            "weights_gbs": weight_bytes / times.median / 1e9,
        }

    def _stages(self, run: Callable[[Batch], int], batch: Batch, once: float) -> dict[str, Any]:
        with profile() as prof:
            for _ in range(max(1, math.ceil(PROFILED_S / once))):
                run(batch)
        stages = {stage.stage: stage for stage in prof.summary.stages}
        forward = stages["forward"].total_us
        shares = {name: stage.total_us / forward for name, stage in stages.items() if stage.share is not None}
        products = shares.get("gate_up", 0.0) + shares.get("down", 0.0)
        return {
            "share_of_forward": shares,
            "outside_products": sum(shares.values()) - products,
            "between_stages": 1.0 - sum(shares.values()),
            "imbalance": {name: stages[name].imbalance for name in ("gate_up", "down") if name in stages},
        }


def reference(shape: Shape, weights: GaussianWeights, batch: Batch) -> torch.Tensor:
    """The output of a batch's first routing, float32 [tokens, H], with all products in float32."""
    ids, scores = batch.routes[0]
    x = batch.input.float()
    output = torch.zeros(batch.tokens, shape.hidden_size)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up, down = (matrix.float() for matrix in weights.matrices(expert))
        rows = x[token]
        hidden = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        output.index_add_(0, token, (hidden @ down.T) * scores[token, slot, None])
    return output


class _CpuUsage:
    """What other processes used of the machine's CPUs since this object was made."""

    def __init__(self) -> None:
        self._begin = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            with open("/proc/stat", encoding="ascii") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        tick = 1 / os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, steal = ticks
        own = os.times()
        busy = (user + nice + system + irq + softirq + steal) * tick
        return time.perf_counter(), busy, own.user + own.system

    def others(self) -> float | None:
        """CPUs, on average; steal by other virtual machines included. None where the kernel does not say."""
        end = self._read()
        if self._begin is None or end is None:
            return None
        wall, busy, own = (later - earlier for later, earlier in zip(end, self._begin, strict=True))
        return round(max(busy - own, 0.0) / wall, 3) if wall > 0 else None


def _wait_until_quiet(deadline: float) -> None:
    """Wait until other processes use next to nothing, or until `deadline` (of `time.perf_counter`)."""
    while time.perf_counter() < deadline:
        usage = _CpuUsage()
        time.sleep(0.3)
        if (usage.others() or 0.0) <= QUIET_CPUS:
            return


def available_memory_bytes() -> int:
    """Memory that new allocations can have: MemAvailable, or the physical memory where that is not told."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _machine() -> dict[str, Any]:
    machine = json.loads(_native.machine_json())
    names = ("cpu_model", "cpus_online", "cpus_allowed", "physical_cores", "cpu_quota", "huge_pages")
    return {name: machine.get(name) for name in names} | {"numa_nodes": len(machine["nodes"])}


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
