"""One file, written whole or not at all."""

import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...errors import OPLoRAFileError

__all__ = ["cannot_write", "old", "place", "sync", "temporary", "write_file"]

STALE_SECONDS: Final = 3600  # no save takes so long: what has lain for longer is of a run that was killed


def write_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """A safetensors file at `path`, which until then keeps what it holds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".oplora-*.part"):
            if old(left):
                left.unlink(missing_ok=True)
    except OSError as error:
        raise OPLoRAFileError(f"oplora.save_adapter: cannot write into {path.parent}: {error}.") from error
    new = path.parent / temporary("part")
    try:
        save_file(dict(tensors), new, dict(metadata))
        sync(new)
        os.replace(new, path)
    except (OSError, SafetensorError) as error:  # safetensors reports failed writes as errors of its own
        raise cannot_write(path, error) from error
    finally:
        new.unlink(missing_ok=True)


def place(path: Path, name: str) -> Path:
    """`path` itself if it is a file's, else the file `name` in that folder."""
    return path if path.suffix == ".safetensors" else path / name


def temporary(suffix: str) -> str:
    return f".oplora-{secrets.token_hex(4)}.{suffix}"


def old(path: Path) -> bool:
    with suppress(OSError):  # another process may be removing it
        return path.stat().st_mtime < time.time() - STALE_SECONDS
    return False


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # a kill does not need it; after a power cut a name could be that of no bytes


def cannot_write(path: Path, error: Exception) -> OPLoRAFileError:
    return OPLoRAFileError(
        f"oplora.save_adapter: writing the adapter into {path} failed ({error}). Free some space or choose another "
        "folder; the adapter is still in the model."
    )
