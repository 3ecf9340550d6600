"""kohya's files, read against the pipeline that they are for.

Its keys have underscores for dots, and one matrix where diffusers has several, so only the base's layers tell what they
mean: each is given the name that kohya.py would write for it, and the file's are looked up among them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ...errors import OPLoRAFileError, OPLoRATypeError, OPLoRAValueError
from ..tensor_file import read_object
from . import kohya
from .layers import COMPONENTS, BaseWeights, Component, LoRALayer, kind_in, refuse_no_pair

__all__ = ["is_kohya", "read"]

PARTS: Final = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "dora_scale"}
SHOWN: Final = 5  # names in a message


def is_kohya(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("lora_unet_", "lora_te")) for key in tensors)


def read(path: Path, tensors: Mapping[str, Tensor], base: Path | None) -> Iterator[Component]:
    """The components that the file has layers of."""
    if base is None:
        raise OPLoRAValueError(
            f"{path} is in kohya's format, whose keys say what they mean only beside the model's layers. Name the "
            "pipeline's folder with --base."
        )
    entries = _entries(path, tensors)
    there = _components(base)
    family = kohya.family_of([one.component for one in there])
    found: set[str] = set()
    for one in there:
        layers = list(_layers(one, entries, family, found))
        if layers:
            yield Component(one.component.name, tuple(layers), one.component.kind, one.component.config)
    if left := sorted(entries.keys() - found):
        raise OPLoRAValueError(
            f"{path}: {len(left)} of {len(entries)} layers are none of {base} ({', '.join(left[:SHOWN])}). Is it the "
            "pipeline that the adapter was trained on?"
        )


def _entries(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, end = key.partition(".")
        found.setdefault(name, {})[PARTS.get(end, end)] = tensor
    odd = [name for name, parts in found.items() if not {"A", "B"} <= parts.keys() <= set(PARTS.values())]
    if odd:
        raise OPLoRAValueError(
            f"{path}: {len(odd)} of {len(found)} layers are not lora_down, lora_up and alpha: {', '.join(odd[:SHOWN])} "
            f"has {', '.join(found[odd[0]])}. LoHa, LoKr and the like have no place in other formats: load the file "
            "with the program that wrote it."
        )
    return {name: _checked(path, name, parts) for name, parts in found.items()}


def _checked(path: Path, name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    A, B = parts["A"], parts["B"]
    refuse_no_pair(path, name, A, B)
    wide = {what: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for what, tensor in parts.items()}
    for what, tensor in wide.items():
        if not tensor.isfinite().all():
            raise OPLoRAValueError(f"{path}: {what} of layer {name} holds NaN or infinity. Take an earlier one.")
    sizes = {"A": A.numel(), "B": len(A) * len(B), "alpha": 1, "dora_scale": len(B)}
    if odd := [what for what, tensor in wide.items() if tensor.numel() != sizes[what]]:
        raise OPLoRAValueError(
            f"{path}: layer {name} has lora_down of shape {tuple(A.shape)}, lora_up of {tuple(B.shape)} and "
            f"{odd[0]} of {tuple(wide[odd[0]].shape)}. They do not go together."
        )
    return wide


@dataclass(frozen=True)
class _Part:
    component: Component  # without layers
    weights: BaseWeights


def _components(base: Path) -> list[_Part]:
    found = []
    for folder in sorted(path.parent for path in base.glob("*/config.json")):
        if any(folder.glob("*.safetensors")):
            config = read_object(folder / "config.json")
            if folder.name in COMPONENTS:
                found.append(_Part(Component(folder.name, (), kind_in(config), config), BaseWeights.of(folder)))
    if not found:
        raise OPLoRAFileError(
            f"--base {str(base)!r} holds no part of a pipeline. Give the folder with unet or transformer in it."
        )
    return found


def _layers(
    part: _Part, entries: Mapping[str, Mapping[str, Tensor]], family: kohya.Family, found: set[str]
) -> Iterator[LoRALayer]:
    if part.component.name not in family.prefixes:
        return
    for weight in part.weights.tensors:
        name = weight.removesuffix(".weight")
        try:
            key, number = kohya.key_of(part.component, name, family)
        except OPLoRATypeError:  # the format has no name for it
            continue
        if name != weight and (entry := entries.get(key)) is not None:
            found.add(key)
            rows = kohya.rows_of(key, number, entry["A"].shape[1])
            if (layer := _layer(name, entry, rows, family, part.weights)) is not None:
                yield layer


def _layer(
    name: str, entry: Mapping[str, Tensor], rows: slice, family: kohya.Family, weights: BaseWeights
) -> LoRALayer | None:
    A, B, scale = entry["A"], entry["B"], entry.get("dora_scale")
    if family is kohya.FLUX and name == "norm_out.linear":
        B, scale = kohya.swap_halves(B), None if scale is None else kohya.swap_halves(scale)
    scaling = float(entry["alpha"]) / len(A) if "alpha" in entry else 1.0
    B, scale = B[rows], None if scale is None else scale.flatten()[rows].clone()
    if rows != slice(None):  # of a fused matrix: the ranks that are this part's, if any are
        own = B.any(dim=0)
        if scale is None and not own.any():
            return None
        own[0] |= not own.any()  # DoRA on a layer whose B is zero
        A, B = A[own], B[:, own]
    A, B = A.clone(), B.contiguous()
    layer = LoRALayer(name, A, B, scaling)
    if scale is None:
        return layer
    base_norm, norm = weights.norms(layer)
    return LoRALayer(name, A, B, scaling, scale * norm / base_norm)
