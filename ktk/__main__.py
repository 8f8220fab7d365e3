"""``python -m ktk``: the command line.

``doctor`` is answered here with the standard library alone, because it is what one runs when the rest does
not work.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line of this process; return the exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["doctor"]:
        from ktk import diagnostics

        return diagnostics.main(arguments[1:])
    # PyTorch's threads wait actively after each operation, on the very cores that the experts' threads are
    # about to use, and the other way round: on few or busy cores that is slower by a factor of ten. Read when
    # PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from ktk import cli
    except ImportError as error:
        sys.stderr.write(
            f"ktk: the command line cannot be imported ({error}); it needs typer and rich: pip install "
            "'ktk[cli]'. 'python -m ktk doctor' works without them.\n"
        )
        return 2
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
