"""What this process has of tensors that several divide: the rows or columns of DTensors.

fully_shard and tensor parallelism make DTensors of a model's Parameters. A step moves every entry by itself, given a
few sums over all of them. So the part that is here is stepped as an ordinary tensor, and only the sums cross processes
(engines/sharding.py). A Share stands before the engines in the place of the layer.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OPLoRARuntimeError, OPLoRATypeError
from .layers import AdaptedLayer, Place, is_divided

__all__ = [
    "Share",
    "divide_again",
    "divided_like",
    "gradient_here",
    "here",
    "is_zero",
    "known_or_found",
    "refuse_divided",
]


def here(tensor: Any) -> Any:
    """What this process has of it, in its memory; of anything but a DTensor itself."""
    if not is_divided(tensor):
        return tensor
    if not torch.is_grad_enabled():
        return tensor.to_local()
    with torch.no_grad():
        return tensor.to_local()


def gradient_here(parameter: Tensor) -> Tensor | None:
    """Of the entries that are here. Where processes hold summands of it they are summed, which all of them wait for."""
    gradient: Any = parameter.grad
    of: Any = parameter
    if gradient is not None and is_divided(gradient) and gradient.placements != of.placements:
        gradient = gradient.redistribute(of.device_mesh, of.placements)
    local: Tensor | None = here(gradient)
    return local


def is_zero(tensor: Tensor) -> bool:
    """Whether all of it is, in every process."""
    found = here(tensor.detach()).count_nonzero()
    if is_divided(tensor):
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        found = found.to(mesh.device_type)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(found, group=mesh.get_group(dimension))
    return not bool(found)


def divide_again(model: nn.Module) -> None:
    """Gives back what fully_shard has gathered for a forward pass that no backward pass has followed: the root module
    would hold it, and not the Parameters that are stepped."""
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def divided_like(parameter: Any, value: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, perhaps with other dimensions before, as a DTensor placed as it is;
    nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    whole = DTensor.from_local(value.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    divided: Tensor = whole.redistribute(mesh, _placements(parameter, value.dim() - parameter.dim()))
    return divided


def _placements(parameter: Any, leading: int) -> tuple[Any, ...]:
    """The parameter's, for a tensor that has `leading` dimensions before those of the parameter."""
    return tuple(_behind(placement, leading) for placement in parameter.placements)


def _behind(placement: Any, leading: int) -> Any:
    if leading == 0 or not hasattr(placement, "dim"):
        return placement
    if hasattr(placement, "split_factor"):  # of tensor parallelism under fully_shard, in the same dimension
        return type(placement)(placement.dim + leading, split_factor=placement.split_factor)
    return type(placement)(placement.dim + leading)


def known_or_found(known: Any, found: Any) -> Any:
    """The DTensor that was known where the model holds what fully_shard has gathered from it for the time being, as
    between forward and backward; otherwise what was found."""
    if found is known or not is_divided(known) or found.shape != known.shape:
        return found
    gathered = not is_divided(found) or found.device_mesh.ndim < known.device_mesh.ndim
    return known if gathered else found


def refuse_divided(layers: Sequence[AdaptedLayer], why: str) -> None:
    """Raises where a tensor is divided, for what wants whole ones."""
    for layer in layers:
        for tensor, parameter in zip(layer.tensors, layer.parameters(), strict=True):
            if is_divided(parameter):
                raise OPLoRATypeError(
                    f"oplora: {tensor} of layer {layer.name} is divided among processes (FSDP2's fully_shard, or "
                    f"tensor parallelism), and {why}; or keep the adapter whole, "
                    "fully_shard(..., ignored_params=...) (docs/loops.md)."
                )


