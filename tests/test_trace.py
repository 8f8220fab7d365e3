"""Traces, the table made from them, and the limit of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ktk
from conftest import FORK_IS_MEANT
from ktk import CPUInfer, ForwardTask, WorkerPoolConfig, _native, profiling, runtime
from ktk.errors import KtkArgumentError, KtkStateError, KtkSystemError

pytestmark = pytest.mark.filterwarnings("ignore:.* threads? for .* CPU:RuntimeWarning")

NODES = [node["id"] for node in json.loads(_native.machine_json())["nodes"] if node["cpus_allowed"]]
COMPUTING = {"route", "quantise", "gate_up", "down"}


def config(*threads: int) -> WorkerPoolConfig:
    return WorkerPoolConfig(len(threads), [NODES[0]] * len(threads), list(threads), bind_threads=False)


class Layer:
    """Four int8 experts, and a batch for them."""

    def __init__(self, cpu: CPUInfer, tokens: int = 5, layer_index: int = 11) -> None:
        rng = np.random.default_rng(1)
        hidden, intermediate, experts = 96, 640, 4
        self.moe = _native.Moe(
            cpu.native_pool,
            num_experts=experts,
            top_k=2,
            hidden_size=hidden,
            intermediate_size=intermediate,
            max_tokens=tokens,
            format=_native.FORMAT_INT8,
            layer_index=layer_index,
        )
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        for expert in range(experts):
            weights = [rng.standard_normal(shape, np.float32) for shape in shapes]
            self.moe.pack_expert(expert, _native.DTYPE_F32, *(matrix.ctypes.data for matrix in weights))
        self.count = np.array([tokens], np.int32)
        self.ids = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :2].copy()
        self.weights = rng.random((tokens, 2), np.float32)
        self.x = rng.standard_normal((tokens, hidden), np.float32)
        self.y = np.empty_like(self.x)

    def task(self) -> ForwardTask:
        pointers = [a.ctypes.data for a in (self.count, self.ids, self.weights, self.x, self.y)]
        count, ids, weights, x, y = pointers
        return ForwardTask(self.moe, count, 2, ids, weights, x, 0, y, 0)

    def forward(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.moe.forward(*self.task()._arguments()[1:])
        return self.y.copy()


@pytest.fixture
def cpu() -> Iterator[CPUInfer]:
    with CPUInfer(config(2)) as cpu:
        yield cpu


def spans(trace: dict[str, Any], stage: str | None = None) -> list[dict[str, Any]]:
    return [
        event
        for event in trace["traceEvents"]
        if event["ph"] == "X" and (stage is None or event["name"] == stage)
    ]


def names_of(trace: dict[str, Any], kind: str) -> dict[tuple[int, int], str]:
    return {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] == f"{kind}_name"
    }


def test_a_forward_leaves_the_spans_of_its_stages(cpu: CPUInfer) -> None:
    layer = Layer(cpu)
    with ktk.profile() as prof:
        for _ in range(3):
            layer.forward()
    trace = prof.events
    assert {span["name"] for span in spans(trace)} - {"wait", "gather"} == {*COMPUTING, "forward"}
    forwards = sorted(spans(trace, "forward"), key=lambda span: span["ts"])
    assert [span["args"] for span in forwards] == [{"units": 5, "layer": 11}] * 3
    for stage, units in (("route", 5), ("quantise", 1), ("gate_up", 4 * 5)):
        assert sum(span["args"]["units"] for span in spans(trace, stage)) == 3 * units
    for span in spans(trace):
        assert span["args"]["layer"] == 11
        inside = [f for f in forwards if f["ts"] <= span["ts"] + 0.01 and span["ts"] <= f["ts"] + f["dur"]]
        assert len(inside) == 1
        assert span["ts"] + span["dur"] <= inside[0]["ts"] + inside[0]["dur"] + 0.01
    workers = {(0, 0), (0, 1)}
    for span in spans(trace):
        assert ((span["pid"], span["tid"]) in workers) == (span["cat"] == "compute")


def test_metadata_names_every_lane(cpu: CPUInfer) -> None:
    layer = Layer(cpu)
    with ktk.profile() as prof:
        cpu.submit(layer.task())
        cpu.submit(lambda: None)
        cpu.sync()
    lanes = names_of(prof.events, "thread")
    assert {(span["pid"], span["tid"]) for span in spans(prof.events)} == lanes.keys()
    (queue_lane,) = (lane for lane, name in lanes.items() if name == "queue")
    for stage in ("forward", "task"):
        assert [(span["pid"], span["tid"]) for span in spans(prof.events, stage)] == [queue_lane]
    assert names_of(prof.events, "process") == {(0, 0): f"subpool 0 (NUMA node {NODES[0]})"}
    about = prof.events["otherData"]
    assert about["clock"] in ("tsc", "CLOCK_MONOTONIC")
    assert about["pools"] == [{"pids": [0], "threads": 2}]
    assert about["dropped_spans"] == 0
    assert about["duration_us"] >= max(span["ts"] + span["dur"] for span in spans(prof.events))


def test_shards_are_processes_and_merge() -> None:
    with CPUInfer(config(1, 2)) as cpu, ktk.profile() as prof:
        Layer(cpu).forward()
    assert {span["pid"] for span in spans(prof.events, "gate_up")} == {0, 1}
    assert spans(prof.events, "merge") and spans(prof.events, "pack")
    assert prof.events["otherData"]["pools"] == [{"pids": [0, 1], "threads": 3}]


def test_table(cpu: CPUInfer) -> None:
    layer = Layer(cpu)
    with ktk.profile() as prof:
        for _ in range(10):
            layer.forward()
    stages = {stage.stage: stage for stage in prof.summary.stages}
    for name in COMPUTING:
        stage = stages[name]
        assert stage.calls == 10
        assert stage.total_us == pytest.approx(stage.mean_us * 10) and stage.total_us > 0
        assert stage.imbalance is not None and 0.99 <= stage.imbalance <= 2.01
    assert stages["route"].imbalance == pytest.approx(2.0)
    assert sum(stage.share or 0.0 for stage in stages.values()) == pytest.approx(1.0)
    assert stages["forward"].share is None and stages["forward"].imbalance is None
    assert stages["forward"].total_us > stages["gate_up"].total_us
    lines = str(prof.summary).splitlines()
    assert lines[0].split() == ["stage", "calls", "total", "ms", "mean", "us", "share", "imbalance"]
    assert len(lines) == len(stages) + 2
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].endswith("ms traced, 0 spans dropped")
    assert str(prof) == str(prof.summary)


def made_up(*events: tuple[str, int, int, float, float, int | None]) -> dict[str, Any]:
    """A trace of one pool with four threads in two subpools: name, pid, tid, ts, dur, section."""
    return {
        "otherData": {"pools": [{"pids": [0, 1], "threads": 4}], "duration_us": 100.0, "dropped_spans": 7},
        "traceEvents": [
            {
                "ph": "X",
                "name": name,
                "cat": "host" if name == "forward" else "compute",
                "pid": pid,
                "tid": tid,
                "ts": ts,
                "dur": dur,
                "args": {"units": 2, **({} if section is None else {"section": section})},
            }
            for name, pid, tid, ts, dur, section in events
        ],
    }


def test_summary_of_known_spans() -> None:
    trace = made_up(
        ("down", 0, 0, 0.0, 10.0, 1),
        ("down", 0, 1, 1.0, 5.0, 1),
        ("down", 1, 0, 2.0, 10.0, 1),
        ("down", 1, 1, 2.0, 5.0, 1),
        ("down", 0, 0, 20.0, 8.0, 2),
        ("route", 0, 0, 13.0, 2.0, None),
        ("route", 0, 0, 15.0, 3.0, None),
        ("forward", 0, 10000, 0.0, 30.0, None),
    )
    summary = profiling.summarise(trace)
    assert [stage.stage for stage in summary.stages] == ["down", "route", "forward"]
    down, route, forward = summary.stages
    assert (down.calls, down.units, down.total_us, down.mean_us) == (2, 10, 12.0 + 8.0, 10.0)
    assert down.imbalance == pytest.approx((10 + 8) / (30 / 4 + 8 / 4))
    assert (route.calls, route.total_us, route.imbalance) == (2, 5.0, 4.0)
    assert (down.share, route.share) == (20 / 25, 5 / 25)
    assert (forward.calls, forward.units, forward.total_us) == (1, 2, 30.0)
    assert (summary.duration_us, summary.dropped_spans) == (100.0, 7)


def test_an_empty_profile() -> None:
    with ktk.profile() as prof:
        pass
    assert prof.summary.stages == ()
    assert "0 spans dropped" in str(prof)


def test_file_is_the_trace(cpu: CPUInfer, tmp_path: Path) -> None:
    path = tmp_path / "a trace.json"
    path.write_text("what was there before")
    layer = Layer(cpu)
    with pytest.raises(LookupError), ktk.profile(path) as prof:
        layer.forward()
        raise LookupError
    assert profiling.load_trace(path) == prof.events
    assert [file.name for file in tmp_path.iterdir()] == ["a trace.json"]


def test_profiles_nest(cpu: CPUInfer) -> None:
    layer = Layer(cpu)
    with ktk.profile() as outer:
        layer.forward()
        with ktk.profile() as inner:
            layer.forward()
        layer.forward()
    assert len(spans(inner.events, "forward")) == 1
    assert len(spans(outer.events, "forward")) == 3


def test_dropped_spans_are_counted(cpu: CPUInfer) -> None:
    layer = Layer(cpu)

    def run() -> None:
        with ktk.profile(spans_per_thread=20) as prof:
            for _ in range(100):
                layer.forward()
        profiles.append(prof)

    # A thread keeps a ring that was once made larger.
    profiles: list[profiling.Profile] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (prof,) = profiles
    assert prof.summary.dropped_spans > 0
    assert 3 <= len(spans(prof.events, "forward")) < 100


def test_profiles_of_many_threads(cpu: CPUInfer) -> None:
    layer = Layer(cpu)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(10):
                with ktk.profile(spans_per_thread=64) as prof:
                    pass
                assert prof.summary.duration_us >= 0
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        layer.forward()
    for thread in threads:
        thread.join()
    assert failures == []


def test_misuse(tmp_path: Path) -> None:
    prof = ktk.profile()
    with pytest.raises(KtkStateError, match="after its with block"):
        prof.events  # noqa: B018
    with prof, pytest.raises(KtkStateError, match="after its with block"):
        prof.summary  # noqa: B018
    with pytest.raises(KtkStateError, match="make a new one"), prof:
        pass
    with pytest.raises(KtkArgumentError, match="there is no folder"):
        ktk.profile(tmp_path / "no" / "trace.json")
    for spans_per_thread in (-1, 2**24):
        with (
            pytest.raises(KtkArgumentError, match="spans_per_thread"),
            ktk.profile(spans_per_thread=spans_per_thread),
        ):
            pass
    with pytest.raises(TypeError), ktk.profile(spans_per_thread="many"):  # type: ignore[arg-type]
        pass
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(KtkSystemError, match="cannot write the trace"), ktk.profile(folder):
        pass
    assert list(tmp_path.iterdir()) == [folder]


def test_native_trace(tmp_path: Path) -> None:
    trace = _native.Trace()
    with pytest.raises(KtkStateError, match="still running"):
        trace.json()
    with pytest.raises(KtkStateError, match="still running"):
        trace.write(str(tmp_path / "trace.json"))
    trace.stop()
    trace.stop()
    assert json.loads(trace.json())["traceEvents"] == []
    trace.close()
    trace.close()
    assert trace.closed
    with pytest.raises(KtkStateError, match="closed"):
        trace.stop()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "nothing", '{"traceEvents": []}', '{"otherData": {"pools": []}}', "\0\xff"]
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(KtkArgumentError, match=r"other\.json is no trace of ktk"):
        profiling.load_trace(path)


# ---- KTK_TRACE -----------------------------------------------------------------------------------------

WORK = """
import os, sys
import ktk
from ktk import _native
cpu = ktk.CPUInfer(ktk.WorkerPoolConfig(1, [NODE], [2], bind_threads=False))
cpu.submit(lambda: None)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FORK_IS_MEANT, "-c", code.replace("NODE", str(NODES[0]))],
        env={**os.environ, "KTK_BINDING": _native.binding, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_environment_variable_traces_the_process(tmp_path: Path) -> None:
    # The task may still be pending at exit; the child of a fork that exits the same way writes nothing.
    forked = """
pid = os.fork()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
    with ktk.profile() as prof:
        cpu.submit(lambda: None)
        cpu.sync()
    assert len(prof.summary.stages) > 0
"""
    result = python(WORK + forked, KTK_TRACE=str(tmp_path / "trace-%p.json"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("trace-") and path.name[6:-5].isdecimal()
    assert len(spans(profiling.load_trace(path), "task")) == 2


def test_environment_variable_that_names_no_place(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "no" / "trace.json"):
        result = python(WORK, KTK_TRACE=str(wrong))
        assert result.returncode == 1
        assert "ImportError: KTK_TRACE names" in result.stderr


# ---- ktk trace -----------------------------------------------------------------------------------------


def written(cpu: CPUInfer, path: Path) -> Path:
    layer = Layer(cpu)
    with ktk.profile(path):
        for _ in range(4):
            cpu.submit(layer.task())
            cpu.sync()
    return path


def test_command_prints_the_table(cpu: CPUInfer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ktk.cli import main

    path = written(cpu, tmp_path / "trace.json")
    assert main(["trace", str(path)]) == 0
    shown = capsys.readouterr().out
    for word in ("trace.json", "gate_up", "imbalance", "forward", "sync"):
        assert word in shown
    assert main(["trace", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    summary = profiling.summarise(profiling.load_trace(path))
    assert [stage["stage"] for stage in report["stages"]] == [stage.stage for stage in summary.stages]
    assert report["stages"][0]["mean_us"] == summary.stages[0].mean_us
    middle = report["duration_us"] / 2e3
    counts = []
    for window in (["--to", str(middle)], ["--from", str(middle)]):
        assert main(["trace", str(path), "--json", *window]) == 0
        part = json.loads(capsys.readouterr().out)
        assert part["duration_us"] == pytest.approx(report["duration_us"] / 2)
        counts.append(sum(stage["calls"] for stage in part["stages"]))
    assert 0 < sum(counts) <= sum(stage["calls"] for stage in report["stages"]) + 8


def test_command_draws_lanes(cpu: CPUInfer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from ktk.cli import main, trace

    path = written(cpu, tmp_path / "trace.json")
    picture = tmp_path / "lanes.png"
    assert main(["trace", str(path), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 200_000
    loaded = profiling.load_trace(path)
    axes = trace.draw(loaded, "title").axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    hosts = [label for label in labels if not label.startswith("worker ")]
    assert labels[: len(hosts)] == hosts and "queue" in hosts and "worker 0" in labels
    capsys.readouterr()
    assert main(["trace", str(path), "--plot", str(picture), "--from", "1e9"]) == 1
    assert "no spans to draw" in capsys.readouterr().err


def test_every_stage_has_a_colour() -> None:
    from ktk.cli.trace import COLOURS

    source = Path(__file__).resolve().parent.parent / "native" / "src" / "runtime" / "trace.cpp"
    table = source.read_text().split("kStages[] = {")[1].split("};")[0]
    names = [line.split('"')[1] for line in table.splitlines() if '"' in line]
    assert list(COLOURS) == names


def test_command_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ktk.cli import main

    assert main(["trace", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    (tmp_path / "some.json").write_text("{}")
    assert main(["trace", str(tmp_path / "some.json")]) == 1
    assert "no trace of ktk" in capsys.readouterr().err


# ---- number of threads ---------------------------------------------------------------------------------


@pytest.fixture
def unlimited() -> Iterator[None]:
    yield
    ktk.set_num_threads(None)


def lanes_at_work(layer: Layer) -> set[tuple[int, int]]:
    layer.forward()
    with ktk.profile() as prof:
        for _ in range(20):
            layer.forward()
    return {(span["pid"], span["tid"]) for span in spans(prof.events) if span["cat"] == "compute"}


@pytest.mark.usefixtures("unlimited")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    with CPUInfer(config(3)) as cpu:
        layer = Layer(cpu)
        expected = layer.forward()
        for number in (1, 2, 3, 1, 7):
            ktk.set_num_threads(number)
            lanes = lanes_at_work(layer)
            assert all(tid < number for _, tid in lanes)
            assert np.array_equal(layer.forward(), expected)
    ktk.set_num_threads(1)
    with CPUInfer(config(2, 1)) as cpu:
        layer = Layer(cpu)
        assert lanes_at_work(layer) == {(0, 0)}
        alone = layer.forward()
        ktk.set_num_threads(None)
        assert np.array_equal(layer.forward(), alone)


@pytest.mark.usefixtures("unlimited")
def test_getting_what_was_set(cpu: CPUInfer) -> None:
    every = ktk.get_num_threads()
    assert every >= max(2, cpu.native_pool.thread_count)
    ktk.set_num_threads(1)
    assert ktk.get_num_threads() == 1
    ktk.set_num_threads(every)
    assert ktk.get_num_threads() == every
    ktk.set_num_threads(1)
    ktk.set_num_threads(None)
    assert ktk.get_num_threads() == every
    for wrong in (0, -1):
        with pytest.raises(KtkArgumentError, match="num_threads must be at least 1"):
            ktk.set_num_threads(wrong)
    for kind in (1.5, "2", True):
        with pytest.raises(TypeError, match="num_threads"):
            ktk.set_num_threads(kind)  # type: ignore[arg-type]
    assert ktk.get_num_threads() == every


def test_default_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KTK_NUM_THREADS", raising=False)
    machine = json.loads(_native.machine_json())
    cores = sum(node["physical_cores"] for node in machine["nodes"])
    assert 1 <= runtime.default_threads() <= max(1, cores)
    with CPUInfer() as cpu:
        assert cpu.native_pool.thread_count == runtime.default_threads()
    monkeypatch.setenv("KTK_NUM_THREADS", "3")
    with CPUInfer() as cpu:
        assert cpu.native_pool.thread_count == 3
    with CPUInfer(1) as cpu:
        assert cpu.native_pool.thread_count == 1
    monkeypatch.setenv("KTK_NUM_THREADS", "")
    assert runtime.default_threads() <= max(1, cores)
    for wrong in ("0", "-2", "two", "1.5"):
        monkeypatch.setenv("KTK_NUM_THREADS", wrong)
        with pytest.raises(KtkArgumentError, match="KTK_NUM_THREADS must be a number of at least 1"):
            CPUInfer()


@pytest.mark.usefixtures("unlimited")
def test_threadpoolctl(cpu: CPUInfer) -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    import ktk.integrations.threadpoolctl

    every = ktk.get_num_threads()
    (info,) = (entry for entry in threadpoolctl.threadpool_info() if entry["user_api"] == "ktk")
    assert info["internal_api"] == "ktk" and info["prefix"] == "libktk"
    assert info["version"] == ktk.__version__
    assert info["num_threads"] == every
    assert Path(info["filepath"]).samefile(ktk.get_library())
    layer = Layer(cpu)
    expected = layer.forward()
    with threadpoolctl.threadpool_limits(limits=1, user_api="ktk"):
        assert ktk.get_num_threads() == 1
        assert lanes_at_work(layer) == {(0, 0)}
        assert np.array_equal(layer.forward(), expected)
        with threadpoolctl.threadpool_limits(limits={"ktk": 2}):
            assert ktk.get_num_threads() == 2 or every == 2
        assert ktk.get_num_threads() == 1
    assert ktk.get_num_threads() == every
