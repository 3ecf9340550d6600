"""State "exact": a generator's five tensors and their two AdamW moments in full, stepped by the C core.

12 bytes an element of W2 (float32), and nothing else of its size at any time: the gradient of W2 is never stored, and
pages of moments that no step has touched (units that never fired) are not resident.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _core
from .adapters import Factors
from .errors import OPLoRAMemoryError, OPLoRATypeError, OPLoRAValueError

__all__ = ["ExactState", "Settings", "measure", "start_parameters", "step", "views", "write_factors"]

ADAMW = ("lr", "hidden_lr", "beta1", "beta2", "eps", "weight_decay")


@dataclass(frozen=True)
class Settings:
    """What a generator is made with; the numbers of the paper, but for the seed."""

    hidden_width: int = 32
    latent_width: int = 128
    latent_std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_width", "latent_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OPLoRAValueError(f"oplora: {name} is {value!r}, expected a whole number of at least 1.")
        if not 0 <= self.latent_std < float("inf"):
            raise OPLoRAValueError(f"oplora: latent_std is {self.latent_std!r}, expected a number of at least 0.")
        if not 0 <= self.seed < 2**64:
            raise OPLoRAValueError(f"oplora: seed is {self.seed!r}, expected a whole number in [0, 2^64).")


def _zeros(count: int, dtype: torch.dtype, purpose: str) -> Tensor:
    """Zeros whose pages the system hands out when they are first touched (torch.zeros would touch them all)."""
    try:
        return torch.from_numpy(np.zeros(count, dtype=np.float64 if dtype == torch.float64 else np.float32))
    except (MemoryError, ValueError) as error:
        raise OPLoRAMemoryError(
            f"oplora: no memory for {purpose}: {count} numbers. Lower hidden_width or the rank r, or adapt fewer layers."
        ) from error


def start_parameters(factors: Factors, settings: Settings, index: int) -> Tensor:
    """The flat parameters of the generator of the model's layer `index`, at the paper's start (on the CPU)."""
    H, Z, N = settings.hidden_width, settings.latent_width, sum(factors.sizes)
    flat = _zeros(H * N + N + H * Z + H + Z, factors.dtype, f"the generator of layer {factors.layer.name}")
    _core.start(
        flat.numpy(),
        hidden_width=H,
        latent_width=Z,
        seed=settings.seed,
        layer=index,
        latent_std=settings.latent_std,
        uniform=factors.uniform_rows(),
    )
    return flat


def views(flat: Tensor, hidden_width: int, latent_width: int) -> dict[str, Tensor]:
    """z (Z,), W1 (H, Z), c1 (H,), W2 (N, H), c2 (N,) as views of the flat parameters (or of a moment)."""
    H, Z = hidden_width, latent_width
    N = (flat.numel() - H * Z - H - Z) // (H + 1)
    W2, c2, W1, c1, z = flat.split([H * N, N, H * Z, H, Z])
    return {"z": z, "W1": W1.view(H, Z), "c1": c1, "W2": W2.view(H, N).t(), "c2": c2}


class ExactState:
    """One layer's generator with its moments, its step count, and what its still columns owe to weight decay."""

    def __init__(self, factors: Factors, settings: Settings, index: int) -> None:
        self.factors = factors
        self.H, self.Z, self.N = settings.hidden_width, settings.latent_width, sum(factors.sizes)
        self.steps = 0
        self.parameters = start_parameters(factors, settings, index)
        purpose = f"the moments of layer {factors.layer.name}"
        self.exp_avg = _zeros(self.parameters.numel(), factors.dtype, purpose)
        self.exp_avg_sq = _zeros(self.parameters.numel(), factors.dtype, purpose)
        self.decay = torch.ones(self.H, dtype=torch.float64)
        self.moving = torch.zeros(self.H, dtype=torch.uint8)
        self.report: Tensor | None = None  # the core's, of the last step that was measured

    @property
    def name(self) -> str:
        return self.factors.layer.name

    @property
    def report_size(self) -> int:
        return 3 + 2 * self.H

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
            "bases": list(self.factors.bases),
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
        if not isinstance(saved["bases"], list | tuple) or len(saved["bases"]) != len(self.factors.shapes):
            raise OPLoRAValueError(f"oplora: the saved bases of layer {self.name} are not one for each factor.")
        for base, shape in zip(saved["bases"], self.factors.shapes, strict=True):
            if base is not None:
                _check_like(f"a base of layer {self.name}", base, torch.empty(shape, dtype=self.factors.dtype))
        if not isinstance(saved["step"], int) or saved["step"] < 0:
            raise OPLoRAValueError(f"oplora: the saved step count of layer {self.name} is {saved['step']!r}.")

    def load_state(self, saved: dict[str, Any]) -> None:
        for key in ("parameters", "exp_avg", "exp_avg_sq", "decay", "moving"):
            getattr(self, key).copy_(saved[key])
        self.steps = saved["step"]
        self.report = None
        self.factors.bases = [None if base is None else base.clone().contiguous() for base in saved["bases"]]


