"""State "exact": a generator's five tensors and their two AdamW moments in full, stepped by the C core.

12 bytes an element of W2 (float32), and nothing else of its size at any time: the gradient of W2 is never stored, and
pages of moments that no step has touched (units that never fired) are not resident.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (loads the ops that are called below)
from .adapters import Factors
from .errors import OPLoRATypeError, OPLoRAValueError
from .start import Settings, allocate, count_parameters, start_parameters

__all__ = ["ExactState", "Layers", "measure", "step", "write_factors"]


class ExactState:
    """One layer's generator with its moments, its step count, and what its still columns owe to weight decay."""

    def __init__(self, factors: Factors, settings: Settings, index: int, memory: Sequence[Tensor]) -> None:
        self.factors = factors
        self.H, self.Z, self.N = settings.hidden_width, settings.latent_width, sum(factors.sizes)
        self.steps = 0
        self.parameters, self.exp_avg, self.exp_avg_sq = memory
        start_parameters(self.parameters, factors, settings, index)
        self.decay = torch.ones(self.H, dtype=torch.float64)
        self.moving = torch.zeros(self.H, dtype=torch.uint8)
        self.measured: tuple[Tensor, int] | None = None  # the core's last report of all layers, where this one's begins

    @classmethod
    def make_all(cls, factors: Sequence[Factors], settings: Settings) -> list["ExactState"]:
        """The generators of all layers; the parameters of all lie in one piece of memory, and so do their moments."""
        pieces: dict[torch.dtype, list[Iterator[Tensor]]] = {}
        for dtype in {f.dtype for f in factors}:
            counts = [count_parameters(f, settings) for f in factors if f.dtype == dtype]
            pieces[dtype] = [
                iter(allocate(sum(counts), dtype, huge_pages=is_w2).split(counts)) for is_w2 in (True, False, False)
            ]
        return [cls(f, settings, i, [next(piece) for piece in pieces[f.dtype]]) for i, f in enumerate(factors)]

    @property
    def name(self) -> str:
        return self.factors.layer.name

    @property
    def report_size(self) -> int:
        return 3 + 2 * self.H

    @property
    def report(self) -> Tensor | None:
        """The core's numbers of the last step; oplora_core.h says what is where."""
        if self.measured is None:
            return None
        everything, begin = self.measured
        return everything[begin : begin + self.report_size]

    def generate(self) -> list[Tensor]:
        """v, a piece for each factor, without their bases."""
        pieces = [torch.empty(size, dtype=self.factors.dtype) for size in self.factors.sizes]
        _generate([self], pieces, [None] * len(pieces))
        return pieces

    def begin(self, keep: bool) -> None:
        """Ties the factors to the generator: they keep their values, or take what is generated."""
        if keep:
            self.factors.keep(self.generate())
        else:
            write_factors([self])

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; the tensors are the live ones, as in torch's optimizers."""
        return {
            "shapes": [list(shape) for shape in self.factors.shapes],
            "tensors": list(self.factors.layer.tensors),
            "hidden_width": self.H,
            "latent_width": self.Z,
            "step": self.steps,
            "parameters": self.parameters,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "decay": self.decay,
            "moving": self.moving,
            **self.factors.state_dict(),
        }

    def check_state(self, saved: Any) -> None:
        """Raises unless load_state(saved) will go through; changes nothing."""
        mine = self.state_dict()
        if not isinstance(saved, dict) or (missing := mine.keys() - saved.keys()):
            what = f"lacks {', '.join(sorted(missing))}" if isinstance(saved, dict) else f"is a {type(saved).__name__}"
            raise OPLoRAValueError(f"oplora: the saved state of layer {self.name} {what}; it is not of state='exact'.")
        for key in ("tensors", "shapes", "hidden_width", "latent_width"):
            theirs = [list(s) for s in saved[key]] if key == "shapes" else saved[key]
            if theirs != mine[key]:
                raise OPLoRAValueError(
                    f"oplora: the saved state of layer {self.name} has {key} {theirs}, the model {mine[key]}. "
                    "Build the adapter and the optimizer with the settings of the run that was saved."
                )
        for key in ("parameters", "exp_avg", "exp_avg_sq", "decay", "moving"):
            _check_like(f"{key} of layer {self.name}", saved[key], mine[key])
        self.factors.check_state(saved)
        if not isinstance(saved["step"], int) or saved["step"] < 0:
            raise OPLoRAValueError(f"oplora: the saved step count of layer {self.name} is {saved['step']!r}.")

    def load_state(self, saved: dict[str, Any]) -> None:
        for key in ("parameters", "exp_avg", "exp_avg_sq", "decay", "moving"):
            getattr(self, key).copy_(saved[key])
        self.steps = saved["step"]
        self.measured = None
        self.factors.load_state(saved)


