"""The semidefinite bound of every row of a layer."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.bounds.interior import bound_forms
from maskopt.bounds.pairs import pair_multipliers
from maskopt.bounds.work import Progress, Stopper, within
from maskopt.errors import MaskoptError
from maskopt.problems import LayerReconstruction

__all__ = ["RowBounds", "convex_part", "sdp_bound"]

_MATRICES = 32  # of size d x d in float64, alive at once for each row worked on
_AT_ONCE = 2**26  # multiplications in an operation, beyond which processors gain nothing from more rows at a time
_SOLUTION = 25  # iterations of the multipliers that take as long as one bound, for the estimate of what is left


@dataclass(frozen=True)
class RowBounds:
    """What is proven of each row, float64, in full units.

    Attributes
    ----------
    bound : Tensor
        No mask that keeps the row's number of entries has a smaller error, shape (rows,).
    shift : Tensor
        D, shape (rows, d). The error plus sum_i D_i (p_i - p_i^2) is the same on masks, convex where sum p = s, and
        nowhere there smaller than `shifted`: Q - Diag(D) + (y 1^T + 1 y^T) / (2 s) with y = D - shifted / s is
        positive semidefinite (`convex_part`). Zero where nothing is proven or nothing is to be decided.
    shifted : Tensor
        The bound without cuts, shape (rows,).
    primal : Tensor
        Value of the relaxation's best point found, without cuts: what `shifted` can still become with more iterations,
        up to rounding; infinite where there is none. Shape (rows,).
    point : Tensor
        Pruned shares of the entries in the relaxation, shape (rows, d).
    iterations : Tensor
        Shape (rows,), int64.
    seconds : float
        For all rows together.
    finished : Tensor
        Whether the work on a row ended by itself, boolean, shape (rows,). Where it was stopped the bound holds, too,
        but more time would have raised it.
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
    stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> RowBounds:
    """Prove a lower bound on the error of every mask of each row.

    The semidefinite relaxation min <Q, Z> with diag Z = z, Z 1 = s z, 1^T z = s and Z - z z^T positive semidefinite
    (Helmberg, Rendl and Weismantel, J. Combinatorial Optimization 4, 2000, for cardinalities; its dual is the best
    convex quadratic of Billionnet, Elloumi and Plateau, Discrete Applied Mathematics 157, 2009), solved by
    `bound_forms`. Bounds are proven in float64 at any stop: no mask has a smaller error than `bound`.

    Parameters
    ----------
    problem : LayerReconstruction
        Of shape (rows, d). The bound is meant for d up to a few hundred: a row costs about 200 d^3 multiplications.
    keep : Tensor
        How many entries each row keeps, integers, shape (rows,).
    group : int, optional
        Every `group` consecutive entries of a row keep equally many (N:M): `keep` * `group` / d.
    accuracy : float
        A row is done when bound and relaxation differ by this, relatively.
    iterations : int
        At most so many for each row; about 15 are enough for three digits.
    cuts : int
        Iterations of `pair_multipliers`, which adds Z >= 0: 50 close a third or more of what the bound lacks, at three
        times the cost.
    target : Tensor, optional
        Errors, in full units, shape (rows,): a row is done, too, as soon as its bound has reached this, which is all
        branch and bound asks, or the relaxation is known not to.
    memory : int
        Bytes the work may take; at least one row is worked on at a time.
    stop : callable, optional
        Asked before every iteration; True ends the work with what is proven until then.
    progress : callable, optional
        Called after every iteration with the fraction of the work that is done, an estimate.

    Raises
    ------
    MaskoptError
        If `keep` is no vector of integers from 0 to d or does not spread evenly over groups, or if the problem aims at
        other weights' output.
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
        # Where nothing or everything is pruned there is nothing to be decided.
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
    """Return the positive semidefinite C, shape (d, d), in full units, that explains a row's bound without cuts.

    For every p with p_i^2 = p_i and sum p = s the row's error is p^T C p + shifted: the reformulation to hand to
    mixed-integer solvers instead of Q, as its relaxation at the root is worth `shifted`.
    """
    weight, gram = problem.double().rows(torch.tensor([row])).weight[0], problem.gram.double()
    s = int(problem.shape[1] - keep[row])
    C = weight.unsqueeze(1) * ((gram + gram.T) / 2) * weight
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
    """Return bounds in full units and which of them say something: errors are sums of squares."""
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
