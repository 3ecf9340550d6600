"""Settings of the generator that belong together, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..errors import OPLoRAValueError

__all__ = ["PRESETS", "Preset", "preset_of"]


# of preset "flat": the hidden path's rate, and the most that its product with lr may be
HIDDEN_LR: Final = 0.01
LR_TIMES_HIDDEN_LR: Final = 5e-6
LEAST_LR: Final = 1e-30  # below it the ratio would pass all numbers


def paper_ratio(lr: float) -> float:
    return 1.0


def flat_ratio(lr: float) -> float:
    """A step moves the factors by about lr times the sum of h, which grows with the hidden path's rate. A rate that
    does not depend on lr lets h make up for a low lr; the product is bounded so that h does not add to a high one."""
    return min(HIDDEN_LR, LR_TIMES_HIDDEN_LR / lr) / max(lr, LEAST_LR) if lr > 0 else 0.0


@dataclass(frozen=True)
class Preset:
    """hidden_lr_ratio: the hidden path's rate over lr, for the highest lr of a schedule."""

    name: str
    init: str
    hidden_lr_ratio: Callable[[float], float]


PRESETS: Final = {"paper": Preset("paper", "paper", paper_ratio), "flat": Preset("flat", "keep", flat_ratio)}


def preset_of(name: str) -> Preset:
    if name not in PRESETS:
        raise OPLoRAValueError(f"oplora: preset is {name!r}, expected {' or '.join(map(repr, PRESETS))}.")
    return PRESETS[name]