def _check_like(what: str, saved: Any, mine: Tensor) -> None:
    if not isinstance(saved, Tensor):
        raise OPLoRATypeError(f"oplora: the saved {what} is a {type(saved).__name__}, expected a tensor.")
    if saved.shape != mine.shape or saved.dtype != mine.dtype:
        raise OPLoRAValueError(
            f"oplora: the saved {what} is {saved.dtype} of shape {tuple(saved.shape)}, expected {mine.dtype} of shape "
            f"{tuple(mine.shape)}. It was saved from another model, rank, width or dtype."
        )


# ---- all layers in one call of the core ----


@dataclass
class Layers:
    """Layers of one dtype that go through the core together: their states, and factor by factor the tensors."""

    states: list[ExactState]
    parameters: list[torch.nn.Parameter]
    gradients: list[Tensor]

    def add(self, state: ExactState, parameters: list[torch.nn.Parameter], gradients: list[Tensor]) -> None:
        self.states.append(state)
        self.parameters += parameters
        self.gradients += gradients

    def new_report(self) -> Tensor:
        """Room for the core's numbers of every layer, one behind the other."""
        return torch.zeros(sum(state.report_size for state in self.states), dtype=torch.float64)

    def reports(self, report: Tensor) -> list[Tensor]:
        """A piece a layer."""
        return list(report.split([state.report_size for state in self.states]))


def _sizes(states: Sequence[ExactState]) -> list[int]:
    return [n for s in states for n in (s.H, s.Z, len(s.factors.shapes))]


def _generate(states: Sequence[ExactState], out: list[Tensor], bases: Sequence[Tensor | None]) -> None:
    torch.ops.oplora.exact_generate_([s.parameters for s in states], out, list(bases), _sizes(states))


def _bases(states: Sequence[ExactState]) -> list[Tensor | None]:
    return [base for state in states for base in state.factors.bases]


def _targets(parameters: Sequence[torch.nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
    """Where the core writes: into the factors themselves, or for those of another dtype or layout into buffers."""
    return [p if p.dtype == dtype and p.is_contiguous() else torch.empty(p.shape, dtype=dtype) for p in parameters]


def _finish(states: Sequence[ExactState], parameters: list[torch.nn.Parameter], targets: list[Tensor]) -> None:
    """Rounds what lies in buffers into its factor, and tells autograd and the ties what was written."""
    for parameter, target in zip(parameters, targets, strict=True):
        if target is not parameter:
            parameter.detach().copy_(target)
    torch.autograd.graph.increment_version(parameters)
    begin = 0
    for state in states:
        end = begin + len(state.factors.shapes)
        state.factors.remember_written(parameters[begin:end])
        begin = end


@torch.no_grad()
def write_factors(states: Sequence[ExactState]) -> None:
    """The factors of all layers from their generators."""
    for dtype in {state.factors.dtype for state in states}:
        alike = [state for state in states if state.factors.dtype == dtype]
        parameters = [p for state in alike for p in state.factors.layer.parameters()]
        targets = _targets(parameters, dtype)
        _generate(alike, targets, _bases(alike))
        _finish(alike, parameters, targets)


def measure(layers: Layers) -> Tensor:
    """The core's report (float64; oplora_core.h says what is where, also which gradients are not finite)."""
    report = layers.new_report()
    parameters = [state.parameters for state in layers.states]
    torch.ops.oplora.exact_measure_(parameters, layers.gradients, _sizes(layers.states), report)
    return report


def step(layers: Layers, adamw: list[float], measured: Tensor | None) -> tuple[bool, Tensor]:
    """One AdamW step of all layers and their next factors. A report of `measure` on these gradients saves its pass.

    adamw: oplora_core.h's oplora_adamw, in its order, but for the step.

    Returns whether it was done, which it is not where a gradient is not finite, and the report.
    """
    states = layers.states
    report = layers.new_report() if measured is None else measured
    targets = _targets(layers.parameters, states[0].factors.dtype)
    done = torch.ops.oplora.exact_step_(
        [s.parameters for s in states],
        [s.exp_avg for s in states],
        [s.exp_avg_sq for s in states],
        [s.decay for s in states],
        [s.moving for s in states],
        targets,
        _bases(states),
        layers.gradients,
        _sizes(states),
        adamw * len(states),
        [s.steps + 1 for s in states],
        report,
        measured is not None,
    )
    if done:
        begin = 0
        for state in states:
            state.steps += 1
            state.measured = report, begin
            begin += state.report_size
        _finish(states, layers.parameters, targets)
    return done, report
