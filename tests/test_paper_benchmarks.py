"""benchmarks/paper: its protocol does what it says, and every experiment runs. Their figures are nobody's test."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

PAPER = ROOT / "benchmarks" / "paper"
sys.path.insert(0, str(PAPER))

import diffusion  # noqa: E402
import eager_generators  # noqa: E402
import factorisation  # noqa: E402
import figures  # noqa: E402
import images  # noqa: E402
import methods  # noqa: E402
import portraits  # noqa: E402
import protocol  # noqa: E402
import run  # noqa: E402
import small_diffusion  # noqa: E402
import text  # noqa: E402
import untuned  # noqa: E402

# ---- the protocol, on trials that are made up ----

TASK = protocol.Task("made up", lambda seed: None, 10, ("q",), 2, 2, lowest_rate=1e-3, rates=3, growth=2, seeds=2)


def made_up(tmp_path: Path, loss: Any, task: protocol.Task = TASK, **settings: Any) -> protocol.Experiment:
    """An experiment whose trials say `loss` of themselves instead of training."""
    plan = {"task": (task, run.methods(methods.LORA, methods.OP_LEAN))}
    experiment = protocol.Experiment("made up", plan, tmp_path / "made-up.json", **settings)

    def run_all(trials: list[protocol.Trial]) -> bool:
        for trial in trials:
            split = "validation" if protocol.is_tuning(trial) else "test"
            numbers = {f"{split}_loss": loss(trial), "train_loss": loss(trial)}
            experiment.rows[trial] = {"kind": "trial", **vars(trial), **numbers}
        experiment.save()
        return True

    experiment.run_all = run_all  # type: ignore[method-assign]
    return experiment


def distance_from(best: float) -> Any:
    return lambda trial: abs(math.log10(trial.lr / best))


def test_rates_are_three_to_a_decade() -> None:
    assert [TASK.rate(i) for i in (-1, 0, 1, 2, 3)] == [4.6e-4, 1e-3, 2.2e-3, 4.6e-3, 1e-2]


def test_best_rate_has_the_least_validation_loss(tmp_path: Path) -> None:
    experiment = made_up(tmp_path, distance_from(2.2e-3))
    assert experiment.run()
    assert [experiment.best_rate("task", m) for m in ("LoRA", "OP-LoRA, lean")] == [2.2e-3, 2.2e-3]


@pytest.mark.parametrize(("best", "found"), [(1e-2, 1e-2), (1e-1, 2.2e-2 * 4.6 / 2.2), (1e-9, 4.6e-5)])
def test_grid_grows_where_the_best_is_at_its_edge_and_ends_somewhere(tmp_path: Path, best: float, found: float) -> None:
    experiment = made_up(tmp_path, distance_from(best))
    experiment.run()
    tuned = experiment.tuned("task", "LoRA")
    assert len(tuned) <= 3 + 2 * 2 and experiment.best_rate("task", "LoRA") in (found, max(map(TASK.rate, tuned)))


def test_losses_that_are_infinite_are_never_best(tmp_path: Path) -> None:
    experiment = made_up(tmp_path, lambda trial: math.inf if trial.lr > 1e-3 else 5.0)
    experiment.run()
    assert experiment.best_rate("task", "LoRA") <= 1e-3


def test_tests_have_seeds_that_tuning_has_not(tmp_path: Path) -> None:
    experiment = made_up(tmp_path, distance_from(2.2e-3))
    experiment.run()
    tuning = {trial.seed for trial in experiment.rows if protocol.is_tuning(trial)}
    tests = {trial.seed for trial in experiment.rows if not protocol.is_tuning(trial)}
    assert tests == {1, 2} and tuning.isdisjoint(tests)


def test_best_is_of_the_mean_over_tuning_seeds(tmp_path: Path) -> None:
    task = protocol.dataclasses.replace(TASK, tuning_seeds=2, growth=0)
    by_seed = {1000: {1e-3: 0.0, 2.2e-3: 1.0, 4.6e-3: 2.0}, 1001: {1e-3: 5.0, 2.2e-3: 1.0, 4.6e-3: 2.0}}
    experiment = made_up(tmp_path, lambda trial: by_seed.get(trial.seed, {}).get(trial.lr, 0.0), task)
    experiment.run()
    assert experiment.best_rate("task", "LoRA") == 2.2e-3


def test_equal_seconds_are_fewer_steps_where_a_step_is_measurably_slower(tmp_path: Path) -> None:
    experiment = made_up(tmp_path, distance_from(2.2e-3), equal_seconds="LoRA")
    names = {"kind": "step time", "task": "task", "method": "OP-LoRA, lean"}
    for ratio, within, steps in ((2.0, 0.1, {10, 5}), (1.1, 0.2, {10})):
        experiment.rows.clear()
        row = {**names, "ratio": ratio, "ratio_20": ratio - within, "ratio_80": ratio + within}
        experiment.ratios = {("task", "OP-LoRA, lean"): row}
        experiment.run()
        assert {trial.steps for trial in experiment.rows if trial.method == "OP-LoRA, lean"} == steps
        assert {trial.steps for trial in experiment.rows if trial.method == "LoRA"} == {10}


def test_steps_are_timed_once_and_all_methods_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def in_own_process(function: Any, task: protocol.Task, some: list[methods.Method], *_: Any) -> dict[str, Any]:
        timed.append([method.name for method in some])
        return {name: {"ratio": 2.0, "ratio_20": 1.9, "ratio_80": 2.1} for name in timed[-1]}

    monkeypatch.setattr(protocol.harness, "in_own_process", in_own_process)
    for _ in range(2):
        assert made_up(tmp_path, distance_from(2.2e-3), equal_seconds="LoRA").run()
    assert timed == [["OP-LoRA, lean"]]


def test_diverged_trainings_are_counted_and_not_averaged() -> None:
    assert protocol.spread([1.0, 3.0]) == "2.000 ± 1.414"
    assert protocol.spread([1.0, math.inf, math.inf]) == "2 of 3 diverged"
    assert protocol.spread([1.0]) == "1.000" and protocol.spread([]) == ""


def test_schedule_warms_up_and_ends_at_nothing() -> None:
    task = protocol.dataclasses.replace(TASK, warmup=0.1)
    rates = [task.schedule(step, 40) for step in range(41)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8] and rates[4] == 1.0 and rates[40] == 0.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert [task.schedule(step, 1) for step in range(2)] == [0.5, 0.0]


def test_curve_ends_at_the_last_step_and_keeps_the_mean() -> None:
    losses = [float(i) for i in range(100)]
    curve = protocol.curve(losses)
    assert len(curve) == protocol.CURVE and curve[-1][0] == 100
    ends = [0, *(end for end, _ in curve)]
    assert sum(mean * (b - a) for (_, mean), a, b in zip(curve, ends, ends[1:], strict=False)) == pytest.approx(4950)


# ---- every experiment runs ----

FEW = {"ablations": ["LoRA", "one MLP for all layers", "line search only", "H = 4"]}
FEW["settings"] = ["LoRA", "keep, H 8", "keep, hidden rate 0.01, latent_std 1"]


@pytest.mark.parametrize("name", run.EXPERIMENTS)
def test_experiment_runs_and_is_not_run_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "language":
        pytest.importorskip("lora_pro")
        pytest.importorskip("pytorch_optimizer")
    command = [name, "--quick", "--workers", "2", "--output", str(tmp_path / f"{name}.json")]
    command += ["--methods", *FEW[name]] if name in FEW else []
    experiment = run.main(command)
    rows = json.loads(experiment.output.read_text())
    assert {(row["task"], row["method"]) for row in rows if row["kind"] == "trial"} == set(experiment.pairs())
    assert all(row["test_loss"] > 0 for row in rows if row["kind"] == "trial" and row["seed"] < 1000)
    printed = capsys.readouterr().out
    monkeypatch.setattr(protocol.Experiment, "run_all", lambda *_: pytest.fail("a trial was run again"))
    run.main(command)
    assert capsys.readouterr().out == printed


def test_run_that_is_out_of_time_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["images", "--quick", "--methods", "LoRA", "--output", str(tmp_path / "images.json")]
    run.main([*command, "--minutes", "0"])
    assert "not yet all of them" in capsys.readouterr().out


def test_unknown_method_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["images", "--methods", "LoRa"])
    assert "no method LoRa; there are: LoRA; " in capsys.readouterr().err


def test_training_that_diverges_has_infinite_losses() -> None:
    trial = protocol.Trial("toy", "LoRA", 1e30, 1000, 6)
    row = protocol.run(trial, run.TOYS["images"], methods.LORA, "cpu", 1)
    assert row["validation_loss"] == row["train_loss"] == math.inf and row["diverged_at"] < 6


# ---- without a choice of rates ----

PACKAGES = ("prodigyopt", "prodigyplus", "schedulefree", "adv_optm", "dadaptation", "pytorch_optimizer")
TOY_IMAGES = untuned.toys()["toy images"][0]


def test_untuned_runs_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    command = ["--quick", "--workers", "2", "--output", str(tmp_path / "untuned.json")]
    experiment = untuned.main(command)
    rows = json.loads(experiment.output.read_text())
    assert {(row["task"], row["method"]) for row in rows} == set(experiment.pairs())
    tests = [row for row in rows if row["seed"] < 1000]
    assert all(0 < row["best_test_loss"] < math.inf and row["test_loss"] > 0 for row in tests)
    assert all(row["best_validation_loss"] <= row["validation_loss"] for row in rows)
    assert not any("test_loss" in row for row in rows if row["seed"] >= 1000)
    printed = capsys.readouterr().out
    monkeypatch.setattr(protocol.Experiment, "run_all", lambda *_: pytest.fail("a trial was run again"))
    untuned.main(command)
    assert capsys.readouterr().out == printed


def test_untuned_out_of_time_says_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untuned.main(["--quick", "--output", str(tmp_path / "untuned.json"), "--minutes", "0"])
    assert "0 trials" in capsys.readouterr().out


def trained(lr: float, steps: int, method: methods.Method = untuned.TUNED, checkpoints: int = 5) -> dict[str, Any]:
    task = protocol.dataclasses.replace(TOY_IMAGES, checkpoints=checkpoints)
    return untuned.run(protocol.Trial("toy images", method.name, lr, 1, steps), task, method, "cpu", 1)


def test_best_checkpoint_is_what_a_training_that_ended_there_comes_to() -> None:
    long = trained(0.1, 50)
    assert long["best_step"] == min(long["validation_curve"], key=lambda point: point[1])[0] < 50
    short = trained(0.1, long["best_step"], checkpoints=1)
    assert short["test_loss"] == long["best_test_loss"] != long["test_loss"]
    assert short["validation_loss"] == long["best_validation_loss"]


def test_training_that_diverges_keeps_its_best_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    step = protocol.Training.step
    losses: list[float] = []

    def until_the_eighth(training: protocol.Training) -> float:
        losses.append(step(training) if len(losses) < 8 else math.inf)
        return losses[-1]

    monkeypatch.setattr(protocol.Training, "step", until_the_eighth)
    row = trained(1e-3, 10)
    assert row["diverged_at"] == 8 and row["test_loss"] == row["validation_loss"] == math.inf
    assert row["best_step"] <= 8 and row["best_test_loss"] < math.inf


def test_schedule_free_weights_are_averaged_to_be_measured_and_not_to_be_trained() -> None:
    pytest.importorskip("schedulefree")
    (method,) = (method for method in untuned.METHODS if method.name == "schedule-free AdamW")
    training = protocol.Training.of(TOY_IMAGES, method, 0.1, 1, "cpu")
    for _ in range(5):
        training.step()
    parameters = protocol.trainable(training.model)
    trains = [p.detach().clone() for p in parameters]
    with untuned.averaged(training.optimizer):
        assert not all(map(torch.equal, trains, parameters))
    for before, after in zip(trains, parameters, strict=True):
        torch.testing.assert_close(before, after)
    training.step()


def test_schedule_free_rates_are_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = {}

    def run(trial: protocol.Trial, task: protocol.Task, *_: Any) -> dict[str, Any]:
        schedules[trial.method] = [task.schedule(step, 10) for step in range(10)]
        return {}

    monkeypatch.setattr(protocol, "run", run)
    task = protocol.dataclasses.replace(TOY_IMAGES, warmup=0.1)
    for method in (untuned.TUNED, *untuned.METHODS):
        untuned.run(protocol.Trial("toy", method.name, 1.0, 1, 10), task, method, "cpu", 1)
    constant = {name for name, schedule in schedules.items() if schedule == [1.0] * 10}
    assert constant == {"Prodigy plus schedule-free", "schedule-free AdamW"}


def test_both_grids_are_one() -> None:
    task = untuned.Interleaved.of(TASK, 1, 4)
    assert [task.rate(i) for i in range(-2, 4)] == [1e-3, 1.7e-3, 2.2e-3, 3.7e-3, 4.6e-3, 7.8e-3]


def test_language_models_are_tuned_around_their_best_known_rates() -> None:
    experiment = figures.read("language")
    for name in ("small", "reference", "glosses"):
        task = untuned.TASKS[name]
        rates = {task.rate(index) for index in range(task.rates)}
        for method, factor in ((methods.LORA.name, 1), (methods.LORA_FASTER.name, methods.BETWEEN)):
            best = protocol.best_index(experiment.tuned(name, method))
            grid = experiment.plan[name][0]
            around = {float(f"{factor * grid.rate(best + step):.2g}") for step in (-1, 0, 1)}
            assert around <= rates, (name, method)


def test_tests_go_by_seeds_and_every_method_has_its_own_rate(tmp_path: Path) -> None:
    task = protocol.dataclasses.replace(TOY_IMAGES, seeds=3)
    plan = {"task": (task, run.methods(untuned.TUNED, *untuned.METHODS, untuned.AUTO))}
    experiment = untuned.UntunedExperiment("made up", plan, tmp_path / "made-up.json")
    asked: list[protocol.Trial] = []

    def run_all(trials: list[protocol.Trial]) -> bool:
        asked.extend(trials)
        for trial in trials:
            experiment.rows[trial] = {"kind": "trial", **vars(trial), "best_validation_loss": trial.lr, "test_loss": 1}
        return True

    experiment.run_all = run_all  # type: ignore[method-assign]
    assert experiment.run()
    assert {trial.method for trial in asked if protocol.is_tuning(trial)} == {untuned.TUNED.name}
    tests = [trial for trial in asked if not protocol.is_tuning(trial)]
    seeds = [trial.seed for trial in tests if trial.lr not in untuned.FLATNESS_RATES]
    assert seeds == sorted(seeds) and set(seeds) == {1, 2, 3}
    rates = {method.name: {t.lr for t in tests if t.method == method.name} for method in untuned.METHODS}
    assert rates == {method.name: {method.lr} for method in untuned.METHODS}
    ours = {t.lr for t in tests if t.method == untuned.AUTO.name}
    assert ours == {untuned.AUTO.lr, *untuned.FLATNESS_RATES}


# ---- what is compared ----


def test_methods_share_data_order_and_start() -> None:
    rows = []
    for method in (methods.LORA, methods.START_KEPT):
        training = protocol.Training.of(run.TOYS["images"], method, 1e-3, 3, "cpu")
        rows.append([training.problem.loss(training.model).item(), *map(float, next(training.problem.order)[:5])])
    assert rows[0] == rows[1]


def test_lora_between_the_rates_of_the_grid_is_between_them() -> None:
    (group,) = methods.LORA_FASTER.optimizer(make_model(), TASK.rate(0), 0).param_groups
    assert TASK.rate(0) < group["lr"] < TASK.rate(1)


def test_pairs_are_in_the_order_that_lora_rite_asks_for() -> None:
    model = make_model()
    names = {id(p): name for name, p in model.named_parameters()}
    (group,) = methods.lora_rite(model, 1e-3, seed=0).param_groups
    ordered = [names[id(p)] for p in group["params"]]
    assert [name.split("lora_")[1][0] for name in ordered] == ["A", "B", "A", "B"]
    assert [name.replace("lora_A", "lora_B") for name in ordered[::2]] == ordered[1::2]


def displacement(only: str | None, lr: float) -> Tensor:
    """Of A and B in the second of two SGD steps, of which the first is common to all."""
    model = make_model(torch.float64)
    optimizer = eager_generators.EagerOPLoRA(
        model, 0.1, optimizer=torch.optim.SGD, hidden_width=8, latent_width=5, latent_std=1.0
    )
    for generator, z, _ in optimizer.jobs:
        generator.double()
        z.data = z.data.double()
    optimizer.write()
    x = torch.ones(4, 13, dtype=torch.float64)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()

    step()
    before = torch.cat([p.detach().flatten() for p in optimizer.factors])
    optimizer.only = only
    for group in optimizer.param_groups:
        group["lr"] = lr
    step()
    return torch.cat([p.detach().flatten() for p in optimizer.factors]) - before


def test_trainable_rate_and_line_search_make_up_the_step() -> None:
    lr = 1e-5
    whole, rate, line = (displacement(only, lr) for only in (None, "trainable rate", "line search"))
    assert min(rate.norm(), line.norm()) > 1e-3 * whole.norm()
    assert (whole - rate - line).norm() < 1e-3 * line.norm()  # to first order in lr


@pytest.mark.parametrize("frozen", [("z",), ("W2",), ("z", "W1", "c1")])
def test_frozen_parameters_stay(frozen: tuple[str, ...]) -> None:
    model = make_model()
    optimizer = eager_generators.EagerOPLoRA(model, 1e-2, frozen=frozen)
    generator, z, _ = optimizer.jobs[0]
    parameters = {"z": z, **dict(generator.named_parameters())}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 13)).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    assert moved == {"z", "W1", "c1", "W2", "c2"} - set(frozen)


def test_shared_generator_serves_layers_of_every_size() -> None:
    model = make_model()
    optimizer = eager_generators.EagerOPLoRA(model, 1e-2, share="model")
    assert len({id(generator) for generator, _, _ in optimizer.jobs}) == 1
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 13)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("zero_start", [False, True])
def test_kept_start_stays_to_the_rounding(zero_start: bool) -> None:
    model = make_model()
    before = [p.detach().clone() for p in methods.trainable(model)]
    eager_generators.EagerOPLoRA(model, 1e-2, keep=True, zero_start=zero_start, latent_std=1.0)
    for old, new in zip(before, methods.trainable(model), strict=True):
        assert torch.allclose(old, new, atol=1e-6)


# ---- what they are compared on ----


def test_factorisation_of_the_svd_is_the_optimum() -> None:
    problem = factorisation.Factorisation(0, n=12, r=3)
    U, S, V = torch.linalg.svd(problem.M)
    best = U[:, :3] * S[:3] @ V[:3]
    optimum = nn.Linear(12, 12, bias=False)
    optimum.weight.data = best
    assert problem.loss(optimum).item() == pytest.approx(1, abs=1e-5)
    assert factorisation.effective_rank(torch.tensor([2.0, 2.0, 0.0])) == pytest.approx(2)


def test_epoch_has_every_image_at_most_once() -> None:
    order = images.batches(1000, seed=1)
    epoch = torch.cat([next(order) for _ in range(1000 // images.BATCH)])
    assert len(epoch.unique()) == len(epoch) == 896


def test_splits_of_texts_are_disjoint() -> None:
    blocks = torch.arange(200).view(100, 2)
    parts = text.split_blocks(blocks, 10, 20)
    assert [len(part) for part in parts.values()] == [70, 10, 20]
    assert len(torch.cat(list(parts.values())).unique()) == 200


def test_splits_of_glosses_are_by_a_hash() -> None:
    splits = [text.split_of(f"{i:08d}") for i in range(4000)]
    shares = [splits.count(name) / 4000 for name in ("train", "validation", "test")]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.02)


def test_faces_are_known_by_their_subgroup() -> None:
    listed = (
        "# group: Smileys & Emotion\n# subgroup: face-smiling\n1F600 ; fully-qualified # x E1.0 grinning face\n"
        "263A ; unqualified # x E0.6 smiling face\n# subgroup: heart\n2764 FE0F ; fully-qualified # x E0.6 red heart\n"
    )
    assert portraits.subgroups(listed) == {0x1F600: "face-smiling", 0x2764: "heart"}


def toy_gpt2() -> tuple[nn.Module, text.Texts]:
    return text.new_gpt2(2, 32), text.toy_on_counting()[1]


@pytest.mark.parametrize("name", ["portraits", "other model"])
@pytest.mark.parametrize("method", [untuned.TUNED, untuned.METHODS[-1]], ids=lambda method: method.name)
def test_what_confirms_is_trained_by_plain_lora_and_by_ours(name: str, method: methods.Method) -> None:
    toys = {"portraits": portraits.TOY, "other model": lambda seed: text.Blocks(seed, toy_gpt2, 2)}
    task = protocol.dataclasses.replace(untuned.CONFIRMING[name], make=toys[name], steps=4, checkpoints=2)
    row = untuned.run(protocol.Trial(name, method.name, 1e-2, 1, 4), task, method, "cpu", 1)
    assert row["best_step"] and 0 < row["best_test_loss"] < math.inf
    assert [steps for steps, _ in row["validation_curve"]] == [2, 4]


def test_noise_and_timesteps_of_measured_pictures_are_always_the_same() -> None:
    problems = [portraits.TOY(seed) for seed in (1, 2)]
    losses = [problem.measure(problem.base, "test")["loss"] for problem in problems]
    assert losses[0] == losses[1] and problems[0].loss(problems[0].base) != problems[1].loss(problems[1].base)


# ---- the diffusion model ----


@pytest.fixture(scope="module")
def diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `small_diffusion.py pictures` leaves it, with noise for pictures."""
    folder = tmp_path_factory.mktemp("diffusion")
    noise = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    captions = np.array([f"drawing {n}" for n in range(200)])
    np.savez_compressed(folder / "cliparts.npz", pictures=noise, captions=captions)
    for split, count in {"train": 12, "test": 3}.items():
        (folder / "emoji" / split).mkdir(parents=True)
        for n in range(count):
            Image.fromarray(noise[n]).save(folder / "emoji" / split / f"{n}.png")
        lines = [json.dumps({"file_name": f"{n}.png", "text": f"emoji of {n}"}) for n in range(count)]
        (folder / "emoji" / split / "metadata.jsonl").write_text("\n".join(lines))
    small_diffusion.main(["pretrain", "--quick", "--folder", str(folder), "--device", "cpu"])
    return folder


