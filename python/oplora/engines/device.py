"""Steps on a GPU: planned once, then launched without waiting for the device (csrc/cuda/plan.h).

What a step needs of the host lies on the device: AdamW's numbers, the step counts, the verdict on the gradients. A plan
holds the layers' addresses; it is made anew when one of them changes, as gradients do that were set to None.

A CUDA graph holds addresses, and nobody tells when it is gone. So a plan that was captured is kept as long as the
engine, with everything that it was made of, and no later step is made with one whose table only a replay fills. Its
table is where the graph finds the addresses: where a state that was loaded, or an edit, puts other tensors behind the
layers, the table is written anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from ..kernels import is_capturing
from .engine import Batch, Engine, LayerState, State
from .exact import Exact
from .factors import Factors
from .lean import Lean
from .memory import CPU
from .rate import Rate

__all__ = ["DeviceEngine"]

_dtype = attrgetter("dtype")


@dataclass
class Plan:
    """What the launches for a batch take, and the tensors at whose addresses it was made for.

    key: of the batch, of what the model has (how often its factors were looked at, which is whenever one was replaced;
    gradients), and of what the engine has (masters, bases).
    """

    key: tuple[Any, Any, Any]
    plan: Tensor
    table: Tensor
    workspace: Tensor
    report: Tensor
    dh: Tensor | None  # lean state's
    copied: list[tuple[Tensor, Tensor]]  # factors that are not contiguous, and what stands for them
    factors: list[Tensor | None]
    rounded: list[Tensor | None]
    bases: list[Tensor | None]
    host: Tensor  # what the table was copied from: a captured copy reads it again
    is_of_capture: bool  # made there: no step has filled its table, replays do
    batch: Batch | None = None  # of a captured step: the layers,
    gradients: list[Tensor] | None = None  # and their gradients; other plans must not keep these

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.plan, self.table, self.workspace


class DeviceEngine(Engine):
    """Generators and factors on one GPU."""

    state: Lean | Exact | Rate
    looks_for_edits = False

    def __init__(self, state: State, ties: Sequence[Factors], weight_ratio: float) -> None:
        super().__init__(state, ties, weight_ratio)
        self.verdict = torch.zeros(2, dtype=torch.int32, device=self.device)  # not finite, steps that were refused
        self.refused = self.verdict[:1]  # whether the last gradients were
        self.plan: Plan | None = None
        self._verdict_on_host = torch.zeros(2, dtype=torch.int32, device=CPU, pin_memory=self.device.type == "cuda")
        self._refusals_told = 0
        self._told: torch.cuda.Event | None = None  # when the latest verdict has got to the host
        self._measured: Plan | None = None  # by measure, for the step that follows it
        self._captured: list[Plan] = []
        self._captured_is_stale = False  # as how a layer began is another story now

    @property
    def casts(self) -> bool:
        """The kernels read gradients of 16 bits as they are."""
        return False

    def forget(self, layer: LayerState, wrote: bool) -> None:
        super().forget(layer, wrote)
        self.plan = None  # it holds how the layer began
        self._captured_is_stale = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy has other addresses, and was never captured."""
        return {**self.__dict__, "plan": None, "_measured": None, "_captured": [], "_told": None}

    # ---- the verdict ----

    def tell_verdict(self) -> None:
        """Has the verdict sent to the host, which does not wait for it."""
        self._verdict_on_host.copy_(self.verdict, non_blocking=True)
        if self.device.type == "cuda" and not is_capturing(self.device):
            self._told = self._told or torch.cuda.Event()
            self._told.record(torch.cuda.current_stream(self.device))

    def count_refusal(self, veto: Tensor) -> None:
        """A step that was refused elsewhere, and for which nothing is launched here."""
        self.verdict[1:] += veto
        self.tell_verdict()

    def new_refusals(self, *, wait: bool = False) -> int:
        """How many steps were refused since the last call: as far as the host has been told, or all of them."""
        if wait and self._told is not None and not self.is_captured:
            self._told.synchronize()
        elif wait and self.device.type == "cuda":  # a replay records no event that could be waited for
            torch.cuda.current_stream(self.device).synchronize()
        refused: int = self._verdict_on_host.tolist()[1]
        new, self._refusals_told = refused - self._refusals_told, refused
        return new

    def generate(self, state: LayerState) -> list[Tensor]:
        batch = Batch(self, (state.index,))
        self._new_numbers(batch)
        v = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in state.factors.shapes]
        nothing = [None] * len(v)
        plan, table, workspace = self.state.plan(batch, v, nothing, nothing, [], self.numbers, self.verdict)
        arguments = plan, table.to(self.device), workspace
        if isinstance(self.state, Lean):
            torch.ops.oplora.cuda_lean_start_(*arguments, self.state.latent_std[state.index])
        else:
            torch.ops.oplora.cuda_exact_generate_(*arguments)
        return v

    # ---- stepping ----

    def measure(self, batch: Batch) -> Tensor:
        self._measured = self._plan_of(batch)
        self._launch("measure", batch, self._measured)
        batch.dh = self._measured.dh
        return self._measured.report

    def step(self, batch: Batch, report: Tensor | None) -> tuple[bool, Tensor]:
        """As Engine.step; whether it was done is known on the device alone, so the answer is always yes."""
        return True, self.launch(batch, report is not None, None)

    def launch(self, batch: Batch, measured: bool, veto: Tensor | None) -> Tensor:
        """A step that is refused where a gradient is not finite or veto (int32, on the device) says so.

        State rate's is always measured.
        """
        plan = self._measured if measured and self._measured is not None else self._plan_of(batch)
        held = self.hold(batch)
        self._launch("step", batch, plan, veto, *(() if isinstance(self.state, Rate) else (measured,)))
        for factor, stand_in in plan.copied:
            factor.copy_(stand_in)
        self.put_back(batch, held)
        self.tell_verdict()
        self._measured = None
        self.finish(batch, plan.report)
        return plan.report

    def _launch(self, what: str, batch: Batch, plan: Plan, *more: Any) -> None:
        if is_capturing(self.device):
            self._keep(plan, batch)
        for factor, stand_in in plan.copied:
            stand_in.copy_(factor)
        getattr(torch.ops.oplora, f"cuda_{self.state.KIND}_{what}_")(*plan.arguments(), *more)

    def _new_numbers(self, batch: Batch) -> None:
        """Room for what the device tells of the batch."""
        batch.report = batch.new_report()
        if isinstance(self.state, Lean):
            batch.dh = torch.zeros(batch.units, dtype=torch.float64, device=self.device)

    def _plan_of(self, batch: Batch) -> Plan:
        gradients = batch.gradients
        of_gradients = list(map(Tensor.data_ptr, gradients)), list(map(_dtype, gradients))
        key = (batch.indices, (self.looks, *of_gradients), self._own_addresses(batch))
        if is_capturing(self.device):
            return self._plan_of_capture(key, batch)
        self.renew_captured()
        if self.plan is None or self.plan.key != key:
            self.plan = self._make_plan(key, batch)
        return self.plan

    def _own_addresses(self, batch: Batch) -> tuple[Any, ...]:
        masters, bases = _masters(batch), batch.bases()
        return _addresses(masters), _addresses(bases)

    def _make_plan(self, key: tuple[Any, Any, Any], batch: Batch) -> Plan:
        factors: list[Tensor | None] = []
        rounded: list[Tensor | None] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for parameter, master in zip(batch.parameters, _masters(batch), strict=True):
            factor = parameter.detach()
            if not factor.is_contiguous():
                copied.append((factor, factor.contiguous()))
                factor = copied[-1][1]
            is_half = factor.dtype != torch.float32
            rounded.append(factor if is_half else None)
            factors.append(factor if not is_half else master)
        if self.latest is batch:
            self._leave_latest()  # the report that is kept is of the last plan
            self.latest = None
        self._new_numbers(batch)
        assert batch.report is not None
        plan, table, workspace = self.state.plan(
            batch, factors, rounded, batch.every_base(), batch.gradients, self.numbers, self.verdict
        )
        on_device, host = _upload(table, self.device)
        of_capture = is_capturing(self.device)
        report, dh, bases = batch.report, batch.dh, batch.bases()
        return Plan(key, plan, on_device, workspace, report, dh, copied, factors, rounded, bases, host, of_capture)

    # ---- captured steps ----

    @property
    def is_captured(self) -> bool:
        return bool(self._captured)

    def _plan_of_capture(self, key: tuple[Any, Any, Any], batch: Batch) -> Plan:
        made = [*([] if self.plan is None else [self.plan]), *self._captured]
        plan = next((plan for plan in made if plan.key == key), None)
        if plan is None:
            return self._make_plan(key, batch)
        if plan.is_of_capture:  # perhaps of another graph, which need not be replayed before this one
            plan.table.copy_(plan.host, non_blocking=True)
        return plan

    def _keep(self, plan: Plan, batch: Batch) -> None:
        plan.batch, plan.gradients = batch, list(batch.gradients)
        if all(plan is not known for known in self._captured):
            self._captured.append(plan)

    def renew_captured(self) -> None:
        for plan in self._captured:
            assert plan.batch is not None and plan.gradients is not None
            batch = Batch(self, plan.batch.indices)
            own = self._own_addresses(batch)
            if plan.key[2] == own and not self._captured_is_stale:
                continue
            batch.report, batch.dh = plan.report, plan.dh
            pairs = zip(plan.factors, plan.rounded, _masters(batch), strict=True)
            plan.factors = [factor if rounded is None else master for factor, rounded, master in pairs]
            made, table, workspace = self.state.plan(
                batch, plan.factors, plan.rounded, batch.every_base(), plan.gradients, self.numbers, self.verdict
            )
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a replay under way reads what is let go here
            plan.host.copy_(table)
            plan.table.copy_(plan.host)
            plan.plan, plan.workspace, plan.bases, plan.key = made, workspace, batch.bases(), (*plan.key[:2], own)
        self._captured_is_stale = False


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """0 where there is none; an empty list where there is none at all."""
    if any(map(is_not, tensors, repeat(None))):
        return [0 if t is None else t.data_ptr() for t in tensors]
    return []


def _masters(batch: Batch) -> list[Tensor | None]:
    return [master for state in batch.states for master in state.masters]


def _upload(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A copy on the device, without waiting, and what it is copied from."""
    if device.type == "cuda":
        host = host.pin_memory()
    return torch.empty_like(host, device=device).copy_(host, non_blocking=True), host
