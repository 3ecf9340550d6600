"""One share of the generators a process, under torch.distributed's data parallelism (shard=True).

The replicas' factors and gradients are equal, so each process can step the generators of its own layers and send the
others what they generate: of a model's state it keeps one share, and N numbers travel, the factors themselves. The cut
runs between layers and not through them. So the numbers are the bits of the undivided step (a sum over a layer's rows
never crosses processes), a step waits for one message, and the largest share is at most an even one and one layer more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import OPLoRAError, OPLoRARuntimeError

__all__ = ["Shards"]


class Shards:
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

    def any_refuses(self, refused: Tensor) -> Tensor:
        """The largest of all processes' numbers, in place."""
        dist.all_reduce(refused, dist.ReduceOp.MAX)
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
        dist.all_reduce(numbers)
        return numbers

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
