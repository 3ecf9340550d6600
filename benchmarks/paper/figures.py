"""Figures and tables of the experiments, from their files alone.

python benchmarks/paper/figures.py                                results/*.json -> results/*.png
python benchmarks/paper/figures.py --evidence docs/evidence.md    the tables, between the markers in that file that name
                                                                  an experiment and a table
python benchmarks/paper/figures.py --table language/comparison    one of them, for the terminal

A task is drawn when all methods were tuned on it; tables have what was tested.
"""

import argparse
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
from plot import markdown, replace_between
from protocol import RESULTS, Experiment, Task
from run import EQUAL_SECONDS, EXPERIMENTS

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
            trials = self.experiment.tuning(self.name, method, index)
            values = [self.experiment.rows[trial][number] for trial in trials]
            rates.append(self.task.rate(index))
            means.append(statistics.fmean(values))
            deviations.append(statistics.stdev(values) if len(values) > 1 and math.isfinite(means[-1]) else 0.0)
        return rates, means, deviations

    def tests(self, method: str, steps: int | None = None) -> list[Row]:
        return self.experiment.tested(self.name, method, steps)

    def good_decades(self, method: str, number: str = "validation_loss") -> float:
        """Decades of rates, of the grid that all share, that are good: within NEAR of the best of any method."""
        grid = {self.task.rate(index) for index in range(self.task.rates)}
        best = min(value for m in self.methods for value in self.curve(m, number)[1])
        rates, values, _ = self.curve(method, number)
        return sum(value <= NEAR * best for rate, value in zip(rates, values, strict=True) if rate in grid) / 3


def read(name: str, folder: Path = RESULTS) -> Experiment:
    output = folder / f"{name}.json"
    return Experiment(name, EXPERIMENTS[name](), output, equal_seconds=EQUAL_SECONDS.get(name))


def comparisons(experiment: Experiment) -> list[Comparison]:
    found = [Comparison(experiment, name) for name in experiment.plan]
    return [comparison for comparison in found if comparison.methods]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    if not values or not all(map(math.isfinite, values)):
        return "diverged" if values else ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


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


def training_table(comparison: Comparison) -> str:
    """The paper's own measure: the training loss at the rate at which it is least."""
    header = [comparison.task.title, "rate", "training loss", "decades of good rates"]

    def cells(method: str) -> list[str]:
        rates, means, deviations = comparison.curve(method, "train_loss")
        least = int(np.argmin(means))
        decades = comparison.good_decades(method, "train_loss")
        return [method, f"{rates[least]:.2g}", f"{means[least]:.3f} ± {deviations[least]:.3f}", f"{decades:.1f}"]

    return markdown(header, map(cells, comparison.methods))


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
    if not values or not all(map(math.isfinite, values)):
        return "diverged"
    return f"{statistics.fmean(values):.1e} ± {statistics.stdev(values):.0e}"


def cost_table(comparison: Comparison) -> str:
    """Equal steps, equal seconds, and memory."""
    experiment = comparison.experiment
    header = [comparison.task.title, "step over LoRA's", "test loss, equal steps", "test loss, equal seconds"]
    header += ["MB at the peak", "bytes an adapter's number"]

    def cells(method: str) -> list[str]:
        ratio = 1.0 if method == "LoRA" else experiment.ratios[comparison.name, method]["ratio"]
        rows = comparison.tests(method)
        in_time = comparison.tests(method, experiment.steps_in_equal_time(comparison.name, method))
        held = statistics.fmean(row["held_bytes"] / row["adapter_numbers"] for row in rows)
        return [
            method,
            f"{ratio:.2f}",
            spread(column(rows, "test_loss")),
            spread(column(in_time, "test_loss")),
            f"{statistics.median(row['peak_bytes'] for row in rows) / 1e6:.0f}",
            f"{held:.0f}",
        ]

    timed = [m for m in comparison.methods if m == "LoRA" or (comparison.name, m) in experiment.ratios]
    return markdown(header, map(cells, timed))


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
    if name == "factorisation":
        return made | {f"{name}/terms": factorisation_table(experiment)}
    for comparison in comparisons(experiment):
        made[f"{name}/{comparison.name}"] = test_table(comparison)
        if name == "images":
            made[f"{name}/{comparison.name}/training"] = training_table(comparison)
        if any(task == comparison.name for task, _ in experiment.ratios):
            made[f"{name}/{comparison.name}/cost"] = cost_table(comparison)
    return made


