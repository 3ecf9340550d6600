"""A small Stable Diffusion, pretrained from nothing on packaged clip-arts, and the pictures to adapt it to.

    python benchmarks/paper/small_diffusion.py pictures    of Debian's packages: clip-arts and emoji of 64 x 64 pixels
    python benchmarks/paper/small_diffusion.py pretrain    a StableDiffusionPipeline, in runs/diffusion/model
    python benchmarks/paper/small_diffusion.py pretrain --quick      a minute on a CPU: it learns nothing, all runs

The real classes of diffusers and transformers, small: an AutoencoderKL (64 x 64 pixels to 16 x 16 x 4), a CLIPTextModel
with a tokenizer of these captions, and a UNet2DConditionModel, the last two trained together on noise. The clip-arts
(openclipart-png, public domain) have their names as captions; the emoji (fonts-noto-color-emoji, unicode-data) have
Unicode's, and are the style that diffusion.py adapts the model to. They are divided by a hash of the name into
80% to train on and 20% that nothing is chosen by.

    apt-get install openclipart-png fonts-noto-color-emoji unicode-data
    pip install diffusers fonttools
"""

import argparse
import hashlib
import io
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FOLDER = Path("runs/diffusion")
CLIPARTS = Path("/usr/share/openclipart/png")
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
SOURCES = {CLIPARTS: "openclipart-png", EMOJI_FONT: "fonts-noto-color-emoji", EMOJI_NAMES: "unicode-data"}
SIDE = 64
CAPTION_TOKENS = 16
SPLITS = {"train": 0.8, "test": 1.0}


# ---- pictures ----


def make_pictures(folder: Path) -> None:
    for path, package in SOURCES.items():
        if not path.exists():
            sys.exit(f"error: {path} is not there. Run: apt-get install {package}")
    folder.mkdir(parents=True, exist_ok=True)
    pictures, captions = zip(*tqdm(cliparts(), desc="clip-arts", total=8121), strict=True)
    np.savez_compressed(folder / "cliparts.npz", pictures=np.stack(pictures), captions=np.array(captions))
    for split in SPLITS:
        (folder / "emoji" / split).mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for code, picture, name in emoji():
        split = split_of(name)
        picture.save(folder / "emoji" / split / f"{code:x}.png")
        lines[split].append(json.dumps({"file_name": f"{code:x}.png", "text": f"emoji of {name}"}))
    for split in SPLITS:
        (folder / "emoji" / split / "metadata.jsonl").write_text("\n".join(lines[split]) + "\n", encoding="utf-8")
    print({"cliparts": len(captions)} | {split: len(lines[split]) for split in SPLITS})


def cliparts() -> Iterator[tuple[np.ndarray, str]]:
    for path in sorted(CLIPARTS.rglob("*.png")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture = on_white(Image.open(path))
        except (OSError, Image.DecompressionBombWarning, Image.DecompressionBombError):
            continue  # a few stop signs are larger than Pillow takes
        # bison_leif_lodahl_01: the title comes first, then the author
        title = re.sub(r"[^a-z]+", " ", " ".join(path.stem.lower().split("_")[:2])).strip()
        yield np.asarray(picture), f"{path.parent.name.replace('_', ' ')} {title}"


def emoji() -> Iterator[tuple[int, Image.Image, str]]:
    from fontTools.ttLib import TTFont

    font = TTFont(EMOJI_FONT)
    glyphs, bitmaps = font.getBestCmap(), font["CBDT"].strikeData[0]
    for line in EMOJI_NAMES.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([0-9A-F]+)( FE0F)?\s*; fully-qualified\s*# \S+ E\S+ (.+)", line)
        if match and (glyph := glyphs.get(int(match[1], 16))) in bitmaps:
            picture = on_white(Image.open(io.BytesIO(bitmaps[glyph].imageData)))
            yield int(match[1], 16), picture, match[3].lower()


def on_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def split_of(name: str) -> str:
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(split for split, end in SPLITS.items() if position < end)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(n, height, width, 3) of 0..255 to (n, 3, height, width) of -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- the model ----


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocabulary = trained["vocab"]
    for letter in alphabet:  # a letter that ends no word here may end one in a prompt
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    merges = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_TOKENS)


def make_model(captions: list[str], seed: int) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(captions)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIDE,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # in SD 1.x's configurations this is the number of heads
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# ---- pretraining ----


def pretrain(folder: Path, args: argparse.Namespace) -> None:
    with np.load(folder / "cliparts.npz") as file:
        pictures, captions = torch.from_numpy(file["pictures"]), file["captions"].tolist()
    if args.quick:
        pictures, captions = pictures[::99], captions[::99]
    names = [json.loads(line)["text"] for line in (folder / "emoji/train/metadata.jsonl").read_text().splitlines()]
    pipeline = make_model(captions + names, args.seed)
    pipeline.to(args.device)
    began = time.perf_counter()
    losses = {"vae": train_vae(pipeline.vae, pictures, args)}
    latents = encode(pipeline, pictures, args)
    losses["unet"] = train_unet(pipeline, latents, captions, args)
    draw(pipeline, captions, args).save(folder / "samples.png")
    pipeline.to(torch.float16).save_pretrained(folder / "model", max_shard_size="12MB")
    record = {
        "seconds": time.perf_counter() - began,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "parameters": {
            name: sum(p.numel() for p in getattr(pipeline, name).parameters())
            for name in ("vae", "text_encoder", "unet")
        },
        "steps": {"vae": args.vae_steps, "unet": args.steps},
        "batch_size": {"vae": args.vae_batch_size, "unet": args.batch_size},
        "seed": args.seed,
        "losses": losses,
    }
    (folder / "model" / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("seconds", "device", "parameters")}))


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Epochs, each in another order; a step's rows, with repeats where the set is smaller."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[:size], order[size:]
        yield rows


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def warm_and_decay(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=min(0.1, 100 / steps + 0.01)
    )


