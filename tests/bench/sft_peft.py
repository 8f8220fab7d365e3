"""Fine-tuning of one MoE block: ktk by turns with transformers and PEFT in eager PyTorch.

    python tests/bench/sft_peft.py --output peft.json
    python tests/bench/sft_peft.py --shapes qwen3 --experts 16 --tokens 512 --threads 1 --cpu-time

Every side is transformers' Qwen3-MoE block, router included, with the same weights and LoRA of the same rank
on every expert. A round is a forward and a backward of each side in turn, and ratios are taken round by
round, so that whatever else the machine does meets all sides. The sides:

`ktk`     experts in ktk, bf16, adapters put on by PEFT.
`fused`   as transformers 5 and PEFT have it: fused experts, a loop over experts, LoRA on the two parameters
          (`target_parameters`), which adds the adapters' product to all weights in each forward.
`linear`  experts as a list of linear layers, a loop over experts, PEFT's LoRA on each linear layer: the
          cheaper way, where a model still has such a list.

Eager sides run in each of `--dtypes`; float32 is what a CPU without bf16 instructions multiplies fastest, at
twice the memory. `--cpu-time` counts only the time that the thread had a CPU, for a machine that others use
(one thread then). The first round warms up and is not counted. `output_error` and `gradient_error` are the
relative L2 distances of a side's output and of the gradients of its input from those of the first eager side
in float32, or in the first dtype if float32 is not run: the proof that all sides compute the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import transformers
from torch import nn

import ktk
from ktk import _native
from ktk.bench.cases import Shape, parse_shapes
from ktk.bench.figures import operations, relative_l2, spread
from ktk.bench.report import save_report
from ktk.runtime import default_threads
from ktk.sft import kt_adapt_peft_lora, wrap_moe_layers_with_kt_wrapper

SCHEMA = "ktk-bench-sft-peft-1"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
QUICK = {"shapes": "128x64x4x2", "tokens": "32", "rank": 4, "rounds": 1}
EXPERTS = 16


class LinearExpert(nn.Module):
    """gate, up and down as linear layers."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            layer.weight = nn.Parameter(weight)
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class LinearExperts(nn.ModuleList):
    """The experts of a fused module as a list, called as that is."""

    @classmethod
    def of(cls, fused: Any) -> LinearExperts:
        experts = []
        for gate_up, down in zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True):
            gate, up = gate_up.chunk(2)
            experts.append(LinearExpert(gate.clone(), up.clone(), down.clone()))
        return cls(experts)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(x)
        for index, expert in enumerate(self):
            token, slot = torch.where(ids == index)
            if token.numel():
                y = expert(x[token]) * scores[token, slot, None]
                output.index_add_(0, token, y.to(output.dtype))
        return output


@dataclass
class Side:
    """One way to run the block."""

    name: str
    block: Any
    model: Any
    dtype: torch.dtype

    def run(
        self, x: torch.Tensor, grad: torch.Tensor, clock: Callable[[], float]
    ) -> tuple[float, float, torch.Tensor, torch.Tensor]:
        """Seconds of a forward and of its backward, the output, and the gradient of the input."""
        self.model.zero_grad(set_to_none=True)
        x = x.detach().clone().to(self.dtype).requires_grad_()
        grad = grad.to(self.dtype)
        began = clock()
        output = self.block(x)
        between = clock()
        output.backward(grad)
        ended = clock()
        assert x.grad is not None
        return between - began, ended - between, output.detach(), x.grad


