"""The tie between a generator's output and the tensors of its layer: who wrote them last, and what they start from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import STARTS, AdaptedLayer, Start
from ..errors import OPLoRATypeError, OPLoRAValueError, warn
from .memory import CPU
from .written import Written

__all__ = ["Factors", "keep_starts", "places_of", "warn_adopted"]


@dataclass
class Factors:
    """The tie between one generator's output v and its layer's tensors: what they hold, and who wrote it.

    The tensors are base + v. A base (None stands for zeros) appears where they keep a start of their own, and where
    somebody else has changed them between two steps.
    """

    layer: AdaptedLayer
    position: int  # of the layer in the model, by which its start is seeded
    dtype: torch.dtype  # of the generator: float64 for float64 tensors, float32 for all others
    device: torch.device  # where the generator is: beside the tensors, unless it was asked for elsewhere
    placed: torch.device  # where the tensors are
    bases: list[Tensor | None]
    kept: list[bool]  # whether each keeps the value that it had; the generator then adds to it, from nothing on
    begun: list[bool] | None = None  # of a Share: whether each has a start other than zero in any process
    places: list[list[int]] | None = None  # where processes add sums up: rows_here() of each, and if these count
    _written: Written = field(default_factory=Written)

    @classmethod
    def of(cls, layer: AdaptedLayer, position: int, device: torch.device | None = None) -> "Factors":
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
            position,
            torch.float64 if double else torch.float32,
            placed if device is None else device,
            placed,
            [None] * len(parameters),
            [False] * len(parameters),
        )

    def move(self, placed: torch.device, device: torch.device) -> None:
        """Follows tensors that were moved."""
        self.placed, self.device = placed, device
        self.bases = [None if base is None else base.to(device) for base in self.bases]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        return self.layer.shapes

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property
    def whole_sizes(self) -> list[int]:
        """With the entries that other processes have."""
        return self.sizes if self.places is None else [place[0] for place in self.places]

    def has_start(self, i: int, value: Tensor) -> bool:
        """Whether the i-th tensor, of this value here, has a start other than zero; in every process alike."""
        return bool(value.count_nonzero()) or (self.begun is not None and self.begun[i])

    def random_rows(self) -> list[tuple[int, int]]:
        """[begin, end) of the rows of the whole W2 that start at random."""
        rows, begin = [], 0
        for random, size in zip(self.is_random(), self.whole_sizes, strict=True):
            if random:
                rows.append((begin, begin + size))
            begin += size
        return rows

    def is_random(self) -> list[bool]:
        """Whether the rows of W2 that predict each tensor start at random; the others start at 0."""
        tensors = zip(self.layer.tensors, self.kept, strict=True)
        return [STARTS[tensor] is Start.RANDOM and not kept for tensor, kept in tensors]

    def keep(self, init: str) -> list[bool]:
        """Settles whether each tensor keeps the value it has."""
        self.kept = [init == "keep" or STARTS[tensor] is Start.KEPT for tensor in self.layer.tensors]
        return self.kept

    def hold_a_start(self) -> bool:
        """Whether a tensor that should start at zero does not (a trained adapter, PiSSA, OLoRA), or A is EVA's."""
        return self.layer.is_eva or any(
            STARTS[tensor] is Start.ZERO and self.has_start(i, parameter.detach())
            for i, (tensor, parameter) in enumerate(zip(self.layer.tensors, self.layer.parameters(), strict=True))
        )

    def gradients(self, parameters: Sequence[nn.Parameter], *, cast: bool = True) -> list[Tensor] | None:
        """Contiguous, zeros where one is missing, None where all are; in the generator's dtype, or as they are."""
        gradients = [p.grad for p in parameters]
        for twin in self.layer.twins:
            gradients[twin.index] = _with_twin(parameters[twin.index], gradients[twin.index], twin.parameter())
        self._refuse_sparse(gradients)
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

    def _refuse_sparse(self, gradients: Sequence[Tensor | None]) -> None:
        for tensor, gradient in zip(self.layer.tensors, gradients, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise OPLoRATypeError(
                    f"oplora: the gradient of {tensor} in layer {self.layer.name} is sparse ({gradient.layout}); a "
                    "generator takes dense ones. Build the embedding with sparse=False. Nothing was changed."
                )

    def sources(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """What gradients() is made from."""
        return [p.grad for p in self.layer.with_twins(parameters) if p.grad is not None]

    def begin(self, v: Sequence[Tensor], keep: Sequence[bool]) -> None:
        """Ties the tensors to v, which is what is generated now: they keep their values as a start that v is added to,
        or take v."""
        for i, (parameter, piece) in enumerate(zip(self.layer.parameters(), v, strict=True)):
            if keep[i]:
                self.keep_value(i, parameter, piece)
            else:
                self.bases[i] = None
                parameter.detach().copy_(piece.view(parameter.shape))
        self.remember_written()

    def keep_value(self, i: int, parameter: nn.Parameter, piece: Tensor) -> None:
        """Makes what the i-th tensor holds, but for `piece` of v, what it starts from."""
        base = parameter.detach().to(self.device, self.dtype) - piece.view(parameter.shape)
        self.bases[i] = base.contiguous() if bool(base.count_nonzero()) else None

    def remember_written(self, parameters: list[nn.Parameter] | None = None) -> None:
        self._written.remember(self.layer.parameters() if parameters is None else parameters)

    def forget(self) -> None:
        """Another hand has written: the next step looks whether the tensors are base + v."""
        self._written.forget()

    def values(self, v: Sequence[Tensor]) -> list[Tensor]:
        """What the tensors are for what is generated: base + v, in their shapes and the generator's dtype."""
        pieces = [piece.view(shape) for piece, shape in zip(v, self.shapes, strict=True)]
        return [piece if base is None else base + piece for base, piece in zip(self.bases, pieces, strict=True)]

    def adopt_edits(self, parameters: list[nn.Parameter], generate: Callable[[], Sequence[Tensor]]) -> bool:
        """Whether somebody changed the values since they were written; if so they become the new start.

        Values that are base + generate() are ours, and so are those that the base was made from: before its first step
        a kept factor is not yet the rounded sum.
        """
        if not self._written.changed(parameters):
            return False
        v, before = generate(), list(self.bases)
        for i, (p, mine) in enumerate(zip(parameters, self.values(v), strict=True)):
            if not torch.equal(p.detach(), mine.to(p)):
                self.keep_value(i, p, v[i])
        self.remember_written(parameters)
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
        self.forget()


def _with_twin(parameter: nn.Parameter, gradient: Tensor | None, twin: nn.Parameter) -> Tensor | None:
    """The gradient with that of another Parameter over the same memory, which may be a transposed view of it."""
    if twin.grad is None:
        return gradient
    as_laid_out = torch.zeros_like(twin, dtype=twin.grad.dtype, memory_format=torch.preserve_format).copy_(twin.grad)
    as_laid_out = as_laid_out.as_strided(parameter.shape, parameter.stride())
    return as_laid_out if gradient is None else gradient + as_laid_out


def places_of(factors: Sequence[Factors]) -> Tensor | None:
    """A row a tensor, as the core's oplora_place has it, where processes add sums up."""
    if any(f.places is None for f in factors):
        return None
    return torch.tensor([place for f in factors for place in f.places or ()], dtype=torch.int64, device=CPU)


def keep_starts(factors: Sequence[Factors], init: str) -> list[list[bool]]:
    """Settles which tensors of each layer keep their values, and says so; warns where that was not asked for."""
    if init not in ("paper", "keep"):
        raise OPLoRAValueError(f"oplora: init is {init!r}, expected 'paper' or 'keep'.")
    held = [init == "paper" and f.hold_a_start() for f in factors]
    if any(held):
        name = factors[held.index(True)].layer.name
        warn(
            f"oplora: {sum(held)} of {len(held)} layers hold a start of their own ({name}), as after earlier training, "
            "PiSSA, OLoRA or EVA. They keep it, as with init='keep', until a state_dict is loaded."
        )
    return [f.keep("keep" if holds else init) for f, holds in zip(factors, held, strict=True)]


def warn_adopted(names: Sequence[str]) -> None:
    warn(
        f"oplora: the factors of {len(names)} layer(s) were changed since the last step ({names[0]}"
        f"{', ...' if len(names) > 1 else ''}); their new values are kept, and training continues from them."
    )
