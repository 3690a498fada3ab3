"""Methods that only some sets of masks have, as protocols: any class with these methods satisfies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from maskopt.oracles.base import MaskSet, Shape

__all__ = ["CanProject", "CanRestrict", "CanSwap", "HasFaces", "HasGroups"]


@runtime_checkable
class HasFaces(Protocol):
    """Sets with an oracle for the faces of their hull; decomposition-invariant Frank-Wolfe methods need one.

    Methods
    -------
    inface(cost, x)
        The vertex of minimal cost on the smallest face that contains `x`.
    max_step(x, direction)
        The largest step size that stays in the hull.

    References
    ----------
    Garber and Meshi, Linear-memory and decomposition-invariant linearly convergent conditional gradient algorithm for
    structured polytopes, NeurIPS 2016.
    """

    def inface(self, cost: Tensor, x: Tensor) -> Tensor:
        """Return the vertex of minimal cost on the smallest face that contains the point `x`, in the form of `lmo`.

        Parameters
        ----------
        cost, x : Tensor
            Finite, shape (rows, d); `x` in the hull. An entry of `x` within `face_tolerance` of 0 or 1 counts as equal
            to it.
        """

    def max_step(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the largest step size for which x + step * direction stays in the hull.

        Parameters
        ----------
        x, direction : Tensor
            Shape (rows, d); `x` in the hull, `direction` in its span.

        Returns
        -------
        Tensor
            Shape (rows,), infinite where nothing limits the step; that of a row block is the minimum over its rows.
        """


@runtime_checkable
class CanProject(Protocol):
    """Sets with a Euclidean projection onto their hull.

    Methods
    -------
    project(x)
        The nearest point of the hull.
    """

    def project(self, x: Tensor) -> Tensor:
        """Return the point of the hull nearest to `x` (Euclidean), shape (rows, d)."""


@runtime_checkable
class CanRestrict(Protocol):
    """Sets in which entries can be fixed, as branch and bound does.

    Methods
    -------
    restrict(kept, pruned)
        The subset with some entries fixed.
    """

    def restrict(self, kept: Tensor | None = None, pruned: Tensor | None = None) -> MaskSet:
        """Return the masks that keep all entries of `kept` and prune all of `pruned`.

        Parameters
        ----------
        kept, pruned : Tensor, optional
            Boolean, shape (rows, d).

        Raises
        ------
        MaskoptError
            If there is no such mask.
        """


@runtime_checkable
class CanSwap(Protocol):
    """Sets in which any kept entry can be exchanged for any pruned one of the same group.

    Methods
    -------
    swap_groups(shape)
        The group of each entry.
    """

    def swap_groups(self, shape: Shape) -> Tensor:
        """Return the group of each entry, int64, shape (rows, d); -1 for entries that never change.

        If a kept and a pruned entry of one group (not -1) of a member are exchanged, the result is a member. No group
        extends over several row blocks.
        """


@runtime_checkable
class HasGroups(Protocol):
    """Sets that are a product of one set per group of entries; dependent rounding and block steps need the groups.

    Methods
    -------
    groups(matrix)
        Rearrange a matrix by groups.
    ungroup(groups, shape)
        The inverse.
    """

    def groups(self, matrix: Tensor) -> Tensor:
        """Rearrange (rows, d) into (groups, entries)."""

    def ungroup(self, groups: Tensor, shape: Shape) -> Tensor:
        """Undo `groups`."""
