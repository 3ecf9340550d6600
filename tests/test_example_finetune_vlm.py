"""examples/finetune_vlm.py as a user runs it, on a tiny random LLaVA and pictures of one colour."""

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import assert_same_bits
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_vlm.py"
sys.path.insert(0, str(SCRIPT.parent))  # as for who runs it: the modules beside it are found
import vlm_data  # noqa: E402

SIDE, PATCH = 18, 6  # nine image tokens
IMAGE, END, PAD = "<image>", "<end>", "<pad>"
STEPS, CHECKPOINT = 20, 12
COLOURS = {"red": (230, 20, 10), "green": (10, 200, 30), "blue": (20, 30, 240), "grey": (120, 120, 120)}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens are the bytes, and three of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return fast


def text_config(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.1,  # so that a resumed run needs its random state
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )


def save_llava(folder: Path, layers: int = 2) -> Path:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    tokenizer = byte_tokenizer()
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(layers),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("model"))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of a colour, of odd sizes and several modes, and the question which it is."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    rows = []
    for i in range(24):
        name, colour = list(COLOURS.items())[i % 4]
        image = Image.new("RGB", (19 + i, 41 - i), colour)
        image.convert(("RGB", "RGBA", "P")[i % 3]).save(folder / f"pictures/{i}.png")
        rows.append({"image": f"pictures/{i}.png", "question": "Which colour?", "answer": name})
    return write_rows(folder / "data.jsonl", rows)


def flags(model_folder: Path, data: Path, output: Path) -> list[str]:
    values = {
        "--model": model_folder,
        "--data": data,
        "--output": output,
        "--device": "cpu",
        "--steps": STEPS,
        "--batch-size": 2,
        "--grad-accumulation": 2,
        "--r": 2,
        "--lora-alpha": 4,
        "--lora-dropout": 0.1,
        "--eval-steps": 10,
        "--save-steps": CHECKPOINT,
        "--keep-checkpoints": 2,
        "--sample-steps": 10,
        "--samples": 1,
        "--max-new-tokens": 6,
    }
    return [str(part) for pair in values.items() for part in pair]


def run(arguments: list[str], script: Path | str = SCRIPT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_vlm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def output(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run leaves; its standard output is in stdout.txt."""
    folder = tmp_path_factory.mktemp("runs") / "vlm"
    done = run(flags(model_folder, data, folder))
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def run_here(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path, data: Path
) -> Callable[..., dict]:
    """Runs the script in this process with further arguments; returns what it wrote into losses.json."""

    def run_here(*arguments: object, output: Path = tmp_path / "out") -> dict:
        further = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags(model_folder, data, output), *further])
        script.main()
        return losses(output)

    return run_here


@pytest.fixture
def arguments(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path, data: Path
) -> Callable[..., object]:
    """The script's arguments as it reads them."""

    def arguments(*further: object) -> object:
        values = [str(value) for value in further]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags(model_folder, data, tmp_path / "out"), *values])
        return script.parse_arguments()

    return arguments


def losses(output: Path) -> dict:
    return json.loads((output / "losses.json").read_text())


# ---- what comes out ----


