"""The generator's maths in plain PyTorch: the explanation, the oracle of the tests, and the way on other devices."""

import torch
from torch import Tensor

__all__ = ["generate", "generate_backward"]


def generate(z: Tensor, W1: Tensor, c1: Tensor, W2: Tensor, c2: Tensor) -> Tensor:
    """v = W2 ReLU(W1 z + c1) + c2, for z (Z,), W1 (H, Z), c1 (H,), W2 (N, H), c2 (N,)."""
    return torch.addmv(c2, W2, torch.relu(torch.addmv(c1, W1, z)))


def generate_backward(
    g: Tensor, z: Tensor, W1: Tensor, c1: Tensor, W2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From g = dL/dv (N,): the gradients of z, W1 and c1, and h (H,), with which that of W2 is g h^T."""
    h = torch.relu(torch.addmv(c1, W1, z))
    d = torch.mv(W2.t(), g) * (h > 0)
    return torch.mv(W1.t(), d), torch.outer(d, z), d, h
