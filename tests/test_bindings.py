"""Both bindings: how one is chosen, what they check, and who owns what."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import ktk
from conftest import ROOT
from ktk import _native, errors
from ktk._native import _tasks
from ktk.errors import (
    KtkArgumentError,
    KtkError,
    KtkInternalError,
    KtkStateError,
    KtkSystemError,
    KtkUnsupportedError,
)
from threads import count_threads, no_more_threads_than, settled_threads

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 2, 24, 40, 8


def make_moe(pool: Any, module: Any = _native, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "num_experts": EXPERTS,
        "top_k": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_tokens": TOKENS,
        "format": module.FORMAT_BF16,
    }
    return module.Moe(pool, **{**options, **changes})


class Batch:
    """Arrays of one forward, and the arguments that name them."""

    def __init__(self, tokens: int = 3) -> None:
        rng = np.random.default_rng(7)
        self.count = np.array([tokens], np.int32)
        self.ids = rng.integers(0, EXPERTS, (tokens, 2))
        self.weights = rng.random((tokens, 2), np.float32)
        self.input = rng.standard_normal((tokens, HIDDEN), np.float32)
        self.output = np.zeros((tokens, HIDDEN), np.float32)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "num_tokens_ptr": self.count.ctypes.data,
            "top_k": 2,
            "expert_ids_ptr": self.ids.ctypes.data,
            "expert_weights_ptr": self.weights.ctypes.data,
            "input_ptr": self.input.ctypes.data,
            "input_dtype": _native.DTYPE_F32,
            "output_ptr": self.output.ctypes.data,
            "output_dtype": _native.DTYPE_F32,
        }
        return {**arguments, **changes}


Matrices = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def matrices() -> Matrices:
    rng = np.random.default_rng(11)
    return (
        rng.standard_normal((INTERMEDIATE, HIDDEN), np.float32),
        rng.standard_normal((INTERMEDIATE, HIDDEN), np.float32),
        rng.standard_normal((HIDDEN, INTERMEDIATE), np.float32),
    )


def load(moe: Any) -> None:
    arrays = matrices()
    for expert in range(EXPERTS):
        moe.pack_expert(expert, _native.DTYPE_F32, *(array.ctypes.data for array in arrays))


def run_python(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, where `environment` replaces the KTK_ variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KTK_")}
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**clean, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def printed(code: str, *flags: str, **environment: str) -> str:
    result = run_python(code, *flags, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.strip()


# Choice of the binding.

BLOCK_EXTENSION = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "ktk._native._cython":
            raise ImportError("the extension is blocked")
sys.meta_path.insert(0, Block())
"""
SHOW_BINDING = "from ktk import _native; print(_native.binding, _native.Pool.__module__)"


def test_the_binding_is_the_one_asked_for(binding: str) -> None:
    assert _native.Pool is importlib.import_module(f"ktk._native._{binding}").Pool


def test_cython_is_the_default() -> None:
    assert printed(SHOW_BINDING, "-W", "error").split() == ["cython", "ktk._native._cython"]


@pytest.mark.parametrize("name", ["cython", "ctypes"])
def test_the_environment_names_the_binding(name: str) -> None:
    assert printed(SHOW_BINDING, "-W", "error", KTK_BINDING=name).split() == [name, f"ktk._native._{name}"]


def test_an_unknown_binding_is_an_error() -> None:
    result = run_python(SHOW_BINDING, KTK_BINDING="cffi")
    assert result.returncode == 1
    assert "KTK_BINDING must be 'cython' or 'ctypes', got 'cffi'" in result.stderr


def test_without_the_extension_ctypes_takes_over_with_one_warning() -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from ktk import _native
    import ktk._native
print(_native.binding, len(caught), caught[0].category.__name__, caught[0].message)
"""
    answer = printed(BLOCK_EXTENSION + code)
    assert answer.startswith("ctypes 1 RuntimeWarning ktk uses its ctypes binding")
    assert "the extension is blocked" in answer


def test_a_binding_that_was_asked_for_is_not_replaced() -> None:
    result = run_python(BLOCK_EXTENSION + SHOW_BINDING, KTK_BINDING="cython")
    assert result.returncode == 1
    assert "the extension is blocked" in result.stderr
    answer = printed(BLOCK_EXTENSION + SHOW_BINDING, "-W", "error", KTK_BINDING="ctypes")
    assert answer.startswith("ctypes")


def test_another_library_can_be_named(tmp_path: Path) -> None:
    copy = tmp_path / "libktk-copy.so"
    shutil.copy(ktk.get_library(), copy)
    code = """
