"""A LoRA adapter as PEFT writes it: a folder with a configuration and the tensors.

OPLoRAFileError for what is missing or damaged; where the adapter is to be merged, OPLoRAValueError for a configuration
that asks for more than W + scaling B A.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from ..errors import OPLoRAFileError, OPLoRAValueError
from .tensor_file import TensorFile, parse_object, read_object, read_tensor_file

__all__ = [
    "CHANGED_BASE",
    "CONFIG",
    "KEY_PREFIX",
    "METADATA",
    "WEIGHTS",
    "AdapterConfig",
    "FactorKey",
    "factor_of",
    "parse_config",
    "read_adapter",
    "read_fields",
    "refuse_more",
]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
METADATA: Final = "adapter_config"  # of a file that stands alone: its header's entry with the configuration
KEY_PREFIX: Final = "base_model.model."  # of every tensor's name, before the module's

# Fields of adapter_config.json that make the adapter something else than W + scaling B A, and how.
MORE: Final = {
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
    "megatron_config": "Megatron's layers lie in parts",
}
# Fields that say nothing of what the adapter's tensors mean, or that are read here.
KNOWN: Final = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "bias",
        "modules_to_save",
        "ensure_weight_tying",
        "alora_invocation_string",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    }
)
MERGED: Final = ("target_parameters",)  # what a merge on disk can nevertheless
OFF: Final[tuple[object, ...]] = (None, False, 0, "", [], {})
# Starts that also change the base weight, so that the adapter does not fit the base as it is on disk.
CHANGED_BASE: Final = ("pissa", "corda", "olora", "loftq", "lora_ga")
STARTS: Final = ("gaussian", "eva", "orthogonal", "mica", "true", "false")  # those that do not


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says about ranks and scalings; each pattern with the number it stands for."""

    path: Path
    fields: Mapping[str, Any]  # all of them
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
    """What the configuration of a folder, or of a file that stands alone, says, and the header of its weights."""
    weights = _read_weights(adapter)
    path, config = read_fields(adapter, weights)
    if config.get("peft_type") != "LORA":
        raise OPLoRAValueError(
            f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'. Only LoRA adapters merge."
        )
    refuse_more(path, config, "Merge this adapter with PEFT's merge_and_unload.", MERGED)
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise OPLoRAValueError(f"{path}: target_parameters is {targets!r}, expected names. Save the adapter again.")
    return parse_config(path, config), weights


def read_fields(adapter: Path, weights: TensorFile) -> tuple[Path, dict[str, Any]]:
    """The configuration, and the file that it is in."""
    if adapter.is_dir():
        return adapter / CONFIG, read_object(adapter / CONFIG)
    text = weights.metadata().get(METADATA)
    if text is None:
        raise OPLoRAFileError(
            f"{adapter} has no configuration in its header, which would tell its rank and scale. Give the folder with "
            f"{CONFIG} and {WEIGHTS}, or a file that oplora.save_adapter wrote."
        )
    return adapter, parse_object(adapter, text.encode())


def refuse_more(path: Path, config: Mapping[str, Any], instead: str, allowed: Collection[str] = ()) -> None:
    """Of a configuration that asks for more than W + scaling B A, or that may, as it has a field that is unknown here.

    instead: what to do with such an adapter. allowed: fields that may be on nevertheless.
    """
    for name, value in config.items():
        if name in KNOWN or name in allowed or value in OFF:
            continue
        if name in MORE:
            raise OPLoRAValueError(
                f"{path}: {name} is set, and {MORE[name]}, which is more than W + scaling B A. {instead}"
            )
        raise OPLoRAValueError(
            f"{path}: {name} is {value!r}, a field that this version of oplora does not know, so what it makes of the "
            f"adapter would be a guess. {instead} If it says nothing of the tensors, remove it from {path.name}."
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise OPLoRAValueError(
            f"{path}: init_lora_weights is {start!r}, which changed the base weights at the start of the training, so "
            "the adapter does not fit BASE. Save it with path_initial_model_for_weight_conversion, which turns it "
            "into a plain LoRA."
        )
    if isinstance(start, str) and start.lower() not in STARTS:
        raise OPLoRAValueError(
            f"{path}: init_lora_weights is {start!r}, a start that this version of oplora does not know: it may have "
            f"changed the base. {instead}"
        )


def parse_config(path: Path, config: dict[str, Any]) -> AdapterConfig:
    """Ranks and scalings of a LoraConfig written as JSON; `path` is for messages."""
    return AdapterConfig(
        path,
        config,
        _rank(path, "r", config.get("r")),
        _alpha(path, "lora_alpha", config.get("lora_alpha")),
        _flag(path, "use_rslora", config.get("use_rslora") or False),
        _flag(path, "fan_in_fan_out", config.get("fan_in_fan_out") or False),
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


# ---- names of tensors ----

# files of older versions of PEFT have the adapter's name between
FACTOR_KEYS: Final = (
    re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?\.weight", re.DOTALL),
    re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?", re.DOTALL),
)


@dataclass(frozen=True)
class FactorKey:
    module: str
    factor: str  # "A" or "B"
    adapter: str | None
    is_embedding: bool


def factor_of(name: str) -> FactorKey | None:
    """What the name of a tensor, without KEY_PREFIX, says of an A or B; None of another tensor."""
    for is_embedding, pattern in enumerate(FACTOR_KEYS):
        if match := pattern.fullmatch(name):
            return FactorKey(match["module"], match["factor"], match["adapter"], bool(is_embedding))
    return None


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


def _read_weights(adapter: Path) -> TensorFile:
    if os.path.isfile(adapter):
        return read_tensor_file(adapter)
    if not os.path.isdir(adapter):
        raise OPLoRAFileError(
            f"ADAPTER {str(adapter)!r} is no folder and no file. Give the folder that save_pretrained wrote."
        )
    path = adapter / WEIGHTS
    if not os.path.exists(path) and os.path.exists(adapter / "adapter_model.bin"):
        raise OPLoRAFileError(
            f"{adapter} holds adapter_model.bin, a pickle, which is not read. Load it with PEFT and save it again: "
            f"that writes {WEIGHTS}."
        )
    return read_tensor_file(path)
