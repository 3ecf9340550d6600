"""What the formats have in common: the adapted layers of a model or a file, whatever their keys are called."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...adapters import STARTS, unwrapped
from ...errors import OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError
from ..merge_sources import CHANGED_BASE

__all__ = [
    "Component",
    "LoRALayer",
    "component_name",
    "components_of",
    "path_in_file",
    "read_components",
    "refuse_extras",
]

# a component's place in a pipeline, by its class: what a bare module is called in a file
NAMES: Final = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
FACTORS: Final = {"lora_A", "lora_B", "lora_magnitude_vector"}


@dataclass(frozen=True)
class LoRALayer:
    """One adapted layer: y = W0 x + scaling * B (A x), and with DoRA m / ||W0 + scaling * B A|| times that.

    Tensors are on the CPU, contiguous, and share no memory with the model; float32, or float64 if they were trained so.
    """

    name: str  # of the module in its component: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora_A: Tensor  # (r, in_features), or (r, in_channels, height, width)
    lora_B: Tensor  # (out_features, r), or (out_channels, r, 1, 1)
    scaling: float  # alpha / r, or alpha / sqrt(r)
    magnitude: Tensor | None = None  # DoRA's m, (out_features,)
    base_norm: Tensor | None = None  # DoRA: ||W0|| of each row, (out_features,)
    norm: Tensor | None = None  # DoRA: ||W0 + scaling * B A|| of each row, (out_features,)

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def folded(self) -> Tensor:
        """scaling * B: with it the layer is one of alpha = r."""
        return self.lora_B * self.scaling

    def magnitude_of_peft(self) -> Tensor:
        """m in the shape that PEFT's layers have it in."""
        assert self.magnitude is not None
        return self.magnitude.view((1, -1, 1, 1) if self.lora_A.dim() == 4 else (-1,))


@dataclass(frozen=True)
class Component:
    name: str  # its place in a pipeline: "unet", "transformer", "text_encoder", "text_encoder_2"
    layers: tuple[LoRALayer, ...]
    kind: str  # the class of the module: "UNet2DConditionModel"; "" where a file does not tell
    config: Mapping[str, Any]  # of the module, as diffusers and transformers write it; may be empty


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
        layers = tuple(_read(f"{name}.{path}", path, layer, configs) for path, layer in _layers(module))
        if not layers:
            raise OPLoRAValueError(
                f"oplora.save_adapter: {kind} has no adapter. Add one with peft.get_peft_model or add_adapter."
            )
        found.append(Component(name, layers, kind, config))
    return found


def component_name(kind: str) -> str:
    """The place of a class in a pipeline."""
    if kind in NAMES or "Transformer2D" in kind or "Transformer3D" in kind:
        return NAMES.get(kind, "transformer")
    raise OPLoRAValueError(
        f"oplora.save_adapter: a {kind or 'model of unknown class'} has no place of its own in a diffusers pipeline; "
        f"known are {', '.join(NAMES)} and transformers. Name it, as in save_adapter({{'text_encoder_3': m}}, ...), "
        'or take format="peft".'
    )


def path_in_file(component: str, name: str) -> str:
    """A module's path as files have it: a level of CLIP's text encoders that transformers 5 left out is in them."""
    if component.startswith("text_encoder") and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def refuse_extras(where: str, config: Any) -> None:
    """What an adapter's configuration says of tensors that have no place beside A and B, or of another base."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise OPLoRATypeError(
            f"oplora.save_adapter: {where} started from init_lora_weights={start!r}, which changed the base's "
            'weights, so its factors do not fit the base that others have. Save it with format="peft".'
        )
    extras = {
        "modules_to_save": getattr(config, "modules_to_save", None),
        "lora_bias": getattr(config, "lora_bias", False),
    }
    if getattr(config, "bias", "none") != "none":
        extras["bias"] = config.bias
    for name, value in extras.items():
        if value:
            raise OPLoRATypeError(
                f"oplora.save_adapter: {where} was trained with {name}={value!r}, for which diffusers' and kohya's "
                'files have no place. Save it with format="peft".'
            )


def _inner(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    get_base_model = getattr(model, "get_base_model", None)  # PeftModel's
    return get_base_model() if get_base_model else model


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name.replace("_orig_mod.", ""), module


def _read(where: str, name: str, layer: Any, configs: Mapping[str, Any]) -> LoRALayer:
    from peft.tuners.lora import Conv2d, Linear, LoraLayer

    if layer.merged:
        raise OPLoRARuntimeError(f"oplora.save_adapter: layer {where} is merged into its base. Unmerge it first.")
    if not isinstance(layer, LoraLayer):
        raise OPLoRATypeError(
            f"oplora.save_adapter: layer {where} is a {type(layer).__module__}.{type(layer).__name__}; diffusers' and "
            'kohya\'s files hold LoRA and DoRA. Save it with format="peft".'
        )
    active = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
    if len(active) != 1:
        raise OPLoRARuntimeError(
            f"oplora.save_adapter: layer {where} has {len(active)} active adapters ({', '.join(active)}), and a file "
            f"holds one. Call set_adapter with one of: {', '.join(layer.scaling)}."
        )
    (adapter,) = active
    refuse_extras(where, configs.get(adapter))
    modules: dict[str, Any] = vars(layer)["_modules"]
    others = [tensor for tensor in STARTS if tensor not in FACTORS and adapter in modules.get(tensor, ())]
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
