"""examples/finetune_diffusion.py as a user runs it, on tiny pipelines with random weights and a few pictures."""

import gc
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES, encode, predict

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_diffusion.py"
sys.path.insert(0, str(SCRIPT.parent))  # as for who runs it: the modules beside it are found
import diffusion_pictures  # noqa: E402

PICTURES = 7
STEPS = 6
CHECKPOINT = 4
QUIET = ("--checkpointing-steps", "0")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_diffusion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    gc.collect()
    gc.freeze()  # what is imported by now need not be searched after every training
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline's folder of each architecture, and one that predicts v."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: make() for name, make in PIPELINES.items()} | {"v": PIPELINES["sd"]("v_prediction")}
    return {name: tiny_pipelines.save(pipeline, folder / name) for name, pipeline in made.items()}


def write_picture(path: Path, seed: int, size: tuple[int, int] = (20, 17)) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(PICTURES):
        write_picture(folder / f"{i}.png", seed=i)
        rows.append({"file_name": f"{i}.png", "text": f"picture {'abcdefg'[i]}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def flags(model: Path, data: Path, output: Path, *more: object) -> list[str]:
    values = ["--model", model, "--data", data, "--output", output, "--resolution", 16, "--steps", STEPS]
    values += ["--lr", 1e-2, "--r", 2, "--held-out-fraction", 0.3, "--held-out-draws", 2, "--eval-steps", 3]
    values += ["--checkpointing-steps", CHECKPOINT, "--inference-steps", 1, "--max-sequence-length", 12]
    return [str(value) for value in (*values, *more)]


Train = Callable[..., tuple[dict[str, Any], Any]]


@pytest.fixture
def train(script: ModuleType, models: dict[str, Path], data: Path, tmp_path: Path) -> Train:
    """Runs the script in this process; returns what is in losses.json, and the pipeline that was trained."""

    def train(*more: object, model: str = "sd", data: Path = data, output: Path = tmp_path / "run") -> Any:
        args = script.parse_arguments(flags(models[model], data, output, *more))
        record, architecture = script.train(args)
        return record, architecture.pipeline

    return train


@pytest.fixture(scope="module")
def plain(
    script: ModuleType, models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Any, Path]:
    """What a run with the settings of `flags` gives, and where its results are: many tests compare with it."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    record, architecture = script.train(script.parse_arguments(flags(models["sd"], data, folder)))
    return record, architecture.pipeline, folder


@pytest.fixture(scope="module")
def output(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run leaves; its standard output is in stdout.txt."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    wanted = ["--validation-prompt", "a harbour", "--num-validation-images", 3, "--validation-steps", 4, "--kohya"]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *flags(models["sd"], data, folder, *wanted)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def losses(output: Path) -> dict[str, Any]:
    return json.loads((output / "losses.json").read_text())


# ---- what comes out ----


def test_run_writes_losses_adapters_and_pictures(output: Path) -> None:
    record = losses(output)
    assert len(record["train_loss"]) == len(record["learning_rate"]) == STEPS
    assert [step for step, _ in record["held_out_loss"]] == [0, 3, STEPS]
    assert record["pictures"] == {"train": 4, "held_out": 3}
    assert {"python", "oplora", "torch", "diffusers", "peft"} <= record["versions"].keys()
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in output.iterdir()} == {
        *("stdout.txt", "losses.json", "loss.png", "monitor.jsonl", "pictures", f"checkpoint-{CHECKPOINT}"),
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"),
    }


def test_validation_draws_a_grid_at_intervals_and_at_the_end(output: Path) -> None:
    grids = sorted((output / "pictures").iterdir())
    assert [p.name for p in grids] == ["step-000004.png", "step-000006.png"]
    for path in grids:
        with Image.open(path) as grid:
            assert grid.size == (32, 32)  # three pictures and a blank


def test_file_holds_lora_of_the_denoiser_alone(output: Path) -> None:
    names = load_file(output / "pytorch_lora_weights.safetensors")
    assert {name.split(".")[0] for name in names} == {"unet"}
    assert {name.split(".")[-2] for name in names} == {"lora_A", "lora_B"}


def test_twenty_steps_learn_a_single_picture(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    Image.new("RGB", (16, 16), (200, 30, 60)).save(folder / "red.png")
    fixed = ("--caption", "red", "--held-out-fraction", 0, "--steps", 20, "--batch-size", 4, *QUIET)
    record, _ = train(*fixed, data=folder)
    assert np.mean(record["train_loss"][-5:]) < np.mean(record["train_loss"][:5])


FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import encode, predict

for line in sys.argv[2:]:
    model, adapter, target = line.split("|")
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(adapter)
    torch.save([predict(pipeline), encode(pipeline)], target)
assert "oplora" not in sys.modules
"""
TRAININGS = {
    "sd": ("sd", "--train-text-encoder"),
    "sd-paper": ("sd", "--train-text-encoder", "--preset", "paper"),
    "sdxl": ("sdxl", "--train-text-encoder", "--dora", "--preset", "flat"),
    "flux": ("flux", "--train-text-encoder", "--lora-alpha", 3),
}


@pytest.fixture(scope="module")
def trained_and_loaded(
    script: ModuleType, models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[torch.Tensor]], Path]:
    """Outputs of each of TRAININGS after 20 steps, and a folder with those of diffusers alone, in a fresh process,
    from the file that the training wrote and from its last checkpoint."""
    folder = tmp_path_factory.mktemp("round-trip")
    trained, lines = {}, []
    for name, (model, *more) in TRAININGS.items():
        wanted = (*more, "--steps", 20, "--held-out-fraction", 0, "--checkpointing-steps", 20)
        args = script.parse_arguments(flags(models[model], data, folder / name, *wanted))
        pipeline = script.train(args)[1].pipeline
        trained[name] = [predict(pipeline), encode(pipeline)]
        for source in ("", "/checkpoint-20"):
            target = folder / f"{name}{source.replace('/', '-')}.pt"
            lines.append(f"{models[model]}|{folder}/{name}{source}|{target}")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(Path(__file__).parent), *lines]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return trained, folder


