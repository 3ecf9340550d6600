"""Pipelines of Stable Diffusion, SDXL and Flux with random weights, so small that a step takes milliseconds."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT_WIDTH = 16


def clip_tokenizer() -> CLIPTokenizer:
    """Its tokens are letters."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=12)


def clip_config(width: int = TEXT_WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        intermediate_size=24,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        attention_dropout=0.1,  # so that a resumed run with a trained encoder needs its random state
    )


def vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **{"latent_channels": 4, **config},
    )


def unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{
            "block_out_channels": (8, 16),
            "attention_head_dim": 2,
            "cross_attention_dim": TEXT_WIDTH,
            "dropout": 0.1,
            **config,
        },
    )


def stable_diffusion(prediction_type: str = "epsilon", **config: Any) -> StableDiffusionPipeline:
    """dropout=0.1 in the U-Net, so that a resumed run needs its random state."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=unet(**config),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=prediction_type,
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=TEXT_WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return FluxPipeline(
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


PIPELINES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "flux": flux}


def save(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


@torch.no_grad()
def predict(pipeline: DiffusionPipeline) -> torch.Tensor:
    """The denoiser's output on inputs that are always the same."""
    generator = torch.Generator().manual_seed(1)
    randn = {"generator": generator}
    if isinstance(pipeline, FluxPipeline):
        return (
            pipeline.transformer.eval()(
                hidden_states=torch.randn(2, 16, 16, **randn),
                timestep=torch.tensor([0.2, 0.8]),
                guidance=torch.ones(2),
                pooled_projections=torch.randn(2, TEXT_WIDTH, **randn),
                encoder_hidden_states=torch.randn(2, 5, TEXT_WIDTH, **randn),
                txt_ids=torch.zeros(5, 3),
                img_ids=torch.zeros(16, 3),
            )
        ).sample
    noisy = torch.randn(2, 4, 8, 8, **randn)
    width = pipeline.unet.config.cross_attention_dim
    added = {"text_embeds": torch.randn(2, TEXT_WIDTH, **randn), "time_ids": torch.full((2, 6), 16.0)}
    return pipeline.unet.eval()(
        noisy, torch.tensor([3, 700]), torch.randn(2, 5, width, **randn), added_cond_kwargs=added
    ).sample


@torch.no_grad()
def encode(pipeline: DiffusionPipeline) -> torch.Tensor:
    """The text encoders' output on one caption."""
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipeline, name):
            getattr(pipeline, name).eval()
    encoded = pipeline.encode_prompt("a harbour", device=torch.device("cpu"), **clip_only(pipeline))
    return torch.cat(
        [t.flatten() for t in encoded[: 2 if isinstance(pipeline, FluxPipeline) else None] if t is not None]
    )


def clip_only(pipeline: DiffusionPipeline) -> dict[str, Any]:
    if isinstance(pipeline, FluxPipeline):
        return {"max_sequence_length": 12}
    return {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
