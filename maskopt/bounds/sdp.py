"""The semidefinite bound of every row of a layer."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.bounds.interior import bound_forms
from maskopt.bounds.pairs import pair_multipliers
from maskopt.bounds.work import Progress, Stop, Stopper, within
from maskopt.errors import MaskoptError
from maskopt.problems import LayerReconstruction

__all__ = ["RowBounds", "convex_part", "sdp_bound"]

_MATRICES = 32  # number of d x d matrices in float64 allocated for each row
_AT_ONCE = 2**26  # multiplications in an operation beyond which a CPU gains nothing from more rows at a time
_SOLUTION = 25  # iterations of `pair_multipliers` that take as long as one bound, for the estimate of progress


@dataclass(frozen=True)
class RowBounds:
    """Semidefinite bounds of a layer's rows, float64, in units of `problem.objective`.

    Attributes
    ----------
    bound : Tensor
        Proven lower bound on the error of every mask that keeps the row's number of entries, shape (rows,).
    shift : Tensor
        D, shape (rows, d). The error plus sum_i D_i (p_i - p_i^2) has the same value on masks; on the hyperplane
        sum p = s it is convex and at least `shifted`: Q - Diag(D) + (y 1^T + 1 y^T) / (2 s) with y = D - shifted / s is
        positive semidefinite (`convex_part`). Zero where nothing is proven, and where none or all entries are kept.
    shifted : Tensor
        The bound without cuts, shape (rows,).
    primal : Tensor
        Value of the best point found of the relaxation without cuts, shape (rows,): up to rounding, the largest value
        that more iterations could give `shifted`. Infinite where there is no point.
    point : Tensor
        Relaxed indicator p of pruned entries in the relaxation, shape (rows, d).
    iterations : Tensor
        Int64, shape (rows,).
    seconds : float
        For all rows together.
    finished : Tensor
        Whether the method converged on a row, boolean, shape (rows,). Where it was stopped before, the bound is valid
        but more time could have raised it.
    """

    bound: Tensor
    shift: Tensor
    shifted: Tensor
    primal: Tensor
    point: Tensor
    iterations: Tensor
    seconds: float
    finished: Tensor


def sdp_bound(
    problem: LayerReconstruction,
    keep: Tensor,
    *,
    group: int | None = None,
    accuracy: float = 1e-3,
    iterations: int = 50,
    cuts: int = 0,
    target: Tensor | None = None,
    memory: int = 2**30,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> RowBounds:
    """Prove a lower bound on the error of every mask of each row.

    With Q = Diag(w) G Diag(w) and s pruned entries, `bound_forms` solves the semidefinite relaxation min <Q, Z> with
    diag Z = z, Z 1 = s z, 1^T z = s and Z - z z^T positive semidefinite. Bounds are proven in float64, rounding errors
    included, whenever the method is stopped.

    Parameters
    ----------
    problem : LayerReconstruction
        Of shape (rows, d), with d up to a few hundred: a row costs about 200 d^3 multiplications.
    keep : Tensor
        How many entries each row keeps, integers, shape (rows,).
    group : int, optional
        Every `group` consecutive entries of a row keep equally many (N:M), `keep` * `group` / d.
    accuracy : float
        A row is done when the values of bound and relaxation differ by this, relatively.
    iterations : int
        Maximal number for each row; about 15 suffice for three digits.
    cuts : int
        Iterations of `pair_multipliers`, which adds the cuts Z >= 0: 50 close a third or more of the remaining gap, at
        three times the cost.
    target : Tensor, optional
        In units of `problem.objective`, shape (rows,). A row is also done as soon as its bound has reached the target,
        as branch and bound requires, or its relaxation has a point below it.
    memory : int
        Bytes that may be allocated; at least one row is processed at a time.
    stop : callable, optional
        Called before every iteration; True ends the method with the bounds proven so far.
    progress : callable, optional
        Called after every iteration with the estimated fraction of the work that is done.

    Returns
    -------
    RowBounds

    Raises
    ------
    MaskoptError
        If `keep` is no vector of integers from 0 to d or not a multiple of the number of groups, or if the problem has
        a target other than its own weights.

    References
    ----------
    The relaxation with a cardinality constraint: Helmberg, Rendl and Weismantel, A semidefinite programming approach to
    the quadratic knapsack problem, J. Combinatorial Optimization 4, 2000. Its dual as the best convex reformulation:
    Billionnet, Elloumi and Plateau, Improving the performance of standard solvers for quadratic 0-1 programs by a tight
    convex reformulation: the QCR method, Discrete Applied Mathematics 157, 2009.

    Examples
    --------
    >>> import torch
    >>> import maskopt
    >>> from maskopt.bounds import sdp_bound
    >>> layer = maskopt.synthetic(rows=2, d=8).problem()
    >>> bounds = sdp_bound(layer, keep=torch.tensor([4, 6]))
    >>> bool((0 < bounds.bound).all()), bool((bounds.bound <= bounds.primal).all()), bounds.finished.tolist()
    (True, True, [True, True])
    """
    begin = time.perf_counter()
    if problem.aims_elsewhere:
        raise MaskoptError(
            "The semidefinite bound needs a problem that aims at its own weights' output; this one aims at others."
        )
    rows, d = problem.shape
    _check(keep, group, rows, d)
    wide = problem.double()
    pruned = d - keep.to(wide.device).long()
    bound = torch.zeros(rows, dtype=torch.float64, device=wide.device)
    shifted, primal = torch.zeros_like(bound), torch.full_like(bound, torch.inf)
    shift, point = bound.new_zeros((rows, d)), bound.new_zeros((rows, d))
    spent = torch.zeros(rows, dtype=torch.int64, device=wide.device)
    finished, stopper = torch.zeros(rows, dtype=torch.bool, device=wide.device), Stopper(stop)
    first_bound = _SOLUTION / (2 * _SOLUTION + cuts) if cuts else 1.0  # as a fraction of the work on a row
    chunk = memory // (_MATRICES * 8 * d * d)
    if wide.device.type == "cpu":
        chunk = min(chunk, _AT_ONCE // d**3)
    chunk = max(1, chunk)
    gram = wide.symmetric_gram()
    for start in range(0, rows, chunk):
        if stopper.stopped:
            break
        part = slice(start, min(start + chunk, rows))
        of_part = within(progress, part.start / rows, part.stop / rows)
        scaled, exponent = _balanced(wide.scaled_weight[part], gram)
        forms = scaled.unsqueeze(2) * gram * scaled.unsqueeze(1)
        aim = None if target is None else torch.ldexp(torch.ldexp(target[part] / wide.unit, -exponent), -exponent)
        solve = functools.partial(bound_forms, group=group, accuracy=accuracy, iterations=iterations, stop=stopper)
        found = solve(forms, pruned[part], target=aim, progress=within(of_part, 0.0, first_bound))
        shifted[part], proven = _in_full(found.bound, exponent, wide.unit)
        bound[part] = shifted[part]
        primal[part] = _times(found.primal, exponent, wide.unit)
        point[part] = found.point.diagonal(dim1=1, dim2=2)
        spent[part] = found.iterations
        # Where none or all entries are pruned there is only one mask.
        inside = (pruned[part] > 0) & (pruned[part] < d)
        index = (inside & proven).nonzero().flatten()
        level = found.bound[index] / pruned[part][index]
        shift[start + index] = _times(found.tilt[index] + level.unsqueeze(1), exponent[index].unsqueeze(1), wide.unit)
        inside &= torch.isfinite(found.bound)
        if target is not None:
            inside &= bound[part] < target[part]
        index = inside.nonzero().flatten()
        if cuts and len(index):
            forms, few = forms[index], pruned[part][index]
            of_cuts = within(of_part, first_bound, 1.0 - first_bound)
            forms -= pair_multipliers(forms, few, found.take(index), cuts, group=group, stop=stopper, progress=of_cuts)
            again = within(of_part, 1.0 - first_bound, 1.0)
            found = solve(forms, few, target=None if aim is None else aim[index], progress=again)
            cut = _in_full(found.bound, exponent[index], wide.unit)[0]
            bound[start + index] = torch.maximum(bound[start + index], cut)
        finished[part] = ~found.stopped if cuts == 0 else not stopper.stopped
    return RowBounds(bound, shift, shifted, primal, point, spent, time.perf_counter() - begin, finished)


def convex_part(problem: LayerReconstruction, keep: Tensor, bounds: RowBounds, row: int) -> Tensor:
    """Return the positive semidefinite matrix C that proves a row's bound without cuts.

    For every p in {0, 1}^d with sum p = s the row's error is p^T C p + shifted. This convex reformulation (QCR:
    Billionnet, Elloumi and Plateau 2009) serves mixed-integer solvers better than Q, as the value of its root
    relaxation is at least `shifted`.

    Parameters
    ----------
    problem : LayerReconstruction
    keep : Tensor
        As for `sdp_bound`.
    bounds : RowBounds
        The result of `sdp_bound` for them.
    row : int

    Returns
    -------
    Tensor
        C, in units of `problem.objective`, float64, shape (d, d).
    """
    weight, gram = problem.double().rows(torch.tensor([row])).weight[0], problem.gram.double()
    s = int(problem.shape[1] - keep[row])
    C = weight.unsqueeze(1) * gram * weight
    if s == 0:
        return C
    shift = bounds.shift[row]
    half = (shift - bounds.shifted[row] / s) / (2 * s)
    return C - torch.diag(shift) + half.unsqueeze(0) + half.unsqueeze(1)


def _balanced(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Divide rows by powers of two so that their forms have diagonals near one; return the exponents too."""
    largest = (weight.abs() * gram.diagonal().clamp_min(0.0).sqrt()).amax(1)
    exponent = torch.frexp(largest).exponent
    return torch.ldexp(weight, -exponent.unsqueeze(1)), exponent


