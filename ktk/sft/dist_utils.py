"""Experts on rank 0 only, for all ranks.

Every rank runs the whole model on its own tokens except for the experts: their inputs go to rank 0, which
runs all tokens at once, and the results come back. Adapters are parameters on every rank. Rank 0 computes
their gradients for the tokens of all ranks and the others return zeros, so that the mean over ranks, which
DDP and FSDP take, is the gradient of the mean of the ranks' losses.

An exchange is three messages: a header from every rank to every rank, one packed message to rank 0, one
packed message back. Whatever fails on one rank is told to all of them in the header or in the answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ktk.errors import KtkArgumentError
from ktk.sft.base import BaseSFTMoEWrapper, Gradients
from ktk.sft.errors import KTAMXDistributedError
from ktk.sft.native import check_gradient

__all__ = [
    "FailureBoard",
    "RankZeroRunner",
    "RankZeroSaved",
    "Transport",
    "average_gradients",
    "failure_guard",
    "is_distributed",
    "world",
]

_POLL_S = 0.5
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world() -> tuple[int, int]:
    """This rank and the number of ranks; 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all ranks; a gradient that is None counts as zero."""
    if not is_distributed():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(dist.get_world_size())


class FailureBoard:
    """Where a rank writes that it failed, and all ranks look: a key-value store that rank 0 serves."""

    _KEY = "failure"

    def __init__(self) -> None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        rank, port = dist.get_rank(), [0]
        self._store: Any = None
        if rank == 0:
            self._store = TCPStore(host, 0, None, True, wait_for_workers=False)
            port[0] = self._store.port
        dist.broadcast_object_list(port, src=0)
        if rank != 0:
            self._store = TCPStore(host, port[0], None, False)

    def post(self, text: str) -> None:
        """Write a failure."""
        self._store.set(self._KEY, text)

    def read(self) -> str | None:
        """The last failure that was written, or that the store is gone, and rank 0 with it; or None."""
        try:
            return self._store.get(self._KEY).decode() if self._store.check([self._KEY]) else None
        except dist.DistError as error:
            return f"rank 0 is gone ({error})"


_boards: list[FailureBoard] = []


@contextmanager
def failure_guard() -> Iterator[None]:
    """Tell the other ranks when the block fails; they raise at their next exchange, or in the one they wait
    in.

    Raises
    ------
    BaseException
        What the block raised.
    """
    try:
        yield
    except BaseException as error:
        if is_distributed() and not isinstance(error, KTAMXDistributedError):
            for board in _boards[-1:]:
                board.post(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        raise


class Transport:
    """Moves bytes between rank 0 and the others. Replace it to place experts otherwise.

    Parameters
    ----------
    timeout_s : float, default 1800
        Longest wait for a rank that says nothing.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # A group of its own: exchanges must not get between the collectives of DDP or FSDP.
        self._group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        self._timeout_s = timeout_s
        self._board = FailureBoard()
        _boards[:] = [self._board]
        backend = dist.get_backend(self._group)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
        )

    def _wait(self, works: Sequence[Any]) -> None:
        """Wait for all, looking every half second whether some rank has failed meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        pause, next_look = 1e-5, time.monotonic() + _POLL_S
        for work in works:
            while not work.is_completed():
                now = time.monotonic()
                if now >= next_look:
                    next_look = now + _POLL_S
                    if (failure := self._board.read()) is not None:
                        raise KTAMXDistributedError(f"another rank failed: {failure}")
                    if now > deadline:
                        raise KTAMXDistributedError(
                            f"rank {self.rank} waited {self._timeout_s:.0f} s for another rank at the experts"
                        )
                time.sleep(pause)
                pause = min(pause * 1.5, 1e-3)
            try:
                work.wait()
            except RuntimeError as error:
                failure = self._board.read() or str(error)
                raise KTAMXDistributedError(
                    f"rank {self.rank} lost another rank at the experts: {failure}"
                ) from error

    def all_gather(self, header: torch.Tensor) -> torch.Tensor:
        """Header ``[n]`` of every rank, int64 ``[world_size, n]`` on the CPU."""
        mine = header.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        self._wait([dist.all_gather(parts, mine, group=self._group, async_op=True)])
        return torch.stack(parts).cpu()

    def all_gather_text(self, text: str) -> list[str]:
        """A text of every rank."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, text, group=self._group)
        return [str(part) for part in parts]

    def to_rank_zero(self, payload: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send uint8 `payload` to rank 0; there, the payload of every rank, whose sizes are `sizes`."""
        nothing = [0] * self.world_size
        sent = [payload.numel(), *nothing[1:]]
        received = self._exchange(payload, sent, list(sizes) if self.rank == 0 else nothing)
        return list(received.split(list(sizes))) if self.rank == 0 else []

    def from_rank_zero(self, payloads: Sequence[torch.Tensor] | None, size: int) -> torch.Tensor:
        """On rank 0, send each rank its payload; returns this rank's, of `size` bytes."""
        nothing = [0] * self.world_size
        if payloads is None:
            data, sent = torch.empty(0, dtype=torch.uint8), nothing
        else:
            data, sent = torch.cat(list(payloads)), [payload.numel() for payload in payloads]
        return self._exchange(data, sent, [size, *nothing[1:]])

    def _exchange(self, data: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        # One collective with sizes for each rank, and not sends and receives: under gloo only collectives can
        # be watched while they wait.
        mine = data.to(self.device).contiguous()
        result = torch.empty(sum(received), dtype=torch.uint8, device=self.device)
        self._wait([dist.all_to_all_single(result, mine, received, sent, group=self._group, async_op=True)])
        return result


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
        tokens = self._meet(
            check,
            _FORWARD,
            len(hidden_states),
            top_k,
            dtype,
            _POLICIES.index(policy) + 4 * (lora is not None),
        )
        parts = (hidden_states.detach(), expert_ids.detach().to(torch.int64), expert_weights.detach().float())
        row_bytes = self.hidden_size * dtype.itemsize + top_k * 12
        received = self.transport.to_rank_zero(_pack(parts), [count * row_bytes for count in tokens])
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

        answer = self._answer(compute, [count * self.hidden_size * dtype.itemsize for count in tokens])
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
        tokens = self._meet(
            lambda: check_gradient(grad_output, mine, self.hidden_size, self.layer_idx),
            _BACKWARD,
            mine,
            saved.top_k,
            saved.dtype,
            int(want_lora) + 2 * (base_dtype is not None),
        )
        row_bytes = self.hidden_size * saved.dtype.itemsize
        payload = _pack((grad_output.detach().to(saved.dtype),))
        received = self.transport.to_rank_zero(payload, [count * row_bytes for count in tokens])
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

        answer = self._answer(compute, [count * (row_bytes + 4 * saved.top_k) for count in tokens])
        grad_hidden, grad_weights = _unpack(
            answer, ((mine, self.hidden_size), (mine, saved.top_k)), (saved.dtype, torch.float32)
        )
        if gradients is None:
            gradients = self._zeros(lora if want_lora else None, base_dtype)
        gradients.hidden_states = grad_hidden.to(saved.device)
        gradients.expert_weights = grad_weights.to(saved.device)
        return gradients

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
        phase: int,
        tokens: int,
        top_k: int,
        dtype: torch.dtype,
        flags: int,
    ) -> list[int]:
        """Tell all ranks what this one is about to do; the number of tokens of each."""
        failure = _attempt(check)
        code = _DTYPES.index(dtype) if dtype in _DTYPES else -1
        header = torch.tensor([failure is not None, phase, self.layer_idx, top_k, code, flags, tokens])
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
        return counts

    def _answer(
        self, compute: Callable[[], list[tuple[torch.Tensor, ...]]], sizes: Sequence[int]
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
        answer = self.transport.from_rank_zero(payloads, 8 + sizes[self.transport.rank])
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
