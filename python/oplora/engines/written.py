"""Who wrote last: whether tensors still hold what was in them when they were looked at.

Version counters do not tell: `tensor.data`, a hot swap and torch.distributed's collectives go around them. So on the
CPU the values themselves are compared, by a 64-bit fingerprint of their bytes. On a GPU that would make the host wait;
there version counters and addresses have to do.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .. import ops  # noqa: F401  (loads the op that is called below)

__all__ = ["Written", "marks"]

_version = attrgetter("_version")


class Written:
    """What some tensors, all on one device, held at the last remember()."""

    def __init__(self) -> None:
        self._marks: list[Any] | None = None

    def remember(self, tensors: Sequence[Tensor]) -> None:
        self._marks = marks(tensors)

    def forget(self) -> None:
        """From now on everything counts as changed."""
        self._marks = None

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of them, of as many as were remembered, holds something else now."""
        return self._marks is None or marks(tensors) != self._marks


def marks(tensors: Sequence[Tensor]) -> list[Any]:
    """On the CPU a number a tensor, elsewhere address and version of each."""
    if tensors and tensors[0].device.type == "cpu":
        fingerprints: list[Any] = torch.ops.oplora.fingerprint(tensors).tolist()
        return fingerprints
    return list(zip(map(Tensor.data_ptr, tensors), map(_version, tensors), strict=True))
