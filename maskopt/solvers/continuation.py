"""Continuation Frank-Wolfe: from the convex relaxation to an objective whose local minima are masks."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, instance_of, real, truth, whole
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction, Point, Problem
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.blocks import better_of, block_errors
from maskopt.solvers.directions import Conjugate
from maskopt.solvers.loop import frank_wolfe
from maskopt.solvers.one_swap import descend
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import RowBlocks
from maskopt.solvers.scores import Wanda
from maskopt.solvers.steps import ExactStep

__all__ = ["ContinuationFrankWolfe"]

_FAR = 0.1  # of the error, that the added term still has where a run was too short
_GAIN = 0.05  # of the error, that twice the iterations have to save


@dataclass(frozen=True)
class ContinuationFrankWolfe(Solver):
    """The default solver: follow the homotopy twice, relink what differs, polish with swaps.

    On masks x_i^2 = x_i, so f_t(x) = f(x) + t sum_i a_i (x_i - x_i^2) with a_i = w_i^2 G_ii equals the error f on
    every mask for every t. At t = 0 it is the convex relaxation; at t = 1 the diagonal is gone and local minima over
    the hull are masks. Frank-Wolfe with conjugate directions and exact steps follows t from 0 to 1 and arrives at a
    mask (almost: it is rounded). Two runs from different starts mostly agree; further, shorter runs from the
    midpoint of a row's two best masks, where only the disputed entries are open, improve on both (path
    relinking). One matrix product per iteration, rows independent, deterministic.

    How many iterations it takes to arrive at a mask depends on the layer: wide and ill-conditioned ones need more. The
    second run, which is the shorter, is made first. With `doublings`, row blocks in which it ends far from a mask start
    again with twice the iterations; where that lowers the error, these are what all runs have. Far means that the added
    term is more than a tenth of the rounded mask's error. Whether a row is far is decided on its way, where float32
    rounds by the number of rows that are solved together; so a memory limit may then change the mask of a row, which it
    does not otherwise.

    Parameters
    ----------
    iterations : int
        Of the first run.
    doublings : int
        How many times they are doubled at most, where a row block does not arrive; 0: never.
    second : float
        Length of the second run, from halfway between the center of the hull and the mask of `start`, as a fraction of
        `iterations`; 0 skips it and the relinking.
    relinks : int
        Relinking runs.
    relink : float
        Length of each, as a fraction of `iterations`.
    polish : bool
        Swap to a 1-swap optimum at the end.
    start : Solver
        Makes the mask the second run starts from.

    References
    ----------
    The conjugate directions are those of Mitradjieva and Lindberg, Transportation Science 47(2), 2013; continuation
    from a convex to a concave relaxation follows Zaslavskiy, Bach and Vert, "A path following algorithm for the graph
    matching problem", IEEE TPAMI 31(12), 2009; path relinking Glover, Laguna and Marti, Control and Cybernetics 29(3),
    2000.

    Examples
    --------
    >>> import maskopt
    >>> layer, masks = maskopt.synthetic(rows=4, d=16).problem(), maskopt.PerRow(0.5)
    >>> default = maskopt.solve(layer, masks, maskopt.ContinuationFrankWolfe())
    >>> default.total <= maskopt.solve(layer, masks, maskopt.Wanda()).total
    True
    """

    iterations: int = 200
    doublings: int = 0
    second: float = 0.5
    relinks: int = 2
    relink: float = 0.3
    polish: bool = True
    start: Solver = field(default_factory=Wanda)

    requires: ClassVar[Requirements] = Requirements(problem=(LayerReconstruction,))
    needs_start: ClassVar[bool] = True
    arrays: ClassVar[float] = 24.0
    corrects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(
            self,
            iterations=whole(1),
            doublings=whole(0, 16),
            second=real(0, 1),
            relinks=whole(0),
            relink=real(0, 1),
            polish=truth(),
            start=instance_of(Solver, example="Wanda()"),
        )

    def run(self, problem: LayerReconstruction, masks: MaskSet, start: Tensor, monitor: Monitor) -> Outcome:
        return _Run(self, problem, masks, start, monitor).outcome()


class _Run:
    """One solve: the state that its stages have in common."""

    def __init__(
        self,
        settings: ContinuationFrankWolfe,
        problem: LayerReconstruction,
        masks: MaskSet,
        start: Tensor,
        monitor: Monitor,
    ) -> None:
        self.settings, self.problem, self.masks, self.start, self.monitor = settings, problem, masks, start, monitor
        self.diagonal = problem.diagonal()
        self.first = settings.iterations
        self.second = round(settings.second * settings.iterations)
        self.relinking = settings.relinks * max(1, round(settings.relink * settings.iterations))
        self.planned = self.planned_at_once = self.first + (self.second + self.relinking if self.second else 0)
        self.done = 0
        self.paces: list[tuple[Tensor | None, int]] = []
        """Rows, all of them if None, and how many times the iterations they need."""

    def outcome(self) -> Outcome:
        masks = self.masks
        mask = self.coupled(masks) if isinstance(masks, PartitionMatroid) and not masks.separable else self.separable()
        # Stopped early, or on tiny layers, the start may be the better one.
        mask, _ = better_of(self.problem, self.masks, mask, self.start)
        status = Status.COMPLETED
        if self.settings.polish and isinstance(self.masks, PartitionMatroid):
            mask, _, optimal = descend(self.problem, self.masks, mask, self.monitor, proven=True)
            status = Status.LOCAL_OPTIMUM if optimal else status
        return Outcome(mask, status, self.done, source="polish" if self.settings.polish else "solver")

    def separable(self) -> Tensor:
        """Follow the homotopy from the center and from halfway to the start, then relink."""
        center = self.center(self.masks)
        if not self.second:
            return self.paced(self.masks, center, self.first)
        # The shorter run comes first: where even that arrives, the longer one has iterations to spare.
        other = self.paced(self.masks, torch.lerp(center, self.start.to(center.dtype), 0.5), self.second)
        return self.relink(self.masks, self.homotopy(self.masks, center, self.first), other)

    def coupled(self, masks: PartitionMatroid) -> Tensor:
        """Find how many entries each row keeps, then solve with these counts.

        One step length for all rows stalls on ill-conditioned layers, steps of their own need fixed counts. Three
        candidates for the counts: all rows together (good where that does not stall), the counts of the start, and
        even ones (so that the result is no worse than that of the same set per row).
        """
        problem = self.problem
        self.planned = self.planned_at_once = 4 * self.first + self.relinking
        candidates = [self.paced(masks, self.center(masks), self.first)]
        for rowwise in (masks.rowwise(problem.shape, self.start), masks.rowwise(problem.shape)):
            candidates.append(self.paced(rowwise, self.center(rowwise), self.first))
        best = min(candidates, key=lambda mask: float(problem.objective(mask).sum()))
        if not self.second:
            return best
        best, _, _ = descend(problem, masks, best, self.monitor)
        rowwise = masks.rowwise(problem.shape, best)
        return self.relink(rowwise, best, self.paced(rowwise, self.center(rowwise), self.first))

    def relink(self, masks: MaskSet, one: Tensor, two: Tensor) -> Tensor:
        """Follow the homotopy from the midpoint of each row's two masks; the result replaces the worse of them."""
        best, other = better_of(self.problem, masks, one, two)
        for _ in range(self.settings.relinks):
            if self.monitor.ended is not None:
                break
            midpoint = torch.lerp(best.to(self.problem.dtype), other.to(self.problem.dtype), 0.5)
            child = self.homotopy(masks, midpoint, self.relinking // self.settings.relinks, since=0.3, power=1.0)
            best, other = better_of(self.problem, masks, best, child)
        return best

    def center(self, masks: MaskSet) -> Tensor:
        return masks.center(self.problem.shape, self.problem.dtype, self.problem.device)

    def paced(self, masks: MaskSet, x: Tensor, iterations: int) -> Tensor:
        """Follow the homotopy, again with twice the iterations in row blocks that do not arrive, and round."""
        self.paces, blocks = [(None, 1)], RowBlocks.of(self.problem, masks)
        arrived = self.follow(masks, x, iterations, None).x
        found = masks.round(arrived)
        if self.settings.doublings == 0:
            return found
        error = block_errors(self.problem, masks, found)
        factor, factors = 1, torch.ones_like(error, dtype=torch.int64)
        running = self.far_from(blocks, arrived, error)
        while factor < 2**self.settings.doublings and self.monitor.ended is None and bool(running.any()):
            factor *= 2
            self.planned += factor * self.planned_at_once
            rows = blocks.spread(running)
            start = torch.where(rows.unsqueeze(1), x, found.to(x.dtype))
            arrived = self.follow(masks, start, factor * iterations, _numbers(rows)).x
            mask = masks.round(arrived)
            again = block_errors(self.problem, masks, mask)
            # What stays between two masks of like errors however slowly it goes gains nothing from that.
            running &= again < (1.0 - _GAIN) * error
            factors.masked_fill_(running, factor)
            found = torch.where(blocks.spread(again < error).unsqueeze(1), mask, found)
            error = torch.minimum(error, again)
            running &= self.far_from(blocks, arrived, error)
        factors = blocks.spread(factors)
        self.paces = [(_numbers(factors == factor), factor) for factor in sorted(set(factors.tolist()))]
        return found

    def far_from(self, blocks: RowBlocks, x: Tensor, error: Tensor) -> Tensor:
        """Return the row blocks in which x is far from any mask, boolean; `error` is that of the rounded one."""
        added = blocks.total((self.diagonal * (x - x * x)).sum(1, dtype=torch.float64))
        return added * self.problem.unit > _FAR * error

    def homotopy(self, masks: MaskSet, x: Tensor, iterations: int, since: float = 0.0, power: float = 1.5) -> Tensor:
        """Follow t from `since` to 1, as much slower as the first run showed for each row block, and round."""
        for rows, factor in self.paces:
            if self.monitor.ended is None:
                x = self.follow(masks, x, factor * iterations, rows, since, power).x
        return masks.round(x)

    def follow(
        self,
        masks: MaskSet,
        x: Tensor,
        iterations: int,
        rows: Tensor | None,
        since: float = 0.0,
        power: float = 1.5,
    ) -> Point:
        """Return where some rows, or all, end that follow t from `since` to 1; others stay."""

        def shifted(iteration: int) -> Problem:
            t = since + (1.0 - since) * ((iteration + 1) / iterations) ** power
            return self.problem.shifted(self.diagonal, t)

        loop_result = frank_wolfe(
            shifted,
            masks,
            x,
            direction=Conjugate(),
            step=ExactStep(),
            iterations=iterations,
            monitor=self.monitor,
            progress=(self.done, self.planned),
            rows=rows,
        )
        self.done += loop_result.iterations
        return loop_result.point


def _numbers(rows: Tensor) -> Tensor | None:
    """Return the numbers of the rows chosen, or None for all of them."""
    return None if bool(rows.all()) else rows.nonzero().flatten()
