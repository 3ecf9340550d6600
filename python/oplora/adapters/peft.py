"""PEFT's layers: each adapted layer's trainable tensors, as PEFT keeps them.

A layer is found by PEFT's own attributes, and its tensors are looked up again at every step: PEFT replaces Parameter
objects (low_cpu_mem_usage, the cast of a half-precision adapter), and one that was kept would be dead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError
from .layers import AdaptedLayer, Place, check_parameter, is_divided, refuse_flattened
from .tensors import STARTS

__all__ = [
    "PeftLayer",
    "check_adapter_name",
    "find_layers",
    "foreign_gradient",
    "foreign_tensors",
    "has_peft_layers",
    "memory_of",
    "other_parameters",
    "unwrapped",
]


@dataclass(frozen=True)
class Twin:
    """A Parameter of its own over the memory of a layer's `index`-th tensor: PEFT ties a head to an embedding so."""

    layer: str  # to which it belongs
    index: int
    module: Any
    adapter: str
    tensor: str

    def parameter(self) -> nn.Parameter:
        return _held(self.module._modules[self.tensor], self.adapter)


@dataclass(frozen=True)
class PeftLayer(AdaptedLayer):
    """One PEFT layer, `module`, and one of its adapters."""

    name: str
    module: Any
    adapter: str
    tensors: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    is_eva: bool = False
    twins: tuple[Twin, ...] = ()

    def places(self) -> list[Place]:
        """By way of the modules' own dicts: nn.Module's attribute look-up would cost a step of many small layers a
        tenth of its time."""
        containers, adapter = self.module._modules, self.adapter
        try:
            return [_place(containers[tensor], adapter) for tensor in self.tensors]
        except KeyError as error:
            raise self.lost() from error

    def modules(self) -> list[Any]:
        return [self.module, *(twin.module for twin in self.twins)]

    def refuse_if_folded(self) -> None:
        """A step on a merged layer would make the later unmerge subtract another product than was added."""
        for name, module in ((self.name, self.module), *((twin.layer, twin.module) for twin in self.twins)):
            if module.merged:
                raise OPLoRARuntimeError(
                    f"oplora: layer {name} is merged into its base weight; a step now would corrupt the base at "
                    "unmerge. Call model.unmerge_adapter() before the step. Nothing was changed."
                )
        if self.module.disable_adapters:
            raise OPLoRARuntimeError(
                f"oplora: the adapters of layer {self.name} are disabled, so its gradients are not of the model that "
                "is trained. Enable them (model.enable_adapter_layers(), or leave `with model.disable_adapter()`) "
                "before the step. Nothing was changed."
            )

    def pair(self) -> tuple[int, int] | None:
        """As AdaptedLayer.pair; KaSA has something between A and B."""
        return None if self.adapter in self.module._modules.get("lora_diag", ()) else super().pair()

    def blocks(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """As AdaptedLayer.blocks; also one block an expert."""
        if (experts := getattr(self.module, "num_experts", 1)) > 1:
            return A.reshape(experts, -1, A.shape[-1]), B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        container = self.module._modules["lora_A"]._modules
        if (n := getattr(container.get(self.adapter), "nblocks", 1)) > 1:  # BD-LoRA: A's blocks stand side by side
            return A.reshape(n, -1, A.shape[-1]), B.reshape(B.shape[0], n, -1).transpose(0, 1)
        return super().blocks(A, B)


def _place(container: Any, adapter: str) -> Place:
    """What a ModuleDict of layers or a ParameterDict holds for the adapter."""
    if adapter in container._modules:
        return container._modules, adapter, True
    return container._parameters, adapter, False


def _held(container: Any, adapter: str) -> nn.Parameter:
    at, key, of_module = _place(container, adapter)
    parameter: nn.Parameter = at[key]._parameters["weight"] if of_module else at[key]
    return parameter


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of what torch.compile and DistributedDataParallel put around it: it has the same names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def memory_of(parameter: nn.Parameter) -> tuple[Any, ...]:
    """What two Parameters share that are one. A DTensor has no address of its own."""
    if is_divided(parameter):
        return (id(parameter),)
    return parameter.data_ptr(), parameter.numel(), parameter.dtype


def _is_adalora(module: nn.Module) -> bool:
    return "lora_E" in module._modules


def _adapters_of(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(adapter, tensor, parameter) for every tensor of one PEFT layer that can be generated.

    None of AdaLoRA, which is LoRA's by its names, but prunes what it trains between the steps.
    """
    if _is_adalora(module):
        return
    for tensor in STARTS:
        container: Any = module._modules.get(tensor, ())
        for adapter in container:
            if adapter in container._parameters or "weight" in container[adapter]._parameters:
                yield adapter, tensor, _held(container, adapter)


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def has_peft_layers(model: nn.Module) -> bool:
    return next(_tuner_layers(unwrapped(model)), None) is not None


def check_adapter_name(adapter_name: Any) -> None:
    if adapter_name is not None and not isinstance(adapter_name, str):
        raise OPLoRATypeError(f"oplora: adapter_name is {adapter_name!r}, expected the name of one adapter, or None.")


def find_layers(model: nn.Module, adapter_name: str | None = None) -> list[PeftLayer]:
    """Every layer of `model` with a trainable adapter, of the adapter `adapter_name` or of all of them.

    A tensor that two layers share belongs to the first.

    Raises:
        OPLoRAError: no such layer; tensors that are sharded, on the meta device or of a dtype that cannot be trained.
    """
    if not isinstance(model, nn.Module):
        raise OPLoRATypeError(f"oplora: expected the model itself, got {type(model).__name__}.")
    check_adapter_name(adapter_name)
    model = unwrapped(model)
    configs = getattr(model, "peft_config", {})
    found: dict[tuple[int, str], tuple[str, Any, dict[str, torch.Size], list[Twin]]] = {}
    owners: dict[tuple[Any, ...], tuple[tuple[int, str], int, nn.Parameter]] = {}
    known = set[str]()
    for path, module in _tuner_layers(model):
        for adapter, tensor, parameter in _adapters_of(module):
            known.add(adapter)
            if adapter_name not in (None, adapter) or not parameter.requires_grad:
                continue
            name = f"{path.replace('_orig_mod.', '')}.{adapter}"  # a part of the model may be compiled alone
            check_parameter(name, tensor, parameter)
            memory = memory_of(parameter)
            if memory in owners:
                owner, index, first = owners[memory]
                if first is not parameter:
                    found[owner][3].append(Twin(name, index, module, adapter, tensor))
                continue
            key = id(module), adapter
            tensors = found.setdefault(key, (name, module, {}, []))[2]
            owners[memory] = key, len(tensors), parameter
            tensors[tensor] = parameter.shape
    if not found:
        refuse_flattened("the model's tensors are", model.parameters())
        raise OPLoRAValueError(_why_none(model, adapter_name, known))
    eva = {adapter for adapter, config in configs.items() if getattr(config, "init_lora_weights", None) == "eva"}
    return [
        PeftLayer(name, module, adapter, tuple(tensors), tuple(tensors.values()), adapter in eva, tuple(twins))
        for (_, adapter), (name, module, tensors, twins) in found.items()
    ]


def _why_none(model: nn.Module, adapter_name: str | None, known: set[str]) -> str:
    if not known and any(_is_adalora(module) for _, module in _tuner_layers(model)):
        return (
            f"oplora: the adapter of {type(model).__name__} is AdaLoRA, which prunes its matrices between steps. "
            "oplora cannot follow that. Use LoraConfig, or train this adapter with torch.optim.AdamW."
        )
    if not known and (unknown := _unknown_tensors(model)):
        return (
            f"oplora: the adapter of {type(model).__name__} is of a type that oplora does not know "
            f"({'; '.join(unknown[:3])}); docs/adapters.md lists those that it knows. Use LoraConfig, or train this "
            "adapter with torch.optim.AdamW."
        )
    configs = getattr(model, "peft_config", {})
    prompts = (c for c in configs.values() if getattr(c, "is_prompt_learning", False))
    if not known and (config := next(prompts, None)) is not None:
        return (
            f"oplora: {type(config).__name__} trains prompts, and no adapter inside the model's layers. Use "
            "LoraConfig, or train the prompts with torch.optim.AdamW."
        )
    if others := [c for name, c in configs.items() if adapter_name in (None, name) and not _is_known(c)]:
        # adaption prompts; X-LoRA, which mixes frozen adapters that have names of their own
        return (
            f"oplora: {type(others[0]).__name__} trains nothing that oplora knows; docs/adapters.md lists the types "
            "that it knows. Use LoraConfig, or train this adapter with torch.optim.AdamW."
        )
    if not known:
        return (
            f"oplora: {type(model).__name__} has no LoRA layer, nor another adapter inside its layers. Add one first: "
            "model = get_peft_model(model, LoraConfig(...)), or model = oplora.wrap(model, oplora.OPLoRAConfig(...)). "
            "Where a trainer adds it (peft_config), pass optimizer_cls_and_kwargs=oplora.for_trainer(args) to that."
        )
    if adapter_name is not None and adapter_name not in known:
        return f"oplora: no adapter is named {adapter_name!r}; the model has {', '.join(map(repr, sorted(known)))}."
    which = "No adapter" if adapter_name is None else f"Adapter {adapter_name!r} is there, but no layer of it"
    name = adapter_name or min(known)
    return (
        f"oplora: {which} is trainable. The model has {', '.join(map(repr, sorted(known)))}: call "
        f"model.set_adapter({name!r}), or load it by PeftModel.from_pretrained(..., is_trainable=True)."
    )


def _is_known(config: Any) -> bool:
    """Whether tensors of STARTS belong to this type of PEFT's."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    return any(name.startswith(prefix) for name in STARTS)


def _unknown_tensors(model: nn.Module) -> list[str]:
    """Of every class of PEFT layers that can hold none of STARTS, what it holds."""
    return sorted(
        {
            f"{type(module).__name__} with {', '.join(module.adapter_layer_names)}"
            for _, module in _tuner_layers(model)
            if not STARTS.keys() & set(module.adapter_layer_names)  # else its adapters were deleted
        }
    )


def other_parameters(model: nn.Module, adapter_name: str | None = None) -> Iterator[nn.Parameter]:
    """What is trainable but not generated (biases, modules_to_save): each once, in the model's order.

    With an adapter_name without what belongs to other adapters.
    """
    left_out = {id(parameter) for _, module in _tuner_layers(model) for _, _, parameter in _adapters_of(module)}
    if adapter_name is not None:
        left_out |= {id(parameter) for parameter in _of_other_adapters(model, adapter_name)}
    return (p for p in model.parameters() if p.requires_grad and id(p) not in left_out)


def _of_other_adapters(model: nn.Module, adapter_name: str) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            for adapter, held in getattr(module._modules.get(name), "items", tuple)():
                if adapter != adapter_name:
                    yield from [held] if isinstance(held, nn.Parameter) else held.parameters()


def foreign_tensors(model: nn.Module, adapter_name: str | None) -> Iterator[nn.Parameter]:
    """Tensors of adapters that an optimizer made for `adapter_name` leaves to others; for all adapters, those of which
    nothing is trainable now."""
    held = [item for _, module in _tuner_layers(model) for item in _adapters_of(module)]
    mine = {adapter_name} if adapter_name is not None else {adapter for adapter, _, p in held if p.requires_grad}
    return (p for adapter, _, p in held if adapter not in mine)


def foreign_gradient(model: nn.Module, layers: Sequence[AdaptedLayer]) -> str | None:
    """An adapter that has gradients and none of whose layers is among `layers`."""
    mine = {layer.adapter for layer in layers}
    for _, module in _tuner_layers(model):
        for adapter, _, parameter in _adapters_of(module):
            if adapter not in mine and parameter.grad is not None:
                return adapter
    return None
