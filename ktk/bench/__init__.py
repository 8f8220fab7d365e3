"""How close a layer comes to what the machine can do: what ``ktk bench`` measures and draws.

`cases` says what is measured, `figures` is the arithmetic, `probes` the machine's peaks, `measure` the clock,
and `report` and `roofline` what becomes of the results.
"""

from __future__ import annotations

from ktk.bench.cases import SHAPES, FormatChoice, Shape, parse_formats, parse_shapes
from ktk.bench.measure import Options, run
from ktk.bench.probes import PeakProbe, ReadProbe

__all__ = [
    "SHAPES",
    "FormatChoice",
    "Options",
    "PeakProbe",
    "ReadProbe",
    "Shape",
    "run",
    "parse_formats",
    "parse_shapes",
]
