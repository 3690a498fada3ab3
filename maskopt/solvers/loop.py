"""The one Frank-Wolfe loop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Move, Point, Problem
from maskopt.solvers.base import Watch, band_of
from maskopt.solvers.rules import Direction, Pool, Step, View

__all__ = ["Walk", "frank_wolfe"]


@dataclass(frozen=True)
class Walk:
    """Where the loop ended.

    Attributes
    ----------
    point : Point
        The last relaxed mask; its gradient is up to date where the direction is `exact`.
    iterations : int
        That were run.
    converged : bool
        Whether every band's gap came down to the tolerance.
    """

    point: Point
    iterations: int
    converged: bool


def frank_wolfe(
    objective_at: Callable[[int], Problem],
    masks: MaskSet,
    x: Tensor,
    *,
    direction: Direction,
    step: Step,
    iterations: int,
    watch: Watch,
    progress: tuple[int, int] | None = None,
    tolerance: Tensor | None = None,
    refresh: int = 0,
) -> Walk:
    """Minimise over the convex hull of `masks`, one `Problem.along` per iteration.

    Parameters
    ----------
    objective_at : callable
        The objective of iteration t: shifts of one problem, or always the same.
    masks : MaskSet
        Offers the oracle.
    x : Tensor
        Start in the hull, shape (rows, d); not changed.
    direction, step
        Rules; where set or objective couples rows they see sums over bands of rows.
    iterations : int
        At most.
    watch : Watch
        Clock, callback, counters, recorder.
    progress : (int, int), optional
        Iterations done before and planned in all, where this call is a part of a longer method.
    tolerance : Tensor, optional
        Gap at which a band is done, per row, in the objective's `unit`; only where the objective stays the same. Done
        bands stand still, and leave the batch once they are half of it.
    refresh : int
        Iterations after which the carried gradient is computed anew; 0: never.
    """
    before, planned = progress or (0, iterations)
    whole, everything = objective_at(0), masks
    batch = _Batch(whole, whole.at(x.clone()))
    pool = Pool(band_of(whole, masks))
    view = View(whole, masks, pool, 0, batch.point, watch.counters)
    direction, step = direction.begin(view), step.begin(view)
    full = torch.ones(len(x), dtype=x.dtype, device=x.device)
    running: Tensor | None = None
    for iteration in range(iterations):
        if tolerance is None:
            whole = objective_at(iteration)
            batch.objective = whole
        if watch.stops(whole, everything, before + iteration, planned, batch.whole):
            return Walk(batch.whole(), iteration, False)
        if refresh and iteration and iteration % refresh == 0 and direction.exact:
            batch.refresh(watch)
        view = View(batch.objective, masks, pool, iteration, batch.point, watch.counters)
        way = direction.way(view)
        limit = full if way.limit is None else way.limit
        gap = None if tolerance is None else view.certified_gap()
        if tolerance is not None and gap is not None:
            # A band that is done stands still, so that it stays done, whatever is known of it later.
            running = gap > tolerance if running is None else running & (gap > tolerance)
            if not bool(running.any()):
                return Walk(batch.whole(), iteration, True)
        if direction.exact:
            move = direction.bend(view, view.along(way.x))
            share = _held(limit if way.best else step.share(view, move, limit), running)
            batch.objective.advance(batch.point, move, share.unsqueeze(1))
            direction.moved(view, move, share, limit)
        else:
            share = _held(step.share(view, Move(way.x, way.x.new_empty(0)), limit), running)
            batch.point.x.addcmul_(way.x, share.unsqueeze(1))
        if running is not None and gap is not None and tolerance is not None and 2 * int(running.sum()) <= len(running):
            bands = pool.first(running).nonzero().squeeze(1)
            rows = pool.rows_of(bands)
            masks = masks.rows(rows, batch.objective.shape)
            batch.shrink(rows)
            tolerance, full, running = tolerance[rows], full[rows], None
            direction, step = direction.take(rows, bands), step.take(rows, bands)
    return Walk(batch.whole(), iterations, False)


def _held(share: Tensor, running: Tensor | None) -> Tensor:
    return share if running is None else share * running


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

    def refresh(self, watch: Watch) -> None:
        """Compute the gradient anew, in place."""
        self.point.gradient.copy_(self.objective.at(self.point.x).gradient)
        watch.counters["products"] += 1
