"""OP-ScaledAdamW: gradients of a pair A, B in the metric of the product B A, before they flow into the generator.

    g_A <- (B^T B + delta I)^-1 g_A        A (r, in_features), B (out_features, r)
    g_B <- g_B (A A^T + delta I)^-1

(arXiv 2412.10362, and Zhang, Pilanci: "Riemannian Preconditioned LoRA", arXiv 2402.02347.) The r x r matrices are
formed and inverted in float64: those of a B that has just left zero are singular to float32's rounding. Layers of the
same shapes go through together, as many small products one by one would cost more than the step itself. It takes 2 r
multiplications a factor entry, and holds a second copy of the gradients.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import OPLoRAValueError
from .layers import AdaptedLayer

__all__ = ["precondition_gradients", "require_pairs"]

MOST_ENTRIES: Final = 1 << 23  # of A and B at once: they are copied, as float64 too


def require_pairs(layers: Sequence[AdaptedLayer]) -> None:
    for layer in layers:
        if layer.pair() is None:
            raise OPLoRAValueError(
                f"oplora.AdamW: precondition needs the A and the B of a product B A; layer {layer.name} has "
                f"{', '.join(layer.tensors)}. Leave precondition out, or train that adapter with an optimizer of its "
                "own (adapter_name)."
            )


def precondition_gradients(
    layers: Sequence[AdaptedLayer], tensors: Sequence[Sequence[Tensor]], gradients: Sequence[list[Tensor]], delta: float
) -> list[list[Tensor]]:
    """The gradients of every layer, with new tensors for those of its pair; tensors are the layers' own."""
    pairs = [(*_blocks(layer, of), *_blocks(layer, g)) for layer, of, g in zip(layers, tensors, gradients, strict=True)]
    scaled = [list(some) for some in gradients]
    for indices in _alike(pairs):
        A, B, g_A, g_B = (torch.stack(some) for some in zip(*(pairs[i] for i in indices), strict=True))
        to_A, to_B = _scaled(A, B, g_A, g_B, delta)
        for i, a, b in zip(indices, to_A, to_B, strict=True):
            for index in _indices(layers[i]):
                scaled[i][index] = torch.empty_like(scaled[i][index], memory_format=torch.contiguous_format)
            for out, result in zip(_blocks(layers[i], scaled[i]), (a, b), strict=True):
                out.copy_(result)
    return scaled


def _alike(pairs: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
    """Layers that go through one batched product: of the same shapes, and together no more than MOST_ENTRIES."""
    by_kind: dict[Any, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_kind.setdefault(tuple((t.shape, t.dtype, t.device) for t in pair), []).append(i)
    for indices in by_kind.values():
        A, B, *_ = pairs[indices[0]]
        at_once = max(1, MOST_ENTRIES // (A.numel() + B.numel()))
        for begin in range(0, len(indices), at_once):
            yield indices[begin : begin + at_once]


def _scaled(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Of batches (layers, blocks, r, in_features) and (layers, blocks, out_features, r)."""
    A, B = A.double(), B.double()
    for_A, for_B = _inverse(B.mT @ B, delta), _inverse(A @ A.mT, delta)
    wide = torch.promote_types(g_A.dtype, torch.float32)  # gradients of 16 bits are rounded once, at the end
    return for_A.to(wide) @ g_A.to(wide), g_B.to(wide) @ for_B.to(wide)


def _inverse(matrices: Tensor, delta: float) -> Tensor:
    """(matrix + delta I)^-1 of each; NaN, which the step then refuses, for one with NaN or infinity and for one that
    is not positive definite to rounding."""
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64, device=matrices.device)
    matrices = matrices + delta * identity
    L, info = torch.linalg.cholesky_ex(matrices)
    root = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    usable = (info == 0) & matrices.isfinite().all(-1).all(-1)
    return torch.where(usable[..., None, None], root.mT @ root, torch.nan)


def _indices(layer: AdaptedLayer) -> tuple[int, int]:
    indices = layer.pair()
    assert indices is not None  # require_pairs
    return indices


def _blocks(layer: AdaptedLayer, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    A, B = (tensors[index].detach() for index in _indices(layer))
    return layer.blocks(A, B)
