"""One ABI, written five times: header, Cython, ctypes, exported symbols, and the stub of both bindings."""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

import ktk
from conftest import ROOT
from ktk import _native, errors
from ktk._native import _ctypes

sys.path.insert(0, str(ROOT / "native" / "tools"))
import check_objects

PACKAGE = ROOT / "ktk" / "_native"
HEADER = Path(ktk.get_include()) / "ktk.h"


@dataclass
class Abi:
    """What a declaration file declares; types are C text with single spaces and `*` apart from names."""

    enums: dict[str, list[str]] = field(default_factory=dict)
    enum_values: dict[str, int] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)
    structs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    functions: dict[str, tuple[str, list[tuple[str, str]]]] = field(default_factory=dict)
    function_types: dict[str, tuple[str, list[tuple[str, str]]]] = field(default_factory=dict)


def split_declaration(text: str) -> tuple[str, str]:
    """`"const char *name"` as `("const char *", "name")`."""
    match = re.fullmatch(r"(.*?)(\w+)", text.strip())
    assert match, text
    return re.sub(r"\s*\*", " *", re.sub(r"\s+", " ", match[1]).strip()).replace("* *", "**"), match[2]


def parameters(text: str) -> list[tuple[str, str]]:
    text = text.strip()
    return [] if text in ("", "void") else [split_declaration(part) for part in text.split(",")]


def parse_header(path: Path) -> Abi:
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.S)
    text = re.sub(r"#ifdef __cplusplus.*?#endif", " ", text, flags=re.S)
    text = re.sub(r"^#.*$", " ", text, flags=re.M)
    abi = Abi()
    while text := text.strip():
        if match := re.match(r"typedef enum (\w+) \{(.*?)\} (\w+);", text, re.S):
            assert match[1] == match[3]
            pairs = [entry.split("=") for entry in match[2].split(",")]
            abi.enums[match[1]] = [name.strip() for name, _ in pairs]
            abi.enum_values.update({name.strip(): int(value) for name, value in pairs})
        elif match := re.match(r"typedef struct (\w+) \{(.*?)\} (\w+);", text, re.S):
            assert match[1] == match[3]
            abi.structs[match[1]] = [split_declaration(part) for part in match[2].split(";") if part.strip()]
        elif match := re.match(r"typedef struct (\w+) (\w+);", text):
            assert match[1] == match[2]
            abi.opaque.add(match[1])
        elif match := re.match(r"typedef (\w+) \(\*(\w+)\)\(([^)]*)\);", text):
            abi.function_types[match[2]] = (match[1], parameters(match[3]))
        elif match := re.match(r"KTK_API ([^;(]*)\(([^)]*)\);", text, re.S):
            result, name = split_declaration(match[1])
            abi.functions[name] = (result, parameters(match[2]))
        else:
            raise AssertionError(f"ktk.h: cannot read {text[:80]!r}")
        text = text[match.end() :]
    return abi


def parse_pxd(path: Path) -> Abi:
    text = path.read_text()
    text = text[text.index("cdef extern from") :].split("\n", 1)[1]
    text = re.sub(r",\s*\n\s*", ", ", re.sub(r"#.*", "", text))
    abi = Abi()
    body: list[str] = []
    for line in text.splitlines():
        statement = line.strip()
        if not statement:
            continue
        if line.startswith(" " * 8):
            body.append(statement)
        elif match := re.fullmatch(r"ctypedef (enum|struct) (\w+):", statement):
            body = []
            if match[1] == "enum":
                abi.enums[match[2]] = body
            else:
                abi.structs[match[2]] = body  # type: ignore[assignment]
        elif match := re.fullmatch(r"ctypedef (\w+) \(\*(\w+)\)\(([^)]*)\)", statement):
            abi.function_types[match[2]] = (match[1], parameters(match[3]))
        elif match := re.fullmatch(r"([^(]*)\(([^)]*)\)", statement):
            result, name = split_declaration(match[1])
            abi.functions[name] = (result, parameters(match[2]))
        else:
            assert statement == "int KTK_ABI_VERSION", statement
    abi.opaque = {name for name, fields in abi.structs.items() if fields == ["pass"]}
    abi.structs = {
        name: [split_declaration(part) for part in fields]  # type: ignore[arg-type]
        for name, fields in abi.structs.items()
        if name not in abi.opaque
    }
    return abi