def test_small_diffusion_is_a_pipeline_whose_latents_have_no_variance(diffusion_folder: Path) -> None:
    """Its U-Net knows the means alone: a training on samples would learn to undo their noise."""
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_folder / "model", dtype=torch.float32)
    latents = pipeline.vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latent_dist
    torch.testing.assert_close(latents.sample(), latents.mode(), rtol=0, atol=1e-5)
    assert pipeline.tokenizer("Emoji of 7!").input_ids[0] == pipeline.tokenizer.bos_token_id


def test_loss_of_the_example_and_of_the_benchmark_are_of_the_same_thing(diffusion_folder: Path, tmp_path: Path) -> None:
    """On the same pictures, each with noise of its own."""
    model, emoji = str(diffusion_folder / "model"), str(diffusion_folder / "emoji")
    args = diffusion.parse_arguments(["--model", model, "--emoji", emoji])
    args.device = "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    theirs = diffusion.test_loss(pipeline, *diffusion.test_pictures(args), args)
    sys.path.insert(0, str(diffusion.EXAMPLES))
    import finetune_diffusion

    flags = "--method lora --lr 1e-9 --steps 1 --held-out-fraction 0.6 --held-out-draws 16 --checkpointing-steps 0"
    where = ["--model", str(args.model), "--data", str(args.emoji / "test"), "--output", str(tmp_path)]
    ours, _ = finetune_diffusion.train(finetune_diffusion.parse_arguments(where + flags.split()))
    assert ours["held_out_loss"][0][1] == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("method", ["LoRA", "OP-DoRA"])
