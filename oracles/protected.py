"""Entries that must stay: a wrapper around any set of masks."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array, vstack
from torch import Tensor

from maskopt.errors import MaskoptError
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
        self.protected = protected
        excess = self.groups(protected).sum(1) - base.kept_per_group(protected.shape)
        if bool((excess > 0).any()):
            raise MaskoptError(
                f"Group {int(excess.argmax())} protects {int(excess.max())} more entries than {base} keeps there."
            )

    def vertex(self, cost: Tensor) -> Tensor:
        return super().vertex(cost.masked_fill(self.protected, -float("inf")))

    def center(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        protected = self.groups(self.protected).to(device)
        held = protected.sum(1, keepdim=True)
        free = self.kept_per_group(shape).to(device).unsqueeze(1) - held
        share = free / (protected.shape[1] - held).clamp_min(1)
        return self.ungroup(torch.where(protected, 1.0, share).to(dtype), shape)

    def count(self, shape: tuple[int, int]) -> int:
        groups = self.groups(self.protected)
        held, keep = groups.sum(1).tolist(), self.kept_per_group(shape).tolist()
        return math.prod(math.comb(groups.shape[1] - h, k - h) for h, k in zip(held, keep, strict=True))

    def enumerate(self, shape: tuple[int, int]) -> Iterator[Tensor]:
        return (mask for mask in super().enumerate(shape) if self.contains(mask))

    def milp_constraints(self, shape: tuple[int, int]) -> LinearConstraint:
        groups = super().milp_constraints(shape)
        held = self.protected.flatten().nonzero().flatten().numpy()
        ones = csr_array((np.ones(len(held)), (np.arange(len(held)), held)), shape=(len(held), shape[0] * shape[1]))
        right = np.concatenate((groups.lb, np.ones(len(held))))
        return LinearConstraint(vstack((groups.A, ones)), right, right)

    def rowwise(self, shape: tuple[int, int], mask: Tensor | None = None) -> "Protected":
        if mask is None:
            mask = self.round(self.center(shape, torch.float32, self.protected.device))
        return Protected(super().rowwise(shape, mask), self.protected)

    def contains(self, mask: Tensor) -> bool:
        return bool((mask | ~self.protected).all()) and super().contains(mask)

    def rows(self, index: slice, shape: tuple[int, int]) -> "Protected":
        return Protected(super().rows(index, shape), self.protected[index])
