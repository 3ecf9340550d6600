"""kohya's format, of sd-scripts: read by ComfyUI, sd-scripts and, DoRA excepted, diffusers.

    <prefix>_<path of the module, with _ for .>.lora_down.weight   A
                                               .lora_up.weight     B
                                               .alpha              () : the scale is alpha / rank
                                               .dora_scale         (out, 1), (out, 1, 1, 1) for convolutions

Stable Diffusion 1.x and 2.x go by diffusers' paths; SDXL and Flux by those of their authors' code, in which Flux has
one matrix for q, k and v. A LoRA on each of the three is then one of the ranks' sum, exactly: its A are stacked, its B
stand on a diagonal.

dora_scale is what ComfyUI's formula needs. It divides by ||W0||, PEFT by ||W0 + scaling * B A||, each by rows, so
dora_scale = m ||W0|| / ||W0 + scaling * B A||. sd-scripts leaves the key out without a word, diffusers with a warning.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ...errors import OPLoRATypeError, OPLoRAValueError, warn
from .layers import Component, LoRALayer, path_in_file
from .saving import place, write_file

__all__ = ["FILE", "FLUX", "Family", "family_of", "key_of", "rows_of", "save", "swap_halves"]

DORA: Final = "read by ComfyUI; left out by sd-scripts and diffusers, where the adapter is another one"
FILE: Final = "pytorch_lora_weights_kohya.safetensors"


@dataclass(frozen=True)
class Family:
    version: str  # what sd-scripts calls it
    prefixes: Mapping[str, str]  # by component
    network: str = "networks.lora"


SD1: Final = Family("sd_v1", {"unet": "lora_unet", "text_encoder": "lora_te"})
SD2: Final = Family("sd_v2", SD1.prefixes)
SDXL: Final = Family("sdxl_base_v1-0", {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"})
FLUX: Final = Family(
    "flux1",
    {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
    "networks.lora_flux",
)

SDXL_ENCODERS: Final = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
# SDXL: the parts of a block, diffusers' name to the authors'
RESNET: Final = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
SDXL_OUTER: Final = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
FLUX_OUTER: Final = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
# name, and the part where several of diffusers' matrices are one: q, k, v and, in a single block, the MLP's first
FLUX_DOUBLE: Final = {
    "norm1.linear": ("img_mod.lin", None),
    "norm1_context.linear": ("txt_mod.lin", None),
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
}
FLUX_SINGLE: Final = {
    "norm.linear": ("modulation.lin", None),
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", None),
}
FLUX_PARTS: Final = {"qkv": (1, 1, 1), "linear1": (1, 1, 1, 4)}  # their rows, in widths of the model


@dataclass(frozen=True)
class Entry:
    """A module as the file has it: what its keys begin with, and their tensors."""

    name: str
    down: Tensor
    up: Tensor
    alpha: float
    dora_scale: Tensor | None


def save(components: Iterable[Component], path: Path) -> None:
    components = list(components)
    family = family_of(components)
    tensors: dict[str, Tensor] = {}
    entries = [entry for component in components for entry in _entries(component, family)]
    entries = _scales_folded(entries, family)
    for entry in entries:
        tensors[f"{entry.name}.lora_down.weight"] = entry.down.contiguous()
        tensors[f"{entry.name}.lora_up.weight"] = entry.up.contiguous()
        tensors[f"{entry.name}.alpha"] = torch.tensor(entry.alpha)
        if entry.dora_scale is not None:
            tensors[f"{entry.name}.dora_scale"] = entry.dora_scale.contiguous()
    if any(entry.dora_scale is not None for entry in entries):
        warn(
            "oplora.save_adapter: this adapter has DoRA. ComfyUI reads its dora_scale in kohya's format; sd-scripts "
            "and diffusers leave it out, so the adapter is another one there. For diffusers save with "
            'format="diffusers".'
        )
    write_file(tensors, _metadata(family, entries), place(path, FILE))


def family_of(components: Sequence[Component]) -> Family:
    by_name = {component.name: component for component in components}
    if (unet := by_name.get("unet")) is not None and unet.kind in ("UNet2DConditionModel", ""):
        return _unet_family(unet, "text_encoder_2" in by_name)
    if (transformer := by_name.get("transformer")) is not None:
        if transformer.kind == "FluxTransformer2DModel" or (not transformer.kind and _looks_like_flux(transformer)):
            return FLUX
    elif {name: one.kind for name, one in by_name.items()} == SDXL_ENCODERS:
        return SDXL
    what = ", ".join(f"{component.name} ({component.kind or 'of unknown class'})" for component in components)
    raise OPLoRATypeError(
        f"oplora.save_adapter: kohya's format has no names for {what}. It has them for a UNet2DConditionModel of "
        "Stable Diffusion 1.x, 2.x and SDXL, a FluxTransformer2DModel, and the text encoders beside one of them; "
        'a text encoder alone does not tell which of the models it belongs to. Save with format="diffusers".'
    )


def _unet_family(unet: Component, has_two_encoders: bool) -> Family:
    if unet.config:
        if unet.config.get("addition_embed_type") == "text_time":
            return SDXL
        return SD2 if unet.config.get("cross_attention_dim") == 1024 else SD1
    # of an adapter's file alone: SDXL has no attention in its first block, and stacks of it in the others
    names = [layer.name for layer in unet.layers]
    if any(name.startswith(("down_blocks.0.attentions", "up_blocks.3.")) for name in names):
        contexts = {layer.lora_A.shape[1] for layer in unet.layers if layer.name.endswith(("attn2.to_k", "attn2.to_v"))}
        if contexts & {768, 1024}:
            return SD2 if 1024 in contexts else SD1
    elif has_two_encoders or any("transformer_blocks.1." in name for name in names):
        return SDXL
    raise OPLoRAValueError(
        "oplora.save_adapter: these layers do not tell whether the U-Net is one of Stable Diffusion 1.x, 2.x or SDXL. "
        "Name its pipeline's folder with --base."
    )


def _looks_like_flux(transformer: Component) -> bool:
    return all(_flux_name(layer.name) for layer in transformer.layers) and any(
        layer.name.startswith("single_transformer_blocks.") for layer in transformer.layers
    )


def _entries(component: Component, family: Family) -> list[Entry]:
    if component.name not in family.prefixes:
        raise OPLoRAValueError(
            f"oplora.save_adapter: kohya's format of {family.version} has no place for {component.name}; it has "
            f"{', '.join(family.prefixes)}."
        )
    parts: dict[str, dict[int, LoRALayer]] = {}
    entries = []
    for layer in component.layers:
        _refuse_groups(component, layer)
        key, part = key_of(component, layer.name, family)
        if part is not None:
            parts.setdefault(key, {})[part] = layer
        else:
            swapped = family is FLUX and layer.name == "norm_out.linear"
            entries.append(_entry(key, layer, swapped))
    return entries + [_fused(key, layers) for key, layers in parts.items()]


def _refuse_groups(component: Component, layer: LoRALayer) -> None:
    if layer.lora_B.shape[1] != layer.r:
        raise OPLoRATypeError(
            f"oplora.save_adapter: layer {component.name}.{layer.name} is a convolution in groups, which kohya's "
            'format does not have. Save with format="diffusers".'
        )


def key_of(component: Component, layer: str, family: Family) -> tuple[str, int | None]:
    """What a layer's keys begin with, and which part it is where several layers are one matrix."""
    name, part = _name(component, layer, family)
    return f"{family.prefixes[component.name]}_{name.replace('.', '_')}", part


