"""Branch and bound with Frank-Wolfe relaxations: the best mask, with a proof."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, instance_of, real, whole
from maskopt.oracles import PartitionMatroid, Restricted
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.certificate import dual_bound
from maskopt.solvers.continuation import ContinuationFrankWolfe
from maskopt.solvers.directions import Conjugate
from maskopt.solvers.fixing import fixable
from maskopt.solvers.loop import frank_wolfe
from maskopt.solvers.nodes import Nodes, Relaxation
from maskopt.solvers.one_swap import descend
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import RowBlocks
from maskopt.solvers.steps import ExactStep

__all__ = ["BranchAndBound", "NodeLog"]


_NEAR = 0.2  # of what is between a node's bound and the incumbent


@dataclass(frozen=True)
class NodeLog:
    """Where the search of one row block stands.

    Attributes
    ----------
    row block : int
        Number of the row block in the block.
    seconds : float
        Since its search began.
    nodes : int
        Relaxations solved.
    waiting : int
        Nodes left.
    bound, incumbent : float
        Proven lower bound and error of the best mask.
    """

    row_block: int
    seconds: float
    nodes: int
    waiting: int
    bound: float
    incumbent: float

    @property
    def gap(self) -> float:
        """Fraction of the incumbent's error that is not proven."""
        return (self.incumbent - self.bound) / self.incumbent if self.incumbent > 0 else 0.0


