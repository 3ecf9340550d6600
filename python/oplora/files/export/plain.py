"""PEFT's format for readers that know one rank and one alpha: alpha = r for every layer, and every scale is in B.

What llama.cpp's converter and others read of a PEFT file is lora_alpha, not use_rslora, alpha_pattern nor what r and
alpha are together. So each layer's scale is folded into its B, ranks are filled up with zeros to the greatest, and
alpha is that rank: the scale is 1 whichever way it is read, and PEFT reads the same adapter as before.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import OPLoRATypeError, OPLoRAValueError
from ..peft_adapter import CONFIG, KEY_PREFIX, WEIGHTS, AdapterConfig, FactorKey, factor_of, parse_config, refuse_more
from ..tensor_file import read_object
from .layers import refuse_no_pair

__all__ = ["fold"]


def fold(folder: Path, source: Path = Path()) -> None:
    """Rewrites the adapters that PEFT wrote into `folder` and its subfolders; messages name them in `source`."""
    for path in sorted(folder.rglob(CONFIG)):
        _fold(path, source / path.relative_to(folder))


def _fold(path: Path, shown: Path) -> None:
    fields = read_object(path)
    if fields.get("peft_type") != "LORA":
        raise OPLoRATypeError(
            f'{shown}: peft_type is {fields.get("peft_type")!r}, and format="plain" is LoRA\'s. Save it with '
            'format="peft".'
        )
    refuse_more(shown, fields, 'Save it with format="peft".', allowed=("use_dora",))
    config = parse_config(shown, fields)
    tensors = load_file(path.with_name(WEIGHTS))
    factors = {key: found for key in tensors if (found := factor_of(key.removeprefix(KEY_PREFIX)))}
    ranks = _ranks(shown, tensors, factors, config)
    r = max(ranks.values())
    for key, found in factors.items():
        own = ranks[found.module]
        numbers = tensors[key].to(torch.promote_types(tensors[key].dtype, torch.float32))
        if found.factor == "B":
            numbers = numbers * config.scaling(_target(found.module), own)
        tensors[key] = _filled(shown, key, numbers, 0 if found.factor == "A" else 1, own, r)
    save_file(tensors, path.with_name(WEIGHTS), {"format": "pt"})
    one = {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    path.write_text(json.dumps(fields | one, indent=2, sort_keys=True))


def _target(module: str) -> str:
    """The module that the configuration's patterns are matched with: of the one inside MultiheadAttention, that."""
    return module.partition(".base_layer.")[0]


def _ranks(
    shown: Path, tensors: Mapping[str, Tensor], factors: Mapping[str, FactorKey], config: AdapterConfig
) -> dict[str, int]:
    """By module, each of which has an A and a B that go together."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, found in factors.items():
        pairs.setdefault(found.module, {})[found.factor] = tensors[key]
    if not pairs:
        raise OPLoRAValueError(f"{shown.with_name(WEIGHTS)} holds no lora_A and lora_B. Save the adapter again.")
    for module, pair in pairs.items():
        refuse_no_pair(shown.with_name(WEIGHTS), module, pair.get("A"), pair.get("B"), config.rank(_target(module)))
    return {module: len(pair["A"]) for module, pair in pairs.items()}


def _filled(path: Path, key: str, numbers: Tensor, dim: int, own: int, r: int) -> Tensor:
    """Zeros where a layer has less than the rank of all."""
    if own == r:
        return numbers.contiguous()
    if numbers.shape[dim] != own:
        raise OPLoRATypeError(
            f"{path}: {key} is of a convolution in groups, whose rank cannot be filled up to {r}, that of other "
            'layers. Train it with one rank for all, or save it with format="peft".'
        )
    shape = list(numbers.shape)
    shape[dim] = r - own
    return torch.cat([numbers, numbers.new_zeros(shape)], dim)
