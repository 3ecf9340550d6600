"""From a model to what is generated: each adapted layer's trainable tensors, as PEFT keeps them.

A layer is found by PEFT's own attributes, and its tensors are looked up again at every step: PEFT replaces Parameter
objects (low_cpu_mem_usage, the cast of a half-precision adapter), and one that was kept would be dead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError

__all__ = [
    "STARTS",
    "AdaptedLayer",
    "Start",
    "check_layers",
    "find_layers",
    "foreign_gradient",
    "other_parameters",
    "refuse_to_step",
    "unwrapped",
]


class Start(Enum):
    """How the rows of W2 that predict a tensor start, and with them the tensor."""

    RANDOM = "random"  # both at random
    ZERO = "zero"  # both at zero
    KEPT = "kept"  # the rows at zero; the tensor keeps the value that PEFT gave it, and the generator adds to it


# PEFT's names of a layer's trainable tensors, in the order in which v holds them. Of LoRA's pair one starts at zero, so
# that training starts at the base model. Adding an adapter type is one row.
STARTS = {
    "lora_A": Start.RANDOM,
    "lora_B": Start.ZERO,
    "lora_embedding_A": Start.ZERO,
    "lora_embedding_B": Start.RANDOM,
    "lora_magnitude_vector": Start.KEPT,  # DoRA
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), Start.KEPT),  # VeRA
    "ia3_l": Start.KEPT,  # (IA)^3
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), Start.KEPT),  # LoHa
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b"), Start.KEPT),  # LoKr
    **dict.fromkeys(("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), Start.KEPT),
    **dict.fromkeys(("oft_R", "oft_embedding_R"), Start.KEPT),  # OFT
    **dict.fromkeys(("boft_R", "boft_s"), Start.KEPT),  # BOFT
    **dict.fromkeys(("lily_A", "lily_B", "lily_router"), Start.KEPT),  # Lily
    **dict.fromkeys(("randlora_lambda", "randlora_gamma"), Start.KEPT),  # RandLoRA
    "hra_u": Start.KEPT,  # HRA
    "c3a_kernel": Start.KEPT,  # C3A
    "miss_block": Start.KEPT,  # MiSS
    "fourierft_spectrum": Start.KEPT,  # FourierFT
    **dict.fromkeys(("delora_A", "delora_B", "delora_lambda"), Start.KEPT),  # DeLoRA
    **dict.fromkeys(("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), Start.KEPT),  # GraLoRA
    **dict.fromkeys(("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"), Start.KEPT),  # VB-LoRA
}
PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


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
class AdaptedLayer:
    """One PEFT layer and one of its adapters.

    Attributes:
        name: the layer's name in the model and the adapter's: "model.layers.0.self_attn.q_proj.default".
        module: PEFT's layer.
        adapter: the adapter's name.
        tensors: the names, of STARTS, of the trainable tensors that the layer has.
        shapes: theirs.
        is_eva: whether PEFT computed A from data (EVA); as B is zero then, the tensors do not tell.
        twins: other Parameters over the same memory, whose gradients belong to the tensors too.
    """

    name: str
    module: Any
    adapter: str
    tensors: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    is_eva: bool = False
    twins: tuple[Twin, ...] = ()

    def parameters(self) -> list[nn.Parameter]:
        """The tensors themselves, as the layer holds them now."""
        containers, adapter = self.module._modules, self.adapter
        try:
            return [_held(containers[tensor], adapter) for tensor in self.tensors]
        except KeyError as error:
            raise OPLoRARuntimeError(
                f"oplora: layer {self.name} no longer holds adapter {self.adapter!r}. Make a new optimizer after "
                "adapters were deleted."
            ) from error

    def with_twins(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """These, the layer's own, and the twins."""
        return [*parameters, *(twin.parameter() for twin in self.twins)] if self.twins else parameters

    def refuse_to_step(self, parameters: list[nn.Parameter]) -> None:
        """Raises where a step on these, the layer's own, would go wrong; changes nothing."""
        self.refuse_if_folded()
        if tuple(p.shape for p in parameters) != self.shapes:
            raise OPLoRARuntimeError(
                f"oplora: the factors of layer {self.name} are of shapes {[tuple(p.shape) for p in parameters]}, and "
                f"were of {[tuple(shape) for shape in self.shapes]} when the optimizer was made. Make a new optimizer, "
                "with init='keep', after a rank has changed (a larger adapter swapped in, EVA's initialisation). "
                "Nothing was changed."
            )
        for twin in self.twins:
            if parameters[twin.index].data_ptr() != twin.parameter().data_ptr():
                raise OPLoRARuntimeError(
                    f"oplora: {twin.tensor} of layer {twin.layer} was tied to {self.tensors[twin.index]} of layer "
                    f"{self.name} and no longer is, as after model.to(). Make a new optimizer, with init='keep'. "
                    "Nothing was changed."
                )

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
        """Which of `tensors` are the A and the B of a product B A; None for adapters that have none, or as KaSA has
        something between them."""
        if self.adapter in self.module._modules.get("lora_diag", ()):
            return None
        for A, B in PAIRS:
            if A in self.tensors and B in self.tensors:
                return self.tensors.index(A), self.tensors.index(B)
        return None

    def blocks(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(blocks, r, in_features) and (blocks, out_features, r) of two tensors like the pair's, which the layer
        multiplies block by block: one, one an expert, or one a group of a convolution. Views of contiguous tensors."""
        if (experts := getattr(self.module, "num_experts", 1)) > 1:
            return A.reshape(experts, -1, A.shape[-1]), B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        container = self.module._modules["lora_A"]._modules
        if (n := getattr(container.get(self.adapter), "nblocks", 1)) > 1:  # BD-LoRA: A's blocks stand side by side
            return A.reshape(n, -1, A.shape[-1]), B.reshape(B.shape[0], n, -1).transpose(0, 1)
        groups = A.shape[0] // B.shape[1]
        return A.reshape(groups, B.shape[1], -1), B.reshape(groups, -1, B.shape[1])


def _held(container: Any, adapter: str) -> nn.Parameter:
    """What a ModuleDict of layers or a ParameterDict holds for the adapter.

    By way of their own dicts: nn.Module's attribute look-up would cost a step of many small layers a tenth of its time.
    """
    held = container._modules.get(adapter)
    parameter: nn.Parameter = container._parameters[adapter] if held is None else held._parameters["weight"]
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


def find_layers(model: nn.Module, adapter_name: str | None = None) -> list[AdaptedLayer]:
    """Every layer of `model` with a trainable adapter, of the adapter `adapter_name` or of all of them.

    A tensor that two layers share belongs to the first.

    Raises:
        OPLoRAError: no such layer; tensors that are sharded, on the meta device or of a dtype that cannot be trained.
    """
    if not isinstance(model, nn.Module):
        raise OPLoRATypeError(
            f"oplora: expected the model itself, got {type(model).__name__}. Pass the PEFT model, as in "
            "oplora.AdamW(model, lr=1e-4), not its parameters: the layers are found in the model. To transformers' "
            "Trainer give optimizers=(oplora.AdamW(model, lr=1e-4), None), or optimizer_cls_and_kwargs=(oplora.AdamW, "
            '{"model": model, "lr": 1e-4}).'
        )
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
            _check_parameter(name, tensor, parameter)
            memory = parameter.data_ptr(), parameter.numel(), parameter.dtype
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
        raise OPLoRAValueError(_why_none(model, adapter_name, known))
    eva = {adapter for adapter, config in configs.items() if getattr(config, "init_lora_weights", None) == "eva"}
    return [
        AdaptedLayer(name, module, adapter, tuple(tensors), tuple(tensors.values()), adapter in eva, tuple(twins))
        for (_, adapter), (name, module, tensors, twins) in found.items()
    ]


def _check_parameter(layer: str, tensor: str, parameter: nn.Parameter) -> None:
    if (sharded := _how_sharded(parameter)) is not None:
        raise OPLoRATypeError(
            f"oplora: {tensor} of layer {layer} is sharded by {sharded}: no process has the whole of it, which its "
            "generator needs. Keep the adapter whole and shard the base alone (docs/loops.md shows it for "
            "fully_shard(..., ignored_params=...)), or use DistributedDataParallel, where "
            "oplora.AdamW(model, shard=True) divides the generators among the processes."
        )
    if parameter.is_meta:
        raise OPLoRAValueError(
            f"oplora: {tensor} of layer {layer} is on the meta device and has no values. Load the adapter's weights "
            "(or build the model without init_empty_weights / low_cpu_mem_usage) before making the optimizer."
        )
    if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
        raise OPLoRATypeError(
            f"oplora: {tensor} of layer {layer} is {parameter.dtype}; trainable factors are float32, float64, bfloat16 "
            "or float16. Quantise the base model, not its adapter."
        )


def check_layers(layers: Sequence[AdaptedLayer]) -> None:
    """Raises where PEFT, or who shards the model, has put a tensor that cannot be trained."""
    for layer in layers:
        for tensor, parameter in zip(layer.tensors, layer.parameters(), strict=True):
            _check_parameter(layer.name, tensor, parameter)


def _how_sharded(parameter: nn.Parameter) -> str | None:
    """Who keeps only a piece of it here; by the attributes that each leaves, as none of them may be installed."""
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO-3"
    if hasattr(parameter, "device_mesh"):
        return "FSDP2 or tensor parallelism (it is a DTensor)"
    return "FSDP" if hasattr(parameter, "_fsdp_flattened") else None


def _why_none(model: nn.Module, adapter_name: str | None, known: set[str]) -> str:
    if not known and any(_is_adalora(module) for _, module in _tuner_layers(model)):
        return (
            f"oplora: the adapter of {type(model).__name__} is AdaLoRA, which prunes between the steps what it trains, "
            "so it is not generated. Train it with torch.optim.AdamW, or use LoraConfig."
        )
    if not known and (unknown := _unknown_tensors(model)):
        return (
            f"oplora: the adapter of {type(model).__name__} is of a type that oplora does not know "
            f"({'; '.join(unknown[:3])}); docs/adapters.md has the table of those that it does. Train this one with "
            "torch.optim.AdamW, or use LoraConfig."
        )
    if not known:
        return (
            f"oplora: {type(model).__name__} has no LoRA layer, nor another adapter inside its layers. Add one first: "
            "model = get_peft_model(model, LoraConfig(...)), or model = oplora.wrap(model, oplora.OPLoRAConfig(...))."
        )
    if adapter_name is not None and adapter_name not in known:
        return f"oplora: no adapter is named {adapter_name!r}; the model has {', '.join(sorted(known))}."
    which = "No adapter" if adapter_name is None else f"Adapter {adapter_name!r} is there, but no layer of it"
    return (
        f"oplora: {which} is trainable (the model has {', '.join(sorted(known))}). Call model.set_adapter(name), or "
        "load with is_trainable=True."
    )


def _unknown_tensors(model: nn.Module) -> list[str]:
    """Of every class of PEFT layers that holds none of STARTS, what it holds."""
    return sorted(
        {f"{type(module).__name__} with {', '.join(module.adapter_layer_names)}" for _, module in _tuner_layers(model)}
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


def refuse_to_step(layers: Sequence[AdaptedLayer], held: Sequence[list[nn.Parameter]]) -> None:
    """Raises where a step would go wrong in any of the layers that have a gradient, before the first is touched.

    held: every layer's own tensors.
    """
    for layer, parameters in zip(layers, held, strict=True):
        if any(p.grad is not None for p in layer.with_twins(parameters)):
            layer.refuse_to_step(parameters)


def foreign_gradient(model: nn.Module, layers: list[AdaptedLayer]) -> str | None:
    """An adapter that has gradients and none of whose layers is among `layers`."""
    mine = {layer.adapter for layer in layers}
    for _, module in _tuner_layers(model):
        for adapter, _, parameter in _adapters_of(module):
            if adapter not in mine and parameter.grad is not None:
                return adapter
    return None
