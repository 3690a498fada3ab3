"""The partition matroids that have names: unstructured, per row, N:M, blocks, and each with at most as many entries."""

from __future__ import annotations

from torch import Tensor

from maskopt.checks import shown, whole
from maskopt.errors import MaskoptError
from maskopt.oracles.matroid import PartitionMatroid

__all__ = ["NM", "AtMost", "Blocks", "PerRow", "Unstructured"]


def Unstructured(keep: float | int) -> PartitionMatroid:  # noqa: N802 - named like the sets it stands for
    """Return the set of masks that keep a number of entries of the whole matrix.

    Parameters
    ----------
    keep : float or int
        A fraction in [0, 1] (rounded up) or a count.

    Returns
    -------
    PartitionMatroid

    Examples
    --------
    >>> import torch
    >>> from maskopt.oracles import Unstructured
    >>> weight = torch.tensor([[4.0, -3.0, 0.1], [0.2, -2.0, 0.3]])
    >>> Unstructured(0.5).lmo_mask(-weight.abs()).tolist()
    [[True, True, False], [False, True, False]]
    """
    return PartitionMatroid(keep, (None, None), "Unstructured")


def PerRow(keep: float | int | Tensor) -> PartitionMatroid:  # noqa: N802
    """Return the set of masks that keep a number of entries of every row.

    Parameters
    ----------
    keep : float, int or Tensor
        A fraction in [0, 1] (rounded up), a count, or a count for each row, integers, shape (rows,).

    Returns
    -------
    PartitionMatroid

    Examples
    --------
    The masks of magnitude pruning that keep a third of every row:

    >>> import torch
    >>> from maskopt.oracles import PerRow
    >>> weight = torch.tensor([[4.0, -3.0, 0.1], [0.2, -2.0, 0.3]])
    >>> PerRow(1 / 3).lmo_mask(-weight.abs()).tolist()
    [[True, False, False], [False, True, False]]
    """
    return PartitionMatroid(keep, (1, None), "PerRow")


def NM(*, keep: int, group: int) -> PartitionMatroid:  # noqa: N802
    """Return the set of N:M masks, which keep `keep` of every `group` consecutive input features of a row.

    Parameters
    ----------
    keep, group : int
        0 <= keep <= group; 2:4 is NM(keep=2, group=4). Keywords only, because libraries disagree about whether the
        first number of "2:4" counts kept or pruned entries.

    Returns
    -------
    PartitionMatroid

    Raises
    ------
    MaskoptError
        If they are no such numbers.

    References
    ----------
    Mishra et al., Accelerating sparse deep neural networks, arXiv 2104.08378.

    Examples
    --------
    >>> import torch
    >>> from maskopt.oracles import NM
    >>> weight = torch.tensor([[4.0, 0.1, -3.0, 0.2]])
    >>> NM(keep=2, group=4).lmo_mask(-weight.abs()).tolist()
    [[True, False, True, False]]
    >>> NM(keep=2, group=4).count((1, 8))  # binomial(4, 2) choices for each of two groups
    36
    """
    if not all(whole(-(2**53)).fits(number) for number in (keep, group)):
        raise MaskoptError(
            f"NM needs whole numbers, as it counts entries; got keep={shown(keep)}, group={shown(group)}."
        )
    if not 0 <= keep <= group:
        raise MaskoptError(f"NM needs 0 <= keep <= group; got keep={keep}, group={group}.")
    return PartitionMatroid(keep, (1, group), "NM")


def Blocks(keep: float | int | Tensor, tile: tuple[int, int]) -> PartitionMatroid:  # noqa: N802
    """Return the set of masks that keep a number of entries of every tile.

    Parameters
    ----------
    keep : float, int or Tensor
        A fraction in [0, 1] (rounded up), a count, or a count for each tile, integers, in row-major order of tiles.
    tile : (int, int)
        Rows and columns of a tile.

    Returns
    -------
    PartitionMatroid
    """
    return PartitionMatroid(keep, tile, "Blocks")


def AtMost(base: PartitionMatroid) -> PartitionMatroid:  # noqa: N802
    """Return the set of masks whose groups keep at most as many entries as in `base`.

    Parameters
    ----------
    base : PartitionMatroid
        Entries fixed there stay fixed.

    Returns
    -------
    PartitionMatroid

    Raises
    ------
    MaskoptError
        If `base` is not a partition matroid.
    """
    if not isinstance(base, PartitionMatroid):
        raise MaskoptError(f"AtMost needs a set such as PerRow(0.5); got {shown(base)}.")
    masks = PartitionMatroid(base.keep, base.tile, base.name, at_most=True)
    if base.protected is None and base.forbidden is None:
        return masks
    return masks.restrict(base.protected, base.forbidden)
