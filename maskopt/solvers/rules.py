"""What the rules of the Frank-Wolfe loop see and what they promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.linalg import vecdot

from maskopt.oracles import HasFaces, HasGroups, MaskSet
from maskopt.problems import Direction, Point, Problem, Quadratic
from maskopt.solvers.requirements import Requirements

__all__ = ["DirectionRule", "IterationState", "RowBlocks", "SearchDirection", "StepRule", "row_block_of"]


def row_block_of(problem: Problem, masks: MaskSet) -> int:
    """Return how many consecutive rows are coupled by the set or the objective."""
    return problem.shape[0] if problem.coupled else masks.row_block(problem.shape)


class RowBlocks:
    """Row blocks: consecutive rows that the set or the objective couples, and that therefore have one step size.

    Numbers come in two forms: per row, where all rows of a block have the same one, and per block.

    Parameters
    ----------
    row_block : int
        Rows in each block; 1 where rows are independent.
    """

    def __init__(self, row_block: int) -> None:
        self.row_block = row_block

    @classmethod
    def of(cls, problem: Problem, masks: MaskSet) -> RowBlocks:
        """Return the row blocks of a problem with a set."""
        return cls(row_block_of(problem, masks))

    def __call__(self, per_row: Tensor) -> Tensor:
        """Sum over each block's rows; per row."""
        if self.row_block == 1:
            return per_row
        return self.spread(self.total(per_row).to(per_row.dtype))

    def total(self, per_row: Tensor) -> Tensor:
        """Sum over each block's rows; per block, float64."""
        return per_row.view(-1, self.row_block).sum(1, dtype=torch.float64)

    def minimum(self, per_row: Tensor) -> Tensor:
        """Return the minimum over each block's rows; per row."""
        return per_row if self.row_block == 1 else self.spread(per_row.view(-1, self.row_block).amin(1))

    def first(self, per_row: Tensor) -> Tensor:
        """Turn per row into per block."""
        return per_row if self.row_block == 1 else per_row[:: self.row_block]

    def spread(self, per_block: Tensor) -> Tensor:
        """Turn per block into per row."""
        return per_block if self.row_block == 1 else per_block.repeat_interleave(self.row_block)

    def flat(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (blocks, entries)."""
        return matrix if self.row_block == 1 else matrix.reshape(len(matrix) // self.row_block, -1)

    def rows_of(self, blocks: Tensor) -> Tensor:
        """Return the row numbers of some blocks."""
        within = torch.arange(self.row_block, device=blocks.device)
        return (blocks.unsqueeze(1) * self.row_block + within).view(-1)


class IterationState:
    """One iteration as rules see it; the oracle is called when its answer is first needed.

    Attributes
    ----------
    objective : Problem
    masks : MaskSet
    row_blocks : RowBlocks
    iteration : int
        Counted from 0.
    point : Point
        The relaxed mask and its gradient.
    counters : Counter of str
        Oracle calls, matrix products, samples ...
    """

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
    def quadratic(self) -> Quadratic:
        """The objective, for rules that require a `Quadratic` (checked before the run)."""
        return cast(Quadratic, self.objective)

    @property
    def faces(self) -> HasFaces:
        """The set, for rules that require `HasFaces` (checked before the run)."""
        return cast(HasFaces, self.masks)

    @property
    def groups(self) -> HasGroups:
        """The set, for rules that require `HasGroups` (checked before the run)."""
        return cast(HasGroups, self.masks)

    @property
    def x(self) -> Tensor:
        """The relaxed mask, shape (rows, d)."""
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
        """The difference vertex - x, shape (rows, d); the direction rule may overwrite it."""
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
        """Return the gap if the oracle has been called, infinite in row blocks for which it has not; else None."""
        return self.gap if self._vertex is not None else self.known_gap

    def oracle(self, cost: Tensor) -> Tensor:
        """Return the set's vertex of minimal cost."""
        self.counters["lmo"] += 1
        return self.masks.lmo(cost)

    def ask_rows(self, rows: Tensor) -> Tensor:
        """Return the set's vertex for the gradient of some rows (whole row blocks) only."""
        self.counters["lmo"] += 1
        return self.masks.rows(rows, self.objective.shape).lmo(self.gradient[rows])

    def hvp(self, vector: Tensor) -> Direction:
        """Return the direction `vector`, shape (rows, d), with its Hessian product."""
        self.counters["products"] += 1
        return self.objective.hvp(vector)

    def dot(self, one: Tensor, two: Tensor) -> Tensor:
        """Return inner products over row blocks, per row."""
        return self.row_blocks(vecdot(one, two))


@dataclass(frozen=True)
class SearchDirection:
    """A search direction and how far it can be followed.

    Attributes
    ----------
    vector : Tensor
        Shape (rows, d).
    max_step : Tensor, optional
        Per row the largest step size that stays in the hull; 1 where it is not given.
    best : bool
        Whether its end is known to be the best point on it, so that no step rule is called.
    """

    vector: Tensor
    max_step: Tensor | None = None
    best: bool = False

    def take(self, rows: Tensor) -> SearchDirection:
        """Return the search direction of some rows."""
        return SearchDirection(self.vector[rows], None if self.max_step is None else self.max_step[rows], self.best)


class DirectionRule:
    """Chooses the search direction.

    Rules are settings only. One that has to remember something between iterations returns an object that does from
    `begin`, which lives as long as one run of the loop.

    Class attributes
    ----------------
    requires : Requirements
        What it needs of objective and set.
    from_vertex : bool
        Whether it has to start at a mask.
    exact : bool
        Whether the point's gradient has to be kept up to date.
    """

    requires: ClassVar[Requirements] = Requirements()
    from_vertex: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    def begin(self, state: IterationState) -> DirectionRule:
        """Return the object that serves one run."""
        return self

    def search_direction(self, state: IterationState) -> SearchDirection:
        """Return a direction that stays in the hull; rules that remember leave it to what `begin` returns."""
        raise NotImplementedError(
            f"{type(self).__name__} must define search_direction, or begin must return what does."
        )

    def correct(self, state: IterationState, direction: Direction) -> Direction:
        """Return a corrected direction once the Hessian product is known (conjugate directions).

        It must stay in the hull for the same step sizes; `direction` may be overwritten.
        """
        return direction

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        """Learn the step size that was taken, and the maximal one, per row; `direction` may be overwritten."""

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        """Return the rule of some rows, which are the row blocks of these numbers."""
        return self


class StepRule:
    """Chooses the step size; `begin` and `take` as for a `DirectionRule`.

    Class attributes
    ----------------
    requires : Requirements
        What it needs of objective and set.
    open_loop : bool
        Whether it looks at nothing but the iteration's number.
    """

    requires: ClassVar[Requirements] = Requirements()
    open_loop: ClassVar[bool] = False

    def begin(self, state: IterationState) -> StepRule:
        """Return the object that serves one run."""
        return self

    def step_size(self, state: IterationState, direction: Direction, max_step: Tensor) -> Tensor:
        """Return step sizes in [0, max_step], per row; rules that remember leave it to what `begin` returns."""
        raise NotImplementedError(f"{type(self).__name__} must define step_size, or begin must return what does.")

    def take(self, rows: Tensor, blocks: Tensor) -> StepRule:
        """Return the rule of some rows, which are the row blocks of these numbers."""
        return self
