"""Native layers from NumPy arrays, for tests that compare them with `reference`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from ktk import _native
from ktk.errors import KtkUnsupportedError
from reference.moe import Activation
from reference.packing import PART_NAMES, ExpertWeights, Format, U8Array
from reference.rounding import BF16, F16, F32, Array, F32Array

DTYPE_CODES = {F32: _native.DTYPE_F32, BF16: _native.DTYPE_BF16, F16: _native.DTYPE_F16}

PART_CODES = {name: getattr(_native, f"PART_{name.upper()}") for name in PART_NAMES}

FORMATS = (
    Format(_native.FORMAT_BF16),
    Format(_native.FORMAT_INT8),
    Format(_native.FORMAT_INT4),
    Format(_native.FORMAT_INT4, 32),
    Format(_native.FORMAT_INT4, 64),
    Format(_native.FORMAT_INT4, 128),
    Format(_native.FORMAT_INT8, 32),
    Format(_native.FORMAT_INT8, 128),
    Format(_native.FORMAT_FP8, 128),
    Format(_native.FORMAT_INT8, 512, rotated=True),
    Format(_native.FORMAT_INT8, rotated=True),
    Format(_native.FORMAT_INT4, 32, rotated=True),
    Format(_native.FORMAT_INT4, 128, rotated=True),
)

#: What `FORMATS` lacks, groups of more columns among it; of down they are no wider than the intermediate's.
WIDE_FORMATS = (
    *(Format(_native.FORMAT_INT8, group, rotated) for group in (256, 512) for rotated in (False, True)),
    Format(_native.FORMAT_INT8, 32, rotated=True),
    Format(_native.FORMAT_INT4, 64, rotated=True),
    Format(_native.FORMAT_INT4, rotated=True),
)

PLAIN = Activation()

#: Instruction sets whose kernels are written for checking and not for speed.
SLOW_ISAS = ("portable", "amx_emulated")


def _runs(name: str) -> bool:
    try:
        _native.isa_check(name)
    except KtkUnsupportedError:
        return False
    return True


@functools.cache
def runnable_isas() -> tuple[str, ...]:
    """Instruction sets that this build has and this CPU can run."""
    return tuple(name for name in _native.isa_names() if _runs(name))


@functools.cache
def thresholds(isa: str, kind: int, most_rows: int = 600) -> tuple[int, ...]:
    """Row counts from which an expert gets another kernel than with one row less."""
    names = [_native.isa_kernel(isa, kind, rows) for rows in range(1, most_rows + 1)]
    return tuple(rows for rows in range(2, most_rows + 1) if names[rows - 1] != names[rows - 2])


@contextmanager
def pool_of(*threads: int) -> Iterator[_native.Pool]:
    """Pool with one subpool for each thread count, all on the first NUMA node."""
    pool = _native.Pool(list(threads), [0] * len(threads), bind_threads=False)
    try:
        yield pool
    finally:
        pool.close()


@dataclasses.dataclass(frozen=True)
class Options:
    """What a layer is created with besides its experts."""

    activation: Activation = PLAIN
    masked: tuple[int, ...] = ()
    strict: bool = False
    isa: str | None = None
    max_tokens: int = 512
    top_k: int | None = None


class NativeLayer:
    """`ktk._native.Moe` over NumPy arrays; closes with the `with` block.

    Parameters
    ----------
    pool : ktk._native.Pool
    experts : sequence of ExpertWeights
    form : Format
    options : Options
    load : bool
        Whether to pack the experts; the default is True.
    """

    def __init__(
        self,
        pool: _native.Pool,
        experts: Sequence[ExpertWeights],
        form: Format,
        options: Options = Options(),
        load: bool = True,
    ) -> None:
        self.hidden_size = experts[0].hidden_size
        self.intermediate_size = experts[0].intermediate_size
        self.mask = np.zeros(len(experts), np.uint8)
        self.mask[list(options.masked)] = 1
        self.moe = _native.Moe(
            pool,
            num_experts=len(experts),
            top_k=options.top_k or len(experts),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            max_tokens=options.max_tokens,
            format=form.kind,
            group_size=form.group,
            strict=options.strict,
            swiglu_limit=options.activation.limit,
            swiglu_alpha=options.activation.alpha,
            isa=options.isa,
            gpu_experts_mask_ptr=self.mask.ctypes.data if options.masked else 0,
            rotated=form.rotated,
        )
        if load:
            for index, expert in enumerate(experts):
                self.pack(index, expert)

    def __enter__(self) -> NativeLayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.moe.close()

    def pack(self, index: int, expert: ExpertWeights) -> None:
        """Quantise and pack one expert."""
        matrices = [np.ascontiguousarray(matrix) for matrix in (expert.gate, expert.up, expert.down)]
        biases = [
            None if bias is None else np.ascontiguousarray(bias, np.float32)
            for bias in (expert.gate_bias, expert.up_bias, expert.down_bias)
        ]
        self.moe.pack_expert(
            index,
            DTYPE_CODES[matrices[0].dtype],
            *(matrix.ctypes.data for matrix in matrices),
            *(0 if bias is None else bias.ctypes.data for bias in biases),
        )

    def export(self, index: int) -> dict[str, U8Array]:
        """All parts of one expert as flat bytes."""
        parts = {}
        for name, code in PART_CODES.items():
            buffer = np.full(self.moe.part_bytes(code), 0xA5, np.uint8)
            if buffer.size:
                self.moe.export_part(index, code, buffer.ctypes.data, buffer.size)
            parts[name] = buffer
        return parts

    def load(self, index: int, parts: dict[str, U8Array]) -> None:
        """Import parts that `export` or the reference made."""
        for name, part in parts.items():
            if part.size:
                aligned = np.ascontiguousarray(part)
                self.moe.import_part(index, PART_CODES[name], aligned.ctypes.data, aligned.size)

    def forward(
        self,
        x: Array,
        ids: npt.NDArray[np.int64],
        weights: F32Array,
        dtype: np.dtype[np.generic] = F32,
        previous: Array | None = None,
    ) -> Array:
        """Layer output [B, H] of type `dtype`; `previous`, of that type, is what it adds to."""
        x, ids, weights = (np.ascontiguousarray(array) for array in (x, ids, weights))
        count = np.array([x.shape[0]], np.int32)
        # A value that no forward produces, so that an output left unwritten shows, and so does one written
        # beside the buffer.
        guarded = np.full((x.shape[0] + 2, self.hidden_size), 1.2345e4, dtype)
        output = guarded[1:-1]
        if previous is not None:
            output[:] = previous
        self.moe.forward(
            count.ctypes.data,
            ids.shape[1],
            ids.ctypes.data,
            weights.ctypes.data,
            x.ctypes.data,
            DTYPE_CODES[x.dtype],
            output.ctypes.data,
            DTYPE_CODES[output.dtype],
            incremental=previous is not None,
        )
        assert (guarded[[0, -1]] == guarded.dtype.type(1.2345e4)).all(), "written outside the output"
        return output


def same_bits(first: Array, second: Array) -> bool:
    """Whether two arrays agree bit for bit."""
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
