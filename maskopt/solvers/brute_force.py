"""Every mask, one by one: slow, simple, and what faster exact solvers are held against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, whole
from maskopt.errors import MaskoptError
from maskopt.exact import WIDEST, condition
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction, Problem, Quadratic
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.rules import row_block_of

__all__ = ["BruteForce", "enumerated"]

_ENTRIES = 2**20  # of masks that are evaluated at a time
_BELOW = 1e-10  # of the optimum, by which its bound is lower at most
_NEAR = 1024  # masks that may be compared without rounding in the end
_CAP = 2**61  # numbers of masks stay below 2^62, so that sums of two fit into int64

Shape = tuple[int, int]


@dataclass(frozen=True)
class BruteForce(Solver):
    """Evaluate every mask of every independent row block, and keep the best.

    Of equally good masks the first one wins: the one that keeps the lower index. Masks that rounding makes as good as
    the best are compared without it, and bounds are the optima; where there are too many of them, or the objective is a
    function that can only be called, bounds are the optima less what rounding may have hidden.

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
        bound = torch.full((len(blocks),), -math.inf, dtype=torch.float64, device=problem.device)
        for number, (index, part) in enumerate(zip(blocks, sets, strict=True)):
            search = _Least(_Evaluation(problem, index))
            for some in _chunks(part, (row_block, d), chunk, problem.device):
                search.look(some)
                monitor.counters["masks"] += len(some)
                done += 1
                if monitor.stops(problem, masks, done, planned):
                    break
            else:
                best[index], bound[number] = search.settled()
                continue
            best[index] = search.best
            break
        bound = bound.clamp_min(problem.lowest)
        return Outcome(
            best,
            Status.OPTIMAL if monitor.ended is None else monitor.ended,
            done,
            bound if bool(bound.isfinite().all()) else None,
        )

    def _size(self, masks: MaskSet, shape: Shape) -> int:
        """Return `number_tried`.

        Raises
        ------
        MaskoptError
            If there are too many.
        """
        size = number_tried(masks, shape)
        if size > self.limit:
            number = f"10^{math.log10(size):.1f}" if size > 10**6 else str(size)
            raise MaskoptError(
                f"BruteForce tries at most {self.limit} masks per row block, but {masks} has {number} on "
                f"{shape[0]} x {shape[1]} entries; take fewer columns or another exact solver."
            )
        return size


def number_tried(masks: MaskSet, shape: Shape) -> int:
    """Return how many masks there are, or patterns where a set can only try them all."""
    return 2 ** (shape[0] * shape[1]) if type(masks).enumerate is MaskSet.enumerate else masks.count(shape)


def enumerated(problem: Problem, masks: MaskSet) -> tuple[Tensor, float]:
    """Return the best mask of one row block of rows, shape (rows, d), and a bound on all, in full: for few masks."""
    search = _Least(_Evaluation(problem, slice(0, problem.shape[0])))
    chunk = max(1, _ENTRIES // (problem.shape[0] * problem.shape[1]))
    for some in _chunks(masks, problem.shape, chunk, problem.device):
        search.look(some)
    return search.settled()


class _Least:
    """The best of the masks of a row block that have been looked at, and those that rounding makes as good."""

    def __init__(self, evaluate: _Evaluation) -> None:
        self.evaluate = evaluate
        self.best: Tensor
        self.value, self.largest = math.inf, 0.0
        self._near: list[Tensor] = []
        self._values: list[Tensor] = []

    def look(self, masks: Tensor) -> None:
        """Look at masks of shape (number, row block, d), which come in a fixed order."""
        values = self.evaluate(masks)
        lowest = float(values.amin())
        self.largest = max(self.largest, float(values.abs().amax()))
        if lowest < self.value:
            # Not argmin: which of several it returns depends on the device.
            self.best, self.value = masks[(values == lowest).nonzero()[0, 0]], lowest
        near = values <= self.value + self._doubt()
        if bool(near.any()):
            self._near.append(masks[near])
            self._values.append(values[near])
            if sum(map(len, self._near)) > _NEAR:
                self._sift()

    def _doubt(self) -> float:
        return 2.0 * self.evaluate.rounding(self.value, self.largest)

    def _sift(self) -> None:
        """Forget masks that were as good as the best when they came; if too many are left, the last of them."""
        masks, values = torch.cat(self._near), torch.cat(self._values)
        near = values <= self.value + self._doubt()
        self._near, self._values = [masks[near][:_NEAR]], [values[near][:_NEAR]]
        self._all = int(near.sum()) <= _NEAR

    _all = True

    def settled(self) -> tuple[Tensor, float]:
        """Return the best of the row block's masks, and a bound on their objective that rounding has not raised."""
        self._sift()
        exact = [self.evaluate.exactly(mask) for mask in self._near[0]] if self._all else [None]
        known = [value for value in exact if value is not None]
        if len(known) < len(exact):
            return self.best, self.value - self.evaluate.rounding(self.value, self.largest)
        minimum = min(known)
        # Not above what others get who add up in float64, as long as that is next to nothing.
        below = min(self.evaluate.rounding(self.value, self.largest), _BELOW * abs(float(minimum)))
        bound = float(minimum) - below
        bound = bound if Fraction(bound) <= minimum else math.nextafter(bound, -math.inf)
        return self._near[0][known.index(minimum)], bound


class _Evaluation:
    """Objectives of many masks of one row block, float64."""

    def __init__(self, problem: Problem, index: slice) -> None:
        self._height = index.stop - index.start
        self._part = problem if problem.shape[0] == self._height else problem.rows(index)
        self._copies: Problem | None = None
        self._size: float = 0.0

    def exactly(self, mask: Tensor) -> Fraction | None:
        """Return the objective of one mask without rounding, None where that cannot be had."""
        if self._part.shape[1] > WIDEST:
            return None
        rows = self._part.exact_objective(mask)
        return None if rows is None else sum(rows, Fraction(0))

    def rounding(self, value: float, largest: float) -> float:
        """Return how wrong a computed objective near `value` may be, given the largest one."""
        problem = self._part
        entries = self._height * problem.shape[1]
        if not isinstance(problem, Quadratic):
            eps: float = torch.finfo(problem.dtype).eps
            fraction: float = max(1e-12, entries * eps)
            return largest * fraction
        if self._size == 0.0:
            exact = problem.double()
            # d terms exact to 2^-53 each; no row of Q sums to more than half the smoothness, and signs may cancel.
            kept = exact.gradient(exact.evaluate(torch.ones(exact.shape, dtype=exact.dtype, device=exact.device)))
            linear = kept.abs().sum(1) + 0.5 * problem.shape[1] * exact.smoothness().double()
            size = float((exact.scale().abs() + linear * problem.unit).sum())
            self._size = float(size * (entries + 8)) * 2.0**-51
        if isinstance(problem.unshifted(), LayerReconstruction) and problem.shape[1] <= WIDEST:
            # Errors whose sums cancel are repeated exactly: the others have a small relative error.
            relative: float = condition(problem.shape[1]) * float(entries + 8) * 2.0**-51
            return min(self._size, abs(value) * relative)
        return self._size

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
