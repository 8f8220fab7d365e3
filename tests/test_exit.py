"""Processes that end, fork or are interrupted in any state of pools and queues: nothing hangs or crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import FORK_IS_MEANT
from ktk import _native

# A layer of two shards on one node, a queue, and a forward with a known answer.
SET_UP = """
import atexit, os, signal, sys, threading, time
import numpy as np
import ktk
from ktk import _native

import json
node = next(n["id"] for n in json.loads(_native.machine_json())["nodes"] if n["cpus_allowed"])
def make(spin_ns=None):
    return ktk.CPUInfer(ktk.WorkerPoolConfig(2, [node, node], [2, 1], bind_threads=False, spin_ns=spin_ns))
cpu = make(SPIN)
rng = np.random.default_rng(0)
E, H, I, T = 3, 64, 256, 7
moe = _native.Moe(cpu.native_pool, num_experts=E, top_k=2, hidden_size=H, intermediate_size=I, max_tokens=T,
                  format=_native.FORMAT_INT8)
for expert in range(E):
    parts = [rng.standard_normal(shape, np.float32) for shape in ((I, H), (I, H), (H, I))]
    moe.pack_expert(expert, _native.DTYPE_F32, *(part.ctypes.data for part in parts))
count, ids = np.array([T], np.int32), rng.integers(0, E, (T, 2))
weights, x = rng.random((T, 2), np.float32), rng.standard_normal((T, H), np.float32)
class Batch:
    def __init__(self):
        self.y = np.zeros((T, H), np.float32)
        pointers = [a.ctypes.data for a in (count, ids, weights, x)]
        self.args = (pointers[0], 2, *pointers[1:], _native.DTYPE_F32, self.y.ctypes.data, _native.DTYPE_F32)
    def forward(self):
        moe.forward(*self.args)
        return self
    def submit(self):
        cpu.submit(ktk.ForwardTask(moe, *self.args))
        return self
    def right(self):
        return self.y.tobytes() == expected
expected = Batch().forward().y.tobytes()
def slow(seconds=0.3):
    time.sleep(seconds)
"""

SPINS = {"parked": "0", "spinning": "10**10"}


def start(code: str, spin: str = "None") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-Wignore::RuntimeWarning",
            FORK_IS_MEANT,
            "-c",
            SET_UP.replace("SPIN", spin) + code,
        ],
        env={**os.environ, "KTK_BINDING": _native.binding},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code: str, spin: str = "None") -> tuple[int, str, str]:
    process = start(code, spin)
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hung: {process.communicate()}")
    return process.returncode, out, err


STATES = {
    "idle": "",
    "pending": """
kept = [Batch().submit() for _ in range(20)]
cpu.submit(slow)
kept.append(Batch().submit())
""",
    "failed": "cpu.submit(lambda: 1 / 0)",
    "closed": "moe.close(); cpu.close()",
    "traced": "trace = _native.Trace(); kept = Batch().submit()",
    "limited": "ktk.set_num_threads(1); Batch().forward()",
    "working": """
def work():
    while True:
        Batch().forward()
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
""",
    "syncing": """
cpu.submit(slow)
threading.Thread(target=cpu.sync, daemon=True).start()
time.sleep(0.05)
""",
    "packing": """
def pack():
    while True:
        moe.pack_expert(0, _native.DTYPE_F32, *(part.ctypes.data for part in parts))
threading.Thread(target=pack, daemon=True).start()
time.sleep(0.05)
""",
    "exit handler": """
def last():
    assert Batch().forward().right()
    batch = Batch().submit()
    cpu.sync()
    assert batch.right()
    print("handled", flush=True)
atexit.register(last)
""",
}


@pytest.mark.parametrize("spin", SPINS.values(), ids=SPINS)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_the_interpreter_ends(state: str, spin: str) -> None:
    out = "handled\n" if "handled" in state else ""
    assert run(state, spin) == (0, out, "")


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_the_process_ends_at_once(state: str) -> None:
    assert run(state + "\nos._exit(5)", SPINS["spinning"]) == (5, "", "")


@pytest.mark.parametrize("state", ["pending", "working", "syncing"])
def test_an_uncaught_exception_ends_it(state: str) -> None:
    code, _, err = run(STATES[state] + "\nraise LookupError('mine')")
    assert code == 1
    assert err.strip().endswith("LookupError: mine")


def test_a_task_ends_the_process() -> None:
    assert run("cpu.submit(lambda: os._exit(4))\ncpu.sync()") == (4, "", "")


def test_an_exit_inside_a_task_is_raised_by_sync() -> None:
    assert run("cpu.submit(lambda: sys.exit(6))\ncpu.sync()")[0] == 6


def when_ready(code: str) -> subprocess.Popen[str]:
    process = start(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.mark.parametrize("state", ["idle", "pending", "working", "syncing"])
def test_a_signal_ends_the_process(state: str) -> None:
    process = when_ready(
        STATES[state] + "\nprint('ready', flush=True)\ncpu.submit((slow, (60,)))\ncpu.sync()"
    )
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_reaches_the_thread_that_waits() -> None:
    # A shell ignores SIGINT in what it starts in the background, and children inherit that.
    process = when_ready("""
signal.signal(signal.SIGINT, signal.default_int_handler)
print('ready', flush=True)
try:
    for _ in range(100):
        cpu.submit((slow, (0.1,)))
        cpu.sync()
except KeyboardInterrupt:
    cpu.sync()
    assert Batch().forward().right()
    print("interrupted")
""")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("interrupted\n", "")
    assert process.returncode == 0


def test_signal_handlers_disturb_no_work() -> None:
    code = """
seen = 0
def handle(*_):
    global seen
    seen += 1
    assert threading.current_thread() is threading.main_thread()
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
end = time.monotonic() + 0.5
while time.monotonic() < end:
    assert Batch().forward().right()
    batch = Batch().submit()
    cpu.sync()
    assert batch.right()
signal.setitimer(signal.ITIMER_REAL, 0)
assert seen > 10, seen
"""
    assert run(code) == (0, "", "")


ENDS = {"returns": "pass", "exits": "sys.exit(0)", "leaves": "os._exit(0)"}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("state", ["idle", "pending", "working"])
def test_the_child_of_a_fork_works_and_ends(state: str, end: str) -> None:
    code = (
        STATES[state]
        + f"""
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    assert Batch().forward().right()
    batch = Batch().submit()
    cpu.sync()
    assert batch.right()
    moe.close()
    cpu.close()
    with make() as fresh:
        fresh.submit(lambda: None)
        fresh.sync()
    {end}
else:
    assert os.waitpid(pid, 0)[1] == 0
    assert Batch().forward().right()
"""
    )
    assert run(code)[::2] == (0, "")


def test_children_of_children() -> None:
    code = """
depth = 0
kept = []
while depth < 3:
    kept.append(Batch().submit())
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        break
    depth += 1
assert Batch().forward().right()
batch = Batch().submit()
cpu.sync()
assert batch.right()
"""
    assert run(code) == (0, "", "")


def test_forked_workers_of_multiprocessing() -> None:
    code = """
import multiprocessing
def work(_):
    batch = Batch().submit()
    cpu.sync()
    return batch.right() and Batch().forward().right()
with multiprocessing.get_context("fork").Pool(3) as workers:
    assert workers.map(work, range(12)) == [True] * 12
assert Batch().forward().right()
"""
    assert run(code)[::2] == (0, "")
