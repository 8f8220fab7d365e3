"""``ktk trace``: what a trace file says, as a table and as a picture of each worker's lane."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktk.cli import options as shared
from ktk.errors import KtkArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "trace"]

MOST_DRAWN_SPANS = 200_000
COLOURS = {
    "section": "#8c8c8c",
    "route": "#e6ab02",
    "quantise": "#66a61e",
    "gather": "#a6761d",
    "gate_up": "#1f78b4",
    "down": "#d95f02",
    "merge": "#7570b3",
    "pack": "#1b9e77",
    "lora_pack": "#66c2a5",
    "lora_input": "#a6cee3",
    "lora_middle": "#fdbf6f",
    "grad_input": "#b2df8a",
    "grad_lora_input": "#cab2d6",
    "grad_down": "#b15928",
    "grad_lora_middle": "#fb9a99",
    "grad_gate_up": "#08306b",
    "grad_merge": "#54278f",
    "grad_lora": "#e7298a",
    "grad_base": "#e31a1c",
    "forward": "#c8c8c8",
    "backward": "#b4b4b4",
    "task": "#b0c4de",
    "wait": "#f2b8b5",
    "sync": "#dcdcdc",
}


def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON written by ktk.profile or KTK_TRACE.")],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", "-o", metavar="PNG", help="Draw each thread's lane into this file."),
    ] = None,
    begin: Annotated[
        float | None, typer.Option("--from", metavar="MS", help="Leave out what begins before, in ms.")
    ] = None,
    end: Annotated[
        float | None, typer.Option("--to", metavar="MS", help="Leave out what ends after, in ms.")
    ] = None,
    json: shared.Json = False,
) -> None:
    """Summarise a trace: time, share and imbalance of each stage."""
    from ktk.profiling import load_trace, summarise

    loaded = load_trace(file)
    first = float("-inf") if begin is None else begin * 1e3
    last = float("inf") if end is None else end * 1e3
    loaded["traceEvents"] = [
        event
        for event in loaded["traceEvents"]
        if event["ph"] != "X" or (event["ts"] >= first and event["ts"] + event["dur"] <= last)
    ]
    about = loaded["otherData"]
    about["duration_us"] = max(0.0, min(last, about["duration_us"]) - max(first, 0.0))
    summary = summarise(loaded)
    if plot is not None:
        draw(loaded, file.name).savefig(plot, dpi=100, pil_kwargs={"optimize": True})
    if json:
        report = {
            "file": str(file),
            "duration_us": summary.duration_us,
            "dropped_spans": summary.dropped_spans,
            "stages": [{**asdict(stage), "mean_us": stage.mean_us} for stage in summary.stages],
        }
        sys.stdout.write(json_module.dumps(report, indent=1) + "\n")
        return
    dropped = f", {summary.dropped_spans} spans dropped" if summary.dropped_spans else ""
    shared.show(
        f"{file.name}: {summary.duration_us / 1e3:.1f} ms{dropped}",
        list(summary.COLUMNS),
        [list(row) for row in summary.rows()],
    )


def draw(trace: dict[str, Any], title: str) -> Figure:
    """Draw each thread of a trace as a lane, with its spans in the colours of their stages.

    Parameters
    ----------
    trace : dict
        As `ktk.profiling.load_trace` returns it.
    title : str
        Above the picture.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    KtkArgumentError
        If there is nothing to draw, or too much to be seen.
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib: pip install 'ktk[plot]' ({error})") from error

    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    if not spans:
        raise KtkArgumentError("there are no spans to draw; did anything run, and between --from and --to?")
    if len(spans) > MOST_DRAWN_SPANS:
        raise KtkArgumentError(
            f"{len(spans)} spans are too many to be seen; choose at most {MOST_DRAWN_SPANS} with --from and "
            "--to"
        )
    names: dict[tuple[int, int], str] = {}
    subpools: dict[int, str] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "thread_name":
            names[event["pid"], event["tid"]] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "process_name":
            subpools[event["pid"]] = event["args"]["name"]

    bars: dict[tuple[int, int], dict[str, list[tuple[float, float]]]] = {}
    for span in spans:
        stages_of_lane = bars.setdefault((span["pid"], span["tid"]), {})
        stages_of_lane.setdefault(span["name"], []).append((span["ts"] / 1e3, max(span["dur"] / 1e3, 1e-6)))
    # The submitting threads, whose numbers are the highest, are where one looks first.
    lanes = sorted(bars, key=lambda lane: (lane[0], lane[1] < 10000, lane[1]))

    figure = Figure(figsize=(10, 1.4 + 0.34 * len(lanes)), layout="constrained")
    axes = figure.add_subplot()
    stages = list(COLOURS)
    for row, lane in enumerate(lanes):
        # A forward lies below what happens within it, and so does a backward.
        for stage in sorted(bars[lane], key=lambda name: (name not in ("forward", "backward"), name)):
            axes.broken_barh(
                bars[lane][stage], (row - 0.4, 0.8), color=COLOURS.get(stage, "#000000"), linewidth=0
            )
            if stage not in stages:
                stages.append(stage)
    labels = [names.get(lane, str(lane[1])) for lane in lanes]
    if len({pid for pid, _ in lanes}) > 1:
        labels = [f"{subpools.get(pid, pid)}: {label}" for (pid, _), label in zip(lanes, labels, strict=True)]
    axes.set_yticks(range(len(lanes)), labels)
    axes.invert_yaxis()
    axes.set_xlim(
        min(span["ts"] for span in spans) / 1e3, max(span["ts"] + span["dur"] for span in spans) / 1e3
    )
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_xlabel("ms")
    axes.set_title(title, loc="left")
    seen = {stage for found in bars.values() for stage in found}
    handles = [Patch(color=COLOURS.get(stage, "#000000"), label=stage) for stage in stages if stage in seen]
    axes.legend(handles=handles, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
