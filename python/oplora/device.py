"""Steps on a GPU: planned once, then launched without waiting for the device (csrc/cuda/plan.h).

What a step needs of the host lies on the device: AdamW's numbers, the step counts, the verdict on the gradients. A plan
holds the layers' addresses; it is made anew when one of them changes, as gradients do that were set to None.
"""

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import OPLoRARuntimeError
from .state import Layers, State, finish

__all__ = [
    "Device",
    "DeviceLayers",
    "Plan",
    "PlanTensors",
    "free_memory",
    "has_kernels",
    "require_kernels",
    "runs_on_device",
    "share_devices",
]

ADAMW = 7  # float64 numbers of a layer: oplora_core.h's oplora_adamw, whose last are the 64 bits of the steps done
_LIBRARY = Path(__file__).with_name("liboplora_cuda.so")


def runs_on_device(device: torch.device) -> bool:
    """Whether factors there are stepped by the CUDA kernels."""
    return device.type == "cuda"


def has_kernels() -> bool:
    """Whether the CUDA library was built."""
    return "OPLORA_CUDA_LIBRARY" in os.environ or _LIBRARY.is_file()


def require_kernels(where: torch.device) -> None:
    if not has_kernels():
        raise OPLoRARuntimeError(
            f"oplora: the tensors are on {where}, and this oplora was built without the CUDA kernels. Install the CUDA "
            "toolkit 12.8 or newer (nvcc; CUDA_HOME names its folder) and build again in oplora's sources: "
            "OPLORA_CUDA=1 pip install --no-cache-dir . Until then oplora.create_oplora_optimizer(model, "
            "torch.optim.AdamW, lr=...) trains the same generators with PyTorch alone, in more memory."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated there."""
    if device.type == "cuda":
        return (
            int(torch.cuda.mem_get_info(device)[0])
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _upload(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A copy on the device, without waiting, and what it is copied from: a captured copy reads that again."""
    if device.type == "cuda":
        host = host.pin_memory()
    return torch.empty_like(host, device=device).copy_(host, non_blocking=True), host


@dataclass(frozen=True)
class PlanTensors:
    """What a plan is made of beside the states and their bases. Lists have an item a factor."""

    factors: Sequence[Tensor | None]  # float32; None where exact state needs `rounded` alone
    rounded: Sequence[Tensor | None]  # the factors of 16 bits
    gradients: Sequence[Tensor]
    report: Tensor
    dh: Tensor


@dataclass
class Plan:
    """What the launches for some layers take, and the tensors at whose addresses it was made for."""

    key: tuple[Any, ...]
    plan: Tensor
    table: Tensor
    workspace: Tensor
    tensors: PlanTensors
    copied: list[tuple[Tensor, Tensor]]  # factors that are not contiguous, and what stands for them
    kept: list[Any]  # whatever else the device reads

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.plan, self.table, self.workspace


class Device:
    """What all layers on one device share: AdamW's numbers, the verdict, and the last plan."""

    def __init__(self, device: torch.device, counts: Sequence[int]) -> None:
        """counts: how many factors each layer has."""
        self.device = device
        self.adamw = torch.zeros(len(counts), ADAMW, dtype=torch.float64, device=device)
        self.rates = torch.zeros(sum(counts), 2, dtype=torch.float64, device=device)  # of every factor
        self.first_rates = [sum(counts[:i]) for i in range(len(counts))]
        self.steps = self.adamw.view(torch.int64)[:, ADAMW - 1]  # how many each layer has done
        self.verdict = torch.zeros(2, dtype=torch.int32, device=device)  # not finite, steps that were refused
        self.plan: Plan | None = None
        self._numbers: list[float | None] = [None] * ADAMW
        self._verdict_on_host = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._refusals_told = 0

    def set_numbers(self, numbers: Sequence[float | Tensor]) -> None:
        """lr, weight_ratio, hidden_lr, beta1, beta2, eps, weight_decay, of all layers; those that changed are written.

        A tensor is copied on the device at every step, also at each replay of a captured one.
        """
        places = [[self.rates[:, 0]], *([column] for column in self.adamw.unbind(1)[: ADAMW - 1])]
        places[-1].append(self.rates[:, 1])
        for i, number in enumerate(numbers):
            if isinstance(number, Tensor):
                for column in places[i]:
                    column.copy_(number)
                self._numbers[i] = None
            elif number != self._numbers[i]:
                for column in places[i]:
                    column.fill_(number)
                self._numbers[i] = number

    def rows(self, rows: Sequence[int]) -> Tensor:
        """Where the numbers of some layers are, as the ops take it."""
        return torch.tensor([[row, self.first_rates[row]] for row in rows], dtype=torch.int64)

    def tell_verdict(self) -> None:
        """Has the verdict sent to the host, which does not wait for it."""
        self._verdict_on_host.copy_(self.verdict, non_blocking=True)

    def count_refusal(self, veto: Tensor) -> None:
        """A step that was refused elsewhere, and for which nothing is launched here."""
        self.verdict[1:] += veto
        self.tell_verdict()

    def new_refusals(self, *, wait: bool = False) -> int:
        """How many steps were refused since the last call: as far as the host has been told, or all of them."""
        if wait and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        refused = int(self._verdict_on_host[1])
        new, self._refusals_told = refused - self._refusals_told, refused
        return new


def share_devices(states: Sequence[State]) -> None:
    """Gives all states on one device what they share."""
    by_device: dict[torch.device, list[State]] = {}
    for state in states:
        if runs_on_device(state.factors.device):
            by_device.setdefault(state.factors.device, []).append(state)
    for device, some in by_device.items():
        shared = Device(device, [len(state.factors.shapes) for state in some])
        for row, state in enumerate(some):
            state.shared, state.row = shared, row


class DeviceLayers(Layers):
    """Layers on one device."""

    planned: Plan | None = None  # by a measurement, for the step that follows it

    @property
    def shared(self) -> Device:
        shared: Device = self.states[0].shared
        return shared

    @property
    def rows(self) -> list[int]:
        """Whose numbers in Device.adamw."""
        return [state.row for state in self.states]

    @abstractmethod
    def make_plan(self, tensors: PlanTensors) -> tuple[Tensor, Tensor, Tensor]:
        """The op's plan, table and workspace."""

    @abstractmethod
    def launch_measure(self, plan: Plan) -> None: ...

    @abstractmethod
    def launch_step(self, plan: Plan, veto: Tensor | None, measured: bool) -> None: ...

    @abstractmethod
    def values(self) -> list[Tensor | None]:
        """Of factors of 16 bits the value before rounding, where the state goes on from it; None of all others."""

    def measure(self) -> Tensor:
        self.planned = self._plan()
        self.launch_measure(self.planned)
        return self.planned.tensors.report

    def step(self, adamw: Sequence[float | Tensor], report: Tensor | None) -> tuple[bool, Tensor]:
        """As Layers.step; whether it was done is known on the device alone, so the answer is always yes."""
        return True, self.launch(adamw, report is not None, None)

    def launch(self, adamw: Sequence[float | Tensor], measured: bool, veto: Tensor | None) -> Tensor:
        """A step that is refused where a gradient is not finite or veto (int32, on the device) says so."""
        plan = self.planned if measured and self.planned is not None else self._plan()
        self.shared.set_numbers(adamw)
        for factor, stand_in in plan.copied:
            stand_in.copy_(factor)
        self.launch_step(plan, veto, measured)
        for factor, stand_in in plan.copied:
            factor.copy_(stand_in)
        self.shared.tell_verdict()
        self.remember_step(plan.tensors.report)
        finish(self.states, self.parameters, self.parameters)
        self.planned = None
        return plan.tensors.report

    def count_step(self, state: State) -> None:
        """The device does."""

    def _plan(self) -> Plan:
        values = self.values()
        tensors = [*self.parameters, *self.gradients, *self.bases(), *values]
        key = (
            *(t if t is None else (t.data_ptr(), t.dtype) for t in tensors),
            *self.rows,
        )
        plan = self.shared.plan
        if plan is None or plan.key != key:
            plan = self.shared.plan = self._make_plan(key, values)
        return plan

    def _make_plan(self, key: tuple[Any, ...], values: list[Tensor | None]) -> Plan:
        device = self.shared.device
        factors: list[Tensor | None] = []
        rounded: list[Tensor | None] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for parameter, value in zip(self.parameters, values, strict=True):
            factor = parameter.detach()
            if not factor.is_contiguous():
                copied.append((factor, factor.contiguous()))
                factor = copied[-1][1]
            is_half = factor.dtype != torch.float32
            rounded.append(factor if is_half else None)
            factors.append(factor if not is_half else value)
        report = self.new_report()
        dh = torch.zeros(sum(state.H for state in self.states), dtype=torch.float64, device=device)
        # the plan is kept for many steps, and must not keep their gradients
        plan, table, workspace = self.make_plan(PlanTensors(factors, rounded, self.gradients, report, dh))
        on_device, host = _upload(table, device)
        kept = PlanTensors(factors, rounded, [], report, dh)
        return Plan(key, plan, on_device, workspace, kept, copied, [host, self.bases()])