def train_vae(vae: AutoencoderKL, pictures: Tensor, args: argparse.Namespace) -> list[float]:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    scheduler = warm_and_decay(optimizer, 1e-3, args.vae_steps)
    pictures = pictures.to(args.device)
    losses: list[float] = []
    running = torch.zeros((), device=args.device)
    steps = tqdm(batches(len(pictures), args.vae_batch_size, args.vae_steps, args.seed), "VAE", args.vae_steps)
    for step, rows in enumerate(steps, 1):
        x = pictures[rows.to(args.device)].permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast(args):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        error = y.float() - x
        loss = error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().float().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        running += loss.detach()
        if step % args.log_every == 0:
            losses.append(running.item() / args.log_every)
            running.zero_()
            steps.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, pictures: Tensor, args: argparse.Namespace) -> Tensor:
    """Latents of all pictures, (n, 4, 16, 16), of standard deviation 1 through the scaling_factor that the VAE gets.

    They are the means that the encoder gives; it is left no variance, so that who samples from it later gets the same.
    """
    channels = pipeline.vae.config.latent_channels
    pipeline.vae.quant_conv.weight[channels:] = 0
    pipeline.vae.quant_conv.bias[
        channels:
    ] = -30  # the logarithm of the variance, at the lower end that diffusers allows
    parts = []
    for part in pictures.split(256):
        x = part.to(args.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(pipeline.vae.encode(x).latent_dist.mode())
    latents = torch.cat(parts)
    factor = 1 / latents.std().item()
    pipeline.vae.register_to_config(scaling_factor=factor)
    return latents * factor


def train_unet(
    pipeline: StableDiffusionPipeline, latents: Tensor, captions: list[str], args: argparse.Namespace
) -> list[float]:
    unet, text_encoder, scheduler = pipeline.unet, pipeline.text_encoder, pipeline.scheduler
    tokens = tokenize(pipeline, captions).to(args.device)
    nothing = tokenize(pipeline, [""]).to(args.device)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-2, fused=True)
    rates = warm_and_decay(optimizer, args.lr, args.steps)
    average = EMAModel(parameters, decay=0.999, foreach=True)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    losses: list[float] = []
    running = torch.zeros((), device=args.device)
    steps = tqdm(batches(len(latents), args.batch_size, args.steps, args.seed + 1), "U-Net", args.steps)
    for step, rows in enumerate(steps, 1):
        rows = rows.to(args.device)
        x, ids = latents[rows], tokens[rows]
        # a tenth without caption, for classifier-free guidance
        dropped = torch.rand(len(rows), 1, generator=generator, device=args.device) < 0.1
        ids = torch.where(dropped, nothing, ids)
        noise = torch.randn(x.shape, generator=generator, device=args.device)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), generator=generator, device=args.device)
        with autocast(args):
            predicted = unet(scheduler.add_noise(x, noise, t), t, text_encoder(ids)[0]).sample
        loss = mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        average.step(parameters)
        running += loss.detach()
        if step % args.log_every == 0:
            losses.append(running.item() / args.log_every)
            running.zero_()
            steps.set_postfix(loss=f"{losses[-1]:.4f}")
    average.copy_to(parameters)
    return losses


def draw(pipeline: StableDiffusionPipeline, captions: list[str], args: argparse.Namespace) -> Image.Image:
    """Pictures of some of the captions that it was trained with."""
    chosen = captions[:: max(1, len(captions) // 32)][:32]
    columns = min(8, len(chosen))
    chosen = chosen[: len(chosen) // columns * columns]
    generator = torch.Generator("cpu").manual_seed(args.seed)
    with autocast(args):
        pictures = pipeline(
            chosen, num_inference_steps=args.sampling_steps, guidance_scale=3.0, generator=generator
        ).images
    return make_image_grid(pictures, rows=len(chosen) // columns, cols=columns)


def tokenize(pipeline: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """(n, CAPTION_TOKENS) token ids."""
    encoded = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pictures", "pretrain"])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=1400, help="of U-Net and text encoder")
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vae-steps", type=int, default=700)
    parser.add_argument("--vae-batch-size", type=int, default=32)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, learns nothing")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps = args.vae_steps = args.log_every = args.sampling_steps = 3
        args.batch_size = args.vae_batch_size = 4
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.backends.cudnn.benchmark = True
    if args.what == "pictures":
        make_pictures(args.folder)
    else:
        pretrain(args.folder, args)


if __name__ == "__main__":
    main()
