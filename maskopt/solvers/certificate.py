"""What one relaxed point proves: the dual bound there, evaluated in float64 with a true oracle call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Problem
from maskopt.solvers.rules import RowBlocks

__all__ = ["DualBound", "dual_bound"]


@dataclass(frozen=True)
class DualBound:
    """Figures of a relaxed point, float64, one per row block, in full rather than in the problem's unit.

    Attributes
    ----------
    value : Tensor
        Of the objective at the point.
    gap : Tensor
        Frank-Wolfe gap max over masks of <gradient, x - m>, not less than it.
    bound : Tensor or None
        No mask of the set has a smaller objective; None where convexity is not known.
    vertex : Tensor
        The oracle's mask, boolean, shape (rows, d).
    gradient : Tensor
        Of the objective at the point, in the problem's unit, shape (rows, d).
    """

    value: Tensor
    gap: Tensor
    bound: Tensor | None
    vertex: Tensor
    gradient: Tensor


def dual_bound(objective: Problem, masks: MaskSet, row_blocks: RowBlocks, x: Tensor) -> DualBound:
    """Return what the relaxed mask `x`, shape (rows, d), proves about all masks.

    f(m) >= f(x) + <gradient, m - x> - error holds for every mask m if f lies at most `convexity_error` below its linear
    models; the oracle minimises the right-hand side over m.

    Parameters
    ----------
    objective : Problem
        Made by `double`.
    masks : MaskSet
        Any superset of the set `x` was found with will do.
    row_blocks : RowBlocks
    x : Tensor
        Float64.
    """
    point = objective.evaluate(x)
    gradient = objective.gradient(point)
    vertex = masks.lmo(gradient)
    reach = row_blocks.total((gradient * (vertex - x)).sum(1))
    if not masks.exact:
        minimum = masks.lmo_bound(gradient).view(len(reach), -1).sum(1) - row_blocks.total((gradient * x).sum(1))
        reach = torch.minimum(reach, minimum)
    value, convexity_error = row_blocks.total(objective.value(point)), objective.convexity_error(point)
    bound: Tensor | None = None
    if convexity_error is not None:
        bound = ((value + reach - row_blocks.total(convexity_error)) * objective.unit).clamp_min(objective.lowest)
        # A point that is no number proves nothing.
        bound = torch.where(bound.isnan(), -torch.inf, bound)
    return DualBound(value * objective.unit, -reach * objective.unit, bound, vertex.bool(), gradient)
