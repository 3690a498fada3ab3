"""One diagonal for a whole layer: the cheap shifts of the convex relaxation."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.bounds.work import Progress, Stop
from maskopt.oracles import PerRow
from maskopt.problems import LayerReconstruction
from maskopt.problems.layer import eigenvalue_floor

__all__ = ["layer_shift", "least_eigenvalue", "shifted_bound"]

_SHRINK = 0.2  # of the barrier's weight per round
_ACCURACY = 1e-3  # of the sum


def least_eigenvalue(problem: LayerReconstruction) -> Tensor:
    """Return L = lambda I with G - L positive semidefinite, the diagonal in the units of `gradient`, shape (d,)."""
    gram = problem.symmetric_gram()
    lowest = torch.linalg.eigvalsh(gram)[0].clamp_min(0.0)
    return _safe(gram, lowest.expand(len(gram)))


def layer_shift(
    problem: LayerReconstruction, rounds: int = 40, *, stop: Stop | None = None, progress: Progress | None = None
) -> Tensor:
    """Return the diagonal L >= 0 of largest sum of L_i / G_ii with G - L positive semidefinite.

    In the units of `gradient`, shape (d,). Every row i of the layer may then be shifted by D = w_i^2 L: the relaxation
    stays convex and its minimum, the bound of any Frank-Wolfe method, grows. The program is that of minimum trace
    factor analysis, by Newton's method with shrinking weight on the barrier log det (G - L) + sum log L_i, whose
    Hessian is the elementwise square of (G - L)^-1 (Vandenberghe and Boyd, SIAM Review 38, 1996). A Cholesky
    factorisation in float64 checks the result.

    Parameters
    ----------
    problem : LayerReconstruction
    rounds : int
        Newton steps, each one inverse and one factorisation of size d.
    stop : callable, optional
        Asked before every round; True ends the work with the diagonal found until then.
    progress : callable, optional
        Called before every round with the fraction of them that is done.
    """
    gram = problem.symmetric_gram()
    scale = gram.diagonal().clamp_min(0.0).sqrt()
    alive = (scale > 0).nonzero().flatten()
    if not len(alive):
        return torch.zeros_like(scale)
    unit = scale[alive]
    matrix = gram[alive][:, alive] / unit / unit.unsqueeze(1)
    d = len(matrix)
    # A singular Gram has no interior; this much is taken back by the check at the end.
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    matrix.diagonal().add_(max(1e-10 * d - lowest, 0.0))
    part = torch.full_like(unit, 0.5 * max(lowest, 1e-10 * d))
    barrier = float(part.mean())
    for number in range(rounds):
        if stop is not None and stop():
            break
        if progress is not None:
            progress(number / rounds)
        inverse = torch.linalg.inv(matrix - torch.diag(part))
        slope = 1.0 - barrier * inverse.diagonal() + barrier / part
        hessian = barrier * inverse.square()
        hessian.diagonal().add_(barrier / part.square())
        move = torch.linalg.solve(hessian, slope)
        length = 1.0
        while not _inside(matrix, part + length * move):
            length *= 0.7
        part = part + (1.0 if length == 1.0 else 0.8) * length * move
        if length == 1.0:
            barrier *= _SHRINK
            if 2 * d * barrier < _ACCURACY * float(part.sum()):
                break
    result = torch.zeros_like(scale)
    result[alive] = part * unit.square()
    return _safe(gram, result)


def shifted_bound(
    problem: LayerReconstruction,
    keep: Tensor,
    diagonal: Tensor,
    iterations: int = 300,
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return what the shifted relaxation proves of each row, in full units, float64, shape (rows,).

    The minimum of the error plus sum_i w_i^2 L_i (p_i - p_i^2) over 0 <= p <= 1, sum p = s, from below, by Frank-Wolfe
    with exact line searches: the best tangent on the way.

    Parameters
    ----------
    problem : LayerReconstruction
    keep : Tensor
        How many entries each row keeps, integers, shape (rows,).
    diagonal : Tensor
        L, shape (d,), as `layer_shift` or `least_eigenvalue` return it; zero for the plain relaxation.
    iterations : int
    stop : callable, optional
        Asked before every iteration; True ends the work with what is proven until then.
    progress : callable, optional
        Called before every iteration with the fraction of them that is done.
    """
    wide, masks = problem.double(), PerRow(keep)
    floor = eigenvalue_floor(problem.symmetric_gram() - torch.diag(diagonal))
    best = torch.zeros(problem.shape[0], dtype=torch.float64, device=problem.device)
    if floor is None:
        return best
    squares = wide.scaled_weight.square()
    objective = wide.shifted(squares * diagonal)
    rounding = problem.shape[1] * 2.0**-52 * (wide.scale() / wide.unit + (squares * diagonal).sum(1))
    point = objective.evaluate(masks.lmo(-objective.diagonal()))
    for number in range(iterations):
        if stop is not None and stop():
            break
        if progress is not None:
            progress(number / iterations)
        gradient = objective.gradient(point)
        search = masks.lmo(gradient) - point.x
        descent = (gradient * search).sum(1)
        convexity_error = rounding - floor * (squares * torch.maximum(point.x, 1 - point.x).square()).sum(1)
        best = torch.maximum(best, (objective.value(point) + descent - convexity_error) * wide.unit)
        move = objective.hvp(search)
        curvature = (objective.hessian(move) * search).sum(1)
        fraction = torch.where(curvature > 0, -descent / curvature, 1.0).clamp(0.0, 1.0)
        objective.advance(point, move, fraction.unsqueeze(1))
    return best


def _inside(matrix: Tensor, part: Tensor) -> bool:
    if float(part.min()) <= 0.0:
        return False
    return int(torch.linalg.cholesky_ex(matrix - torch.diag(part)).info) == 0


def _safe(gram: Tensor, part: Tensor) -> Tensor:
    """Shrink until G - L has no eigenvalue below what G's own rounding may have left there."""
    own = eigenvalue_floor(gram)
    for power in range(12):
        trial = part * (1 - 1e-12 * 10.0**power)
        left = eigenvalue_floor(gram - torch.diag(trial))
        if own is not None and left is not None and left >= 1.1 * own:
            return trial
    return torch.zeros_like(part)
