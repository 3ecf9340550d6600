"""From a model to what is generated: each adapted layer's trainable tensors, as PEFT keeps them.

A layer is found by PEFT's own attributes, and its tensors are looked up again at every step: PEFT replaces Parameter
objects (low_cpu_mem_usage, the cast of a half-precision adapter), and one that was kept would be dead.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError

__all__ = ["AdaptedLayer", "Factors", "find_layers", "keep_starts", "other_parameters", "warn_adopted"]


class Start(Enum):
    """How the rows of W2 that predict a tensor start."""

    RANDOM = "random"
    ZERO = "zero"


# PEFT's names of a layer's trainable tensors, in the order in which v holds them. Of each pair one starts at zero, so
# that training starts at the base model. Adding an adapter type is one row.
STARTS = {
    "lora_A": Start.RANDOM,
    "lora_B": Start.ZERO,
    "lora_embedding_A": Start.ZERO,
    "lora_embedding_B": Start.RANDOM,
}


@dataclass(frozen=True)
class AdaptedLayer:
    """One PEFT layer and one of its adapters.

    Attributes:
        name: the layer's name in the model and the adapter's: "model.layers.0.self_attn.q_proj.default".
        module: PEFT's layer.
        adapter: the adapter's name.
        tensors: the names, of STARTS, of the trainable tensors that the layer has.
    """

    name: str
    module: Any
    adapter: str
    tensors: tuple[str, ...]

    def parameters(self) -> list[nn.Parameter]:
        """The tensors themselves, as the layer holds them now."""
        containers, adapter = self.module._modules, self.adapter
        try:
            return [_held(containers[tensor], adapter) for tensor in self.tensors]
        except KeyError as error:
            raise OPLoRARuntimeError(
                f"oplora: layer {self.name} no longer holds adapter {self.adapter!r}. Make a new optimizer after "
                "adapters were deleted."
            ) from error

    def refuse_if_folded(self) -> None:
        """A step on a merged layer would make the later unmerge subtract another product than was added."""
        if self.module.merged:
            raise OPLoRARuntimeError(
                f"oplora: layer {self.name} is merged into its base weight; a step now would corrupt the base at "
                "unmerge. Call model.unmerge_adapter() before the step. Nothing was changed."
            )
        if self.module.disable_adapters:
            raise OPLoRARuntimeError(
                f"oplora: the adapters of layer {self.name} are disabled, so its gradients are not of the model that "
                "is trained. Enable them (model.enable_adapter_layers(), or leave `with model.disable_adapter()`) "
                "before the step. Nothing was changed."
            )


def _held(container: Any, adapter: str) -> nn.Parameter:
    """What a ModuleDict of layers or a ParameterDict holds for the adapter.

    By way of their own dicts: nn.Module's attribute look-up would cost a step of many small layers a tenth of its time.
    """
    held = container._modules.get(adapter)
    parameter: nn.Parameter = container._parameters[adapter] if held is None else held._parameters["weight"]
    return parameter


def _plain_name(name: str) -> str:
    """Without what torch.compile and DistributedDataParallel put before the names of the model's own modules."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _adapters_of(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(adapter, tensor, parameter) for every low-rank tensor of one PEFT layer."""
    for tensor in STARTS:
        for adapter in getattr(module, tensor, ()):
            yield adapter, tensor, _held(getattr(module, tensor), adapter)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def find_layers(model: nn.Module, adapter_name: str | None = None) -> list[AdaptedLayer]:
    """Every layer of `model` with a trainable LoRA, of the adapter `adapter_name` or of all of them.

    A tensor that two layers share (tied weights) belongs to the first.

    Raises:
        OPLoRAError: no such layer; factors on the meta device or of a dtype that cannot be trained.
    """
    if not isinstance(model, nn.Module):
        raise OPLoRATypeError(
            f"oplora: expected the model itself, got {type(model).__name__}. Pass the PEFT model, as in "
            "oplora.AdamW(model, lr=1e-4), not its parameters: the layers are found in the model."
        )
    layers, seen, known = [], set[int](), set[str]()
    for name, module in _lora_layers(model):
        plain_name, trained = _plain_name(name), dict[str, list[str]]()
        for adapter, tensor, parameter in _adapters_of(module):
            known.add(adapter)
            if adapter_name not in (None, adapter) or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            _check_parameter(f"{plain_name}.{adapter}", tensor, parameter)
            trained.setdefault(adapter, []).append(tensor)
        layers += [
            AdaptedLayer(f"{plain_name}.{adapter}", module, adapter, tuple(tensors))
            for adapter, tensors in trained.items()
        ]
    if not layers:
        raise OPLoRAValueError(_why_none(model, adapter_name, known))
    return layers


