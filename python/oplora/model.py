"""Into a model and out of it again: wrap() injects LoRA, merge() folds it in. PEFT does both."""

import collections
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapters import unwrapped
from .config import OPLoRAConfig, check_adapter_name
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
        OPLoRAError: an adapter is there already; no layer matches target_modules, and the message names some that there
            are; or PEFT refuses another field.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = OPLoRAConfig() if config is None else config
    if not isinstance(model, nn.Module) or not isinstance(config, OPLoRAConfig | LoraConfig):
        raise OPLoRATypeError(
            "oplora.wrap: expected (nn.Module, OPLoRAConfig or peft's LoraConfig), got "
            f"({type(model).__name__}, {type(config).__name__}). For another of PEFT's adapters call "
            "peft.get_peft_model(model, config)."
        )
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise OPLoRAValueError(
            "oplora.wrap: the model has an adapter already. Pass it to oplora.AdamW as it is, or add another with its "
            "add_adapter, under another name."
        )
    own = config.adapter_name if isinstance(config, OPLoRAConfig) else "default"
    name = own if adapter_name is None else adapter_name
    check_adapter_name(name, "oplora.wrap")
    try:
        return get_peft_model(model, config.to_peft() if isinstance(config, OPLoRAConfig) else config, name)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise OPLoRAValueError(f"oplora.wrap: PEFT refused the configuration. {error}") from error
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        there = f"{len(linear)} linear layers: {', '.join(linear[:5])}{', ...' if len(linear) > 5 else ''}"
        raise OPLoRAValueError(
            f"oplora.wrap: PEFT refused target_modules={config.target_modules!r}; the model has {there}. {error}"
        ) from error


def merge(model: nn.Module, adapter_names: list[str] | None = None) -> nn.Module:
    """The base model with the adapter folded in: W + scaling B A, and plain layers again, by PEFT's own unloading.

    Of modules that share one weight, as a tied head and embedding do, those that are adapted get one of their own: the
    merged model gives what the adapted one gave, where PEFT alone would change both.

    Args:
        model: a PeftModel, or a model with injected PEFT layers (transformers' and diffusers' add_adapter).
        adapter_names: which to fold, with the modules_to_save of theirs; by default the active ones. The others go.

    Raises:
        OPLoRAError: no adapter to fold, or names of none; one module in modules_to_save of several; an adapter of a
            type that PEFT does not merge, or NaN in a merged weight; the model is left as it was.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = unwrapped(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise OPLoRAValueError(f"oplora.merge: {type(model).__name__} has no adapter to fold in.")
    tuners = _tuners(model)
    _check_names(adapter_names, tuners, layers)
    try:
        _try(model, adapter_names)
        if adapter_names is not None:
            _choose_saved_modules(model, adapter_names)
        _part(model, layers)
        for tuner in tuners:
            tuner.merge_and_unload(adapter_names=adapter_names)
    except NotImplementedError as error:
        raise OPLoRATypeError(
            f"oplora.merge: PEFT cannot merge an adapter of this type ({error}). Save it with oplora.save_adapter and "
            "load it beside its base."
        ) from error
    except (ValueError, RuntimeError) as error:
        raise OPLoRAValueError(f"oplora.merge: {error}") from error
    for module in model.modules():
        if getattr(module, "_hf_peft_config_loaded", False):  # transformers' and diffusers' own mark of an adapter
            module._hf_peft_config_loaded = False  # type: ignore[assignment]
    is_wrapped = any(module is tuners[0] for module in model.modules())
    return tuners[0].model if is_wrapped else model  # type: ignore[no-any-return]


def _check_names(adapter_names: list[str] | None, tuners: list[Any], layers: list[Any]) -> None:
    """PEFT unloads adapters of which nothing was folded in, without a word."""
    there = dict.fromkeys(name for tuner in tuners for name in tuner.peft_config)
    known = ", ".join(map(repr, there))
    if adapter_names is None:
        if not any(layer.active_adapters for layer in layers):
            raise OPLoRAValueError(
                f"oplora.merge: no adapter is active, so there is none to fold in. Pass adapter_names, some of {known}."
            )
        return
    if not isinstance(adapter_names, list | tuple) or not adapter_names:
        raise OPLoRATypeError(f"oplora.merge: adapter_names is {adapter_names!r}, expected a list of some of {known}.")
    if unknown := [name for name in adapter_names if name not in there]:
        raise OPLoRAValueError(f"oplora.merge: no adapter is named {unknown[0]!r}; the model has {known}.")


def _choose_saved_modules(model: nn.Module, adapter_names: list[str]) -> None:
    """Those of the adapters to fold: PEFT takes the active one's."""
    from peft.utils.other import ModulesToSaveWrapper

    chosen = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            chosen[module] = own = [adapter for adapter in adapter_names if adapter in module.modules_to_save]
            if len(own) > 1:
                raise OPLoRAValueError(
                    f"{name} is in modules_to_save of {', '.join(own)}, and the merged model has one such module. Name "
                    "one of these adapters."
                )
    for module, own in chosen.items():
        module.set_adapter(own)


