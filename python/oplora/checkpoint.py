"""Merging a LoRA adapter into a checkpoint on disk: ``python -m oplora merge BASE ADAPTER OUT``.

A merged checkpoint has its base's tensors, dtypes and shapes, so every weight file keeps its header to the
byte, and only the numbers of the adapted tensors change. They stream through in blocks of rows: the memory
needed is a block and one layer's A and B, whatever the size of the model. Everything that can be checked is
checked before the first byte is written. The output is built in a folder beside OUT and renamed at the end,
so that OUT is whole or not there at all.

Neither torch nor PEFT is needed. The result is that of PEFT's own ``merge_and_unload``, with sums in float32
(float64 for a float64 base) and one rounding.
"""

from __future__ import annotations  # _core.DType is a name of the stub alone

import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from . import _core
from .errors import OPLoRAError, OPLoRAFileError, OPLoRAValueError

__all__ = ["merge_checkpoint"]

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"
KEY_PREFIX: Final = "base_model.model."
BLOCK_BYTES: Final = 16 << 20
JSON_BYTES: Final = 100_000_000  # safetensors' own limit for a header

# The same weights in another format: in OUT they would still be the unmerged ones.
OTHER_WEIGHTS: Final = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}

# safetensors' dtypes that arithmetic is done on: the core's name, and the NumPy dtype that holds the bits.
FLOATS: Final[dict[str, tuple[_core.DType, str]]] = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}
ITEM_BYTES: Final = {
    dtype: size
    for size, dtypes in (
        (8, "F64 I64 U64 C64"),
        (4, "F32 I32 U32"),
        (2, "F16 BF16 I16 U16"),
        (1, "I8 U8 BOOL F8_E4M3 F8_E5M2"),
    )
    for dtype in dtypes.split()
}
FACTOR_DTYPES: Final = ("F32", "F16", "BF16")  # exact in float32, in which the core takes A and B

# Fields of adapter_config.json that make the adapter something else than W + scaling B A.
UNSUPPORTED: Final = {
    "use_dora": "DoRA rescales every row of the merged weight",
    "use_qalora": "QALoRA pools the inputs of the layer",
    "use_bdlora": "BD-LoRA keeps blocks of the factors only",
    "kasa_config": "KaSA truncates the base weight",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between adapters at run time",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "lora_bias": "lora_bias adds a bias of its own",
    "target_parameters": "target_parameters adapts parameters that are no layer's weight",
    "layer_replication": "layer_replication changes the base's layers",
    "trainable_token_indices": "trainable_token_indices replaces rows of the embedding",
}
# Starts that also change the base weight, so that the adapter does not fit the base as it is on disk.
CHANGED_BASE: Final = ("pissa", "corda", "olora", "loftq", "lora_ga")


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write `base` with `adapter` folded in to the folder `out`: W + scaling B A for every adapted weight.

    base: a folder with model.safetensors, or with model.safetensors.index.json and its shards; or one
    .safetensors file.
    adapter: a folder as PEFT writes it, with adapter_config.json and adapter_model.safetensors. Linear and
    convolution layers, GPT-2's Conv1D, embeddings, trained biases and modules_to_save are merged as PEFT
    does; rank_pattern, alpha_pattern and use_rslora count.
    out: a folder that does not exist or is empty; with `overwrite` it may hold an earlier model, which is
    kept until the new one is complete. It gets the merged weights and the base folder's other files, but no
    hidden ones and no other weights beside the model's own.
    progress: show a bar over the bytes on stderr.

    Raises OPLoRAFileError for files that are missing, damaged or cannot be written, and OPLoRAValueError for
    an adapter that does not fit; `out` is untouched then.
    """
    try:
        folders = _resolved(base), _resolved(adapter), _resolved(out)
        _merge(*folders, overwrite=overwrite, progress=progress)
    except OPLoRAError:
        raise
    except OSError as error:
        raise OPLoRAFileError(f"{error}. Nothing was written to {os.fspath(out)!r}.") from error


def _merge(base: Path, adapter: Path, out: Path, *, overwrite: bool, progress: bool) -> None:
    _check_out(base, adapter, out, overwrite)
    source = _read_base(base)
    config, factors = _read_config(adapter), _read_adapter_weights(adapter)
    changes = _Planner(source, factors, config).plan()
    _check_finite_factors(factors, changes)
    total = source.nbytes()
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise OPLoRAFileError(
            f"{out.parent} has {free:,} bytes free, but the merged model needs {total:,}. Free space there, or choose "
            "an OUT on another disk. Nothing was written."
        )
    with tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=not progress) as bar:
        _publish(out, overwrite, lambda folder: _write_all(folder, source, factors, changes, bar.update))


# ---- paths ----


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL in the name
        raise OPLoRAFileError(f"{os.fspath(path)!r} is no usable path: {error}.") from error


def _mode(path: Path) -> int | None:
    """The file's mode behind any links, or None where nothing can be reached."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return None


