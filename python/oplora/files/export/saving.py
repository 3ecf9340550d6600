"""What the formats have in common where they write: how failures are told, and one file of tensors."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...errors import OPLoRAError, OPLoRAFileError
from .. import atomic

__all__ = ["place", "write_file", "writing"]


@contextmanager
def writing(new: AbstractContextManager[Path], path: Path, where: Path) -> Iterator[Path]:
    """One of atomic's writers, with its failures told: those before a byte is written of `where`, others of `path`."""
    try:
        with ExitStack() as stack:
            try:
                beside = stack.enter_context(new)
            except OSError as error:
                raise OPLoRAFileError(f"oplora.save_adapter: cannot write into {where}: {error}.") from error
            yield beside
    except OPLoRAError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors reports failed writes as errors of its own
        raise OPLoRAFileError(
            f"oplora.save_adapter: writing the adapter into {path} failed ({error}). Free some space or choose another "
            "folder; the adapter is still in the model."
        ) from error


def write_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """A safetensors file at `path`, which until then keeps what it holds."""
    with writing(atomic.file(path), path, path.parent) as new:
        save_file(dict(tensors), new, dict(metadata))


def place(path: Path, name: str) -> Path:
    """`path` itself if it is a file's, else the file `name` in that folder."""
    return path if path.suffix == ".safetensors" else path / name
