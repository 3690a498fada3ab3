"""The one Frank-Wolfe loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Direction, Point, Problem
from maskopt.solvers.monitor import Monitor
from maskopt.solvers.rules import DirectionRule, IterationState, RowBlocks, StepRule

__all__ = ["LoopResult", "frank_wolfe"]


@dataclass(frozen=True)
class LoopResult:
    """Where the loop ended.

    Attributes
    ----------
    point : Point
        The last relaxed mask; its gradient is up to date where the direction rule is `exact`.
    iterations : int
        That were run.
    converged : bool
        Whether every row block's gap fell to the tolerance.
    """

    point: Point
    iterations: int
    converged: bool


def frank_wolfe(
    objective_at: Callable[[int], Problem],
    masks: MaskSet,
    x: Tensor,
    *,
    direction: DirectionRule,
    step: StepRule,
    iterations: int,
    monitor: Monitor,
    progress: tuple[int, int] | None = None,
    tolerance: Tensor | None = None,
    refresh: int = 0,
    rows: Tensor | None = None,
) -> LoopResult:
    """Minimise over the convex hull of `masks`, one `Problem.hvp` per iteration.

    Parameters
    ----------
    objective_at : callable
        The objective of iteration t: shifts of one problem, or always the same.
    masks : MaskSet
        Offers the oracle.
    x : Tensor
        Start in the hull, shape (rows, d); not changed.
    direction, step
        Rules; where set or objective couples rows they see sums over row blocks.
    iterations : int
        At most.
    monitor : Monitor
        Clock, callback, counters, recorder.
    progress : (int, int), optional
        Iterations done before and planned in all, where this call is a part of a longer method.
    tolerance : Tensor, optional
        Gap at which a row block is done, per row, in the objective's `unit`; only where the objective stays the same.
        Row blocks that are done stay as they are, and leave the batch once they are half of it.
    refresh : int
        Iterations after which the carried gradient is computed anew; 0: never.
    rows : Tensor, optional
        Numbers of the rows to go on with, whole row blocks; the others stay as they are in `x`.

    Raises
    ------
    MaskoptError
        If objective or set lacks what the rules require.
    """
    before, planned = progress or (0, iterations)
    whole = objective_at(0)
    for rule in (direction, step):
        rule.requires.check(whole, masks, type(rule).__name__)
    run = _Run(whole, masks, x.clone(), direction, step, tolerance, monitor, rows)
    for iteration in range(iterations):
        if tolerance is None:
            whole = objective_at(iteration)
            run.batch.objective = whole if rows is None else whole.rows(rows)
        if monitor.stops(whole, masks, before + iteration, planned, run.batch.whole):
            return LoopResult(run.batch.whole(), iteration, False)
        if refresh and iteration and iteration % refresh == 0 and run.direction.exact:
            run.batch.refresh(monitor)
        if run.iterate(iteration):
            return LoopResult(run.batch.whole(), iteration, True)
    return LoopResult(run.batch.whole(), iterations, False)


class _Run:
    """What one run of the loop carries from one iteration to the next."""

    def __init__(
        self,
        objective: Problem,
        masks: MaskSet,
        x: Tensor,
        direction: DirectionRule,
        step: StepRule,
        tolerance: Tensor | None,
        monitor: Monitor,
        rows: Tensor | None,
    ) -> None:
        self.batch, self.masks = _Batch(objective, objective.evaluate(x)), masks
        self.row_blocks, self.counters = RowBlocks.of(objective, masks), monitor.counters
        self.tolerance, self.ones = tolerance, torch.ones(len(x), dtype=x.dtype, device=x.device)
        if rows is not None:
            self._restrict(rows)
        self.running: Tensor | None = None
        """Rows whose gap has not fallen to the tolerance yet; None before any gap is known."""
        self.left = len(x)
        """How many they are: the one number of an iteration that the host asks the device for."""
        state = self._state(0)
        self.direction, self.step = direction.begin(state), step.begin(state)

    def _state(self, iteration: int) -> IterationState:
        batch = self.batch
        return IterationState(batch.objective, self.masks, self.row_blocks, iteration, batch.point, self.counters)

    def iterate(self, iteration: int) -> bool:
        """Go one step; return whether all row blocks were done already."""
        state = self._state(iteration)
        search = self.direction.search_direction(state)
        max_step = self.ones if search.max_step is None else search.max_step
        gap = None if self.tolerance is None else state.certified_gap()
        if gap is not None and self.tolerance is not None and self._converged(gap, self.tolerance):
            return True
        batch = self.batch
        if self.direction.exact:
            direction = self.direction.correct(state, state.hvp(search.vector))
            step_size = max_step if search.best else self.step.step_size(state, direction, max_step)
            step_size = self._of_running(step_size)
            batch.objective.advance(batch.point, direction, step_size.unsqueeze(1))
            self.direction.update(state, direction, step_size, max_step)
        else:
            direction = Direction(search.vector, search.vector.new_empty(0))
            step_size = self._of_running(self.step.step_size(state, direction, max_step))
            batch.point.x.addcmul_(search.vector, step_size.unsqueeze(1))
        if gap is not None:
            self._shrink()
        return False

    def _converged(self, gap: Tensor, tolerance: Tensor) -> bool:
        """Note which row blocks are done; return whether all are."""
        # A row block that is done stays as it is, so that it stays done whatever is known of its gap later.
        above = gap > tolerance
        self.running = above if self.running is None else self.running & above
        self.left = int(self.running.sum())
        return self.left == 0

    def _of_running(self, step_size: Tensor) -> Tensor:
        return step_size if self.running is None else step_size * self.running

    def _shrink(self) -> None:
        """Go on without the row blocks that are done, once they are half of the batch."""
        if self.running is None or self.tolerance is None or 2 * self.left > len(self.running):
            return
        blocks = self.row_blocks.first(self.running).nonzero().squeeze(1)
        rows = self.row_blocks.rows_of(blocks)
        self._restrict(rows)
        self.running = None
        self.direction, self.step = self.direction.take(rows, blocks), self.step.take(rows, blocks)

    def _restrict(self, rows: Tensor) -> None:
        """Go on with some rows of the batch, whole row blocks."""
        self.masks = self.masks.rows(rows, self.batch.objective.shape)
        self.batch.shrink(rows)
        self.ones = self.ones[rows]
        self.tolerance = None if self.tolerance is None else self.tolerance[rows]


class _Batch:
    """The rows whose row blocks are not done, and all rows as they are."""

    def __init__(self, objective: Problem, point: Point) -> None:
        self.objective, self.point = objective, point
        self._all = point
        self._rows: Tensor | None = None

    def whole(self) -> Point:
        """Return the point of all rows."""
        if self._rows is not None:
            self._all.x[self._rows] = self.point.x
            self._all.gradient[self._rows] = self.point.gradient
        return self._all

    def shrink(self, rows: Tensor) -> None:
        """Go on with some of these rows."""
        self.whole()
        self._rows = rows if self._rows is None else self._rows[rows]
        self.objective, self.point = self.objective.rows(rows), self.point.take(rows)

    def refresh(self, monitor: Monitor) -> None:
        """Compute the gradient anew, in place."""
        self.point.gradient.copy_(self.objective.evaluate(self.point.x).gradient)
        monitor.counters["products"] += 1
