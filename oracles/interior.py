"""A point inside the hull of a set of which only the oracle is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from maskopt.oracles.base import MaskSet, Shape

__all__ = ["mean_of_vertices"]

_PAIRS = 10  # of masks that are averaged at most
_LARGE = 2**12  # entries of a row block from which on memory allows only _FEW
_FEW = 4


def mean_of_vertices(masks: MaskSet, shape: Shape, device: torch.device) -> Tensor:
    """Return the mean of masks that span the hull, or of 20 where they would have to be more.

    Every row block asks for the cheapest and the costliest mask of a random cost, orthogonal to the differences of the
    masks it has. If the two differ they add a dimension; if they do not, no mask of the block leaves the span, and the
    mean of masks that span a polytope lies in its relative interior. All blocks get the same random numbers, so that
    none depends on the others.

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
    """Return the part of each row that is orthogonal to its orthonormal basis."""
    for one in basis:
        vectors = vectors - (vectors * one).sum(1, keepdim=True) * one
    return vectors
