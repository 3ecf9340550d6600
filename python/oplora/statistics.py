"""What the generators do to training, per layer: the two terms of the paper's section 3.2, and norms."""

import math
from typing import Any

import torch
from torch import Tensor

from .errors import OPLoRATypeError
from .factors import Factors
from .generators import Generators
from .optim import AdamW

__all__ = ["stats"]


@torch.no_grad()
def stats(optimizer: Any) -> dict[str, dict[str, float]]:
    """Numbers to watch, for every layer by name (with shard=True every layer of this process); cheap enough to be taken
    at each step.

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
        "norm_A", "norm_B"  of the factors as they are now, and so for an adapter's other tensors ("norm_ia3_l");
        and of state "lean" what the truncations dropped of their matrices' squared norms, 0 to 1:
        "dropped_moment"    of the first moment of W2 (in the scale of AdamW's step), cut to moment_rank;
        "dropped_weight"    of W2's change since the start, cut to weight_rank;
        "dropped_hidden_moment", "dropped_hidden_weight"  the same of W1.
        All but those of the factors are of the last step's start, NaN for a layer that has not been stepped.
    """
    generators = getattr(optimizer, "generators", optimizer)
    if isinstance(generators, AdamW):
        return {
            state.name: {**_numbers(state.factors, *state.step_numbers()), **state.stats()}
            for state in generators._states
        }
    if isinstance(generators, Generators):
        return {g.factors.layer.name: _numbers(g.factors, *_of_backward(g.report)) for g in generators}
    raise OPLoRATypeError(f"oplora.stats: expected an oplora optimizer or Generators, got {type(optimizer).__name__}.")


def _of_backward(report: dict[str, Tensor]) -> tuple[float, float, float, float]:
    """||h||^2, units that are on, ||g||^2, ||J^T g||^2; NaN before the first step."""
    if not report:
        return math.nan, math.nan, math.nan, math.nan
    h_square, g_square, hidden_square = (float(report[key].double().square().sum()) for key in ("h", "g", "hidden"))
    return h_square, int(report["h"].count_nonzero()), g_square, hidden_square


def _numbers(factors: Factors, h_square: float, live: float, g_square: float, hidden_square: float) -> dict[str, float]:
    numbers = {
        "trainable_lr": h_square,
        "line_search": hidden_square / g_square if g_square > 0 else (math.nan if math.isnan(g_square) else 0.0),
        "live_units": live,
        "norm_g": math.sqrt(g_square),
    }
    for tensor, parameter in zip(factors.layer.tensors, factors.layer.parameters(), strict=True):
        name = tensor.removeprefix("lora_").removeprefix("embedding_")
        numbers[f"norm_{name}"] = float(parameter.detach().double().norm())
    return numbers
