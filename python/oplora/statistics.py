"""What the generators do to training, per layer: the two terms of the paper's section 3.2, and norms."""

import math
from typing import Any

import torch
from torch import Tensor

from .adapters import Factors
from .errors import OPLoRATypeError
from .generators import Generators
from .optim import AdamW

__all__ = ["stats"]


@torch.no_grad()
def stats(optimizer: Any) -> dict[str, dict[str, float]]:
    """Numbers to watch, for every layer by name; cheap enough to be taken at each step.

    With SGD at rate lr a generator moves v by -lr (||h||^2 + J J^T) g to first order, where J is v's derivative in the
    hidden path (z, W1, c1): a learning rate that is trained, and a line search along directions already taken
    (arXiv 2412.10362, section 3.2).

    Args:
        optimizer: oplora.AdamW, an optimizer of create_oplora_optimizer, or Generators.

    Returns:
        For each layer
        "trainable_lr"  ||h||^2;
        "line_search"   ||J^T g||^2 / ||g||^2, the second term along g, comparable to the first;
        "live_units"    how many of h are not zero;
        "norm_g"        ||g||, of A's and B's gradient together;
        "norm_A", "norm_B"  of the factors as they are now.
        All but the last are of the last step's start, NaN for a layer that has not been stepped.
    """
    generators = getattr(optimizer, "generators", optimizer)
    if isinstance(generators, AdamW):
        return {state.name: _numbers(state.factors, *_of_report(state.report, state.H)) for state in generators._states}
    if isinstance(generators, Generators):
        return {g.factors.layer.name: _numbers(g.factors, *_of_backward(g.report)) for g in generators}
    raise OPLoRATypeError(f"oplora.stats: expected an oplora optimizer or Generators, got {type(optimizer).__name__}.")


def _of_report(report: Tensor | None, hidden_width: int) -> tuple[Tensor | None, float, float]:
    if report is None:
        return None, math.nan, math.nan
    return report[3 : 3 + hidden_width], float(report[0]), float(report[2])


def _of_backward(report: dict[str, Tensor]) -> tuple[Tensor | None, float, float]:
    if not report:
        return None, math.nan, math.nan
    return report["h"], float(report["g"].double().square().sum()), float(report["hidden"].double().square().sum())


def _numbers(factors: Factors, h: Tensor | None, g_square: float, hidden_square: float) -> dict[str, float]:
    numbers = {
        "trainable_lr": math.nan if h is None else float(h.double().square().sum()),
        "line_search": hidden_square / g_square if g_square > 0 else (math.nan if h is None else 0.0),
        "live_units": math.nan if h is None else int(h.count_nonzero()),
        "norm_g": math.sqrt(g_square) if g_square >= 0 else math.nan,
    }
    for tensor, parameter in zip(factors.layer.tensors, factors.layer.parameters(), strict=True):
        numbers[f"norm_{tensor[-1]}"] = float(parameter.detach().double().norm())
    return numbers
