"""CPUInfer and WorkerPoolConfig: threads, order, failures, lifetimes."""

from __future__ import annotations

import gc
import io
import json
import threading
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from ktk import CPUInfer, ForwardTask, WorkerPoolConfig, _native, runtime, show_runtime
from ktk.errors import KtkArgumentError, KtkStateError
from threads import count_threads, no_more_threads_than, settled_threads

# Subpools may have more threads than the machine has CPUs; one test is about that warning.
pytestmark = pytest.mark.filterwarnings("ignore:.* threads for .* CPUs:RuntimeWarning")

MACHINE = json.loads(_native.machine_json())
NODES = [node["id"] for node in MACHINE["nodes"] if node["cpus_allowed"]]
HAS_CUDA_DEVICE = torch.cuda.is_available()


def config(*threads: int, **changes: Any) -> WorkerPoolConfig:
    """Unbound subpools on the first node, which work on any machine."""
    return WorkerPoolConfig(
        subpool_count=len(threads),
        subpool_numa_map=[NODES[0]] * len(threads),
        subpool_thread_count=list(threads),
        **{"bind_threads": False, "spin_ns": 0, **changes},
    )


@pytest.fixture
def cpu() -> Any:
    with CPUInfer(config(2)) as cpu:
        yield cpu


class Layer:
    """A small loaded layer, and tasks on batches for it."""

    def __init__(self, cpu: CPUInfer, tokens: int = 4, loaded: bool = True) -> None:
        rng = np.random.default_rng(3)
        self.moe = _native.Moe(
            cpu.native_pool,
            num_experts=3,
            top_k=2,
            hidden_size=32,
            intermediate_size=48,
            max_tokens=tokens,
            format=_native.FORMAT_INT8,
        )
        for expert in range(3 if loaded else 0):
            gate, up = rng.standard_normal((2, 48, 32), np.float32)
            down = rng.standard_normal((32, 48), np.float32)
            self.moe.pack_expert(
                expert, _native.DTYPE_F32, gate.ctypes.data, up.ctypes.data, down.ctypes.data
            )
        self.count = np.array([tokens], np.int32)
        self.ids = rng.integers(0, 3, (tokens, 2))
        self.weights = rng.random((tokens, 2), np.float32)
        self.input = rng.standard_normal((tokens, 32), np.float32)
        self.output = np.zeros((tokens, 32), np.float32)

    def task(self, incremental: bool = False) -> ForwardTask:
        return ForwardTask(
            moe=self.moe,
            num_tokens_ptr=self.count.ctypes.data,
            top_k=2,
            expert_ids_ptr=self.ids.ctypes.data,
            expert_weights_ptr=self.weights.ctypes.data,
            input_ptr=self.input.ctypes.data,
            input_dtype=_native.DTYPE_F32,
            output_ptr=self.output.ctypes.data,
            output_dtype=_native.DTYPE_F32,
            incremental=incremental,
        )


# Configuration.


@pytest.mark.parametrize(
    ("threads", "nodes", "expected"),
    [
        (1, [0], ([0], [1])),
        (5, [0], ([0], [5])),
        (5, [0, 1], ([0, 1], [3, 2])),
        (8, [0, 2, 5], ([0, 2, 5], [3, 3, 2])),
        (2, [0, 1, 2, 3], ([0, 1], [1, 1])),
    ],
)
def test_threads_are_split_evenly_and_the_first_take_the_remainder(
    threads: int, nodes: list[int], expected: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "nodes_with_cpus", lambda: nodes)
    made = WorkerPoolConfig.from_threads(threads)
    assert (made.subpool_count, made.subpool_numa_map, made.subpool_thread_count) == (
        len(expected[0]),
        *expected,
    )


def test_nodes_without_usable_cpus_get_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"id": 0, "cpus_allowed": []}, {"id": 1, "cpus_allowed": [4, 5]}]
    monkeypatch.setattr(_native, "machine_json", lambda: json.dumps({"nodes": nodes}))
    assert WorkerPoolConfig.from_threads(4).subpool_numa_map == [1]


def test_nodes_that_nobody_names() -> None:
    with WorkerPoolConfig().make_pool() as pool, WorkerPoolConfig(len(NODES)).make_pool() as wide:
        assert (pool.subpool_count, wide.subpool_count) == (1, len(NODES))
    with pytest.raises(
        KtkArgumentError, match=f"{len(NODES) + 1} subpools, but this machine has node {NODES[0]}"
    ):
        WorkerPoolConfig(len(NODES) + 1).make_pool()


def test_fields_may_be_set_one_by_one() -> None:
    made = WorkerPoolConfig()
    made.subpool_count = 2
    made.subpool_numa_map = (NODES[0], NODES[0])
    made.subpool_thread_count = (1, 2)
    made.bind_threads = False
    with CPUInfer(made) as cpu:
        assert (cpu.native_pool.subpool_count, cpu.native_pool.thread_count) == (2, 3)
        assert repr(cpu) == "<CPUInfer: 3 threads in 2 subpools>"
    assert repr(cpu) == "<CPUInfer: closed>"


