"""A set of masks as solvers see it: a few methods every set has, and others that some have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from scipy.optimize import LinearConstraint
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.exact import floor_of_sum
from maskopt.oracles.interior import mean_of_vertices
from maskopt.oracles.milp import MilpFormulation

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

_TOGETHER = 4096  # patterns that are looked at together


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

    Sets know no shape unless their data has one: every method takes it from its argument, so one object serves all
    layers of a model. A new set has to say `milp_constraints`; every other method below has a default that follows
    from it, correct and slow, and what a set knows better it overrides. More can be asked of some sets; a solver names
    what it needs in `Solver.asks`, and the protocols in this module say what these methods promise.
    """

    protected: Tensor | None = None
    """Entries that every mask keeps, boolean, shape (rows, d)."""

    forbidden: Tensor | None = None
    """Entries that every mask prunes, boolean, shape (rows, d)."""

    exact: bool = True
    """Whether `lmo` returns a minimiser; where it does not, `lmo_bound` is still a proven lower bound."""

    def __init_subclass__(cls, **settings: object) -> None:
        super().__init_subclass__(**settings)
        if cls.lmo is MaskSet.lmo and "exact" not in vars(cls):
            cls.exact = False  # HiGHS minimises up to tolerances

    def __repr__(self) -> str:
        settings = (
            f"{name}={_brief(value)}"
            for name, value in vars(self).items()
            if not name.startswith("_") and value is not None
        )
        return f"{type(self).__name__}({', '.join(settings)})"

    @abstractmethod
    def milp_constraints(self, shape: Shape) -> LinearConstraint | MilpFormulation:
        """Return the set as constraints on the flattened mask in {0, 1}, for a weight of this shape.

        A `scipy.optimize.LinearConstraint`, dense or sparse, with one column for each entry in row-major order; with
        auxiliary variables a `MilpFormulation`.
        """

    def formulation(self, shape: Shape) -> MilpFormulation:
        """Return `milp_constraints` in one form: sparse, and with its auxiliary variables, if any.

        Raises
        ------
        MaskoptError
            If the number of columns does not fit the shape.
        """
        given = self.milp_constraints(shape)
        formulation = given if isinstance(given, MilpFormulation) else MilpFormulation(given)
        if formulation.entries != shape[0] * shape[1]:
            raise MaskoptError(
                f"The constraints of {self} have {formulation.entries} columns for mask entries and "
                f"{formulation.auxiliary} for auxiliary variables; a weight of shape {tuple(shape)} has "
                f"{shape[0] * shape[1]} entries."
            )
        return formulation

    def check(self, shape: Shape) -> None:
        """Raise MaskoptError, with the reason, if the set does not fit a weight of this shape or is empty.

        By default: if the oracle's answer to a cost of zero is not in the set.
        """
        if not self.contains(self.lmo_mask(torch.zeros(shape[0], shape[1]))):
            raise MaskoptError(f"{self} has no mask of shape {tuple(shape)}.")

    def lmo(self, cost: Tensor) -> Tensor:
        """Linear minimisation oracle: the mask of least total cost, as zeros and ones in the type of `cost`.

        By default HiGHS finds it, one row block after the other; `exact` is then False.

        Parameters
        ----------
        cost : Tensor
            Floating point, shape (rows, d), no NaN. Ties go to the lower index where the set says nothing else.

        Raises
        ------
        MaskoptError
            If the set is empty.
        """
        vertex = torch.empty_like(cost)
        for rows, formulation in self._blocks(cost.shape):
            block = cost[rows]
            chosen = formulation.cheapest(block.double().cpu().numpy())
            if chosen is None:
                raise MaskoptError(f"{self} has no mask of shape {tuple(cost.shape)}.")
            vertex[rows] = torch.from_numpy(chosen).view(block.shape).to(cost)
        return vertex

    def _blocks(self, shape: Shape) -> Iterator[tuple[slice, MilpFormulation]]:
        """Yield every row block with its formulation."""
        height, own = self.row_block(shape), None
        for first in range(0, shape[0], height):
            rows = slice(first, first + height)
            part = self.rows(rows, shape)
            if part is not self:
                yield rows, part.formulation((height, shape[1]))
                continue
            own = own or self.formulation((height, shape[1]))
            yield rows, own

    def contains(self, mask: Tensor) -> bool:
        """Whether a boolean mask, shape (rows, d), belongs to the set."""
        return mask.dtype == torch.bool and all(
            formulation.contains(mask[rows].cpu().numpy()) for rows, formulation in self._blocks(mask.shape)
        )

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a point in the relative interior of the hull: the mean of all masks where it is known.

        By default the mean of at most 20 masks, which span the hull of a row block unless it has more than 10
        dimensions; of such a hull it is some point.
        """
        return mean_of_vertices(self, shape, device).to(dtype)

    def row_block(self, shape: Shape) -> int:
        """Return how many consecutive rows form a row block; row blocks are independent of each other.

        By default one row where the set is `separable`, else all.
        """
        return 1 if self.separable else shape[0]

    def rows(self, index: Index, shape: Shape) -> MaskSet:
        """Return the set for some rows (whole row blocks) of a weight of this shape.

        By default the set itself, which is right if nothing in it belongs to certain rows.
        """
        return self

    @property
    def separable(self) -> bool:
        """Whether rows are independent of each other; a set in which they are says `separable = True`."""
        return False

    def lmo_mask(self, cost: Tensor) -> Tensor:
        """Return `lmo` as a boolean mask; integer costs are fine."""
        return self.lmo(cost if cost.is_floating_point() else cost.double()).bool()

    def lmo_bound(self, cost: Tensor) -> Tensor:
        """Return a proven lower bound on the cost of any mask, one per row block, float64; tight for exact sets.

        By default the cost of `lmo` where it is exact, else a bound by the linear relaxation of the formulation.

        Parameters
        ----------
        cost : Tensor
            Finite, shape (rows, d).
        """
        if not self.exact:
            bounds = [
                formulation.lower_bound(cost[rows].double().cpu().numpy())
                for rows, formulation in self._blocks(cost.shape)
            ]
            return torch.tensor(bounds, dtype=torch.float64, device=cost.device)
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
        # Where membership is the formulation's it is asked for many patterns at once.
        whole = self.formulation(shape) if type(self).contains is MaskSet.contains else None
        for first in range(0, 2**size, _TOGETHER):
            numbers = torch.arange(first, min(first + _TOGETHER, 2**size))
            masks = ((numbers.unsqueeze(1) >> bits) & 1).bool()
            if whole is not None:
                masks = masks[torch.from_numpy(whole.members(masks.numpy()))]
            for mask in masks.view(-1, shape[0], shape[1]):
                if whole is not None or self.contains(mask):
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
    """Sets in which a kept entry can be exchanged for a pruned one of the same group, whatever the mask."""

    def swap_groups(self, shape: Shape) -> Tensor:
        """Return the group of each entry, int64, shape (rows, d); -1 for entries that never change.

        A member in which a kept and a pruned entry of one group (not -1) are exchanged is a member. Groups lie inside
        row blocks.
        """


@runtime_checkable
class HasGroups(Protocol):
    """Sets whose groups each choose entries of their own: dependent rounding and block steps need them."""

    def groups(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (groups, entries)."""

    def ungroup(self, groups: Tensor, shape: Shape) -> Tensor:
        """Undo `groups`."""


def _brief(value: object) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() > 1 else str(value)
