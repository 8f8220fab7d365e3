"""Two ranks against one, with the experts on rank 0 only; and what happens when a rank fails.

Over gloo on the CPU, and over NCCL where each rank has a GPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import python_path
from ktk.sft import kt_adapt_peft_lora
from ktk.sft.modules import moe_layers
from sft.models import batch, draw_adapters, eager, trained, with_peft, wrap
from sft.ranks import TOKENS

pytestmark = pytest.mark.any_binding

TESTS = Path(__file__).resolve().parent.parent
FAILURE_LIMIT_S = 30.0

GPUS = torch.cuda.device_count() if torch.cuda.is_available() and dist.is_nccl_available() else 0
BACKENDS = (
    "gloo",
    pytest.param(
        "nccl",
        marks=pytest.mark.skipif(
            GPUS < 2, reason=f"NCCL has one GPU a rank: needs two, PyTorch can use {GPUS} here"
        ),
    ),
)

TOGETHER = (
    "ddp",
    "ddp_checkpointed",
    "ddp_apart",
    "fsdp2",
    "fsdp2_apart",
    "alone",
    "tokens",
    "tokens_in_two_groups",
    "tokens_mixed",
    "wrong_dtype",
    "too_many_tokens",
    "nan_gradient",
    "other_layer",
    "elsewhere",
    # The last, because one rank is gone afterwards.
    "dies",
)


@dataclass(frozen=True)
class Outcome:
    """Where the files of each case are, how each rank ended, and when, in seconds from the first end."""

    folder: Path
    codes: list[int]
    ends_s: list[float]


def run(backend: str, cases: str, folder: Path, world: int = 2) -> Outcome:
    """Run cases in a process for each rank."""
    environment = {**os.environ, "PYTHONPATH": python_path(TESTS), "OMP_NUM_THREADS": "1"}
    program = str(TESTS / "sft" / "ranks.py")
    ends: dict[int, float] = {}
    with (folder / "log").open("wb") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, program, backend, cases, str(rank), str(world), str(folder)],
                env=environment,
                cwd=folder,
                stderr=log,
            )
            for rank in range(world)
        ]
        deadline = time.monotonic() + 240
        try:
            while len(ends) < world and time.monotonic() < deadline:
                ends |= {p.pid: time.monotonic() for p in ranks if p.poll() is not None and p.pid not in ends}
                time.sleep(0.05)
            assert len(ends) == world, "a rank hangs\n" + (folder / "log").read_text()
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    first = min(ends.values())
    return Outcome(
        folder, [process.returncode for process in ranks], [ends[process.pid] - first for process in ranks]
    )


def errors_of(folder: Path) -> list[str]:
    return [
        path.read_text() if path.exists() else "" for path in (folder / f"error-{rank}" for rank in (0, 1))
    ]


@pytest.fixture(scope="module", params=BACKENDS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All cases in one pair of processes: a failure that all ranks know of leaves them usable.

    One pair for all processes of pytest-xdist: the first that comes runs it, and the others wait.
    """
    backend = str(request.param)
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    done = shared / f"ranks-{backend}.json"
    with (shared / f"ranks-{backend}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder = tmp_path_factory.mktemp("ranks")
            found = run(backend, ",".join(TOGETHER), folder)
            done.write_text(json.dumps([str(folder), found.codes, found.ends_s]))
    place, codes, ends_s = json.loads(done.read_text())
    return Outcome(Path(place), codes, ends_s)


@pytest.fixture
def together(outcome: Outcome) -> Path:
    return outcome.folder


def expected_gradients(fused: bool) -> dict[str, torch.Tensor]:
    """Of one process for the mean of the losses that the ranks have."""
    model = wrap(eager("qwen3_moe"))
    adapted = with_peft(model, target_parameters=None) if fused else with_peft(model)
    data = batch(0, rows=4, columns=12)
    for rank in range(2):
        mine = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in data.items()}
        (adapted(**mine).loss / 2).backward()
    return {name: p.grad for name, p in trained(adapted).items() if p.grad is not None}


