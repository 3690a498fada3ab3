"""Least squares on a mask: the best weights where it keeps, zero where it prunes."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.weights.base import System

__all__ = ["conjugate_gradients", "definite_factor"]


def conjugate_gradients(system: System, mask: Tensor, v: Tensor, steps: int) -> Tensor:
    """Lower the error of scaled weights on their mask by Jacobi-preconditioned conjugate gradients.

    All rows at once, each with steps of its own; the residual is projected on the mask, so nothing of size
    rows x d x d exists. One matrix product per step, and one before.

    Parameters
    ----------
    system : System
    mask : Tensor
        1 (or True) where kept, shape (rows, d).
    v : Tensor
        Scaled weights to start from, zero where pruned, shape (rows, d).
    steps : int

    Returns
    -------
    Tensor
        Scaled weights, zero where pruned, shape (rows, d).
    """
    if steps <= 0:
        return v
    mask = mask.to(v.dtype)
    diagonal = system.gram.diagonal()
    v = v.clone()
    r = ((system.weight - v) @ system.gram).mul_(mask)
    z = r / diagonal
    p, size = z.clone(), torch.linalg.vecdot(r, z)
    # What is left below this is rounding; a step along it would be noise.
    least = size * torch.finfo(v.dtype).eps ** 2
    for _ in range(steps):
        q = (p @ system.gram).mul_(mask)
        curvature = torch.linalg.vecdot(p, q)
        moves = (size > least) & (curvature > 0)
        alpha = torch.where(moves, size / curvature, 0.0).unsqueeze(1)
        v.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1.0)
        torch.div(r, diagonal, out=z)
        last, size = size, torch.linalg.vecdot(r, z)
        p.mul_(torch.where(moves, size / last, 0.0).unsqueeze(1)).add_(z)
    return v


def definite_factor(gram: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a symmetric matrix, shape (d, d), shifted as little as that takes.

    Parameters
    ----------
    gram : Tensor
        Symmetric, diagonal of about one: what a positive ridge left definite is not shifted. Rounding and rank
        deficiency without a ridge are.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram)
    shift = torch.finfo(gram.dtype).eps * len(gram)
    while int(info) != 0:
        if not shift < 64 * len(gram):  # no row sum is larger
            raise MaskoptError("The Gram must be finite to be factorised, but an entry is NaN or infinite.")
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        shift *= 8.0
    return factor
