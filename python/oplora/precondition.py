"""OP-ScaledAdamW: gradients of a pair A, B in the metric of the product B A, before they flow into the generator.

    g_A <- (B^T B + delta I)^-1 g_A        A (r, in_features), B (out_features, r)
    g_B <- g_B (A A^T + delta I)^-1

(arXiv 2412.10362, and Zhang, Pilanci: "Riemannian Preconditioned LoRA", arXiv 2402.02347.) The r x r matrices are
formed and inverted in float64, those of all layers of one rank at once: the ones of a B that has just left zero are
singular to float32's rounding. It costs 2 r multiplications a factor entry, and holds a second copy of the gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapters import AdaptedLayer
from .errors import OPLoRAValueError

__all__ = ["precondition", "require_pairs"]


def require_pairs(layers: Sequence[AdaptedLayer]) -> None:
    for layer in layers:
        if layer.pair() is None:
            raise OPLoRAValueError(
                f"oplora.AdamW: precondition needs the A and the B of a product B A; layer {layer.name} has "
                f"{', '.join(layer.tensors)}. Leave precondition out, or train that adapter with an optimizer of its "
                "own (adapter_name)."
            )


def precondition(
    layers: Sequence[AdaptedLayer], tensors: Sequence[Sequence[Tensor]], gradients: Sequence[list[Tensor]], delta: float
) -> list[list[Tensor]]:
    """The gradients of every layer, with new tensors for those of its pair; tensors are the layers' own."""
    pairs = [_pair(layer, some) for layer, some in zip(layers, tensors, strict=True)]
    doubles = [(A.double(), B.double()) for A, B in pairs]
    of_a = _inverses([B.mT @ B for _, B in doubles], delta)
    of_b = _inverses([A @ A.mT for A, _ in doubles], delta)
    scaled = []
    for layer, some, for_a, for_b in zip(layers, gradients, of_a, of_b, strict=True):
        g_A, g_B = _pair(layer, some)
        out = list(some)
        for index in _indices(layer):
            out[index] = torch.empty_like(some[index], memory_format=torch.contiguous_format)
        to_A, to_B = _pair(layer, out)
        wide = torch.promote_types(g_A.dtype, torch.float32)  # gradients of 16 bits are rounded once, at the end
        to_A.copy_(for_a.to(wide) @ g_A.to(wide))
        to_B.copy_(g_B.to(wide) @ for_b.to(wide))
        scaled.append(out)
    return scaled


def _indices(layer: AdaptedLayer) -> tuple[int, int]:
    indices = layer.pair()
    assert indices is not None  # require_pairs
    return indices


def _pair(layer: AdaptedLayer, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    A, B = (tensors[index].detach() for index in _indices(layer))
    return layer.blocks(A, B)


def _inverses(matrices: Sequence[Tensor], delta: float) -> list[Tensor]:
    """(matrix + delta I)^-1 of each (blocks, r, r); of one with NaN or infinity NaN, which the step then refuses."""
    by_kind: dict[tuple[int, torch.device], list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_kind.setdefault((matrix.shape[-1], matrix.device), []).append(i)
    inverses = list(matrices)
    for (r, device), indices in by_kind.items():
        identity = torch.eye(r, dtype=torch.float64, device=device)
        batch = torch.cat([matrices[i] for i in indices]) + delta * identity
        L, info = torch.linalg.cholesky_ex(batch)
        root = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
        usable = ((info == 0) & batch.isfinite().all(-1).all(-1))[:, None, None]
        inverse = torch.where(usable, root.mT @ root, torch.nan)
        for i, piece in zip(indices, inverse.split([len(matrices[i]) for i in indices]), strict=True):
            inverses[i] = piece
    return inverses
