"""What the generators do to training, per layer: the two terms of the paper's section 3.2, and norms."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..definition import Generator, Generators
from ..engines import FOUND, Factors, LayerState, StepNumbers
from ..errors import OPLoRATypeError
from ..optim import AdamW

__all__ = ["generators_of", "inner_optimizer", "stats"]

NOT_STEPPED = StepNumbers(math.nan, math.nan, math.nan, math.nan, math.nan)


@torch.no_grad()
def stats(optimizer: Any) -> dict[str, dict[str, float]]:
    """Numbers to watch, for every layer by name (with shard=True every layer of this process); cheap enough to be taken
    at each step. On a GPU the host waits for it a few times, however many layers there are.

    With SGD at rate lr a generator moves v by -lr (||h||^2 + J J^T) g to first order, where J is v's derivative in the
    hidden path (z, W1, c1): a learning rate that is trained, and a line search along directions already taken
    (arXiv 2412.10362, section 3.2).

    Args:
        optimizer: oplora.AdamW, an optimizer of create_oplora_optimizer, or Generators; also as accelerate prepared it.

    Returns:
        For each layer
        "lr"            the rate at which v moves. Of preset "auto" the one that was found, times the lr of the group of
                        B (or of whatever listens) over the highest lr so far. Else lr (1 + r sum h), by which AdamW's
                        kind moves v, the hidden path apart; r is 32 / hidden_width, and 1 for create_oplora_optimizer.
                        State "lean" does not keep h: there ||h|| sqrt(live units) stands for the sum, which is never
                        more. Generators know no lr, and do not have it;
        "norm_g"        ||g||, of A's and B's gradient together;
        "norm_A", "norm_B"  of the factors as they are now, and so for an adapter's other tensors ("norm_ia3_l");
        of preset "auto" alone
        "settled"       1 once the signal that the search follows has turned for the first time, and 0 before. The rate
                        is the whole model's, and so is this; where the loss is noisy it comes early;
        of all others, whose layers have generators of their own,
        "trainable_lr"  ||h||^2;
        "line_search"   ||J^T g||^2 / ||g||^2, the second term along g, comparable to the first;
        "live_units"    how many of h are not zero;
        and of state "lean" what the truncations dropped of their matrices' squared norms, 0 to 1:
        "dropped_moment"    of the first moment of W2 (in the scale of AdamW's step), cut to moment_rank;
        "dropped_weight"    of W2's change since the start, cut to weight_rank;
        "dropped_hidden_moment", "dropped_hidden_weight"  the same of W1.
        All but those of the factors and "settled" are of the last step's start, NaN for a layer that has not been
        stepped. Where processes divide the tensors (FSDP2, ZeRO), the factors' norms are of what is in this process: no
        process waits for another here.
    """
    generators = generators_of(optimizer)
    if isinstance(generators, AdamW):
        return _of_adamw(generators)
    return _of_generators(generators, getattr(inner_optimizer(optimizer), "inner", None))


def _of_adamw(optimizer: AdamW) -> dict[str, dict[str, float]]:
    stepper = optimizer._stepper
    states: list[LayerState] = stepper.states
    found = stepper.found.unbind() if stepper.finds_rate else ()
    norms, more = _of_factors([state.factors for state in states], [*(state.lr for state in states), *found])
    known = dict(zip(FOUND, more[len(states) :], strict=False))
    numbers = {}
    for state, report, lr, own in zip(states, _reports(states), more, norms, strict=False):
        step = NOT_STEPPED if report is None else state.step_numbers(report)
        if found:
            rate = math.nan if report is None else lr * known["rate"]
            told = {"lr": rate, "settled": float(known["turned"] > 0), "norm_g": math.sqrt(step.g_square)}
        else:
            rate = lr * (1 + state.engine.numbers.weight_ratio * step.h_sum)
            told = {"lr": rate, **_of_step(step), **state.stats(report)}
        numbers[state.name] = {**told, **own}
    return numbers


def _of_generators(generators: Generators, inner: torch.optim.Optimizer | None) -> dict[str, dict[str, float]]:
    """inner: what steps them, if that is known."""
    every = list(generators)
    ties, steps = [generator.factors for generator in every], _of_backwards(every)
    norms, _ = _of_factors(ties, [])
    numbers = {}
    for tie, step, own in zip(ties, steps, norms, strict=True):
        rate = {} if inner is None else {"lr": float(inner.param_groups[0]["lr"]) * (1 + step.h_sum)}
        numbers[tie.layer.name] = {**rate, **_of_step(step), **own}
    return numbers


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer itself, without what accelerate and others put around it."""
    ours = AdamW | Generators
    while not isinstance(optimizer, ours) and not hasattr(optimizer, "generators") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def generators_of(optimizer: Any, caller: str = "oplora.stats") -> AdamW | Generators:
    """What holds the generators of one of oplora's optimizers."""
    optimizer = inner_optimizer(optimizer)
    generators = getattr(optimizer, "generators", optimizer)
    if isinstance(generators, AdamW | Generators):
        return generators
    kind = type(optimizer)  # with its module: torch's own AdamW has the name of ours
    raise OPLoRATypeError(
        f"{caller}: expected an oplora optimizer (oplora.AdamW, or one of create_oplora_optimizer) or Generators, got "
        f"{kind.__name__} of {kind.__module__}."
    )


def _reports(states: Sequence[LayerState]) -> list[Tensor | None]:
    """Each layer's part of the core's report; a report, which many layers share, is fetched once."""
    fetched: dict[int, Tensor] = {}
    parts: list[Tensor | None] = []
    for state in states:
        if state.measured is None:
            parts.append(None)
            continue
        report, begin = state.measured
        if report.data_ptr() not in fetched:
            fetched[report.data_ptr()] = report.cpu()
        parts.append(fetched[report.data_ptr()][begin : begin + state.report_size])
    return parts


def _of_backwards(generators: Sequence[Generator]) -> list[StepNumbers]:
    reports = [g.report for g in generators if g.report]
    if not reports:
        return [NOT_STEPPED] * len(generators)
    norms = _norms([report[key] for report in reports for key in ("h", "g", "hidden")])
    live = [report["h"].count_nonzero() for report in reports]
    sums = [report["h"].sum(dtype=torch.float64) for report in reports]
    fetched, n = _fetched([*norms, *live, *sums]), len(norms)
    h, g, hidden = ([norm**2 for norm in fetched[i:n:3]] for i in range(3))
    live_units, h_sums = map(int, fetched[n : n + len(live)]), fetched[n + len(live) :]
    numbers = map(StepNumbers, h, live_units, g, hidden, h_sums)
    return [next(numbers) if generator.report else NOT_STEPPED for generator in generators]


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean, in float64."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(i)
    norms: list[Tensor] = [torch.empty(0)] * len(tensors)
    for indices in by_kind.values():
        some = torch._foreach_norm([tensors[i] for i in indices], 2, dtype=torch.float64)
        for i, norm in zip(indices, some, strict=True):
            norms[i] = norm
    return norms


def _fetched(numbers: Sequence[Tensor]) -> list[float]:
    """Tensors of one number each, from every device at once."""
    by_device: dict[torch.device, list[int]] = {}
    for i, number in enumerate(numbers):
        by_device.setdefault(number.device, []).append(i)
    values = [math.nan] * len(numbers)
    for indices in by_device.values():
        for i, value in zip(indices, torch.stack([numbers[i] for i in indices]).tolist(), strict=True):
            values[i] = value
    return values


def _of_step(step: StepNumbers) -> dict[str, float]:
    g_square = step.g_square
    return {
        "trainable_lr": step.h_square,
        "line_search": step.hidden_square / g_square if g_square > 0 else (math.nan if math.isnan(g_square) else 0.0),
        "live_units": step.live,
        "norm_g": math.sqrt(g_square),
    }


def _of_factors(ties: Sequence[Factors], more: Sequence[Tensor]) -> tuple[list[dict[str, float]], list[float]]:
    """Each layer's norms by name, and the numbers of `more`, which are fetched with them."""
    norms = _norms([parameter.detach() for tie in ties for parameter in tie.layer.parameters()])
    fetched = iter(_fetched([*norms, *more]))
    names = [[t.removeprefix("lora_").removeprefix("embedding_") for t in tie.layer.tensors] for tie in ties]
    return [{f"norm_{name}": next(fetched) for name in some} for some in names], list(fetched)
