"""`TrainableExperts`: forward with adapters and the way back of one layer, on CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from ktk import _native
from ktk.config import checked_int
from ktk.errors import KtkArgumentError, KtkStateError
from ktk.layer import Experts

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = [
    "BASE_NAMES",
    "LORA_NAMES",
    "ForwardContext",
    "Policy",
    "TrainableExperts",
    "check_gradient",
    "lora_shapes",
]

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
"""Adapters of one layer. A of gate and up is ``[E, r, H]`` and of down ``[E, r, I]``; B of gate and up is
``[E, I, r]`` and of down ``[E, H, r]``."""

BASE_NAMES = ("gate", "up", "down")
"""Base weights of one layer: ``[E, I, H]``, ``[E, I, H]``, ``[E, H, I]``."""

MAX_LORA_RANK = 256

Policy = Literal["none", "save", "recompute"]
_POLICIES: Mapping[str, int] = {
    "none": _native.POLICY_NONE,
    "save": _native.POLICY_SAVE,
    "recompute": _native.POLICY_RECOMPUTE,
}
_DTYPE_CODES = {
    torch.float32: _native.DTYPE_F32,
    torch.bfloat16: _native.DTYPE_BF16,
    torch.float16: _native.DTYPE_F16,
}
_TRAINED_DTYPES = (torch.float32, torch.bfloat16)


def _address(tensor: torch.Tensor) -> int:
    # A tensor without elements has no address, and the library wants one that it will not read.
    return tensor.data_ptr() or 64


def _checked_matrices(
    what: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> torch.dtype:
    """Names, kinds, shapes and layout of the tensors that the library reads or writes in place."""
    unknown = sorted(set(tensors) - set(shapes))
    if unknown:
        raise KtkArgumentError(f"{what} has unknown names {unknown}; the names are {', '.join(shapes)}")
    dtypes = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{what}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shapes[name]:
            raise KtkArgumentError(
                f"{what}: {name} must have the shape {list(shapes[name])}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in _TRAINED_DTYPES:
            raise KtkArgumentError(f"{what}: {name} must be float32 or bfloat16, got {tensor.dtype}")
        if not tensor.is_cpu:
            raise KtkArgumentError(f"{what}: {name} must be on the CPU, got {tensor.device}")
        if not tensor.is_contiguous():
            raise KtkArgumentError(f"{what}: {name} must be contiguous; pass {name}.contiguous()")
        dtypes.add(tensor.dtype)
    if len(dtypes) > 1:
        raise KtkArgumentError(f"{what} must be of one dtype, got {sorted(map(str, dtypes))}")
    return dtypes.pop() if dtypes else torch.float32


def lora_shapes(num_experts: int, hidden: int, inner: int, rank: int) -> dict[str, tuple[int, int, int]]:
    """Shape of each adapter tensor, by the names of `LORA_NAMES`."""
    return {
        "gate_lora_a": (num_experts, rank, hidden),
        "gate_lora_b": (num_experts, inner, rank),
        "up_lora_a": (num_experts, rank, hidden),
        "up_lora_b": (num_experts, inner, rank),
        "down_lora_a": (num_experts, rank, inner),
        "down_lora_b": (num_experts, hidden, rank),
    }


def check_gradient(gradient: torch.Tensor, tokens: int, hidden: int, layer_idx: int) -> None:
    """Raise `TypeError` or `KtkArgumentError` if a gradient of the output does not fit its forward
    ``[tokens, hidden]``."""
    if not isinstance(gradient, torch.Tensor):
        raise TypeError(f"grad_output must be a torch.Tensor, got {type(gradient).__name__}")
    if tuple(gradient.shape) != (tokens, hidden) or gradient.dtype not in _DTYPE_CODES:
        raise KtkArgumentError(
            f"layer {layer_idx}: the gradient must have the shape [{tokens}, {hidden}] of the output and be "
            f"float32, bfloat16 or float16, got {gradient.dtype} {list(gradient.shape)}"
        )


class TrainableExperts:
    """The experts of one layer, for forward and backward.

    With the adapters of expert e and ``s = lora_alpha / lora_rank``, gate is
    ``x @ Wg.T + s * (dropout(x) @ Ag.T) @ Bg.T``, and up and down alike.

    Parameters
    ----------
    experts : Experts
        The layer. Its packed weights serve both directions.
    lora_rank : int, default 0
        r, up to 256; 0 means no adapters.
    lora_alpha : float, default 1.0
    lora_dropout : float, default 0.0
        Share of elements of each adapter's input that a forward with a seed drops.
    skip_lora : bool, default False
        The adapters are neither added nor differentiated.

    Attributes
    ----------
    experts : Experts
    lora_rank : int
    lora_scale : float
        ``lora_alpha / lora_rank``.
    lora_dropout : float
    skip_lora : bool

    Raises
    ------
    KtkArgumentError
        If an argument is out of range.
    KtkStateError
        If the layer is closed.
    """

    def __init__(
        self,
        experts: Experts,
        *,
        lora_rank: int = 0,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        skip_lora: bool = False,
    ) -> None:
        self._sft: _native.Sft | None = None
        if not isinstance(experts, Experts):
            raise TypeError(f"experts must be a ktk.Experts, got {type(experts).__name__}")
        self.experts = experts
        self.lora_rank = checked_int("lora_rank", lora_rank, 0, MAX_LORA_RANK)
        if not math.isfinite(lora_alpha):
            raise KtkArgumentError(f"lora_alpha must be finite, got {lora_alpha}")
        if not 0 <= lora_dropout < 1:
            raise KtkArgumentError(f"lora_dropout must be at least 0 and below 1, got {lora_dropout}")
        self.lora_scale = lora_alpha / self.lora_rank if self.lora_rank else 1.0
        self.lora_dropout = float(lora_dropout)
        self.skip_lora = bool(skip_lora)
        self._lora: dict[str, torch.Tensor] = {}
        # What tasks of the queue read and write, until the next sync.
        self._pending: list[object] = []
        self._sft = _native.Sft(
            experts.native,
            lora_rank=self.lora_rank,
            lora_scale=self.lora_scale,
            lora_dropout=self.lora_dropout,
            skip_lora=self.skip_lora,
        )

    @property
    def closed(self) -> bool:
        return self._sft is None or self._sft.closed

    def close(self) -> None:
        """End the use of the layer; contexts can only be closed from then on. Again: does nothing."""
        if self._sft is not None:
            self._sft.close()
            self._lora = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape of each adapter, in the order of `LORA_NAMES`."""
        config = self.experts.config
        return lora_shapes(config.num_experts, config.hidden_size, config.intermediate_size, self.lora_rank)

    def base_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape of each base weight."""
        config = self.experts.config
        e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
        return {"gate": (e, i, h), "up": (e, i, h), "down": (e, h, i)}

    def set_lora(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Use these adapters from now on.

        The tensors are kept and read in place by each forward and backward, so that changes in place, such as
        those of an optimizer, need no further call.

        Parameters
        ----------
        tensors : mapping of str to torch.Tensor
            The six of `LORA_NAMES`, float32 or bfloat16, contiguous, on the CPU.

        Raises
        ------
        KtkArgumentError
            If a tensor is missing, has the wrong shape, dtype, device or layout, or holds NaN or infinity.
        KtkStateError
            If this is closed.
        """
        sft = self._open()
        missing = [name for name in LORA_NAMES if name not in tensors]
        if missing:
            raise KtkArgumentError(f"the adapters lack {', '.join(missing)}; give all of {LORA_NAMES}")
        dtype = _checked_matrices("the adapters", tensors, self.lora_shapes())
        sft.set_lora(_DTYPE_CODES[dtype], *(_address(tensors[name]) for name in LORA_NAMES))
        self._lora = {name: tensors[name] for name in LORA_NAMES}

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        *,
        policy: Policy = "none",
        dropout_seed: int | None = None,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ForwardContext | None]:
        """Run a batch.

        Parameters
        ----------
        hidden_states : torch.Tensor
            ``[T, H]``, bfloat16 or float32, on the CPU. T may be 0 and is at most ``config.max_tokens``.
        expert_ids : torch.Tensor
            int64 ``[T, k]``; ids outside 0 .. E-1 contribute nothing.
        expert_weights : torch.Tensor
            float32 ``[T, k]``.
        policy : {"none", "save", "recompute"}, default "none"
            What is kept for the backward: nothing, and there is none; input, gate and up in bfloat16,
            ``2 T H + 4 T k I`` bytes; or the routing tables, and the backward runs the forward again from
            `hidden_states`, which must not change until then.
        dropout_seed : int, optional
            Drops elements of the adapters' inputs, which depend on this number, the expert, the projection,
            the token's row and the feature, and on nothing else. Default: nothing is dropped.
        output : torch.Tensor, optional
            ``[T, H]`` of the dtype of `hidden_states`, written in place. Default: a new tensor.

        Returns
        -------
        output : torch.Tensor
        context : ForwardContext or None
            None with the policy "none".

        Raises
        ------
        KtkArgumentError
            If a tensor has the wrong shape, dtype, device or layout, or an adapter holds NaN or infinity.
        KtkStateError
            If this or the layer is closed, has no weights, or lacks its adapters.
        """
        context, arguments, result, _read = self._prepare(
            hidden_states, expert_ids, expert_weights, policy, dropout_seed, output
        )
        context._native.forward(*arguments)
        return result, context if policy != "none" else None

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        *,
        policy: Policy = "none",
        dropout_seed: int | None = None,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ForwardContext | None]:
        """As `forward`, on the layer's queue: the result holds from the next `sync` on, which also raises
        what failed."""
        context, arguments, result, read = self._prepare(
            hidden_states, expert_ids, expert_weights, policy, dropout_seed, output
        )
        self.experts.cpu_infer.native_queue.submit_sft_forward(context._native, *arguments)
        self._pending.append((context, result, read))
        return result, context if policy != "none" else None

    def sync(self) -> None:
        """Wait for what was submitted; raises the first failure of the queue since its last sync."""
        try:
            self.experts.cpu_infer.native_queue.sync()
        finally:
            self._pending.clear()

    def update_base(self, expert: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        """Replace the weights of one expert, for instance after an optimizer step.

        Parameters
        ----------
        expert : int
        gate, up, down : torch.Tensor
            ``[I, H]``, ``[I, H]``, ``[H, I]``, bfloat16, float16 or float32 of one dtype. Its biases stay.

        Raises
        ------
        KtkArgumentError
            If a tensor has the wrong shape or dtype, or holds NaN or infinity; in the last case the expert
            has no weights any more.
        KtkStateError
            If this or the layer is closed.
        """
        self._open()
        self.experts.update_expert(expert, gate, up, down)

    def read_base(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stored weights of one expert, dequantised: float32 gate and up ``[I, H]``, down ``[H, I]``.

        Columns of a rotated layer are rotated back, so that these are the model's.

        Raises
        ------
        KtkArgumentError
            If there is no such expert.
        KtkStateError
            If this or the layer is closed, or the expert has no weights.
        """
        self._open()
        index = checked_int("expert", expert, 0, self.experts.config.num_experts - 1)
        gate, up, down = (torch.empty(shape[1:]) for shape in self.base_shapes().values())
        self.experts.native.unpack_expert(index, gate.data_ptr(), up.data_ptr(), down.data_ptr())
        return gate, up, down

    def _open(self) -> _native.Sft:
        if self._sft is None or self._sft.closed:
            raise KtkStateError("these TrainableExperts are closed; make new ones")
        return self._sft

    def _prepare(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        policy: str,
        dropout_seed: int | None,
        output: torch.Tensor | None,
    ) -> tuple[ForwardContext, tuple[Any, ...], torch.Tensor, tuple[torch.Tensor, ...]]:
        """The context, the arguments of the call, its result, and the tensors that it reads."""
        sft = self._open()
        self.experts.ready()
        if policy not in _POLICIES:
            raise KtkArgumentError(f"policy must be one of {', '.join(_POLICIES)}, got {policy!r}")
        hidden, ids, weights = self.experts.checked(hidden_states, expert_ids, expert_weights)
        if hidden.dtype not in _TRAINED_DTYPES or not hidden.is_cpu:
            raise KtkArgumentError(
                f"hidden_states must be float32 or bfloat16 on the CPU, got {hidden.dtype} on {hidden.device}"
            )
        hidden = hidden.contiguous()
        ids = ids.to(torch.int64).contiguous()
        weights = weights.to(torch.float32).contiguous()
        if output is None:
            output = torch.empty_like(hidden)
        elif output.shape != hidden.shape or output.dtype != hidden.dtype or not output.is_contiguous():
            raise KtkArgumentError(
                f"output must be a contiguous {hidden.dtype} tensor of the shape {list(hidden.shape)}, got "
                f"{output.dtype} {list(output.shape)}"
            )
        seed = None if dropout_seed is None else int(dropout_seed)
        native = _native.SftContext(sft, _POLICIES[policy], seed is not None, seed or 0)
        context = ForwardContext(self, native, hidden, ids.shape[1], policy)
        code = _DTYPE_CODES[hidden.dtype]
        count = torch.tensor([hidden.shape[0]], dtype=torch.int32)
        arguments = (
            count.data_ptr(),
            ids.shape[1],
            _address(ids),
            _address(weights),
            _address(hidden),
            code,
            _address(output),
            code,
        )
        return context, arguments, output, (hidden, ids, weights, count)


class ForwardContext:
    """What one forward left for its backward.

    `TrainableExperts.forward` makes them. Any number may be alive, in any order. Dropping the last reference
    frees what is kept.

    Attributes
    ----------
    num_tokens : int
    """

    def __init__(
        self,
        owner: TrainableExperts,
        native: _native.SftContext,
        hidden: torch.Tensor,
        top_k: int,
        policy: str,
    ) -> None:
        self._owner = owner
        self._native = native
        # Only a forward that is run again reads the input once more.
        self._input = hidden if policy == "recompute" else None
        self._dtype = hidden.dtype
        self._top_k = top_k
        self._policy = policy
        self.num_tokens = hidden.shape[0]

    @property
    def closed(self) -> bool:
        return self._native.closed

    @property
    def nbytes(self) -> int:
        """Bytes that are kept: ``2 T H + 4 T k I`` and the routing tables with the policy "save", the tables
        alone with "recompute"; 0 after the backward."""
        return self._native.activation_bytes + self._native.table_bytes

    @property
    def activation_bytes(self) -> int:
        """`nbytes` without the routing tables."""
        return self._native.activation_bytes

    def backward(
        self,
        grad_output: torch.Tensor,
        *,
        grad_lora: Mapping[str, torch.Tensor] | None = None,
        grad_base: Mapping[str, torch.Tensor] | None = None,
        accumulate: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute gradients; once for each context.

        Parameters
        ----------
        grad_output : torch.Tensor
            ``[T, H]``, float32, bfloat16 or float16, on the CPU.
        grad_lora : mapping of str to torch.Tensor, optional
            Where the gradients of adapters go, any of `LORA_NAMES`: float32 or bfloat16 of one dtype,
            contiguous. Sums are made in float32 and rounded once.
        grad_base : mapping of str to torch.Tensor, optional
            The same for base weights, any of ``gate``, ``up``, ``down``; format bf16 only.
        accumulate : bool, default False
            Adds to what is there. Otherwise experts without tokens get zeros.

        Returns
        -------
        grad_hidden : torch.Tensor
            ``[T, H]`` in the dtype of the forward's `hidden_states`.
        grad_expert_weights : torch.Tensor
            float32 ``[T, k]``; 0 where an expert contributed nothing.

        Raises
        ------
        KtkArgumentError
            If a tensor has the wrong shape, dtype, device or layout, or the gradient holds NaN or infinity;
            the context can still be used.
        KtkStateError
            If the context was used or closed, or the layer is closed.
        """
        arguments, keywords, results, _read = self._arguments(grad_output, grad_lora, grad_base, accumulate)
        self._native.backward(*arguments, **keywords)
        self._input = None
        return results

    def submit_backward(
        self,
        grad_output: torch.Tensor,
        *,
        grad_lora: Mapping[str, torch.Tensor] | None = None,
        grad_base: Mapping[str, torch.Tensor] | None = None,
        accumulate: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `backward`, on the layer's queue, until `TrainableExperts.sync`."""
        arguments, keywords, results, read = self._arguments(grad_output, grad_lora, grad_base, accumulate)
        owner = self._owner
        owner.experts.cpu_infer.native_queue.submit_sft_backward(self._native, *arguments, **keywords)
        owner._pending.append((self._native, results, read, self._input))
        self._input = None
        return results

    def _arguments(
        self,
        grad_output: torch.Tensor,
        grad_lora: Mapping[str, torch.Tensor] | None,
        grad_base: Mapping[str, torch.Tensor] | None,
        accumulate: bool,
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[torch.Tensor, torch.Tensor], tuple[Any, ...]]:
        """Arguments of the call, its results, and the other tensors that it reads and writes."""
        owner = self._owner
        shape = (self.num_tokens, owner.experts.config.hidden_size)
        check_gradient(grad_output, *shape, owner.experts.config.layer_idx)
        if not grad_output.is_cpu:
            raise KtkArgumentError(f"grad_output must be on the CPU, got {grad_output.device}")
        lora, base = dict(grad_lora or {}), dict(grad_base or {})
        lora_dtype = _checked_matrices("the gradients of adapters", lora, owner.lora_shapes())
        base_dtype = _checked_matrices("the gradients of base weights", base, owner.base_shapes())
        grad_output = grad_output.detach().contiguous()
        grad_hidden = torch.empty(shape, dtype=self._dtype)
        grad_weights = torch.empty((self.num_tokens, self._top_k))
        keywords: dict[str, Any] = {
            "lora_dtype": _DTYPE_CODES[lora_dtype],
            "base_dtype": _DTYPE_CODES[base_dtype],
            "accumulate": int(bool(accumulate)),
        }
        keywords.update({f"{name.replace('_lora', '')}_ptr": t.data_ptr() for name, t in lora.items()})
        keywords.update({f"{name}_ptr": t.data_ptr() for name, t in base.items()})
        arguments = (
            _address(grad_output),
            _DTYPE_CODES[grad_output.dtype],
            _address(grad_hidden),
            _DTYPE_CODES[grad_hidden.dtype],
            _address(grad_weights),
        )
        return arguments, keywords, (grad_hidden, grad_weights), (grad_output, lora, base)

    def close(self) -> None:
        """Free what is kept. Again: does nothing."""
        self._native.close()
        self._input = None