def test_training_of_diffusion_is_measured_from_the_file_that_it_saved(
    method: str, diffusion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "features", lambda pictures, device: pictures.float().flatten(1))
    where = ["--model", str(diffusion_folder / "model"), "--emoji", str(diffusion_folder / "emoji")]
    args = diffusion.parse_arguments(["--quick", *where, "--output", str(tmp_path / "it.json"), "--device", "cpu"])
    row = diffusion.train(method, 1e-2, 1, args)
    assert row.keys() >= {"train_loss", "held_out_loss", "test_loss", "mmd"} and math.isfinite(row["mmd"])
    assert row["test_loss"] != diffusion.measure(None, args)["test_loss"]


def test_diffusions_lora_between_the_rates_is_lora_at_another(diffusion_folder: Path, tmp_path: Path) -> None:
    where = ["--model", str(diffusion_folder / "model"), "--emoji", str(diffusion_folder / "emoji")]
    args = diffusion.parse_arguments(["--quick", *where, "--output", str(tmp_path / "it.json"), "--device", "cpu"])
    between = diffusion.train(methods.LORA_FASTER.name, 1e-2, diffusion.TUNING_SEED, args)
    at_that_rate = diffusion.train("LoRA", 1.7e-2, diffusion.TUNING_SEED, args)
    assert between["lr"] == 1e-2 and between["held_out_loss"] == at_that_rate["held_out_loss"]


