"""State "lean": W2, its moments and W1's as low-rank factors, in LoRA's memory whatever hidden_width is.

A factor entry costs 4 weight_rank + 2 (moment_rank + 3) bytes in float32, and the start of W2 none: it is made anew
from the seed at every step. docs/lean.md derives it, csrc/core/adamw_lean.c computes it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (loads the ops that are called below)
from .adapters import STARTS, Start
from .device import DeviceLayers, Plan, PlanTensors, share_devices
from .errors import OPLoRAValueError
from .factors import Factors
from .start import Settings, allocate
from .state import Layers, State, by_kind, check_like, finish, kind_of, step_numbers

__all__ = ["LeanLayers", "LeanState"]

SCALARS = 4  # of a layer: the scale of W2's start and the mean of its row factor, and the same for W1
REPORT = 9


class LeanState(State):
    """One layer's generator. `numbers`, `moments` and `scalars` are views of what all layers share; oplora_core.h says
    what lies where in them.

    masters: where a factor is of another dtype than the state (a bfloat16 model), its value before rounding, to which
    steps add; otherwise small steps would be lost.
    """

    KIND = "lean"
    KEYS = ("numbers", "moments", "scalars")

    def __init__(self, factors: Factors, settings: Settings, ranks: tuple[int, int], arenas: "Arenas") -> None:
        self.factors, self.arenas, self.start = factors, arenas, settings.start
        self.seed, self.index, self.latent_std = settings.seed, factors.position, settings.latent_std
        self.H, self.Z, self.N = settings.hidden_width, settings.latent_width, sum(factors.sizes)
        self.weight_rank, self.moment_rank = ranks
        self.random = [int(random) for random in factors.is_random()]
        self.numbers, self.moments, self.scalars, offsets = arenas.next_views()
        kind = int(settings.start == "sign")
        self.sizes = [self.H, self.Z, *ranks, kind, self.index, len(factors.shapes), *offsets, _signed(self.seed)]
        self.masters: list[Tensor | None] = [None] * len(factors.shapes)

    @staticmethod
    def counts(factors: Factors, settings: Settings, ranks: tuple[int, int]) -> tuple[int, int]:
        """Numbers and moments of one layer, as oplora_lean_numbers and oplora_lean_moments count them."""
        H, Z, N = settings.hidden_width, settings.latent_width, sum(factors.sizes)
        d, k = ranks
        return d * N + (2 * d + k + 2) * H + (d + k + 4) * Z, (k + 3) * (N + H)

    @staticmethod
    def bytes_needed(factors: Factors, settings: Settings, ranks: tuple[int, int]) -> int:
        numbers, moments = LeanState.counts(factors, settings, ranks)
        return numbers * factors.dtype.itemsize + moments * _moment_dtype(factors.dtype).itemsize

    @classmethod
    def make_all(cls, factors: Sequence[Factors], settings: Settings, ranks: tuple[int, int]) -> list["LeanState"]:
        """The generators of all layers; those of one dtype and device share their memory."""
        arenas = {
            kind: Arenas([cls.counts(f, settings, ranks) for f in some], *kind)
            for kind, some in by_kind(factors).items()
        }
        states = [cls(f, settings, ranks, arenas[kind_of(f)]) for f in factors]
        share_devices(states)
        return states

    @property
    def report_size(self) -> int:
        return REPORT

    @torch.no_grad()
    def begin(self, keep: Sequence[bool]) -> None:
        parameters, dtype = self.factors.layer.parameters(), self.factors.dtype
        written = self.generate_start()
        self.factors.begin(written, keep)
        for i, parameter in enumerate(parameters):
            if parameter.dtype != dtype:
                self.masters[i] = parameter.detach().to(dtype) if keep[i] else written[i]

    def generate_start(self) -> list[Tensor]:
        """Begins the generator; what it generates before any step."""
        shapes, dtype, device = self.factors.shapes, self.factors.dtype, self.factors.device
        written = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self._write_start(written)
        return written

    def _write_start(self, written: list[Tensor]) -> None:
        state = (self.numbers, self.moments, self.scalars)
        sizes = torch.tensor([[*self.sizes[:7], 0, 0, 0, self.sizes[10]]])  # the views begin where the layer does
        random, latent_std = torch.tensor(self.random), self.latent_std
        if self.shared is None:
            torch.ops.oplora.lean_start_(*state, written, sizes, random, latent_std)
            return
        report, dh = (
            torch.zeros(size, dtype=torch.float64, device=self.shared.device) for size in (self.report_size, self.H)
        )
        none = [None] * len(written)
        numbers = (self.shared.adamw, self.shared.rates, self.shared.rows([self.row]), self.shared.verdict, report, dh)
        plan, table, workspace = torch.ops.oplora.cuda_lean_plan(
            *state, written, none, none, [], sizes, random, *numbers
        )
        torch.ops.oplora.cuda_lean_start_(plan, table.to(self.shared.device), workspace, latent_std)

    def absorb_edits(self, parameters: list[torch.nn.Parameter]) -> bool:
        """What a factor holds is what the next step goes on from, so only masters have to follow it; before the first
        step also the bases, as when DistributedDataParallel writes rank 0's start into the replicas."""
        touched = self.factors.were_touched(parameters)
        if touched and self.steps == 0:
            self.factors.adopt_edits(parameters, self.generate_start)
        for i, (parameter, master) in enumerate(zip(parameters, self.masters, strict=True)):
            if parameter.dtype == self.factors.dtype:  # also after the model was moved back
                self.masters[i] = None
            elif master is None or (touched and not torch.equal(master.to(parameter.dtype), parameter.detach())):
                self.masters[i] = parameter.detach().to(self.factors.dtype)
        return False

    def targets(self, parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
        """Where the core reads and writes the factors' values."""
        return [
            (p if p.is_contiguous() else p.detach().contiguous()) if master is None else master
            for p, master in zip(parameters, self.masters, strict=True)
        ]

    def step_numbers(self, report: Tensor) -> tuple[float, float, float, float]:
        g_square, _, hidden_square, h_square, live = report[:5].tolist()
        return h_square, int(live), g_square, hidden_square

    def stats(self, report: Tensor | None) -> dict[str, float]:
        dropped = [float("nan")] * 4 if report is None else report[5:].tolist()
        names = ("dropped_moment", "dropped_weight", "dropped_hidden_moment", "dropped_hidden_weight")
        return dict(zip(names, dropped, strict=True))

    def settings_saved(self) -> dict[str, Any]:
        ranks = {"weight_rank": self.weight_rank, "moment_rank": self.moment_rank}
        return {**super().settings_saved(), **ranks, "start": self.start}

    def state_dict(self) -> dict[str, Any]:
        """Also the seed and the layer's index, of which W1's and W2's start is made, and which rows of W2 have one."""
        self.absorb_edits(self.factors.layer.parameters())  # a model that was moved has other masters from now on
        start = {"seed": self.seed, "layer": self.index, "latent_std": self.latent_std, "random": list(self.random)}
        return {**super().state_dict(), "masters": list(self.masters), **start}

    def check_state(self, saved: Any) -> None:
        if isinstance(saved, dict):
            before = {"latent_std": self.latent_std, "random": _random_before(self.factors)}
            saved = {**before, **saved}  # earlier versions did not save them
        super().check_state(saved)
        for key, end in (("seed", 1 << 64), ("layer", 1 << 32)):
            if not isinstance(saved[key], int) or not 0 <= saved[key] < end:
                raise OPLoRAValueError(f"oplora: the saved {key} of layer {self.name} is {saved[key]!r}.")
        if not isinstance(saved["random"], list | tuple) or len(saved["random"]) != len(self.random):
            raise OPLoRAValueError(f"oplora: the saved start of layer {self.name} is not one of its tensors'.")
        if not isinstance(saved["masters"], list | tuple) or len(saved["masters"]) != len(self.masters):
            raise OPLoRAValueError(f"oplora: the saved masters of layer {self.name} are not one a factor.")
        for mine, theirs in zip(self.masters, saved["masters"], strict=True):
            if (mine is None) != (theirs is None):
                raise OPLoRAValueError(
                    f"oplora: the factors of layer {self.name} were saved in another dtype than the model's. Build the "
                    "model in the dtype of the run that was saved."
                )
            if mine is not None:
                check_like(f"masters of layer {self.name}", theirs, mine)

    def load_state(self, saved: dict[str, Any]) -> None:
        super().load_state(saved)
        self.seed, self.index = saved["seed"], saved["layer"]
        self.latent_std = saved.get("latent_std", self.latent_std)
        self.random = list(saved.get("random", _random_before(self.factors)))
        self.sizes[5], self.sizes[10] = self.index, _signed(self.seed)
        if self.shared is not None:
            self.shared.plan = None  # it knows the start
        for mine, theirs in zip(self.masters, saved["masters"], strict=True):
            if mine is not None:
                mine.copy_(theirs)

    def take_over(self, old: Any) -> None:
        super().take_over(old)
        self.seed, self.index, self.latent_std, self.random = old.seed, old.index, old.latent_std, old.random
        self.sizes[5], self.sizes[10] = self.index, _signed(self.seed)
        device = self.factors.device
        self.masters = [None if master is None else master.to(device) for master in old.masters]

    def new_layers(self) -> "LeanLayers":
        return LeanLayers() if self.shared is None else LeanDeviceLayers()


class Arenas:
    """The memory of all layers of one dtype and device: one tensor each for numbers, moments and scalars."""

    def __init__(self, counts: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        self.numbers = allocate(sum(n for n, _ in counts), dtype, device, huge_pages=True)
        self.moments = allocate(sum(m for _, m in counts), _moment_dtype(dtype), device, huge_pages=True)
        self.scalars = torch.zeros(SCALARS * len(counts), dtype=torch.float64, device=device)
        self._views = iter(list(self._cut(counts)))  # a generator could not be copied

    def _cut(self, counts: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor, Tensor, list[int]]]:
        at = [0, 0, 0]
        for numbers, moments in counts:
            offsets = list(at)
            at = [at[0] + numbers, at[1] + moments, at[2] + SCALARS]
            yield (
                self.numbers[offsets[0] : at[0]],
                self.moments[offsets[1] : at[1]],
                self.scalars[offsets[2] : at[2]],
                offsets,
            )

    def next_views(self) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        return next(self._views)


class LeanLayers(Layers):
    dh: Tensor | None = None  # dL/dh of all layers, if measured

    def measure(self) -> Tensor:
        report = self.new_report()
        self.dh = torch.zeros(sum(state.H for state in self.states), dtype=torch.float64)
        torch.ops.oplora.lean_measure_(*self._state(), self.gradients, *self._sizes(), report, self.dh)
        return report

    def step(self, adamw: Sequence[float | Tensor], report: Tensor | None) -> tuple[bool, Tensor]:
        states, measured = self.states, report is not None
        if report is None:
            report = self.new_report()
        written: list[Tensor] = []
        for state in states:
            written += state.targets(self.parameters[len(written) : len(written) + len(state.masters)])
        done = torch.ops.oplora.lean_step_(
            *self._state(),
            written,
            self.bases(),
            self.gradients,
            *self._sizes(),
            *step_numbers(states, adamw),
            report,
            self.dh if measured else None,
        )
        if done:
            self.remember_step(report)
            finish(states, self.parameters, written)
        return done, report

    def square(self, report: Tensor) -> Tensor:
        numbers = report.view(-1, REPORT)
        return numbers[:, 0] * (numbers[:, 3] + 1.0) + numbers[:, 2]

    def scale(self, report: Tensor, scale: Tensor) -> None:
        numbers = report.view(-1, REPORT)
        numbers[:, 0] *= scale**2
        numbers[:, 2] *= scale**2
        if self.dh is not None:
            self.dh *= scale

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        arenas = self.states[0].arenas
        return arenas.numbers, arenas.moments, arenas.scalars

    def _sizes(self) -> tuple[Tensor, Tensor]:
        random = [number for state in self.states for number in state.random]
        sizes = [number for state in self.states for number in state.sizes]
        return torch.tensor(sizes).view(len(self.states), -1), torch.tensor(random)


class LeanDeviceLayers(DeviceLayers, LeanLayers):
    def measure(self) -> Tensor:
        report = super().measure()
        assert self.planned is not None
        self.dh = self.planned.tensors.dh
        return report

    def make_plan(self, tensors: PlanTensors) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.shared
        numbers = (shared.adamw, shared.rates, shared.rows(self.rows), shared.verdict, tensors.report, tensors.dh)
        factors = (tensors.factors, tensors.rounded, self.bases(), tensors.gradients)
        plan: tuple[Tensor, Tensor, Tensor] = torch.ops.oplora.cuda_lean_plan(
            *self._state(), *factors, *self._sizes(), *numbers
        )
        return plan

    def values(self) -> list[Tensor | None]:
        return [master for state in self.states for master in state.masters]

    def launch_measure(self, plan: Plan) -> None:
        torch.ops.oplora.cuda_lean_measure_(*plan.arguments())

    def launch_step(self, plan: Plan, veto: Tensor | None, measured: bool) -> None:
        torch.ops.oplora.cuda_lean_step_(*plan.arguments(), veto, measured)


def _random_before(factors: Factors) -> list[int]:
    """Which tensors' rows of W2 started at random in states that do not say it: those of A, also where it was kept."""
    return [int(STARTS[tensor] is Start.RANDOM) for tensor in factors.layer.tensors]


def _moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """How the core keeps moments: bfloat16, stochastically rounded; the float64 twin rounds nothing."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


def _signed(seed: int) -> int:
    """The seed's 64 bits as the signed number that torch's ops take."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
