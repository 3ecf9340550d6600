"""Steps on the CPU: one call of the C core for all layers, which writes the next factors in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import Batch, Engine, LayerState
from .exact import Exact
from .lean import Lean
from .rate import Rate
from .staging import Staging

__all__ = ["HostEngine", "StagedEngine"]


class HostEngine(Engine):
    """Generators and factors on the CPU."""

    state: Lean | Exact | Rate

    def generate(self, state: LayerState) -> list[Tensor]:
        v = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in state.factors.shapes]
        if isinstance(self.state, Lean):
            self.state.start(state.index, v)
        else:
            assert isinstance(self.state, Exact), "state rate keeps what it generates"
            self.state.generate(state.index, v)
        return v

    def measure(self, batch: Batch) -> Tensor:
        report = batch.new_report()
        if isinstance(self.state, Rate):
            self.state.measure(batch, self.outputs(batch), self.inputs(batch), report)
        else:
            self.state.measure(batch, self.inputs(batch), report)
        return report

    def finish_measuring(self, batch: Batch, report: Tensor) -> None:
        self.state.finish_measuring(batch, self.measured_inputs(batch), report)

    def reduce(self, batch: Batch, report: Tensor) -> list[Tensor]:
        return self.state.reduce(batch, self.measured_inputs(batch), self.numbers, report)

    def step(self, batch: Batch, report: Tensor | None) -> tuple[bool, Tensor]:
        measured = report is not None
        if report is None:
            report = batch.new_report()
        out, held = self.outputs(batch), self.hold(batch)
        if not self.state.step(batch, out, self.inputs(batch), self.numbers, report, measured):
            return False, report
        self.write(batch, out)
        self.put_back(batch, held)
        self.finish(batch, report)
        return True, report

    def inputs(self, batch: Batch) -> list[Tensor]:
        """The gradients where the core reads them."""
        return batch.gradients

    def measured_inputs(self, batch: Batch) -> list[Tensor]:
        """The same after they were measured, as they were then."""
        return batch.gradients

    def outputs(self, batch: Batch) -> list[Any]:
        """Where the core writes the factors, and in state lean reads them: in place if it can."""
        if self.writes_in_place:
            return batch.parameters
        masters = [master for state in batch.states for master in state.masters]
        return [
            master if master is not None else self._in_place(p)
            for p, master in zip(batch.parameters, masters, strict=True)
        ]

    def _in_place(self, parameter: Tensor) -> Tensor:
        if parameter.dtype is self.dtype and parameter.is_contiguous():
            return parameter
        return parameter.detach().to(self.dtype, copy=True, memory_format=torch.contiguous_format)

    def write(self, batch: Batch, out: Sequence[Any]) -> None:
        """Rounds what lies beside its factor into it."""
        if self.writes_in_place:
            return
        for parameter, written in zip(batch.parameters, out, strict=True):
            if written is not parameter:
                parameter.detach().copy_(written)


class StagedEngine(HostEngine):
    """Factors on a GPU and generators in host memory: the C core makes the step, and only the gradients and the factors
    cross the bus. The host waits for the gradients."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._stagings: list[Staging | None] = [None] * len(self.states)

    def inputs(self, batch: Batch) -> list[Tensor]:
        buffers = [buffer for staging in self._of(batch) for buffer in staging.g]
        Staging.fetch(batch.gradients, buffers)
        return buffers

    def measured_inputs(self, batch: Batch) -> list[Tensor]:
        return [buffer for staging in self._of(batch) for buffer in staging.g]

    def outputs(self, batch: Batch) -> list[Any]:
        buffers = [buffer for staging in self._of(batch) for buffer in staging.v]
        if not self.state.STARTS_FROM_FACTORS:
            return buffers
        masters = [master for state in batch.states for master in state.masters]
        values = [
            (p.detach(), buffer)
            for p, buffer, master in zip(batch.parameters, buffers, masters, strict=True)
            if master is None
        ]
        if values:
            Staging.fetch(*map(list, zip(*values, strict=True)))
        return [buffer if master is None else master for buffer, master in zip(buffers, masters, strict=True)]

    def write(self, batch: Batch, out: Sequence[Any]) -> None:
        Staging.send(out, [parameter.detach() for parameter in batch.parameters])

    def _of(self, batch: Batch) -> list[Staging]:
        stagings = []
        for state in batch.states:
            if (staging := self._stagings[state.index]) is None:
                staging = self._stagings[state.index] = Staging(state.factors.shapes, self.dtype, self.placed)
            stagings.append(staging)
        return stagings
