"""Sets of masks by name, for the command line and for files."""

import re

from maskopt.checks import real, shown
from maskopt.errors import MaskoptError
from maskopt.oracles.base import MaskSet
from maskopt.oracles.matroid import PartitionMatroid
from maskopt.oracles.patterns import NM, AtMost, Blocks, PerRow, Unstructured
from maskopt.oracles.transposable import TransposableNM
from maskopt.oracles.units import Columns, Rows

__all__ = ["parse_masks"]

_FAMILIES = {"per-row": PerRow, "unstructured": Unstructured, "columns": Columns, "rows": Rows}


def parse_masks(pattern: str, sparsity: float | None = None) -> MaskSet:
    """Return the set named by a pattern and the fraction of weights to prune.

    Parameters
    ----------
    pattern : str
        "per-row", "unstructured", "columns", "rows", "blocks-HxW" (tiles of H rows and W columns), "n:m" with n kept
        of every m ("2:4"), or "transposable-n:m". "at-most-" before a set of single entries lets its groups keep
        fewer.
    sparsity : float, optional
        Fraction of the weights pruned, in [0, 1]; of each tile for "blocks-HxW". With "n:m" it may be left out, and
        must agree if given.

    Returns
    -------
    MaskSet

    Raises
    ------
    MaskoptError
        If the pattern is unknown, the sparsity is missing or out of range, or both disagree.

    Examples
    --------
    >>> parse_masks("2:4")
    NM(keep=2, group=4)
    >>> parse_masks("per-row", sparsity=0.75)
    PerRow(keep=0.25)
    """
    if not isinstance(pattern, str):
        raise MaskoptError(f"A pattern is a word such as per-row or 2:4; got {shown(pattern)}.")
    if not real(0, 1, optional=True).fits(sparsity):
        raise MaskoptError(f"The sparsity must lie between 0 and 1; got {shown(sparsity)}.")
    if pattern.startswith("at-most-"):
        masks = parse_masks(pattern.removeprefix("at-most-"), sparsity)
        if not isinstance(masks, PartitionMatroid):
            raise MaskoptError(f"The pattern {pattern} is not offered; at-most- goes before sets of single entries.")
        return AtMost(masks)
    ratio = re.fullmatch(r"(transposable-)?([0-9]{1,15}):([0-9]{1,15})", pattern)
    if ratio:
        keep, group = int(ratio[2]), int(ratio[3])
        if not 0 <= keep <= group or group == 0:
            raise MaskoptError(f"The pattern {pattern} keeps {keep} of every {group}, which is impossible.")
        if sparsity is not None and abs(sparsity - (1 - keep / group)) > 1e-9:
            raise MaskoptError(
                f"The pattern {pattern} keeps {keep} of every {group}, a sparsity of {1 - keep / group:g}, not "
                f"{sparsity:g}; leave the sparsity out."
            )
        return TransposableNM(keep=keep, group=group) if ratio[1] else NM(keep=keep, group=group)
    tile = re.fullmatch(r"blocks-([0-9]{1,15})x([0-9]{1,15})", pattern)
    if not tile and pattern not in _FAMILIES:
        raise MaskoptError(
            f"There is no pattern {shown(pattern)}; choose per-row, unstructured, columns, rows, blocks-HxW such as "
            "blocks-4x4, n:m such as 2:4, or transposable-n:m such as transposable-2:4."
        )
    if sparsity is None:
        raise MaskoptError(f"The pattern {pattern} needs a sparsity between 0 and 1.")
    fraction = float(1 - sparsity)
    return Blocks(fraction, (int(tile[1]), int(tile[2]))) if tile else _FAMILIES[pattern](fraction)
