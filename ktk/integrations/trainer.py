"""transformers' `Trainer` and what is built on it: checkpoints that hold all of the experts' adapters.

PEFT saves and restores its own adapters and ktk's. What is left are extra experts, and kt-kernel's file
of fused adapters; a callback writes and reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ktk.sft.artifacts import load_kt_adapter_artifacts, save_kt_adapter_artifacts
from ktk.sft.transport import world

__all__ = ["KTTrainerCallback"]


class KTTrainerCallback(TrainerCallback):
    """Writes adapters of experts into each checkpoint of a `Trainer`, and restores them when it resumes.

    Parameters
    ----------
    resume_from_checkpoint : path or bool, optional
        As given to ``Trainer.train``: a checkpoint's folder, or True for the last one in the output folder.
    """

    def __init__(self, resume_from_checkpoint: Any = None) -> None:
        self._resume = resume_from_checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore."""
        folder = self._resume
        if folder is True:
            folder = get_last_checkpoint(args.output_dir)  # type: ignore[no-untyped-call]
        if folder:
            load_kt_adapter_artifacts(kwargs["model"], folder)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write."""
        if world()[0] == 0:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            save_kt_adapter_artifacts(kwargs["model"], folder)
