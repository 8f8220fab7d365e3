"""Speed of fine-tuning one layer: forward and backward, and where the backward's time goes.

    python tests/bench/sft.py --shape qwen3 --tokens 4096 --rank 8 16 --format bf16 --peak-gflops 9000

Operations are those of the base weights, 6 H I a routed row in each direction; `--peak-gflops` is what the
same threads reach in a loop of products of the instruction that the layer uses, measured in the same minutes.
With `--eager` the same layer runs in PyTorch, expert by expert, with autograd. Times are the least of
`--repeats`, on the wall, or with `--cpu-time` those of the process, for a machine that others use too (one
thread then). The adapters' share counts their own stages; a run with `--rank 0` beside shows all they cost.
Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

import ktk
from ktk.sft.native import TrainableExperts

SHAPES = {
    "qwen3": {"hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8},
    "deepseek-v3": {"hidden": 7168, "intermediate": 2048, "experts": 32, "top_k": 8},
    "awkward": {"hidden": 2880, "intermediate": 1440, "experts": 32, "top_k": 4},
}

#: Stages of a backward that the adapters and the router ask for.
ADAPTER_STAGES = (
    "lora_pack",
    "lora_input",
    "lora_middle",
    "grad_lora_input",
    "grad_lora_middle",
    "grad_lora",
)


def least(repeats: int, clock: Callable[[], float], *steps: Callable[[], Any]) -> list[float]:
    """Least time of each of `steps`, which run in turn."""
    best = [float("inf")] * len(steps)
    for _ in range(repeats + 1):
        for index, step in enumerate(steps):
            begin = clock()
            step()
            best[index] = min(best[index], clock() - begin)
    return best


def eager(
    weights: tuple[torch.Tensor, ...],
    lora: dict[str, torch.Tensor],
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


def measure(options: argparse.Namespace, rank: int, tokens: int) -> dict[str, Any]:
    shape = dict(SHAPES[options.shape])
    shape["experts"] = options.experts or shape["experts"]
    hidden, inner, experts, top_k = (shape[k] for k in ("hidden", "intermediate", "experts", "top_k"))
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        values = torch.empty(sizes, dtype=torch.bfloat16)
        return values.normal_(std=sizes[-1] ** -0.5, generator=generator)

    weights = normal(experts, inner, hidden), normal(experts, inner, hidden), normal(experts, hidden, inner)
    extra = {"group_size": options.group_size} if options.format != "bf16" else {}
    layer = ktk.Experts.from_weights(
        *weights,
        num_experts_per_tok=top_k,
        format=options.format,
        max_tokens=tokens,
        threads=options.threads,
        isa=options.isa,
        **extra,
    )
    trainer = TrainableExperts(layer, lora_rank=rank, lora_alpha=2 * rank if rank else 1.0)
    lora = {name: normal(*sizes) for name, sizes in trainer.lora_shapes().items()} if rank else {}
    if rank:
        trainer.set_lora(lora)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in lora.items()}
    x, grad = normal(tokens, hidden) * hidden**0.5, normal(tokens, hidden)
    scores, ids = torch.rand(tokens, experts, generator=generator).topk(top_k)
    policy = "recompute" if options.recompute else "save"
    context: Any = None

    def forward() -> None:
        nonlocal context
        context = trainer.forward(x, ids, scores, policy=policy)[1]

    def backward() -> None:
        context.backward(grad, grad_lora=gradients)

    clock = time.process_time if options.cpu_time else time.perf_counter
    times = least(options.repeats, clock, forward, backward)
    forward()
    kept = context.nbytes
    with ktk.profile() as trace:
        backward()
    stages = {stage.stage: stage.total_us for stage in trace.summary.stages}
    compute = {
        name: time_us for name, time_us in stages.items() if name not in ("forward", "backward", "wait")
    }
    operations = 6.0 * hidden * inner * tokens * top_k
    result: dict[str, Any] = {
        "shape": options.shape,
        **shape,
        "tokens": tokens,
        "rank": rank,
        "format": options.format,
        "isa": layer.native.isa,
        "policy": policy,
        "forward_ms": round(times[0] * 1e3, 2),
        "backward_ms": round(times[1] * 1e3, 2),
        "gflops": round(2 * operations / sum(times) / 1e9, 1),
        "saved_bytes": kept,
        "adapter_share_of_backward": round(
            sum(compute.get(name, 0.0) for name in ADAPTER_STAGES) / sum(compute.values()), 4
        ),
        "backward_stages_ms": {name: round(time_us / 1e3, 2) for name, time_us in compute.items()},
    }
    if options.peak_gflops:
        result["fraction_of_peak"] = round(result["gflops"] / options.peak_gflops, 3)
    if options.eager:
        for tensor in (x, scores, *lora.values()):
            tensor.requires_grad_()
        total: list[torch.Tensor] = []

        def eager_forward() -> None:
            total[:] = [eager(weights, lora, trainer.lora_scale, x, ids, scores)]

        torch.set_num_threads(options.threads or torch.get_num_threads())
        times = least(1, clock, eager_forward, lambda: total[0].backward(grad))
        result["eager_ms"] = [round(t * 1e3, 2) for t in times]
        result["times_faster_than_eager"] = round(
            sum(times) * 1e3 / (result["forward_ms"] + result["backward_ms"]), 2
        )
    trainer.close()
    layer.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3")
    parser.add_argument("--experts", type=int, help="fewer than the shape has, where memory is short")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rank", type=int, nargs="+", default=[8])
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--peak-gflops", type=float)
    options = parser.parse_args()
    for tokens in options.tokens:
        for rank in options.rank:
            print(json.dumps(measure(options, rank, tokens)), flush=True)


if __name__ == "__main__":
    main()
