"""State lean in plain float64 PyTorch, matrices written out: what the C core must agree with.

Each map W (rows, inputs) with bias c is held as dense matrices; a truncation is torch's SVD of the dense product. The
formulas are docs/lean.md's.
"""

from collections.abc import Iterable, Sequence

import pytest
import torch
from conftest import batches, make_model
from torch import Tensor, nn

import oplora
from oplora.engines import LayerState
from oplora.engines.settings import count_parameters, start_parameters, views

Rate = float | Tensor  # one for all rows, or one a row


def truncated(product: Tensor, rank: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(product, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def column(rate: Rate) -> Rate:
    return rate[:, None] if isinstance(rate, Tensor) else rate


class LeanMap:
    """W = s W0 + change, moment, R r^T, and AdamW on c with m and S."""

    def __init__(self, W0: Tensor, ranks: tuple[int, int]) -> None:
        rows, inputs = W0.shape
        self.W0, self.ranks = W0, ranks
        self.scale: Rate = 1.0
        self.mean, self.t = 0.0, 0
        self.change, self.moment = torch.zeros_like(W0), torch.zeros_like(W0)
        self.R, self.r = W0.new_zeros(rows), W0.new_zeros(inputs)
        self.c, self.m, self.S = W0.new_zeros(rows), W0.new_zeros(rows), W0.new_zeros(rows)

    @property
    def W(self) -> Tensor:
        return column(self.scale) * self.W0 + self.change

    def output(self, x: Tensor) -> Tensor:
        return self.W @ x + self.c

    def step(
        self, g: Tensor, x: Tensor, lr: Rate, weight_ratio: float, decay: Rate, b: Sequence[float], eps: float
    ) -> None:
        """weight_ratio: W's rate over c's. A row counts in both truncations by the step that it makes."""
        self.t += 1
        keep, first, second = 1 - decay, 1 - b[0] ** self.t, 1 - b[1] ** self.t
        mean_x = float(x.square().mean())
        fresh = (1 - b[1]) * mean_x * float(g.square().mean())
        self.mean = b[1] * self.mean + fresh
        if fresh > 0:
            self.r += fresh / self.mean * (x.square() / mean_x - self.r)
        self.R = b[1] * self.R + (1 - b[1]) * mean_x * g.square()
        root = self.r.sqrt()
        live = root > 0
        eps_row = eps / float(root[live].mean()) if live.any() else eps
        row = 1 / ((self.R / second).sqrt() + eps_row)
        col = torch.where(live, 1 / root, torch.zeros_like(root))

        moment = b[0] * self.moment + (1 - b[0]) * torch.outer(g, x)
        fastest = float(torch.as_tensor(lr, dtype=torch.float64).max())
        weight = row * (lr / fastest if fastest else 1.0)
        scaled = weight[:, None] * moment * col
        update = truncated(scaled, self.ranks[1])
        # where a row does not move its moment is what the others' directions keep of it
        directions = torch.linalg.svd(scaled, full_matrices=False)[2][: self.ranks[1]]
        still = moment * col @ directions.T @ directions / col.where(live, torch.ones_like(col))
        self.moment = torch.where(weight[:, None] > 0, update / weight[:, None] * root, still)
        step = fastest * weight_ratio / first * update
        self.change = truncated(column(keep) * self.change - step, self.ranks[0])
        self.scale = self.scale * keep

        self.m = b[0] * self.m + (1 - b[0]) * g
        self.S = b[1] * self.S + (1 - b[1]) * g.square()
        self.c = keep * self.c - lr / first * self.m / ((self.S / second).sqrt() + eps)


class LeanOracle:
    """One generator, from the start that oplora.Generators gives it."""

    def __init__(self, start: dict[str, Tensor], ranks: tuple[int, int] = (2, 1)) -> None:
        self.z = start["z"].double().clone()
        self.outer = LeanMap(start["W2"].double().clone(), ranks)
        self.hidden = LeanMap(start["W1"].double().clone(), ranks)
        self.z_m, self.z_s = torch.zeros_like(self.z), torch.zeros_like(self.z)

    @property
    def h(self) -> Tensor:
        return self.hidden.output(self.z).relu()

    def generate(self) -> Tensor:
        return self.outer.output(self.h)

    def gradients(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """d (H), the gradient of W1 z + c1, and that of z."""
        d = (self.outer.W.T @ g) * (self.h > 0)
        return d, self.hidden.W.T @ d

    def norm_square(self, g: Tensor) -> Tensor:
        """||.||^2 of the gradients of all five tensors."""
        d, dz = self.gradients(g)
        return (
            g.square().sum() * (self.h.square().sum() + 1)
            + d.square().sum() * (self.z.square().sum() + 1)
            + dz.square().sum()
        )

    def step(
        self,
        g: Tensor,
        lr: Rate,
        weight_ratio: float = 1.0,
        hidden_lr: float | None = None,
        weight_decay: Rate = 0.01,
        hidden_decay: float | None = None,
        b: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """lr and weight_decay: of all rows of W2 and c2, or of each; then the hidden path's must be given as well."""
        hidden_lr = float(lr) if hidden_lr is None else hidden_lr
        hidden_decay = float(weight_decay) if hidden_decay is None else hidden_decay
        h, (d, dz) = self.h, self.gradients(g)
        self.outer.step(g, h, lr, weight_ratio, lr * weight_decay, b, eps)
        self.hidden.step(d, self.z, hidden_lr, 1.0, hidden_lr * hidden_decay, b, eps)
        t = self.hidden.t
        self.z_m = b[0] * self.z_m + (1 - b[0]) * dz
        self.z_s = b[1] * self.z_s + (1 - b[1]) * dz.square()
        step = self.z_m / (1 - b[0] ** t) / ((self.z_s / (1 - b[1] ** t)).sqrt() + eps)
        self.z = (1 - hidden_lr * hidden_decay) * self.z - hidden_lr * step


def rows_of(state: LayerState) -> int:
    """N, of its W2."""
    return sum(state.factors.sizes)


def values(state: LayerState) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in state.factors.layer.parameters()])


def gradient(state: LayerState) -> Tensor:
    parameters = state.factors.layer.parameters()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters])


