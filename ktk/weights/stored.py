"""How weights on disk were quantised, which a layer follows where its maker leaves it open."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ktk.errors import KtkArgumentError
from ktk.weights.kt_kernel import KTKernelLayer, stored_group_size
from ktk.weights.packed import PackedFile, find_packed

__all__ = ["StoredLayout", "complete_layout", "stored_layout"]


@dataclass(frozen=True, kw_only=True)
class StoredLayout:
    """How the weights of a layer were quantised.

    Parameters
    ----------
    group_size : int
        That of a layer that holds them as they are.
    rotated : bool
        Whether their columns were rotated before.
    kt_kernel : bool
        Whether kt-kernel wrote them, rather than ktk.
    """

    group_size: int
    rotated: bool
    kt_kernel: bool

    @classmethod
    def of_kt_kernel(cls, layer: KTKernelLayer) -> StoredLayout:
        """Layout of weights that kt-kernel has quantised, which never rotates."""
        return cls(group_size=layer.group_size, rotated=False, kt_kernel=True)

    def complete(
        self, group_size: int | None = None, rotated: bool | None = None
    ) -> tuple[int | None, bool | None]:
        """`group_size` and `rotated` of a layer that is to hold these weights.

        Parameters
        ----------
        group_size : int, optional
        rotated : bool, optional
            What was asked for; None leaves it to the weights.

        Returns
        -------
        group_size : int or None
            None where the weights have to be quantised again, which any group size will do for.
        rotated : bool
        """
        if self.kt_kernel and rotated:
            return group_size, rotated
        return (
            self.group_size if group_size is None else group_size,
            self.rotated if rotated is None else rotated,
        )


def stored_layout(path: str | os.PathLike[str] | None, layer_idx: int, format: str) -> StoredLayout | None:
    """Layout of the quantised weights of one layer at a path.

    Parameters
    ----------
    path : path, optional
        A packed file, a folder of them, or weights of kt-kernel (`ktk.weights.KTKernelWeights`).
    layer_idx : int
        Number of the layer.
    format : str
        A key of `ktk.config.FORMATS`.

    Returns
    -------
    StoredLayout or None
        None if there are no such weights of this layer in this format, or they cannot be read: whoever loads
        them says what is wrong.

    Raises
    ------
    KtkArgumentError
        If weights of kt-kernel are incomplete, or their sizes do not go together.
    """
    if not path or not Path(path).exists():
        return None
    packed = find_packed(path, format, layer_idx)
    if packed is not None:
        try:
            with PackedFile(packed) as file:
                header = file.layers.get(layer_idx)
        except (KtkArgumentError, OSError):
            header = None
        if header is not None and header.format == format:
            return StoredLayout(group_size=header.group_size, rotated=header.rotated, kt_kernel=False)
    group_size = stored_group_size(path, layer_idx, format)
    return None if group_size is None else StoredLayout(group_size=group_size, rotated=False, kt_kernel=True)


def complete_layout(
    path: str | os.PathLike[str] | None,
    layer_idx: int,
    format: str,
    group_size: int | None,
    rotated: bool | None,
) -> tuple[int | None, bool | None]:
    """`group_size` and `rotated` as asked for; those left open as the weights at a path have them, if any.

    Parameters
    ----------
    path, layer_idx, format
        As for `stored_layout`.
    group_size, rotated
        As for `StoredLayout.complete`.

    Returns
    -------
    group_size : int or None
    rotated : bool or None
        None is the default of the format.

    Raises
    ------
    KtkArgumentError
        As `stored_layout`.
    """
    stored = stored_layout(path, layer_idx, format)
    return (group_size, rotated) if stored is None else stored.complete(group_size, rotated)
