"""What does each method give when nobody chooses a learning rate?

    python benchmarks/paper/untuned.py                      all of it
    python benchmarks/paper/untuned.py --tasks digits small --methods Prodigy "LoRA, tuned"
    python benchmarks/paper/untuned.py --quick --output /tmp/untuned.json      of toys: does it run at all?

Every method trains once a seed, as its documentation has it, and nothing of it is chosen on any of these tasks:
neither a rate nor anything else. They train with the task's own schedule, the same for all, but for the two with a
schedule-free average: their documentation says to use no schedule, and their rate is constant. Prodigy's
documentation has no schedule or one that decays, that of D-Adaptation the schedule that the task has anyway.

Beside them is "LoRA, tuned", torch's AdamW at the best of many rates: the grid of protocol.py, three to a decade, and
between each two of them the lower one BETWEEN times, by the least validation loss of a checkpoint, with the tuning
seeds of protocol.py. To save time the pictures' grid begins at 1e-3, and on the language models it has but the rates
that are within one step of the best of each of the two grids in results/language.json (on the longer training: of the
best one in results/settings.json). It grows where its best rate is at its edge, as protocol.py says.

Validation data are measured at evenly spaced checkpoints: 20, on the small LLaMA 8, on SmolLM2 4. A training is
measured on test data at its end, and as it was at the checkpoint with the least validation loss: who looks at
validation data keeps that one. An optimizer that averages its weights is switched to the average for it.

"flatness" are trainings of "OP-LoRA, auto" at other values of its rate argument, with one seed, but not of SmolLM2,
whose trainings take longest: the bits are the same. "AdamW, auto's rates" is a control: torch's AdamW steps A and B at
the rates that "OP-LoRA, auto" found, step by step with the same seed. What it lacks is what the method has beside a
schedule.

The first seven tasks are those of run.py. CONFIRMING were looked at once, when the methods were what they are.

    pip install prodigyopt prodigy-plus-schedule-free schedulefree adv-optm dadaptation pytorch-optimizer

Rows go to results/untuned.json as they are measured; the same command continues a run that was stopped. figures.py
makes the tables. README.md explains the columns.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import portraits
import protocol
import text
import torch
from harness import Row
from methods import BETWEEN, LORA, OP_LORA, Method, adamw, lora_plus, lora_rite, on_factors, op, trainable
from protocol import AtTheEnd, Experiment, Plan, Task, Training, Trial, is_tuning, spread
from run import DIGITS, FASHION, GLOSSES, MNIST, REFERENCE, SMALL, TOYS, add_options, experiment_of
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

FLATNESS_RATES = (1e-5, 1e-4, 1e-3, 1e-2)
FLATNESS_SEED = 1
NOT_FLATNESS = ("reference", "glosses")


# ---- methods ----


def packaged(model: nn.Module, lr: float, seed: int, module: str, name: str, **settings: Any) -> Any:
    """Another package's optimizer on A and B; of a schedule-free one the weights that are trained."""
    optimizer = on_factors(model, lr, seed, getattr(import_module(module), name), **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


@dataclass(frozen=True)
class Untuned(Method):
    lr: float = 1.0
    scheduled: bool = True  # the task's schedule; else a constant rate


TUNED = dataclasses.replace(LORA, name="LoRA, tuned")
AUTO = Untuned("OP-LoRA, auto", OP_LORA, partial(op, preset="auto"))
CONTROL = Untuned("AdamW, auto's rates", LORA.source, adamw)
UNTUNED_LORA = [
    Untuned("AdamW 1e-4", LORA.source, adamw, lr=1e-4),  # most examples of PEFT and of diffusers
    Untuned("AdamW 2e-4", LORA.source, adamw, lr=2e-4),  # QLoRA's, and most recipes for language models
]
METHODS = [
    *UNTUNED_LORA,
    # the example in PEFT's documentation has this rate and B's 16 times as high
    Untuned("LoRA+", "arXiv 2402.12354; peft", lora_plus, lr=5e-5),
    Untuned(
        "Prodigy",  # the two switches are what its documentation recommends
        "arXiv 2306.06101; prodigyopt",
        partial(packaged, module="prodigyopt", name="Prodigy", use_bias_correction=True, safeguard_warmup=True),
    ),
    Untuned(
        "Prodigy plus schedule-free",
        "prodigy-plus-schedule-free",
        partial(packaged, module="prodigyplus", name="ProdigyPlusScheduleFree"),
        scheduled=False,
    ),
    Untuned("Prodigy_adv", "adv-optm", partial(packaged, module="adv_optm", name="Prodigy_adv")),
    Untuned(
        "schedule-free AdamW",
        "arXiv 2405.15682; schedulefree",
        partial(packaged, module="schedulefree", name="AdamWScheduleFree"),
        lr=2.5e-3,
        scheduled=False,
    ),
    Untuned(
        "D-Adaptation", "arXiv 2301.07733; dadaptation", partial(packaged, module="dadaptation", name="DAdaptAdam")
    ),
    Untuned("LoRA-RITE", "arXiv 2410.20625; pytorch-optimizer", lora_rite, lr=1e-3),
    Untuned("OP-LoRA, paper", OP_LORA, partial(op, preset="paper"), lr=1e-3),
    Untuned("OP-LoRA, flat", OP_LORA, partial(op, preset="flat"), lr=1e-4),
]


def methods() -> dict[str, Method]:
    every = [TUNED, *METHODS, AUTO, CONTROL]
    return {method.name: method for method in every}


# ---- tasks ----


@dataclass(frozen=True)
class Interleaved(Task):
    """Of a task, both grids as one, and how often it is measured."""

    first_rate: int = 0  # of the task's own grid
    checkpoints: int = 20

    def rate(self, index: int) -> float:
        coarse, between = divmod(index, 2)
        return float(f"{super().rate(self.first_rate + coarse) * (BETWEEN if between else 1):.2g}")

    @classmethod
    def of(cls, task: Task, first_rate: int, rates: int, **changes: Any) -> "Interleaved":
        same = {field.name: getattr(task, field.name) for field in dataclasses.fields(Task)}
        return cls(**{**same, "first_rate": first_rate, "rates": rates, "seeds": 5, "apart": False, **changes})


LONG = dataclasses.replace(SMALL, title="the small LLaMA, ten times as many steps", steps=10 * SMALL.steps)
DECAYING = dataclasses.replace(MNIST, title=f"{MNIST.title}, decaying rate", warmup=0.1)
IMAGES = {"digits": DIGITS, "mnist": MNIST, "mnist decaying": DECAYING, "fashion": FASHION}
TASKS = {
    **{name: Interleaved.of(task, 3, 12) for name, task in IMAGES.items()},
    "small": Interleaved.of(SMALL, 5, 6, growth=1, checkpoints=8),
    "reference": Interleaved.of(REFERENCE, 2, 7, growth=1, checkpoints=4),
    "glosses": Interleaved.of(GLOSSES, 3, 7, growth=1, checkpoints=4),
}
FACES = Task("a small U-Net, 60 emoji of faces", portraits.FACES, 300, portraits.ATTENTION, r=4, alpha=4)  # type: ignore[arg-type]
OTHER = dataclasses.replace(
    SMALL, title="a small GPT-2, from the Bible to Python's reference", make=text.OTHER, targets=("c_attn", "c_proj")
)
OTHER_LONG = dataclasses.replace(OTHER, title="the small GPT-2, ten times as many steps", steps=10 * OTHER.steps)
CONFIRMING = {
    "other model": Interleaved.of(OTHER, 4, 8, checkpoints=8, seeds=2),
    "portraits": Interleaved.of(FACES, 3, 8, checkpoints=10, seeds=2),
    "small long": Interleaved.of(LONG, 4, 5, growth=1, checkpoints=8, seeds=2),
    "other long": Interleaved.of(OTHER_LONG, 5, 5, growth=1, checkpoints=8, seeds=2),
}
UP_TO_SEEDS = (1, 3, 5)  # so many with all tasks, then so many, ...


def plan() -> Plan:
    return {name: (task, methods()) for name, task in {**TASKS, **CONFIRMING}.items()}


def toys() -> Plan:
    return {
        f"toy {kind}": (Interleaved.of(TOYS[kind], 0, 2, checkpoints=3, seeds=2), methods())
        for kind in ("images", "text")
    }


# ---- a training ----


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """The weights that a schedule-free optimizer is for, in the place of those that it trains."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    optimizer.eval()
    yield
    optimizer.train()


class AtCheckpoints(AtTheEnd):
    """Validation data at the task's checkpoints; test data at the end, and of the checkpoint that was best."""

    def __init__(self, trial: Trial, task: Task, training: Training) -> None:
        super().__init__(trial, task, training)
        assert isinstance(task, Interleaved)
        self.at = {round(trial.steps * (i + 1) / task.checkpoints) for i in range(task.checkpoints)}
        self.measured: dict[int, dict[str, float]] = {}  # by step
        self.best = 0
        self.kept: list[Tensor] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return protocol.trainable(self.training.model)

    def after(self, steps: int) -> None:
        if steps not in self.at:
            return
        begin = time.perf_counter()
        with averaged(self.training.optimizer):
            self.measured[steps] = self.measure("validation")
            loss = self.measured[steps]["loss"]
            if loss < math.inf and (not self.best or loss < self.measured[self.best]["loss"]):
                self.best = steps
                self.kept = [p.detach().clone() for p in self.parameters]
        self.seconds += time.perf_counter() - begin

    def columns(self, whole: bool) -> Row:
        diverged = {"loss": math.inf}
        row: Row = {"validation_curve": [[steps, measured["loss"]] for steps, measured in self.measured.items()]}
        row["best_step"] = self.best or None
        with averaged(self.training.optimizer):
            row |= named("validation", self.measured[self.trial.steps] if whole else diverged)
            row |= named("best_validation", self.measured[self.best] if self.best else diverged)
            if is_tuning(self.trial):
                return row
            at_the_end = self.measure("test") if whole else diverged
            at_best = at_the_end if self.best == self.trial.steps else self.test_of_best() if self.best else diverged
        return row | named("test", at_the_end) | named("best_test", at_best)

    @torch.no_grad()
    def test_of_best(self) -> dict[str, float]:
        """The training is over: its weights are overwritten."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)
        return self.measure("test")


def named(prefix: str, measured: dict[str, float]) -> Row:
    return {f"{prefix}_{name}": value for name, value in measured.items()}


class AtRates(torch.optim.AdamW):
    """Each step at its own rate, whatever a schedule says."""

    def __init__(self, parameters: Sequence[nn.Parameter], rates: Sequence[float]) -> None:
        super().__init__(parameters, lr=rates[0])
        self.rates = iter(rates)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = next(self.rates)
        return super().step(closure)


def found_rates(trial: Trial, task: Task, device: str) -> list[float]:
    """Those at which "OP-LoRA, auto" steps, the schedule's part among them."""
    training = Training.of(task, AUTO, AUTO.lr, trial.seed, device)
    scheduler = LambdaLR(training.optimizer, lambda step: task.schedule(step, trial.steps))
    rates: list[float] = []
    for _ in range(trial.steps):
        training.step()
        rates.append(training.optimizer.found_lr)
        scheduler.step()
    return rates


def run(trial: Trial, task: Task, method: Method, device: str, threads: int) -> Row:
    if method.name == CONTROL.name:
        rates = found_rates(trial, task, device)
        method = dataclasses.replace(CONTROL, optimizer=lambda model, lr, seed: AtRates(trainable(model), rates))
    if isinstance(method, Untuned) and not method.scheduled:
        task = dataclasses.replace(task, warmup=None)
    return protocol.run(trial, task, method, device, threads, AtCheckpoints)


# ---- all of them ----


class UntunedExperiment(Experiment):
    """The tuned method's rate is chosen as in other experiments, the others have theirs."""

    train = staticmethod(run)
    chosen_by = "best_validation_loss"

    def run(self) -> bool:
        """Task by task with few seeds, then with more; what confirms comes last."""
        first = [name for name in self.plan if name not in CONFIRMING]
        last = [name for name in self.plan if name in CONFIRMING]
        turns = [(name, seeds) for names in (first, last) for seeds in UP_TO_SEEDS for name in names]
        for name, seeds in turns:
            wanted: Callable[[], list[Trial]]
            for wanted in (self.missing_tuning, partial(self.missing_tests, seeds)):
                while trials := [trial for trial in wanted() if trial.task == name]:
                    if not self.run_all(trials):
                        return False
        return True

    def missing_tuning(self) -> list[Trial]:
        return [trial for trial in super().missing_tuning() if trial.method == TUNED.name]

    def best_rate(self, task: str, method: str) -> float:
        there = self.plan[task][1][method]
        return there.lr if isinstance(there, Untuned) else super().best_rate(task, method)

    def missing_tests(self, seeds: int = max(UP_TO_SEEDS)) -> list[Trial]:
        """Seed by seed, and the flatness last."""
        pairs = [pair for pair in self.pairs() if pair[1] != TUNED.name or self.tuned(*pair)]
        trials = [trial for pair in pairs for trial in self.tests(*pair) if trial.seed <= seeds]
        trials.sort(key=lambda trial: trial.seed)
        trials += [trial for task in self.plan for trial in self.flatness(task)]
        return [trial for trial in dict.fromkeys(trials) if trial not in self.rows]

    def flatness(self, task: str) -> list[Trial]:
        settings, some = self.plan[task]
        rates = FLATNESS_RATES if AUTO.name in some and task not in NOT_FLATNESS else ()
        return [Trial(task, AUTO.name, lr, FLATNESS_SEED, settings.steps) for lr in rates]


def table(experiment: UntunedExperiment) -> str:
    """Losses of every method, for the terminal."""
    lines = []
    for name, (task, some) in experiment.plan.items():
        lines.append(f"{task.title:50} {'rate':>8} {'test at the end':>22} {'at the best checkpoint':>22}")
        for method in some:
            if method == TUNED.name and not experiment.tuned(name, method):
                continue
            tests = experiment.tested(name, method)
            end, best = (spread([row[column] for row in tests], 4) for column in ("test_loss", "best_test_loss"))
            lines.append(f"  {method:48} {experiment.best_rate(name, method):8.2g} {end:>22} {best:>22}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> UntunedExperiment:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args(arguments)
    experiment = experiment_of(UntunedExperiment, "untuned", plan(), toys(), parser, args)
    whole = experiment.run()
    print(table(experiment))
    if not whole:
        print(f"{len(experiment.rows)} trials in {experiment.output}, not yet all of them")
    return experiment


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
