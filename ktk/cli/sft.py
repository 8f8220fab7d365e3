"""``ktk sft``: fine-tune a checkpoint as a file says."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ktk.cli import options as shared

__all__ = ["sft"]


def sft(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="Model, text, output and settings.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and say how much memory the run takes.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    json: shared.Json = False,
) -> None:
    """Fine-tune a mixture-of-experts model with LoRA, its experts on the CPU."""
    from ktk.sft.run_config import read_run_config

    config = read_run_config(config_file)
    shared.quiet_transformers()
    if dry_run:
        _dry_run(config, json)
        return
    from ktk.sft.train import fine_tune

    with (
        shared.layer_progress("packing", not json) as layers,
        _steps(not json) as steps,
    ):
        report = fine_tune(config, resume=resume, progress=steps, layer_progress=layers)
    if json:
        sys.stdout.write(json_module.dumps(report, indent=1) + "\n")
        return
    shared.show(
        f"{len(report['losses'])} steps, {report['trained_parameters']} trained parameters",
        ["text", "held out before", "held out after", "speed", "peak memory"],
        [
            [
                Path(config.text).name,
                f"{report['held_out_before']:.3f} nats",
                f"{report['held_out_after']:.3f} nats",
                f"{shared.rate(report['tokens_per_s'])} tokens/s",
                shared.megabytes(report["peak_rss_bytes"]),
            ]
        ],
    )
    for name in ("adapter", "plot", "trace"):
        if report[name]:
            sys.stdout.write(f"{name}: {report[name]}\n")


def _dry_run(config: Any, json: bool) -> None:
    from ktk.sft.memory import FORMULA, estimate_memory

    estimate = estimate_memory(config)
    if json:
        content = {"formula": FORMULA, "bytes": vars(estimate), "total_bytes": estimate.total}
        sys.stdout.write(json_module.dumps(content, indent=1) + "\n")
        return
    sys.stdout.write(f"{FORMULA}\n")
    terms = [[name, shared.megabytes(size)] for name, size in vars(estimate).items()]
    shared.show("memory at the peak", ["term", "size"], [*terms, ["total", shared.megabytes(estimate.total)]])


@contextmanager
def _steps(enabled: bool) -> Iterator[Any]:
    """A bar of steps with the loss on standard error; yields what to call after each."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=None, loss=float("nan"))
        yield lambda done, total, loss: bar.update(task, completed=done, total=total, loss=loss)
