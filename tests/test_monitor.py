"""oplora.Monitor: what it writes down, when, and what it does where it cannot; python -m oplora plot."""

import json
import math
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import test_trainer
import torch
from accelerate import Accelerator
from conftest import Net, batches, make_model, train
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import oplora
from oplora.__main__ import main
from oplora.engines import FOUND
from oplora.watching.plot import Run, _draw, plot_run, shortened

STATES = {
    "auto": lambda model: oplora.AdamW(model, lr=1e-2),
    "lean": lambda model: oplora.AdamW(model, lr=1e-2, state="lean"),
    "exact": lambda model: oplora.AdamW(model, lr=1e-2, state="exact"),
    "general": lambda model: oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=1e-2),
}
TURNED = FOUND.index("turned")
FULL = Path("/dev/full")  # every write to it fails as on a full disk
every_state = pytest.mark.parametrize("make_optimizer", STATES.values(), ids=STATES)


def watched(folder: Path, steps: int, every: int = 10, first: int = 1, make_optimizer: Any = STATES["lean"]) -> Any:
    """A loop of one's own; returns the optimizer and the losses."""
    model = make_model()
    optimizer = make_optimizer(model)
    monitor = oplora.Monitor(folder, optimizer, every=every)
    losses = []
    for step, (x, y) in enumerate(batches(steps, torch.float32), first):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        monitor(loss, step if first > 1 else None)
        losses.append(loss.item())
    monitor.close()
    return optimizer, losses


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "monitor.jsonl").read_text().splitlines()]


OF_VERSION_0_1 = ["trainable_lr", "line_search", "dropped_weight"]
OF_AUTO = ["lr", "settled", "norm_g"]


def write(
    file: Path, layers: list[str], steps: Iterable[int], processes: int = 1, names: list[str] = OF_VERSION_0_1
) -> list[str]:
    """Lines as the Monitor appends them, with the step for every number; returns the numbers' names."""
    text: list[dict[str, Any]] = [{"format": 1, "processes": processes, "layers": layers, "numbers": names}]
    for step in steps:
        text.append({"step": step, "loss": 1 / step, "stats": {name: [float(step)] * len(layers) for name in names}})
    with file.open("a") as appended:
        appended.writelines(json.dumps(line) + "\n" for line in text)
    return names


# ---- in a loop of one's own ----


@every_state
def test_last_line_holds_what_stats_says(tmp_path: Path, make_optimizer: Any) -> None:
    optimizer, losses = watched(tmp_path, 4, every=4, make_optimizer=make_optimizer)
    header, _, last = lines(tmp_path)
    numbers = oplora.stats(optimizer)
    assert header["layers"] == list(numbers)
    assert last["loss"] == pytest.approx(losses[-1], rel=1e-5) and last["lr"] == 1e-2
    assert header["numbers"] == list(last["stats"])
    for name, column in last["stats"].items():
        assert column == pytest.approx([layer[name] for layer in numbers.values()], rel=1e-5)


def test_optimizer_that_accelerate_prepared_is_watched(tmp_path: Path, accelerator: Accelerator) -> None:
    optimizer = accelerator.prepare(STATES["lean"](make_model()))
    oplora.Monitor(tmp_path, optimizer)(1.0)
    header, line = lines(tmp_path)
    assert header["layers"] == list(oplora.stats(optimizer)) and line["lr"] == 1e-2


def test_first_step_and_every_nth_are_recorded(tmp_path: Path) -> None:
    watched(tmp_path, 9, every=4)
    assert [line["step"] for line in lines(tmp_path)[1:]] == [1, 4, 8]


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_step_may_be_any_librarys_integer(kind: Any, tmp_path: Path) -> None:
    monitor = oplora.Monitor(tmp_path, oplora.AdamW(make_model()), every=4)
    monitor(step=kind(8))
    assert lines(tmp_path)[-1]["step"] == 8


def test_step_that_is_no_integer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"step is 0\.5, expected a whole number"):
        oplora.Monitor(tmp_path, oplora.AdamW(make_model()))(step=0.5)


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = make_model()
    oplora.Monitor("~/run", oplora.AdamW(model))(1.0)
    oplora.save_adapter(model, "~/adapter")
    assert plot_run("~/run") == tmp_path / "run/monitor.png"
    assert main(["export", "~/adapter", "~/plain.safetensors", "--format", "plain"]) == 0
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"run", "adapter", "plain.safetensors"}


