"""The one Frank-Wolfe loop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Direction, Point, Problem
from maskopt.solvers.base import Monitor, row_block_of
from maskopt.solvers.rules import DirectionRule, IterationState, RowBlocks, StepRule

__all__ = ["LoopResult", "frank_wolfe"]


@dataclass(frozen=True)
class LoopResult:
    """Where the loop ended.

    Attributes
    ----------
    point : Point
        The last relaxed mask; its gradient is up to date where the direction is `exact`.
    iterations : int
        That were run.
    converged : bool
        Whether every row block's gap came down to the tolerance.
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
        Rules; where set or objective couples rows they see sums over row blocks of rows.
    iterations : int
        At most.
    watch : Monitor
        Clock, callback, counters, recorder.
    progress : (int, int), optional
        Iterations done before and planned in all, where this call is a part of a longer method.
    tolerance : Tensor, optional
        Gap at which a row block is done, per row, in the objective's `unit`; only where the objective stays the same. Done
        row blocks stand still, and leave the batch once they are half of it.
    refresh : int
        Iterations after which the carried gradient is computed anew; 0: never.
    """
    before, planned = progress or (0, iterations)
    whole, everything = objective_at(0), masks
    batch = _Batch(whole, whole.evaluate(x.clone()))
    row_blocks = RowBlocks(row_block_of(whole, masks))
    state = IterationState(whole, masks, row_blocks, 0, batch.point, monitor.counters)
    direction, step = direction.begin(state), step.begin(state)
    full = torch.ones(len(x), dtype=x.dtype, device=x.device)
    running: Tensor | None = None
    for iteration in range(iterations):
        if tolerance is None:
            whole = objective_at(iteration)
            batch.objective = whole
        if monitor.stops(whole, everything, before + iteration, planned, batch.whole):
            return LoopResult(batch.whole(), iteration, False)
        if refresh and iteration and iteration % refresh == 0 and direction.exact:
            batch.refresh(monitor)
        state = IterationState(batch.objective, masks, row_blocks, iteration, batch.point, monitor.counters)
        search = direction.search_direction(state)
        max_step = full if search.max_step is None else search.max_step
        gap = None if tolerance is None else state.certified_gap()
        if tolerance is not None and gap is not None:
            # A row block that is done stands still, so that it stays done, whatever is known of it later.
            running = gap > tolerance if running is None else running & (gap > tolerance)
            if not bool(running.any()):
                return LoopResult(batch.whole(), iteration, True)
        if direction.exact:
            direction = direction.correct(state, state.hvp(search.x))
            step_size = _held(max_step if search.best else step.step_size(state, direction, max_step), running)
            batch.objective.advance(batch.point, direction, step_size.unsqueeze(1))
            direction.update(state, direction, step_size, max_step)
        else:
            step_size = _held(step.step_size(state, Direction(search.x, search.x.new_empty(0)), max_step), running)
            batch.point.x.addcmul_(search.x, step_size.unsqueeze(1))
        if running is not None and gap is not None and tolerance is not None and 2 * int(running.sum()) <= len(running):
            blocks = row_blocks.first(running).nonzero().squeeze(1)
            rows = row_blocks.rows_of(blocks)
            masks = masks.rows(rows, batch.objective.shape)
            batch.shrink(rows)
            tolerance, full, running = tolerance[rows], full[rows], None
            direction, step = direction.take(rows, blocks), step.take(rows, blocks)
    return LoopResult(batch.whole(), iterations, False)


def _held(step_size: Tensor, running: Tensor | None) -> Tensor:
    return step_size if running is None else step_size * running


class _Batch:
    """The rows that still move, and all rows as they stand."""

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
        """Go on with some of the rows that still move."""
        self.whole()
        self._rows = rows if self._rows is None else self._rows[rows]
        self.objective, self.point = self.objective.rows(rows), self.point.take(rows)

    def refresh(self, monitor: Monitor) -> None:
        """Compute the gradient anew, in place."""
        self.point.gradient.copy_(self.objective.evaluate(self.point.x).gradient)
        monitor.counters["products"] += 1
