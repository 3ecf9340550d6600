"""Several processes and one optimizer: a share of the generators each (Shards), or a part of every tensor (Mesh).

Shards, under data parallelism with shard=True. The replicas' factors and gradients are equal, so each process can step
the generators of its own layers and send the others what they generate: of a model's state it keeps one share, and N
numbers travel, the factors themselves. The cut runs between layers and not through them. So the numbers are the bits of
the undivided step (a sum over a layer's rows never crosses processes), a step waits for one message, and the largest
share is at most an even one and one layer more.

Mesh, where fully_shard or tensor parallelism has divided the tensors. A step moves every entry by itself, given a few
sums over all of them. Each process sums over the entries that it has, one message for all layers adds the sums up, and
what is made of them (the rate, a generator's hidden path, the truncations) is the same everywhere. Of state rate these
are its reports, of state exact W2^T g beside ||g||^2, of state lean the same and, in a second message, the Gram matrix:
its rows are scaled by what ||g||^2 of all rows makes of the averages. An entry that several processes have (a
replica's, HSDP's) counts in the first of them alone.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adapters import AdaptedLayer, is_divided
from ..errors import OPLoRAError, OPLoRARuntimeError, OPLoRATypeError
from .memory import CPU

if TYPE_CHECKING:
    from .engine import Batch

__all__ = ["Disjoint", "Mesh", "Processes", "Shards"]


class Processes:
    """What the processes of a group tell each other."""

    group: Any = None  # the default one

    def any_refuses(self, refused: Tensor) -> Tensor:
        """The largest of all processes' numbers, in place."""
        dist.all_reduce(refused, dist.ReduceOp.MAX, group=self.group)
        return refused

    def together(self, call: Callable[[], Any], device: torch.device) -> Any:
        """call(), which may raise in some processes: then it raises in all, before one waits for another."""
        result, refusal = None, None
        try:
            result = call()
        except OPLoRAError as error:
            refusal = error
        if bool(self.any_refuses(torch.tensor([refusal is not None], dtype=torch.int32, device=device))):
            raise refusal or OPLoRARuntimeError(
                "oplora: another process refuses its share; its error says why. Nothing was changed."
            )
        return result

    def sum(self, numbers: Tensor) -> Tensor:
        """Over all processes, in place; exact where all but one hold zero."""
        dist.all_reduce(numbers, group=self.group)
        return numbers


class Shards(Processes):
    """Which of a model's layers belong to which process of the default group, and what these tell each other."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """sizes: factor entries of each layer."""
        if not (dist.is_available() and dist.is_initialized()):
            raise OPLoRARuntimeError(
                "oplora.AdamW: shard=True divides the generators among the processes of torch.distributed, which is "
                "not initialised. Start the script with torchrun or `accelerate launch`, and make the optimizer after "
                "init_process_group() or Accelerator(); or leave shard out."
            )
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        if len(sizes) < self.count:
            raise OPLoRARuntimeError(
                f"oplora.AdamW: shard=True gives each process whole layers; {len(sizes)} adapted layers are too few "
                f"for {self.count} processes. Leave shard out: their generators are small."
            )
        self.owners = _divide(sizes, self.count)

    def owns(self, position: int) -> bool:
        return self.owners[position] == self.rank

    def send(self, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        """Every layer's tensors from its owner to all others: one message an owner and dtype."""
        for owner in sorted(set(self.owners)):
            by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
            for some, of in zip(parameters, self.owners, strict=True):
                for parameter in some if of == owner else ():
                    by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter.detach())
            for tensors in by_kind.values():
                message = torch.cat([tensor.flatten() for tensor in tensors])
                dist.broadcast(message, owner)
                if owner != self.rank:
                    for tensor, piece in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
                        tensor.copy_(piece.view(tensor.shape))

    def gather(self, share: dict[str, Any], to: int | None) -> dict[str, Any] | None:
        """All processes' shares, on process `to` or, where it is None, on each; None elsewhere."""
        shares: list[Any] | None = [None] * self.count if to in (None, self.rank) else None
        if to is None:
            dist.all_gather_object(shares, _on_host(share))
        else:
            dist.gather_object(_on_host(share), shares, dst=to)
        return None if shares is None else {name: value for some in shares for name, value in some.items()}


