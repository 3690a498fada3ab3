"""Step rules: how far to go along a move."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, whole
from maskopt.problems import Move, Quadratic
from maskopt.solvers.rules import Step, View

__all__ = ["AdaptiveStep", "ExactStep", "LogStep", "MonotoneStep", "OpenLoopStep", "SecantStep", "ShortStep"]


@dataclass(frozen=True)
class OpenLoopStep(Step):
    """2 / (t + offset): needs nothing from the objective (Frank and Wolfe, 1956; Jaggi, ICML 2013)."""

    offset: int = 2

    open_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self, offset=whole(1))

    def share(self, view: View, move: Move, limit: Tensor) -> Tensor:
        return limit.clamp(max=2.0 / (view.iteration + self.offset))


@dataclass(frozen=True)
class LogStep(Step):
    """(2 + log(t + 1)) / (t + 2 + log(t + 1)): open loop with faster rates (Pokutta, arXiv 2311.05313, section 4)."""

    open_loop: ClassVar[bool] = True

    def share(self, view: View, move: Move, limit: Tensor) -> Tensor:
        order = 2.0 + math.log(view.iteration + 1)
        return limit.clamp(max=order / (view.iteration + order))


@dataclass(frozen=True)
class ShortStep(Step):
    """<-gradient, d> / (L |d|^2) with L the objective's `smoothness` (Demyanov and Rubinov, 1970)."""

    requires: ClassVar[tuple[str, ...]] = ("smoothness",)

    def begin(self, view: View) -> Step:
        assert isinstance(view.objective, Quadratic)
        # Rows of a band are blocks of one Hessian: the largest bound holds for all.
        return _ShortRun(-view.pool.least(-view.objective.smoothness()))


@dataclass
class _ShortRun(Step):
    smoothness: Tensor

    def share(self, view: View, move: Move, limit: Tensor) -> Tensor:
        return _short(view.dot(view.gradient, move.x), self.smoothness, view.dot(move.x, move.x), limit)

    def take(self, rows: Tensor, bands: Tensor) -> Step:
        return _ShortRun(self.smoothness[rows])


def _short(slope: Tensor, smoothness: Tensor, size: Tensor, limit: Tensor) -> Tensor:
    """Return -slope / (smoothness size) in [0, limit]; 0 for a move of no size."""
    share = (-slope / (smoothness * size)).nan_to_num(0.0, torch.inf, 0.0)
    return torch.where(size > 0, torch.minimum(share.clamp_min(0.0), limit), 0.0)


@dataclass(frozen=True)
class ExactStep(Step):
    """The best share for a quadratic objective, convex or not."""

    requires: ClassVar[tuple[str, ...]] = ("hessian",)

    def share(self, view: View, move: Move, limit: Tensor) -> Tensor:
        assert isinstance(view.objective, Quadratic)
        slope = view.dot(view.gradient, move.x)
        curvature = view.dot(view.objective.hessian(move), move.x)
        inside = torch.minimum((-slope / curvature).clamp_(min=0.0), limit)
        # Where the objective is concave along the move one of its ends is best; a move of no size stays (nan is not
        # below nought).
        end = (slope + 0.5 * curvature * limit) * limit
        return torch.where(curvature > 0, inside, torch.where(end < 0, limit, 0.0))


@dataclass(frozen=True)
class SecantStep(Step):
    """Root of the slope along the move by the Illinois variant of regula falsi: any differentiable objective.

    Parameters
    ----------
    evaluations : int
        Gradients at most, one of them at the far end.
    accuracy : float
        Stops where the slope has fallen to this share of its first value.
    """

    evaluations: int = 12
    accuracy: float = 1e-8

    def __post_init__(self) -> None:
        check_settings(self, evaluations=whole(1), accuracy=real(0, 1))

    def share(self, view: View, move: Move, limit: Tensor) -> Tensor:
        finite = limit.nan_to_num(posinf=1.0)
        low, high = torch.zeros_like(finite), finite.clone()
        first = view.dot(view.gradient, move.x)
        slope_low, slope_high = first.clone(), _slope(view, move, high)
        best = torch.where(slope_high <= 0, high, 0.0)
        open_ = (first < 0) & (slope_high > 0)
        best[open_] = high[open_]
        side = torch.zeros_like(finite)
        for _ in range(self.evaluations - 1):
            if not bool(open_.any()):
                break
            trial = high - slope_high * (high - low) / (slope_high - slope_low)
            best = torch.where(open_, trial, best)
            slope = _slope(view, move, best)
            open_ = open_ & (slope.abs() > self.accuracy * first.abs())
            beyond = slope > 0
            # An end that stays twice running has its slope halved, or the other one would creep.
            slope_low = torch.where(beyond, torch.where(side > 0, slope_low / 2, slope_low), slope)
            slope_high = torch.where(beyond, slope, torch.where(side < 0, slope_high / 2, slope_high))
            low, high = torch.where(beyond, low, best), torch.where(beyond, best, high)
            side = torch.where(beyond, 1.0, -1.0)
        # Left of the root a convex objective has fallen for certain.
        return torch.where(first < 0, torch.where(open_ & (low > 0), low, best), 0.0)


