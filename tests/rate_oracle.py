"""Preset "auto" in plain PyTorch: generators v = start + W2 h whose gradients autograd makes, and the rule of
docs/rate.md in plain numbers.

What is scaled together, W2 by 1/s and h by s, generates the same. So when h moves, W2 and its second moment follow, and
what was generated stays: h is a rate for the steps to come.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Search:
    """The rate, from what a step's gradients tell."""

    def __init__(self) -> None:
        self.rate, self.pace, self.steps = 1e-4, 0.7, 0
        self.signal = self.scale = self.recent = 0.0

    def __call__(self, signal: float, gain: float, recent: float) -> float:
        last, self.signal = self.signal, (self.signal + signal) / 2
        self.scale = (self.scale + self.rate * gain) / 2
        self.recent = (self.recent + recent) / 2
        if last * self.signal < 0:
            self.pace /= 2
        aim = 0.4 * (1 - 200 / max(self.steps, 200))
        slope = 2 * (self.signal / self.scale - aim) if self.scale > 0 else 0.0
        slope = min(1.0, max(-1.0, slope))
        if slope > 0 > self.recent:
            slope = 0.0
        if self.steps > 0:
            pace = max(self.pace, 4 / self.steps) if slope < 0 else 2 / self.steps
            self.rate = min(10.0, self.rate * math.exp(-slope * min(0.7, pace)))
        self.steps += 1
        return self.rate


def remembered(step: int, grows: bool) -> float:
    """Squares in the mean of squares, unless beta2 has it forget more: all. Of a gradient that grows from nothing, as
    A's does with B, the latest quarter up to step 20, then all since."""
    if not grows:
        return step
    return (step + 3) / 4 if step < 20 else step - 14.25


class Oracle:
    """Steps `parameters` by the gradients in them. listens: whether W2's rows of each tell h how to move."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        listens: Sequence[bool],
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self.parameters, self.listens = list(parameters), list(listens)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.starts = [p.detach().clone() for p in self.parameters]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.W2 = [torch.zeros_like(p, requires_grad=True) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.search, self.steps = Search(), 0

    def step(self, shares: Sequence[float] | None = None) -> None:
        """shares: of the rate, for every tensor."""
        shares = [1.0] * len(self.parameters) if shares is None else shares
        self.steps += 1
        h = torch.tensor(self.search.rate, dtype=torch.float64, requires_grad=True)
        v = [
            start + W2 * (h if listens else h.detach())
            for start, W2, listens in zip(self.starts, self.W2, self.listens, strict=True)
        ]
        gradients = [p.grad for p in self.parameters]
        torch.autograd.backward(v, gradients)
        directions = [self._direction(i, h.item()) for i in range(len(v))]
        listening = [i for i, listens in enumerate(self.listens) if listens]
        highest = max(shares)
        gain = sum(shares[i] / highest * (gradients[i] * directions[i]).sum().item() for i in listening)
        late = sum((gradients[i] * (v[i] - self.parameters[i])).sum().item() for i in listening)
        moved = self.search(h.item() * h.grad.item(), gain, late) / h.item()
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                self.W2[i] /= moved
                self.squares[i] *= moved**2
                self.W2[i] -= shares[i] * (directions[i] + self.weight_decay * parameter)
                self.W2[i].grad = None
                self._average(i, parameter)

    def _direction(self, i: int, h: float) -> Tensor:
        beta2, gradient = self.betas[1], self.W2[i].grad
        assert gradient is not None
        share = max(1 - beta2, 1 / remembered(self.steps, grows=not self.listens[i]))
        self.squares[i] = (1 - share) * self.squares[i] + share * gradient**2
        return gradient / (self.squares[i].sqrt() + self.eps * h)

    def _average(self, i: int, parameter: nn.Parameter) -> None:
        v, beta1 = self.starts[i] + self.W2[i] * self.search.rate, self.betas[0]
        self.averages[i] += 9 / (self.steps + 8) * (v - self.averages[i])
        parameter.copy_((1 - beta1) * v + beta1 * self.averages[i])
