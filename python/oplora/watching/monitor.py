"""Watching a run: the rate of every layer and what its generator does, written down every few steps.

A run's folder gets monitor.jsonl, a JSON object a line:

    {"format": 1, "processes": 1, "layers": [name, ...], "numbers": [name, ...]}     where a run begins, or continues
    {"step": 10, "loss": 2.1, "lr": 1e-4, "stats": {"lr": [a number a layer], ...}}
    {"step": 10, "loss": 2.1}, {"step": 10, "eval_loss": 2.2}        what transformers' Trainer logs

"lr" of a line is that of the first group, for preset "auto" a share; "lr" in "stats" is the rate of each layer. The
numbers are those of oplora.stats, to six digits; null stands for one that is not finite, or not there. Where a run
continued from a checkpoint, steps that were done again stand there twice, and the later lines count.
"processes" is of how many processes the files hold layers: with AdamW(shard=True) of all, each its own file, else 1.
"""

import json
import math
import operator
import os
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed
from torch import Tensor
from transformers import TrainerCallback

from ..errors import OPLoRAFileError, OPLoRATypeError, OPLoRAValueError
from ..optim import AdamW
from .plot import FILE, FORMAT
from .stats import generators_of, inner_optimizer, stats

__all__ = ["Monitor"]

DIGITS = 6