def _slope(view: View, move: Move, share: Tensor) -> Tensor:
    view.counters["slopes"] += 1
    return view.pool(view.objective.slope(view.point, move, share))


@dataclass(frozen=True)
class AdaptiveStep(Step):
    """Short steps with an estimated smoothness, doubled until the slope at the end is not positive.

    The gradient test <gradient(x + share d), d> <= 0 needs no difference of nearly equal values (Pokutta, arXiv
    2311.05313, section 4.2; after Pedregosa et al., AISTATS 2020).

    Parameters
    ----------
    decay : float
        What the last estimate is multiplied by before it is tried again.
    """

    decay: float = 0.7

    def __post_init__(self) -> None:
        check_settings(self, decay=real(0, 1, above=True))

    def begin(self, view: View) -> Step:
        return _AdaptiveRun(self, None)


@dataclass
class _AdaptiveRun(Step):
    rule: AdaptiveStep
    smoothness: Tensor | None

    def share(self, view: View, move: Move, limit: Tensor) -> Tensor:
        slope, size = view.dot(view.gradient, move.x), view.dot(move.x, move.x)
        if self.smoothness is None:
            # A first guess from a small step: the slope's rise over a thousandth of the way.
            near = limit.clamp(max=1.0) * 1e-3
            rise = (_slope(view, move, near) - slope) / near
            self.smoothness = (rise / size).nan_to_num(0.0, 0.0, 0.0).clamp_min(torch.finfo(slope.dtype).tiny)
        estimate = self.smoothness * self.rule.decay
        share = _short(slope, estimate, size, limit)
        bad = torch.ones_like(slope, dtype=torch.bool)
        for _ in range(60):
            bad = bad & (_slope(view, move, share) > 0) & (share > 0)
            if not bool(bad.any()):
                break
            # Twice what makes the failed share a short step: the limit may have hidden how small the estimate was.
            estimate = torch.where(bad, -2.0 * slope / (size * share), estimate)
            share = torch.where(bad, _short(slope, estimate, size, limit), share)
        self.smoothness = estimate.clamp_min(torch.finfo(slope.dtype).tiny)
        return torch.where(bad, 0.0, share)

    def take(self, rows: Tensor, bands: Tensor) -> Step:
        return _AdaptiveRun(self.rule, None if self.smoothness is None else self.smoothness[rows])


@dataclass(frozen=True)
class MonotoneStep(Step):
    """2 / (t + 2) halved, for good, until the objective falls (Carderera, Besançon and Pokutta, NeurIPS 2021)."""

    def begin(self, view: View) -> Step:
        return _MonotoneRun(torch.ones(len(view.x), dtype=view.x.dtype, device=view.x.device))


@dataclass
class _MonotoneRun(Step):
    factor: Tensor

    def share(self, view: View, move: Move, limit: Tensor) -> Tensor:
        size = 2.0 / (view.iteration + 2)
        share = torch.minimum(self.factor * size, limit)
        downhill = view.dot(view.gradient, move.x) < 0
        bad = downhill
        for _ in range(40):
            bad = bad & (view.pool(view.objective.change(view.point, move, share)) > 0)
            if not bool(bad.any()):
                break
            self.factor = torch.where(bad, self.factor / 2, self.factor)
            share = torch.where(bad, torch.minimum(self.factor * size, limit), share)
        return torch.where(downhill & ~bad, share, 0.0)

    def take(self, rows: Tensor, bands: Tensor) -> Step:
        return _MonotoneRun(self.factor[rows])
