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
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import peft
import plumbing
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import free_memory
from diffusers.utils import make_image_grid
from diffusion_checkpoints import Checkpoints, settings_of
from diffusion_flags import flags_of
from diffusion_models import Denoiser, StableDiffusion, add_adapters, load_pipeline
from diffusion_pictures import Batches, Draws, Pictures, generator_for
from PIL import Image
from plumbing import LABELS, found_lr, replaced, trainable
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import oplora

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        self.monitor = oplora.Monitor(args.output, optimizer) if args.method == "oplora" else None
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
            if self.monitor is not None:
                self.monitor(loss, step)
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
                plumbing.write_json(args.output / "losses.json", record)
                curves = {LABELS[args.method]: plumbing.Curves.of(self.history)}
                plumbing.draw(args.output / "loss.png", curves, ylabel="denoising loss")
                if args.kohya:
                    oplora.save_adapter(self.components, args.output, format="kohya")
            except (OSError, oplora.OPLoRAError) as error:
                sys.exit(f"error: the results could not be written: {error}{self.checkpoints.last_stays()}")
        self.accelerator.wait_for_everyone()
        return record

    def _record(self) -> dict[str, Any]:
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return {
            "settings": settings_of(self),
            "versions": plumbing.versions(torch, diffusers, transformers, peft, accelerate),
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


def save_grid(pictures: list[Image.Image], path: Path) -> None:
    columns = math.ceil(math.sqrt(len(pictures)))
    blank = Image.new("RGB", pictures[0].size, "white")
    rows = math.ceil(len(pictures) / columns)
    pictures = pictures + [blank] * (rows * columns - len(pictures))
    with replaced(path) as new:
        make_image_grid(pictures, rows=rows, cols=columns).save(new)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return flags_of(__doc__, argv)


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
