"""Any architecture of transformers, tiny, from the defaults of its configuration: same code, small numbers."""

import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

__all__ = ["NotTinyError", "architectures", "build"]

FACTORS: Final = (64, 32, 16, 8, 4, 2, 1)  # by which widths are divided: the first that the model's code takes
LAYERS: Final = (2, 4, 8, 64)  # some models have several kinds of layers, in turns, or name some by number
VOCABULARY: Final = 160
POSITIONS: Final = 128
LARGEST: Final = 100_000_000  # parameters
# what a class is for, in the order in which one is taken for its architecture
TASKS: Final = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "SEQUENCE_CLASSIFICATION",
)

RESNET: Final = {"backbone": None, "use_timm_backbone": False, "backbone_config": {"model_type": "resnet"}}
# what a configuration has no default for, or none that its model takes, or one that needs another library
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "reformer": {"is_decoder": True},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
    "esm": {"vocab_size": 33},
    "wav2vec2-bert": {"vocab_size": 32},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 48},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "detr": RESNET,
    "conditional_detr": RESNET,
    "dab-detr": RESNET,
    "deformable_detr": RESNET,
    "table-transformer": RESNET,
}

WIDTH: Final = re.compile(
    r"(size|sizes|dim|dims|width|widths|channels|d_model|d_ff|d_kv|n_embd|n_inner|ffn|rank|hidden)$"
)
NO_WIDTH: Final = re.compile(
    r"(patch|image|kernel|window|vocab|chunk|block|batch|crop|pool|grid|tile|group|stride|token|input)"
)
LAYER_COUNT: Final = re.compile(r"(num_(\w+_)?layers|n_layers?|\w*layers|depth|num_blocks|n_blocks)$")


class NotTinyError(Exception):
    """The architecture cannot be made tiny from its configuration; the message says why."""


def architectures() -> Iterator[tuple[str, list[str]]]:
    """Each model type that transformers' auto classes know, with its classes, the most usual task's first."""
    tasks = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS]
    others = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_FOR_\w+_MAPPING_NAMES", name)]
    tables = [getattr(modeling_auto, name) for name in [*tasks, *others, "MODEL_MAPPING_NAMES"]]
    for kind in CONFIG_MAPPING.keys():  # noqa: SIM118
        found = [table[kind] for table in tables if kind in table]
        names = [name for names in found for name in ([names] if isinstance(names, str) else names)]
        if names:
            yield kind, list(dict.fromkeys(names))


def build(kind: str, class_names: Sequence[str]) -> nn.Module:
    """The first class that can be made, with random weights, float32, on the CPU."""
    reasons = []
    for class_name, layers, factor in itertools.product(class_names, LAYERS, FACTORS):
        try:
            model_class = getattr(transformers, class_name)
            config = CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
            _shrink(config, factor, layers)
            with tempfile.TemporaryDirectory() as folder:  # a configuration that can be saved but not loaded is none
                config.save_pretrained(folder)
                type(config).from_pretrained(folder)
            with torch.device("meta"):
                counts = [p.numel() for p in model_class(config).parameters()]
            if sum(counts) > LARGEST or 0 in counts:
                reasons.append(f"{class_name} has {sum(counts):,} parameters, {counts.count(0)} tensors empty")
                continue
            torch.manual_seed(0)
            return model_class(config).float().eval()
        except Exception as error:  # whatever a model's code raises of numbers that it does not take
            text = " ".join(str(error).split())
            reasons.append(f"{class_name}: {type(error).__name__}: {text[:200]}")
    raise NotTinyError(reasons[0])


def _shrink(config: PretrainedConfig, factor: int, most: int) -> None:
    """Widths divided by `factor`; few layers, words and positions."""
    lengths = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, factor, most)
        elif isinstance(value, dict) and name.endswith("_config"):
            continue
        elif type(value) is int:
            small = _small(name, value, factor, most)
            if small != value:
                if LAYER_COUNT.search(name):
                    lengths[value] = small
                setattr(config, name, small)
        elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            if WIDTH.search(name) and not NO_WIDTH.search(name):
                setattr(config, name, type(value)(_divided(v, factor) for v in value))
            elif name == "depths":
                setattr(config, name, type(value)(1 for _ in value))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) in lengths:
            setattr(config, name, value[: lengths[len(value)]])


def _small(name: str, value: int, factor: int, most: int) -> int:
    if name.endswith("_token_id") or name.endswith("_token_index"):
        return min(value, VOCABULARY - 1)
    if "vocab" in name:
        return min(value, VOCABULARY)
    if LAYER_COUNT.search(name):
        return min(value, most)
    if "max_position" in name or name in ("n_positions", "max_source_positions", "max_target_positions"):
        return min(value, POSITIONS)
    if WIDTH.search(name) and not NO_WIDTH.search(name):
        return _divided(value, factor)
    return value


def _divided(value: int, factor: int) -> int:
    return value // factor if value >= 16 and value % factor == 0 else value