# ---- figures ----


def draw_curves(axes: Any, comparison: Comparison, number: str, methods: Iterable[str]) -> None:
    """Loss over the rate. What diverged is left out; the axis ends at 1.6 times the least loss."""
    least = math.inf
    for i, method in enumerate(methods):
        rates, means, deviations = (np.array(values) for values in comparison.curve(method, number))
        shown = np.isfinite(means)
        style = "k--" if method == "LoRA" else f"C{i % 10}-" if i < 10 else f"C{i % 10}:"
        axes.errorbar(rates[shown], means[shown], deviations[shown], fmt=style, marker=".", lw=1.2, label=method)
        least = min(least, means[shown].min(initial=math.inf))
    axes.set(xscale="log", xlabel="learning rate")
    axes.set_title(comparison.task.title, fontsize="medium", wrap=True)
    axes.set_ylim(least - 0.05 * abs(least), min(axes.get_ylim()[1], 1.6 * least))


def draw_excess(axes: Any, comparison: Comparison) -> None:
    for i, method in enumerate(comparison.methods):
        rates, means, _ = (np.array(values) for values in comparison.curve(method))
        shown = np.isfinite(means) & (means < 10)
        axes.plot(rates[shown], means[shown] - 1, f"C{i}.-", label=method)
    axes.set(xscale="log", yscale="log", xlabel="learning rate", title=comparison.task.title)
    axes.legend(frameon=False, fontsize="small")


def draw_dots(axes: Any, comparison: Comparison) -> None:
    """Test loss of every method at its best rate, a dot a seed; the line is plain LoRA."""
    some = [method for method in comparison.methods if comparison.tests(method)]
    for place, method in enumerate(some):
        losses = column(comparison.tests(method), "test_loss")
        axes.plot(losses, [place] * len(losses), "C0.", alpha=0.5)
        axes.plot([statistics.fmean(losses)], [place], "k|", ms=10)
    if "LoRA" in some:
        axes.axvline(statistics.fmean(column(comparison.tests("LoRA"), "test_loss")), color="k", lw=0.6, ls="--")
    axes.set_yticks(range(len(some)), some, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="test loss")


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
    found = comparisons(experiment)
    figure, axes = new_figure(len(found), 2)
    for column_of_axes, comparison in zip(axes.T, found, strict=True):
        draw_curves(column_of_axes[0], comparison, "train_loss", comparison.methods)
        draw_curves(column_of_axes[1], comparison, "validation_loss", comparison.methods)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("validation loss")
    axes[0, 0].legend(frameon=False, fontsize="x-small", ncols=2)
    return figure


def draw_methods(experiment: Experiment) -> Any:
    """Rates above, test losses below."""
    found = comparisons(experiment)
    tallest = max(len(comparison.methods) for comparison in found)
    figure, axes = new_figure(len(found), 2, max(4.0, 0.22 * tallest + 1))
    for column_of_axes, comparison in zip(axes.T, found, strict=True):
        draw_curves(column_of_axes[0], comparison, "validation_loss", comparison.methods)
        draw_dots(column_of_axes[1], comparison)
    axes[0, 0].set_ylabel("validation loss")
    axes[0, 0].legend(frameon=False, fontsize="xx-small", ncols=2)
    return figure


FIGURES: dict[str, Callable[[Experiment], Any]] = {
    "factorisation": draw_factorisation,
    "images": draw_images,
    "language": draw_methods,
    "ablations": draw_methods,
    "settings": draw_methods,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--evidence", type=Path)
    parser.add_argument("--table")
    args = parser.parse_args(arguments)
    if args.evidence or args.table:
        made = {key: text for name in EXPERIMENTS for key, text in tables(name, args.results).items()}
        if args.table:
            print(made[args.table] if args.table in made else f"there are: {', '.join(made)}")
            return
        text = args.evidence.read_text(encoding="utf-8")
        for name, table in made.items():
            if f"<!-- {name}:begin -->" in text:
                text = replace_between(text, name, table)
        args.evidence.write_text(text, encoding="utf-8")
        return
    for name, draw in FIGURES.items():
        if (args.results / f"{name}.json").exists() and comparisons(experiment := read(name, args.results)):
            draw(experiment).savefig(args.results / f"{name}.png", dpi=130)
            print(args.results / f"{name}.png")


if __name__ == "__main__":
    main()