@dataclass(frozen=True)
class BranchAndBound(Solver):
    """Prove the best mask of each row block, or a bound in the time there is.

    Boscia's idea (Hendrych, Troppens, Besançon and Pokutta, arXiv 2208.11010), specialised to partition matroids: the
    relaxation of a node is a convex quadratic over the hull of the masks that are left, which is a restricted matroid,
    and Frank-Wolfe on it gives a valid bound whenever it is stopped. What makes it fast is the objective: the diagonal
    is shifted to the linear part as far as convexity allows (the row-wise shift of the semidefinite bound), which
    changes no mask's value and brings relaxations near the truth. Nodes are solved in batches, as rows of one
    problem; gradients fix entries (`fixing.fixable`); rounded points and vertices are candidates; the entry branched on
    is the one that alone costs most.

    Parameters
    ----------
    gap : float
        A row block is done when bound and incumbent differ by this fraction of the incumbent.
    row_block_seconds : float, optional
        Time for each row block; `solve`'s limit is for all of them.
    nodes : int, optional
        For each row block.
    batch : int
        Nodes solved at once.
    iterations : int
        Of Frank-Wolfe on each node.
    start : Solver
        Makes the first incumbent.
    log : callable, optional
        Called with a `NodeLog` after every batch.
    """

    gap: float = 1e-9
    row_block_seconds: float | None = None
    nodes: int | None = None
    batch: int = 2048
    iterations: int = 30
    start: Solver = field(default_factory=ContinuationFrankWolfe)
    log: Callable[[NodeLog], None] | None = field(default=None, repr=False, compare=False)

    requires: ClassVar[Requirements] = Requirements((LayerReconstruction,), (PartitionMatroid,))
    needs_start: ClassVar[bool] = True
    blockwise: ClassVar[bool] = True
    proves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(
            self,
            gap=real(0, infinite=True),
            row_block_seconds=real(0, above=True, infinite=True, optional=True),
            nodes=whole(1, optional=True),
            batch=whole(1, 2**20),
            iterations=whole(1),
            start=instance_of(Solver, example="ContinuationFrankWolfe()"),
            log=instance_of(Callable, example="print", optional=True),  # type: ignore[arg-type]
        )

    def run(self, problem: LayerReconstruction, masks: PartitionMatroid, start: Tensor, monitor: Monitor) -> Outcome:
        height = masks.row_block(problem.shape)
        best, bounds, total = [], [], 0
        statuses = []
        for number in range(problem.shape[0] // height):
            rows = slice(number * height, (number + 1) * height)
            search = _Search(self, problem.rows(rows), masks.rows(rows, problem.shape), start[rows], monitor, number)
            statuses.append(search.run())
            best.append(search.mask)
            bounds.append(search.bound)
            total += search.solved
        worst = max(statuses, key=list(Status).index)
        return Outcome(torch.cat(best), worst, total, torch.stack(bounds) * problem.unit, source="node")


class _Search:
    """The search of one row block."""

    def __init__(
        self,
        settings: BranchAndBound,
        problem: LayerReconstruction,
        masks: PartitionMatroid,
        start: Tensor,
        monitor: Monitor,
        number: int,
    ) -> None:
        self.settings, self.problem, self.masks, self.monitor, self.number = settings, problem, masks, monitor, number
        self.relaxation = Relaxation.of(problem, masks, start)
        self.mask, self.error = start, self.relaxation.error(start.unsqueeze(0))[0]
        self.solved, self.began = 0, time.perf_counter()
        self.nodes = Nodes.root(masks, problem, self.relaxation.known)
        self.bound = torch.zeros((), dtype=torch.float64, device=problem.device)

    def run(self) -> Status:
        """Search until proven or stopped; `mask` and `bound` say what is known then."""
        status = Status.OPTIMAL
        while len(self.nodes):
            self._report()
            if self.monitor.stops(self.problem, self.masks, self.solved, self.solved + len(self.nodes), mask=self.mask):
                status = Status.TIME_LIMIT
                break
            if self.settings.row_block_seconds is not None and self._seconds() > self.settings.row_block_seconds:
                status = Status.TIME_LIMIT
                break
            if self.settings.nodes is not None and self.solved >= self.settings.nodes:
                status = Status.ITERATION_LIMIT
                break
            self._step(self.nodes.pop(self.settings.batch))
        # With no node left nothing is better than the incumbent, but for what counted as equal.
        minimum = self.nodes.bound.min() if len(self.nodes) else self._target()
        self.bound = torch.minimum(minimum, self._target()).clamp_min(0.0)
        self._report()
        return status

    def _target(self) -> Tensor:
        """Return the bound above which a node holds nothing that counts as better."""
        return self.error * (1.0 - self.settings.gap) - self.relaxation.lost

    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    def _report(self) -> None:
        if self.settings.log is not None:
            unit = self.problem.unit
            bound = min(self.nodes.bound.min(), self.error) if len(self.nodes) else self.error
            self.settings.log(
                NodeLog(
                    self.number,
                    self._seconds(),
                    self.solved,
                    len(self.nodes),
                    max(0.0, float(bound)) * unit,
                    float(self.error) * unit,
                )
            )

    def _step(self, nodes: Nodes) -> None:
        """Bound a batch of nodes, fix what can be fixed, and branch on what is left."""
        self.solved += len(nodes)
        self.monitor.counters["nodes"] += len(nodes)
        relaxation = self.relaxation.repeated(len(nodes))
        stacked = stack(self.masks, self.problem.shape, len(nodes))
        masks = Restricted(stacked, nodes.kept.flatten(0, 1), nodes.pruned.flatten(0, 1))
        # Once a node's bound is this near its value it either falls or will have to be branched on anyway.
        enough = _NEAR * (self.error - nodes.bound.clamp_min(0.0)).clamp_min(1e-12 * self.error)
        x = masks.project(nodes.x.flatten(0, 1))
        loop_result = frank_wolfe(
            lambda _: relaxation,
            masks,
            x,
            direction=Conjugate(),
            step=ExactStep(),
            iterations=self.settings.iterations,
            monitor=Monitor("node", None, None),
            tolerance=enough.repeat_interleave(nodes.kept.shape[1]),
        )
        x, shape = loop_result.point.x, nodes.kept.shape
        here = dual_bound(relaxation, masks, RowBlocks(shape[1]), x)
        assert here.bound is not None
        bound = torch.maximum(here.bound, nodes.bound)
        self._offer(masks.round(x).view(shape))
        self._offer(here.vertex.view(shape))
        target = self._target()
        # Exchanges raise the bound of this linear model, not one that was inherited.
        slack = (target - here.bound).repeat_interleave(shape[1])
        keep, prune = fixable(stacked, here.gradient, here.vertex, masks, slack)
        nodes.kept |= keep.view(shape)
        nodes.pruned |= prune.view(shape)
        nodes.bound, nodes.x = bound, x.view(shape)
        alive = bound <= target
        alive &= self._possible(nodes)
        nodes = nodes.take(alive)
        if len(nodes):
            self.nodes = self.nodes.joined(self._branched(nodes))
        self.nodes = self.nodes.take(self.nodes.bound <= self._target())

    def _offer(self, masks: Tensor) -> None:
        """Take the best of some masks, shape (number, rows, d), if it is better than the incumbent; swap it further."""
        errors = self.relaxation.error(masks)
        best = int(errors.argmin())
        if errors[best] >= self.error:
            return
        polished, _, _ = descend(self.problem, self.masks, masks[best], Monitor("polish", None, None))
        both = torch.stack((masks[best], polished))
        errors = self.relaxation.error(both)
        self.mask, self.error = both[int(errors.argmin())], errors.min()

    def _possible(self, nodes: Nodes) -> Tensor:
        """Return which nodes still hold a mask, boolean, shape (nodes,)."""
        if len(nodes) == 0:
            return torch.ones(0, dtype=torch.bool, device=nodes.bound.device)
        stacked = stack(self.masks, self.problem.shape, len(nodes))
        keep = stacked.kept_per_group((len(nodes) * self.problem.shape[0], self.problem.shape[1])).to(nodes.kept.device)
        kept = stacked.groups(nodes.kept.flatten(0, 1)).sum(1)
        pruned = stacked.groups(nodes.pruned.flatten(0, 1)).sum(1)
        size = stacked.groups(nodes.x.flatten(0, 1)).shape[1]
        fits = kept <= keep
        if not self.masks.at_most:
            fits &= pruned <= size - keep
        return fits.view(len(nodes), -1).all(1) & ~(nodes.kept & nodes.pruned).flatten(1).any(1)

    def _branched(self, nodes: Nodes) -> Nodes:
        """Return both children of every node; a node with nothing left to decide has none."""
        free = ~(nodes.kept | nodes.pruned)
        # Deciding the entry that alone costs most changes the relaxation most: on layers this needs a tenth of the
        # nodes that the most fractional entry does.
        alone = self.relaxation.forms.diagonal(dim1=1, dim2=2)
        score = torch.where(free, alone, -1.0).flatten(1)
        open_ = free.flatten(1).any(1)
        entry = score.argmax(1)
        kept, pruned = nodes.copied(), nodes.copied()
        number = torch.arange(len(nodes), device=entry.device)
        kept.kept.flatten(1)[number, entry] = True
        pruned.pruned.flatten(1)[number, entry] = True
        kept, pruned = kept.take(open_), pruned.take(open_)
        children = kept.joined(pruned)
        return children.take(self._possible(children))


def stack(masks: PartitionMatroid, shape: tuple[int, int], number: int) -> PartitionMatroid:
    """Return the set of `number` copies of a weight, one above the other, without fixed entries."""
    keep = masks.keep.repeat(number) if isinstance(masks.keep, Tensor) else masks.keep
    return PartitionMatroid(keep, masks.tile_of(shape), masks.name, at_most=masks.at_most)
