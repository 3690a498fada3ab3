"""What happened in each iteration: named columns, the best bound, and the best mask with where it came from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Problem
from maskopt.solvers.certificate import dual_bound
from maskopt.solvers.rules import RowBlocks

__all__ = ["COLUMNS", "Record", "Recorder", "merged"]

Record = int | Literal["doubling"]
"""Which iterations are recorded: every so many (0: none), or 0, 1, 2, 4, 8 ..."""

COLUMNS = ("iteration", "seconds", "value", "gap", "bound", "rounded", "incumbent")
"""Of a history: the relaxed objective, its Frank-Wolfe gap, the best proven bound so far, the error of the rounded
point and that of the best mask so far; summed over rows, nan where there is none."""


class Recorder:
    """Looks at a solve at chosen iterations.

    Bounds and errors are evaluated from scratch in float64, so that what is recorded is proven, whatever type the
    solver works in. Time spent here is not the solver's.

    Parameters
    ----------
    problem, masks
        What is solved.
    row_blocks : RowBlocks
        Row blocks that are independent of each other.
    record : int or "doubling"
    """

    def __init__(self, problem: Problem, masks: MaskSet, row_blocks: RowBlocks, record: Record) -> None:
        self.problem, self.masks, self.row_blocks, self.record = problem, masks, row_blocks, record
        self.history: dict[str, list[float]] = {name: [] for name in COLUMNS}
        blocks = problem.shape[0] // row_blocks.row_block
        self.error = torch.full((blocks,), torch.inf, dtype=torch.float64, device=problem.device)
        self.mask = torch.zeros(problem.shape, dtype=torch.bool, device=problem.device)
        self.bound: Tensor | None = None
        self.convex = True
        self._source = torch.zeros(blocks, dtype=torch.int64, device=problem.device)
        self._names: list[str] = []
        self._count = -1  # iterations of all stages of a method
        self._exact: tuple[Problem, Problem] | None = None

    def due(self) -> bool:
        """Count an iteration; whether it is to be recorded."""
        self._count += 1
        if self.record == "doubling":
            return self._count & (self._count - 1) == 0
        return self.record > 0 and self._count % self.record == 0

    def relaxed(self, objective: Problem, x: Tensor, seconds: float) -> None:
        """Record a relaxed point; objectives may differ by shifts from one call to the next."""
        if self._exact is None or self._exact[0] is not objective:
            self._exact = objective, objective.double()
        x = x.to(torch.float64 if self._exact[1].dtype == torch.float64 else x.dtype)
        here = dual_bound(self._exact[1], self.masks, self.row_blocks, x)
        if here.bound is None:
            self.convex = False
        else:
            self.bound = here.bound if self.bound is None else torch.maximum(self.bound, here.bound)
        rounded = self.offer(self.masks.round(x), "round")
        self.offer(here.vertex, "vertex")
        self._append(seconds, float(here.value.sum()), float(here.gap.sum()), rounded)

    def whole(self, mask: Tensor, seconds: float, source: str) -> None:
        """Record a mask."""
        self._append(seconds, math.nan, math.nan, self.offer(mask, source))

    def offer(self, mask: Tensor, source: str) -> float:
        """Keep a mask in the row blocks where it is the best so far; return its error in all."""
        error = self.row_blocks.total(self.problem.objective(mask))
        better = error < self.error
        if source not in self._names:
            self._names.append(source)
        if bool(better.any()):
            self.error = torch.where(better, error, self.error)
            self.mask = torch.where(self.row_blocks.spread(better).unsqueeze(1), mask, self.mask)
            self._source[better] = self._names.index(source)
        return float(error.sum())

    @property
    def sources(self) -> dict[str, int]:
        """In how many row blocks the best mask came from where."""
        return dict(Counter(self._names[number] for number in self._source.tolist()))

    def _append(self, seconds: float, value: float, gap: float, rounded: float) -> None:
        bound = math.nan if self.bound is None else float(self.bound.sum())
        row = (max(self._count, 0), seconds, value, gap, bound, rounded, float(self.error.sum()))
        for name, figure in zip(COLUMNS, row, strict=True):
            self.history[name].append(figure)


def merged(histories: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Add up the histories of blocks of rows that were solved one after the other.

    A block that ended earlier stands where it ended; nothing recorded is no history.
    """
    if len(histories) < 2:
        return histories[0] if histories else {}
    rows: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for iteration in sorted({number for history in histories for number in history["iteration"]}):
        last = [
            max((i for i, number in enumerate(history["iteration"]) if number <= iteration), default=None)
            for history in histories
        ]
        if None in last:
            continue
        rows["iteration"].append(iteration)
        for name in COLUMNS[1:]:
            rows[name].append(sum(h[name][i] for h, i in zip(histories, last, strict=True) if i is not None))
    return rows