class Mesh(Processes):
    """The processes that have parts of a model's tensors, and which entries each counts."""

    def __init__(self, mesh: Any, layers: Sequence[AdaptedLayer]) -> None:
        self.ranks = mesh.mesh.flatten().tolist()
        self.group = _group(mesh)
        self.device = _device_of(mesh)
        self.is_first: bool = dist.get_rank() == min(self.ranks)
        self._counts = [[self.counts(p) for p in layer.parameters()] for layer in layers]  # of each layer's tensors
        self._counts_all = all(map(all, self._counts))
        self._signals = [all(some) for some in self._counts]  # whether each layer's signals count
        self._weights: Tensor | None = None  # of a table's numbers, 0 or 1

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layers: Sequence[AdaptedLayer]) -> "Mesh | None":
        """The largest mesh that one of the tensors is divided over; None where none is divided.

        Raises:
            OPLoRAError: meshes side by side, placements that have summands.
        """
        meshes: dict[int, Any] = {}
        for tensor in tensors:
            if is_divided(tensor):
                divided: Any = tensor
                meshes[id(divided.device_mesh)] = divided.device_mesh
                if any(placement.is_partial() for placement in divided.placements):
                    raise OPLoRATypeError(
                        "oplora: processes hold summands of a tensor (a DTensor with a Partial placement), whose value "
                        "none of them knows. Redistribute it before making the optimizer."
                    )
        if not meshes:
            return None
        largest = max(meshes.values(), key=lambda mesh: mesh.size())
        known = set(largest.mesh.flatten().tolist())
        if any(not known.issuperset(mesh.mesh.flatten().tolist()) for mesh in meshes.values()):
            raise OPLoRATypeError(
                "oplora: some factors are divided over processes that have no part of others (two device meshes side "
                "by side). Make an optimizer for each of them, from its own parameters."
            )
        return cls(largest, layers)

    def counts(self, tensor: Tensor) -> bool:
        """Whether this process counts the entries that it has of a tensor; else an earlier one has the same."""
        if not is_divided(tensor):
            return self.is_first
        divided: Any = tensor
        mesh, coordinate = divided.device_mesh, divided.device_mesh.get_coordinate()
        if coordinate is None or min(self.ranks) not in mesh.mesh.flatten().tolist():
            return False
        places = zip(coordinate, divided.placements, strict=True)
        return not any(bool(at > 0) and placement.is_replicate() for at, placement in places)

    def merge(self, batches: "Sequence[Batch]", reports: Sequence[Tensor], refused: Tensor) -> Tensor:
        """Makes of the reports those of all entries, in one message. Returns (int32, 1 number, where `refused` is)
        whether a gradient, of the reports or in `refused`, is not finite in any process."""
        table = self._table(batches, reports)
        message = torch.cat([table.view(-1), refused.view(1).to(table)])
        sums = self.sum(message.to(self.device)).to(table.device)
        table = sums[:-1].view(table.shape)
        for batch, report in zip(batches, reports, strict=True):
            places = batch.positions.to(table.device, non_blocking=True)
            report.view(-1, table.shape[1]).copy_(table.index_select(0, places))
        return ((table[:, 1].sum() + sums[-1]) > 0).to(refused.dtype).view(1).to(refused.device)

    def add(self, batches: "Sequence[Batch]", summands: Sequence[Sequence[Tensor]], width: int, more: Tensor) -> Tensor:
        """Adds up what each process has of sums, `width` numbers a layer, in place and in one message; and `more`, a
        number, which is returned. summands: of each batch, views of a row a layer.

        Raises:
            OPLoRAError: a layer steps in some processes alone. They would go apart.
        """
        table = torch.zeros(len(self._counts), 1 + width, dtype=torch.float64, device=CPU)
        for batch, views in zip(batches, summands, strict=True):
            table.index_copy_(0, batch.positions, torch.cat([table.new_ones(len(views[0]), 1), *views], 1))
        message = torch.cat([table.view(-1), more.view(1).to(table)])
        sums = self.sum(message.to(self.device)).to(table.device)
        table = sums[:-1].view(table.shape)
        apart = (table[:, 0] % len(self.ranks)).nonzero()
        if len(apart):
            raise OPLoRARuntimeError(
                f"oplora: layer {int(apart[0])} has a gradient in some processes and none in others. Every process has "
                "to run the same layers before step(). Nothing was changed."
            )
        for batch, views in zip(batches, summands, strict=True):
            widths = [view.shape[1] for view in views]
            added = table.index_select(0, batch.positions)[:, 1:].split(widths, 1)
            for view, one in zip(views, added, strict=True):
                view.copy_(one)
        return sums[-1:].to(more.device)

    def merge_squares(self, batches: "Sequence[Batch]", reports: Sequence[Tensor], others: Tensor) -> Tensor:
        """||.||^2 of each layer's gradient, and of `others`, of which this process gives what it counts."""
        squares = self._table(batches, reports)[:, 0]
        message = torch.cat([squares, others.to(squares)])
        return self.sum(message.to(self.device)).to(squares.device)

    def _table(self, batches: "Sequence[Batch]", reports: Sequence[Tensor]) -> Tensor:
        """A row for each layer of the model: what this process measured and counts."""
        device = reports[0].device if reports else torch.device("cpu")
        width = 5 if not reports else reports[0].numel() // len(batches[0].indices)
        table = torch.zeros(len(self._counts), width, dtype=torch.float64, device=device)
        for batch, report in zip(batches, reports, strict=True):
            places = batch.positions.to(device, non_blocking=True)
            table.index_copy_(0, places, report.view(-1, width).to(device, non_blocking=True))
        if not self._counts_all:
            self._leave_out(table, batches)
        return table

    def _leave_out(self, table: Tensor, batches: "Sequence[Batch]") -> None:
        """Takes out what an earlier process counts, but for whether it is finite."""
        if self._weights is None or self._weights.device != table.device:
            weights = torch.ones(table.shape, dtype=table.dtype, device=CPU)
            weights[:, 2:] = weights.new_tensor(self._signals)[:, None]
            weights[:, 0] = weights.new_tensor([all(some) for some in self._counts])
            self._weights = weights.to(table.device)
        table *= self._weights
        for batch in batches:
            for state, gradients in zip(batch.states, batch.by_state(batch.gradients), strict=True):
                counts = self._counts[state.factors.position]
                if any(counts) and not all(counts):  # a replica of A and a part of B, of tensor parallelism
                    own = [g.double() for g, counted in zip(gradients, counts, strict=True) if counted]
                    table[state.factors.position, 0] = torch.stack(torch._foreach_norm(own)).square().sum()

    def listen(self, listening: Sequence[Sequence[bool]]) -> None:
        """Which tensors of each layer the signals are of.

        Raises:
            OPLoRAError: a layer's are counted in different processes, where its sums are one number.
        """
        for i, (counts, listens) in enumerate(zip(self._counts, listening, strict=True)):
            heard = {counted for counted, listened in zip(counts, listens, strict=True) if listened}
            if len(heard) > 1:
                raise OPLoRATypeError(
                    f"oplora: of the tensors of layer {i} that tell the rate some are divided among processes and some "
                    "are not. Shard all of a layer's tensors alike."
                )
            self._signals[i] = heard == {True}
        self._weights = None

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which of as many in every process hold in one at least."""
        told = torch.tensor(flags, dtype=torch.int32, device=self.device)
        return [bool(flag) for flag in self.any_refuses(told).tolist()]


class Disjoint(Mesh):
    """Processes of which each has other entries than all the others, and counts them: DeepSpeed's ZeRO."""

    def __init__(self, group: Any, device: torch.device, layers: Sequence[AdaptedLayer]) -> None:
        self.group, self.device = group, device
        self._counts, self._counts_all = [[True] * len(layer.tensors) for layer in layers], True
        self._signals, self._weights = [True] * len(layers), None

    def counts(self, tensor: Tensor) -> bool:
        return True


def _group(mesh: Any) -> Any:
    """Of all processes of a mesh, of any number of dimensions."""
    if mesh.ndim == 1:
        return mesh.get_group()
    return None if mesh.size() == dist.get_world_size() else mesh._flatten().get_group()


def _device_of(mesh: Any) -> torch.device:
    """Where a mesh's messages lie, also of tensors that fully_shard has offloaded to host memory."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _divide(sizes: Sequence[int], count: int) -> list[int]:
    """The owner of each layer: the largest first, each to whoever has least. Every process gets one at least."""
    owners, loads = [0] * len(sizes), [0] * count
    for position in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[position] = min(range(count), key=lambda rank: (loads[rank], rank))
        loads[owners[position]] += sizes[position]
    return owners


def _on_host(value: Any) -> Any:
    """A copy with every tensor in memory of its own: pickling a view would send all that it is a view of."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list | tuple) else value
