"""The saddle point of the perspective relaxation of a column subset problem: the best relaxed choice, best diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from maskopt.problems import ColumnSubset
from maskopt.problems.checks import ridged_factor

__all__ = ["Saddle"]

_SHRINK = 0.25  # factor on the barrier's weight after a full step
_INSIDE = 0.9  # of the largest step size that stays inside
_TRIALS = 40  # step sizes tried before a direction is given up


class Saddle:
    """The iterates of Newton's method on the perspective relaxation with barriers.

    f(x; D) is convex in x and concave in D. The saddle point over 0 < x < 1, sum x = keep and D > 0, K - D positive
    definite, of

        f(x; D) - mu sum_u (log x_u + log(1 - x_u)) + mu (log det(K - D) + sum_j log D_j)

    is followed while mu shrinks. With A = K + Diag(e), e = D (1 / x - 1), and V = B A^-1 the derivatives of f in e are
    |v_j|^2 and -2 (A^-1)_ij (V^T V)_ij.

    Parameters
    ----------
    subset : ColumnSubset
    keep : int
        Neither none nor all of the units.
    best : bool
        Whether D is optimised too.

    Attributes
    ----------
    x : Tensor
        Shape (units,).
    split : Tensor
        D of the scaled and padded columns.
    value : float
        f(x; D).
    gap : float
        By how much the linear model of f(.; D) at x falls below the value: the Frank-Wolfe gap.
    weight : float
        mu.
    """

    def __init__(self, subset: ColumnSubset, keep: int, best: bool) -> None:
        blocks = subset.blocks
        self.best, self.width, self.keep = best, blocks.width, keep
        self.gram, self.split = blocks.gram, blocks.scaled_diagonal(subset.diagonal)
        if best:
            self.split = 0.5 * self.split
        self.x = torch.full((blocks.number,), keep / blocks.number, dtype=torch.float64, device=subset.device)
        self.target = blocks.product
        self.constant = (blocks.target * blocks.product).sum()
        self._evaluate()
        self.weight = 0.1 * self.value / blocks.number

    def _evaluate(self) -> None:
        """Compute value, gap, and what the derivatives are made of."""
        wide = self.x.repeat_interleave(self.width)
        matrix = self.gram.clone()
        matrix.diagonal().add_(self.split * (1.0 / wide - 1.0))
        factor = ridged_factor(matrix)
        fitted = torch.cholesky_solve(self.target.T, factor).T
        self.value = float(self.constant - (fitted * self.target).sum())
        self._slope = fitted.square().sum(0)
        self._curvature = torch.cholesky_inverse(factor).mul_(fitted.T @ fitted).mul_(-2.0)  # of f in e
        # The gradient in x, with the sign changed.
        steepness = (self._slope * self.split / wide.square()).view(-1, self.width).sum(1)
        removed = torch.sort(steepness).values[: len(self.x) - self.keep].sum()
        self.gap = float((steepness * (1.0 - self.x)).sum() - removed)

    def step(self) -> bool:
        """Take a Newton step; return whether there was one, which rounding may prevent."""
        width, x, split, weight = self.width, self.x, self.split, self.weight
        wide = x.repeat_interleave(width)
        slope, curvature = self._slope, self._curvature
        ratio, rate = 1.0 / wide - 1.0, -wide.square().reciprocal()
        scaled = split * rate
        first = (slope * scaled).view(-1, width).sum(1) - weight / x + weight / (1.0 - x)
        hessian = self._units(self._units((curvature * scaled).mul_(scaled.unsqueeze(1))).T)
        own = (2.0 * slope * split / wide.pow(3)).view(-1, width).sum(1)
        hessian.diagonal().add_(own + weight / x.square() + weight / (1.0 - x).square())
        change = torch.zeros_like(split)
        if self.best:
            barrier = torch.cholesky_inverse(ridged_factor(self.gram - torch.diag(split)))
            second = slope * ratio + weight * (1.0 / split - barrier.diagonal())
            # Minus the Hessian in D, which is positive definite.
            bend = (curvature * ratio).mul_(-ratio.unsqueeze(1)).add_(barrier.square_(), alpha=weight)
            bend.diagonal().add_(weight / split.square())
            mixed = (curvature * ratio).mul_(scaled.unsqueeze(1))
            mixed.diagonal().add_(slope * rate)
            mixed = self._units(mixed)  # (units, columns)
            factor = _factor(bend)
            if factor is None:
                return False
            both = torch.cholesky_solve(torch.cat((mixed.T, second.unsqueeze(1)), 1), factor)
            hessian.addmm_(mixed, both[:, :-1])
            first = first + mixed @ both[:, -1]
        factor = _factor(hessian)
        if factor is None:
            return False
        ones = torch.ones_like(x)
        answers = torch.cholesky_solve(torch.stack((first, ones), 1), factor)
        move = -answers[:, 0] + answers[:, 1] * (answers[:, 0].sum() / answers[:, 1].sum())
        if self.best:
            change = both[:, -1] + both[:, :-1] @ move
        length = self._longest(move, change)
        if length == 0.0:
            return False
        self.x, self.split = x + length * move, split + length * change
        self._evaluate()
        if length > 0.5:
            self.weight *= _SHRINK
        return True

    def _units(self, matrix: Tensor) -> Tensor:
        """Return sums over the rows of each unit."""
        return matrix if self.width == 1 else matrix.view(-1, self.width, matrix.shape[1]).sum(1)

    def _longest(self, move: Tensor, change: Tensor) -> float:
        """Return a step size that stays inside all constraints, zero if none was found."""
        limits = [1.0, _INSIDE * _reach(self.x, move), _INSIDE * _reach(1.0 - self.x, -move)]
        limits.append(_INSIDE * _reach(self.split, change))
        length = min(limits)
        for _ in range(_TRIALS):
            if not self.best:
                return length
            trial = self.gram - torch.diag(self.split + length / _INSIDE * change)
            if _factor(trial) is not None:
                return length
            length *= 0.7
        return 0.0


def _factor(matrix: Tensor) -> Tensor | None:
    """Return the Cholesky factor of a matrix, None where it is not positive definite or not finite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor if int(info) == 0 and bool(factor.diagonal().isfinite().all()) else None


def _reach(place: Tensor, move: Tensor) -> float:
    """Return the largest step size for which place + step * move stays nonnegative."""
    falling = torch.where(move < 0, -place / move, torch.inf)
    return float(falling.amin())
