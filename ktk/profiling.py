"""Where the time of the worker threads goes: traces for Perfetto, and a table of stages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ktk import _native
from ktk.errors import KtkArgumentError, KtkStateError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Profile", "StageTime", "TraceSummary", "load_trace", "profile", "summarise"]


@dataclass(frozen=True)
class StageTime:
    """Time that one stage took over a trace.

    Parameters
    ----------
    stage : str
        What was done: `route`, `quantise`, `gather`, `gate_up`, `down`, `merge` or `pack` on the workers;
        `forward`, `task`, `wait` or `sync` on the thread that submitted or queued the work.
    calls : int
        Parallel sections, or spans of the submitting thread.
    units : int
        Units of work in all of them.
    total_us : float
        Microseconds from the beginning to the end of each call, summed.
    share : float or None
        Of the total of all stages on the workers, 0 to 1; None for stages of the submitting thread, which
        contain those.
    imbalance : float or None
        Time of the busiest worker over the mean of all workers of the pool, 1 when all work equally long and
        the number of threads when one works alone; weighted by time. None for the submitting thread.
    """

    stage: str
    calls: int
    units: int
    total_us: float
    share: float | None
    imbalance: float | None

    @property
    def mean_us(self) -> float:
        """Microseconds a call."""
        return self.total_us / self.calls


@dataclass(frozen=True)
class TraceSummary:
    """The stages of a trace, those that took longest first.

    Parameters
    ----------
    stages : tuple of StageTime
        Stages of the workers, then those of the submitting thread.
    duration_us : float
        Length of the trace in microseconds.
    dropped_spans : int
        Spans that were overwritten because a thread had recorded more than the trace keeps.
    """

    stages: tuple[StageTime, ...]
    duration_us: float
    dropped_spans: int

    COLUMNS = ("stage", "calls", "total ms", "mean us", "share", "imbalance")

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, one tuple a stage in the order of `COLUMNS`."""
        return [
            (
                stage.stage,
                str(stage.calls),
                f"{stage.total_us / 1e3:.3f}",
                f"{stage.mean_us:.1f}",
                "-" if stage.share is None else f"{stage.share:.1%}",
                "-" if stage.imbalance is None else f"{stage.imbalance:.2f}",
            )
            for stage in self.stages
        ]

    def __str__(self) -> str:
        table = [self.COLUMNS, *self.rows()]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.COLUMNS))]
        lines = [
            "  ".join(
                text.rjust(width) if column else text.ljust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        lines.append(f"{self.duration_us / 1e3:.3f} ms traced, {self.dropped_spans} spans dropped")
        return "\n".join(lines)


def load_trace(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a trace that `profile` or KTK_TRACE has written.

    Parameters
    ----------
    path : str or os.PathLike
        A JSON file.

    Returns
    -------
    dict
        With `traceEvents` and `otherData`, in the format of Chrome's trace viewer.

    Raises
    ------
    OSError
        If the file cannot be read.
    KtkArgumentError
        If it is no trace of ktk.
    """
    try:
        trace = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise KtkArgumentError(f"{os.fspath(path)} is no trace of ktk: {error}") from None
    if (
        not isinstance(trace, dict)
        or not isinstance(trace.get("traceEvents"), list)
        or "pools" not in trace.get("otherData", {})
    ):
        raise KtkArgumentError(
            f"{os.fspath(path)} is no trace of ktk: it needs traceEvents and otherData.pools, as ktk.profile "
            "and KTK_TRACE write them"
        )
    return trace


@dataclass
class _Call:
    """One parallel section while its spans are gathered; times in microseconds."""

    begin: float
    end: float
    threads: int
    busy: dict[tuple[int, int], float] = field(default_factory=dict)


def summarise(trace: dict[str, Any]) -> TraceSummary:
    """Add up the spans of a trace by stage.

    Parameters
    ----------
    trace : dict
        As `load_trace` returns it. Events may be left out of it; the rest is added up.

    Returns
    -------
    TraceSummary
    """
    pool_of_pid: dict[int, int] = {}
    threads: list[int] = []
    for index, pool in enumerate(trace["otherData"]["pools"]):
        threads.append(pool["threads"])
        pool_of_pid.update(dict.fromkeys(pool["pids"], index))

    sections: dict[tuple[str, int, int], _Call] = {}
    alone: dict[str, list[_Call]] = {}
    host: dict[str, list[float]] = {}
    units: dict[str, int] = {}
    for event in trace["traceEvents"]:
        if event["ph"] != "X":
            continue
        stage, args = event["name"], event["args"]
        units[stage] = units.get(stage, 0) + args["units"]
        if event["cat"] != "compute":
            host.setdefault(stage, []).append(event["dur"])
            continue
        begin, end = event["ts"], event["ts"] + event["dur"]
        pool = pool_of_pid[event["pid"]]
        lane = (event["pid"], event["tid"])
        section = args.get("section")
        if section is None:
            call = _Call(begin, end, threads[pool])
            alone.setdefault(stage, []).append(call)
        else:
            call = sections.setdefault((stage, pool, section), _Call(begin, end, threads[pool]))
            call.begin, call.end = min(call.begin, begin), max(call.end, end)
        call.busy[lane] = call.busy.get(lane, 0.0) + event["dur"]

    calls: dict[str, list[_Call]] = {stage: list(found) for stage, found in alone.items()}
    together: dict[tuple[int, int], dict[str, _Call]] = {}
    for (stage, pool, section), call in sections.items():
        together.setdefault((pool, section), {})[stage] = call
    for stages in together.values():
        for stage, call in _shares(stages).items():
            calls.setdefault(stage, []).append(call)
    totals = {stage: sum(call.end - call.begin for call in found) for stage, found in calls.items()}
    everything = sum(totals.values())
    workers = [
        StageTime(
            stage=stage,
            calls=len(found),
            units=units[stage],
            total_us=totals[stage],
            share=totals[stage] / everything if everything else 0.0,
            imbalance=_imbalance(found),
        )
        for stage, found in calls.items()
    ]
    others = [
        StageTime(stage, len(spans), units[stage], sum(spans), None, None) for stage, spans in host.items()
    ]

    def longest_first(stages: list[StageTime]) -> list[StageTime]:
        return sorted(stages, key=lambda stage: (-stage.total_us, stage.stage))

    about = trace["otherData"]
    return TraceSummary(
        stages=(*longest_first(workers), *longest_first(others)),
        duration_us=about.get("duration_us", 0.0),
        dropped_spans=about.get("dropped_spans", 0),
    )


def _shares(stages: dict[str, _Call]) -> dict[str, _Call]:
    """The stages of one section, each with its share of the section: they may run side by side."""
    if len(stages) == 1:
        return stages
    begin = min(call.begin for call in stages.values())
    end = max(call.end for call in stages.values())
    busy: dict[tuple[int, int], float] = {}
    for call in stages.values():
        for lane, time in call.busy.items():
            busy[lane] = busy.get(lane, 0.0) + time
    everything = sum(busy.values())
    shares = {stage: sum(call.busy.values()) / (everything or 1.0) for stage, call in stages.items()}
    return {
        stage: _Call(
            begin,
            begin + (end - begin) * share,
            stages[stage].threads,
            {lane: time * share for lane, time in busy.items()},
        )
        for stage, share in shares.items()
    }


def _imbalance(calls: Iterable[_Call]) -> float:
    longest = mean = 0.0
    for call in calls:
        longest += max(call.busy.values())
        mean += sum(call.busy.values()) / call.threads
    return longest / mean if mean else 1.0


class Profile:
    """What the worker threads of this process do inside a `with` block; made by `profile`."""

    def __init__(self, path: str | os.PathLike[str] | None, spans_per_thread: int) -> None:
        self._path = None if path is None else Path(path)
        if self._path is not None and not self._path.parent.is_dir():
            raise KtkArgumentError(f"path is {str(path)!r}, but there is no folder {self._path.parent}")
        self._spans_per_thread = spans_per_thread
        self._trace: _native.Trace | None = None
        self._events: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        if self._trace is not None:
            raise KtkStateError("this profile has been used; make a new one with ktk.profile()")
        self._trace = _native.Trace(self._spans_per_thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._trace is not None
        self._trace.stop()
        if self._path is not None:
            self._trace.write(str(self._path))
        self._events = {}

    @property
    def events(self) -> dict[str, Any]:
        """The trace in the format of Chrome's trace viewer: `traceEvents`, times in microseconds.

        Raises `KtkStateError` before the end of the `with` block.
        """
        if self._trace is None or self._events is None:
            raise KtkStateError("the profile is not complete; read it after its with block")
        if not self._events:
            self._events = json.loads(self._trace.json())
        return self._events

    @property
    def summary(self) -> TraceSummary:
        """Calls, total, mean, share and imbalance of each stage; as text, a table.

        Raises `KtkStateError` before the end of the `with` block.
        """
        return summarise(self.events)

    def __str__(self) -> str:
        return repr(self) if self._events is None else str(self.summary)

    def __repr__(self) -> str:
        state = "not started" if self._trace is None else "running" if self._events is None else "complete"
        return f"<ktk.profile: {state}>"


def profile(path: str | os.PathLike[str] | None = None, *, spans_per_thread: int | None = None) -> Profile:
    """Record what the worker threads of this process do inside a `with` block.

    All pools and queues of the process are recorded. Blocks may be nested and may overlap. While nothing is
    recorded, this costs nothing that can be measured.

    Parameters
    ----------
    path : str or os.PathLike, optional
        JSON file to write at the end of the block, also after an exception, for https://ui.perfetto.dev,
        Chrome's `about:tracing` or `ktk trace`. It appears when it is complete. Default: none.
    spans_per_thread : int, optional
        Spans that each thread keeps, 1 to 16777215; when there are more, the oldest are dropped and counted.
        A span takes 40 bytes, and a worker needs about three for a layer and token. Default: 65535.

    Returns
    -------
    Profile
        A context manager; afterwards its `summary` is the table of stages, and `events` the trace itself.

    Raises
    ------
    KtkArgumentError
        If `spans_per_thread` is out of range, or the folder of `path` does not exist.
    KtkSystemError
        At the end of the block, if the file cannot be written.

    Examples
    --------
    >>> import ktk
    >>> with ktk.profile() as prof, ktk.CPUInfer(1) as cpu:
    ...     cpu.submit(lambda: None)
    ...     cpu.sync()
    >>> [stage.stage for stage in prof.summary.stages if stage.stage == "task"]
    ['task']
    """
    return Profile(path, 0 if spans_per_thread is None else spans_per_thread)
