"""Any architecture of transformers, tiny, from the defaults of its configuration: same code, small numbers."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

__all__ = ["NotTinyError", "architectures", "build"]

FACTORS: Final = (64, 32, 16, 8, 4, 2, 1)  # by which widths are divided: the first that the model's code takes
LAYERS: Final = 2
VOCABULARY: Final = 160
POSITIONS: Final = 128
LARGEST: Final = 40_000_000  # parameters
# what a class is for, in the order in which one is taken for its architecture
TASKS: Final = (
    "CAUSAL_LM IMAGE_TEXT_TO_TEXT MULTIMODAL_LM SEQ_TO_SEQ_CAUSAL_LM MASKED_LM SPEECH_SEQ_2_SEQ CTC IMAGE_CLASSIFICATION "
    "AUDIO_CLASSIFICATION OBJECT_DETECTION SEMANTIC_SEGMENTATION SEQUENCE_CLASSIFICATION"
).split()

WIDTH: Final = re.compile(
    r"(size|sizes|dim|dims|width|widths|channels|d_model|d_ff|d_kv|n_embd|n_inner|ffn|rank|hidden)$"
)
NO_WIDTH: Final = re.compile(
    r"(patch|image|kernel|window|vocab|chunk|block|batch|crop|pool|grid|tile|group|stride|token|input)"
)
LAYER_COUNT: Final = re.compile(r"(num_(\w+_)?layers|n_layers?|\w*layers|depth|num_blocks|n_blocks)$")


class NotTinyError(Exception):
    """The architecture cannot be made tiny from its configuration; the message says why."""


def architectures() -> Iterator[tuple[str, str]]:
    """(model type, class): each type that transformers' auto classes know, with the first task that it has."""
    tasks = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS]
    others = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_FOR_\w+_MAPPING_NAMES", name)]
    tables = [getattr(modeling_auto, name) for name in [*tasks, *others, "MODEL_MAPPING_NAMES"]]
    for kind in CONFIG_MAPPING.keys():  # noqa: SIM118
        found = [table[kind] for table in tables if kind in table]
        if found:
            yield kind, found[0] if isinstance(found[0], str) else found[0][0]


def build(kind: str, class_name: str) -> nn.Module:
    """The model with random weights, float32, on the CPU."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise NotTinyError(f"transformers has no {class_name}")
    reasons = []
    for factor in FACTORS:
        try:
            config = CONFIG_MAPPING[kind]()
            _shrink(config, factor)
            with torch.device("meta"):
                count = sum(p.numel() for p in model_class(config).parameters())
        except Exception as error:  # whatever a model's code raises of numbers that it does not take
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if count > LARGEST:
            reasons.append(f"{count:,} parameters")
            continue
        torch.manual_seed(0)
        return model_class(config).float().eval()
    raise NotTinyError(
        reasons[-1].splitlines()[0][:200] if "parameters" in reasons[0] else reasons[0].splitlines()[0][:200]
    )


def _shrink(config: PretrainedConfig, factor: int) -> None:
    """Widths divided by `factor`; few layers, words and positions."""
    layers = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, factor)
        elif isinstance(value, dict) and name.endswith("_config"):
            continue
        elif type(value) is int:
            small = _small(name, value, factor)
            if small != value:
                if LAYER_COUNT.search(name):
                    layers[value] = small
                setattr(config, name, small)
        elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            if WIDTH.search(name) and not NO_WIDTH.search(name):
                setattr(config, name, type(value)(_divided(v, factor) for v in value))
            elif name == "depths":
                setattr(config, name, type(value)(1 for _ in value))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) in layers and len(value) > layers[len(value)]:
            setattr(config, name, value[: layers[len(value)]])


def _small(name: str, value: int, factor: int) -> int:
    if name.endswith("_token_id") or name.endswith("_token_index"):
        return min(value, VOCABULARY - 1)
    if "vocab" in name:
        return min(value, VOCABULARY)
    if LAYER_COUNT.search(name) and value > LAYERS:
        return LAYERS
    if "max_position" in name or name in ("n_positions", "max_source_positions", "max_target_positions"):
        return min(value, POSITIONS)
    if WIDTH.search(name) and not NO_WIDTH.search(name):
        return _divided(value, factor)
    return value


def _divided(value: int, factor: int) -> int:
    return value // factor if value >= 16 and value % factor == 0 else value
