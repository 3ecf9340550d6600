"""State "exact": a generator's five tensors and their two AdamW moments in full, stepped by the C core or on a GPU.

12 bytes an element of W2 (float32), and nothing else of its size at any time: the gradient of W2 is never stored, and
pages of moments that no step has touched (units that never fired) are not resident.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (loads the ops that are called below)
from .device import DeviceLayers, Plan, PlanTensors, runs_on_device, share_devices
from .factors import Factors
from .staging import Staging
from .start import Settings, allocate, count_parameters, start_parameters
from .state import Layers, State, by_kind, finish, kind_of, step_numbers, targets

__all__ = ["ExactLayers", "ExactState"]


class ExactState(State):
    """One layer's generator with its moments, its step count, and what its still columns owe to weight decay."""

    KIND = "exact"
    KEYS = ("parameters", "exp_avg", "exp_avg_sq", "decay", "moving")

    def __init__(self, factors: Factors, settings: Settings, arenas: "Arenas") -> None:
        self.factors, self.arenas = factors, arenas
        self.H, self.Z, self.N = settings.hidden_width, settings.latent_width, sum(factors.sizes)
        views, self.offsets = arenas.next_views()
        self.parameters, self.exp_avg, self.exp_avg_sq, decay, self.moving = views
        self.decay = decay.view(len(factors.shapes), self.H)
        start_parameters(self.parameters, factors, settings)
        self.staging: Staging | None = None

    @staticmethod
    def bytes_needed(factors: Factors, settings: Settings) -> int:
        return 3 * count_parameters(factors, settings) * factors.dtype.itemsize

    @classmethod
    def make_all(cls, factors: Sequence[Factors], settings: Settings) -> list["ExactState"]:
        """The generators of all layers; the parameters of those of one dtype and device lie in one piece of memory, and
        so do their moments."""
        arenas = {kind: Arenas(some, settings, *kind) for kind, some in by_kind(factors).items()}
        states = [cls(f, settings, arenas[kind_of(f)]) for f in factors]
        share_devices(states)
        return states

    @property
    def report_size(self) -> int:
        return 3 + 2 * self.H

    def generate(self) -> list[Tensor]:
        """v, a piece for each factor, without their bases."""
        dtype, device = self.factors.dtype, self.factors.device
        pieces = [torch.empty(size, dtype=dtype, device=device) for size in self.factors.sizes]
        _generate([self], pieces, [None] * len(pieces))
        return pieces

    @torch.no_grad()
    def begin(self, keep: Sequence[bool]) -> None:
        self.factors.begin(self.generate(), keep)

    def absorb_edits(self, parameters: list[torch.nn.Parameter]) -> bool:
        return self.factors.adopt_edits(parameters, self.generate)

    def check_state(self, saved: Any) -> None:
        super().check_state(self._with_decay_of_factors(saved))

    def load_state(self, saved: dict[str, Any]) -> None:
        super().load_state(self._with_decay_of_factors(saved))

    def _with_decay_of_factors(self, saved: Any) -> Any:
        """Earlier versions saved one decay for the rows of all factors."""
        decay = saved.get("decay") if isinstance(saved, dict) else None
        if not isinstance(decay, Tensor) or decay.shape != (self.H,):
            return saved
        return {**saved, "decay": decay.expand(self.decay.shape)}

    def step_numbers(self, report: Tensor) -> tuple[float, float, float, float]:
        h = report[3 : 3 + self.H]
        return float(h.square().sum()), int(h.count_nonzero()), float(report[0]), float(report[2])

    def stats(self, report: Tensor | None) -> dict[str, float]:
        return {}

    def new_layers(self) -> "ExactLayers":
        if self.shared is not None:
            return ExactDeviceLayers()
        return StagedLayers() if runs_on_device(self.factors.placed) else ExactLayers()


class Arenas:
    """The memory of all layers of one dtype and device: a tensor for each of a state's KEYS."""

    def __init__(
        self, factors: Sequence[Factors], settings: Settings, dtype: torch.dtype, device: torch.device
    ) -> None:
        H = settings.hidden_width
        counts = [(count_parameters(f, settings), len(f.shapes) * H, H) for f in factors]
        numbers, decays, units = (sum(column) for column in zip(*counts, strict=True))
        self.tensors = (
            *(allocate(numbers, dtype, device, huge_pages=is_w2) for is_w2 in (True, False, False)),
            torch.ones(decays, dtype=torch.float64, device=device),
            torch.zeros(units, dtype=torch.uint8, device=device),
        )
        self._views = iter(list(self._cut(counts)))  # a generator could not be copied

    def _cut(self, counts: Sequence[tuple[int, int, int]]) -> Iterator[tuple[list[Tensor], list[int]]]:
        at = [0, 0, 0]
        for some in counts:
            places = [0, 0, 0, 1, 2]
            yield (
                [t[at[place] : at[place] + some[place]] for t, place in zip(self.tensors, places, strict=True)],
                list(at),
            )
            at = [begin + count for begin, count in zip(at, some, strict=True)]

    def next_views(self) -> tuple[list[Tensor], list[int]]:
        return next(self._views)