def test_best_rate_of_diffusion_is_chosen_by_the_seed_that_tunes_alone() -> None:
    def row(lr: float, seed: int, loss: float) -> dict:
        return {"method": "LoRA", "lr": lr, "seed": seed, "held_out_loss": loss}

    rows = [row(1e-3, 0, 0.2), row(1e-2, 0, 0.1), row(1e-1, 0, math.inf), row(1e-3, 1, 0.01)]
    others = [method for method in diffusion.METHODS if method != "LoRA"]
    rows += [{**one, "method": method, "held_out_loss": -one["lr"]} for one in rows[:3] for method in others]
    assert diffusion.best_rates(rows) == {"LoRA": 1e-2} | dict.fromkeys(others, 1e-1)


def test_diffusion_is_tuned_on_three_rates_a_decade_over_two_and_two_thirds() -> None:
    plan = list(diffusion.plan(None))
    for method in diffusion.METHODS:
        rates = [lr for name, lr, seed in plan if name == method and seed == diffusion.TUNING_SEED]
        assert len(rates) == 9 and rates[-1] / rates[0] == pytest.approx(10 ** (8 / 3), rel=0.05)


# ---- figures and tables ----


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Of the images' toys, under the names of the real tasks."""
    experiment = run.main(
        ["images", "--quick", "--methods", "LoRA", "OP-LoRA, lean", "--output", str(tmp_path / "quick" / "images.json")]
    )
    rows = json.loads(experiment.output.read_text())
    task = run.rotations()["digits"][0]
    made = []
    for row in rows:
        seeds = range(1000, 1003) if row["seed"] >= 1000 else [row["seed"]]
        for seed in seeds:
            for index in range(task.rates) if row["seed"] >= 1000 else [0]:
                lr = task.rate(index)
                loss = {"validation_loss": row.get("validation_loss", 0) + index} if seed >= 1000 else {}
                made.append({**row, **loss, "task": "digits", "lr": lr, "seed": seed, "steps": task.steps})
    (tmp_path / "images.json").write_text(json.dumps(made))
    return tmp_path


