"""Quadratic forms of the removed units that bound the error of every choice of units with refit."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.bounds.interior import bound_forms
from maskopt.bounds.work import Progress, Stop, steps
from maskopt.problems import ColumnSubset
from maskopt.problems.checks import ridged_factor
from maskopt.problems.convexity import eigenvalue_floor
from maskopt.problems.unit_blocks import UnitBlocks

__all__ = ["removal_bound"]

_ROUNDING = 2.0**-52
_LEAST = 1e-6  # of the entries of a relaxed indicator, from which the first form is made


def removal_bound(
    subset: ColumnSubset,
    keep: int,
    x: Tensor,
    *,
    accuracy: float,
    rounds: int,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> tuple[float, int]:
    """Return a proven lower bound on the error of every choice of `keep` units, and how many forms were bounded.

    With z the indicator of removed columns and P = K^-1, the Lagrangian dual of V diag(z) = 0 is

        f(z) = max over U of 2 <U diag(z), T> - tr(U diag(z) P diag(z) U^T),

    so that every U proves f(z) >= b^T z - z^T Q z with b_j = 2 <U_j, T_j> and Q = P * (U^T U) elementwise, and
    `bound_forms` bounds that over binary z. The largest such bound is a saddle point: at the semidefinite relaxation's
    point Z of z z^T the best U is T Diag(z) (P * Z)^-1, with z = diag(Z), and the value, a matrix fractional function,
    is convex in Z. Each round takes the U of the mean of the points so far (the Frank-Wolfe method with steps of
    1 / (t + 2)). The first point is that of independent entries with the means 1 - x.

    Parameters
    ----------
    subset : ColumnSubset
    keep : int
        Neither none nor all of the units.
    x : Tensor
        A relaxed indicator, shape (units,).
    accuracy : float
        Of the semidefinite programs, relative.
    rounds : int
    stop, progress : callable, optional

    Returns
    -------
    float, int
        The bound in `subset.unit`.

    References
    ----------
    S. Boyd and L. Vandenberghe, "Convex Optimization", 2004, example 3.4, for the matrix fractional function.
    """
    blocks, best, done = subset.blocks, 0.0, 0
    inverse = _upper_inverse(blocks)
    if inverse is None:
        return best, done
    size = blocks.number - keep
    removed = (1.0 - x).clamp(_LEAST, 1.0 - _LEAST)
    point = removed.unsqueeze(1) * removed
    point.diagonal().copy_(removed)
    count = torch.tensor([size], device=x.device)
    for done in steps(rounds, stop, progress):
        form, error = _form(blocks, inverse, _multipliers(blocks, inverse, point), size)
        scale = float(form.abs().amax())
        if not 0.0 < scale < torch.inf:
            break
        # By a power of two: the accuracy of programs is relative to entries of about one.
        power = torch.frexp(form.abs().amax()).exponent
        found = bound_forms(torch.ldexp(form, -power).unsqueeze(0), count, accuracy=accuracy, stop=stop)
        proven = float(torch.ldexp(found.bound[0], power)) - error
        best = max(best, proven * (1.0 - 2.0**-50) if proven == proven else 0.0)
        if bool(found.stopped[0]) or not bool(found.point.isfinite().all()):
            return best, done
        point = torch.lerp(point, found.point[0], 1.0 / (done + 2))
    else:
        done = rounds
    return best, done


def _upper_inverse(blocks: UnitBlocks) -> Tensor | None:
    """Return a matrix that exceeds K^-1 by a proven, tiny positive semidefinite one; None for a K that is singular.

    For any symmetric P, K^-1 - P = K^-1 (I - K P), whose norm is at most |I - K P| / l if K - l I is positive
    semidefinite.
    """
    gram = blocks.gram
    inverse = torch.cholesky_inverse(ridged_factor(gram))
    inverse = (inverse + inverse.T).mul_(0.5)
    residual = gram @ inverse
    residual.diagonal().sub_(1.0)
    norms = torch.linalg.matrix_norm(gram) * torch.linalg.matrix_norm(inverse)
    wrong = torch.linalg.matrix_norm(residual) + (len(gram) + 4) * _ROUNDING * norms
    least = 0.5 / inverse.abs().sum(1).amax()  # no eigenvalue of the inverse exceeds its largest row sum
    for _ in range(20):
        if eigenvalue_floor(gram - torch.diag((least + 2.0**-50).expand(len(gram)))) == 0.0:
            # What is added may be less than a unit in the last place of the entry.
            inverse.diagonal().add_(1.01 * wrong / least + _ROUNDING * inverse.diagonal().amax())
            return inverse
        least = 0.3 * least
    return None


def _multipliers(blocks: UnitBlocks, inverse: Tensor, point: Tensor) -> Tensor:
    """Return U = T Diag(z) (P * Z)^-1, shape (rows, columns)."""
    wide = point.repeat_interleave(blocks.width, 0).repeat_interleave(blocks.width, 1)
    matrix, z = inverse * wide, wide.diagonal()
    root = matrix.diagonal().rsqrt()
    factor = ridged_factor(matrix * root * root.unsqueeze(1))
    return torch.cholesky_solve((blocks.target * (z * root)).T, factor).T * root


def _form(blocks: UnitBlocks, inverse: Tensor, multipliers: Tensor, size: int) -> tuple[Tensor, float]:
    """Return the form of b^T z - z^T Q z for z with `size` ones, and how much rounding may have raised its values."""
    number, width = blocks.number, blocks.width
    linear = 2.0 * (multipliers * blocks.target).sum(0).view(number, width).sum(1)
    quadratic = (inverse * (multipliers.T @ multipliers)).view(number, width, number, width).sum((1, 3))
    quadratic = (quadratic + quadratic.T).mul_(0.5)
    form = (linear.unsqueeze(1) + linear) / (2 * size) - quadratic
    magnitude = multipliers.abs()
    sizes = (inverse.abs() * (magnitude.T @ magnitude)).sum() + 4.0 * (magnitude * blocks.target.abs()).sum()
    terms = len(multipliers) + width**2 + 12
    return form, float(sizes * terms * _ROUNDING)
