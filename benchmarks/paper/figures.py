"""Figures and tables of the experiments, from their files alone.

python benchmarks/paper/figures.py                                results/*.json -> results/*.png
python benchmarks/paper/figures.py --pages README.md docs/evidence_tables.md docs/rate.md docs/diffusion.md
    the tables, between the markers in those files that name an experiment and a table
python benchmarks/paper/figures.py --table language/reference     one of them, for the terminal

A task is drawn when all methods were tuned on it; tables have what was tested.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from harness import Row
from methods import FALLING, FLAT, LORA, LORA_FASTER, OP_LEAN, START_KEPT, Method
from plot import markdown, replace_between
from protocol import RESULTS, TUNING_SEEDS, Experiment, Task, Trial, spread
from run import EQUAL_SECONDS, EXPERIMENTS, TOY_OF
from untuned import AUTO, FLATNESS_RATES, TUNED, UNTUNED_LORA, UntunedExperiment
from untuned import plan as untuned_plan

BOLD = {LORA.name: "black", FLAT.name: "crimson", FALLING.name: "forestgreen"}  # and of the settings:
BOLD |= {"flat": BOLD[FLAT.name], "keep, hidden rate 1e-12 / lr^3": BOLD[FALLING.name]}
IN_RATE_TABLES = {"LoRA+", OP_LEAN.name, "paper, ratio 1", *BOLD} - {FALLING.name}
# LoRA on the grid and between its rates, and OP-LoRA's settings
IN_TUNED_TABLE = [method.name for method in (LORA, LORA_FASTER, OP_LEAN, START_KEPT, FALLING, FLAT)]
# diffusion.py's own files, of trainings that an example makes, and their titles
DIFFUSIONS = {
    "diffusion": "a small Stable Diffusion, emoji",
    "diffusion_repeated": "a small Stable Diffusion, pretrained anew, emoji",
}
# beside LoRA at every rate
RATE_FREE = {
    AUTO.name: {"color": "crimson", "lw": 1.8},
    "Prodigy": {"color": "0.6", "lw": 1.0, "ls": "--"},
    "Prodigy plus schedule-free": {"color": "0.6", "lw": 1.0, "ls": ":"},
}
COLOURS, GREY = 20, "0.75"
FLOAT32 = 1e-7  # what is less than its precision
NEAR = 1.1  # a rate is good if its validation loss is at most so many times the best that any method reached


# ---- what was measured ----


@dataclass
class Comparison:
    """The methods on one task of an experiment."""

    experiment: Experiment
    name: str

    @property
    def task(self) -> Task:
        return self.experiment.plan[self.name][0]

    @property
    def methods(self) -> list[str]:
        """Those that were tuned at every rate."""
        every = self.experiment.plan[self.name][1]
        return [m for m in every if self.experiment.tuned(self.name, m).keys() >= set(range(self.task.rates))]

    @property
    def is_whole(self) -> bool:
        return self.methods == list(self.experiment.plan[self.name][1])

    def curve(self, method: str, number: str = "validation_loss") -> tuple[list[float], list[float], list[float]]:
        """Rates, and over the tuning seeds mean and standard deviation of a column."""
        rates, means, deviations = [], [], []
        for index in sorted(self.experiment.tuned(self.name, method)):
            values = self.tuning(method, index, number)
            rates.append(self.task.rate(index))
            means.append(statistics.fmean(values))
            deviations.append(statistics.stdev(values) if len(values) > 1 and math.isfinite(means[-1]) else 0.0)
        return rates, means, deviations

    def tuning(self, method: str, index: int, number: str) -> list[float]:
        """Of a column, the tuning seeds' values at a rate of the grid."""
        return [self.experiment.rows[trial][number] for trial in self.experiment.tuning(self.name, method, index)]

    def tests(self, method: str, steps: int | None = None) -> list[Row]:
        return self.experiment.tested(self.name, method, steps)

    def good_decades(self, method: str, number: str = "validation_loss") -> float:
        """Decades of rates, of the grid that all share, that are good: within NEAR of the best of any method."""
        grid = {self.task.rate(index) for index in range(self.task.rates)}
        best = min(value for m in self.methods for value in self.curve(m, number)[1])
        rates, values, _ = self.curve(method, number)
        return sum(value <= NEAR * best for rate, value in zip(rates, values, strict=True) if rate in grid) / 3


