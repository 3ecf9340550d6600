"""Settings of the generator that belong together, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ..engines import Recipe, Settings
from ..errors import OPLoRAValueError

__all__ = ["PRESETS", "Preset", "preset_of", "recipe_of"]


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
    """hidden_lr_ratio: the hidden path's rate over lr, for the highest lr of a schedule; None: there is one hidden unit
    for all layers, whose gradient finds the rate, and of lr only its course matters.
    lr, betas: where none are given.
    """

    name: str
    init: str
    hidden_lr_ratio: Callable[[float], float] | None
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)

    @property
    def finds_rate(self) -> bool:
        return self.hidden_lr_ratio is None


PRESETS: Final = {
    "auto": Preset("auto", "keep", None, lr=1.0, betas=(0.9, 0.99)),
    "paper": Preset("paper", "paper", paper_ratio),
    "flat": Preset("flat", "keep", flat_ratio),
}


def preset_of(name: str | None, given: dict[str, Any]) -> Preset:
    """given: the arguments of a generator a layer, None where they were not given. One that was asks for such a
    generator, and so for the paper's preset where none is named."""
    asked = [argument for argument, value in given.items() if value is not None and argument != "seed"]
    if name is None:
        name = "paper" if asked else "auto"
    if name == "auto" and given["init"] == "keep":
        asked.remove("init")  # it does
    if name == "auto" and asked:
        raise OPLoRAValueError(
            f"oplora.AdamW: {', '.join(asked)} {'is' if len(asked) == 1 else 'are'} for presets 'paper' and 'flat', "
            "which have a generator in every layer. Leave preset out, or pass one of these."
        )
    if name not in PRESETS:
        raise OPLoRAValueError(f"oplora: preset is {name!r}, expected {' or '.join(map(repr, PRESETS))}.")
    return PRESETS[name]


W2_STARTS: Final = {"lean": "sign", "exact": "uniform"}  # by state, unless the user says otherwise
RANKS: Final = {"weight_rank": 2, "moment_rank": 1}


def recipe_of(preset: Preset, given: dict[str, Any]) -> Recipe:
    """given: as for preset_of."""
    if preset.finds_rate:
        seed = 0 if given["seed"] is None else given["seed"]
        return Recipe(Settings(hidden_width=1, seed=seed), "rate", (0, 0))
    state = "lean" if given["state"] is None else given["state"]
    if state not in W2_STARTS:
        raise OPLoRAValueError(f"oplora.AdamW: state is {state!r}, expected {' or '.join(map(repr, W2_STARTS))}.")
    ranks = {name: default if given[name] is None else given[name] for name, default in RANKS.items()}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 8:
            raise OPLoRAValueError(f"oplora.AdamW: {name} is {rank!r}, expected a whole number from 1 to 8.")
    names = ("hidden_width", "latent_width", "latent_std", "seed", "start")
    settings = {name: given[name] for name in names if given[name] is not None}
    return Recipe(
        Settings(**{"start": W2_STARTS[state], **settings}), state, (ranks["weight_rank"], ranks["moment_rank"])
    )
