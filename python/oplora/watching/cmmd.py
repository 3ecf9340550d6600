"""The distance between two sets of pictures that OP-LoRA's paper reports."""

import torch
from torch import Tensor

from ..errors import OPLoRATypeError, OPLoRAValueError

__all__ = ["cmmd"]

BANDWIDTH = 10.0
SCALE = 1000.0
ROWS = 1024  # of the matrix of kernel values that are in memory at once


def cmmd(features_x: Tensor, features_y: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features: 0 for equal sets, larger the more they differ.

        x, y divided by their Euclidean norms;  k(x, y) = exp(-||x - y||^2 / (2 * 10^2))
        1000 * (mean k(x, x') + mean k(y, y') - 2 mean k(x, y))

    The means are over all pairs, a row with itself included: the biased estimator, as in the paper's figures. With
    features of CLIP ViT-L/14 at 336 pixels this is CMMD; with those of another encoder it is an MMD of that encoder and
    should be called so. As the features have norm 1, no value exceeds 2000 * (1 - exp(-0.02)) = 39.6. The bias is about
    10 * (1/n + 1/m) for features without structure, so compare sets of the same sizes only.

    Args:
        features_x: (n, d), float of any kind, on any device; a row is a picture.
        features_y: (m, d).

    Returns:
        The distance, summed in float64; never negative but for rounding, about 1e-13.

    Raises:
        OPLoRAError: no matrices of floats, different widths, no rows, NaN or infinity, or a row of zeros.

    Source: Jayasumana et al., "Rethinking FID" (arXiv 2401.09603), section 4; arXiv 2412.10362 uses it for SDXL.
    """
    x, y = (_unit_rows(features, name) for features, name in ((features_x, "features_x"), (features_y, "features_y")))
    if x.shape[1] != y.shape[1]:
        raise OPLoRAValueError(
            f"oplora.cmmd: features_x are {x.shape[1]} wide and features_y {y.shape[1]}. Take both from one encoder."
        )
    y = y.to(x.device)
    return SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _unit_rows(features: Tensor, name: str) -> Tensor:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
        raise OPLoRATypeError(f"oplora.cmmd: {name} is {got}, expected a tensor of floats (pictures, width).")
    if features.dim() != 2 or not features.numel():
        raise OPLoRAValueError(
            f"oplora.cmmd: {name} has shape {tuple(features.shape)}, expected (pictures, width), at least one of each."
        )
    features = features.detach().double()
    norms = features.norm(dim=1, keepdim=True)
    bad = ~(norms.isfinite() & (norms > 0)).squeeze(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise OPLoRAValueError(
            f"oplora.cmmd: row {row} of {name} has norm {norms[row].item()}, so it cannot be scaled to 1 "
            f"({int(bad.sum())} of {len(bad)} rows). Leave such pictures out, or look at the encoder's output."
        )
    unit_rows: Tensor = features / norms
    return unit_rows


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    """mean k(x, y) - 1: the ones cancel in the sum of three; without them a small sum keeps its digits."""
    total = x.new_zeros(())
    for rows in x.split(ROWS):
        squared_distances = 2 - 2 * (rows @ y.T)
        total += torch.expm1(squared_distances.clamp(min=0) / (-2 * BANDWIDTH**2)).sum()
    return float(total) / (len(x) * len(y))
