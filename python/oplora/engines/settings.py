"""What a generator is made with, its flat parameters, and the paper's random numbers in them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _core
from ..errors import OPLoRATypeError, OPLoRAValueError
from .factors import Factors
from .memory import CPU, allocate

__all__ = ["Settings", "count_parameters", "start_parameters", "views", "weight_ratio"]


@dataclass(frozen=True)
class Settings:
    """What a generator is made with; the numbers of the paper, but for the seed.

    start: of the random rows of W2, "uniform" (the paper's) or "sign" (+-1/sqrt(3 H), the same variance).
    """

    hidden_width: int = 32
    latent_width: int = 128
    latent_std: float = 0.01
    seed: int = 0
    start: str = "uniform"

    def __post_init__(self) -> None:
        for name in ("hidden_width", "latent_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OPLoRAValueError(f"oplora: {name} is {value!r}, expected a whole number of at least 1.")
        if not isinstance(self.latent_std, int | float) or isinstance(self.latent_std, bool):
            raise OPLoRATypeError(f"oplora: latent_std is {self.latent_std!r}, expected a number of at least 0.")
        if not 0 <= self.latent_std < float("inf"):
            raise OPLoRAValueError(f"oplora: latent_std is {self.latent_std!r}, expected a number of at least 0.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**64:
            raise OPLoRAValueError(f"oplora: seed is {self.seed!r}, expected a whole number in [0, 2^64).")
        if self.start not in ("uniform", "sign"):
            raise OPLoRAValueError(f"oplora: start is {self.start!r}, expected 'uniform' or 'sign'.")


def count_parameters(factors: Factors, settings: Settings) -> int:
    """Numbers in one generator: W2, c2, W1, c1 and z."""
    return _count(settings.hidden_width, settings.latent_width, sum(factors.sizes))


def _count(H: int, Z: int, N: int) -> int:
    return H * N + N + H * Z + H + Z


def weight_ratio(hidden_width: int) -> float:
    """The learning rate of W2 as a multiple of that of c2: 1 at the paper's width of 32.

    AdamW moves every entry of W2 by about its rate, and so v by the rate times the sum of h, which grows with H. With
    32 / H the best rate of one width is that of every other; benchmarks/bench_width.py shows it.
    """
    return 32 / hidden_width


def start_parameters(flat: Tensor, factors: Factors, settings: Settings) -> None:
    """Writes the paper's start of the layer's generator into its flat parameters, all zero."""
    H, Z, rows = settings.hidden_width, settings.latent_width, _rows_here(factors)
    count = flat.numel() if rows is None else _count(H, Z, sum(factors.whole_sizes))
    is_in_place = rows is None and flat.device.type == "cpu"
    on_cpu = flat if is_in_place else allocate(count, flat.dtype, huge_pages=False)
    _core.start(
        on_cpu.numpy(),
        hidden_width=H,
        latent_width=Z,
        seed=settings.seed,
        layer=factors.position,
        latent_std=settings.latent_std,
        random=factors.random_rows(),
        start=settings.start,  # type: ignore[arg-type]
    )
    if rows is not None:
        own, whole = views(flat, H, Z), views(on_cpu, H, Z)
        own["W2"].copy_(whole["W2"][rows])
        for name in ("z", "W1", "c1"):
            own[name].copy_(whole[name])
    elif on_cpu is not flat:
        flat.copy_(on_cpu)


def _rows_here(factors: Factors) -> Tensor | None:
    """Which rows of the whole W2 are here, where processes divide what starts at random; otherwise None."""
    if factors.places is None or not any(factors.is_random()):
        return None
    rows, begin = [], 0
    for (count, first, run, stride, _), size in zip(factors.places, factors.sizes, strict=True):
        at = torch.arange(size, device=CPU)
        rows.append(begin + first + at.div(run, rounding_mode="floor") * stride + at % run)
        begin += count
    return torch.cat(rows)


def views(flat: Tensor, hidden_width: int, latent_width: int) -> dict[str, Tensor]:
    """z (Z,), W1 (H, Z), c1 (H,), W2 (N, H), c2 (N,) as views of the flat parameters (or of a moment)."""
    H, Z = hidden_width, latent_width
    N = (flat.numel() - H * Z - H - Z) // (H + 1)
    W2, c2, W1, c1, z = flat.split([H * N, N, H * Z, H, Z])
    return {"z": z, "W1": W1.view(H, Z), "c1": c1, "W2": W2.view(H, N).t(), "c2": c2}
