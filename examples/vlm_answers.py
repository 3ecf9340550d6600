"""What the model of finetune_vlm.py answers: samples on the way, and how many held-out questions it answers rightly."""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from vlm_data import Batches, Example
from vlm_model import DTYPES


@torch.no_grad()
def answer(model: nn.Module, batches: Batches, example: Example, args: argparse.Namespace) -> str:
    """What the model answers, greedily."""
    training = model.training
    model.eval()
    prompt = batches.process([batches.prompt(example)], [example])
    prompt = {key: value.to(args.device) for key, value in prompt.items()}
    tokenizer = batches.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with autocast(args):
        out = model.generate(**prompt, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=pad)
    model.train(training)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def autocast(args: argparse.Namespace) -> Any:
    """The precision that Trainer runs the model in."""
    if args.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, DTYPES[args.dtype])


def exact_match(
    model: nn.Module, batches: Batches, held_out: Sequence[Example], args: argparse.Namespace
) -> float | None:
    """The share of held-out questions answered word for word; None where answers are too long to ask for that."""
    asked = held_out[: args.accuracy_count]
    lengths = [len(batches.tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in asked]
    if not asked or max(lengths) > args.max_new_tokens:
        return None
    right = [
        plain(answer(model, batches, e, args)) == plain(e.answer) for e in tqdm(asked, desc="answering", leave=False)
    ]
    return sum(right) / len(right)


def plain(text: str) -> str:
    """Without what does not make an answer wrong: case, spaces, a full stop."""
    return " ".join(text.casefold().split()).rstrip(".")


class Samples(TrainerCallback):
    """Answers to a few held-out questions, printed and kept."""

    def __init__(self, batches: Batches, examples: Sequence[Example], args: argparse.Namespace) -> None:
        self.batches, self.examples, self.args = batches, examples, args
        self.taken: list[dict[str, Any]] = []

    def on_train_begin(self, _: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if self.args.sample_steps and state.global_step == 0:
            self.take(model, state)

    def on_step_end(self, _: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if self.args.sample_steps and state.global_step % self.args.sample_steps == 0:
            self.take(model, state)

    def take(self, model: nn.Module, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        for example in self.examples:
            said = answer(model, self.batches, example, self.args)
            picture, question = example.picture.name, example.turns[-1][0]
            self.taken.append(
                {"step": state.global_step, "picture": picture, "question": question, "answer": said}
                | {"expected": example.answer}
            )
            print(f"[step {state.global_step}] {picture}: {question} {said!r}, expected {example.answer!r}", flush=True)
