"""kohya's keys against the names of the models' authors, and its numbers against ComfyUI's formulas."""

import json
import re
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import ATTENTION, adapted, add_adapter
from torch import Tensor, nn

import oplora
from oplora.files.export import kohya
from oplora.files.export.layers import Component, LoRALayer

FILE = "pytorch_lora_weights_kohya.safetensors"
SDXL_BLOCKS = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
# the numbers of the published configurations
UNETS = {
    "sd_v1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd_v2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl_base_v1-0": SDXL_BLOCKS,
}


def meta_unet(version: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[version])


def component(name: str, model: nn.Module, r: int = 1) -> Component:
    """An adapter on every linear and convolutional layer; its A and B are of one memory, whatever their size."""
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            shape = module.weight.shape
            A, B = torch.zeros(1).expand(r, *shape[1:]), torch.zeros(1).expand(shape[0], r, *[1] * (len(shape) - 2))
            layers.append(LoRALayer(path, A, B, 1.0))
    return Component(name, tuple(layers), type(model).__name__, dict(model.config))


def entries(one: Component) -> list[kohya.Entry]:
    return kohya._entries(one, kohya.family_of([one]))


def as_key(name: str) -> str:
    return "lora_unet_" + name.removesuffix(".weight").replace(".", "_")


@pytest.mark.parametrize("version", ["sd_v1", "sd_v2"])
def test_stable_diffusions_keys_are_diffusers_paths_each_used_once(version):
    one = component("unet", meta_unet(version))
    expected = {as_key(layer.name): layer.lora_A.shape[1:] for layer in one.layers}
    assert len(expected) == len(one.layers) > 250
    assert {entry.name: entry.down.shape[1:] for entry in entries(one)} == expected
    assert kohya.family_of([one]).version == version


def test_sdxls_keys_are_those_of_its_authors_model_each_used_once():
    """diffusers' conversion of their checkpoints, given weights of our names, must find the layers that we mean."""
    one = component("unet", meta_unet("sdxl_base_v1-0"))
    ours = {kohya._sdxl_name(layer.name, one.config)[0]: layer.name for layer in one.layers}
    assert len(ours) == len(one.layers) > 700
    weights = {f"model.diffusion_model.{theirs}.weight": f"{name}.weight" for theirs, name in ours.items()}
    biases = {key.replace(".weight", ".bias"): name.replace(".weight", ".bias") for key, name in weights.items()}
    converted = convert_ldm_unet_checkpoint(weights | biases, dict(one.config))
    assert converted == {name: name for name in (weights | biases).values()}
    assert [entry.name for entry in entries(one)] == [as_key(theirs) for theirs in ours]


@pytest.fixture(scope="module")
def flux_layers() -> Component:
    """Of a Flux of full width, for which alone diffusers reads the format, with one block of each kind."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    generator = torch.Generator().manual_seed(0)
    layers = []
    for number, layer in enumerate(component("transformer", transformer).layers):
        r = 1 + number % 3
        A = torch.randn(r, layer.lora_A.shape[1], generator=generator)
        B = torch.randn(layer.lora_B.shape[0], r, generator=generator)
        layers.append(LoRALayer(layer.name, A, B, scaling=0.5 + number))
    return Component("transformer", tuple(layers), "FluxTransformer2DModel", {})


def flux_read_by_diffusers(one: Component, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every layer, scale 1, by diffusers' name."""
    kohya.save([one], folder)
    read = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(load_file(folder / FILE))
    read = {key.removeprefix("transformer."): tensor for key, tensor in read.items()}
    names = {key.rpartition(".lora_")[0] for key in read}
    return {name: (read[f"{name}.lora_A.weight"], read[f"{name}.lora_B.weight"]) for name in names}