def make_model(shape: Shape, dtype: torch.dtype) -> Any:
    """A model of one MoE layer, little else, and weights that bf16 holds."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        intermediate_size=64,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, experts_implementation="eager"
    )
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (experts.gate_up_proj, experts.down_proj, model.model.layers[0].mlp.gate.weight):
            for matrix in parameter.unbind() if parameter.dim() == 3 else (parameter,):
                noise = torch.randn(matrix.shape, generator=generator) * matrix.shape[-1] ** -0.5
                matrix.copy_(noise.bfloat16())
    return model


def adapt(model: Any, rank: int, **targets: Any) -> Any:
    """PEFT's adapters on the experts, in the model's dtype."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, **targets)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def make_side(name: str, shape: Shape, dtype: str, rank: int, threads: int, tokens: int) -> Side:
    model = make_model(shape, DTYPES[dtype])
    block = model.model.layers[0].mlp
    if name == "linear":
        block.experts = LinearExperts.of(block.experts)
        # Alone: of a whole Qwen3-MoE, PEFT knows that its experts are fused.
        model = adapt(block, rank, target_modules=r"experts\..*_proj")
        return Side(f"{name} {dtype}", block, model, DTYPES[dtype])
    if name == "ktk":
        wrap_moe_layers_with_kt_wrapper(
            model, {"backend": "AMXBF16", "num_threads": threads, "model_max_length": tokens}
        )
    model = adapt(model, rank, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    if name == "ktk":
        kt_adapt_peft_lora(model)
    block = model.get_base_model().model.layers[0].mlp
    return Side(name if name == "ktk" else f"{name} {dtype}", block, model, DTYPES[dtype])


def measure(
    shape: Shape, tokens: int, rank: int, dtypes: list[str], rounds: int, threads: int, clock: Any
) -> dict[str, Any]:
    """One cell of the report."""
    sides = [make_side("ktk", shape, "bf16", rank, threads, tokens)]
    sides += [
        make_side(name, shape, dtype, rank, threads, tokens)
        for dtype in dtypes
        for name in ("fused", "linear")
    ]
    generator = torch.Generator().manual_seed(tokens)
    x, grad = (torch.randn(1, tokens, shape.hidden_size, generator=generator).bfloat16() for _ in range(2))
    exact = next((side for side in sides[1:] if side.dtype == torch.float32), sides[1])
    times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    found = {}
    for side in sides:
        found[side.name] = side.run(x, grad, clock)[2:]
    for number in range(rounds):
        print(f"{shape.name}: round {number + 1} of {rounds}", file=sys.stderr)
        for side in sides:
            times[side.name].append(side.run(x, grad, clock)[:2])
    cell: dict[str, Any] = {
        "shape": shape.name,
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "tokens": tokens,
        "rank": rank,
        "isa": sides[0].model._kt_wrappers[0].experts.isa,
        "sides": {},
    }
    own = times["ktk"]
    for side in sides:
        mine = times[side.name]
        output, gradient = (
            relative_l2(a.float(), b.float())
            for a, b in zip(found[side.name], found[exact.name], strict=True)
        )
        cell["sides"][side.name] = {
            "forward_s": [round(ahead, 5) for ahead, _ in mine],
            "backward_s": [round(back, 5) for _, back in mine],
            "gops": vars(spread(2 * operations(shape, tokens) / sum(pair) / 1e9 for pair in mine)),
            "ratio": vars(spread(sum(a) / sum(b) for a, b in zip(mine, own, strict=True))),
            "output_error": output,
            "gradient_error": gradient,
        }
    return cell


def table(cells: list[dict[str, Any]]) -> str:
    """All cells, one line a side."""
    head = ("layer", "T", "r", "side", "forward s", "backward s", "GFLOP/s", "time / ktk", "output error")
    rows = [head]
    for cell in cells:
        for name, side in cell["sides"].items():
            ratio = side["ratio"]
            rows.append(
                (
                    f"{cell['shape']} E{cell['experts']}",
                    str(cell["tokens"]),
                    str(cell["rank"]),
                    name,
                    f"{statistics.median(side['forward_s']):.3f}",
                    f"{statistics.median(side['backward_s']):.3f}",
                    f"{side['gops']['median']:.1f}",
                    f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                    f"{side['output_error']:.1e}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def run(options: argparse.Namespace) -> dict[str, Any]:
    threads = options.threads or default_threads()
    torch.set_num_threads(threads)
    machine = json.loads(_native.machine_json())
    dtypes = options.dtypes.split(",")
    if not dtypes or any(name not in DTYPES for name in dtypes):
        raise SystemExit(
            f"--dtypes must be {' or '.join(DTYPES)} with commas between them, got {options.dtypes!r}"
        )
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "ktk": ktk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "cpu_model": machine.get("cpu_model"),
        "threads": threads,
        "clock": "cpu" if options.cpu_time else "wall",
        "rounds": options.rounds,
        "load_average": {"before": list(os.getloadavg())},
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cells": [],
    }
    clock = time.process_time if options.cpu_time else time.perf_counter
    for named in parse_shapes(options.shapes):
        shape = replace(named, num_experts=max(min(named.num_experts, options.experts), named.top_k))
        for tokens in options.tokens.split(","):
            report["cells"].append(
                measure(shape, int(tokens), options.rank, dtypes, options.rounds, threads, clock)
            )
    report["load_average"]["after"] = list(os.getloadavg())
    report["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3", help="names of ktk bench, or HxIxExK")
    parser.add_argument("--experts", type=int, default=EXPERTS, help="of each layer, at most")
    parser.add_argument("--tokens", default="512")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtypes", default="bf16,fp32", help="of the eager sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
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
