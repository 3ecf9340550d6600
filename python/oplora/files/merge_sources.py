"""What a merge reads: the base model's folder or file, and the adapter's folder as PEFT writes it.

Each is taken as a whole or refused: OPLoRAFileError for what is missing or damaged, OPLoRAValueError for an adapter
whose configuration asks for more than W + scaling B A.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from ..errors import OPLoRAFileError, OPLoRAValueError
from .tensor_file import StoredTensor, TensorFile, damaged, read_object, read_tensor_file

__all__ = ["AdapterConfig", "Base", "read_adapter", "read_base"]

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"

# The same weights in another format: in OUT they would still be the unmerged ones.
OTHER_WEIGHTS: Final = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}

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


# ---- the base ----


@dataclass(frozen=True)
class Base:
    """The model to merge into; `root` is its folder, or the one .safetensors file."""

    root: Path
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, StoredTensor]
    others: tuple[Path, ...]  # files to copy, relative to root, which is then a folder
    tied: bool  # the config says that lm_head is the input embedding

    def nbytes(self) -> int:
        return sum(file.nbytes() for file in self.files) + sum(
            (self.root / other).stat().st_size for other in self.others
        )


def read_base(base: Path) -> Base:
    """The headers of all weight files, checked against each other and the index, and what else is to be copied."""
    if os.path.isfile(base):
        file = read_tensor_file(base)
        return Base(base, (file,), {tensor.name: tensor for tensor in file.tensors}, (), False)
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
    return Base(base, files, _tensors_by_name(base, files, indexed), others, _is_tied(base))


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


def _is_tied(base: Path) -> bool:
    if not os.path.isfile(base / "config.json"):
        return False
    return read_object(base / "config.json").get("tie_word_embeddings") is True


# ---- the adapter ----


@dataclass(frozen=True)
class AdapterConfig:
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


def read_adapter(adapter: Path) -> tuple[AdapterConfig, TensorFile]:
    """What the folder's adapter_config.json says, and the header of its weights."""
    if not os.path.isdir(adapter):
        raise OPLoRAFileError(f"ADAPTER {str(adapter)!r} is no folder. Give the folder that save_pretrained wrote.")
    return _read_config(adapter / ADAPTER_CONFIG), _read_adapter_weights(adapter)


def _read_config(path: Path) -> AdapterConfig:
    config = read_object(path)
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
    return parse_config(path, config)


def parse_config(path: Path, config: dict[str, Any]) -> AdapterConfig:
    """Ranks and scalings of a LoraConfig written as JSON; `path` is for messages."""
    return AdapterConfig(
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


def _read_adapter_weights(adapter: Path) -> TensorFile:
    path = adapter / ADAPTER_WEIGHTS
    if not os.path.exists(path) and os.path.exists(adapter / "adapter_model.bin"):
        raise OPLoRAFileError(
            f"{adapter} holds adapter_model.bin, a pickle, which is not read. Load it with PEFT and save it again: "
            f"that writes {ADAPTER_WEIGHTS}."
        )
    return read_tensor_file(path)
