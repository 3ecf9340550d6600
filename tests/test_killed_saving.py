"""A process that is killed while it saves: what was saved before stays whole, or the new is whole in its place.

Kills come at random moments, which reach into the writing of a file, and before every single operation on files, which
finds each state that a folder passes through.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Net, factors
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import oplora

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_llm.py"
SIZES = (100, 200, 100)
ADAPTERS = ("default", "other")  # the second goes into a folder of its name
STATES = ("old", "new", "changed")
DELAYS = [random.Random(kill).uniform(0.0, 0.1) for kill in range(20)]  # seconds until a kill
HOUR = 3600

# Forks a worker a line of its standard input. Importing is done once, and what is saved is made once: a state is a
# model and its optimizer, "changed" one with another lora_alpha.
WORKSHOP = """
import itertools, os, signal, sys, traceback
from pathlib import Path
here, expected = sys.argv[1:]
sys.path.insert(0, here)
import torch
import oplora
from test_killed_saving import STATES, load_script, make_training

script, args = load_script()
trainings = dict(zip(STATES, (make_training(1), make_training(3), make_training(3, lora_alpha=12)), strict=True))
for name, (model, optimizer, _) in trainings.items():
    model.save_pretrained(f"{expected}/{name}")
    torch.save(optimizer.state_dict(), f"{expected}/{name}.pt")

def save(folder, name):
    oplora.save_adapter(trainings[name][0], folder)

def save_often(folder, *names):
    for name in 500 * names:
        save(folder, name)
        print(name, flush=True)

def save_twice_at_once(folder):
    second = os.fork()
    for name in 3 * ("new", "old"):
        save(folder, name)
    if second == 0:
        os._exit(0)
    assert os.waitpid(second, 0)[1] == 0

def checkpoint(folder, step):
    name = ("old", "new")[int(step) % 2]
    history = {"train_loss": [0.0] * int(step)}
    script.save_checkpoint(Path(folder), int(step), *trainings[name], history, args)

def checkpoint_often(folder):
    done = [int(path.name.split("-")[-1]) for path in script.checkpoints(Path(folder))]
    first = max(done, default=0) + 1
    for step in range(first, first + 1000):
        checkpoint(folder, step)
        print(step, flush=True)

def begin_anew(folder):
    script.remove_checkpoints(Path(folder))

def kill_at(operation):
    count = itertools.count()
    def hook(event, _):
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(count) == operation:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    operation, job, *arguments = line.split()
    if (worker := os.fork()) == 0:
        try:
            kill_at(int(operation))
            globals()[job](*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(worker, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), "end", sep="\\n", flush=True)
