"""`ktk.bench` and ``ktk bench``: the arithmetic, the probes, the report; nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktk import _native
from ktk.bench import cases, figures, measure, probes, report, roofline
from ktk.bench.cases import FormatChoice, GaussianWeights, Shape
from ktk.bench.measure import Batch, Layers, Options
from ktk.cli import main
from ktk.config import FORMATS
from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError
from layers import SLOW_ISAS, runnable_isas

TINY = Shape("96x160x6x2", 96, 160, 6, 2)
MEGABYTE = 1 << 20

# ---- probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", range(_native.FORMAT_FP8 + 1))
def test_product_probes_count_operations_of_all_threads(format: int, isa: str, pool: _native.Pool) -> None:
    with _native.Probe(pool, kind=_native.PROBE_PRODUCT, format=format, isa=isa) as probe:
        names = probe.variants
        assert len(names) == len(set(names)) >= 2
        assert any(name.startswith("tiles") for name in names) == isa.startswith("amx")
        for variant in range(len(names)):
            eight, seconds = probe.run(variant, 8)
            assert seconds > 0
            assert eight > 0 and eight % (8 * pool.thread_count * 16 * 2) == 0
            # Rounded up to a multiple of 8.
            assert probe.run(variant, 9)[0] == probe.run(variant, 16)[0] == 2 * eight


def test_tiles_are_counted_whole(pool: _native.Pool) -> None:
    for format, depth in ((_native.FORMAT_BF16, 32), (_native.FORMAT_INT8, 64)):
        with _native.Probe(pool, kind=_native.PROBE_PRODUCT, format=format, isa="amx_emulated") as probe:
            for variant, name in enumerate(probe.variants):
                if name.startswith("tiles"):
                    # Four products of 16 rows, 16 columns and `depth` each.
                    assert probe.run(variant, 8)[0] == 8 * 2 * (4 * 2 * 16 * 16 * depth)


@pytest.mark.parametrize("kind", [_native.PROBE_READ, _native.PROBE_COPY])
def test_memory_probes_go_through_everything(kind: int, isa: str, pool: _native.Pool) -> None:
    # A probe that misses memory raises.
    with _native.Probe(pool, kind=kind, bytes=5 * MEGABYTE, isa=isa) as probe:
        names = probe.variants
        assert len(names) == len(set(names)) == (36 if kind == _native.PROBE_READ else 2)
        for variant in range(len(names)):
            work, seconds = probe.run(variant)
            # Two chunks of 2 MiB for each of two threads.
            assert work == 8 * MEGABYTE * (1 if kind == _native.PROBE_READ else 2)
            assert seconds > 0
        assert probe.run(0, 3)[0] == 3 * probe.run(0, 1)[0]


def test_probes_cover_subpools() -> None:
    nodes = [node["id"] for node in json.loads(_native.machine_json())["nodes"] if node["cpus_allowed"]]
    with _native.Pool([1, 2], [nodes[0]] * 2, bind_threads=False, spin_ns=0) as pool:
        with _native.Probe(pool, kind=_native.PROBE_READ, bytes=MEGABYTE) as probe:
            assert {probe.run(variant)[0] for variant in range(36)} == {6 * MEGABYTE}
        with _native.Probe(pool, kind=_native.PROBE_PRODUCT) as probe:
            work, _ = probe.run(0, 8)
            assert work % 3 == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": 3}, "probe kind 3 is unknown"),
        ({"kind": -1}, "probe kind -1"),
        ({"kind": 0, "format": 4}, "format 4 is unknown"),
        ({"kind": 0, "bytes": 64}, "bytes is 64"),
        ({"kind": 1, "bytes": 0}, "bytes must be positive"),
        ({"kind": 2, "bytes": 2**63}, "bytes must be positive"),
        ({"kind": 1, "bytes": -1}, "bytes must be between 0"),
        ({"kind": 1, "bytes": 1, "format": 1}, "format is 1"),
        ({"kind": 0, "isa": "mmx"}, "unknown instruction set 'mmx'"),
    ],
)
def test_bad_probes_are_refused(arguments: dict[str, Any], message: str, pool: _native.Pool) -> None:
    with pytest.raises(KtkArgumentError, match=message):
        _native.Probe(pool, **arguments)


def test_probes_refuse_bad_runs(pool: _native.Pool) -> None:
    probe = _native.Probe(pool, kind=_native.PROBE_PRODUCT)
    for variant in (-1, len(probe.variants)):
        with pytest.raises(KtkArgumentError, match=f"variant {variant} does not exist"):
            probe.run(variant)
    for repeats in (0, -1, 2**41):
        with pytest.raises(KtkArgumentError, match="repeats must be between 1"):
            probe.run(0, repeats)
    with pytest.raises(TypeError, match="pool must be"):
        _native.Probe(None, kind=_native.PROBE_PRODUCT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="isa must be a str"):
        _native.Probe(pool, kind=_native.PROBE_PRODUCT, isa=b"avx2")  # type: ignore[arg-type]
    probe.close()
    assert probe.closed
    with pytest.raises(KtkStateError, match="this Probe is closed"):
        probe.run(0)


def test_a_probe_keeps_its_pool() -> None:
    pool = _native.Pool([1], bind_threads=False, spin_ns=0)
    probe = _native.Probe(pool, kind=_native.PROBE_PRODUCT)
    with pytest.raises(KtkStateError, match="probes still use the pool"):
        pool.close()
    probe.close()
    pool.close()


def test_the_chosen_variant_is_the_best_one(pool: _native.Pool) -> None:
    with probes.PeakProbe(pool, "int8", run_s=0.0005) as probe:
        assert probe.name == probe.names[int(np.argmax(probe.best_of_variant))]
        assert all(rate > 0 for rate in probe.best_of_variant)
        assert probe.rate() > 0
    with probes.CopyProbe(pool, bytes=MEGABYTE, run_s=0.0005) as copy:
        assert copy.rate() > 0


def test_a_variant_that_was_disturbed_is_chosen_later() -> None:
    class Loops:
        """Two loops of 1 and 2 operations a second; other processes hold up the faster one at first."""

        variants = ("slow", "fast")
        now = 0.0
        disturbed = True

        def run(self, variant: int, count: int) -> tuple[float, float]:
            seconds = 1e-3 * count
            self.now += seconds
            return seconds * (2.0 if variant == 1 and not self.disturbed else 1.0 - 0.5 * variant), seconds

    loops = Loops()
    probe = probes._Probe(loops, 0.1, lambda: loops.now)  # type: ignore[arg-type]
    assert (probe.name, probe.rate()) == ("slow", pytest.approx(1.0))
    assert probe.rate() == pytest.approx(1.0) and probe.name == "slow"
    loops.disturbed = False
    rates = [probe.rate() for _ in range(3)]
    assert probe.name == "fast" and rates[-1] == pytest.approx(2.0)
    # One that is slow for a while stays: what counts is the best it has shown.
    loops.disturbed = True
    assert [probe.rate() for _ in range(3)] == pytest.approx([0.5] * 3) and probe.name == "fast"


def test_last_level_caches_are_added_up(tmp_path: Path) -> None:
    def cache(cpu: int, index: int, level: int, size: str, shared: str) -> None:
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(text + "\n")

    assert probes.last_level_cache_bytes(str(tmp_path)) == 0
    for cpu in range(4):
        cache(cpu, 0, 1, "32K", str(cpu))
        cache(cpu, 3, 3, "16384K", "0-1" if cpu < 2 else "2-3")
    assert probes.last_level_cache_bytes(str(tmp_path)) == 2 * 16 * MEGABYTE
    (tmp_path / "sys/devices/system/cpu/cpu0/cache/index3/size").write_text("what")
    assert probes.last_level_cache_bytes(str(tmp_path)) == 2 * 16 * MEGABYTE
    assert probes.footprint_of_machine() >= 512 * MEGABYTE


# ---- cases ---------------------------------------------------------------------------------------


def test_shapes_by_name_and_by_size() -> None:
    assert [shape.name for shape in cases.parse_shapes("qwen3, dsv3,qwen3")] == ["qwen3", "dsv3"]
    assert cases.parse_shapes("96x160x6x2") == [TINY]
    assert cases.SHAPES["dsv3"].weights_of_expert == 3 * 7168 * 2048
    assert cases.SHAPES["dsv3"].fitting(40).num_experts == 40
    assert cases.SHAPES["dsv3"].fitting(3).num_experts == 8
    assert cases.SHAPES["dsv3"].fitting(1000).num_experts == 256


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (cases.parse_shapes, "gpt", "unknown shape 'gpt'; valid shapes: dsv3"),
        (cases.parse_shapes, "", "a shape is missing"),
        (cases.parse_shapes, "0x160x6x2", "H of shape"),
        (cases.parse_shapes, "96x160x6x7", "K of shape .* between 1 and 6, got 7"),
        (cases.parse_formats, "bf16,int3", "unknown format 'int3'; valid formats: bf16, int8-g512"),
        (
            cases.parse_formats,
            "bf16-plain",
            "unknown format 'bf16-plain'.*names of int8 and int4 also with -plain",
        ),
        (cases.parse_formats, "bf16,,int8", "a format is missing"),
        (cases.parse_batches, "1,x", "a batch must be a number of at least 1, got 'x'"),
        (cases.parse_batches, "0", "got '0'"),
        (cases.parse_batches, "99999999999", "batch must be"),
    ],
)
def test_bad_lists_are_refused(parse: Any, text: str, message: str) -> None:
    with pytest.raises(KtkArgumentError, match=message):
        parse(text)


def test_formats_are_those_of_the_library() -> None:
    choices = cases.parse_formats("bf16,int8-row,int4-g128,int4-g64,int4-g32,int4-row")
    assert [(choice.format, choice.group_size) for choice in choices] == [
        ("bf16", 0),
        ("int8", 0),
        ("int4", 128),
        ("int4", 64),
        ("int4", 32),
        ("int4", 0),
    ]
    assert [choice.code for choice in choices[:3]] == [0, 1, 2]
    defaults = cases.parse_formats("int8,int4,int4-g32")
    assert [(choice.format, choice.group_size) for choice in defaults] == [
        (name, FORMATS[name].default_group_size) for name in ("int8", "int4")
    ]
    every = {(info.name, group) for info in FORMATS.values() for group in info.group_sizes}
    assert {(choice.format, choice.group_size) for choice in cases.FORMAT_CHOICES.values()} == every
    for choice in cases.FORMAT_CHOICES.values():
        assert choice.rotated == (choice.format in ("int8", "int4"))
    plain = cases.parse_formats("int8-g128-plain,int8-plain,int4-row-plain,int8-g512-plain,int8")
    assert [(choice.name, choice.group_size, choice.rotated) for choice in plain] == [
        ("int8-g128-plain", 128, False),
        ("int8-g512-plain", 512, False),
        ("int4-row-plain", 0, False),
        ("int8-g512", 512, True),
    ]


def test_weights_have_unit_gain_and_differ() -> None:
    shape = Shape("s", 256, 128, 3, 1)
    weights = GaussianWeights(shape)
    gate, up, down = weights.matrices(0)
    assert gate.shape == up.shape == (128, 256) and down.shape == (256, 128)
    for matrix, columns in ((gate, 256), (up, 256), (down, 128)):
        assert matrix.is_contiguous() and matrix.dtype == torch.bfloat16
        assert abs(float(matrix.float().std()) * columns**0.5 - 1) < 0.02
    assert not torch.equal(gate, up) and not torch.equal(gate, weights.matrices(1)[0])
    assert torch.equal(gate, GaussianWeights(shape).matrices(0)[0])


@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_routings_have_the_same_rows(tokens: int) -> None:
    shape = Shape("s", 8, 8, 12, 3)
    for skewed in (False, True):
        ids, weights = cases.routes(shape, tokens, 5, skewed=skewed)
        assert ids.shape == weights.shape == (tokens, 3)
        assert ids.dtype == torch.int64 and weights.dtype == torch.float32
        assert all(len(set(row)) == 3 for row in ids.tolist())
        assert int(ids.min()) >= 0 and int(ids.max()) < 12
        torch.testing.assert_close(weights.sum(1), torch.ones(tokens))
        if skewed:
            assert int((ids == 0).sum()) == -(-tokens // 4)
    again, _ = cases.routes(shape, tokens, 5)
    assert torch.equal(again, cases.routes(shape, tokens, 5)[0])


# ---- figures -------------------------------------------------------------------------------------


def test_the_bound_is_the_larger_of_two_times() -> None:
    assert figures.operations(TINY, 5) == 2 * 3 * 96 * 160 * 5 * 2
    assert figures.activation_bytes(TINY, 5) == 5 * 96 * 4
    assert figures.bound_of(100, 10, 10, 10) == figures.Bound(10.0, "operations")
    assert figures.bound_of(100, 10, 1000, 10) == figures.Bound(1.0, "bytes")
    assert figures.bound_of(10, 10, 10, 10).limit == "operations"


def test_spreads() -> None:
    assert figures.spread([3.0, 1.0, 2.0, 10.0]) == figures.Spread(1.0, 2.5, 10.0)
    assert figures.Spread(1.0, 2.0, 3.0).scaled(2) == figures.Spread(2.0, 4.0, 6.0)
    with pytest.raises(ValueError, match="nothing was measured"):
        figures.spread([])
    assert figures.between([1.0, 3.0, 7.0]) == [2.0, 5.0]
    exact = torch.tensor([3.0, 4.0])
    assert figures.relative_l2(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)


def test_the_reference_is_what_the_layer_approximates(pool: _native.Pool) -> None:
    weights, batch = GaussianWeights(TINY), Batch(TINY, 16)
    exact = measure.reference(TINY, weights, batch)
    ids, scores = batch.routes[0]
    token = 3
    expected = torch.zeros(TINY.hidden_size, dtype=torch.float64)
    for expert, score in zip(ids[token].tolist(), scores[token].tolist(), strict=True):
        gate, up, down = (matrix.double() for matrix in weights.matrices(expert))
        x = batch.input[token].double()
        gated = gate @ x
        expected += score * (down @ (gated / (1 + torch.exp(-gated)) * (up @ x)))
    torch.testing.assert_close(exact[token].double(), expected, rtol=1e-4, atol=1e-5)
    for name, most in (("bf16", 0.005), ("int8", 0.05)):
        choice = FormatChoice(name, name, 0)
        with Layers(pool, TINY, choice, weights, 16, 1) as layers:
            batch.forward(layers.moes[0], 0)
        assert figures.relative_l2(batch.output, exact) < most


def test_packed_bytes_count_weights_scales_and_factors(pool: _native.Pool) -> None:
    shape = Shape("s", 64, 128, 2, 1)
    weights, scales = 3 * 64 * 128, 4 * (128 + 128 + 64)
    for choice, size in zip(
        cases.parse_formats("bf16,int8-row,int4-g32"),
        (2 * weights, weights + scales, weights // 2 + weights // 32 * 2 + scales),
        strict=True,
    ):
        with Layers(pool, shape, choice, GaussianWeights(shape), 1, 2) as layers:
            assert layers.expert_bytes == size
            assert len(layers.moes) == 2


# ---- a run ---------------------------------------------------------------------------------------

FAST = {
    "rounds": 2,
    "cell_s": 0.0005,
    "memory_bytes": 64 * MEGABYTE,
    "footprint_bytes": 2 * MEGABYTE,
    "threads": [2],
}


def tiny_run(**changes: Any) -> dict[str, Any]:
    settings = {
        "shapes": [TINY],
        "formats": cases.parse_formats("bf16,int4-g32"),
        "batches": [8, 1],
        **FAST,
        **changes,
    }
    return measure.run(Options(**settings))


def check_spread(found: dict[str, float]) -> None:
    assert set(found) == {"min", "median", "max"}
    assert 0 < found["min"] <= found["median"] <= found["max"]


def test_a_report_holds_what_the_documentation_lists() -> None:
    seen: list[int] = []
    parts: list[int] = []
    settings = Options(shapes=[TINY], formats=cases.parse_formats("bf16,int4-g32"), batches=[8, 1], **FAST)
    found = measure.run(
        settings,
        progress=lambda done, total, what: seen.append(done) if total == 4 and what else None,
        on_part=lambda so_far: parts.append(len(so_far["cells"])),
    )
    assert parts == [2, 4]
    assert [done for done in seen if done] == [1, 2, 3, 4]
    assert json.loads(json.dumps(found)) == found
    assert found["schema"] == "ktk-bench-1"
    assert found["isa"] == _native.isa_default()
    assert {"ktk", "torch", "binding", "began", "ended", "machine", "load_average", "footprint_bytes"} <= set(
        found
    )
    assert len(found["load_average"]["before"]) == len(found["load_average"]["after"]) == 3
    (entry,) = found["probes"]
    assert entry["threads"] == 2
    assert entry["read_gbs"]["chosen"] in entry["read_gbs"]["variants"]
    assert set(entry["peak_gops"]) == {"bf16", "int4"}
    assert [(cell["format"], cell["tokens"]) for cell in found["cells"]] == [
        ("bf16", 1),
        ("bf16", 8),
        ("int4-g32", 1),
        ("int4-g32", 8),
    ]
    for cell in found["cells"]:
        for name in ("ms", "bound_ms", "fraction", "peak_gops", "read_gbs"):
            check_spread(cell[name])
        assert cell["rounds"] == 2 and cell["calls"] >= 2
        assert cell["limit"] in ("operations", "bytes")
        assert cell["operations"] == figures.operations(TINY, cell["tokens"])
        assert cell["experts"] == 6 and cell["layers"] >= 2
        # No forward can beat the best time, nor the bound be above what the best rates give.
        assert cell["fraction_of_best"] > 0
        assert {"route", "quantise", "gate_up", "down"} <= set(cell["stages"]["share_of_forward"])
        assert 0 <= cell["stages"]["outside_products"] <= 1
        assert ("skewed" in cell) == (cell["tokens"] == 8)
        if "skewed" in cell:
            check_spread(cell["skewed"]["time_ratio"])
    assert [entry["format"] for entry in found["errors"]] == ["bf16", "int4-g32"]
    assert 0 < found["errors"][0]["relative_l2"] < 0.005 < found["errors"][1]["relative_l2"] < 0.3
    for entry in found["packing"]:
        check_spread(entry["fraction_of_copy"])


def test_parts_of_a_run_can_be_left_out() -> None:
    found = tiny_run(
        formats=cases.parse_formats("int8"),
        batches=[8],
        skewed=False,
        errors=False,
        packing=False,
        stages=False,
    )
    (cell,) = found["cells"]
    assert "skewed" not in cell and "stages" not in cell
    assert found["errors"] == found["packing"] == []


def test_the_cpu_clock_leaves_out_waiting(pool: _native.Pool) -> None:
    found = tiny_run(formats=cases.parse_formats("int8"), batches=[1], threads=[1], clock="cpu")
    assert found["clock"] == "cpu"
    check_spread(found["cells"][0]["fraction"])
    ticks = iter(range(0, 10**9, 10**6))
    probe = probes.PeakProbe(pool, "int8", run_s=0.0001, clock=lambda: next(ticks))
    work, _ = probe._native.run(probe.chosen, probe._count)
    assert probe.rate() == work / 1e6


def test_a_disturbed_cell_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0.7, 0.4, 0.05, 9.0])
    monkeypatch.setattr(measure._CpuUsage, "others", lambda self: next(used))
    monkeypatch.setattr(measure, "_wait_until_quiet", lambda deadline: None)
    found = tiny_run(formats=cases.parse_formats("int8"), batches=[1], patience_s=100.0, packing=False)
    assert (found["cells"][0]["attempts"], found["cells"][0]["cpus_used_by_others"]) == (3, 0.05)


def test_waiting_for_quiet_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure._CpuUsage, "others", lambda self: 1.0)
    measure._wait_until_quiet(0.0)
    used = iter([1.0, 0.5, 0.0])
    monkeypatch.setattr(measure._CpuUsage, "others", lambda self: next(used))
    measure._wait_until_quiet(float("inf"))
    assert next(used, None) is None


def test_long_forwards_are_left_out_with_a_reason() -> None:
    found = tiny_run(formats=cases.parse_formats("bf16"), batches=[64, 4096], most_call_s=1e-9)
    assert "fraction" in found["cells"][0]
    assert "a forward would take about" in found["cells"][1]["skipped"]
    assert any("would take" in text for row in report.cell_rows(found) for text in row)


@pytest.mark.parametrize("isa", [name for name in runnable_isas() if name not in SLOW_ISAS])
def test_the_instruction_set_is_taken(isa: str) -> None:
    found = tiny_run(formats=cases.parse_formats("int8"), batches=[1], isa=isa)
    assert found["isa"] == isa


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": []}, "shapes is empty"),
        ({"batches": [0]}, "at least 1, got 0"),
        ({"threads": [0]}, "at least 1, got 0"),
        ({"rounds": 0}, "at least 1, got 0"),
        ({"cell_s": 0.0}, "cell_s must be positive, got 0.0"),
        ({"most_call_s": float("nan")}, "most_call_s must be positive"),
        ({"patience_s": -1.0}, "patience_s must not be negative"),
        ({"clock": "sun"}, "clock must be one of wall, cpu, got 'sun'"),
        ({"clock": "cpu", "threads": [2]}, "the cpu clock needs threads to be 1"),
        ({"isa": "mmx"}, "unknown instruction set 'mmx'"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KtkArgumentError, match=message):
        tiny_run(**changes)


def test_an_instruction_set_that_does_not_run_is_refused() -> None:
    missing = [name for name in _native.isa_names() if name not in runnable_isas()]
    if not missing:
        pytest.skip("this CPU runs everything")
    with pytest.raises(KtkUnsupportedError, match=missing[0]):
        tiny_run(isa=missing[0])


# ---- files, tables, pictures ---------------------------------------------------------------------


def cell(tokens: int, threads: int, ms: float, bound_ms: float, **more: Any) -> dict[str, Any]:
    def around(value: float) -> dict[str, float]:
        return {"min": value * 0.9, "median": value, "max": value * 1.1}

    return {
        "shape": "qwen3",
        "format": "int8",
        "threads": threads,
        "tokens": tokens,
        "experts": 128,
        "limit": "bytes",
        "ms": around(ms),
        "bound_ms": around(bound_ms),
        "fraction": around(bound_ms / ms),
        "fraction_of_best": bound_ms / ms,
        "peak_gops": around(500.0),
        "read_gbs": around(40.0),
        **more,
    }


def made_up_report() -> dict[str, Any]:
    return {
        "schema": "ktk-bench-1",
        "machine": {"cpu_model": "a CPU"},
        "isa": "avx2",
        "load_average": {"before": [0.0, 0.0, 0.0]},
        "probes": [{"threads": 1}, {"threads": 4}],
        "cells": [
            cell(1, 1, 8.0, 6.0),
            cell(1, 4, 2.5, 2.0, skewed={"time_ratio": {"min": 1, "median": 1.25, "max": 2}}),
            cell(16, 4, 5.0, 4.0, stages={"outside_products": 0.031}),
        ],
        "errors": [{"shape": "qwen3", "format": "int8", "relative_l2": 0.01234}],
        "packing": [
            {
                "shape": "qwen3",
                "format": "int8",
                "gbs": {"median": 12.34},
                "fraction_of_copy": {"median": 0.5},
            }
        ],
    }


def test_tables() -> None:
    rows = report.cell_rows(made_up_report())
    assert all(len(row) == len(report.CELL_COLUMNS) for row in rows)
    assert rows[0][:6] == ("qwen3 int8, 1 threads", "1", "8.00", "bytes", "75% (68%-82%)", "75%")
    assert rows[1][8] == "1.25" and rows[2][9] == "3.1%"
    assert report.summary_rows(made_up_report()) == [("qwen3 int8", "0.0123", "12.3", "50%")]
    # 8 ms to 2.5 ms, while the bound went from 6 to 2 ms.
    assert report.scaling_rows(made_up_report()) == [("qwen3 int8", "1", "1 to 4", "3.20", "3.00", "1.07")]


def test_files_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.save_report(made_up_report(), path)
    assert report.load_report(path) == made_up_report()
    with pytest.raises(TypeError):
        report.save_report({"schema": object()}, path)
    assert report.load_report(path) == made_up_report()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(OSError):
        report.save_report({}, tmp_path / "nowhere" / "report.json")


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"schema": "else"}'])
def test_foreign_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(text)
    for load in (report.load_report, report.load_peers):
        with pytest.raises(KtkArgumentError, match=r"foreign\.json"):
            load(path)


def made_up_peers() -> dict[str, Any]:
    fraction = {"min": 0.3, "median": 0.4, "max": 0.5}
    return {
        "schema": "ktk-bench-peers-1",
        "cells": [
            {"shape": "qwen3", "peer": "another", "tokens": 1, "fraction": fraction},
            {"shape": "qwen3", "peer": "another", "tokens": 16, "fraction": fraction},
            {"shape": "qwen3", "peer": "broken", "tokens": 16, "failed": "illegal instruction"},
        ],
    }


def test_the_picture_has_a_line_for_each_format_and_peer() -> None:
    pytest.importorskip("matplotlib")
    figure = roofline.draw(made_up_report(), made_up_peers())
    (axes,) = figure.axes
    # The most threads only: two batch sizes.
    solid = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in solid] == [[1, 16]]
    assert list(solid[0].get_ydata()) == pytest.approx([0.8, 0.8])
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[0.4, 0.4]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["int8", "another"]
    with pytest.raises(KtkArgumentError, match="no cells"):
        roofline.draw({**made_up_report(), "cells": []})


# ---- the command ---------------------------------------------------------------------------------

COMMAND = [
    "bench",
    "--shapes",
    "96x160x6x2",
    "--formats",
    "int8",
    "--batches",
    "1,8",
    "--threads",
    "1,2",
    "--rounds",
    "1",
    "--cell-s",
    "0.0005",
    "--memory-gb",
    "0.05",
    "--footprint-gb",
    "0.002",
]


def test_the_command_prints_saves_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    saved, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert main([*COMMAND, "--json", "--save", str(saved), "--roofline", str(picture)]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed == report.load_report(saved)
    assert [entry["threads"] for entry in printed["probes"]] == [1, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")

    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps(made_up_peers()))
    again = tmp_path / "again.png"
    assert main(["bench", "--load", str(saved), "--roofline", str(again), "--peers", str(peers)]) == 0
    out = capsys.readouterr().out
    for word in ("96x160x6x2 int8-g512", "Accuracy and packing", "Scaling", "1 to 2"):
        assert word in out
    assert again.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--shapes", "gpt"], 1, "unknown shape 'gpt'"),
        (["--formats", "int3"], 1, "unknown format 'int3'"),
        (["--batches", "0"], 1, "got '0'"),
        (["--threads", "two"], 1, "a number of threads must be a number"),
        (["--isa", "mmx"], 1, "mmx"),
        (["--rounds", "0"], 2, "--rounds"),
        (["--save", "{tmp}/nowhere/x.json"], 1, "no folder"),
        (["--roofline", "{tmp}/nowhere/x.png"], 1, "no folder"),
        (["--load", "{tmp}/missing.json"], 1, "missing.json"),
        (["--peers", "{tmp}/missing.json"], 1, "--roofline"),
    ],
)
def test_bad_command_lines_are_one_line(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    assert main(["bench", "--quick", *words]) == status
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.out == ""