def _tuners(model: nn.Module) -> list[Any]:
    """PEFT's object for a model with adapters: a PeftModel's own, or one for what had add_adapter called."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    if own := [module for module in model.modules() if isinstance(module, BaseTuner)]:
        return own
    found = []
    for module in model.modules():
        if isinstance(configs := getattr(module, "peft_config", None), dict) and configs:
            kind = PEFT_TYPE_TO_TUNER_MAPPING[next(iter(configs.values())).peft_type]
            tuner: Any = kind.__new__(kind)  # its __init__ would add the adapter once more
            nn.Module.__init__(tuner)
            tuner.model, tuner.peft_config = module, configs
            found.append(tuner)
    return found


def _try(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raises what merging would raise, on copies: PEFT raises in the middle, with some layers merged and gone.

    Of plain LoRA one layer of a kind is tried, and others where their numbers might not be finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tried = set()
    inside: tuple[str, ...] = ()
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or name.startswith(inside):
            continue
        inside += (f"{name}.",)
        kind = _kind(layer, adapter_names)
        if kind not in tried or kind is None or not _is_finite(layer, adapter_names):
            twin: Any = _twin(layer)
            while isinstance(twin, BaseTunerLayer):
                twin.merge(safe_merge=True, adapter_names=adapter_names)
                twin = vars(twin)["_modules"]["base_layer"]
        tried.add(kind)


def _twin(layer: Any) -> Any:
    """A copy, without the arguments that PEFT made it with: tensors among them, as of a tied adapter, are no leaves."""
    arguments = [kwargs for module in layer.modules() if isinstance(kwargs := vars(module).get("kwargs"), dict)]
    none: dict[int, Any] = {id(kwargs): {} for kwargs in arguments}
    return copy.deepcopy(layer, none)


def _adapters(layer: Any, adapter_names: list[str] | None) -> list[str]:
    return [name for name in adapter_names or layer.active_adapters if name in layer.lora_A]


def _kind(layer: Any, adapter_names: list[str] | None) -> tuple[Any, ...] | None:
    """What layers of plain LoRA have in common that merge alike; None of other layers."""
    from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear

    if type(layer) not in (Linear, Conv1d, Conv2d, Conv3d) or not _adapters(layer, adapter_names):
        return None
    base = layer.get_base_layer()
    of_adapters = tuple((n, layer.lora_bias[n], n in layer.lora_variant) for n in _adapters(layer, adapter_names))
    return type(layer), type(base), base.weight.dtype, base.bias is None, getattr(base, "groups", 1), of_adapters


def _is_finite(layer: Any, adapter_names: list[str] | None) -> bool:
    """Whether W + scaling B A surely is, by the greatest entries: |(B A)_ij| <= max |B| max_j sum_k |A_kj|."""
    weight = layer.get_base_layer().weight
    bound = max(abs(end) for end in map(float, weight.detach().aminmax()))
    for name in _adapters(layer, adapter_names):
        A, B = (factor[name].weight.detach().float() for factor in (layer.lora_A, layer.lora_B))
        if name in layer.lora_variant or (layer.lora_bias[name] and not layer.lora_B[name].bias.isfinite().all()):
            return False
        bound += abs(layer.scaling[name]) * float(B.abs().max() * A.flatten(1).abs().sum(0).max())
    return bound < 0.99 * torch.finfo(weight.dtype).max


def _part(model: nn.Module, layers: list[Any]) -> None:
    """Gives adapted modules whose weight is another's too one of their own; the last that has it keeps it."""
    holders = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for base in dict.fromkeys(layer.get_base_layer() for layer in layers):
        weight = getattr(base, "weight", None)
        if isinstance(weight, nn.Parameter) and holders[id(weight)] > 1:
            holders[id(weight)] -= 1
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
