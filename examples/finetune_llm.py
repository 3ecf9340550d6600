"""Fine-tunes a causal language model on a text file with LoRA at several rates and with OP-LoRA, side by side.

    python examples/finetune_llm.py                            # about six minutes on two cores
    python examples/finetune_llm.py --model ./my-model --text notes.txt --method oplora --r 16 --lora-alpha 32

All runs train the same adapter: same base model, rank, alpha and target modules, same start of A and B, same batches
in the same order, same number of steps, decay and clipping. They differ in one line, the optimizer (make_optimizer
below). LoRA wants a learning rate, and gets each that --lora-lr names in a run of its own; OP-LoRA finds its own, or
takes --oplora-lr with --preset paper or flat.

Without other flags it trains SmolLM2-135M-Instruct on Python's reference documentation at PEFT's usual 1e-4, at 1e-3
and at 1e-2, and with nothing chosen. A few dozen steps are a demonstration, not a benchmark: docs/evidence.md has the
figures.

At the end each adapter is saved, loaded into a fresh model by PEFT alone, and must give the training model's
logits bit for bit.
"""

import argparse
import math
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from llm_flags import DTYPES, flags_of
from llm_text import block_order, load_tokenizer, packaged_model, read_text, split_into_blocks
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from plumbing import (
    LABELS,
    Curves,
    differences,
    draw,
    found_lr,
    settings_of,
    trainable,
    versions,
    write_json,
    written_whole,
)
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import oplora

NEW_TOKENS = 32
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


# ---- model ----


def load_base(args: argparse.Namespace) -> transformers.PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(args.device)
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot load the model {args.model}: {error}")


def check_target_modules(model: torch.nn.Module, targets: list[str]) -> None:
    """PEFT is content if one of the names fits; a misspelt one would go unnoticed."""
    matrices = [name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2]
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in matrices)]
    if unknown:
        there = " ".join(sorted({name.rsplit(".", 1)[-1] for name in matrices}))
        sys.exit(f"error: the model has no target module {' '.join(unknown)}; it has {there}.")


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

    monitor = oplora.Monitor(folder, optimizer) if run.method == "oplora" else None
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
        if monitor is not None:
            monitor(loss, step)
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
    if (found := found_lr(optimizer)) is not None:
        history.setdefault("found_lr", []).append(found)
    return loss


@torch.no_grad()
def evaluate(model: torch.nn.Module, blocks: Tensor, args: argparse.Namespace) -> float:
    model.eval()
    total = 0.0
    for ids in blocks.to(args.device).split(args.batch_size):
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    model.train()
    return total / len(blocks)


# ---- checkpoints ----


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
    if other := differences(state["settings"], settings_of(args), FREE_SETTINGS):
        sys.exit(f"error: {last} is of a run with other settings: {', '.join(other)}.")
    set_peft_model_state_dict(model, load_peft_weights(str(last), device=args.device))
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"]["cpu"])
    torch.cuda.set_rng_state_all(state["random"]["cuda"])
    print(f"{last}: continuing after step {len(state['history']['train_loss'])}", flush=True)
    return state["history"]


# ---- results ----


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, prompt: str) -> str:
    """How the model continues the prompt, greedily."""
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


def record_of(results: dict[Run, dict], texts: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "settings": settings_of(args),
        "versions": versions(torch, transformers, peft),
        "summary": {run.name: summarize(history) for run, history in results.items()},
        "generated": texts,
        "runs": {run.name: history for run, history in results.items()},
    }


# ---- all of it ----


def main() -> None:
    args = flags_of(__doc__)
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

    write_json(args.output / "losses.json", record_of(results, texts, args))
    curves = {run.label: Curves.of(history) for run, history in results.items()}
    draw(args.output / "loss_curves.png", curves)
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