def test_an_int_is_a_number_of_threads() -> None:
    with CPUInfer(1) as cpu:
        assert cpu.native_pool.thread_count == 1


@pytest.mark.parametrize(
    ("wrong", "error", "pattern"),
    [
        (0, KtkArgumentError, "threads must be at least 1, got 0"),
        (-3, ValueError, "threads must be at least 1, got -3"),
        ("4", TypeError, "threads must be an int, got str"),
        (2.0, TypeError, "threads must be an int, got float"),
        (True, TypeError, "threads must be an int, got bool"),
        (WorkerPoolConfig(subpool_count=0), KtkArgumentError, "subpool_count must be at least 1, got 0"),
        (WorkerPoolConfig(subpool_count="2"), TypeError, "subpool_count must be an int"),  # type: ignore[arg-type]
        (
            WorkerPoolConfig(2, [0], [1, 1]),
            KtkArgumentError,
            "subpool_numa_map has 1 elements; subpool_count = 2 needs 2",
        ),
        (WorkerPoolConfig(1, [0], [1, 1]), KtkArgumentError, "subpool_thread_count has 2 elements"),
        (WorkerPoolConfig(1, [0], [0]), KtkArgumentError, "thread"),
        (WorkerPoolConfig(1, [12345], [1]), KtkArgumentError, "12345"),
    ],
)
def test_wrong_configurations_are_refused(wrong: Any, error: type[Exception], pattern: str) -> None:
    before = settled_threads()
    with pytest.raises(error, match=pattern):
        CPUInfer(wrong)
    assert no_more_threads_than(before)


def test_a_missing_node_names_those_that_exist() -> None:
    with pytest.raises(KtkArgumentError, match=f"node {NODES[0]}"):
        CPUInfer(WorkerPoolConfig(1, [12345], [1]))


def test_more_threads_than_cpus_work_with_one_warning() -> None:
    threads = 4 * MACHINE["cpus_online"] + 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cpu = CPUInfer(WorkerPoolConfig(1, [NODES[0]], [threads]))
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert str(threads) in str(caught[0].message)
    assert caught[0].filename == __file__
    with cpu:
        layer = Layer(cpu)
        cpu.submit(layer.task())
        cpu.sync()
        assert np.any(layer.output)


# Tasks.


def test_forwards_and_callables_share_one_order(cpu: CPUInfer) -> None:
    layer = Layer(cpu)
    seen: list[float] = []
    cpu.submit(lambda: seen.append(float(np.abs(layer.output).sum())))
    cpu.submit(layer.task())
    cpu.submit(lambda: seen.append(float(np.abs(layer.output).sum())))
    cpu.submit(layer.task(incremental=True))
    cpu.submit((seen.append, (-1.0,)))
    cpu.sync()
    assert seen[0] == 0 < seen[1]
    assert seen[2] == -1
    assert float(np.abs(layer.output).sum()) == pytest.approx(2 * seen[1])


def test_the_batch_size_is_read_when_the_task_runs(cpu: CPUInfer) -> None:
    layer = Layer(cpu)
    gate = threading.Event()
    cpu.submit(lambda: gate.wait(10))
    cpu.submit(layer.task())
    layer.count[0] = 2
    gate.set()
    cpu.sync()
    assert np.all(np.any(layer.output[:2], axis=1))
    assert not np.any(layer.output[2:])


def test_sync_leaves_what_it_may(cpu: CPUInfer) -> None:
    gate = threading.Event()
    layer = Layer(cpu)
    cpu.submit(layer.task())
    cpu.submit(lambda: gate.wait(10))
    cpu.sync(allow_n_pending=1)
    assert np.any(layer.output)
    assert cpu.native_queue.pending == 1
    gate.set()
    cpu.sync()


@pytest.mark.parametrize("task", [3, None, "task", (), (print,), (print, [1]), (print, (), {}), (1, (2,))])
def test_what_is_no_task_is_refused(cpu: CPUInfer, task: Any) -> None:
    for call in (cpu.submit, lambda task: cpu.submit_with_cuda_stream(None, task)):
        with pytest.raises(TypeError, match="a task"):
            call(task)
    cpu.sync()


def test_failures_are_raised_once_and_nothing_is_lost(cpu: CPUInfer) -> None:
    layer = Layer(cpu, loaded=False)
    cpu.submit(layer.task())
    with pytest.raises(KtkStateError):
        cpu.sync()
    assert np.all(np.isnan(layer.output))
    cpu.sync()
    error = LookupError("mine")

    def fail() -> None:
        raise error

    cpu.submit(fail)
    with pytest.raises(LookupError) as caught:
        cpu.sync()
    assert caught.value is error
    cpu.sync()


