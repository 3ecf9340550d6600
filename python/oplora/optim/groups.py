"""Parameter groups: what torch's dicts have to hold, and the numbers of a step in them.

A group in which something is generated has two numbers more than torch.optim.AdamW's: `hidden_lr_ratio`, the rate of z,
W1 and c1 over lr, and, where a preset chose it, `peak_lr`, the highest lr so far, of which the preset makes it anew.
Under preset "auto" it has `peak_lr` alone, the highest lr of all groups so far: a group's lr is a share of it.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor

from ..errors import OPLoRATypeError, OPLoRAValueError
from .presets import Preset

__all__ = [
    "NUMBERS",
    "check_defaults",
    "complete",
    "highest_share",
    "numbers_of",
    "rates_of",
    "refuse_numbers",
    "refuse_options",
    "seen",
    "shares_of",
    "with_names",
]

GroupNumbers = tuple[float | Tensor, float, float | Tensor, float, float, float]

NUMBERS: Final = ("lr", "weight_decay", "hidden_lr_ratio", "betas", "eps")

# arguments of torch.optim.AdamW that choose among ways to the same numbers, and those that change the numbers
NO_MATTER: Final = ("foreach", "fused", "capturable")
REFUSED: Final = {
    "amsgrad": "a maximum of second moments cannot be kept as a product of factors",
    "maximize": "negate the loss instead",
    "differentiable": "the step is no part of a graph",
}


def refuse_options(options: dict[str, Any], where: str = "") -> None:
    """Takes what torch.optim.AdamW takes and means nothing here; raises for what would have to change the step."""
    for name, value in options.items():
        if name in REFUSED and value:
            raise OPLoRAValueError(f"oplora.AdamW: {name}=True is not supported{where}: {REFUSED[name]}.")
        if name not in NO_MATTER and name not in REFUSED:
            hint = " The rate is called lr, and is found: leave it out." if name == "learning_rate" else ""
            raise OPLoRATypeError(f"oplora.AdamW: there is no argument {name!r}.{hint} help(oplora.AdamW) lists them.")


def _is_on_device(value: Any) -> bool:
    """Where reading a number would wait."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _checked(name: str, value: Any, most: float = math.inf) -> None:
    """A number of at least 0 and below `most`; as torch's optimizers, never text."""
    if isinstance(value, str | bytes | bool) or value is None:
        raise OPLoRATypeError(
            f"oplora.AdamW: {name} is {value!r}, expected a number. (YAML reads 1e-4 as text: write 1.0e-4.)"
        )
    if isinstance(value, Tensor) and value.numel() != 1:
        raise OPLoRATypeError(f"oplora.AdamW: {name} is a tensor of shape {tuple(value.shape)}, expected one number.")
    if _is_on_device(value):
        return  # reading it would wait for the device, whose verdict refuses what is not finite
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise OPLoRATypeError(f"oplora.AdamW: {name} is {value!r}, expected a number.") from error
    if not 0 <= number < most:
        expected = "a number of at least 0" if most == math.inf else f"a number in [0, {most:g})"
        raise OPLoRAValueError(f"oplora.AdamW: {name} is {value!r}, expected {expected}.")


def _check(group: dict[str, Any], where: str = "") -> None:
    for name in ("lr", "eps", "weight_decay", "hidden_lr_ratio"):
        if name in group:
            _checked(f"{name}{where}", group[name])
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise OPLoRAValueError(f"oplora.AdamW: betas{where} are {betas!r}, expected two numbers in [0, 1).")
    for beta in betas:
        _checked(f"betas{where}", beta, most=1.0)


def check_defaults(defaults: dict[str, Any], hidden_lr_ratio: float | None) -> None:
    _check(defaults if hidden_lr_ratio is None else {**defaults, "hidden_lr_ratio": hidden_lr_ratio})


