"""Fine-tunes Stable Diffusion 1.x, 2.x, SDXL or Flux on a folder of pictures with OP-LoRA, or with LoRA.

    python examples/finetune_diffusion.py --model stabilityai/stable-diffusion-xl-base-1.0 --data my-pictures \
        --output runs/mine --validation-prompt "a harbour at dawn"

The architecture follows from the checkpoint. A picture's caption stands in metadata.jsonl or metadata.csv (columns
file_name and text, as in the imagefolder of datasets), in a file NAME.txt beside the picture, or is --caption.

Both methods train the same adapter on the same pictures in the same order with the same noise and timesteps; they
differ in the optimizer (make_optimizer below): OP-LoRA finds its learning rate, LoRA takes --lr. Out comes
pytorch_lora_weights.safetensors, an ordinary LoRA that pipeline.load_lora_weights reads, and with --kohya the file
that ComfyUI and others read. docs/diffusion.md tells the rest.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import diffusers
import matplotlib
import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import _collate_lora_metadata, cast_training_params, compute_snr, free_memory
from diffusers.utils import make_image_grid
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import oplora

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"lora": "LoRA", "oplora": "OP-LoRA"}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = "pytorch_lora_weights.safetensors"
PROGRESS = "progress.json"
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NAMES_SHOWN = 10
LR = 1e-4  # where none is found
# what a resumed run may change: it has no influence on the course of the training
FREE_SETTINGS = {
    *("model", "variant", "revision", "data", "output", "workers", "kohya", "gradient_checkpointing"),
    *("cache_latents", "cache_text", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit"),
    *("validation_prompt", "negative_prompt", "validation_steps", "num_validation_images", "inference_steps"),
    *("validation_guidance", "eval_steps"),
}


# ---- the method: all that differs ----


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    given = {"lr": args.lr, "betas": args.betas and tuple(args.betas)}
    shared = {name: value for name, value in given.items() if value is not None}
    shared |= {"eps": args.eps, "weight_decay": args.weight_decay}
    if args.method == "lora":
        return torch.optim.AdamW(trainable(model), **shared)
    return oplora.AdamW(
        model,
        **shared,
        hidden_width=args.hidden_width,
        preset=args.preset,
        state=args.oplora_state,
        seed=args.seed,
    )


def clip_gradients(accelerator: Accelerator, model: nn.Module, optimizer: Any, max_norm: float) -> None:
    if isinstance(optimizer.optimizer, oplora.AdamW):  # it trains the generators, so their gradients' norm counts
        accelerator.unscale_gradients(optimizer)
        optimizer.optimizer.clip_grad_norm_(max_norm)
    else:
        accelerator.clip_grad_norm_(trainable(model), max_norm)


def found_lr(optimizer: Any) -> float | None:
    """The rate that OP-LoRA has found by now, of which a schedule makes less; None where it was given."""
    found = next((state["found"] for state in optimizer.state.values() if "found" in state), None)
    return None if found is None else float(found[0])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ---- the architectures ----


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a U-Net that predicts the noise, or v, in the latents of a VAE."""

    name: ClassVar = "sd"
    denoiser: ClassVar = "unet"
    encoders: ClassVar = ("text_encoder",)  # those that the pipeline has
    trained_encoders: ClassVar = ("text_encoder",)  # those that --train-text-encoder trains

    def __init__(self, pipeline: Any, args: argparse.Namespace, dtype: torch.dtype) -> None:
        self.pipeline, self.args, self.dtype = pipeline, args, dtype
        self.step = pipeline.vae_scale_factor  # pixels to a latent
        self.default_resolution = pipeline.unet.config.sample_size * self.step
        self._prepare_schedule()

    def _prepare_schedule(self) -> None:
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            sys.exit(
                f"error: {self.args.model} predicts {self.scheduler.config.prediction_type!r}; this script trains "
                "models that predict epsilon or v_prediction."
            )
        if getattr(self.pipeline.vae.config, "latents_mean", None) is not None:
            sys.exit(f"error: {self.args.model} normalises its latents by mean and deviation, which is not supported.")

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.args.resolution // self.step
        return (self.vae.config.latent_channels, side, side)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """(b, 3, height, width) in [-1, 1] -> mean and log-variance of the latents, (b, 2 c, h, w)."""
        with torch.autocast(self.vae.device.type, enabled=False):  # SDXL's VAE overflows in float16
            return self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.parameters.float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample of the VAE's posterior, in the scale of the denoiser."""
        posterior = DiagonalGaussianDistribution(moments)
        return (posterior.mean + posterior.std * noise - self._shift) * self.vae.config.scaling_factor

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self._shift
        with torch.autocast(self.vae.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            pixels = self.vae.decode(scaled).sample
        return self.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")

    def text(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(captions, device, 1, False)
        return {"prompt_embeds": embeds}

    def validation_text(self, prompt: str, negative: str, device: torch.device) -> dict[str, Tensor]:
        """The pipeline's arguments for a prompt."""
        positive, negative = self.pipeline.encode_prompt(prompt, device, 1, True, negative)
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For u (b,), uniform in [0, 1): the noisy latents, the denoiser's target and its timesteps."""
        timesteps = (u * self.scheduler.config.num_train_timesteps).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.scheduler.config.prediction_type == "v_prediction":
            return noisy, self.scheduler.get_velocity(latents, noise, timesteps), timesteps
        return noisy, noise, timesteps

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Of the losses at the timesteps: min(snr, gamma) / snr, for v-prediction / (snr + 1) (min-SNR)."""
        if self.args.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        plus = 1 if self.scheduler.config.prediction_type == "v_prediction" else 0
        return snr.clamp(max=self.args.snr_gamma) / (snr + plus)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], time_ids: Tensor
    ) -> Tensor:
        return denoiser(noisy, timesteps, text["prompt_embeds"].to(noisy.dtype), return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, and a U-Net that is told the picture's original size and crop."""

    name: ClassVar = "sdxl"
    encoders: ClassVar = ("text_encoder", "text_encoder_2")
    trained_encoders: ClassVar = ("text_encoder", "text_encoder_2")

    def text(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def validation_text(self, prompt: str, negative: str, device: torch.device) -> dict[str, Tensor]:
        encoded = self.pipeline.encode_prompt(prompt, device=device, negative_prompt=negative)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, encoded, strict=True))

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], time_ids: Tensor
    ) -> Tensor:
        added = {"text_embeds": text["pooled_prompt_embeds"].to(noisy.dtype), "time_ids": time_ids.to(noisy.dtype)}
        embeds = text["prompt_embeds"].to(noisy.dtype)
        return denoiser(noisy, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]