@pytest.mark.parametrize("source", ["", "-checkpoint-20"])
@pytest.mark.parametrize("name", TRAININGS)
def test_file_in_diffusers_alone_gives_the_output_of_the_training(
    trained_and_loaded: tuple[dict[str, list[torch.Tensor]], Path], name: str, source: str
) -> None:
    trained, loaded = trained_and_loaded[0][name], torch.load(trained_and_loaded[1] / f"{name}{source}.pt")
    base = PIPELINES[TRAININGS[name][0]]()
    for mine, theirs, before in zip(trained, loaded, (predict(base), encode(base)), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-6 * mine.abs().max().item())
        assert (mine - before).abs().max() > 1e-3


# ---- both methods ----


def test_methods_share_pictures_noise_and_start(train: Train, plain: Any) -> None:
    lora, oplora = train("--method", "lora", *QUIET)[0], plain[0]
    assert lora["train_loss"][0] == oplora["train_loss"][0]
    assert lora["held_out_loss"][0] == oplora["held_out_loss"][0]
    assert lora["train_loss"][-1] != oplora["train_loss"][-1]
    assert lora["trained_parameters"] == oplora["trained_parameters"]


def test_rate_is_found_whatever_lr_is(train: Train, plain: Any, tmp_path: Path) -> None:
    other, _ = train("--lr", 2.0, *QUIET)
    found = plain[0]["found_lr"]
    assert len(found) == STEPS and min(found) > 0 and found[-1] != found[0]
    assert other["found_lr"] == found and other["train_loss"] == plain[0]["train_loss"]
    lora, _ = train("--method", "lora", "--steps", 1, *QUIET, output=tmp_path / "lora")
    assert "found_lr" not in lora


def test_defaults_of_rate_and_betas_are_the_presets(script: ModuleType) -> None:
    def chosen(*more: str) -> tuple[float | None, float, tuple[float, float]]:
        args = script.parse_arguments(["--model", "m", "--data", "d", *more])
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), LoraConfig(r=1, target_modules=["0"]))
        group = script.make_optimizer(model, args).param_groups[0]
        return args.lr, group["lr"], tuple(group["betas"])

    assert chosen() == (None, 1.0, (0.9, 0.99))
    assert chosen("--method", "lora") == chosen("--preset", "paper") == (1e-4, 1e-4, (0.9, 0.999))
    assert chosen("--betas", "0.8", "0.9")[2] == (0.8, 0.9)


