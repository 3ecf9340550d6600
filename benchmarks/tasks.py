"""Small trainings that are the same in all but the optimizer's state, and the rows that they become.

    factorisation  the paper's appendix B.2: B A of rank 8 is fitted to a random M (100, 100); the loss is over the
                   best that any B A can reach, which the SVD tells
    digits         the paper's section 3.3 in small: an MLP pretrained on upright digits of 8 x 8 pixels, then LoRA of
                   r = 4 on the same digits rotated, each by an angle of its own
    long           the same for 5000 steps: what small errors of a state add up to
    smollm2        SmolLM2-135M-Instruct on the language reference that Python brings along, as examples/finetune_llm.py

A Case is all that determines a run; two runs that differ in `state` alone see the same data in the same order and
start from the same numbers. The toy tasks need no package and a second: they show that the code runs.
"""

import copy
import dataclasses
import math
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import harness
import numpy as np
import pictures
import torch
from harness import Row
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import oplora

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import finetune_llm

LATENT_WIDTH = 128
DEFAULT_START = "sign"  # what oplora.AdamW(state="lean") starts from unless told otherwise
WEIGHT_RANK, MOMENT_RANK = 2, 1
BATCH = 64  # images
TEXT_BATCH, TEXT_BLOCK, TEXT_HELD_OUT = 1, 32, 48  # blocks a step, tokens a block, blocks


# ---- a run ----


@dataclass(frozen=True)
class Case:
    """What determines a run, and what its row is known by."""

    task: str
    state: str  # exact, lean, or lora: torch.optim.AdamW on A and B, for which the fields below with None stay so
    lr: float
    seed: int  # of the task, of PEFT's A, of the generators
    steps: int
    start: str | None = None
    hidden_width: int | None = None
    weight_rank: int | None = None
    moment_rank: int | None = None
    init: str | None = None
    hidden_lr_ratio: float | None = None


@dataclass(frozen=True)
class Rate:
    """A learning rate, and what else of oplora.AdamW's arguments goes with it."""

    lr: float
    init: str = "paper"
    hidden_lr_ratio: float = 1.0


def lora_case(name: str, lr: float, seed: int) -> Case:
    return Case(name, "lora", lr, seed, task_of(name).steps)


def oplora_case(
    name: str,
    state: str,
    start: str,
    rate: Rate,
    seed: int,
    hidden_width: int = 32,
    ranks: tuple[int, int] = (WEIGHT_RANK, MOMENT_RANK),
) -> Case:
    weight_rank, moment_rank = ranks if state == "lean" else (None, None)
    return Case(
        name,
        state,
        rate.lr,
        seed,
        task_of(name).steps,
        start,
        hidden_width,
        weight_rank,
        moment_rank,
        rate.init,
        rate.hidden_lr_ratio,
    )


def case_of(row: Row) -> Case:
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


def make_optimizer(case: Case, model: nn.Module) -> Optimizer:
    if case.state == "lora":
        return torch.optim.AdamW(finetune_llm.trainable(model), lr=case.lr)
    ranks = {"weight_rank": case.weight_rank, "moment_rank": case.moment_rank} if case.state == "lean" else {}
    return oplora.AdamW(
        model,
        lr=case.lr,
        state=case.state,
        start=case.start,
        hidden_width=case.hidden_width,
        latent_width=LATENT_WIDTH,
        init=case.init,
        hidden_lr_ratio=case.hidden_lr_ratio,
        seed=case.seed,
        **ranks,
    )


def run(case: Case) -> Row:
    """Trains; the row has no environment yet. A loss that is not finite ends a run, whose `loss` is then None."""
    from oplora.errors import OPLoRARuntimeError

    task = task_of(case.task)
    torch.manual_seed(case.seed)  # PEFT's A
    problem = task.make(case.seed)
    factors = finetune_llm.trainable(problem.model)
    optimizer = make_optimizer(case, problem.model)
    scheduler = LambdaLR(optimizer, task.schedule)
    losses: list[float] = []
    held_bytes = 0
    begin = time.perf_counter()
    for step in range(case.steps):
        loss = problem.loss()
        if not math.isfinite(loss.item()):
            break
        loss.backward()  # type: ignore[no-untyped-call]
        if step == case.steps - 1:
            held_bytes = harness.bytes_held((factors, [p.grad for p in factors], optimizer.state_dict()))
        try:
            optimizer.step()
        except OPLoRARuntimeError:  # a gradient that is not finite behind a loss that is
            break
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    whole = len(losses) == case.steps
    numbers = sum(p.numel() for p in factors)
    return {
        "kind": "run",
        **dataclasses.asdict(case),
        "title": task.title,
        "r": task.r,
        "latent_width": None if case.state == "lora" else LATENT_WIDTH,
        "factor_numbers": numbers,
        "loss": task.mean_before(case.steps, losses) if whole else None,
        "losses": [[mark, task.mean_before(mark, losses)] for mark in task.marks if mark <= len(losses)],
        "held_out": problem.held_out() if whole else None,
        "diverged_at": None if whole else len(losses),
        "held_bytes": held_bytes if whole else None,
        "bytes_per_entry": held_bytes / numbers if whole else None,
        "seconds": seconds,
    }


