"""Objects and libraries keep instruction sets apart; see native/tools/check_objects.py for the reasons."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ktk
from conftest import ROOT

sys.path.insert(0, str(ROOT / "native" / "tools"))
import check_objects

pytestmark = pytest.mark.any_binding


def build_folder() -> Path:
    """A build with the archives of the instruction sets: KTK_BUILD_DIR, an editable install's, or make's."""
    named = os.environ.get("KTK_BUILD_DIR")
    candidates = (
        [Path(named)] if named else [Path(ktk.get_library()).parent.parent, ROOT / "build" / "native"]
    )
    for folder in candidates:
        if check_objects.isa_archives(folder):
            return folder
    pytest.skip("needs a build folder: set KTK_BUILD_DIR, or build with pip's -Cbuild-dir=build/native")


def test_archives_of_a_build_are_clean() -> None:
    build = build_folder()
    assert check_objects.build_problems(build) == []
    names = {path.name for path in check_objects.isa_archives(build)}
    assert {f"libktk_isa_{name}.a" for name in ("portable", "avx2", "avx512", "avx512_bf16", "amx")} <= names
    for path in check_objects.isa_archives(build):
        assert check_objects.archive_definitions(path), (
            f"{path} defines nothing: the reader overlooks symbols"
        )


def test_the_installed_library_exports_the_c_abi_only() -> None:
    assert check_objects.library_problems(Path(ktk.get_library())) == []


def test_the_installed_library_needs_system_libraries_only() -> None:
    allowed = (
        "libc.so",
        "libm.so",
        "libdl.so",
        "libpthread.so",
        "librt.so",
        "libgcc_s.so",
        "libstdc++.so",
        "ld-linux",
    )
    needed = check_objects.Elf(Path(ktk.get_library()).read_bytes(), "libktk.so").needed()
    assert [name for name in needed if not name.startswith(allowed)] == []


def compile_archive(tmp_path: Path, text: str, *options: str, name: str = "bad") -> Path:
    compiler = next((path for word in ("c++", "g++", "clang++") if (path := shutil.which(word))), None)
    archiver = shutil.which("ar")
    if compiler is None or archiver is None:
        pytest.skip("needs a C++ compiler and ar")
    source = tmp_path / f"{name}.cpp"
    source.write_text(text)
    produced = tmp_path / f"{name}.o"
    subprocess.run([compiler, "-c", "-O0", str(source), "-o", str(produced)], check=True)
    archive = tmp_path / f"libktk_isa_{name}.a"
    subprocess.run([archiver, *options, str(archive), produced.name], check=True, cwd=tmp_path)
    return archive


CLEAN = "namespace { int twice(int x) { return 2 * x; } }\nint entry(int x) { return twice(x); }\n"


@pytest.mark.parametrize("options", [("rcs",), ("rcsT",)], ids=["plain", "thin"])
@pytest.mark.parametrize("name", ["ok", "a_name_that_is_too_long_for_the_header"])
def test_a_clean_archive_passes(options: tuple[str, ...], name: str, tmp_path: Path) -> None:
    archive = compile_archive(tmp_path, CLEAN, *options, name=name)
    assert check_objects.archive_problems(archive) == []
    assert check_objects.archive_definitions(archive) == {"_Z5entryi"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "inline int shared(int x) { return x + 1; }\nint entry(int x) { return shared(x); }",
            "weak or unique",
        ),
        (
            "template <class T> T same(T x) { return x; }\nint entry(int x) { return same(x); }",
            "weak or unique",
        ),
        (
            "inline int &counter() { static int n; return n; }\nint entry() { return counter()++; }",
            "weak or unique",
        ),
        (
            "int compute();\nstatic const int table = compute();\nint entry() { return table; }",
            "when the library is",
        ),
    ],
    ids=["inline", "template", "static in inline", "initialiser"],
)
def test_each_kind_of_trap_is_found(text: str, problem: str, tmp_path: Path) -> None:
    problems = check_objects.archive_problems(compile_archive(tmp_path, text + "\n", "rcs"))
    assert any(problem in entry for entry in problems), problems


def test_one_symbol_in_two_archives_is_found(tmp_path: Path) -> None:
    compile_archive(tmp_path, CLEAN, "rcs", name="first")
    compile_archive(tmp_path, CLEAN, "rcs", name="second")
    shutil.copy(ktk.get_library(), tmp_path / "libktk.so")
    assert check_objects.build_problems(tmp_path) == [
        "libktk_isa_second.a: _Z5entryi is also defined by libktk_isa_first.a"
    ]
    assert check_objects.main([str(tmp_path)]) == 1


def test_an_export_too_many_is_found(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "leak.c"
    source.write_text("int ktk_fine(void) { return 0; }\nint leaked(void) { return 1; }\n")
    library = tmp_path / "libktk.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert check_objects.library_problems(library) == [
        "libktk.so: exports leaked, which is not part of the C ABI"
    ]


def test_a_folder_without_a_build_is_reported(tmp_path: Path) -> None:
    assert check_objects.main([str(tmp_path)]) == 1
    assert check_objects.main([]) == 2
    (tmp_path / "libktk_isa_text.a").write_text("no archive")
    with pytest.raises(check_objects.ElfError, match="no static archive"):
        check_objects.archive_problems(tmp_path / "libktk_isa_text.a")
    with pytest.raises(check_objects.ElfError, match="no 64-bit"):
        check_objects.Elf(b"no ELF file", "text")