import ktk
from ktk import _native
print(_native.binding, ktk.get_library(), _native.isa_default())
"""
    answer = printed(code, "-W", "error", KTK_LIBRARY=str(copy)).split()
    assert answer == ["ctypes", str(copy), _native_default()]
    result = run_python(code, KTK_LIBRARY=str(copy), KTK_BINDING="cython")
    assert result.returncode == 1
    assert "KTK_LIBRARY needs the ctypes binding" in result.stderr


def _native_default() -> str:
    return printed("from ktk import _native; print(_native.isa_default())", KTK_BINDING=_native.binding)


@pytest.mark.parametrize("kind", ["missing", "text", "foreign"])
def test_a_wrong_library_is_an_import_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "libktk.so"
    message = "which is no file"
    if kind == "text":
        path.write_text("not a library")
        message = "cannot be loaded"
    elif kind == "foreign":
        path = Path(np._core._multiarray_umath.__file__)  # type: ignore[attr-defined]
        message = "does not export ktk_"
    result = run_python("import ktk; import ktk._native", KTK_LIBRARY=str(path))
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert message in result.stderr


def test_importing_ktk_is_cheap() -> None:
    code = """
import sys
import ktk
heavy = ("torch", "numpy", "ktk._native", "ktk.sft", "ktk.integrations", "transformers", "importlib.metadata")
print([name for name in heavy if name in sys.modules], "CPUInfer" in dir(ktk), ktk.get_library() != "")
assert not [name for name in heavy[:6] if name in sys.modules]
try:
    ktk.no_such_name
except AttributeError as error:
    print(error)
