"""Which devices the CUDA kernels serve, and whether they were built."""

import os
from pathlib import Path

import torch

from .errors import OPLoRARuntimeError

__all__ = ["has_kernels", "is_capturing", "library_path", "require_kernels", "runs_on_device"]

_LIBRARY = Path(__file__).with_name("liboplora_cuda.so")


def runs_on_device(device: torch.device) -> bool:
    """Whether factors there are stepped by the CUDA kernels."""
    return device.type == "cuda"


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched there now goes into a CUDA graph, and runs at each of its replays."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def library_path() -> str:
    """Of the CUDA library, as the torch ops look for it."""
    return os.environ.get("OPLORA_CUDA_LIBRARY", str(_LIBRARY))


def has_kernels() -> bool:
    """Whether the CUDA library was built."""
    return "OPLORA_CUDA_LIBRARY" in os.environ or _LIBRARY.is_file()


def require_kernels(where: torch.device) -> None:
    if not has_kernels():
        raise OPLoRARuntimeError(
            f"oplora: the tensors are on {where}, and this oplora was built without the CUDA kernels. Install oplora's "
            "wheel, which has them. Or install the CUDA toolkit 12.8 or newer (nvcc; CUDA_HOME names its folder) and "
            "build again in oplora's sources: OPLORA_CUDA=1 pip install --no-cache-dir . Until then "
            "oplora.create_oplora_optimizer(model, torch.optim.AdamW, lr=...) trains the same generators with PyTorch "
            "alone, in more memory."
        )
