"""format="plain": PEFT's files whose one alpha is right for every layer, and adapters in one file."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_merge_checkpoint import gpt2, llama, randomise
from torch import Tensor, nn

import oplora
from oplora.__main__ import main
from oplora.files.merge_checkpoint import merge_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS = ["q_proj", "down_proj", "lm_head", "embed_tokens"]
CASES: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 9, r"layers\.1\.mlp\.down_proj": 0.5}},
    "rank_pattern": {"rank_pattern": {"down_proj": 5, "embed_tokens": 1}},
    "all": {"use_rslora": True, "alpha_pattern": {"q_proj": 9}, "rank_pattern": {"down_proj": 5}},
    "DoRA": {"use_dora": True, "target_modules": ["q_proj"], "rank_pattern": {r"0\.self_attn.q_proj": 3}},
    "trained biases and a saved norm": {"use_rslora": True, "bias": "all", "modules_to_save": ["norm"]},
}


def adapted(**config: Any) -> PeftModel:
    model = get_peft_model(llama(), LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": LAYERS, **config}))
    randomise(model)
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    return model(torch.arange(9)[None]).logits.detach()


def products_by_alpha_alone(folder: Path) -> dict[str, Tensor]:
    """What a reader that knows lora_alpha and a layer's own rank takes for each layer's change."""
    alpha = json.loads((folder / CONFIG).read_text())["lora_alpha"]
    tensors = load_file(folder / WEIGHTS)
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    pairs = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in layers}
    return {name: alpha / len(A) * B @ A for name, (A, B) in pairs.items()}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_a_plain_file_as_the_model_that_was_saved(tmp_path: Path, case: str) -> None:
    model = adapted(**CASES[case])
    oplora.save_adapter(model, tmp_path, format="plain")
    read = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert (outputs(read) - outputs(model)).abs().max() <= 1e-6 * outputs(model).abs().max()


@pytest.mark.parametrize("case", [case for case in CASES if case != "DoRA"])
def test_alpha_alone_scales_every_layer_of_a_plain_file_rightly(tmp_path: Path, case: str) -> None:
    model = adapted(**CASES[case])
    oplora.save_adapter(model, tmp_path, format="plain")
    found = products_by_alpha_alone(tmp_path)
    modules = dict(model.named_modules())
    assert len(found) == 5
    for name, product in found.items():
        torch.testing.assert_close(product, modules[name].get_delta_weight("default"), rtol=1e-6, atol=1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.last = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attn(x, x, x)[0])


def test_layer_inside_multihead_attention_is_scaled_as_its_attention(tmp_path: Path) -> None:
    base, config = Attention(), {"alpha_pattern": {"attn": 9}, "rank_pattern": {"attn": 3}}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["attn", "last"], **config)).eval()
    randomise(model)
    oplora.save_adapter(model, tmp_path, format="plain")
    x = torch.randn(4, 1, 8)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(x), model(x), rtol=1e-5, atol=1e-5)


def test_rank_and_alpha_of_a_plain_file_are_one_number_for_all_layers(tmp_path: Path) -> None:
    oplora.save_adapter(adapted(**CASES["all"]), tmp_path, format="plain")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert config["alpha_pattern"] == config["rank_pattern"] == {}
    factors = {name: tensor for name, tensor in load_file(tmp_path / WEIGHTS).items() if ".lora_A" in name}
    assert {len(A) for A in factors.values()} == {5}


def test_every_adapter_of_a_model_is_folded(tmp_path: Path) -> None:
    model = make_model(use_rslora=True)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=3, target_modules=["first"], use_rslora=True))
    oplora.save_adapter(model, tmp_path, format="plain")
    alphas = [json.loads((folder / CONFIG).read_text())["lora_alpha"] for folder in (tmp_path, tmp_path / "other")]
    assert alphas == [3, 4]


def test_export_makes_of_a_folder_what_save_adapter_makes_of_its_model(tmp_path: Path) -> None:
    model = adapted(**CASES["all"])
    oplora.save_adapter(model, tmp_path / "peft")
    oplora.save_adapter(model, tmp_path / "expected", format="plain")
    assert main(["export", str(tmp_path / "peft"), str(tmp_path / "plain"), "--format", "plain"]) == 0
    ours, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "expected"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("plain", "expected")]
    assert configs[0] == {**configs[1], "target_modules": configs[0]["target_modules"]}


@pytest.mark.parametrize("name", ["use_rslora", "alpha_pattern", "rank_pattern"])
@pytest.mark.filterwarnings("default")
def test_saving_for_peft_says_what_other_readers_overlook(tmp_path: Path, name: str) -> None:
    value: Any = True if name == "use_rslora" else {"first": 1}
    with pytest.warns(UserWarning, match=rf'has {name}, which PEFT reads.*save it for them with format="plain"'):
        oplora.save_adapter(make_model(**{name: value}), tmp_path)


@pytest.mark.filterwarnings("error:oplora")
def test_nothing_is_said_where_every_reader_is_right(tmp_path: Path) -> None:
    oplora.save_adapter(make_model(), tmp_path)
    oplora.save_adapter(make_model(use_rslora=True), tmp_path, format="plain")


def test_what_plain_cannot_hold_is_refused(tmp_path: Path) -> None:
    groups = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 4, 1))
    config = LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1": 4})
    with pytest.raises(oplora.OPLoRAError, match=r"0\.lora_B\.weight is of a convolution in groups"):
        oplora.save_adapter(get_peft_model(groups, config), tmp_path / "groups", format="plain")
    linear = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(oplora.OPLoRAError, match=r'peft_type is \'IA3\', and format="plain" is LoRA'):
        oplora.save_adapter(
            get_peft_model(linear, IA3Config(target_modules=["0"], feedforward_modules=[])), tmp_path, format="plain"
        )
    with pytest.raises(oplora.OPLoRAError, match="lora_bias is set"):
        oplora.save_adapter(make_model(lora_bias=True), tmp_path / "bias", format="plain")
    assert not list(tmp_path.iterdir())


def test_export_refuses_what_is_no_folder_of_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--format", "plain"]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err


def test_files_that_nobody_may_write_become_ones_that_their_owner_may(tmp_path: Path) -> None:
    oplora.save_adapter(make_model(), tmp_path / "peft")
    for path in (tmp_path / "peft").iterdir():
        path.chmod(0o444)
    assert main(["export", str(tmp_path / "peft"), str(tmp_path / "plain"), "--format", "plain"]) == 0
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "plain").iterdir())


X = "base_model.model.first"
A, B = torch.ones(3, 13), torch.ones(21, 3)
DAMAGED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "field": ({}, {"new": 1}, "peft/adapter_config.json: new is 1, a field that"),
    "no B": ({f"{X}.lora_A.weight": A}, {}, "peft/adapter_model.safetensors: layer first has no lora_B"),
    "no tensors": ({"other": A}, {}, "peft/adapter_model.safetensors holds no lora_A and lora_B"),
    "two ranks": ({f"{X}.lora_A.weight": A, f"{X}.lora_B.weight": B[:, :2].clone()}, {}, "do not go together"),
    "another rank": ({f"{X}.lora_A.weight": A, f"{X}.lora_B.weight": B}, {"r": 2}, "with rank 2 in its configuration"),
    "a number": ({f"{X}.lora_A.weight": A.sum(), f"{X}.lora_B.weight": B}, {}, "lora_A of shape ()"),
    "integers": ({f"{X}.lora_A.weight": A.int(), f"{X}.lora_B.weight": B}, {}, "lora_A of layer first is int32"),
    "8 bits": ({f"{X}.lora_A.weight": A.to(torch.float8_e5m2), f"{X}.lora_B.weight": B}, {}, "first is float8_e5m2"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_adapter_is_refused_by_its_own_name(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, fields, message = DAMAGED[case]
    oplora.save_adapter(make_model(), tmp_path / "peft")
    config = tmp_path / "peft" / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    if tensors:
        save_file(tensors, tmp_path / "peft" / WEIGHTS)
    assert main(["export", str(tmp_path / "peft"), str(tmp_path / "out"), "--format", "plain"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- one file ----


@pytest.mark.parametrize("format", ["peft", "plain"])
def test_path_of_a_file_is_that_file(tmp_path: Path, format: str) -> None:
    model = make_model(lora_alpha=5)
    oplora.save_adapter(model, tmp_path / "mine.safetensors", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
    oplora.save_adapter(model, tmp_path / "folder", format=format)
    ours, expected = load_file(tmp_path / "mine.safetensors"), load_file(tmp_path / "folder" / WEIGHTS)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        config = json.loads(file.metadata()["adapter_config"])
    assert math.isclose(config["lora_alpha"] / config["r"], 5 / 3 if format == "peft" else 1)


def test_file_merges_as_its_folder_does(tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), LoraConfig(r=2, lora_alpha=7, target_modules=["c_attn"]))
    randomise(model)
    gpt2().save_pretrained(tmp_path / "base")
    for name in ("mine.safetensors", "folder"):
        oplora.save_adapter(model, tmp_path / name)
        merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-out", progress=False)
    files = [(tmp_path / f"{name}-out/model.safetensors").read_bytes() for name in ("mine.safetensors", "folder")]
    assert files[0] == files[1]


@pytest.mark.parametrize("format", ["peft", "plain"])
def test_export_makes_a_file_of_any_model_the_folder_that_its_model_gives(tmp_path: Path, format: str) -> None:
    model = adapted(**CASES["all"])
    oplora.save_adapter(model, tmp_path / "mine.safetensors")
    oplora.save_adapter(model, tmp_path / "expected", format=format)
    assert main(["export", str(tmp_path / "mine.safetensors"), str(tmp_path / "out"), "--format", format]) == 0
    ours, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "expected"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    read = PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    assert (outputs(read) - outputs(model)).abs().max() <= 1e-6 * outputs(model).abs().max()


@pytest.mark.parametrize("format", ["peft", "plain"])
def test_export_makes_a_folder_of_any_model_a_file_that_merges_as_it_does(tmp_path: Path, format: str) -> None:
    model = get_peft_model(gpt2(), LoraConfig(r=2, lora_alpha=7, target_modules=["c_attn"], use_rslora=True))
    randomise(model)
    gpt2().save_pretrained(tmp_path / "base")
    oplora.save_adapter(model, tmp_path / "folder", format=format)
    assert main(["export", str(tmp_path / "folder"), str(tmp_path / "x.safetensors"), "--format", format]) == 0
    for name in ("x.safetensors", "folder"):
        merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-out", progress=False)
    files = [(tmp_path / f"{name}-out/model.safetensors").read_bytes() for name in ("x.safetensors", "folder")]
    assert files[0] == files[1]


def test_file_without_a_configuration_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    oplora.save_adapter(make_model(), tmp_path / "adapter")
    gpt2().save_pretrained(tmp_path / "base")
    with pytest.raises(oplora.OPLoRAError, match=r"has no configuration in its header.*Give the folder"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter" / WEIGHTS, tmp_path / "out", progress=False)


def test_several_adapters_do_not_fit_into_a_file(tmp_path: Path) -> None:
    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(oplora.OPLoRAError, match=r"to hold 2 adapters \(default, other\).*Give a folder"):
        oplora.save_adapter(model, tmp_path / "x.safetensors")
    with pytest.raises(
        oplora.OPLoRAError, match=r'one model, and here are a, b\. Give a folder, or format="diffusers"'
    ):
        oplora.save_adapter({"a": make_model(), "b": make_model()}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
