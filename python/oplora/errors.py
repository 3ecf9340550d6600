"""The package's errors: each says what, where and how to mend it, and is also the built-in that it resembles."""

import os
import sys
import warnings

__all__ = [
    "OPLoRAError",
    "OPLoRAFileError",
    "OPLoRAMemoryError",
    "OPLoRARuntimeError",
    "OPLoRATypeError",
    "OPLoRAValueError",
    "warn",
]

_CALLERS = ("torch", "accelerate")
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


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


def warn(message: str) -> None:
    """A UserWarning that points at the line outside the package from which it came."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_inside(filename: str) -> bool:
    """Of this package, or of torch and accelerate, which call optimizers by way of wrappers of their own."""
    return filename.startswith(_PACKAGE) or any(f"{os.sep}{name}{os.sep}" in filename for name in _CALLERS)
