"""State "lean": W2, its moments and W1's as low-rank factors, in LoRA's memory whatever hidden_width is.

A factor entry costs 4 weight_rank + 2 (moment_rank + 3) bytes in float32, and the start of W2 none: it is made anew
from the seed at every step. docs/lean.md derives it, csrc/core/adamw_lean.c computes it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops  # noqa: F401  (loads the ops that are called below)
from .engine import Batch, Engine, LayerState, State, StepNumbers
from .factors import Factors, places_of
from .memory import CPU, allocate, columns
from .settings import Settings

__all__ = ["Lean"]

SCALARS = 4  # of a layer: the scale of W2's start and the mean of its row factor, and the same for W1
REPORT = 9


class Lean(State):
    """The arenas `numbers`, `moments` and `scalars`; oplora_core.h says what lies where in a layer's part of them.

    Factors are in- and output: a step adds to what they hold. Where one is of another dtype than the state (a bfloat16
    model), a master holds its value before rounding, as small steps would be lost otherwise.
    """

    KIND = "lean"
    KEYS = ("numbers", "moments", "scalars")

    def __init__(self, ties: Sequence[Factors], settings: Settings, ranks: tuple[int, int]) -> None:
        self.ties, self.settings, self.ranks = ties, settings, ranks
        counts = [self.counts(tie, settings, ranks) for tie in ties]
        dtype, device = ties[0].dtype, ties[0].device
        self.numbers = allocate(sum(n for n, _ in counts), dtype, device, huge_pages=True)
        self.moments = allocate(sum(m for _, m in counts), _moment_dtype(dtype), device, huge_pages=True)
        self.scalars = torch.zeros(SCALARS * len(ties), dtype=torch.float64, device=device)
        self.latent_std = [settings.latent_std] * len(ties)
        random = [int(random) for tie in ties for random in tie.is_random()]
        self.random = torch.tensor(random, dtype=torch.int64, device=CPU)
        self.places = places_of(ties)
        self._first = [0]  # factor of each layer
        self._begins, at = [], [0, 0, 0]
        for tie, (numbers, moments) in zip(ties, counts, strict=True):
            self._begins.append(tuple(at))
            at = [at[0] + numbers, at[1] + moments, at[2] + SCALARS]
            self._first.append(self._first[-1] + len(tie.shapes))
        H, Z, kind = settings.hidden_width, settings.latent_width, int(settings.start == "sign")
        self.sizes = torch.tensor(
            [
                [H, Z, *ranks, kind, tie.position, len(tie.shapes), *begins, _signed(settings.seed)]
                for tie, begins in zip(ties, self._begins, strict=True)
            ],
            dtype=torch.int64,
            device=CPU,
        )

    @staticmethod
    def counts(tie: Factors, settings: Settings, ranks: tuple[int, int]) -> tuple[int, int]:
        """Numbers and moments of one layer, as oplora_lean_numbers and oplora_lean_moments count them."""
        H, Z, N = settings.hidden_width, settings.latent_width, sum(tie.sizes)
        d, k = ranks
        return d * N + (2 * d + k + 2) * H + (d + k + 4) * Z, (k + 3) * (N + H)

    @staticmethod
    def bytes_needed(tie: Factors, settings: Settings, ranks: tuple[int, int]) -> int:
        numbers, moments = Lean.counts(tie, settings, ranks)
        return numbers * tie.dtype.itemsize + moments * _moment_dtype(tie.dtype).itemsize

    # ---- what is where ----

    def report_size(self, i: int) -> int:
        return REPORT

    def pieces(self, i: int) -> dict[str, Tensor]:
        numbers, moments = self.counts(self.ties[i], self.settings, self.ranks)
        sizes = zip(self.KEYS, self._begins[i], (numbers, moments, SCALARS), strict=True)
        return {key: getattr(self, key)[begin : begin + size] for key, begin, size in sizes}

    def of_tensors(self, i: int) -> list[dict[str, Tensor]]:
        """weight_change: the columns of U, in which W2 changed (weight_rank of them). exp_avg: the row factors of W2's
        first moment (moment_rank of them), then c2's. exp_avg_sq: c2's second moment, then the row factor of W2's."""
        d, k = self.ranks
        N, (numbers, moments, _) = sum(self.ties[i].sizes), self._begins[i]
        held, row = [], 0
        for shape in self.ties[i].shapes:
            held.append(
                {
                    "weight_change": columns(self.numbers, numbers + row, d, N, shape),
                    "exp_avg": columns(self.moments, moments + row, k + 1, N, shape),
                    "exp_avg_sq": columns(self.moments, moments + (k + 1) * N + row, 2, N, shape),
                }
            )
            row += shape.numel()
        return held

    def of_layer(self, i: int) -> dict[str, Any]:
        """hidden and hidden_moments are what oplora_core.h lists of W1, z and the columns' sides, in its order."""
        N, pieces, sizes = sum(self.ties[i].sizes), self.pieces(i), self.sizes[i].tolist()
        random = self.random[self._first[i] : self._first[i + 1]].tolist()
        return {
            "hidden": pieces["numbers"][self.ranks[0] * N :],
            "hidden_moments": pieces["moments"][(self.ranks[1] + 3) * N :],
            "scalars": pieces["scalars"],
            "hidden_width": sizes[0],
            "latent_width": sizes[1],
            "weight_rank": sizes[2],
            "moment_rank": sizes[3],
            "sign": sizes[4],
            "layer": sizes[5],
            "seed": sizes[10],
            "latent_std": self.latent_std[i],
            "random": sum(bit << f for f, bit in enumerate(random)),
        }

    def take_settings(self, i: int, saved: dict[str, Any]) -> None:
        self.sizes[i, 5], self.sizes[i, 10] = saved["layer"], saved["seed"]
        self.latent_std[i] = saved["latent_std"]
        for f in range(self._first[i], self._first[i + 1]):
            self.random[f] = saved["random"] >> (f - self._first[i]) & 1

    def forget_moments(self, i: int) -> None:
        pieces = self.pieces(i)
        pieces["numbers"][-2 * self.settings.latent_width :] = 0  # z's
        pieces["scalars"][1::2] = 0  # the means of both row factors, which are named moments

    def tables(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """sizes and random of the batch's layers."""
        return batch.sizes, self.random if batch.is_whole else self.random[batch.factors]

    def arenas(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.numbers, self.moments, self.scalars

    # ---- the core's calls ----

    def start(self, i: int, out: list[Tensor]) -> None:
        """Begins layer i's generator and writes what it generates."""
        own = slice(self._first[i], self._first[i + 1])
        places = None if self.places is None else self.places[own]
        torch.ops.oplora.lean_start_(
            *self.arenas(), out, self.sizes[i : i + 1], self.random[own], self.latent_std[i], places
        )

    def measure(self, batch: Batch, gradients: list[Tensor], report: Tensor) -> None:
        if self.places is not None:
            self._reduce(batch, gradients, report, None)
            return
        batch.dh = torch.zeros(batch.units, dtype=torch.float64, device=CPU)
        torch.ops.oplora.lean_measure_(*self.arenas(), gradients, *self.tables(batch), report, batch.dh)

    @property
    def summed(self) -> int:
        return 2 + self.ranks[0] + self.settings.hidden_width

    def summands(self, batch: Batch, report: Tensor) -> list[Tensor]:
        """U^T g and W0^T g, which lie behind the Gram matrix."""
        return [report.view(-1, REPORT)[:, :2], self._sums(batch)[:, self._gram_size :]]

    def finish_measuring(self, batch: Batch, gradients: list[Tensor], report: Tensor) -> None:
        batch.dh = torch.zeros(batch.units, dtype=torch.float64, device=CPU)
        torch.ops.oplora.lean_finish_measure_(
            *self.arenas(), gradients, *self._divided_tables(batch), report, batch.sums, batch.dh
        )

    def reduce(self, batch: Batch, gradients: list[Tensor], numbers: Any, report: Tensor) -> list[Tensor]:
        self._reduce(batch, gradients, report, numbers.adamw)
        return [self._sums(batch)[:, : self._gram_size]]

    @property
    def _gram_size(self) -> int:
        return (sum(self.ranks) + 1) ** 2

    def _sums(self, batch: Batch) -> Tensor:
        """A row a layer, as oplora_lean_reduce fills them."""
        if batch.sums is None:
            width = self._gram_size + self.ranks[0] + self.settings.hidden_width
            batch.sums = torch.zeros(len(batch.states), width, dtype=torch.float64, device=CPU)
        return batch.sums

    def _reduce(self, batch: Batch, gradients: list[Tensor], report: Tensor, adamw: Tensor | None) -> None:
        """The sums over the rows that are here: of a measurement, or with a step's numbers of a step."""
        rates, rows = batch.engine.numbers.rates, batch.rows
        torch.ops.oplora.lean_reduce_(
            *self.arenas(), gradients, *self._divided_tables(batch), report, self._sums(batch), adamw, rates, rows
        )

    def _divided_tables(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """tables, and where the rows lie."""
        assert self.places is not None
        return *self.tables(batch), self.places[batch.factors]

    def step(
        self, batch: Batch, out: list[Tensor], gradients: list[Tensor], numbers: Any, report: Tensor, measured: bool
    ) -> bool:
        written = (*self.arenas(), out, batch.bases(), gradients)
        told = (numbers.adamw, numbers.rates, batch.rows, report)
        done: bool
        if batch.sums is None:
            dh = batch.dh if measured else None
            done = torch.ops.oplora.lean_step_(*written, *self.tables(batch), *told, dh)
        else:
            tables = self._divided_tables(batch)
            done = torch.ops.oplora.lean_finish_step_(*written, *tables, *told, batch.sums, batch.dh)
        return done

    def plan(
        self, batch: Batch, factors: Any, rounded: Any, bases: Any, gradients: Any, numbers: Any, verdict: Tensor
    ) -> Any:
        """The op's plan, table and workspace, for a GPU."""
        return torch.ops.oplora.cuda_lean_plan(
            *self.arenas(),
            factors,
            rounded,
            bases,
            gradients,
            *self.tables(batch),
            numbers.adamw,
            numbers.rates,
            batch.rows,
            verdict,
            batch.report,
            batch.dh,
        )

    # ---- numbers to watch ----

    def step_numbers(self, report: Tensor) -> StepNumbers:
        """The report has no h: by Cauchy and Schwarz its sum is ||h|| sqrt(live) at most."""
        g_square, _, hidden_square, h_square, live = report[:5].tolist()
        return StepNumbers(h_square, int(live), g_square, hidden_square, math.sqrt(h_square * live))

    def stats(self, report: Tensor | None) -> dict[str, float]:
        dropped = [float("nan")] * 4 if report is None else report[5:].tolist()
        names = ("dropped_moment", "dropped_weight", "dropped_hidden_moment", "dropped_hidden_weight")
        return dict(zip(names, dropped, strict=True))

    def square(self, batch: Batch, report: Tensor) -> Tensor:
        numbers = report.view(-1, REPORT)
        return numbers[:, 0] * (numbers[:, 3] + 1.0) + numbers[:, 2]

    def scale(self, batch: Batch, report: Tensor, scale: Tensor) -> None:
        numbers = report.view(-1, REPORT)
        numbers[:, 0] *= scale**2
        numbers[:, 2] *= scale**2
        if batch.dh is not None:
            batch.dh *= scale

    # ---- other hands on the factors ----

    def watches(self, engine: Engine) -> bool:
        """Masters hide what is written into the factors; on a GPU the kernels look themselves."""
        return engine.looks_for_edits and any(m is not None for state in engine.states for m in state.masters)

    def begin_masters(self, state: LayerState, v: Sequence[Tensor]) -> None:
        for i, (parameter, kept) in enumerate(zip(state.factors.layer.parameters(), state.factors.kept, strict=True)):
            if parameter.dtype != state.factors.dtype and not kept:
                state.masters[i] = v[i]

    def absorb(self, state: LayerState, parameters: list[nn.Parameter]) -> bool:
        """What a factor holds is what the next step starts from, so only masters have to follow it; before the first
        step also the bases, as when DistributedDataParallel writes rank 0's start into the replicas."""
        if state.is_fresh:
            state.factors.adopt_edits(parameters, lambda: state.engine.generate(state))
        for i, (parameter, master) in enumerate(zip(parameters, state.masters, strict=True)):
            if master is not None and not torch.equal(master.to(parameter), parameter.detach()):
                state.keep_master(i, parameter.detach())
        return False


def _moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """How the core keeps moments: bfloat16, stochastically rounded; the float64 twin rounds nothing."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


def _signed(seed: int) -> int:
    """The seed's 64 bits as the signed number that torch's tensors hold."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
