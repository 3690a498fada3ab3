"""Every mask, one by one: slow, simple, and what faster exact solvers are held against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, whole
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import Problem, Quadratic
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.rules import row_block_of

__all__ = ["BruteForce"]

_ENTRIES = 2**20  # of masks that are evaluated at a time
_CAP = 2**61  # numbers of masks stay below 2^62, so that sums of two fit into int64

Shape = tuple[int, int]


@dataclass(frozen=True)
class BruteForce(Solver):
    """Evaluate every mask of every independent row block, and keep the best.

    Of equally good masks the first one wins: the one that keeps the lower index. Bounds are the optima less what
    rounding may have hidden.

    Parameters
    ----------
    limit : int
        Masks per row block at most.
    """

    limit: int = 10**7

    proves: ClassVar[bool] = True
    arrays: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_settings(self, limit=whole(1))

    def run(self, problem: Problem, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        rows, d = problem.shape
        row_block = row_block_of(problem, masks)
        blocks = [slice(first, first + row_block) for first in range(0, rows, row_block)]
        sets = [masks if row_block == rows else masks.rows(index, (rows, d)) for index in blocks]
        sizes = [self._size(part, (row_block, d)) for part in sets]
        chunk = max(1, _ENTRIES // (row_block * d))
        planned, done = sum(-(-size // chunk) for size in sizes), 0
        best = masks.lmo_mask(torch.zeros((rows, d), dtype=torch.float64, device=problem.device))
        minimum = torch.full((len(blocks),), math.inf, dtype=torch.float64, device=problem.device)
        largest, finished = torch.zeros_like(minimum), torch.zeros_like(minimum, dtype=torch.bool)
        for number, (index, part) in enumerate(zip(blocks, sets, strict=True)):
            evaluate = _Evaluation(problem, index)
            for some in _chunks(part, (row_block, d), chunk, problem.device):
                values = evaluate(some)
                lowest = values.amin()
                if bool(lowest < minimum[number]):
                    # Not argmin: which of several it returns depends on the device.
                    best[index], minimum[number] = some[(values == lowest).nonzero()[0, 0]], lowest
                largest[number] = torch.maximum(largest[number], values.abs().amax())
                monitor.counters["masks"] += len(some)
                done += 1
                if monitor.stops(problem, masks, done, planned):
                    break
            else:
                finished[number] = True
            if monitor.ended is not None:
                break
        bound = torch.where(finished, minimum - _rounding(problem, row_block, largest), -math.inf).clamp_min(
            problem.lowest
        )
        return Outcome(
            best,
            Status.OPTIMAL if monitor.ended is None else monitor.ended,
            done,
            bound if bool(bound.isfinite().all()) else None,
        )

    def _size(self, masks: MaskSet, shape: Shape) -> int:
        """Return how many masks there are, or patterns where a set can only try them all.

        Raises
        ------
        MaskoptError
            If there are too many.
        """
        entries = shape[0] * shape[1]
        tries = type(masks).enumerate is MaskSet.enumerate
        size = 2**entries if tries else masks.count(shape)
        if size > self.limit:
            number = f"10^{math.log10(size):.1f}" if size > 10**6 else str(size)
            raise MaskoptError(
                f"BruteForce tries at most {self.limit} masks per row block, but {masks} has {number} on "
                f"{shape[0]} x {shape[1]} entries; take fewer columns or another exact solver."
            )
        return size


class _Evaluation:
    """Objectives of many masks of one row block, float64."""

    def __init__(self, problem: Problem, index: slice) -> None:
        self._height = index.stop - index.start
        self._part = problem if problem.shape[0] == self._height else problem.rows(index)
        self._copies: Problem | None = None

    def __call__(self, masks: Tensor) -> Tensor:
        """Return the row block's objective of masks of shape (number, row block, d), shape (number,)."""
        if not isinstance(self._part, Quadratic):
            return torch.stack([self._part.objective(mask).sum() for mask in masks])
        # All at once: a quadratic's rows may be repeated, and every copy gets another mask.
        rows = len(masks) * self._height
        if self._copies is None or self._copies.shape[0] < rows:
            self._copies = self._part.rows(torch.arange(self._height, device=masks.device).repeat(len(masks)))
        copies = self._copies.rows(slice(0, rows))
        return copies.objective(masks.flatten(0, 1)).view(len(masks), self._height).sum(1)


def _rounding(problem: Problem, row_block: int, largest: Tensor) -> Tensor:
    """Return how far below its computed value an objective may lie, one entry per row block."""
    entries = row_block * problem.shape[1]
    if isinstance(problem, Quadratic):
        exact = problem.double()
        # d terms exact to 2^-53 each; no row of Q sums to more than half the smoothness, and signs may cancel.
        size = exact.scale() + 0.5 * problem.shape[1] * exact.smoothness().double() * problem.unit
        return size.view(-1, row_block).sum(1).mul_(entries * 2.0**-52)
    return largest * max(1e-12, entries * torch.finfo(problem.dtype).eps)


def _chunks(masks: MaskSet, shape: Shape, chunk: int, device: torch.device) -> Iterator[Tensor]:
    """Yield all masks, boolean, shape (at most `chunk`, rows, d)."""
    if isinstance(masks, PartitionMatroid):
        yield from _matroid(masks, shape, chunk, device)
        return
    every = masks.enumerate(shape)
    while some := list(itertools.islice(every, chunk)):
        yield torch.stack(some).to(device)


def _matroid(masks: PartitionMatroid, shape: Shape, chunk: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the masks of a partition matroid, unranked in lexicographic order of kept entries (those first).

    A mask's number has one digit per group; within a group, masks that keep an entry come before those that do not,
    so comparing with the number of the former decides entry after entry, for all masks of a chunk at once.
    """
    kept = torch.zeros(shape, dtype=torch.bool) if masks.protected is None else masks.protected.cpu()
    pruned = torch.zeros(shape, dtype=torch.bool) if masks.forbidden is None else masks.forbidden.cpu()
    open_entries = masks.groups(~kept & ~pruned)
    counts = (masks.kept_per_group(shape) - masks.groups(kept).sum(1)).tolist()
    entries = masks.groups(torch.arange(shape[0] * shape[1]).view(shape))
    free = [one[some].tolist() for one, some in zip(entries, open_entries, strict=True)]
    tables = [_table(len(one), count, masks.at_most).to(device) for one, count in zip(free, counts, strict=True)]
    radix = [int(table[-1, -1]) for table in tables]
    size = math.prod(radix)
    for first in range(0, size, chunk):
        rest = torch.arange(first, min(size, first + chunk), device=device)
        flat = kept.flatten().to(device).unsqueeze(1).repeat(1, len(rest))
        for table, digits, places, count in reversed(list(zip(tables, radix, free, counts, strict=True))):
            rank, rest = rest % digits, rest // digits
            left = torch.full_like(rank, count)
            for after, place in zip(range(len(places) - 1, -1, -1), places, strict=True):
                with_it = table[after][left]
                keeps = rank < with_it
                flat[place] = keeps
                rank -= with_it * ~keeps
                left -= keeps.long()
        yield flat.T.reshape(-1, *shape)


def _table(size: int, count: int, at_most: bool) -> Tensor:
    """Return in row n, column k + 1 how many masks of n entries keep k (or at most k), int64, column 0 zero."""
    table = torch.zeros((size + 1, count + 2), dtype=torch.int64)
    table[0, 1:] = 1
    if not at_most:
        table[0, 2:] = 0
    for n in range(1, size + 1):
        table[n, 1:] = (table[n - 1, 1:] + table[n - 1, :-1]).clamp_(max=_CAP)
    return table