class Monitor(TrainerCallback):  # type: ignore[misc]
    """Writes down oplora.stats, the loss and the first group's lr every few steps; `python -m oplora plot` draws them.

        Trainer(..., callbacks=[oplora.Monitor("runs/mine")])        # finds the optimizer and the losses itself

        monitor = oplora.Monitor("runs/mine", optimizer)             # in a loop of your own
        for batch in batches:
            ...
            optimizer.step()
            monitor(loss)

    On steps in between nothing is computed, and on a GPU nothing is waited for. With several processes the first
    writes; with AdamW(shard=True) each writes its own layers, to monitor-RANK.jsonl. Where tensorboard is installed it
    gets loss, rate and each number's least, middle and greatest over the layers; so does a run of wandb or trackio that
    has begun (by Trainer's report_to, or by init). It adds to a file that is there.

    Args:
        folder: of the run, made if need be.
        optimizer: oplora.AdamW, an optimizer of create_oplora_optimizer, or Generators; also as accelerate prepared it.
            Not needed under Trainer.
        every: record each step whose number divides by it, and the first.

    Raises:
        OPLoRAError: an optimizer that is not oplora's, a folder that cannot be written, a full disk. Where writing
            fails later there is a warning and the training continues, unwatched.
    """

    def __init__(self, folder: str | os.PathLike[str], optimizer: Any = None, *, every: int = 10) -> None:
        if not isinstance(every, int) or every < 1:
            raise OPLoRAValueError(f"oplora.Monitor: every is {every!r}, expected a whole number of at least 1.")
        self.folder, self.every = Path(os.path.expanduser(folder)), every
        self.optimizer: Any = None
        self._file: TextIO | None = None
        self._board: Any = None
        self._is_first = False  # of the processes
        self._count = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / FILE).open("a"):
                pass
            if optimizer is not None:
                self._begin(optimizer)
        except OSError as error:
            self._drop_file()
            raise OPLoRAFileError(
                f"oplora.Monitor: cannot write to {self.folder}: {error.strerror or error}. Choose a folder that can "
                "be written, on a disk with room."
            ) from error

    def __call__(self, loss: float | Tensor | None = None, step: int | None = None) -> None:
        """After optimizer.step(). loss: a number or a tensor of one, which is only read on steps that are recorded.
        step: counted from 1; by default one more than in the call before. A loop that continues from a checkpoint says
        where it is."""
        if self.optimizer is None:
            raise OPLoRATypeError(
                "oplora.Monitor: there is no optimizer to watch. Pass it, oplora.Monitor(folder, optimizer), or "
                "give the monitor to transformers' Trainer as a callback."
            )
        self._count = self._count + 1 if step is None else _whole(step)
        if self._is_due(self._count):
            self._record(self._count, loss.item() if isinstance(loss, Tensor) else loss)

    def close(self) -> None:
        """Lets go of the files; they are complete at any time."""
        self._drop_file()
        with self._unless_board_fails():
            if self._board is not None:
                self._board.close()
        self._board = None

    # ---- transformers' Trainer ----

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._begin_in_training(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Between the optimizer's step and the schedule's, so that the rate is the one of the step."""
        self._begin_in_training(optimizer)  # DeepSpeed makes it late
        if self._is_due(state.global_step + 1):
            self._record(state.global_step + 1, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        losses = {name: float(value) for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        if losses and self._file is not None:
            self._write({"step": state.global_step, **{name: _rounded(loss) for name, loss in losses.items()}})
            self._to_board(state.global_step, losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()
        self.optimizer = None  # the next training's may be another

    # ---- writing ----

    def _begin(self, optimizer: Any) -> None:
        generators = generators_of(optimizer, "oplora.Monitor")
        self.optimizer = inner_optimizer(optimizer)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        shards = generators._stepper.shards if isinstance(generators, AdamW) else None
        if rank > 0 and shards is None:
            return
        numbers = stats(self.optimizer)
        path = self.folder / (FILE if rank == 0 else f"monitor-{rank}.jsonl")
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        processes = 1 if shards is None else shards.count
        self._append({"format": FORMAT, "processes": processes, "layers": list(numbers), "numbers": _names(numbers)})
        self._is_first = rank == 0
        if self._is_first:
            self._board = _new_board(self.folder)

    def _begin_in_training(self, optimizer: Any) -> None:
        """Unless it has, or Trainer has no optimizer yet."""
        if self.optimizer is not None or optimizer is None:
            return
        try:
            self._begin(optimizer)
        except OSError as error:
            self._give_up(error)

    def _is_due(self, step: int) -> bool:
        return self._file is not None and (step == 1 or step % self.every == 0)

    def _record(self, step: int, loss: float | None) -> None:
        numbers = stats(self.optimizer)
        columns = {name: [layer.get(name, math.nan) for layer in numbers.values()] for name in _names(numbers)}
        head: dict[str, float] = {} if loss is None else {"loss": loss}
        if (groups := getattr(self.optimizer, "param_groups", None)) is not None:
            head["lr"] = float(groups[0]["lr"])
        line = {key: _rounded(value) for key, value in head.items()}
        self._write({"step": step, **line, "stats": {name: list(map(_rounded, c)) for name, c in columns.items()}})
        self._to_board(step, head, columns)
        if self._is_first:
            self._to_trackers(step, head, columns)

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
            self._file.flush()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._append(line)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warnings.warn(
            f"oplora.Monitor: cannot write to {self.folder}: {error.strerror or error}. The training continues, "
            "unwatched.",
            stacklevel=4,
        )
        self._drop_file()

    def _drop_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # every whole line was flushed; what is left is of the line that failed
                self._file.close()
        self._file = None

    @contextmanager
    def _unless_board_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # with tensorflow installed its writer raises errors that are no OSErrors
            self._board = None
            warnings.warn(
                f"oplora.Monitor: cannot write to {self.folder} for TensorBoard: {error}. The training continues "
                "without it.",
                stacklevel=4,
            )

    def _to_board(self, step: int, head: dict[str, float], columns: dict[str, list[float]] | None = None) -> None:
        if self._board is None:
            return
        with self._unless_board_fails():
            for name, value in (head | _over_layers(columns or {})).items():
                self._board.add_scalar(name, value, step)

    def _to_trackers(self, step: int, head: dict[str, float], columns: dict[str, list[float]]) -> None:
        """Beside what Trainer reports there itself, under names of our own; the step by the name that Trainer uses."""
        numbers = {f"oplora/{name}": value for name, value in (head | _over_layers(columns)).items()}
        for tracker in _trackers():
            try:
                tracker.log({**numbers, "train/global_step": step})
            except Exception as error:  # what a tracker raises is its own matter, and must not end the training
                warnings.warn(f"oplora.Monitor: {tracker.__name__} took no numbers: {error}", stacklevel=4)


def _whole(step: Any) -> int:
    """Of NumPy's and torch's integers too, which JSON does not take."""
    try:
        return operator.index(step)
    except TypeError as error:
        raise OPLoRATypeError(f"oplora.Monitor: step is {step!r}, expected a whole number.") from error


def _over_layers(columns: dict[str, list[float]]) -> dict[str, float]:
    """Each number's least, middle and greatest."""
    scalars: dict[str, float] = {}
    for name, column in columns.items():
        if known := [value for value in column if math.isfinite(value)]:
            scalars |= {
                f"{name}/min": min(known),
                f"{name}/max": max(known),
                f"{name}/median": statistics.median(known),
            }
    return scalars


def _trackers() -> list[Any]:
    """Those that somebody imported and that have a run under way; nothing is imported here."""
    wandb, trackio = (sys.modules.get(name) for name in ("wandb", "trackio"))
    found = [wandb] if getattr(wandb, "run", None) is not None else []
    current = getattr(getattr(trackio, "context_vars", None), "current_run", None)
    return [*found, trackio] if current is not None and current.get() is not None else found


def _names(numbers: dict[str, dict[str, float]]) -> list[str]:
    """Of what oplora.stats tells of any layer."""
    return list(dict.fromkeys(name for layer in numbers.values() for name in layer))


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _cut_torn_line(path: Path) -> None:
    """Takes away what a killed process left of a line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def _new_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
