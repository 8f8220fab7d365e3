"""transformers' Trainer and TRL's SFTTrainer around a model with experts in ktk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ktk.integrations.trainer import KTTrainerCallback
from sft.models import eager, lora_config, trained, with_peft, wrap

pytestmark = [pytest.mark.any_binding, pytest.mark.filterwarnings("ignore::UserWarning")]


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int = 32, columns: int = 12) -> None:
        self.ids = torch.randint(256, (count, columns), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(str(folder), **{**settings, **changes})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(model: Any, folder: Path, resume: Any = None, callbacks: Any = (), **changes: Any) -> Any:
    trainer = transformers.Trainer(
        model, arguments(folder, **changes), train_dataset=Rows(), callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_loss_falls_with_accumulation_and_checkpointing(tmp_path: Path) -> None:
    model = with_peft(wrap(eager("qwen3_moe")))
    trainer = run(
        model,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=True,
    )
    found = losses(trainer)
    assert len(found) == 12 and sum(found[-3:]) < sum(found[:3])


def test_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    source = eager("qwen3_moe")
    saving = {"save_strategy": "steps", "save_steps": 5}
    # 32 rows are 8 steps an epoch: step 5 is in the first, step 10 in the second.
    whole = run(with_peft(wrap(copy.deepcopy(source))), tmp_path / "whole", **saving)
    expected = {name: p.detach().clone() for name, p in trained(whole.model).items()}
    for step in (5, 10):
        again = run(
            with_peft(wrap(copy.deepcopy(source)), seed=9),
            tmp_path / f"from-{step}",
            resume=str(tmp_path / "whole" / f"checkpoint-{step}"),
        )
        assert losses(again)[-2:] == losses(whole)[-2:]
        for name, parameter in trained(again.model).items():
            assert torch.equal(parameter, expected[name]), name


def test_resumes_with_adapters_of_ktk_and_extra_experts(tmp_path: Path) -> None:
    source = eager("qwen3_moe")
    settings = {"use_lora_experts": True, "lora_expert_intermediate_size": 8}

    def make(seed: int) -> Any:
        return with_peft(wrap(copy.deepcopy(source), **settings), seed=seed, target_parameters=None)

    whole = run(
        make(0), tmp_path / "whole", callbacks=[KTTrainerCallback()], save_strategy="steps", save_steps=6
    )
    last = tmp_path / "whole" / "checkpoint-6"
    assert (last / "fused_expert_lora.safetensors").is_file()
    again = run(make(9), tmp_path / "again", resume=str(last), callbacks=[KTTrainerCallback(str(last))])
    for (name, parameter), other in zip(
        trained(again.model).items(), trained(whole.model).values(), strict=True
    ):
        assert torch.equal(parameter, other), name


def test_sft_trainer_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs ktk[sft] with trl")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import datasets
    from trl import SFTConfig, SFTTrainer

    from ktk.sft import kt_adapt_peft_lora

    rows = datasets.Dataset.from_dict({"input_ids": Rows(count=2).ids.tolist()})
    model = wrap(eager("qwen3_moe"))
    args = SFTConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=12,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=True,
    )
    from ktk.demo.train import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "!"
    trainer = SFTTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config()
    )
    # TRL puts PEFT around the model by itself.
    result = kt_adapt_peft_lora(trainer.model)
    assert len(result.named_optimizer_parameters) == 8
    trainer.train()
    found = losses(trainer)
    assert len(found) == 6 and found[-1] < found[0]
