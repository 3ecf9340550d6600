"""What a merge does to each tensor of the base: found by name, checked by shape, dtype and value.

All that can be checked is checked here, before the first byte is written; OPLoRAValueError says which tensor of the
adapter does not fit, and why.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from ..errors import OPLoRAValueError
from .merge_base import Base
from .peft_adapter import KEY_PREFIX, AdapterConfig
from .tensor_file import FACTOR_DTYPES, FLOATS, StoredTensor, TensorFile, count_nonfinite, read_factor

__all__ = ["Change", "Delta", "plan_merge"]

LINEAR_KEY: Final = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight", re.DOTALL)
EMBEDDING_KEY: Final = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])", re.DOTALL)


@dataclass(frozen=True)
class Delta:
    """scaling B A on a weight seen as rows and columns; `transposed` as in _core.merge."""

    A: StoredTensor
    B: StoredTensor
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Change:
    """A base tensor's new numbers: the adapter's `replacement`, if any, and `delta`, if any, added."""

    replacement: StoredTensor | None = None
    delta: Delta | None = None


@dataclass
class _Layer:
    """The adapter's tensors of one module."""

    module: str
    embedding: bool
    factors: dict[str, StoredTensor] = field(default_factory=dict)  # by "A" and "B"


def plan_merge(base: Base, adapter: TensorFile, config: AdapterConfig) -> dict[str, Change]:
    """The changes by the base tensor's name; a tensor that is not among them stays as it is."""
    changes = _Planner(base, adapter, config).plan()
    _check_finite_factors(adapter, changes)
    return changes


def _without_wrappers(name: str) -> str:
    """PEFT's name in terms of the base model, without the layers that it wrapped around."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


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

    def plan(self) -> dict[str, Change]:
        for tensor in self.adapter.tensors:
            self._sort_in(tensor)
        if not self.layers and not self.replacements:
            raise OPLoRAValueError(f"{self.adapter.path} holds no tensors. Save the adapter again.")
        for layer in self.layers.values():
            self._check_pair(layer)
        wanted = dict(self.replacements)
        wanted |= {f"{module}.weight": layer.factors["A"] for module, layer in self.layers.items()}
        targets = {name: self.base.tensors[found] for name, found in self._base_names(wanted).items()}
        self._check_ties(wanted, targets)
        changes: dict[str, Change] = {}
        for name, tensor in self.replacements.items():
            self._check_replacement(tensor, targets[name])
            changes[targets[name].name] = Change(replacement=tensor)
        layers = [(layer, targets[f"{layer.module}.weight"]) for layer in self.layers.values()]
        # a square weight doesn't show its orientation: the config decides, unless a layer that does show it contradicts
        contradicted = any(_orientation(layer, target) == (not self.config.fan_in_fan_out) for layer, target in layers)
        for layer, target in layers:
            replacement = changes.get(target.name, Change()).replacement
            changes[target.name] = Change(replacement, self._delta(layer, target, contradicted))
        return changes

    def _refused(self, tensor: StoredTensor, why: str) -> OPLoRAValueError:
        return OPLoRAValueError(f"{self.adapter.path}: tensor {tensor}: {why}. Nothing was written.")

    def _sort_in(self, tensor: StoredTensor) -> None:
        if not tensor.name.startswith(KEY_PREFIX):
            raise self._refused(tensor, f"the name lacks PEFT's prefix {KEY_PREFIX!r}, so save the adapter with PEFT")
        name = tensor.name.removeprefix(KEY_PREFIX)
        if ".lora_magnitude_vector" in name:
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

    def _sort_in_factor(self, tensor: StoredTensor, module: str, factor: str, embedding: bool) -> None:
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
            factor, tensor = next(iter(layer.factors.items()))
            raise self._refused(
                tensor, f"{layer.module!r} has no lora_{'B' if factor == 'A' else 'A'}, so save the adapter again"
            )
        A, B = layer.factors["A"], layer.factors["B"]
        r = self.config.rank(layer.module)
        for tensor in (A, B):
            if len(tensor.shape) < 2 or 0 in tensor.shape:
                raise self._refused(tensor, "expected at least two sizes, none of them 0")
        if A.shape[0] != r:
            raise self._refused(A, f"expected {r} rows, the rank that {self.config.path.name} gives {layer.module!r}")
        if B.shape[1] != r:
            raise self._refused(
                B, f"expected {r} columns, the rank of its lora_A (layers with groups are not merged here)"
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
            return self._refused(tensor, f"BASE has no tensor {name!r}. Is it another model's adapter?")
        return self._refused(
            tensor,
            f"BASE has no {name!r} but {siblings}. Quantised and fused layers are not merged: dequantise BASE first",
        )

    def _check_ties(self, wanted: Mapping[str, StoredTensor], targets: Mapping[str, StoredTensor]) -> None:
        for name, tensor in wanted.items():
            target = targets[name].name
            if self.base.tied and f".{target}".endswith(".lm_head.weight"):
                raise self._refused(
                    tensor,
                    f"config.json of BASE has tie_word_embeddings, so a model that loads the merged {target!r} would "
                    "put the input embedding in its place. Untie the two and save BASE again",
                )

    # -- shapes --

    def _check_replacement(self, tensor: StoredTensor, target: StoredTensor) -> None:
        if tensor.shape != target.shape:
            raise self._refused(
                tensor,
                f"expected the shape {target.shape} of BASE's {target.name!r}; resize BASE first if it was resized",
            )
        if tensor.dtype != target.dtype and (tensor.dtype not in FACTOR_DTYPES or target.dtype not in FLOATS):
            raise self._refused(tensor, f"can't be converted to {target.dtype}, which BASE's {target.name!r} has")

    def _delta(self, layer: _Layer, target: StoredTensor, contradicted: bool) -> Delta:
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
        transposed = layer.embedding or (len(adapted) == 2 and self._is_transposed(layer, target, contradicted))
        return Delta(A, B, self.config.scaling(layer.module, A.shape[0]), transposed)

    def _is_transposed(self, layer: _Layer, target: StoredTensor, contradicted: bool) -> bool:
        orientation = _orientation(layer, target)
        if orientation is not None:
            return orientation
        if contradicted:
            raise self._refused(
                layer.factors["A"],
                f"BASE's {target} is square, and {self.config.path.name} says fan_in_fan_out = "
                f"{self.config.fan_in_fan_out}, which other layers contradict. Correct it there",
            )
        return self.config.fan_in_fan_out


def _check_finite_factors(adapter: TensorFile, changes: Mapping[str, Change]) -> None:
    with adapter.path.open("rb") as file:
        for delta in (change.delta for change in changes.values() if change.delta):
            for tensor in (delta.A, delta.B):
                bad = count_nonfinite(read_factor(file, tensor), "F32")
                if bad:
                    raise OPLoRAValueError(
                        f"{adapter.path}: tensor {tensor} holds {bad} NaN or infinite numbers, expected none: the "
                        "training diverged, or the file is damaged. Take an earlier checkpoint. Nothing was written."
                    )
