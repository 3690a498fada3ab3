"""Proven lower bounds on the error of every choice of units with refit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from maskopt.bounds.column_forms import removal_bound
from maskopt.bounds.saddle import Saddle
from maskopt.bounds.work import Progress, Stop, Stopper, steps, stop_after, within
from maskopt.checks import check_time_limit
from maskopt.errors import MaskoptError
from maskopt.problems import ColumnSubset
from maskopt.threads import factor_threads

__all__ = ["ColumnBound", "ColumnBoundKind", "column_bound"]

ColumnBoundKind = Literal["plain", "diagonal", "forms"]

_SMALL = 1 / 20  # of the time limit, that the plain relaxation takes where there is time for the best diagonal
_PART = 0.3  # of the time that the diagonal takes, for the estimate of progress


@dataclass(frozen=True)
class ColumnBound:
    """What is proven about all choices of some number of units.

    Attributes
    ----------
    bound : float
        No choice has a smaller `ColumnSubset.objective`.
    x : Tensor
        The relaxed indicator of the perspective relaxation, float64, shape (units,).
    diagonal : Tensor
        Its D, in the units of the problem's Gram, shape (d,).
    iterations : int
        Newton steps and semidefinite programs.
    finished : bool
        Whether the method converged; where it was stopped before, the bound is valid but more time could have raised
        it.
    """

    bound: float
    x: Tensor
    diagonal: Tensor
    iterations: int
    finished: bool


def column_bound(
    subset: ColumnSubset,
    keep: int,
    kind: ColumnBoundKind = "forms",
    *,
    accuracy: float = 3e-3,
    rounds: int = 8,
    seconds: float | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> ColumnBound:
    """Return a proven lower bound on the error of every choice of `keep` units.

    Every kind is stronger, up to the accuracy, and costlier than the one before:

    - plain: the perspective relaxation with the problem's diagonal D.
    - diagonal: the same with the best diagonal (`saddle.Saddle`), which is a semidefinite relaxation.
    - forms: quadratic forms of the removed units (`column_forms.removal_bound`), each bounded by a semidefinite
      program with one row and column for each unit.

    However x, D and the forms were found, the bounds are evaluated with their rounding errors subtracted, after
    factorisations in float64 have proven what they need of K and K - D.

    Parameters
    ----------
    subset : ColumnSubset
    keep : int
        Units to keep; choices that keep fewer have no smaller error.
    kind : {"plain", "diagonal", "forms"}
    accuracy : float
        Relative to the bound, at which a method ends.
    rounds : int
        Quadratic forms that are bounded, each of which may improve on those before.
    seconds : float, optional
        Time limit, after which the bound proven so far is returned. For "forms" the best diagonal, which is only where
        they start, is then left out unless it takes a small part of the time.
    stop, progress : callable, optional
        Called before every iteration, see `maskopt.bounds`.

    Returns
    -------
    ColumnBound

    Raises
    ------
    MaskoptError
        If `keep` is no number of units, or there is no such kind.

    References
    ----------
    H. Dong, K. Chen and J. Linderoth, "Regularization vs. Relaxation: A conic optimization perspective of statistical
    variable selection", arXiv 1510.06083, for the best diagonal.

    Examples
    --------
    >>> import torch
    >>> import maskopt
    >>> from maskopt.bounds import column_bound
    >>> from maskopt.problems import ColumnSubset
    >>> subset = ColumnSubset.of(maskopt.synthetic("correlated", rows=4, d=8).problem())
    >>> found = column_bound(subset, 4)
    >>> mask = torch.tensor([[True, False] * 4])
    >>> column_bound(subset, 4, "plain").bound < found.bound <= float(subset.objective(mask))
    True
    """
    number = subset.shape[1]
    if not 0 <= keep <= number:
        raise MaskoptError(f"keep must lie in 0 ... {number}, the number of units; got {keep}.")
    if kind not in get_args(ColumnBoundKind):
        raise MaskoptError(f"There is no bound {kind!r}; choose one of {', '.join(get_args(ColumnBoundKind))}.")
    check_time_limit(seconds, "time for a bound")
    uniform = torch.full((number,), keep / number, dtype=torch.float64, device=subset.device)
    if keep in (0, number) or not bool(subset.blocks.target.any()):
        return ColumnBound(_proven(subset, uniform, keep), uniform, subset.diagonal, 0, True)
    stopper, began = Stopper(_either(stop, stop_after(seconds))), time.perf_counter()
    with factor_threads(len(subset.blocks.gram)):
        part = _PART if kind == "forms" else 1.0
        timed = kind == "forms" and seconds is not None
        found = _perspective(
            subset, keep, kind != "plain" and not timed, accuracy, stopper, within(progress, 0.0, part)
        )
        if timed and seconds is not None and time.perf_counter() - began < _SMALL * seconds:
            better = _perspective(subset, keep, True, accuracy, stopper, None)
            found = better if better.bound > found.bound else found
        if kind != "forms" or stopper():
            return found
        rest = within(progress, part, 1.0)
        bound, done = removal_bound(
            subset, keep, found.x, accuracy=accuracy, rounds=rounds, stop=stopper, progress=rest
        )
    best = max(found.bound, bound * subset.unit)
    return ColumnBound(best, found.x, found.diagonal, found.iterations + done, done == rounds)


def _perspective(
    subset: ColumnSubset, keep: int, best: bool, accuracy: float, stop: Stop, progress: Progress | None
) -> ColumnBound:
    """Return the bound of the perspective relaxation."""
    number = subset.shape[1]
    x = torch.full((number,), keep / number, dtype=torch.float64, device=subset.device)
    plain = ColumnBound(_proven(subset, x, keep), x, subset.diagonal, 0, False)
    saddle, finished, done = Saddle(subset, keep, best), False, 0
    for iteration in steps(60, stop, progress):
        if not saddle.step():
            break
        done = iteration + 1
        finished = max(saddle.weight * number, saddle.gap) < accuracy * saddle.value
        if finished:
            break
    if best:
        try:
            subset = subset.with_diagonal(subset.blocks.unscaled(saddle.split))
        except MaskoptError:  # rounding decides whether K less the diagonal is semidefinite: K is nearly singular
            finished = False
    bound = _proven(subset, saddle.x, keep)
    return ColumnBound(bound, saddle.x, subset.diagonal, done, finished) if bound > plain.bound else plain


def _either(one: Stop | None, other: Stop | None) -> Stop | None:
    """Return a condition that is true once one of two is."""
    if one is None or other is None:
        return one or other
    return lambda: one() or other()


def _proven(subset: ColumnSubset, x: Tensor, keep: int) -> float:
    """Return the bound that the linear model at x proves for all choices, in full."""
    start, slopes = subset.bound_from(x)
    removed = torch.sort(slopes).values[: len(slopes) - keep]
    total = removed.sum()
    bound = float(start + total - (len(slopes) + 4) * 2.0**-52 * (total + start.abs()))
    # Errors are sums of squares; a number that is none proves nothing.
    return bound * subset.unit if bound > 0.0 else 0.0