def test_run_writes_losses_of_all_steps(output: Path) -> None:
    record = losses(output)
    assert [step for step, _ in record["train_loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in record["held_out_loss"]] == [0, 10, STEPS]
    assert record["held_out_loss"][-1][1] < record["held_out_loss"][0][1] - 0.1
    assert record["learning_rate"][0][1] == 1.0 > record["learning_rate"][-1][1]
    assert record["settings"]["method"] == "oplora"
    assert {"python", "oplora", "torch", "transformers", "peft"} <= record["versions"].keys()
    assert record["exact_match"].keys() == {"before", "after"}
    assert (output / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


def test_found_rate_is_recorded_and_told(output: Path) -> None:
    found = losses(output)["found_lr"]
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert min(rate for _, rate in found) > 0 and found[-1][1] != found[0][1]
    assert f"learning rate: found {found[-1][1]:.1e}" in (output / "stdout.txt").read_text()


def test_run_prints_sample_answers_at_intervals(output: Path) -> None:
    samples = losses(output)["samples"]
    assert [sample["step"] for sample in samples] == [0, 10, 20]
    assert {sample["question"] for sample in samples} == {"Which colour?"}
    assert {sample["expected"] for sample in samples} <= COLOURS.keys()
    stdout = (output / "stdout.txt").read_text()
    assert all(f"[step {step}] {samples[0]['picture']}: Which colour?" in stdout for step in (0, 10, 20))


def test_reloaded_logits_are_those_of_the_training_model(output: Path) -> None:
    assert (
        "its 20 tensors are equal bit for bit, 23,828 logits differ by 0 at most" in (output / "stdout.txt").read_text()
    )


LOAD_WITH_PEFT_ALONE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
model, *folders = sys.argv[1:]
for folder in folders:
    probe = torch.load(f"{folder}/probe.pt")
    fresh = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), f"{folder}/adapter").eval()
    with torch.no_grad():
        logits = fresh(**probe["batch"]).logits
        with fresh.disable_adapter():
            base = fresh(**probe["batch"]).logits
    print((logits - probe["logits"]).abs().max().item(), (base - probe["logits"]).abs().max().item())
assert "oplora" not in sys.modules
"""


def test_adapters_in_a_fresh_process_give_the_training_models_logits(
    run_here: Callable[..., dict],
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model_folder: Path,
) -> None:
    reload = script.reload

    def keep_and_reload(trained: dict, logits: torch.Tensor, batch: dict, args: object) -> object:
        torch.save({"logits": logits, "batch": batch}, args.output / "probe.pt")
        return reload(trained, logits, batch, args)

    monkeypatch.setattr(script, "reload", keep_and_reload)
    rate = ("--lr", 2e-2)
    ways = {"lora": ("--method", "lora", *rate), "auto": (), "paper": ("--preset", "paper", "--hidden-width", 8, *rate)}
    folders = [tmp_path / name for name in ways]
    for folder, further in zip(folders, ways.values(), strict=True):
        record = run_here(*further, output=folder)
        assert bool(record["found_lr"]) == (folder.name == "auto")
    program = tmp_path / "load.py"
    program.write_text(LOAD_WITH_PEFT_ALONE)
    done = run([str(model_folder), *map(str, folders)], program)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        difference, of_base = map(float, line.split())
        assert difference <= 1e-6
        assert of_base > 1e-3  # of the model without the adapter
    assert len(done.stdout.splitlines()) == len(ways)


def test_last_held_out_loss_is_of_the_last_step(run_here: Callable[..., dict]) -> None:
    record = run_here("--steps", 4, "--eval-steps", 3, "--save-steps", 0, "--sample-steps", 0)
    assert [step for step, _ in record["held_out_loss"]] == [0, 3, 4]
    assert record["samples"] == []


def test_adapter_file_holds_lora_factors_alone(output: Path) -> None:
    with safe_open(output / "adapter/adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    kinds = {name.rsplit(".", 2)[-2] for name in names}
    assert kinds == {"lora_A", "lora_B"}
    assert not any("vision_tower" in name for name in names)


OLD_NAMES = {  # of LLaVA before transformers 4.52, and what each is now
    "language_model.model": "model.language_model",
    "multi_modal_projector": "model.multi_modal_projector",
}


def test_adapter_with_keys_of_the_old_hierarchy_loads_by_key_mapping(
    output: Path, model_folder: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(output / "adapter", tmp_path / "old")
    now = load_file(old / "adapter_model.safetensors")
    named = {}
    for name, tensor in now.items():
        for before, after in OLD_NAMES.items():
            name = name.replace(f"base_model.model.{after}.", f"base_model.model.{before}.")
        named[name] = tensor
    assert not named.keys() & now.keys()
    save_file(named, old / "adapter_model.safetensors", metadata={"format": "pt"})
    mapping = {f"^{before}": after for before, after in OLD_NAMES.items()}
    base = LlavaForConditionalGeneration.from_pretrained(model_folder)
    assert_same_bits(get_peft_model_state_dict(PeftModel.from_pretrained(base, old, key_mapping=mapping)), now)


# ---- checkpoints ----


@pytest.fixture(scope="module")
def interrupted(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As if the run had been killed after its first checkpoint, in the middle of writing another."""
    folder = tmp_path_factory.mktemp("interrupted") / "vlm"
    shutil.copytree(output / f"checkpoint-{CHECKPOINT}", folder / f"checkpoint-{CHECKPOINT}")
    (folder / "unfinished" / f"checkpoint-{STEPS}").mkdir(parents=True)
    return folder


def test_resumed_run_has_the_bits_of_the_uninterrupted(
    run_here: Callable[..., dict], threads: Callable[[int], None], output: Path, interrupted: Path, tmp_path: Path
) -> None:
    threads(1)
    folder = shutil.copytree(interrupted, tmp_path / "resumed")
    here, there = run_here("--resume-from-checkpoint", output=folder), losses(output)
    for name in ("train_loss", "held_out_loss", "learning_rate", "found_lr", "samples", "exact_match"):
        assert here[name] == there[name], name
    weights = [(f / "adapter/adapter_model.safetensors").read_bytes() for f in (folder, output)]
    assert weights[0] == weights[1]
    assert not (folder / "unfinished").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--r": "3"}, r"other settings: --r was 2, is 3\."),
        ({"--targets": "language"}, r"other settings: --targets was both, is language\."),
        ({"--held-out-count": "1"}, r"other settings: --held-out-count was 64, is 1\."),
    ],
)
def test_resume_refuses_other_settings(
    run_here: Callable[..., dict], interrupted: Path, change: dict[str, str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        run_here("--resume-from-checkpoint", *next(iter(change.items())), output=interrupted)


def test_resume_refuses_another_class(run_here: Callable[..., dict], interrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "other")
    state = folder / f"checkpoint-{CHECKPOINT}" / "finetune_vlm.json"
    state.write_text(state.read_text().replace("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"))
    message = "is of a Qwen2VLForConditionalGeneration, the model is a LlavaForConditionalGeneration"
    with pytest.raises(SystemExit, match=message):
        run_here("--resume-from-checkpoint", output=folder)


def test_resume_refuses_another_size(run_here: Callable[..., dict], interrupted: Path, tmp_path: Path) -> None:
    deeper = save_llava(tmp_path / "deeper", layers=3)
    message = r"another model of this class: .*layers\.2\.self_attn.* is not in it, here \[.*8 tensors differ"
    with pytest.raises(SystemExit, match=message):
        run_here("--resume-from-checkpoint", "--model", deeper, output=interrupted)


def test_resume_needs_a_checkpoint(run_here: Callable[..., dict]) -> None:
    with pytest.raises(SystemExit, match=r"nothing to resume: .*out holds no checkpoint; --save-steps writes them"):
        run_here("--resume-from-checkpoint")


def test_new_run_does_not_overwrite_checkpoints(run_here: Callable[..., dict], interrupted: Path) -> None:
    with pytest.raises(SystemExit, match=f"checkpoint-{CHECKPOINT} is of an earlier run"):
        run_here(output=interrupted)


def test_full_disk_leaves_the_last_checkpoint(run_here: Callable[..., dict], interrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "full")
    last = folder / f"checkpoint-{CHECKPOINT}"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((last / "optimizer.pt").stat().st_size - 1, hard))
    try:
        with pytest.raises(
            SystemExit, match=rf"writing .*checkpoint-{STEPS} failed .*checkpoint-12 is whole.*Free some"
        ):
            run_here("--resume-from-checkpoint", output=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in folder.iterdir()} == {last.name, "monitor.jsonl"}
    assert {path.name: path.read_bytes() for path in last.iterdir()} == before


# ---- data ----


@pytest.fixture(scope="module")
def batches(script: ModuleType, model_folder: Path) -> Callable[..., object]:
    def batches(**other: object) -> object:
        args = script.argparse.Namespace(model=model_folder, chat_template=None, dtype="float32", max_length=None)
        vars(args).update(other)
        model = LlavaForConditionalGeneration.from_pretrained(model_folder)
        return script.Batches(script.load_processor(args), model, args)

    return batches


def test_labels_are_the_answers_tokens_alone(batches: Callable[..., object], script: ModuleType, data: Path) -> None:
    picture, tokenizer = data.parent / "pictures/0.png", byte_tokenizer()
    answers = ["red", "a very dark blue"]
    batch = batches()([vlm_data.Example(picture, (("Which colour?", answer),)) for answer in answers])
    ids, labels = batch["input_ids"], batch["labels"]
    for i, answer in enumerate(answers):
        assert tokenizer.decode(labels[i][labels[i] != -100]) == f" {answer}{END}"
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert (ids == tokenizer.convert_tokens_to_ids(IMAGE)).sum(1).tolist() == [9, 9]
    assert ids[0, -1] == tokenizer.pad_token_id and ids[1, -1] == tokenizer.eos_token_id  # padding is on the right


def test_conversation_gives_an_example_for_each_answer(
    script: ModuleType, batches: Callable[..., object], arguments: Callable[..., object], data: Path, tmp_path: Path
) -> None:
    spoken = [("human", "<image>\nWhich colour?"), ("gpt", "red"), ("human", "And the sky?"), ("gpt", "blue")]
    row = {"image": "pictures/0.png", "conversations": [{"from": who, "value": value} for who, value in spoken]}
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([row]))
    examples = vlm_data.read_examples(path, arguments("--image-folder", data.parent), vlm_data.Skipped())
    assert [example.answer for example in examples] == ["red", "blue"]
    batch = batches()(examples[1:])
    text = byte_tokenizer().decode(batch["input_ids"][0])
    assert text == f"user: {IMAGE * 9}Which colour?\nassistant: red\nuser: And the sky?\nassistant: blue{END}"
    assert byte_tokenizer().decode(batch["labels"][0][batch["labels"][0] != -100]) == f" blue{END}"


