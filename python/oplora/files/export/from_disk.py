"""Adapters on disk: PEFT's folders and diffusers' file, read without the model that they belong to."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...errors import OPLoRAFileError, OPLoRATypeError, OPLoRAValueError
from ..peft_adapter import CONFIG, KEY_PREFIX, WEIGHTS, AdapterConfig, parse_config, read_fields, refuse_more
from ..peft_adapter import METADATA as ADAPTER_CONFIG
from ..tensor_file import parse_object, read_object, read_tensor_file
from . import diffusers, from_kohya
from .layers import (
    COMPONENTS,
    BaseWeights,
    Component,
    LoRALayer,
    component_name,
    kind_in,
    refuse_extras,
    refuse_no_pair,
)

__all__ = ["read_components"]

METADATA: Final = "lora_adapter_metadata"  # diffusers' header
# what ends the keys of a layer's tensors; the older ones are of diffusers' own scripts
SUFFIXES: Final = {
    "A": (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"),
    "B": (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"),
    "magnitude": (".lora_magnitude_vector.weight", ".lora_magnitude_vector"),
    "alpha": (".alpha",),
}
ALPHA: Final = ".alpha"  # diffusers reads it of transformers, as kohya's: the scale is alpha / r
SHOWN: Final = 5  # names in a message
PLACES: Final = "Name its place: --component unet, transformer, text_encoder or text_encoder_2."


def read_components(source: Path, base: Path | None = None, component: str | None = None) -> list[Component]:
    """The components of an adapter on disk.

    Args:
        source: a PEFT folder; a folder of them, each called as its component ("unet", "text_encoder"); or diffusers'
            pytorch_lora_weights.safetensors, or the folder that it is in; or kohya's file, which needs `base`.
        base: folder of the pipeline that the adapter is for. Every layer must be there with the same shape; DoRA's
            norms are taken from its weights.
        component: the place of a single PEFT folder in a pipeline, where its configuration does not tell.

    Raises:
        OPLoRAError: no adapter there; keys that fit only in part; an adapter that is not LoRA or DoRA on linear and
            convolutional layers; one of another model than `base`.
    """
    found = list(_read(source, base, component))
    return [_on_base(one, base) for one in found] if base is not None else found


def _read(source: Path, base: Path | None, component: str | None) -> Iterator[Component]:
    if component is not None and component not in COMPONENTS:
        raise OPLoRAValueError(f"--component {component!r} is no part of a pipeline. {PLACES}")
    file = source / diffusers.FILE if source.is_dir() else source
    if (source / CONFIG).is_file():
        yield _read_peft(source, component)
    elif folders := [path.parent for path in sorted(source.glob(f"[!.]*/{CONFIG}"))]:
        if others := [folder.name for folder in folders if folder.name not in COMPONENTS]:
            raise OPLoRAValueError(
                f"SOURCE {str(source)!r} has adapters in {', '.join(others[:SHOWN])}, and no part of a pipeline is "
                f"called so. Give one of these folders itself. {PLACES}"
            )
        for folder in folders:
            yield _read_peft(folder, folder.name)
    elif file.is_file() and file.suffix == ".safetensors":
        if ADAPTER_CONFIG in read_tensor_file(file).metadata():
            yield _read_peft(file, component)
        else:
            yield from _read_file(file, base)
    else:
        there = ", ".join(sorted(os.listdir(source))[:SHOWN]) if source.is_dir() else "nothing"
        raise OPLoRAFileError(
            f"SOURCE {str(source)!r} holds no adapter; there is {there or 'nothing'}. Give a folder with {CONFIG} and "
            f"{WEIGHTS}, a folder of such folders called unet, text_encoder, ..., or {diffusers.FILE}."
        )


def _read_peft(folder: Path, component: str | None) -> Component:
    weights = folder / WEIGHTS if folder.is_dir() else folder
    path, config = read_fields(folder, read_tensor_file(weights))
    if config.get("peft_type") != "LORA":
        raise OPLoRATypeError(
            f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA': diffusers' and kohya's files hold no "
            "other."
        )
    refuse_extras(str(path), SimpleNamespace(**config))
    refuse_more(path, config, "Save it with PEFT, for PEFT.", allowed=("use_dora",))
    mapping = config.get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    kind = kind if isinstance(kind, str) else ""
    tensors = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in _tensors(weights).items()}
    layers = _layers(weights, tensors, parse_config(path, config))
    try:
        name = component or component_name(kind)
    except OPLoRAValueError as error:
        raise OPLoRAValueError(
            f"{path} does not say which part of a pipeline it adapts (its base is {kind or 'of unknown class'}). "
            f"{PLACES}"
        ) from error
    return Component(name, layers, kind, {})


def _read_file(path: Path, base: Path | None) -> Iterator[Component]:
    """diffusers' file, or kohya's."""
    tensors = _tensors(path)
    if from_kohya.is_kohya(tensors):
        yield from from_kohya.read(path, tensors, base)
        return
    with safe_open(path, "pt") as file:
        metadata = parse_object(path, (file.metadata() or {}).get(METADATA, "{}").encode())
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        parts.setdefault(name, {})[rest] = tensor
    if not parts:
        raise OPLoRAValueError(f"{path} holds no tensors. Save the adapter again.")
    if unknown := [name for name in parts if name not in COMPONENTS]:
        raise OPLoRAValueError(
            f"{path}: {len(unknown)} keys begin with no part of a pipeline that is known "
            f"({', '.join(unknown[:SHOWN])}), expected unet, transformer or text_encoder. Is it a file of diffusers?"
        )
    for name, part in parts.items():
        if name != "transformer" and any(key.endswith(ALPHA) for key in part):
            raise OPLoRAValueError(
                f"{path}: layers of {name} have .alpha keys, which diffusers does not load. Multiply each B by its "
                "alpha / rank and remove them, or take the file that the training program wrote."
            )
        own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
        refuse_extras(f"{path} ({name})", SimpleNamespace(**own))
        yield Component(name, _layers(path, part, parse_config(path, own) if own else None), "", {})


def _tensors(path: Path) -> dict[str, Tensor]:
    read_tensor_file(path)  # says what is wrong with the file
    return load_file(path)


def _layers(path: Path, tensors: Mapping[str, Tensor], config: AdapterConfig | None) -> tuple[LoRALayer, ...]:
    """By the configuration, or without one with alpha = r for every layer, as diffusers takes it."""
    found: dict[str, dict[str, Tensor]] = {}
    left = []
    for key, tensor in tensors.items():
        ends = [(part, end) for part, suffixes in SUFFIXES.items() for end in suffixes if key.endswith(end)]
        if ends:
            part, end = ends[0]
            found.setdefault(key.removesuffix(end), {})[part] = tensor
        else:
            left.append(key)
    left += [name for name, parts in found.items() if not {"A", "B"} <= parts.keys()]
    if left or not found:
        raise OPLoRAValueError(
            f"{path}: {len(left)} of {len(tensors)} keys belong to no layer with lora_A and lora_B: "
            f"{', '.join(left[:SHOWN])}. The file is of another kind, or not whole."
        )
    return tuple(_layer(path, name, parts, config) for name, parts in found.items())


def _layer(path: Path, name: str, parts: Mapping[str, Tensor], config: AdapterConfig | None) -> LoRALayer:
    refuse_no_pair(path, name, parts.get("A"), parts.get("B"), config.rank(name) if config else None)
    A, B, magnitude, alpha = (
        None if (tensor := parts.get(part)) is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for part in SUFFIXES
    )
    assert A is not None and B is not None
    for what, tensor, size in (("lora_magnitude_vector", magnitude, len(B)), ("alpha", alpha, 1)):
        if tensor is not None and tensor.numel() != size:
            raise OPLoRAValueError(
                f"{path}: {what} of layer {name} has shape {tuple(tensor.shape)}, expected {size} numbers. The file is "
                "damaged: save the adapter again."
            )
    for what, tensor in (("lora_A", A), ("lora_B", B), ("lora_magnitude_vector", magnitude), ("alpha", alpha)):
        if tensor is not None and not tensor.isfinite().all():
            raise OPLoRAValueError(f"{path}: {what} of layer {name} holds NaN or infinity. Take an earlier checkpoint.")
    r = len(A)
    scaling = config.scaling(name, r) if config else 1.0 if alpha is None else float(alpha) / r
    return LoRALayer(name, A, B, scaling, None if magnitude is None else magnitude.flatten())


# ---- the model that an adapter is for ----


def _on_base(component: Component, base: Path) -> Component:
    folder = base / component.name
    if not (folder / "config.json").is_file():
        there = sorted(path.parent.name for path in base.glob("*/config.json"))
        raise OPLoRAFileError(
            f"--base {str(base)!r} has no {component.name}; it has {', '.join(there) or 'no component of a pipeline'}. "
            "Give the folder of the pipeline that the adapter was trained on."
        )
    config = read_object(folder / "config.json")
    weights = BaseWeights.of(folder)
    for layer in component.layers:
        weights.check(layer)
    layers = tuple(_with_norms(layer, weights) for layer in component.layers)
    return Component(component.name, layers, kind_in(config), config)


def _with_norms(layer: LoRALayer, base: BaseWeights) -> LoRALayer:
    if layer.magnitude is None:
        return layer
    base_norm, norm = base.norms(layer)
    return replace(layer, base_norm=base_norm, norm=norm)
