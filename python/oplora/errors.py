"""The package's errors: each says what, where and how to mend it, and is also the built-in that it resembles."""

__all__ = [
    "OPLoRAError",
    "OPLoRAFileError",
    "OPLoRAMemoryError",
    "OPLoRARuntimeError",
    "OPLoRATypeError",
    "OPLoRAValueError",
]


class OPLoRAError(Exception):
    """Any error that oplora raises on purpose."""


class OPLoRAValueError(OPLoRAError, ValueError):
    """A value, shape or name that cannot be right."""


class OPLoRATypeError(OPLoRAError, TypeError):
    """An argument of another kind, dtype or device than the call takes."""


class OPLoRARuntimeError(OPLoRAError, RuntimeError):
    """The call is right but the state of the model or optimizer forbids it now; nothing was changed."""


class OPLoRAMemoryError(OPLoRAError, MemoryError):
    """The generators' state does not fit into memory."""


class OPLoRAFileError(OPLoRAError, OSError):
    """A file that is missing, damaged, of another model, or cannot be written; no half-written output is left."""
