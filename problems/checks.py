"""Checks of a problem's data: finite, symmetric, positive semidefinite."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.errors import MaskoptError

__all__ = [
    "check_finite",
    "check_layer",
    "check_positive_semidefinite",
    "check_symmetric",
    "ridged_factor",
    "symmetrised",
]


def symmetrised(matrix: Tensor) -> Tensor:
    """Return the mean of a matrix and its transpose, or the matrix itself if they are equal.

    Parameters
    ----------
    matrix : Tensor
        Shape (d, d).
    """
    if torch.equal(matrix, matrix.T):
        return matrix
    half = matrix * 0.5
    return half + half.T


def ridged_factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of a matrix plus the smallest tried multiple of the identity that makes it definite.

    Parameters
    ----------
    matrix : Tensor
        Symmetric, with unit diagonal, shape (d, d).

    Returns
    -------
    Tensor
        Lower triangular, shape (d, d).
    """
    ridge = 0.0
    for _ in range(8):
        factor: Tensor
        shifted = matrix if ridge == 0.0 else matrix + ridge * torch.eye(len(matrix)).to(matrix)
        factor, info = torch.linalg.cholesky_ex(shifted)
        # An entry that is not finite makes the diagonal of its row so.
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return factor
        ridge = max(10.0 * ridge, 1e-6)
    last: Tensor = torch.linalg.cholesky(matrix + len(matrix) * torch.eye(len(matrix)).to(matrix))
    return last


def check_layer(weight: Tensor, gram: Tensor, target: Tensor | None, mean: Tensor | None) -> None:
    """Check that the data of a layer have shapes that go together, on one device.

    Parameters
    ----------
    weight : Tensor
        Must have shape (rows, d).
    gram : Tensor
        Must have shape (d, d).
    target : Tensor or None
        Must have shape (rows, d).
    mean : Tensor or None
        Must have shape (d,).

    Raises
    ------
    MaskoptError
        If they have not.
    """
    if weight.ndim != 2 or gram.ndim != 2 or 0 in weight.shape:
        raise MaskoptError(
            f"A layer needs a non-empty weight (rows, d) and a Gram (d, d); got shapes {tuple(weight.shape)} "
            f"and {tuple(gram.shape)}."
        )
    if gram.shape != (weight.shape[1], weight.shape[1]):
        raise MaskoptError(
            f"The weight has {weight.shape[1]} input features but the Gram has shape {tuple(gram.shape)}; "
            f"it must be ({weight.shape[1]}, {weight.shape[1]})."
        )
    if weight.device != gram.device:
        raise MaskoptError(f"Weight lies on {weight.device} and Gram on {gram.device}; put both on one device.")
    shapes = (("target", target, "the weight's shape", weight.shape), ("mean", mean, "shape", gram.shape[:1]))
    for name, data, words, shape in shapes:
        if data is not None and (data.shape != shape or data.device != weight.device):
            raise MaskoptError(
                f"The {name} must have {words} {tuple(shape)} and device {weight.device}; got {tuple(data.shape)} on "
                f"{data.device}."
            )


def check_finite(name: str, data: Tensor | None) -> None:
    """Check that all entries are finite.

    Parameters
    ----------
    name : str
        Of the data, for the message.
    data : Tensor or None
        Of any shape; None has no entries.

    Raises
    ------
    MaskoptError
        At the first entry that is NaN or infinite.
    """
    if data is not None and not bool(torch.isfinite(data).all()):
        place = tuple((~torch.isfinite(data)).nonzero()[0].tolist())
        raise MaskoptError(f"The {name} must be finite, but entry {place} is {data[place].item()}.")


def check_symmetric(gram: Tensor) -> None:
    """Check that a Gram is symmetric up to rounding.

    Parameters
    ----------
    gram : Tensor
        Finite, shape (d, d).

    Raises
    ------
    MaskoptError
        If it differs from its transpose by more than 1e-4 of its largest entry.
    """
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
    """Check that a symmetric Gram is positive semidefinite up to rounding.

    Parameters
    ----------
    gram : Tensor
        Finite, symmetric, shape (d, d).

    Raises
    ------
    MaskoptError
        If it has negative eigenvalues beyond what rounding in float32 sums explains.
    """
    size = float(gram.abs().max())
    if size == 0.0:
        return
    if float(gram.diagonal().min()) < -1e-5 * size:
        worst = int(gram.diagonal().argmin())
        raise MaskoptError(
            f"The Gram must be positive semidefinite, but diagonal entry {worst} is {float(gram[worst, worst]):.3g}."
        )
    # In float64 as far as memory allows; the shift is the rounding error of sums in float32.
    wide = (gram / size).to(torch.float64 if gram.shape[0] <= 4096 else gram.dtype)
    shift = 1e-5 * float(torch.linalg.matrix_norm(wide)) * (1.0 if wide.dtype == torch.float64 else 10.0)
    wide.diagonal().add_(shift)
    if int(torch.linalg.cholesky_ex(wide).info) != 0:
        lowest = (
            f", smallest eigenvalue {float(torch.linalg.eigvalsh(gram.double())[0]):.3g}" if len(gram) <= 4096 else ""
        )
        raise MaskoptError(f"The Gram must be positive semidefinite, but it is indefinite{lowest}; is it X X^T?")