def test_unusable_rows_are_skipped_by_name(
    script: ModuleType, arguments: Callable[..., object], data: Path, tmp_path: Path
) -> None:
    whole = (data.parent / "pictures/0.png").read_bytes()
    (tmp_path / "good.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[:-40])
    (tmp_path / "text.jpg").write_text("no picture")
    rows = [{"image": name, "answer": "red"} for name in ("good.png", "cut.png", "text.jpg", "missing.png")]
    rows += [{"image": "good.png", "answer": " "}, {"image": "good.png"}, {"answer": "red"}]
    rows += [{"image": ["good.png", "good.png"], "answer": "red"}]
    rows += [{"image": "good.png", "conversations": spoken} for spoken in ("red", ["red"], [], [{"from": "gpt"}])]
    skipped = vlm_data.Skipped()
    examples = vlm_data.read_examples(write_rows(tmp_path / "rows.jsonl", rows), arguments(), skipped)
    assert [example.turns for example in examples] == [(("What is shown in the picture?", "red"),)]
    assert skipped == {
        "with a picture that does not decode": ["cut.png", "text.jpg", "missing.png"],
        "without an answer": ["line 5", "line 6", "line 9", "line 10", "line 11", "line 12"],
        "without a picture": ["line 7"],
        "with several pictures": ["line 8"],
    }
    assert skipped.report().startswith("skipped 11 rows: 3 with a picture that does not decode (cut.png, text.jpg, ")


def test_transparent_pixels_become_white(script: ModuleType, tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 5), (200, 0, 0, 0))
    image.putpixel((1, 2), (200, 0, 0, 255))
    image.save(tmp_path / "clear.png")
    loaded = vlm_data.load_picture(tmp_path / "clear.png")
    assert (loaded.mode, loaded.size) == ("RGB", (3, 5))
    assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((1, 2)) == (200, 0, 0)


