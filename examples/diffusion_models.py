"""The models of finetune_diffusion.py: what Stable Diffusion, SDXL and Flux predict, how each is asked, its adapter."""

import argparse
import sys
from typing import Any, ClassVar

import torch
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import cast_training_params, compute_snr
from peft import LoraConfig
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn


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
