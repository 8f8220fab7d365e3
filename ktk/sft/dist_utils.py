"""Experts on rank 0 only, for all ranks.

Every rank runs the whole model on its own tokens except for the experts: their inputs go to rank 0, which
runs all tokens at once, and the results come back. Adapters are parameters on every rank. Rank 0 computes
their gradients for the tokens of all ranks and the others return zeros, so that the mean over ranks, which
DDP and FSDP take, is the gradient of the mean of the ranks' losses.

An exchange is three messages: a header from every rank to every rank, one packed message to rank 0, one
packed message back; over NCCL the ranks meet once more before the last. Whatever fails on one rank is told to
all of them in the header or in the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ktk.errors import KtkArgumentError
from ktk.sft.base import BaseSFTMoEWrapper
from ktk.sft.errors import KTAMXDistributedError
from ktk.sft.native import check_gradient
from ktk.sft.saved import Gradients
from ktk.sft.transport import Transport

__all__ = ["RankZeroRunner", "RankZeroSaved"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class RankZeroSaved:
    """A forward over all ranks that waits for its backward.

    Parameters
    ----------
    saved : SavedForward or None
        On rank 0.
    tokens : list of int
        Of each rank.
    dtype : torch.dtype
    device : torch.device
    top_k : int
    """

    saved: Any
    tokens: list[int]
    dtype: torch.dtype
    device: torch.device
    top_k: int

    def close(self) -> None:
        """Free the activations."""
        if self.saved is not None:
            self.saved.close()


_FORWARD, _BACKWARD = 1, 2
_POLICIES: tuple[Literal["none", "save", "recompute"], ...] = ("none", "save", "recompute")


class RankZeroRunner:
    """Runs a layer of experts that rank 0 holds, for the tokens of all ranks.

    All ranks must call `run` and `run_backward` of the same layers in the same order, as they do when they
    run the same model. A rank may have no tokens.

    Parameters
    ----------
    wrapper : BaseSFTMoEWrapper or None
        None on all ranks but 0.
    layer_idx, num_experts, hidden_size, intermediate_size : int
    transport : Transport
    """

    def __init__(
        self,
        wrapper: BaseSFTMoEWrapper | None,
        *,
        layer_idx: int,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        transport: Transport,
    ) -> None:
        self.wrapper, self.transport = wrapper, transport
        self.layer_idx, self.hidden_size = layer_idx, hidden_size
        self._base_shapes = {
            "gate": (num_experts, intermediate_size, hidden_size),
            "up": (num_experts, intermediate_size, hidden_size),
            "down": (num_experts, hidden_size, intermediate_size),
        }

    def run(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        *,
        policy: Literal["none", "save", "recompute"] = "none",
        lora: Mapping[str, torch.Tensor] | None = None,
        dropout_seed: int | None = None,
    ) -> tuple[torch.Tensor, RankZeroSaved | None]:
        """Forward, see `BaseSFTMoEWrapper.run`; the seed of rank 0 counts.

        Raises
        ------
        KTAMXDistributedError
            On every rank, if it fails on one.
        """
        top_k = expert_ids.shape[-1]

        def check() -> None:
            if hidden_states.dim() != 2 or hidden_states.shape[1] != self.hidden_size:
                raise KtkArgumentError(
                    f"hidden_states must be [tokens, {self.hidden_size}], got {list(hidden_states.shape)}"
                )
            if hidden_states.dtype not in _DTYPES:
                raise KtkArgumentError(
                    f"hidden_states must be bfloat16, float16 or float32, got {hidden_states.dtype}"
                )
            if self.wrapper is not None:
                self.wrapper.check_inputs(hidden_states, expert_ids, expert_weights)

        dtype = hidden_states.dtype
        tokens, device = self._meet(
            check,
            hidden_states.device,
            _FORWARD,
            len(hidden_states),
            top_k,
            dtype,
            _POLICIES.index(policy) + 4 * (lora is not None),
        )
        parts = (hidden_states.detach(), expert_ids.detach().to(torch.int64), expert_weights.detach().float())
        row_bytes = self.hidden_size * dtype.itemsize + top_k * 12
        received = self.transport.to_rank_zero(_pack(parts), [count * row_bytes for count in tokens], device)
        saved: Any = None

        def compute() -> list[tuple[torch.Tensor, ...]]:
            nonlocal saved
            assert self.wrapper is not None
            shapes = [((n, self.hidden_size), (n, top_k), (n, top_k)) for n in tokens]
            kinds = (dtype, torch.int64, torch.float32)
            split = [_unpack(data, shape, kinds) for data, shape in zip(received, shapes, strict=True)]
            everything = [torch.cat(columns) for columns in zip(*split, strict=True)]
            output, saved = self.wrapper.run(*everything, policy=policy, lora=lora, dropout_seed=dropout_seed)
            return [(piece,) for piece in output.split(tokens)]

        answer = self._answer(
            compute, [count * self.hidden_size * dtype.itemsize for count in tokens], device
        )
        (output,) = _unpack(answer, ((len(hidden_states), self.hidden_size),), (dtype,))
        kept = None
        if policy != "none":
            kept = RankZeroSaved(saved, tokens, dtype, hidden_states.device, top_k)
        return output.to(hidden_states.device), kept

    def run_backward(
        self,
        saved: RankZeroSaved,
        grad_output: torch.Tensor,
        *,
        lora: Mapping[str, torch.Tensor] | None = None,
        want_lora: bool = False,
        base_dtype: torch.dtype | None = None,
    ) -> Gradients:
        """Backward, see `BaseSFTMoEWrapper.run_backward`. Ranks other than 0 get zeros for adapters and
        weights.

        Raises
        ------
        KTAMXDistributedError
            On every rank, if it fails on one.
        """
        rank = self.transport.rank
        mine = saved.tokens[rank]
        tokens, device = self._meet(
            lambda: self._check_gradient(grad_output, mine),
            grad_output.device,
            _BACKWARD,
            mine,
            saved.top_k,
            saved.dtype,
            int(want_lora) + 2 * (base_dtype is not None),
        )
        row_bytes = self.hidden_size * saved.dtype.itemsize
        payload = _pack((grad_output.detach().to(saved.dtype),))
        received = self.transport.to_rank_zero(payload, [count * row_bytes for count in tokens], device)
        gradients: Gradients | None = None

        def compute() -> list[tuple[torch.Tensor, ...]]:
            nonlocal gradients
            assert self.wrapper is not None
            whole = torch.cat(
                [
                    _unpack(data, ((n, self.hidden_size),), (saved.dtype,))[0]
                    for data, n in zip(received, tokens, strict=True)
                ]
            )
            gradients = self.wrapper.run_backward(
                saved.saved, whole, lora=lora, want_lora=want_lora, base_dtype=base_dtype
            )
            return list(
                zip(
                    gradients.hidden_states.split(tokens),
                    gradients.expert_weights.split(tokens),
                    strict=True,
                )
            )

        answer = self._answer(compute, [count * (row_bytes + 4 * saved.top_k) for count in tokens], device)
        grad_hidden, grad_weights = _unpack(
            answer, ((mine, self.hidden_size), (mine, saved.top_k)), (saved.dtype, torch.float32)
        )
        if gradients is None:
            gradients = self._zeros(lora if want_lora else None, base_dtype)
        gradients.hidden_states = grad_hidden.to(saved.device)
        gradients.expert_weights = grad_weights.to(saved.device)
        return gradients

    def _check_gradient(self, gradient: torch.Tensor, tokens: int) -> None:
        check_gradient(gradient, tokens, self.hidden_size, self.layer_idx)
        # The native backward looks too, but cannot tell whose tokens they were.
        if not torch.isfinite(gradient).all():
            raise KtkArgumentError(
                f"the gradient that reaches the experts of layer {self.layer_idx} holds NaN or infinity: the "
                "loss, or a layer after this one, overflowed. Lower the learning rate, or clip gradients"
            )

    def _zeros(self, lora: Mapping[str, torch.Tensor] | None, base_dtype: torch.dtype | None) -> Gradients:
        empty = torch.empty(0)
        zeros = Gradients(empty, empty)
        if lora is not None:
            zeros.lora = {name: torch.zeros_like(tensor) for name, tensor in lora.items()}
        if base_dtype is not None:
            zeros.base = {
                name: torch.zeros(shape, dtype=base_dtype) for name, shape in self._base_shapes.items()
            }
        return zeros

    def _meet(
        self,
        check: Callable[[], None],
        device: torch.device,
        phase: int,
        tokens: int,
        top_k: int,
        dtype: torch.dtype,
        flags: int,
    ) -> tuple[list[int], torch.device]:
        """Tell all ranks what this one is about to do; the number of tokens of each, and where to exchange
        them: on `device` if all ranks can, else on the CPU."""
        failure = _attempt(check)
        code = _DTYPES.index(dtype) if dtype in _DTYPES else -1
        there = self.transport.takes(device)
        header = torch.tensor([failure is not None, phase, self.layer_idx, top_k, code, flags, tokens, there])
        everyone = self.transport.all_gather(header.to(torch.int64))
        if everyone[:, 0].any():
            self._raise(failure)
        kinds = everyone[:, 1:6]
        if not bool((kinds == kinds[0]).all()):
            names = ("phase", "layer", "experts a token", "dtype", "what is needed")
            differing = [
                name for name, column in zip(names, kinds.T, strict=True) if len(set(column.tolist())) > 1
            ]
            raise KTAMXDistributedError(
                f"the ranks are not at the same point of the model: {', '.join(differing)} differ "
                f"({kinds.tolist()}); all ranks must run the same layers in the same order"
            )
        counts: list[int] = everyone[:, 6].tolist()
        return counts, device if bool(everyone[:, 7].all()) else torch.device("cpu")

    def _answer(
        self,
        compute: Callable[[], list[tuple[torch.Tensor, ...]]],
        sizes: Sequence[int],
        device: torch.device,
    ) -> torch.Tensor:
        """Compute on rank 0 and hand every rank its part, of `sizes` bytes, or the failure."""
        failure: BaseException | None = None
        payloads: list[torch.Tensor] | None = None
        if self.transport.rank == 0:
            pieces: list[tuple[torch.Tensor, ...]] = []

            def work() -> None:
                pieces.extend(compute())

            failure = _attempt(work)
            status = torch.tensor([failure is not None], dtype=torch.int64).view(torch.uint8)
            parts = [_pack(piece) for piece in pieces] if failure is None else map(_zeros, sizes)
            payloads = [torch.cat([status.to(part.device), part]) for part in parts]
        answer = self.transport.from_rank_zero(payloads, 8 + sizes[self.transport.rank], device)
        if int(answer[:8].cpu().view(torch.int64)):
            self._raise(failure)
        return answer[8:]

    def _raise(self, failure: BaseException | None) -> None:
        text = "" if failure is None else f"rank {self.transport.rank}: {type(failure).__name__}: {failure}"
        texts = [part for part in self.transport.all_gather_text(text) if part]
        raise KTAMXDistributedError(
            f"the experts of layer {self.layer_idx} failed: {'; '.join(texts)}"
        ) from failure


def _attempt(work: Callable[[], None]) -> BaseException | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are to raise it
        return error
    return None


def _zeros(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def _pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bytes of all tensors, one after the other."""
    return torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])


def _unpack(
    data: torch.Tensor, shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]
) -> tuple[torch.Tensor, ...]:
    found, begin = [], 0
    for (rows, columns), dtype in zip(shapes, dtypes, strict=True):
        end = begin + rows * columns * dtype.itemsize
        # A copy: what follows a part of odd size may start at any byte.
        found.append(data[begin:end].clone().view(dtype).view(rows, columns))
        begin = end
    return tuple(found)
