"""What one generator stands behind: the trainable tensors of one adapter in one layer.

Two kinds of layers have the same few methods: PeftLayer (peft.py), whose tensors are looked up in PEFT's module again
at every step, and PlainLayer, for tensors that were handed over without a module (pairing.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError
from .tensors import PAIRS

__all__ = [
    "AdaptedLayer",
    "Place",
    "PlainLayer",
    "by_layer",
    "check_layers",
    "check_parameter",
    "is_divided",
    "refuse_flattened",
    "refuse_to_step",
]

# Where a tensor is looked up: in a dict or list, by key; and whether what is there is a module, whose weight it is.
Place = tuple[Any, Any, bool]


class AdaptedLayer(ABC):
    """The tensors that come out of one generator.

    Attributes:
        name: the layer's name in the model and the adapter's: "model.layers.0.self_attn.q_proj.default".
        adapter: the adapter's name; "" where nobody named it.
        tensors: the names, of STARTS, of the layer's trainable tensors.
        shapes: theirs.
        is_eva: whether PEFT computed A from data (EVA); as B is zero then, the tensors do not tell.
        twins: other Parameters over the same memory, whose gradients belong to the tensors too.
    """

    name: str
    adapter: str
    tensors: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    is_eva: bool = False
    twins: Sequence[Any] = ()

    @abstractmethod
    def places(self) -> list[Place]:
        """Where the tensors are looked up, one by one."""

    @abstractmethod
    def refuse_if_folded(self) -> None:
        """Raises for a layer that is merged into its base, or switched off."""

    def modules(self) -> list[Any]:
        """PEFT's layers whose being merged or switched off makes refuse_if_folded() raise."""
        return []

    def parameters(self) -> list[nn.Parameter]:
        """The tensors themselves, as the layer holds them now."""
        try:
            return [at[key]._parameters["weight"] if of_module else at[key] for at, key, of_module in self.places()]
        except KeyError as error:
            raise self.lost() from error

    def listed(self) -> list[nn.Parameter]:
        """The tensors as the optimizer's groups have them, which parameters() may stand for."""
        return self.parameters()

    def published(self, i: int, tensor: Tensor) -> Tensor:
        """What is kept for each entry of the i-th tensor, as others are to see it: in its shape, behind how many
        numbers are kept of each."""
        return tensor

    def rows_here(self, i: int) -> tuple[int, int, int, int]:
        """How many entries the i-th tensor has as a whole, and which of them are here, in its own order: runs of how
        many, where the first begins, and how far the next begins from it."""
        count = self.shapes[i].numel()
        return count, 0, count, 0

    def received(self, i: int, value: Any) -> Any:
        """What others hand over for the i-th tensor, as it is kept here; whole, where processes divide it."""
        return value.full_tensor() if is_divided(value) else value

    def lost(self) -> OPLoRARuntimeError:
        return OPLoRARuntimeError(
            f"oplora: layer {self.name} no longer holds adapter {self.adapter!r}. Make a new optimizer after "
            "adapters were deleted."
        )

    def with_twins(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """These, the layer's own, and the twins."""
        return [*parameters, *(twin.parameter() for twin in self.twins)] if self.twins else parameters

    def refuse_to_step(self, parameters: list[nn.Parameter]) -> None:
        """Raises where a step on these, the layer's own, would go wrong; changes nothing."""
        self.refuse_if_folded()
        if tuple(p.shape for p in parameters) != self.shapes:
            refuse_flattened(f"the tensors of layer {self.name} are", parameters)
            raise OPLoRARuntimeError(
                f"oplora: the factors of layer {self.name} are of shapes {[tuple(p.shape) for p in parameters]}, and "
                f"were of {[tuple(shape) for shape in self.shapes]} when the optimizer was made. Make a new optimizer "
                "after a rank has changed (a larger adapter swapped in, EVA's initialisation); it continues from the "
                "values that are there. Nothing was changed."
            )
        for twin in self.twins:
            if parameters[twin.index].data_ptr() != twin.parameter().data_ptr():
                raise OPLoRARuntimeError(
                    f"oplora: {twin.tensor} of layer {twin.layer} was tied to {self.tensors[twin.index]} of layer "
                    f"{self.name} and no longer is, as after model.to(). Make a new optimizer; it continues from "
                    "the values that are there. Nothing was changed."
                )

    def pair(self) -> tuple[int, int] | None:
        """Which of `tensors` are the A and the B of a product B A; None for adapters that have none."""
        for A, B in PAIRS:
            if A in self.tensors and B in self.tensors:
                return self.tensors.index(A), self.tensors.index(B)
        return None

    def blocks(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(blocks, r, in_features) and (blocks, out_features, r) of two tensors like the pair's, which the layer
        multiplies block by block: one, or one a group of a convolution. Views of contiguous tensors."""
        groups = A.shape[0] // B.shape[1]
        return A.reshape(groups, B.shape[1], -1), B.reshape(groups, -1, B.shape[1])


class PlainLayer(AdaptedLayer):
    """Tensors that were handed over without a module: nobody can merge or replace them unseen."""

    def __init__(self, name: str, adapter: str, tensors: Sequence[str], held: Sequence[nn.Parameter]) -> None:
        self.name, self.adapter, self.tensors = name, adapter, tuple(tensors)
        self.held = list(held)
        self.shapes = tuple(p.shape for p in held)

    def places(self) -> list[Place]:
        return [(self.held, i, False) for i in range(len(self.held))]

    def refuse_if_folded(self) -> None:
        pass


def by_layer(layers: Sequence[AdaptedLayer], of_tensors: Sequence[Any]) -> list[list[Any]]:
    """A list for each layer, of a list with an item for each of their tensors."""
    pieces, begin = [], 0
    for layer in layers:
        pieces.append(list(of_tensors[begin : begin + len(layer.tensors)]))
        begin += len(pieces[-1])
    return pieces


def check_parameter(layer: str, tensor: str, parameter: nn.Parameter) -> None:
    """Raises where a generator cannot stand behind it."""
    refuse_flattened(f"{tensor} of layer {layer} is", [parameter])
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


def refuse_flattened(what: str, parameters: Iterable[Any]) -> None:
    """Raises where one of them is a flat piece, in a sentence that begins with `what`."""
    sharded = next((who for p in parameters if (who := _how_flattened(p)) is not None), None)
    if sharded is not None and "DeepSpeed" in sharded:
        raise OPLoRATypeError(
            f"oplora: {what} sharded by {sharded}, which has put flat pieces without a shape in its place. Make the "
            "optimizer first, deepspeed.initialize(model=model, optimizer=oplora.AdamW(model), ...), and the adapter "
            "outside of deepspeed.zero.Init()."
        )
    if sharded is not None:
        raise OPLoRATypeError(
            f"oplora: {what} sharded by {sharded}, which gives a process flat pieces without a shape. Use FSDP2 "
            "(torch.distributed.fsdp.fully_shard; with accelerate fsdp_version=2), whose shards oplora.AdamW(model) "
            "steps as they are; or DistributedDataParallel, where oplora.AdamW(model, shard=True) divides the "
            "generators among the processes."
        )


def check_layers(layers: Sequence[AdaptedLayer]) -> None:
    """Raises where PEFT, or who shards the model, has put a tensor that cannot be trained."""
    for layer in layers:
        for tensor, parameter in zip(layer.tensors, layer.parameters(), strict=True):
            check_parameter(layer.name, tensor, parameter)


def is_divided(tensor: Any) -> bool:
    """Whether it is a DTensor, of which a process has a part; by an attribute, as importing the class takes time."""
    return hasattr(tensor, "device_mesh")


def _how_flattened(parameter: Any) -> str | None:
    """Who keeps only a flat piece of it here; by the attributes that each leaves, as none of them may be installed."""
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO-3"
    is_flat = hasattr(parameter, "_fsdp_flattened") or getattr(parameter, "_is_flat_param", False)
    return "FSDP1 (FullyShardedDataParallel)" if is_flat else None


def refuse_to_step(layers: Sequence[AdaptedLayer], held: Sequence[list[nn.Parameter]]) -> None:
    """Raises where a step would go wrong in any of the layers that have a gradient, before the first is touched.

    held: every layer's own tensors.
    """
    for layer, parameters in zip(layers, held, strict=True):
        if any(p.grad is not None for p in layer.with_twins(parameters)):
            layer.refuse_to_step(parameters)
