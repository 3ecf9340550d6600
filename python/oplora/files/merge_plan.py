"""What a merge does to each tensor of the base: found by name, checked by shape, dtype and value.

An adapter's names are those in memory. Where the base has the same, as most have, nothing more is asked; else, or where
a tensor may be tied to another, model_layout tells what transformers makes of the base.

All that can be checked is checked here, before the first byte is written; OPLoRAValueError says which tensor of the
adapter does not fit, and why.
"""

import copy
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import OPLoRAValueError
from . import model_layout
from .merge_base import Base
from .model_layout import Group, Layout
from .peft_adapter import KEY_PREFIX, AdapterConfig, FactorKey, factor_of
from .tensor_file import FACTOR_DTYPES, FLOATS, StoredTensor, TensorFile, count_nonfinite, read_numbers

__all__ = ["Added", "Change", "Delta", "Plan", "Regrouped", "plan_merge"]

MAY_BE_TIED: Final = re.compile(r"head|embed|decoder|output|logits|proj_out|generator|cls|wte", re.IGNORECASE)
CONV1D_NAMES: Final = re.compile(r"c_\w+|q_attn")
WRAPPERS: Final = ("base_layer", "_orig_mod", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Delta:
    """scaling B A on a weight seen as rows and columns; `transposed` as in _core.merge.

    With experts, on each matrix of a stack of as many: A of shape (experts r, in) has theirs one after the other, B of
    shape (out, r experts) in turns.
    """

    A: StoredTensor
    B: StoredTensor
    scaling: float
    transposed: bool
    experts: int | None = None


@dataclass(frozen=True)
class Change:
    """A tensor's new numbers: those of `origin`, a file and a tensor in it, by default its own, and `delta` added."""

    origin: tuple[Path, StoredTensor] | None = None
    delta: Delta | None = None


@dataclass(frozen=True)
class Regrouped:
    """Changes of tensors in memory that lie on disk in another number or form."""

    group: Group
    changes: Mapping[str, tuple[StoredTensor, Change]]  # by name in memory; the tensor has its shape and dtype alone


@dataclass(frozen=True)
class Added:
    """A tensor that the base has not; its place in the file is the writer's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    change: Change


@dataclass(frozen=True)
class Plan:
    changes: Mapping[str, Change]  # by the base tensor's name; others stay as they are
    groups: tuple[Regrouped, ...] = ()
    added: tuple[Added, ...] = ()
    config: Mapping[str, Any] | None = None  # config.json of the merged model, where it is not the base's


@dataclass
class _Layer:
    """The adapter's tensors of one module, or of one of its parameters (target_parameters)."""

    module: str
    embedding: bool
    target: str = ""  # the tensor that it adapts, as it is called in memory
    depth: int = 0  # how many of PEFT's layers are around this one: a module whose second parameter is adapted has two
    experts: int | None = None
    r: int = 0
    scaling: float = 0.0
    factors: dict[str, StoredTensor] = field(default_factory=dict)  # by "A" and "B"


def plan_merge(base: Base, adapter: TensorFile, config: AdapterConfig) -> Plan:
    """What is to be written, or why it cannot be."""
    planner = _Planner(base, adapter, config)
    plan = planner.plan()
    _check_finite_factors(adapter, planner.layers.values())
    return plan


def _without_wrappers(name: str) -> str:
    """PEFT's name in terms of the base model, without what PEFT, torch.compile and FSDP wrapped around its layers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _orientation(layer: _Layer, target: StoredTensor) -> bool | None:
    """Whether a linear weight is plainly transposed, (in, out); None for square ones and other layers."""
    out_features, in_features = layer.factors["B"].shape[0], layer.factors["A"].shape[1]
    if layer.embedding or len(target.shape) != 2 or out_features == in_features:
        return None
    return target.shape == (in_features, out_features)


def _renames(wanted: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str]]:
    """Prefixes (lost, gained) on the way from the adapter's names to the base's."""
    yield from ((first + ".", "") for first in {name.partition(".")[0] for name in wanted})
    yield from (("", first + ".") for first in {name.partition(".")[0] for name in base})


class _Planner:
    """Gives every tensor of the adapter its tensor of the base, or says which one has none."""

    def __init__(self, base: Base, adapter: TensorFile, config: AdapterConfig) -> None:
        self.base, self.adapter, self.config = base, adapter, config
        self.layers: dict[str, _Layer] = {}
        self.replacements: dict[str, StoredTensor] = {}
        self.adapter_names: set[str | None] = set()

    def plan(self) -> Plan:
        for tensor in self.adapter.tensors:
            self._sort_in(tensor)
        if not self.layers and not self.replacements:
            raise OPLoRAValueError(f"{self.adapter.path} holds no tensors. Save the adapter again.")
        has_parameters = bool(self.config.fields.get("target_parameters"))
        for layer in self.layers.values():
            if layer.depth and not has_parameters:
                # MultiheadAttention, whose out_proj PEFT 0.21 adds twice, in training as in merging
                first = next(iter(layer.factors.values()))
                raise self._refused(first, "it adapts a layer inside an adapted layer, so merge it with PEFT")
            self._check_is_pair(layer)
        if has_parameters:
            return self._plan_parameters()
        for layer in self.layers.values():
            layer.target = f"{layer.module}.weight"
            self._check_ranks(layer, layer.module)
        wanted = self._wanted()
        is_direct = all(name in self.base.tensors for name in wanted)
        if not is_direct or self._may_be_tied(wanted) or self._may_be_transposed():
            for layout in self._candidates():
                if (names := self._names_in(layout, wanted)) is not None:
                    return _OnLayout(self, layout).plan(self._changes(wanted, names, layout))
            self._refuse_unknown_ties(wanted)
        names = {name: name for name in wanted} if is_direct else self._base_names(wanted)
        return Plan({name: change for name, (_, change) in self._changes(wanted, names, None).items()})

    def _wanted(self) -> dict[str, StoredTensor]:
        """By the name in memory: every tensor that changes, and one of the adapter's that says so."""
        return self.replacements | {layer.target: layer.factors["A"] for layer in self.layers.values()}

    def _plan_parameters(self) -> Plan:
        """Of an adapter on parameters that are no layer's weight, as experts are: only the model knows their order."""
        for layout in self._candidates():
            named = {}  # what patterns are matched with
            for place, layer in self.layers.items():
                around = self._parameters_of(layer.module, layout)[::-1]  # the last is outermost
                layer.target = around[layer.depth] if layer.depth < len(around) else f"{layer.module}.weight"
                shape = layout.shapes.get(layer.target, ())
                layer.experts = shape[0] if around and len(shape) == 3 else None
                named[place] = layer.target if around else layer.module
            wanted = self._wanted()
            is_each_one = len({layer.target for layer in self.layers.values()}) == len(self.layers)
            if is_each_one and (names := self._names_in(layout, wanted)) is not None:
                for place, layer in self.layers.items():
                    self._check_ranks(layer, named[place])
                return _OnLayout(self, layout).plan(self._changes(wanted, names, layout))
        raise self._refused(
            self.adapter.tensors[0],
            "target_parameters adapts parameters that are no layer's weight, and which they are only transformers can "
            "tell, which is not installed or does not know BASE. Install it, or merge with PEFT",
        )

    def _parameters_of(self, module: str, layout: Layout) -> list[str]:
        """The parameters of a module that target_parameters names, the one that PEFT wraps first before others."""
        targets = self.config.fields["target_parameters"]
        names = [name for name in layout.shapes if name.rpartition(".")[0] == module]
        return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]

    def _changes(
        self, wanted: Mapping[str, StoredTensor], names: Mapping[str, str], layout: Layout | None
    ) -> dict[str, tuple[StoredTensor, Change]]:
        """The tensors that change and how, by their names in memory, or in the base where there is no layout."""
        targets = {name: self._target(names[name], tensor, layout) for name, tensor in wanted.items()}
        changes: dict[str, tuple[StoredTensor, Change]] = {}
        for name, tensor in self.replacements.items():
            self._check_replacement(tensor, targets[name])
            changes[names[name]] = targets[name], Change((self.adapter.path, tensor))
        layers = [(layer, layer.target) for layer in self.layers.values()]
        # a square weight doesn't show its orientation: the model tells, or the config, unless a layer contradicts it
        contradicted = any(
            _orientation(layer, targets[name]) == (not self.config.fan_in_fan_out) for layer, name in layers
        )
        for layer, name in layers:
            target = targets[name]
            origin = changes[names[name]][1].origin if names[name] in changes else None
            if layer.experts:
                assert layout is not None
                changes[names[name]] = target, Change(origin, self._delta_of_experts(layer, target, layout))
                continue
            told: bool | None = None if contradicted else self.config.fan_in_fan_out
            if layout is not None and (transposed := layout.is_transposed(names[name])) is not None:
                told = transposed
            changes[names[name]] = target, Change(origin, self._delta(layer, target, told))
        return changes

    def _target(self, name: str, tensor: StoredTensor, layout: Layout | None) -> StoredTensor:
        """The tensor to change: the base's, or for one that is not there as such, its name, dtype and shape."""
        if layout is None:
            return self.base.tensors[name]
        if (place := layout.place(name)) is not None:
            return self.base.tensors[place]
        if (group := layout.groups.get(name)) is not None:
            dtypes = {self.base.tensors[stored].dtype for stored in group.stored}
            dtype = dtypes.pop() if len(dtypes) == 1 else f"{len(dtypes)} dtypes"
            return StoredTensor(name, dtype, layout.shapes[name], 0, 0)
        # a new head has as many rows as the adapter has labels
        return StoredTensor(name, self.float_of_base(tensor.dtype), tensor.shape, 0, 0)

    def float_of_base(self, otherwise: str) -> str:
        dtypes = [tensor.dtype for tensor in self.base.tensors.values() if tensor.dtype in FLOATS]
        return statistics.mode(dtypes) if dtypes else otherwise

    # -- what only transformers knows --

    def _may_be_tied(self, wanted: Mapping[str, StoredTensor]) -> bool:
        return (
            any(layer.embedding for layer in self.layers.values())
            or any(len(tensor.shape) == 2 for tensor in self.replacements.values())
            or any(MAY_BE_TIED.search(".".join(name.split(".")[-2:])) for name in wanted)
        )

    def _may_be_transposed(self) -> bool:
        """GPT-2's Conv1D among other layers: the one fan_in_fan_out of the configuration is right for some of them."""
        return any(CONV1D_NAMES.fullmatch(module.rpartition(".")[2]) for module in self.layers)

    def _candidates(self) -> Iterator[Layout]:
        if "model_type" in self.base.config and model_layout.is_installed():
            stored = {name: tensor.shape for name, tensor in self.base.tensors.items()}
            yield from model_layout.candidates(self.base.config, self.config.fields, stored)

    def _names_in(self, layout: Layout, wanted: Mapping[str, StoredTensor]) -> dict[str, str] | None:
        """What the adapter's names are called in memory, if all are found there."""
        if all(layout.place(name) or name in layout.groups or self._is_new(name, layout) for name in wanted):
            return {name: name for name in wanted}
        on_disk = {place: name for name, place in layout.places.items()}
        if all(name in on_disk for name in wanted):  # of an earlier transformers, which had the names on disk
            return {name: on_disk[name] for name in wanted}
        return None

    def _is_new(self, name: str, layout: Layout) -> bool:
        return name in self.replacements and name in layout.shapes

    def _refuse_unknown_ties(self, wanted: Mapping[str, StoredTensor]) -> None:
        """Where nothing tells which tensors are one, those that often are."""
        if not self.base.config or self.base.config.get("tie_word_embeddings") is False:
            return
        tied = self.base.config.get("tie_word_embeddings") is True
        embeddings = {layer.target for layer in self.layers.values() if layer.embedding}
        for name, tensor in wanted.items():
            is_head = f".{name}".endswith(".lm_head.weight") and name in self.base.tensors
            is_matrix = name in embeddings or (name in self.replacements and len(tensor.shape) == 2)
            if (is_matrix and (tied or "model_type" in self.base.config)) or (is_head and tied):
                raise self._refused(
                    tensor,
                    "BASE's config.json has tie_word_embeddings, or does not say, and whether this tensor is tied only "
                    "transformers can tell, which is not installed or does not know the model. Install it, or untie "
                    "the model (tie_word_embeddings=false), save BASE again and merge into that",
                )

    def _refused(self, tensor: StoredTensor, why: str) -> OPLoRAValueError:
        end = "" if why.endswith("?") else "."
        return OPLoRAValueError(f"{self.adapter.path}: tensor {tensor}: {why}{end} Nothing was written.")

    def _sort_in(self, tensor: StoredTensor) -> None:
        if not tensor.name.startswith(KEY_PREFIX):
            raise self._refused(tensor, f"the name lacks PEFT's prefix {KEY_PREFIX!r}, so save the adapter with PEFT")
        name = tensor.name.removeprefix(KEY_PREFIX)
        if ".lora_magnitude_vector" in name:
            raise self._refused(tensor, "this is DoRA, which is not W + scaling B A, so merge it with PEFT")
        if found := factor_of(name):
            self.adapter_names.add(found.adapter)
            if len(self.adapter_names) > 1:
                raise self._refused(tensor, f"the file holds several adapters ({_listed(self.adapter_names)})")
            self._sort_in_factor(tensor, found)
        elif "lora_" in name:
            raise self._refused(tensor, "expected lora_A.weight, lora_B.weight, lora_embedding_A or lora_embedding_B")
        elif (plain := _without_wrappers(name)) in self.replacements:
            raise self._refused(tensor, f"{plain!r} is replaced twice")
        else:
            self.replacements[plain] = tensor

    def _sort_in_factor(self, tensor: StoredTensor, key: FactorKey) -> None:
        if tensor.dtype not in FACTOR_DTYPES:
            raise self._refused(tensor, f"expected one of {', '.join(FACTOR_DTYPES)}, so save the adapter in float32")
        parts = [part for part in key.module.split(".") if part == "base_layer" or part not in WRAPPERS]
        depth, module = parts.count("base_layer"), _without_wrappers(key.module)
        layer = self.layers.setdefault(".".join(parts), _Layer(module, key.is_embedding, depth=depth))
        if layer.embedding != key.is_embedding:
            raise self._refused(tensor, f"{module!r} has other factors already")
        if key.factor in layer.factors:
            raise self._refused(tensor, f"{module!r} has a lora_{key.factor} already")
        layer.factors[key.factor] = tensor

    def _check_is_pair(self, layer: _Layer) -> None:
        if len(layer.factors) < 2:
            factor, tensor = next(iter(layer.factors.items()))
            raise self._refused(
                tensor, f"{layer.module!r} has no lora_{'B' if factor == 'A' else 'A'}, so save the adapter again"
            )
        for tensor in layer.factors.values():
            if len(tensor.shape) < 2 or 0 in tensor.shape:
                raise self._refused(tensor, "expected at least two sizes, none of them 0")

    def _check_ranks(self, layer: _Layer, name: str) -> None:
        """name: what rank_pattern and alpha_pattern are matched with."""
        A, B = layer.factors["A"], layer.factors["B"]
        layer.r = self.config.rank(name)
        layer.scaling = self.config.scaling(name, layer.r)
        rows = layer.r * (layer.experts or 1)
        if A.shape[0] != rows:
            times = f", times {layer.experts} experts" if layer.experts else ""
            raise self._refused(A, f"expected {rows} rows, the rank that {self.config.path.name} gives {name!r}{times}")
        if B.shape[1] != rows:
            raise self._refused(
                B, f"expected {rows} columns, the rank of its lora_A (layers with groups are not merged here)"
            )

    # -- names --

    def _base_names(self, wanted: Mapping[str, StoredTensor]) -> dict[str, str]:
        """The base's name of every tensor that the adapter changes.

        Checkpoints of the same model may have a component more or less in front ("model.", "transformer."):
        one such change for all names counts, if it finds all of them and no other does.
        """
        missing = [name for name in wanted if name not in self.base.tensors]
        if not missing:
            return {name: name for name in wanted}
        answers = [
            {name: gained + name.removeprefix(lost) for name in wanted}
            for lost, gained in _renames(wanted, self.base.tensors)
            if all(gained + name.removeprefix(lost) in self.base.tensors for name in wanted)
        ]
        if not answers:
            raise self._missing(missing[0], wanted[missing[0]])
        if any(answer != answers[0] for answer in answers) or len({*answers[0].values()}) < len(wanted):
            raise self._refused(wanted[missing[0]], f"BASE has several tensors that {missing[0]!r} might mean")
        return answers[0]

    def _missing(self, name: str, tensor: StoredTensor) -> OPLoRAValueError:
        module = name.rpartition(".")[0]
        if module.rpartition(".")[2] == "lm_head":
            return self._refused(
                tensor,
                f"BASE has no {name!r}: it is tied to the input embedding. Untie it (tie_word_embeddings=false), save "
                "BASE with its own lm_head.weight and merge into that",
            )
        siblings = [other for other in self.base.tensors if module and other.startswith(module + ".")][:4]
        if not siblings:
            return self._refused(tensor, f"BASE has no tensor {name!r}. {self._why_unknown()}")
        return self._refused(
            tensor,
            f"BASE has no {name!r} but {siblings}. Quantised and fused layers are not merged: dequantise BASE first",
        )

    def _why_unknown(self) -> str:
        if "model_type" in self.base.config and not model_layout.is_installed():
            return "On disk it may have another name, which transformers tells: install it. Or is it another model's?"
        return "Is it another model's adapter?"

    # -- shapes --

    def _check_replacement(self, tensor: StoredTensor, target: StoredTensor) -> None:
        if tensor.shape != target.shape:
            raise self._refused(
                tensor,
                f"expected the shape {target.shape} of BASE's {target.name!r}; resize BASE first if it was resized",
            )
        if tensor.dtype != target.dtype and (tensor.dtype not in FACTOR_DTYPES or target.dtype not in FLOATS):
            raise self._refused(tensor, f"can't be converted to {target.dtype}, which BASE's {target.name!r} has")

    def _delta(self, layer: _Layer, target: StoredTensor, told: bool | None) -> Delta:
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
        fits = target.shape in shapes and B.shape[2:] == (1,) * (len(A.shape) - 2)
        if not fits or (layer.embedding and len(adapted) != 2):
            raise self._refused(A, f"with lora_B of shape {B.shape} it adapts {shapes[0]}, but BASE has {target}")
        transposed = layer.embedding or (len(adapted) == 2 and self._is_transposed(layer, target, told))
        return Delta(A, B, layer.scaling, transposed)

    def _delta_of_experts(self, layer: _Layer, target: StoredTensor, layout: Layout) -> Delta:
        A, B = layer.factors["A"], layer.factors["B"]
        transposed = layout.has_transposed_experts(layer.target)
        adapted = (A.shape[1], B.shape[0]) if transposed else (B.shape[0], A.shape[1])
        if target.dtype not in FLOATS or target.shape != (layer.experts, *adapted):
            raise self._refused(
                A, f"with lora_B of shape {B.shape} it adapts {(layer.experts, *adapted)}, but BASE has {target}"
            )
        return Delta(A, B, layer.scaling, transposed, layer.experts)

    def _is_transposed(self, layer: _Layer, target: StoredTensor, told: bool | None) -> bool:
        orientation = _orientation(layer, target)
        if orientation is not None:
            return orientation
        if told is None:
            raise self._refused(
                layer.factors["A"],
                f"BASE's {target} is square, and {self.config.path.name} says fan_in_fan_out = "
                f"{self.config.fan_in_fan_out}, which other layers contradict. Correct it there",
            )
        return told


