"""`ktk.sft.native` in PyTorch, for a tree without the native training backend: same interface, any speed."""

from __future__ import annotations

import sys
import types
import weakref
from typing import Any

import torch

from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError
from ktk.layer import Experts

NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
_weights: weakref.WeakKeyDictionary[Experts, dict[int, list[torch.Tensor]]] = weakref.WeakKeyDictionary()
_pack = Experts._pack


def _record(self: Experts, slot: int, weights: Any, clear_bias: bool) -> None:
    _pack(self, slot, weights, clear_bias)
    stored = [t.detach().bfloat16().float() for t in (weights.gate, weights.up, weights.down)]
    _weights.setdefault(self, {})[slot] = stored


class ForwardContext:
    def __init__(self, owner: TrainableExperts, inputs: tuple[torch.Tensor, ...], seed: int | None, policy: str):
        self._owner, self._inputs, self._seed = owner, inputs, seed
        self.num_tokens, k = inputs[1].shape
        i, h = owner.config.intermediate_size, owner.config.hidden_size
        self.nbytes = 2 * self.num_tokens * h + 4 * self.num_tokens * k * i if policy == "save" else 0
        owner.live.add(self)

    def backward(
        self, grad_output: torch.Tensor, *, grad_lora: Any = None, grad_base: Any = None, accumulate: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._inputs is None:
            raise KtkStateError("this forward was used already, or closed")
        if self._owner.experts.closed:
            raise KtkStateError("the layer is closed")
        (hidden, ids, weights), self._inputs = self._inputs, None
        owner = self._owner
        with torch.enable_grad():
            x = hidden.detach().float().requires_grad_()
            w = weights.detach().clone().requires_grad_()
            lora = {n: t.detach().float().requires_grad_() for n, t in owner.lora.items()}
            base = [t.clone().requires_grad_() for t in owner.base()]
            output = owner.compute(x, ids, w, lora, base, self._seed)
            grads = torch.autograd.grad(
                output, [x, w, *lora.values(), *base], grad_output.float(), allow_unused=True, materialize_grads=True
            )
        found = dict(zip(lora, grads[2 : 2 + len(lora)], strict=True))
        for targets, values in ((grad_lora, found), (grad_base, dict(zip(("gate", "up", "down"), grads[-3:])))):
            for name, target in (targets or {}).items():
                target.copy_(target.float() + values[name] if accumulate else values[name])
        return grads[0].to(hidden.dtype), grads[1]

    def close(self) -> None:
        self._inputs = None


class TrainableExperts:
    def __init__(
        self,
        experts: Experts,
        *,
        lora_rank: int = 0,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        skip_lora: bool = False,
    ) -> None:
        self.experts, self.config = experts, experts.config
        self.rank, self.scale, self.dropout = lora_rank, lora_alpha / max(lora_rank, 1), lora_dropout
        self.skip = skip_lora
        self.lora: dict[str, torch.Tensor] = {}
        self.live: weakref.WeakSet[ForwardContext] = weakref.WeakSet()

    def base(self) -> list[torch.Tensor]:
        stored = _weights[self.experts]
        return [torch.stack([stored[e][part] for e in range(self.config.num_experts)]) for part in range(3)]

    def set_lora(self, tensors: Any) -> None:
        c, r = self.config, self.rank
        e, h, i = c.num_experts, c.hidden_size, c.intermediate_size
        shapes = dict(zip(NAMES, ((e, r, h), (e, i, r), (e, r, h), (e, i, r), (e, r, i), (e, h, r)), strict=True))
        for name, shape in shapes.items():
            t = tensors[name]
            if tuple(t.shape) != shape:
                raise KtkArgumentError(f"{name} must have the shape {list(shape)}, got {list(t.shape)}")
            if t.dtype not in (torch.bfloat16, torch.float32) or t.dtype != tensors["gate_lora_a"].dtype:
                raise KtkArgumentError(f"{name} must be bfloat16 or float32, as all six; got {t.dtype}")
            if not t.is_contiguous() or t.device.type != "cpu":
                raise KtkArgumentError(f"{name} must be contiguous and on the CPU")
            if not torch.isfinite(t).all():
                raise KtkArgumentError(f"{name} is not finite")
        self.lora = dict(tensors)

    def compute(
        self, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, lora: Any, base: Any, seed: int | None
    ) -> torch.Tensor:
        gate, up, down = base
        out = torch.zeros_like(x)
        generator = None if seed is None else torch.Generator().manual_seed(seed % 2**31)

        def adapt(v: torch.Tensor, e: int, part: str) -> torch.Tensor | float:
            if not lora or self.skip:
                return 0.0
            if generator is not None and self.dropout:
                keep = (torch.rand(v.shape, generator=generator) >= self.dropout).float()
                v = v * keep / (1 - self.dropout)
            return self.scale * (v @ lora[f"{part}_lora_a"][e].T) @ lora[f"{part}_lora_b"][e].T

        for e in range(self.config.num_experts):
            tokens, slots = torch.where(ids == e)
            if len(tokens) == 0:
                continue
            rows = x[tokens]
            g = rows @ gate[e].T + adapt(rows, e, "gate")
            u = rows @ up[e].T + adapt(rows, e, "up")
            z = torch.nn.functional.silu(g) * u
            y = z @ down[e].T + adapt(z, e, "down")
            out = out.index_add(0, tokens, y * w[tokens, slots, None])
        return out

    def forward(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        policy: str = "none",
        dropout_seed: int | None = None,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ForwardContext | None]:
        if self.experts.closed:
            raise KtkStateError("the layer is closed")
        if len(hidden) > self.config.max_tokens:
            raise KtkArgumentError(f"at most {self.config.max_tokens} tokens, got {len(hidden)}")
        with torch.no_grad():
            lora = {n: t.detach().float() for n, t in self.lora.items()}
            result = self.compute(hidden.float(), ids, weights, lora, self.base(), dropout_seed).to(hidden.dtype)
        kept = (hidden if policy == "recompute" else hidden.clone(), ids.clone(), weights.clone())
        return result, None if policy == "none" else ForwardContext(self, kept, dropout_seed, policy)

    def update_base(self, expert: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        if self.config.format != "bf16":
            raise KtkUnsupportedError("only bf16")
        _weights[self.experts][expert] = [t.detach().bfloat16().float() for t in (gate, up, down)]

    def read_base(self, expert: int) -> tuple[torch.Tensor, ...]:
        return tuple(_weights[self.experts][expert])


def install() -> None:
    """Make `ktk.sft.native` importable."""
    Experts._pack = _record  # type: ignore[method-assign]
    module = types.ModuleType("ktk.sft.native")
    module.TrainableExperts = TrainableExperts  # type: ignore[attr-defined]
    module.ForwardContext = ForwardContext  # type: ignore[attr-defined]
    module.LORA_NAMES = NAMES  # type: ignore[attr-defined]
    sys.modules["ktk.sft.native"] = module
