"""Exceptions of fine-tuning. Each is also the exception of `ktk.errors` with the same meaning."""

from __future__ import annotations

from ktk.errors import KtkArgumentError, KtkError, KtkStateError, KtkUnsupportedError

__all__ = [
    "KTAMXConfigError",
    "KTAMXDistributedError",
    "KTAMXError",
    "KTAMXModelNotSupportedError",
    "KTAMXNotAvailableError",
]


class KTAMXError(KtkError):
    """Base of what fine-tuning raises by itself. The name is historical: it runs on every instruction set."""


class KTAMXNotAvailableError(KTAMXError, KtkUnsupportedError):
    """This build of ktk, or this installation, cannot fine-tune in the way that was asked for."""


class KTAMXModelNotSupportedError(KTAMXError, KtkUnsupportedError):
    """The model has no experts that ktk can train, or they compute something that it has no gradient of."""


class KTAMXConfigError(KTAMXError, KtkArgumentError):
    """A setting is unknown, out of range, or at odds with another."""


class KTAMXDistributedError(KTAMXError, KtkStateError):
    """Another rank failed, or the ranks are not at the same point of the model."""
