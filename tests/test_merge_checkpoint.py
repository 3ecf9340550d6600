"""``python -m oplora merge``: equal to PEFT's own merge, bounded in memory, and whole or absent."""

import copy
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from oplora.__main__ import main
from oplora.errors import OPLoRAError, OPLoRAFileError, OPLoRAValueError
from oplora.files.merge_checkpoint import merge_checkpoint

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


# ---- models and adapters ----


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=41,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": False, **options},
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=4))


def randomise(model: nn.Module) -> None:
    """Every trainable tensor away from its start, so that each of them matters."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)


def save_adapter(model: nn.Module, config: LoraConfig, path: Path) -> PeftModel:
    adapted = get_peft_model(copy.deepcopy(model), config)
    randomise(adapted)
    adapted.save_pretrained(path)
    return adapted


def merged_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def merged_by_peft(model: nn.Module, adapter: Path) -> Tensors:
    return PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload().state_dict()


def assert_equals_peft(model: nn.Module, adapter: Path, out: Path) -> None:
    ours, theirs = merged_tensors(out), merged_by_peft(model, adapter)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items() if name in ours)


LLAMA_CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"]),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules="all-linear",
        rank_pattern={"q_proj": 3, r"layers\.1\.mlp.*_proj": 7},
        alpha_pattern={"model.layers.0.mlp.up_proj": 5, "_proj": 100, "v_proj": 0.5},
    ),
    "rslora": LoraConfig(r=5, lora_alpha=3, target_modules=["o_proj", "lm_head"], use_rslora=True),
    "embedding": LoraConfig(r=3, target_modules=["embed_tokens", "k_proj"]),
    "modules_to_save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LLAMA_CONFIGS)
def test_merge_equals_peft_on_a_sharded_llama(tmp_path: Path, name: str) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    save_adapter(model, LLAMA_CONFIGS[name], tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert_equals_peft(model, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_merge_equals_peft_on_gpt2_conv1d(tmp_path: Path, bias: str) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    # c_attn (24, 72) shows its orientation, attn.c_proj (24, 24) has it from fan_in_fan_out
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], bias=bias)
    save_adapter(model, config, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert_equals_peft(model, tmp_path / "adapter", tmp_path / "out")


class Vision(nn.Module):
    """A convolution of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 5, 3), nn.Conv2d(4, 7, (3, 2))
        self.point, self.conv3 = nn.Conv2d(6, 5, 1), nn.Conv3d(2, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore")
def test_merge_equals_peft_on_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Vision()
    save_file(model.state_dict(), tmp_path / "vision.safetensors")
    names = ["conv1", "conv2", "point", "conv3"]
    save_adapter(model, LoraConfig(r=2, target_modules=names), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "vision.safetensors", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert_equals_peft(model, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_merge_rounds_once(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama(dtype)
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, LoraConfig(r=9, lora_alpha=5, target_modules="all-linear"), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, out = merged_tensors(tmp_path / "base"), merged_tensors(tmp_path / "out")
    for name in (name for name in factors if name.endswith("lora_A.weight")):
        A, B = factors[name].double(), factors[name.replace("lora_A", "lora_B")].double()
        target = name.removeprefix(PREFIX).replace("lora_A.", "")
        exact = base[target].double() + 5 / 9 * (B @ A)
        # the float32 sum may be off by this much, and may then round to the other side of a tie
        slack = 12 * 2.0**-24 * (base[target].double().abs() + 5 / 9 * (B.abs() @ A.abs()))
        low, high = (exact - slack).to(dtype), (exact + slack).to(dtype)
        assert ((low <= out[target]) & (out[target] <= high)).all()
        assert (out[target] == exact.to(dtype)).double().mean() > 0.99


@pytest.mark.parametrize("change", [("gain", "model."), ("loss", "transformer.")])
def test_merge_follows_one_component_more_or_less(tmp_path: Path, change: tuple[str, str]) -> None:
    kind, prefix = change
    bare, long = "h.0.fc", f"{prefix}h.0.fc"
    tiny(tmp_path, base_name=long if kind == "gain" else bare, adapter_name=bare if kind == "gain" else long)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert not torch.equal(*(next(iter(merged_tensors(tmp_path / part).values())) for part in ("base", "out")))


def test_merge_casts_what_it_replaces(tmp_path: Path) -> None:
    tiny(
        tmp_path,
        base={"fc.bias": torch.zeros(5, dtype=torch.bfloat16), "none": torch.zeros(3, 0).half()},
        adapter={PREFIX + "fc.bias": torch.linspace(-1, 1, 5), PREFIX + "none": torch.zeros(3, 0)},
    )
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert torch.equal(merged_tensors(tmp_path / "out")["fc.bias"], torch.linspace(-1, 1, 5).bfloat16())


def test_merge_adds_to_an_embedding_that_the_adapter_also_replaces(tmp_path: Path) -> None:
    new = torch.randn(11, 6)
    A, B = torch.randn(2, 11), torch.randn(6, 2)
    tiny(
        tmp_path,
        base={"wte.weight": torch.zeros(11, 6)},
        adapter={
            f"{PREFIX}wte.base_layer.weight": new,
            f"{PREFIX}wte.lora_embedding_A": A,
            f"{PREFIX}wte.lora_embedding_B": B,
        },
    )
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    torch.testing.assert_close(merged_tensors(tmp_path / "out")["wte.weight"], new + 2 * (B @ A).T)


# ---- what else lies in OUT ----


def test_merge_keeps_headers_and_other_files(tmp_path: Path) -> None:
    tiny(tmp_path)
    base, out = tmp_path / "base", tmp_path / "out"
    (base / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", ".hidden"):
        (base / name).write_text("{}")
    merge_checkpoint(base, tmp_path / "adapter", out, progress=False)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "tokenizer.json", "1_Pooling/config.json"}
    before, after = ((folder / "model.safetensors").read_bytes() for folder in (base, out))
    length = 8 + int.from_bytes(before[:8], "little")
    assert before[:length] == after[:length]
    assert len(before) == len(after)


def test_merge_leaves_other_tensors_bit_equal(tmp_path: Path) -> None:
    odd = {
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 3),
        "f8": torch.randn(33).to(torch.float8_e4m3fn),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
    }
    tiny(tmp_path, base=odd)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    out = merged_tensors(tmp_path / "out")
    for name, tensor in odd.items():
        bits = [t.reshape(-1).view(torch.uint8) for t in (out[name], tensor)]
        assert torch.equal(*bits), name


# ---- OUT ----


def test_merge_refuses_a_filled_out(tmp_path: Path) -> None:
    tiny(tmp_path)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    with pytest.raises(OPLoRAFileError, match="--overwrite"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)


def test_merge_overwrites_an_earlier_model_when_asked(tmp_path: Path) -> None:
    tiny(tmp_path)
    for _ in range(2):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", overwrite=True, progress=False)
        (tmp_path / "out" / "stale").touch()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", overwrite=True, progress=False)
    assert not (tmp_path / "out" / "stale").exists()
    assert_nothing_left(tmp_path, "out")


def test_merge_never_overwrites_a_folder_without_a_model(tmp_path: Path) -> None:
    tiny(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(OPLoRAFileError, match="no earlier model"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", overwrite=True, progress=False)
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.parametrize("out", ["base", "adapter", ".", "base/merged", "/"])
def test_merge_refuses_an_out_around_or_inside_its_sources(tmp_path: Path, out: str) -> None:
    tiny(tmp_path)
    with pytest.raises(OPLoRAValueError, match="contain each other"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / out, overwrite=True, progress=False)


def test_merge_keeps_the_name_of_a_file_that_is_a_link(tmp_path: Path) -> None:
    tiny(tmp_path)  # the hub's cache links models to files that are called by their hashes
    (tmp_path / "base/model.safetensors").rename(tmp_path / "0a1b2c")
    (tmp_path / "base/flux.safetensors").symlink_to("../0a1b2c")
    merge_checkpoint(tmp_path / "base/flux.safetensors", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert os.listdir(tmp_path / "out") == ["flux.safetensors"]


def test_merge_fills_an_empty_out(tmp_path: Path) -> None:
    tiny(tmp_path)
    (tmp_path / "out").mkdir()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- a failure leaves nothing ----


def assert_nothing_left(tmp_path: Path, *also: str) -> None:
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter", *also}


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_merge_works_without_torch(tmp_path: Path) -> None:
    tiny(tmp_path)
    code = """
import sys
sys.modules["torch"] = None
from oplora.__main__ import main
sys.exit(main(["merge", *sys.argv[1:]]))
"""
    done = run_python(code, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # the progress bar knows its end


def test_merge_survives_a_disk_that_fails(tmp_path: Path) -> None:
    tiny(tmp_path, base={"large": torch.zeros(1 << 18)})
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
from oplora.__main__ import main
sys.exit(main(["merge", *sys.argv[1:]]))
"""
    done = run_python(code, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert_nothing_left(tmp_path)


def test_merge_refuses_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OPLoRAFileError, match="10 bytes free"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_merge_tidies_up_when_interrupted(tmp_path: Path, signal: str) -> None:
    tiny(tmp_path)
    code = f"""
import os, signal, sys
from oplora import _core
from oplora.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would we
_core.merge = lambda *_, **__: os.kill(os.getpid(), signal.{signal})
sys.exit(main(["merge", "--quiet", *sys.argv[1:]]))
"""
    done = run_python(code, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (done.returncode, done.stderr) == (130, "oplora: interrupted. Nothing was written.\n")
    assert_nothing_left(tmp_path)


def test_merge_keeps_the_old_out_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    (tmp_path / "out" / "mine").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", overwrite=True, progress=False)
    assert (tmp_path / "out" / "mine").exists()
    assert_nothing_left(tmp_path, "out")


def test_merge_killed_at_any_operation_leaves_the_old_out_or_the_new(tmp_path: Path) -> None:
    """Between the two renames OUT is away for a moment; the next merge puts it back."""
    tiny(tmp_path)
    old, new, out = (tmp_path / name for name in ("old", "new", "out"))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", new, progress=False)
    shutil.copytree(tmp_path / "base", old)
    code = """
import itertools, os, signal, sys
from oplora.__main__ import main
count = itertools.count()
def hook(event, _):
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(count) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.exit(main(["merge", "--quiet", "--overwrite", *sys.argv[2:]]))
"""
    found, killed = [], True
    while killed:
        shutil.copytree(old, out)
        killed = run_python(code, len(found), tmp_path / "base", tmp_path / "adapter", out).returncode != 0
        away = not out.exists()
        with pytest.raises(OPLoRAFileError, match="not empty"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", out, progress=False)
        weights = [(folder / "model.safetensors").read_bytes() for folder in (out, old, new)]
        found.append("away" if away and weights[0] == weights[1] else ("old", "new")[weights[1:].index(weights[0])])
        assert not [path for path in tmp_path.glob(".oplora-*") if path.suffix != ".partial"]
        shutil.rmtree(out)
    assert [name for name, _ in itertools.groupby(found)] == ["old", "away", "new"]


def test_model_that_a_kill_left_beside_an_empty_out_is_put_back(tmp_path: Path) -> None:
    tiny(tmp_path)
    (tmp_path / "base").rename(tmp_path / ".oplora-out-old")
    (tmp_path / "out").mkdir()  # as a script makes it before it starts
    with pytest.raises(OPLoRAFileError, match="not empty"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert (tmp_path / "out/model.safetensors").exists()


def test_model_that_a_kill_left_is_not_removed_for_an_out_without_weights(tmp_path: Path) -> None:
    tiny(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / ".oplora-out-old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    with pytest.raises(OPLoRAFileError, match="not empty"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert (tmp_path / ".oplora-out-old/model.safetensors").exists()


def test_merge_removes_what_a_killed_one_left_an_hour_ago(tmp_path: Path) -> None:
    tiny(tmp_path)
    names = (".oplora-out-12345678.partial", ".oplora-other-12345678.partial")
    left, others = (tmp_path / name for name in names)
    for folder in (left, others):
        folder.mkdir()
        (folder / "model.safetensors").touch()
        os.utime(folder, (0, 0))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert left.exists()  # its file is young: it could be that of a process that is writing now
    for folder in (left, others):
        os.utime(folder / "model.safetensors", (0, 0))
        os.utime(folder, (0, 0))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", overwrite=True, progress=False)
    assert not left.exists()
    assert others.exists()


def test_merge_memory_is_bounded(tmp_path: Path) -> None:
    count, rows, columns = 24, 1024, 4096  # 8 MiB each, 192 MiB in all; the file has holes instead of zeros
    (tmp_path / "base").mkdir()
    size, nbytes = rows * columns * 2, {}
    for i in range(count):
        place = [i * size, (i + 1) * size]
        nbytes[f"layers.{i}.fc.weight"] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": place}
    header = json.dumps(nbytes).encode()
    with (tmp_path / "base" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * size)
    factors = {}
    for i in range(0, count, 6):
        factors[f"{PREFIX}layers.{i}.fc.lora_A.weight"] = torch.ones(4, columns)
        factors[f"{PREFIX}layers.{i}.fc.lora_B.weight"] = torch.ones(rows, 4)
    write_adapter(tmp_path / "adapter", factors, r=4, lora_alpha=8)
    code = """
import re, sys
from oplora.__main__ import main
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = peak()
code = main(["merge", "--quiet", *sys.argv[1:]])
print(peak() - before)
sys.exit(code)
"""
    done = run_python(code, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 48  # MiB


# ---- the command line ----


def test_merge_command_reports_errors_in_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path / "none"), str(tmp_path), str(tmp_path / "out" / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("oplora: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"]])
def test_merge_command_explains_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "merge" in capsys.readouterr().out


# ---- refusals ----


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def tiny(
    folder: Path,
    base: Tensors | None = None,
    adapter: Tensors | None = None,
    base_name: str = "fc",
    adapter_name: str = "fc",
    **config: Any,
) -> None:
    """A base with one linear layer (5, 7) and an adapter of rank 2 for it; an entry of None is left out."""
    torch.manual_seed(0)
    factors = {
        f"{PREFIX}{adapter_name}.lora_A.weight": torch.randn(2, 7),
        f"{PREFIX}{adapter_name}.lora_B.weight": torch.randn(5, 2),
    }
    tensors = {f"{base_name}.weight": torch.randn(5, 7), **(base or {})}
    (folder / "base").mkdir(exist_ok=True)
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "base" / "model.safetensors")
    factors |= adapter or {}
    write_adapter(folder / "adapter", {k: v for k, v in factors.items() if v is not None}, **config)


def assert_refused(tmp_path: Path, kind: type[OPLoRAError], message: str) -> None:
    with pytest.raises(kind, match=message):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert_nothing_left(tmp_path)


FC_A, FC_B = f"{PREFIX}fc.lora_A.weight", f"{PREFIX}fc.lora_B.weight"
REFUSED_ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "a lora_A alone": ({"adapter": {FC_B: None}}, r"fc\.lora_A\.weight.*has no lora_B"),
    "a lora_B alone": ({"adapter": {FC_A: None}}, r"fc\.lora_B\.weight.*has no lora_A"),
    "another rank than the config's": ({"r": 3}, r"fc\.lora_A\.weight.*expected 3 rows"),
    "ranks that differ": ({"adapter": {FC_B: torch.ones(5, 3)}}, r"fc\.lora_B\.weight.*expected 2 columns"),
    "another width": ({"adapter": {FC_A: torch.ones(2, 8)}}, r"fc\.lora_A\.weight.*\(5, 8\).*\(5, 7\)"),
    "one dimension": ({"adapter": {FC_A: torch.ones(14)}}, r"fc\.lora_A\.weight.*at least two sizes"),
    "no rows": ({"adapter": {FC_B: torch.ones(0, 2)}}, r"fc\.lora_B\.weight.*none of them 0"),
    "NaN": ({"adapter": {FC_A: torch.full((2, 7), math.nan)}}, r"fc\.lora_A\.weight.*14 NaN or infinite"),
    "infinity": ({"adapter": {FC_B: torch.full((5, 2), math.inf)}}, r"fc\.lora_B\.weight.*NaN or infinite"),
    "integer factors": ({"adapter": {FC_A: torch.ones(2, 7, dtype=torch.int32)}}, r"I32.*F64, F32, F16, BF16"),
    "a quantised base": (
        {"base": {"fc.weight": torch.ones(5, 7, dtype=torch.int8)}},
        r"fc\.lora_A.*I8.*quantised",
    ),
    "another quantised base": (
        {"base": {"fc.weight": None, "fc.qweight": torch.ones(5, 7, dtype=torch.int32)}},
        r"fc\.lora_A.*fc\.qweight.*Quantised",
    ),
    "another model's layer": ({"adapter_name": "other"}, r"other\.lora_A\.weight.*no tensor 'other\.weight'"),
    "a tied head": ({"adapter_name": "lm_head"}, r"lm_head\.lora_A\.weight.*tied.*Untie"),
    "a missing head": ({"adapter": {PREFIX + "lm_head.weight": torch.ones(5)}}, r"lm_head\.weight.*tied"),
    "DoRA": (
        {"adapter": {PREFIX + "fc.lora_magnitude_vector": torch.ones(5)}},
        r"lora_magnitude_vector.*DoRA",
    ),
    "a bias of its own": ({"adapter": {PREFIX + "fc.lora_B.bias": torch.ones(5)}}, r"fc\.lora_B\.bias"),
    "two adapters": (
        {"adapter": {PREFIX + "fc.lora_A.mine.weight": torch.ones(2, 7)}},
        r"several adapters \(None, mine\)",
    ),
    "no prefix": ({"adapter": {"fc.lora_A.weight": torch.ones(2, 7)}}, "lacks PEFT's prefix"),
    "an unknown tensor": (
        {"adapter": {PREFIX + "fc.gate": torch.ones(5)}},
        r"fc\.gate.*BASE has no 'fc\.gate'",
    ),
    "a resized tensor": (
        {"base": {"e.weight": torch.ones(4, 3)}, "adapter": {PREFIX + "e.weight": torch.ones(5, 3)}},
        r"e\.weight.*shape \(4, 3\).*resize",
    ),
    "an embedding with three dimensions": (
        {
            "base": {"e.weight": torch.ones(5, 7, 3)},
            "adapter": {
                PREFIX + "e.lora_embedding_A": torch.ones(2, 7, 3),
                PREFIX + "e.lora_embedding_B": torch.ones(5, 2, 1),
            },
        },
        r"e\.lora_embedding_A.*BASE has 'e\.weight'",
    ),
    "a tensor of another kind": (
        {"base": {"e": torch.ones(3)}, "adapter": {PREFIX + "e": torch.ones(3, dtype=torch.int64)}},
        "can't be converted to F32",
    ),
    "fused attention": (
        {"base": {"fc.weight": None, "fc.in_proj_weight": torch.ones(5, 7)}},
        r"no 'fc\.weight' but .*in_proj_weight.*fused",
    ),
    "a layer in a layer": (
        {"adapter": {f"{PREFIX}fc.base_layer.out.lora_A.weight": torch.ones(2, 7)}},
        r"base_layer\.out\.lora_A\.weight.*inside an adapted layer",
    ),
    "two targets for one weight": (
        {
            "base": {"fc.weight": torch.ones(7, 5)},
            "adapter": {PREFIX + "fc.lora_embedding_A": torch.ones(2, 7), FC_A: torch.ones(2, 7)},
        },
        "has other factors already",
    ),
    "grouped convolution": (
        {
            "base": {"fc.weight": torch.ones(6, 2, 3)},
            "adapter": {FC_A: torch.ones(2, 4, 3), FC_B: torch.ones(6, 1, 1)},
        },
        "layers with groups",
    ),
    "a square weight that is contradicted": (
        {
            "base": {"square.weight": torch.ones(5, 5)},
            "adapter": {
                PREFIX + "square.lora_A.weight": torch.ones(2, 5),
                PREFIX + "square.lora_B.weight": torch.ones(5, 2),
            },
            "fan_in_fan_out": True,
        },
        r"square\.lora_A\.weight.*fan_in_fan_out = True.*contradict",
    ),
    "float16 that overflows": (
        {"base": {"fc.weight": torch.ones(5, 7).half()}, "lora_alpha": 1e6},
        "pass what F16 can hold",
    ),
    "a replacement that overflows": (
        {"base": {"b": torch.ones(2).half()}, "adapter": {PREFIX + "b": torch.tensor([1e6, 1])}},
        "pass what F16 can hold at 1 places",
    ),
}


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_merge_refuses(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED_ADAPTERS[case]
    tiny(tmp_path, **changes)
    assert_refused(tmp_path, OPLoRAValueError, message)


def test_merge_refuses_a_head_that_loading_would_tie_again(tmp_path: Path) -> None:
    tiny(tmp_path, base_name="lm_head", adapter_name="lm_head")
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    assert_refused(tmp_path, OPLoRAValueError, "tie_word_embeddings")


def test_merge_refuses_names_with_two_meanings(tmp_path: Path) -> None:
    tiny(tmp_path, base={"fc.weight": None, "a.fc.weight": torch.ones(5, 7), "b.fc.weight": torch.ones(5, 7)})
    assert_refused(tmp_path, OPLoRAValueError, "several tensors")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "target_parameters that are no names": ({"target_parameters": [3]}, "target_parameters is [3], expected names"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "a field that no version has": (
        {"use_future_variant": True},
        "use_future_variant is True, a field that this version",
    ),
    "a start that no version has": ({"init_lora_weights": "future"}, "init_lora_weights is 'future'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "r as text": ({"r": "2"}, "r is '2'"),
    "r negative": ({"r": -2}, "r is -2"),
    "r zero": ({"r": 0}, "r is 0"),
    "r true": ({"r": True}, "r is True"),
    "r missing": ({"r": None}, "r is None"),
    "alpha NaN": ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "a pattern that is no object": ({"rank_pattern": [1]}, "rank_pattern"),
    "a pattern with a bad rank": ({"rank_pattern": {"fc": 1.5}}, r"rank_pattern\['fc'\] is 1.5"),
    "a pattern with a bad alpha": ({"alpha_pattern": {"fc": math.inf}}, r"alpha_pattern\['fc'\] is inf"),
    "a bad expression": ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    "a flag as text": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_merge_refuses_a_config_with(tmp_path: Path, case: str) -> None:
    changes, message = BAD_CONFIGS[case]
    tiny(tmp_path, **changes)
    assert_refused(tmp_path, OPLoRAValueError, re.escape(message) if "\\" not in message else message)


# ---- hostile and damaged files ----

ONE = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def raw(header: str, data: int = 4, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header.encode() + bytes(data)


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "a header of 2^63 bytes": raw(ONE + "}", length=1 << 63),
    "a header longer than the file": raw(ONE + "}", length=1000),
    "a header that is no JSON": raw("{" * 40),
    "a header that is a list": raw("[]", 0),
    "a header nested too deep": raw('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a header with a huge number": raw('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}'),
    "data cut off": raw(ONE + "}", 3),
    "data left over": raw(ONE + "}", 5),
    "overlapping tensors": raw(ONE + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "a gap": raw(ONE + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}', 12),
    "offsets beyond the end": raw('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
    "offsets backwards": raw('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'),
    "a negative size": raw('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
    "sizes that overflow": raw('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', 0),
    "an unknown dtype": raw('{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}'),
    "a key twice": raw(ONE + ',"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'),
    "an entry that is a number": raw('{"a":4}'),
    "bytes that are no UTF-8": raw(ONE + "}").replace(b'"a"', b'"\xff"'),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("place", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_merge_refuses_a_file_with(tmp_path: Path, place: str, case: str) -> None:
    tiny(tmp_path)
    (tmp_path / place).write_bytes(DAMAGED[case])
    assert_refused(tmp_path, OPLoRAFileError, re.escape(place))


BAD_INDEXES = {
    "a path upwards": {"weight_map": {"fc.weight": "../../etc/passwd"}},
    "an absolute path": {"weight_map": {"fc.weight": "/etc/passwd.safetensors"}},
    "a missing shard": {"weight_map": {"fc.weight": "gone.safetensors"}},
    "a NUL": {"weight_map": {"fc.weight": "\0.safetensors"}},
    "a number": {"weight_map": {"fc.weight": 3}},
    "the wrong shard": {"weight_map": {"fc.weight": "shard.safetensors", "other": "shard.safetensors"}},
    "no map": {"metadata": {}},
    "an empty map": {"weight_map": {}},
    "a list": [],
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_merge_refuses_an_index_with(tmp_path: Path, case: str) -> None:
    tiny(tmp_path)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "shard.safetensors")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(BAD_INDEXES[case]))
    assert_refused(tmp_path, OPLoRAFileError, r"index\.json|gone\.safetensors|\.safetensors is missing")


def test_merge_refuses_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tiny(tmp_path)
    base = tmp_path / "base"
    (base / "b.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (base / "model.safetensors").rename(base / "a.safetensors")
    index = {"weight_map": {"fc.weight": "a.safetensors", "x": "b.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(tmp_path, OPLoRAFileError, "is also in a.safetensors")


def make_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_loop, make_pipe, Path.unlink])
@pytest.mark.parametrize(
    "place", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "base/model.safetensors"]
)
def test_merge_refuses_what_is_no_file(tmp_path: Path, make: Callable[[Path], None], place: str) -> None:
    tiny(tmp_path)
    make(tmp_path / place)
    assert_refused(tmp_path, OPLoRAFileError, Path(place).name)


@pytest.mark.parametrize("make", [make_loop, make_pipe, lambda path: path.symlink_to("/tmp")])
def test_merge_refuses_to_copy_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    tiny(tmp_path)
    make(tmp_path / "base" / "odd")
    assert_refused(tmp_path, OPLoRAFileError, "odd")


def test_merge_refuses_a_loop_as_base(tmp_path: Path) -> None:
    tiny(tmp_path)
    make_loop(tmp_path / "loop")
    with pytest.raises(OPLoRAFileError, match="loop"):
        merge_checkpoint(tmp_path / "loop", tmp_path / "adapter", tmp_path / "out", progress=False)


def assert_merges_or_refuses(folder: Path) -> None:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    refused = False
    try:
        merge_checkpoint(folder / "base", folder / "adapter", out, progress=False)
    except OPLoRAError:
        refused = True
    assert out.exists() != refused
    assert not list(folder.glob(".oplora*"))


FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.data(), place=st.sampled_from(["base/model.safetensors", "adapter/adapter_model.safetensors"]))
def test_merge_survives_any_bytes(tmp_path: Path, data: st.DataObject, place: str) -> None:
    tiny(tmp_path)
    content = bytearray((tmp_path / place).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else len(content) :]
    (tmp_path / place).write_bytes(content)
    assert_merges_or_refuses(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "U8", "F4", "?"]) | JSON,
        "shape": st.lists(st.integers(0, 9) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 200) | st.integers(), min_size=2, max_size=2) | JSON,
    }
)
NAMES = st.sampled_from(["fc.weight", FC_A, FC_B, PREFIX + "fc.bias", "__metadata__", "fc.bias"]) | st.text(max_size=5)


@FUZZ
@given(
    header=st.dictionaries(NAMES, ENTRY | JSON, max_size=4),
    place=st.sampled_from(["base/model.safetensors", "adapter/adapter_model.safetensors"]),
    size=st.integers(0, 300),
)
def test_merge_survives_any_header(tmp_path: Path, header: dict[str, Any], place: str, size: int) -> None:
    tiny(tmp_path)
    (tmp_path / place).write_bytes(raw(json.dumps(header), size))
    assert_merges_or_refuses(tmp_path)


CONFIG_NAMES = st.sampled_from(
    [
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias"),
        *("target_parameters", "auto_mapping", "task_type", "ensure_weight_tying", "init_lora_weights", "use_future"),
    ]
)
BASE_CONFIG_NAMES = st.sampled_from(
    [
        *("architectures", "tie_word_embeddings", "vocab_size", "hidden_size", "num_hidden_layers", "id2label"),
        *("num_attention_heads", "text_config", "quantization_config", "dtype", "auto_map"),
    ]
)


@FUZZ
@given(
    config=st.dictionaries(CONFIG_NAMES, JSON | st.dictionaries(st.sampled_from(["fc", "f.", "*"]), JSON), max_size=4)
)
def test_merge_survives_any_config(tmp_path: Path, config: dict[str, Any]) -> None:
    tiny(tmp_path, **config)
    assert_merges_or_refuses(tmp_path)


@FUZZ
@given(
    kind=st.sampled_from(["llama", "gpt2", "bert", "llava"]) | JSON,
    base=st.dictionaries(BASE_CONFIG_NAMES, JSON | st.just(["LlamaForCausalLM"]), max_size=4),
    adapter=st.dictionaries(CONFIG_NAMES, JSON, max_size=2),
    name=st.sampled_from(["fc", "model.embed_tokens", "lm_head", "transformer.h.0.attn.c_proj"]),
)
@pytest.mark.filterwarnings("ignore")
def test_merge_survives_any_config_of_the_base(
    tmp_path: Path, kind: Any, base: dict[str, Any], adapter: dict[str, Any], name: str
) -> None:
    tiny(tmp_path, base_name=name, adapter_name=name, **adapter)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind, **base}))
    assert_merges_or_refuses(tmp_path)


@FUZZ
@given(fields=st.dictionaries(CONFIG_NAMES, JSON, max_size=3) | JSON, text=st.booleans(), size=st.integers(0, 300))
def test_merge_survives_any_file_that_stands_alone(tmp_path: Path, fields: Any, text: bool, size: int) -> None:
    tiny(tmp_path)
    place = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **(fields if isinstance(fields, dict) else {})}
    metadata = {"adapter_config": json.dumps(whole if text else fields)}
    save_file(load_file(place), tmp_path / "adapter.safetensors", metadata)
    place.unlink()
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "adapter.safetensors").rename(tmp_path / "adapter")
    try:
        assert_merges_or_refuses(tmp_path)
    finally:
        (tmp_path / "adapter").unlink()


@FUZZ
@given(index=JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(NAMES, JSON, max_size=3) | JSON}))
def test_merge_survives_any_index(tmp_path: Path, index: Any) -> None:
    tiny(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_merges_or_refuses(tmp_path)


def test_merge_in_several_blocks_equals_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    whole = merged_tensors(tmp_path / "out")["fc.weight"]
    monkeypatch.setattr("oplora.files.merge_checkpoint.BLOCK_BYTES", 8 * 7 * 2)  # two rows
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", overwrite=True, progress=False)
    assert torch.equal(merged_tensors(tmp_path / "out")["fc.weight"], whole)