"""


def make_training(steps: int, lora_alpha: int = 6) -> tuple[PeftModel, oplora.AdamW, Any]:
    torch.manual_seed(0)
    settings = {"r": 16, "lora_alpha": lora_alpha, "target_modules": ["first", "second"]}
    model = get_peft_model(Net(SIZES), LoraConfig(**settings))
    model.add_adapter("other", LoraConfig(**settings | {"r": 8}))
    model.base_model.set_adapter(list(ADAPTERS))
    optimizer = oplora.AdamW(model, lr=1e-2)
    for _ in range(steps):
        model(torch.ones(2, SIZES[0])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)


def load_script() -> tuple[Any, argparse.Namespace]:
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("finetune_llm", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script, argparse.Namespace(device="cpu")


class Workshop:
    """The process that forks workers, and what PEFT alone and torch alone write of the states that they save."""

    def __init__(self, expected: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a pool of threads would not be there in a worker
        command = [sys.executable, "-c", WORKSHOP, str(Path(__file__).parent), str(expected)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.expected = expected

    def run(self, job: str, *arguments: object, operation: int = -1, seconds: float | None = None) -> bool:
        """Whether it came to its end: killed before that operation on a file (from 0), or so many seconds after the
        first of its saves."""
        print(operation, job, *arguments, file=self.process.stdin, flush=True)
        worker = int(self.process.stdout.readline())
        if seconds is not None:
            self.process.stdout.readline()
            time.sleep(seconds)
            os.kill(worker, signal.SIGKILL)
        *_, status = itertools.takewhile("end\n".__ne__, self.process.stdout)
        assert int(status) in (0, -signal.SIGKILL)
        return int(status) == 0

    def states_in(self, folder: Path) -> tuple[str, ...]:
        """Of each adapter which state it is in, weights and config."""
        return tuple(self._state_in(folder, adapter) for adapter in ADAPTERS)

    def _state_in(self, folder: Path, adapter: str) -> str:
        if not (subfolder(folder, adapter) / "adapter_config.json").exists():
            with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
                load(folder, adapter)
            return "refused"
        config, tensors = load(folder, adapter)
        for name in STATES:
            its_config, its_tensors = self.states[name, adapter]
            if config == its_config and same(tensors, its_tensors):
                return name
        pytest.fail(f"adapter {adapter} is in none of the states")

    @functools.cached_property
    def states(self) -> dict[tuple[str, str], tuple[LoraConfig, dict[str, Tensor]]]:
        return {(name, adapter): load(self.expected / name, adapter) for name in STATES for adapter in ADAPTERS}


def subfolder(folder: Path, adapter: str) -> Path:
    return folder if adapter == "default" else folder / adapter


def load(folder: Path, adapter: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    model = PeftModel.from_pretrained(Net(SIZES), subfolder(folder, adapter))
    return model.peft_config["default"], factors(model)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path_factory.mktemp("expected"))
    yield workshop
    workshop.process.kill()
    workshop.process.communicate()


@pytest.fixture
def states_after_kills(workshop: Workshop, tmp_path: Path) -> Callable[..., list[tuple[str, ...] | None]]:
    """Saves the state `name` over a copy of the folder `before`, killed before each operation on a file in turn.
    Returns the adapters' states after each kill, None where there is no folder."""

    def states_after_kills(name: str, before: Path | None) -> list[tuple[str, ...] | None]:
        states = []
        for operation in itertools.count():
            folder = tmp_path / "kills" / str(operation) / "adapter"
            folder.parent.mkdir(parents=True)
            if before is not None:
                shutil.copytree(before, folder)
            done = workshop.run("save", folder, name, operation=operation)
            states.append(workshop.states_in(folder) if folder.exists() else None)
            if done:
                return states

    return states_after_kills


def phases(states: Iterable[Any]) -> list[Any]:
    """Without repetitions."""
    return [state for state, _ in itertools.groupby(states)]


# ---- save_adapter ----


def test_adapters_saved_over_themselves_survive_kills_at_random_moments(workshop: Workshop, tmp_path: Path) -> None:
    seen = set()
    for seconds, names in zip(DELAYS, 10 * [("old", "new"), ("new", "old")], strict=True):
        workshop.run("save_often", tmp_path, *names, seconds=seconds)
        seen.update(workshop.states_in(tmp_path))
    assert seen == {"old", "new"}


def test_save_killed_at_any_operation_leaves_each_adapter_old_or_new(
    workshop: Workshop, states_after_kills: Callable[..., list]
) -> None:
    for states in zip(*states_after_kills("new", before=workshop.expected / "old"), strict=True):
        assert phases(states) == ["old", "new"]


def test_save_of_another_config_killed_at_any_operation_leaves_no_mixture(
    workshop: Workshop, states_after_kills: Callable[..., list]
) -> None:
    for states in zip(*states_after_kills("changed", before=workshop.expected / "old"), strict=True):
        assert phases(states) == ["old", "refused", "changed"]


def test_config_with_its_sets_in_another_order_is_no_other_config(
    workshop: Workshop, states_after_kills: Callable[..., list], tmp_path: Path
) -> None:
    """Another process writes them in another order, for it hashes strings otherwise."""
    old = shutil.copytree(workshop.expected / "old", tmp_path / "old")
    for path in old.rglob("adapter_config.json"):
        config = json.loads(path.read_text())
        config["target_modules"].reverse()
        path.write_text(json.dumps(config))
    for states in zip(*states_after_kills("new", before=old), strict=True):
        assert phases(states) == ["old", "new"]


def test_first_save_killed_at_any_operation_leaves_both_adapters_or_no_folder(
    states_after_kills: Callable[..., list],
) -> None:
    assert phases(states_after_kills("new", before=None)) == [None, ("new", "new")]


