"""Options that several commands share, and how results are shown."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = [
    "Format",
    "GroupSize",
    "Rotated",
    "Isa",
    "Json",
    "Threads",
    "WeightFormat",
    "layer_progress",
    "megabytes",
    "quiet_transformers",
    "rate",
    "show",
]


class WeightFormat(str, enum.Enum):
    """Formats that experts can be packed in."""

    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


Format = Annotated[WeightFormat, typer.Option("--format", help="Weight format of the experts.")]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        help="Input columns a scale: 32 (default of int4), 64, 128, for int8 also 256 and 512 (its default); "
        "0: one scale a row.",
    ),
]
Rotated = Annotated[
    bool | None,
    typer.Option(
        "--rotated/--no-rotated",
        help="int8, int4: whether columns are rotated before they are quantised. Default: yes.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads for the experts. Default: the physical cores allowed."),
]
Isa = Annotated[
    str | None,
    typer.Option("--isa", help="Instruction set. Default: the best one, or KTK_ISA.", metavar="NAME"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@contextmanager
def layer_progress(label: str, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on standard error while layers are packed; yields what to call after each."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def quiet_transformers() -> None:
    """Keep transformers' own bars and advice out of the output."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def rate(tokens_per_s: float | None) -> str:
    """Write a rate in tokens a second, with three digits or all before the point."""
    if tokens_per_s is None:
        return "-"
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:#.3g}"


def megabytes(size: int) -> str:
    """Write a number of bytes in units of 10^6."""
    return f"{size / 1e6:.2f} MB"


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    console = Console()
    if not console.is_terminal:
        # A file has no width; nothing in it is to be cut.
        console.width = max(console.width, 120)
    console.print(table)
