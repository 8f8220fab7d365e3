"""The run of ``ktk sft``: load, adapt, train, save; interrupted, it goes on where its last checkpoint is."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ktk
from ktk.errors import KtkArgumentError
from ktk.sft.artifacts import save_kt_adapter_artifacts
from ktk.sft.checkpoint import (
    last_checkpoint,
    load_training_state,
    save_training_state,
)
from ktk.sft.config import BACKENDS
from ktk.sft.files import write_json
from ktk.sft.lora import kt_adapt_peft_lora
from ktk.sft.run_config import RunConfig
from ktk.sft.wrapper import load_kt_model

__all__ = ["Corpus", "Progress", "fine_tune", "prepare_model"]

HELD_OUT = 20

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: what is trained on, and the last twentieth, which is held out."""

    train: torch.Tensor
    held_out: torch.Tensor

    @classmethod
    def read(cls, config: RunConfig, tokenizer: Any) -> Corpus:
        """Read `config.text`.

        Raises
        ------
        KtkArgumentError
            If it is not UTF-8, or shorter than two sequences.
        """
        path = Path(config.text)
        try:
            tokens = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8")), dtype=torch.int64)
        except UnicodeDecodeError as error:
            raise KtkArgumentError(f"{path} is not UTF-8: {error}") from None
        cut = len(tokens) - max(len(tokens) // HELD_OUT, config.context + 1)
        if cut <= config.context:
            raise KtkArgumentError(
                f"{path} has {len(tokens)} tokens, and needs {2 * config.context + 2} for sequences of "
                f"{config.context}; take a longer text or a smaller context"
            )
        return cls(tokens[:cut], tokens[cut:])

    def batch(self, config: RunConfig, index: int) -> torch.Tensor:
        """Sequences ``[batch, context + 1]`` number `index`, drawn by the seed and this number alone."""
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        starts = torch.randint(len(self.train) - config.context, (config.batch,), generator=generator)
        return self.train[starts[:, None] + torch.arange(config.context + 1)]


def prepare_model(config: RunConfig, progress: Callable[[int, int], None] | None = None) -> Any:
    """Load the checkpoint with its experts in ktk, and put PEFT's adapters on attention and experts."""
    from peft import LoraConfig, get_peft_model

    model = load_kt_model(
        model_name_or_path=config.model,
        kt_plugin={
            "backend": BACKENDS[config.format],
            "num_threads": config.threads,
            "model_max_length": config.tokens,
            "activation_policy": config.activation,
        },
        dtype=config.dtype,
        progress=progress,
    )
    torch.manual_seed(config.seed)
    adapted: Any = get_peft_model(
        model,
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            target_modules=list(config.target_modules),
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    kt_adapt_peft_lora(adapted)
    if config.gradient_checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    return adapted.train()


def _loss(model: Any, window: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    logits = model(input_ids=window[:, :-1].to(device), use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten().to(device))


@torch.no_grad()
def _held_out_loss(model: Any, corpus: Corpus, config: RunConfig) -> float:
    model.eval()
    count = min(len(corpus.held_out) // (config.context + 1), 4 * config.batch)
    windows = corpus.held_out[: count * (config.context + 1)].view(count, -1)
    losses = [_loss(model, part).item() * len(part) for part in windows.split(config.batch)]
    model.train()
    return sum(losses) / count


def _schedule(config: RunConfig) -> Callable[[int], float]:
    rise = max(1, config.steps // 10)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))

    return factor


def fine_tune(
    config: RunConfig,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    layer_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run a fine-tune.

    Parameters
    ----------
    config : RunConfig
    resume : bool, default False
        Go on from the last checkpoint in the output folder, if there is one.
    progress : callable, optional
        Called with steps done, all steps, and the loss, after each step.
    layer_progress : callable, optional
        Called with layers packed and all layers.

    Returns
    -------
    dict
        What `report.json` holds: the configuration, losses, held-out losses before and after, seconds,
        tokens a second, peak memory and the paths of what was written.

    Raises
    ------
    KtkArgumentError
        If the text is too short, or a checkpoint is of another run.
    KTAMXError
        If the model cannot be trained.
    """
    from ktk.cli.generate import load_tokenizer

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.read(config, load_tokenizer(Path(config.model)))
    model = prepare_model(config, layer_progress)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config))
    losses: list[float] = []
    start = 0
    checkpoint = last_checkpoint(output) if resume else None
    if checkpoint is not None:
        state = load_training_state(checkpoint, model, optimizer, scheduler)
        start, losses = state["step"], state["extra"]["losses"]
        before = state["extra"]["held_out_before"]
    else:
        before = _held_out_loss(model, corpus, config)
    began = time.perf_counter()
    traced = _Trace(output / "trace.json", config, start)
    for step in range(start, config.steps):
        with traced.around(step):
            total = 0.0
            for part in range(config.gradient_accumulation):
                window = corpus.batch(config, step * config.gradient_accumulation + part)
                loss = _loss(model, window) / config.gradient_accumulation
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(parameters, config.gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
        losses.append(total)
        if progress is not None:
            progress(step + 1, config.steps, total)
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            extra = {"losses": losses, "held_out_before": before}
            save_training_state(output, step + 1, model, optimizer, scheduler, extra=extra)
    seconds = time.perf_counter() - began
    after = _held_out_loss(model, corpus, config)
    adapter = output / "adapter"
    model.save_pretrained(adapter)
    save_kt_adapter_artifacts(model, adapter)
    steps = config.steps - start
    report: dict[str, Any] = {
        "config": asdict(config),
        "losses": losses,
        "held_out_before": before,
        "held_out_after": after,
        "seconds": seconds,
        "tokens_per_s": steps * config.tokens * config.gradient_accumulation / seconds if steps else None,
        "trained_parameters": sum(p.numel() for p in parameters),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "adapter": str(adapter),
        "trace": str(traced.path) if traced.written else None,
        "plot": _plot(output / "loss.png", losses, before, after) if config.plot else None,
    }
    write_json(output / "report.json", report)
    return report


class _Trace:
    """Records the steps that are to be traced, in one file."""

    def __init__(self, path: Path, config: RunConfig, start: int) -> None:
        self.path, self.written = path, False
        self._first = max(start, config.steps - config.trace_steps)
        self._last = config.steps - 1
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def around(self, step: int) -> Any:
        """Around one step."""
        if step == self._first <= self._last:
            self._stack.enter_context(ktk.profile(self.path))
            self.written = True
        with contextlib.ExitStack() as ending:
            if step == self._last:
                ending.push(self._stack.pop_all())
            yield


def _plot(path: Path, losses: list[float], before: float, after: float) -> str | None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1.2, label="training")
    axes.plot([0, len(losses)], [before, after], "o", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return str(path)
