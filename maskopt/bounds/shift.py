"""Shifts of the convex relaxation by one diagonal for the whole layer, and the bound they prove."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.bounds.work import Progress, Stop, steps
from maskopt.oracles import PerRow
from maskopt.problems import LayerReconstruction
from maskopt.problems.convexity import diagonal_floor

__all__ = ["layer_shift", "shifted_bound", "smallest_eigenvalue"]

_SHRINK = 0.2  # factor on the barrier's weight per iteration
_ACCURACY = 1e-3  # relative to the sum that is maximised
_TRIALS = 60  # step sizes tried before a direction is given up; the last is below 1e-9
_ROUNDING = 1e-13  # relative to each input's second moment: the rounding allowed in the test of convexity


def smallest_eigenvalue(problem: LayerReconstruction) -> Tensor:
    """Return the diagonal of L = lambda_min(G) I, for which G - L is positive semidefinite.

    (Hammer and Rubin, Some remarks on quadratic programming with 0-1 variables, RIRO 4, 1970.)

    Parameters
    ----------
    problem : LayerReconstruction

    Returns
    -------
    Tensor
        In the units of `problem.scaled_gram`, float64, shape (d,).
    """
    gram = problem.symmetric_gram()
    lowest = torch.linalg.eigvalsh(gram)[0].clamp_min(0.0)
    return _safe(problem, lowest.expand(len(gram)))


def layer_shift(
    problem: LayerReconstruction, rounds: int = 40, *, stop: Stop | None = None, progress: Progress | None = None
) -> Tensor:
    """Return the diagonal L >= 0 that maximises sum_i L_i / G_ii subject to G - L positive semidefinite.

    Row i of the layer may then be shifted by w_i^2 L: its relaxation stays convex, and the relaxation's minimum, which
    is a lower bound, grows. The maximisation is the semidefinite program of minimum trace factor analysis. It is solved
    by Newton's method on the barrier log det (G - L) + sum_i log L_i with a shrinking weight; the Hessian of log det is
    the elementwise square of (G - L)^-1 (Vandenberghe and Boyd, SIAM Review 38, 1996). A Cholesky factorisation in
    float64 proves that G - L is positive semidefinite up to rounding.

    Parameters
    ----------
    problem : LayerReconstruction
    rounds : int
        Maximal number of Newton steps, each of which costs one inverse and one factorisation of size d.
    stop : callable, optional
        Called before every step; True ends the method with the diagonal found so far.
    progress : callable, optional
        Called before every step with the fraction of them that is done.

    Returns
    -------
    Tensor
        In the units of `problem.scaled_gram`, float64, shape (d,).
    """
    gram = problem.symmetric_gram()
    scale = gram.diagonal().clamp_min(0.0).sqrt()
    alive = (scale > 0).nonzero().flatten()
    if not len(alive):
        return torch.zeros_like(scale)
    unit = scale[alive]
    matrix = gram[alive][:, alive] / unit / unit.unsqueeze(1)
    d = len(matrix)
    # A singular Gram has no interior point; the check at the end subtracts what is added here.
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    matrix.diagonal().add_(max(1e-10 * d - lowest, 0.0))
    part = torch.full_like(unit, 0.5 * max(lowest, 1e-10 * d))
    barrier = float(part.mean())
    for _ in steps(rounds, stop, progress):
        direction = _newton(matrix, part, barrier)
        length = 0.0 if direction is None else _longest(matrix, part, direction)
        if direction is None or length == 0.0:
            break  # the diagonal reached so far is checked below like any other
        part = part + (1.0 if length == 1.0 else 0.8) * length * direction
        if length == 1.0:
            barrier *= _SHRINK
            if 2 * d * barrier < _ACCURACY * float(part.sum()):
                break
    result = torch.zeros_like(scale)
    result[alive] = part * unit.square()
    return _safe(problem, result)


def shifted_bound(
    problem: LayerReconstruction,
    keep: Tensor,
    diagonal: Tensor,
    iterations: int = 300,
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return a lower bound of each row's shifted relaxation, proven by linear models.

    The Frank-Wolfe method with exact line searches minimises the error plus sum_i w_i^2 L_i (p_i - p_i^2) over
    0 <= p <= 1, sum p = s. The minimum of the linear model at any iterate is a lower bound (the Frank-Wolfe gap: Jaggi,
    Revisiting Frank-Wolfe, ICML 2013); the largest is returned, less rounding errors.

    Parameters
    ----------
    problem : LayerReconstruction
    keep : Tensor
        How many entries each row keeps, integers, shape (rows,).
    diagonal : Tensor
        L, shape (d,), as `layer_shift` or `smallest_eigenvalue` return it; zero for the plain relaxation.
    iterations : int
        Of the Frank-Wolfe method.
    stop : callable, optional
        Called before every iteration; True ends the method with the bounds proven so far.
    progress : callable, optional
        Called before every iteration with the fraction of them that is done.

    Returns
    -------
    Tensor
        In units of `problem.objective`, float64, shape (rows,).

    Examples
    --------
    >>> import torch
    >>> import maskopt
    >>> from maskopt.bounds import layer_shift, shifted_bound
    >>> layer, keep = maskopt.synthetic(rows=2, d=8).problem(), torch.tensor([4, 4])
    >>> plain = shifted_bound(layer, keep, torch.zeros(8, dtype=torch.float64))
    >>> bool((shifted_bound(layer, keep, layer_shift(layer)) > plain).all())
    True
    """
    wide, masks = problem.double(), PerRow(keep)
    best = torch.zeros(problem.shape[0], dtype=torch.float64, device=problem.device)
    squares = wide.scaled_weight.square()
    objective = wide.shifted(squares * diagonal)
    # The shift is one diagonal for all rows, so that one factorisation bounds the convexity error of all rows.
    sizes = torch.maximum(problem.entry_sizes(), diagonal.clamp_min(0.0).sqrt())
    nonconvexity = diagonal_floor(problem.symmetric_gram() - torch.diag(diagonal), sizes)
    reach = wide.scaled_weight.abs() * sizes
    residual = reach if not problem.aims_elsewhere else reach + (wide.scaled_target - wide.scaled_weight).abs() * sizes
    rounding = (problem.shape[1] + 8) * 2.0**-50 * (residual.sum(1).square() + (squares * diagonal.abs()).sum(1))
    point = objective.evaluate(masks.lmo(-objective.diagonal()))
    for _ in steps(iterations, stop, progress):
        gradient = objective.gradient(point)
        search = masks.lmo(gradient) - point.x
        descent = (gradient * search).sum(1)
        convexity_error = rounding + nonconvexity * (reach * torch.maximum(point.x, 1 - point.x)).square().sum(1)
        best = torch.maximum(best, (objective.value(point) + descent - convexity_error) * wide.unit)
        direction = objective.hvp(search)
        curvature = (objective.hessian(direction) * search).sum(1)
        step_size = torch.where(curvature > 0, -descent / curvature, 1.0).clamp(0.0, 1.0)
        objective.advance(point, direction, step_size.unsqueeze(1))
    return best