class Flux(StableDiffusion):
    """Flux: a transformer that predicts the velocity from picture to noise (flow matching)."""

    name: ClassVar = "flux"
    denoiser: ClassVar = "transformer"
    encoders: ClassVar = ("text_encoder", "text_encoder_2")
    trained_encoders: ClassVar = ("text_encoder",)

    def __init__(self, pipeline: Any, args: argparse.Namespace, dtype: torch.dtype) -> None:
        self.pipeline, self.args, self.dtype = pipeline, args, dtype
        self.step = pipeline.vae_scale_factor
        self.default_resolution = pipeline.default_sample_size * self.step
        self.scheduler = pipeline.scheduler
        if args.snr_gamma is not None:
            sys.exit("error: --snr-gamma weighs losses of noise prediction; Flux has none. Leave it out.")

    def text(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        length = self.args.max_sequence_length
        embeds, pooled, _ = self.pipeline.encode_prompt(captions, device=device, max_sequence_length=length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def validation_text(self, prompt: str, negative: str, device: torch.device) -> dict[str, Tensor]:
        return self.text([prompt], device)

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma = self._sigma(u.clamp(1e-4, 1 - 1e-4), latents.shape[-1] * latents.shape[-2] // 4)
        share = sigma.view(-1, 1, 1, 1)
        return (1 - share) * latents + share * noise, noise - latents, sigma

    def _sigma(self, u: Tensor, patches: int) -> Tensor:
        """The share of noise, from u by the inverse of its distribution function."""
        if self.args.timestep_sampling == "uniform":
            return u
        sigma = torch.sigmoid(self.args.logit_mean + self.args.logit_std * torch.special.ndtri(u))
        if self.args.timestep_sampling == "logit-normal":
            return sigma
        config = self.scheduler.config  # as the pipeline does at this resolution
        mu = calculate_shift(
            patches, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        return self.scheduler.time_shift(mu, 1.0, sigma)

    def weights(self, timesteps: Tensor) -> None:
        return None

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], time_ids: Tensor
    ) -> Tensor:
        count, channels, height, width = noisy.shape
        embeds, device = text["prompt_embeds"].to(noisy.dtype), noisy.device
        guidance = None
        if denoiser.config.guidance_embeds:
            guidance = torch.full((count,), self.args.guidance, device=device, dtype=torch.float32)
        packed = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps.to(noisy.dtype),
            guidance=guidance,
            pooled_projections=text["pooled_prompt_embeds"].to(noisy.dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=noisy.dtype),
            img_ids=self.pipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, noisy.dtype),
            return_dict=False,
        )[0]
        return self._unpack(packed, height * self.step, width * self.step)

    def _unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        return self.pipeline._unpack_latents(packed, height, width, self.step)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        return super().decode(self._unpack(latents, self.args.resolution, self.args.resolution))