@pytest.fixture(scope="module")
def header() -> Abi:
    return parse_header(HEADER)


@pytest.fixture(params=["cython", "ctypes"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"ktk._native._{request.param}")


def test_the_header_is_read_whole(header: Abi) -> None:
    text = HEADER.read_text()
    assert len(header.functions) == text.count("KTK_API ") - text.count("define KTK_API ")
    assert len(header.enums) == text.count("typedef enum")
    assert len(header.structs) + len(header.opaque) == text.count("typedef struct")
    assert HEADER.read_text() == (ROOT / "native" / "include" / "ktk.h").read_text()


def test_cython_declares_what_the_header_does(header: Abi) -> None:
    pxd = parse_pxd(PACKAGE / "ktk.pxd")
    assert pxd.enums == header.enums
    assert pxd.opaque == header.opaque
    assert pxd.structs == header.structs
    assert pxd.function_types == header.function_types
    assert pxd.functions == header.functions


SCALARS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
    "size_t": ctypes.c_size_t,
    "uintptr_t": ctypes.c_size_t,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "ktk_status": ctypes.c_int32,
    "ktk_task_fn": _ctypes.TASK_FN,
}


def ctypes_type(c_type: str, header: Abi) -> object:
    base = c_type.replace("const ", "").replace(" ", "")
    name, stars = base.rstrip("*"), base.count("*")
    if name in header.opaque or name == "void":
        kind: object = ctypes.c_void_p
        stars -= 1
    elif name == "char":
        kind = ctypes.c_char_p
        stars -= 1
    elif name in header.structs:
        kind = _ctypes.STRUCTS[name]
    else:
        kind = SCALARS[name]
    for _ in range(stars):
        kind = ctypes.POINTER(kind)  # type: ignore[arg-type]
    return kind


def test_ctypes_prototypes_are_those_of_the_header(header: Abi) -> None:
    assert _ctypes.PROTOTYPES.keys() == header.functions.keys()
    for name, (result, arguments) in header.functions.items():
        expected = (ctypes_type(result, header), tuple(ctypes_type(kind, header) for kind, _ in arguments))
        assert _ctypes.PROTOTYPES[name] == expected, name


def test_ctypes_structs_are_those_of_the_header(header: Abi) -> None:
    assert _ctypes.STRUCTS.keys() == header.structs.keys()
    for name, fields in header.structs.items():
        expected = [(field_name, ctypes_type(kind, header)) for kind, field_name in fields]
        assert list(_ctypes.STRUCTS[name]._fields_) == expected, name


def compiler(language: str) -> str:
    names = ("cc", "gcc", "clang") if language == "c" else ("c++", "g++", "clang++")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a compiler for {language}")
    return found