def complete(group: dict[str, Any], preset: Preset, hidden_lr_ratio: float | None) -> None:
    """Adds what a group lacks in which something is generated. A ratio that was given has no peak."""
    if preset.hidden_lr_ratio is None:
        group.setdefault("peak_lr", 0.0)
        return
    if hidden_lr_ratio is not None:
        group.setdefault("hidden_lr_ratio", hidden_lr_ratio)
    if "hidden_lr_ratio" not in group:
        peak = group.setdefault("peak_lr", max(float(group["lr"]), float(group.get("initial_lr", 0.0))))
        group["hidden_lr_ratio"] = preset.hidden_lr_ratio(peak)


def rates_of(group: dict[str, Any], preset: Preset) -> tuple[float | Tensor, float | Tensor]:
    """lr and the hidden path's rate of a step now.

    The preset's rule holds for the highest lr so far, so that a warm-up from 0, OneCycleLR and a learning-rate finder
    come to what the same rate as a constant gives, and that a schedule's fall scales both rates. A ratio that
    somebody else has set stays.
    """
    lr, ratio = group["lr"], group.get("hidden_lr_ratio", 0.0)
    rule = preset.hidden_lr_ratio
    if not _is_on_device(lr):
        lr = float(lr)
        if "peak_lr" in group and lr > (peak := group["peak_lr"]):
            if rule is not None and ratio == rule(peak):
                ratio = group["hidden_lr_ratio"] = rule(lr)
            group["peak_lr"] = lr
    return lr, lr * ratio


def numbers_of(group: dict[str, Any], preset: Preset) -> GroupNumbers:
    """lr, weight_decay, hidden_lr, beta1, beta2, eps of a step now."""
    return _with_rates(group, *rates_of(group, preset))


def _with_rates(group: dict[str, Any], lr: float | Tensor, hidden_lr: float | Tensor) -> GroupNumbers:
    beta1, beta2 = group["betas"]
    return lr, float(group["weight_decay"]), hidden_lr, float(beta1), float(beta2), float(group["eps"])


def shares_of(groups: Sequence[dict[str, Any]]) -> list[GroupNumbers]:
    """As numbers_of where the rate is found: lr is a share of the highest so far, so that a schedule's course and the
    groups' ratios matter, and its size does not. A warm-up is all at the highest: the search has one of its own."""
    peak = _peak(groups)
    numbers: list[GroupNumbers] = []
    for group in groups:
        group["peak_lr"] = peak
        share = group["lr"] / peak if peak > 0 else 0.0
        numbers.append(_with_rates(group, share if _is_on_device(share) else float(share), 0.0))
    return numbers


def highest_share(groups: Sequence[dict[str, Any]]) -> float:
    """Of a step now; changes nothing."""
    peak = _peak(groups)
    return max(float(group["lr"]) for group in groups) / peak if peak > 0 else 0.0


def _peak(groups: Sequence[dict[str, Any]]) -> float:
    known = max((float(g.get("peak_lr", 0.0)) for g in groups), default=0.0)
    # one on a device is read once
    now = [float(group["lr"]) for group in groups if known == 0.0 or not _is_on_device(group["lr"])]
    return max([known, *now])


def seen(group: dict[str, Any]) -> list[Any]:
    """NUMBERS as they are now: a tensor may hold another number later. One on a GPU is not read."""
    values = (group.get(name) for name in NUMBERS)
    return [v.tolist() if isinstance(v, Tensor) and v.device.type == "cpu" else v for v in values]


def with_names(group: dict[str, Any], first: int) -> dict[str, Any]:
    """The group with a name for every tensor, as torch asks of all groups if one has them."""
    held = group["params"]
    if isinstance(held, set):
        return group  # torch refuses it, as it has no order
    held = [held] if isinstance(held, Tensor) else list(held)
    named = [item if isinstance(item, tuple) else (f"parameters.{first + i}", item) for i, item in enumerate(held)]
    return {**group, "params": named}


def refuse_numbers(groups: Sequence[dict[str, Any]]) -> None:
    """Raises where somebody has put into a group what no step can be made with."""
    for i, group in enumerate(groups):
        _check(group, f" of parameter group {i}")
        refuse_options({k: v for k, v in group.items() if k in REFUSED}, f" (parameter group {i})")
