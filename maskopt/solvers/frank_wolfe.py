"""Frank-Wolfe on the relaxation, any direction with any step, and the best mask among all iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from maskopt.checks import check_settings, choice, instance_of, real, truth, whole
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction, Point, Problem, Quadratic
from maskopt.solvers.active import Away, BlendedPairwise, FullyCorrective, Lazy, Pairwise
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.directions import BlockCoordinate, Boosted, Conjugate, Momentum, Stochastic, Vanilla
from maskopt.solvers.history import Record
from maskopt.solvers.inface import BlendedInFace, InFace
from maskopt.solvers.loop import frank_wolfe
from maskopt.solvers.one_swap import descend
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rounding import best_weight
from maskopt.solvers.rules import DirectionRule, RowBlocks, StepRule
from maskopt.solvers.steps import (
    AdaptiveStep,
    ExactStep,
    LogStep,
    MonotoneStep,
    OpenLoopStep,
    SecantStep,
    ShortStep,
)

__all__ = ["DIRECTIONS", "STEPS", "FrankWolfe"]

DirectionName = Literal[
    "vanilla",
    "conjugate",
    "away",
    "pairwise",
    "blended-pairwise",
    "dicg",
    "blended-dicg",
    "boosted",
    "momentum",
    "stochastic",
    "lazy",
    "block-coordinate",
    "fully-corrective",
]
StepName = Literal["open-loop", "log", "short", "exact", "secant", "adaptive", "monotone"]

DIRECTIONS: dict[DirectionName, Callable[[], DirectionRule]] = {
    "vanilla": Vanilla,
    "conjugate": Conjugate,
    "away": Away,
    "pairwise": Pairwise,
    "blended-pairwise": BlendedPairwise,
    "dicg": InFace,
    "blended-dicg": BlendedInFace,
    "boosted": Boosted,
    "momentum": Momentum,
    "stochastic": Stochastic,
    "lazy": Lazy,
    "block-coordinate": BlockCoordinate,
    "fully-corrective": FullyCorrective,
}
STEPS: dict[StepName, Callable[[], StepRule]] = {
    "open-loop": OpenLoopStep,
    "log": LogStep,
    "short": ShortStep,
    "exact": ExactStep,
    "secant": SecantStep,
    "adaptive": AdaptiveStep,
    "monotone": MonotoneStep,
}

_REFRESH = 100  # iterations after which carried gradients are computed anew


@dataclass(frozen=True)
class FrankWolfe(Solver):
    """Minimise over the hull of the masks, and return the best mask met.

    Candidates are the rounded points and the oracle's vertices (each of which is a mask) of the recorded iterations,
    the last point rounded with regard to its gradient, then the 1-swap optimum near the best of them. Where the
    objective is convex the recorded points prove lower bounds.

    Parameters
    ----------
    direction : str or DirectionRule
        A name from `DIRECTIONS` or a rule with settings of its own.
    step : str or StepRule, optional
        A name from `STEPS` or a rule. By default exact for quadratics, adaptive for other functions, and open loop
        for momentum and stochastic directions.
    iterations : int
        At most.
    gap, relative_gap : float
        A row block is done when its Frank-Wolfe gap is at most `gap` plus `relative_gap` times its objective of
        pruning everything.
    polish : bool
        Swap to a 1-swap optimum at the end, where problem and set allow it.
    start : Solver, optional
        Makes the mask to start from; by default the hull's center, or the oracle's vertex there.

    Examples
    --------
    >>> import maskopt
    >>> from maskopt.solvers import FrankWolfe
    >>> layer, masks = maskopt.synthetic(rows=4, d=16).problem(), maskopt.PerRow(0.5)
    >>> result = maskopt.solve(layer, masks, FrankWolfe("dicg", relative_gap=1e-6))
    >>> result.gap_kind.name, bool((result.lower_bound <= result.objective).all())
    ('PROVEN', True)
    """

    direction: DirectionName | DirectionRule = "vanilla"
    step: StepName | StepRule | None = None
    iterations: int = 1000
    gap: float = 0.0
    relative_gap: float = 1e-5
    polish: bool = True
    start: Solver | None = None

    relaxes: ClassVar[bool] = True
    blockwise: ClassVar[bool] = True
    record: ClassVar[Record] = "doubling"
    proves: ClassVar[bool] = True
    arrays: ClassVar[float] = 16.0

    def __post_init__(self) -> None:
        for rule, known, kind in ((self.direction, DIRECTIONS, "direction"), (self.step, STEPS, "step")):
            if isinstance(rule, str) and rule not in known:
                raise MaskoptError(f"There is no {kind} {rule!r}; choose one of {', '.join(known)}.")
        check_settings(
            self,
            direction=choice(DIRECTIONS, also=(DirectionRule,)),
            step=choice(STEPS, also=(StepRule,), optional=True),
            iterations=whole(1),
            gap=real(0, infinite=True),
            relative_gap=real(0, infinite=True),
            polish=truth(),
            start=instance_of(Solver, example="Wanda()", optional=True),
        )
        if not self._direction.exact and isinstance(step := self._chosen, StepRule) and not step.open_loop:
            raise MaskoptError(
                f"{self._direction} keeps no gradient for {step} to look at; choose an open-loop step: open-loop, log."
            )

    @property
    def _direction(self) -> DirectionRule:
        return DIRECTIONS[self.direction]() if isinstance(self.direction, str) else self.direction

    @property
    def _chosen(self) -> StepRule | None:
        return STEPS[self.step]() if isinstance(self.step, str) else self.step

    def _step(self, problem: Problem) -> StepRule:
        if self._chosen is not None:
            return self._chosen
        if isinstance(self._direction, Momentum | Stochastic):
            return OpenLoopStep()
        return ExactStep() if isinstance(problem, Quadratic) else AdaptiveStep()

    @property
    def name(self) -> str:
        return f"FrankWolfe with {self._direction}"

    @property
    def requirements(self) -> Requirements:
        step = self._chosen
        return self._direction.requires if step is None else self._direction.requires.joined(step.requires)

    def run(self, problem: Problem, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        row_blocks = RowBlocks.of(problem, masks)
        allowed = (self.gap + self.relative_gap * problem.scale().abs()) / problem.unit
        tolerance = row_blocks(allowed).to(problem.dtype)
        loop_result = frank_wolfe(
            lambda _: problem,
            masks,
            self._begin(problem, masks, start),
            direction=self._direction,
            step=self._step(problem),
            iterations=self.iterations,
            monitor=monitor,
            tolerance=tolerance,
            refresh=_REFRESH if isinstance(problem, Quadratic) else 0,
        )
        mask, source = self._rounded(problem, masks, loop_result.point), "gradient"
        if monitor.recorder is not None:
            monitor.last(problem, loop_result.point)
            monitor.recorder.offer(mask, source)
            mask = monitor.recorder.mask
        layer = problem.unshifted()
        if self.polish and isinstance(layer, LayerReconstruction) and isinstance(masks, PartitionMatroid):
            mask, _, _ = descend(layer, masks, mask, monitor)
            source = "polish"
        status = Status.CONVERGED if loop_result.converged else Status.ITERATION_LIMIT
        return Outcome(mask, status, loop_result.iterations, source=source)

    def _rounded(self, problem: Problem, masks: MaskSet, point: Point) -> Tensor:
        # Of the gradients that may order nearly equal entries, the one of the concave shift costs the smallest error.
        curved = problem.shifted(problem.diagonal()) if isinstance(problem, Quadratic) else problem
        return best_weight(problem, masks, point.x, curved.gradient(point))

    def _begin(self, problem: Problem, masks: MaskSet, start: Tensor | None) -> Tensor:
        if start is not None:
            return start.to(problem.dtype)
        center = masks.center(problem.shape, problem.dtype, problem.device)
        if not self._direction.from_vertex:
            return center
        return masks.lmo(problem.gradient(problem.evaluate(center)))
