"""How every comparison here is made: the same grid of rates for all methods, the best chosen on validation data, then
fresh seeds on test data.

1. Tuning. Each method trains at each rate of the task's grid: three to a decade, nine or more of them. The best rate
   is the one with the least validation loss, its mean where the task has several tuning seeds. Where that is the grid's
   last or first rate the grid grows by two rates on that side, three times at most: for every method by the same rule.
2. Test. At its best rate each method trains with the seeds 1, 2, 3, ..., which no choice has seen, and is measured on
   test data, which no choice has seen either.

3. Equal seconds, where the experiment asks for it. Training steps of all methods are timed in turns in one process;
   where a method's differ from the baseline's by more than the rounds do, it trains once more with the test seeds, at
   its best rate, for as many steps as fit into the baseline's time, and the schedule is fitted to them.

A trial is known by task, method, rate, seed and steps; what the result's file has is not run again, so a run that was
cut short continues where it was. Data, their order and the adapter's start depend on the seed alone.
"""

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import harness
from harness import Row
from methods import Method, trainable

Plan = dict[str, tuple["Task", dict[str, Method]]]
RESULTS = Path(__file__).parent / "results"
TUNING_SEEDS = 1000  # and 1001, ...; the tests have 1, 2, 3, ...
CURVE = 20  # points of a loss curve that are kept
GROWN = 2  # rates by which a grid grows at its edge


# ---- what is trained ----


class Problem(Protocol):
    """A model without adapter, the loss of one batch after the other, and what is measured at the end."""

    base: nn.Module

    def loss(self, model: nn.Module) -> Tensor: ...

    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        """split: "validation" or "test". "loss" is what a rate is chosen by."""
        ...


@dataclass(frozen=True)
class Task:
    title: str
    make: Callable[[int], Problem]  # from a seed
    steps: int
    targets: tuple[str, ...]
    r: int
    alpha: int
    lowest_rate: float = 1e-4
    rates: int = 9  # of the grid, three to a decade
    growth: int = 3  # times that the grid grows, at most, where the best is at its edge
    warmup: float | None = None  # share of the steps; then linear to 0 at the end. None: a constant rate
    seeds: int = 3  # of the test
    tuning_seeds: int = 1
    apart: bool = False  # on the CPU every trial in a process of its own, whose memory is measured

    def schedule(self, step: int, steps: int) -> float:
        if self.warmup is None:
            return 1.0
        warmup = math.ceil(self.warmup * steps)
        return min((step + 1) / (warmup + 1), max(0, steps - step) / max(1, steps - warmup))

    def rate(self, index: int) -> float:
        """The grid's rates, and those by which it grows below 0 and above its end."""
        return float(f"{self.lowest_rate * 10 ** (index / 3):.2g}")


@dataclass
class Training:
    """What steps: of a task by a method, from a seed."""

    problem: Problem
    model: nn.Module
    optimizer: Any

    @classmethod
    def of(cls, task: Task, method: Method, lr: float, seed: int, device: str) -> "Training":
        problem = task.make(seed)
        torch.manual_seed(seed)  # the adapter's start
        model = method.adapt(problem.base, task.r, task.alpha, task.targets)
        model.to(device)
        return cls(problem, model, method.optimizer(model, lr, seed))

    def step(self) -> float:
        """The loss before the step; infinite, and nothing more was done, where anything is not finite."""
        from oplora.errors import OPLoRARuntimeError

        loss = self.problem.loss(self.model)
        value = loss.item()
        if not math.isfinite(value):
            return math.inf
        loss.backward()  # type: ignore[no-untyped-call]
        if observe := getattr(self.problem, "observe", None):  # some watch the gradients
            observe(self.model)
        try:
            self.optimizer.step()
        except (OPLoRARuntimeError, torch.linalg.LinAlgError):
            return math.inf
        self.optimizer.zero_grad()
        return value


# ---- a trial ----