# ---- what is trained ----


class Problem(Protocol):
    """A model with LoRA, the loss of one batch after the other, and the loss on what is never trained on."""

    model: nn.Module

    def loss(self) -> Tensor: ...

    def held_out(self) -> float | None: ...


def with_lora(model: nn.Module, r: int, alpha: int, targets: Sequence[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets)))


class Factorisation:
    """mean((B A - M)^2) over its least value, M (n, n) uniform; A and B are LoRA's, on a layer whose weight is 0."""

    def __init__(self, seed: int, n: int, r: int) -> None:
        self.M = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
        self.best = torch.linalg.svdvals(self.M)[r:].square().sum() / n**2
        layer = nn.Linear(n, n, bias=False)
        nn.init.zeros_(layer.weight)
        self.model = with_lora(nn.Sequential(OrderedDict(product=layer)), r, r, ["product"])
        self.eye = torch.eye(n)

    def loss(self) -> Tensor:
        loss: Tensor = (self.model(self.eye).T - self.M).square().mean() / self.best
        return loss

    def held_out(self) -> None:
        return None


@lru_cache(1)
def pretrained_on(load: Callable[[], pictures.Pictures]) -> tuple[nn.Module, Tensor, Tensor]:
    """An MLP 64-128-10 that has learnt the upright images; the rotated ones, (count, 64); their labels."""
    upright, labels = load()
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = OrderedDict(first=nn.Linear(64, 128), relu=nn.ReLU(), second=nn.Linear(128, 10))
        model = nn.Sequential(layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(800):
        some = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(upright[some].flatten(1)), labels[some]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    radians = pictures.random_angles(len(labels), generator)
    return model, pictures.rotated(upright, radians).flatten(1), labels


class Digits:
    """The cross entropy of a batch of rotated digits; every image has one angle, drawn once."""

    def __init__(self, seed: int, load: Callable[[], pictures.Pictures], r: int) -> None:
        model, self.images, self.labels = pretrained_on(load)
        self.model = with_lora(copy.deepcopy(model), r, r, ["first", "second"])
        self.order = finetune_llm.block_order(len(self.labels), seed)

    def loss(self) -> Tensor:
        some = list(islice(self.order, BATCH))
        return F.cross_entropy(self.model(self.images[some]), self.labels[some])

    def held_out(self) -> None:
        return None


@lru_cache(1)
def text_blocks(folder: str) -> tuple[Tensor, Tensor]:
    """Blocks to train on and blocks held out."""
    tokenizer = finetune_llm.load_tokenizer(Namespace(model=folder))
    settings = Namespace(block_size=TEXT_BLOCK, held_out_blocks=TEXT_HELD_OUT)
    return finetune_llm.split_into_blocks(finetune_llm.read_text(None), tokenizer, settings)


def smollm2() -> tuple[nn.Module, Tensor, Tensor]:
    folder = finetune_llm.packaged_model()
    base = finetune_llm.load_base(Namespace(model=folder, dtype="float32", device="cpu"))
    return base, *text_blocks(folder)


def toy_llama() -> tuple[nn.Module, Tensor, Tensor]:
    """A LLaMA of two layers from random numbers, and text in which every block counts up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
    blocks = (torch.arange(20)[:, None] + torch.arange(TEXT_BLOCK)) % 64
    return base, blocks[:-4], blocks[-4:]


class Text:
    """The mean cross entropy of the next token in a batch of blocks."""

    def __init__(self, seed: int, load: Callable[[], tuple[nn.Module, Tensor, Tensor]], r: int) -> None:
        base, self.blocks, self.unseen = load()
        self.model = with_lora(base, r, 2 * r, ["q_proj", "k_proj", "v_proj", "o_proj"]).train()
        self.order = finetune_llm.block_order(len(self.blocks), seed)

    def loss(self) -> Tensor:
        ids = self.blocks[list(islice(self.order, TEXT_BATCH))]
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def held_out(self) -> float:
        return finetune_llm.evaluate(self.model, self.unseen, Namespace(device="cpu", batch_size=8))


# ---- the tasks ----


@dataclass(frozen=True)
class Task:
    title: str
    make: Callable[[int], Problem]
    r: int
    steps: int
    rates: tuple[Rate, ...]
    warmup: int | None  # steps, then linear to 0 at the end; None: a constant rate
    tail: int  # a loss in a row is the mean of so many steps before its mark
    small: bool = True  # runs go side by side, a thread each
    lora_seeds: int | None = None  # plain LoRA runs with so many of the seeds; None: with all
    seeds: int = 3  # more where a run takes a second: a deviation over three seeds says little

    @property
    def marks(self) -> list[int]:
        return [max(1, self.steps // 12), max(1, self.steps // 3), self.steps]

    def mean_before(self, mark: int, losses: Sequence[float]) -> float:
        return float(np.mean(losses[max(0, mark - self.tail) : mark]))

    def schedule(self, step: int) -> float:
        if self.warmup is None:
            return 1.0
        return finetune_llm.warmup_then_linear(step, self.warmup, self.steps)


def rates(*values: float) -> tuple[Rate, ...]:
    return tuple(map(Rate, values))


FACTORISATION = partial(Factorisation, n=100, r=8)
DIGITS = partial(Digits, load=pictures.digits, r=4)
EPOCH = 28  # steps of BATCH digits
TASKS = {
    "factorisation": Task(
        "matrix factorisation, 100 x 100, rank 8",
        FACTORISATION,
        8,
        600,
        rates(1e-3, 3e-3, 1e-2),
        warmup=50,
        tail=1,
        seeds=12,
    ),
    "digits": Task(
        "rotated digits",
        DIGITS,
        4,
        8 * EPOCH,
        (*rates(1e-3, 3e-3, 1e-2, 3e-2), Rate(3e-2, hidden_lr_ratio=0.1)),
        warmup=None,
        tail=EPOCH,
        seeds=12,
    ),
    "long": Task(
        "rotated digits, 5000 steps", DIGITS, 4, 5000, rates(3e-4, 1e-3, 3e-3), warmup=None, tail=100, seeds=6
    ),
    "smollm2": Task(
        "SmolLM2-135M on text",
        partial(Text, load=smollm2, r=8),
        8,
        300,
        rates(3e-4, 1e-3, 3e-3),
        warmup=30,
        tail=50,
        lora_seeds=1,
    ),
}
TOYS = {
    "toy factorisation": Task(
        "matrix factorisation, 12 x 12, rank 2", partial(Factorisation, n=12, r=2), 2, 24, rates(3e-3, 1e-2), 4, tail=1
    ),
    "toy digits": Task(
        "noisy pictures, rotated", partial(Digits, load=pictures.toy, r=2), 2, 12, rates(3e-3), None, tail=4
    ),
    "toy text": Task(
        "a random LLaMA on counting",
        partial(Text, load=toy_llama, r=2),
        2,
        6,
        (Rate(1e-2), Rate(1e-2, init="keep", hidden_lr_ratio=0.1)),
        warmup=2,
        tail=3,
        small=False,
        lora_seeds=1,
    ),
}


def task_of(name: str) -> Task:
    return {**TASKS, **TOYS}[name]


# ---- many runs ----


def finished(cases: Sequence[Case], threads: int, apart: bool) -> Iterator[Row]:
    """The rows as they come: small tasks side by side in processes of one thread each (here, unless apart), then the
    others here, one by one, with all threads."""
    small = [case for case in cases if task_of(case.task).small and apart]
    if small:
        pool = ProcessPoolExecutor(
            threads, mp_context=get_context("forkserver"), initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            for future in as_completed([pool.submit(run, case) for case in small]):
                yield {**future.result(), "threads": 1}
        finally:
            pool.shutdown(cancel_futures=True)
    for case in cases:
        if case not in small:
            yield run(case)


def run_all(
    plan: Iterable[Case], output: Path, common: Row, threads: int, *, fresh: bool = False, apart: bool = True
) -> list[Row]:
    """Rows of the plan's cases, in its order. Those that the file has are not run again, unless `fresh`; the others
    are in it as soon as they are measured. Whatever else the file holds stays, before them."""
    plan = list(dict.fromkeys(plan))
    there = harness.read_rows(output) if output.exists() else []
    others = [row for row in there if row["kind"] != "run" or case_of(row) not in plan]
    known = {} if fresh else {case_of(row): row for row in there if row["kind"] == "run"}
    missing = [case for case in plan if case not in known]
    for count, row in enumerate(finished(missing, threads, apart), 1):
        known[case_of(row)] = {**common, **row}
        print(f"{count}/{len(missing)} {line(row)}", flush=True)
        harness.write_rows(output, others + [known[case] for case in plan if case in known])
    return [known[case] for case in plan]


def line(row: Row) -> str:
    """A row for the terminal."""
    text = f"{row['title']}: {row['state']}"
    if row["state"] != "lora":
        text += f" from {row['start']}, H {row['hidden_width']}, init {row['init']}, ratio {row['hidden_lr_ratio']:g}"
    text += f", lr {row['lr']:g}, seed {row['seed']}: "
    if row["loss"] is None:
        return text + f"diverged at step {row['diverged_at']}"
    held_out = "" if row["held_out"] is None else f", held out {row['held_out']:.4f}"
    return text + f"{row['loss']:.4f}{held_out}, {row['bytes_per_entry']:.0f} bytes an entry, {row['seconds']:.1f} s"
