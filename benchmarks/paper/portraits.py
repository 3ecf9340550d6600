"""A few dozen pictures of one style: a small U-Net learns to take noise off emoji that are no faces, is frozen, and
then adapts to 60 faces. Validation and test have other faces, with noise and timesteps that are always the same.

The U-Net is diffusers' UNet2DModel, on pixels: 32 x 32, no text, attention at 16 x 16 and 8 x 8. Pictures and names are
those of small_diffusion.py, groups are Unicode's. What it has learnt is kept in runs/paper; it takes a few minutes.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import harness

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SIDE, TIMESTEPS = 32, 1000
TRAINED, VALIDATED = 60, 30  # faces; the others are for the test
DRAWS = 4  # of noise and timestep, for a picture that is measured
Splits = dict[str, Tensor]  # (count, 3, SIDE, SIDE) from -1 to 1


# ---- pictures ----


def subgroups(text: str) -> dict[int, str]:
    """Of Unicode's list: by an emoji's number the subgroup's name."""
    found, subgroup = {}, ""
    for line in text.splitlines():
        if line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := re.match(r"([0-9A-F]+)( FE0F)?\s*; fully-qualified", line):
            found[int(match[1], 16)] = subgroup
    return found


@lru_cache(1)
def emoji() -> Splits:
    """The faces, divided once, and all "others"."""
    import small_diffusion

    for path, package in small_diffusion.SOURCES.items():
        if path != small_diffusion.CLIPARTS and not path.exists():
            sys.exit(f"error: {path} is not there. Run: apt-get install {package}")
    subgroup = subgroups(small_diffusion.EMOJI_NAMES.read_text(encoding="utf-8"))
    faces, others = [], []
    for code, picture, _ in small_diffusion.emoji():
        (faces if "face" in subgroup[code] else others).append(np.asarray(picture.resize((SIDE, SIDE))))
    some = small_diffusion.to_tensor(np.stack(faces))
    some = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(0))]
    parts = some.tensor_split([TRAINED, TRAINED + VALIDATED])
    named = dict(zip(("train", "validation", "test"), parts, strict=True))
    return {**named, "others": small_diffusion.to_tensor(np.stack(others))}


def toy() -> Splits:
    generator = torch.Generator().manual_seed(0)
    counts = {"train": 6, "validation": 2, "test": 2, "others": 8}
    return {name: torch.rand(n, 3, SIDE, SIDE, generator=generator) * 2 - 1 for name, n in counts.items()}


# ---- the model ----


def new_unet(channels: tuple[int, int, int]) -> nn.Module:
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=SIDE,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=channels,
            layers_per_block=1,
            attention_head_dim=16,
            norm_num_groups=16,
        )


def kept_share(t: Tensor) -> Tensor:
    """Of the picture's variance at a timestep: the cosine schedule."""
    return torch.cos((t + 1) / (TIMESTEPS + 1) * torch.pi / 2).square()


def noise_loss(model: nn.Module, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    kept = kept_share(t)[:, None, None, None]
    return F.mse_loss(model(kept.sqrt() * x + (1 - kept).sqrt() * noise, t).sample, noise)


def drawn(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The pictures, noise for each, and a timestep."""
    noise = torch.randn(x.shape, generator=generator)
    return x, noise, torch.randint(0, TIMESTEPS, (len(x),), generator=generator)


def batches(pictures: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(pictures), generator=generator).split(batch):
            if len(rows) == min(batch, len(pictures)):
                yield pictures[rows]


def pretrain(model: nn.Module, pictures: Tensor, steps: int, batch: int = 24) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1, pct_start=0.1)
    order = batches(pictures, batch, generator)
    harness.learn(model, lambda: noise_loss(model, *drawn(next(order), generator)), optimizer, scheduler, steps)


@lru_cache(1)
def prepared(
    load: Callable[[], Splits], channels: tuple[int, int, int], steps: int, name: str | None
) -> tuple[nn.Module, Splits]:
    splits, model = load(), new_unet(channels)
    return harness.pretrained(model, partial(pretrain, model, splits["others"], steps), name), splits


class Portraits:
    """The mean squared error of the noise in batches of pictures."""

    def __init__(
        self,
        seed: int,
        load: Callable[[], Splits] = emoji,
        channels: tuple[int, int, int] = (16, 48, 96),
        steps: int = 1000,
        name: str | None = "small-unet",
        batch: int = 8,
    ) -> None:
        model, self.splits = prepared(load, channels, steps, name)
        self.base = copy.deepcopy(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = batches(self.splits["train"], batch, self.generator)

    def loss(self, model: nn.Module) -> Tensor:
        return noise_loss(model, *drawn(next(self.order), self.generator))

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        pictures = self.splits[split].repeat(DRAWS, 1, 1, 1)
        parts = [part.split(40) for part in drawn(pictures, torch.Generator().manual_seed(0))]
        losses = [noise_loss(model, *part).item() * len(part[0]) for part in zip(*parts, strict=True)]
        return {"loss": sum(losses) / len(pictures)}


FACES = Portraits
TOY = partial(Portraits, load=toy, channels=(16, 16, 16), steps=1, name=None, batch=2)