@dataclass(frozen=True)
class Trial:
    task: str
    method: str
    lr: float
    seed: int
    steps: int


def is_tuning(trial: Trial) -> bool:
    return trial.seed >= TUNING_SEEDS


def trial_of(row: Row) -> Trial:
    return Trial(**{field.name: row[field.name] for field in dataclasses.fields(Trial)})


class AtTheEnd:
    """What is measured of a training: validation data where it tunes, else test data, when it has ended."""

    seconds = 0.0  # of the training's that measuring took

    def __init__(self, trial: Trial, task: Task, training: Training) -> None:
        self.trial, self.task, self.training = trial, task, training

    def after(self, steps: int) -> None:
        """While it trains."""

    def columns(self, whole: bool) -> Row:
        """whole: it did not diverge."""
        split = "validation" if is_tuning(self.trial) else "test"
        measured = self.measure(split) if whole else {"loss": math.inf}
        return {f"{split}_{name}": value for name, value in measured.items()}

    def measure(self, split: str) -> dict[str, float]:
        return finite(self.training.problem.measure(self.training.model, split))


def run(
    trial: Trial, task: Task, method: Method, device: str, threads: int, measuring: type[AtTheEnd] = AtTheEnd
) -> Row:
    """Trains and measures; a loss that is not finite ends the training, whose losses are then infinite."""
    torch.set_num_threads(threads)
    training = Training.of(task, method, trial.lr, trial.seed, device)
    model, optimizer = training.model, training.optimizer
    scheduler = LambdaLR(optimizer, lambda step: task.schedule(step, trial.steps))
    measured = measuring(trial, task, training)
    losses: list[float] = []
    begin = time.perf_counter()
    with harness.PeakMemory() as peak:
        while len(losses) < trial.steps:
            losses.append(training.step())
            if math.isinf(losses[-1]):
                break
            scheduler.step()
            measured.after(len(losses))
    seconds = time.perf_counter() - begin - measured.seconds
    whole = math.isfinite(losses[-1])
    trained = trainable(model)
    held = harness.bytes_held((getattr(optimizer, "state_dict", dict)(), trained), ())
    return {
        "kind": "trial",
        **dataclasses.asdict(trial),
        "title": task.title,
        "train_loss": statistics.fmean(losses[-(len(losses) // 3 or 1) :]) if whole else math.inf,
        **measured.columns(whole),
        "curve": curve(losses),
        "diverged_at": None if whole else len(losses) - 1,
        "adapter_numbers": sum(p.numel() for p in trained),
        "held_bytes": held,
        "peak_bytes": peak.bytes if task.apart and device == "cpu" else None,  # beside the model with its adapter
        "seconds": seconds,
        "threads": threads,
    }


def step_ratios(
    task: Task, methods: Sequence[Method], baseline: Method, device: str, threads: int, rounds: int = 7
) -> dict[str, Row]:
    """By method, a training step's time over the baseline's in the same round: median, 20% and 80% quantiles."""
    torch.set_num_threads(threads)
    contenders = {}
    for method in (baseline, *methods):
        training = Training.of(task, method, task.lowest_rate, 1, device)
        training.step()  # makes the optimizer's state

        def turn(training: Training = training) -> None:
            training.step()  # ends with the device: the loss is read
            if device != "cpu":
                torch.cuda.synchronize(device)

        contenders[method.name] = harness.Contender(turn)
    seconds = harness.in_turns(contenders, rounds, limit_s=300)
    return {m.name: harness.ratio_columns(seconds[m.name], over=seconds[baseline.name]) for m in methods}


def finite(measured: dict[str, float]) -> dict[str, float]:
    """Infinity for a loss that is not a number: it must not be the least."""
    return {name: value if math.isfinite(value) else math.inf for name, value in measured.items()}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation; how many of the trainings diverged, if any."""
    if diverged := sum(not math.isfinite(value) for value in values):
        return f"{diverged} of {len(values)} diverged"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}" if values else ""


def curve(losses: Sequence[float]) -> list[list[float]]:
    """[last step, mean loss] of at most CURVE pieces of the training."""
    pieces = np.array_split(np.array(losses), min(CURVE, len(losses)))
    ends = np.cumsum([len(piece) for piece in pieces])
    return [[int(end), float(f"{piece.mean():.6g}")] for end, piece in zip(ends, pieces, strict=True)]


# ---- many trials ----


@dataclass
class Experiment:
    """What to train, task by task with which methods, and the file that holds what was measured."""

    name: str
    plan: Plan
    output: Path
    device: str = "cpu"
    workers: int = 1
    threads: int = 1
    until: float = math.inf  # time.monotonic() after which no trial begins
    equal_seconds: str | None = None  # the method with whose time all train once more

    train: ClassVar[Callable[..., Row]] = staticmethod(run)
    chosen_by: ClassVar[str] = "validation_loss"  # the column whose least is the best rate's

    def __post_init__(self) -> None:
        rows = harness.read_rows(self.output) if self.output.exists() else []
        self.rows = {trial_of(row): row for row in rows if row["kind"] == "trial"}
        self.ratios = {(row["task"], row["method"]): row for row in rows if row["kind"] == "step time"}
        self.common = {"experiment": self.name, **harness.environment()}
        if self.device != "cpu":
            self.common["device"] = torch.cuda.get_device_name(self.device)

    def run(self) -> bool:
        """Whether all of it is there; a part begins when the one before it is done."""
        parts = [self.missing_tuning, self.missing_tests]
        if self.equal_seconds is not None:
            parts.append(self.missing_of_equal_seconds)
        for wanted in parts:
            while trials := wanted():
                if not self.run_all(trials):
                    return False
        return True

    def pairs(self) -> Iterator[tuple[str, str]]:
        yield from ((task, method) for task, (_, methods) in self.plan.items() for method in methods)

    def tuning(self, task: str, method: str, index: int) -> list[Trial]:
        """The trials at one rate of the grid."""
        settings = self.plan[task][0]
        seeds = range(TUNING_SEEDS, TUNING_SEEDS + settings.tuning_seeds)
        return [Trial(task, method, settings.rate(index), seed, settings.steps) for seed in seeds]

    def tuned(self, task: str, method: str) -> dict[int, float]:
        """The validation loss by the rate's index, where all trials are there."""
        settings = self.plan[task][0]
        losses: dict[int, float] = {}
        for index in range(-GROWN * settings.growth, settings.rates + GROWN * settings.growth):
            trials = self.tuning(task, method, index)
            if all(trial in self.rows for trial in trials):
                losses[index] = statistics.fmean(self.rows[trial][self.chosen_by] for trial in trials)
        return losses

    def missing_tuning(self) -> list[Trial]:
        trials = []
        for task, method in self.pairs():
            settings, losses = self.plan[task][0], self.tuned(task, method)
            indices = set(range(settings.rates))
            if indices <= losses.keys():
                indices = self.grown(losses, settings)
            for index in sorted(indices - losses.keys()):
                trials += [trial for trial in self.tuning(task, method, index) if trial not in self.rows]
        return trials

    @staticmethod
    def grown(losses: dict[int, float], task: Task) -> set[int]:
        """The grid with the rates beyond an edge at which the best is."""
        lowest, highest, best = min(losses), max(losses), best_index(losses)
        most = GROWN * task.growth
        if best == lowest and lowest > -most:
            lowest -= GROWN
        if best == highest and highest < task.rates - 1 + most:
            highest += GROWN
        return set(range(lowest, highest + 1))

    def best_rate(self, task: str, method: str) -> float:
        return self.plan[task][0].rate(best_index(self.tuned(task, method)))

    def tests(self, task: str, method: str, steps: int | None = None) -> list[Trial]:
        """At the best rate, with the test's seeds; by default after as many steps as all."""
        settings, lr = self.plan[task][0], self.best_rate(task, method)
        steps = settings.steps if steps is None else steps
        return [Trial(task, method, lr, seed, steps) for seed in range(1, 1 + settings.seeds)]

    def tested(self, task: str, method: str, steps: int | None = None) -> list[Row]:
        """The rows of those tests that are there."""
        return [self.rows[trial] for trial in self.tests(task, method, steps) if trial in self.rows]

    def missing_tests(self) -> list[Trial]:
        return [trial for pair in self.pairs() for trial in self.tests(*pair) if trial not in self.rows]

    def missing_of_equal_seconds(self) -> list[Trial]:
        for task in self.plan:
            self.time_steps(task)
        wanted = (self.tests(*pair, self.steps_in_equal_time(*pair)) for pair in self.pairs())
        return [trial for trials in wanted for trial in trials if trial not in self.rows]

    def time_steps(self, task: str) -> None:
        """All methods that were not timed yet, in one process."""
        settings, methods = self.plan[task]
        baseline = self.equal_seconds
        assert baseline is not None
        untimed = [m for name, m in methods.items() if name != baseline and (task, name) not in self.ratios]
        if not untimed:
            return
        ratios = harness.in_own_process(step_ratios, settings, untimed, methods[baseline], self.device, self.threads)
        for method, ratio in ratios.items():
            names = {"kind": "step time", "task": task, "method": method, "over": baseline}
            self.ratios[task, method] = {**self.common, **names, **ratio}
        self.save()

    def steps_in_equal_time(self, task: str, method: str) -> int:
        settings = self.plan[task][0]
        if method == self.equal_seconds:
            return settings.steps
        row = self.ratios[task, method]
        if row["ratio_20"] <= 1 <= row["ratio_80"]:  # no difference to measure
            return settings.steps
        return max(1, round(settings.steps / row["ratio"]))

    def run_all(self, trials: Sequence[Trial]) -> bool:
        """Whether time was left for all."""
        apart = self.device == "cpu" and any(self.plan[trial.task][0].apart for trial in trials)
        context = get_context("forkserver" if self.device == "cpu" else "spawn")
        if self.device == "cpu":
            context.set_forkserver_preload(["peft"])
        whole = True
        if time.monotonic() <= self.until:
            for name in {trial.task for trial in trials}:
                self.plan[name][0].make(0)  # what is pretrained, is so before the trials want it side by side
        pool = ProcessPoolExecutor(self.workers, mp_context=context, max_tasks_per_child=1 if apart else None)
        with pool, tqdm(total=len(trials), desc=self.name, smoothing=0) as bar:
            waiting = iter(trials)
            running: set[Future[Row]] = set()

            def begin_next() -> bool:
                if time.monotonic() > self.until:
                    return False
                trial = next(waiting, None)
                if trial is not None:
                    task, methods = self.plan[trial.task]
                    running.add(pool.submit(self.train, trial, task, methods[trial.method], self.device, self.threads))
                return True

            for _ in range(2 * self.workers):
                whole = begin_next() and whole
            while running:
                future = next(as_completed(running))
                running.remove(future)
                row = {**self.common, **future.result()}
                self.rows[trial_of(row)] = row
                self.save()
                bar.update()
                bar.set_postfix_str(f"{row['task']}, {row['method']}, {row['lr']:g}: {row['train_loss']:.4g}")
                whole = begin_next() and whole
        return whole

    def save(self) -> None:
        order = {pair: i for i, pair in enumerate(self.pairs())}
        rows = sorted(
            self.rows.values(),
            key=lambda row: (
                order.get((row["task"], row["method"]), len(order)),
                *(row[key] for key in ("task", "method", "steps", "seed", "lr")),
            ),
        )
        harness.write_rows(self.output, [*rows, *self.ratios.values()], a_line_each=True)


def best_index(losses: dict[int, float]) -> int:
    return min(losses, key=lambda index: (losses[index], index))
