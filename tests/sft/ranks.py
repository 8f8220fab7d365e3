"""What each rank of the distributed tests runs: ``python ranks.py CASES RANK WORLD FOLDER``."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ktk.sft import (
    KTConfig,
    failure_guard,
    kt_adapt_peft_lora,
    sync_kt_lora_gradients,
    wrap_moe_layers_with_kt_wrapper,
)
from ktk.sft.modules import moe_layers
from sft.models import batch, draw_adapters, eager, trained, with_peft

TOKENS = {"even": (16, 16), "uneven": (24, 4), "none": (20, 0)}


def model(fused: bool = False) -> Any:
    source = eager("qwen3_moe")
    wrap_moe_layers_with_kt_wrapper(source, KTConfig(num_threads=1, model_max_length=256))
    return with_peft(source, target_parameters=None) if fused else with_peft(source)


def step(found: Any, rank: int, world: int) -> None:
    data = batch(0, rows=2 * world, columns=12)
    mine = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in data.items()}
    found(**mine).loss.backward()


def save(found: Any, path: Path) -> None:
    gradients = {}
    for name, parameter in trained(found).items():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        gradients[name.replace("module.", "")] = (
            gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        )
    if dist.get_rank() == 0:
        torch.save(gradients, path / "gradients.pt")


def ddp(rank: int, world: int, folder: Path) -> None:
    inner = model()
    assert (inner.get_base_model()._kt_wrappers[0] is None) == (rank > 0)
    found = torch.nn.parallel.DistributedDataParallel(inner)
    step(found, rank, world)
    save(found, folder)


def ddp_checkpointed(rank: int, world: int, folder: Path) -> None:
    inner = model(fused=True)
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    found = torch.nn.parallel.DistributedDataParallel(inner)
    step(found, rank, world)
    save(found, folder)


def alone(rank: int, world: int, folder: Path) -> None:
    found = model()
    step(found, rank, world)
    for name, parameter in trained(found).items():
        if "experts" not in name and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world)
    sync_kt_lora_gradients(found)
    save(found, folder)


def fsdp2(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = model(fused=True)
    mesh = init_device_mesh("cpu", (world,))
    for layer in found.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(found, mesh=mesh)
    assert any(hasattr(p, "full_tensor") for name, p in trained(found).items() if "experts" in name)
    step(found, rank, world)
    save(found, folder)


def tokens(rank: int, world: int, folder: Path) -> None:
    """Ranks with different numbers of tokens, in one layer."""
    source = eager("qwen3_moe")
    wrap_moe_layers_with_kt_wrapper(source, KTConfig(num_threads=1, model_max_length=256))
    kt_adapt_peft_lora(source)
    draw_adapters(source)
    experts = moe_layers(source)[0][1].experts
    for name, counts in TOKENS.items():
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(sum(counts), 72, generator=generator)
        ids = torch.randint(6, (sum(counts), 3), generator=generator)
        weights = torch.rand(sum(counts), 3, generator=generator)
        begin = sum(counts[:rank])
        piece = slice(begin, begin + counts[rank])
        mine, w = x[piece].clone().requires_grad_(), weights[piece].clone().requires_grad_()
        output = experts(mine, ids[piece], w)
        (output * output).sum().backward()
        torch.save((output.detach(), mine.grad, w.grad), folder / f"{name}-{rank}.pt")


def wrong_dtype(rank: int, world: int, folder: Path) -> None:
    found = model()
    experts = moe_layers(found)[0][1].core
    x = torch.randn(4, 72, dtype=torch.float64 if rank == 1 else torch.float32)
    experts.run(x, torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, 3), True)


def too_many_tokens(rank: int, world: int, folder: Path) -> None:
    moe_layers(model())[0][1].core.run(
        torch.randn(600, 72), torch.zeros(600, 3, dtype=torch.int64), torch.ones(600, 3), True
    )


def nan_gradient(rank: int, world: int, folder: Path) -> None:
    output = model()(**batch()).logits
    output.backward(torch.full_like(output, torch.nan if rank == 1 else 1.0))


def other_layer(rank: int, world: int, folder: Path) -> None:
    layer = moe_layers(model())[rank][1]
    layer.core.run(torch.randn(4, 72), torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, 3), True)


def elsewhere(rank: int, world: int, folder: Path) -> None:
    """A rank fails outside of the experts, and lives on; the other waits in them."""
    found = model()
    with failure_guard():
        if rank == 1:
            try:
                with failure_guard():
                    raise RuntimeError("no more data")
            except RuntimeError:
                time.sleep(6)
                raise
        found(**batch())


def dies(rank: int, world: int, folder: Path) -> None:
    found = model()
    if rank == 1:
        os._exit(3)
    found(**batch())


def main() -> None:
    cases, rank, world, folder = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    for case in cases:
        place = folder / case
        place.mkdir(exist_ok=True)
        try:
            globals()[case](rank, world, place)
        except Exception as error:  # noqa: BLE001 - the test reads it
            (place / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    if cases[-1] != "dies":
        dist.barrier()
    # At once: what a failed case has left is not to be waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
