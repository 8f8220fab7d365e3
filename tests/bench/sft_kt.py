"""Fine-tuning beside kt-kernel: forward and backward of one layer with adapters, by turns in one run.

    python tests/bench/sft_kt.py --site FOLDER --shapes qwen3 --tokens 4096 --ranks 8 --output kt.json

Both train the same adapters on the same bf16 weights, each in a process of its own that is stopped (SIGSTOP)
while the other works. A round is a forward and a backward of ktk, then of kt-kernel; ratios are taken round
by round, of the sums of both. Before that each side is held against the layer in fp32 in PyTorch on a few
tokens: `errors` are relative L2 errors of the output and of the gradients of the input, of the routing
weights and of one adapter.

kt_sft_bf16 is held against bf16, kt_sft_int8 against int8-g512. kt-kernel 0.7.2 fine-tunes with AMX only; put
its wheel, unpacked, in FOLDER. Its pool gets one thread less than there are CPUs (--kt-threads).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, replace
from typing import IO, Any

import torch
from peers import Failed, Side, add_side_options, answer_requests, begin_report, is_side

from ktk.bench.cases import GaussianWeights, Shape, parse_batches, parse_formats, parse_shapes, routes
from ktk.bench.figures import relative_l2, spread
from ktk.bench.report import save_report
from ktk.runtime import CPUInfer, WorkerPoolConfig
from ktk.sft.native import LORA_NAMES, lora_shapes
from sft import EXPERTS, Layer, eager, gaussian_adapters

SCHEMA = "ktk-bench-sft-kt-1"
ERROR_TOKENS = 32
SCALE = 2.0  # of the adapters: alpha / rank

#: kt-kernel's class, and the ktk format beside it.
PEERS = {"kt_sft_bf16": ("AMXBF16_SFT_MOE", "bf16"), "kt_sft_int8": ("AMXInt8_SFT_MOE", "int8-g512")}


class Step:
    """A batch with a gradient of its output, and where the results go."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
        self.grad = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
        self.ids, self.scores = routes(shape, tokens, seed=tokens)
        self.count = torch.tensor([tokens], dtype=torch.int32)
        self.output, self.grad_x = torch.empty_like(self.x), torch.empty_like(self.x)
        self.grad_scores = torch.empty_like(self.scores)


def stacked(shape: Shape) -> tuple[torch.Tensor, ...]:
    """Gate, up and down of all experts."""
    weights = GaussianWeights(shape)
    matrices = [weights.matrices(expert) for expert in range(shape.num_experts)]
    return tuple(torch.stack(parts) for parts in zip(*matrices, strict=True))


class KtkSide:
    """ktk in a worker."""

    def __init__(self, job: dict[str, Any], shape: Shape) -> None:
        (choice,) = parse_formats(job["format"])
        cpu = CPUInfer(WorkerPoolConfig.from_threads(job["threads"]))
        layer = Layer(shape, choice, GaussianWeights(shape), cpu, None, job["max_tokens"], keep=False)
        self.trainer, lora = layer.trainer(job["rank"])
        self.gradients = {name: torch.zeros_like(tensor) for name, tensor in lora.items()}
        self.note = f"{layer.experts.isa}, {choice.name}, {job['threads']} threads"

    def run(self, step: Step) -> tuple[float, float]:
        """Seconds of a forward and of a backward."""
        began = time.perf_counter()
        _, context = self.trainer.forward(step.x, step.ids, step.scores, policy="save", output=step.output)
        between = time.perf_counter()
        assert context is not None
        step.grad_x, step.grad_scores = context.backward(step.grad, grad_lora=self.gradients)
        return between - began, time.perf_counter() - between


