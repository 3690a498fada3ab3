"""Sets of masks by name, for the command line and for files."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from maskopt.checks import real, shown
from maskopt.errors import MaskoptError
from maskopt.oracles.base import MaskSet, Shape
from maskopt.oracles.matroid import PartitionMatroid
from maskopt.oracles.patterns import NM, AtMost, Blocks, PerRow, Unstructured
from maskopt.oracles.transposable import TransposableNM
from maskopt.oracles.units import Columns, Rows

__all__ = ["Counts", "parse_masks"]

_FAMILIES: dict[str, Callable[[float | int], MaskSet]] = {"per-row": PerRow, "unstructured": Unstructured, "columns": Columns, "rows": Rows}


def parse_masks(pattern: str, sparsity: float | None = None) -> MaskSet:
    """Return the set named by a pattern and the fraction of weights to prune.

    Parameters
    ----------
    pattern : str
        "per-row", "unstructured", "columns", "columns-W" (W consecutive ones together), "rows", "blocks-HxW" (tiles of
        H rows and W columns), "n:m" with n kept of every m ("2:4"), or "transposable-n:m". "at-most-" before a set of single entries lets its groups keep
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
    width = _width(pattern)
    if not tile and width is None and pattern not in _FAMILIES:
        raise MaskoptError(
            f"There is no pattern {shown(pattern)}; choose per-row, unstructured, columns, columns-W such as "
            "columns-64, rows, blocks-HxW such as blocks-4x4, n:m such as 2:4, or transposable-n:m such as transposable-2:4."
        )
    if sparsity is None:
        raise MaskoptError(f"The pattern {pattern} needs a sparsity between 0 and 1.")
    fraction = float(1 - sparsity)
    if width is not None:
        return Columns(fraction, width)
    return Blocks(fraction, (int(tile[1]), int(tile[2]))) if tile else _FAMILIES[pattern](fraction)


@dataclass(frozen=True)
class Counts:
    """How many weights of a layer the masks of a pattern can keep: a step times 0, 1, ... `most`.

    Parameters
    ----------
    pattern : str
        As for `parse_masks`; of "n:m", n is the count.
    shape : (int, int)
        Rows and inputs of the layer.
    cost : int, optional
        What each unit of the count costs in a budget; its weights in the layer (`step`) by default. Units of whole
        columns may bring parameters of other layers with them.

    Raises
    ------
    MaskoptError
        If there is no such pattern or it does not fit the shape.

    Examples
    --------
    >>> counts = Counts("per-row", (8, 16))
    >>> counts.step, counts.most, counts.masks(4)
    (8, 16, PerRow(keep=4))
    >>> Counts("2:8", (8, 16)).of(0.6), Counts("2:8", (8, 16)).sparsity(3)
    (4, 0.625)
    """

    pattern: str
    shape: Shape
    cost: int = 0

    def __post_init__(self) -> None:
        # The pattern "n:m" says its own sparsity, the others need one.
        parse_masks(self.pattern, None if isinstance(self.pattern, str) and ":" in self.pattern else 0.5)
        if min(self.shape) < 1:
            raise MaskoptError(f"A layer of shape {tuple(self.shape)} has no weights to keep.")
        self.masks(self.most).check(self.shape)
        object.__setattr__(self, "cost", self.cost or self.step)

    @property
    def most(self) -> int:
        """The count that keeps all weights."""
        rows, columns = self.shape
        plain = self._plain
        if ":" in plain:
            return int(plain.rpartition(":")[2])
        if plain.startswith("blocks-"):
            height, width = plain.removeprefix("blocks-").split("x")
            return int(height) * int(width)
        grouped = _width(plain)
        if grouped is not None:
            return columns // grouped
        return {"per-row": columns, "columns": columns, "rows": rows, "unstructured": rows * columns}[plain]

    @property
    def step(self) -> int:
        """Weights kept for each unit of the count."""
        return self.shape[0] * self.shape[1] // self.most

    def of(self, sparsity: float) -> int:
        """Return the count at a sparsity; what it keeps is rounded up, as `parse_masks` does."""
        return min(self.most, math.ceil((1 - sparsity) * self.most * (1 - 1e-12)))

    def sparsity(self, count: int) -> float:
        """Return the fraction of the weights that are pruned at a count."""
        return 1 - count / self.most

    def masks(self, count: int) -> MaskSet:
        """Return the set of masks that keep `count` times `step` weights (or at most that many)."""
        plain = self._plain
        made: MaskSet
        if ":" in plain:
            kind = TransposableNM if plain.startswith("transposable-") else NM
            made = kind(keep=count, group=self.most)
        elif plain.startswith("blocks-"):
            height, width = plain.removeprefix("blocks-").split("x")
            made = Blocks(count, (int(height), int(width)))
        elif (grouped := _width(plain)) is not None:
            made = Columns(count, grouped)
        else:
            made = _FAMILIES[plain](count)
        return AtMost(made) if self.pattern != plain and isinstance(made, PartitionMatroid) else made

    @property
    def _plain(self) -> str:
        plain = self.pattern
        while plain.startswith("at-most-"):
            plain = plain.removeprefix("at-most-")
        return plain


def _width(pattern: str) -> int | None:
    """Return W of the pattern "columns-W"; None for others."""
    found = re.fullmatch(r"columns-([1-9][0-9]{0,14})", pattern)
    return int(found[1]) if found else None
