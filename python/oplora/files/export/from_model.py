"""The adapters in models and pipelines, read as layers."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...adapters import STARTS, unwrapped
from ...errors import OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError
from .layers import Component, LoRALayer, component_name, refuse_extras

__all__ = ["components_of", "read_components"]

FACTORS: Final = {"lora_A", "lora_B", "lora_magnitude_vector"}
# of PEFT's variants of a layer: those that are plain LoRA once they are trained, and DoRA
VARIANTS: Final = ("Dora", "MiCA", "Velora")
NO_ADAPTER: Final = "no adapter. Add one with peft.get_peft_model or add_adapter"


def components_of(model: Any) -> dict[str, nn.Module]:
    """The modules with an adapter in a pipeline or in a mapping of names to modules; {"": model} for a module."""
    if isinstance(model, nn.Module):
        return {"": model}
    parts = model if isinstance(model, Mapping) else getattr(model, "components", None)
    if not isinstance(parts, Mapping):
        raise OPLoRATypeError(
            f"oplora.save_adapter: expected a model with an adapter, a diffusers pipeline, or a mapping of names to "
            f'models like {{"unet": unet, "text_encoder": text_encoder}}, got {type(model).__name__}.'
        )
    adapted = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and any(_layers(part))}
    if not adapted:
        there = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items() if part is not None)
        raise OPLoRAValueError(
            f"oplora.save_adapter: no part of the {type(model).__name__} has an adapter; it has {there or 'none'}. "
            "Add one with add_adapter(LoraConfig(...))."
        )
    return adapted


def read_components(model: Any) -> list[Component]:
    """The active adapter of every component of a model, of a pipeline, or of a mapping of names to models.

    Raises:
        OPLoRAError: merged layers, several active adapters, factors that are not finite, or what only PEFT's own format
            holds: adapters other than LoRA and DoRA on linear and convolutional layers, biases, modules_to_save.
    """
    found = []
    for name, part in components_of(model).items():
        module = _inner(part)
        kind = type(module).__name__
        config = getattr(module, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        configs = getattr(unwrapped(part), "peft_config", {})
        name = name or component_name(kind)
        read = [_read(f"{name}.{path}", path, layer, configs) for path, layer in _layers(module)]
        layers = tuple(layer for layer in read if layer is not None)
        if not layers:
            lacks = "no active adapter. Call set_adapter with one of: " + ", ".join(configs) if read else NO_ADAPTER
            raise OPLoRAValueError(f"oplora.save_adapter: {kind} has {lacks}.")
        found.append(Component(name, layers, kind, config))
    return found


def _inner(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    get_base_model = getattr(model, "get_base_model", None)  # PeftModel's
    return get_base_model() if get_base_model else model


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name.replace("_orig_mod.", ""), module


def _read(where: str, name: str, layer: Any, configs: Mapping[str, Any]) -> LoRALayer | None:
    """None of a layer that the active adapter leaves as it is."""
    from peft.tuners.lora import Conv2d, Linear, LoraLayer

    if layer.merged:
        raise OPLoRARuntimeError(f"oplora.save_adapter: layer {where} is merged into its base. Unmerge it first.")
    if not isinstance(layer, LoraLayer):
        raise OPLoRATypeError(
            f"oplora.save_adapter: layer {where} is a {type(layer).__module__}.{type(layer).__name__}; diffusers' and "
            'kohya\'s files hold LoRA and DoRA. Save it with format="peft".'
        )
    active = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
    if not active:
        return None
    if len(active) != 1:
        raise OPLoRARuntimeError(
            f"oplora.save_adapter: layer {where} has {len(active)} active adapters ({', '.join(active)}), and a file "
            f"holds one. Call set_adapter with one of: {', '.join(layer.scaling)}."
        )
    (adapter,) = active
    refuse_extras(where, configs.get(adapter))
    modules: dict[str, Any] = vars(layer)["_modules"]
    others = [tensor for tensor in STARTS if tensor not in FACTORS and adapter in modules.get(tensor, ())]
    if (variant := layer.lora_variant.get(adapter)) and not type(variant).__name__.startswith(VARIANTS):
        others.append(type(variant).__name__)
    quantised = type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
    if others or not (isinstance(layer, Linear | Conv2d) or quantised) or adapter not in layer.lora_A:
        raise OPLoRATypeError(
            f"oplora.save_adapter: layer {where} ({type(layer.get_base_layer()).__name__}{', ' * bool(others)}"
            f"{', '.join(others)}) is none that diffusers' and kohya's files hold: these are nn.Linear, Conv1D and "
            'nn.Conv2d with lora_A, lora_B and DoRA\'s magnitude. Save it with format="peft".'
        )
    A, B = _own(modules["lora_A"][adapter].weight), _own(modules["lora_B"][adapter].weight)
    _refuse_nonfinite(where, lora_A=A, lora_B=B)
    scaling = float(layer.scaling[adapter])
    if adapter not in layer.lora_magnitude_vector:
        return LoRALayer(name, A, B, scaling)
    magnitude = _own(modules["lora_magnitude_vector"][adapter].weight).flatten()
    _refuse_nonfinite(where, lora_magnitude_vector=magnitude)
    base_norm, norm = _row_norms(layer, scaling, A, B)
    return LoRALayer(name, A, B, scaling, magnitude, base_norm, norm)


def _own(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to("cpu", dtype, copy=True).contiguous()


def _refuse_nonfinite(where: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
            raise OPLoRAValueError(
                f"oplora.save_adapter: {name} of layer {where} holds NaN or infinity. The training has diverged: go "
                "back to an earlier checkpoint."
            )


def _row_norms(layer: Any, scaling: float, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """||W0|| and ||W0 + scaling * B A|| of each row, as PEFT takes them."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).detach().to("cpu", A.dtype)
    if getattr(layer, "fan_in_fan_out", False):
        weight = weight.T
    weight = weight.flatten(1)
    return weight.norm(dim=1), (weight + scaling * B.flatten(1) @ A.flatten(1)).norm(dim=1)
