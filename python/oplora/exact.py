"""State "exact": a generator's five tensors and their two AdamW moments in full, stepped by the C core.

12 bytes an element of W2 (float32), and nothing else of its size at any time: the gradient of W2 is never stored, and
pages of moments that no step has touched (units that never fired) are not resident.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import ops  # noqa: F401  (loads the ops that are called below)
from .adapters import Factors
from .start import Settings, allocate, count_parameters, start_parameters
from .state import Layers, State, finish, targets

__all__ = ["ExactLayers", "ExactState"]


class ExactState(State):
    """One layer's generator with its moments, its step count, and what its still columns owe to weight decay."""

    KIND = "exact"
    KEYS = ("parameters", "exp_avg", "exp_avg_sq", "decay", "moving")

    def __init__(self, factors: Factors, settings: Settings, index: int, memory: Sequence[Tensor]) -> None:
        self.factors = factors
        self.H, self.Z, self.N = settings.hidden_width, settings.latent_width, sum(factors.sizes)
        self.steps = 0
        self.parameters, self.exp_avg, self.exp_avg_sq = memory
        start_parameters(self.parameters, factors, settings, index)
        self.decay = torch.ones(self.H, dtype=torch.float64)
        self.moving = torch.zeros(self.H, dtype=torch.uint8)

    @staticmethod
    def bytes_needed(factors: Factors, settings: Settings) -> int:
        return 3 * count_parameters(factors, settings) * factors.dtype.itemsize

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
    def report_size(self) -> int:
        return 3 + 2 * self.H

    def generate(self) -> list[Tensor]:
        """v, a piece for each factor, without their bases."""
        pieces = [torch.empty(size, dtype=self.factors.dtype) for size in self.factors.sizes]
        _generate([self], pieces, [None] * len(pieces))
        return pieces

    @torch.no_grad()
    def begin(self, keep: bool) -> None:
        if keep:
            self.factors.keep(self.generate())
            return
        parameters = self.factors.layer.parameters()
        written = targets(parameters, self.factors.dtype)
        _generate([self], written, self.factors.bases)
        finish([self], parameters, written)

    def absorb_edits(self, parameters: list[torch.nn.Parameter]) -> bool:
        return self.factors.adopt_edits(parameters, self.generate)

    def step_numbers(self) -> tuple[float, float, float, float]:
        if (report := self.report) is None:
            return math.nan, math.nan, math.nan, math.nan
        h = report[3 : 3 + self.H]
        return float(h.square().sum()), int(h.count_nonzero()), float(report[0]), float(report[2])

    def stats(self) -> dict[str, float]:
        return {}

    @staticmethod
    def new_layers() -> "ExactLayers":
        return ExactLayers()


class ExactLayers(Layers):
    def measure(self) -> Tensor:
        report = self.new_report()
        parameters = [state.parameters for state in self.states]
        torch.ops.oplora.exact_measure_(parameters, self.gradients, _sizes(self.states), report)
        return report

    def step(self, adamw: list[float], report: Tensor | None) -> tuple[bool, Tensor]:
        states, measured = self.states, report is not None
        if report is None:
            report = self.new_report()
        written = targets(self.parameters, states[0].factors.dtype)
        done = torch.ops.oplora.exact_step_(
            [s.parameters for s in states],
            [s.exp_avg for s in states],
            [s.exp_avg_sq for s in states],
            [s.decay for s in states],
            [s.moving for s in states],
            written,
            self.bases(),
            self.gradients,
            _sizes(states),
            adamw * len(states),
            [s.steps + 1 for s in states],
            report,
            measured,
        )
        if done:
            self.remember_step(report)
            finish(states, self.parameters, written)
        return done, report

    def square(self, report: Tensor) -> float:
        total = 0.0
        for state, piece in zip(self.states, self.reports(report), strict=True):
            h = piece[3 : 3 + state.H]
            total += float(piece[0]) * (float(h @ h) + 1.0) + float(piece[2])
        return total

    def scale(self, report: Tensor, scale: float) -> None:
        for state, piece in zip(self.states, self.reports(report), strict=True):
            piece[0] *= scale**2
            piece[2] *= scale**2
            piece[3 + state.H :] *= scale  # dL/dh; h before it stays


def _sizes(states: Sequence[ExactState]) -> list[int]:
    return [n for s in states for n in (s.H, s.Z, len(s.factors.shapes))]


def _generate(states: Sequence[ExactState], out: list[Tensor], bases: Sequence[Tensor | None]) -> None:
    torch.ops.oplora.exact_generate_([s.parameters for s in states], out, list(bases), _sizes(states))