class ExactLayers(Layers):
    def measure(self) -> Tensor:
        report = self.new_report()
        parameters = self.states[0].arenas.tensors[0]
        torch.ops.oplora.exact_measure_(parameters, self.inputs(), _sizes(self.states), report)
        return report

    def inputs(self) -> list[Tensor]:
        """The gradients where the core reads them."""
        return self.gradients

    def write(self, written: list[Tensor]) -> None:
        """Brings what the core wrote into the factors."""
        finish(self.states, self.parameters, written)

    def targets(self) -> list[Tensor]:
        """Where the core writes the factors."""
        factors = self.states[0].factors
        return targets(self.parameters, factors.dtype, factors.device)

    def step(self, adamw: Sequence[float | Tensor], report: Tensor | None) -> tuple[bool, Tensor]:
        states, measured = self.states, report is not None
        if report is None:
            report = self.new_report()
        written = self.targets()
        done = torch.ops.oplora.exact_step_(
            *states[0].arenas.tensors,
            written,
            self.bases(),
            self.inputs(),
            _sizes(states),
            *step_numbers(states, adamw),
            report,
            measured,
        )
        if done:
            self.remember_step(report)
            self.write(written)
        return done, report

    def square(self, report: Tensor) -> Tensor:
        numbers, H = self._by_layer(report)
        h_square = numbers[:, 3 : 3 + H].square().sum(1)
        return numbers[:, 0] * (h_square + 1.0) + numbers[:, 2]

    def scale(self, report: Tensor, scale: Tensor) -> None:
        numbers, H = self._by_layer(report)
        numbers[:, 0] *= scale**2
        numbers[:, 2] *= scale**2
        numbers[:, 3 + H :] *= scale  # dL/dh; h before it stays

    def _by_layer(self, report: Tensor) -> tuple[Tensor, int]:
        """A row a layer, and H, which is one for all."""
        return report.view(len(self.states), -1), self.states[0].H


class StagedLayers(ExactLayers):
    """Factors on a GPU and generators in host memory: the C core makes the step, and only the gradients and the factors
    cross the bus. The host waits for the gradients."""

    def inputs(self) -> list[Tensor]:
        buffers = [buffer for staging in self._stagings() for buffer in staging.g]
        Staging.fetch(self.gradients, buffers)
        return buffers

    def targets(self) -> list[Tensor]:
        return [buffer for staging in self._stagings() for buffer in staging.v]

    def write(self, written: list[Tensor]) -> None:
        Staging.send(written, [parameter.detach() for parameter in self.parameters])
        finish(self.states, self.parameters, self.parameters)

    def _stagings(self) -> list[Staging]:
        for state in self.states:
            if state.staging is None:
                state.staging = Staging(state.factors.shapes, state.factors.dtype, state.factors.placed)
        return [state.staging for state in self.states]


class ExactDeviceLayers(DeviceLayers, ExactLayers):
    def make_plan(self, tensors: PlanTensors) -> tuple[Tensor, Tensor, Tensor]:
        factors = (tensors.factors, tensors.rounded, self.bases(), tensors.gradients)
        return _plan(self.states, *factors, tensors.report)

    def values(self) -> list[Tensor | None]:
        return [None] * len(self.parameters)

    def launch_measure(self, plan: Plan) -> None:
        torch.ops.oplora.cuda_exact_measure_(*plan.arguments())

    def launch_step(self, plan: Plan, veto: Tensor | None, measured: bool) -> None:
        torch.ops.oplora.cuda_exact_step_(*plan.arguments(), veto, measured)


def _sizes(states: Sequence[ExactState]) -> Tensor:
    sizes = [n for s in states for n in (s.H, s.Z, len(s.factors.shapes), *s.offsets)]
    return torch.tensor(sizes).view(len(states), -1)


def _plan(
    states: Sequence[ExactState],
    factors: Sequence[Tensor | None],
    rounded: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    report: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    shared = states[0].shared
    plan: tuple[Tensor, Tensor, Tensor] = torch.ops.oplora.cuda_exact_plan(
        *states[0].arenas.tensors,
        factors,
        rounded,
        bases,
        gradients,
        _sizes(states),
        shared.adamw,
        shared.rates,
        shared.rows([s.row for s in states]),
        shared.verdict,
        report,
    )
    return plan


def _generate(states: Sequence[ExactState], out: list[Tensor], bases: Sequence[Tensor | None]) -> None:
    if states[0].shared is None:
        torch.ops.oplora.exact_generate_(states[0].arenas.tensors[0], out, list(bases), _sizes(states))
        return
    size = sum(state.report_size for state in states)
    report = torch.zeros(size, dtype=torch.float64, device=states[0].shared.device)
    plan, table, workspace = _plan(states, out, [None] * len(out), list(bases), [], report)
    torch.ops.oplora.cuda_exact_generate_(plan, table.to(states[0].shared.device), workspace)
