"""The operators ``torch.ops.ktk.*``.

``ktk::moe_forward(Tensor hidden_states, Tensor expert_ids, Tensor expert_weights, int layer) -> Tensor`` is
the forward of one `ktk.Experts`, named by its `handle`. It has implementations for CPU and CUDA tensors and a
fake one, so that ``torch.compile(fullgraph=True)`` and ``torch.export`` see one opaque call. It has no
gradient: a backward pass through it raises.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch

from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError

__all__ = ["moe_forward", "register_layer"]


class _Layer(Protocol):
    def run(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor: ...


_layers: weakref.WeakValueDictionary[int, _Layer] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


def register_layer(layer: _Layer) -> int:
    """Give a layer the number under which the operators find it.

    Parameters
    ----------
    layer : object
        With a method ``run(hidden_states, expert_ids, expert_weights)``. It is not kept alive.

    Returns
    -------
    int
        Unique within the process, never used again.
    """
    handle = next(_handles)
    _layers[handle] = layer
    return handle


def _moe_forward(
    hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, layer: int
) -> torch.Tensor:
    found = _layers.get(layer)
    if found is None:
        raise KtkStateError(
            f"there is no layer with handle {layer}; it was deleted, or the handle belongs to another process"
        )
    return found.run(hidden_states, expert_ids, expert_weights)


def _moe_forward_fake(
    hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, layer: int
) -> torch.Tensor:
    if hidden_states.dim() < 1 or expert_ids.shape != expert_weights.shape:
        raise KtkArgumentError(
            "hidden_states must be [..., H] and expert_ids and expert_weights [..., k], got "
            f"{list(hidden_states.shape)}, {list(expert_ids.shape)} and {list(expert_weights.shape)}"
        )
    return hidden_states.new_empty(hidden_states.shape)


def _no_backward(context: Any, gradient: torch.Tensor) -> Any:
    raise KtkUnsupportedError(
        "ktk::moe_forward has no gradient; run inference under torch.no_grad(), or train with ktk.sft"
    )


# The library object owns the registrations, so it lives as long as the module.
_library = torch.library.Library("ktk", "FRAGMENT")
_library.define(
    "moe_forward(Tensor hidden_states, Tensor expert_ids, Tensor expert_weights, int layer) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("moe_forward", _moe_forward, _device)
torch.library.register_fake("ktk::moe_forward", _moe_forward_fake, lib=_library)
torch.library.register_autograd("ktk::moe_forward", _no_backward, lib=_library)


def moe_forward(
    hidden_states: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, layer: int
) -> torch.Tensor:
    """Run a layer of experts; the same as ``torch.ops.ktk.moe_forward``.

    Parameters
    ----------
    hidden_states : torch.Tensor
        ``[..., H]``, float32, bfloat16 or float16, on the CPU or a CUDA device.
    expert_ids : torch.Tensor
        int32 or int64 ``[..., k]``. Ids outside 0 .. E-1 contribute nothing.
    expert_weights : torch.Tensor
        Floating point ``[..., k]``.
    layer : int
        `handle` of a `ktk.Experts`.

    Returns
    -------
    torch.Tensor
        A new tensor like `hidden_states`.

    Raises
    ------
    KtkStateError
        If the layer is closed, deleted or without weights.
    KtkArgumentError
        If a tensor has the wrong shape, dtype or device.
    """
    result: torch.Tensor = torch.ops.ktk.moe_forward(hidden_states, expert_ids, expert_weights, layer)
    return result
