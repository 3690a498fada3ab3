"""Continuation Frank-Wolfe: from the convex relaxation to an objective whose local minima are masks."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import PartitionMatroid
from maskopt.problems import LayerReconstruction, Problem
from maskopt.solvers.base import Outcome, Solver, Status, Watch
from maskopt.solvers.loop import frank_wolfe
from maskopt.solvers.one_swap import descend
from maskopt.solvers.rules import Conjugate, ExactStep
from maskopt.solvers.scores import Wanda

__all__ = ["ContinuationFrankWolfe"]


@dataclass(frozen=True)
class ContinuationFrankWolfe(Solver):
    """The default solver: anneal twice, relink what differs, polish with swaps.

    On masks x_i^2 = x_i, so f_t(x) = f(x) + t sum_i a_i (x_i - x_i^2) with a_i = w_i^2 G_ii equals the error f on
    every mask for every t. At t = 0 it is the convex relaxation; at t = 1 the diagonal is gone and local minima over
    the hull are masks. Frank-Wolfe with conjugate directions and exact steps follows t from 0 to 1 and arrives at a
    mask (almost: it is rounded). Two runs from different starts mostly agree; further, shorter runs from the
    midpoint of a row's two best masks, where only the disputed entries are open, improve on both (path
    relinking). One matrix product per iteration, rows independent, deterministic.

    Parameters
    ----------
    iterations : int
        Of the first run.
    second : float
        Length of the second run, from halfway between the center of the hull and the mask of `start`, as a share of
        `iterations`; 0 skips it and the relinking.
    relinks : int
        Relinking runs.
    relink : float
        Length of each, as a share of `iterations`.
    polish : bool
        Swap to a 1-swap optimum at the end.
    start : Solver
        Makes the mask the second run starts from.
    """

    iterations: int = 200
    second: float = 0.5
    relinks: int = 2
    relink: float = 0.3
    polish: bool = True
    start: Solver = field(default_factory=Wanda)

    requires: ClassVar[tuple[str, ...]] = ("weight", "gram")
    arrays: ClassVar[float] = 24.0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.relinks < 0 or not 0 <= self.second <= 1 or not 0 <= self.relink <= 1:
            raise MaskoptError(
                "ContinuationFrankWolfe needs iterations >= 1, relinks >= 0, and second and relink in [0, 1]; got "
                f"{self.iterations}, {self.relinks}, {self.second}, {self.relink}."
            )

    def run(self, problem: Problem, masks: PartitionMatroid, start: Tensor | None, watch: Watch) -> Outcome:
        assert isinstance(problem, LayerReconstruction)
        assert start is not None
        return _Run(self, problem, masks, start, watch).outcome()


class _Run:
    """One solve: the state the stages share."""

    def __init__(
        self,
        settings: ContinuationFrankWolfe,
        problem: LayerReconstruction,
        masks: PartitionMatroid,
        start: Tensor,
        watch: Watch,
    ) -> None:
        self.settings, self.problem, self.masks, self.start, self.watch = settings, problem, masks, start, watch
        self.diagonal = problem.diagonal()
        self.second = round(settings.second * settings.iterations)
        self.relink = max(1, round(settings.relink * settings.iterations))
        self.planned = settings.iterations
        if self.second:
            self.planned += self.second + settings.relinks * self.relink
        self.done = 0
        self.optimal = False

    def outcome(self) -> Outcome:
        mask = self._best_mask()
        status = Status.LOCAL_OPTIMUM if self.optimal else Status.COMPLETED
        return Outcome(mask, status, self.done)

    def _best_mask(self) -> Tensor:
        problem, masks = self.problem, self.masks
        center = masks.center(problem.shape, problem.dtype, problem.device)
        best = self.anneal(center, self.settings.iterations, power=1.5)
        if self.second and self.watch.ended is None:
            halfway = torch.lerp(center, self.start.to(center.dtype), 0.5)
            other = self.anneal(halfway, self.second, power=1.5)
            best, other = self.ordered(best, other)
            for _ in range(self.settings.relinks):
                if self.watch.ended is not None:
                    break
                midpoint = torch.lerp(best.to(center.dtype), other.to(center.dtype), 0.5)
                child = self.anneal(midpoint, self.relink, since=0.3)
                # The better parent stays; the child takes the other's place.
                best, other = self.ordered(best, child)
        return self.descend(best)

    def anneal(self, x: Tensor, iterations: int, since: float = 0.0, power: float = 1.0) -> Tensor:
        """Follow t from `since` to 1 and round."""

        def shifted(iteration: int) -> Problem:
            t = since + (1.0 - since) * ((iteration + 1) / iterations) ** power
            return self.problem.shifted(self.diagonal, t)

        point = frank_wolfe(
            shifted,
            self.masks,
            x,
            direction=Conjugate(),
            step=ExactStep(),
            iterations=iterations,
            watch=self.watch,
            progress=(self.done, self.planned),
        )
        self.done += iterations
        return self.masks.round(point.x)

    def descend(self, mask: Tensor) -> Tensor:
        if not self.settings.polish:
            return mask
        mask, _, self.optimal = descend(self.problem, self.masks, mask, self.watch)
        return mask

    def ordered(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        """Return the better and the worse mask of every row."""
        swap = (self.problem.objective(two) < self.problem.objective(one)).unsqueeze(1)
        return torch.where(swap, two, one), torch.where(swap, one, two)
