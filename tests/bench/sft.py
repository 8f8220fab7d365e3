"""Fine-tuning of one layer: forward and backward against what the machine's multiplications can do.

    python tests/bench/sft.py --shapes qwen3,dsv3 --tokens 512,4096 --ranks 8,16 --formats bf16,int8
    python tests/bench/sft.py --quick --output sft.json

A round is a probe of the machine's bf16 products, a forward, a probe, a backward, a probe; then the same
backward without adapters and without the gradient of the routing weights, which shows what those two cost.
The peak of a round is the mean of its probes, and fractions are taken round by round. Operations are those of
the base weights, 6 H I a routed row in each direction, so that adapters count as time and not as work; all
formats are held against the bf16 peak, since every backward multiplies bf16.

`stages` is the part of the backward that the adapters' own stages take in a trace; it lacks the products that
are fused into the base's, and so is less than `adapters_and_router`. With `--eager` the same layer runs in
PyTorch, expert by expert, with autograd. `--cpu-time` counts only the time that the thread had a CPU, for a
machine that others use (one thread then). Shapes have fewer experts than their models (`--experts`).

Needs ktk installed, and nothing of the source tree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import ktk
from ktk import _native
from ktk.bench.cases import (
    FormatChoice,
    GaussianWeights,
    Shape,
    parse_batches,
    parse_formats,
    parse_shapes,
    routes,
)
from ktk.bench.figures import operations, spread
from ktk.bench.probes import PeakProbe
from ktk.bench.report import save_report
from ktk.runtime import CPUInfer, WorkerPoolConfig, default_threads
from ktk.sft.native import ForwardContext, TrainableExperts

SCHEMA = "ktk-bench-sft-1"
QUICK = {"shapes": "256x192x8x2", "tokens": "64", "ranks": "0,8", "formats": "bf16,int8,fp8", "cell_s": 0.05}
EXPERTS = {"qwen3": 128, "dsv3": 16, "mixtral": 8, "awkward": 32}

#: Stages of a backward that only adapters ask for.
ADAPTER_STAGES = (
    "lora_pack",
    "lora_input",
    "lora_middle",
    "grad_lora_input",
    "grad_lora_middle",
    "grad_lora",
)
#: Spans that hold others.
OUTER_STAGES = ("forward", "backward", "wait")

COLUMNS = ("layer", "T", "r", "forward ms", "backward ms", "of the peak", "forward", "backward", "GFLOP/s")
COLUMNS += ("adapters, router", "stages", "saved MB", "eager / ktk")


@dataclass(frozen=True)
class Settings:
    """How long and how each cell is measured."""

    cell_s: float
    max_call_s: float
    least_rounds: int
    policy: str
    eager: bool
    clock: Callable[[], float]


class Layer:
    """A packed layer and its trainers; with `keep` also the weights that it was packed from."""

    def __init__(
        self,
        shape: Shape,
        choice: FormatChoice,
        weights: GaussianWeights,
        cpu: CPUInfer,
        isa: str | None,
        tokens: int,
        keep: bool,
    ) -> None:
        self.shape = shape
        config = ktk.config.LayerConfig(
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            format=choice.format,
            group_size=choice.group_size,
            rotated=choice.rotated,
            max_tokens=tokens,
            isa=isa,
        )
        self.experts = ktk.Experts(config, cpu_infer=cpu)
        matrices = [weights.matrices(expert) for expert in range(shape.num_experts)]
        self.weights: tuple[torch.Tensor, ...] = tuple(
            torch.stack(parts) for parts in zip(*matrices, strict=True)
        )
        self.experts.load_tensors(*self.weights)
        if not keep:
            self.weights = ()
        self.plain = TrainableExperts(self.experts)

    def trainer(self, rank: int) -> tuple[TrainableExperts, dict[str, torch.Tensor]]:
        """With Gaussian adapters of a rank, 0 for none."""
        if rank == 0:
            return self.plain, {}
        made = TrainableExperts(self.experts, lora_rank=rank, lora_alpha=2.0 * rank)
        lora = gaussian_adapters(made.lora_shapes(), rank)
        made.set_lora(lora)
        return made, lora

    def close(self) -> None:
        self.plain.close()
        self.experts.close()


def gaussian_adapters(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, torch.Tensor]:
    """Adapters whose products are as large as their inputs, in bfloat16."""
    generator = torch.Generator().manual_seed(rank)
    return {
        name: (torch.randn(sizes, generator=generator) * sizes[-1] ** -0.5).bfloat16()
        for name, sizes in shapes.items()
    }


def eager(
    weights: tuple[torch.Tensor, ...],
    lora: Mapping[str, torch.Tensor],
    scale: float,
    x: torch.Tensor,
    ids: torch.Tensor,
    scores: torch.Tensor,
) -> torch.Tensor:
    """The layer in PyTorch, as transformers and PEFT run it: a loop over experts."""
    gate, up, down = weights
    output = torch.zeros_like(x)

    def linear(rows: torch.Tensor, weight: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        y = rows @ weight[expert].T
        if not lora:
            return y
        return y + (rows @ lora[f"{name}_lora_a"][expert].T) @ lora[f"{name}_lora_b"][expert].T * scale

    for expert in range(gate.shape[0]):
        token, slot = torch.where(ids == expert)
        if not token.numel():
            continue
        rows = x[token]
        z = torch.nn.functional.silu(linear(rows, gate, "gate", expert)) * linear(rows, up, "up", expert)
        y = linear(z, down, "down", expert) * scores[token, slot, None].to(z.dtype)
        output.index_add_(0, token, y)
    return output


def eager_seconds(
    layer: Layer,
    trainer: TrainableExperts,
    lora: Mapping[str, torch.Tensor],
    batch: tuple[torch.Tensor, ...],
    clock: Callable[[], float],
) -> float:
    """Least of two forwards and backwards in PyTorch."""
    x, ids, scores, grad = batch
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in lora.items()}
    x, scores = x.detach().requires_grad_(), scores.detach().requires_grad_()
    best = float("inf")
    for _ in range(2):
        began = clock()
        eager(layer.weights, tensors, trainer.lora_scale, x, ids, scores).backward(grad)
        best = min(best, clock() - began)
    return best


def base_backward(context: ForwardContext, grad: torch.Tensor) -> None:
    """The gradient of the input alone."""
    arguments, keywords, _results, _read = context._arguments(grad, None, None, False)
    context._native.backward(*arguments[:-1], 0, **keywords)


def traced(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Milliseconds of each stage of a call, and of the call as a whole (`all`), and what it returned."""
    with ktk.profile() as trace:
        began = time.perf_counter()
        result = call()
        spent = {"all": 1e3 * (time.perf_counter() - began)}
    for stage in trace.summary.stages:
        if stage.stage not in OUTER_STAGES:
            spent[stage.stage] = stage.total_us / 1e3
    return spent, result


