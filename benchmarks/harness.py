"""What all benchmarks share: contenders in turns, memory, the machine's bandwidth, rows that stand alone.

Two numbers from different minutes of a busy machine say little about each other; two from the same second say
a lot. So contenders run in one process, on the same inputs, one turn each a round, forwards and backwards
alternately, and what is reported is the ratio within a round.
"""

import argparse
import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Row = dict[str, Any]

# What imports have made stays. Looked through before each measurement of memory it took nine tenths of a small trial.
gc.freeze()


# ---- the command ----


class Command(argparse.ArgumentParser):
    """Options that every benchmark has: where its rows go, whether it only tries itself out, and its threads.

    about: the script's docstring; quick: what --quick does."""

    def __init__(self, about: str | None, result: Path | None, quick: str) -> None:
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--threads", type=int, default=torch.get_num_threads())
        self.add_argument("--output", type=Path, default=result)
        self.add_argument("--quick", action="store_true", help=f"{quick}: does it run at all?")

    def options(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        options = self.parse_args(arguments)
        if options.quick and options.output == self.get_default("output"):
            self.error("--quick needs --output: its rows don't belong among the results")
        torch.set_num_threads(options.threads)
        return options


# ---- time ----


@dataclass(frozen=True)
class Contender:
    """`run` is timed; `before` prepares each turn and is not."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


def in_turns(contenders: dict[str, Contender], rounds: int, limit_s: float = 15.0) -> dict[str, list[float]]:
    """Seconds of every turn, by name; the i-th of each is of round i. A round before them warms up.

    After limit_s no round begins, if there are three: the slowest contenders have the largest effects.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + limit_s
        for turn in range(1 + rounds):
            if turn > 3 and time.perf_counter() > end:
                break
            # the other way round every other time: nobody always gets the caches that the same neighbour left
            for name, contender in list(contenders.items())[:: 1 if turn % 2 == 0 else -1]:
                contender.before()
                begin = time.perf_counter()
                contender.run()
                if turn > 0:
                    seconds[name].append(time.perf_counter() - begin)
    finally:
        if collecting:
            gc.enable()
    return seconds


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20%, 50% and 80% quantiles, linear between the sorted values."""
    q20, q50, q80 = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    return q20, q50, q80


def time_columns(seconds: Sequence[float], prefix: str = "") -> Row:
    """Milliseconds of a contender: the median and the quantiles around it."""
    q20, q50, q80 = (1e3 * q for q in quantiles(seconds))
    return {f"{prefix}ms": q50, f"{prefix}ms_20": q20, f"{prefix}ms_80": q80}


def ratio_columns(seconds: Sequence[float], over: Sequence[float]) -> Row:
    """The ratio of two contenders' times in the same round."""
    q20, q50, q80 = quantiles([a / b for a, b in zip(seconds, over, strict=True)])
    return {"ratio": q50, "ratio_20": q20, "ratio_80": q80}


# ---- the machine's memory bandwidth ----


def last_level_cache_bytes() -> int:
    """The largest cache of the first processor as Linux tells it, or 32 MiB."""
    units = {"K": 2**10, "M": 2**20}
    texts = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units], default=32 * 2**20)


class Bandwidth:
    """Two streams over arrays far larger than the caches, with torch's threads. Counted are the bytes that
    the program reads and writes:

    copy:  y = x, 8 bytes a number. Unless the store is non-temporal the processor reads the line first; that
           is not counted, so the memory may have moved 12.
    triad: y = y + a x, 12 bytes a number (two reads, one write), which is what moves: y is read anyway.
    """

    def __init__(self, array_bytes: int) -> None:
        numbers = array_bytes // 4
        self.x, self.y = torch.ones(numbers), torch.ones(numbers)
        self.bytes = {"copy": 8 * numbers, "triad": 12 * numbers}

    def contenders(self) -> dict[str, Contender]:
        return {
            "copy": Contender(lambda: self.y.copy_(self.x)),
            "triad": Contender(lambda: self.y.add_(self.x, alpha=0.5)),
        }

    def columns(self, seconds: dict[str, list[float]]) -> Row:
        """GB/s of the median turn; `bandwidth_gbps` is the better of the two."""
        rates = {f"{name}_gbps": n / quantiles(seconds[name])[1] / 1e9 for name, n in self.bytes.items()}
        return {**rates, "bandwidth_gbps": max(rates.values())}


# ---- memory ----


def keep_freed_memory() -> None:
    """Makes glibc keep what this process frees. By default large blocks go back to the system, and each new
    gradient of such a size pays for its pages anew: more than its arithmetic costs."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    ctypes.CDLL(None).mallopt(trim_threshold, -1)
    ctypes.CDLL(None).mallopt(mmap_max, 0)


def release_freed_memory() -> None:
    gc.collect()  # models and optimizers hold cycles
    ctypes.CDLL(None).malloc_trim(0)


def bytes_held(held: object, by_others: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages of all tensors in nested dicts and iterables, but for those that others hold anyway; a
    shared storage counts once."""
    storages: dict[int, int] = {}

    def visit(thing: object) -> None:
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            visit(list(thing.values()))
        elif isinstance(thing, Iterable) and not isinstance(thing, str):
            for part in thing:
                visit(part)

    visit(held)
    for tensor in by_others:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


@dataclass
class PeakMemory:
    """Resident memory above what the process had on entering, at its highest until it is read.

    Linux only. getrusage's ru_maxrss won't do: it holds the peak of everything before, and, as it lives on
    across exec, of the process that started this one. The other high-water mark, VmHWM, can be set back.
    """

    before: int = 0

    def __enter__(self) -> "PeakMemory":
        release_freed_memory()  # it would be used again without a trace
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS, proc(5)
        self.before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status_bytes("VmHWM") - self.before


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """function(*arguments), picklable, in a process that does nothing else. It is forked from one that has
    only imported libraries, which saves seconds each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


# ---- rows ----


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The short hash, with a + if the tracked files differ from it; empty outside a repository."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def environment() -> Row:
    """The columns that make a row readable without the others."""
    from oplora import _core

    return {
        "device": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _core.isa(),
        "dtype": "float32",
        "oplora": _version("oplora"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A file of this process's own, renamed at the end: a reader finds the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_rows(path: Path, rows: Sequence[Row], *, a_line_each: bool = False) -> None:
    """A JSON list.

    a_line_each: for thousands of rows."""
    if a_line_each:
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        text = f"[\n{lines}\n]\n"
    else:
        text = json.dumps(list(rows), indent=1) + "\n"
    with written_beside(path) as beside:
        beside.write_text(text)


def read_rows(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text())
    return rows


# ---- models that are pretrained here ----


def pretrained(model: nn.Module, train: Callable[[], object], name: str | None) -> nn.Module:
    """The model, frozen: its parameters are read from runs/paper, or `train` makes and the file keeps them.

    name: the file's; None: nothing is kept."""
    path = Path("runs/paper") / f"{name}.pt"
    if name is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.requires_grad_(False)
    train()
    if name is not None:
        with written_beside(path) as beside:
            torch.save(model.state_dict(), beside)
    return model.requires_grad_(False)


def learn(model: nn.Module, loss_of: Callable[[], Tensor], optimizer: Any, scheduler: Any, steps: int) -> None:
    """Trains the whole model, gradients clipped to 1; every hundredth loss goes to stderr."""
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            print(f"{type(model).__name__}, step {step}: {loss.item():.3f}", file=sys.stderr, flush=True)
