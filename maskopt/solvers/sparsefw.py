"""SparseFW: Frank-Wolfe on the convex relaxation, then rounding."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import PartitionMatroid, Protected
from maskopt.problems import LayerReconstruction, Problem
from maskopt.solvers.base import Outcome, Solver, Status, Watch
from maskopt.solvers.loop import frank_wolfe
from maskopt.solvers.rules import OpenLoopStep, Vanilla
from maskopt.solvers.scores import Wanda

__all__ = ["SparseFW"]


@dataclass(frozen=True)
class SparseFW(Solver):
    """The published recipe (arXiv 2510.13713): open-loop steps from a warm start, top-k rounding at the end.

    With `alpha` = 0 the final relaxed point also proves a lower bound.

    Parameters
    ----------
    iterations : int
        T; the paper uses 2000.
    alpha : float
        Share of each group's kept entries that is fixed to the best scores of `start` beforehand.
    start : Solver
        Greedy solver that warm-starts and, for alpha > 0, ranks the fixed entries: `Wanda()` or `RIA()`.
    """

    iterations: int = 2000
    alpha: float = 0.0
    start: Solver = field(default_factory=Wanda)

    requires: ClassVar[tuple[str, ...]] = ("weight", "gram")
    arrays: ClassVar[float] = 9.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0 or self.iterations < 1:
            raise MaskoptError(
                f"SparseFW needs alpha in [0, 1] and iterations >= 1; got {self.alpha} and {self.iterations}."
            )

    def run(self, problem: Problem, masks: PartitionMatroid, start: Tensor | None, watch: Watch) -> Outcome:
        assert isinstance(problem, LayerReconstruction)
        assert start is not None
        feasible = masks
        if self.alpha > 0:
            fixed = (masks.kept_per_group(problem.shape) * self.alpha + 1e-9).floor().long()
            few = PartitionMatroid(fixed, masks.tile)
            feasible = Protected(masks, self.start.run(problem, few, None, watch).mask & start)
        point, done = frank_wolfe(
            lambda _: problem,
            feasible,
            start.to(problem.dtype),
            direction=Vanilla(),
            step=OpenLoopStep(),
            iterations=self.iterations,
            watch=watch,
        )
        bound = _lower_bound(problem, masks, point.x) if self.alpha == 0 else None
        return Outcome(feasible.round(point.x), Status.COMPLETED, done, bound)


def _lower_bound(problem: LayerReconstruction, masks: PartitionMatroid, x: Tensor) -> Tensor:
    """Return f(x) + min_v <gradient, v - x> in float64, lowered by what a Gram indefinite by rounding could hide.

    Valid for every mask: f is convex up to the Gram's smallest eigenvalue, which `eigenvalue_floor` bounds.
    """
    exact = problem.double()
    point = exact.at(x.double())
    gradient = exact.gradient(point)
    bound = exact.value(point) + (gradient * (masks.lmo(gradient).double() - point.x)).sum(1)
    farthest = torch.maximum(point.x, 1 - point.x)
    bound += exact.eigenvalue_floor() * (exact.scaled_weight * farthest).square().sum(1)
    # Rounding of the sums themselves: d terms, each exact to 2^-53.
    bound -= exact.shape[1] * 2.0**-52 * exact.scale() / exact.unit
    bound = bound.clamp_min(0.0) if masks.separable else bound.sum(0, keepdim=True).clamp_min(0.0)
    assert math.isfinite(float(bound.sum()))
    return bound * exact.unit
