"""Export of trained adapters: one module a format."""

import os
from pathlib import Path
from typing import Any

from ..errors import OPLoRAValueError
from . import peft

__all__ = ["save_adapter"]

FORMATS = {"peft": peft.save}


def save_adapter(model: Any, path: str | os.PathLike[str], format: str = "peft") -> None:
    """Writes the adapter as a file that other programs load; nothing of the generators is in it.

    Args:
        model: a PeftModel.
        path: the folder to write; files of the same names in it are replaced, each in one move once all are written.
        format: "peft": adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained. Adapters with
            a name other than "default" go into a subfolder of that name, as PEFT does.

    A process that is killed leaves each adapter as it was or new. Where its configuration changes there is a moment, of
    three system calls, in which PEFT refuses the folder; a kill then leaves the new adapter in its `.oplora-*` folder.

    Raises:
        OPLoRAError: an unknown format, a model without adapter, merged layers, or a folder that cannot be written;
            what was there before is untouched then.
    """
    if format not in FORMATS:
        known = " or ".join(map(repr, FORMATS))
        raise OPLoRAValueError(f"oplora.save_adapter: format is {format!r}, expected {known}.")
    FORMATS[format](model, Path(path))
