"""Checkpoints of version 0.1: a layer's arenas, whole, as the entries that its tensors have now."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import OPLoRAValueError
from .memory import columns

__all__ = ["entries_of_0_1"]


def entries_of_0_1(name: str, saved: Any) -> list[dict[str, Any]]:
    """What 0.1 saved of layer `name`, an entry a tensor.

    Raises:
        OPLoRAError: it is damaged.
    """
    if not isinstance(saved, Mapping):
        raise OPLoRAValueError(f"oplora: the saved state of layer {name} is a {type(saved).__name__}.")
    kind = saved.get("state", "exact")  # which the first of 0.1's checkpoints do not tell
    own = ("numbers", "moments", "scalars", "seed", "layer", "masters") if kind == "lean" else _EXACT
    common = ("shapes", "hidden_width", "latent_width", "step", "bases", "factors")
    if missing := {*own, *common} - saved.keys():
        raise OPLoRAValueError(f"oplora: the saved state of layer {name} lacks {', '.join(sorted(missing))}.")
    shapes = [torch.Size(shape) for shape in saved["shapes"]]
    for key in ("bases", "factors"):
        if not isinstance(saved[key], list | tuple) or len(saved[key]) != len(shapes):
            raise OPLoRAValueError(f"oplora: the saved {key} of layer {name} are not one a factor.")
    arenas = [saved[key] for key in (own[:3] if kind == "lean" else _EXACT)]
    if not all(isinstance(arena, Tensor) for arena in arenas):
        raise OPLoRAValueError(f"oplora: the saved state of layer {name} holds what is no tensor.")
    try:
        entries = _lean(saved, shapes) if kind == "lean" else _exact(saved, shapes)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OPLoRAValueError(f"oplora: the saved state of layer {name} does not fit its shapes: {error}") from error
    for entry, base, factor in zip(entries, saved["bases"], saved["factors"], strict=True):
        entry |= {"factor": factor} if base is None else {"factor": factor, "base": base}
    entries[0] |= {key: saved[key] for key in ("step", "hidden_width", "latent_width")}
    return entries


_EXACT = ("parameters", "exp_avg", "exp_avg_sq", "decay", "moving")


def _lean(saved: Mapping[str, Any], shapes: list[torch.Size]) -> list[dict[str, Any]]:
    numbers, moments = saved["numbers"], saved["moments"]
    d, k, N = saved["weight_rank"], saved["moment_rank"], sum(shape.numel() for shape in shapes)
    entries, row = [], 0
    for shape, master in zip(shapes, saved["masters"], strict=True):
        entry = {
            "weight_change": columns(numbers, row, d, N, shape),
            "exp_avg": columns(moments, row, k + 1, N, shape),
            "exp_avg_sq": columns(moments, (k + 1) * N + row, 2, N, shape),
        }
        entries.append(entry if master is None else {**entry, "master": master})
        row += shape.numel()
    random = saved.get("random", [tensor in ("lora_A", "lora_embedding_B") for tensor in saved["tensors"]])
    seed = saved["seed"]
    entries[0] |= {
        "hidden": numbers[d * N :],
        "hidden_moments": moments[(k + 3) * N :],
        "scalars": saved["scalars"],
        "weight_rank": d,
        "moment_rank": k,
        "sign": int(saved["start"] == "sign"),
        "seed": seed - (1 << 64) if seed >= 1 << 63 else seed,
        "layer": saved["layer"],
        "latent_std": saved.get("latent_std", 0.01),
        "random": sum(int(bit) << f for f, bit in enumerate(random)),
    }
    return entries


def _exact(saved: Mapping[str, Any], shapes: list[torch.Size]) -> list[dict[str, Any]]:
    H, N = saved["hidden_width"], sum(shape.numel() for shape in shapes)
    arenas = {"weight": saved["parameters"], "exp_avg": saved["exp_avg"], "exp_avg_sq": saved["exp_avg_sq"]}
    entries, row = [], 0
    for shape in shapes:
        entries.append({name: columns(arena, row, H + 1, N, shape) for name, arena in arenas.items()})
        row += shape.numel()
    begin = (H + 1) * N
    entries[0] |= {
        "hidden": saved["parameters"][begin:],
        "hidden_exp_avg": saved["exp_avg"][begin:],
        "hidden_exp_avg_sq": saved["exp_avg_sq"][begin:],
        "decay": saved["decay"].expand(len(shapes), H),  # one for all tensors then
        "moving": saved["moving"],
    }
    return entries