"""
    assert printed(code).splitlines() == ["[] True True", "module 'ktk' has no attribute 'no_such_name'"]


def test_every_public_name_exists() -> None:
    assert ktk.__version__ == _native.version()
    for name in ktk.__all__:
        assert getattr(ktk, name) is not None
    assert (Path(ktk.get_include()) / "ktk.h").is_file()


def test_source_tree_explains_itself() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ktk._native"
    result = run_python(code, "-S", "-I")
    assert result.returncode == 1
    assert "imported from its source tree, or was not built" in result.stderr


# Exceptions.


def test_exceptions_have_a_base_and_a_builtin() -> None:
    builtin = {
        "KtkArgumentError": ValueError,
        "KtkUnsupportedError": NotImplementedError,
        "KtkMemoryError": MemoryError,
        "KtkSystemError": OSError,
        "KtkStateError": RuntimeError,
        "KtkInternalError": RuntimeError,
    }
    assert {cls.__name__ for cls in errors.STATUS_ERRORS.values()} == builtin.keys()
    for cls in errors.STATUS_ERRORS.values():
        assert issubclass(cls, KtkError)
        assert issubclass(cls, builtin[cls.__name__])
        assert str(cls("what went wrong")) == "what went wrong"


def test_an_unknown_status_is_a_defect() -> None:
    assert isinstance(errors.error_from_status(99, ""), KtkInternalError)
    assert "status 99" in str(errors.error_from_status(99, ""))


# Arguments. Each case is a call that both bindings must refuse in the same words.

Call = Callable[[ModuleType, Any, Any, Any], object]


def forward_case(**changes: Any) -> Call:
    batch = Batch()
    return lambda module, pool, moe, queue: moe.forward(**batch.arguments(**changes))


def submit_case(**changes: Any) -> Call:
    batch = Batch()
    return lambda module, pool, moe, queue: queue.submit_forward(moe, **batch.arguments(**changes))


def moe_case(**changes: Any) -> Call:
    return lambda module, pool, moe, queue: make_moe(pool, module, **changes).close()


def pack_case(*changes: tuple[int, Any]) -> Call:
    arrays = matrices()
    arguments: list[Any] = [0, _native.DTYPE_F32, *(array.ctypes.data for array in arrays), 0, 0, 0]
    for index, value in changes:
        arguments[index] = value
    return lambda module, pool, moe, queue: (arrays, moe.pack_expert(*arguments))


def write_trace(module: ModuleType, path: Any) -> None:
    with module.Trace() as trace:
        trace.stop()
        trace.write(path)


REFUSED: dict[str, tuple[type[Exception], str, Call]] = {
    "isa of another type": (TypeError, "name must be a str, got int", lambda m, p, e, q: m.isa_check(3)),
    "isa with null": (KtkArgumentError, "null character", lambda m, p, e, q: m.isa_check("a\0b")),
    "isa unknown": (KtkError, "sse9", lambda m, p, e, q: m.isa_check("sse9")),
    "kernel of unknown isa": (KtkError, "sse9", lambda m, p, e, q: m.isa_kernel("sse9", 0, 1)),
    "kernel of unknown format": (
        KtkArgumentError,
        "format",
        lambda m, p, e, q: m.isa_kernel("portable", 9, 1),
    ),
    "kernel format too big": (
        KtkArgumentError,
        "format must be between -2147483648 and 2147483647, got 4294967296",
        lambda m, p, e, q: m.isa_kernel("portable", 2**32, 1),
    ),
    "kernel rows as float": (
        TypeError,
        "rows must be an int, got float",
        lambda m, p, e, q: m.isa_kernel("portable", 0, 1.0),
    ),
    "pool of nothing": (
        KtkArgumentError,
        "subpool_thread_count must have at least one",
        lambda m, p, e, q: m.Pool([]),
    ),
    "pool of an int": (TypeError, "must be a sequence of ints, got int", lambda m, p, e, q: m.Pool(2)),
    "pool of text": (TypeError, "must be a sequence of ints, got str", lambda m, p, e, q: m.Pool("2")),
    "pool of floats": (
        TypeError,
        r"subpool_thread_count\[1\] must be an int, got float",
        lambda m, p, e, q: m.Pool([1, 2.0], [0, 0]),
    ),
    "pool with too few nodes": (
        KtkArgumentError,
        "2 elements and subpool_numa_map 1",
        lambda m, p, e, q: m.Pool([1, 1], [0]),
    ),
    "pool with no threads": (KtkArgumentError, "", lambda m, p, e, q: m.Pool([0])),
    "pool on a missing node": (KtkArgumentError, "999", lambda m, p, e, q: m.Pool([1], [999])),
    "pool flag": (
        TypeError,
        "bind_threads must be an int, got str",
        lambda m, p, e, q: m.Pool([1], None, "yes"),
    ),
    "pool flag of 2": (KtkArgumentError, "between 0 and 1, got 2", lambda m, p, e, q: m.Pool([1], None, 2)),
    "pool spin": (
        KtkArgumentError,
        "spin_ns must be between",
        lambda m, p, e, q: m.Pool([1], None, True, 2**63),
    ),
    "layer of no pool": (
        TypeError,
        "pool must be a ktk._native.Pool, got",
        lambda m, p, e, q: make_moe(None, m),
    ),
    "layer of no experts": (KtkArgumentError, "num_experts", moe_case(num_experts=0)),
    "layer of bool experts": (TypeError, "num_experts must be an int, got bool", moe_case(num_experts=True)),
    "layer of float width": (TypeError, "hidden_size must be an int, got float", moe_case(hidden_size=64.0)),
    "layer too wide": (KtkArgumentError, "hidden_size must be between", moe_case(hidden_size=2**31)),
    "layer of unknown format": (KtkArgumentError, "format", moe_case(format=17)),
    "layer top_k over experts": (KtkArgumentError, "top_k", moe_case(top_k=3)),
    "layer with odd group": (KtkArgumentError, "group_size", moe_case(format=2, group_size=48)),
    "layer with grouped bf16": (KtkArgumentError, "group_size", moe_case(group_size=32)),
    "layer with rotated bf16": (KtkArgumentError, "rotated", moe_case(rotated=True)),
    "layer limit as text": (TypeError, "swiglu_limit must be a float, got str", moe_case(swiglu_limit="7")),
    "layer limit NaN": (KtkArgumentError, "swiglu_limit", moe_case(swiglu_limit=float("nan"))),
    "layer alpha negative": (KtkArgumentError, "swiglu_alpha", moe_case(swiglu_alpha=-1.0)),
    "layer on unknown isa": (KtkError, "sse9", moe_case(isa="sse9")),
    "layer isa as int": (TypeError, "isa must be a str, got int", moe_case(isa=2)),
    "layer mask negative": (KtkArgumentError, "gpu_experts_mask_ptr", moe_case(gpu_experts_mask_ptr=-8)),
    "pack of missing expert": (KtkArgumentError, "expert", pack_case((0, EXPERTS))),
    "pack of negative expert": (KtkArgumentError, "expert", pack_case((0, -1))),
    "pack of unknown dtype": (KtkArgumentError, r"dtype must be DTYPE_F32 \(0\).*got 5", pack_case((1, 5))),
    "pack of null": (KtkArgumentError, "up_ptr is a null pointer", pack_case((3, 0))),
    "pack of a tensor": (TypeError, "gate_ptr must be an int, got ndarray", pack_case((2, np.zeros(3)))),
    "pack misaligned": (KtkArgumentError, "down_ptr must be aligned to 4 bytes", pack_case((4, 4098))),
    "pack bias misaligned": (KtkArgumentError, "up_bias_ptr must be aligned to 4", pack_case((6, 4098))),
    "part unknown": (KtkArgumentError, "part", lambda m, p, e, q: e.part_bytes(99)),
    "part as text": (TypeError, "part must be an int, got str", lambda m, p, e, q: e.part_bytes("gate")),
    "export to null": (
        KtkArgumentError,
        "ptr is a null pointer",
        lambda m, p, e, q: e.export_part(0, 0, 0, 8),
    ),
    "export negative": (
        KtkArgumentError,
        "bytes must be between 0",
        lambda m, p, e, q: e.export_part(0, 0, 64, -1),
    ),
    "import of wrong size": (
        KtkArgumentError,
        "",
        lambda m, p, e, q: e.import_part(0, 0, BUFFER.ctypes.data, 3),
    ),
    "forward of null": (KtkArgumentError, "num_tokens_ptr is a null", forward_case(num_tokens_ptr=0)),
    "forward of negative": (KtkArgumentError, "input_ptr must be an address", forward_case(input_ptr=-4096)),
    "forward misaligned ids": (KtkArgumentError, "aligned to 8 bytes", forward_case(expert_ids_ptr=4100)),
    "forward misaligned weights": (KtkArgumentError, "aligned to 4", forward_case(expert_weights_ptr=4098)),
    "forward misaligned bf16": (
        KtkArgumentError,
        "output_ptr must be aligned to 2 bytes, got address 0x1001",
        forward_case(output_ptr=4097, output_dtype=_native.DTYPE_BF16),
    ),
    "forward of a float": (TypeError, "output_ptr must be an int, got float", forward_case(output_ptr=1.0)),
    "forward of None": (TypeError, "input_ptr must be an int, got NoneType", forward_case(input_ptr=None)),
    "forward dtype": (KtkArgumentError, "input_dtype must be", forward_case(input_dtype=3)),
    "forward dtype type": (TypeError, "output_dtype must be an int", forward_case(output_dtype="f32")),
    "forward top_k": (KtkArgumentError, "top_k", forward_case(top_k=3)),
    "forward flag": (TypeError, "incremental must be an int, got NoneType", forward_case(incremental=None)),
    "submit of null": (KtkArgumentError, "expert_weights_ptr is a null", submit_case(expert_weights_ptr=0)),
    "submit top_k": (KtkArgumentError, "top_k", submit_case(top_k=0)),
    "submit to no layer": (
        TypeError,
        "moe must be a ktk._native.Moe, got Pool",
        lambda m, p, e, q: q.submit_forward(p, **Batch().arguments()),
    ),
    "submit of no function": (TypeError, "a task must be callable, got int", lambda m, p, e, q: q.submit(3)),
    "submit to a text stream": (
        TypeError,
        "stream must be an int, got str",
        lambda m, p, e, q: q.submit_with_cuda_stream("0", print),
    ),
    "submit to a negative stream": (
        KtkArgumentError,
        "stream must be between 0",
        lambda m, p, e, q: q.submit_with_cuda_stream(-1, print),
    ),
    "sync negative": (KtkArgumentError, "allow_n_pending", lambda m, p, e, q: q.sync(-1)),
    "sync of float": (TypeError, "allow_n_pending must be an int, got float", lambda m, p, e, q: q.sync(0.5)),
    "trace of text": (TypeError, "spans_per_thread must be an int", lambda m, p, e, q: m.Trace("all")),
    "trace of negative": (KtkArgumentError, "spans", lambda m, p, e, q: m.Trace(-1)),
    "trace too long": (KtkArgumentError, "spans", lambda m, p, e, q: m.Trace(2**40)),
    "trace to no path": (
        TypeError,
        "path must be a str or os.PathLike",
        lambda m, p, e, q: write_trace(m, 3),
    ),
    "trace to null": (KtkArgumentError, "null character", lambda m, p, e, q: write_trace(m, "a\0b")),
    "trace to a missing folder": (
        KtkSystemError,
        "/no/such/folder/trace.json",
        lambda m, p, e, q: write_trace(m, "/no/such/folder/trace.json"),
    ),
    "trace while it runs": (KtkStateError, "", lambda m, p, e, q: m.Trace().json()),
    "thread limit of text": (
        TypeError,
        "num_threads must be an int",
        lambda m, p, e, q: m.set_num_threads("2"),
    ),
    "thread limit negative": (KtkArgumentError, "num_threads", lambda m, p, e, q: m.set_num_threads(-1)),
    "queue of no pool": (
        TypeError,
        "pool must be a ktk._native.Pool, got int",
        lambda m, p, e, q: m.Queue(1),
    ),
    "unknown option": (TypeError, "", moe_case(colour="red")),
}

BUFFER = np.zeros(1 << 16, np.uint8)


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_in_the_same_words(case: str) -> None:
    expected, pattern, call = REFUSED[case]
    said = []
    for name in ("cython", "ctypes"):
        module = importlib.import_module(f"ktk._native._{name}")
        pool = module.Pool([1], [0], False, 0)
        moe = make_moe(pool, module)
        load(moe)
        queue = module.Queue(pool)
        with pytest.raises(expected, match=pattern or None) as caught:
            call(module, pool, moe, queue)
        said.append((type(caught.value), str(caught.value)))
        batch = Batch()
        moe.forward(**batch.arguments())
        assert np.any(batch.output)
        queue.close()
        moe.close()
        pool.close()
    if case != "unknown option":
        assert said[0] == said[1]
        assert said[0][1]


def test_forward_is_the_same_through_both_bindings() -> None:
    outputs = []
    for name in ("cython", "ctypes"):
        module = importlib.import_module(f"ktk._native._{name}")
        with (
            module.Pool([2], None, False, 0) as pool,
            make_moe(pool, module) as moe,
            module.Queue(pool) as queue,
        ):
            load(moe)
            direct, queued, streamed = Batch(), Batch(), Batch()
            moe.forward(**direct.arguments())
            queue.submit_forward(moe, **queued.arguments())
            queue.sync()
            queue.submit_forward_with_cuda_stream(None, moe, **streamed.arguments())
            queue.sync_with_cuda_stream(0)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            queue.sync()
            outputs += [direct.output, queued.output, streamed.output]
    assert np.any(outputs[0])
    for output in outputs:
        assert output.tobytes() == outputs[0].tobytes()


def test_integers_of_other_libraries_are_taken(pool: Any) -> None:
    with make_moe(pool, num_experts=np.int64(EXPERTS), strict=0, swiglu_limit=np.float32(0)) as moe:
        load(moe)
        batch = Batch()
        moe.forward(**batch.arguments(num_tokens_ptr=np.uint64(batch.count.ctypes.data)))
        assert np.any(batch.output)


def test_parts_travel(pool: Any) -> None:
    with make_moe(pool) as first, make_moe(pool) as second:
        load(first)
        for expert in range(EXPERTS):
            for part in range(9):
                size = first.part_bytes(part)
                assert size == second.part_bytes(part)
                if size:
                    buffer = np.zeros(size, np.uint8)
                    first.export_part(expert, part, buffer.ctypes.data, size)
                    second.import_part(expert, part, buffer.ctypes.data, size)
        a, b = Batch(), Batch()
        first.forward(**a.arguments())
        second.forward(**b.arguments())
        assert a.output.tobytes() == b.output.tobytes()
        assert first.weight_bytes > 0
        assert first.isa == _native.isa_default()


# Handles.


@pytest.mark.parametrize("name", ["Pool", "Moe", "Queue"])
def test_closed_handles_say_so(name: str) -> None:
    pool = _native.Pool([1], None, False, 0)
    if name == "Pool":
        handle: Any = pool
    else:
        handle = make_moe(pool) if name == "Moe" else _native.Queue(pool)
    assert not handle.closed
    handle.close()
    handle.close()
    assert handle.closed
    batch = Batch().arguments()
    calls: dict[str, list[Callable[[], object]]] = {
        "Pool": [
            lambda: handle.warnings,
            lambda: handle.thread_count,
            lambda: handle.subpool_count,
            lambda: make_moe(handle),
            lambda: _native.Queue(handle),
        ],
        "Moe": [
            lambda: handle.isa,
            lambda: handle.weight_bytes,
            lambda: handle.part_bytes(0),
            lambda: handle.export_part(0, 0, BUFFER.ctypes.data, 8),
            lambda: handle.import_part(0, 0, BUFFER.ctypes.data, 8),
            lambda: handle.forward(**batch),
            lambda: load(handle),
        ],
        "Queue": [
            lambda: handle.pending,
            lambda: handle.submit(print),
            lambda: handle.submit_with_cuda_stream(0, print),
            lambda: handle.sync(),
            lambda: handle.sync_with_cuda_stream(0),
        ],
    }
    for call in [*calls[name], handle.__enter__]:
        with pytest.raises(KtkStateError, match=f"this {name} is closed"):
            call()


def test_a_pool_in_use_stays_open() -> None:
    pool = _native.Pool([1], None, False, 0)
    moe = make_moe(pool)
    load(moe)
    with pytest.raises(KtkStateError):
        pool.close()
    assert not pool.closed
    batch = Batch()
    moe.forward(**batch.arguments())
    assert np.any(batch.output)
    moe.close()
    pool.close()


def test_submitting_to_a_closed_layer_fails(pool: Any) -> None:
    with _native.Queue(pool) as queue:
        moe = make_moe(pool)
        moe.close()
        with pytest.raises(KtkStateError, match="this Moe is closed"):
            queue.submit_forward(moe, **Batch().arguments())
        queue.sync()


def test_closing_a_layer_waits_for_its_tasks(pool: Any) -> None:
    with _native.Queue(pool) as queue:
        moe = make_moe(pool)
        load(moe)
        batch = Batch()
        queue.submit(lambda: time.sleep(0.05))
        queue.submit_forward(moe, **batch.arguments())
        moe.close()
        assert np.any(batch.output)
        queue.sync()


def test_the_collector_frees_handles_in_any_order() -> None:
    gc.collect()
    before = settled_threads()

    class Holder:
        pass

    for order in range(3):
        holder: Any = Holder()
        holder.itself = holder
        pool = _native.Pool([3], None, False, 0)
        moe, queue = make_moe(pool), _native.Queue(pool)
        # In different orders, as the collector may take them.
        handles = [pool, moe, queue]
        holder.first, holder.second, holder.third = handles[order:] + handles[:order]
        gone = [weakref.ref(pool), weakref.ref(moe), weakref.ref(queue)]
        assert count_threads() > before
        del holder, pool, moe, queue, handles
        gc.collect()
        assert [reference() for reference in gone] == [None] * 3
        assert no_more_threads_than(before)


def test_handles_of_subclasses_in_a_cycle_are_freed() -> None:
    gc.collect()
    before = settled_threads()

    class MyPool(_native.Pool):
        pass

    class MyQueue(_native.Queue):
        pass

    pool: Any = MyPool([2], None, False, 0)
    queue: Any = MyQueue(pool)
    queue.itself, pool.queue = queue, queue
    queue.submit(lambda: None)
    if not torch.cuda.is_available():
        queue.submit_with_cuda_stream(0, functools.partial(id, queue))
    queue.sync()
    del pool, queue
    gc.collect()
    assert no_more_threads_than(before)


def test_a_pool_outlives_its_name() -> None:
    pool = _native.Pool([1], None, False, 0)
    moe = make_moe(pool)
    load(moe)
    del pool
    gc.collect()
    batch = Batch()
    moe.forward(**batch.arguments())
    assert np.any(batch.output)


def test_initialising_twice_replaces_the_handle() -> None:
    before = settled_threads()
    pool = _native.Pool([2], None, False, 0)
    pool.__init__([3], None, False, 0)  # type: ignore[misc]
    assert pool.thread_count == 3
    pool.close()
    assert no_more_threads_than(before)


def test_closing_from_another_thread_waits_for_calls(pool: Any) -> None:
    queue = _native.Queue(pool)
    release = threading.Event()
    queue.submit(lambda: release.wait(10))
    syncing = threading.Thread(target=queue.sync)
    syncing.start()
    time.sleep(0.02)
    closing = threading.Thread(target=queue.close)
    closing.start()
    time.sleep(0.02)
    assert syncing.is_alive() and closing.is_alive()
    release.set()
    syncing.join(10)
    closing.join(10)
    assert not syncing.is_alive() and not closing.is_alive()
    assert queue.closed


# Queue.


@pytest.fixture
def queue(pool: Any) -> Any:
    with _native.Queue(pool) as queue:
        yield queue


def test_tasks_run_in_order_on_one_thread(queue: Any) -> None:
    seen: list[tuple[int, int]] = []
    for index in range(200):
        queue.submit(lambda index=index: seen.append((index, threading.get_ident())))
    queue.sync()
    assert [index for index, _ in seen] == list(range(200))
    assert len({thread for _, thread in seen}) == 1
    assert threading.get_ident() not in {thread for _, thread in seen}
    assert queue.pending == 0


def test_sync_leaves_what_it_may(queue: Any) -> None:
    gate = threading.Event()
    seen: list[str] = []
    queue.submit(lambda: seen.append("first"))
    queue.submit(lambda: gate.wait(10))
    queue.sync(1)
    assert seen == ["first"]
    assert queue.pending == 1
    gate.set()
    queue.sync()
    assert queue.pending == 0


class Odd(Exception):
    """An exception that ktk knows nothing of."""


def fail_with(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [Odd("mine"), KeyError("key"), SystemExit(3), KtkStateError("own")])
def test_sync_raises_the_exception_itself(queue: Any, error: BaseException) -> None:
    seen: list[int] = []
    queue.submit(lambda: fail_with(error))
    queue.submit(lambda: fail_with(ValueError("a later one")))
    queue.submit(lambda: seen.append(1))
    with pytest.raises(type(error)) as caught:
        queue.sync()
    assert caught.value is error
    assert "fail_with" in {entry.name for entry in traceback.extract_tb(error.__traceback__)}
    assert seen == [1]
    queue.sync()
    queue.submit(lambda: seen.append(2))
    queue.sync()
    assert seen == [1, 2]


def test_a_failed_forward_is_raised_by_sync_and_leaves_nan(pool: Any, queue: Any) -> None:
    with make_moe(pool) as moe:
        batch = Batch()
        queue.submit_forward(moe, **batch.arguments())
        with pytest.raises(KtkStateError):
            queue.sync()
        assert np.all(np.isnan(batch.output))
        load(moe)
        queue.submit_forward(moe, **batch.arguments())
        queue.sync()
        assert np.all(np.isfinite(batch.output))


def test_both_kinds_of_failure_are_kept(pool: Any, queue: Any) -> None:
    with make_moe(pool) as moe:
        batch = Batch()
        queue.submit_forward(moe, **batch.arguments())
        queue.submit(lambda: fail_with(Odd("mine")))
        with pytest.raises(Odd) as caught:
            queue.sync()
        assert isinstance(caught.value.__context__, KtkStateError)
        queue.sync()


@pytest.mark.parametrize("name", ["sync", "sync_with_cuda_stream", "close"])
def test_a_task_cannot_wait_for_itself(queue: Any, name: str) -> None:
    arguments = (0,) if name == "sync_with_cuda_stream" else ()
    queue.submit(lambda: getattr(queue, name)(*arguments))
    with pytest.raises(KtkStateError, match=f"Queue.{name} was called by a task of the same queue"):
        queue.sync()


def test_a_task_may_submit(queue: Any) -> None:
    seen: list[str] = []
    queue.submit(lambda: queue.submit(lambda: seen.append("inner")))
    queue.sync()
    queue.sync()
    assert seen == ["inner"]


def test_callables_are_dropped_after_they_ran(queue: Any) -> None:
    known = len(_tasks._waiting)
    references = []
    for index in range(3000):
        task: Callable[[], object] = lambda index=index: index  # noqa: E731
        if index % 100 == 0:
            references.append(weakref.ref(task))
        queue.submit(task)
        if index % 1000 == 999:
            queue.sync()
    del task
    queue.sync()
    assert len(_tasks._waiting) == known
    assert [reference() for reference in references] == [None] * len(references)


def test_a_raised_exception_is_not_kept(queue: Any) -> None:
    error = Odd("mine")
    gone = weakref.ref(error)
    queue.submit(lambda error=error: fail_with(error))
    with pytest.raises(Odd):
        queue.sync()
    del error
    gc.collect()
    assert gone() is None


def test_callables_for_a_stream_live_as_long_as_the_queue(pool: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("stream 0 is in the order of the host only without a CUDA device")
    known = len(_tasks._replayable)
    queue = _native.Queue(pool)
    seen: list[int] = []

    def task() -> None:
        seen.append(len(seen))

    unhashable = UnhashableTask(seen)
    for _ in range(50):
        queue.submit_with_cuda_stream(None, task)
        queue.submit_with_cuda_stream(0, unhashable)
    queue.sync_with_cuda_stream(None)
    assert seen == list(range(100))
    assert len(_tasks._replayable) == known + 2
    queue.close()
    assert len(_tasks._replayable) == known


class UnhashableTask:
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def __eq__(self, other: object) -> bool:
        return True

    def __call__(self) -> None:
        self.seen.append(len(self.seen))


def test_a_task_number_of_a_closed_queue_is_refused() -> None:
    assert _tasks.run_task(0) == 1


NO_CUDA = "/no/such/libcudart.so"


def test_a_stream_without_cuda_is_a_system_error() -> None:
    code = """
