"""The documentation: it builds, its links lead somewhere, and every fenced block in it works.

README.md, CONTRIBUTING.md and docs/*.md are read with the parser of MyST's own library. By language:

- python: run, all blocks of a page in order in one namespace and one empty folder;
- c: compiled with warnings as errors against the installed header and library, and run;
- bash, console: every command is run or, if it is in `NOT_RUN`, checked by what stands there;
- diff, and code blocks whose caption is a path: applied to a copy of the tree, which is then compiled;
- text: free.

Any other language fails.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import ktk
from conftest import ROOT

pytestmark = pytest.mark.any_binding

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str
    caption: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Fenced blocks of a page that hold something to try; directives of Sphinx are its own to check."""
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type != "fence":
            continue
        assert token.map is not None
        line, language, text, caption = token.map[0] + 1, token.info.strip(), token.content, None
        if directive := re.fullmatch(r"\{code-block\} (\w+)", language):
            language = directive[1]
            option, _, text = text.partition("\n")
            caption = option.removeprefix(":caption: ")
            assert caption != option, f"{page.name}:{line}: a code-block without a caption"
        elif language.startswith("{"):
            assert re.fullmatch(r"\{(image|eval-rst)\}.*", language), f"{page.name}:{line}: {language}"
            continue
        found.append(Block(page, line, language, text, caption))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(b.page == page and b.language in languages for b in BLOCKS)]


def of_page(page: Path, *languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.page == page and block.language in languages]


