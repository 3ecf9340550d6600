"""What DeepSpeed's ZeRO leaves in this process of a model's tensors: pieces of flat rows.

Stages 1 and 2 lay the tensors of a parameter group behind each other, pad the row and cut it into one part a process.
Each process gets its part, in float32, in the place of the group's tensors; its gradient is there when a step is to be
made, and DeepSpeed then copies the part into the model. Preset "auto" moves every entry by itself, so the run of a
tensor's entries that is in the part is stepped as a tensor of its own, over the same memory. Padding is no tensor's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import OPLoRARuntimeError, OPLoRATypeError
from .layers import AdaptedLayer, PlainLayer

__all__ = ["Piece", "Pieces", "are_in_pieces", "refuse_in_pieces"]


def are_in_pieces(parameters: Sequence[Any]) -> bool:
    """Whether ZeRO has laid them into rows; by the attribute that DeepSpeed leaves, as it may not be installed."""
    return any(hasattr(p, "_hp_mapping") for p in parameters)


def refuse_in_pieces(layers: Sequence[AdaptedLayer], what: str) -> None:
    """Raises, for generators that predict all of a layer's tensors."""
    raise OPLoRATypeError(
        f"oplora: DeepSpeed's ZeRO has cut {layers[0].tensors[0]} of layer {layers[0].name} and all others into "
        f"pieces, and {what} predicts all of a layer's tensors together. Use preset='auto', the default of "
        "oplora.AdamW(model), which steps what each process has; or stage 0."
    )


@dataclass
class Run:
    """The entries of a parameter from `begin` on that are in this process, which are those of `row` from `at` on."""

    parameter: nn.Parameter  # the model's
    row: Tensor
    at: int
    begin: int
    size: int
    stand_in: nn.Parameter  # over the same memory; one zero where nothing is here

    @classmethod
    def of(cls, parameter: Any, place: int, row: Tensor, part: int) -> "Run":
        """place: of the parameter in the uncut row; part: which of its parts `row` is."""
        first = part * row.numel()
        begin = max(first - place, 0)
        size = max(min(place + parameter.numel(), first + row.numel()) - place - begin, 0)
        nothing = torch.zeros(1, dtype=row.dtype, device=row.device)
        run = cls(parameter, row, max(place - first, 0), begin, size, nn.Parameter(nothing))
        run.follow()
        return run

    def follow(self) -> None:
        """The row, wherever it lies now."""
        if self.size:
            self.stand_in.data = self.cut(self.row.detach())

    def cut(self, row: Tensor) -> Tensor:
        return row[self.at : self.at + self.size]

    def take_gradient(self, of_row: Tensor) -> None:
        self.stand_in.grad = self.cut(of_row) if self.size else torch.zeros_like(self.stand_in)

    def received(self, whole: Tensor) -> Tensor:
        """Of a tensor like the parameter what is here."""
        if not self.size:
            return torch.zeros(1, dtype=whole.dtype, device=whole.device)
        return whole.reshape(-1)[self.begin : self.begin + self.size]

    def write(self) -> None:
        """Into the model."""
        if self.size:
            self.parameter.detach().view(-1)[self.begin : self.begin + self.size].copy_(self.stand_in.detach())


class Piece(PlainLayer):
    """The runs of a layer's tensors. Every process has every tensor, if only by a stand-in that stays zero."""

    def __init__(self, whole: AdaptedLayer, runs: Sequence[Run]) -> None:
        super().__init__(whole.name, whole.adapter, whole.tensors, [run.stand_in for run in runs])
        self.whole, self.runs, self.is_eva = whole, runs, whole.is_eva

    def modules(self) -> list[Any]:
        return self.whole.modules()

    def refuse_if_folded(self) -> None:
        self.whole.refuse_if_folded()

    def received(self, i: int, value: Any) -> Any:
        of_whole = isinstance(value, Tensor) and value.shape == self.whole.shapes[i] != self.shapes[i]
        return self.runs[i].received(value) if of_whole else value