def _is_folder(path: Path) -> bool:
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _is_file(path: Path) -> bool:
    """A regular file: opening a pipe or a device could wait or read for ever."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _check_out(base: Path, adapter: Path, out: Path, overwrite: bool) -> None:
    for source, what in ((base, "BASE"), (adapter, "ADAPTER")):
        if out == source or out in source.parents or source in out.parents:
            raise OPLoRAValueError(
                f"OUT {str(out)!r} and {what} {str(source)!r} contain each other. Choose an OUT elsewhere."
            )
    if not _is_folder(out.parent):
        raise OPLoRAFileError(f"{str(out.parent)!r}, where OUT is to lie, is no folder. Create it first.")
    if _mode(out) is None:
        return
    if not _is_folder(out):
        raise OPLoRAFileError(f"OUT {str(out)!r} exists and is no folder. Choose another OUT, or delete it.")
    names = os.listdir(out)
    if names and not overwrite:
        raise OPLoRAFileError(f"OUT {str(out)!r} is not empty. Choose another OUT, or replace it with --overwrite.")
    if names and not any(name.endswith(".safetensors") for name in names):
        raise OPLoRAFileError(
            f"OUT {str(out)!r} holds no .safetensors file, so it is no earlier model that --overwrite might replace. "
            "Choose another OUT, or delete it yourself."
        )


# ---- JSON ----


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!r} occurs twice")
        result[name] = value
    return result


def _parse_object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise OPLoRAFileError(
            f"{path} is no valid JSON: {error}. The file is damaged: fetch or save it again."
        ) from error
    if not isinstance(value, dict):
        raise OPLoRAFileError(
            f"{path} holds a JSON {type(value).__name__}, expected an object. Fetch or save it again."
        )
    return value


def _read_object(path: Path) -> dict[str, Any]:
    if not _is_file(path):
        raise OPLoRAFileError(f"{path} is missing or no regular file.")
    if path.stat().st_size > JSON_BYTES:
        raise OPLoRAFileError(f"{path} has more than {JSON_BYTES:,} bytes, which is no sensible JSON file.")
    return _parse_object(path, path.read_bytes())


# ---- safetensors files ----


@dataclass(frozen=True)
class _Tensor:
    """One entry of a safetensors header; begin and end count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.name!r} ({self.dtype}, shape {self.shape})"


@dataclass(frozen=True)
class _TensorFile:
    path: Path
    header: bytes  # from the first byte to the last before the numbers
    tensors: tuple[_Tensor, ...]  # in the order of their offsets, which leave no gap

    def nbytes(self) -> int:
        return self.tensors[-1].end if self.tensors else len(self.header)


