"""Peaks of the machine on the threads of a pool: multiplications, reads and copies."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ktk import _native
from ktk.config import format_info

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CopyProbe", "PeakProbe", "ReadProbe", "footprint_of_machine", "last_level_cache_bytes"]

Clock = Callable[[], float]

# Times over the last-level cache that memory has to be, for next to nothing of it to be found there.
CACHE_TIMES = 8
LEAST_FOOTPRINT = 512 << 20
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache_bytes(root: str = "/") -> int:
    """Bytes of all last-level caches of the machine; 0 where the kernel does not say.

    Parameters
    ----------
    root : str, default "/"
        Where to look for ``sys/devices/system/cpu``.
    """
    largest = 0
    caches: dict[str, tuple[int, int]] = {}
    for index in Path(root).glob("sys/devices/system/cpu/cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text())
            match = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
            shared = (index / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        if match is not None:
            largest = max(largest, level)
            caches[f"{level} {shared}"] = (level, int(match[1]) * _SIZE_UNITS[match[2]])
    return sum(size for level, size in caches.values() if level == largest)


def footprint_of_machine() -> int:
    """Bytes of memory to go through before anything is read again: several times the last-level cache."""
    return max(CACHE_TIMES * last_level_cache_bytes(), LEAST_FOOTPRINT)


class _Probe:
    """A native probe, with the variant that is fastest here.

    Parameters
    ----------
    native : ktk._native.Probe
        Owned from here on.
    run_s : float
        Seconds that one call of `rate` takes, about; at least one repeat is made.
    clock : callable
        Seconds so far, of which differences are taken.
    """

    # Rounds over all variants before one is chosen. Each is judged by its best, since what is sought is what
    # the machine can do. Whatever kept the best one from showing it in all of these few milliseconds is over
    # some measurements later: each of them gives one of the others another chance.
    CHOOSING_ROUNDS = 3

    def __init__(self, native: _native.Probe, run_s: float, clock: Clock) -> None:
        self._native, self._clock = native, clock
        self.names = native.variants
        self._run_s = run_s
        self._trial_counts = [self._repeats(variant, run_s / 5) for variant in range(len(self.names))]
        self.best_of_variant = [0.0] * len(self.names)
        for _ in range(self.CHOOSING_ROUNDS):
            for variant in range(len(self.names)):
                self._try(variant)
        self._choose()
        self._challengers = itertools.cycle(range(len(self.names)))

    def _try(self, variant: int) -> None:
        rate = self._rate(variant, self._trial_counts[variant])
        self.best_of_variant[variant] = max(self.best_of_variant[variant], rate)

    def _choose(self) -> None:
        self.chosen = max(range(len(self.names)), key=self.best_of_variant.__getitem__)
        self._count = self._repeats(self.chosen, self._run_s)

    def _repeats(self, variant: int, run_s: float) -> int:
        count = 1
        while True:
            _, seconds = self._native.run(variant, count)
            if seconds >= run_s / 4:
                return max(1, round(count * run_s / seconds))
            count *= 4

    @property
    def name(self) -> str:
        """The variant that `rate` runs."""
        return self.names[self.chosen]

    def rate(self) -> float:
        """Operations or bytes a second, measured now.

        If another variant turns out to be faster, the next measurement is made with that one.
        """
        rate = self._rate(self.chosen, self._count)
        challenger = next(self._challengers)
        if challenger == self.chosen:
            self.best_of_variant[challenger] = max(self.best_of_variant[challenger], rate)
        else:
            self._try(challenger)
            if self.best_of_variant[challenger] > self.best_of_variant[self.chosen]:
                self._choose()
        return rate

    def _rate(self, variant: int, count: int) -> float:
        began = self._clock()
        work, _ = self._native.run(variant, count)
        return work / (self._clock() - began)

    def close(self) -> None:
        """Free the probe's memory."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PeakProbe(_Probe):
    """Operations a second of the multiplications that a weight format's products are made of.

    Operands stay in registers. Of the loops that the instruction set has for the format, the fastest counts.

    Parameters
    ----------
    pool : ktk._native.Pool
    format : str
        A key of `ktk.config.FORMATS`.
    isa : str, optional
        Default: that of layers.
    run_s : float, default 0.01
        Seconds of one measurement.
    clock : callable, default `time.perf_counter`
        Seconds so far. With a pool of one thread it may be `time.thread_time`.
    """

    def __init__(
        self,
        pool: _native.Pool,
        format: str,
        isa: str | None = None,
        run_s: float = 0.01,
        clock: Clock = time.perf_counter,
    ) -> None:
        native = _native.Probe(pool, kind=_native.PROBE_PRODUCT, format=format_info(format).code, isa=isa)
        super().__init__(native, run_s, clock)


class ReadProbe(_Probe):
    """Bytes a second that the threads of a pool load from memory.

    Of several access patterns and distances of prefetching, the fastest counts.

    Parameters
    ----------
    pool : ktk._native.Pool
    isa : str, optional
        Default: that of layers.
    bytes : int, optional
        Memory to read; default: `footprint_of_machine`.
    run_s : float, default 0.01
        Seconds of one measurement; all of the memory is read at least once.
    clock : callable, default `time.perf_counter`
        As for `PeakProbe`.
    """

    def __init__(
        self,
        pool: _native.Pool,
        isa: str | None = None,
        bytes: int | None = None,
        run_s: float = 0.01,
        clock: Clock = time.perf_counter,
    ) -> None:
        size = footprint_of_machine() if bytes is None else bytes
        super().__init__(_native.Probe(pool, kind=_native.PROBE_READ, bytes=size, isa=isa), run_s, clock)


class CopyProbe(_Probe):
    """Bytes a second that are read plus those that are written when memory is copied; parameters as above."""

    def __init__(
        self,
        pool: _native.Pool,
        isa: str | None = None,
        bytes: int | None = None,
        run_s: float = 0.01,
        clock: Clock = time.perf_counter,
    ) -> None:
        size = footprint_of_machine() // 2 if bytes is None else bytes
        super().__init__(_native.Probe(pool, kind=_native.PROBE_COPY, bytes=size, isa=isa), run_s, clock)