class Pieces:
    """All runs of an optimizer's parameters, and their rows.

    layers: the pieces of `wholes`; groups: DeepSpeed's; before: what each of them held before.
    """

    def __init__(
        self,
        wholes: Sequence[AdaptedLayer],
        groups: Sequence[dict[str, Any]],
        before: Sequence[Sequence[nn.Parameter]],
    ) -> None:
        self.rows = [_row_of(group) for group in groups]
        self._addresses = [row.data_ptr() for row in self.rows]
        self._runs = [_runs_of(row, some) for row, some in zip(self.rows, before, strict=True)]
        of_parameter = {id(run.parameter): run for some in self._runs for run in some}
        for whole in wholes:
            if any(id(p) not in of_parameter for p in whole.parameters()):
                raise OPLoRARuntimeError(
                    f"oplora: DeepSpeed's ZeRO does not know tensors of layer {whole.name}, which were put there or "
                    "unfrozen since deepspeed.initialize(). Call it when the adapter is complete."
                )
            if whole.twins:
                raise OPLoRARuntimeError(
                    f"oplora: tensors of layer {whole.name} are tied to others in memory, which DeepSpeed's ZeRO "
                    "undoes. Use stage 0, which keeps them as they are."
                )
        self.layers = [Piece(whole, [of_parameter[id(p)] for p in whole.parameters()]) for whole in wholes]
        generated = {id(p) for layer in self.layers for p in layer.held}
        for group, row, some, names in zip(groups, self.rows, self._runs, _names(groups, before), strict=True):
            held = [run for run in some if run.size or id(run.stand_in) in generated]
            if names is not None:
                group["param_names"] = ["", *(names[id(run.parameter)] for run in held)]
            group["params"] = [row, *(run.stand_in for run in held)]  # the first stays DeepSpeed's
        first: Any = self._runs[0][0].parameter
        self.group, self.device = first._dp_group, first.device  # of processes, and where they tell each other
        self._early: list[int] = []  # groups that wait for later ones
        self._taken: list[Tensor | None] = [None] * len(self.rows)  # gradients that the runs have
        if any(run.parameter._dp_group is not self.group for some in self._runs for run in some):  # type: ignore[attr-defined]
            raise OPLoRATypeError(
                "oplora: DeepSpeed divides some parameters among other processes than others (experts). Train the "
                "adapters of experts without ZeRO."
            )

    def of_state(self, state: Mapping[Tensor, Any]) -> dict[Tensor, Any]:
        """Of what an optimizer kept of the parameters that no layer has, what is here."""
        generated = {id(p) for layer in self.layers for p in layer.held}
        return {
            run.stand_in: {
                name: run.received(value).to(run.stand_in, copy=True) if name != "step" else value
                for name, value in state[run.parameter].items()
            }
            for run in chain.from_iterable(self._runs)
            if run.size and run.parameter in state and id(run.stand_in) not in generated
        }

    def await_more(self, groups: Sequence[int]) -> bool:
        """Whether other groups come after these, which are stepped with them."""
        if groups[-1] == len(self.rows) - 1:
            return False
        self.take_gradients()
        self._early += groups
        return True

    def take_gradients(self) -> None:
        """Of the rows that have one; of the others the runs keep what they have."""
        for i, (row, some) in enumerate(zip(self.rows, self._runs, strict=True)):
            if row.data_ptr() != self._addresses[i]:
                self._addresses[i] = row.data_ptr()
                for run in some:
                    run.follow()
            if row.grad is not None and row.grad is not self._taken[i]:
                self._taken[i] = row.grad
                for run in some:
                    run.take_gradient(row.grad)

    def write(self) -> None:
        """Into the model what DeepSpeed has copied there too early."""
        for run in chain.from_iterable(self._runs[g] for g in self._early):
            run.write()

    def release(self) -> None:
        """Lets go of the gradients."""
        self._early, self._taken = [], [None] * len(self.rows)
        for run in chain.from_iterable(self._runs):
            run.stand_in.grad = None


def _row_of(group: dict[str, Any]) -> Tensor:
    row: Tensor = group["params"][0]
    if len(group["params"]) != 1 or row.dim() != 1 or row.dtype != torch.float32:
        raise OPLoRATypeError(
            f"oplora: DeepSpeed keeps a parameter group as {len(group['params'])} tensors of {row.dtype}, expected one "
            "row of float32. Leave bf16_master_weights_and_grads and fp16_master_weights_and_grads out of its config."
        )
    return row


def _runs_of(row: Tensor, before: Sequence[Any]) -> list[Run]:
    """Of the parameters that DeepSpeed trains. Their memory tells where in the uncut row they lie: the addresses that
    DeepSpeed leaves at them are others with round_robin_gradients."""
    some = [p for p in before if are_in_pieces([p])]
    first = min((p.storage_offset() for p in some), default=0)
    return [Run.of(p, p.storage_offset() - first, row, dist.get_rank(p._dp_group)) for p in some]


def _names(groups: Sequence[dict[str, Any]], before: Sequence[Sequence[nn.Parameter]]) -> list[dict[int, str] | None]:
    """Of each group the parameters' names by their ids; None where they have none."""
    return [
        dict(zip(map(id, some), group["param_names"], strict=True)) if "param_names" in group else None
        for group, some in zip(groups, before, strict=True)
    ]
