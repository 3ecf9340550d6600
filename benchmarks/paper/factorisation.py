"""Matrix factorisation, the paper's appendix B.2: B A of rank 8 is fitted to M (100, 100) with entries from U(0, 1).

The loss is mean((B A - M)^2) over the least that any B A of that rank reaches, which the SVD tells: 1 is the optimum.
There is no noise and nothing to generalise to, so validation and test are the loss at the end, of matrices that differ
by seed. Besides:

    effective_rank   exp(entropy of the normalised singular values) of B A;  its optimum is that of M cut to rank 8
    cosine           of two gradients of (A, B) ten steps apart, mean over the training: how quickly its direction turns
    gradient_norm    of (A, B), mean over the training
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

APART = 10  # steps


class Factorisation:
    def __init__(self, seed: int, n: int, r: int) -> None:
        self.M = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
        self.r = r
        self.best = torch.linalg.svdvals(self.M)[r:].square().sum() / n**2
        layer = nn.Linear(n, n, bias=False)
        nn.init.zeros_(layer.weight)
        self.base = nn.Sequential(OrderedDict(product=layer))
        self.eye = torch.eye(n)
        self.gradients: list[Tensor] = []

    def loss(self, model: nn.Module) -> Tensor:
        loss: Tensor = (model(self.eye).T - self.M).square().mean() / self.best
        return loss

    def observe(self, model: nn.Module) -> None:
        """After every backward."""
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients))

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        product = model(self.eye).T
        loss = ((product - self.M).square().mean() / self.best).item()
        gradients = torch.stack(self.gradients)
        norms = gradients.norm(dim=1)
        pairs = torch.cosine_similarity(gradients[:-APART], gradients[APART:], dim=1)
        optimal = torch.linalg.svdvals(self.M)[: self.r]
        return {
            "loss": loss,
            "effective_rank": effective_rank(torch.linalg.svdvals(product)),
            "optimal_effective_rank": effective_rank(optimal),
            "cosine": pairs.mean().item() if len(pairs) else 0.0,
            "gradient_norm": norms.mean().item(),
        }


def effective_rank(singular_values: Tensor) -> float:
    p = singular_values.double() / singular_values.double().sum()
    p = p[p > 0]
    return float((-(p * p.log()).sum()).exp())


FACTORISATION = partial(Factorisation, n=100, r=8)
TOY = partial(Factorisation, n=12, r=2)
