"""Helpers for sets with fixed entries: entries that every mask keeps, and others that every mask prunes."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from maskopt.checks import shown
from maskopt.errors import MaskoptError

__all__ = ["fixed_rows", "joined", "of_rows", "refuse_contradiction", "respects"]


def joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the union of two sets of fixed entries.

    Parameters
    ----------
    one, other : Tensor, optional
        Boolean, shape (rows, d).

    Returns
    -------
    Tensor or None
        Boolean, shape (rows, d); None if both are None.

    Raises
    ------
    MaskoptError
        If one is no boolean matrix, or both differ in shape.
    """
    for entries in (one, other):
        if entries is not None and not isinstance(entries, Tensor):
            raise MaskoptError(f"Fixed entries are marked in a boolean tensor; got {shown(entries)}.")
        if entries is not None and (entries.dtype != torch.bool or entries.ndim != 2):
            raise MaskoptError(
                f"Fixed entries are marked in a boolean matrix; got {entries.dtype} of shape {tuple(entries.shape)}."
            )
    if one is None or other is None:
        return other if one is None else one
    if one.shape != other.shape:
        raise MaskoptError(f"Fixed entries have the shapes {tuple(one.shape)} and {tuple(other.shape)}.")
    return one | other.to(one.device)


def of_rows(entries: Tensor | None, index: slice | Tensor) -> Tensor | None:
    """Return the fixed entries of some rows.

    Parameters
    ----------
    entries : Tensor, optional
        Boolean, shape (rows, d).
    index : slice or Tensor
        A vector of row numbers may lie on another device, that of the problem.

    Returns
    -------
    Tensor or None
        Boolean, shape (rows chosen, d).
    """
    if entries is None:
        return None
    return entries[index.to(entries.device) if isinstance(index, Tensor) else index]


def refuse_contradiction(kept: Tensor | None, pruned: Tensor | None) -> None:
    """Check that no entry is fixed to both values.

    Parameters
    ----------
    kept, pruned : Tensor, optional
        Boolean, shape (rows, d).

    Raises
    ------
    MaskoptError
        If an entry is both kept and pruned, or if the shapes differ.
    """
    if kept is None or pruned is None:
        return
    if kept.shape != pruned.shape:
        raise MaskoptError(f"Fixed entries have the shapes {tuple(kept.shape)} and {tuple(pruned.shape)}.")
    both = kept & pruned.to(kept.device)
    if bool(both.any()):
        row, column = both.nonzero()[0].tolist()
        raise MaskoptError(f"Entry ({row}, {column}) cannot be both kept and pruned.")


def respects(mask: Tensor, kept: Tensor | None, pruned: Tensor | None) -> bool:
    """Whether a mask keeps all entries of `kept` and prunes all of `pruned`.

    Parameters
    ----------
    mask : Tensor
        Boolean, shape (rows, d).
    kept, pruned : Tensor, optional
        Boolean, shape (rows, d).
    """
    stays = kept is None or bool((mask | ~kept.to(mask.device)).all())
    return stays and (pruned is None or not bool((mask & pruned.to(mask.device)).any()))


def fixed_rows(kept: Tensor | None, pruned: Tensor | None) -> tuple[csr_array, np.ndarray]:
    """Return A and b of the equations A x = b that fix entries of the flattened mask x.

    Parameters
    ----------
    kept, pruned : Tensor, optional
        Boolean, shape (rows, d), at least one of them given.

    Returns
    -------
    csr_array, ndarray
        Shapes (fixed entries, rows * d) and (fixed entries,).
    """
    places, values, size = [], [], 0
    for entries, value in ((kept, 1.0), (pruned, 0.0)):
        if entries is not None:
            size = entries.numel()
            places.append(entries.flatten().nonzero().flatten().cpu().numpy())
            values.append(np.full(len(places[-1]), value))
    place, right = np.concatenate(places), np.concatenate(values)
    matrix = csr_array((np.ones(len(place)), (np.arange(len(place)), place)), shape=(len(place), size))
    return matrix, right
