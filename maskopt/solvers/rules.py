"""What the rules of the Frank-Wolfe loop see and what they promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vecdot

from maskopt.oracles import MaskSet
from maskopt.problems import Move, Point, Problem

__all__ = ["Direction", "Pool", "Step", "View", "Way"]


class Pool:
    """Bands: consecutive rows that the set or the objective couples, and that therefore share every step.

    Numbers come in two forms: per row, where all rows of a band have the same one, and per band.

    Parameters
    ----------
    band : int
        Rows in each; 1 where rows are independent.
    """

    def __init__(self, band: int) -> None:
        self.band = band

    def __call__(self, per_row: Tensor) -> Tensor:
        """Sum over each band's rows; per row."""
        if self.band == 1:
            return per_row
        return self.spread(self.total(per_row).to(per_row.dtype))

    def total(self, per_row: Tensor) -> Tensor:
        """Sum over each band's rows; per band, float64."""
        return per_row.view(-1, self.band).sum(1, dtype=torch.float64)

    def least(self, per_row: Tensor) -> Tensor:
        """Return the least of each band's rows; per row."""
        return per_row if self.band == 1 else self.spread(per_row.view(-1, self.band).amin(1))

    def first(self, per_row: Tensor) -> Tensor:
        """Turn per row into per band."""
        return per_row if self.band == 1 else per_row[:: self.band]

    def spread(self, per_band: Tensor) -> Tensor:
        """Turn per band into per row."""
        return per_band if self.band == 1 else per_band.repeat_interleave(self.band)

    def flat(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (bands, entries)."""
        return matrix if self.band == 1 else matrix.reshape(len(matrix) // self.band, -1)

    def rows_of(self, bands: Tensor) -> Tensor:
        """Return the row numbers of some bands."""
        within = torch.arange(self.band, device=bands.device)
        return (bands.unsqueeze(1) * self.band + within).view(-1)


class View:
    """One iteration as rules see it; the oracle is asked when its answer is first needed."""

    def __init__(
        self, objective: Problem, masks: MaskSet, pool: Pool, iteration: int, point: Point, counters: Counter[str]
    ) -> None:
        self.objective, self.masks, self.pool = objective, masks, pool
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
        """Return the gap if the oracle has been asked, infinite in bands for which it has not; else None."""
        return self.gap if self._vertex is not None else self.known_gap

    def oracle(self, cost: Tensor) -> Tensor:
        """Ask the set for its vertex of least cost."""
        self.counters["lmo"] += 1
        return self.masks.vertex(cost)

    def ask_rows(self, rows: Tensor) -> Tensor:
        """Ask the set for its vertex, for the gradient of some rows (whole bands) only."""
        self.counters["lmo"] += 1
        return self.masks.rows(rows, self.objective.shape).vertex(self.gradient[rows])

    def along(self, x: Tensor) -> Move:
        """Ask the objective for the move in direction `x`."""
        self.counters["products"] += 1
        return self.objective.along(x)

    def dot(self, one: Tensor, two: Tensor) -> Tensor:
        """Return inner products over bands, per row."""
        return self.pool(vecdot(one, two))


@dataclass(frozen=True)
class Way:
    """A direction, shape (rows, d), and per row the largest share of it that stays in the hull (None: 1).

    `best` says that its end is known to be the best point along it, so that no step rule is asked.
    """

    x: Tensor
    limit: Tensor | None = None
    best: bool = False

    def take(self, rows: Tensor) -> Way:
        return Way(self.x[rows], None if self.limit is None else self.limit[rows], self.best)


class Direction:
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

    def begin(self, view: View) -> Direction:
        """Return the object that serves one run."""
        return self

    def way(self, view: View) -> Way:
        """Return a way inside the hull; rules that remember leave it to what `begin` returns."""
        raise AssertionError("begin first")

    def bend(self, view: View, move: Move) -> Move:
        """Return another move inside the hull once the Hessian along the way is known; may overwrite `move`."""
        return move

    def moved(self, view: View, move: Move, share: Tensor, limit: Tensor) -> None:
        """Learn how far the point has gone, and could have, per row; `move` may be overwritten."""

    def take(self, rows: Tensor, bands: Tensor) -> Direction:
        """Return what goes on with some rows only."""
        return self


class Step:
    """Chooses how far to go; `begin` and `take` as for a `Direction`."""

    requires: ClassVar[tuple[str, ...]] = ()
    open_loop: ClassVar[bool] = False
    """Whether it looks at nothing but the iteration's number."""

    def begin(self, view: View) -> Step:
        """Return the object that serves one run."""
        return self

    def share(self, view: View, move: Move, limit: Tensor) -> Tensor:
        """Return shares of the move in [0, limit], per row; rules that remember leave it to what `begin` returns."""
        raise AssertionError("begin first")

    def take(self, rows: Tensor, bands: Tensor) -> Step:
        """Return what goes on with some rows only."""
        return self