from ktk import _native
from ktk.errors import KtkSystemError
queue = _native.Queue(_native.Pool([1]))
queue.submit_with_cuda_stream(0, lambda: print("ran"))
queue.sync_with_cuda_stream(None)
for call in (lambda: queue.submit_with_cuda_stream(4096, print), lambda: queue.sync_with_cuda_stream(4096)):
    try:
        call()
    except KtkSystemError as error:
        print(error)
queue.sync()
"""
    ran, *errors = printed(code, KTK_BINDING=_native.binding, KTK_CUDART=NO_CUDA).splitlines()
    assert ran == "ran"
    assert len(errors) == 2
    assert all("a CUDA stream was given, but there is no CUDA run time" in line for line in errors)


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a CUDA run time without a device, whose graphs a test captures and replays."""
    compiler = next((path for word in ("c++", "g++", "clang++") if (path := shutil.which(word))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("fake_cuda") / "libcudart.so"
    source = ROOT / "native" / "tests" / "fake_cudart.cpp"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return str(library)


REPLAY = """
import ctypes, os
import numpy as np
from ktk import _native
fake = ctypes.CDLL(os.environ["KTK_CUDART"])
stream = 4096
rng = np.random.default_rng(5)
pool = _native.Pool([1], None, False, 0)
moe = _native.Moe(pool, num_experts=2, top_k=1, hidden_size=8, intermediate_size=16, max_tokens=3, format=1)
weights = [rng.standard_normal(shape, np.float32) for shape in ((16, 8), (16, 8), (8, 16))]
for expert in range(2):
    moe.pack_expert(expert, 0, *(weight.ctypes.data for weight in weights))
count, ids = np.array([3], np.int32), np.array([[0], [1], [0]])
scores, x = np.ones((3, 1), np.float32), np.zeros((3, 8), np.float32)
y, expected = np.zeros_like(x), np.zeros_like(x)
def arguments(output):
    arrays = (count, 1, ids, scores, x, 0, output, 0)
    return [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arrays]
queue = _native.Queue(pool)
ran = []
def task():
    ran.append(1)
    if len(ran) == 50:
        raise LookupError("the fiftieth")
fake.fake_set_capture(1)
queue.submit_forward_with_cuda_stream(stream, moe, *arguments(y))
queue.submit_with_cuda_stream(stream, task)
queue.sync_with_cuda_stream(stream)
fake.fake_set_capture(0)
for step in range(100):
    x[:] = rng.standard_normal(x.shape)
    count[0] = 1 + step % 3
    fake.fake_replay()
    fake.fake_synchronize()
    moe.forward(*arguments(expected))
    assert np.array_equal(y[:count[0]], expected[:count[0]]) and y.any()
    try:
        queue.sync()
    except LookupError as error:
        print(step, error)
print(len(ran))
queue.submit_with_cuda_stream(stream, lambda: print("once", flush=True))
queue.sync_with_cuda_stream(stream)
fake.fake_synchronize()
moe.close()
y[:] = 0
fake.fake_replay()
fake.fake_synchronize()
try:
    queue.sync()
except Exception as error:
    print(type(error).__name__, np.isnan(y[:count[0]]).all() or not y.any())
queue.close()
fake.fake_stop()
print(len(ran))
"""


def test_a_captured_graph_replays_forwards_and_callables(fake_cuda: str) -> None:
    lines = printed(REPLAY, KTK_BINDING=_native.binding, KTK_CUDART=fake_cuda).splitlines()
    assert lines == ["49 the fiftieth", "100", "once", "KtkStateError True", "101"]


def test_waiting_leaves_the_interpreter_to_others(queue: Any) -> None:
    released = threading.Event()
    queue.submit(lambda: released.wait(10))
    threading.Timer(0.02, released.set).start()
    queue.sync()
    assert released.is_set()


# The end of a process.


@pytest.mark.parametrize("close", ["", "queue.close(); moe.close(); pool.close()"])
def test_a_process_ends_cleanly_with_work_pending(close: str) -> None:
    code = f"""
import time
from ktk import _native
pool = _native.Pool([2])
moe = _native.Moe(pool, num_experts=2, top_k=1, hidden_size=8, intermediate_size=8, max_tokens=4, format=0)
queue = _native.Queue(pool)
queue.submit_with_cuda_stream(0, lambda: queue)
queue.submit(lambda: time.sleep(0.1))
queue.submit(lambda: print("ran", flush=True))
{close}
"""
    assert printed(code, "-X", "dev", KTK_BINDING=_native.binding, KTK_CUDART=NO_CUDA) == "ran"


def test_a_process_ends_cleanly_when_a_task_failed() -> None:
    code = """
from ktk import _native
queue = _native.Queue(_native.Pool([1]))
queue.submit(lambda: 1 / 0)
"""
    assert printed(code, "-X", "dev", KTK_BINDING=_native.binding) == ""


# Trace and thread limit.


def test_a_trace_names_what_ran(pool: Any, tmp_path: Path) -> None:
    with make_moe(pool, layer_index=7) as moe, _native.Trace() as trace:
        load(moe)
        moe.forward(**Batch().arguments())
        trace.stop()
        trace.stop()
        events = json.loads(trace.json())["traceEvents"]
        assert events
        trace.write(tmp_path / "trace.json")
        assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == events
    assert trace.closed
    with pytest.raises(KtkStateError, match="this Trace is closed"):
        trace.json()


def test_the_thread_limit_changes_no_result(pool: Any) -> None:
    before = _native.get_num_threads()
    with make_moe(pool) as moe:
        load(moe)
        free, limited = Batch(), Batch()
        moe.forward(**free.arguments())
        _native.set_num_threads(1)
        try:
            assert _native.get_num_threads() == 1
            moe.forward(**limited.arguments())
        finally:
            _native.set_num_threads(before)
    assert _native.get_num_threads() == before
    assert free.output.tobytes() == limited.output.tobytes()


# Instruction sets.


def test_isa_names_are_in_order_of_preference() -> None:
    names = _native.isa_names()
    assert names.index("portable") > names.index("avx2") > names.index("amx")
    _native.isa_check("portable")
    _native.isa_check(_native.isa_default())
    assert not _native.isa_default().endswith("_emulated")


def test_an_isa_that_cannot_run_names_the_missing_requirement() -> None:
    refused = 0
    for name in _native.isa_names():
        try:
            _native.isa_check(name)
        except KtkUnsupportedError as error:
            refused += 1
            assert name in str(error)
    if not refused:
        pytest.skip("every instruction set runs here")


def test_the_environment_names_the_default_isa(isa: str) -> None:
    code = "from ktk import _native; print(_native.isa_default())"
    assert printed(code, KTK_BINDING=_native.binding, KTK_ISA=isa) == isa


def test_a_wrong_default_isa_is_an_error_where_it_is_used() -> None:
    code = """
from ktk import _native
from ktk.errors import KtkError
sizes = dict(num_experts=2, top_k=1, hidden_size=8, intermediate_size=8, max_tokens=4, format=0)
for call in (_native.isa_default, lambda: _native.Moe(_native.Pool([1]), **sizes)):
    try:
        call()
    except KtkError as error:
        print(error)
"""
    lines = printed(code, KTK_BINDING=_native.binding, KTK_ISA="sse9").splitlines()
    assert len(lines) == 2
    assert all("sse9" in line for line in lines)
