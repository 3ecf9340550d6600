"""Generators in host memory behind factors on a GPU: gradients come and factors go through pinned buffers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .memory import CPU

__all__ = ["Staging"]

_streams: dict[torch.device, torch.cuda.Stream] = {}  # of each device, for these copies alone


class Staging:
    """The buffers of one layer in host memory: its gradients g and its factors v, N numbers each."""

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.g, self.v = (
            [torch.empty(shape, dtype=dtype, device=CPU, pin_memory=pinned) for shape in shapes] for _ in range(2)
        )

    @staticmethod
    def fetch(sources: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Copies what is on a device into buffers, and waits for it, and so for all earlier copies out of buffers."""
        with _Copies(sources[0].device) as copies:
            for source, buffer in zip(sources, buffers, strict=True):
                buffer.copy_(source.to(buffer.dtype), non_blocking=True)
        copies.wait()

    @staticmethod
    def send(buffers: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copies buffers to a device, rounding there; what is launched later sees them, the host does not wait."""
        with _Copies(targets[0].device):
            for buffer, target in zip(buffers, targets, strict=True):
                target.copy_(buffer.to(target.device, non_blocking=True))


class _Copies:
    """A stream of their own for copies between a device and the host, in the order of the caller's stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            if device not in _streams:
                _streams[device] = torch.cuda.Stream(device)
            self.stream = _streams[device]

    def __enter__(self) -> "_Copies":
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self.context.__exit__(*error)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
