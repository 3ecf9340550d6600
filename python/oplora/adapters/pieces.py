"""What DeepSpeed's ZeRO leaves in this process of a model's tensors: pieces of flat rows.

Stages 1 and 2 lay the tensors of a parameter group behind each other, pad the row and cut it into one part a process.
Stage 3 cuts every tensor, and lays the parts of this process behind each other. Either way a process has rows of
float32, which are put into the groups in the tensors' places; their gradients are there when a step is to be made, and
DeepSpeed then copies the rows into the model. Preset "auto" moves every entry by itself, so the run of a tensor's
entries that is in a row is stepped as a tensor of its own, over the same memory. Padding is no tensor's.
"""

from collections.abc import Iterator, Mapping, Sequence
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
    """Whether ZeRO has laid them into rows; by the attributes that DeepSpeed leaves, as it may not be installed."""
    return any(hasattr(p, "_hp_mapping") or hasattr(p, "_z3_optimizer") for p in parameters)


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

    parameter: Any  # the model's
    row: Tensor
    at: int
    begin: int
    size: int

    def __post_init__(self) -> None:
        """The stand-in lies in the row; where nothing is here it is one zero."""
        self.stand_in = nn.Parameter(torch.zeros(1, dtype=self.row.dtype, device=self.row.device))
        self.follow()

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
        """Into the model, as DeepSpeed keeps it in this process."""
        if self.size:
            kept = getattr(self.parameter, "ds_tensor", None)
            here = self.received(self.parameter.detach()) if kept is None else kept.detach()[: self.size]
            here.copy_(self.stand_in.detach())


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
    """All runs of an optimizer's parameters, and the rows that they lie in.

    layers: the pieces of `wholes`; before: what each of the groups held before DeepSpeed came.
    """

    def __init__(
        self,
        wholes: Sequence[AdaptedLayer],
        groups: Sequence[dict[str, Any]],
        before: Sequence[Sequence[Any]],
    ) -> None:
        known = [p for some in before for p in some if are_in_pieces([p])]
        stage_3 = next((p._z3_optimizer for p in known if hasattr(p, "_z3_optimizer")), None)
        cut = _in_groups(groups, before) if stage_3 is None else _in_stage_3(stage_3)
        self._of_groups, self.rows, self._runs = zip(*cut, strict=True)
        self._addresses = [row.data_ptr() for row in self.rows]
        self._taken: list[Tensor | None] = [None] * len(self.rows)  # gradients that the runs have
        self._early: list[int] = []  # rows that wait for later ones
        of_parameter = {id(run.parameter): run for run in chain(*self._runs)}
        _refuse(wholes, of_parameter)
        self.layers = [Piece(whole, [of_parameter[id(p)] for p in whole.parameters()]) for whole in wholes]
        self._listed: list[Any] = [None] * len(groups)  # what is in each now
        self._stepped = self._in_order(groups, before)
        self.put_back(groups)
        distributed = [p._dp_group if stage_3 is None else p.ds_process_group for p in known]
        self.group, self.device = distributed[0], known[0].device  # of processes, and where they tell each other
        if any(one is not self.group for one in distributed):
            raise OPLoRATypeError(
                "oplora: DeepSpeed divides some parameters among other processes than others (experts). Train the "
                "adapters of experts without ZeRO."
            )

    # ---- groups ----

    def _in_order(self, groups: Sequence[dict[str, Any]], before: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """What is stepped of each group, behind its rows: DeepSpeed looks for these in the first places."""
        generated, stepped = {id(p) for layer in self.layers for p in layer.held}, []
        for g, (group, some) in enumerate(zip(groups, before, strict=True)):
            rows = [i for i, owner in enumerate(self._of_groups) if owner == g]
            held = [r for i in rows for r in self._runs[i] if r.size or id(r.stand_in) in generated]
            stepped.append([*(self.rows[i] for i in rows), *(run.stand_in for run in held)])
            if "param_names" in group:
                names = dict(zip(map(id, some), group["param_names"], strict=True))
                group["param_names"] = [*("" for _ in rows), *(names[id(run.parameter)] for run in held)]
        return stepped

    def put_back(self, groups: Sequence[dict[str, Any]]) -> None:
        """What is stepped, where DeepSpeed's stage 3 has put its rows, or nothing, in the meantime."""
        for g, (group, stepped) in enumerate(zip(groups, self._stepped, strict=True)):
            if group["params"] is not self._listed[g] or len(group["params"]) != len(stepped):
                group["params"] = self._listed[g] = list(stepped)

    def await_more(self, held: Sequence[Any], groups: Sequence[dict[str, Any]]) -> bool:
        """Whether other rows follow those in `held`, lists that DeepSpeed has just had in groups; they are then stepped
        together. `groups` have been put back since."""
        others = [some for some in held if all(some is not listed for listed in self._listed)]
        there = {id(p) for some in others or held for p in some}
        rows = [i for i, row in enumerate(self.rows) if id(row) in there]
        self.put_back(groups)
        if not rows or rows[-1] == len(self.rows) - 1:
            return False
        self.take_gradients()
        self._early += rows
        return True

    # ---- a step ----

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
        for i in self._early:
            for run in self._runs[i]:
                run.write()

    def release(self) -> None:
        """Lets go of the gradients."""
        self._early, self._taken = [], [None] * len(self.rows)
        for run in chain(*self._runs):
            run.stand_in.grad = None

    # ---- what was kept before ----

    def of_state(self, state: Mapping[Tensor, Any]) -> dict[Tensor, Any]:
        """Of what an optimizer kept of the parameters that no layer has, what is here."""
        generated = {id(p) for layer in self.layers for p in layer.held}
        return {
            run.stand_in: {
                name: run.received(value).to(run.stand_in, copy=True) if name != "step" else value
                for name, value in state[run.parameter].items()
            }
            for run in chain(*self._runs)
            if run.size and run.parameter in state and id(run.stand_in) not in generated
        }


def _refuse(wholes: Sequence[AdaptedLayer], known: Mapping[int, Run]) -> None:
    for whole in wholes:
        if any(id(p) not in known for p in whole.parameters()):
            raise OPLoRARuntimeError(
                f"oplora: DeepSpeed's ZeRO does not know tensors of layer {whole.name}, which were put there or "
                "unfrozen since deepspeed.initialize(). Call it when the adapter is complete."
            )
        if whole.twins:
            raise OPLoRARuntimeError(
                f"oplora: tensors of layer {whole.name} are tied to others in memory, which DeepSpeed's ZeRO undoes. "
                "Use stage 0, which keeps them as they are."
            )


def _in_groups(
    groups: Sequence[dict[str, Any]], before: Sequence[Sequence[Any]]
) -> Iterator[tuple[int, Tensor, list[Run]]]:
    """Of stages 1 and 2: each row with its group and its runs. The parameters' memory tells where in the uncut row they
    lie: the addresses that DeepSpeed leaves at them are others with round_robin_gradients."""
    for g, (group, some) in enumerate(zip(groups, before, strict=True)):
        row, cut = _checked(group["params"]), [p for p in some if are_in_pieces([p])]
        origin, runs = min((p.storage_offset() for p in cut), default=0), []
        for p in cut:
            place, first = p.storage_offset() - origin, dist.get_rank(p._dp_group) * row.numel()
            begin = max(first - place, 0)
            size = max(min(place + p.numel(), first + row.numel()) - place - begin, 0)
            runs.append(Run(p, row, max(place - first, 0), begin, size))
        yield g, row, runs


def _in_stage_3(optimizer: Any) -> Iterator[tuple[int, Tensor, list[Run]]]:
    """Of stage 3: the last process's part of a parameter ends in padding."""
    for i, row in enumerate(optimizer.fp32_partitioned_groups_flat):
        runs = []
        for p in optimizer.fp16_groups[i]:
            _, at, part = optimizer.grad_position[optimizer.get_param_id(p)]
            begin = dist.get_rank(p.ds_process_group) * part
            runs.append(Run(p, _checked([row]), at, begin, max(min(p.ds_numel - begin, part), 0)))
        if row.numel() < max((run.at + run.size for run in runs), default=0):
            raise OPLoRARuntimeError(
                "oplora: DeepSpeed's ZeRO-3 keeps float32 rows on a disk (NVMe), where they cannot be stepped. Offload "
                "the optimizer to the CPU instead."
            )
        yield optimizer.sub_group_to_group_id[i], row, runs


def _checked(held: Sequence[Tensor]) -> Tensor:
    """A group's only row."""
    if len(held) != 1 or held[0].dim() != 1 or held[0].dtype != torch.float32:
        raise OPLoRATypeError(
            f"oplora: DeepSpeed keeps a parameter group as {len(held)} tensors of {held[0].dtype}, expected one row of "
            "float32. Leave bf16_master_weights_and_grads and fp16_master_weights_and_grads out of its config."
        )
    return held[0]
