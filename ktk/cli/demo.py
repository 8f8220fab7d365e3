"""``ktk demo``: the shipped model in every weight format, beside transformers' own experts."""

from __future__ import annotations

import json as json_module
import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktk.cli import options as shared

if TYPE_CHECKING:
    import torch

__all__ = ["demo"]

PROMPT = "ROMEO.\n"
# Windows scored at once: enough for the experts to see batches, few enough for little memory.
SCORE_BATCH = 8


@dataclass(frozen=True)
class Row:
    """One line of the table; sizes in bytes, rates in tokens a second, perplexity a byte of text.

    Of each byte's logits the largest difference from those of the eager model is taken; given are the largest
    and the median over the bytes. The former is reached where a router, on a slightly different input, chose
    another expert.
    """

    experts: str
    packed_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    largest_logit_difference: float | None
    median_logit_difference: float | None
    perplexity: float


def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = PROMPT,
    format: shared.Format = shared.WeightFormat.int4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=2)] = 300,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0)] = 0.7,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    windows: Annotated[
        int, typer.Option("--windows", min=1, max=63, help="Windows of 512 bytes of held-out text to score.")
    ] = 16,
    threads: shared.Threads = None,
    isa: shared.Isa = None,
    json: shared.Json = False,
) -> None:
    """Generate Shakespeare with the shipped model (text in --format), and compare all formats."""
    import torch
    import transformers

    from ktk.cli.generate import encode_batch, generate, load_tokenizer
    from ktk.demo import held_out_text, model_dir
    from ktk.integrations.transformers import Options, expert_modules, layers_of, load_model

    shared.quiet_transformers()
    root = model_dir()
    tokenizer = load_tokenizer(root)
    eager: Any = transformers.AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.float32, experts_implementation="eager", local_files_only=True
    )
    eager.eval()
    context = eager.config.max_position_embeddings
    text = torch.frombuffer(bytearray(held_out_text()), dtype=torch.uint8).long()
    text = text[: windows * context + 1]
    # Long enough for a rate to mean something, and within the positions the model was trained on.
    timing = encode_batch([text[: context // 2].tolist()])
    timed_tokens = min(96, context // 2)

    def measure(name: str, model: Any, size: int, wanted: torch.Tensor | None) -> tuple[Row, torch.Tensor]:
        logits, nats = _score(model, text, context)
        generate(model, *encode_batch([[10]]), max_new_tokens=4)
        timed = generate(model, *timing, max_new_tokens=timed_tokens)
        differences = None if wanted is None else (logits - wanted).abs().amax(-1)
        assert timed.decode_tokens_per_s is not None
        row = Row(
            experts=name,
            packed_bytes=size,
            prefill_tokens_per_s=timed.prefill_tokens_per_s,
            decode_tokens_per_s=timed.decode_tokens_per_s,
            largest_logit_difference=None if differences is None else float(differences.max()),
            median_logit_difference=None if differences is None else float(differences.median()),
            perplexity=math.exp(nats),
        )
        return row, logits

    stored = sum(p.numel() * 2 for _, module in expert_modules(eager) for p in module.parameters())
    row, eager_logits = measure("eager", eager, stored, None)
    rows = [row]
    story, isa_used, threads_used = "", "", 0
    for form in shared.WeightFormat:
        model = load_model(root, Options(format=form.value, isa=isa, threads=threads), dtype=torch.float32)
        layers = list(layers_of(model).values())
        isa_used, threads_used = layers[0].isa, layers[0].cpu_infer.native_pool.thread_count
        row, _ = measure(form.value, model, sum(layer.weight_bytes for layer in layers), eager_logits)
        rows.append(row)
        if form is format:
            ids, mask = encode_batch([tokenizer.encode(prompt)])
            told = generate(
                model, ids, mask, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            story = tokenizer.decode(told.sequences[0].tolist())
    report = {
        "prompt": prompt,
        "format": format.value,
        "text": story,
        "isa": isa_used,
        "threads": threads_used,
        "held_out_bytes": len(text) - 1,
        "rows": [asdict(row) for row in rows],
    }
    if json:
        sys.stdout.write(json_module.dumps(report, indent=1) + "\n")
        return
    sys.stdout.write(f"{prompt}{story}\n\n")
    shared.show(
        f"{eager.config.num_hidden_layers} layers of {eager.config.num_experts} experts on {isa_used}, "
        f"{threads_used} threads (the text is by {format.value})",
        [
            "experts",
            "size",
            "prefill\ntokens/s",
            "decode\ntokens/s",
            "logit difference\nlargest   median",
            "held-out\nperplexity",
        ],
        [
            [
                row.experts,
                shared.megabytes(row.packed_bytes),
                shared.rate(row.prefill_tokens_per_s),
                shared.rate(row.decode_tokens_per_s),
                _differences(row),
                f"{row.perplexity:.4f}",
            ]
            for row in rows
        ],
    )


def _differences(row: Row) -> str:
    largest, median = row.largest_logit_difference, row.median_logit_difference
    return "-" if largest is None or median is None else f"{largest:.4f}   {median:.4f}"


def _score(model: Any, text: torch.Tensor, context: int) -> tuple[torch.Tensor, float]:
    """Logits [N, V] and mean nats of the N bytes after the first, in windows of `context`; it divides N."""
    import torch

    inputs = text[:-1].view(-1, context)
    with torch.inference_mode():
        parts = [model(input_ids=batch, use_cache=False).logits for batch in inputs.split(SCORE_BATCH)]
    joined = torch.cat(parts).flatten(0, 1)
    return joined, float(torch.nn.functional.cross_entropy(joined, text[1:]))
