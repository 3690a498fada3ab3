"""One diagonal for a whole layer: the cheap shifts of the convex relaxation."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.bounds.work import Progress, Stop
from maskopt.oracles import PerRow
from maskopt.problems import LayerReconstruction
from maskopt.problems.convexity import diagonal_floor

__all__ = ["layer_shift", "least_eigenvalue", "shifted_bound"]

_SHRINK = 0.2  # of the barrier's weight per round
_ACCURACY = 1e-3  # of the sum
_TRIALS = 60  # step sizes tried before a direction is given up; the last is below 1e-9
_ROUNDING = 1e-13  # of each input's own second moment: what convexity may lack in float64


def least_eigenvalue(problem: LayerReconstruction) -> Tensor:
    """Return L = lambda I with G - L positive semidefinite, the diagonal in the units of `gradient`, shape (d,)."""
    gram = problem.symmetric_gram()
    lowest = torch.linalg.eigvalsh(gram)[0].clamp_min(0.0)
    return _safe(problem, lowest.expand(len(gram)))


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
        direction = _newton(matrix, part, barrier)
        length = 0.0 if direction is None else _longest(matrix, part, direction)
        if direction is None or length == 0.0:
            break  # what has been reached is a diagonal like any other; it is made safe below
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
    best = torch.zeros(problem.shape[0], dtype=torch.float64, device=problem.device)
    squares = wide.scaled_weight.square()
    objective = wide.shifted(squares * diagonal)
    # The shift is one diagonal for all rows, so that one factorisation says how far its convexity falls short.
    sizes = torch.maximum(problem.entry_sizes(), diagonal.clamp_min(0.0).sqrt())
    missing = diagonal_floor(problem.symmetric_gram() - torch.diag(diagonal), sizes)
    spread = wide.scaled_weight.abs() * sizes
    off = spread if not problem.aims_elsewhere else spread + (wide.scaled_target - wide.scaled_weight).abs() * sizes
    rounding = (problem.shape[1] + 8) * 2.0**-50 * (off.sum(1).square() + (squares * diagonal.abs()).sum(1))
    point = objective.evaluate(masks.lmo(-objective.diagonal()))
    for number in range(iterations):
        if stop is not None and stop():
            break
        if progress is not None:
            progress(number / iterations)
        gradient = objective.gradient(point)
        search = masks.lmo(gradient) - point.x
        descent = (gradient * search).sum(1)
        convexity_error = rounding + missing * (spread * torch.maximum(point.x, 1 - point.x)).square().sum(1)
        best = torch.maximum(best, (objective.value(point) + descent - convexity_error) * wide.unit)
        move = objective.hvp(search)
        curvature = (objective.hessian(move) * search).sum(1)
        fraction = torch.where(curvature > 0, -descent / curvature, 1.0).clamp(0.0, 1.0)
        objective.advance(point, move, fraction.unsqueeze(1))
    return best


def _newton(matrix: Tensor, part: Tensor, barrier: float) -> Tensor | None:
    """Return the Newton direction of the barrier problem; None where rounding leaves none."""
    inverse, info = torch.linalg.inv_ex(matrix - torch.diag(part))
    if int(info) != 0:
        return None
    slope = 1.0 - barrier * inverse.diagonal() + barrier / part
    hessian = barrier * inverse.square()
    hessian.diagonal().add_(barrier / part.square())
    direction, info = torch.linalg.solve_ex(hessian, slope)
    return direction if int(info) == 0 and bool(torch.isfinite(direction).all()) else None


def _longest(matrix: Tensor, part: Tensor, direction: Tensor) -> float:
    """Return the first of the step sizes 1, 0.7, 0.49 ... that stays inside; zero: none of those tried does."""
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
    """Shrink until G - L is no further from positive semidefinite than rounding may have left G."""
    gram, sizes = problem.symmetric_gram(), problem.entry_sizes()
    part = torch.minimum(part, sizes.square())  # a diagonal entry of G - L is not negative
    allowed = 1.1 * problem.indefiniteness() + _ROUNDING * len(gram)
    for power in range(12):
        trial = part * (1 - 1e-12 * 10.0**power)
        if diagonal_floor(gram - torch.diag(trial), sizes) <= allowed:
            return trial
    return torch.zeros_like(part)