def _check_parameter(layer: str, tensor: str, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise OPLoRAValueError(
            f"oplora: {tensor} of layer {layer} is on the meta device and has no values. Load the adapter's weights "
            "(or build the model without init_empty_weights / low_cpu_mem_usage) before making the optimizer."
        )
    if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
        raise OPLoRATypeError(
            f"oplora: {tensor} of layer {layer} is {parameter.dtype}; trainable factors are float32, float64, bfloat16 "
            "or float16. Quantise the base model, not its adapter."
        )


def _why_none(model: nn.Module, adapter_name: str | None, known: set[str]) -> str:
    if not known:
        return (
            f"oplora: {type(model).__name__} has no LoRA layer. Add an adapter first: "
            "model = get_peft_model(model, LoraConfig(...)), or model = oplora.wrap(model, oplora.OPLoRAConfig(...))."
        )
    if adapter_name is not None and adapter_name not in known:
        return f"oplora: no adapter is named {adapter_name!r}; the model has {', '.join(sorted(known))}."
    which = "No adapter" if adapter_name is None else f"Adapter {adapter_name!r} is there, but no layer of it"
    return (
        f"oplora: {which} is trainable (the model has {', '.join(sorted(known))}). Call model.set_adapter(name), or "
        "load with is_trainable=True."
    )


def other_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What is trainable but no LoRA factor (biases, modules_to_save): each once, in the model's order."""
    factors = {id(parameter) for _, module in _lora_layers(model) for _, _, parameter in _adapters_of(module)}
    return (p for p in model.parameters() if p.requires_grad and id(p) not in factors)


@dataclass
class Factors:
    """The tie between one generator's output v and its layer's tensors: what they hold, and who wrote it.

    The tensors are base + v. A base (None stands for zeros) appears where they keep a start of their own, and where
    somebody else has changed them between two steps. Edits are noticed by the tensors' version counters, so what goes
    around autograd (`tensor.data`) is not.
    """

    layer: AdaptedLayer
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype  # of the generator: float64 for float64 tensors, float32 for all others
    device: torch.device  # where the generator is: beside the tensors, unless it was asked for elsewhere
    placed: torch.device  # where the tensors are
    bases: list[Tensor | None]
    _versions: list[int] = field(default_factory=list)
    _written: list[nn.Parameter] = field(default_factory=list)

    @classmethod
    def of(cls, layer: AdaptedLayer, device: torch.device | None = None) -> "Factors":
        """device: where the generator is to be, if not beside the tensors."""
        parameters = layer.parameters()
        placed = parameters[0].device
        if elsewhere := [p.device for p in parameters if p.device != placed]:
            raise OPLoRATypeError(
                f"oplora: the factors of layer {layer.name} are on {placed} and {elsewhere[0]}; they must share one."
            )
        double = all(p.dtype == torch.float64 for p in parameters)
        return cls(
            layer,
            tuple(p.shape for p in parameters),
            torch.float64 if double else torch.float32,
            placed if device is None else device,
            placed,
            [None] * len(parameters),
        )

    def move(self, placed: torch.device, device: torch.device) -> None:
        """Follows tensors that were moved."""
        self.placed, self.device = placed, device
        self.bases = [None if base is None else base.to(device) for base in self.bases]

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def random_rows(self) -> list[tuple[int, int]]:
        """[begin, end) of the rows of W2 that start at random."""
        rows, begin = [], 0
        for random, size in zip(self.is_random(), self.sizes, strict=True):
            if random:
                rows.append((begin, begin + size))
            begin += size
        return rows

    def is_random(self) -> list[bool]:
        """Whether the rows of W2 that predict each tensor start at random."""
        return [STARTS[tensor] is Start.RANDOM for tensor in self.layer.tensors]

    def hold_a_start(self) -> bool:
        """Whether a tensor that should start at zero does not: a trained adapter, PiSSA's or OLoRA's start."""
        return any(
            STARTS[tensor] is Start.ZERO and bool(parameter.detach().count_nonzero())
            for tensor, parameter in zip(self.layer.tensors, self.layer.parameters(), strict=True)
        )

    def gradients(self, parameters: Sequence[nn.Parameter], *, cast: bool = True) -> list[Tensor] | None:
        """Contiguous, zeros where one is missing, None where all are; in the generator's dtype, or as they are."""
        gradients = [p.grad for p in parameters]
        dtypes = [self.dtype if cast else p.dtype for p in parameters]
        ready = [
            g
            for g, dtype in zip(gradients, dtypes, strict=True)
            if g is not None and g.dtype == dtype and g.is_contiguous()
        ]
        if len(ready) == len(parameters):
            return ready
        if all(g is None for g in gradients):
            return None
        return [
            torch.zeros(p.shape, dtype=dtype, device=p.device) if g is None else g.to(dtype).contiguous()
            for p, g, dtype in zip(parameters, gradients, dtypes, strict=True)
        ]

    def were_touched(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether somebody may have changed the tensors since remember_written."""
        written = self._written
        return (
            len(written) != len(parameters)
            or any(map(is_not, parameters, written))
            or [p._version for p in parameters] != self._versions
        )

    def keep(self, v: Sequence[Tensor]) -> None:
        """Takes the tensors' present values as the start that v is added to; v is what is generated now."""
        for i, (parameter, piece) in enumerate(zip(self.layer.parameters(), v, strict=True)):
            base = parameter.detach().to(self.device, self.dtype) - piece.view(parameter.shape)
            self.bases[i] = base.contiguous() if bool(base.count_nonzero()) else None
        self.remember_written()

    def remember_written(self, parameters: list[nn.Parameter] | None = None) -> None:
        self._written = self.layer.parameters() if parameters is None else parameters
        self._versions = [p._version for p in self._written]

    def values(self, v: Sequence[Tensor]) -> list[Tensor]:
        """What the tensors are for what is generated: base + v, in their shapes and the generator's dtype."""
        pieces = [piece.view(shape) for piece, shape in zip(v, self.shapes, strict=True)]
        return [piece if base is None else base + piece for base, piece in zip(self.bases, pieces, strict=True)]

    def adopt_edits(self, parameters: list[nn.Parameter], generate: Callable[[], Sequence[Tensor]]) -> bool:
        """Whether somebody changed the values since they were written; if so they become the new start.

        Values that are base + generate() are ours, and so are those that the base was made from: before its first step
        a kept factor is not yet the rounded sum.
        """
        if not self.were_touched(parameters):
            return False
        v, before = generate(), list(self.bases)
        if all(torch.equal(p.detach(), m.to(p)) for p, m in zip(parameters, self.values(v), strict=True)):
            self.remember_written(parameters)
            return False
        self.keep(v)
        return not all(
            base is now or (base is not None and now is not None and torch.equal(base, now))
            for base, now in zip(before, self.bases, strict=True)
        )

    def state_dict(self) -> dict[str, Any]:
        """The live tensors: bases, and the factors themselves, so that resuming restores their very bits."""
        return {"bases": list(self.bases), "factors": [p.detach() for p in self.layer.parameters()]}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises unless load_state(saved) will go through; changes nothing."""
        for key in ("bases", "factors"):
            tensors = saved[key]
            if not isinstance(tensors, list | tuple) or len(tensors) != len(self.shapes):
                raise OPLoRAValueError(f"oplora: the saved {key} of layer {self.layer.name} are not one a factor.")
            for tensor, shape in zip(tensors, self.shapes, strict=True):
                if tensor is None and key == "bases":
                    continue
                if not isinstance(tensor, Tensor) or tensor.shape != shape:
                    raise OPLoRAValueError(
                        f"oplora: the saved {key} of layer {self.layer.name} are not tensors of shapes "
                        f"{[tuple(s) for s in self.shapes]}. They were saved from another model or rank."
                    )

    def load_state(self, saved: dict[str, Any]) -> None:
        self.bases = [
            None if base is None else base.to(self.device, self.dtype, copy=True).contiguous()
            for base in saved["bases"]
        ]
        for parameter, value in zip(self.layer.parameters(), saved["factors"], strict=True):
            parameter.detach().copy_(value)
        self._written = []  # the next step looks whether they are base + v


def keep_starts(factors: Sequence[Factors], init: str) -> list[bool]:
    """Whether each layer keeps its values; with a warning where that was not asked for."""
    if init not in ("paper", "keep"):
        raise OPLoRAValueError(f"oplora: init is {init!r}, expected 'paper' or 'keep'.")
    if init == "keep":
        return [True] * len(factors)
    held = [f.hold_a_start() for f in factors]
    if any(held):
        name = factors[held.index(True)].layer.name
        warnings.warn(
            f"oplora: {sum(held)} of {len(held)} layers hold a start of their own ({name}: a factor that starts at "
            "zero is not zero), as after earlier training, PiSSA or OLoRA. They keep them, as with init='keep'.",
            stacklevel=3,
        )
    return held


def warn_adopted(names: Sequence[str]) -> None:
    warnings.warn(
        f"oplora: the factors of {len(names)} layer(s) were changed since the last step ({names[0]}"
        f"{', ...' if len(names) > 1 else ''}); their new values are kept and the generators go on from there.",
        stacklevel=4,
    )