def rows_of(key: str, part: int | None, width: int) -> slice:
    """Those of a part in its matrix, of a model of that width."""
    if part is None:
        return slice(None)
    heights = _heights(key, width)
    return slice(sum(heights[:part]), sum(heights[: part + 1]))


def _heights(key: str, width: int) -> list[int]:
    return [times * width for times in FLUX_PARTS["linear1" if key.endswith("linear1") else "qkv"]]


def _name(component: Component, layer: str, family: Family) -> tuple[str, int | None]:
    named: tuple[str, int | None] | None
    if component.name.startswith("text_encoder"):
        is_t5 = family is FLUX and component.name == "text_encoder_2"
        named = layer if is_t5 else path_in_file(component.name, layer), None
    elif family is FLUX:
        named = _flux_name(layer)
    elif family is SDXL:
        named = _sdxl_name(layer, component.config)
    else:
        named = layer, None
    if named is None:
        raise OPLoRATypeError(
            f"oplora.save_adapter: kohya's format of {family.version} has no name for layer "
            f'{component.name}.{layer}. Leave it out of target_modules, or save with format="diffusers".'
        )
    return named


def _sdxl_name(name: str, config: Mapping[str, Any]) -> tuple[str, None] | None:
    if name in SDXL_OUTER:
        return SDXL_OUTER[name], None
    kinds = "resnets|attentions|downsamplers|upsamplers"
    match = re.fullmatch(rf"(down|mid|up)_blocks?(?:\.(\d+))?\.({kinds})\.(\d+)\.(.+)", name)
    if match is None:
        return None
    where, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    number_of_layers = config.get("layers_per_block", 2)
    if not isinstance(number_of_layers, int):  # a list: the authors' code has as many in every block
        return None
    each = number_of_layers + 1  # of input_blocks, and of output_blocks, to a block
    if kind == "resnets":
        if rest not in RESNET:
            return None
        rest = RESNET[rest]
    if where == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}", None
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * each}.0.op", None
    if kind == "upsamplers":
        types = config.get("up_block_types", ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
        return f"output_blocks.{(block + 1) * each - 1}.{2 if 'Attn' in types[block] else 1}.conv", None
    place_in_block = 1 if kind == "attentions" else 0
    if where == "down":
        return f"input_blocks.{1 + block * each + number}.{place_in_block}.{rest}", None
    return f"output_blocks.{block * each + number}.{place_in_block}.{rest}", None


def _flux_name(name: str) -> tuple[str, int | None] | None:
    if name in FLUX_OUTER:
        return FLUX_OUTER[name], None
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
    if match is None or match[3] not in (names := FLUX_SINGLE if match[1] else FLUX_DOUBLE):
        return None
    inner, part = names[match[3]]
    return f"{'single' if match[1] else 'double'}_blocks.{match[2]}.{inner}", part


def _entry(key: str, layer: LoRALayer, swapped: bool) -> Entry:
    up, dora_scale = layer.lora_B, _dora_scale(layer)
    if swapped:  # diffusers has scale before shift there, Flux's own code shift before scale
        up, dora_scale = swap_halves(up), None if dora_scale is None else swap_halves(dora_scale)
    return Entry(key, layer.lora_A, up, layer.scaling * layer.r, dora_scale)


def swap_halves(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _dora_scale(layer: LoRALayer) -> Tensor | None:
    if layer.magnitude is None:
        return None
    if layer.base_norm is None or layer.norm is None:
        raise OPLoRAValueError(
            f"oplora.save_adapter: layer {layer.name} has a DoRA magnitude, and kohya's format needs the norms of the "
            "base's weight with it. Name the pipeline's folder with --base."
        )
    scale = layer.magnitude * layer.base_norm / layer.norm
    return scale.view(-1, *[1] * (layer.lora_A.dim() - 1))


def _fused(key: str, parts: Mapping[int, LoRALayer]) -> Entry:
    """One LoRA of several on rows of one matrix; parts without one keep their rows."""
    first = next(iter(parts.values()))
    heights = _heights(key, first.lora_A.shape[1])
    for part, layer in parts.items():
        if layer.lora_B.shape[0] != heights[part] or layer.lora_A.shape[1] != first.lora_A.shape[1]:
            raise OPLoRAValueError(
                f"oplora.save_adapter: layer {layer.name} has a B of {layer.lora_B.shape[0]} rows, expected "
                f"{heights[part]} for its part of a fused matrix. Is it of a Flux transformer?"
            )
    layers = [parts[part] for part in sorted(parts)]
    shared = all(torch.equal(layer.lora_A, first.lora_A) for layer in layers)
    down = first.lora_A if shared else torch.cat([layer.lora_A for layer in layers])
    up = down.new_zeros(sum(heights), len(down))
    column = 0
    for part, layer in sorted(parts.items()):
        up[rows_of(key, part, first.lora_A.shape[1]), column : column + layer.r] = layer.folded()
        column += 0 if shared else layer.r
    return Entry(key, down, up, float(len(down)), _fused_dora_scale(layers, len(heights)))


def _fused_dora_scale(layers: Sequence[LoRALayer], parts: int) -> Tensor | None:
    scales = [_dora_scale(layer) for layer in layers]
    present = [scale for scale in scales if scale is not None]
    if not present:
        return None
    if len(present) != parts:
        raise OPLoRATypeError(
            f"oplora.save_adapter: DoRA on {', '.join(layer.name for layer in layers)}: in kohya's format these are "
            f"rows of one matrix with a scale for every row, so all {parts} of its parts need DoRA. "
            'Adapt all of them, or save with format="diffusers".'
        )
    return torch.cat(present)


def _scales_folded(entries: Sequence[Entry], family: Family) -> list[Entry]:
    """The scales folded into B, with an alpha that says so: the rank, or for U-Nets the commonest. diffusers (0.42)
    overlooks alphas of Flux's last layer, and mistakes those of a U-Net's attention layers that differ from most."""
    common = statistics.mode(len(entry.down) for entry in entries)
    alphas = [float(len(entry.down) if family is FLUX else common) for entry in entries]
    return [replace(e, up=e.up * (e.alpha / alpha), alpha=alpha) for e, alpha in zip(entries, alphas, strict=True)]


def _metadata(family: Family, entries: Sequence[Entry]) -> dict[str, str]:
    """What sd-scripts and programs that list LoRAs look for in the header."""
    convolutions = [entry for entry in entries if entry.down.shape[2:] > (1, 1)]
    others = [entry for entry in entries if entry.down.shape[2:] <= (1, 1)]
    dim, alpha = _rank_and_alpha(others or convolutions)
    arguments = {}
    if convolutions:
        arguments["conv_dim"], arguments["conv_alpha"] = _rank_and_alpha(convolutions)
    dora = {"dora_scale": DORA} if any(entry.dora_scale is not None for entry in entries) else {}
    return {
        **dora,
        "format": "pt",
        "ss_v2": str(family is SD2),
        "ss_base_model_version": family.version,
        "ss_network_module": family.network,
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
    }


def _rank_and_alpha(entries: Sequence[Entry]) -> tuple[str, str]:
    """Those of all, or what sd-scripts says where they differ."""
    ranks, alphas = {len(entry.down) for entry in entries}, {entry.alpha for entry in entries}
    rank, alpha = ("Dynamic" if len(values) > 1 else str(*values) for values in (ranks, alphas))
    return rank, alpha
