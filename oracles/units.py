"""Structured sets: whole columns, rows, heads or vectors of entries are kept or pruned together."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import eye_array, vstack
from torch import Tensor

from maskopt.checks import shown, sides
from maskopt.errors import MaskoptError
from maskopt.exact import summable
from maskopt.oracles.base import Index, MaskSet, Shape, fitted
from maskopt.oracles.fixed import joined, of_rows, refuse_contradiction
from maskopt.oracles.matroid import PartitionMatroid

__all__ = ["Columns", "Rows", "Units"]

Unit = tuple[int | None, int | None]


class Units(MaskSet):
    """Masks whose units, blocks of one shape, are kept or pruned as a whole.

    The cost of a unit is the sum over its entries. `base` chooses among the units, as a set of masks of the reduced
    weight, which has one entry for each unit. All methods of the base are available except the exchange of single
    entries.

    Parameters
    ----------
    base : PartitionMatroid
        Which units may be kept together, without fixed entries.
    unit : (int or None, int or None)
        Rows and columns of a unit; None stands for all of them.

    Raises
    ------
    MaskoptError
        If a side of the unit is below one, or the base has fixed entries. Methods raise it where units do not divide
        the weight, or the base does not fit the reduced one.

    Examples
    --------
    Of every row, two of four vectors of two entries:

    >>> import torch
    >>> from maskopt.oracles import PerRow, Units
    >>> masks = Units(PerRow(2), (1, 2))
    >>> masks.lmo_mask(torch.tensor([[-1.0, -1.0, 2.0, -5.0, 0.0, 0.0, -1.5, 0.0]])).tolist()
    [[True, True, True, True, False, False, False, False]]
    """

    def __init__(self, base: PartitionMatroid, unit: Unit) -> None:
        if not isinstance(base, PartitionMatroid):
            raise MaskoptError(f"Units needs a set such as PerRow(0.5); got {shown(base)}.")
        sides("A unit", unit)
        if base.protected is not None or base.forbidden is not None:
            raise MaskoptError(f"Units restrict themselves: give {base} without fixed entries, then call restrict.")
        self.base = base
        self.unit = unit

    def __repr__(self) -> str:
        names = {(None, 1): "columns", (1, None): "rows"}
        height, width = ("all" if side is None else side for side in self.unit)
        return f"Units({self.base}, {names.get(self.unit, f'{height} x {width}')})"

    # Geometry

    def unit_of(self, shape: Shape) -> tuple[int, int]:
        """Return the unit's rows and columns on a weight of this shape.

        Raises
        ------
        MaskoptError
            If units do not divide the weight.
        """
        return fitted(self, self.unit, shape)

    def _reduced(self, shape: Shape) -> tuple[int, int]:
        height, width = self.unit_of(shape)
        return shape[0] // height, shape[1] // width

    def _units(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (units down, rows, units across, columns)."""
        height, width = self.unit_of(matrix.shape)
        return matrix.reshape(matrix.shape[0] // height, height, matrix.shape[1] // width, width)

    def _first(self, matrix: Tensor) -> Tensor:
        """Return the first entry of every unit: the reduced matrix where the entries of units are equal."""
        height, width = self.unit_of(matrix.shape)
        return matrix[::height, ::width]

    def _repeat(self, reduced: Tensor, shape: Shape) -> Tensor:
        height, width = self.unit_of(shape)
        units = reduced.view(len(reduced), 1, -1, 1).expand(-1, height, -1, width)
        return units.reshape(shape[0], shape[1])

    def _sum(self, cost: Tensor) -> Tensor:
        return self._units(cost).sum((1, 3), dtype=torch.float64)

    @property
    def separable(self) -> bool:
        return self.base.separable and self.unit[0] == 1

    def row_block(self, shape: Shape) -> int:
        return self.base.row_block(self._reduced(shape)) * self.unit_of(shape)[0]

    def check(self, shape: Shape) -> None:
        self.base.check(self._reduced(shape))
        for fixed in (self.protected, self.forbidden):
            if fixed is not None and tuple(fixed.shape) != tuple(shape):
                raise MaskoptError(f"{self} fixes entries of shape {tuple(fixed.shape)}; got {tuple(shape)}.")

    def rows(self, index: Index, shape: Shape) -> Units:
        height, _ = self.unit_of(shape)
        blocks = torch.arange(shape[0])[index.cpu() if isinstance(index, Tensor) else index][::height] // height
        base = self.base.rows(blocks, self._reduced(shape))
        if base is self.base:
            return self
        fixed = (of_rows(entries, index) for entries in (self.protected, self.forbidden))
        return self._with(base, *fixed)

    def _with(self, base: PartitionMatroid, protected: Tensor | None, forbidden: Tensor | None) -> Units:
        units = copy.copy(self)
        units.base, units.protected, units.forbidden = base, protected, forbidden
        return units

    # Oracles, projection, membership

    def lmo(self, cost: Tensor) -> Tensor:
        return self._repeat(self.base.lmo(self._sum(cost)).to(cost.dtype), cost.shape)

    def lmo_bound(self, cost: Tensor) -> Tensor:
        # The cost of a unit is a sum that is rounded, which may decide between units.
        height, width = self.unit_of(cost.shape)
        flat = cost.double().reshape(-1, self.row_block(cost.shape) * cost.shape[1])
        rounding = flat.abs().sum(1).mul_(height * width * 2.0**-51)
        return super().lmo_bound(cost) - torch.where(summable(flat), 0.0, rounding)

    def inface(self, cost: Tensor, x: Tensor) -> Tensor:
        """Return the vertex of minimal cost on the smallest face that contains `x`.

        Parameters
        ----------
        cost, x : Tensor
            Finite, shape (rows, d); `x` in the hull.
        """
        chosen = self.base.inface(self._sum(cost), self._first(x))
        return self._repeat(chosen.to(cost.dtype), cost.shape)

    def max_step(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the largest step size for which x + step * direction stays in the hull, shape (rows,).

        Parameters
        ----------
        x, direction : Tensor
            Shape (rows, d), equal within units; `x` in the hull.
        """
        step = self.base.max_step(self._first(x), self._first(direction))
        return step.repeat_interleave(self.unit_of(x.shape)[0])

    def project(self, x: Tensor) -> Tensor:
        """Return the point of the hull nearest to `x`, shape (rows, d): the projection of the means over units."""
        return self._repeat(self.base.project(self._units(x).mean((1, 3))), x.shape)

    def round(self, x: Tensor) -> Tensor:
        wide = self._units(x.to(torch.promote_types(x.dtype, torch.float32)))
        return self._repeat(self.base.round(wide.mean((1, 3))), x.shape)

    def contains(self, mask: Tensor) -> bool:
        first = self._first(mask)
        return self.base.contains(first) and bool((self._repeat(first, mask.shape) == mask).all())

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._repeat(self.base.center(self._reduced(shape), dtype, device), shape)

    def count(self, shape: Shape) -> int:
        return self.base.count(self._reduced(shape))

    def enumerate(self, shape: Shape) -> Iterator[Tensor]:
        return (self._repeat(mask, shape) for mask in self.base.enumerate(self._reduced(shape)))

    def neighbours(self, mask: Tensor) -> Iterator[Tensor]:
        """Yield every mask in which one kept unit is exchanged for a pruned one of its group; for small shapes."""
        return (self._repeat(other, mask.shape) for other in self.base.neighbours(self._first(mask)))

    def restrict(self, kept: Tensor | None = None, pruned: Tensor | None = None) -> Units:
        """Return the masks that keep all entries of `kept` and prune all of `pruned`; a fixed entry fixes its unit.

        Parameters
        ----------
        kept, pruned : Tensor, optional
            Boolean, shape (rows, d).

        Raises
        ------
        MaskoptError
            If there is no such mask.
        """
        if kept is None and pruned is None:
            return self
        kept, pruned = joined(self.protected, kept), joined(self.forbidden, pruned)
        refuse_contradiction(kept, pruned)
        parts = [None if entries is None else self._units(entries).any(3).any(1) for entries in (kept, pruned)]
        if parts[0] is not None and parts[1] is not None and bool((parts[0] & parts[1]).any()):
            row, column = (parts[0] & parts[1]).nonzero()[0].tolist()
            raise MaskoptError(f"Unit ({row}, {column}) holds entries to keep and entries to prune.")
        shapes = [entries.shape for entries in (kept, pruned) if entries is not None]
        whole = [None if part is None else self._repeat(part, shapes[0]) for part in parts]
        return self._with(self.base.restrict(*parts), *whole)

    def milp_constraints(self, shape: Shape) -> LinearConstraint:
        base = self.base.milp_constraints(self._reduced(shape))
        flat = torch.arange(shape[0] * shape[1]).view(shape[0], shape[1])
        first = self._first(flat).flatten().numpy()
        leader = self._repeat(self._first(flat), shape).flatten().numpy()
        others = np.flatnonzero(leader != np.arange(leader.size))
        identity = eye_array(leader.size, format="csr")
        none = np.zeros(others.size)
        return LinearConstraint(
            vstack((base.A @ identity[first], identity[others] - identity[leader[others]])),
            np.concatenate((base.lb, none)),
            np.concatenate((base.ub, none)),
        )


def Columns(keep: float | int, width: int = 1) -> Units:  # noqa: N802 - named like the sets they stand for
    """Return the set of masks that keep a number of whole columns (input features), or of groups of them.

    Parameters
    ----------
    keep : float or int
        A fraction in [0, 1] (rounded up) or a count.
    width : int
        Consecutive columns that are kept or pruned together, such as those of an attention head.

    Returns
    -------
    Units

    Examples
    --------
    >>> import torch
    >>> Columns(1).lmo_mask(torch.tensor([[0.0, -3.0], [-2.0, 0.0]])).tolist()
    [[False, True], [False, True]]
    """
    return Units(PartitionMatroid(keep, (None, None), "Columns"), (None, width))


def Rows(keep: float | int) -> Units:  # noqa: N802
    """Return the set of masks that keep a number of whole rows (output features).

    Parameters
    ----------
    keep : float or int
        A fraction in [0, 1] (rounded up) or a count.

    Returns
    -------
    Units
    """
    return Units(PartitionMatroid(keep, (None, None), "Rows"), (1, None))
