"""The interface of a set of masks: the methods that every set has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from scipy.optimize import LinearConstraint
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.exact import floor_of_sum
from maskopt.oracles.interior import mean_of_vertices
from maskopt.oracles.milp import MilpFormulation

__all__ = ["Index", "MaskSet", "Shape", "box_step", "face_tolerance", "fitted"]

Index = slice | Tensor
"""Some rows: a slice, or a vector of row numbers (whole row blocks where a set couples rows)."""

Shape = tuple[int, int] | torch.Size

_BATCH = 4096  # patterns tested for membership at once


def face_tolerance(dtype: torch.dtype) -> float:
    """Return the tolerance within which an entry of a relaxed mask counts as 0 or 1: 16 machine epsilons.

    In-face oracles and the solvers that call them use the same number.

    Parameters
    ----------
    dtype : torch.dtype
        Floating-point type of the relaxed mask.
    """
    return 16.0 * torch.finfo(dtype).eps


def fitted(masks: MaskSet, tile: tuple[int | None, int | None], shape: Shape) -> tuple[int, int]:
    """Return a tile's rows and columns on a weight of this shape.

    Parameters
    ----------
    masks : MaskSet
        Named in the message.
    tile : (int or None, int or None)
        Rows and columns of a tile; None stands for all of them.
    shape : (int, int)
        Of the weight.

    Returns
    -------
    (int, int)

    Raises
    ------
    MaskoptError
        If the tile does not divide the weight.
    """
    rows, columns = shape
    height, width = tile[0] or rows, tile[1] or columns
    if columns % width:
        raise MaskoptError(f"{masks} needs a number of input features divisible by {width}; this weight has {columns}.")
    if rows % height:
        raise MaskoptError(f"{masks} needs a number of rows divisible by {height}; this weight has {rows}.")
    return height, width


def box_step(x: Tensor, direction: Tensor) -> Tensor:
    """Return the largest step size that keeps every entry of x + step * direction in [0, 1].

    Parameters
    ----------
    x, direction : Tensor
        Shape (rows, d); `x` in [0, 1].

    Returns
    -------
    Tensor
        Shape (rows,); infinite for a row whose direction is zero.
    """
    # The slack is 1 - x where the direction rises and x where it falls; rising is 0 or 1.
    rising = torch.gt(direction, 0.0, out=torch.empty_like(direction))
    slack = torch.lerp(x, 1.0 - x, rising)
    # With a positive slack, 0 / 0 becomes infinite: an entry that does not change limits nothing.
    return slack.clamp_(min=torch.finfo(x.dtype).tiny).div_(direction.abs()).amin(1)


class MaskSet(ABC):
    """A set of keep masks of a weight; solvers work on its convex hull.

    A set has no shape of its own unless its data has one: every method takes the shape from its argument, so one
    object serves all layers of a model. A subclass must define `milp_constraints`; every other method has a correct
    but slow default that follows from it, to be overridden where the structure of the set allows something faster.
    Methods that only some sets have are described by the protocols in `protocols.py`; a solver declares those it needs
    in `requires`.

    Class attributes
    ----------------
    protected, forbidden : Tensor, optional
        Entries that every mask keeps or prunes, boolean, shape (rows, d).
    exact : bool
        Whether `lmo` returns a minimiser; where it does not, `lmo_bound` is still a proven lower bound.
    separable : bool
        Whether rows are independent of each other.
    """

    protected: Tensor | None = None
    forbidden: Tensor | None = None
    exact: bool = True

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
        """Return the set as linear constraints on the flattened mask in {0, 1}.

        Parameters
        ----------
        shape : (int, int)
            Of the weight, (rows, d).

        Returns
        -------
        LinearConstraint or MilpFormulation
            A `scipy.optimize.LinearConstraint`, dense or sparse, with one column for each entry in row-major order; a
            `MilpFormulation` where the set needs auxiliary variables.
        """

    def formulation(self, shape: Shape) -> MilpFormulation:
        """Return `milp_constraints` as a `MilpFormulation`, with a sparse matrix.

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

        By default the oracle's answer to a cost of zero is tested for membership.
        """
        if not self.contains(self.lmo_mask(torch.zeros(shape[0], shape[1]))):
            raise MaskoptError(f"{self} has no mask of shape {tuple(shape)}.")

    def lmo(self, cost: Tensor) -> Tensor:
        """Linear minimisation oracle: return a mask m that minimises <cost, m>.

        By default HiGHS solves the MILP formulation, one row block after the other; `exact` is then False.

        Parameters
        ----------
        cost : Tensor
            Floating point, shape (rows, d), no NaN. Among equal costs the lower index is kept, unless the set documents
            another rule.

        Returns
        -------
        Tensor
            Zeros and ones in the type of `cost`, shape (rows, d).

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

        By default the mean of at most 20 masks. They span the hull of a row block of up to 10 dimensions; of a larger
        hull the mean is some point, possibly on its boundary.
        """
        return mean_of_vertices(self, shape, device).to(dtype)

    def row_block(self, shape: Shape) -> int:
        """Return how many consecutive rows form a row block; row blocks are independent of each other.

        By default one row where the set is `separable`, else all.
        """
        return 1 if self.separable else shape[0]

    def rows(self, index: Index, shape: Shape) -> MaskSet:
        """Return the set for some rows (whole row blocks) of a weight of this shape.

        By default the set itself, which is correct if none of its data belongs to particular rows.
        """
        return self

    @property
    def separable(self) -> bool:
        """Whether rows are independent of each other; a subclass in which they are sets `separable = True`."""
        return False

    def lmo_mask(self, cost: Tensor) -> Tensor:
        """Return `lmo` as a boolean mask; integer costs are fine."""
        return self.lmo(cost if cost.is_floating_point() else cost.double()).bool()

    def lmo_bound(self, cost: Tensor) -> Tensor:
        """Return a proven lower bound on the cost of any mask, per row block; tight for exact sets.

        By default the cost of `lmo` where it is exact, else the bound of the formulation's linear relaxation.

        Parameters
        ----------
        cost : Tensor
            Finite, shape (rows, d).

        Returns
        -------
        Tensor
            Float64, shape (row blocks,).
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
        """Return the mask nearest to the relaxed mask `x` (Euclidean), boolean, shape (rows, d)."""
        # |m - x|^2 = sum_i m_i (1 - 2 x_i) + a constant.
        return self.lmo_mask(0.5 - x.to(torch.promote_types(x.dtype, torch.float32)))

    def count(self, shape: Shape) -> int:
        """Return the number of masks, exactly."""
        return sum(1 for _ in self.enumerate(shape))

    def enumerate(self, shape: Shape) -> Iterator[Tensor]:
        """Yield every mask, shape (rows, d); for small shapes only."""
        size = shape[0] * shape[1]
        bits = torch.arange(size)
        # The formulation tests many patterns for membership at once.
        whole = self.formulation(shape) if type(self).contains is MaskSet.contains else None
        for first in range(0, 2**size, _BATCH):
            numbers = torch.arange(first, min(first + _BATCH, 2**size))
            masks = ((numbers.unsqueeze(1) >> bits) & 1).bool()
            if whole is not None:
                masks = masks[torch.from_numpy(whole.members(masks.numpy()))]
            for mask in masks.view(-1, shape[0], shape[1]):
                if whole is not None or self.contains(mask):
                    yield mask


def _brief(value: object) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() > 1 else str(value)
