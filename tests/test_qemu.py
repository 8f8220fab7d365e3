"""The installed library on CPUs older than this one, under qemu's user-mode emulation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from ktk import _native

QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
pytestmark = [
    pytest.mark.any_binding,
    pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian: qemu-user)"),
]

# A layer small enough for an emulator, against float arithmetic in NumPy. Weights and inputs are multiples of
# 1/8 that bf16 holds exactly; int8 is off by its quantisation, some percent of the largest output.
SMOKE = """
import sys
import numpy as np
from ktk import _native
assert "torch" not in sys.modules
print(_native.binding, _native.isa_default())
E, K, H, I, B = 3, 2, 40, 56, 5
rng = np.random.default_rng(1)
def draw(*shape):
    return (rng.integers(-8, 9, shape) / 8).astype(np.float32)
gate, up, down, x = draw(E, I, H), draw(E, I, H), draw(E, H, I), draw(B, H)
ids = np.array([rng.permutation(E)[:K] for _ in range(B)])
scores = rng.random((B, K), np.float32)
expected = np.zeros((B, H))
for token in range(B):
    for slot in range(K):
        e = ids[token, slot]
        g = gate[e].astype(float) @ x[token]
        z = g / (1 + np.exp(-g)) * (up[e].astype(float) @ x[token])
        expected[token] += scores[token, slot] * (down[e].astype(float) @ z)
count = np.array([B], np.int32)
with _native.Pool([2], None, False) as pool:
    for name, format, tolerance in (("bf16", _native.FORMAT_BF16, 0.01), ("int8", _native.FORMAT_INT8, 0.05)):
        with _native.Moe(pool, num_experts=E, top_k=K, hidden_size=H, intermediate_size=I, max_tokens=B,
                         format=format) as moe:
            for e in range(E):
                parts = [np.ascontiguousarray(matrix[e]) for matrix in (gate, up, down)]
                moe.pack_expert(e, _native.DTYPE_F32, *(part.ctypes.data for part in parts))
            y = np.full((B, H), np.nan, np.float32)
            moe.forward(count.ctypes.data, K, ids.ctypes.data, scores.ctypes.data, x.ctypes.data,
                        _native.DTYPE_F32, y.ctypes.data, _native.DTYPE_F32)
            error = np.abs(y - expected).max() / np.abs(expected).max()
            assert error < tolerance, (name, error)
            print(name, moe.isa, "ok")
"""


def emulated(cpu: str, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KTK_")}
    assert QEMU is not None
    return subprocess.run(
        [QEMU, "-cpu", cpu, sys.executable, "-c", code],
        env={**clean, "KTK_BINDING": _native.binding, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "portable"), ("Haswell", "avx2")])
def test_an_old_cpu_gets_what_it_can_run(cpu: str, isa: str) -> None:
    result = emulated(cpu, SMOKE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{_native.binding} {isa}", f"bf16 {isa} ok", f"int8 {isa} ok"]


def test_an_isa_that_is_asked_for_but_missing_is_an_error() -> None:
    code = """
from ktk import _native
from ktk.errors import KtkUnsupportedError
for call in (_native.isa_default, lambda: _native.isa_check("amx"), lambda: _native.isa_check("avx2")):
    try:
        call()
    except KtkUnsupportedError as error:
        print(error)
_native.isa_check("portable")
"""
    result = emulated("Nehalem", code, KTK_ISA="amx")
    assert result.returncode == 0, result.stderr
    default, amx, avx2 = result.stdout.splitlines()
    assert "KTK_ISA" in default
    assert "amx" in default.lower() and "amx" in amx.lower()
    assert "avx" in avx2.lower()
