"""Reports of `ktk.bench.run`: files, and tables made from them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ktk.bench.measure import SCHEMA
from ktk.errors import KtkArgumentError

__all__ = [
    "CELL_COLUMNS",
    "cell_rows",
    "load_peers",
    "load_report",
    "save_report",
    "scaling_rows",
    "summary_rows",
]

PEERS_SCHEMA = "ktk-bench-peers-1"

CELL_COLUMNS = (
    "layer",
    "B",
    "ms",
    "limit",
    "of the bound\nmedian (min-max)",
    "of the bound,\nbest",
    "peak\nGOP/s",
    "read\nGB/s",
    "skewed\n/ even",
    "outside\nproducts",
)
SCALING_COLUMNS = ("layer", "B", "threads", "speed-up", "of the probe", "ratio")
SUMMARY_COLUMNS = (
    "layer",
    "relative\nL2 error",
    "packing\nGB/s",
    "of copying",
)


def save_report(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a report as JSON; the file appears, or is replaced, when it is complete.

    Parameters
    ----------
    report : dict
    path : path

    Raises
    ------
    OSError
        If it cannot be written.
    """
    target = Path(path)
    with tempfile.NamedTemporaryFile(
        "w", dir=target.parent, prefix=f".{target.name}.", delete=False, encoding="utf-8"
    ) as file:
        try:
            json.dump(report, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def load_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a report that `save_report` has written.

    Raises
    ------
    OSError
        If the file cannot be read.
    KtkArgumentError
        If it is no such report.
    """
    return _load(path, SCHEMA, "ktk bench --save")


def load_peers(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what tests/bench/peers.py has written about other libraries; raises as `load_report`."""
    return _load(path, PEERS_SCHEMA, "tests/bench/peers.py")


def _load(path: str | os.PathLike[str], schema: str, writer: str) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise KtkArgumentError(f"{os.fspath(path)} is no JSON file: {error}") from None
    found = report.get("schema") if isinstance(report, dict) else None
    if found != schema:
        raise KtkArgumentError(
            f"{os.fspath(path)} has the schema {found!r}, expected {schema!r} as {writer} writes it"
        )
    return report  # type: ignore[no-any-return]


def cell_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of a report as text, in the order of `CELL_COLUMNS`."""
    rows = []
    several = len({cell["threads"] for cell in report["cells"]}) > 1
    for cell in report["cells"]:
        name = f"{cell['shape']} {cell['format']}" + (f", {cell['threads']} threads" if several else "")
        if "skipped" in cell:
            rows.append((name, str(cell["tokens"]), "-", cell["skipped"], *["-"] * (len(CELL_COLUMNS) - 4)))
            continue
        fraction, skewed, stages = cell["fraction"], cell.get("skewed"), cell.get("stages")
        rows.append(
            (
                name,
                str(cell["tokens"]),
                number(cell["ms"]["median"]),
                cell["limit"],
                f"{fraction['median']:.0%} ({fraction['min']:.0%}-{fraction['max']:.0%})",
                f"{cell['fraction_of_best']:.0%}",
                number(cell["peak_gops"]["median"]),
                number(cell["read_gbs"]["median"]),
                "-" if skewed is None else f"{skewed['time_ratio']['median']:.2f}",
                "-" if stages is None else f"{stages['outside_products']:.1%}",
            )
        )
    return rows


def summary_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Accuracy and packing of each shape and format as text, in the order of `SUMMARY_COLUMNS`."""
    rows: dict[str, list[str]] = {}
    for entry in report["errors"]:
        rows[f"{entry['shape']} {entry['format']}"] = [f"{entry['relative_l2']:.4f}", "-", "-"]
    for entry in report["packing"]:
        row = rows.setdefault(f"{entry['shape']} {entry['format']}", ["-"] * 3)
        row[1:] = number(entry["gbs"]["median"]), f"{entry['fraction_of_copy']['median']:.0%}"
    return [(name, *row) for name, row in rows.items()]


def scaling_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Speed-ups over the fewest threads, beside those of the probe that limits the cell.

    In the order of `SCALING_COLUMNS`; empty if only one number of threads was measured.
    """
    measured = [cell for cell in report["cells"] if "skipped" not in cell]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell in measured:
        groups.setdefault((cell["shape"], cell["format"], cell["tokens"]), []).append(cell)
    rows: list[tuple[str, ...]] = []
    for (shape, name, tokens), cells in groups.items():
        base, *others = sorted(cells, key=lambda cell: int(cell["threads"]))
        for cell in others:
            speed = base["ms"]["median"] / cell["ms"]["median"]
            probe = base["bound_ms"]["median"] / cell["bound_ms"]["median"]
            rows.append(
                (
                    f"{shape} {name}",
                    str(tokens),
                    f"{base['threads']} to {cell['threads']}",
                    f"{speed:.2f}",
                    f"{probe:.2f}",
                    f"{speed / probe:.2f}",
                )
            )
    return rows


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
