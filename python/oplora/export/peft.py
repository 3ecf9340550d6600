"""PEFT's own format, written by PEFT and moved into place when it is whole.

A process that is killed on the way leaves the old adapter or the new one. Config and weights are two files, and no
file system moves two at once into a folder that others use too. So where the old config differs from the new one it
goes first and the new one comes last: for that moment PEFT refuses the folder, as there is no config in it.
"""

import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from ..errors import OPLoRAFileError, OPLoRARuntimeError, OPLoRATypeError

__all__ = ["save"]

CARD: Final = "README.md"
CONFIG: Final = "adapter_config.json"
STALE_SECONDS: Final = 3600  # no save takes so long: what has lain for longer is of a run that was killed


def save(model: Any, path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise OPLoRATypeError(
            f"oplora.save_adapter: expected a PeftModel, got {type(model).__name__}. A model with an injected adapter "
            "saves it by its own save_pretrained (transformers) or save_lora_adapter (diffusers)."
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise OPLoRARuntimeError(
                f"oplora.save_adapter: layer {name} is merged into its base. Call model.unmerge_adapter() first."
            )
    try:
        new = _new_folder(path if path.exists() else path.parent)
    except OSError as error:
        raise OPLoRAFileError(f"oplora.save_adapter: cannot write into {path}: {error}.") from error
    try:
        if (path / CARD).is_file():
            shutil.copy(path / CARD, new)  # PEFT adds to the one that is there
        model.save_pretrained(str(new))
        _sync(new)
        _move(new, path)
    except (OSError, SafetensorError) as error:  # safetensors reports failed writes as errors of its own
        raise OPLoRAFileError(
            f"oplora.save_adapter: writing the adapter into {path} failed ({error}). Free some space or choose another "
            "folder; the adapter is still in the model."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _new_folder(parent: Path) -> Path:
    """A folder to write into, on the disk of the target; those that killed runs left are removed."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".oplora-*.adapter"):
        with suppress(OSError):  # another process may be removing it
            if left.stat().st_mtime < time.time() - STALE_SECONDS:
                shutil.rmtree(left)
    new = parent / f".oplora-{secrets.token_hex(4)}.adapter"
    new.mkdir()
    return new


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a kill does not need it; after a power cut a name could be that of no bytes


def _move(new: Path, path: Path) -> None:
    if new.parent != path:
        with suppress(OSError):  # by now another process may have saved there
            new.rename(path)
            return
    for folder, _, names in os.walk(new):
        target = path / Path(folder).relative_to(new)
        target.mkdir(exist_ok=True)
        if CONFIG in names and not _have_same_config(Path(folder), target):
            (target / CONFIG).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == CONFIG):
            os.replace(Path(folder, name), target / name)


def _have_same_config(*folders: Path) -> bool:
    """As PEFT reads them: what is a set there lies in the file in another order each run."""
    from peft import PeftConfig

    if not all((folder / CONFIG).is_file() for folder in folders):  # PEFT would ask the hub
        return False
    try:
        one, other = (PeftConfig.from_pretrained(str(folder)) for folder in folders)
    except (ValueError, KeyError, TypeError):  # it is no adapter that lies there
        return False
    return bool(one == other)
