"""Fixtures of the tests of fine-tuning."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("ktk.sft.native") is None:
    from sft import stand_in

    stand_in.install()