def oracle_of(state: LayerState) -> LeanOracle:
    widths = state.engine.state.settings
    flat = torch.zeros(count_parameters(state.factors, widths), dtype=torch.float64)
    start_parameters(flat, state.factors, widths)
    return LeanOracle(views(flat, widths.hidden_width, widths.latent_width), state.engine.state.ranks)


class Pair:
    """An optimizer and the oracles of its layers, fed with the same gradients."""

    def __init__(self, dtype: torch.dtype = torch.float64, model: nn.Module | None = None, **options: object) -> None:
        self.model = make_model(dtype) if model is None else model
        defaults = {"lr": 1e-2, "weight_decay": 0.1, "hidden_lr_ratio": 1.0, "betas": (0.9, 0.999), "eps": 1e-8}
        self.options = {**defaults, **options}
        self.optimizer = oplora.AdamW(self.model, state="lean", **self.options)
        self.states: list[LayerState] = self.optimizer._stepper.states
        self.oracles = [oracle_of(state) for state in self.states]
        pairs = zip(self.states, self.oracles, strict=True)
        self.bases = [values(state) - oracle.generate() for state, oracle in pairs]

    def step(self, max_norm: float | None = None) -> None:
        stepping = [
            (state, oracle, gradient(state))
            for state, oracle in zip(self.states, self.oracles, strict=True)
            if any(p.grad is not None for p in state.factors.layer.parameters())
        ]
        scale = 1.0
        if max_norm is not None:
            norm = torch.stack([oracle.norm_square(g) for _, oracle, g in stepping]).sum().sqrt()
            assert self.optimizer.clip_grad_norm_(max_norm).item() == pytest.approx(norm.item(), rel=1e-9)
            scale = min(1.0, max_norm / (norm.item() + 1e-6))
        self.optimizer.step()
        lr, ratio = self.options["lr"], self.options["hidden_lr_ratio"]
        numbers = dict(weight_decay=self.options["weight_decay"], b=self.options["betas"], eps=self.options["eps"])
        for state, oracle, g in stepping:
            oracle.step(
                g * scale,
                lr,
                weight_ratio=32 / state.engine.state.settings.hidden_width,
                hidden_lr=lr * ratio,
                **numbers,
            )

    def train(
        self, steps: int, max_norm: float | None = None, pairs: Iterable[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        for x, y in batches(steps, torch.float64) if pairs is None else pairs:
            self.optimizer.zero_grad()
            (self.model(x) - y).square().mean().backward()
            self.step(max_norm)

    def error(self) -> float:
        """The largest relative distance of a layer's factors from the oracle's."""
        errors = []
        for state, oracle, base in zip(self.states, self.oracles, self.bases, strict=True):
            truth = base + oracle.generate()
            errors.append(float((values(state) - truth).norm() / truth.norm().clamp_min(1e-6)))
        return max(errors)
