"""The data of finetune_diffusion.py: pictures with captions, what is cached of them, and their order."""

import argparse
import csv
import hashlib
import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_models import StableDiffusion
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NAMES_SHOWN = 10


@dataclass(frozen=True)
class Record:
    path: Path
    caption: str


class SkipError(Exception):
    """Why a picture cannot be used."""


def find_records(args: argparse.Namespace) -> tuple[list[Record], dict[str, str]]:
    """The pictures that have a caption, and of the others why not."""
    folder = args.data
    if not folder.is_dir():
        sys.exit(f"error: --data {folder} is no folder.")
    captions = read_metadata(folder)
    pictures = {p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file()}
    skipped = {str(p.relative_to(folder)): "named in the metadata, not there" for p in captions.keys() - pictures}
    if not pictures:
        kinds = " ".join(sorted(PICTURE_SUFFIXES))
        sys.exit(f"error: no pictures in {folder}; looked for {kinds}, in subfolders too.")
    records = []
    for path in sorted(pictures):
        caption = captions.get(path) or read_caption(path) or args.caption
        if caption:
            records.append(Record(path, caption))
        else:
            skipped[str(path.relative_to(folder))] = "no caption"
    if not records:
        sys.exit(
            f"error: none of the {len(pictures)} pictures in {folder} has a caption. Write them into metadata.jsonl "
            '(a line a picture: {"file_name": "a.png", "text": "..."}), metadata.csv, or a.txt beside a.png; or give '
            "one for all by --caption."
        )
    return records, skipped


def read_metadata(folder: Path) -> dict[Path, str]:
    """Captions from metadata.jsonl and metadata.csv, in subfolders too, by picture."""
    captions: dict[Path, str] = {}
    for path in sorted(p for p in folder.rglob("metadata.*") if p.suffix in (".jsonl", ".csv")):
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".csv":
                rows = list(csv.DictReader(io.StringIO(text)))
            else:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            captions |= {path.parent / row["file_name"]: str(row["text"] or "").strip() for row in rows}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error, KeyError, TypeError) as error:
            reason = f"a row lacks {error}" if isinstance(error, KeyError) else error
            sys.exit(f"error: cannot read {path}: {reason}. Each row needs file_name and text.")
    return captions


def read_caption(path: Path) -> str:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read the caption {path.with_suffix('.txt')}: {error}")


