"""The torch ops: loading, what tracing needs to know of them, autograd, and the public `generate`."""

from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .errors import OPLoRAError, OPLoRATypeError, OPLoRAValueError
from .kernels import require_kernels

__all__ = ["generate"]

_LIBRARY = Path(__file__).with_name("liboplora_torch.so")
if not _LIBRARY.is_file():
    raise OPLoRAError(
        f"oplora: {_LIBRARY.name} is not beside the package: it was not built. "
        "Install a wheel, or `pip install .` in the source folder, with PyTorch and a C++ compiler installed."
    )
torch.ops.load_library(_LIBRARY)


def generate(z: Tensor, W1: Tensor, c1: Tensor, W2: Tensor, c2: Tensor) -> Tensor:
    """The factors' entries that one generator predicts: v = W2 ReLU(W1 z + c1) + c2 (OP-LoRA, arXiv 2412.10362).

    Differentiable once in all five arguments. The gradient of W2 is the rank-one matrix grad_v h^T.

    Args:
        z: (Z,) the learned latent.
        W1: (H, Z), contiguous.
        c1: (H,).
        W2: (N, H), contiguous or the transpose of a contiguous (H, N): then the columns of units that are off are
            not read.
        c2: (N,).

    All are of one dtype, float32 or float64, on one device. On the CPU the C core computes, on a GPU its CUDA kernels,
    elsewhere plain PyTorch.

    Returns:
        v (N,), of the same dtype.

    Raises:
        OPLoRAError: shapes, dtypes, devices or strides that do not fit (the message names the argument), or a CUDA
            tensor where the kernels were not built.
    """
    _check_generate(z, W1, c1, W2, c2)
    if W2.device.type == "cuda":
        require_kernels(W2.device)
    v: Tensor = torch.ops.oplora.generate(z, W1, c1, W2, c2)
    return v


def _check_generate(z: Tensor, W1: Tensor, c1: Tensor, W2: Tensor, c2: Tensor) -> None:
    named = {"z": z, "W1": W1, "c1": c1, "W2": W2, "c2": c2}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise OPLoRATypeError(f"oplora.generate: {name} is a {type(tensor).__name__}, expected a torch.Tensor.")
    if W1.dim() != 2 or W2.dim() != 2:
        raise OPLoRAValueError(
            f"oplora.generate: W1 has shape {tuple(W1.shape)} and W2 {tuple(W2.shape)}, expected (H, Z) and (N, H)."
        )
    H, Z = W1.shape
    N = W2.shape[0]
    expected = {"z": (Z,), "W1": (H, Z), "c1": (H,), "W2": (N, H), "c2": (N,)}
    for name, tensor in named.items():
        if tuple(tensor.shape) != expected[name]:
            raise OPLoRAValueError(
                f"oplora.generate: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}, "
                f"as W1 is (H, Z) = {(H, Z)} and W2 (N, H) = {tuple(W2.shape)}."
            )
        if tensor.dtype != W2.dtype or tensor.dtype not in (torch.float32, torch.float64):
            raise OPLoRATypeError(
                f"oplora.generate: {name} is {tensor.dtype} and W2 {W2.dtype}; all five must be torch.float32 or all "
                f"torch.float64. Convert with {name}.to(...)."
            )
        if tensor.device != W2.device:
            raise OPLoRATypeError(
                f"oplora.generate: {name} is on {tensor.device}, W2 on {W2.device}; move all five to one device."
            )
        if not (tensor.is_contiguous() or (name == "W2" and tensor.t().is_contiguous())):
            raise OPLoRAValueError(
                f"oplora.generate: {name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; "
                f"pass {name}.contiguous()."
            )
    if 0 in (H, Z, N):
        raise OPLoRAValueError(f"oplora.generate: H, Z and N must be at least 1, are {H}, {Z} and {N}.")


@torch.library.register_fake("oplora::generate")
def _(z: Tensor, W1: Tensor, c1: Tensor, W2: Tensor, c2: Tensor) -> Tensor:
    return z.new_empty((W2.shape[0],))


@torch.library.register_fake("oplora::generate_backward")
def _(g: Tensor, z: Tensor, W1: Tensor, c1: Tensor, W2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, Z = W1.shape
    return z.new_empty((Z,)), z.new_empty((H, Z)), z.new_empty((H,)), z.new_empty((H,))


# Every device without a kernel of its own.
torch.library.impl("oplora::generate", "CompositeExplicitAutograd", reference.generate)
torch.library.impl("oplora::generate_backward", "CompositeExplicitAutograd", reference.generate_backward)


def _save_inputs(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx, g):  # type: ignore[no-untyped-def]
    z, W1, c1, W2 = ctx.saved_tensors
    g = g.contiguous()
    grad_z, grad_W1, grad_c1, h = torch.ops.oplora.generate_backward(g, z, W1, c1, W2)
    grad_W2 = None
    if ctx.needs_input_grad[3]:
        grad_W2 = torch.outer(g, h) if W2.is_contiguous() else torch.outer(h, g).t()
    return grad_z, grad_W1, grad_c1, grad_W2, g if ctx.needs_input_grad[4] else None


def _twice(ctx, *grads):  # type: ignore[no-untyped-def]
    raise OPLoRAError("oplora.generate is differentiable once; write v = W2 @ relu(W1 @ z + c1) + c2 for more.")


torch.library.register_autograd("oplora::generate", _backward, setup_context=_save_inputs)
torch.library.register_autograd("oplora::generate_backward", _twice)
