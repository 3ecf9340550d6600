"""State "rate": one hidden unit for all layers, whose gradient finds the learning rate; the factors are averages.

A factor entry costs 8 bytes beside the factor and its gradient, as LoRA's does under AdamW: what is generated, and the
second moment. docs/rate.md derives it, csrc/core/adamw_rate.c computes it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from .. import ops  # noqa: F401  (loads the ops that are called below)
from ..adapters import STARTS, Start
from .engine import Batch, Engine, LayerState, State, StepNumbers
from .factors import Factors
from .memory import CPU, allocate
from .settings import Settings

__all__ = ["FOUND", "Rate"]

REPORT = 5

# of `found`, as csrc/shared/find_rate.h has it and moves it
FOUND: Final = ("rate", "signal", "scale", "recent", "steps", "pace", "turned")
START: Final = 1e-4  # of the rate: below what any model was seen to want
FIRST_PACE: Final = 0.7  # in the logarithm of the rate, a step; halved at each turn


class Rate(State):
    """The arenas `generated` and `exp_avg_sq`, layer after layer, and `found`.

    Factors are in- and output. Where one is of another dtype than the state (a bfloat16 model), a master holds its
    value before rounding, as small steps would be lost otherwise.
    """

    KIND = "rate"
    KEYS = ("generated", "exp_avg_sq", "found")
    IS_LINEAR = False
    DOUBTS = False

    def __init__(self, ties: Sequence[Factors], settings: Settings) -> None:
        self.ties, self.settings = ties, settings
        dtype, device = ties[0].dtype, ties[0].device
        self._begins = list(accumulate((sum(tie.sizes) for tie in ties), initial=0))
        self.generated, self.exp_avg_sq = (allocate(self._begins[-1], dtype, device, huge_pages=True) for _ in range(2))
        self.found = torch.tensor([START, 0.0, 0.0, 0.0, 0.0, FIRST_PACE, 0.0], dtype=torch.float64, device=device)
        self.sizes = torch.tensor(
            [[len(tie.shapes), begin] for tie, begin in zip(ties, self._begins, strict=False)],
            dtype=torch.int64,
            device=CPU,
        )
        self._first = list(accumulate((len(tie.shapes) for tie in ties), initial=0))  # factor of each layer
        self.listens = torch.zeros(self._first[-1], dtype=torch.int64, device=CPU)
        self._listening = torch.zeros(len(ties), dtype=torch.int64, device=device)  # of each layer the first that does
        for i, tie in enumerate(ties):
            self._set_listens(i, _listening(tie))

    @staticmethod
    def bytes_needed(tie: Factors) -> int:
        return 2 * sum(tie.sizes) * tie.dtype.itemsize

    # ---- what is where ----

    def report_size(self, i: int) -> int:
        return REPORT

    def pieces(self, i: int) -> dict[str, Tensor]:
        begin, end = self._begins[i], self._begins[i + 1]
        return {"generated": self.generated[begin:end], "exp_avg_sq": self.exp_avg_sq[begin:end], "found": self.found}

    def of_tensors(self, i: int) -> list[dict[str, Tensor]]:
        """generated: v, of which the tensor is the average; exp_avg_sq: the second moment of its gradient."""
        held, row = [], self._begins[i]
        for shape in self.ties[i].shapes:
            end = row + shape.numel()
            held.append({key: getattr(self, key)[row:end].view(shape) for key in ("generated", "exp_avg_sq")})
            row = end
        return held

    def of_layer(self, i: int) -> dict[str, Any]:
        """found is the whole model's. listens has a bit for each tensor."""
        return {"found": self.found, "listens": sum(bit << f for f, bit in enumerate(self.listening(i)))}

    def take_settings(self, i: int, saved: dict[str, Any]) -> None:
        self._set_listens(i, [bool(saved["listens"] >> f & 1) for f in range(len(self.ties[i].shapes))])

    def listening(self, i: int) -> list[bool]:
        """Which of layer i's tensors tell how the rate is."""
        return [bool(bit) for bit in self.listens[self._first[i] : self._first[i + 1]].tolist()]

    def _set_listens(self, i: int, listens: Sequence[bool]) -> None:
        self.listens[self._first[i] : self._first[i + 1]] = torch.tensor(listens, dtype=torch.int64, device=CPU)
        self._listening[i] = self._first[i] + listens.index(True)

    def forget_moments(self, i: int) -> None:
        """An average of no steps is what the factor holds; the rate is known."""
        for piece, parameter in zip(self.of_tensors(i), self.ties[i].layer.parameters(), strict=True):
            piece["generated"].copy_(parameter.detach())
        self.found[1:4] = 0

    # ---- the core's calls ----

    def measure(self, batch: Batch, factors: list[Tensor], gradients: list[Tensor], report: Tensor) -> None:
        torch.ops.oplora.rate_measure_(
            self.generated, self.exp_avg_sq, factors, batch.bases(), gradients, *self._tables(batch), report
        )

    def step(
        self, batch: Batch, out: list[Tensor], gradients: list[Tensor], numbers: Any, report: Tensor, measured: bool
    ) -> bool:
        assert measured, "the rate is found between measuring and stepping"
        done: bool = torch.ops.oplora.rate_step_(
            self.generated,
            self.exp_avg_sq,
            out,
            gradients,
            *self._tables(batch),
            report,
            self.found,
        )
        return done

    def plan(
        self, batch: Batch, factors: Any, rounded: Any, bases: Any, gradients: Any, numbers: Any, verdict: Tensor
    ) -> Any:
        """The op's plan, table and workspace, for a GPU."""
        return torch.ops.oplora.cuda_rate_plan(
            self.generated,
            self.exp_avg_sq,
            self.found,
            factors,
            rounded,
            bases,
            gradients,
            *self._tables(batch),
            verdict,
            batch.report,
        )

    def _tables(self, batch: Batch) -> tuple[Tensor, ...]:
        """sizes and listens of the batch's layers; the numbers of their steps, and which of them are theirs."""
        listens = self.listens if batch.is_whole else self.listens[batch.factors]
        numbers = batch.engine.numbers
        return batch.sizes, listens, numbers.adamw, numbers.rates, batch.rows

    # ---- what the gradients tell of the rate ----

    def heard(self, batch: Batch, report: Tensor) -> Tensor:
        """(layers of the batch, 3): <g, v - start>, <g, u> times the lr of what listens over the highest lr of all
        groups, and <g, v - p>."""
        listening = self._listening if batch.is_whole else self._listening.index_select(0, batch.places)
        numbers = batch.engine.numbers
        heard: Tensor = torch.ops.oplora.rate_heard(report, numbers.rates, listening, numbers.groups)
        return heard

    def find(self, heard: Tensor, refused: Tensor | None) -> None:
        """Moves the rate by what all layers of the model tell, (layers, 3); not where `refused` is not 0."""
        torch.ops.oplora.find_rate_(self.found, heard, refused)

    # ---- numbers to watch ----

    def speaker(self, i: int) -> int:
        """The first that listens."""
        return self.listening(i).index(True)

    def step_numbers(self, report: Tensor) -> StepNumbers:
        nan = float("nan")
        return StepNumbers(nan, nan, report[:1].tolist()[0], nan, nan)

    def stats(self, report: Tensor | None) -> dict[str, float]:
        return {}

    def square(self, batch: Batch, report: Tensor) -> Tensor:
        """The factors' own: h has the signal for a gradient, which no step follows in its size."""
        return report.view(-1, REPORT)[:, 0].clone()

    def scale(self, batch: Batch, report: Tensor, scale: Tensor) -> None:
        """Scaled gradients are measured again: u is not linear in them."""

    # ---- other hands on the factors ----

    def watches(self, engine: Engine) -> bool:
        """An average that somebody has replaced is no average of what is generated any more."""
        return True

    def begin(self, state: LayerState) -> None:
        """Every tensor keeps its value, which is what is generated."""
        self._go_on_from(state, state.factors.layer.parameters())

    def absorb(self, state: LayerState, parameters: list[Any]) -> bool:
        """A new value is what is generated, and the average of no other."""
        self.replace(state, parameters, [*map(self._is_edited, parameters, state.masters)])
        return False

    def beside(self, i: int, f: int) -> list[Tensor]:
        return list(self.of_tensors(i)[f].values())

    def unseen(self, state: LayerState, parameters: Sequence[Any]) -> list[dict[str, Any]]:
        found = list[dict[str, Any]]()
        for i, (parameter, master) in enumerate(zip(parameters, state.masters, strict=True)):
            if not self._is_edited(parameter, master):
                found.append({})
                continue
            value = state.copied(parameter.detach())
            of_master = {} if master is None else {"master": value}
            found.append({"generated": value, "base": self._start(state, i, value), **of_master})
        return found

    @staticmethod
    def _is_edited(parameter: Tensor, master: Tensor | None) -> bool:
        """Of a layer in which something was. A factor that holds its master's rounding was not written into."""
        return master is None or not torch.equal(master.to(parameter.dtype), parameter.detach())

    def replace(self, state: LayerState, parameters: Sequence[Any], edited: Sequence[bool]) -> None:
        for i, (parameter, is_other) in enumerate(zip(parameters, edited, strict=True)):
            if is_other and state.masters[i] is not None:
                state.keep_master(i, parameter.detach())
        self._go_on_from(state, parameters, edited)

    def _go_on_from(self, state: LayerState, parameters: Sequence[Any], edited: Sequence[bool] | None = None) -> None:
        for i, (piece, parameter) in enumerate(zip(self.of_tensors(state.index), parameters, strict=True)):
            if edited is not None and not edited[i]:
                continue
            value = piece["generated"].copy_(parameter.detach())
            state.factors.bases[i] = self._start(state, i, value)

    def _start(self, state: LayerState, i: int, value: Tensor) -> Tensor | None:
        """What a tensor that goes on from `value` is heard against; None: zero, or it is not heard."""
        is_heard = bool(self.listens[self._first[state.index] + i])
        return value.clone() if is_heard and state.factors.has_start(i, value) else None


def _listening(tie: Factors) -> list[bool]:
    """Whether <g, v - start> of each tensor is heard: of those that start at zero, as their start need not be kept; of
    all where none does. In LoRA <g_A, A> = <g_B, B>, so B tells of both."""
    at_zero = [STARTS[tensor] is Start.ZERO for tensor in tie.layer.tensors]
    if not any(at_zero):
        at_zero = [not tie.has_start(i, p.detach()) for i, p in enumerate(tie.layer.parameters())]
    return at_zero if any(at_zero) else [True] * len(at_zero)