def test_tables_and_figures_come_from_the_files_alone(results: Path) -> None:
    made = figures.tables("images", results)
    assert made.keys() == {f"images/{key}" for key in ("budget", "digits", "digits/rates", "digits/training")}
    (line,) = (line for line in made["images/digits"].splitlines() if line.startswith("| OP-LoRA, lean |"))
    assert re.match(r"\| OP-LoRA, lean \| 0\.0001 \| \d\.\d{3} ± \d\.\d{3} \| ", line)
    figures.main(["--results", str(results)])
    assert (results / "images.png").stat().st_size > 10_000


def test_untuned_tables_are_of_what_is_there(tmp_path: Path) -> None:
    task = untuned.TASKS["digits"]
    experiment = untuned.UntunedExperiment("untuned", untuned.plan(), tmp_path / "untuned.json")
    best = {"best_step": 30, "steps": task.steps, "held_bytes": 12, "adapter_numbers": 1, "seconds": 1, "threads": 1}

    def row(method: str, lr: float, seed: int, loss: float) -> dict[str, Any]:
        numbers = {f"{best}{split}_loss": loss for best in ("", "best_") for split in ("validation", "test")}
        trial = {"kind": "trial", "task": "digits", "method": method, "lr": lr, "seed": seed, "device": "a CPU"}
        return {**best, **trial, **numbers, "train_loss": loss}

    grid = [task.rate(index) for index in range(task.rates)]
    tuning = [row(untuned.TUNED.name, lr, seed, abs(lr - 0.01)) for lr in grid for seed in (1000, 1001, 1002)]
    tests = [row(untuned.TUNED.name, 0.01, seed, float(seed)) for seed in (1, 2, 3)]
    tests += [row("AdamW 1e-4", 1e-4, seed, seed + 0.5) for seed in (1, 2)]
    protocol.harness.write_rows(experiment.output, tuning + tests)
    made = figures.tables("untuned", tmp_path)
    assert made.keys() == {f"untuned/{key}" for key in ("budget", "end", "best", "short", "digits")}
    assert "| AdamW 1e-4 | +0.500 (+0.5) |" in made["untuned/best"]
    assert "| AdamW 1e-4 | 0.0001 | 2 | 2.000 ± 0.707 | 2.000 ± 0.707 | 5% | 16 |" in made["untuned/digits"]
    figures.main(["--results", str(tmp_path)])
    assert (tmp_path / "untuned.png").stat().st_size > 5_000
    assert (tmp_path / "untuned_rates.png").stat().st_size > 5_000
    (comparison,) = figures.comparisons(figures.read("untuned", tmp_path))
    rates, losses = comparison.lora_curve()
    assert rates == [1e-4, *grid]
    assert losses[0] == 2.0 and losses[rates.index(0.01)] == 2.0  # of the seeds that test
    assert losses[rates.index(0.001)] == pytest.approx(0.009)  # of those that tune


