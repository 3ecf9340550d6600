"""PEFT's format for readers that know one rank and one alpha: alpha = r for every layer, and every scale is in B.

What llama.cpp's converter and others read of a PEFT file is lora_alpha, not use_rslora, alpha_pattern nor what r and
alpha are together. So each layer's scale is folded into its B, ranks are filled up with zeros to the greatest, and
alpha is that rank: the scale is 1 whichever way it is read, and PEFT reads the same adapter as before.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import OPLoRATypeError
from ..peft_adapter import CONFIG, KEY_PREFIX, WEIGHTS, factor_of, parse_config, refuse_more
from ..tensor_file import read_object, read_tensor_file

__all__ = ["fold"]


def fold(folder: Path) -> None:
    """Rewrites the adapters that PEFT wrote into `folder` and its subfolders."""
    for path in sorted(folder.rglob(CONFIG)):
        _fold(path)


def _fold(path: Path) -> None:
    fields = read_object(path)
    if fields.get("peft_type") != "LORA":
        raise OPLoRATypeError(
            f'{path.name}: peft_type is {fields.get("peft_type")!r}, and format="plain" is LoRA\'s. Save it with '
            'format="peft".'
        )
    refuse_more(path, fields, 'Save it with format="peft".', allowed=("use_dora",))
    config = parse_config(path, fields)
    read_tensor_file(path.with_name(WEIGHTS))  # says what is wrong with the file
    tensors = load_file(path.with_name(WEIGHTS))
    factors = {key: found for key in tensors if (found := factor_of(key.removeprefix(KEY_PREFIX)))}
    ranks = {found.module: len(tensors[key]) for key, found in factors.items() if found.factor == "A"}
    r = max(ranks.values(), default=config.r)
    for key, found in factors.items():
        own = ranks.get(found.module, r)
        numbers = tensors[key].to(torch.promote_types(tensors[key].dtype, torch.float32))
        if found.factor == "B":
            numbers = numbers * config.scaling(found.module, own)
        tensors[key] = _filled(path, key, numbers, 0 if found.factor == "A" else 1, own, r)
    save_file(tensors, path.with_name(WEIGHTS), {"format": "pt"})
    one = {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    path.write_text(json.dumps(fields | one, indent=2, sort_keys=True))


def _filled(path: Path, key: str, numbers: Tensor, dim: int, own: int, r: int) -> Tensor:
    """Zeros where a layer has less than the rank of all."""
    if own == r:
        return numbers.contiguous()
    if numbers.shape[dim] != own:
        raise OPLoRATypeError(
            f"{path.name}: {key} is of a convolution in groups, whose rank cannot be filled up to {r}, that of other "
            'layers. Train it with one rank for all, or save it with format="peft".'
        )
    shape = list(numbers.shape)
    shape[dim] = r - own
    return torch.cat([numbers, numbers.new_zeros(shape)], dim)
