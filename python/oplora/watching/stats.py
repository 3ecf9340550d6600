"""What the generators do to training, per layer: the two terms of the paper's section 3.2, and norms."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..definition import Generator, Generators
from ..engines import Factors, LayerState
from ..errors import OPLoRATypeError
from ..optim import AdamW

__all__ = ["generators_of", "inner_optimizer", "stats"]

StepNumbers = tuple[float, float, float, float]  # ||h||^2, units that are on, ||g||^2, ||J^T g||^2
NOT_STEPPED = (math.nan, math.nan, math.nan, math.nan)


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
    generators = generators_of(optimizer)
    if isinstance(generators, AdamW):
        states = generators._stepper.states
        reports = _reports(states)
        steps = [s.step_numbers(r) if r is not None else NOT_STEPPED for s, r in zip(states, reports, strict=True)]
        own = [s.stats(r) for s, r in zip(states, reports, strict=True)]
        ties = [s.factors for s in states]
    else:
        every = list(generators)
        ties, steps, own = [g.factors for g in every], _of_backwards(every), [{}] * len(every)
    norms = _norms([p.detach() for tie in ties for p in tie.layer.parameters()])
    numbers, begin = {}, 0
    for tie, step, more in zip(ties, steps, own, strict=True):
        end = begin + len(tie.layer.tensors)
        numbers[tie.layer.name] = {**_of_step(*step), **_of_factors(tie, norms[begin:end]), **more}
        begin = end
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
    squares = [norm**2 for norm in _norms([report[key] for report in reports for key in ("h", "g", "hidden")])]
    live = _fetched([report["h"].count_nonzero() for report in reports])
    numbers = iter(zip(squares[::3], map(int, live), squares[1::3], squares[2::3], strict=True))
    return [next(numbers) if g.report else NOT_STEPPED for g in generators]


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """Euclidean, in float64."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(i)
    norms = [math.nan] * len(tensors)
    for indices in by_kind.values():
        some = torch._foreach_norm([tensors[i] for i in indices], 2, dtype=torch.float64)
        for i, norm in zip(indices, _fetched(some), strict=True):
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


def _of_step(h_square: float, live: float, g_square: float, hidden_square: float) -> dict[str, float]:
    return {
        "trainable_lr": h_square,
        "line_search": hidden_square / g_square if g_square > 0 else (math.nan if math.isnan(g_square) else 0.0),
        "live_units": live,
        "norm_g": math.sqrt(g_square),
    }


def _of_factors(factors: Factors, norms: Sequence[float]) -> dict[str, float]:
    names = (tensor.removeprefix("lora_").removeprefix("embedding_") for tensor in factors.layer.tensors)
    return {f"norm_{name}": norm for name, norm in zip(names, norms, strict=True)}