@pytest.mark.skipif(HAS_CUDA_DEVICE, reason="stream 0 is in the order of the host only without a CUDA device")
def test_streams_without_cuda(cpu: CPUInfer) -> None:
    layer = Layer(cpu)
    seen: list[int] = []
    for stream in (None, 0):
        cpu.submit_with_cuda_stream(stream, layer.task())
        cpu.submit_with_cuda_stream(stream, lambda: seen.append(1))
        cpu.submit_with_cuda_stream(stream, (seen.append, (2,)))
        cpu.sync_with_cuda_stream(stream)
    assert seen == [1, 2, 1, 2]
    assert np.any(layer.output)
    cpu.submit_with_cuda_stream(None, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cpu.sync_with_cuda_stream(None)


def test_many_threads_may_submit(cpu: CPUInfer) -> None:
    seen: list[tuple[int, int]] = []

    def submit(worker: int) -> None:
        for index in range(50):
            cpu.submit((seen.append, ((worker, index),)))

    workers = [threading.Thread(target=submit, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    cpu.sync()
    assert len(seen) == 200
    for worker_index in range(4):
        assert [index for worker, index in seen if worker == worker_index] == list(range(50))


# Lifetimes.


def test_closing_twice_is_fine_and_using_it_afterwards_is_not() -> None:
    cpu = CPUInfer(config(1))
    seen: list[int] = []
    cpu.submit((seen.append, (1,)))
    assert not cpu.closed
    cpu.close()
    cpu.close()
    assert seen == [1]
    assert cpu.closed
    calls: list[Any] = [
        lambda: cpu.submit(print),
        cpu.sync,
        lambda: cpu.submit_with_cuda_stream(0, print),
        lambda: cpu.sync_with_cuda_stream(0),
        lambda: cpu.native_pool,
        lambda: cpu.native_queue,
        cpu.__enter__,
    ]
    for call in calls:
        with pytest.raises(KtkStateError, match="this CPUInfer is closed"):
            call()


def test_closing_raises_a_failure_that_nobody_saw() -> None:
    gc.collect()
    before = settled_threads()
    cpu = CPUInfer(config(2))
    cpu.submit(lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        cpu.close()
    assert cpu.closed
    del cpu
    gc.collect()
    assert no_more_threads_than(before)


def test_an_error_in_the_block_comes_with_that_of_a_task() -> None:
    with pytest.raises(KeyError, match="missing") as caught, CPUInfer(config(1)) as cpu:
        cpu.submit(lambda: {}["missing"])
        raise ValueError("in the block")
    contexts = []
    error: BaseException | None = caught.value
    while error is not None:
        contexts.append(type(error))
        error = error.__context__
    assert ValueError in contexts


def test_threads_end_with_the_last_layer() -> None:
    gc.collect()
    before = settled_threads()
    cpu = CPUInfer(config(3))
    layer = Layer(cpu)
    cpu.close()
    assert not layer.moe.closed
    layer.moe.close()
    assert no_more_threads_than(before)


def test_the_collector_frees_everything_in_a_cycle() -> None:
    gc.collect()
    before = settled_threads()
    cpu: Any = CPUInfer(config(2))
    cpu.itself = cpu
    cpu.layer = Layer(cpu)
    cpu.submit(cpu.layer.task())
    cpu.submit(lambda: None)
    gone = weakref.ref(cpu)
    assert count_threads() > before
    del cpu
    gc.collect()
    assert gone() is None
    assert no_more_threads_than(before)


def test_two_of_different_sizes_coexist() -> None:
    with CPUInfer(config(1)) as small, CPUInfer(config(2, 1)) as large:
        first, second = Layer(small), Layer(large)
        for _ in range(5):
            small.submit(first.task())
            large.submit(second.task())
        small.sync()
        large.sync()
        assert first.output.tobytes() == second.output.tobytes()


# What it says about itself.


def test_runtime_info_describes_every_instruction_set() -> None:
    info = runtime.runtime_info()
    assert info["version"] == _native.version()
    assert info["binding"] == _native.binding
    assert list(info["isas"]) == _native.isa_names()
    assert info["default_isa"] == _native.isa_default()
    for isa in info["isas"].values():
        assert isa["runnable"] == (isa["reason"] == "")
        assert set(isa["kernels"]) == (set(runtime.FORMAT_NAMES) if isa["runnable"] else set())
    json.dumps(info)


def test_show_runtime_writes_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = io.StringIO()
    show_runtime(text)
    assert capsys.readouterr().out == ""
    show_runtime()
    assert capsys.readouterr().out == text.getvalue()
    for name in _native.isa_names():
        assert f"  {name}:" in text.getvalue()
