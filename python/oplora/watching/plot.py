"""The picture of a run, from what oplora.Monitor wrote: ``python -m oplora plot RUN``."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OPLoRAError, OPLoRAFileError, OPLoRAValueError
from ..files import atomic

__all__ = ["FILE", "FORMAT", "Run", "plot_run"]

FILE = "monitor.jsonl"
FORMAT = 1
RATE = {"lr": "rate of the factors"}
TERMS = {"trainable_lr": "trainable learning rate, ‖h‖²", "line_search": "line search, ‖Jᵀg‖² / ‖g‖²"}
LABELLED_LAYERS = 40
GREATEST_STEP = 1 << 53  # beyond it float64, by which is drawn, has not every number
DECADES = 6  # below the greatest value; what is smaller does not matter


# ---- reading ----


@dataclass
class Line:
    """Of one step in one file: of which layers, of how many processes together, and a number a layer by name."""

    layers: list[str]
    processes: float
    columns: dict[str, np.ndarray]


@dataclass
class Part:
    """One file: of the only process, or of one that holds a share of the layers."""

    layers: list[str] = field(default_factory=list)
    processes: float = math.inf  # as many as there are files of, where no header says it
    lines: dict[int, Line] = field(default_factory=dict)  # by step
    losses: dict[str, dict[int, float]] = field(default_factory=lambda: {"loss": {}, "eval_loss": {}})

    @classmethod
    def read(cls, file: Path) -> "Part":
        part = cls()
        try:
            text = file.read_text(encoding="utf-8", errors="replace")  # its line is refused below, by number
        except OSError as error:
            raise OPLoRAFileError(f"oplora plot: cannot read {file}: {error.strerror}.") from error
        begun = False  # a header came: the step after it is where the run continued
        for number, line in enumerate(text.split("\n")[:-1], 1):  # behind the last end of a line is what was torn
            try:
                record = json.loads(line)
                if "layers" in record:
                    if record["format"] != FORMAT:
                        raise OPLoRAFileError(
                            f"oplora plot: line {number} of {file} begins format {record['format']!r}, and this oplora "
                            f"reads {FORMAT}. Draw it with the oplora that wrote it."
                        )
                    part.begin(record)
                    begun = True
                    continue
                if begun:
                    part.forget_from(record["step"])
                    begun = False
                part.take(record)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                raise OPLoRAFileError(
                    f"oplora plot: line {number} of {file} was not written by oplora.Monitor. Was the file edited?"
                ) from error
        return part

    def begin(self, header: dict[str, Any]) -> None:
        layers, processes = header["layers"], header.get("processes", math.inf)
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise TypeError("layers are a list of names")
        self.layers, self.processes = layers, float(processes)

    def take(self, record: dict[str, Any]) -> None:
        step = int(record["step"])
        if abs(step) > GREATEST_STEP:
            raise ValueError("a number of steps")
        for name, losses in self.losses.items():
            if name in record:
                losses[step] = math.nan if record[name] is None else float(record[name])
        if "stats" in record:
            columns = {name: np.array(column, dtype=np.float64) for name, column in record["stats"].items()}
            if any(column.shape != (len(self.layers),) for column in columns.values()):
                raise ValueError("a number for every layer")
            if TERMS.keys() - columns.keys() and RATE.keys() - columns.keys():  # files of older versions have no rate
                raise ValueError("a rate, or both terms")
            self.lines[step] = Line(self.layers, self.processes, columns)

    def forget_from(self, step: int) -> None:
        self.lines = {known: line for known, line in self.lines.items() if known < step}
        for name, losses in self.losses.items():
            self.losses[name] = {known: loss for known, loss in losses.items() if known < step}


@dataclass
class Run:
    """steps (n,), names of the layers (m), each number of oplora.stats as a table (n, m) with NaN where there is none;
    "loss" and "eval_loss" by step."""

    steps: list[int]
    layers: list[str]
    tables: dict[str, np.ndarray]
    losses: dict[str, dict[int, float]]

    @property
    def settled(self) -> int | None:
        """The first recorded step after which the search for the rate had turned."""
        if "settled" not in self.tables:
            return None
        return next(
            (step for step, row in zip(self.steps, self.tables["settled"], strict=True) if (row > 0).any()), None
        )

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Of a folder, or of one file.

        Raises:
            OPLoRAError: nothing there, no step recorded, a line that is not the Monitor's.
        """
        named = path.is_file() or (path.suffix == ".jsonl" and not path.is_dir())
        file = path if named else path / FILE
        if not file.exists():
            raise OPLoRAFileError(
                f"oplora plot: there is no {file}. Train with oplora.Monitor({str(file.parent)!r}, optimizer), or name "
                "the folder of a run that it watched."
            )
        first = Part.read(file)
        if not first.lines:
            raise OPLoRAValueError(f"oplora plot: {file} holds no step yet.")
        others = {} if named else {rank: Part.read(other) for rank, other in _other_files(path).items()}
        steps = sorted(first.lines)
        # a run that continued with fewer processes, or anew with one, leaves files that say nothing of its steps
        lines = [
            [first.lines[step]]
            + [p.lines[step] for rank, p in others.items() if rank < first.lines[step].processes and step in p.lines]
            for step in steps
        ]
        layers = list(dict.fromkeys(layer for some in lines for line in some for layer in line.layers))
        return cls(steps, layers, _tables(lines, layers), first.losses)


