"""Clipping: what a measurement found, as long as the gradients are those that it left."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engines import Batch, Written

__all__ = ["Clipped", "scale_gradients"]


class Clipped:
    """The reports of batches whose gradients were measured, and scaled afterwards."""

    def __init__(self, batches: Sequence[Batch], reports: list[Tensor]) -> None:
        self._batches, self._gradients = list(batches), [batch.gradients for batch in batches]
        self._dh = [batch.dh for batch in batches]
        self.reports = reports
        # of 16 bits the gradients were rounded when they were scaled, so they are measured again
        self._is_exact = all(source.element_size() > 2 for batch in batches for source in batch.sources) and all(
            batch.engine.state.IS_LINEAR for batch in batches
        )
        self._written = [Written() for _ in batches]
        for written, batch in zip(self._written, batches, strict=True):
            written.remember(batch.sources)

    def hold(self, batches: Sequence[Batch]) -> bool:
        """Whether the reports are those of these batches now; if so they get back the gradients that were measured."""
        if not self._is_exact or len(batches) != len(self._batches):
            return False
        if any(a is not b for a, b in zip(batches, self._batches, strict=True)):
            return False
        if any(written.changed(batch.sources) for written, batch in zip(self._written, batches, strict=True)):
            return False
        for batch, gradients, dh in zip(batches, self._gradients, self._dh, strict=True):
            batch.gradients, batch.dh = gradients, dh
        return True


def scale_gradients(gradients: Sequence[Tensor], scale: Tensor) -> None:
    """In place; a call for each dtype and device, and nothing is waited for."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for kind, some in by_kind.items():
        torch._foreach_mul_(some, scale.to(*kind, non_blocking=True))