ARCHITECTURES = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "FluxPipeline": Flux,
}


def load_pipeline(args: argparse.Namespace, dtype: torch.dtype) -> StableDiffusion:
    """The pipeline in host memory, all of it frozen, as the architecture that it has."""
    where = {"revision": args.revision} if args.revision else {}
    try:
        kind = DiffusionPipeline.load_config(args.model, **where).get("_class_name")
    except (OSError, ValueError) as error:
        sys.exit(
            f"error: {args.model} is no diffusers pipeline: {error}\nGive a folder with a model_index.json, or a "
            "hub name. One .safetensors file becomes a folder by StableDiffusionPipeline.from_single_file(FILE)"
            ".save_pretrained(FOLDER)."
        )
    if kind not in ARCHITECTURES:
        sys.exit(f"error: {args.model} is a {kind}; this script knows {', '.join(ARCHITECTURES)}.")
    options: dict[str, Any] = {
        "dtype": {"default": dtype, "vae": torch.float32},
        "variant": args.variant,
        **where,
    }
    if kind == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = DiffusionPipeline.from_pretrained(args.model, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"error: cannot load the pipeline {args.model}: {error}")
    pipeline.set_progress_bar_config(disable=True)
    architecture = ARCHITECTURES[kind](pipeline, args, dtype)
    for name in ("vae", architecture.denoiser, *architecture.encoders):
        getattr(pipeline, name).requires_grad_(False).eval()
    return architecture


# ---- the adapter ----


class Denoiser(nn.Module):
    """All that is trained, as one module: accelerate, the optimizer and DistributedDataParallel see one model."""

    def __init__(self, architecture: StableDiffusion, components: dict[str, nn.Module]) -> None:
        super().__init__()
        self.components = nn.ModuleDict(components)
        self.architecture = architecture

    def forward(self, batch: dict[str, Any], weighted: bool = True) -> Tensor:
        """The loss of each picture of the batch, (b,)."""
        architecture, device = self.architecture, batch["noise"].device
        if "moments" not in batch:
            batch["moments"] = architecture.moments(batch["pixels"])
        text = batch["text"] if "text" in batch else architecture.text(batch["caption"], device)
        latents = architecture.latents(batch["moments"], batch["vae_noise"])
        noisy, target, timesteps = architecture.noised(latents, batch["noise"], batch["u"])
        denoiser = self.components[architecture.denoiser]
        prediction = architecture.predict(denoiser, noisy.to(architecture.dtype), timesteps, text, batch["time_ids"])
        losses = (prediction.float() - target.float()).square().mean((1, 2, 3))
        weights = architecture.weights(timesteps) if weighted else None
        return losses if weights is None else losses * weights


