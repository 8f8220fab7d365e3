"""``ktk run``: generate text with attention in PyTorch and the experts in ktk."""

from __future__ import annotations

import enum
import json as json_module
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktk.cli import options as shared

if TYPE_CHECKING:
    import torch

__all__ = ["run"]


class Dtype(str, enum.Enum):
    """Dtypes of everything but the experts."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def run(
    model_dir: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="Hugging Face checkpoint, safetensors.")
    ],
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="Text to continue. Repeat it for a batch.")
    ],
    format: shared.Format = shared.WeightFormat.int8,
    group_size: shared.GroupSize = None,
    rotated: shared.Rotated = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0.0, help="0: always the most likely token.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", help="For drawing tokens; the same seed gives the same text.")
    ] = 0,
    threads: shared.Threads = None,
    isa: shared.Isa = None,
    packed: Annotated[
        Path | None,
        typer.Option(
            "--packed",
            help="Packed file, or a folder: layers found there are loaded, others are packed and kept there.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Folder of a LoRA adapter, as ktk sft or PEFT writes it.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of everything but the experts.")] = Dtype.auto,
    json: shared.Json = False,
) -> None:
    """Generate text from a mixture-of-experts model, its experts on the CPU."""
    from ktk.cli.generate import encode_batch, generate, load_tokenizer
    from ktk.integrations.transformers import Options, layers_of, load_model

    shared.quiet_transformers()
    options = Options(format=format.value, group_size=group_size, rotated=rotated, isa=isa, threads=threads)
    began = time.perf_counter()
    with shared.layer_progress("packing", not json) as progress:
        model = load_model(model_dir, options, dtype=dtype.value, packed=packed, progress=progress)
    layers = list(layers_of(model).values())
    if adapter is not None:
        from ktk.sft.inference import with_adapter

        model = with_adapter(model, adapter)
    load_s = time.perf_counter() - began
    tokenizer = load_tokenizer(model_dir)
    ids, mask = encode_batch([tokenizer.encode(text) for text in prompt])
    # PyTorch's first call sets things up that no later one does.
    generate(model, ids[:1, -1:], mask[:1, -1:], max_new_tokens=1)
    stream = _Stream(tokenizer, ids.shape[1]) if len(prompt) == 1 and not json else None
    if stream is not None:
        sys.stdout.write(prompt[0])
    result = generate(
        model, ids, mask, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, on_step=stream
    )
    texts = [tokenizer.decode(_without_eos(row.tolist(), model)) for row in result.sequences]
    report: dict[str, Any] = {
        "model": str(model_dir),
        "adapter": None if adapter is None else str(adapter),
        "architecture": model.config.architectures[0] if adapter else type(model).__name__,
        "format": format.value,
        "group_size": layers[0].config.groups,
        "rotated": layers[0].config.rotates,
        "isa": layers[0].isa,
        "threads": layers[0].cpu_infer.native_pool.thread_count,
        "layers": len(layers),
        "packed_bytes": sum(layer.weight_bytes for layer in layers),
        "load_s": load_s,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.sequences.shape[1],
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "prompts": prompt,
        "texts": texts,
    }
    if json:
        sys.stdout.write(json_module.dumps(report, indent=1) + "\n")
        return
    if stream is None:
        for text, continued in zip(prompt, texts, strict=True):
            sys.stdout.write(f"{text}{continued}\n\n")
    else:
        stream.finish(texts[0])
    shared.show(
        f"{report['architecture']}: {len(layers)} layers of experts on {report['isa']}, "
        f"{report['threads']} threads",
        ["format", "packed size", "load", "prefill", "decode"],
        [
            [
                format.value,
                shared.megabytes(report["packed_bytes"]),
                f"{load_s:.1f} s",
                f"{shared.rate(result.prefill_tokens_per_s)} tokens/s",
                f"{shared.rate(result.decode_tokens_per_s)} tokens/s",
            ]
        ],
    )


def _without_eos(ids: list[int], model: Any) -> list[int]:
    """Cut a row at its first end-of-sequence token; what follows is padding of the batch."""
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


class _Stream:
    """Writes the continuation of one prompt as it grows."""

    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._skip = prompt_tokens
        self._written = 0

    def __call__(self, ids: torch.Tensor) -> None:
        text = self._tokenizer.decode(ids[0, self._skip :].tolist())
        # The last characters may still change, when a token ends in the middle of one.
        if not text.endswith("\ufffd"):
            self._write(text)

    def _write(self, text: str) -> None:
        sys.stdout.write(text[self._written :])
        sys.stdout.flush()
        self._written = len(text)

    def finish(self, text: str) -> None:
        """Write what is left of the final text, and end the line."""
        self._write(text if len(text) > self._written else text[: self._written])
        sys.stdout.write("\n\n")
