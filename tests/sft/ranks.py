"""What each rank of the distributed tests runs: ``python ranks.py BACKEND CASES RANK WORLD FOLDER``.

With gloo everything is on the CPU. With NCCL each rank has a GPU, where all of the model is but the experts
and their adapters.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ktk.sft import (
    KTConfig,
    Transport,
    failure_guard,
    get_kt_trainable_params,
    hidden_kt_parameters,
    kt_adapt_peft_lora,
    move_non_experts_to_gpu,
    sync_kt_lora_gradients,
    wrap_moe_layers_with_kt_wrapper,
)
from ktk.sft.failure import GRACE_S
from ktk.sft.modules import moe_layers
from sft.models import batch, draw_adapters, eager, trained, with_peft

TOKENS = {"even": (16, 16), "uneven": (24, 4), "none": (20, 0)}
CPU = torch.device("cpu")


class Here:
    """Where this rank's part of the model is."""

    device = CPU


def model(fused: bool = False) -> Any:
    source = eager("qwen3_moe")
    wrap_moe_layers_with_kt_wrapper(source, KTConfig(num_threads=1, model_max_length=256))
    found = with_peft(source, target_parameters=None) if fused else with_peft(source)
    if Here.device != CPU:
        move_non_experts_to_gpu(found, device=Here.device)
    assert {p.device for p in get_kt_trainable_params(found)} == {CPU}
    return found


def step(found: Any, rank: int, world: int, device: torch.device | None = None) -> None:
    data = batch(0, rows=2 * world, columns=12, device=device or Here.device)
    mine = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in data.items()}
    found(**mine).loss.backward()


def save(found: Any, path: Path) -> None:
    gradients = {}
    for name, parameter in trained(found).items():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        gradients[name.replace("module.", "")] = (
            gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        ).cpu()
    if dist.get_rank() == 0:
        torch.save(gradients, path / "gradients.pt")


def ddp(rank: int, world: int, folder: Path) -> None:
    """All parameters on one device, as DDP wants them."""
    inner = model()
    assert (inner.get_base_model()._kt_wrappers[0] is None) == (rank > 0)
    inner.to(Here.device)
    found = torch.nn.parallel.DistributedDataParallel(inner)
    step(found, rank, world)
    save(found, folder)


def ddp_checkpointed(rank: int, world: int, folder: Path) -> None:
    inner = model(fused=True).to(Here.device)
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    found = torch.nn.parallel.DistributedDataParallel(inner)
    step(found, rank, world)
    save(found, folder)


def ddp_apart(rank: int, world: int, folder: Path) -> None:
    """Adapters in CPU memory, which DDP does not see."""
    inner = model(fused=True)
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    names = [name for name, _ in inner.named_parameters()]
    with hidden_kt_parameters(inner):
        assert not any("experts" in name for name in trained(inner))
        found = torch.nn.parallel.DistributedDataParallel(inner)
    assert [name for name, _ in inner.named_parameters()] == names
    step(found, rank, world)
    sync_kt_lora_gradients(found)
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
    """FSDP2 moves adapters to where everything else is, and shards them."""
    found = _sharded(world, set())
    assert all(hasattr(p, "full_tensor") for name, p in trained(found).items() if "experts" in name)
    step(found, rank, world)
    save(found, folder)


def fsdp2_apart(rank: int, world: int, folder: Path) -> None:
    """Adapters in CPU memory, which FSDP2 does not see."""
    found = _sharded(world, None)
    assert not any(hasattr(p, "full_tensor") for name, p in trained(found).items() if "experts" in name)
    step(found, rank, world)
    sync_kt_lora_gradients(found)
    save(found, folder)


