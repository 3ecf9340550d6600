"""How transformers loads a model: what its tensors are called in memory, how they lie on disk, which of them are one.

An adapter names modules as they are in memory. On disk they may have other names (LLaVA, ViT), several may lie in one
tensor, or one in several; transformers' own tables say how, and they are used here as its loader uses them. Ties come
from the same model, built without numbers. Nothing of a model that is not transformers' own is run.

torch and transformers are imported when a layout is asked for: most merges need none.
"""

import copy
import importlib.util
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Group", "Layout", "candidates", "is_installed"]

TASKS = {  # PEFT's task types, by the class that PEFT's users load for them
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def is_installed() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
    except ValueError:  # a module that somebody took out of sys.modules
        return False


@dataclass(frozen=True)
class Group:
    """Tensors on disk that together are tensors of the model, and the way there and back."""

    stored: tuple[str, ...]
    names: tuple[str, ...]  # in memory
    layout: "Layout"

    def load(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        return self.layout.convert(tensors)

    def store(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        return self.layout.revert(tensors)


class Layout:
    """A class of transformers with a configuration, against the names of a checkpoint.

    Attributes:
        class_name: of the model.
        shapes: of every tensor in memory, by name; parameters: those that are no buffers.
        places: the tensor on disk of a name in memory, where one is the other.
        ties: of the tensors that are another's, that other.
    """

    def __init__(self, class_name: str, config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping

        model_class = getattr(transformers, class_name)
        self.class_name, self.config, self._stored = class_name, dict(config), stored
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = model_class(_as_transformers_reads(config))
        self._state = self._model.state_dict()
        self._conversions = get_model_conversion_mapping(self._model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        self.parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        self.ties: dict[str, str] = dict(self._model.all_tied_weights_keys)
        self.places: dict[str, str] = {}
        self._patterns: dict[str, tuple[str, str]] = {}  # of a name on disk: what it begins in memory, the rule's name
        for name in sorted(stored, key=_natural):
            self._place(name)
        self._used = [conversion for conversion in self._conversions if conversion.was_used()]

    def _place(self, name: str) -> None:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        found, pattern = rename_source_key(name, *self._rules, prefix, self._state)
        if found not in self._state and name in self._state:
            found, pattern = rename_source_key(name, [], [], prefix, self._state)
        if found not in self._state:
            return
        if pattern is None:
            self.places.setdefault(found, name)
        else:
            self._patterns[name] = (found, pattern)

    @cached_property
    def _rules(self) -> tuple[list[Any], list[Any]]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        kinds = WeightRenaming, WeightConverter
        renamings, converters = ([one for one in self._conversions if isinstance(one, kind)] for kind in kinds)
        return renamings, converters

    @cached_property
    def groups(self) -> dict[str, Group]:
        """By the names in memory: of the tensors that lie on disk in another number or form."""
        import torch

        found: dict[str, list[str]] = {}
        for name, (first, _) in self._patterns.items():
            found.setdefault(first, []).append(name)
        groups: dict[str, Group] = {}
        for members in found.values():
            tensors = {name: torch.empty(self._stored[name], device="meta") for name in members}
            group = Group(tuple(members), tuple(self.convert(tensors)), self)
            groups |= dict.fromkeys(group.names, group)
        return groups

    def convert(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """What transformers makes of one group's tensors when it loads them."""
        rules = {pattern: rule for rule in self._rules[1] for pattern in rule.source_patterns}
        first, pattern = self._patterns[next(iter(tensors))]
        rule = copy.deepcopy(rules[pattern])
        for name, tensor in tensors.items():
            rule.add_tensor(first, name, self._patterns[name][1], tensor)
        found = rule.convert(first, model=self._model, config=self._model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}

    def revert(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """What transformers makes of the model's tensors when it saves them."""
        from transformers.core_model_loading import revert_weight_conversion

        self._model._weight_conversions = self._used
        reverted: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return reverted

    def root(self, name: str) -> str:
        """The tensor that `name` is tied to in the end; itself where it is not."""
        seen = set()
        while name in self.ties and name not in seen:
            seen.add(name)
            name = self.ties[name]
        return name

    def place(self, name: str) -> str | None:
        """The tensor on disk of a name in memory, its own or that of one that it is tied to."""
        if name in self.places:
            return self.places[name]
        root = self.root(name)
        return next(
            (self.places[one] for one in (root, *self.ties) if self.root(one) == root and one in self.places), None
        )

    def is_transposed(self, name: str) -> bool | None:
        """Whether a layer keeps its weight as (in, out), as GPT-2's Conv1D does; None where it is no linear layer."""
        import torch
        from transformers.pytorch_utils import Conv1D

        module = self._model.get_submodule(name.rpartition(".")[0])
        return isinstance(module, Conv1D) if isinstance(module, Conv1D | torch.nn.Linear) else None

    def has_transposed_experts(self, name: str) -> bool:
        """Whether a stack of matrices is (experts, in, out); PEFT asks the module, and so does this."""
        return bool(getattr(self._model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))

    def with_config(self, config: Mapping[str, Any]) -> "Layout | None":
        """The same class with another configuration; None where it does not take it."""
        try:
            return Layout(self.class_name, config, self._stored)
        except Exception:  # whatever its code raises
            return None

    def name_on_disk(self, name: str) -> str:
        return next(iter(self.revert({name: self._state[name]})))


def candidates(
    config: Mapping[str, Any], adapter: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]
) -> Iterator[Layout]:
    """The model that the adapter was trained on, as far as adapter and base tell: its class, that of its task, and
    that which the base was saved as.
    """
    import transformers

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING or not _is_sane(config, len(stored)):
        return
    mapping = adapter.get("auto_mapping") or {}
    names = [mapping.get("base_model_class")] if isinstance(mapping, dict) else []
    task = TASKS.get(str(adapter.get("task_type")))
    auto = None if task is None else getattr(transformers, task)
    names += [_class_of(auto, config), *_listed(config.get("architectures")), _class_of(transformers.AutoModel, config)]
    for name in dict.fromkeys(name for name in names if isinstance(name, str)):
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            try:
                yield Layout(found.__name__, config, stored)
            except Exception:  # whatever a model's code raises of a configuration that it does not take
                continue


def _is_sane(config: Mapping[str, Any], tensors: int) -> bool:
    """Whether there are so many layers as a checkpoint of so many tensors can have: each costs time and memory here."""
    for name, value in config.items():
        if isinstance(value, dict) and not _is_sane(value, tensors):
            return False
        if type(value) is int and value > 1000 + 4 * tensors and re.search("layer|depth|block|expert", str(name)):
            return False
    return True


def _class_of(auto: Any, config: Mapping[str, Any]) -> str | None:
    found = None if auto is None else auto._model_mapping.get(_config_class(config), None)
    found = found[0] if isinstance(found, tuple) else found
    return None if found is None else str(found.__name__)


def _config_class(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]]


def _as_transformers_reads(config: Mapping[str, Any]) -> Any:
    """It writes infinity in JSON's words, and fills in what older versions left out."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        return _config_class(config).from_pretrained(folder)


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _natural(name: str) -> Any:
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(name)