class Share(AdaptedLayer):
    """The part of a layer's tensors that is in this process, as ordinary tensors over the same memory.

    A tensor of which nothing is here has one entry, of which nobody hears, so that every process has every tensor.
    """

    def __init__(self, whole: AdaptedLayer) -> None:
        if whole.twins:
            raise OPLoRARuntimeError(
                f"oplora: tensors of layer {whole.name} are tied to others in memory, which fully_shard undoes. Make "
                "the optimizer after fully_shard."
            )
        self.whole, self.name, self.adapter = whole, whole.name, whole.adapter
        self.tensors, self.is_eva = whole.tensors, whole.is_eva
        self._held: list[Tensor | None] = [None] * len(whole.tensors)
        self._addresses: list[Any] = [None] * len(whole.tensors)  # of what is here, and its dtype
        self.hold(whole.parameters())
        self.shapes = tuple(tensor.shape for tensor in self.parameters())

    def hold(self, parameters: Sequence[nn.Parameter]) -> None:
        """The layer's tensors, as the model has them now."""
        self._parameters = list(parameters)

    def listed(self) -> list[nn.Parameter]:
        return self._parameters

    def parameters(self) -> list[nn.Parameter]:
        return [self._stand_in(i, p) for i, p in enumerate(self._parameters)]

    def with_gradients(self) -> list[nn.Parameter]:
        """parameters(), with the gradients of what they stand for."""
        stand_ins = self.parameters()
        for parameter, stand_in in zip(self._parameters, stand_ins, strict=True):
            gradient = gradient_here(parameter)
            if gradient is not None and stand_in.shape != gradient.shape:
                gradient = torch.zeros_like(stand_in)
            if gradient is not None and gradient.dtype != stand_in.dtype:
                stand_in.grad_dtype = None
            stand_in.grad = gradient
        return stand_ins

    def _stand_in(self, i: int, parameter: nn.Parameter) -> Any:
        local, held = here(parameter), self._held[i]
        address = local.data_ptr(), local.dtype
        if held is not None and address == self._addresses[i] and held.device == local.device:
            return held
        self._addresses[i] = address
        held = local.detach() if local.numel() else torch.zeros(1, dtype=local.dtype, device=local.device)
        self._held[i] = held
        return held

    def rows_here(self, i: int) -> tuple[int, int, int, int]:
        parameter: Any = self._parameters[i]
        if not is_divided(parameter):
            return super().rows_here(i)
        count = parameter.numel()
        entries = here(divided_like(parameter, torch.arange(count, device="cpu").view(parameter.shape))).flatten().cpu()
        if not entries.numel():
            return count, 0, 1, 0
        behind = (entries.diff() != 1).nonzero()
        run = int(behind[0]) + 1 if len(behind) else entries.numel()
        first, stride = int(entries[0]), int(entries[run] - entries[0]) if len(behind) else 0
        at = torch.arange(entries.numel(), device="cpu")
        if not torch.equal(entries, first + at.div(run, rounding_mode="floor") * stride + at % run):
            raise OPLoRATypeError(
                f"oplora: {self.tensors[i]} of layer {self.name} is divided in more than one of its inner dimensions "
                f"({parameter.placements}). Divide it in one of them, and in its first."
            )
        return count, first, run, stride

    def published(self, i: int, tensor: Tensor) -> Tensor:
        """As a DTensor that is placed as the layer's, over the same memory."""
        parameter: Any = self._parameters[i]
        if not is_divided(parameter):
            return tensor
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        own, leading = here(parameter).shape, tensor.dim() - len(self.shapes[i])
        columns = tensor.shape[:leading]
        local = tensor if tensor.shape[leading:] == own else tensor.new_empty((*columns, *own))
        shape = torch.Size((*columns, *parameter.shape))
        told = TensorMeta(shape, torch.empty(shape, device="meta").stride(), local.dtype)
        spec = DTensorSpec(parameter.device_mesh, _placements(parameter, leading), tensor_meta=told)
        # from_local() would copy what lies in host memory to the mesh's device
        divided: Tensor = DTensor(local, spec, requires_grad=False)  # type: ignore[abstract]
        return divided

    def received(self, i: int, value: Any) -> Any:
        parameter: Any = self._parameters[i]
        leading = value.dim() - parameter.dim() if isinstance(value, Tensor) else -1
        if leading < 0 or value.shape[leading:] != parameter.shape:
            return value  # who checks it says what does not fit
        if not is_divided(parameter):
            return super().received(i, value)
        if not is_divided(value):
            value = divided_like(parameter, value)
        placed: Any = value
        if placed.placements != _placements(parameter, leading) or placed.device_mesh != parameter.device_mesh:
            value = divided_like(parameter, super().received(i, value))
        local: Tensor = here(value)
        columns = local.shape[:leading]
        return local if local.numel() else torch.zeros((*columns, 1), dtype=local.dtype, device=local.device)

    def places(self) -> list[Place]:
        return self.whole.places()

    def refuse_if_folded(self) -> None:
        self.whole.refuse_if_folded()