def measure(
    layer: Layer, choice: FormatChoice, tokens: int, rank: int, peak: PeakProbe, settings: Settings
) -> dict[str, Any]:
    """One cell of the report."""
    shape, clock = layer.shape, settings.clock
    trainer, lora = layer.trainer(rank)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in lora.items()}
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    grad = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    ids, scores = routes(shape, tokens, seed=tokens)
    output = torch.empty_like(x)

    def forward(which: TrainableExperts) -> ForwardContext:
        context = which.forward(x, ids, scores, policy=settings.policy, output=output)[1]
        assert context is not None
        return context

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        began = clock()
        result = call()
        return clock() - began, result

    cell: dict[str, Any] = {"shape": shape.name, "format": choice.name, "tokens": tokens, "rank": rank}
    cell["experts"] = shape.num_experts
    first, context = timed(lambda: forward(trainer))
    if first > settings.max_call_s:
        return cell | {"skipped": f"a forward takes {first:.1f} s"}
    saved = {
        "saved_bytes": context.activation_bytes,
        "table_bytes": context.nbytes - context.activation_bytes,
    }
    # The first backward touches memory that later ones find in place.
    context.backward(grad, grad_lora=gradients)
    base_backward(forward(layer.plain), grad)
    ahead_ms, context = traced(lambda: forward(trainer))
    back_ms, _ = traced(lambda: context.backward(grad, grad_lora=gradients))

    rounds: list[tuple[float, float, float, float]] = []
    deadline = time.perf_counter() + settings.cell_s
    while len(rounds) < settings.least_rounds or time.perf_counter() < deadline:
        rates = [peak.rate()]
        ahead, context = timed(lambda: forward(trainer))
        rates.append(peak.rate())
        back, _ = timed(lambda: context.backward(grad, grad_lora=gradients))  # noqa: B023 - called at once
        rates.append(peak.rate())
        context = forward(layer.plain)
        alone, _ = timed(lambda: base_backward(context, grad))  # noqa: B023
        rounds.append((ahead, back, alone, sum(rates) / len(rates)))
    one_way = operations(shape, tokens)
    times = {
        "forward_ms": spread(1e3 * ahead for ahead, *_ in rounds),
        "backward_ms": spread(1e3 * back for _, back, *_ in rounds),
        "base_backward_ms": spread(1e3 * alone for _, _, alone, _ in rounds),
        "peak_gops": spread(rate / 1e9 for *_, rate in rounds),
        "gops": spread(2 * one_way / (ahead + back) / 1e9 for ahead, back, *_ in rounds),
        "fraction": spread(2 * one_way / (ahead + back) / rate for ahead, back, _, rate in rounds),
        "forward_fraction": spread(one_way / ahead / rate for ahead, _, _, rate in rounds),
        "backward_fraction": spread(one_way / back / rate for _, back, _, rate in rounds),
        "adapters_and_router": spread(1 - alone / back for _, back, alone, _ in rounds),
    }
    cell |= {"isa": layer.experts.isa, "policy": settings.policy, "rounds": len(rounds), **saved}
    cell |= {
        name: {key: round(number, 4) for key, number in vars(value).items()} for name, value in times.items()
    }
    total = sum(back_ms.values()) - back_ms["all"]
    adapters = sum(back_ms.get(name, 0.0) for name in ADAPTER_STAGES)
    cell["stages"] = round(adapters / total, 4) if total else None
    for name, spent in (("forward", ahead_ms), ("backward", back_ms)):
        cell[f"{name}_stages_ms"] = {stage: round(ms, 3) for stage, ms in spent.items()}
    if settings.eager:
        seconds = eager_seconds(layer, trainer, lora, (x, ids, scores, grad), clock)
        cell["eager_ms"] = round(1e3 * seconds, 2)
    if trainer is not layer.plain:
        trainer.close()
    return cell


