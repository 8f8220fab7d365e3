"""Link hygiene of a build of ktk: what the linker sees must not mix instruction sets.

Usage: python native/tools/check_objects.py BUILD_DIR

Reads the static archives of the instruction sets and the shared library, without help from binutils, and
reports

- weak and unique definitions in an archive: the linker keeps one copy of such a function, built with the
flags of
  whichever instruction set came first, and every other one calls it;
- initialisers in an archive: they run when the library is loaded, before anything has looked at the CPU;
- one symbol defined in two archives;
- symbols that the shared library exports besides `ktk_*`.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHT_SYMTAB, SHT_DYNAMIC, SHT_DYNSYM = 2, 6, 11
DT_NEEDED = 1
SHN_UNDEF = 0
STB_LOCAL, STB_GLOBAL, STB_WEAK, STB_GNU_UNIQUE = 0, 1, 2, 10
STT_SECTION, STT_FILE = 3, 4
STV_DEFAULT, STV_PROTECTED = 0, 3

INITIALISERS = (".init_array", ".preinit_array", ".ctors")


@dataclass(frozen=True)
class Symbol:
    """One entry of a symbol table."""

    name: str
    binding: int
    kind: int
    visibility: int
    defined: bool


class ElfError(Exception):
    """The file is not what this reader understands."""


class Elf:
    """Sections and symbols of a 64-bit little-endian ELF file.

    Parameters
    ----------
    data : bytes
        The whole file.
    name : str
        For messages.
    """

    def __init__(self, data: bytes, name: str) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ElfError(f"{name} is no 64-bit little-endian ELF file")
        self._data = data
        table, entry_bytes, count, names_index = struct.unpack_from("<Q10xHHH", data, 40)
        if count == 0:
            # More sections than the header's field can hold.
            count = struct.unpack_from("<Q", data, table + 32)[0]
        if names_index == 0xFFFF:
            names_index = struct.unpack_from("<I", data, table + 40)[0]
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + entry_bytes * i) for i in range(count)]
        names = headers[names_index][4]
        self._headers = headers
        self.sections = [self._string(names, header[0]) for header in headers]

    def _string(self, table: int, offset: int) -> str:
        start = table + offset
        return self._data[start : self._data.index(b"\0", start)].decode()

    def symbols(self, dynamic: bool = False) -> Iterator[Symbol]:
        """Named symbols of the static or of the dynamic table."""
        wanted = SHT_DYNSYM if dynamic else SHT_SYMTAB
        for _, kind, _, _, offset, size, link, _, _, entry_bytes in self._headers:
            if kind != wanted:
                continue
            strings = self._headers[link][4]
            for at in range(offset, offset + size, entry_bytes):
                name, info, other, section = struct.unpack_from("<IBBH", self._data, at)
                if name and info & 15 not in (STT_SECTION, STT_FILE):
                    yield Symbol(
                        self._string(strings, name), info >> 4, info & 15, other & 3, section != SHN_UNDEF
                    )

    def needed(self) -> list[str]:
        """Names of the shared libraries that the file asks the loader for."""
        names = []
        for _, kind, _, _, offset, size, link, _, _, entry_bytes in self._headers:
            if kind != SHT_DYNAMIC:
                continue
            for at in range(offset, offset + size, entry_bytes):
                tag, value = struct.unpack_from("<qQ", self._data, at)
                if tag == DT_NEEDED:
                    names.append(self._string(self._headers[link][4], value))
        return names


def archive_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each object in a static archive, thin ones included."""
    data = path.read_bytes()
    magic = data[:8]
    if magic not in (b"!<arch>\n", b"!<thin>\n"):
        raise ElfError(f"{path} is no static archive")
    thin = magic == b"!<thin>\n"
    long_names = b""
    at = 8
    while at < len(data):
        field = data[at : at + 16].decode().rstrip()
        size = int(data[at + 48 : at + 58])
        content = data[at + 60 : at + 60 + size]
        special = field in ("/", "//", "/SYM64/")
        if field == "//":
            long_names = content
        if not special:
            name = field.rstrip("/")
            if field.startswith("/"):
                start = int(field[1:])
                name = long_names[start : long_names.index(b"\n", start)].decode().rstrip("/")
            yield name, (path.parent / name).read_bytes() if thin else content
        if special or not thin:
            at += size + size % 2
        at += 60


def archive_problems(path: Path) -> list[str]:
    """What is wrong with the archive of one instruction set; empty when nothing is."""
    problems = []
    for name, content in archive_members(path):
        where = f"{path.name}({os.path.basename(name)})"
        elf = Elf(content, where)
        problems += [
            f"{where}: section {section} runs code when the library is loaded"
            for section in elf.sections
            if section.startswith(INITIALISERS)
        ]
        problems += [
            f"{where}: {symbol.name} is a weak or unique definition, which the linker may share"
            for symbol in elf.symbols()
            if symbol.defined and symbol.binding in (STB_WEAK, STB_GNU_UNIQUE)
        ]
    return problems


def archive_definitions(path: Path) -> set[str]:
    """Global symbols that an archive defines."""
    return {
        symbol.name
        for name, content in archive_members(path)
        for symbol in Elf(content, name).symbols()
        if symbol.defined and symbol.binding == STB_GLOBAL
    }


def exported_symbols(path: Path) -> set[str]:
    """Symbols that a shared library offers to others."""
    return {
        symbol.name
        for symbol in Elf(path.read_bytes(), str(path)).symbols(dynamic=True)
        if symbol.defined
        and symbol.binding != STB_LOCAL
        and symbol.visibility in (STV_DEFAULT, STV_PROTECTED)
    }


def library_problems(path: Path) -> list[str]:
    """What is wrong with the shared library; empty when nothing is."""
    return [
        f"{path.name}: exports {name}, which is not part of the C ABI"
        for name in sorted(exported_symbols(path))
        if not name.startswith("ktk_")
    ]


def isa_archives(build: Path) -> list[Path]:
    """Archives of the instruction sets below a build folder."""
    return sorted(build.rglob("libktk_isa_*.a"))


def build_problems(build: Path) -> list[str]:
    """What is wrong with a build folder; empty when nothing is."""
    archives = isa_archives(build)
    libraries = sorted(build.rglob("libktk.so"))
    if not archives or not libraries:
        return [f"{build} is no build folder of ktk: no libktk_isa_*.a or no libktk.so in it"]
    problems = [problem for path in archives for problem in archive_problems(path)]
    owner: dict[str, str] = {}
    for path in archives:
        for name in sorted(archive_definitions(path)):
            if name in owner:
                problems.append(f"{path.name}: {name} is also defined by {owner[name]}")
            owner.setdefault(name, path.name)
    return problems + [problem for path in libraries for problem in library_problems(path)]


def main(arguments: list[str]) -> int:
    """Runs the checks on the build folder named on the command line."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    problems = build_problems(Path(arguments[0]))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