@pytest.mark.parametrize("more", [("--hidden-width", "8"), ("--oplora-state", "lean")])
def test_preset_that_finds_its_rate_refuses_what_belongs_to_others(
    script: ModuleType, capsys: pytest.CaptureFixture[str], more: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit):
        script.parse_arguments(["--model", "m", "--data", "d", *more])
    assert f"{more[0]} is for --preset paper and flat" in capsys.readouterr().err


def test_held_out_loss_depends_on_its_own_seed_alone(train: Train, plain: Any, tmp_path: Path) -> None:
    other, _ = train("--steps", 1, "--seed", 2, *QUIET)
    assert other["held_out_loss"][0] == plain[0]["held_out_loss"][0]
    assert other["train_loss"][0] != plain[0]["train_loss"][0]
    third, _ = train("--steps", 1, "--seed-held-out", 3, *QUIET, output=tmp_path / "third")
    assert third["held_out_loss"][0] != plain[0]["held_out_loss"][0]


# ---- settings ----


def test_uncached_training_has_the_losses_of_the_cached(train: Train, plain: Any) -> None:
    uncached, _ = train("--no-cache-latents", "--no-cache-text", *QUIET)
    assert uncached["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=1e-5)
    assert uncached["held_out_loss"][-1] == pytest.approx(plain[0]["held_out_loss"][-1], rel=1e-5)


def test_accumulation_gives_the_losses_of_the_whole_batch(train: Train, tmp_path: Path) -> None:
    fixed = ("--held-out-fraction", 0, "--target-modules", "to_q", *QUIET)  # Flux has no dropout
    whole, _ = train("--batch-size", 4, *fixed, model="flux")
    split, _ = train("--batch-size", 2, "--grad-accumulation", 2, *fixed, model="flux", output=tmp_path / "split")
    assert split["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)


def test_gradient_checkpointing_changes_no_loss(train: Train, plain: Any) -> None:
    without, _ = train("--no-gradient-checkpointing", *QUIET)
    assert without["train_loss"] == plain[0]["train_loss"]


@pytest.fixture
def _another_precision() -> Iterator[None]:
    """accelerate keeps the precision for the life of the process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("_another_precision")
def test_bfloat16_base_trains_a_float32_adapter(train: Train) -> None:
    record, pipeline = train("--mixed-precision", "bf16", "--validation-prompt", "abc", *QUIET, model="sdxl")
    dtypes = {("lora_" in name, p.dtype) for name, p in pipeline.unet.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert record["precision"] == "bf16"
    assert all(np.isfinite(record["train_loss"]))


def test_random_crops_and_flips_train_with_workers(train: Train) -> None:
    record, _ = train("--random-crop", "--random-flip", "--workers", 1, "--max-grad-norm", 0, *QUIET, model="sdxl")
    assert record["settings"]["cache_latents"] is False
    assert all(np.isfinite(record["train_loss"]))


# ---- noise, targets and weights ----


@pytest.fixture
def architecture(script: ModuleType, models: dict[str, Path], data: Path) -> Callable[..., Any]:
    def architecture(model: str, *more: object) -> Any:
        args = script.parse_arguments(flags(models[model], data, Path("unused"), *more))
        return script.load_pipeline(args, torch.float32)

    return architecture


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.4, 0.999])


@pytest.mark.parametrize("model", ["sd", "v"])
def test_target_and_noisy_latents_give_the_latents_back(architecture: Callable[..., Any], model: str) -> None:
    latents, noise, u = samples()
    made = architecture(model)
    noisy, target, timesteps = made.noised(latents, noise, u)
    assert timesteps.tolist() == [0, 400, 999]
    a = made.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    found = a.sqrt() * noisy - (1 - a).sqrt() * target if model == "v" else (noisy - (1 - a).sqrt() * target) / a.sqrt()
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal", "shift"])
def test_flux_goes_straight_from_latents_to_noise(architecture: Callable[..., Any], sampling: str) -> None:
    latents, noise, u = samples()
    noisy, velocity, sigma = architecture("flux", "--timestep-sampling", sampling).noised(latents, noise, u)
    assert ((sigma > 0) & (sigma < 1)).all() and (sigma.diff() > 0).all()
    torch.testing.assert_close(noisy - sigma.view(-1, 1, 1, 1) * velocity, latents, rtol=1e-4, atol=1e-4)


def test_flux_logit_normal_has_its_median_at_one_half_and_shift_above(architecture: Callable[..., Any]) -> None:
    half = torch.tensor([0.5])
    assert architecture("flux")._sigma(half, 4096).item() == pytest.approx(0.5)
    assert architecture("flux", "--timestep-sampling", "shift")._sigma(half, 4096).item() > 0.7


@pytest.mark.parametrize("model", ["sd", "v"])
def test_min_snr_weights_are_those_of_the_formula(architecture: Callable[..., Any], model: str) -> None:
    made = architecture(model, "--snr-gamma", 5)
    timesteps = torch.tensor([0, 400, 999])
    a = made.scheduler.alphas_cumprod[timesteps].double()
    snr = a / (1 - a)
    wanted = snr.clamp(max=5) / (snr + (model == "v"))
    torch.testing.assert_close(made.weights(timesteps).double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model", ["sd", "v", "sdxl", "flux"])
@torch.no_grad()
def test_denoiser_is_asked_as_the_pipeline_asks_it(architecture: Callable[..., Any], model: str) -> None:
    made = architecture(model)
    denoiser = getattr(made.pipeline, made.denoiser).eval()
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remember(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        asked.append((args[0] if args else kwargs["hidden_states"], output[0]))

    denoiser.register_forward_hook(remember, with_kwargs=True)
    guidance = made.args.guidance if model == "flux" else 1.0  # none
    options = {"max_sequence_length": 12} if model == "flux" else {}
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": guidance}
    made.pipeline("a harbour", output_type="latent", generator=torch.Generator().manual_seed(0), **size, **options)
    noisy, wanted = asked[1]
    timestep = made.pipeline.scheduler.timesteps[1:2]
    if model == "flux":
        noisy, wanted, timestep = made._unpack(noisy, 16, 16), made._unpack(wanted, 16, 16), timestep / 1000
    time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    found = made.predict(denoiser, noisy, timestep, made.text(["a harbour"], torch.device("cpu")), time_ids)
    torch.testing.assert_close(found, wanted)


def test_decoding_undoes_the_scale_and_shift_of_latents(architecture: Callable[..., Any]) -> None:
    made = architecture("flux", "--resolution", 16)
    moments = torch.randn(1, 8, 8, 8)
    latents = made.latents(moments, torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(latents / made.vae.config.scaling_factor + 0.1, moments[:, :4])


def test_strata_spread_timesteps_evenly(script: ModuleType, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    noised = script.StableDiffusion.noised

    def spy(self: Any, latents: torch.Tensor, noise: torch.Tensor, u: torch.Tensor) -> Any:
        seen.extend(u.tolist() if not torch.is_grad_enabled() else [])
        return noised(self, latents, noise, u)

    monkeypatch.setattr(script.StableDiffusion, "noised", spy)
    train("--held-out-draws", 5, "--steps", 1, *QUIET)
    assert [int(u * 5) for u in seen] == [0, 1, 2, 3, 4] * 6  # three pictures, before and after


# ---- pictures ----


def test_picture_is_cut_at_its_centre_and_keeps_its_values(script: ModuleType) -> None:
    pixels = np.arange(16 * 22 * 3, dtype=np.uint8).reshape(16, 22, 3)
    cut, time_ids = diffusion_pictures.cut(Image.fromarray(pixels), 16, False, (0.5, 0.5))
    torch.testing.assert_close(cut, torch.from_numpy(pixels[:, 3:19]).permute(2, 0, 1) / 127.5 - 1)
    assert time_ids.tolist() == [16, 22, 0, 3, 16, 16]


def test_mirrored_picture_tells_its_crop_from_the_other_side(script: ModuleType) -> None:
    pixels = np.arange(16 * 22 * 3, dtype=np.uint8).reshape(16, 22, 3)
    plain, _ = diffusion_pictures.cut(Image.fromarray(pixels), 16, False, (0.5, 0.0))
    mirrored, time_ids = diffusion_pictures.cut(Image.fromarray(pixels), 16, True, (0.5, 0.0))
    assert torch.equal(mirrored, plain.flip(-1))
    assert time_ids.tolist() == [16, 22, 0, 6, 16, 16]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16", "CMYK", "1"])
def test_picture_of_any_mode_opens_as_rgb(script: ModuleType, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (9, 9)).save(path)
    assert diffusion_pictures.open_picture(path, 1).mode == "RGB"


def test_transparent_pixels_become_white(script: ModuleType, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    picture.putpixel((1, 0), (10, 20, 30, 255))
    picture.save(tmp_path / "a.png")
    opened = diffusion_pictures.open_picture(tmp_path / "a.png", 1)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]


def test_sixteen_bit_greys_keep_their_brightness(script: ModuleType, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "a.png")
    assert diffusion_pictures.open_picture(tmp_path / "a.png", 1).getpixel((0, 0)) == (128, 128, 128)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two pictures with captions of their own, and four that cannot be used as they are."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "deep/b.JPG", "small.png", "bare.png", "cut.png")):
        write_picture(folder / name, i, (7, 20) if name == "small.png" else (20, 20))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:300])
    (folder / "metadata.csv").write_text('file_name,text\na.png,"one, two"\nlost.png,lost\nsmall.png,s\ncut.png,c\n')
    (folder / "deep/b.txt").write_text("\ufeffbeside\n", encoding="utf-8")
    return folder


def test_captions_come_from_metadata_and_files_beside(script: ModuleType, mixed: Path, models: dict[str, Path]) -> None:
    args = script.parse_arguments(flags(models["sd"], mixed, mixed))
    records, skipped = diffusion_pictures.find_records(args)
    assert {r.path.name: r.caption for r in records} == {
        "a.png": "one, two",
        "b.JPG": "beside",
        "small.png": "s",
        "cut.png": "c",
    }
    assert skipped == {"bare.png": "no caption", "lost.png": "named in the metadata, not there"}


def test_unusable_pictures_are_skipped_counted_and_named(
    train: Train, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, _ = train("--steps", 1, "--held-out-fraction", 0, *QUIET, data=mixed)
    assert record["pictures"]["train"] == 2
    assert record["skipped"].keys() == {"bare.png", "lost.png", "small.png", "cut.png"}
    said = capsys.readouterr().out
    assert "4 of 6 pictures skipped" in said
    assert "small.png (7 x 20, smaller than 8)" in said
    assert "cut.png (does not decode" in said


def test_caption_flag_is_for_pictures_without_one(script: ModuleType, mixed: Path, models: dict[str, Path]) -> None:
    args = script.parse_arguments(flags(models["sd"], mixed, mixed, "--caption", "any"))
    captions = {r.path.name: r.caption for r in diffusion_pictures.find_records(args)[0]}
    assert captions["bare.png"] == "any" and captions["b.JPG"] == "beside"


# ---- checkpoints ----


def resume(train: Train, run: Path, to: Path, *more: object, **options: Any) -> Any:
    shutil.copytree(run / f"checkpoint-{CHECKPOINT}", to / f"checkpoint-{CHECKPOINT}")
    (to / "unfinished-checkpoint-5").mkdir()  # as if it had been killed while writing another
    return train(*more, "--resume-from-checkpoint", "latest", output=to, **options)


def assert_same_course(one: tuple[dict[str, Any], Any], other: tuple[dict[str, Any], Any]) -> None:
    for name in ("train_loss", "held_out_loss", "learning_rate", "found_lr"):
        assert one[0].get(name) == other[0].get(name), name
    assert torch.equal(predict(one[1]), predict(other[1]))


def test_resumed_run_has_the_losses_of_the_uninterrupted(train: Train, plain: Any, tmp_path: Path) -> None:
    record, pipeline, run = plain
    assert_same_course(resume(train, run, tmp_path / "resumed"), (record, pipeline))


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("sd", ("--method", "lora", "--train-text-encoder", "--lr-scheduler", "cosine", "--warmup", 2)),
        ("sdxl", ("--train-text-encoder", "--lora-alpha", 3, "--dora", "--preset", "paper", "--oplora-state", "exact")),
        ("flux", ("--grad-accumulation", 2, "--lora-dropout", 0.1)),
    ],
)
def test_resumed_run_of_other_settings_is_the_uninterrupted_too(
    train: Train, tmp_path: Path, model: str, more: tuple[object, ...]
) -> None:
    whole = train(*more, model=model, output=tmp_path / "whole")
    assert_same_course(resume(train, tmp_path / "whole", tmp_path / "resumed", *more, model=model), whole)


def test_newest_checkpoints_are_kept(train: Train, tmp_path: Path) -> None:
    train("--checkpointing-steps", 1, "--checkpoints-total-limit", 2)
    assert {p.name for p in (tmp_path / "run").glob("*checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


def test_full_disk_leaves_the_last_checkpoint(train: Train, plain: Any, tmp_path: Path) -> None:
    shutil.copytree(plain[2], tmp_path / "run")
    last = tmp_path / "run" / f"checkpoint-{CHECKPOINT}"
    before = {path: path.read_bytes() for path in last.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the adapter fits, the optimizer does not
    try:
        with pytest.raises(SystemExit, match=r"checkpoint-8 could not be written(.|\n)*checkpoint-4 stays") as error:
            train("--steps", 8, "--resume-from-checkpoint", "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Free some space" in str(error.value)
    assert {path: path.read_bytes() for path in last.iterdir()} == before
    assert not list((tmp_path / "run").glob("unfinished-*"))
    train("--steps", 8, "--resume-from-checkpoint", "latest")


def test_checkpoint_of_other_settings_is_refused(train: Train, output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"other settings: --r was 2, is 3\. Resume with"):
        train("--r", 3, "--resume-from-checkpoint", "latest")
    with pytest.raises(SystemExit, match="the architecture was sd, is sdxl"):
        train("--resume-from-checkpoint", f"checkpoint-{CHECKPOINT}", model="sdxl")


def test_checkpoint_of_another_size_of_the_architecture_is_refused(
    script: ModuleType, data: Path, output: Path, tmp_path: Path
) -> None:
    other = tiny_pipelines.save(tiny_pipelines.stable_diffusion(block_out_channels=(8, 24)), tmp_path / "other")
    shutil.copytree(output, tmp_path / "run")
    args = script.parse_arguments(flags(other, data, tmp_path / "run", "--resume-from-checkpoint", "latest"))
    with pytest.raises(SystemExit, match=r"checkpoint-4 does not fit .*other(.|\n)*the checkpoint is unchanged"):
        script.train(args)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("latest", "nothing to resume: .* holds no checkpoint"),
        ("checkpoint-9", "no checkpoint checkpoint-9; in .* there is none"),
    ],
)
def test_resuming_needs_a_checkpoint(train: Train, wanted: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train("--resume-from-checkpoint", wanted)


def test_damaged_checkpoint_is_named(train: Train, output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / f"checkpoint-{CHECKPOINT}" / "progress.json").write_text("{")
    with pytest.raises(SystemExit, match="checkpoint-4 is no checkpoint of this script"):
        train("--resume-from-checkpoint", "latest")


# ---- errors ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-modules", "to_q", "to_x"], r"unet has no target module to_x; it has .*to_out\.0 .*to_q"),
        (["--train-text-encoder", "--text-encoder-target-modules", "qkv"], "text_encoder has no target module qkv"),
        (["--resolution", "17"], "--resolution 17 is not a multiple of 2"),
        (["--held-out-fraction", "0.99"], "keeps back 7 of 7 pictures; none is left"),
        (["--data", "missing"], "--data missing is no folder"),
        (["--lr", "1e30", "--method", "lora", "--max-grad-norm", "0"], r"the loss is (nan|inf) at step \d; lower --lr"),
        (["--lr", "1e30", "--preset", "paper"], r"(the loss is|step \d: oplora: the gradient of) (.|\n)*(nan|inf|NaN)"),
        (["--model", "."], r"\. is no diffusers pipeline"),
    ],
)
def test_errors_say_what_is_wrong(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        train(*more)


def test_unknown_pipeline_names_the_known(train: Train, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    known = "StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline"
    with pytest.raises(SystemExit, match=f"is a PixArtAlphaPipeline; this script knows {known}"):
        train("--model", tmp_path)


def test_flux_refuses_snr_weights(train: Train) -> None:
    with pytest.raises(SystemExit, match="--snr-gamma weighs losses of noise prediction; Flux has none"):
        train("--snr-gamma", 5, model="flux")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no pictures in .*; looked for .*png"),
        ({"notes.txt": "text"}, "no pictures in "),
        ({"a.png": None}, "none of the 1 pictures in .* has a caption(.|\n)*--caption"),
        ({"a.png": "no picture", "a.txt": "a"}, "none of the pictures in .* can be used: a.png .does not decode"),
        ({"a.png": None, "metadata.jsonl": "{"}, "cannot read .*metadata.jsonl"),
        ({"a.png": None, "metadata.csv": "name,text\na.png,a\n"}, "a row lacks 'file_name'"),
    ],
)
def test_unusable_folder_says_why(train: Train, tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in files.items():
        if text is None:
            write_picture(folder / name, 0)
        else:
            (folder / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        train(data=folder)
