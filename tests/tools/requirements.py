"""Prints what pyproject.toml asks for: dependencies, and those of the extra `dev` with all it refers to.

pip installs the dependencies of a project only together with the project, and tools are needed before it is
built.
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


def main() -> None:
    """Print one requirement a line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + requirements("dev", project["optional-dependencies"], project["name"])
    print("\n".join(dict.fromkeys(wanted)))


if __name__ == "__main__":
    main()
