"""Builds an sdist and a wheel from it, and holds that wheel against one built from the tree.

Usage: check_sdist.py FOLDER WHEEL. Wants meson-python and its tools on the path, and a git checkout: an sdist
holds what is committed. Files must be the same in both wheels, and but for compiled ones and RECORD, which
lists their hashes, have the same contents.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def contents(wheel: Path) -> dict[str, bytes]:
    """Files of a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def build_sdist(folder: Path) -> Path:
    """Build the sdist in `folder`; return its path."""
    import mesonpy

    return folder / mesonpy.build_sdist(str(folder))


def build_wheel(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist and build the wheel as any user does, in pip's own environment; return its path."""
    with tarfile.open(sdist) as archive:
        # Python before 3.10.12 and 3.11.4 has no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = next(path for path in folder.iterdir() if path.is_dir())
    # It is the files that count: compile kernels for one instruction set, and the rest as quickly as can be.
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
    command += ["-Csetup-args=-Doptimization=0", "-Csetup-args=-Damx_emulation=false"]
    command += ["-Csetup-args=-Dwithout_isas=avx2,avx512,avx512_bf16,amx"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


def problems(wheel: Path, other: Path) -> list[str]:
    """What differs between the wheel of the tree and that of the sdist."""
    tree, sdist = contents(wheel), contents(other)
    found = [f"{name} is missing from the wheel of the sdist" for name in sorted(tree.keys() - sdist.keys())]
    found += [f"{name} is in the wheel of the sdist only" for name in sorted(sdist.keys() - tree.keys())]
    found += [
        f"{name} differs"
        for name in sorted(tree.keys() & sdist.keys())
        if tree[name] != sdist[name] and not name.endswith((".so", "/RECORD"))
    ]
    return found


def main(arguments: list[str]) -> int:
    """Run the check; 0 if the wheels agree."""
    folder, wheel = Path(arguments[0]).resolve(), Path(arguments[1]).resolve()
    print("== sdist")
    if not (ROOT / ".git").exists():
        print("skipped: an sdist is made of what git has, and this is no checkout")
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sdist = build_sdist(folder)
    found = problems(wheel, build_wheel(sdist, folder))
    for problem in found:
        print(problem)
    if found:
        dirty = subprocess.run(
            ["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        print(f"an sdist holds committed files only; not committed here:\n{dirty.stdout}")
        return 1
    print(
        f"{sdist.name} ({sdist.stat().st_size / 1e6:.1f} MB) builds the {len(contents(wheel))} files of "
        f"{wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