@pytest.mark.parametrize(
    ("case", "fused"),
    [
        ("ddp", False),
        ("ddp_checkpointed", True),
        ("ddp_apart", True),
        ("fsdp2", True),
        ("fsdp2_apart", True),
        ("alone", False),
    ],
)
def test_gradients_of_two_ranks_are_those_of_one(case: str, fused: bool, together: Path) -> None:
    assert errors_of(together / case) == ["", ""]
    actual = torch.load(together / case / "gradients.pt")
    expected = expected_gradients(fused)
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        # The same products in the same precision; sums over tokens are made in another order.
        assert (actual[name] - wanted).norm() <= 2e-3 * wanted.norm() + 1e-7, name


@pytest.mark.parametrize("case", ["tokens", "tokens_in_two_groups", "tokens_mixed"])
def test_any_number_of_tokens_a_rank(case: str, together: Path) -> None:
    assert errors_of(together / case) == ["", ""]
    model = wrap(eager("qwen3_moe"))
    kt_adapt_peft_lora(model)
    draw_adapters(model)
    experts = moe_layers(model)[0][1].experts
    for name, counts in TOKENS.items():
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(sum(counts), 72, generator=generator).requires_grad_()
        ids = torch.randint(6, (sum(counts), 3), generator=generator)
        weights = torch.rand(sum(counts), 3, generator=generator).requires_grad_()
        output = experts(x, ids, weights)
        (output * output).sum().backward()
        parts = [torch.load(together / case / f"{name}-{rank}.pt") for rank in range(2)]
        assert [len(part[0]) for part in parts] == list(counts)
        for actual, wanted in zip(zip(*parts, strict=True), (output, x.grad, weights.grad), strict=True):
            assert wanted is not None
            assert torch.equal(torch.cat(actual), wanted.detach())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("wrong_dtype", "rank 1: .*torch.float64"),
        ("too_many_tokens", "600 tokens|1200 tokens"),
        ("nan_gradient", "rank 1: .*holds NaN"),
        ("other_layer", "layer differ"),
    ],
)
def test_a_failure_reaches_every_rank(case: str, message: str, together: Path) -> None:
    for error in errors_of(together / case):
        assert error.startswith("KTAMXDistributedError") and re.search(message, error), error


def test_a_failure_elsewhere_ends_the_wait_at_the_experts(together: Path) -> None:
    waiting, failed = errors_of(together / "elsewhere")
    assert waiting.startswith("KTAMXDistributedError") and "rank 1: RuntimeError: no more data" in waiting
    assert failed == "RuntimeError: no more data"


def test_a_rank_that_dies_takes_the_others_down(outcome: Outcome) -> None:
    assert outcome.codes == [0, 3]
    assert "lost another rank" in errors_of(outcome.folder / "dies")[0]
    assert max(outcome.ends_s) < FAILURE_LIMIT_S


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "message"), [("stuck", "no more data"), ("killed", "rank 1 is gone")])
def test_a_failure_ends_ranks_that_wait_outside_of_the_experts(
    case: str, message: str, backend: str, tmp_path: Path
) -> None:
    found = run(backend, case, tmp_path)
    log = (tmp_path / "log").read_text()
    assert found.codes == [1, 3], log
    assert re.search(f"ktk: rank 0 was still within failure_guard.*{message}", log), log
    # The rank that fails in "stuck" lives on for 20 s.
    assert (found.ends_s[0] < found.ends_s[1]) if case == "stuck" else (found.ends_s[0] < FAILURE_LIMIT_S)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_is_done_may_end_before_the_others(backend: str, tmp_path: Path) -> None:
    assert run(backend, "leaves", tmp_path).codes == [0, 0]
    assert errors_of(tmp_path / "leaves") == ["", ""]
    assert all((tmp_path / "leaves" / f"done-{rank}").exists() for rank in range(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_accelerator_under_torchrun(backend: str, tmp_path: Path) -> None:
    """``accelerate launch`` itself starts several processes on GPUs only, or through MPI."""
    # Accelerate has each rank wait on a GPU of its own if there is any.
    cpu_only = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if backend == "gloo" else {}
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(TESTS / "sft" / "launched.py"), backend, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": python_path(TESTS),
            "OMP_NUM_THREADS": "1",
            **cpu_only,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    actual = torch.load(tmp_path / "gradients.pt")
    expected = expected_gradients(False)
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (actual[name] - wanted).norm() <= 2e-3 * wanted.norm() + 1e-7, name
