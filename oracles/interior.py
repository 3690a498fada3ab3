"""A point in the hull of a set, from calls of its oracle alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from maskopt.oracles.base import MaskSet, Shape

__all__ = ["mean_of_vertices"]

_PAIRS = 10  # pairs of masks that are averaged at most
_LARGE = 2**12  # entries of a row block from which on memory allows only _FEW pairs
_FEW = 4


def mean_of_vertices(masks: MaskSet, shape: Shape, device: torch.device) -> Tensor:
    """Return the mean of masks that span the hull, or of 20 masks where more would be needed.

    For every row block the oracle is called with a random cost that is orthogonal to the differences of the masks found
    so far, and with its negative. If the two masks differ, they add a dimension; if they do not, all masks of the block
    lie in the span. The mean of masks that span a polytope lies in its relative interior. All blocks get the same
    random numbers, so that no block's answer depends on the others.

    Parameters
    ----------
    masks : MaskSet
    shape : (int, int)
        Of the weight.
    device : torch.device

    Returns
    -------
    Tensor
        Float64, shape (rows, d).
    """
    height = masks.row_block(shape)
    blocks, size = shape[0] // height, height * shape[1]
    random = torch.Generator().manual_seed(0)
    total = torch.zeros((blocks, size), dtype=torch.float64, device=device)
    number = torch.zeros((blocks, 1), dtype=torch.float64, device=device)
    open_ = torch.ones_like(number, dtype=torch.bool)
    basis: list[Tensor] = []
    for _ in range(min(size, _PAIRS if size < _LARGE else _FEW)):
        drawn = torch.randn(size, generator=random, dtype=torch.float64).to(device)
        cost = _without(_without(drawn.expand(blocks, size), basis), basis)
        open_ = open_ & (cost.norm(dim=1, keepdim=True) > 1e-6 * drawn.norm())
        if not bool(open_.any()):
            break
        low, high = (masks.lmo((sign * cost).view(shape[0], shape[1])).view(blocks, size) for sign in (1.0, -1.0))
        total += open_ * (low + high)
        number += 2.0 * open_
        new = _without(_without(high - low, basis), basis)
        length = new.norm(dim=1, keepdim=True)
        open_ = open_ & (length > 1e-6)
        basis.append(torch.where(open_, new / length, 0.0))
    return (total / number).view(shape[0], shape[1])


def _without(vectors: Tensor, basis: list[Tensor]) -> Tensor:
    """Return each row's component orthogonal to the row's orthonormal basis."""
    for one in basis:
        vectors = vectors - (vectors * one).sum(1, keepdim=True) * one
    return vectors
