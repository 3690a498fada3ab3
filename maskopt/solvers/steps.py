"""Step rules: the step size in a direction."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, whole
from maskopt.problems import Direction, Quadratic
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import IterationState, StepRule

__all__ = ["AdaptiveStep", "ExactStep", "LogStep", "MonotoneStep", "OpenLoopStep", "SecantStep", "ShortStep"]


@dataclass(frozen=True)
class OpenLoopStep(StepRule):
    """2 / (t + offset): needs nothing from the objective (Frank and Wolfe, 1956; Jaggi, ICML 2013).

    Parameters
    ----------
    offset : int
        At least 1; 2 is the classical choice.
    """

    offset: int = 2

    open_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self, offset=whole(1))

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        return max_step.clamp(max=2.0 / (state.iteration + self.offset))


@dataclass(frozen=True)
class LogStep(StepRule):
    """(2 + log(t + 1)) / (t + 2 + log(t + 1)): open loop with faster rates.

    References
    ----------
    Pokutta, "The Frank-Wolfe algorithm: a short introduction", arXiv 2311.05313, section 4.
    """

    open_loop: ClassVar[bool] = True

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        order = 2.0 + math.log(state.iteration + 1)
        return max_step.clamp(max=order / (state.iteration + order))


@dataclass(frozen=True)
class ShortStep(StepRule):
    """<-gradient, d> / (L |d|^2) with L the objective's `smoothness`.

    Class attributes
    ----------------
    requires : Requirements
        A `Quadratic`, whose smoothness is known.

    References
    ----------
    Demyanov and Rubinov, "Approximate Methods in Optimization Problems", 1970.
    """

    requires: ClassVar[Requirements] = Requirements((Quadratic,))

    def begin(self, state: IterationState) -> StepRule:
        # Rows of a row block are blocks of one Hessian: the largest bound holds for all.
        return _ShortRun(-state.row_blocks.minimum(-state.quadratic.smoothness()))


@dataclass
class _ShortRun(StepRule):
    smoothness: Tensor

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        return _short(
            state.dot(state.gradient, direction.vector),
            self.smoothness,
            state.dot(direction.vector, direction.vector),
            max_step,
        )

    def take(self, rows: Tensor, blocks: Tensor) -> StepRule:
        return _ShortRun(self.smoothness[rows])


def _short(slope: Tensor, smoothness: Tensor, size: Tensor, max_step: Tensor) -> Tensor:
    """Return -slope / (smoothness size) in [0, max_step]; 0 for a direction of no size."""
    step_size = (-slope / (smoothness * size)).nan_to_num(0.0, torch.inf, 0.0)
    return torch.where(size > 0, torch.minimum(step_size.clamp_min(0.0), max_step), 0.0)


@dataclass(frozen=True)
class ExactStep(StepRule):
    """The best step size for a quadratic objective, convex or not: the exact line search.

    Class attributes
    ----------------
    requires : Requirements
        A `Quadratic`, whose Hessian product of the direction is known.
    """

    requires: ClassVar[Requirements] = Requirements((Quadratic,))

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        slope = state.dot(state.gradient, direction.vector)
        curvature = state.dot(state.quadratic.hessian(direction), direction.vector)
        inside = torch.minimum((-slope / curvature).clamp_(min=0.0), max_step)
        # Where the objective is concave in the direction one of its ends is best; a direction of no size gives no step
        # (nan is not below zero).
        end = (slope + 0.5 * curvature * max_step) * max_step
        return torch.where(curvature > 0, inside, torch.where(end < 0, max_step, 0.0))


@dataclass(frozen=True)
class SecantStep(StepRule):
    """Root of the slope in the direction by the Illinois variant of regula falsi: any differentiable objective.

    Parameters
    ----------
    evaluations : int
        Gradients at most, one of them at the far end.
    accuracy : float
        Stops where the slope has fallen to this fraction of its first value.
    """

    evaluations: int = 12
    accuracy: float = 1e-8

    def __post_init__(self) -> None:
        check_settings(self, evaluations=whole(1), accuracy=real(0, 1))

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        finite = max_step.nan_to_num(posinf=1.0)
        low, high = torch.zeros_like(finite), finite.clone()
        first = state.dot(state.gradient, direction.vector)
        slope_low, slope_high = first.clone(), _slope(state, direction, high)
        best = torch.where(slope_high <= 0, high, 0.0)
        open_ = (first < 0) & (slope_high > 0)
        best[open_] = high[open_]
        side = torch.zeros_like(finite)
        for _ in range(self.evaluations - 1):
            if not bool(open_.any()):
                break
            trial = high - slope_high * (high - low) / (slope_high - slope_low)
            best = torch.where(open_, trial, best)
            slope = _slope(state, direction, best)
            open_ = open_ & (slope.abs() > self.accuracy * first.abs())
            beyond = slope > 0
            # An end that stays twice running has its slope halved, or the other one would creep.
            slope_low = torch.where(beyond, torch.where(side > 0, slope_low / 2, slope_low), slope)
            slope_high = torch.where(beyond, slope, torch.where(side < 0, slope_high / 2, slope_high))
            low, high = torch.where(beyond, low, best), torch.where(beyond, best, high)
            side = torch.where(beyond, 1.0, -1.0)
        # Left of the root a convex objective has fallen for certain.
        return torch.where(first < 0, torch.where(open_ & (low > 0), low, best), 0.0)


def _slope(state: IterationState, direction: Direction, step_size: Tensor) -> Tensor:
    state.counters["slopes"] += 1
    return state.row_blocks(state.objective.slope(state.point, direction, step_size))


@dataclass(frozen=True)
class AdaptiveStep(StepRule):
    """Short steps with an estimated smoothness, doubled until the slope at the end is not positive.

    The gradient test <gradient(x + step_size d), d> <= 0 needs no difference of nearly equal values (Pokutta, arXiv
    2311.05313, section 4.2; after Pedregosa et al., AISTATS 2020).

    Parameters
    ----------
    decay : float
        What the last estimate is multiplied by before it is tried again.
    """

    decay: float = 0.7

    def __post_init__(self) -> None:
        check_settings(self, decay=real(0, 1, above=True))

    def begin(self, state: IterationState) -> StepRule:
        return _AdaptiveRun(self, None)


@dataclass
class _AdaptiveRun(StepRule):
    rule: AdaptiveStep
    smoothness: Tensor | None

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        slope, size = state.dot(state.gradient, direction.vector), state.dot(direction.vector, direction.vector)
        if self.smoothness is None:
            # A first guess from a small step: the slope's rise over a thousandth of the direction.
            near = max_step.clamp(max=1.0) * 1e-3
            rise = (_slope(state, direction, near) - slope) / near
            self.smoothness = (rise / size).nan_to_num(0.0, 0.0, 0.0).clamp_min(torch.finfo(slope.dtype).tiny)
        estimate = self.smoothness * self.rule.decay
        step_size = _short(slope, estimate, size, max_step)
        bad = torch.ones_like(slope, dtype=torch.bool)
        for _ in range(60):
            bad = bad & (_slope(state, direction, step_size) > 0) & (step_size > 0)
            if not bool(bad.any()):
                break
            # Twice what makes the failed step size a short step: max_step may have hidden how small the estimate was.
            estimate = torch.where(bad, -2.0 * slope / (size * step_size), estimate)
            step_size = torch.where(bad, _short(slope, estimate, size, max_step), step_size)
        self.smoothness = estimate.clamp_min(torch.finfo(slope.dtype).tiny)
        return torch.where(bad, 0.0, step_size)

    def take(self, rows: Tensor, blocks: Tensor) -> StepRule:
        return _AdaptiveRun(self.rule, None if self.smoothness is None else self.smoothness[rows])


@dataclass(frozen=True)
class MonotoneStep(StepRule):
    """2 / (t + 2), halved for good until the objective falls.

    References
    ----------
    Carderera, Besançon and Pokutta, "Simple steps are all you need: Frank-Wolfe and generalized self-concordant
    functions", NeurIPS 2021.
    """

    def begin(self, state: IterationState) -> StepRule:
        return _MonotoneRun(torch.ones(len(state.x), dtype=state.x.dtype, device=state.x.device))


@dataclass
class _MonotoneRun(StepRule):
    factor: Tensor

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        size = 2.0 / (state.iteration + 2)
        step_size = torch.minimum(self.factor * size, max_step)
        downhill = state.dot(state.gradient, direction.vector) < 0
        bad = downhill
        for _ in range(40):
            bad = bad & (state.row_blocks(state.objective.change(state.point, direction, step_size)) > 0)
            if not bool(bad.any()):
                break
            self.factor = torch.where(bad, self.factor / 2, self.factor)
            step_size = torch.where(bad, torch.minimum(self.factor * size, max_step), step_size)
        return torch.where(downhill & ~bad, step_size, 0.0)

    def take(self, rows: Tensor, blocks: Tensor) -> StepRule:
        return _MonotoneRun(self.factor[rows])