def test_held_out_pictures_are_not_trained_on(script: ModuleType, arguments: Callable[..., object]) -> None:
    examples = [vlm_data.Example(Path(f"{i % 30}.png"), (("?", str(i)),)) for i in range(90)]
    train_on, held_out = vlm_data.split(examples, arguments())
    assert len(train_on) + len(held_out) == 90
    assert len(held_out) == 9  # a tenth of the pictures, with all of their questions
    assert not {e.picture for e in train_on} & {e.picture for e in held_out}


def test_long_answer_is_cut_behind_the_picture(batches: Callable[..., object], script: ModuleType, data: Path) -> None:
    example = vlm_data.Example(data.parent / "pictures/0.png", (("Which?", "x" * 60),))
    whole, cut = batches()([example]), batches(max_length=48)([example])
    assert whole["labels"].shape[1] > 48
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:, :48])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])


def test_length_that_would_cut_image_tokens_is_refused(
    batches: Callable[..., object], script: ModuleType, data: Path
) -> None:
    example = vlm_data.Example(data.parent / "pictures/0.png", (("Which?", "red"),))
    with pytest.raises(script.RunError, match=r"0\.png: its prompt has 32 tokens .* image tokens cannot be cut"):
        batches(max_length=32)([example])


def test_answer_longer_than_the_models_positions_is_refused(
    batches: Callable[..., object], script: ModuleType, data: Path
) -> None:
    example = vlm_data.Example(data.parent / "pictures/0.png", (("Which?", "x" * 128),))
    with pytest.raises(script.RunError, match="tokens with the picture's, the model has 128 positions"):
        batches()([example])


