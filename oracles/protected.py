"""Entries that must stay: a wrapper around any set of masks."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array, vstack
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles.base import Index, Shape
from maskopt.oracles.matroid import PartitionMatroid

__all__ = ["Protected"]


class Protected(PartitionMatroid):
    """The masks of `base` that keep every protected entry (SparseFW's fixed ratio alpha, outliers).

    Parameters
    ----------
    base : PartitionMatroid
        The set to restrict.
    protected : Tensor
        Boolean, shape (rows, d); no group may hold more protected entries than it keeps.

    Raises
    ------
    MaskoptError
        If some group has more protected entries than it keeps.
    """

    def __init__(self, base: PartitionMatroid, protected: Tensor) -> None:
        super().__init__(base.keep, base.tile, base.name)
        self.protected: Tensor = protected if base.protected is None else protected | base.protected
        excess = self.groups(self.protected).sum(1) - base.kept_per_group(protected.shape).to(protected.device)
        if bool((excess > 0).any()):
            raise MaskoptError(
                f"Group {int(excess.argmax())} protects {int(excess.max())} more entries than {base} keeps there."
            )

    def __repr__(self) -> str:
        return f"Protected({super().__repr__()}, {int(self.protected.sum())} entries)"

    def vertex(self, cost: Tensor) -> Tensor:
        # Even an infinitely good entry comes after the protected ones.
        cost = cost.clamp_min(torch.finfo(cost.dtype).min).masked_fill(self.protected, -torch.inf)
        return super().vertex(cost)

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        protected = self.groups(self.protected).to(device)
        held = protected.sum(1, keepdim=True)
        free = self.kept_per_group(shape).to(device).unsqueeze(1) - held
        share = free.double() / (protected.shape[1] - held).clamp_min(1)
        return self.ungroup(torch.where(protected, 1.0, share).to(dtype), shape)

    def count(self, shape: Shape) -> int:
        groups = self.groups(self.protected)
        held, keep = groups.sum(1).tolist(), self.kept_per_group(shape).tolist()
        return math.prod(math.comb(groups.shape[1] - h, k - h) for h, k in zip(held, keep, strict=True))

    def enumerate(self, shape: Shape) -> Iterator[Tensor]:
        return (mask for mask in super().enumerate(shape) if self.contains(mask))

    def milp_constraints(self, shape: Shape) -> LinearConstraint:
        groups = super().milp_constraints(shape)
        held = self.protected.flatten().nonzero().flatten().numpy()
        ones = csr_array((np.ones(len(held)), (np.arange(len(held)), held)), shape=(len(held), shape[0] * shape[1]))
        right = np.concatenate((groups.lb, np.ones(len(held))))
        return LinearConstraint(vstack((groups.A, ones)), right, right)

    def rowwise(self, shape: Shape, mask: Tensor | None = None) -> "Protected":
        rowwise = super().rowwise(shape, mask)
        held = rowwise.groups(self.protected).sum(1)
        if bool((held > rowwise.kept_per_group(shape).to(held.device)).any()):
            # Even counts do not cover what is protected in some row: a member's do.
            member = self.round(self.center(shape, torch.float32, self.protected.device))
            rowwise = super().rowwise(shape, member)
        return Protected(rowwise, self.protected)

    def contains(self, mask: Tensor) -> bool:
        return super().contains(mask) and bool((mask | ~self.protected).all())

    def rows(self, index: Index, shape: Shape) -> "Protected":
        plain = PartitionMatroid(self.keep, self.tile, self.name).rows(index, shape)
        return Protected(plain, self.protected[index])
