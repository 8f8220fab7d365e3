"""Prints what pyproject.toml asks for, since tools are needed before the project itself is built.

Usage: requirements.py build, for what compiles it; requirements.py dev, for its dependencies and those of the
extra `dev`, with all that it refers to.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def requirements(extra: str, table: dict[str, list[str]], name: str) -> list[str]:
    """Requirements of an extra; `name[a,b]` within it stands for the extras a and b."""
    found: list[str] = []
    for entry in table[extra]:
        match = re.fullmatch(re.escape(name) + r"\[([\w,-]+)\]", entry)
        if match is None:
            found.append(entry)
        else:
            for other in match[1].split(","):
                found += requirements(other, table, name)
    return found


def main(purpose: str) -> None:
    """Print one requirement a line."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = table["project"]
    dev = requirements("dev", project["optional-dependencies"], project["name"])
    if purpose == "build":
        # meson-python asks for ninja only where a build has an environment of its own.
        wanted = table["build-system"]["requires"] + [entry for entry in dev if entry.startswith("ninja")]
    else:
        wanted = project["dependencies"] + dev
    print("\n".join(dict.fromkeys(wanted)))


if __name__ == "__main__":
    main(sys.argv[1])
