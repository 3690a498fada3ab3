"""What the rules of the Frank-Wolfe loop see and what they promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vecdot

from maskopt.oracles import MaskSet
from maskopt.problems import Direction, Point, Problem

__all__ = ["DirectionRule", "IterationState", "RowBlocks", "SearchDirection", "StepRule"]


class RowBlocks:
    """Row blocks: consecutive rows that the set or the objective couples, and that therefore share every step.

    Numbers come in two forms: per row, where all rows of a row block have the same one, and per row block.

    Parameters
    ----------
    row block : int
        Rows in each; 1 where rows are independent.
    """

    def __init__(self, row_block: int) -> None:
        self.row_block = row_block

    def __call__(self, per_row: Tensor) -> Tensor:
        """Sum over each row block's rows; per row."""
        if self.row_block == 1:
            return per_row
        return self.spread(self.total(per_row).to(per_row.dtype))

    def total(self, per_row: Tensor) -> Tensor:
        """Sum over each row block's rows; per row block, float64."""
        return per_row.view(-1, self.row_block).sum(1, dtype=torch.float64)

    def minimum(self, per_row: Tensor) -> Tensor:
        """Return the least of each row block's rows; per row."""
        return per_row if self.row_block == 1 else self.spread(per_row.view(-1, self.row_block).amin(1))

    def first(self, per_row: Tensor) -> Tensor:
        """Turn per row into per row block."""
        return per_row if self.row_block == 1 else per_row[:: self.row_block]

    def spread(self, per_band: Tensor) -> Tensor:
        """Turn per row block into per row."""
        return per_band if self.row_block == 1 else per_band.repeat_interleave(self.row_block)

    def flat(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (row blocks, entries)."""
        return matrix if self.row_block == 1 else matrix.reshape(len(matrix) // self.row_block, -1)

    def rows_of(self, blocks: Tensor) -> Tensor:
        """Return the row numbers of some row blocks."""
        within = torch.arange(self.row_block, device=blocks.device)
        return (blocks.unsqueeze(1) * self.row_block + within).view(-1)


class IterationState:
    """One iteration as rules see it; the oracle is asked when its answer is first needed."""

    def __init__(
        self,
        objective: Problem,
        masks: MaskSet,
        row_blocks: RowBlocks,
        iteration: int,
        point: Point,
        counters: Counter[str],
    ) -> None:
        self.objective, self.masks, self.row_blocks = objective, masks, row_blocks
        self.iteration, self.point, self.counters = iteration, point, counters
        self.renew()

    def renew(self) -> None:
        """Forget what was computed from the point's gradient."""
        self._gradient: Tensor | None = None
        self._vertex: Tensor | None = None
        self._toward: Tensor | None = None
        self.known_gap: Tensor | None = None

    @property
    def x(self) -> Tensor:
        return self.point.x

    @property
    def gradient(self) -> Tensor:
        """The objective's gradient at the point, shape (rows, d); read only."""
        if self._gradient is None:
            self._gradient = self.objective.gradient(self.point)
        return self._gradient

    @property
    def vertex(self) -> Tensor:
        """The oracle's answer to the gradient, shape (rows, d); read only."""
        if self._vertex is None:
            self._vertex = self.oracle(self.gradient)
        return self._vertex

    @property
    def toward(self) -> Tensor:
        """The way from the point to the vertex, shape (rows, d); the direction may make it its own."""
        if self._toward is None:
            self._toward = self.vertex - self.x
        return self._toward

    @property
    def gap(self) -> Tensor:
        """The Frank-Wolfe gap <gradient, x - vertex>, per row; `known_gap` from then on."""
        if self.known_gap is None:
            self.known_gap = -self.dot(self.gradient, self.toward)
        return self.known_gap

    def certified_gap(self) -> Tensor | None:
        """Return the gap if the oracle has been asked, infinite in row blocks for which it has not; else None."""
        return self.gap if self._vertex is not None else self.known_gap

    def oracle(self, cost: Tensor) -> Tensor:
        """Ask the set for its vertex of least cost."""
        self.counters["lmo"] += 1
        return self.masks.lmo(cost)

    def ask_rows(self, rows: Tensor) -> Tensor:
        """Ask the set for its vertex, for the gradient of some rows (whole row blocks) only."""
        self.counters["lmo"] += 1
        return self.masks.rows(rows, self.objective.shape).lmo(self.gradient[rows])

    def hvp(self, x: Tensor) -> Direction:
        """Ask the objective for the move in direction `x`."""
        self.counters["products"] += 1
        return self.objective.hvp(x)

    def dot(self, one: Tensor, two: Tensor) -> Tensor:
        """Return inner products over row blocks, per row."""
        return self.row_blocks(vecdot(one, two))


@dataclass(frozen=True)
class SearchDirection:
    """A direction, shape (rows, d), and per row the largest fraction of it that stays in the hull (None: 1).

    `best` says that its end is known to be the best point along it, so that no step rule is asked.
    """

    x: Tensor
    max_step: Tensor | None = None
    best: bool = False

    def take(self, rows: Tensor) -> SearchDirection:
        return SearchDirection(self.x[rows], None if self.max_step is None else self.max_step[rows], self.best)


class DirectionRule:
    """Chooses the way to go.

    Rules are settings only. One that has to remember something between iterations returns an object that does from
    `begin`, which lives as long as one run of the loop.

    Class attributes
    ----------------
    requires : tuple of str
        Verbs it needs of the objective, beyond `Problem`'s.
    asks : tuple of str
        Verbs it needs of the set, beyond `MaskSet`'s.
    from_vertex : bool
        Whether it has to start at a mask.
    exact : bool
        Whether the point's gradient has to be kept up to date.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    asks: ClassVar[tuple[str, ...]] = ()
    from_vertex: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    def begin(self, state: IterationState) -> DirectionRule:
        """Return the object that serves one run."""
        return self

    def search_direction(self, state: IterationState) -> SearchDirection:
        """Return a way inside the hull; rules that remember leave it to what `begin` returns."""
        raise AssertionError("begin first")

    def correct(self, state: IterationState, direction: Direction) -> Direction:
        """Return another move inside the hull once the Hessian along the way is known; may overwrite `direction`."""
        return direction

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        """Learn how far the point has gone, and could have, per row; `direction` may be overwritten."""

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        """Return what goes on with some rows only."""
        return self


class StepRule:
    """Chooses how far to go; `begin` and `take` as for a `DirectionRule`."""

    requires: ClassVar[tuple[str, ...]] = ()
    open_loop: ClassVar[bool] = False
    """Whether it looks at nothing but the iteration's number."""

    def begin(self, state: IterationState) -> StepRule:
        """Return the object that serves one run."""
        return self

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        """Return shares of the move in [0, limit], per row; rules that remember leave it to what `begin` returns."""
        raise AssertionError("begin first")

    def take(self, rows: Tensor, blocks: Tensor) -> StepRule:
        """Return what goes on with some rows only."""
        return self