def named(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


def test_every_block_is_of_a_kind_that_is_tried() -> None:
    tried = {"python", "c", "bash", "console", "diff", "text"}
    assert [
        f"{b}: {b.language or 'no language'}" for b in BLOCKS if not (b.language in tried or b.caption)
    ] == []


# ---- python --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("python"), ids=named)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    # In a process of its own: blocks import, register and fork whatever they like.
    program = ["import warnings", "warnings.simplefilter('error', ResourceWarning)"]
    for block in of_page(page, "python"):
        # Through compile, so that a traceback names the line of the page.
        text = "\n" * block.line + block.text
        program.append(f"exec(compile({text!r}, {str(block)!r}, 'exec'))")
    script = tmp_path / "page.py"
    script.write_text("\n".join(program) + "\n", encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr


# ---- c -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "c"], ids=str)
def test_c_blocks_compile_and_run(block: Block, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "block.c").write_text(block.text)
    library = Path(ktk.get_library())
    command = [
        compiler,
        "-std=c11",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        "block.c",
        "-o",
        "block",
    ]
    command += [f"-I{ktk.get_include()}", str(library), f"-Wl,-rpath,{library.parent}", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    result = subprocess.run(["./block"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- bash, console -------------------------------------------------------------------------------


def check_make(arguments: list[str]) -> None:
    """The target exists, and so does what PYTEST_ARGS names."""
    assert subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True).returncode == 0
    for argument in arguments:
        if argument.startswith("PYTEST_ARGS="):
            check_pytest(shlex.split(argument.removeprefix("PYTEST_ARGS=")))


def check_pytest(arguments: list[str]) -> None:
    """The test files exist."""
    files = [argument for argument in arguments if "/" in argument]
    assert files and all((ROOT / file.split("::")[0]).exists() for file in files)


def check_ktk(arguments: list[str]) -> None:
    """The command line parses."""
    typer = pytest.importorskip("typer", reason="needs ktk[cli]")
    from ktk.cli import app

    typer.main.get_command(app).make_context("ktk", arguments, resilient_parsing=False)


def check_pip(arguments: list[str]) -> None:
    """It installs the tree, with extras that exist."""
    extras = re.search(r"\.\[([\w,]+)\]", " ".join(arguments))
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras[1].split(",") if extras else ():
        assert re.search(rf"^{extra} = \[", known, re.MULTILINE)
    assert arguments[0] == "install" and arguments[-1].startswith(".")


def check_script(*paths: str) -> Callable[[list[str]], None]:
    """The script, or one whose options it takes over, knows the options."""

    def check(arguments: list[str]) -> None:
        known = "".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
        assert all(f'"{argument}"' in known for argument in arguments if argument.startswith("--"))

    return check


def check_nothing(arguments: list[str]) -> None:
    """There is nothing about it that could become wrong."""


# Commands that need what a test does not have, or change the installation: by how they begin.
NOT_RUN: dict[tuple[str, ...], Callable[[list[str]], None]] = {
    ("make",): check_make,
    ("pip",): check_pip,
    (".venv/bin/pip",): check_pip,
    (".venv/bin/pytest",): check_pytest,
    ("python3", "-m", "venv"): check_nothing,
    ("source",): check_nothing,
    ("ktk", "run", "path/to/checkpoint"): check_ktk,
    # The long ones; tests of their own run small ones.
    ("ktk", "bench"): check_ktk,
    ("python", "tests/bench/peers.py"): check_script("tests/bench/peers.py"),
    ("python", "tests/bench/sft.py"): check_script("tests/bench/sft.py"),
    ("python", "tests/bench/sft_kt.py"): check_script("tests/bench/sft_kt.py", "tests/bench/peers.py"),
    ("python", "tests/bench/sft_peft.py"): check_script("tests/bench/sft_peft.py"),
    # A test of its own runs the demo.
    ("ktk", "demo"): check_ktk,
}


def commands_of(block: Block) -> list[str]:
    """Commands of a block; in a console block they follow a prompt, and the rest is output."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        assert any(line.startswith("$ ") for line in lines), f"{block}: no prompt"
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def check_of(command: str) -> tuple[Callable[[list[str]], None], list[str]] | None:
    """What checks a command that is not run, and its arguments."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    for beginning, check in NOT_RUN.items():
        if tuple(words[: len(beginning)]) == beginning:
            return check, words[1 if beginning[0] == "ktk" else len(beginning) :]
    return None


@pytest.mark.parametrize("page", pages_with("bash", "console"), ids=named)
def test_commands_run_or_are_checked(page: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if "cc " in "\n".join(block.text for block in of_page(page, "bash")) and shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    for block in of_page(page, "c"):
        # The page says to save its program under the name that its commands use.
        match = re.search(r"saved as `([\w.]+)`", page.read_text(encoding="utf-8"))
        assert match is not None, f"{block}: under which name?"
        (tmp_path / match[1]).write_text(block.text)
    script = ["set -eu -o pipefail"]
    for block in of_page(page, "bash", "console"):
        for command in commands_of(block):
            checked = check_of(command)
            if checked is None:
                script.append(command)
            else:
                checked[0](checked[1])
    result = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr


# ---- changes of the tree -------------------------------------------------------------------------


def apply_diff(text: str, tree: Path) -> None:
    """Apply hunks, which are found by their lines alone: each must be in its file exactly once."""
    path: Path | None = None
    for hunk in re.split(r"^@@.*\n|^(?=--- )", text, flags=re.MULTILINE):
        header = re.match(r"--- a/(\S+)\n\+\+\+ b/(\S+)\n", hunk)
        if header:
            assert header[1] == header[2]
            path = tree / header[1]
            continue
        if not hunk:
            continue
        assert path is not None
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        content = path.read_text(encoding="utf-8")
        assert content.count(before) == 1, f"{path.name} has no single\n{before}"
        path.write_text(content.replace(before, after), encoding="utf-8")


@pytest.mark.parametrize("page", pages_with("diff"), ids=named)
def test_changes_of_the_tree_apply_and_compile(page: Path, tmp_path: Path) -> None:
    meson, ninja = shutil.which("meson"), shutil.which("ninja")
    if meson is None or ninja is None:
        pytest.skip("needs meson and ninja")
    for part in ("native", "ktk"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "model"))
    for part in ("meson.build", "meson.options", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path)
    new = [block for block in BLOCKS if block.page == page and block.caption]
    for block in new:
        target = tmp_path / str(block.caption)
        assert not target.exists()
        target.parent.mkdir()
        target.write_text(block.text)
    for block in of_page(page, "diff"):
        apply_diff(block.text, tmp_path)
    folders = {Path(str(block.caption)).parent.name for block in new}
    targets = [f"native/libktk_isa_{name}.a" for name in folders]
    targets.append("native/libktk.so.p/src_core_cpu.cpp.o")
    build = tmp_path / "build"
    for command in (
        [meson, "setup", str(build), "-Damx_emulation=false", "-Doptimization=0", "-Dwerror=true"],
        [ninja, "-C", str(build), "-j1", *targets],
    ):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stdout + result.stderr


# ---- text ----------------------------------------------------------------------------------------


def test_paths_in_the_text_exist() -> None:
    path = re.compile(r"`((?:native|ktk|tests|docs)/[\w./-]+)`")
    made = {block.caption for block in BLOCKS if block.caption}
    missing = [
        f"{page.name}: {found}"
        for page in PAGES
        for found in path.findall(page.read_text(encoding="utf-8"))
        if found not in made and not (ROOT / found).exists()
    ]
    assert missing == []


def test_environment_variables_are_those_that_are_read() -> None:
    sources = [
        p
        for folder in ("native/src", "ktk")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".cpp")
    ]
    reads = re.compile(r"(?:getenv\(|environ(?:\.get\(|\[))\"(KTK_\w+)\"")
    read = {name for source in sources for name in reads.findall(source.read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(KTK_\w+)`", page, re.MULTILINE)) == read


def test_public_names_are_documented() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    exported = {name for name in ktk.__all__ if not name.startswith("__")}
    errors = {name for name in exported if name.startswith("Ktk")}
    assert "automodule:: ktk.errors" in page
    assert {
        name for name in exported - errors if not re.search(rf":: ktk\.{name}$", page, re.MULTILINE)
    } == set()


def test_python_blocks_have_no_leftovers() -> None:
    for block in BLOCKS:
        if block.language == "python":
            ast.parse(block.text)
            assert not re.search(r"^\s*\.\.\.", block.text, re.MULTILINE), f"{block} leaves something out"


def test_sphinx_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx.application", reason="needs ktk[docs]")
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-E"]
    command += ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "cache")]
    result = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "html")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # Nothing is fetched when a page is read.
    for page in (tmp_path / "html").glob("*.html"):
        content = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+"', content) == [], (
            page.name
        )
