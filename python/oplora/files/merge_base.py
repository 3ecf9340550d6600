"""The base model that an adapter is merged into: a folder or one file, taken as a whole or refused."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import OPLoRAFileError
from .tensor_file import StoredTensor, TensorFile, damaged, read_object, read_tensor_file

__all__ = ["CONFIG", "INDEX", "Base", "read_base"]

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
# The same weights in another format: in OUT they would still be the unmerged ones.
OTHER_WEIGHTS: Final = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}


@dataclass(frozen=True)
class Base:
    """The model to merge into; `root` is its folder, or the one .safetensors file."""

    root: Path
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, StoredTensor]
    others: tuple[Path, ...]  # files to copy, relative to root, which is then a folder
    config: Mapping[str, Any]  # what config.json says; {} where there is none

    def nbytes(self) -> int:
        return sum(file.nbytes() for file in self.files) + sum(
            (self.root / other).stat().st_size for other in self.others
        )

    def file_of(self, tensor: StoredTensor) -> Path:
        return next(file.path for file in self.files if tensor in file.tensors)


def read_base(base: Path) -> Base:
    """The headers of all weight files, checked against each other and the index, and what else is to be copied."""
    if os.path.isfile(base):
        file = read_tensor_file(base)
        return Base(base, (file,), {tensor.name: tensor for tensor in file.tensors}, (), {})
    if not os.path.isdir(base):
        raise OPLoRAFileError(
            f"BASE {str(base)!r} does not exist. Give a local folder or .safetensors file; a model on the Hub is "
            "fetched with `hf download NAME`, which prints its folder."
        )
    if os.path.isfile(base / WEIGHTS):
        names, indexed = [WEIGHTS], None
    elif os.path.exists(base / INDEX):
        indexed = _read_index(base / INDEX)
        names = sorted(set(indexed.values()))
    else:
        raise OPLoRAFileError(
            f"BASE {str(base)!r} holds neither {WEIGHTS} nor {INDEX}. Other formats are not read: save the model with "
            "save_pretrained(..., safe_serialization=True) first, or give one .safetensors file as BASE."
        )
    files = tuple(read_tensor_file(base / name) for name in names)
    others = tuple(sorted(_other_files(base, keep_index=indexed is not None)))
    config = read_object(base / CONFIG) if os.path.isfile(base / CONFIG) else {}
    return Base(base, files, _tensors_by_name(base, files, indexed), others, config)


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Only files beside the index are accepted: it may come from anywhere."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "it has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise OPLoRAFileError(
                f"{path} puts {tensor!r} into {name!r}, expected the name of a .safetensors file beside the index. "
                "Fetch the model again."
            )
    return weight_map


def _tensors_by_name(
    base: Path, files: tuple[TensorFile, ...], indexed: dict[str, str] | None
) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    place: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in found:
                raise damaged(file.path, f"{tensor.name!r} is also in {place[tensor.name]}")
            found[tensor.name], place[tensor.name] = tensor, file.path.name
    for name, file_name in (indexed or {}).items():
        if place.get(name) != file_name:
            raise damaged(base / INDEX, f"it puts {name!r} into {file_name}, which does not hold it")
    return found


def _other_files(base: Path, *, keep_index: bool) -> Iterator[Path]:
    """What is copied, relative to `base`; not the same weights in other formats, which lie at the top."""
    for folder, folders, names in os.walk(base, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if folder == str(base):
            names = [name for name in names if (keep_index and name == INDEX) or not _is_weights(name)]
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                raise OPLoRAFileError(f"{folder}/{name} links to a folder, which is not followed. Remove it.")
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if not os.path.isfile(path):
                raise OPLoRAFileError(f"{path} is a broken link or no regular file, so it can't be copied. Remove it.")
            yield path.relative_to(base)


def _raise(error: OSError) -> None:
    raise error


def _is_weights(name: str) -> bool:
    return Path(name).suffix in OTHER_WEIGHTS or name.endswith(".index.json")