@dataclass
class UntunedComparison(Comparison):
    """Of methods that have a rate beforehand, beside LoRA at its best one."""

    @property
    def methods(self) -> list[str]:
        """Those that were tested."""
        return [method for method in self.experiment.plan[self.name][1] if self.tests(method)]

    @property
    def has_lora(self) -> bool:
        return TUNED.name in self.methods

    def tests(self, method: str, steps: int | None = None) -> list[Row]:
        if method == TUNED.name and not self.experiment.tuned(self.name, method):
            return []
        return super().tests(method, steps)

    def flatness(self) -> list[Row | None]:
        """Of OP-LoRA, auto at FLATNESS_RATES, as far as they are measured."""
        assert isinstance(self.experiment, UntunedExperiment)
        return [self.experiment.rows.get(trial) for trial in self.experiment.flatness(self.name)]

    def lora_curve(self) -> tuple[list[float], list[float]]:
        """Rates, and LoRA's validation loss at the best checkpoint: of the grids with the seed that tunes, of its best
        rate and its two usual ones the mean over the seeds that test, as it is of other methods."""
        losses = {self.task.rate(i): loss for i, loss in self.experiment.tuned(self.name, TUNED.name).items()}
        tested = {method.name: method.lr for method in UNTUNED_LORA}
        tested[TUNED.name] = self.experiment.best_rate(self.name, TUNED.name)
        for method, rate in tested.items():
            if rows := self.tests(method):
                losses[rate] = statistics.fmean(column(rows, "best_validation_loss"))
        shown = sorted(rate for rate, loss in losses.items() if math.isfinite(loss))
        return shown, [losses[rate] for rate in shown]

    def excess(self, method: str, number: str) -> tuple[list[float], float]:
        """By seed the test loss less that of tuned LoRA at its best checkpoint; the deviation of that."""
        lora = {row["seed"]: row["best_test_loss"] for row in self.tests(TUNED.name)}
        over = [row[number] - lora[row["seed"]] for row in self.tests(method) if row["seed"] in lora]
        return over, statistics.stdev(lora.values()) if len(lora) > 1 else math.nan


def read(name: str, folder: Path = RESULTS) -> Experiment:
    output = folder / f"{name}.json"
    if name == "untuned":
        return UntunedExperiment(name, untuned_plan(), output)
    if name in DIFFUSIONS:
        return read_diffusion(name, output)
    return Experiment(name, EXPERIMENTS[name](), output, equal_seconds=EQUAL_SECONDS.get(name))


def read_diffusion(name: str, path: Path) -> Experiment:
    """The trainings of diffusion.py as an experiment of one task."""
    result = json.loads(path.read_text())
    rows = result["rows"]
    tuned = {row["lr"] for row in rows if row["seed"] == 0}
    seeds = len({row["seed"] for row in rows}) - 1
    methods = {
        method: Method(method, "examples/finetune_diffusion.py", lambda *_: None) for method in result["summary"]
    }
    grid = {"lowest_rate": min(tuned), "rates": len(tuned), "seeds": seeds}
    task = Task(DIFFUSIONS[name], lambda _: None, rows[0]["steps"], (), r=4, alpha=4, **grid)  # type: ignore[arg-type, return-value]
    experiment = Experiment(name, {"emoji": (task, methods)}, path.with_suffix(".none"))
    for row in rows:
        seed = row["seed"] or TUNING_SEEDS
        numbers = {"validation_loss": row["held_out_loss"], "threads": 1, "device": rows[0]["device"]}
        experiment.rows[Trial("emoji", row["method"], row["lr"], seed, row["steps"])] = {**row, **numbers}
    return experiment


def comparisons(experiment: Experiment) -> list[Comparison]:
    kind = UntunedComparison if isinstance(experiment, UntunedExperiment) else Comparison
    found = [kind(experiment, name) for name in experiment.plan]
    return [comparison for comparison in found if comparison.methods]


