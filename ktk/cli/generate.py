"""Text in, text out, with the clock running: what the commands share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

__all__ = ["ByteTokenizer", "Generation", "encode_batch", "generate", "load_tokenizer"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


class ByteTokenizer:
    """UTF-8 bytes as token ids 0 to 255, for checkpoints that come without a tokenizer."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        """Return the bytes of `text`."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; ids that are no byte are left out."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def load_tokenizer(model_dir: Path) -> Any:
    """Return the tokenizer in `model_dir`, or a `ByteTokenizer` where there is none."""
    if any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return ByteTokenizer()


def encode_batch(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token lists on the left to one length.

    Parameters
    ----------
    prompts : sequence of sequences of int
        At least one, none empty.
    pad : int, default 0
        Any id of the vocabulary; it is masked.

    Returns
    -------
    ids, mask : torch.Tensor
        int64 [B, longest]; the mask is 0 at padding.

    Raises
    ------
    ValueError
        A prompt has no tokens.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty; give at least one character to continue")
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@dataclass(frozen=True)
class Generation:
    """What was generated, and how long it took.

    Parameters
    ----------
    sequences : torch.Tensor
        int64 [B, new]: the new tokens alone.
    prompt_tokens : int
        Tokens of all prompts, without padding.
    prefill_s, decode_s : float
        Seconds up to the first new token of every sequence, and from there to the last.
    """

    sequences: torch.Tensor
    prompt_tokens: int
    prefill_s: float
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens of all sequences a second."""
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens of all sequences a second, first ones left out; None if there was but one step."""
        rows, steps = self.sequences.shape
        return rows * (steps - 1) / self.decode_s if steps > 1 else None


class _Clock(StoppingCriteria):
    """Notes the time after every step; never stops. transformers calls it for batches, unlike a streamer."""

    def __init__(self, on_step: Callable[[torch.Tensor], None] | None) -> None:
        self.times: list[float] = []
        self._on_step = on_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        if self._on_step is not None:
            self._on_step(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> Generation:
    """Continue a batch of prompts with ``model.generate`` and time it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    ids, mask : torch.Tensor
        int64 [B, T], as from `encode_batch`.
    max_new_tokens : int
        At least 1.
    temperature : float, default 0.0
        0 takes the most likely token; otherwise tokens are drawn from the softmax of logits over
        `temperature`.
    seed : int, default 0
        Of PyTorch's generator, for drawing.
    on_step : callable, optional
        Called with the int64 [B, T + n] ids so far after every new token.

    Returns
    -------
    Generation
    """
    clock = _Clock(on_step)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    eos = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=0 if pad is None else pad,
            stopping_criteria=StoppingCriteriaList([clock]),
            **sampling,
        )
    return Generation(
        sequences=output[:, ids.shape[1] :].cpu(),
        prompt_tokens=int(mask.sum()),
        prefill_s=clock.times[0] - began,
        decode_s=clock.times[-1] - clock.times[0],
    )
