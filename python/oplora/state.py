"""What the states of oplora.AdamW have in common: saving and loading, and going through the core together."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .errors import OPLoRATypeError, OPLoRAValueError
from .factors import Factors

__all__ = ["Layers", "State", "by_kind", "check_like", "finish", "kind_of", "step_numbers", "targets"]


class State(ABC):
    """One layer's generator as a state keeps it. KIND is its name for users, KEYS are the tensors that are saved."""

    KIND: str
    KEYS: tuple[str, ...]
    factors: Factors
    H: int
    Z: int
    shared: Any = None  # of a state on a GPU, the Device that counts its steps, in this row
    row: int = 0
    measured: tuple[Tensor, int] | None = None  # the core's last report of all layers, and where this one's begins
    _steps: int = 0

    @property
    def name(self) -> str:
        return self.factors.layer.name

    @property
    def steps(self) -> int:
        """How many steps were done; on a GPU this waits for it."""
        return self._steps if self.shared is None else int(self.shared.steps[self.row])

    @steps.setter
    def steps(self, steps: int) -> None:
        if self.shared is None:
            self._steps = steps
        else:
            self.shared.steps[self.row] = steps

    @property
    @abstractmethod
    def report_size(self) -> int:
        """Numbers of one layer in the core's report."""

    @property
    def report(self) -> Tensor | None:
        """The core's numbers of the last step; oplora_core.h says what is where."""
        if self.measured is None:
            return None
        everything, begin = self.measured
        return everything[begin : begin + self.report_size].cpu()

    @abstractmethod
    def begin(self, keep: Sequence[bool]) -> None:
        """Ties the factors to the generator: each keeps its value, or takes what is generated."""

    @abstractmethod
    def absorb_edits(self, parameters: list[torch.nn.Parameter]) -> bool:
        """Goes on from what somebody wrote into the factors since the last step; whether users should hear of it."""

    @abstractmethod
    def step_numbers(self, report: Tensor) -> tuple[float, float, float, float]:
        """Of a report: ||h||^2, how many units are on, ||g||^2, and ||.||^2 of the hidden path's gradient."""

    @abstractmethod
    def new_layers(self) -> "Layers":
        """The Layers that this kind of state goes through the core with."""

    @abstractmethod
    def stats(self, report: Tensor | None) -> dict[str, float]:
        """What oplora.stats tells of this state alone, beside what it tells of every state; NaN without a report."""

    def settings_saved(self) -> dict[str, Any]:
        """What must be the same in the state that is loaded."""
        return {
            "shapes": [list(shape) for shape in self.factors.shapes],
            "tensors": list(self.factors.layer.tensors),
            "hidden_width": self.H,
            "latent_width": self.Z,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; the tensors are the live ones, as in torch's optimizers."""
        return {
            "state": self.KIND,
            **self.settings_saved(),
            "step": self.steps,
            **{key: getattr(self, key) for key in self.KEYS},
            **self.factors.state_dict(),
        }

    def check_state(self, saved: Any) -> None:
        """Raises unless load_state(saved) will go through; changes nothing."""
        mine = self.state_dict()
        if isinstance(saved, dict) and (kind := saved.get("state", "exact")) != self.KIND:
            raise OPLoRAValueError(
                f"oplora: the saved state of layer {self.name} is of state={kind!r}, this optimizer's is "
                f"{self.KIND!r}. Neither is made into the other: a W2 trained whole is no seeded start and a change of "
                f"low rank. To resume, make the optimizer with state={kind!r}. To go on with state={self.KIND!r}, load "
                "the saved adapter and start anew with init='keep': A and B keep their values, the moments begin at 0."
            )
        if not isinstance(saved, dict) or (missing := mine.keys() - saved.keys() - {"state"}):
            what = f"lacks {', '.join(sorted(missing))}" if isinstance(saved, dict) else f"is a {type(saved).__name__}"
            raise OPLoRAValueError(
                f"oplora: the saved state of layer {self.name} {what}; it is not of state={self.KIND!r}."
            )
        for key, value in self.settings_saved().items():
            theirs = [list(s) for s in saved[key]] if key == "shapes" else saved[key]
            if theirs != value:
                raise OPLoRAValueError(
                    f"oplora: the saved state of layer {self.name} has {key} {theirs}, this optimizer {value}. Build "
                    "the adapter (r, rank_pattern) and the optimizer with the settings of the run that was saved."
                )
        for key in self.KEYS:
            check_like(f"{key} of layer {self.name}", saved[key], mine[key])
        self.factors.check_state(saved)
        if not isinstance(saved["step"], int) or saved["step"] < 0:
            raise OPLoRAValueError(f"oplora: the saved step count of layer {self.name} is {saved['step']!r}.")

    def load_state(self, saved: dict[str, Any]) -> None:
        for key in self.KEYS:
            getattr(self, key).copy_(saved[key])
        self.steps = saved["step"]
        self.measured = None
        self.factors.load_state(saved)

    def take_over(self, old: Any) -> None:
        """Goes on from where `old`, the same layer's state on another device, is."""
        for key in self.KEYS:
            getattr(self, key).copy_(getattr(old, key))
        self.steps = old.steps


def check_like(what: str, saved: Any, mine: Tensor) -> None:
    if not isinstance(saved, Tensor):
        raise OPLoRATypeError(f"oplora: the saved {what} is a {type(saved).__name__}, expected a tensor.")
    if saved.shape != mine.shape or saved.dtype != mine.dtype:
        raise OPLoRAValueError(
            f"oplora: the saved {what} is {saved.dtype} of shape {tuple(saved.shape)}, expected {mine.dtype} of shape "
            f"{tuple(mine.shape)}. It was saved from another model, rank, width or dtype."
        )


class Layers(ABC):
    """Layers of one dtype that go through the core together: their states, and factor by factor the tensors."""

    def __init__(self) -> None:
        self.states: list[Any] = []
        self.parameters: list[torch.nn.Parameter] = []
        self.gradients: list[Tensor] = []
        self.sources: list[Tensor] = []

    def add(
        self, state: State, parameters: list[torch.nn.Parameter], gradients: list[Tensor], sources: list[Tensor]
    ) -> None:
        """sources: the tensors that the gradients were made from, or are: what the Parameters hold."""
        self.states.append(state)
        self.parameters += parameters
        self.gradients += gradients
        self.sources += sources

    @abstractmethod
    def measure(self) -> Tensor:
        """The core's report of these gradients (float64; oplora_core.h says what is where, also which are not finite).

        The next step() takes it instead of measuring again.
        """

    @abstractmethod
    def step(self, adamw: Sequence[float | Tensor], report: Tensor | None) -> tuple[bool, Tensor]:
        """One AdamW step of all layers and their next factors. The report of `measure` saves a pass.

        adamw: lr, weight_ratio, hidden_lr, beta1, beta2, eps, weight_decay.

        Returns whether it was done, which it is not where a gradient is not finite, and the report.
        """

    @abstractmethod
    def square(self, report: Tensor) -> Tensor:
        """||.||^2 of each generator's gradient: ||g||^2 (||h||^2 + 1) for W2 and c2, and that of the hidden path."""

    @abstractmethod
    def scale(self, report: Tensor, scale: Tensor) -> None:
        """Makes of a measured report what it would have been for gradients times `scale`."""

    def new_report(self) -> Tensor:
        """Room for the core's numbers of every layer, one behind the other."""
        size = sum(state.report_size for state in self.states)
        return torch.zeros(size, dtype=torch.float64, device=self.states[0].factors.device)

    def reports(self, report: Tensor) -> list[Tensor]:
        """A piece a layer."""
        return list(report.split([state.report_size for state in self.states]))

    def nonfinite(self, report: Tensor) -> list[str]:
        """The layers whose gradients hold NaN or infinity."""
        pieces = zip(self.states, self.reports(report.cpu()), strict=True)
        return [f"layer {state.name}" for state, piece in pieces if piece[1] != 0]

    def bases(self) -> list[Tensor | None]:
        return [base for state in self.states for base in state.factors.bases]

    def count_step(self, state: State) -> None:
        state.steps += 1

    def remember_step(self, report: Tensor) -> None:
        begin = 0
        for state in self.states:
            self.count_step(state)
            state.measured = report, begin
            begin += state.report_size


def kind_of(factors: Factors) -> tuple[torch.dtype, torch.device]:
    """What layers have in common that go through the core together."""
    return factors.dtype, factors.device


def by_kind(factors: Sequence[Factors]) -> dict[tuple[torch.dtype, torch.device], list[Factors]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[Factors]] = {}
    for some in factors:
        kinds.setdefault(kind_of(some), []).append(some)
    return kinds


def step_numbers(states: Sequence[State], adamw: Sequence[float | Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """adamw, rates and rows as the core's ops take them: AdamW's numbers of every layer and of every factor."""
    lr, *numbers, weight_decay = adamw
    counts = [len(state.factors.shapes) for state in states]
    table = torch.tensor([*numbers, weight_decay, 0.0], dtype=torch.float64).repeat(len(states), 1)
    table.view(torch.int64)[:, -1] = torch.tensor([state.steps for state in states])
    rates = torch.tensor([lr, weight_decay], dtype=torch.float64).repeat(sum(counts), 1)
    firsts = accumulate(counts[:-1], initial=0)
    return table, rates, torch.tensor([n for row in enumerate(firsts) for n in row]).view(-1, 2)


def targets(parameters: Sequence[torch.nn.Parameter], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Where the core writes: into the factors themselves, or for those of another dtype or layout into buffers."""
    return [
        p
        if p.dtype == dtype and p.device == device and p.is_contiguous()
        else torch.empty(p.shape, dtype=dtype, device=device)
        for p in parameters
    ]


def finish(states: Sequence[State], parameters: list[torch.nn.Parameter], written: Sequence[Tensor]) -> None:
    """Rounds what lies in buffers into its factor, and tells autograd and the ties what was written."""
    for parameter, target in zip(parameters, written, strict=True):
        if target is not parameter:
            parameter.detach().copy_(target)
    torch.autograd.graph.increment_version(parameters)
    begin = 0
    for state in states:
        end = begin + len(state.factors.shapes)
        state.factors.remember_written(parameters[begin:end])
        begin = end
