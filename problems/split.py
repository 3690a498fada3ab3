"""Diagonals that can be split off a positive definite matrix, proven in floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.problems.checks import ridged_factor
from maskopt.problems.convexity import eigenvalue_floor

__all__ = ["cheap_split", "proven_split"]


def cheap_split(gram: Tensor) -> Tensor:
    """Return 1 / (K^-1)_jj times the largest factor found for which K less that diagonal is proven semidefinite.

    Parameters
    ----------
    gram : Tensor
        K, symmetric, float64, with a diagonal of about one, shape (d, d).

    Returns
    -------
    Tensor
        Positive, shape (d,).

    Raises
    ------
    MaskoptError
        If K is not positive definite.
    """
    variances = torch.cholesky_inverse(ridged_factor(gram)).diagonal().reciprocal()
    root = variances.rsqrt()
    smallest = float(torch.linalg.eigvalsh(gram * root * root.unsqueeze(1))[0])
    proven = proven_split(gram, variances * max(smallest, 2.0**-40))
    if proven is None:
        raise MaskoptError("The Gram must be positive definite for a relaxation; add a ridge to its diagonal.")
    return proven


def proven_split(gram: Tensor, diagonal: Tensor, steps: int = 14) -> Tensor | None:
    """Return a diagonal times the largest tried factor below one for which K less it is proven semidefinite.

    Parameters
    ----------
    gram : Tensor
        K, as in `cheap_split`.
    diagonal : Tensor
        Nonnegative, shape (d,).
    steps : int
        Factors tried: 1 - 1e-13, 1 - 1e-12 and so on.

    Returns
    -------
    Tensor or None
        Shape (d,); None where none of them is proven.
    """
    for power in range(steps):
        trial = diagonal * (1.0 - 1e-13 * 10.0**power)
        # The diagonal of the difference is rounded; that of K is about one.
        if eigenvalue_floor(gram - torch.diag(trial + 2.0**-50)) == 0.0:
            return trial
    return None