@pytest.mark.parametrize("language", ["c", "c++"])
def test_a_compiler_lays_structs_out_as_ctypes_does(language: str, header: Abi, tmp_path: Path) -> None:
    lines = ['#include "ktk.h"', "#include <stdio.h>", "int main(void) {"]
    expected = []
    for name, struct in _ctypes.STRUCTS.items():
        lines.append(f'  printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field_name, *_ in struct._fields_:
            lines.append(f'  printf("{field_name} %zu\\n", offsetof({name}, {field_name}));')
            expected.append(f"{field_name} {getattr(struct, field_name).offset}")
    for name, value in header.enum_values.items():
        lines.append(f'  printf("{name} %d\\n", {name});')
        expected.append(f"{name} {value}")
    source = tmp_path / "layout.source"
    source.write_text("\n".join([*lines, "  return 0;", "}", ""]))
    program = tmp_path / "layout"
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{ktk.get_include()}", "-x", language]
    subprocess.run([compiler(language), *flags, str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == expected


def test_a_c_program_links_against_the_installed_library(tmp_path: Path) -> None:
    source = tmp_path / "user.c"
    source.write_text(
        '#include <ktk.h>\n#include <stdio.h>\nint main(void) { printf("%s %d\\n", ktk_version(), '
        "ktk_abi_version()); return 0; }\n"
    )
    library = Path(ktk.get_library())
    program = tmp_path / "user"
    command = [compiler("c"), str(source), f"-I{ktk.get_include()}", str(library), "-o", str(program)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}"], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert printed.split() == [_native.version(), str(_native.abi_version())]


def test_the_library_exports_the_header_and_nothing_else(header: Abi) -> None:
    assert check_objects.exported_symbols(Path(ktk.get_library())) == header.functions.keys()


def test_versions_agree(module: ModuleType) -> None:
    match = re.search(r"#define KTK_ABI_VERSION (\d+)", HEADER.read_text())
    assert match
    assert module.HEADER_ABI_VERSION == module.abi_version() == int(match[1])
    assert module.version() == ktk.__version__


def test_constants_are_those_of_the_header(module: ModuleType, header: Abi) -> None:
    for enum in ("ktk_dtype", "ktk_format", "ktk_part", "ktk_policy", "ktk_probe_kind"):
        for name in header.enums[enum]:
            value = getattr(module, name.removeprefix("KTK_"))
            assert (type(value), value) == (int, header.enum_values[name])


def test_every_status_has_its_exception(header: Abi) -> None:
    failures = {header.enum_values[name]: name for name in header.enums["ktk_status"] if name != "KTK_OK"}
    assert errors.STATUS_ERRORS.keys() == failures.keys()
    for status, name in failures.items():
        word = name.removeprefix("KTK_ERR_").capitalize()
        assert errors.STATUS_ERRORS[status].__name__ == f"Ktk{word}Error"


@dataclass
class Stub:
    """Names, signatures and properties that api.pyi describes."""

    constants: dict[str, int] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    methods: dict[str, dict[str, str]] = field(default_factory=dict)
    properties: dict[str, set[str]] = field(default_factory=dict)


def signature_text(arguments: ast.arguments) -> str:
    """Names, order, kinds and defaults of parameters, without their types."""
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    return ast.unparse(arguments)


@pytest.fixture(scope="module")
def stub() -> Stub:
    described = Stub()
    for node in ast.parse((PACKAGE / "api.pyi").read_text()).body:
        if isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name) and isinstance(node.value, ast.Constant)
            described.constants[node.target.id] = node.value.value  # type: ignore[assignment]
        elif isinstance(node, ast.FunctionDef):
            described.functions[node.name] = signature_text(node.args)
        elif isinstance(node, ast.ClassDef):
            methods = described.methods.setdefault(node.name, {})
            properties = described.properties.setdefault(node.name, set())
            for member in node.body:
                if not isinstance(member, ast.FunctionDef):
                    continue
                if member.decorator_list:
                    properties.add(member.name)
                else:
                    methods[member.name] = signature_text(member.args)
    return described


def python_signature(function: object) -> str:
    text = str(inspect.signature(function))  # type: ignore[arg-type]
    definition = ast.parse(f"def function{text}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    return signature_text(definition.args)


def initialiser_signature(module: ModuleType, name: str) -> str:
    """Of `__init__`, which extension types do not tell at run time."""
    if module is _ctypes:
        return python_signature(getattr(module, name).__init__)
    source = (PACKAGE / "_cython.pyx").read_text()
    match = re.search(rf"^cdef class {name}:.*?def __init__\((.*?)\):", source, re.S | re.M)
    assert match
    definition = ast.parse(f"def function({match[1]}): ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    return signature_text(definition.args)


def test_bindings_export_what_the_stub_describes(module: ModuleType, stub: Stub) -> None:
    described = {*stub.constants, *stub.functions, *stub.methods}
    assert set(_native.__all__) == described | {"binding", "library_path"}
    for name, value in stub.constants.items():
        assert getattr(module, name) == value
    for name, signature in stub.functions.items():
        assert python_signature(getattr(module, name)) == signature, name
    for class_name, methods in stub.methods.items():
        cls = getattr(module, class_name)
        public = {name for name in dir(cls) if not name.startswith("_")}
        assert public == {name for name in methods if not name.startswith("_")} | stub.properties[class_name]
        for name, signature in methods.items():
            if name == "__init__":
                assert initialiser_signature(module, class_name) == signature, class_name
            else:
                assert python_signature(getattr(cls, name)) == signature, f"{class_name}.{name}"
