"""Lower bounds on the eigenvalues of a Gram, proven in floating point by Cholesky factorisations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["diagonal_floor", "eigenvalue_floor", "entry_sizes"]

_BLOCK = 1024  # rows converted to float64 at a time


def eigenvalue_floor(matrix: Tensor) -> float | None:
    """Return a proven lower bound, at most 0, on the eigenvalues of a matrix.

    That a Cholesky factorisation of A + t I succeeds proves lambda_min(A) >= -t up to the backward error of the
    factorisation (Higham, Accuracy and Stability of Numerical Algorithms, 2002, Theorem 10.3: at most gamma_{d+1} tr
    A).

    Parameters
    ----------
    matrix : Tensor
        Symmetric, float64, shape (d, d).

    Returns
    -------
    float or None
        None if an eigenvalue lies below -1e-4 times the Frobenius norm.
    """
    size = float(torch.linalg.matrix_norm(matrix))
    if size == 0.0:
        return 0.0
    trace = float(matrix.diagonal().abs().sum())
    error = 1.01 * (len(matrix) + 2) * 2.0**-53 * (trace + len(matrix) * 1e-4 * size)
    # Where even A less the error can be factorised no eigenvalue is negative.
    if _definite(matrix, -1.01 * error):
        return 0.0
    if _definite(matrix, 0.0):
        return -error
    if not _definite(matrix, 1e-4 * size):
        return None
    shifts = (10.0**-digits * size for digits in range(13, 4, -1))
    return -next((shift for shift in shifts if _definite(matrix, shift)), 1e-4 * size) - error


def entry_sizes(gram: Tensor) -> Tensor:
    """Return r >= 0 with |G_ij| <= r_i r_j for all entries of a symmetric matrix, float64, shape (d,).

    For a positive semidefinite matrix r_i is the square root of G_ii; where rounding has made an entry larger than the
    diagonal allows, r is raised.

    Parameters
    ----------
    gram : Tensor
        Symmetric, shape (d, d).
    """
    root = gram.diagonal().double().clamp_min(0.0).sqrt()
    size = root.clone()
    tiny = torch.finfo(torch.float64).tiny
    for start in range(0, len(gram), _BLOCK):
        block = gram[start : start + _BLOCK].double().abs()
        partner = torch.maximum(root, block.sqrt()).clamp_min_(tiny)
        # One unit in the last place more than the quotient, which is rounded.
        raised = (block / partner).amax(1).mul_(1 + 2.0**-50)
        size[start : start + _BLOCK] = torch.maximum(size[start : start + _BLOCK], raised)
    return size


def diagonal_floor(matrix: Tensor, sizes: Tensor) -> float:
    """Return t >= 0, as small as can be proven, with A + t Diag(r)^2 positive semidefinite.

    Unlike an eigenvalue, t does not depend on the scales of the channels: an input a million times larger than the
    others does not loosen the bound for the others. The matrix is scaled to about unit diagonal before it is
    factorised.

    Parameters
    ----------
    matrix : Tensor
        Symmetric, float64, shape (d, d).
    sizes : Tensor
        r > 0 wherever a row is not zero, shape (d,).
    """
    d = len(matrix)
    # Powers of two that are not above r, so that scaling is exact and t holds for r too.
    exponent = torch.frexp(sizes).exponent - 1
    power = torch.ldexp(torch.ones_like(sizes), -exponent.clamp(-1000, 1000))
    power = power.where(sizes > 0, 0.0)
    scaled = matrix * power * power.unsqueeze(1)
    scaled.diagonal()[sizes == 0] = 1.0  # dead inputs do not count
    trace = float(scaled.diagonal().abs().sum())

    def error(shift: float) -> float:
        return 1.01 * (d + 2) * 2.0**-53 * (trace + d * abs(shift)) + 2.0**-500

    if _definite(scaled, -1.05 * error(error(0.0))):
        return 0.0
    if _definite(scaled, 0.0):
        return error(0.0)
    for digits in range(14, 1, -1):
        shift = 10.0**-digits
        if _definite(scaled, shift):
            return shift + error(shift)
    # No eigenvalue lies further below zero (Gershgorin).
    return float(scaled.abs().sum(1).amax()) * (1 + d * 2.0**-50)


def _definite(matrix: Tensor, shift: float) -> bool:
    trial = matrix.clone()
    trial.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(trial)
    return int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all())
