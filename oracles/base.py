"""A set of masks as solvers see it: a few verbs every set has, and others that some have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from scipy.optimize import LinearConstraint
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.exact import floor_of_sum

__all__ = [
    "CanProject",
    "CanRestrict",
    "CanSwap",
    "HasFaces",
    "HasGroups",
    "Index",
    "MaskSet",
    "Shape",
    "box_step",
    "face_tolerance",
    "fitted",
]

Index = slice | Tensor
"""Some rows: a slice, or a vector of row numbers (whole row blocks where a set couples rows)."""

Shape = tuple[int, int] | torch.Size


def face_tolerance(dtype: torch.dtype) -> float:
    """Return how near to 0 or 1 an entry counts as being there: one number for in-face oracles and their users."""
    return 16.0 * torch.finfo(dtype).eps


def fitted(masks: MaskSet, tile: tuple[int | None, int | None], shape: Shape) -> tuple[int, int]:
    """Return a tile's rows and columns on a weight of this shape, None standing for all of them.

    Raises
    ------
    MaskoptError
        If tiles do not fit the weight evenly.
    """
    rows, columns = shape
    height, width = tile[0] or rows, tile[1] or columns
    if columns % width:
        raise MaskoptError(f"{masks} needs a number of input features divisible by {width}; this weight has {columns}.")
    if rows % height:
        raise MaskoptError(f"{masks} needs a number of rows divisible by {height}; this weight has {rows}.")
    return height, width


def box_step(x: Tensor, direction: Tensor) -> Tensor:
    """Return the largest fraction of `direction` that keeps every entry in [0, 1], shape (rows,)."""
    # Room is 1 - x where the direction rises and x where it falls; rising is 0 or 1.
    rising = torch.gt(direction, 0.0, out=torch.empty_like(direction))
    room = torch.lerp(x, 1.0 - x, rising)
    # The tiny number makes 0 / 0 infinite: an entry that does not move limits nothing.
    return room.clamp_(min=torch.finfo(x.dtype).tiny).div_(direction.abs()).amin(1)


class MaskSet(ABC):
    """Masks of a weight, as the vertices of their convex hull.

    Sets know no shape unless their data has one: every verb takes it from its argument, so one object serves all
    layers of a model. The verbs below are what every set has. More can be asked of some sets; a solver names
    what it needs in `Solver.asks`, and the protocols in this module say what these verbs promise.
    """

    protected: Tensor | None = None
    """Entries that every mask keeps, boolean, shape (rows, d)."""

    forbidden: Tensor | None = None
    """Entries that every mask prunes, boolean, shape (rows, d)."""

    exact: bool = True
    """Whether `lmo` returns a minimiser; where it does not, `lmo_bound` is still a proven lower bound."""

    @abstractmethod
    def check(self, shape: Shape) -> None:
        """Raise MaskoptError, with the reason, if the set does not fit a weight of this shape or is empty."""

    @abstractmethod
    def lmo(self, cost: Tensor) -> Tensor:
        """Linear minimisation oracle: the mask of least total cost, as zeros and ones in the type of `cost`.

        Parameters
        ----------
        cost : Tensor
            Floating point, shape (rows, d), no NaN. Ties go to the lower index.
        """

    @abstractmethod
    def contains(self, mask: Tensor) -> bool:
        """Whether a boolean mask, shape (rows, d), belongs to the set."""

    @abstractmethod
    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a point in the relative interior of the hull: the mean of all masks where it is known."""

    @abstractmethod
    def milp_constraints(self, shape: Shape) -> LinearConstraint:
        """Return the set's exact formulation for scipy's MILP solver: constraints on the flattened mask in {0, 1}."""

    def row_block(self, shape: Shape) -> int:
        """Return how many consecutive rows the set couples; row blocks of so many rows are independent of each other."""
        return shape[0]

    def rows(self, index: Index, shape: Shape) -> MaskSet:
        """Return the set for some rows (whole row blocks) of a weight of this shape."""
        return self

    @property
    def separable(self) -> bool:
        """Whether rows are independent of each other."""
        return False

    def lmo_mask(self, cost: Tensor) -> Tensor:
        """Return `lmo` as a boolean mask; integer costs are fine."""
        return self.lmo(cost if cost.is_floating_point() else cost.double()).bool()

    def lmo_bound(self, cost: Tensor) -> Tensor:
        """Return a proven lower bound of the least cost of any mask, one per row block, float64; tight for exact sets."""
        terms = cost.double() * self.lmo(cost)
        blocks = terms.reshape(-1, self.row_block(cost.shape) * cost.shape[1])
        return torch.tensor([floor_of_sum(row_block) for row_block in blocks], dtype=torch.float64, device=cost.device)

    def round(self, x: Tensor) -> Tensor:
        """Return the mask nearest to the relaxed mask `x`, boolean."""
        # |m - x|^2 = sum_i m_i (1 - 2 x_i) + a constant.
        return self.lmo_mask(0.5 - x.to(torch.promote_types(x.dtype, torch.float32)))

    def count(self, shape: Shape) -> int:
        """Return the number of masks, exactly."""
        return sum(1 for _ in self.enumerate(shape))

    def enumerate(self, shape: Shape) -> Iterator[Tensor]:
        """Yield every mask, shape (rows, d); for small shapes only."""
        size = shape[0] * shape[1]
        bits = torch.arange(size)
        for number in range(2**size):
            mask = ((number >> bits) & 1).bool().view(shape[0], shape[1])
            if self.contains(mask):
                yield mask


@runtime_checkable
class HasFaces(Protocol):
    """Sets whose faces are known: decomposition-invariant methods need them."""

    def inface(self, cost: Tensor, x: Tensor) -> Tensor:
        """Return the vertex of least cost on the smallest face that contains the point `evaluate`, as `lmo` does.

        An entry of `evaluate` within `face_tolerance` of 0 or 1 counts as being there.
        """

    def max_step(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the largest fraction of `direction` (shape (rows, d), within the hull's span) that stays in the hull.

        One entry per row, infinite where nothing limits it; a row block's is the least of its rows'.
        """


@runtime_checkable
class CanProject(Protocol):
    """Sets onto whose hull one can project."""

    def project(self, x: Tensor) -> Tensor:
        """Return the point of the hull nearest to `x` (Euclidean), shape (rows, d)."""


@runtime_checkable
class CanRestrict(Protocol):
    """Sets in which entries can be fixed."""

    def restrict(self, kept: Tensor | None = None, pruned: Tensor | None = None) -> MaskSet:
        """Return the masks that keep all entries of `kept` and prune all of `pruned`, boolean, shape (rows, d).

        Raises
        ------
        MaskoptError
            If there is no such mask.
        """


@runtime_checkable
class CanSwap(Protocol):
    """Sets in which a kept entry can be exchanged for a pruned one of the same tile."""

    def swap_tile(self, shape: Shape) -> tuple[int, int]:
        """Return rows and columns of the tiles within which entries may be exchanged."""

    def neighbours(self, mask: Tensor) -> Iterator[Tensor]:
        """Yield every mask one exchange away; for small shapes."""


@runtime_checkable
class HasGroups(Protocol):
    """Sets whose groups each choose entries of their own: dependent rounding and block steps need them."""

    def groups(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (groups, entries)."""

    def ungroup(self, groups: Tensor, shape: Shape) -> Tensor:
        """Undo `groups`."""
