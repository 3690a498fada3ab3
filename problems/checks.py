"""What data of a problem have to be: finite, symmetric, positive semidefinite."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.errors import MaskoptError

__all__ = ["check_finite", "check_positive_semidefinite", "check_symmetric", "ridged_factor", "symmetrised"]


def symmetrised(matrix: Tensor) -> Tensor:
    """Return the mean of a matrix and its transpose: the matrix itself where they are equal."""
    if torch.equal(matrix, matrix.T):
        return matrix
    half = matrix * 0.5
    return half + half.T


def ridged_factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of a matrix with unit diagonal, with as much added to it as that needs."""
    ridge = 0.0
    for _ in range(8):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * torch.eye(len(matrix)).to(matrix))
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            return factor
        ridge = max(10.0 * ridge, 1e-6)
    last: Tensor = torch.linalg.cholesky(matrix + len(matrix) * torch.eye(len(matrix)).to(matrix))
    return last


def check_finite(name: str, matrix: Tensor) -> None:
    """Raise MaskoptError at the first entry that is NaN or infinite."""
    if not bool(torch.isfinite(matrix).all()):
        row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
        raise MaskoptError(f"The {name} must be finite, but entry ({row}, {column}) is {matrix[row, column].item()}.")


def check_symmetric(gram: Tensor) -> None:
    """Raise MaskoptError if a Gram differs from its transpose by more than rounding."""
    size = float(gram.abs().max())
    if size == 0.0:
        return
    # float32 sums of real activations are symmetric to about 1e-7 of their largest entry.
    skew = float((gram - gram.T).abs().max() / size)
    if skew > 1e-4:
        raise MaskoptError(
            f"The Gram must be symmetric, but it differs from its transpose by {skew:.1e} of its largest entry."
        )


def check_positive_semidefinite(gram: Tensor) -> None:
    """Raise MaskoptError if a symmetric Gram has negative eigenvalues beyond rounding."""
    size = float(gram.abs().max())
    if size == 0.0:
        return
    if float(gram.diagonal().min()) < -1e-5 * size:
        worst = int(gram.diagonal().argmin())
        raise MaskoptError(
            f"The Gram must be positive semidefinite, but diagonal entry {worst} is {float(gram[worst, worst]):.3g}."
        )
    # float64 as far as memory allows; the shift is what float32 accumulation may have cost.
    wide = (gram / size).to(torch.float64 if gram.shape[0] <= 4096 else gram.dtype)
    shift = 1e-5 * float(torch.linalg.matrix_norm(wide)) * (1.0 if wide.dtype == torch.float64 else 10.0)
    wide.diagonal().add_(shift)
    if int(torch.linalg.cholesky_ex(wide).info) != 0:
        lowest = (
            f", smallest eigenvalue {float(torch.linalg.eigvalsh(gram.double())[0]):.3g}" if len(gram) <= 4096 else ""
        )
        raise MaskoptError(f"The Gram must be positive semidefinite, but it is indefinite{lowest}; is it X X^T?")