def row(cell: dict[str, Any]) -> tuple[str, ...]:
    """A cell as text, in the order of `COLUMNS`."""
    head = (f"{cell['shape']} {cell['format']}", str(cell["tokens"]), str(cell["rank"]))
    if "skipped" in cell:
        return (*head, cell["skipped"], *["-"] * (len(COLUMNS) - 4))

    def middle(name: str) -> float:
        return float(cell[name]["median"])

    ahead, back = middle("forward_ms"), middle("backward_ms")
    return (
        *head,
        f"{ahead:.1f}",
        f"{back:.1f}",
        f"{middle('fraction'):.0%}",
        f"{middle('forward_fraction'):.0%}",
        f"{middle('backward_fraction'):.0%}",
        f"{middle('gops'):.0f}",
        f"{middle('adapters_and_router'):.0%}",
        "-" if cell["stages"] is None else f"{cell['stages']:.0%}",
        f"{cell['saved_bytes'] / 1e6:.1f}",
        f"{cell['eager_ms'] / (ahead + back):.1f}" if "eager_ms" in cell else "-",
    )


def table(cells: list[dict[str, Any]]) -> str:
    """All cells, in columns."""
    rows = [COLUMNS, *map(row, cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(each, widths, strict=True))
        )
        for each in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def run(options: argparse.Namespace) -> dict[str, Any]:
    threads = options.threads or default_threads()
    settings = Settings(
        cell_s=options.cell_s,
        max_call_s=options.max_call_s,
        least_rounds=options.rounds,
        policy="recompute" if options.recompute else "save",
        eager=options.eager,
        clock=time.process_time if options.cpu_time else time.perf_counter,
    )
    torch.set_num_threads(threads)
    machine = json.loads(_native.machine_json())
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "ktk": ktk.__version__,
        "torch": torch.__version__,
        "cpu_model": machine.get("cpu_model"),
        "threads": threads,
        "clock": "cpu" if options.cpu_time else "wall",
        "load_average": {"before": list(os.getloadavg())},
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cells": [],
    }
    batches, ranks = parse_batches(options.tokens, "number of tokens"), parse_ranks(options.ranks)
    cpu = CPUInfer(WorkerPoolConfig.from_threads(threads))
    with PeakProbe(cpu.native_pool, "bf16", options.isa, clock=settings.clock) as peak:
        report["peak_loop"] = peak.name
        for named in parse_shapes(options.shapes):
            count = options.experts or EXPERTS.get(named.name, named.num_experts)
            shape = replace(named, num_experts=max(min(named.num_experts, count), named.top_k))
            weights = GaussianWeights(shape)
            for choice in parse_formats(options.formats):
                layer = Layer(shape, choice, weights, cpu, options.isa, max(batches), options.eager)
                for tokens in batches:
                    for rank in ranks:
                        print(f"{shape.name} {choice.name}: {tokens} tokens, rank {rank}", file=sys.stderr)
                        report["cells"].append(measure(layer, choice, tokens, rank, peak, settings))
                layer.close()
    report["load_average"]["after"] = list(os.getloadavg())
    report["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return report


def parse_ranks(text: str) -> list[int]:
    """Ranks with commas between them; 0 is a layer without adapters."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) <= 256 for word in words):
        raise SystemExit(f"--ranks must be numbers of 0 to 256 with commas between them, got {text!r}")
    return [int(word) for word in words]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3,dsv3", help="names of ktk bench, or HxIxExK")
    parser.add_argument("--tokens", default="512,4096")
    parser.add_argument("--ranks", default="8")
    parser.add_argument(
        "--formats", default="bf16,int8", help="as of ktk bench: bf16, fp8, int8-row, int4-g32 ..."
    )
    parser.add_argument("--experts", type=int, help="of each layer; default: 128 of qwen3, 16 of dsv3")
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cell-s", type=float, default=2.0, help="seconds of rounds for each cell")
    parser.add_argument("--rounds", type=int, default=2, help="at least")
    parser.add_argument(
        "--max-call-s", type=float, default=20.0, help="skip cells whose forward takes longer"
    )
    parser.add_argument("--recompute", action="store_true", help="keep nothing between forward and backward")
    parser.add_argument("--eager", action="store_true", help="also in PyTorch")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one small cell, to see whether it runs")
    parser.add_argument("--json", action="store_true", help="print the report as JSON in place of the table")
    parser.add_argument("--output", help="write the report to this file")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    report = run(options)
    if options.output:
        save_report(report, options.output)
    print(json.dumps(report) if options.json else table(report["cells"]))


if __name__ == "__main__":
    main()
