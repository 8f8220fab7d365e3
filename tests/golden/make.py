"""Writes the golden parts from the reference. Run only when a layout changes on purpose.

Usage, in the folder tests: python -m golden.make
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reference.packing import Format, pack
from strategies import make_weights

HERE = Path(__file__).parent

FORMATS = (
    Format(0),
    Format(1),
    *(Format(1, group) for group in (32, 128)),
    Format(2),
    *(Format(2, group) for group in (32, 64, 128)),
    Format(3, 128),
    *(Format(1, group, rotated=True) for group in (512, 0)),
    *(Format(2, group, rotated=True) for group in (32, 128)),
)

if __name__ == "__main__":
    expert = make_weights(np.random.default_rng(2024), 70, 35, biases=True)
    expert.gate[3] = 0
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    np.savez_compressed(HERE / "source.npz", **{name: getattr(expert, name) for name in names})
    for form in FORMATS:
        np.savez_compressed(HERE / f"{form}.npz", **pack(expert, form))