def test_nothing_is_computed_on_steps_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monitor = oplora.Monitor(tmp_path, oplora.AdamW(model), every=1000)
    monkeypatch.setattr("oplora.watching.monitor.stats", lambda _: pytest.fail("stats were asked for"))
    monkeypatch.setattr(Tensor, "item", lambda _: pytest.fail("a tensor was read"))
    for step in range(2, 1000):
        monitor(torch.zeros(()), step)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    optimizer = oplora.AdamW(make_model())  # not stepped: its numbers are NaN
    oplora.Monitor(tmp_path, optimizer)(math.nan)
    record = lines(tmp_path)[-1]
    assert record["loss"] is None and record["stats"]["lr"] == [None, None]
    run = Run.read(tmp_path)
    assert np.isnan(run.tables["lr"]).all() and math.isnan(run.losses["loss"][1])


def test_rate_is_recorded_as_it_is_found(tmp_path: Path) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    monitor, rates, turned = oplora.Monitor(tmp_path, optimizer, every=1), [], []
    for _ in range(9):
        train(model, optimizer, 1)
        monitor()
        rates.append(optimizer.found_lr)
        turned.append(float(optimizer._stepper.found[TURNED] > 0))
    run = Run.read(tmp_path)
    assert len(set(rates)) > 5
    for column, settled in zip(run.tables["lr"].T, run.tables["settled"].T, strict=True):
        assert column == pytest.approx(rates, rel=1e-5) and list(settled) == turned


def test_layers_of_other_kinds_share_a_table(tmp_path: Path) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first = nn.Embedding(7, 5), nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.first(self.words(ids))

    model = oplora.wrap(Embedded(), oplora.OPLoRAConfig(r=2, target_modules=["words", "first"], use_dora=True))
    oplora.Monitor(tmp_path, oplora.AdamW(model))(1.0)
    run = Run.read(tmp_path)
    assert all(table.shape == (1, 2) for table in run.tables.values())


def test_each_line_is_there_as_soon_as_the_step_is_done(tmp_path: Path) -> None:
    monitor = oplora.Monitor(tmp_path, oplora.AdamW(make_model()), every=1)
    monitor(1.0)
    assert lines(tmp_path)[-1]["step"] == 1  # no close()


@every_state
def test_stats_fetch_as_often_from_many_layers_as_from_few(
    monkeypatch: pytest.MonkeyPatch, make_optimizer: Any
) -> None:
    def fetches(layers: int) -> int:
        model = oplora.wrap(nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))), oplora.OPLoRAConfig(r=2))
        optimizer = make_optimizer(model)
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        calls = []
        with monkeypatch.context() as patch:
            for owner, name in ((Tensor, "cpu"), (oplora.watching.stats, "_fetched")):
                fetch = getattr(owner, name)
                patch.setattr(owner, name, lambda tensors, fetch=fetch: (calls.append(0), fetch(tensors))[1])
            oplora.stats(optimizer)
        return len(calls)

    assert 0 < fetches(20) == fetches(3)


