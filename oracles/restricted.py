"""Partition matroids with fixed entries: some that every mask keeps, some that every mask prunes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import vstack
from torch import Tensor

from maskopt.checks import shown
from maskopt.errors import MaskoptError
from maskopt.oracles.base import Index, Shape
from maskopt.oracles.fixed import fixed_rows, joined, of_rows, refuse_contradiction, respects
from maskopt.oracles.matroid import PartitionMatroid

__all__ = ["Protected", "Restricted"]


class Restricted(PartitionMatroid):
    """The masks of `base` that keep every protected entry and prune every forbidden one.

    Parameters
    ----------
    base : PartitionMatroid
        The set to restrict; entries fixed there stay fixed.
    protected, forbidden : Tensor, optional
        Boolean, shape (rows, d).

    Raises
    ------
    MaskoptError
        If there is no such mask.

    Examples
    --------
    >>> import torch
    >>> from maskopt.oracles import PerRow, Restricted
    >>> masks = Restricted(PerRow(2), protected=torch.tensor([[True, False, False, False]]))
    >>> masks.lmo_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0]])).tolist()
    [[True, False, False, True]]
    >>> masks.count((1, 4))
    3
    """

    def __init__(
        self, base: PartitionMatroid, protected: Tensor | None = None, forbidden: Tensor | None = None
    ) -> None:
        if not isinstance(base, PartitionMatroid):
            raise MaskoptError(f"Restricted needs a set such as PerRow(0.5); got {shown(base)}.")
        super().__init__(base.keep, base.tile, base.name, at_most=base.at_most)
        self.protected, self.forbidden = joined(base.protected, protected), joined(base.forbidden, forbidden)
        some = self.protected if self.protected is not None else self.forbidden
        if some is None:
            raise MaskoptError("A restriction needs entries to keep or to prune; got neither.")
        self._shape = some.shape
        self._biases: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        refuse_contradiction(self.protected, self.forbidden)
        keep, held, banned = base.kept_per_group(self._shape), self._held(self.protected), self._held(self.forbidden)
        excess = held - keep
        if bool((excess > 0).any()):
            raise MaskoptError(
                f"Group {int(excess.argmax())} protects {int(excess.max())} more entries than {base} keeps there."
            )
        height, width = self.tile_of(self._shape)
        excess = keep + banned - height * width
        if not self.at_most and bool((excess > 0).any()):
            raise MaskoptError(
                f"Group {int(excess.argmax())} forbids {int(excess.max())} more entries than {base} prunes there."
            )

    def __repr__(self) -> str:
        words = (("protected", self.protected), ("forbidden", self.forbidden))
        fixed = [f"{int(entries.sum())} {word}" for word, entries in words if entries is not None]
        return f"Restricted({super().__repr__()}, {', '.join(fixed)})"

    def _held(self, entries: Tensor | None) -> Tensor:
        """Return how many of these entries each group has, int64, shape (groups,), on the CPU."""
        if entries is None:
            return torch.zeros_like(self.kept_per_group(self._shape))
        return self.groups(entries).sum(1).cpu()

    def _fixed(self, cost: Tensor) -> Tensor:
        if cost.shape != self._shape:
            self.check(cost.shape)
        key = cost.dtype, cost.device
        if key not in self._biases:
            bias = torch.zeros(self._shape, dtype=cost.dtype, device=cost.device)
            for entries, value in ((self.protected, -torch.inf), (self.forbidden, torch.inf)):
                if entries is not None:
                    bias[entries.to(cost.device)] = value
            self._biases[key] = bias
        # Costs are made finite first, so that no infinite cost displaces a fixed entry.
        limits = torch.finfo(cost.dtype)
        return cost.clamp(limits.min, limits.max).add_(self._biases[key])

    def check(self, shape: Shape) -> None:
        super().check(shape)
        if tuple(shape) != tuple(self._shape):
            raise MaskoptError(f"{self} fixes entries of a weight of shape {tuple(self._shape)}; got {tuple(shape)}.")

    def project(self, x: Tensor) -> Tensor:
        far = torch.finfo(x.dtype).max / 8
        bias = self._fixed(torch.zeros_like(x)).neg_().clamp_(-2 * far, 2 * far)
        return super().project(x.clamp(-far, far).add_(bias))

    def _free(self, shape: Shape) -> tuple[Tensor, Tensor]:
        size, keep = super()._free(shape)
        held = self._held(self.protected)
        return size - held - self._held(self.forbidden), keep - held

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        center = super().center(shape, dtype, device)
        for entries, value in ((self.protected, 1.0), (self.forbidden, 0.0)):
            if entries is not None:
                center[entries.to(device)] = value
        return center

    def enumerate(self, shape: Shape) -> Iterator[Tensor]:
        return (mask for mask in super().enumerate(shape) if self.contains(mask))

    def milp_constraints(self, shape: Shape) -> LinearConstraint:
        groups = super().milp_constraints(shape)
        matrix, values = fixed_rows(self.protected, self.forbidden)
        lower, upper = (np.concatenate((side, values)) for side in (groups.lb, groups.ub))
        return LinearConstraint(vstack((groups.A, matrix)), lower, upper)

    def rowwise(self, shape: Shape, mask: Tensor | None = None) -> Restricted:
        try:
            return Restricted(super().rowwise(shape, mask), self.protected, self.forbidden)
        except MaskoptError:
            # Even counts contradict the fixed entries of some row; those of a member do not.
            member = self.lmo_mask(-self.center(shape, torch.float32, torch.device("cpu")))
            return Restricted(super().rowwise(shape, member), self.protected, self.forbidden)

    def contains(self, mask: Tensor) -> bool:
        return super().contains(mask) and respects(mask, self.protected, self.forbidden)

    def rows(self, index: Index, shape: Shape) -> Restricted:
        plain = self._like(self.keep, self.tile).rows(index, shape)
        parts = (of_rows(entries, index) for entries in (self.protected, self.forbidden))
        return Restricted(plain, *parts)


def Protected(base: PartitionMatroid, protected: Tensor) -> Restricted:  # noqa: N802 - named like the set
    """Return the set of masks of `base` that keep every protected entry.

    SparseFW protects a ratio alpha of the entries so (arXiv 2510.13713); others protect outliers.

    Parameters
    ----------
    base : PartitionMatroid
        The set to restrict.
    protected : Tensor
        Boolean, shape (rows, d); no group may have more protected entries than it keeps.

    Returns
    -------
    Restricted

    Raises
    ------
    MaskoptError
        If some group has more protected entries than it keeps.
    """
    return Restricted(base, protected)


# Set here, because a restriction is a partition matroid itself.
PartitionMatroid._restriction = Restricted
