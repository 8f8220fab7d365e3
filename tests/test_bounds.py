"""Nothing is read or written past the caller's buffers, each of which ends at a page that cannot be touched.

An access past the end is a fault, so the work is done in a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import python_path
from layers import DTYPE_CODES, FORMATS, PART_CODES, NativeLayer, Options, pool_of, runnable_isas
from reference.packing import ExpertWeights
from reference.rounding import Array
from strategies import DTYPES, make_input, make_weights

pytestmark = pytest.mark.any_binding

_kept: list[mmap.mmap] = []


def at_the_edge(array: Array) -> Array:
    """Copy of `array` whose last byte is the last one before a page without access."""
    pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    _kept.append(memory)
    bytes_ = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    edge = bytes_.ctypes.data + pages * mmap.PAGESIZE
    if libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    end = pages * mmap.PAGESIZE
    copy = bytes_[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def use_everything(isa: str) -> None:
    """Pack, export, import and forward with every buffer at the edge."""
    rng = np.random.default_rng(61)
    with pool_of(1, 1) as pool:
        for form in FORMATS:
            for dtype in DTYPES:
                for hidden, intermediate in ((1, 1), (33, 47), (64, 128), (70, 130)):
                    plain = make_weights(rng, hidden, intermediate, dtype, biases=True)
                    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
                    expert = ExpertWeights(*(at_the_edge(getattr(plain, name)) for name in names))
                    with NativeLayer(pool, [expert], form, Options(isa=isa)) as layer:
                        for code in PART_CODES.values():
                            part = at_the_edge(np.zeros(layer.moe.part_bytes(code), np.uint8))
                            if part.size:
                                layer.moe.export_part(0, code, part.ctypes.data, part.size)
                                layer.moe.import_part(0, code, part.ctypes.data, part.size)
                        for batch in (1, 9, 17):
                            x = at_the_edge(make_input(rng, batch, hidden, dtype))
                            ids = at_the_edge(np.zeros((batch, 1), np.int64))
                            weights = at_the_edge(np.ones((batch, 1), np.float32))
                            count = at_the_edge(np.array([batch], np.int32))
                            output = at_the_edge(np.zeros((batch, hidden), dtype))
                            for incremental in (False, True):
                                layer.moe.forward(
                                    count.ctypes.data,
                                    1,
                                    ids.ctypes.data,
                                    weights.ctypes.data,
                                    x.ctypes.data,
                                    DTYPE_CODES[dtype],
                                    output.ctypes.data,
                                    DTYPE_CODES[dtype],
                                    incremental=incremental,
                                )


@pytest.mark.parametrize("isa", runnable_isas())
def test_buffers_may_end_at_a_page_without_access(isa: str) -> None:
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", f"import test_bounds; test_bounds.use_everything({isa!r})"],
        env={**os.environ, "PYTHONPATH": python_path(here)},
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
