"""Short texts of names and numbers for tables and result lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from maskopt.oracles import MaskSet

__all__ = [
    "duration",
    "kept_words",
    "masks_words",
    "named_table",
    "rows_words",
    "set_words",
    "shortened",
    "solver_words",
]


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Return names shortened to at most `width` characters; different names stay different, as far as possible.

    Names that fit stay as they are. Else common parts at the beginning and at the end are removed, then characters in
    the middle.

    Parameters
    ----------
    names : sequence of str
        Of layers or files, parts separated by dots.
    width : int
    """
    parts = [name.split(".") for name in names]
    headless = _without_common(parts)
    bare = [part[::-1] for part in _without_common([part[::-1] for part in headless])]
    for trial in (parts, headless, bare):
        short = [".".join(part) for part in trial]
        if max(map(len, short), default=0) <= width:
            return short
    different = len(set(short))
    # The end identifies the layer in a block, the beginning the block: use as few characters of it as possible.
    for head in range(1, max(2, width - 2)):
        cut = [_cut(name, width, head) for name in short]
        if len(set(cut)) == different:
            return cut
    return short


def named_table(
    title: str, heading: str, names: Sequence[str], columns: Mapping[str, Sequence[str]], width: int
) -> Table:
    """Return a table of numbers in full and names shortened to the width left.

    Parameters
    ----------
    title : str
        Empty for none.
    heading : str
        Of the column of names.
    names : sequence of str
        One for each row.
    columns : mapping of str to sequence of str
        Cells by heading.
    width : int
        Columns of the terminal.
    """
    table = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left")
    table.add_column(heading, no_wrap=True)
    taken = 4  # margins of the table
    for name, cells in columns.items():
        table.add_column(name, justify="right", no_wrap=True)
        taken += 3 + max(len(cell) for cell in (name, *cells))
    short = shortened(names, max(8, width - taken))
    for row in zip(short, *columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def _without_common(parts: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Remove the first parts that all have in common, as long as something is left of each."""
    if len(set(map(tuple, parts))) < 2:
        return list(parts)
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return [part[common:] for part in parts]


def _cut(name: str, width: int, head: int) -> str:
    if len(name) <= width:
        return name
    return f"{name[:head]}…{name[len(name) - (width - head - 1) :]}"


def solver_words(solver: Any) -> str:
    """Return a solver's name with the settings that differ from the defaults."""
    if not is_dataclass(solver) or isinstance(solver, type):
        return str(solver)
    changed = []
    for field in fields(solver):
        value = getattr(solver, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.repr and value != default:
            changed.append(f"{field.name}={solver_words(value) if is_dataclass(value) else repr(value)}")
    return type(solver).__name__ + (f"({', '.join(changed)})" if changed else "")


def set_words(pattern: str, sparsity: float | None) -> str:
    """Return a set of masks as text: `per-row 60 %`, `2:4`."""
    return pattern if sparsity is None or ":" in pattern else f"{pattern} {100 * sparsity:g} %"


def masks_words(pattern: str, sparsity: float | None, masks: MaskSet, shapes: Iterable[tuple[int, int]]) -> str:
    """Return a set of masks as text, with the kept counts of layers of these shapes where they were rounded."""
    kept = kept_words(masks, shapes)
    return set_words(pattern, sparsity) + (f"; {kept}" if kept else "")


def rows_words(first: int, count: int) -> str:
    """Return a row as its number, several rows as `first:end`."""
    return str(first) if count == 1 else f"{first}:{first + count}"


def kept_words(masks: MaskSet, shapes: Iterable[tuple[int, int]]) -> str:
    """Return how many entries of a group are kept where the kept fraction is no whole number of them, else "".

    Kept counts are rounded up, so that the sparsity is below the one asked for.
    """
    from maskopt.oracles import PartitionMatroid

    if not isinstance(masks, PartitionMatroid) or not isinstance(masks.keep, float):
        return ""
    counts: dict[str, None] = {}
    for shape in shapes:
        height, width = masks.tile_of(shape)
        size, keep = height * width, int(masks.kept_per_group(shape)[0])
        if abs(masks.keep * size - keep) > 1e-6:
            counts[f"{keep} of {size}"] = None
    if not counts:
        return ""
    return f"keeps {', '.join(counts)} {_group_words(masks.tile)}, rounded up"


def _group_words(tile: tuple[int | None, int | None]) -> str:
    known = {(1, None): "per row", (None, None): "in the matrix", (None, 1): "per column"}
    if tile in known:
        return known[tile]
    height, width = ("all" if side is None else side for side in tile)
    return f"per group of {width}" if height == 1 else f"per block of {height} x {width}"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, with about three digits."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