def assert_same_product(read: tuple[Tensor, Tensor], layer: LoRALayer) -> None:
    A, B = (tensor.double() for tensor in read)
    x = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(1)).double()
    expected = layer.scaling * (layer.lora_B.double() @ (layer.lora_A.double() @ x))
    assert (B @ (A @ x) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_flux_is_read_by_diffusers_layer_by_layer(flux_layers, tmp_path):
    read = flux_read_by_diffusers(flux_layers, tmp_path)
    assert read.keys() == {layer.name for layer in flux_layers.layers}
    for layer in flux_layers.layers:
        assert_same_product(read[layer.name], layer)


@pytest.mark.parametrize("kept", [["attn.to_q", "attn.to_v"], ["attn.to_k", "proj_mlp"]])
def test_parts_of_a_fused_matrix_without_adapter_stay_without(flux_layers, kept, tmp_path):
    some = tuple(layer for layer in flux_layers.layers if layer.name.endswith(tuple(kept)))
    read = flux_read_by_diffusers(Component("transformer", some, "FluxTransformer2DModel", {}), tmp_path)
    for layer in some:
        assert_same_product(read.pop(layer.name), layer)
    assert read and not any(B.any() for _, B in read.values())


def test_fused_factors_with_one_A_keep_their_rank():
    A = torch.randn(2, 8)
    parts = [LoRALayer(f"single_transformer_blocks.0.attn.to_{n}", A, torch.randn(8, 2), 1.0) for n in "qkv"]
    (entry,) = kohya._entries(Component("transformer", tuple(parts), "FluxTransformer2DModel", {}), kohya.FLUX)
    assert torch.equal(entry.down, A)
    assert torch.equal(entry.up, torch.cat([*(part.lora_B for part in parts), torch.zeros(32, 2)]))


def comfyui_weight(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What ComfyUI makes of a weight: W0 + alpha / r * up down, and with DoRA times dora_scale / ||W0||, by rows."""
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (tensors["alpha"] / down.shape[0])
    if "dora_scale" not in tensors:
        return weight + delta
    norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
    return (weight + delta) * (tensors["dora_scale"] / norm)


@pytest.mark.parametrize("case", ["sd, DoRA", "sd, convolutions, mixed ranks", "sd, rsLoRA"])
def test_comfyuis_weights_are_pefts_merged_ones(case, tmp_path):
    pipeline = adapted(case)
    oplora.save_adapter(pipeline, tmp_path, format="kohya")
    file = load_file(tmp_path / FILE)
    compared = 0
    for prefix, model in {"lora_unet_": pipeline.unet, "lora_te_text_model_": pipeline.text_encoder}.items():
        for name, module in list(model.named_modules()):
            key = prefix + name.replace(".", "_") + "."
            tensors = {k.removeprefix(key): tensor for k, tensor in file.items() if k.startswith(key)}
            if tensors:
                ours = comfyui_weight(module.get_base_layer().weight.detach(), tensors)
                module.merge()
                theirs = module.get_base_layer().weight
                assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
                compared += len(tensors)
    assert compared == len(file)


def test_swapped_halves_of_fluxs_last_norm_are_swapped_for_dora_too():
    B, m = torch.arange(8.0).view(4, 2), torch.arange(1.0, 5.0)
    layer = LoRALayer("norm_out.linear", torch.ones(2, 3), B, 1.0, m, torch.ones(4), torch.ones(4))
    (entry,) = kohya._entries(Component("transformer", (layer,), "FluxTransformer2DModel", {}), kohya.FLUX)
    assert entry.up.tolist() == B[[2, 3, 0, 1]].tolist()
    assert entry.dora_scale.flatten().tolist() == [3, 4, 1, 2]


@pytest.mark.parametrize(
    ("case", "version", "module", "dim"),
    [
        ("sd, rsLoRA", "sd_v1", "networks.lora", "4"),
        ("sd, convolutions, mixed ranks", "sd_v1", "networks.lora", "Dynamic"),
        ("sdxl", "sdxl_base_v1-0", "networks.lora", "Dynamic"),
        ("flux", "flux1", "networks.lora_flux", "Dynamic"),
    ],
)
def test_header_says_what_sd_scripts_looks_for(case, version, module, dim, tmp_path):
    oplora.save_adapter(adapted(case), tmp_path, format="kohya")
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_network_module"] == module
    assert metadata["ss_network_dim"] == dim
    assert metadata["ss_v2"] == "False"
    assert ("conv_dim" in json.loads(metadata["ss_network_args"])) == ("conv" in case or case == "sdxl")


def test_dora_says_who_leaves_it_out_when_saved_and_in_the_header(tmp_path):
    with pytest.warns(UserWarning, match="has DoRA. ComfyUI reads.*sd-scripts and diffusers leave it out"):
        oplora.save_adapter(adapted("sd, DoRA"), tmp_path, format="kohya")
    with safe_open(tmp_path / FILE, "pt") as file:
        assert "left out by sd-scripts" in file.metadata()["dora_scale"]


@pytest.mark.filterwarnings("error:oplora.save_adapter")
def test_header_of_plain_lora_has_no_word_of_dora(tmp_path):
    oplora.save_adapter(adapted("sd, rsLoRA"), tmp_path, format="kohya")
    with safe_open(tmp_path / FILE, "pt") as file:
        assert "dora_scale" not in file.metadata()


def test_every_key_of_a_file_belongs_to_a_module_and_none_is_of_a_generator(tmp_path):
    oplora.save_adapter(adapted("sdxl"), tmp_path, format="kohya")
    kinds = r"(lora_unet|lora_te1|lora_te2)_\w+\.(lora_down\.weight|lora_up\.weight|alpha)"
    keys = load_file(tmp_path / FILE)
    assert keys and all(re.fullmatch(kinds, key) for key in keys)


# ---- what is refused ----


def text_encoder_alone() -> dict[str, nn.Module]:
    return {"text_encoder": adapted("sd, rsLoRA").text_encoder}


def other_transformer() -> Component:
    layer = LoRALayer("blocks.0.attn1.to_q", torch.ones(1, 4), torch.ones(4, 1), 1.0)
    return Component("transformer", (layer,), "WanTransformer3DModel", {})


def test_text_encoder_alone_is_refused(tmp_path):
    with pytest.raises(oplora.OPLoRAError, match="a text encoder alone does not tell"):
        oplora.save_adapter(text_encoder_alone(), tmp_path, format="kohya")


def test_two_text_encoders_alone_are_sdxls_by_their_classes(tmp_path):
    pipeline = adapted("sdxl")
    both = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    oplora.save_adapter(both, tmp_path, format="kohya")
    assert {key[:9] for key in load_file(tmp_path / FILE)} == {"lora_te1_", "lora_te2_"}
    others = [Component(name, (), "CLIPTextModelWithProjection", {}) for name in both]
    with pytest.raises(oplora.OPLoRAError, match="no names for text_encoder"):
        kohya.save(others, tmp_path)


def test_transformer_without_names_in_the_format_is_refused(tmp_path):
    with pytest.raises(
        oplora.OPLoRAError, match=r"no names for transformer \(WanTransformer3DModel\).*FluxTransformer2DModel"
    ):
        kohya.save([other_transformer()], tmp_path)


def test_layer_without_a_name_is_refused_by_name(tmp_path):
    unet = add_adapter(tiny_pipelines.stable_diffusion_xl().unet, LoraConfig(target_modules=["to_q"]))
    (one,) = oplora.files.export.from_model.read_components(unet)
    odd = LoRALayer("adapter.something", torch.ones(1, 4), torch.ones(4, 1), 1.0)
    with pytest.raises(oplora.OPLoRAError, match=r"no name for layer unet\.adapter\.something"):
        kohya.save([Component("unet", (*one.layers, odd), one.kind, one.config)], tmp_path)


def test_dora_on_a_part_of_a_fused_matrix_is_refused(tmp_path):
    ones = torch.ones(4)
    layer = LoRALayer("transformer_blocks.0.attn.to_q", torch.ones(1, 4), torch.ones(4, 1), 1.0, ones, ones, ones)
    with pytest.raises(oplora.OPLoRAError, match="all 3 of its parts need DoRA"):
        kohya.save([Component("transformer", (layer,), "FluxTransformer2DModel", {})], tmp_path)


def test_dora_without_the_bases_norms_is_refused(tmp_path):
    layer = LoRALayer("conv_in", torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1), 1.0, torch.ones(8))
    with pytest.raises(oplora.OPLoRAError, match=r"layer conv_in has a DoRA magnitude.*--base"):
        kohya.save([Component("unet", (layer,), "UNet2DConditionModel", {"cross_attention_dim": 768})], tmp_path)


def test_convolution_in_groups_is_refused(tmp_path):
    layer = LoRALayer("conv_in", torch.ones(4, 2, 3, 3), torch.ones(8, 2, 1, 1), 1.0)
    with pytest.raises(oplora.OPLoRAError, match=r"unet\.conv_in is a convolution in groups"):
        kohya.save([Component("unet", (layer,), "UNet2DConditionModel", {"cross_attention_dim": 768})], tmp_path)


@pytest.mark.parametrize("version", ["sd_v1", "sd_v2", "sdxl_base_v1-0"])
def test_family_follows_from_the_layers_where_there_is_no_configuration(version):
    layers = tuple(
        layer for layer in component("unet", meta_unet(version)).layers if layer.name.endswith(tuple(ATTENTION))
    )
    assert kohya.family_of([Component("unet", layers, "", {})]).version == version


def test_layers_that_fit_several_families_are_refused(tmp_path):
    layer = LoRALayer("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", torch.ones(1, 4), torch.ones(4, 1), 1.0)
    with pytest.raises(oplora.OPLoRAError, match=r"do not tell whether the U-Net.*--base"):
        kohya.save([Component("unet", (layer,), "", {})], tmp_path)
