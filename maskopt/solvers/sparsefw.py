"""SparseFW: Frank-Wolfe on the convex relaxation, then rounding."""

from dataclasses import dataclass, field
from typing import ClassVar, cast

from torch import Tensor

from maskopt.checks import check_settings, instance_of, real, whole
from maskopt.oracles import MaskSet, PartitionMatroid, Protected
from maskopt.problems import Problem
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.certificate import dual_bound
from maskopt.solvers.directions import Vanilla
from maskopt.solvers.loop import frank_wolfe
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import RowBlocks
from maskopt.solvers.scores import Wanda
from maskopt.solvers.steps import OpenLoopStep

__all__ = ["SparseFW"]


@dataclass(frozen=True)
class SparseFW(Solver):
    """The published recipe (arXiv 2510.13713): open-loop steps from a warm start, top-k rounding at the end.

    The final relaxed point also proves a lower bound where the objective is convex.

    Parameters
    ----------
    iterations : int
        T; the paper uses 2000.
    alpha : float
        Fraction of each group's kept entries that is fixed to the best scores of `start` beforehand.
    start : Solver
        Greedy solver that warm-starts and, for alpha > 0, ranks the fixed entries: `Wanda()` or `RIA()`.
    """

    iterations: int = 2000
    alpha: float = 0.0
    start: Solver = field(default_factory=Wanda)

    needs_start: ClassVar[bool] = True
    relaxes: ClassVar[bool] = True
    proves: ClassVar[bool] = True
    arrays: ClassVar[float] = 9.0

    def __post_init__(self) -> None:
        check_settings(self, iterations=whole(1), alpha=real(0, 1), start=instance_of(Solver, example="Wanda()"))

    @property
    def requirements(self) -> Requirements:
        # alpha > 0 fixes a fraction of each group.
        return Requirements((), (PartitionMatroid,)) if self.alpha > 0 else self.requires

    def run(self, problem: Problem, masks: MaskSet, start: Tensor, monitor: Monitor) -> Outcome:
        feasible = masks
        if self.alpha > 0:
            feasible = self._fixed(problem, cast(PartitionMatroid, masks), start, monitor)
        loop_result = frank_wolfe(
            lambda _: problem,
            feasible,
            start.to(problem.dtype),
            direction=Vanilla(),
            step=OpenLoopStep(),
            iterations=self.iterations,
            monitor=monitor,
        )
        exact = problem.double()
        proof = dual_bound(exact, masks, RowBlocks.of(problem, masks), loop_result.point.x.to(exact.dtype))
        return Outcome(
            feasible.round(loop_result.point.x), Status.COMPLETED, loop_result.iterations, proof.bound, source="round"
        )

    def _fixed(self, problem: Problem, masks: PartitionMatroid, start: Tensor, monitor: Monitor) -> MaskSet:
        """Return the masks that keep the best-scored fraction of each group."""
        fixed = (masks.kept_per_group(problem.shape) * self.alpha + 1e-9).floor().long()
        few = PartitionMatroid(fixed, masks.tile)
        return Protected(masks, self.start.run(problem.unshifted(), few, None, monitor).mask & start)
