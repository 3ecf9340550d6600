"""Settings of the generator that belong together, by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .errors import OPLoRAValueError

__all__ = ["settle"]


# of preset "flat": the hidden path's rate, and the most that its product with lr may be
HIDDEN_LR = 0.01
LR_TIMES_HIDDEN_LR = 5e-6


def paper_ratio(lr: float) -> float:
    return 1.0


def flat_ratio(lr: float) -> float:
    """A step moves the factors by about lr times the sum of h, which grows with the hidden path's rate. A rate that
    does not depend on lr lets h make up for a low lr; the product is bounded so that h does not add to a high one."""
    if not lr > 0:
        raise OPLoRAValueError(
            f"oplora: lr is {lr!r}, of which preset='flat' makes the hidden path's rate a multiple. Give the highest "
            "rate of the schedule, or hidden_lr_ratio."
        )
    return min(HIDDEN_LR, LR_TIMES_HIDDEN_LR / lr) / lr


@dataclass(frozen=True)
class Preset:
    init: str
    hidden_lr_ratio: Callable[[float], float]  # of lr


PRESETS = {"paper": Preset("paper", paper_ratio), "flat": Preset("keep", flat_ratio)}


def settle(preset: str, init: str | None, hidden_lr_ratio: float | None, lr: float | Tensor) -> tuple[str, float]:
    """init and hidden_lr_ratio: as given, else the preset's."""
    if preset not in PRESETS:
        raise OPLoRAValueError(f"oplora: preset is {preset!r}, expected {' or '.join(map(repr, PRESETS))}.")
    chosen = PRESETS[preset]
    if hidden_lr_ratio is None:
        hidden_lr_ratio = chosen.hidden_lr_ratio(float(lr))
    return chosen.init if init is None else init, hidden_lr_ratio
