"""How the best dense weights of a layer move when its inputs come from pruned layers."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.problems.checks import ridged_factor
from maskopt.problems.convexity import entry_sizes
from maskopt.threads import factor_threads

__all__ = ["drift_step"]

_BLOCK = 1024  # rows converted to float64 at a time, so that no second float64 copy of a large Gram exists


def drift_step(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float, lost: Tensor | None = None) -> Tensor:
    """Return (W (C - G) + R) G^-1, float64, shape (rows, d): what `LayerReconstruction.towards` adds to the weights.

    Parameters
    ----------
    weight : Tensor
        W, shape (rows, d).
    gram, cross : Tensor
        G and C, shape (d, d).
    ridge : float
        Added to the diagonal of G that is inverted, relative to its mean.
    lost : Tensor, optional
        R, shape (rows, d); zero by default.
    """
    scaled = _symmetric_double(gram)
    diagonal = scaled.diagonal()
    diagonal.add_(ridge * float(diagonal.mean()))
    # Scaled to about unit diagonal: outlier channels would make the factorisation inaccurate.
    size = entry_sizes(scaled)
    size = torch.where(size > 0, size, 1.0)
    scaled.div_(size).div_(size.unsqueeze(1))
    with factor_threads(len(scaled)):
        factor = ridged_factor(scaled)
    del scaled, diagonal
    drift = cross.to(torch.float64, copy=True)
    drift.sub_(gram).div_(size)
    right = weight.double() @ drift
    if lost is not None:
        right.add_(lost / size)
    step: Tensor = torch.cholesky_solve(right.T, factor).T / size
    return step


def _symmetric_double(matrix: Tensor) -> Tensor:
    """Return the mean of a matrix and its transpose in float64, with no other float64 array of its size."""
    double = torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device)
    for start in range(0, len(matrix), _BLOCK):
        block = slice(start, start + _BLOCK)
        double[block] = matrix[block].double() / 2 + matrix[:, block].T.double() / 2
    return double
