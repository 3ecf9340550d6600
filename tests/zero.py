"""What DeepSpeed's ZeRO does with an optimizer, without DeepSpeed (0.19: runtime/zero/stage_1_and_2.py; stage3.py; and
runtime/bf16_optimizer.py, which steps all groups at once)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 2  # entries, a process
SUB_GROUP = 4  # parameters


class Zero:
    """Stages 1 and 2. Lays every group's parameters behind each other, pads the row, and puts this process's part of
    it, in float32, into the group. step() averages gradients, hands the part's over and copies the part back."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, at_once: bool = False, round_robin: bool = False) -> None:
        self.optimizer, self.at_once = optimizer, at_once
        rank, self.world = dist.get_rank(), dist.get_world_size()
        self.rows: list[Tensor] = []  # of 16 bits, if the model is; uncut
        self.parts: list[Tensor] = []
        self.held: list[list[Any]] = []
        self.paddings: list[int] = []  # entries at the end of this process's part
        for group in optimizer.param_groups:
            some = list(group["params"])
            if round_robin:
                some = [p for first in range(self.world) for p in some[first :: self.world]]
            size = sum(p.numel() for p in some)
            padding = -size % (ALIGNMENT * self.world)
            row = torch.cat([*(p.detach().flatten() for p in some), some[0].new_zeros(padding)]).detach()
            begin = 0
            for p in some:
                p.data = row[begin : begin + p.numel()].view(p.shape)
                p._hp_mapping, p._dp_group = None, dist.group.WORLD
                begin += p.numel()
            part = row.chunk(self.world)[rank].clone().float().requires_grad_()
            group["params"] = [part]
            self.rows.append(row)
            self.parts.append(part)
            self.held.append(some)
            self.paddings.append(min(max((rank + 1) * part.numel() - size, 0), part.numel()))

    def gradient(self, g: int) -> Tensor:
        """Of this process's part, averaged; what is in the padding is nobody's."""
        flat = torch.cat([p.grad.flatten().float() for p in self.held[g]])
        dist.all_reduce(flat)
        padded = torch.cat([flat / self.world, torch.full((self.rows[g].numel() - flat.numel(),), torch.nan)])
        return padded.chunk(self.world)[dist.get_rank()].clone()

    def step(self) -> None:
        groups = self.optimizer.param_groups
        if self.at_once:
            for g, part in enumerate(self.parts):
                part.grad = self.gradient(g)
            self.optimizer.step()
        for g, part in enumerate(self.parts):
            if not self.at_once:
                part.grad = self.gradient(g)
                self.optimizer.param_groups = [groups[g]]
                self.optimizer.step()
                self.optimizer.param_groups = groups
                part.grad = None
            self.rows[g].chunk(self.world)[dist.get_rank()].copy_(part.detach())
        for row in self.rows:
            parts = [torch.empty_like(part) for part in row.chunk(self.world)]
            dist.all_gather(parts, row.chunk(self.world)[dist.get_rank()])
            row.copy_(torch.cat(parts))

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved)


class Zero3:
    """Stage 3, of parameters that stay gathered. Cuts every parameter into one part a process, the last of which ends
    in padding, and lays this process's parts of a few parameters behind each other in rows of float32. A row is in its
    group while it is stepped, and nothing otherwise."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.world = optimizer, dist.get_world_size()
        self.fp16_groups: list[list[Any]] = []
        self.fp32_partitioned_groups_flat: list[Tensor] = []
        self.rows: list[Tensor] = []  # in the model's dtype; the parameters' ds_tensor are in them
        self.sub_group_to_group_id: dict[int, int] = {}
        self.grad_position: dict[int, list[int]] = {}
        for g, group in enumerate(optimizer.param_groups):
            every = list(group["params"])
            for first in range(0, len(every), SUB_GROUP):
                self.sub_group_to_group_id[len(self.rows)] = g
                self._cut(every[first : first + SUB_GROUP])
            group["params"] = []
        self.parts = self.fp32_partitioned_groups_flat

    def _cut(self, some: list[Any]) -> None:
        own = [self._padded(p.detach()).chunk(self.world)[dist.get_rank()] for p in some]
        self.rows.append(torch.cat(own))
        at = 0
        for p, part in zip(some, own, strict=True):
            p.ds_id, p.ds_numel, p.ds_process_group, p._z3_optimizer = id(p), p.numel(), dist.group.WORLD, self
            p.ds_tensor = self.rows[-1][at : at + part.numel()]
            self.grad_position[id(p)] = [len(self.fp16_groups), at, part.numel()]
            at += part.numel()
        self.fp16_groups.append(some)
        self.fp32_partitioned_groups_flat.append(self.rows[-1].clone().float().requires_grad_())

    def _padded(self, whole: Tensor, value: float = 0.0) -> Tensor:
        return torch.cat([whole.flatten(), whole.new_full((-whole.numel() % self.world,), value)])

    def get_param_id(self, parameter: Any) -> int:
        return id(parameter)

    def step(self) -> None:
        for i, (some, part) in enumerate(zip(self.fp16_groups, self.parts, strict=True)):
            gradients = []
            for p in some:
                whole = p.grad.float()
                dist.all_reduce(whole)
                gradients.append(self._padded(whole / self.world, torch.nan).chunk(self.world)[dist.get_rank()])
            group = self.optimizer.param_groups[self.sub_group_to_group_id[i]]
            part.grad, group["params"] = torch.cat(gradients), [part]
            self.optimizer.step()
            part.grad, group["params"] = None, []
            self.rows[i].copy_(part.detach())
        for p in (p for some in self.fp16_groups for p in some):
            parts = [torch.empty_like(p.ds_tensor) for _ in range(self.world)]
            dist.all_gather(parts, p.ds_tensor)
            p.data.copy_(torch.cat(parts)[: p.numel()].view(p.shape))

    def _with_rows(self, call: Any) -> Any:
        for i, part in enumerate(self.parts):
            self.optimizer.param_groups[self.sub_group_to_group_id[i]]["params"].append(part)
        result = call()
        for group in self.optimizer.param_groups:
            group["params"] = []
        return result

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = self._with_rows(self.optimizer.state_dict)
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._with_rows(lambda: self.optimizer.load_state_dict(saved))


def cut(optimizer: torch.optim.Optimizer, stage: int = 1, **options: Any) -> Any:
    return Zero3(optimizer) if stage == 3 else Zero(optimizer, **options)
