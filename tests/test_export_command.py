"""python -m oplora export: it writes what save_adapter writes of the model, and PEFT and diffusers load it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from diffusers import StableDiffusionPipeline
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_export import ATTENTION, CASES, adapted, add_adapter, mapping, outputs

import oplora
from oplora.__main__ import main

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    return {
        name: str(tiny_pipelines.save(make(), root / name))
        for name, make in tiny_pipelines.PIPELINES.items()
        if name != "flux"
    }


def export(source: Path, out: Path, format: str, *more: str) -> int:
    return main(["export", str(source), str(out), "--format", format, *more])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert export(*arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("case", [case for case in CASES if case != "flux"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_peft_folders_become_the_file_that_the_model_gives(case, format, bases, tmp_path):
    model = mapping(adapted(case), case)
    oplora.save_adapter(model, tmp_path / "peft")
    oplora.save_adapter(model, tmp_path / "expected.safetensors", format=format)
    base = bases[CASES[case][0]]
    assert export(tmp_path / "peft", tmp_path / "ours.safetensors", format, "--base", base) == 0
    ours, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "expected"))
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["sd, rsLoRA", "sd, convolutions, mixed ranks"])
def test_without_a_base_the_layers_tell_what_they_belong_to(case, tmp_path):
    model = mapping(adapted(case), case)
    oplora.save_adapter(model, tmp_path / "peft")
    oplora.save_adapter(model, tmp_path / "expected.safetensors", format="diffusers")
    assert export(tmp_path / "peft", tmp_path / "ours.safetensors", "diffusers") == 0
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@pytest.mark.parametrize("case", ["sd, rsLoRA", "sd, DoRA", "sd, convolutions, mixed ranks"])
def test_diffusers_file_becomes_peft_folders_that_give_the_models_output(case, bases, tmp_path):
    pipeline = adapted(case)
    oplora.save_adapter(pipeline, tmp_path, format="diffusers")
    assert export(tmp_path, tmp_path / "peft", "peft", "--base", bases["sd"]) == 0
    fresh = tiny_pipelines.stable_diffusion()
    for folder in (tmp_path / "peft").iterdir():
        PeftModel.from_pretrained(getattr(fresh, folder.name), str(folder))
    for ours, theirs in zip(outputs(fresh), outputs(pipeline), strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("with_metadata", [True, False])
def test_file_of_diffusers_own_scripts_means_what_diffusers_takes_it_for(with_metadata, tmp_path):
    unet = add_adapter(tiny_pipelines.stable_diffusion().unet, LoraConfig(r=2, lora_alpha=5, target_modules=ATTENTION))
    layers = get_peft_model_state_dict(unet)
    metadata = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()} if with_metadata else {}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    assert export(tmp_path, tmp_path / "ours", "diffusers") == 0
    read = [tiny_pipelines.stable_diffusion() for _ in range(2)]
    for pipeline, folder in zip(read, (tmp_path, tmp_path / "ours"), strict=True):
        pipeline.load_lora_weights(folder, weight_name=FILE)
    one, other = (tiny_pipelines.predict(pipeline) for pipeline in read)
    assert (one - other).abs().max() <= 1e-6 * one.abs().max()


def test_keys_of_older_scripts_are_read(tmp_path):
    A, B = torch.randn(2, 4), torch.randn(4, 2)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora.down.weight": A, f"{name}.lora.up.weight": B}, tmp_path / FILE)
    assert export(tmp_path, tmp_path / "new", "diffusers") == 0
    assert set(load_file(tmp_path / "new" / FILE)) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}


def products(path: Path) -> dict[str, torch.Tensor]:
    """scaling B A by layer, and magnitudes, whatever ranks the factors have."""
    tensors = load_file(path)
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")]
            found[key] = (B.flatten(1).double() @ A.flatten(1).double()).float()
        elif "magnitude" in key:
            found[key] = A
    return found


@pytest.fixture(scope="module")
def all_bases(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    flux = tiny_pipelines.save(tiny_pipelines.PIPELINES["flux"](), tmp_path_factory.mktemp("flux"))
    return {**bases, "flux": str(flux)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*this adapter has DoRA")
def test_kohyas_file_becomes_diffusers_that_the_model_gives(case, all_bases, tmp_path):
    model = mapping(adapted(case), case)
    oplora.save_adapter(model, tmp_path / "kohya.safetensors", format="kohya")
    oplora.save_adapter(model, tmp_path / "expected.safetensors", format="diffusers")
    base = all_bases[CASES[case][0]]
    assert export(tmp_path / "kohya.safetensors", tmp_path / "ours.safetensors", "diffusers", "--base", base) == 0
    ours, expected = (products(tmp_path / f"{name}.safetensors") for name in ("ours", "expected"))
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (ours[key] - tensor).abs().max() <= 2e-6 * tensor.abs().max(), key


def test_alpha_of_a_transformer_is_read_as_diffusers_reads_it(tmp_path):
    torch.manual_seed(0)
    name = "transformer.transformer_blocks.0.attn.to_q"
    width = tiny_pipelines.PIPELINES["flux"]().transformer.transformer_blocks[0].attn.to_q.weight.shape[1]
    factors = {f"{name}.lora_A.weight": torch.randn(2, width), f"{name}.lora_B.weight": torch.randn(width, 2)}
    save_file({**factors, f"{name}.alpha": torch.tensor(5.0)}, tmp_path / FILE)
    assert export(tmp_path, tmp_path / "ours", "diffusers") == 0
    pipeline = tiny_pipelines.PIPELINES["flux"]()
    pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    theirs = pipeline.transformer.transformer_blocks[0].attn.to_q.get_delta_weight("default_0")
    (ours,) = products(tmp_path / "ours" / FILE).values()
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_command_runs_as_a_program_and_names_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "oplora", "export", str(tmp_path), str(tmp_path / "out"), "--format", "kohya"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds no adapter; there is nothing. Give a folder with adapter_config.json" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- what is refused ----


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    case = "sd, rsLoRA"
    oplora.save_adapter(mapping(adapted(case), case), tmp_path / "peft")
    return tmp_path / "peft"


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.filterwarnings("default")
def test_warning_is_told_as_errors_are(bases, tmp_path, capsys):
    case = "sd, DoRA"
    oplora.save_adapter(mapping(adapted(case), case), tmp_path / "peft")
    capsys.readouterr()
    assert export(tmp_path / "peft", tmp_path / "out", "kohya", "--base", bases["sd"]) == 0
    assert capsys.readouterr().err.startswith("oplora: this adapter has DoRA. ComfyUI reads")


def test_another_architecture_is_refused_with_both_shapes(peft_folder, bases, tmp_path, capsys):
    message = refused(capsys, peft_folder, tmp_path / "out", "kohya", "--base", bases["sdxl"])
    assert "attn2.to_k is for a weight of shape (16, 16), and there it is (16, 32)" in message
    assert not (tmp_path / "out").exists()


def test_layer_that_the_base_lacks_is_refused_by_name(peft_folder, bases, tmp_path, capsys):
    path = peft_folder / "unet" / "adapter_model.safetensors"
    save_file({key.replace("mid_block", "side_block"): tensor for key, tensor in load_file(path).items()}, path)
    message = refused(capsys, peft_folder, tmp_path / "out", "diffusers", "--base", bases["sd"])
    assert "no weight for the adapter's layer side_block.attentions.0" in message


def test_component_that_the_base_lacks_is_refused(peft_folder, bases, tmp_path, capsys):
    (peft_folder / "unet").rename(peft_folder / "transformer")
    message = refused(capsys, peft_folder, tmp_path / "out", "diffusers", "--base", bases["sd"])
    assert "has no transformer; it has text_encoder, unet, vae" in message


def test_keys_that_fit_in_part_are_counted_and_named(peft_folder, tmp_path, capsys):
    path = peft_folder / "unet" / "adapter_model.safetensors"
    tensors = load_file(path)
    dropped = next(key for key in tensors if key.endswith("lora_B.weight"))
    del tensors[dropped]
    save_file({**tensors, "base_model.model.conv_in.bias": torch.ones(8)}, path)
    message = refused(capsys, peft_folder, tmp_path / "out", "diffusers")
    layer = dropped.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    assert f"2 of {len(tensors) + 1} keys belong to no layer with lora_A and lora_B: conv_in.bias, {layer}" in message


def test_rank_that_the_configuration_contradicts_is_refused(peft_folder, tmp_path, capsys):
    edit(peft_folder / "unet", r=7)
    assert "with rank 7 in its configuration" in refused(capsys, peft_folder, tmp_path / "out", "diffusers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save=['conv_in']"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changed the base"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much', expected a finite number"),
    ],
)
def test_configuration_that_a_file_cannot_express_is_refused(settings, message, peft_folder, tmp_path, capsys):
    edit(peft_folder / "unet", **settings)
    assert message in refused(capsys, peft_folder, tmp_path / "out", "diffusers")


def test_other_adapter_types_are_refused_by_name(tmp_path, capsys):
    unet = get_peft_model(
        tiny_pipelines.stable_diffusion().unet, IA3Config(target_modules=["to_q"], feedforward_modules=[])
    )
    unet.save_pretrained(tmp_path / "unet")
    assert "peft_type is 'IA3', expected 'LORA'" in refused(capsys, tmp_path, tmp_path / "out", "kohya")


def test_folder_of_a_class_without_a_place_asks_for_its_component(tmp_path, capsys):
    get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoraConfig(target_modules=["0"])).save_pretrained(
        tmp_path
    )
    assert "--component unet, transformer" in refused(capsys, tmp_path, tmp_path / "out", "diffusers")
    assert export(tmp_path, tmp_path / "out", "diffusers", "--component", "transformer") == 0


def test_component_goes_into_a_file_of_peft_that_is_asked_for(tmp_path, bases):
    case = "sd, rsLoRA"
    oplora.save_adapter(mapping(adapted(case), case), tmp_path / "source")
    unet = tmp_path / "source" / "unet"
    assert export(unet, tmp_path / "x.safetensors", "peft", "--base", bases["sd"]) == 0
    assert (tmp_path / "x.safetensors").is_file()
    assert export(tmp_path / "x.safetensors", tmp_path / "again", "diffusers", "--component", "unet") == 0


def test_text_encoder_without_a_base_is_no_peft_folder(tmp_path, capsys):
    oplora.save_adapter(adapted("sd, rsLoRA"), tmp_path, format="diffusers")
    assert "Name the pipeline's folder with --base" in refused(capsys, tmp_path, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_alpha_that_diffusers_does_not_load_is_refused(tmp_path, capsys):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file({**factors, f"{name}.alpha": torch.tensor(5.0)}, tmp_path / FILE)
    message = refused(capsys, tmp_path, tmp_path / "out", "kohya")
    assert "layers of unet have .alpha keys" in message and "Multiply each B by its alpha / rank" in message


KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
ODD_KOHYA = {
    "another model's": (
        {f"{KOHYA}_x.lora_down.weight": (2, 4), f"{KOHYA}_x.lora_up.weight": (4, 2)},
        "1 of 1 layers are none",
    ),
    "LoKr": ({f"{KOHYA}.lokr_w1": (2, 2), f"{KOHYA}.alpha": ()}, "lokr_w1. LoHa, LoKr and the like"),
    "half a layer": ({f"{KOHYA}.lora_down.weight": (2, 4)}, "1 of 1 layers are not lora_down, lora_up and alpha"),
    "two ranks": ({f"{KOHYA}.lora_down.weight": (2, 4), f"{KOHYA}.lora_up.weight": (4, 3)}, "do not go together"),
    "no matrix": ({f"{KOHYA}.lora_down.weight": (2,), f"{KOHYA}.lora_up.weight": (4, 2)}, "do not go together"),
    "a number": ({f"{KOHYA}.lora_down.weight": (), f"{KOHYA}.lora_up.weight": (4, 2)}, "do not go together"),
    "no rank": ({f"{KOHYA}.lora_down.weight": (0, 4), f"{KOHYA}.lora_up.weight": (4, 0)}, "do not go together"),
    "three alphas": (
        {f"{KOHYA}.lora_down.weight": (2, 16), f"{KOHYA}.lora_up.weight": (16, 2), f"{KOHYA}.alpha": (3,)},
        "alpha of (3,). They do not go together",
    ),
    "DoRA of other rows": (
        {f"{KOHYA}.lora_down.weight": (2, 16), f"{KOHYA}.lora_up.weight": (16, 2), f"{KOHYA}.dora_scale": (3, 1)},
        "dora_scale of (3, 1). They do not go together",
    ),
    "DoRA of another model": (
        {f"{KOHYA}.lora_down.weight": (2, 4), f"{KOHYA}.lora_up.weight": (4, 2), f"{KOHYA}.dora_scale": (4, 1)},
        "is for a weight of shape (4, 4), and there it is",
    ),
}


@pytest.mark.parametrize("case", ODD_KOHYA)
def test_kohyas_file_that_does_not_fit_is_refused_by_name(case, bases, tmp_path, capsys):
    shapes, message = ODD_KOHYA[case]
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "in.safetensors")
    arguments = (tmp_path / "in.safetensors", tmp_path / "out", "diffusers", "--base", bases["sd"])
    assert message in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()


PAIR = {"unet.x.lora_A.weight": torch.ones(2, 8), "unet.x.lora_B.weight": torch.ones(8, 2)}
DAMAGED = {
    "metadata that is no JSON": (PAIR, "no JSON", "is no valid JSON"),
    "metadata that is no object": (PAIR, "[1]", "holds a JSON list, expected an object"),
    "metadata that is deep": (PAIR, 100_000 * "[", "is no valid JSON"),
    "no tensors": ({}, "{}", "holds no tensors"),
    "a number for A": (PAIR | {"unet.x.lora_A.weight": torch.ones(())}, "{}", "lora_A of shape ()"),
    "no rank": ({"unet.x.lora_A.weight": torch.ones(0, 8), "unet.x.lora_B.weight": torch.ones(8, 0)}, "{}", "(0, 8)"),
    "integers": (PAIR | {"unet.x.lora_B.weight": torch.ones(8, 2).int()}, "{}", "lora_B of layer x is int32"),
    "8 bits": (PAIR | {"unet.x.lora_B.weight": torch.ones(8, 2).to(torch.float8_e5m2)}, "{}", "is float8_e5m2"),
    "DoRA of other rows": (PAIR | {"unet.x.lora_magnitude_vector": torch.ones(3)}, "{}", "has shape (3,), expected 8"),
    "three alphas": (
        {key.replace("unet", "transformer"): tensor for key, tensor in PAIR.items()}
        | {"transformer.x.alpha": torch.ones(3)},
        "{}",
        "alpha of layer x has shape (3,), expected 1",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_of_diffusers_is_refused_by_what_is_wrong(case, tmp_path, capsys):
    tensors, metadata, message = DAMAGED[case]
    save_file(tensors, tmp_path / FILE, {"lora_adapter_metadata": metadata})
    assert message in refused(capsys, tmp_path, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mapping", ["UNet2DConditionModel", [1], {"base_model_class": 3}, {"base_model_class": [1]}])
def test_configuration_that_names_no_class_asks_for_the_component(mapping, peft_folder, tmp_path, capsys):
    edit(peft_folder / "unet", auto_mapping=mapping)
    assert "of unknown class" in refused(capsys, peft_folder / "unet", tmp_path / "out", "diffusers")


def test_folders_that_no_pipeline_has_are_refused_by_name(peft_folder, tmp_path, capsys):
    (peft_folder / "unet").rename(peft_folder / "checkpoint-500")
    message = refused(capsys, peft_folder, tmp_path / "out", "diffusers")
    assert "has adapters in checkpoint-500, and no part of a pipeline is called so" in message
    message = refused(capsys, peft_folder / "checkpoint-500", tmp_path / "out", "peft", "--component", "../unet")
    assert "--component '../unet' is no part of a pipeline" in message


def test_kohyas_file_without_a_base_asks_for_it(tmp_path, capsys):
    save_file({f"{KOHYA}.lora_down.weight": torch.ones(2, 4)}, tmp_path / "in.safetensors")
    message = refused(capsys, tmp_path / "in.safetensors", tmp_path / "out", "diffusers")
    assert "is in kohya's format" in message and "Name the pipeline's folder with --base" in message


def test_damaged_file_is_refused(tmp_path, capsys):
    (tmp_path / FILE).write_bytes(b"no tensors")
    assert "is no valid safetensors file" in refused(capsys, tmp_path, tmp_path / "out", "kohya")