# ---- targets ----


@pytest.mark.parametrize(
    ("chosen", "names", "width"),
    [
        (["--targets", "projector"], {"linear_1", "linear_2"}, 768),
        (["--targets", "language"], {"q_proj", "k_proj", "v_proj", "o_proj"}, 32),
        (["--target-modules", "multi_modal_projector.linear_2", "mlp.up_proj"], {"linear_2", "up_proj"}, 32),
    ],
)
def test_targets_choose_layers_outside_the_vision_tower(
    script: ModuleType,
    arguments: Callable[..., object],
    model_folder: Path,
    chosen: list[str],
    names: set[str],
    width: int,
) -> None:
    given = arguments(*chosen)
    assert given.hidden_width is None
    assert arguments(*chosen, "--preset", "paper").hidden_width == width
    model = script.add_adapter(LlavaForConditionalGeneration.from_pretrained(model_folder), given)
    adapted = [name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name]
    assert {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in adapted} == names
    assert not any("vision_tower" in name for name in adapted)


def test_rate_is_needed_by_those_that_do_not_find_it(arguments: Callable[..., object]) -> None:
    assert arguments().lr is None
    assert arguments("--method", "lora").lr == arguments("--preset", "flat").lr == 5e-5


def test_preset_that_finds_its_rate_refuses_a_width(
    arguments: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments("--hidden-width", 8)
    assert "--hidden-width is for --preset paper and flat" in capsys.readouterr().err


def test_4bit_quantises_the_language_models_layers_alone(script: ModuleType, arguments: Callable[..., object]) -> None:
    model = script.load_base(arguments("--load-in-4bit"))
    quantised = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(quantised) == 14
    assert all(name.startswith("model.language_model.layers.") for name in quantised)


# ---- errors ----


def test_text_model_is_refused(run_here: Callable[..., dict], tmp_path: Path) -> None:
    LlamaForCausalLM(text_config()).save_pretrained(tmp_path / "llama")
    message = r"is LlamaForCausalLM, a model that reads text only; .*finetune_llm\.py trains it\. Expected is a vision"
    with pytest.raises(SystemExit, match=message):
        run_here("--model", tmp_path / "llama")


def test_unknown_model_is_refused(run_here: Callable[..., dict], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows_it"}')
    with pytest.raises(SystemExit, match=r"cannot load the model .*nobody_knows_it"):
        run_here("--model", tmp_path)


def test_processor_without_chat_template_is_refused(
    run_here: Callable[..., dict], model_folder: Path, tmp_path: Path
) -> None:
    silent = shutil.copytree(model_folder, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match=r"LlavaProcessor\) has no chat template.*--chat-template FILE"):
        run_here("--model", silent)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--target-modules", "q_proj", "qkv"], r"no target module qkv; it has .*down_proj .*linear_1 .*q_proj"),
        (["--data", "missing.jsonl"], "cannot read the data missing.jsonl"),
        (["--data", "empty.jsonl"], r"empty\.jsonl leaves 0 answers to train on and 0 held out; .*pictures are looked"),
        (["--data", "broken.jsonl"], r"broken\.jsonl, line 2: no JSON"),
        (["--data", "list.jsonl"], r"list\.jsonl, line 1: a int, expected an object"),
        (["--method", "lora", "--lr", "1e30"], r"the loss is (nan|inf) at step \d; lower --lr"),
    ],
)
def test_errors_say_what_is_wrong(
    run_here: Callable[..., dict],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    further: list[str],
    message: str,
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"image": "a.png", "answer": "b"}\n{"image": \n')
    (tmp_path / "list.jsonl").write_text("7\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run_here(*further)