@pytest.mark.parametrize("state", ["auto", "lean", "general"])
def test_stats_read_no_number_alone(state: str) -> None:
    """State exact does, from the report that it fetched in one piece."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default)
            return function(*args, **(kwargs or {}))

    model = make_model()
    optimizer = STATES[state](model)
    train(model, optimizer, 1)
    with Reads() as reads:
        oplora.stats(optimizer)
    assert reads.count == 0


# ---- going on ----


def test_run_that_went_on_from_a_checkpoint_has_every_step_once(tmp_path: Path) -> None:
    watched(tmp_path, 12, every=2)
    watched(tmp_path, 8, every=2, first=9)  # from step 8's checkpoint
    run = Run.read(tmp_path)
    assert run.steps == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    assert run.losses["loss"].keys() == set(run.steps)


def test_new_run_in_an_old_folder_is_read_alone(tmp_path: Path) -> None:
    watched(tmp_path, 12, every=2)
    watched(tmp_path, 4, every=2)
    assert Run.read(tmp_path).steps == [1, 2, 4]


def test_line_torn_by_a_kill_is_cut_before_the_next(tmp_path: Path) -> None:
    watched(tmp_path, 4, every=2)
    with (tmp_path / "monitor.jsonl").open("a") as file:
        file.write('{"step":6,"sta')
    assert Run.read(tmp_path).steps == [1, 2, 4]
    watched(tmp_path, 2, every=2, first=5)
    assert Run.read(tmp_path).steps == [1, 2, 4, 6]


def test_run_that_went_on_with_other_layers_has_both(tmp_path: Path) -> None:
    names = write(tmp_path / "monitor.jsonl", ["a", "b"], steps=[1, 2])
    write(tmp_path / "monitor.jsonl", ["b", "c"], steps=[2, 3])
    run = Run.read(tmp_path)
    assert run.layers == ["a", "b", "c"] and run.steps == [1, 2, 3]
    for name in names:
        assert np.array_equal(run.tables[name], [[1, 1, np.nan], [np.nan, 2, 2], [np.nan, 3, 3]], equal_nan=True)


def test_files_of_processes_that_are_no_more_are_not_read(tmp_path: Path) -> None:
    for rank, file in enumerate(["monitor.jsonl", "monitor-1.jsonl", "monitor-2.jsonl"]):
        write(tmp_path / file, [f"of {rank} of 3"], steps=[1, 2, 3, 4], processes=3)
    for rank, file in enumerate(["monitor.jsonl", "monitor-1.jsonl"]):  # from step 2's checkpoint
        write(tmp_path / file, [f"of {rank} of 2"], steps=[3, 4], processes=2)
    run = Run.read(tmp_path)
    columns = zip(run.layers, run.tables["line_search"].T, strict=True)
    known = {layer: list(~np.isnan(column)) for layer, column in columns}
    assert known == {f"of {i} of 3": [True, True, False, False] for i in range(3)} | {
        f"of {i} of 2": [False, False, True, True] for i in range(2)
    }
    write(tmp_path / "monitor.jsonl", ["whole"], steps=[1], processes=1)  # anew, undivided
    run = Run.read(tmp_path)
    assert run.layers == ["whole"] and run.steps == [1]


# ---- transformers' Trainer ----


def test_trainer_needs_the_callback_alone(tmp_path: Path) -> None:
    model = test_trainer.make_model()
    trainer = test_trainer.make_trainer(
        tmp_path, model, test_trainer.as_optimizer(model), eval_strategy="steps", eval_steps=4
    )
    trainer.add_callback(oplora.Monitor(tmp_path, every=3))
    losses = test_trainer.run(trainer)
    run = Run.read(tmp_path)
    assert run.steps == [1, 3, 6]
    assert list(run.losses["loss"].values()) == pytest.approx(losses, rel=1e-5)
    assert list(run.losses["eval_loss"]) == [4, 8]


def test_trainer_that_resumes_has_every_step_once(tmp_path: Path) -> None:
    def trained(steps: int, resume: bool) -> None:
        model = test_trainer.make_model()
        trainer = test_trainer.make_trainer(
            tmp_path, model, test_trainer.as_optimizer(model), max_steps=steps, save_strategy="steps", save_steps=4
        )
        trainer.add_callback(oplora.Monitor(tmp_path, every=1))
        trainer.train(resume_from_checkpoint=resume)

    trained(4, resume=False)
    trained(6, resume=True)
    run = Run.read(tmp_path)
    assert run.steps == list(run.losses["loss"]) == [1, 2, 3, 4, 5, 6]


def test_trainer_records_the_rate_of_the_step(tmp_path: Path) -> None:
    model = test_trainer.make_model()
    trainer = test_trainer.make_trainer(
        tmp_path, model, test_trainer.as_class(model), lr_scheduler_type="linear", max_steps=4
    )
    trainer.add_callback(oplora.Monitor(tmp_path, every=1))
    trainer.train()
    assert [line["lr"] for line in lines(tmp_path) if "lr" in line] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_monitor_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    losses = [watched(tmp_path / str(every), 12, every=every)[1] for every in (1, 100)]
    assert losses[0] == losses[1]


# ---- TensorBoard ----


def test_tensorboard_gets_least_middle_and_greatest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars = {}

    class Board:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars[name] = value

        def close(self) -> None:
            pass

    monkeypatch.setattr("oplora.watching.monitor._new_board", lambda _: Board())
    optimizer, losses = watched(tmp_path, 2, every=2)
    values = [layer["norm_g"] for layer in oplora.stats(optimizer).values()]
    assert scalars["loss"] == losses[-1]
    assert [scalars[f"norm_g/{what}"] for what in ("min", "median", "max")] == pytest.approx(
        [min(values), sum(values) / 2, max(values)]
    )


class Tracker:
    """What Monitor sees of wandb or trackio."""

    __name__ = "tracker"

    def __init__(self, run: object, failing: bool = False) -> None:
        self.run, self.failing, self.logged = run, failing, []
        self.context_vars = types.SimpleNamespace(current_run=types.SimpleNamespace(get=lambda: run))

    def log(self, numbers: dict[str, float]) -> None:
        if self.failing:
            raise RuntimeError("no connection")
        self.logged.append(numbers)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_run_of_a_tracker_gets_the_numbers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, Tracker(run=object()))
    watched(tmp_path, 4, every=2)
    logged = sys.modules[name].logged
    assert [numbers["train/global_step"] for numbers in logged] == [1, 2, 4]
    assert logged[-1]["oplora/lr/min"] <= logged[-1]["oplora/lr/median"] <= logged[-1]["oplora/lr/max"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracker_without_a_run_is_left_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, Tracker(run=None))
    watched(tmp_path, 2, every=1)
    assert not sys.modules[name].logged


def test_failing_tracker_ends_neither_training_nor_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Tracker(run=object(), failing=True))
    with pytest.warns(UserWarning, match="took no numbers: no connection"):
        watched(tmp_path, 2, every=1)
    assert len(lines(tmp_path)) == 3


def test_without_tensorboard_lines_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    watched(tmp_path, 2, every=2)
    assert len(lines(tmp_path)) == 3


# ---- what cannot be ----


def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"oplora\.Monitor: expected .*\(oplora\.AdamW.* got AdamW of torch"):
        oplora.Monitor(tmp_path, torch.optim.AdamW(Net().parameters()))


def test_call_without_an_optimizer_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"oplora\.Monitor\(folder, optimizer\)"):
        oplora.Monitor(tmp_path)(1.0)


@pytest.mark.parametrize("every", [0, -3, 2.5])
def test_steps_between_records_are_checked(tmp_path: Path, every: Any) -> None:
    with pytest.raises(oplora.OPLoRAError, match=f"every is {every}"):
        oplora.Monitor(tmp_path, every=every)


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(oplora.OPLoRAError, match=r"cannot write to .*run: "):
        oplora.Monitor(tmp_path / "run")


def test_full_disk_ends_the_watching_and_not_the_training(tmp_path: Path) -> None:
    monitor = oplora.Monitor(tmp_path, oplora.AdamW(make_model()), every=1)
    monitor._drop_file()
    monitor._file = file = FULL.open("w")
    with pytest.warns(UserWarning, match="No space left on device. The training continues"):
        monitor(1.0)
    assert file.closed
    monitor(1.0)  # silently
    monitor.close()


def test_full_disk_is_refused_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # it would read the device, which has no end
    monkeypatch.setattr("oplora.watching.monitor._cut_torn_line", lambda _: None)
    (tmp_path / "monitor.jsonl").symlink_to(FULL)
    with pytest.raises(oplora.OPLoRAError, match=r"cannot write to .*: No space left on device\. Choose a folder"):
        oplora.Monitor(tmp_path, oplora.AdamW(make_model()))


def test_trainer_goes_on_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oplora.watching.monitor._cut_torn_line", lambda _: None)
    (tmp_path / "monitor.jsonl").symlink_to(FULL)
    model = test_trainer.make_model()
    trainer = test_trainer.make_trainer(tmp_path, model, test_trainer.as_optimizer(model), max_steps=2)
    trainer.add_callback(oplora.Monitor(tmp_path, every=1))
    with pytest.warns(UserWarning, match="No space left on device. The training continues") as warned:
        trainer.train()
    assert sum("oplora.Monitor" in str(warning.message) for warning in warned) == 1
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("failing", ["add_scalar", "close"])
def test_failing_tensorboard_ends_neither_training_nor_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    class Board:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: (_ for _ in ()).throw(RuntimeError("out of space")) if name == failing else None

    monkeypatch.setattr("oplora.watching.monitor._new_board", lambda _: Board())
    with pytest.warns(UserWarning, match="for TensorBoard: out of space. The training continues") as warned:
        watched(tmp_path, 3, every=1)
    assert sum("TensorBoard" in str(warning.message) for warning in warned) == 1
    assert len(lines(tmp_path)) == 4


# ---- the picture ----


def made_up_run(folder: Path, layers: int, steps: int, names: list[str] = OF_VERSION_0_1) -> None:
    layer_names = [f"model.layers.{i}.q_proj" for i in range(layers)]
    write(folder / "monitor.jsonl", layer_names, range(1, steps + 1), names=names)


@pytest.mark.parametrize("names", [OF_VERSION_0_1, ["lr", *OF_VERSION_0_1], OF_AUTO], ids=["0.1", "paper", "auto"])
@pytest.mark.parametrize(("layers", "steps"), [(1, 1), (200, 3), (3, 40)])
def test_plot_draws_runs_of_any_size(
    tmp_path: Path, layers: int, steps: int, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_run(tmp_path, layers, steps, names)
    assert main(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "monitor.png")
    assert min(Image.open(tmp_path / "monitor.png").size) > 400


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (OF_VERSION_0_1, ["loss", "over the layers", "share dropped", "", ""]),
        (["lr", *OF_VERSION_0_1], ["loss", "rate over the layers", "over the layers", "share dropped", "", ""]),
        (OF_AUTO, ["loss", "rate over the layers"]),
    ],
    ids=["0.1", "paper", "auto"],
)
def test_panels_are_of_what_the_run_has(tmp_path: Path, names: list[str], labels: list[str]) -> None:
    made_up_run(tmp_path, 3, 5, names)
    panels = [axes for axes in _draw(Run.read(tmp_path)).axes if axes.get_label() != "<colorbar>"]
    assert [axes.get_ylabel() for axes in panels] == labels


def test_rate_is_drawn_over_the_steps_on_a_log_axis(tmp_path: Path) -> None:
    made_up_run(tmp_path, 3, 7, OF_AUTO)
    axes = _draw(Run.read(tmp_path)).axes[1]
    assert axes.get_yscale() == "log"
    assert np.array_equal(axes.lines[0].get_xydata(), [[step, step] for step in range(1, 8)])


@pytest.mark.parametrize("turned", [[0, 0, 0], [0, 1, 1], [1, 1, 1]])
def test_mark_is_where_the_search_has_settled(tmp_path: Path, turned: list[int]) -> None:
    text = [{"format": 1, "layers": ["a"], "numbers": OF_AUTO}]
    text += [{"step": 3 * i, "stats": {"lr": [1e-3], "settled": [bit]}} for i, bit in enumerate(turned, 1)]
    (tmp_path / "monitor.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text))
    run = Run.read(tmp_path)
    assert run.settled == (3 * (turned.index(1) + 1) if any(turned) else None)
    marks = [line.get_xdata()[0] for line in _draw(run).axes[1].lines[1:]]
    assert marks == ([] if run.settled is None else [run.settled])


def test_run_that_went_on_with_another_preset_has_both_in_its_picture(tmp_path: Path) -> None:
    write(tmp_path / "monitor.jsonl", ["a", "b"], steps=[1, 2])
    write(tmp_path / "monitor.jsonl", ["a", "b"], steps=[3, 4], names=OF_AUTO)
    run = Run.read(tmp_path)
    assert np.array_equal(run.tables["lr"][:, 0], [np.nan, np.nan, 3, 4], equal_nan=True)
    assert np.array_equal(run.tables["line_search"][:, 0], [1, 2, np.nan, np.nan], equal_nan=True)
    assert plot_run(tmp_path).stat().st_size > 1000


@every_state
def test_plot_draws_a_run_that_was_not_stepped(tmp_path: Path, make_optimizer: Any) -> None:
    oplora.Monitor(tmp_path, make_optimizer(make_model()))()
    assert main(["plot", str(tmp_path), str(tmp_path / "picture.pdf")]) == 0
    assert (tmp_path / "picture.pdf").stat().st_size > 1000


def test_shares_of_the_layers_are_drawn_together(tmp_path: Path) -> None:
    write(tmp_path / "monitor.jsonl", ["a", "b", "c"], steps=[1, 2, 3], processes=2)
    write(tmp_path / "monitor-1.jsonl", ["d", "e"], steps=[1, 2, 3], processes=2)
    run = Run.read(tmp_path)
    assert len(run.layers) == 5 and run.tables["line_search"].shape == (3, 5)
    assert len(run.losses["loss"]) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no .*monitor.jsonl. Train with oplora.Monitor"),
        ("", "holds no step yet"),
        ('{"format": 1, "layers": ["a"], "numbers": []}\nsomething\n', "line 2 of .*monitor.jsonl"),
        ('{"format": 1, "layers": ["a"], "numbers": []}\n{"step": 1, "stats": {"norm_g": [1, 2]}}\n', "line 2 of"),
        ('{"format": 1, "layers": ["a"], "numbers": []}\n{"step": 1, "stats": {"norm_g": ["b"]}}\n', "line 2 of"),
        ('{"format": 1, "layers": ["a"], "numbers": []}\n{"step": 1, "stats": [1]}\n', "line 2 of"),
        ('{"format": 1, "layers": ["a"], "numbers": []}\n{"step": 1, "stats": {}}\n', "line 2 of"),
        ('{"format": 1, "layers": "a", "numbers": []}\n', "line 1 of"),
        ('{"format": 1, "layers": ["a"], "numbers": []}\n\udcff\n', "line 2 of"),
        ('{"format": 1, "layers": [["a"]], "numbers": []}\n', "line 1 of"),
        ('{"format": 1, "layers": ["a"], "processes": "x"}\n', "line 1 of"),
        ('{"format": 1, "layers": ["a"], "numbers": []}\n{"step": 1e999, "stats": {"lr": [1]}}\n', "line 2 of"),
        ('{"format": 1, "layers": ["a"], "numbers": []}\n{"step": 1e30, "stats": {"lr": [1]}}\n', "line 2 of"),
        (f'{{"format": 1, "layers": ["a"], "numbers": []}}\n{{"step": 1, "loss": 1{400 * "0"}}}\n', "line 2 of"),
        (100_000 * "[" + "\n", "line 1 of"),
        ('{"format": 2, "layers": ["a"]}\n', "line 1 of .* begins format 2, and this oplora reads 1"),
    ],
)
def test_plot_says_what_is_wrong(
    tmp_path: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "monitor.jsonl").write_text(content, errors="surrogateescape")
    assert main(["plot", str(tmp_path)]) == 2
    assert re.search(f"^oplora: .*{said}", capsys.readouterr().err)


def test_plot_says_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "monitor.jsonl").mkdir()
    assert main(["plot", str(tmp_path)]) == 2
    assert "monitor.jsonl: Is a directory" in capsys.readouterr().err


def test_plot_of_a_file_that_is_not_there_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path / "run/monitor.jsonl")]) == 2
    assert f"there is no {tmp_path}/run/monitor.jsonl." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["picture", "new/picture.svg"])
def test_plot_writes_the_file_that_it_names(tmp_path: Path, name: str) -> None:
    made_up_run(tmp_path, 1, 1)
    assert plot_run(tmp_path, tmp_path / name) == tmp_path / name
    assert (tmp_path / name).is_file()


def test_picture_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    made_up_run(tmp_path, 1, 1)
    (tmp_path / "old.unknown").write_text("old")
    with pytest.raises(oplora.OPLoRAError, match=r"cannot write .*unknown"):
        plot_run(tmp_path, tmp_path / "old.unknown")
    assert (tmp_path / "old.unknown").read_text() == "old"


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "monitor.jsonl", ["$a^{$", "b_$"], steps=[1, 2])
    assert plot_run(tmp_path).is_file()


def test_plot_leaves_the_callers_backend(tmp_path: Path) -> None:
    made_up_run(tmp_path, 1, 1)
    with matplotlib.rc_context({"backend": "svg"}):
        plot_run(tmp_path)
        assert matplotlib.get_backend() == "svg"


def test_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_run(tmp_path, 1, 1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_layer_names_lose_what_all_have_in_common() -> None:
    assert shortened(["model.layers.0.q.default", "model.layers.11.v.default"]) == ["0.q", "11.v"]
    assert shortened(["model.q_proj"]) == ["q_proj"]
    assert shortened(["a", "a.b"]) == ["a", "b"]