def _in_full(bound: Tensor, exponent: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Return bounds in units of the objective, and which of them are positive: errors are sums of squares."""
    full = _times(bound * (1 - 2.0**-51), exponent, unit)
    # Below the smallest normal number, units round up as well as down.
    proven = (bound > 0.0) & (full > torch.finfo(full.dtype).tiny)
    return full.where(proven, 0.0), proven


def _times(value: Tensor, exponent: Tensor, unit: float) -> Tensor:
    """Undo `_balanced` for what is quadratic in the weights."""
    return torch.ldexp(torch.ldexp(value, exponent), exponent) * unit


def _check(keep: Tensor, group: int | None, rows: int, d: int) -> None:
    if keep.shape != (rows,) or keep.is_floating_point() or keep.dtype == torch.bool:
        raise MaskoptError(
            f"keep must be one count for each of {rows} rows; got a {keep.dtype} tensor of shape {tuple(keep.shape)}."
        )
    if rows and not 0 <= int(keep.min()) <= int(keep.max()) <= d:
        raise MaskoptError(f"keep must lie in 0 ... {d}; got {int(keep.min())} ... {int(keep.max())}.")
    if group is not None and (group < 1 or d % group or bool((keep % (d // group)).any())):
        raise MaskoptError(
            f"Groups of {group} must divide {d} entries and keep equally many; got keep {keep.tolist()}."
        )