def column(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


# ---- tables ----


def test_table(comparison: Comparison) -> str:
    """Best rate, training and test loss, accuracy where there is one, and how many rates are good."""
    some = comparison.methods
    with_accuracy = any("test_accuracy" in row for method in some for row in comparison.tests(method))
    header = [comparison.task.title, "best rate", "training loss", "test loss"]
    header += (["accuracy"] if with_accuracy else []) + ["decades of good rates"]

    def cells(method: str) -> list[str]:
        rows = comparison.tests(method)
        cells = [method, f"{comparison.experiment.best_rate(comparison.name, method):.2g}"]
        cells += [spread(column(rows, "train_loss")), spread(column(rows, "test_loss"))]
        cells += [spread(column(rows, "test_accuracy"))] if with_accuracy else []
        return [*cells, f"{comparison.good_decades(method):.1f}"]

    return markdown(header, map(cells, some))


def tuned_table(some: Sequence[Comparison]) -> str:
    """Test losses at the best rate, of IN_TUNED_TABLE."""

    def cells(comparison: Comparison) -> list[str]:
        losses = (column(comparison.tests(method), "test_loss") for method in IN_TUNED_TABLE)
        return [comparison.task.title, *map(spread, losses)]

    return markdown(["test loss", *IN_TUNED_TABLE], map(cells, some))


def training_table(comparison: Comparison) -> str:
    """The paper's own measure: the training loss at the rate at which it is least."""
    header = [comparison.task.title, "rate", "training loss", "decades of good rates"]

    def cells(method: str) -> list[str]:
        _, means, _ = comparison.curve(method, "train_loss")
        least = sorted(comparison.experiment.tuned(comparison.name, method))[int(np.argmin(means))]
        losses = spread(comparison.tuning(method, least, "train_loss"))
        decades = comparison.good_decades(method, "train_loss")
        return [method, f"{comparison.task.rate(least):.2g}", losses, f"{decades:.1f}"]

    return markdown(header, map(cells, comparison.methods))


def rate_table(comparison: Comparison, some: Iterable[str] = IN_RATE_TABLES) -> str:
    """The validation loss at every rate of the grid that all share, of a few methods."""
    grid = range(comparison.task.rates)
    header = [comparison.task.title, *(f"{comparison.task.rate(index):g}" for index in grid)]

    def cells(method: str) -> list[str]:
        losses = comparison.experiment.tuned(comparison.name, method)
        return [method, *(shortened(losses[index]) for index in grid)]

    return markdown(header, [cells(method) for method in comparison.methods if method in some])


def shortened(loss: float) -> str:
    if not math.isfinite(loss):
        return "diverged"
    return f"{loss:#.3g}" if loss < 100 else "> 100"


def diffusion_table(comparison: Comparison, path: Path) -> str:
    """Test loss and MMD, and by how much the loss is below LoRA's with the same seed."""
    lora = column(comparison.tests(LORA.name), "test_loss")

    def cells(method: str) -> list[str]:
        losses, mmd = (column(comparison.tests(method), name) for name in ("test_loss", "mmd"))
        less = [theirs - ours for theirs, ours in zip(lora, losses, strict=True)] if losses else []
        rate = f"{comparison.experiment.best_rate(comparison.name, method):.2g}"
        return [method, rate, spread(losses, 5), "" if method == LORA.name else spread(less, 5), spread(mmd, 2)]

    result = json.loads(path.read_text())
    base = ["no adapter", "", f"{result['base']['test_loss']:.5f}", "", f"{result['base']['mmd']:.2f}"]
    real = ["training pictures in place of drawn ones", "", "", "", f"{result['real']['mmd']:.2f}"]
    header = [comparison.task.title, "best rate", "test loss", "less than LoRA's, by seed", "MMD"]
    return markdown(header, [*map(cells, comparison.methods), base, real])


def factorisation_table(experiment: Experiment) -> str:
    """Excess over the SVD's optimum, and what appendix B.2 looks at."""
    header = ["optimizer", "of", "rate", "loss over the optimum", "effective rank", "cosine", "gradient norm"]

    def cells(comparison: Comparison, method: str) -> list[str]:
        rows = comparison.tests(method)
        losses = [loss - 1 for loss in column(rows, "test_loss")]
        of = [comparison.task.title.split(", ")[1], method]
        rate = f"{experiment.best_rate(comparison.name, method):.2g}"
        rank = spread(column(rows, "test_effective_rank"), 2)
        more = [spread(column(rows, f"test_{name}")) for name in ("cosine", "gradient_norm")]
        return [*of, rate, scientific(losses), rank, *more]

    return markdown(header, [cells(c, m) for c in comparisons(experiment) for m in c.methods])


def scientific(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return spread(values)
    return f"{statistics.fmean(values):.1e} ± {statistics.stdev(values):.0e}"


def cost_table(comparison: Comparison) -> str:
    """Equal steps, equal seconds, and memory: the bytes that are kept, and what a training adds to the model at its
    peak, the median of all."""
    experiment = comparison.experiment
    every = [row for row in experiment.rows.values() if row["task"] == comparison.name]
    header = [comparison.task.title, "step over LoRA's", "test loss, equal steps", "test loss, equal seconds"]
    header += ["bytes an adapter's number", "MB at the peak"]

    def cells(method: str) -> list[str]:
        ratio = 1.0 if method == LORA.name else experiment.ratios[comparison.name, method]["ratio"]
        rows = [row for row in every if row["method"] == method]
        in_time = comparison.tests(method, experiment.steps_in_equal_time(comparison.name, method))
        in_time = in_time if len(in_time) == comparison.task.seeds else []
        held = statistics.median(row["held_bytes"] / row["adapter_numbers"] for row in rows)
        peaks = [row["peak_bytes"] / 1e6 for row in rows if row["peak_bytes"] is not None]
        return [
            method,
            f"{ratio:.2f}",
            spread(column(comparison.tests(method), "test_loss")),
            spread(column(in_time, "test_loss")),
            f"{held:.0f}",
            f"{statistics.median(peaks):.0f}" if peaks else "",
        ]

    timed = [m for m in comparison.methods if m == LORA.name or (comparison.name, m) in experiment.ratios]
    return markdown(header, map(cells, timed))


AT = {"test_loss": "at the end", "best_test_loss": "at the best checkpoint"}


def untuned_table(some: Sequence[UntunedComparison], number: str) -> str:
    """How far every method is above tuned LoRA, task by task."""
    every = dict.fromkeys(method for comparison in some for method in comparison.methods)

    def cells(method: str) -> list[str]:
        return [method, *(excess_of(comparison, method, number) for comparison in some)]

    titles = [comparison.name for comparison in some]
    return markdown([f"test loss above tuned LoRA's, {AT[number]}", *titles], map(cells, every))


SHORT = {  # of the methods in the README's table, which is narrow
    "AdamW 1e-4": "AdamW 1e-4",
    "LoRA+": "LoRA+",
    "Prodigy": "Prodigy",
    "Prodigy plus schedule-free": "Prodigy + SF",
    "schedule-free AdamW": "SF AdamW",
    "LoRA-RITE": "LoRA-RITE",
    AUTO.name: "OP-LoRA",
}


def short_table(some: Sequence[UntunedComparison]) -> str:
    """At the best checkpoint, a row a task, without deviations."""

    def cell(comparison: UntunedComparison, method: str) -> str:
        over, _ = comparison.excess(method, "best_test_loss")
        return f"{statistics.fmean(over):+.3f}" if over and all(map(math.isfinite, over)) else ""

    lines = ([comparison.name, *(cell(comparison, method) for method in SHORT)] for comparison in some)
    return markdown(["above tuned LoRA", *SHORT.values()], lines)


def excess_of(comparison: UntunedComparison, method: str, number: str) -> str:
    """The mean over the seeds, in brackets in standard deviations of LoRA's own seeds."""
    over, deviation = comparison.excess(method, number)
    if not all(map(math.isfinite, over)):
        return spread(over)
    mean = statistics.fmean(over) if over else math.nan
    return f"{mean:+.3f} ({mean / deviation:+.1f})" if math.isfinite(deviation) and over else ""


def untuned_task_table(comparison: UntunedComparison) -> str:
    """The losses themselves, accuracies, and the memory: an entry's value and gradient are counted in."""
    with_accuracy = any("test_accuracy" in row for method in comparison.methods for row in comparison.tests(method))
    header = [comparison.task.title, "rate", "seeds"]
    for name in AT.values():
        header += [f"test loss {name}", *([f"accuracy {name}"] if with_accuracy else [])]
    header += ["best checkpoint, of the steps", "bytes an entry"]

    def cells(method: str) -> list[str]:
        rows = comparison.tests(method)
        made = [method, f"{comparison.experiment.best_rate(comparison.name, method):.2g}", f"{len(rows)}"]
        for number in AT:
            made.append(spread(column(rows, number)))
            if with_accuracy:
                made.append(spread(column(rows, number.replace("loss", "accuracy"))))
        best = [row["best_step"] / row["steps"] for row in rows if row["best_step"]]
        held = statistics.median(row["held_bytes"] / row["adapter_numbers"] for row in rows) + 4  # and a gradient's
        return [*made, f"{statistics.fmean(best):.0%}" if best else "", f"{held:.0f}"]

    return markdown(header, map(cells, comparison.methods))


def flatness_table(some: Sequence[UntunedComparison]) -> str:
    """Of OP-LoRA, auto at other rates than its own."""

    def cells(comparison: UntunedComparison) -> list[str]:
        return [comparison.name, *(f"{row['best_test_loss']:.3f}" if row else "" for row in comparison.flatness())]

    measured = [comparison for comparison in some if any(comparison.flatness())]
    header = [f"{AUTO.name}, test loss at the rate", *(f"{lr:g}" for lr in FLATNESS_RATES)]
    return markdown(header, map(cells, measured))


def untuned_tables(experiment: UntunedExperiment) -> dict[str, str]:
    some = [comparison for comparison in comparisons(experiment) if isinstance(comparison, UntunedComparison)]
    beside_lora = [comparison for comparison in some if comparison.has_lora]
    made = {}
    if beside_lora:
        made["untuned/end"] = untuned_table(beside_lora, "test_loss")
        made["untuned/best"] = untuned_table(beside_lora, "best_test_loss")
        made["untuned/short"] = short_table(beside_lora)
    made |= {f"untuned/{comparison.name}": untuned_task_table(comparison) for comparison in some}
    if any(AUTO.name in comparison.methods for comparison in some):
        made["untuned/flatness"] = flatness_table(some)
    return made


def budget(experiment: Experiment) -> str:
    """What the table took."""
    rows = list(experiment.rows.values())
    hours = sum(row["seconds"] * row["threads"] for row in rows) / 3600
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return f"{len(rows)} trainings, {hours:.1f} core-hours ({devices})."


def tables(name: str, folder: Path = RESULTS) -> dict[str, str]:
    """By the name of their markers; the results' file says what there is."""
    if not (folder / f"{name}.json").exists():
        return {}
    experiment = read(name, folder)
    made = {f"{name}/budget": budget(experiment)}
    if isinstance(experiment, UntunedExperiment):
        return made | untuned_tables(experiment)
    found = comparisons(experiment)
    if name == "factorisation":
        return made | {f"{name}/terms": factorisation_table(experiment)}
    if name in DIFFUSIONS:
        (comparison,) = found
        made[f"{name}/emoji"] = diffusion_table(comparison, folder / f"{name}.json")
        return made | {f"{name}/emoji/rates": rate_table(comparison, comparison.methods)}
    if some := [c for c in found if set(IN_TUNED_TABLE) <= set(c.methods)]:
        made[f"{name}/tuned"] = tuned_table(some)
    for comparison in found:
        made[f"{name}/{comparison.name}"] = test_table(comparison)
        made[f"{name}/{comparison.name}/rates"] = rate_table(comparison)
        if TOY_OF.get(comparison.name) == "images":
            made[f"{name}/{comparison.name}/training"] = training_table(comparison)
        if any(task == comparison.name for task, _ in experiment.ratios):
            made[f"{name}/{comparison.name}/cost"] = cost_table(comparison)
    return made


# ---- figures ----


def style(experiment: Experiment, method: str) -> dict[str, Any]:
    """Of a line, the same in every panel; of more than COLOURS methods those that no table of rates has are grey."""
    if method in BOLD:
        return {"color": BOLD[method], "ls": "--" if method == LORA.name else "-", "lw": 1.8, "zorder": 3}
    every = dict.fromkeys(name for _, methods in experiment.plan.values() for name in methods)
    if len(every) > COLOURS and method not in IN_RATE_TABLES:
        return {"color": GREY, "ls": "-", "lw": 0.6, "zorder": 1}
    place = [name for name in every if name not in BOLD].index(method)
    return {"color": f"C{[0, 1, 2, 4, 5, 6, 7, 8, 9][place % 9]}", "ls": "-:"[place // 9 % 2], "lw": 1.0}


def draw_curves(axes: Any, comparison: Comparison, number: str) -> None:
    """Loss over the rate, its standard deviation where a rate has several seeds. Diverged trainings are left out, and
    the axis ends where a third of the rest lies above."""
    every = []
    for method in comparison.methods:
        rates, means, deviations = (np.array(values) for values in comparison.curve(method, number))
        shown = np.isfinite(means)
        error = deviations[shown] if deviations.any() else None
        line = style(comparison.experiment, method)
        label = "the others" if line["color"] == GREY else method
        axes.errorbar(rates[shown], means[shown], error, marker=".", elinewidth=0.4, label=label, **line)
        every += means[shown].tolist()
    least, high = min(every), np.quantile(every, 0.67)
    high = min(max(high, 1.05 * least), 2 * least)
    axes.set(xscale="log", xlabel="learning rate", ylim=(least - 0.1 * (high - least), high))
    axes.set_title(comparison.task.title, fontsize="medium", wrap=True)


def draw_excess(axes: Any, comparison: Comparison) -> None:
    for method in comparison.methods:
        rates, means, _ = (np.array(values) for values in comparison.curve(method))
        shown = np.isfinite(means) & (means < 10)
        excess = np.maximum(means[shown] - 1, FLOAT32)
        axes.plot(rates[shown], excess, marker=".", label=method, **style(comparison.experiment, method))
    axes.set(xscale="log", yscale="log", xlabel="learning rate", title=comparison.task.title)
    axes.legend(frameon=False, fontsize="small")


def draw_dots(axes: Any, comparison: Comparison) -> None:
    """Test loss of every method at its best rate, a dot a seed; the line is plain LoRA. What is more than twice the
    least is an arrow at that edge."""
    every = {method: column(comparison.tests(method), "test_loss") for method in comparison.methods}
    tests = {method: losses for method, losses in every.items() if losses}
    axes.set_visible(bool(tests))
    edge = 2 * min(map(min, tests.values()), default=1)
    for place, (method, losses) in enumerate(tests.items()):
        color = style(comparison.experiment, method)["color"]
        seen = [loss for loss in losses if loss <= edge]
        axes.plot(seen, [place] * len(seen), ".", color=color, alpha=0.6)
        if len(seen) < len(losses):
            axes.plot([edge], [place], ">", color=color)
        else:
            axes.plot([statistics.fmean(losses)], [place], "k|", ms=10)
    if LORA.name in tests:
        axes.axvline(statistics.fmean(tests[LORA.name]), color="k", lw=0.6, ls="--")
    axes.set_yticks(range(len(tests)), list(tests), fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="test loss")


def draw_legend(figure: Any, axes: Any) -> None:
    """Of all panels, beneath them."""
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    ncols = min(4, 2 * len(axes))
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=ncols, frameon=False, fontsize="small")


def new_figure(columns: int, rows: int = 1, height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_factorisation(experiment: Experiment) -> Any:
    found = comparisons(experiment)
    figure, axes = new_figure(len(found))
    for axis, comparison in zip(axes[0], found, strict=True):
        draw_excess(axis, comparison)
    axes[0, 0].set_ylabel("loss over the SVD's optimum, less 1")
    return figure


def draw_images(experiment: Experiment) -> Any:
    """The paper's measure, held-out loss, and the tests."""
    return draw_rows(experiment, ["train_loss", "validation_loss"])


def draw_methods(experiment: Experiment) -> Any:
    return draw_rows(experiment, ["validation_loss"])


def draw_rows(experiment: Experiment, numbers: Sequence[str]) -> Any:
    """A row of panels for each number over the rate, below them the tests; a column for each task."""
    found = comparisons(experiment)
    tallest = max(len(comparison.methods) for comparison in found)
    figure, axes = new_figure(len(found), len(numbers) + 1, max(3.6, 0.2 * tallest + 1))
    for column_of_axes, comparison in zip(axes.T, found, strict=True):
        for axis, number in zip(column_of_axes, numbers, strict=False):
            draw_curves(axis, comparison, number)
        draw_dots(column_of_axes[-1], comparison)
    names = [[label.get_text() for label in axis.get_yticklabels()] for axis in axes[-1]]
    for axis, here, left in zip(axes[-1][1:], names[1:], names, strict=False):
        axis.tick_params(labelleft=here != left)
    for axis, number in zip(axes[:, 0], numbers, strict=False):
        axis.set_ylabel({"train_loss": "training loss", "validation_loss": "validation loss"}[number])
    draw_legend(figure, axes[0])
    return figure


def draw_untuned(experiment: Experiment) -> Any:
    """Test loss at the best checkpoint, a dot a seed, a ring where it was at the end; the line is tuned LoRA. What is
    more than half as much again as the least is an arrow at that edge."""
    found = comparisons(experiment)
    columns = min(4, len(found))
    figure, axes = new_figure(columns, math.ceil(len(found) / columns), height=3.6)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    names = list(dict.fromkeys(method for comparison in found for method in comparison.methods))
    for axis, comparison in zip(axes.flat, found, strict=False):
        edge = 1.5 * min(loss for method in names for loss in column(comparison.tests(method), "best_test_loss"))
        for place, method in enumerate(names):
            rows = comparison.tests(method)
            for number, marker, face in (("test_loss", "o", "none"), ("best_test_loss", ".", "crimson")):
                losses = column(rows, number)
                seen = [loss for loss in losses if loss <= edge]
                axis.plot(seen, [place] * len(seen), marker, mec="crimson", mfc=face, alpha=0.6)
                if len(seen) < len(losses):
                    axis.plot([edge], [place], ">", mec="crimson", mfc=face)
        if lora := column(comparison.tests(TUNED.name), "best_test_loss"):
            axis.axvline(statistics.fmean(lora), color="k", lw=0.6, ls="--")
        axis.set_yticks(range(len(names)), names, fontsize="small")
        axis.tick_params(labelleft=axis in axes[:, 0])
        axis.invert_yaxis()
        axis.set(xlabel="test loss")
        axis.set_title(comparison.task.title, fontsize="medium", wrap=True)
    return figure


def draw_untuned_rates(experiment: Experiment) -> Any:
    """Validation loss of LoRA over its rate, at the best checkpoint of each training; the lines are of methods that
    have none to choose, means over their seeds. What is more than twice the least lies outside."""
    found = [c for c in comparisons(experiment) if isinstance(c, UntunedComparison) and c.has_lora]
    columns = max(1, min(4, len(found)))
    figure, axes = new_figure(columns, max(1, math.ceil(len(found) / columns)), height=2.9)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, comparison in zip(axes.flat, found, strict=False):
        rates, losses = comparison.lora_curve()
        axis.plot(rates, losses, "k.-", label="LoRA at this rate")
        least = min(losses)
        for method, line in RATE_FREE.items():
            if rows := comparison.tests(method):
                loss = statistics.fmean(column(rows, "best_validation_loss"))
                axis.axhline(loss, label=f"{method}, nothing chosen", **line)
                least = min(least, loss)
        high = min(2 * least, 1.02 * max(losses))
        axis.set(xscale="log", xlabel="learning rate", ylim=(least - 0.1 * (high - least), high))
        axis.set_title(comparison.task.title, fontsize="medium", wrap=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss")
    draw_legend(figure, axes[0])
    return figure


# of every experiment, by what the figure's name has behind the experiment's
FIGURES: dict[str, dict[str, Callable[[Experiment], Any]]] = {
    "factorisation": {"": draw_factorisation},
    "images": {"": draw_images},
    **{name: {"": draw_methods} for name in ("language", "ablations", "settings", *DIFFUSIONS)},
    "untuned": {"": draw_untuned, "_rates": draw_untuned_rates},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pages", nargs="+", type=Path)
    parser.add_argument("--table")
    args = parser.parse_args(arguments)
    if args.pages or args.table:
        made = {key: text for name in FIGURES for key, text in tables(name, args.results).items()}
        if args.table:
            print(made[args.table] if args.table in made else f"there are: {', '.join(made)}")
            return
        for page in args.pages:
            text = page.read_text(encoding="utf-8")
            for name, table in made.items():
                if f"<!-- {name}:begin -->" in text:
                    text = replace_between(text, name, table)
            page.write_text(text, encoding="utf-8")
        return
    for name, drawn in FIGURES.items():
        if (args.results / f"{name}.json").exists() and comparisons(experiment := read(name, args.results)):
            for suffix, draw in drawn.items():
                draw(experiment).savefig(args.results / f"{name}{suffix}.png", dpi=130)
                print(args.results / f"{name}{suffix}.png")


if __name__ == "__main__":
    main()