def _read_tensor_file(path: Path) -> _TensorFile:
    """The header, checked by the safetensors library and then for all that the streaming below relies on."""
    if not _is_file(path):
        raise OPLoRAFileError(f"{path} is missing or no regular file.")
    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise OPLoRAFileError(f"{path} is no valid safetensors file: {error}. Fetch or save it again.") from error
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, JSON_BYTES):
            raise _damaged(path, f"its header has {length} bytes")
        text = file.read(length)
    entries = _parse_object(path, text)
    entries.pop("__metadata__", None)
    tensors = sorted(
        (_parse_tensor(path, name, entry, 8 + length) for name, entry in entries.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    _check_layout(path, tensors, 8 + length, size)
    return _TensorFile(path, length.to_bytes(8, "little") + text, tuple(tensors))


def _damaged(path: Path, what: str) -> OPLoRAFileError:
    return OPLoRAFileError(f"{path} is damaged: {what}. Fetch or save it again.")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # a bool is an int to isinstance


def _parse_tensor(path: Path, name: str, entry: object, start: int) -> _Tensor:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the header's entry for {name!r} is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise _damaged(path, f"the header's entry for {name!r} lacks its dtype, shape or data_offsets")
    if len(offsets) != 2 or not all(map(_is_size, [*shape, *offsets])) or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name!r} has the shape {shape} and the data_offsets {offsets}")
    item = ITEM_BYTES.get(dtype)
    if item is not None and math.prod(shape) * item != offsets[1] - offsets[0]:
        raise _damaged(path, f"{name!r} ({dtype}, shape {shape}) lies in {offsets[1] - offsets[0]} bytes")
    return _Tensor(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _check_layout(path: Path, tensors: list[_Tensor], start: int, size: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.begin != end:
            raise _damaged(path, f"{tensor.name!r} begins at byte {tensor.begin}, expected {end}")
        end = tensor.end
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}, the file at {size}")


def _read(file: BufferedReader, offset: int, buffer: memoryview) -> None:
    file.seek(offset)
    done = file.readinto(buffer)
    if done != len(buffer):
        raise OPLoRAFileError(f"{file.name} ended early at byte {offset + done}: it changed while it was read.")


def _read_numbers(file: BufferedReader, tensor: _Tensor, first: int, count: int) -> NDArray[Any]:
    """Entries [first, first + count) of a tensor with a dtype of FLOATS, as they are stored."""
    numbers = np.empty(count, FLOATS[tensor.dtype][1])
    if count:
        _read(file, tensor.begin + first * numbers.itemsize, numbers.data.cast("B"))
    return numbers


def _float32(numbers: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The exact values of numbers stored as one of FACTOR_DTYPES."""
    if dtype == "BF16":
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32, copy=False)


# ---- the base ----


@dataclass(frozen=True)
class _Base:
    root: Path
    files: tuple[_TensorFile, ...]
    tensors: Mapping[str, _Tensor]
    others: tuple[Path, ...]  # files to copy, relative to root, which is then a folder
    tied: bool  # the config says that lm_head is the input embedding

    def nbytes(self) -> int:
        return sum(file.nbytes() for file in self.files) + sum(
            (self.root / other).stat().st_size for other in self.others
        )


def _read_base(base: Path) -> _Base:
    if _is_file(base):
        file = _read_tensor_file(base)
        return _Base(base, (file,), {tensor.name: tensor for tensor in file.tensors}, (), False)
    if not _is_folder(base):
        raise OPLoRAFileError(
            f"BASE {str(base)!r} does not exist. Give a local folder or .safetensors file; a model on the Hub is "
            "fetched with `hf download NAME`, which prints its folder."
        )
    if _is_file(base / WEIGHTS):
        names, indexed = [WEIGHTS], None
    elif _mode(base / INDEX) is not None:
        indexed = _read_index(base / INDEX)
        names = sorted(set(indexed.values()))
    else:
        raise OPLoRAFileError(
            f"BASE {str(base)!r} holds neither {WEIGHTS} nor {INDEX}. Other formats are not read: save the model with "
            "save_pretrained(..., safe_serialization=True) first, or give one .safetensors file as BASE."
        )
    files = tuple(_read_tensor_file(base / name) for name in names)
    others = tuple(sorted(_other_files(base, keep_index=indexed is not None)))
    return _Base(base, files, _tensors_by_name(base, files, indexed), others, _is_tied(base))


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Only files beside the index are accepted: it may come from anywhere."""
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "it has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise OPLoRAFileError(
                f"{path} puts {tensor!r} into {name!r}, expected the name of a .safetensors file beside the index. "
                "Fetch the model again."
            )
    return weight_map


def _tensors_by_name(base: Path, files: tuple[_TensorFile, ...], indexed: dict[str, str] | None) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    place: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in found:
                raise _damaged(file.path, f"{tensor.name!r} is also in {place[tensor.name]}")
            found[tensor.name], place[tensor.name] = tensor, file.path.name
    for name, file_name in (indexed or {}).items():
        if place.get(name) != file_name:
            raise _damaged(base / INDEX, f"it puts {name!r} into {file_name}, which does not hold it")
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
            if not _is_file(path):
                raise OPLoRAFileError(f"{path} is a broken link or no regular file, so it can't be copied. Remove it.")
            yield path.relative_to(base)


def _raise(error: OSError) -> None:
    raise error


def _is_weights(name: str) -> bool:
    return Path(name).suffix in OTHER_WEIGHTS or name.endswith(".index.json")


def _is_tied(base: Path) -> bool:
    if not _is_file(base / "config.json"):
        return False
    return _read_object(base / "config.json").get("tie_word_embeddings") is True


# ---- the adapter ----


@dataclass(frozen=True)
class _Config:
    """What adapter_config.json says about ranks and scalings; each pattern with the number it stands for."""

    path: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]

    def rank(self, module: str) -> int:
        return next((r for pattern, r in self.rank_pattern if pattern.match(module)), self.r)

    def scaling(self, module: str, r: int) -> float:
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if pattern.match(module)), self.lora_alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def _read_config(adapter: Path) -> _Config:
    if not _is_folder(adapter):
        raise OPLoRAFileError(f"ADAPTER {str(adapter)!r} is no folder. Give the folder that save_pretrained wrote.")
    path = adapter / ADAPTER_CONFIG
    config = _read_object(path)
    if config.get("peft_type") != "LORA":
        raise OPLoRAValueError(
            f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'. Only LoRA adapters merge."
        )
    for name, why in UNSUPPORTED.items():
        if config.get(name):
            raise OPLoRAValueError(
                f"{path}: {name} is set, and {why}, which is more than W + scaling B A. Merge this adapter with PEFT's "
                "merge_and_unload."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise OPLoRAValueError(
            f"{path}: init_lora_weights is {start!r}, which changed the base weights at the start of the training, so "
            "the adapter does not fit BASE. Save it with path_initial_model_for_weight_conversion, which turns it "
            "into a plain LoRA."
        )
    return _Config(
        path,
        _rank(path, "r", config.get("r")),
        _alpha(path, "lora_alpha", config.get("lora_alpha")),
        _flag(path, "use_rslora", config.get("use_rslora", False)),
        _flag(path, "fan_in_fan_out", config.get("fan_in_fan_out", False)),
        tuple(_patterns(path, config, "rank_pattern", _rank)),
        tuple(_patterns(path, config, "alpha_pattern", _alpha)),
    )


def _rank(path: Path, name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise OPLoRAValueError(
            f"{path}: {name} is {value!r}, expected a whole number of at least 1. Save the adapter again."
        )
    return value


def _alpha(path: Path, name: str, value: object) -> float:
    try:
        if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
            return float(value)  # type: ignore[arg-type]
    except OverflowError:  # an int beyond float's range
        pass
    raise OPLoRAValueError(f"{path}: {name} is {value!r}, expected a finite number. Save the adapter again.")


def _flag(path: Path, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OPLoRAValueError(f"{path}: {name} is {value!r}, expected true or false. Save the adapter again.")
    return value


N = TypeVar("N")


def _patterns(
    path: Path, config: dict[str, Any], name: str, number: Callable[[Path, str, object], N]
) -> Iterator[tuple[re.Pattern[str], N]]:
    """PEFT's rule: the first pattern that matches the end of the module's path, from a dot on."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise OPLoRAValueError(f"{path}: {name} is {patterns!r}, expected an object. Save the adapter again.")
    for key, value in patterns.items():
        try:
            pattern = re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise OPLoRAValueError(f"{path}: {name} has the key {key!r}, no regular expression: {error}.") from error
        yield pattern, number(path, f"{name}[{key!r}]", value)


def _read_adapter_weights(adapter: Path) -> _TensorFile:
    path = adapter / ADAPTER_WEIGHTS
    if _mode(path) is None and _mode(adapter / "adapter_model.bin") is not None:
        raise OPLoRAFileError(
            f"{adapter} holds adapter_model.bin, a pickle, which is not read. Load it with PEFT and save it again: "
            f"that writes {ADAPTER_WEIGHTS}."
        )
    return _read_tensor_file(path)


# ---- the plan: what happens to each tensor of the base ----


@dataclass(frozen=True)
class _Delta:
    """scaling B A on a weight seen as rows and columns; `transposed` as in _core.merge."""

    A: _Tensor
    B: _Tensor
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class _Change:
    """A base tensor's new numbers: the adapter's `replacement`, if any, and `delta`, if any, added."""

    replacement: _Tensor | None = None
    delta: _Delta | None = None


@dataclass
class _Layer:
    """The adapter's tensors of one module."""

    module: str
    embedding: bool
    factors: dict[str, _Tensor] = field(default_factory=dict)  # by "A" and "B"


LINEAR_KEY: Final = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight", re.DOTALL)
EMBEDDING_KEY: Final = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])", re.DOTALL)


def _without_wrappers(name: str) -> str:
    """PEFT's name in terms of the base model, without the layers that it wrapped around."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _orientation(layer: _Layer, target: _Tensor) -> bool | None:
    """Whether a linear weight is plainly transposed, (in, out); None for square ones and other layers."""
    out_features, in_features = layer.factors["B"].shape[0], layer.factors["A"].shape[1]
    if layer.embedding or len(target.shape) != 2 or out_features == in_features:
        return None
    return target.shape == (in_features, out_features)


def _renames(wanted: Mapping[str, _Tensor], base: Mapping[str, _Tensor]) -> Iterator[tuple[str, str]]:
    """Prefixes (lost, gained) on the way from the adapter's names to the base's."""
    yield from ((first + ".", "") for first in {name.partition(".")[0] for name in wanted})
    yield from (("", first + ".") for first in {name.partition(".")[0] for name in base})


class _Planner:
    """Gives every tensor of the adapter its tensor of the base, or says which one has none."""

    def __init__(self, base: _Base, adapter: _TensorFile, config: _Config) -> None:
        self.base, self.adapter, self.config = base, adapter, config
        self.layers: dict[str, _Layer] = {}
        self.replacements: dict[str, _Tensor] = {}

    def plan(self) -> dict[str, _Change]:
        for tensor in self.adapter.tensors:
            self._sort_in(tensor)
        if not self.layers and not self.replacements:
            raise OPLoRAValueError(f"{self.adapter.path} holds no tensors. Save the adapter again.")
        for layer in self.layers.values():
            self._check_pair(layer)
        names = self._base_names()
        changes: dict[str, _Change] = {}
        for name, tensor in self.replacements.items():
            target = self.base.tensors[names[name]]
            changes[target.name] = _Change(replacement=self._checked_replacement(tensor, target))
        targets = {module: self.base.tensors[names[f"{module}.weight"]] for module in self.layers}
        orientations = {_orientation(layer, targets[module]) for module, layer in self.layers.items()} - {None}
        for module, layer in self.layers.items():
            name = targets[module].name
            replacement = changes.get(name, _Change()).replacement
            changes[name] = _Change(replacement, self._delta(layer, targets[module], orientations))
        return changes

    def _refused(self, tensor: _Tensor, why: str) -> OPLoRAValueError:
        return OPLoRAValueError(f"{self.adapter.path}: tensor {tensor}: {why}. Nothing was written.")

    def _sort_in(self, tensor: _Tensor) -> None:
        if not tensor.name.startswith(KEY_PREFIX):
            raise self._refused(tensor, f"the name lacks PEFT's prefix {KEY_PREFIX!r}, so save the adapter with PEFT")
        name = tensor.name.removeprefix(KEY_PREFIX)
        if name.rpartition(".lora_magnitude_vector")[1]:
            raise self._refused(tensor, "this is DoRA, which is not W + scaling B A, so merge it with PEFT")
        match = LINEAR_KEY.fullmatch(name) or EMBEDDING_KEY.fullmatch(name)
        if match:
            self._sort_in_factor(tensor, match["module"], match["factor"], match.re is EMBEDDING_KEY)
        elif "lora_" in name:
            raise self._refused(tensor, "expected lora_A.weight, lora_B.weight, lora_embedding_A or lora_embedding_B")
        elif (plain := _without_wrappers(name)) in self.replacements:
            raise self._refused(tensor, f"{plain!r} is replaced twice")
        else:
            self.replacements[plain] = tensor

    def _sort_in_factor(self, tensor: _Tensor, module: str, factor: str, embedding: bool) -> None:
        if tensor.dtype not in FACTOR_DTYPES:
            raise self._refused(tensor, f"expected one of {', '.join(FACTOR_DTYPES)}, so save the adapter in float32")
        if module != _without_wrappers(module):
            # MultiheadAttention, whose out_proj PEFT 0.21 adds twice, in training as in merging
            raise self._refused(tensor, "it adapts a layer inside an adapted layer, so merge it with PEFT")
        layer = self.layers.setdefault(module, _Layer(module, embedding))
        if layer.embedding != embedding:
            raise self._refused(tensor, f"{module!r} has other factors already")
        layer.factors[factor] = tensor

    def _check_pair(self, layer: _Layer) -> None:
        if len(layer.factors) < 2:
            (factor, tensor) = next(iter(layer.factors.items()))
            raise self._refused(
                tensor, f"{layer.module!r} has no lora_{'B' if factor == 'A' else 'A'}, so save the adapter again"
            )
        A, B = layer.factors["A"], layer.factors["B"]
        r = self.config.rank(layer.module)
        if len(A.shape) < 2 or len(B.shape) < 2 or 0 in A.shape or 0 in B.shape:
            raise self._refused(
                A if len(A.shape) < 2 or 0 in A.shape else B, "expected at least two sizes, none of them 0"
            )
        if A.shape[0] != r:
            raise self._refused(A, f"expected {r} rows, the rank that {self.config.path.name} gives {layer.module!r}")
        if B.shape[1] != r:
            raise self._refused(
                B, f"expected {r} columns, the rank of its lora_A (layers with groups are not merged here)"
            )

    # -- names --

    def _base_names(self) -> dict[str, str]:
        """The base's name of every tensor that the adapter changes.

        Checkpoints of the same model may have a component more or less in front ("model.", "transformer."):
        one such change for all names counts, if it finds all of them and no other does.
        """
        wanted = dict(self.replacements)
        wanted |= {f"{module}.weight": layer.factors["A"] for module, layer in self.layers.items()}
        missing = [name for name in wanted if name not in self.base.tensors]
        if not missing:
            return self._checked_ties({name: name for name in wanted}, wanted)
        answers: list[dict[str, str]] = []
        for lost, gained in _renames(wanted, self.base.tensors):
            if all(gained + name.removeprefix(lost) in self.base.tensors for name in wanted):
                answers.append({name: gained + name.removeprefix(lost) for name in wanted})
        if not answers:
            raise self._missing(missing[0], wanted[missing[0]])
        if any(answer != answers[0] for answer in answers) or len({*answers[0].values()}) < len(wanted):
            raise self._refused(wanted[missing[0]], f"BASE has several tensors that {missing[0]!r} might mean")
        return self._checked_ties(answers[0], wanted)

    def _missing(self, name: str, tensor: _Tensor) -> OPLoRAValueError:
        module = name.rpartition(".")[0]
        if module.rpartition(".")[2] == "lm_head":
            return self._refused(
                tensor,
                f"BASE has no {name!r}: it is tied to the input embedding. Untie it (tie_word_embeddings=false), save "
                "BASE with its own lm_head.weight and merge into that",
            )
        siblings = [other for other in self.base.tensors if module and other.startswith(module + ".")][:4]
        if not siblings:
            return self._refused(tensor, f"BASE has no tensor {name!r}. Is it another model's adapter?")
        return self._refused(
            tensor,
            f"BASE has no {name!r} but {siblings}. Quantised and fused layers are not merged: dequantise BASE first",
        )

    def _checked_ties(self, names: dict[str, str], wanted: Mapping[str, _Tensor]) -> dict[str, str]:
        for name, target in names.items():
            if self.base.tied and f".{target}".endswith(".lm_head.weight"):
                raise self._refused(
                    wanted[name],
                    f"config.json of BASE has tie_word_embeddings, so a model that loads the merged {target!r} would "
                    "put the input embedding in its place. Untie the two and save BASE again",
                )
        return names

    # -- shapes --

    def _checked_replacement(self, tensor: _Tensor, target: _Tensor) -> _Tensor:
        if tensor.shape != target.shape:
            raise self._refused(
                tensor,
                f"expected the shape {target.shape} of BASE's {target.name!r}; resize BASE first if it was resized",
            )
        if tensor.dtype != target.dtype and (tensor.dtype not in FACTOR_DTYPES or target.dtype not in FLOATS):
            raise self._refused(tensor, f"can't be converted to {target.dtype}, which BASE's {target.name!r} has")
        return tensor

    def _delta(self, layer: _Layer, target: _Tensor, orientations: set[bool | None]) -> _Delta:
        A, B = layer.factors["A"], layer.factors["B"]
        if target.dtype not in FLOATS:
            raise self._refused(
                A,
                f"BASE's {target} is quantised or no float, expected one of {', '.join(FLOATS)}. Dequantise BASE first",
            )
        adapted = (B.shape[0], *A.shape[1:])  # (out, in), and a convolution's kernel
        shapes = [adapted]
        if len(adapted) == 2:
            shapes = [adapted[::-1]] if layer.embedding else [adapted, adapted[::-1]]
        if target.shape not in shapes or B.shape[2:] != (1,) * (len(A.shape) - 2):
            raise self._refused(A, f"with lora_B of shape {B.shape} it adapts {shapes[0]}, but BASE has {target}")
        if layer.embedding:
            transposed = True
        else:
            transposed = len(adapted) == 2 and self._is_transposed(layer, target, orientations)
        return _Delta(A, B, self.config.scaling(layer.module, A.shape[0]), transposed)

    def _is_transposed(self, layer: _Layer, target: _Tensor, orientations: set[bool | None]) -> bool:
        orientation = _orientation(layer, target)
        if orientation is not None:
            return orientation
        # A square weight doesn't show it: the config decides, unless a layer that does show it contradicts.
        if orientations - {self.config.fan_in_fan_out}:
            raise self._refused(
                layer.factors["A"],
                f"BASE's {target} is square, and {self.config.path.name} says fan_in_fan_out = "
                f"{self.config.fan_in_fan_out}, which other layers contradict. Correct it there",
            )
        return self.config.fan_in_fan_out


def _factor(file: BufferedReader, tensor: _Tensor) -> NDArray[np.float32]:
    """A whole A or B as a matrix in float32; convolutions' kernels lie along the columns."""
    numbers = _read_numbers(file, tensor, 0, math.prod(tensor.shape))
    return _float32(numbers, tensor.dtype).reshape(tensor.shape[0], -1)


def _check_finite_factors(adapter: _TensorFile, changes: Mapping[str, _Change]) -> None:
    with adapter.path.open("rb") as file:
        for delta in (change.delta for change in changes.values() if change.delta):
            for tensor in (delta.A, delta.B):
                bad = int(np.count_nonzero(~np.isfinite(_factor(file, tensor))))
                if bad:
                    raise OPLoRAValueError(
                        f"{adapter.path}: tensor {tensor} holds {bad} NaN or infinite numbers, expected none: the "
                        "training diverged, or the file is damaged. Take an earlier checkpoint. Nothing was written."
                    )


# ---- writing ----

Advance = Callable[[int], object]  # is told how many bytes were written


def _publish(out: Path, overwrite: bool, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder beside OUT, then put it in OUT's place by renaming."""
    token = secrets.token_hex(4)
    new, old = out.parent / f".oplora-{token}.partial", out.parent / f".oplora-{token}.old"
    new.mkdir()
    try:
        write(new)
        _sync_folder(new)
        if overwrite and _is_folder(out):
            _swap(out, new, old)
        else:
            new.rename(out)  # over an empty folder too, but never over a filled one
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _swap(out: Path, new: Path, old: Path) -> None:
    try:
        out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_all(
    folder: Path, base: _Base, adapter: _TensorFile, changes: Mapping[str, _Change], advance: Advance
) -> None:
    for other in base.others:
        target = folder / other
        target.parent.mkdir(parents=True, exist_ok=True)
        with (base.root / other).open("rb") as source, target.open("xb") as file:
            _copy(source, file, 0, os.fstat(source.fileno()).st_size, advance)
            _sync(file)
    with adapter.path.open("rb") as factors:
        for weights in base.files:
            with weights.path.open("rb") as source, (folder / weights.path.name).open("xb") as file:
                file.write(weights.header)
                advance(len(weights.header))
                for tensor in weights.tensors:
                    _write_tensor(file, tensor, source, factors, changes.get(tensor.name, _Change()), advance)
                _sync(file)


def _copy(source: BufferedReader, file: BufferedWriter, begin: int, end: int, advance: Advance) -> None:
    buffer = memoryview(bytearray(min(BLOCK_BYTES, end - begin)))
    for offset in range(begin, end, BLOCK_BYTES):
        block = buffer[: min(BLOCK_BYTES, end - offset)]
        _read(source, offset, block)
        file.write(block)
        advance(len(block))


def _write_tensor(
    file: BufferedWriter,
    tensor: _Tensor,
    source: BufferedReader,
    factors: BufferedReader,
    change: _Change,
    advance: Advance,
) -> None:
    replacement, delta = change.replacement, change.delta
    if tensor.begin == tensor.end:
        return
    if delta is None and (replacement is None or replacement.dtype == tensor.dtype):
        origin, kept = (source, tensor) if replacement is None else (factors, replacement)
        _copy(origin, file, kept.begin, kept.end, advance)
        return
    A = B = None
    if delta is not None:
        A, B = _factor(factors, delta.A), _factor(factors, delta.B)
    rows = tensor.shape[0] if tensor.shape else 1
    columns = math.prod(tensor.shape[1:])
    height = max(1, BLOCK_BYTES // (8 * columns))
    for top in range(0, rows, height):
        block = slice(top, min(top + height, rows))
        numbers = _start_numbers(tensor, source, factors, replacement, block, columns)
        if delta is not None and A is not None and B is not None:
            _add(numbers, delta, A, B, block, FLOATS[tensor.dtype][0])
            if _nonfinite(numbers, tensor.dtype):
                before = _start_numbers(tensor, source, factors, replacement, block, columns)
                _check_overflow(tensor, numbers, _nonfinite(before, tensor.dtype))
        file.write(numbers.data.cast("B"))
        advance(numbers.nbytes)


def _start_numbers(
    tensor: _Tensor,
    source: BufferedReader,
    factors: BufferedReader,
    replacement: _Tensor | None,
    block: slice,
    columns: int,
) -> NDArray[Any]:
    """A block of rows before the product is added: the base's own, or what replaces them, rounded."""
    first, count = block.start * columns, (block.stop - block.start) * columns
    if replacement is None or replacement.dtype == tensor.dtype:
        origin, stored = (source, tensor) if replacement is None else (factors, replacement)
        return _read_numbers(origin, stored, first, count).reshape(-1, columns)
    values = _float32(_read_numbers(factors, replacement, first, count), replacement.dtype)
    numbers = _core.round(values, FLOATS[tensor.dtype][0])
    _check_overflow(tensor, numbers, int(np.count_nonzero(~np.isfinite(values))))
    return numbers.reshape(-1, columns)


def _add(
    W: NDArray[Any],
    delta: _Delta,
    A: NDArray[np.float32],
    B: NDArray[np.float32],
    block: slice,
    dtype: _core.DType,
) -> None:
    if delta.transposed:
        _core.merge(W, np.ascontiguousarray(A[:, block]), B, delta.scaling, dtype=dtype, transposed=True)
    else:
        _core.merge(W, A, B[block], delta.scaling, dtype=dtype)


def _nonfinite(numbers: NDArray[Any], dtype: str) -> int:
    bad = (numbers & 0x7F80) == 0x7F80 if dtype == "BF16" else ~np.isfinite(numbers)
    return int(np.count_nonzero(bad))


def _check_overflow(tensor: _Tensor, numbers: NDArray[Any], before: int) -> None:
    after = _nonfinite(numbers, tensor.dtype)
    if after > before:
        raise OPLoRAValueError(
            f"merged into tensor {tensor}, the adapter's numbers pass what {tensor.dtype} can hold at {after - before} "
            "places. Convert BASE to BF16 or F32 first, or check the adapter's scaling. Nothing was written."
        )