class _OnLayout:
    """The changes of a model as it is in memory, brought to disk: under other names, regrouped, untied, with a head."""

    def __init__(self, planner: _Planner, layout: Layout) -> None:
        self.planner, self.base, self.layout = planner, planner.base, layout
        self.changes: dict[str, Change] = {}
        self.regrouped: dict[Group, dict[str, tuple[StoredTensor, Change]]] = {}
        self.added: list[Added] = []
        self.config: dict[str, Any] | None = None

    def plan(self, changes: Mapping[str, tuple[StoredTensor, Change]]) -> Plan:
        families = self._families(changes)
        for name, (target, change) in changes.items():
            if name in families:
                continue
            if (place := self.layout.places.get(name)) is not None:
                self.changes[place] = change
            elif (group := self.layout.groups.get(name)) is not None:
                self.regrouped.setdefault(group, {})[name] = target, change
            else:
                self._add_head(name, target, change)
        self._check_head(changes)
        self._change_families(families, changes)
        groups = tuple(Regrouped(group, changed) for group, changed in self.regrouped.items())
        return Plan(self.changes, groups, tuple(self.added), self.config)

    def _add_head(self, name: str, target: StoredTensor, change: Change) -> None:
        """A tensor that the base has not, as it was saved from another class of the same architecture."""
        layout = self.layout
        if self.config is None:
            self.config = {**copy.deepcopy(dict(self.base.config)), "architectures": [layout.class_name]}
        if target.shape != layout.shapes[name]:
            labels = [f"LABEL_{number}" for number in range(target.shape[0] if target.shape else 0)]
            self.config |= {
                "id2label": {str(number): label for number, label in enumerate(labels)},
                "label2id": {label: number for number, label in enumerate(labels)},
            }
            self.config.pop("num_labels", None)
            other = layout.with_config(self.config)
            if other is None or other.shapes[name] != target.shape:
                assert change.origin is not None
                raise self.planner._refused(
                    change.origin[1],
                    f"BASE has no {name!r}, and a {layout.class_name} has it in the shape {layout.shapes[name]}. Save "
                    "BASE with the head that the adapter was trained with, and merge into that",
                )
        self._add(name, target, change)

    def _check_head(self, changes: Mapping[str, tuple[StoredTensor, Change]]) -> None:
        """Of a class that the base was not saved from, all must be there: what is not would be random when loaded."""
        lacking = sorted(
            name for name in self.layout.parameters - changes.keys() if not self.layout.place(name) and self.added
        )
        if lacking := [name for name in lacking if name not in self.layout.groups]:
            change = next(iter(changes.values()))[1]
            raise self.planner._refused(
                _tensor_of(change),
                f"BASE and the adapter lack {lacking[0]!r}, which a {self.layout.class_name} has: it would be random. "
                "Save BASE from that class, as it was when the adapter was trained, and merge into that",
            )

    def _add(self, name: str, like: StoredTensor, change: Change) -> None:
        self.added.append(Added(self.layout.name_on_disk(name), like.dtype, like.shape, change))

    # -- ties --

    def _families(self, changes: Mapping[str, object]) -> dict[str, str]:
        """Of each tensor that is one with others, of which one changes: the tensor that they all are."""
        touched = {self.layout.root(name) for name in changes}
        found = {name: root for name in self.layout.ties if (root := self.layout.root(name)) in touched}
        return found | {root: root for root in found.values()}

    def _change_families(self, families: Mapping[str, str], changes: Mapping[str, tuple[StoredTensor, Change]]) -> None:
        diverging = {}
        for root in dict.fromkeys(families.values()):
            members = [name for name, other in families.items() if other == root]
            mine = {name: changes[name] for name in members if name in changes}
            _, change = mine.get(root, next(iter(mine.values())))
            trained_as_one = self.planner.config.fields.get("ensure_weight_tying") is True or (
                # biases are trained where they are; what modules_to_save names is a copy
                change.delta is None and root.endswith(".bias") and self.planner.config.fields.get("bias") != "none"
            )
            places = [self.layout.places[name] for name in members if name in self.layout.places]
            if trained_as_one and places:
                self.changes |= dict.fromkeys(places, change)
            else:
                diverging[root] = mine
        if diverging:
            self._untie(diverging)

    def _untie(self, diverging: Mapping[str, Mapping[str, tuple[StoredTensor, Change]]]) -> None:
        """PEFT adapts or replaces one of several modules that are one, so in the merged model they are no longer."""
        config = _untied(self.config or self.base.config)
        other = self.layout.with_config(config)
        first = next(iter(next(iter(diverging.values())).values()))
        if other is None or any(other.root(name) in diverging for name in other.ties):
            raise self._refused_tie(first, diverging)
        self.config = config
        ties = {**{name: self.layout.root(name) for name in self.layout.ties}}
        for name in [*dict.fromkeys(ties.values()), *ties]:
            root = ties.get(name, name)
            if name in other.ties or root in other.ties:
                continue
            place = self.layout.place(root)
            if place is None or other.shapes[name] != self.base.tensors[place].shape:
                raise self._refused_tie(first, diverging)
            stored = self.base.tensors[place]
            change = diverging.get(root, {}).get(name, (stored, Change()))[1]
            origin = change.origin or (self.base.file_of(stored), stored)
            if (own := self.layout.places.get(name)) is not None:
                self.changes[own] = Change(None if own == place and change.origin is None else origin, change.delta)
            else:
                self._add(name, stored, Change(origin, change.delta))

    def _refused_tie(
        self, first: tuple[StoredTensor, Change], diverging: Mapping[str, Mapping[str, object]]
    ) -> OPLoRAValueError:
        names = ", ".join(repr(name) for changed in diverging.values() for name in changed)
        return self.planner._refused(
            _tensor_of(first[1]),
            f"the adapter changes {names}, which a {self.layout.class_name} has as one with other tensors, also with "
            "tie_word_embeddings=false. Merge it with PEFT",
        )


def _tensor_of(change: Change) -> StoredTensor:
    """One of the adapter's, of which a change is."""
    if change.delta is not None:
        return change.delta.A
    assert change.origin is not None
    return change.origin[1]


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """With tie_word_embeddings off, also in the configurations of the model's parts."""
    parts = {
        name: _untied(value)
        for name, value in config.items()
        if isinstance(value, dict) and value.keys() & {"model_type", "tie_word_embeddings"}
    }
    return {**copy.deepcopy(dict(config)), **parts, "tie_word_embeddings": False}


def _listed(names: set[str | None]) -> str:
    return ", ".join(sorted(str(name) for name in names))


def _check_finite_factors(adapter: TensorFile, layers: Iterable[_Layer]) -> None:
    with adapter.path.open("rb") as file:
        for tensor in (tensor for layer in layers for tensor in layer.factors.values()):
            bad = count_nonfinite(read_numbers(file, tensor, 0, math.prod(tensor.shape)), tensor.dtype)
            if bad:
                raise OPLoRAValueError(
                    f"{adapter.path}: tensor {tensor} holds {bad} NaN or infinite numbers, expected none: the "
                    "training diverged, or the file is damaged. Take an earlier checkpoint. Nothing was written."
                )
