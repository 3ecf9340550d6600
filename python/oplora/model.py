"""Into a model and out of it again: wrap() injects LoRA, merge() folds it in. PEFT does both."""

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import OPLoRAConfig
from .errors import OPLoRATypeError, OPLoRAValueError

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["merge", "wrap"]


def wrap(model: nn.Module, config: "OPLoRAConfig | LoraConfig | None" = None, adapter_name: str | None = None) -> Any:
    """A PeftModel with LoRA in the layers that config.target_modules names, every other parameter frozen.

    Args:
        model: any nn.Module; its layers are replaced in place, as by peft.get_peft_model.
        config: OPLoRAConfig(), by default rank 8 in every linear layer; or peft's LoraConfig, which has more fields and
            is taken as it is.
        adapter_name: by default the OPLoRAConfig's, which is "default".

    Raises:
        OPLoRAError: no layer matches target_modules; the message names some that there are.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    config = OPLoRAConfig() if config is None else config
    if not isinstance(model, nn.Module) or not isinstance(config, OPLoRAConfig | LoraConfig):
        raise OPLoRATypeError(
            "oplora.wrap: expected (nn.Module, OPLoRAConfig or peft's LoraConfig), got "
            f"({type(model).__name__}, {type(config).__name__}). For another of PEFT's adapters call "
            "peft.get_peft_model(model, config)."
        )
    if isinstance(model, PeftModel):
        raise OPLoRAValueError(
            "oplora.wrap: the model has an adapter already. Pass it to oplora.AdamW as it is, or add another with "
            "model.add_adapter(name, config)."
        )
    try:
        if isinstance(config, OPLoRAConfig):
            return get_peft_model(model, config.to_peft(), adapter_name or config.adapter_name)
        return get_peft_model(model, config, adapter_name or "default")
    except ValueError as error:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        there = f"{len(linear)} linear layers: {', '.join(linear[:5])}{', ...' if len(linear) > 5 else ''}"
        raise OPLoRAValueError(
            f"oplora.wrap: PEFT refused target_modules={config.target_modules!r}; the model has {there}. {error}"
        ) from error


def merge(model: nn.Module, adapter_names: list[str] | None = None) -> nn.Module:
    """The base model with the adapter folded in: W + scaling B A, and plain layers again.

    Args:
        model: a PeftModel, or a model with injected PEFT layers (transformers' and diffusers' add_adapter).
        adapter_names: which to fold; by default the active ones.

    Raises:
        OPLoRAError: no adapter to fold, one of a type that PEFT does not merge, or NaN in a merged weight; the model is
            left as it was.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise OPLoRAValueError(f"oplora.merge: {type(model).__name__} has no adapter to fold in.")
    try:
        for _, layer in layers:  # on a copy first: PEFT raises in the middle, with some layers merged and gone
            copy.deepcopy(layer).merge(safe_merge=True, adapter_names=adapter_names)
        if isinstance(model, PeftModel):
            merged: nn.Module = model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
            return merged
        for _, layer in layers:
            layer.merge(safe_merge=True, adapter_names=adapter_names)
    except NotImplementedError as error:
        raise OPLoRATypeError(
            f"oplora.merge: PEFT cannot merge an adapter of this type ({error}). Save it with oplora.save_adapter and "
            "load it beside its base."
        ) from error
    except ValueError as error:
        raise OPLoRAValueError(f"oplora.merge: {error}") from error
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model
