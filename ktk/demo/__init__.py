"""The demo model that is shipped with ktk, and the text it is measured on.

`train.py` in this folder made the model; it documents the data and how to reproduce it.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["fine_tuning_text", "held_out_text", "model_dir"]


def model_dir() -> Path:
    """Return the folder of the model, a Hugging Face checkpoint.

    Raises
    ------
    FileNotFoundError
        This installation lacks it.
    """
    path = Path(__file__).parent / "model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"the demo model is missing from {path}; reinstall ktk")
    return path


def held_out_text() -> bytes:
    """Return 32 KiB of Shakespeare that the model was not trained on, as UTF-8."""
    return (model_dir() / "heldout.txt").read_bytes()


def fine_tuning_text() -> Path:
    """Return a file with the beginning of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865), for
    `ktk sft`."""
    return Path(__file__).parent / "fine_tuning.txt"