@pytest.mark.parametrize("folders", [("one", "one", "one"), ("one", "two", "three")], ids=["same", "new"])
def test_leftovers_of_killed_saves_are_removed_after_an_hour(
    workshop: Workshop, tmp_path: Path, folders: tuple[str, ...]
) -> None:
    if folders[0] == folders[1]:
        workshop.run("save", tmp_path / folders[0], "old")
    assert not workshop.run("save", tmp_path / folders[0], "new", operation=5)
    [left] = tmp_path.rglob(".oplora-*")
    workshop.run("save", tmp_path / folders[1], "new")
    assert left.exists()  # it could be that of a process that is saving now
    for path in (left, *left.rglob("*")):
        os.utime(path, (0, time.time() - HOUR - 60))
    workshop.run("save", tmp_path / folders[2], "new")
    assert not left.exists()


def test_two_processes_that_save_at_once_leave_whole_adapters(workshop: Workshop, tmp_path: Path) -> None:
    for attempt in "123":
        folder = tmp_path / attempt
        assert workshop.run("save_twice_at_once", folder)
        assert set(workshop.states_in(folder)) <= {"old", "new"}
    assert not list(tmp_path.rglob(".oplora-*"))


# ---- the example's checkpoints ----


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script()


def steps_in_checkpoint(workshop: Workshop, script: tuple[Any, argparse.Namespace], folder: Path) -> int:
    """Loads the last checkpoint as --resume does; adapter and optimizer are in the state of that step."""
    model, optimizer, scheduler = make_training(steps=0)
    history = script[0].load_checkpoint(folder, model, optimizer, scheduler, script[1])
    steps = len(history["train_loss"])
    name = ("old", "new")[steps % 2]
    assert same(optimizer.state_dict(), torch.load(workshop.expected / f"{name}.pt"))
    for adapter in ADAPTERS:
        _, tensors = workshop.states[name, adapter]
        mine = {key.replace(f".{adapter}.", ".default."): t for key, t in factors(model).items() if adapter in key}
        assert same(mine, tensors)
    return steps


def test_checkpoints_survive_kills_at_random_moments(
    workshop: Workshop, script: tuple[Any, argparse.Namespace], tmp_path: Path
) -> None:
    steps = []
    for seconds in DELAYS:
        workshop.run("checkpoint_often", tmp_path, seconds=seconds)
        steps.append(steps_in_checkpoint(workshop, script, tmp_path))
    assert steps == sorted(set(steps))


def test_checkpoint_killed_at_any_operation_leaves_the_last_or_the_next(
    workshop: Workshop, script: tuple[Any, argparse.Namespace], tmp_path: Path
) -> None:
    workshop.run("checkpoint", tmp_path / "last", 1)
    steps, done = [], False
    while not done:
        folder = shutil.copytree(tmp_path / "last", tmp_path / str(len(steps)))
        done = workshop.run("checkpoint", folder, 2, operation=len(steps))
        steps.append(steps_in_checkpoint(workshop, script, folder))
    assert phases(steps) == [1, 2]


def test_run_that_begins_anew_killed_at_any_operation_leaves_no_checkpoint_in_part(
    workshop: Workshop, script: tuple[Any, argparse.Namespace], tmp_path: Path
) -> None:
    workshop.run("checkpoint", tmp_path / "last", 1)
    left, done = [], False
    while not done:
        folder = shutil.copytree(tmp_path / "last", tmp_path / str(len(left)))
        done = workshop.run("begin_anew", folder, operation=len(left))
        there = script[0].checkpoints(folder)
        left.append(steps_in_checkpoint(workshop, script, folder) if there else 0)
    assert phases(left) == [1, 0]


def test_next_checkpoint_removes_what_a_kill_left(
    workshop: Workshop, script: tuple[Any, argparse.Namespace], tmp_path: Path
) -> None:
    workshop.run("checkpoint", tmp_path, 1)
    assert not workshop.run("checkpoint", tmp_path, 2, operation=5)
    assert list(tmp_path.glob("unfinished-*"))
    workshop.run("checkpoint", tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000003"]