class KtSide:
    """kt-kernel in a worker, through the class behind its wrapper."""

    def __init__(self, job: dict[str, Any], shape: Shape) -> None:
        import kt_kernel

        ext = kt_kernel.kt_kernel_ext
        name = PEERS[job["peer"]][0]
        cls = getattr(ext.moe, name, None)
        if cls is None:
            raise RuntimeError(f"its {kt_kernel.__cpu_variant__} build has no {name}")
        pool = ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [job["threads"]]
        self.infer = ext.CPUInfer(pool)
        sizes = lora_shapes(shape.num_experts, shape.hidden_size, shape.intermediate_size, job["rank"])
        lora = gaussian_adapters(sizes, job["rank"])
        self.gradients = {each: torch.zeros_like(lora[each]) for each in LORA_NAMES}
        self.top_k = shape.top_k
        experts = torch.arange(shape.num_experts)
        weights = stacked(shape)
        self.kept = (lora, experts, weights)
        config = ext.moe.MOESFTConfig(
            shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size
        )
        config.max_len = -(-job["max_tokens"] // 32) * 32
        config.max_cache_depth, config.layer_idx = 1, 0
        config.lora_rank, config.lora_alpha = job["rank"], SCALE * job["rank"]
        config.full_weight_grad, config.authoritative_optimizer_grads = False, True
        config.share_backward_bb, config.share_cache_pool = False, False
        config.physical_to_logical_map = experts.data_ptr()
        for part, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
            setattr(config, part, weight.data_ptr())
        for each, tensor in lora.items():
            setattr(config, each, tensor.data_ptr())
        config.pool = self.infer.backend_
        self.moe = cls(config)
        self.infer.submit(self.moe.load_weights_task())
        self.infer.sync()
        version = f"kt-kernel {kt_kernel.__version__}, {kt_kernel.__cpu_variant__}"
        self.note = f"{version}, {name}, {job['threads']} threads"

    def run(self, step: Step) -> tuple[float, float]:
        """Seconds of a forward and of a backward."""
        began = time.perf_counter()
        tensors = (step.ids, step.scores, step.x, step.output)
        pointers = [tensor.data_ptr() for tensor in tensors]
        self.infer.submit(self.moe.forward_sft_task(step.count.data_ptr(), self.top_k, *pointers, True))
        self.infer.sync()
        between = time.perf_counter()
        adapters = [self.gradients[name].data_ptr() for name in LORA_NAMES]
        outward, inward = step.grad.data_ptr(), step.grad_x.data_ptr()
        self.infer.submit(
            self.moe.backward_task(
                outward, inward, *adapters, step.grad_scores.data_ptr(), 0, 0, 0, False, 1.0
            )
        )
        self.infer.sync()
        return between - began, time.perf_counter() - between


def errors(side: KtkSide | KtSide, shape: Shape, rank: int) -> dict[str, float]:
    """Relative L2 errors against fp32 on the bf16 weights."""
    step = Step(shape, ERROR_TOKENS)
    side.run(step)
    sizes = lora_shapes(shape.num_experts, shape.hidden_size, shape.intermediate_size, rank)
    with torch.enable_grad():
        lora = {
            name: tensor.float().requires_grad_() for name, tensor in gaussian_adapters(sizes, rank).items()
        }
        x, scores = step.x.float().requires_grad_(), step.scores.clone().requires_grad_()
        weights = tuple(weight.float() for weight in stacked(shape))
        output = eager(weights, lora, SCALE, x, step.ids, scores)
        output.backward(step.grad.float())
    pairs = {
        "output": (step.output, output),
        "grad_input": (step.grad_x, x.grad),
        "grad_expert_weights": (step.grad_scores, scores.grad),
        "grad_down_lora_b": (side.gradients["down_lora_b"], lora["down_lora_b"].grad),
    }
    return {name: relative_l2(got.float(), exact.detach()) for name, (got, exact) in pairs.items()}


def serve(job: dict[str, Any], answers: IO[str]) -> None:
    """A side of a comparison of steps."""
    torch.set_num_threads(job["torch_threads"])
    torch.set_grad_enabled(False)
    shape = Shape(*job["shape"])
    steps: dict[int, Step] = {}

    def do(side: KtkSide | KtSide, request: dict[str, Any]) -> dict[str, float]:
        nonlocal steps
        if request["do"] == "errors":
            return errors(side, shape, job["rank"])
        tokens = request["tokens"]
        if tokens not in steps:
            steps = {tokens: Step(shape, tokens)}
        forward, backward = side.run(steps[tokens])
        return {"forward": forward, "backward": backward}

    def build() -> KtkSide | KtSide:
        return (KtSide if job["peer"] else KtkSide)(job, shape)

    answer_requests(build, lambda side: {"note": side.note}, do, answers)


def compare(
    peer: str, shape: Shape, rank: int, batches: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    """All batches of one peer, shape and rank."""
    form = PEERS[peer][1]
    job = {
        "shape": [shape.name, shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k],
        "max_tokens": max(*batches, ERROR_TOKENS),
        "rank": rank,
        "torch_threads": args.threads,
    }
    entry: dict[str, Any] = {"shape": shape.name, "experts": shape.num_experts, "peer": peer, "rank": rank}
    entry |= {"ktk_format": form, "cells": []}
    sides: list[Side] = []
    try:
        # The peer first: without it there is nothing to compare.
        sides.append(Side({**job, "peer": peer, "threads": args.kt_threads}, args.timeout_s, __file__))
        own = {**job, "peer": "", "format": form, "threads": args.threads}
        sides.append(Side(own, args.timeout_s, __file__))
        theirs, ours = sides
        entry |= {"note": theirs.about["note"], "ktk_note": ours.about["note"]}
        if args.errors:
            entry |= {"errors": theirs.ask(do="errors"), "ktk_errors": ours.ask(do="errors")}
        for tokens in batches:
            print(f"{shape.name} {peer}, rank {rank}: {tokens} tokens", file=sys.stderr, flush=True)
            for side in (ours, theirs):
                side.ask(do="time", tokens=tokens)
            times = []
            for _ in range(args.rounds):
                mine, other = (side.ask(do="time", tokens=tokens) for side in (ours, theirs))
                times.append((mine["forward"], mine["backward"], other["forward"], other["backward"]))
            columns = zip(*times, strict=True)
            names = ("ktk_forward_ms", "ktk_backward_ms", "forward_ms", "backward_ms")
            cell: dict[str, Any] = {"tokens": tokens, "rounds": args.rounds}
            cell |= {n: asdict(spread(1e3 * t for t in c)) for n, c in zip(names, columns, strict=True)}
            ratios = [(other + back) / (mine + own_back) for mine, own_back, other, back in times]
            cell["ktk_speed_over_peer"] = asdict(spread(ratios))
            entry["cells"].append(cell)
    except Failed as failure:
        entry["failed"] = str(failure)
    finally:
        for side in sides:
            side.close()
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3,dsv3")
    parser.add_argument("--tokens", default="512,4096")
    parser.add_argument("--ranks", default="8")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--experts", type=int, help="of each layer; default: 128 of qwen3, 16 of dsv3")
    parser.add_argument("--no-errors", dest="errors", action="store_false")
    add_side_options(parser, rounds=5, timeout_s=120.0)
    args = parser.parse_args()
    if is_side(args, serve):
        return 0
    names, report = begin_report(parser, args, PEERS, SCHEMA)
    batches = sorted(parse_batches(args.tokens, "number of tokens"))
    report["layers"] = []
    for named in parse_shapes(args.shapes):
        count = args.experts or EXPERTS.get(named.name, named.num_experts)
        shape = replace(named, num_experts=max(min(named.num_experts, count), named.top_k))
        for name in names:
            for rank in map(int, args.ranks.split(",")):
                entry = compare(name, shape, rank, batches, args)
                report["layers"].append(entry)
                report["load_average"]["after"] = list(os.getloadavg())
                if args.output:
                    save_report(report, args.output)
                about = f"{shape.name:8} {name:12} rank {rank:3}"
                if "failed" in entry:
                    print(f"{about}: {entry['failed']}")
                for cell in entry["cells"]:
                    middle = {key: cell[key]["median"] for key in cell if key.endswith("_ms")}
                    speed = cell["ktk_speed_over_peer"]
                    print(
                        f"{about} {cell['tokens']:5} tokens  kt-kernel {middle['forward_ms']:.1f} + "
                        f"{middle['backward_ms']:.1f} ms, ktk {middle['ktk_forward_ms']:.1f} + "
                        f"{middle['ktk_backward_ms']:.1f} ms: {speed['median']:.2f} times as fast "
                        f"({speed['min']:.2f}-{speed['max']:.2f})",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
