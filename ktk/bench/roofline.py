"""The picture of a report: the fraction of the bound against the batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ktk.errors import KtkArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = ("#1f78b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#8c8c8c")
PEER_COLOURS = ("#555555", "#8c510a", "#01665e", "#762a83", "#b2182b", "#2166ac", "#878787", "#1a1a1a")


def draw(report: dict[str, Any], peers: dict[str, Any] | None = None) -> Figure:
    """Draw the fraction of the bound against B, one panel a shape and one line a format.

    Medians, with a band from the least to the largest pair. Dashed lines are other libraries.

    Parameters
    ----------
    report : dict
        As `ktk.bench.run` returns it.
    peers : dict, optional
        As `ktk.bench.report.load_peers` returns it.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    KtkArgumentError
        If there is nothing to draw.
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"--roofline needs matplotlib: pip install 'ktk[plot]' ({error})") from error

    cells = [cell for cell in report["cells"] if "skipped" not in cell]
    if not cells:
        raise KtkArgumentError("the report has no cells to draw")
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    threads = max(cell["threads"] for cell in cells)
    cells = [cell for cell in cells if cell["threads"] == threads]
    others = [] if peers is None else [cell for cell in peers["cells"] if "fraction" in cell]
    columns = min(len(shapes), 2)
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.9 * rows), layout="constrained")
    formats = list(dict.fromkeys(cell["format"] for cell in cells))
    names = list(dict.fromkeys(cell["peer"] for cell in others))
    lines = {}
    for index, shape in enumerate(shapes):
        axes = figure.add_subplot(rows, columns, index + 1)
        for colour, name in enumerate(formats):
            found = sorted(
                (cell for cell in cells if cell["shape"] == shape and cell["format"] == name),
                key=lambda cell: int(cell["tokens"]),
            )
            if not found:
                continue
            tokens = [cell["tokens"] for cell in found]
            paint = COLOURS[colour % len(COLOURS)]
            low, middle, high = (
                [cell["fraction"][which] for cell in found] for which in ("min", "median", "max")
            )
            axes.fill_between(tokens, low, high, color=paint, alpha=0.15, linewidth=0)
            (lines[name],) = axes.plot(tokens, middle, color=paint, marker="o", markersize=4)
        for colour, name in enumerate(names):
            found = sorted(
                (cell for cell in others if cell["shape"] == shape and cell["peer"] == name),
                key=lambda cell: int(cell["tokens"]),
            )
            if found:
                (lines[name],) = axes.plot(
                    [cell["tokens"] for cell in found],
                    [cell["fraction"]["median"] for cell in found],
                    color=PEER_COLOURS[colour % len(PEER_COLOURS)],
                    linestyle="--",
                    linewidth=1.2,
                )
        axes.axhline(1.0, color="#000000", linewidth=0.6)
        axes.set_xscale("log", base=2)
        ticks = sorted({cell["tokens"] for cell in cells if cell["shape"] == shape})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, max(1.1, *(cell["fraction"]["max"] for cell in cells if cell["shape"] == shape)))
        axes.set_xlabel("tokens in the batch")
        axes.set_ylabel("fraction of the bound")
        experts = {cell["experts"] for cell in cells if cell["shape"] == shape}
        axes.set_title(f"{shape}, {'/'.join(map(str, sorted(experts)))} experts", loc="left")
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"{report['machine']['cpu_model']}, {report['isa']}, "
        f"{threads} threads:\nthe least possible time over the measured one",
        x=0.01,
        ha="left",
        fontsize="medium",
    )
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
    return figure