def _check_like(what: str, saved: Any, mine: Tensor) -> None:
    if not isinstance(saved, Tensor):
        raise OPLoRATypeError(f"oplora: the saved {what} is a {type(saved).__name__}, expected a tensor.")
    if saved.shape != mine.shape or saved.dtype != mine.dtype:
        raise OPLoRAValueError(
            f"oplora: the saved {what} is {saved.dtype} of shape {tuple(saved.shape)}, expected {mine.dtype} of shape "
            f"{tuple(mine.shape)}. It was saved from another model, rank, width or dtype."
        )


# ---- all layers in one call of the core ----


def _sizes(states: Sequence[ExactState]) -> list[int]:
    return [n for s in states for n in (s.H, s.Z, len(s.factors.shapes))]


def _generate(states: Sequence[ExactState], out: list[Tensor], bases: Sequence[Tensor | None]) -> None:
    torch.ops.oplora.exact_generate_([s.parameters for s in states], out, list(bases), _sizes(states))


def _targets(states: Sequence[ExactState]) -> tuple[list[torch.nn.Parameter], list[Tensor]]:
    """The factors, and where the core writes: themselves, or buffers for those of another dtype or layout."""
    parameters = [p for s in states for p in s.factors.layer.parameters()]
    dtypes = [s.factors.dtype for s in states for _ in s.factors.shapes]
    targets = [
        p.detach() if p.dtype == dtype and p.is_contiguous() else torch.empty(p.shape, dtype=dtype)
        for p, dtype in zip(parameters, dtypes, strict=True)
    ]
    return parameters, targets


def _finish(states: Sequence[ExactState], parameters: list[torch.nn.Parameter], targets: list[Tensor]) -> None:
    in_place = []
    for parameter, target in zip(parameters, targets, strict=True):
        if parameter.data_ptr() == target.data_ptr():
            in_place.append(parameter)
        else:
            parameter.detach().copy_(target)
    torch.autograd.graph.increment_version(in_place)  # the core wrote behind autograd's back
    for state in states:
        state.factors.remember_written()


@torch.no_grad()
def write_factors(states: Sequence[ExactState]) -> None:
    """The factors of all layers from their generators."""
    parameters, targets = _targets(states)
    _generate(states, targets, [base for s in states for base in s.factors.bases])
    _finish(states, parameters, targets)


def measure(states: Sequence[ExactState], gradients: list[Tensor]) -> tuple[bool, Tensor]:
    """Whether all gradients are finite, and the core's report of every layer, one behind the other (float64)."""
    report = torch.zeros(sum(s.report_size for s in states), dtype=torch.float64)
    ok = torch.ops.oplora.exact_measure_([s.parameters for s in states], gradients, _sizes(states), report)
    return ok, report


def step(
    states: Sequence[ExactState], gradients: list[Tensor], adamw: dict[str, float], report: Tensor | None
) -> tuple[bool, Tensor]:
    """One AdamW step of all layers and their next factors. A report of `measure` on these gradients saves its pass.

    Returns whether it was done, which it is not where a gradient is not finite, and the report.
    """
    measured = report is not None
    if report is None:
        report = torch.zeros(sum(s.report_size for s in states), dtype=torch.float64)
    parameters, targets = _targets(states)
    done = torch.ops.oplora.exact_step_(
        [s.parameters for s in states],
        [s.exp_avg for s in states],
        [s.exp_avg_sq for s in states],
        [s.decay for s in states],
        [s.moving for s in states],
        targets,
        [base for s in states for base in s.factors.bases],
        gradients,
        _sizes(states),
        [adamw[key] for key in ADAMW] * len(states),
        [s.steps + 1 for s in states],
        report,
        measured,
    )
    if done:
        for state in states:
            state.steps += 1
        _finish(states, parameters, targets)
    return done, report