def add_adapters(architecture: StableDiffusion, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Puts LoRA into the denoiser, and into the text encoders if they are trained; returns those that got one."""
    pipeline = architecture.pipeline
    targets = {architecture.denoiser: args.target_modules}
    if args.train_text_encoder:
        targets |= dict.fromkeys(architecture.trained_encoders, args.text_encoder_target_modules)
    components = {name: getattr(pipeline, name) for name in targets}
    for name, component in components.items():
        check_target_modules(name, component, targets[name])
    torch.manual_seed(args.seed)  # both methods start from the same A
    for name, component in components.items():
        config = LoraConfig(
            r=args.r,
            lora_alpha=args.r if args.lora_alpha is None else args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_dora=args.dora,
            target_modules=targets[name],
        )
        component.add_adapter(config)
        if args.gradient_checkpointing:
            enable_checkpointing(component)
    cast_training_params(list(components.values()), torch.float32)
    return components


def enable_checkpointing(component: nn.Module) -> None:
    if isinstance(component, transformers.PreTrainedModel):
        # nothing before the adapters needs a gradient, which the reentrant kind would want
        old_name = component.gradient_checkpointing_enable
        getattr(component, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    else:
        component.enable_gradient_checkpointing()


def check_target_modules(name: str, component: nn.Module, targets: list[str]) -> None:
    """PEFT is content if one of the names fits; a misspelt one would go unnoticed."""
    layers = [path for path, module in component.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    unknown = [t for t in targets if not any(path == t or path.endswith(f".{t}") for path in layers)]
    if unknown:
        there = sorted({".".join(part for part in short_name(path)) for path in layers})
        sys.exit(f"error: {name} has no target module {' '.join(unknown)}; it has {' '.join(there)}.")


def short_name(path: str) -> list[str]:
    """to_q of "...attn1.to_q", and to_out.0 of "...attn1.to_out.0"."""
    parts = path.split(".")
    return parts[-2:] if parts[-1].isdigit() and len(parts) > 1 else parts[-1:]


# ---- the pictures ----


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


# ---- training ----


class Run:
    """One training, from the arguments to the files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.precision = choose_precision(args.mixed_precision)
        parallel = DistributedDataParallelKwargs(find_unused_parameters=args.train_text_encoder)
        self.accelerator = Accelerator(
            mixed_precision=self.precision,
            gradient_accumulation_steps=args.grad_accumulation,
            kwargs_handlers=[parallel],
        )
        self.device = self.accelerator.device
        args.show_progress = self.accelerator.is_main_process
        self.architecture = load_pipeline(args, DTYPES[self.precision])
        self.pipeline = self.architecture.pipeline
        self._check_resolution()
        self.checkpoints = Checkpoints(self)
        self.checkpoints.find()  # nothing to resume is said before the pictures are encoded
        components = add_adapters(self.architecture, args)
        self._prepare_data()
        self._prepare_training(components)

    def _check_resolution(self) -> None:
        args, architecture = self.args, self.architecture
        args.resolution = args.resolution or architecture.default_resolution
        args.min_size = args.resolution // 2 if args.min_size is None else args.min_size
        unit = architecture.step * (2 if architecture.name == "flux" else 1)
        if args.resolution % unit:
            sys.exit(f"error: --resolution {args.resolution} is not a multiple of {unit}, as {args.model} needs.")

    def _prepare_data(self) -> None:
        args, pipeline, architecture = self.args, self.pipeline, self.architecture
        self.pictures = Pictures(architecture, args, self.device)
        self.train_indices, self.held_out_indices = self.pictures.split()
        for name in architecture.encoders:
            getattr(pipeline, name).to(self.device)
        self.prompt: dict[str, Tensor] | None = None
        if args.cache_text:
            self.pictures.cache_texts(self.device)
            if args.validation_prompt:
                self.prompt = self._encode_prompt()
            pipeline.register_modules(**dict.fromkeys(architecture.encoders))  # they leave the memory
        free_memory()
        if not args.cache_latents:
            pipeline.vae.to(self.device)

    @torch.no_grad()
    def _encode_prompt(self) -> dict[str, Tensor]:
        return self.architecture.validation_text(self.args.validation_prompt, self.args.negative_prompt, self.device)

    def _prepare_training(self, components: dict[str, nn.Module]) -> None:
        args, accelerator = self.args, self.accelerator
        self.components = components
        model = Denoiser(self.architecture, components).to(self.device)
        optimizer = make_optimizer(model, args)
        processes = accelerator.num_processes  # accelerate steps the schedule once a process
        schedule = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.warmup * processes,
            num_training_steps=args.steps * processes,
        )
        self.model, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        self.history: dict[str, Any] = {"train_loss": [], "learning_rate": [], "held_out_loss": [], "seconds": 0.0}
        accelerator.register_save_state_pre_hook(self.checkpoints.save_adapters)
        accelerator.register_load_state_pre_hook(self.checkpoints.load_adapters)

    def train(self) -> None:
        args = self.args
        self.checkpoints.resume()
        done = len(self.history["train_loss"])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what is reported is the training's
        if not done:
            self._evaluate(0)
        batches = self._batches(done)
        progress = tqdm(
            range(done + 1, args.steps + 1),
            desc=LABELS[args.method],
            initial=min(done, args.steps),
            total=args.steps,
            disable=not args.show_progress,
        )
        for step in progress:
            try:
                loss = self._step(batches)
            except oplora.OPLoRAError as error:  # a gradient is not finite
                sys.exit(f"error: step {step}: {error}{self.checkpoints.last_stays()}")
            if not math.isfinite(loss):
                advice = f"lower --lr, which is {args.lr}" if args.lr is not None else "--preset paper takes --lr"
                sys.exit(f"error: the loss is {loss} at step {step}; {advice}.{self.checkpoints.last_stays()}")
            self.history["train_loss"].append(loss)
            found = {"found_lr": f"{self.history['found_lr'][-1]:.1e}"} if "found_lr" in self.history else {}
            progress.set_postfix(loss=f"{loss:.4f}", **found)
            if due(step, args.eval_steps) or step == args.steps:
                self._evaluate(step)
            if due(step, args.validation_steps):
                self._validate(step)
            if due(step, args.checkpointing_steps):
                self.checkpoints.save(step)

    def _batches(self, done: int) -> Iterator[dict[str, Any]]:
        args, accelerator = self.args, self.accelerator
        first = done * args.grad_accumulation * args.batch_size * accelerator.num_processes
        order = Batches(
            *(self.train_indices, args.seed, args.batch_size, accelerator.process_index, accelerator.num_processes),
            first,
        )
        draws, own = Draws(self.pictures, args.seed), torch.Generator()  # else it draws from the one of dropout
        return iter(DataLoader(draws, batch_sampler=order, num_workers=args.workers, generator=own))

    def _step(self, batches: Iterator[dict[str, Any]]) -> float:
        """One step of the optimizer, over grad_accumulation micro-batches. Returns the mean loss before it."""
        args, accelerator = self.args, self.accelerator
        began = time.perf_counter()
        self.history["learning_rate"].append(self.schedule.get_last_lr()[0])
        self.model.train()
        losses = []
        for _ in range(args.grad_accumulation):
            batch = send_to_device(next(batches), self.device, non_blocking=True)
            with accelerator.accumulate(self.model):
                loss = self.model(batch).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm:
                    clip_gradients(accelerator, self.model, self.optimizer, args.max_grad_norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if (found := found_lr(self.optimizer)) is not None:
            self.history.setdefault("found_lr", []).append(found)
        self.history["seconds"] += time.perf_counter() - began
        return mean

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """The mean loss on the pictures held out, unweighted, with noise and timesteps that are always the same."""
        args, accelerator = self.args, self.accelerator
        if self.held_out_indices and accelerator.is_main_process:
            model = accelerator.unwrap_model(self.model, keep_fp32_wrapper=True).eval()
            draws = Draws(self.pictures, args.seed_held_out, strata=args.held_out_draws, augment=False)
            keys = [
                (index, n) for n, index in enumerate(np.repeat(self.held_out_indices, args.held_out_draws).tolist())
            ]
            total = 0.0
            for start in range(0, len(keys), args.batch_size):
                items = [draws[key] for key in keys[start : start + args.batch_size]]
                batch = send_to_device(torch.utils.data.default_collate(items), self.device)
                total += model(batch, weighted=False).double().sum().item()
            self.history["held_out_loss"].append([step, total / len(keys)])
        accelerator.wait_for_everyone()

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Pictures of the prompt, always from the same noise."""
        args, pipeline = self.args, self.pipeline
        if args.validation_prompt and self.accelerator.is_main_process:
            vae_home = pipeline.vae.device
            pipeline.vae.to(self.device)
            self.model.eval()
            text = self.prompt or self._encode_prompt()
            options: dict[str, Any] = {"num_inference_steps": args.inference_steps, "output_type": "latent"}
            if args.validation_guidance is not None:
                options["guidance_scale"] = args.validation_guidance
            pictures = []
            for number in tqdm(range(args.num_validation_images), desc=f"pictures at step {step}", leave=False):
                latents = pipeline(
                    **text,
                    **options,
                    height=args.resolution,
                    width=args.resolution,
                    generator=generator_for(args.seed, number),
                ).images
                pictures += self.architecture.decode(latents)
            save_grid(pictures, args.output / "pictures" / f"step-{step:06d}.png")
            pipeline.vae.to(vae_home)
            free_memory()
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, Any]:
        """Writes the adapter, the losses and their picture; returns what is in losses.json."""
        args, record = self.args, self._record()
        if args.validation_steps and not due(args.steps, args.validation_steps):
            self._validate(args.steps)
        if self.accelerator.is_main_process:
            try:
                oplora.save_adapter(self.components, args.output, format="diffusers")
                write_whole(args.output / "losses.json", json.dumps(record, indent=1) + "\n")
                draw(args.output / "loss.png", self.history, args.method)
                if args.kohya:
                    oplora.save_adapter(self.components, args.output, format="kohya")
            except (OSError, oplora.OPLoRAError) as error:
                sys.exit(f"error: the results could not be written: {error}{self.checkpoints.last_stays()}")
        self.accelerator.wait_for_everyone()
        return record

    def _record(self) -> dict[str, Any]:
        packages = (oplora, torch, diffusers, transformers, peft, accelerate)
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return {
            "settings": settings_of(self),
            "versions": {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "precision": self.precision,
            "pictures": {"train": len(self.train_indices), "held_out": len(self.held_out_indices)},
            "skipped": self.pictures.skipped,
            "trained_parameters": sum(p.numel() for p in trainable(self.model)),
            "peak_memory_bytes": memory,
            **self.history,
        }


def choose_precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# ---- checkpoints ----


class Checkpoints:
    """Folders checkpoint-N: the adapter in the format of diffusers, accelerate's state, and the losses so far."""

    def __init__(self, run: Run) -> None:
        self.run, self.folder = run, run.args.output

    def all(self) -> list[Path]:
        found = [p for p in self.folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def find(self) -> Path | None:
        wanted = self.run.args.resume_from_checkpoint
        if wanted is None:
            return None
        if wanted == "latest":
            if not self.all():
                sys.exit(
                    f"error: nothing to resume: {self.folder} holds no checkpoint. --checkpointing-steps writes them."
                )
            return self.all()[-1]
        path = next((p for p in (Path(wanted), self.folder / wanted) if p.is_dir()), None)
        if path is None:
            there = " ".join(p.name for p in self.all()) or "none"
            sys.exit(f"error: no checkpoint {wanted}; in {self.folder} there is {there}.")
        return path

    def last_stays(self) -> str:
        if not self.all():
            return ""
        return f"\n{self.all()[-1]} stays: the same command with --resume-from-checkpoint latest goes on from it."

    # ---- saving ----

    def save(self, step: int) -> None:
        accelerator, target = self.run.accelerator, self.folder / f"checkpoint-{step}"
        new = self.folder / f"unfinished-{target.name}"
        try:
            if accelerator.is_main_process:
                self._remove_unfinished()
                new.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(new))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                progress = {"settings": settings_of(self.run), "history": self.run.history}
                (new / PROGRESS).write_text(json.dumps(progress))
                sync(new)
                if target.exists():  # of an earlier run, or of this one before it was resumed from an older one
                    target.rename(self.folder / f"unfinished-old-{target.name}")
                new.rename(target)
                self._prune()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
            with suppress(OSError):
                self._remove_unfinished()
            sys.exit(
                f"error: {target} could not be written: {error}. Free some space, or give --checkpoints-total-limit."
                f"{self.last_stays()}"
            )
        accelerator.wait_for_everyone()

    def _prune(self) -> None:
        """Whatever moment the run is killed at, none is left in part under a name that is looked for."""
        limit = self.run.args.checkpoints_total_limit
        for old in self.all()[:-limit] if limit else []:
            old.rename(self.folder / f"unfinished-{old.name}")
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for folder in self.folder.glob("unfinished-*checkpoint-*"):
            shutil.rmtree(folder)

    def save_adapters(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        """accelerate's hook: instead of the model, which is frozen but for them."""
        weights.clear()
        if not self.run.accelerator.is_main_process:
            return
        components = self.run.components
        layers = {f"{name}_lora_layers": adapter_weights(module) for name, module in components.items()}
        self.run.pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata(components))

    # ---- loading ----

    def resume(self) -> None:
        """Puts all back as it was at the checkpoint."""
        path = self.find()
        if path is None:
            return
        try:
            progress = json.loads((path / PROGRESS).read_text())
            saved, history = progress["settings"], progress["history"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"error: {path} is no checkpoint of this script: {error}. Choose another.")
        refuse_other_settings(saved, settings_of(self.run), path)
        try:
            self.run.accelerator.load_state(str(path))
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            sys.exit(
                f"error: {path} does not fit {self.run.args.model}: {error}\nGive the --model that it was trained on, "
                "or another --output; the checkpoint is unchanged."
            )
        self.run.history = history
        if self.run.args.show_progress:
            print(f"{path}: going on after step {len(history['train_loss'])}", flush=True)

    def load_adapters(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        saved = load_file(Path(folder) / WEIGHTS)
        for name, component in self.run.components.items():
            prefix = f"{name}."
            mine = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
            wanted = adapter_weights(component).keys()
            if mine.keys() != wanted:
                differ = sorted(mine.keys() ^ wanted)
                raise ValueError(
                    f"{name}: {len(differ)} adapter weights are in one of them only, {differ[0]} among them"
                )
            magnitude = "lora_magnitude_vector"  # PEFT has it without
            named = {key.replace(f"{magnitude}.weight", magnitude): value for key, value in mine.items()}
            set_peft_model_state_dict(component, named)


def adapter_weights(component: nn.Module) -> dict[str, Tensor]:
    """Under the names that diffusers reads: of text encoders it leaves it to transformers, which asks for .weight."""
    weights = get_peft_model_state_dict(component)
    is_encoder = isinstance(component, transformers.PreTrainedModel)
    return {
        f"{key}.weight" if is_encoder and key.endswith("lora_magnitude_vector") else key: value
        for key, value in weights.items()
    }


def settings_of(run: Run) -> dict[str, Any]:
    values = {name: str(v) if isinstance(v, Path) else v for name, v in vars(run.args).items()}
    del values["show_progress"]
    facts = {
        "architecture": run.architecture.name,
        "processes": run.accelerator.num_processes,
        "precision": run.precision,
        "pictures": run.pictures.digest(),
    }
    return values | facts


def refuse_other_settings(saved: dict[str, Any], mine: dict[str, Any], checkpoint: Path) -> None:
    free = FREE_SETTINGS | ({"steps"} if mine["lr_scheduler"].startswith("constant") else set())
    other = [name for name in mine if name not in free and mine[name] != saved.get(name)]
    if not other:
        return
    names = {"architecture": "the architecture", "pictures": "the digest of pictures and captions"}
    differences = [
        f"{names.get(n, '--' + n.replace('_', '-'))} was {saved.get(n)}, is {mine[n]}" for n in sorted(other)
    ]
    sys.exit(
        f"error: {checkpoint} is of a run with other settings: {', '.join(differences)}. Resume with those of the "
        "checkpoint, or start anew with another --output; the checkpoint is unchanged."
    )


# ---- files ----


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write into, which takes the name `path` when all is in it."""
    beside = path.with_name(f"unfinished-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    with replaced(path) as new:
        new.write_text(text)


def save_grid(pictures: list[Image.Image], path: Path) -> None:
    columns = math.ceil(math.sqrt(len(pictures)))
    blank = Image.new("RGB", pictures[0].size, "white")
    rows = math.ceil(len(pictures) / columns)
    pictures = pictures + [blank] * (rows * columns - len(pictures))
    with replaced(path) as new:
        make_image_grid(pictures, rows=rows, cols=columns).save(new)


def draw(path: Path, history: dict[str, Any], method: str) -> None:
    losses = np.array(history["train_loss"])
    width = max(1, len(losses) // 10)
    smooth = [losses[max(0, end - width) : end].mean() for end in range(1, len(losses) + 1)]
    steps = np.arange(1, len(losses) + 1)
    found = history.get("found_lr")
    panels = 1 if found is None else 2
    figure, axes = plt.subplots(1, panels, figsize=(3 + 4 * panels, 4.2), squeeze=False, layout="constrained")
    axis = axes[0, 0]
    axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth, color="tab:blue", label=f"{LABELS[method]}, training, mean of {width}")
    if history["held_out_loss"]:
        axis.plot(*zip(*history["held_out_loss"], strict=True), "o-", color="tab:orange", label="held out")
    axis.set(xlabel="step", ylabel="denoising loss")
    axis.legend()
    if found is not None:
        axes[0, 1].semilogy(steps, found, color="tab:green")
        axes[0, 1].set(xlabel="step", ylabel="learning rate", title=f"found: {found[-1]:.1e} at the end")
    with replaced(path) as new:
        figure.savefig(new, dpi=150)
    plt.close(figure)


# ---- command line ----


def number(kind: Callable[[str], Any], low: float, high: float = math.inf, open_low: bool = False) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if open_low else 'at least'} {low}"
                + (f" and at most {high}" if high < math.inf else "")
            )
        return value

    return parse


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    summary, *rest = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog="\n\n".join(rest), formatter_class=HelpFormatter)
    count, size = number(int, 0), number(int, 1)
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what").add_argument
    add("--model", required=True, help="diffusers pipeline, folder or hub name")
    add("--variant", help="of its files: fp16")
    add("--revision", help="of a hub name")
    add("--data", type=Path, required=True, help="folder of pictures with captions")
    add("--caption", help="for pictures that have none; without it they are skipped")
    add("--output", type=Path, default=Path("runs/diffusion"), help="folder for all results")
    add("--method", choices=("lora", "oplora"), default="oplora", help="what to train")

    add = parser.add_argument_group("pictures").add_argument
    add("--resolution", type=size, help="sides of the pictures, in pixels (default: the model's)")
    add("--min-size", type=size, help="skip pictures with a shorter side (default: half the resolution)")
    add("--random-crop", action="store_true", help="crop anywhere instead of at the centre; turns latent caching off")
    add("--random-flip", action="store_true", help="mirror half of the draws; doubles the latents cached")
    add("--cache-latents", action=switch, default=True, help="encode pictures once; the VAE leaves the device")
    add("--cache-text", action=switch, default=True, help="encode captions once; the text encoders leave the memory")
    add("--workers", type=count, default=0, help="processes that read pictures; useful without cached latents")

    add = parser.add_argument_group("adapter").add_argument
    add("--r", type=size, default=4, help="rank")
    add(
        "--lora-alpha",
        type=number(float, 0, open_low=True),
        help="the adapter's output is scaled by alpha / r (default: r)",
    )
    add("--lora-dropout", type=number(float, 0, 0.99), default=0.0, help="on the adapter's input")
    add("--dora", action="store_true", help="train magnitudes too (DoRA)")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=["to_q", "to_k", "to_v", "to_out.0"],
        help="layers of the denoiser",
    )
    add("--train-text-encoder", action="store_true", help="adapt the text encoders too (Flux: the CLIP one)")
    add(
        "--text-encoder-target-modules",
        nargs="+",
        metavar="NAME",
        default=["q_proj", "k_proj", "v_proj", "out_proj"],
        help="their layers",
    )

    add = parser.add_argument_group("OP-LoRA").add_argument
    add(
        "--preset",
        choices=("auto", "paper", "flat"),
        default="auto",
        help="auto finds the learning rate; paper and flat have a generator in every layer and take --lr",
    )
    add("--hidden-width", type=size, help="units of a generator, for presets paper and flat (default: 32)")
    add("--oplora-state", choices=("lean", "exact"), help="how these generators are kept (default: lean)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=size, default=1000, help="steps of the optimizer")
    add("--batch-size", type=size, default=1, help="pictures in a forward pass, in each process")
    add("--grad-accumulation", type=size, default=1, help="forward passes to a step")
    add(
        "--lr",
        type=number(float, 0, open_low=True),
        help=f"learning rate; preset auto needs none, and takes only a schedule's course from it (else: {LR:g})",
    )
    add(
        "--lr-scheduler",
        choices=[s.value for s in SchedulerType if s.value != "piecewise_constant"],
        default="constant",
        help="of diffusers",
    )
    add("--warmup", type=count, default=0, help="steps in which the rate rises, for schedules that have it")
    add("--betas", type=number(float, 0, 1), nargs=2, help="of AdamW (default: 0.9 0.999, of preset auto 0.9 0.99)")
    add("--eps", type=number(float, 0, open_low=True), default=1e-8, help="of AdamW")
    add("--weight-decay", type=number(float, 0), default=0.01, help="of AdamW")
    add("--max-grad-norm", type=number(float, 0), default=1.0, help="clip the gradient's norm; 0: don't")
    add("--snr-gamma", type=number(float, 0, open_low=True), help="weigh losses by min-SNR, often 5 (not Flux)")
    add(
        "--mixed-precision",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: bf16 on GPUs that have it, none on the CPU",
    )
    add("--gradient-checkpointing", action=switch, default=True, help="less memory, slower")
    add("--seed", type=count, default=0, help="of adapter, generators, order, noise and validation pictures")

    add = parser.add_argument_group("Flux").add_argument
    add(
        "--timestep-sampling",
        choices=("logit-normal", "shift", "uniform"),
        default="logit-normal",
        help="shift: logit-normal, then moved to more noise at high resolution as the pipeline does",
    )
    add("--logit-mean", type=float, default=0.0, help="of the logit-normal")
    add("--logit-std", type=number(float, 0, open_low=True), default=1.0, help="of the logit-normal")
    add("--guidance", type=number(float, 0), default=3.5, help="told to models that embed it (dev)")
    add("--max-sequence-length", type=number(int, 1, 512), default=512, help="tokens of a caption for T5")

    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--held-out-fraction",
        type=number(float, 0, 0.99),
        default=0.0,
        help="of the pictures, kept back for a held-out loss",
    )
    add("--held-out-draws", type=size, default=4, help="timesteps for each of them")
    add("--seed-held-out", type=count, default=0, help="of their choice, noise and timesteps")
    add("--eval-steps", type=count, default=100, metavar="N", help="steps between held-out losses; 0: at start and end")
    add("--validation-prompt", help="draw pictures of it")
    add("--negative-prompt", default="", help="for these (not Flux)")
    add("--validation-steps", type=count, default=100, metavar="N", help="steps between them; 0: never")
    add("--num-validation-images", type=size, default=4, metavar="N", help="pictures each time")
    add("--inference-steps", type=size, default=25, help="sampling steps for a picture")
    add("--validation-guidance", type=number(float, 0), help="guidance scale (default: the pipeline's)")

    add = parser.add_argument_group("results").add_argument
    add("--kohya", action="store_true", help="also write the file of kohya's scripts, for ComfyUI and others")
    add("--checkpointing-steps", type=count, default=500, metavar="N", help="steps between checkpoints; 0: none")
    add("--checkpoints-total-limit", type=count, default=2, metavar="N", help="newest checkpoints to keep; 0: all")
    add("--resume-from-checkpoint", metavar="NAME", help='a checkpoint, or "latest"')

    args = parser.parse_args(argv)
    args.cache_latents = args.cache_latents and not args.random_crop
    args.cache_text = args.cache_text and not args.train_text_encoder
    if args.method == "lora" or args.preset != "auto":
        args.lr = LR if args.lr is None else args.lr
    else:
        for flag, value in (("--hidden-width", args.hidden_width), ("--oplora-state", args.oplora_state)):
            if value is not None:
                parser.error(f"{flag} is for --preset paper and flat; auto, the default, has no generator in a layer")
    return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag that has one, and the docstring as it stands."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return super()._get_help_string(action) if action.default else action.help


def train(args: argparse.Namespace) -> tuple[dict[str, Any], StableDiffusion]:
    """One run: what is in losses.json, and the pipeline that was trained."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    run = Run(args)
    run.train()
    record = run.finish()
    run.accelerator.free_memory()
    return record, run.architecture


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(argv)
    record, _ = train(args)
    return record


if __name__ == "__main__":
    try:
        main()
    except oplora.OPLoRAError as error:
        sys.exit(f"error: {error}")
