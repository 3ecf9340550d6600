"""The one tolerance of the tests: ours may be twice as far from the float64 truth as PyTorch's own result is."""

import torch
from torch import Tensor


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """max|ours - truth| <= factor max|torchs - truth| + eps max|truth|; truth in float64, the others alike."""
    assert truth.dtype == torch.float64
    assert ours.dtype == torchs.dtype
    error = (ours.double() - truth).abs().max()
    allowed = factor * (torchs.double() - truth).abs().max() + torch.finfo(ours.dtype).eps * truth.abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