def test_controls_rates_have_the_schedules_share_once() -> None:
    task = dataclasses.replace(untuned.toys()["toy images"][0], warmup=0.0)
    trial = protocol.Trial("toy images", untuned.CONTROL.name, 1.0, 1, task.steps)
    training = protocol.Training.of(task, untuned.AUTO, 1.0, 1, "cpu")
    scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: task.schedule(step, task.steps))
    for step, rate in enumerate(untuned.found_rates(trial, task, "cpu")):
        training.step()
        found = float(training.optimizer._stepper.found[0])
        assert rate == pytest.approx(found * task.schedule(step, task.steps), rel=1e-12)
        scheduler.step()


def test_control_steps_at_the_rates_that_were_found() -> None:
    task = untuned.toys()["toy images"][0]
    rates = untuned.found_rates(protocol.Trial("toy images", untuned.CONTROL.name, 1.0, 1, task.steps), task, "cpu")
    assert len(rates) == task.steps and rates[0] == 1e-4 and max(rates) > 1e-4
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = untuned.AtRates([p], rates)
    for rate in rates:
        p.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate


MARKER = re.compile(rf"<!-- ((?:{'|'.join(figures.FIGURES)})/[\w/ ,]+):begin -->")


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return {name: table for experiment in figures.FIGURES for name, table in figures.tables(experiment).items()}


@pytest.mark.parametrize("page", ["README.md", "docs/evidence_tables.md", "docs/rate.md", "docs/diffusion.md"])
def test_page_has_the_tables_of_the_committed_results(page: str, tables: dict[str, str]) -> None:
    written = (ROOT / page).read_text()
    named = MARKER.findall(written)
    assert named and set(named) <= tables.keys()
    for name in named:
        assert tables[name] in written, name


def test_numbers_of_the_claims_are_those_of_the_tables() -> None:
    page = (ROOT / "docs/evidence_tables.md").read_text()
    _, claims, after = re.split(r"\n## (?=The paper's claims|At the best rate)", page)
    in_full = [line.split(" | ")[2] for line in claims.splitlines() if line.startswith("| ")][2:]
    in_short = [line for line in (ROOT / "docs/evidence.md").read_text().splitlines() if line.startswith("| ")]
    for lines in (in_full, in_short):
        numbers = re.findall(r"\d+\.\d{3,}|\d\.\de-\d+", " ".join(lines))
        assert len(numbers) > 20
        assert not [number for number in numbers if number not in after]
