"""What the scripts of this folder share and what is not about training: flags, files, settings, and the picture."""

import argparse
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
from torch import nn

import oplora

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"lora": "LoRA", "oplora": "OP-LoRA"}
Points = list[tuple[int, float]]  # steps, and a number at each


# ---- the training ----


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def found_lr(optimizer: Any) -> float | None:
    """The rate that OP-LoRA has found by now, of which a schedule makes less; None where it was given."""
    found = next((state["found"] for state in optimizer.state.values() if "found" in state), None)
    return None if found is None else float(found[0])


# ---- flags and settings ----


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag that has one, and the docstring as it stands."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Whose --help begins with the script's docstring."""
    summary, *rest = doc.split("\n\n", 1)
    return argparse.ArgumentParser(description=summary, epilog="\n\n".join(rest), formatter_class=HelpFormatter)


def number(kind: Callable[[str], Any], low: float, high: float = math.inf, open_low: bool = False) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if open_low else 'at least'} {low}"
                + (f" and at most {high}" if high < math.inf else "")
            )
        return value

    return parse


def add_preset(add: Callable[..., Any], rate: str) -> None:
    """The flag --preset, beside `rate`, the flag that the paper's presets need."""
    add(
        "--preset",
        choices=("auto", "paper", "flat"),
        default="auto",
        help=f"auto finds the learning rate; paper and flat have a generator in every layer and take {rate}",
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def differences(saved: dict[str, Any], mine: dict[str, Any], free: Iterable[str]) -> list[str]:
    """Of the settings of a checkpoint and of the run that would continue from it, but for those that are free."""
    names = {"architecture": "the architecture", "pictures": "the digest of pictures and captions"}
    other = [name for name in mine if name not in free and mine[name] != saved.get(name)]
    return [f"{names.get(n, '--' + n.replace('_', '-'))} was {saved.get(n)}, is {mine[n]}" for n in other]


def versions(*packages: ModuleType) -> dict[str, str]:
    return {"python": platform.python_version()} | {p.__name__: p.__version__ for p in (oplora, *packages)}


# ---- files that are whole or not there ----


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write into, which takes the name `path` when all is in it."""
    beside = path.with_name(f"unfinished-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `folder` when all is in it: nobody finds half of it."""
    beside = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    beside.rename(folder)


def sync(path: Path) -> None:
    """A file, or all in a folder, onto the disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def write_json(path: Path, record: dict[str, Any]) -> None:
    with replaced(path) as new:
        new.write_text(json.dumps(record, indent=1) + "\n")


# ---- the picture ----


@dataclass
class Curves:
    """Of one run. rates: of every step, found or given."""

    train: Points
    held_out: Points = field(default_factory=list)
    rates: Points = field(default_factory=list)

    @classmethod
    def of(cls, history: dict[str, Any]) -> "Curves":
        """Of a history with a number a step; a rate that was found is scaled by the schedule's fall, as its warm-up is
        the search's own matter."""
        rates = np.array(history["learning_rate"])
        if "found_lr" in history:
            rates = np.array(history["found_lr"]) * rates / np.maximum.accumulate(rates)
        numbered = [list(enumerate(numbers, 1)) for numbers in (history["train_loss"], rates.tolist())]
        return cls(numbered[0], history["held_out_loss"], numbered[1])


def draw(path: Path, runs: dict[str, Curves], ylabel: str = "loss") -> None:
    """Losses, faintly as they are and smoothed, with those held out as points; beside them the rates."""
    figure, (losses, rates) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    others = sum(not label.startswith("OP-LoRA") for label in runs)
    blues = iter(plt.colormaps["Blues"](np.linspace(0.45, 0.95, others)))
    for label, run in runs.items():
        color = "tab:orange" if label.startswith("OP-LoRA") else next(blues)
        steps, values = zip(*run.train, strict=True)
        losses.plot(steps, values, color=color, alpha=0.15, linewidth=0.8)
        losses.plot(steps, smooth(values), color=color, label=label)
        if run.held_out:
            losses.plot(*zip(*run.held_out, strict=True), "o", color=color)
        if run.rates:
            rates.semilogy(*zip(*run.rates, strict=True), color=color, label=label)
    losses.set(xlabel="step", ylabel=ylabel, title="Training (lines) and held out (points)")
    rates.set(xlabel="step", ylabel="learning rate", title="Learning rate, given or found")
    losses.legend()
    rates.legend()
    with replaced(path) as new:
        figure.savefig(new, dpi=150, format="png")
    plt.close(figure)


def smooth(values: Iterable[float]) -> list[float]:
    """The mean over a window that trails; at the start over what there is."""
    numbers = list(values)
    width = max(1, len(numbers) // 10)
    return [float(np.mean(numbers[max(0, end - width) : end])) for end in range(1, len(numbers) + 1)]