def _newton(matrix: Tensor, part: Tensor, barrier: float) -> Tensor | None:
    """Return the Newton direction of the barrier problem; None where a system is singular up to rounding."""
    inverse, info = torch.linalg.inv_ex(matrix - torch.diag(part))
    if int(info) != 0:
        return None
    slope = 1.0 - barrier * inverse.diagonal() + barrier / part
    hessian = barrier * inverse.square()
    hessian.diagonal().add_(barrier / part.square())
    direction, info = torch.linalg.solve_ex(hessian, slope)
    return direction if int(info) == 0 and bool(torch.isfinite(direction).all()) else None


def _longest(matrix: Tensor, part: Tensor, direction: Tensor) -> float:
    """Return the first of the step sizes 1, 0.7, 0.49, ... that stays feasible; zero if none of those tried does."""
    length = 1.0
    for _ in range(_TRIALS):
        if _inside(matrix, part + length * direction):
            return length
        length *= 0.7
    return 0.0


def _inside(matrix: Tensor, part: Tensor) -> bool:
    if not float(part.min()) > 0.0:
        return False
    return int(torch.linalg.cholesky_ex(matrix - torch.diag(part)).info) == 0


def _safe(problem: LayerReconstruction, part: Tensor) -> Tensor:
    """Shrink L until G - L is positive semidefinite up to the rounding error of G itself."""
    gram, sizes = problem.symmetric_gram(), problem.entry_sizes()
    part = torch.minimum(part, sizes.square())  # a diagonal entry of G - L is not negative
    allowed = 1.1 * problem.indefiniteness() + _ROUNDING * len(gram)
    for power in range(12):
        trial = part * (1 - 1e-12 * 10.0**power)
        if diagonal_floor(gram - torch.diag(trial), sizes) <= allowed:
            return trial
    return torch.zeros_like(part)