def _other_files(folder: Path) -> dict[int, Path]:
    """Of the processes after the first, by rank."""
    matches = ((re.fullmatch(r"monitor-(\d+)\.jsonl", file.name), file) for file in folder.iterdir())
    return dict(sorted((int(match[1]), file) for match, file in matches if match))


def _tables(lines: Sequence[Sequence[Line]], layers: Sequence[str]) -> dict[str, np.ndarray]:
    """lines: those of each step, which may be of other layers than those of the step before."""
    place = {layer: i for i, layer in enumerate(layers)}
    names = dict.fromkeys(name for some in lines for line in some for name in line.columns)
    tables = {name: np.full((len(lines), len(layers)), math.nan) for name in names}
    for i, some in enumerate(lines):
        for line in some:
            places = [place[layer] for layer in line.layers]
            for name, column in line.columns.items():
                tables[name][i, places] = column
    return tables


# ---- drawing ----


def plot_run(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Draws the run in folder `path` into `out` (any format that matplotlib writes), by default monitor.png beside it;
    returns where.

    Raises:
        OPLoRAError: no run there, no matplotlib, a picture that cannot be written.
    """
    source = Path(os.path.expanduser(path))
    run = Run.read(source)
    target = (
        (source.parent if source.is_file() else source) / "monitor.png"
        if out is None
        else Path(os.path.expanduser(out))
    )
    try:
        import matplotlib.figure  # noqa: F401 # not pyplot, which has a backend and windows: those are the caller's
    except ImportError as error:
        raise OPLoRAError("oplora plot: matplotlib is not installed. Run: pip install matplotlib") from error
    figure = _draw(run)
    try:
        with atomic.file(target) as new:
            figure.savefig(new, dpi=120, format=target.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise OPLoRAFileError(f"oplora plot: cannot write {target}: {error}") from error
    return target


def _draw(run: Run) -> Any:
    from matplotlib.figure import Figure

    dropped = [name for name in run.tables if name.startswith("dropped_") and not np.isnan(run.tables[name]).all()]
    tall = min(8.0, 1.2 + 0.14 * min(len(run.layers), LABELLED_LAYERS))
    terms = {name: label for name, label in TERMS.items() if name in run.tables}
    has_rate = not RATE.keys() - run.tables.keys()
    heights = [2.2, *([2.2] if has_rate else []), *([2.2] if terms else [])]
    heights += [*([1.8] if dropped else []), *([tall] * len(terms))]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels[-1].set_xlabel("step")
    axes = iter(panels)
    _draw_losses(next(axes), run)
    if has_rate:
        _draw_rate(next(axes), run)
    if terms:
        _draw_bands(next(axes), run, terms)
    if dropped:
        _draw_bands(next(axes), run, {name: name.replace("_", " ") for name in dropped}, ylabel="share dropped")
    for name in terms:
        _draw_map(figure, next(axes), run, name)
    return figure


def _draw_rate(axes: Any, run: Run) -> None:
    _draw_bands(axes, run, RATE, ylabel="rate over the layers")
    if (step := run.settled) is not None:
        axes.axvline(step, color="0.4", ls="--", lw=1, label=f"signal turned by step {step}")
        axes.legend(frameon=False, fontsize="small")


def _draw_losses(axes: Any, run: Run) -> None:
    for name, style in (("loss", "-"), ("eval_loss", "o-")):
        if losses := run.losses[name]:
            axes.plot(list(losses), list(losses.values()), style, ms=3, label=name.replace("_", " "))
    axes.set_ylabel("loss")
    if any(run.losses.values()):
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no loss was given to the monitor", ha="center", transform=axes.transAxes)


def _draw_bands(axes: Any, run: Run, names: dict[str, str], ylabel: str = "over the layers") -> None:
    """The middle of all layers as a line, 10% to 90% of them as a band."""
    greatest = 0.0
    for i, (name, label) in enumerate(names.items()):
        low, middle, high = _quantiles(run.tables[name])
        axes.plot(run.steps, middle, marker="." if len(run.steps) < 3 else None, color=f"C{i}", label=label)
        axes.fill_between(run.steps, low, high, color=f"C{i}", alpha=0.2, lw=0)
        greatest = np.nanmax(np.append(high, greatest))
    if greatest > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], greatest / 10**DECADES))
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize="small")


def _quantiles(table: np.ndarray) -> np.ndarray:
    """(3, steps); NaN where no layer has a value."""
    known = [row[~np.isnan(row)] for row in table]
    return np.array([np.quantile(row, [0.1, 0.5, 0.9]) if len(row) else [math.nan] * 3 for row in known]).T


def _draw_map(figure: Any, axes: Any, run: Run, name: str) -> None:
    from matplotlib.colors import LogNorm

    table = run.tables[name].T
    positive = table[table > 0]
    scale = None
    if len(positive):
        lowest = max(positive.min(), positive.max() / 10**DECADES)
        scale = LogNorm(lowest, max(positive.max(), 1.001 * lowest), clip=True)
    mesh = axes.pcolormesh(_edges(run.steps), np.arange(len(table) + 1), np.where(table > 0, table, np.nan), norm=scale)
    figure.colorbar(mesh, ax=axes, pad=0.01)
    axes.set_title(TERMS[name], loc="left", fontsize="medium")
    shown = range(0, len(run.layers), math.ceil(len(run.layers) / LABELLED_LAYERS))
    labels = shortened(run.layers)
    axes.set_yticks([i + 0.5 for i in shown], [labels[i] for i in shown], fontsize=6, parse_math=False)
    axes.invert_yaxis()


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Of columns around their steps."""
    middles = (np.array(steps[1:]) + np.array(steps[:-1])) / 2
    first, last = (middles[0] - steps[0], steps[-1] - middles[-1]) if len(steps) > 1 else (0.5, 0.5)
    return np.concatenate([[steps[0] - first], middles, [steps[-1] + last]])


def shortened(names: Sequence[str]) -> list[str]:
    """Without the dotted parts that all have in common, in front and behind; something of each stays."""
    split = [name.split(".") for name in names]
    front, behind = _in_common(split), _in_common([parts[::-1] for parts in split])
    return [".".join(parts[front : max(len(parts) - behind, front + 1)] or parts[-1:]) for parts in split]


def _in_common(split: Sequence[Sequence[str]]) -> int:
    """How many first parts all have."""
    count = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count
