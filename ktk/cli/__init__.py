"""The command line: ``ktk`` or ``python -m ktk``.

Commands import PyTorch and the native library when they run, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from ktk.cli import bench, demo, run, sft, trace
from ktk.errors import KtkError

__all__ = ["app", "main"]

app = typer.Typer(
    name="ktk",
    help="Mixture-of-experts layers on the CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("demo")(demo.demo)
app.command("trace")(trace.trace)
app.command("bench")(bench.bench)
app.command("sft")(sft.sft)


@app.command()
def doctor(
    json: bool = typer.Option(False, "--json", help="Print JSON."),
    no_selftest: bool = typer.Option(False, "--no-selftest", help="Leave the self-test out."),
) -> None:
    """Describe this machine and this installation, and test it."""
    from ktk import diagnostics

    flags = {"--json": json, "--no-selftest": no_selftest}
    raise typer.Exit(diagnostics.main([flag for flag, given in flags.items() if given]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name. Default: ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status: 0 on success, 1 if ktk or the files are at fault (the reason is on standard error), 2 for
        a wrong command line.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="ktk")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ImportError as error:
        sys.stderr.write(f"ktk: {error}. 'python -m ktk doctor' tells more.\n")
        return 1
    except (KtkError, OSError, ValueError) as error:
        sys.stderr.write(f"ktk: {error}\n")
        return 1
    return 0
