"""SparseGPT: prune from the first input to the last; the weights of later inputs compensate each loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, whole
from maskopt.oracles import PartitionMatroid
from maskopt.oracles.base import Shape
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Status
from maskopt.solvers.requirements import Requirements
from maskopt.threads import factor_threads
from maskopt.weights.base import Factor, Factored, System
from maskopt.weights.least_squares import definite_factor

__all__ = ["SparseGPT"]


@dataclass(frozen=True)
class SparseGPT(Factored):
    """One pass over the inputs: prune where it costs least, update the weights of all later inputs.

    With U^T U = H^-1, U upper triangular, removing w_j costs w_j^2 / U_jj^2 when weights of inputs before j stay as
    they are; the best update of the later ones is w - w_j / U_jj * U_j.

    Entries are chosen when the pass reaches their group. Wider groups, such as rows or the whole matrix, are cut into
    spans of `block` inputs that each keep the same fraction: for 50 % of the whole matrix, half of every rows x 128
    entries.

    Parameters
    ----------
    ridge : float
        See `System.of`.
    block : int
        Inputs whose weights are chosen together at most, and after which the later ones are updated.

    Raises
    ------
    MaskoptError
        In `solve`, if the set is no `PartitionMatroid`: others cannot be chosen block by block.

    References
    ----------
    E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
    arXiv 2301.00774, algorithm 1.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=8, d=32).problem()
    >>> result = maskopt.solve(layer, maskopt.NM(keep=2, group=4), SparseGPT())
    >>> result.mask.view(8, 8, 4).sum(2).unique().tolist()
    [2]
    >>> result.relative_error < 0.5 * result.kept_error  # after and before the update of the weights
    True
    """

    block: int = 128

    requires: ClassVar[Requirements] = Requirements((LayerReconstruction,), (PartitionMatroid,))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, block=whole(1))

    def factorise(self, problem: LayerReconstruction) -> Factor:
        system = System.of(problem, self.ridge)
        columns = problem.shape[1]
        # With H flipped in both axes, its lower factor flipped back is the R of H = R R^T, upper triangular; U = R^-1.
        with factor_threads(columns):
            factor = definite_factor(system.gram.flip((0, 1))).flip((0, 1))
            upper = torch.linalg.solve_triangular(factor, torch.eye(columns).to(factor), upper=True)
        size = upper.diagonal().clone()
        upper.div_(size.unsqueeze(1)).diagonal().copy_(size)  # where it would be one
        return Factor(system, upper)

    def run_factored(
        self,
        problem: LayerReconstruction,
        masks: PartitionMatroid,
        start: Tensor | None,
        monitor: Monitor,
        factor: Factor,
    ) -> Outcome:
        columns = problem.shape[1]

        def stops(column: int) -> bool:
            return monitor.stops(problem, masks, column, columns)

        mask, weight = self.one_pass(problem, masks, stops, factor)
        monitor.counters["products"] += 1
        return Outcome(mask, Status.COMPLETED, columns, weight=weight)

    def one_pass(
        self,
        problem: LayerReconstruction,
        masks: PartitionMatroid,
        stops: Callable[[int], bool],
        factor: Factor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return mask and weights.

        Parameters
        ----------
        problem, masks
            As in `run`.
        stops : callable
            Called before every input with its number; once it returns True, masks are still chosen but no weights
            are updated.
        factor : Factor, optional
            What `factorise` returned, if it is there already.

        Returns
        -------
        mask, weight : Tensor
            Boolean, and in the problem's type; shape (rows, d).
        """
        known = self.factorise(problem) if factor is None else factor
        system, columns = known.system.of_rows(problem), problem.shape[1]
        upper, size = known.matrix, known.matrix.diagonal()
        # Inputs first: the pass works on one after the other.
        v = system.weight.T.contiguous()
        keep, lost = torch.ones_like(v), torch.empty_like(v)
        stopped = False
        for spans in _blocks(masks, problem.shape, self.block):
            begin, end = spans[0][0], spans[-1][1]
            done = begin  # inputs whose losses the later ones of the block compensate
            for first, last, choice in spans:
                cost = (v[first:last] / size[first:last].unsqueeze(1)).square_().neg_()
                keep[first:last] = choice.lmo(cost.T.contiguous()).T
                pruned = 1.0 - keep[first:last]
                for j in range(first, last):
                    stopped = stopped or stops(j)
                    if stopped:
                        break
                    torch.mul(v[j], pruned[j - first], out=lost[j])
                    v[j + 1 : end].addr_(upper[j, j + 1 : end], lost[j], alpha=-1.0)
                    done = j + 1
            if done > begin and end < columns:
                v[end:].addmm_(upper[begin:done, end:].T, lost[begin:done], alpha=-1.0)
        return keep.T.bool().contiguous(), system.finish(problem, v.mul_(keep).T).contiguous()


_Span = tuple[int, int, PartitionMatroid]


def _blocks(masks: PartitionMatroid, shape: Shape, block: int) -> Iterator[list[_Span]]:
    """Yield blocks of consecutive spans, each with its columns and the set its entries are chosen from."""
    spans: list[_Span] = []
    for span in _spans(masks, shape, block):
        if spans and span[1] - spans[0][0] > block:
            yield spans
            spans = []
        spans.append(span)
    yield spans


def _spans(masks: PartitionMatroid, shape: Shape, block: int) -> Iterator[_Span]:
    """Yield the columns of every tile, cut where they are more than `block`, each with its fraction of the counts."""
    height, width = masks.tile_of(shape)
    rows, columns = shape
    blocks = rows // height
    counts = masks.kept_per_group(shape).view(blocks, columns // width)
    held, banned = (_per_row_block(entries, blocks, shape) for entries in (masks.protected, masks.forbidden))
    free = height - held - banned
    for tile, begin in enumerate(range(0, columns, width)):
        end = begin + width
        total = free[:, begin:end].sum(1)
        # Sets that bound a count from above may allow more entries than there are.
        open_ = torch.minimum(counts[:, tile] - held[:, begin:end].sum(1), total)
        before, seen = torch.zeros_like(total), torch.zeros_like(total)
        for first in range(begin, end, block):
            last = min(first + block, end)
            seen = seen + free[:, first:last].sum(1)
            # The fraction of the free entries so far, rounded: differences never exceed what is free in a span.
            after = (2 * open_ * seen + total).div(2 * total.clamp_min(1), rounding_mode="floor")
            number = held[:, first:last].sum(1) + after - before
            before = after
            same = bool((number == number[0]).all())
            part = PartitionMatroid(int(number[0]) if same else number, (height, last - first), masks.name)
            fixed = (
                None if entries is None else entries[:, first:last] for entries in (masks.protected, masks.forbidden)
            )
            yield first, last, part.restrict(*fixed)


def _per_row_block(entries: Tensor | None, blocks: int, shape: Shape) -> Tensor:
    """Return how many entries of each column are marked in each row block, int64, on the CPU, shape (row blocks, d)."""
    if entries is None:
        return torch.zeros((blocks, shape[1]), dtype=torch.int64)
    return entries.cpu().view(blocks, -1, shape[1]).sum(1)
