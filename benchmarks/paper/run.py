"""The experiments, one command each; protocol.py says how they compare.

    python benchmarks/paper/run.py factorisation    the paper's appendix B.2
    python benchmarks/paper/run.py images           the paper's section 3.3
    python benchmarks/paper/run.py language         language models: eight alternatives beside OP-LoRA
    python benchmarks/paper/run.py ablations        what of OP-LoRA does what
    python benchmarks/paper/run.py settings         starts, rates and widths that the package could have as defaults
    python benchmarks/paper/run.py NAME --quick --output /tmp/NAME.json    seconds, of toys: does it run at all?

Rows go to results/NAME.json as they are measured; the same command continues a run that was stopped. figures.py draws
them. README.md says what has to be installed, and explains the columns.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import factorisation
import images
import text
import torch
from methods import (
    FALLING,
    FLAT,
    LORA,
    LORA_FASTER,
    LORA_OF_EQUAL_MEMORY,
    OP_DORA,
    OP_EXACT,
    OP_LEAN,
    OWN_RATE,
    PEERS,
    START_KEPT,
    Method,
    eager,
    oplora_method,
    steps_factors,
)
from protocol import RESULTS, Experiment, Plan, Task, spread

SETTINGS = (START_KEPT, OWN_RATE, FALLING, FLAT)  # of OP-LoRA, beside the paper's
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TOY_STEPS = 6
E = TypeVar("E", bound=Experiment)


def methods(*some: Method) -> dict[str, Method]:
    return {method.name: method for method in some}


def image_task(title: str, make: object, steps: int, seeds: int = 5) -> Task:
    return Task(title, make, steps, ("first", "second"), r=4, alpha=4, rates=10, seeds=seeds, tuning_seeds=3)  # type: ignore[arg-type]


def text_task(title: str, make: object, steps: int, apart: bool = False, seeds: int = 3) -> Task:
    return Task(title, make, steps, ATTENTION, r=8, alpha=16, warmup=0.1, apart=apart, seeds=seeds)  # type: ignore[arg-type]


def factorisation_task(optimizer: str, lowest_rate: float) -> Task:
    title = f"matrix factorisation, {optimizer}"
    return Task(title, factorisation.FACTORISATION, 1000, ("product",), 8, 8, lowest_rate, warmup=0.05, seeds=10)


DIGITS = image_task("rotated digits", images.DIGITS, 600)
MNIST = image_task("rotated MNIST", images.MNIST, 810)
FASHION = image_task("rotated Fashion-MNIST", images.FASHION_MNIST, 860)
SMALL = text_task("a small LLaMA, from the Bible to Python's reference", text.SMALL, 200)
REFERENCE = text_task("SmolLM2 on Python's reference", text.REFERENCE, 60, apart=True)
GLOSSES = text_task("SmolLM2 on WordNet's categories", text.GLOSSES, 60, apart=True)
ADAMW_FACTORISATION = factorisation_task("AdamW", 1e-4)


def factorisations() -> Plan:
    """Every optimizer on A and B themselves and, by autograd, on two generators; AdamW also inside oplora.AdamW."""
    optimizers = {
        "SGD": (torch.optim.SGD, {}, 1e-2),
        "momentum": (torch.optim.SGD, {"momentum": 0.9}, 1e-3),
        "Adam": (torch.optim.Adam, {}, 1e-4),
    }
    plan: Plan = {}
    for name, (optimizer, settings, lowest_rate) in optimizers.items():
        two = eager("two generators", share="factor", optimizer=optimizer, **settings)
        one = eager("one generator", optimizer=optimizer, **settings)
        plain = steps_factors("factors", optimizer, **settings)
        plan[f"factorisation, {name}"] = factorisation_task(name, lowest_rate), methods(plain, two, one)
    plan["factorisation, AdamW"] = ADAMW_FACTORISATION, methods(LORA, OP_EXACT, OP_LEAN, *SETTINGS)
    # of the rates at the edge of stability, a seed's luck would be the choice
    return {name: (dataclasses.replace(task, tuning_seeds=3), some) for name, (task, some) in plan.items()}


def rotations() -> Plan:
    scaled = oplora_method("OP-ScaledAdamW", precondition=1e-6)
    compared = methods(LORA, LORA_FASTER, *PEERS, OP_EXACT, OP_LEAN, OP_DORA, scaled, *SETTINGS)
    few = {name: compared[name] for name in (LORA.name, LORA_FASTER.name, "LoRA+", "DoRA", "ScaledAdamW")}
    ours = methods(OP_EXACT, OP_LEAN, OP_DORA, *SETTINGS)
    decaying = dataclasses.replace(MNIST, title=f"{MNIST.title}, decaying rate", warmup=0.1)
    return {
        "mnist": (MNIST, compared),
        "mnist decaying": (decaying, methods(LORA, LORA_FASTER, OP_LEAN, *SETTINGS)),
        "digits": (DIGITS, compared),
        "fashion": (FASHION, {**few, **ours}),
    }


def languages() -> Plan:
    compared = methods(LORA, LORA_FASTER, LORA_OF_EQUAL_MEMORY, *PEERS, OP_EXACT, OP_LEAN, OP_DORA, *SETTINGS)
    return {"reference": (REFERENCE, compared), "glosses": (GLOSSES, compared), "small": (SMALL, compared)}


def ablations() -> Plan:
    parts = methods(
        LORA,
        eager("OP-LoRA"),
        eager("linear generator", linear=True),
        eager("z frozen", frozen=("z",)),
        eager("z, W1, c1 frozen", frozen=("z", "W1", "c1")),
        eager("W2 frozen", frozen=("W2",)),
        eager("trainable rate only", only="trainable rate"),
        eager("line search only", only="line search"),
        eager("one MLP for all layers", share="model"),
        Method("LoRA, as many parameters", LORA.source, LORA.optimizer, rank_factor=33),
        *(oplora_method(f"H = {H}", hidden_width=H) for H in (4, 32, 256, 2048)),
    )
    in_one_layer = {name: method for name, method in parts.items() if name != "one MLP for all layers"}
    in_one_layer.pop("LoRA, as many parameters")  # B A of full rank: the loss is 0
    mnist = dataclasses.replace(MNIST, tuning_seeds=1)
    return {"mnist": (mnist, parts), "small": (SMALL, parts), "factorisation": (ADAMW_FACTORISATION, in_one_layer)}


def settings() -> Plan:
    """Tasks to choose by. Others, not looked at here, confirm: images and language."""
    ratios = (1.0, 0.3, 0.1, 0.03, 0.01)
    compared = methods(
        LORA,
        *(
            oplora_method(f"{init}, ratio {ratio:g}", init=init, hidden_lr_ratio=ratio)
            for init in ("paper", "keep")
            for ratio in ratios
        ),
        *(oplora_method(f"keep, H {H}", init="keep", hidden_width=H) for H in (8, 128)),
        *(oplora_method(f"keep, latent_std {std:g}", init="keep", latent_std=std) for std in (0.1, 1.0)),
        oplora_method("keep, ratio 0.1, latent_std 1", init="keep", hidden_lr_ratio=0.1, latent_std=1.0),
        *(
            eager(f"keep, ratio {ratio:g}, W2 random", keep=True, zero_start=False, hidden_lr_ratio=ratio)
            for ratio in (1.0, 0.1)
        ),
        *(oplora_method(f"keep, hidden rate {lr:g}", init="keep", hidden_lr=lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)),
        dataclasses.replace(FLAT, name="flat"),
        oplora_method("keep, hidden rate 0.01, latent_std 1", init="keep", hidden_lr=1e-2, latent_std=1.0),
        oplora_method("paper, hidden rate 0.01", init="paper", hidden_lr=1e-2),
        *(
            oplora_method(f"keep, hidden rate {c:g} / lr^{p}", init="keep", hidden_lr=1e-2, bound=(c, p))
            for c, p in ((1e-7, 1), (3e-8, 1), (1e-10, 2), (1e-11, 2), (1e-12, 3), (3e-13, 3))
        ),
    )
    long = dataclasses.replace(SMALL, title="the small LLaMA, ten times as many steps", steps=10 * SMALL.steps)
    few = ("paper, ratio 1", "keep, hidden rate 0.001", "flat", "keep, hidden rate 1e-12 / lr^3")
    return {
        "digits": (DIGITS, compared),
        "small": (SMALL, compared),
        "small long": (long, methods(LORA, LORA_FASTER) | {name: compared[name] for name in few}),
        "factorisation": (ADAMW_FACTORISATION, compared),
    }


EXPERIMENTS = {
    "factorisation": factorisations,
    "images": rotations,
    "language": languages,
    "ablations": ablations,
    "settings": settings,
}
EQUAL_SECONDS = {"language": "LoRA"}  # with whose time all of an experiment's methods train once more
TOYS = {
    "factorisation": Task(
        "matrix factorisation, 12 x 12", factorisation.TOY, 14, ("product",), 2, 2, 1e-2, 2, 0, 0.1, 2
    ),
    "images": Task("noisy pictures, rotated", images.TOY, TOY_STEPS, ("first", "second"), 2, 2, 1e-3, 2, 0, seeds=2),
    "text": Task("a random LLaMA on counting", text.TOY, TOY_STEPS, ATTENTION, 2, 4, 1e-3, 2, 0, 0.1, seeds=2),
}
TOY_OF = dict.fromkeys(("mnist", "mnist decaying", "digits", "fashion"), "images")


def toys(plan: Plan) -> Plan:
    """On a toy for every kind of task all methods that are run on one of that kind."""
    small: Plan = {}
    for task, (_, some) in plan.items():
        kind = TOY_OF.get(task, "factorisation" if task.startswith("factorisation") else "text")
        _, every = small.setdefault(f"toy {task}" if kind == "factorisation" else f"toy {kind}", (TOYS[kind], {}))
        every.update(some)
    return small


def table(experiment: Experiment) -> str:
    """Best rate and losses of every method, for the terminal."""
    lines = []
    for name, (task, some) in experiment.plan.items():
        lines.append(f"{task.title:40} {'rate':>8} {'training':>20} {'test':>20}")
        for method in some:
            lr = experiment.best_rate(name, method)
            tests = experiment.tested(name, method)
            train, test = (spread([row[name] for row in tests], 4) for name in ("train_loss", "test_loss"))
            lines.append(f"  {method:38} {lr:8.2g} {train:>20} {test:>20}")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every experiment's command."""
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="by default all of the experiment's")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="by default all of the task's")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trials side by side")
    parser.add_argument("--threads", type=int, default=1, help="of a trial")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after so many no trial begins")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--fresh", action="store_true", help="run again what the file has")
    parser.add_argument("--quick", action="store_true", help="toys, two rates: does it run at all?")


