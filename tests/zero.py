"""What DeepSpeed's ZeRO-1 and ZeRO-2 do with an optimizer, without DeepSpeed (0.19: runtime/zero/stage_1_and_2.py, and
runtime/bf16_optimizer.py, which steps all groups at once)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 2  # entries, a process


class Zero:
    """Lays every group's parameters behind each other, pads the row, and puts this process's part of it, in float32,
    into the group. step() averages gradients, hands the part's over and copies the part into the model."""

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
