"""The one Frank-Wolfe loop."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskopt.oracles import PartitionMatroid
from maskopt.problems import Move, Point, Problem
from maskopt.solvers.base import Watch
from maskopt.solvers.rules import Direction, Step

__all__ = ["frank_wolfe"]


def frank_wolfe(
    objective_at: Callable[[int], Problem],
    masks: PartitionMatroid,
    x: Tensor,
    *,
    direction: Direction,
    step: Step,
    iterations: int,
    watch: Watch,
    progress: tuple[int, int] | None = None,
) -> tuple[Point, int]:
    """Minimise over the convex hull of `masks`, one oracle call and one `Problem.along` per iteration.

    Parameters
    ----------
    objective_at : callable
        The objective of iteration t; shifts of one problem.
    masks : PartitionMatroid
        Offers the oracle.
    x : Tensor
        Start in the hull, shape (rows, d); not changed.
    direction, step
        Rules; where the set couples rows they see sums over rows.
    iterations : int
        How many.
    watch : Watch
        Clock, callback, counters.
    progress : (int, int), optional
        Iterations done before and planned in all, where this call is a part of a longer method.

    Returns
    -------
    point : Point
        The last relaxed mask with its gradient.
    done : int
        Iterations that were run: fewer than planned if `watch` ended them.
    """
    before, planned = progress or (0, iterations)
    objective = objective_at(0)
    point = objective.at(x.clone())
    previous: Move | None = None
    pool = _each if masks.separable else _together
    for iteration in range(iterations):
        if watch.stops(objective, masks, before + iteration, planned, point):
            return point, iteration
        objective = objective_at(iteration)
        gradient = objective.gradient(point)
        move = objective.along(masks.vertex(gradient).sub_(point.x))
        move = direction.choose(objective, move, previous, pool)
        share = step.share(iteration, objective, gradient, move, pool).unsqueeze(1)
        point.advance_(move, share)
        if direction.remembers:
            move.scale_(1.0 - share)
            previous = move
        watch.counters["lmo"] += 1
        watch.counters["products"] += 1
    return point, iterations


def _each(per_row: Tensor) -> Tensor:
    return per_row


def _together(per_row: Tensor) -> Tensor:
    return per_row.sum(dtype=torch.float64).to(per_row.dtype).expand_as(per_row)
