"""State "exact": a generator's five tensors and their two AdamW moments in full.

12 bytes an element of W2 (float32), and nothing else of its size at any time: the gradient of W2 is never stored, and
pages of moments that no step has touched (units that never fired) are not resident.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops  # noqa: F401  (loads the ops that are called below)
from .engine import Batch, Engine, LayerState, State, StepNumbers
from .factors import Factors, places_of
from .memory import CPU, allocate, columns
from .settings import Settings, count_parameters, start_parameters

__all__ = ["Exact"]


class Exact(State):
    """Arenas of all layers' parameters and moments; of every column of W2 what it owes to weight decay (`decay`, for
    the rows of each factor) while it stands still, and whether it moves (`moving`). Factors are an output alone."""

    KIND = "exact"
    KEYS = ("parameters", "exp_avg", "exp_avg_sq", "decay", "moving")
    STARTS_FROM_FACTORS = False

    def __init__(self, ties: Sequence[Factors], settings: Settings) -> None:
        self.ties, self.settings = ties, settings
        dtype, device, H = ties[0].dtype, ties[0].device, settings.hidden_width
        self.counts = [count_parameters(tie, settings) for tie in ties]
        self.parameters, self.exp_avg, self.exp_avg_sq = (
            allocate(sum(self.counts), dtype, device, huge_pages=is_w2) for is_w2 in (True, False, False)
        )
        n_factors = sum(len(tie.shapes) for tie in ties)
        self.decay = torch.ones(n_factors * H, dtype=torch.float64, device=device)
        self.moving = torch.zeros(len(ties) * H, dtype=torch.uint8, device=device)
        sizes, at, factor = [], 0, 0
        for i, (tie, count) in enumerate(zip(ties, self.counts, strict=True)):
            sizes.append([H, settings.latent_width, len(tie.shapes), at, factor * H, i * H])
            start_parameters(self.parameters[at : at + count], tie, settings)
            at, factor = at + count, factor + len(tie.shapes)
        self.sizes, self._begins = torch.tensor(sizes, dtype=torch.int64, device=CPU), [row[3] for row in sizes]
        self.places = places_of(ties)

    @staticmethod
    def bytes_needed(tie: Factors, settings: Settings) -> int:
        return 3 * count_parameters(tie, settings) * tie.dtype.itemsize

    # ---- what is where ----

    def report_size(self, i: int) -> int:
        return 3 + 2 * self.settings.hidden_width

    def pieces(self, i: int) -> dict[str, Tensor]:
        H, _, n, flat, decay, moving = self.sizes[i].tolist()
        begins = (flat, flat, flat, decay, moving)
        counts = (self.counts[i], self.counts[i], self.counts[i], n * H, H)
        sizes = zip(self.KEYS, begins, counts, strict=True)
        return {key: getattr(self, key)[begin : begin + count] for key, begin, count in sizes}

    def of_tensors(self, i: int) -> list[dict[str, Tensor]]:
        """weight: the columns of W2 (H of them), then c2; exp_avg and exp_avg_sq likewise."""
        N, begin, H = sum(self.ties[i].sizes), self._begins[i], self.settings.hidden_width
        arenas = {"weight": self.parameters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        held, row = [], begin
        for shape in self.ties[i].shapes:
            held.append({name: columns(arena, row, H + 1, N, shape) for name, arena in arenas.items()})
            row += shape.numel()
        return held

    def of_layer(self, i: int) -> dict[str, Any]:
        """hidden and its moments are W1, c1 and z one behind the other."""
        pieces, H, n = self.pieces(i), self.settings.hidden_width, len(self.ties[i].shapes)
        begin = (H + 1) * sum(self.ties[i].sizes)
        return {
            "hidden": pieces["parameters"][begin:],
            "hidden_exp_avg": pieces["exp_avg"][begin:],
            "hidden_exp_avg_sq": pieces["exp_avg_sq"][begin:],
            "decay": pieces["decay"].view(n, H),
            "moving": pieces["moving"],
            "hidden_width": H,
            "latent_width": self.settings.latent_width,
        }

    def take_settings(self, i: int, saved: dict[str, Any]) -> None:
        """How it began does not matter any more."""

    def forget_moments(self, i: int) -> None:
        """All of them have names."""

    # ---- the core's calls ----

    def generate(self, i: int, out: list[Tensor]) -> None:
        torch.ops.oplora.exact_generate_(self.parameters, out, [], self.sizes[i : i + 1])

    def measure(self, batch: Batch, gradients: list[Tensor], report: Tensor) -> None:
        places = None if self.places is None else self.places[batch.factors]
        torch.ops.oplora.exact_measure_(self.parameters, gradients, batch.sizes, report, places)

    @property
    def summed(self) -> int:
        return 2 + self.settings.hidden_width

    def summands(self, batch: Batch, report: Tensor) -> list[Tensor]:
        numbers = report.view(len(batch.states), -1)
        return [numbers[:, :2], numbers[:, 3 + self.settings.hidden_width :]]

    def finish_measuring(self, batch: Batch, gradients: list[Tensor], report: Tensor) -> None:
        torch.ops.oplora.exact_finish_(self.parameters, gradients, batch.sizes, report)

    def step(
        self, batch: Batch, out: list[Tensor], gradients: list[Tensor], numbers: Any, report: Tensor, measured: bool
    ) -> bool:
        done: bool = torch.ops.oplora.exact_step_(
            *(getattr(self, key) for key in self.KEYS),
            out,
            batch.bases(),
            gradients,
            batch.sizes,
            numbers.adamw,
            numbers.rates,
            batch.rows,
            report,
            measured,
        )
        return done

    def plan(
        self, batch: Batch, factors: Any, rounded: Any, bases: Any, gradients: Any, numbers: Any, verdict: Tensor
    ) -> Any:
        """The op's plan, table and workspace, for a GPU."""
        return torch.ops.oplora.cuda_exact_plan(
            *(getattr(self, key) for key in self.KEYS),
            factors,
            rounded,
            bases,
            gradients,
            batch.sizes,
            numbers.adamw,
            numbers.rates,
            batch.rows,
            verdict,
            batch.report,
        )

    # ---- numbers to watch ----

    def step_numbers(self, report: Tensor) -> StepNumbers:
        h = report[3 : 3 + self.settings.hidden_width]
        live, h_sum = int(h.count_nonzero()), float(h.sum())
        return StepNumbers(float(h.square().sum()), live, float(report[0]), float(report[2]), h_sum)

    def stats(self, report: Tensor | None) -> dict[str, float]:
        return {}

    def square(self, batch: Batch, report: Tensor) -> Tensor:
        numbers, H = report.view(len(batch.states), -1), self.settings.hidden_width
        h_square = numbers[:, 3 : 3 + H].square().sum(1)
        return numbers[:, 0] * (h_square + 1.0) + numbers[:, 2]

    def scale(self, batch: Batch, report: Tensor, scale: Tensor) -> None:
        numbers, H = report.view(len(batch.states), -1), self.settings.hidden_width
        numbers[:, 0] *= scale**2
        numbers[:, 2] *= scale**2
        numbers[:, 3 + H :] *= scale  # dL/dh; h before it stays

    # ---- other hands on the factors ----

    def watches(self, engine: Engine) -> bool:
        return True

    def make_masters(self, state: LayerState, parameters: Sequence[nn.Parameter]) -> None:
        """None: what a step writes is made from W2 and c2, whatever the factors hold."""

    def settle(self, state: LayerState, f: int, parameter: nn.Parameter) -> None:
        """What h and c2 have added since is taken out of what it starts from."""
        state.factors.keep_value(f, parameter, state.engine.generate(state)[f])
        state.engine.stale.append(state)

    def absorb(self, state: LayerState, parameters: list[nn.Parameter]) -> bool:
        return state.factors.adopt_edits(parameters, lambda: state.engine.generate(state))