def open_picture(path: Path, min_size: int) -> Image.Image:
    """RGB, upright; what is transparent becomes white."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            picture = picture.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SkipError(f"does not decode: {error}") from error
    if min(picture.size) < min_size:
        raise SkipError(f"{picture.width} x {picture.height}, smaller than {min_size}")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def cut(picture: Image.Image, resolution: int, flip: bool, corner: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Pixels (3, resolution, resolution) in [-1, 1], and what SDXL is told: original size, crop and target size.

    corner: where the crop lies in what is over, each in [0, 1]; (0.5, 0.5) is the centre.
    """
    original = (picture.height, picture.width)
    scale = resolution / min(picture.size)
    size = [max(resolution, round(side * scale)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    top, left = round(corner[0] * (size[1] - resolution)), round(corner[1] * (size[0] - resolution))
    picture = picture.crop((left, top, left + resolution, top + resolution))
    if flip:
        picture, left = ImageOps.mirror(picture), size[0] - resolution - left
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([*original, top, left, resolution, resolution], dtype=torch.float32)


def generator_for(*key: int) -> torch.Generator:
    """Random numbers that depend on the key alone: the same for both methods, any device and a resumed run."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class Pictures:
    """The pictures that can be used, and what is cached of them."""

    def __init__(self, architecture: StableDiffusion, args: argparse.Namespace, device: torch.device) -> None:
        self.architecture, self.args = architecture, args
        records, self.skipped = find_records(args)
        self.records: list[Record] = []
        self.latents: list[list[tuple[Tensor, Tensor]]] = []  # of each record, and mirrored: moments and time_ids
        self.texts: dict[str, dict[str, Tensor]] = {}  # by caption
        if args.cache_latents:
            architecture.vae.to(device)
        self._read(records)
        if args.cache_latents:
            architecture.vae.to("cpu")
        self._report()

    def _read(self, records: list[Record]) -> None:
        """Every picture is decoded once before training, so that none fails in the middle of it."""
        label = "encoding pictures" if self.args.cache_latents else "checking pictures"
        for record in tqdm(records, desc=label, unit="picture", disable=not self.args.show_progress):
            try:
                picture = open_picture(record.path, self.args.min_size)
            except SkipError as reason:
                self.skipped[str(record.path.relative_to(self.args.data))] = str(reason)
                continue
            self.records.append(record)
            if self.args.cache_latents:
                flips = (False, True) if self.args.random_flip else (False,)
                self.latents.append([self._encode(picture, flip) for flip in flips])

    def _encode(self, picture: Image.Image, flip: bool) -> tuple[Tensor, Tensor]:
        pixels, time_ids = cut(picture, self.args.resolution, flip, (0.5, 0.5))
        return self.architecture.moments(pixels[None])[0].cpu(), time_ids

    def _report(self) -> None:
        folder, names = self.args.data, [f"{name} ({reason})" for name, reason in sorted(self.skipped.items())]
        more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        listed = ", ".join(names[:NAMES_SHOWN]) + more
        if not self.records:
            sys.exit(f"error: none of the pictures in {folder} can be used: {listed}.")
        if names and self.args.show_progress:
            print(f"{folder}: {len(names)} of {len(names) + len(self.records)} pictures skipped: {listed}", flush=True)

    @torch.no_grad()
    def cache_texts(self, device: torch.device) -> None:
        captions = list(dict.fromkeys(record.caption for record in self.records))
        for caption in tqdm(captions, desc="encoding captions", disable=not self.args.show_progress):
            text = self.architecture.text([caption], device)
            self.texts[caption] = {name: tensor[0].cpu() for name, tensor in text.items()}

    def split(self) -> tuple[list[int], list[int]]:
        """The pictures to train on and those held out; which these are depends on --seed-held-out alone."""
        count = len(self.records)
        held_out = math.ceil(self.args.held_out_fraction * count)
        if held_out >= count:
            sys.exit(
                f"error: --held-out-fraction {self.args.held_out_fraction} keeps back {held_out} of {count} pictures; "
                "none is left to train on."
            )
        order = torch.randperm(count, generator=generator_for(self.args.seed_held_out)).tolist()
        return sorted(order[held_out:]), sorted(order[:held_out])

    def digest(self) -> str:
        names = [f"{r.path.relative_to(self.args.data)}\t{r.caption}" for r in self.records]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


class Draws(Dataset):
    """The n-th draw of a picture: the picture, with noise and a timestep that depend on the seed and n.

    strata: n-th timesteps are spread evenly, each in its own of so many equal parts.
    """

    def __init__(self, pictures: Pictures, seed: int, strata: int = 1, augment: bool = True) -> None:
        # no reference to the pipeline: workers get a copy of all that is here
        self.args, self.records = pictures.args, pictures.records
        self.latents, self.texts, self.shape = pictures.latents, pictures.texts, pictures.architecture.latent_shape
        self.seed, self.strata, self.augment = seed, strata, augment

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, number = key
        args, record = self.args, self.records[index]
        generator = generator_for(self.seed, number)
        u = (number % self.strata + torch.rand((), generator=generator)) / self.strata
        vae_noise, noise = (torch.randn(self.shape, generator=generator) for _ in range(2))
        flip_drawn, *corner = torch.rand(3, generator=generator).tolist()
        flip = self.augment and args.random_flip and flip_drawn < 0.5
        item = {"u": u, "vae_noise": vae_noise, "noise": noise, "caption": record.caption}
        if self.latents:
            item["moments"], item["time_ids"] = self.latents[index][flip]
        else:
            place = tuple(corner) if self.augment and args.random_crop else (0.5, 0.5)
            picture = open_picture(record.path, args.min_size)
            item["pixels"], item["time_ids"] = cut(picture, args.resolution, flip, place)
        if self.texts:
            item["text"] = self.texts[record.caption]
        return item


class Batches:
    """Endless epochs, each in another order, from draw `first` on; of each batch of all processes, this one's share."""

    def __init__(self, indices: list[int], seed: int, size: int, rank: int, processes: int, first: int) -> None:
        self.indices, self.seed, self.size = indices, seed, size
        self.rank, self.processes, self.first = rank, processes, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        numbered = ((index, number) for number, index in enumerate(self._order()))
        draws = islice(numbered, self.first, None)
        while True:
            everywhere = list(islice(draws, self.size * self.processes))
            yield everywhere[self.rank * self.size : (self.rank + 1) * self.size]

    def _order(self) -> Iterator[int]:
        generator = generator_for(self.seed)
        while True:
            for position in torch.randperm(len(self.indices), generator=generator).tolist():
                yield self.indices[position]
