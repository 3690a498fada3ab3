"""Branch and bound with Frank-Wolfe relaxations: the best mask, with a proof."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, instance_of, real, whole
from maskopt.exact import WIDEST
from maskopt.oracles import PartitionMatroid, Restricted
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.certificate import dual_bound
from maskopt.solvers.continuation import ContinuationFrankWolfe
from maskopt.solvers.directions import Conjugate
from maskopt.solvers.fixing import fixable
from maskopt.solvers.loop import frank_wolfe
from maskopt.solvers.nodes import Nodes, Relaxation, always_kept
from maskopt.solvers.one_swap import descend
from maskopt.solvers.outcome import weakest
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import RowBlocks
from maskopt.solvers.steps import ExactStep

__all__ = ["BranchAndBound", "NodeLog"]


_NEAR = 0.2  # of what is between a node's bound and the incumbent
_NOTICED = 0.25  # of the gap: more rounding than this is worth another beginning
_DOUBTS = 20_000  # nodes that are branched on although nothing but rounding keeps them


@dataclass(frozen=True)
class NodeLog:
    """Where the search of one row block stands.

    Attributes
    ----------
    row_block : int
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
        A row block is done when bound and incumbent differ by this fraction of the incumbent. Where the data's scales
        differ so much that float64 cannot tell, the bound that is proven is returned with status COMPLETED.
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
        worst = weakest(statuses)
        proven = torch.tensor(bounds, dtype=torch.float64, device=problem.device)
        return Outcome(torch.cat(best), worst, total, proven, source="node")


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
        self.mask, self.full = start, self._evaluated(start)
        self.solved, self.began, self.doubts = 0, time.perf_counter(), 0
        protected = torch.zeros_like(start) if masks.protected is None else masks.protected.to(start.device)
        self.kept = always_kept(problem, protected, start, self.full)
        self.bound = 0.0
        self._begin()

    def _begin(self) -> None:
        """Start at the root, with what is known to be kept."""
        self.relaxation = Relaxation.of(self.problem, self.masks, self.mask, self.kept)
        self.nodes = Nodes.root(self.masks, self.problem, self.kept, self.relaxation.known)
        self.aside = math.inf  # smallest bound of nodes that rounding leaves undecided
        self.began_with = self.full

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
            self._reduce()
        # With no node left nothing is better than the incumbent, but for what counted as equal.
        self.bound = self._proven(self._target())
        self._report()
        error = float(self.problem.objective(self.mask).sum())
        if status is Status.OPTIMAL and not error - self.bound <= self.settings.gap * error:
            status = Status.COMPLETED  # rounding hides what is left
        return status

    @property
    def error(self) -> float:
        """Error of the incumbent in the unit of the relaxation."""
        return self.relaxation.in_unit(self.full, self.problem)

    def _evaluated(self, mask: Tensor) -> float:
        """Return the error of a mask of the row block, in full, without rounding where that can be had."""
        if self.problem.shape[1] > WIDEST:
            return float(self.problem.objective(mask).sum())
        exact = sum(self.problem.exact_objective(mask), Fraction(0))
        error = float(exact)
        return error if Fraction(error) <= exact else math.nextafter(error, 0.0)

    def _target(self) -> float:
        """Return the bound from which on a node holds nothing that counts as better."""
        # A little less than the gap, for the rounding of these lines.
        gap = max(0.0, self.settings.gap * (1.0 - 2.0**-10) - 2.0**-50)
        return self.error * (1.0 - gap)

    def _reduce(self) -> None:
        """Begin anew where the incumbent has become so good that rounding hides what is better.

        Then entries may be known to be kept that were not, without which everything is smaller.
        """
        if self.full >= self.began_with or self.relaxation.lost <= _NOTICED * self.settings.gap * self.error:
            return
        self.began_with = self.full
        kept = always_kept(self.problem, self.kept, self.mask, self.full)
        if bool((kept & ~self.kept).any()):
            self.kept = kept
            self._begin()

    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    def _proven(self, most: float) -> float:
        """Return the bound proven by the nodes that are left, in full; at most `most`, in the relaxation's unit."""
        waiting = float(self.nodes.bound.min()) if len(self.nodes) else math.inf
        bound = self.relaxation.in_full(min(self.aside, waiting, most), self.problem)
        return max(0.0, min(bound, self.full))

    def _report(self) -> None:
        if self.settings.log is not None:
            self.settings.log(
                NodeLog(
                    self.number,
                    self._seconds(),
                    self.solved,
                    len(self.nodes),
                    self._proven(self.error),
                    self.full,
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
        # Exchanges raise the bound of this linear model, not one that was inherited; gradients are rounded, too.
        slack = (self._target() - here.bound + self.relaxation.lost).repeat_interleave(shape[1])
        keep, prune = fixable(stacked, here.gradient, here.vertex, masks, slack)
        nodes.kept |= keep.view(shape)
        nodes.pruned |= prune.view(shape)
        nodes.bound, nodes.x = bound, x.view(shape)
        nodes = nodes.take((bound < self._target()) & self._possible(nodes))
        nodes = nodes.take(~self._decided(nodes))
        nodes = nodes.take(self._worthwhile(nodes))
        if len(nodes):
            self.nodes = self.nodes.joined(self._branched(nodes))
        self.nodes = self.nodes.take(self.nodes.bound < self._target())

    def _decided(self, nodes: Nodes) -> Tensor:
        """Return which nodes hold one mask only; these are evaluated without rounding."""
        whole = (nodes.kept | nodes.pruned).flatten(1).all(1)
        for mask in nodes.kept[whole]:
            self._compare(mask)
        return whole

    def _worthwhile(self, nodes: Nodes) -> Tensor:
        """Return which nodes to branch on; others lie within rounding of the target, and there are too many of them."""
        doubtful = nodes.bound + 2.0 * self.relaxation.lost >= self._target()
        self.doubts += int(doubtful.sum())
        if self.doubts <= _DOUBTS or not bool(doubtful.any()):
            return torch.ones_like(doubtful)
        self.aside = min(self.aside, float(nodes.bound[doubtful].min()))
        return ~doubtful

    def _compare(self, mask: Tensor) -> None:
        """Take a mask, shape (rows, d), if it is better than the incumbent."""
        full = self._evaluated(mask)
        if full < self.full:
            self.mask, self.full = mask, full

    def _offer(self, masks: Tensor) -> None:
        """Take the best of some masks, shape (number, rows, d), if it is better than the incumbent; swap it further."""
        errors = self.relaxation.error(masks)
        best = int(errors.argmin())
        if errors[best] >= self.error:
            return
        polished, _, _ = descend(self.problem, self.masks, masks[best], Monitor("polish", None, None))
        self._compare(masks[best])
        self._compare(polished)

    def _possible(self, nodes: Nodes) -> Tensor:
        """Return which nodes still hold a mask, boolean, shape (nodes,)."""
        if len(nodes) == 0:
            return torch.ones(0, dtype=torch.bool, device=nodes.bound.device)
        stacked = stack(self.masks, self.problem.shape, len(nodes))
        keep = stacked.kept_per_group((len(nodes) * self.problem.shape[0], self.problem.shape[1])).to(nodes.kept.device)
        held = stacked.groups(nodes.kept.flatten(0, 1))
        kept, size = held.sum(1), held.shape[1]
        pruned = stacked.groups(nodes.pruned.flatten(0, 1)).sum(1)
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
        score = torch.where(free, alone, -math.inf).flatten(1)
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
