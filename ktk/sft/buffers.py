"""`KExpertsSFTBuffer`: staging memory between a GPU and the experts on the CPU."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

__all__ = ["KExpertsSFTBuffer", "SFTBufferSet"]


@dataclass(frozen=True)
class SFTBufferSet:
    """Tensors of one layer call, on the CPU; pinned where CUDA is there.

    Parameters
    ----------
    input, output, grad_output, grad_input : torch.Tensor
        ``[T, H]`` in the dtype of the hidden states.
    expert_ids : torch.Tensor
        int64 ``[T, k]``.
    weights, grad_weights : torch.Tensor
        float32 ``[T, k]``.
    bsz : torch.Tensor
        int32 ``[1]``, T.
    """

    input: torch.Tensor
    output: torch.Tensor
    grad_output: torch.Tensor
    grad_input: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    grad_weights: torch.Tensor
    bsz: torch.Tensor

    def rows(self, tokens: int) -> SFTBufferSet:
        """The first `tokens` rows."""
        self.bsz.fill_(tokens)
        parts = {name: tensor[:tokens] for name, tensor in vars(self).items() if name != "bsz"}
        return SFTBufferSet(**parts, bsz=self.bsz)


class KExpertsSFTBuffer:
    """Staging sets by everything that shapes them: hidden size, experts a token, dtype, pinned or not.

    A set grows with the largest batch seen and never shrinks; models of different sizes do not share one.
    Only tensors that are not on the CPU pass through it.
    """

    _sets: ClassVar[dict[tuple[Any, ...], SFTBufferSet]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get_buffer(
        cls,
        tokens: int,
        hidden_size: int,
        num_experts_per_tok: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        pin_memory: bool | None = None,
    ) -> SFTBufferSet:
        """Buffers of `tokens` rows, valid until the next call with the same shapes.

        Parameters
        ----------
        tokens, hidden_size, num_experts_per_tok : int
            T, H and k.
        dtype : torch.dtype, default torch.bfloat16
            Of hidden states and their gradients.
        pin_memory : bool, optional
            Default: whether CUDA is there.
        """
        pinned = torch.cuda.is_available() if pin_memory is None else pin_memory
        key = (hidden_size, num_experts_per_tok, dtype, pinned, threading.get_ident())
        with cls._lock:
            found = cls._sets.get(key)
            if found is None or found.input.shape[0] < tokens:
                found = cls._allocate(tokens, hidden_size, num_experts_per_tok, dtype, pinned)
                cls._sets[key] = found
        return found.rows(tokens)

    @staticmethod
    def _allocate(tokens: int, hidden: int, top_k: int, dtype: torch.dtype, pinned: bool) -> SFTBufferSet:
        def empty(columns: int, of: torch.dtype) -> torch.Tensor:
            return torch.empty(tokens, columns, dtype=of, pin_memory=pinned)

        return SFTBufferSet(
            input=empty(hidden, dtype),
            output=empty(hidden, dtype),
            grad_output=empty(hidden, dtype),
            grad_input=empty(hidden, dtype),
            expert_ids=empty(top_k, torch.int64),
            weights=empty(top_k, torch.float32),
            grad_weights=empty(top_k, torch.float32),
            bsz=torch.zeros(1, dtype=torch.int32),
        )

    @classmethod
    def clear_cache(cls) -> None:
        """Drop all sets."""
        with cls._lock:
            cls._sets.clear()