def chosen(plan: Plan, parser: argparse.ArgumentParser, args: argparse.Namespace) -> Plan:
    """The tasks and methods that the command names; a name that there is not is refused."""
    for kind, wanted, known in (
        ("task", args.tasks, plan.keys()),
        ("method", args.methods, dict.fromkeys(name for _, some in plan.values() for name in some)),
    ):
        if wanted and (unknown := set(wanted) - set(known)):
            parser.error(f"no {kind} {', '.join(sorted(unknown))}; there are: {'; '.join(known)}")
    return {
        name: (task, {method: some[method] for method in some if not args.methods or method in args.methods})
        for name, (task, some) in plan.items()
        if not args.tasks or name in args.tasks
    }


def experiment_of(
    kind: type[E], name: str, plan: Plan, toys: Plan, parser: argparse.ArgumentParser, args: argparse.Namespace
) -> E:
    """What the options ask for. toys: the plan of --quick."""
    if args.quick and args.output is None:
        parser.error("--quick needs --output: its rows don't belong among the results")
    plan = chosen(toys if args.quick else plan, parser, args)
    output = args.output or RESULTS / f"{name}.json"
    if args.fresh:
        output.unlink(missing_ok=True)
    until = time.monotonic() + 60 * args.minutes
    return kind(name, plan, output, args.device, args.workers, args.threads, until, EQUAL_SECONDS.get(name))


def main(arguments: Sequence[str] | None = None) -> Experiment:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    add_options(parser)
    args = parser.parse_args(arguments)
    plan = EXPERIMENTS[args.experiment]()
    experiment = experiment_of(Experiment, args.experiment, plan, toys(plan), parser, args)
    whole = experiment.run()
    print(table(experiment) if whole else f"{len(experiment.rows)} trials in {experiment.output}, not yet all of them")
    return experiment


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
