"""``ktk bench``: how close a layer comes to what the machine can do."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ktk.cli import options as shared
from ktk.errors import KtkArgumentError

__all__ = ["bench"]

QUICK = {"shapes": "qwen3", "formats": "bf16,int8,int4", "batches": "1,16,256"}
FULL = {
    "shapes": "dsv3,qwen3,mixtral,awkward",
    "formats": "bf16,int8-g512,int8-g128-plain,int8-row,int4-g128,int4-g32,int4-row",
    "batches": "1,4,16,64,256,1024,4096",
}
GIGA = 10**9


def bench(
    shapes: Annotated[
        str | None,
        typer.Option(help="dsv3, qwen3, mixtral, awkward, or HxIxExK; with commas.", show_default="all"),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="bf16, int8-g512, int8-row, int4-g32 ..., -plain: not rotated; with commas."),
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="Tokens of a forward, with commas.", show_default="1 to 4096")
    ] = None,
    isa: shared.Isa = None,
    threads: Annotated[
        str | None,
        typer.Option(help="Threads; several with commas, for scaling.", show_default="physical cores"),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Most experts of a layer. Default: as memory holds in bf16.")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.001, help="For packed weights. Default: half of what is free.")
    ] = None,
    footprint_gb: Annotated[
        float | None,
        typer.Option(min=0.001, help="Weights to rotate through. Default: 8 times the last-level cache."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Pairs of probes and forwards.")] = None,
    cell_s: Annotated[
        float | None, typer.Option(min=0.0001, help="Seconds of forwards in one cell, about.")
    ] = None,
    max_cell_s: Annotated[float, typer.Option(min=0.0001, help="Seconds after which a cell ends.")] = 10.0,
    max_call_s: Annotated[
        float, typer.Option(min=0.0001, help="Leave out forwards that take longer.")
    ] = 30.0,
    patience_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds a cell may wait for others to leave the CPUs alone.")
    ] = 0.0,
    clock: Annotated[
        str, typer.Option(help="wall, or with one thread cpu, for a machine that others use too.")
    ] = "wall",
    skewed: Annotated[bool, typer.Option(help="Also with a quarter of the tokens at one expert.")] = True,
    errors: Annotated[bool, typer.Option(help="Also the error against float32.")] = True,
    packing: Annotated[bool, typer.Option(help="Also the speed of packing.")] = True,
    stages: Annotated[bool, typer.Option(help="Also the shares of the stages.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, three formats, three batches.")] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report here, anew after each format of a shape."),
    ] = None,
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show a saved report; measure nothing.")
    ] = None,
    roofline: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw fractions of the bound against B.")
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Other libraries, for --roofline (tests/bench).")
    ] = None,
    json: shared.Json = False,
) -> None:
    """Measure forwards against the machine's own peaks, taken by turns on the same threads."""
    from ktk.bench.report import load_peers, load_report, save_report

    if peers is not None and roofline is None:
        raise KtkArgumentError("--peers are for the picture; name one with --roofline")
    for path in (save, roofline):
        if path is not None and not path.absolute().parent.is_dir():
            raise KtkArgumentError(f"there is no folder {path.absolute().parent}")
    others = None if peers is None else load_peers(peers)
    if load is not None:
        report = load_report(load)
    else:
        report = _measure(
            quick,
            {
                "shapes": shapes,
                "formats": formats,
                "batches": batches,
                "threads": threads,
            },
            {
                "isa": isa,
                "num_experts": experts,
                "memory_bytes": None if memory_gb is None else round(memory_gb * GIGA),
                "footprint_bytes": None if footprint_gb is None else round(footprint_gb * GIGA),
                "rounds": rounds if rounds is not None else 3 if quick else 7,
                "cell_s": cell_s if cell_s is not None else 0.2 if quick else 0.5,
                "most_cell_s": max_cell_s,
                "most_call_s": max_call_s,
                "patience_s": patience_s,
                "clock": clock,
                "skewed": skewed,
                "errors": errors,
                "packing": packing,
                "stages": stages,
            },
            save,
        )
    if save is not None:
        save_report(report, save)
    if roofline is not None:
        from ktk.bench.roofline import draw

        draw(report, others).savefig(roofline, dpi=100, pil_kwargs={"optimize": True})
    if json:
        sys.stdout.write(json_module.dumps(report, indent=1) + "\n")
    else:
        _show(report)


def _measure(
    quick: bool, lists: dict[str, str | None], settings: dict[str, Any], save: Path | None
) -> dict[str, Any]:
    from ktk.bench.cases import parse_batches, parse_formats, parse_shapes
    from ktk.bench.measure import Options, run
    from ktk.bench.report import save_report

    preset = QUICK if quick else FULL
    chosen = {name: lists[name] if lists[name] is not None else preset[name] for name in preset}
    threads = lists["threads"]
    options = Options(
        shapes=parse_shapes(chosen["shapes"] or ""),
        formats=parse_formats(chosen["formats"] or ""),
        batches=parse_batches(chosen["batches"] or ""),
        threads=None if threads is None else parse_batches(threads, "number of threads"),
        **settings,
    )
    with _progress() as progress:
        return run(
            options,
            progress=progress,
            on_part=None if save is None else lambda report: save_report(report, save),
        )


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, total=total, description=what)
            if done:
                bar.update(task, completed=done)

        yield update


def _show(report: dict[str, Any]) -> None:
    from ktk.bench import report as tables

    machine = report["machine"]
    threads = ", ".join(str(entry["threads"]) for entry in report["probes"])
    before = report["load_average"]["before"][0]
    shared.show(
        f"{machine['cpu_model']}, {report['isa']}, {threads} threads; load average {before:.1f} at the start",
        list(tables.CELL_COLUMNS),
        [list(row) for row in tables.cell_rows(report)],
    )
    summary = tables.summary_rows(report)
    if summary:
        shared.show("Accuracy and packing", list(tables.SUMMARY_COLUMNS), [list(row) for row in summary])
    scaling = tables.scaling_rows(report)
    if scaling:
        shared.show("Scaling", list(tables.SCALING_COLUMNS), [list(row) for row in scaling])