def _sharded(world: int, ignored: set[torch.nn.Parameter] | None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = model(fused=True)
    mesh = init_device_mesh(Here.device.type, (world,))
    if ignored is None:
        ignored = set(get_kt_trainable_params(found))
    for layer in found.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(found, mesh=mesh, ignored_params=ignored)
    return found


def tokens(rank: int, world: int, folder: Path) -> None:
    """Ranks with different numbers of tokens, in one layer."""
    _tokens(rank, folder, None)


def tokens_in_two_groups(rank: int, world: int, folder: Path) -> None:
    """Tensors in a group of their own, as over NCCL, on the CPU."""
    _tokens(rank, folder, Transport(bulk="gloo"))


def tokens_mixed(rank: int, world: int, folder: Path) -> None:
    """One rank's tensors are elsewhere than the other's."""
    _tokens(rank, folder, None, CPU if rank == 1 else Here.device)


def _tokens(rank: int, folder: Path, transport: Transport | None, device: torch.device | None = None) -> None:
    device = device or (Here.device if transport is None else CPU)
    source = eager("qwen3_moe")
    wrap_moe_layers_with_kt_wrapper(source, KTConfig(num_threads=1, model_max_length=256))
    kt_adapt_peft_lora(source)
    draw_adapters(source)
    experts = moe_layers(source)[0][1].experts
    if transport is not None:
        experts.core.runner.transport = transport
    for name, counts in TOKENS.items():
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(sum(counts), 72, generator=generator)
        ids = torch.randint(6, (sum(counts), 3), generator=generator)
        weights = torch.rand(sum(counts), 3, generator=generator)
        begin = sum(counts[:rank])
        piece = slice(begin, begin + counts[rank])
        mine = x[piece].to(device, copy=True).requires_grad_()
        w = weights[piece].to(device, copy=True).requires_grad_()
        output = experts(mine, ids[piece].to(device), w)
        (output * output).sum().backward()
        assert mine.grad is not None and w.grad is not None
        torch.save((output.detach().cpu(), mine.grad.cpu(), w.grad.cpu()), folder / f"{name}-{rank}.pt")


def wrong_dtype(rank: int, world: int, folder: Path) -> None:
    found = model()
    experts = moe_layers(found)[0][1].core
    experts.run(*_inputs(4, torch.float64 if rank == 1 else torch.float32), True)


def _inputs(
    tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, ids = torch.randn(tokens, 72, dtype=dtype), torch.zeros(tokens, 3, dtype=torch.int64)
    return x.to(Here.device), ids.to(Here.device), torch.ones(tokens, 3, device=Here.device)


def too_many_tokens(rank: int, world: int, folder: Path) -> None:
    moe_layers(model())[0][1].core.run(*_inputs(600), True)


def nan_gradient(rank: int, world: int, folder: Path) -> None:
    output = model()(**batch(device=Here.device)).logits
    output.backward(torch.full_like(output, torch.nan if rank == 1 else 1.0))


def other_layer(rank: int, world: int, folder: Path) -> None:
    layer = moe_layers(model())[rank][1]
    layer.core.run(*_inputs(4), True)


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
        found(**batch(device=Here.device))


def dies(rank: int, world: int, folder: Path) -> None:
    found = model()
    if rank == 1:
        os._exit(3)
    found(**batch(device=Here.device))


def stuck(rank: int, world: int, folder: Path) -> None:
    """A rank fails, and lives on; the other waits for it in a collective that has nothing to do with ktk."""
    _kept.append(model())
    data = torch.ones(1, device=Here.device)
    dist.all_reduce(data)
    if rank == 0:
        with failure_guard():
            dist.all_reduce(data)
            data.item()
    with suppress(RuntimeError), failure_guard():
        raise RuntimeError("no more data")
    time.sleep(20)
    os._exit(3)


def killed(rank: int, world: int, folder: Path) -> None:
    """A rank ends without a word; the other does not notice where it waits."""
    _kept.append(model())
    data = torch.ones(1, device=Here.device)
    dist.all_reduce(data)
    with failure_guard():
        if rank == 1:
            time.sleep(1)
            os._exit(3)
        if Here.device == CPU:
            # Collectives of gloo notice by themselves.
            time.sleep(60)
        dist.all_reduce(data)
        data.item()


def leaves(rank: int, world: int, folder: Path) -> None:
    """A rank is done and ends; the other has still something to do."""
    _kept.append(model())
    with failure_guard():
        data = torch.ones(1, device=Here.device)
        dist.all_reduce(data)
        data.item()
        if rank == 0:
            time.sleep(GRACE_S + 3)
    (folder / f"done-{rank}").touch()


# A model whose last reference goes takes what watches the ranks with it.
_kept: list[Any] = []
# After these not both ranks are there.
ENDING = ("dies", "stuck", "killed", "leaves")


def main() -> None:
    backend, cases = sys.argv[1], sys.argv[2].split(",")
    rank, world, folder = int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
    torch.set_num_threads(1)
    if backend == "nccl":
        Here.device = torch.device("cuda", rank)
        torch.cuda.set_device(Here.device)
    dist.init_process_group(
        backend,
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
    if cases[-1] not in ENDING:
        dist.barrier()
    # At once: what a failed case has left is not to be waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
