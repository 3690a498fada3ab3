"""The registries of sets and solvers: one entry each, and every test of its kind runs on it.

Entries come from three places: the dictionaries below; the how-to pages, whose classes must pass the tests of ours; and
files named in the environment variable MASKOPT_REGISTER, which define `SETS` or `SOLVERS` likewise:

    MASKOPT_REGISTER=my_set.py python -m pytest tests -k "my-set"
"""

from __future__ import annotations

import ast
import math
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskopt.oracles import (
    NM,
    AtMost,
    Budget,
    Columns,
    MaskSet,
    PartitionMatroid,
    PerRow,
    Product,
    Protected,
    Rows,
    TransposableNM,
    Units,
    Unstructured,
)
from maskopt.solvers import (
    DIRECTIONS,
    RIA,
    BranchAndBound,
    BruteForce,
    ContinuationFrankWolfe,
    FrankWolfe,
    Magnitude,
    OneSwap,
    Scip,
    Solver,
    SparseFW,
    Wanda,
)
from tests.answers import Shape, costs_little, keeps_counts, keeps_lines, uses_few_columns
from tests.entries import SetEntry, SolverEntry
from tests.made import FewColumns

DOCS = Path(__file__).parent.parent / "docs"


def code_of(page: Path) -> list[tuple[int, str]]:
    """Return the Python blocks of a page with the numbers of the lines before them."""
    text = page.read_text()
    blocks = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in blocks]


def definitions_of(path: Path) -> dict[str, Any]:
    """Return what a how-to page or a Python file defines: of a page only imports, classes, functions and registries."""
    module = types.ModuleType(f"registered_{path.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module  # where dataclasses look up annotations
    blocks = code_of(path) if path.suffix == ".md" else [(0, path.read_text())]
    for lines, block in blocks:
        tree = ast.parse("\n" * lines + block, str(path))
        if path.suffix == ".md":
            tree.body = [statement for statement in tree.body if _defines(statement)]
        exec(compile(tree, str(path), "exec", dont_inherit=True), vars(module))
    return vars(module)


def _defines(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id in ("SETS", "SOLVERS") for target in statement.targets)
    return isinstance(statement, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef))


def registered_elsewhere(name: str) -> dict[str, Any]:
    """Return the entries that the how-to pages and the files of MASKOPT_REGISTER add to a registry."""
    files = [Path(file) for file in os.environ.get("MASKOPT_REGISTER", "").split(os.pathsep) if file]
    entries: dict[str, Any] = {}
    for path in (DOCS / "add-a-set.md", DOCS / "add-a-solver.md", *files):
        entries |= definitions_of(path).get(name, {})
    return entries


# Sets


def _divisor(number: int, choices: tuple[int, ...]) -> int:
    return next(choice for choice in choices if number % choice == 0)


def _nm(shape: Shape, fraction: float) -> PartitionMatroid:
    group = _divisor(shape[1], (4, 3, 2, 1))
    return NM(keep=round(fraction * group), group=group)


def _blocks(shape: Shape, fraction: float) -> PartitionMatroid:
    tile = _divisor(shape[0], (2, 3, 1)), _divisor(shape[1], (4, 3, 2, 1))
    return PartitionMatroid(round(fraction * tile[0] * tile[1]), tile, "Blocks")


def _columns(_: Shape, fraction: float) -> PartitionMatroid:
    return PartitionMatroid(fraction, (None, 1), "Columns")


def _row_blocks_set(shape: Shape, fraction: float) -> PartitionMatroid:
    return PartitionMatroid(fraction, (_divisor(shape[0], (2, 3, 1)), None), "Row blocks")


def _row_counts(shape: Shape, fraction: float) -> PartitionMatroid:
    rows, d = shape
    counts = torch.arange(rows) * 2 + round(fraction * d) - rows
    return PerRow(counts.clamp(0, d))


def _block_counts(shape: Shape, fraction: float) -> PartitionMatroid:
    height, width = _blocks(shape, fraction).tile
    number = shape[0] * shape[1] // (height * width)
    counts = (torch.arange(number) * 5) % 4 + round(fraction * height * width) - 2
    return PartitionMatroid(counts.clamp(0, height * width), (height, width), "Counts")


def _protected(base: Callable[[Shape, float], PartitionMatroid]) -> Callable[[Shape, float], PartitionMatroid]:
    def make(shape: Shape, fraction: float) -> PartitionMatroid:
        masks = base(shape, fraction)
        # Some member, of which every second row's and column's entries are protected.
        member = masks.lmo_mask((torch.arange(shape[0] * shape[1]).view(shape) * 7919 % 101).double())
        member[::2, ::2] = False
        return Protected(masks, member)

    return make


def _restricted(base: Callable[[Shape, float], MaskSet]) -> Callable[[Shape, float], MaskSet]:
    def make(shape: Shape, fraction: float) -> MaskSet:
        masks = base(shape, fraction)
        # Two members: half of what both keep is kept, half of what both prune is pruned.
        order = torch.arange(shape[0] * shape[1]).view(shape)
        one, other = masks.lmo_mask((order * 7919 % 101 - 80).double()), masks.lmo_mask((order * 31 % 17 - 9).double())
        some = (order % 3 != 1) | (order < 2)
        return masks.restrict(kept=one & other & some, pruned=~one & ~other & some)

    return make


def _units(shape: Shape, fraction: float) -> Units:
    height, width = _divisor(shape[0], (2, 1)), _divisor(shape[1], (3, 2, 1))
    return Units(_blocks((shape[0] // height, shape[1] // width), fraction), (height, width))


def _transposable(shape: Shape, fraction: float) -> TransposableNM:
    group = _divisor(math.gcd(*shape), (4, 3, 2, 1))
    return TransposableNM(keep=round(fraction * group), group=group)


def _budget(shape: Shape, fraction: float) -> Budget:
    prices = (torch.arange(shape[0] * shape[1]).view(shape) * 5 % 7 + 0.75) * (torch.arange(shape[1]) % 4 != 3)
    return Budget(prices, round(fraction * float(prices.sum()) * 4) / 4)


def _product(shape: Shape, fraction: float) -> Product:
    """The first row by groups, the others as one matrix; of a single row, two halves."""
    rows, d = shape
    if rows > 1:
        return Product([(_nm((1, d), fraction), (1, d)), (Unstructured(fraction), (rows - 1, d))])
    parts = [(PerRow(fraction), (1, half)) for half in (d // 2, d - d // 2) if half]
    return Product(parts)


def _members_of_product(masks: Product, patterns: Tensor) -> Tensor:
    member = torch.ones(len(patterns), dtype=torch.bool)
    first = 0
    for part, (rows, d) in masks.parts:
        own = patterns.flatten(1)[:, first : first + rows * d].reshape(-1, rows, d)
        member &= keeps_counts(part, own)
        first += rows * d
    return member


def _members_of_units(masks: Units, patterns: Tensor) -> Tensor:
    """Which repeat the first entry of every unit, and the units kept belong to the base."""
    height, width = masks.unit[0] or patterns.shape[1], masks.unit[1] or patterns.shape[2]
    units, member = patterns[:, ::height, ::width], torch.ones(len(patterns), dtype=torch.bool)
    for row in range(patterns.shape[1]):
        for column in range(patterns.shape[2]):
            member &= patterns[:, row, column] == units[:, row // height, column // width]
    return member & keeps_counts(masks.base, units)


def _matroid(make: Callable[[Shape, float], MaskSet], **claims: bool) -> SetEntry:
    return SetEntry(make, keeps_counts, **{"matroid": True, "equal_size": True, "integral": True, **claims})


def _whole_units(make: Callable[[Shape, float], MaskSet], **claims: bool) -> SetEntry:
    return SetEntry(make, _members_of_units, **{"equal_size": True, "integral": True, **claims})


_AT_MOST = {"equal_size": False, "down_closed": True}
SET_ENTRIES: dict[str, SetEntry] = {
    "unstructured": _matroid(lambda shape, fraction: Unstructured(fraction)),
    "per-row": _matroid(lambda shape, fraction: PerRow(fraction)),
    "n:m": _matroid(_nm),
    "blocks": _matroid(_blocks),
    "columns": _matroid(_columns),
    "row blocks": _matroid(_row_blocks_set),
    "row counts": _matroid(_row_counts),
    "block counts": _matroid(_block_counts),
    "protected rows": _matroid(_protected(lambda shape, fraction: PerRow(fraction))),
    "protected matrix": _matroid(_protected(lambda shape, fraction: Unstructured(fraction))),
    "protected blocks": _matroid(_protected(_blocks)),
    "at most rows": _matroid(lambda shape, fraction: AtMost(PerRow(fraction)), **_AT_MOST),
    "at most matrix": _matroid(lambda shape, fraction: AtMost(Unstructured(fraction)), **_AT_MOST),
    "at most n:m": _matroid(lambda shape, fraction: AtMost(_nm(shape, fraction)), **_AT_MOST),
    "at most counts": _matroid(lambda shape, fraction: AtMost(_block_counts(shape, fraction)), **_AT_MOST),
    "restricted rows": _matroid(_restricted(lambda shape, fraction: PerRow(fraction))),
    "restricted blocks": _matroid(_restricted(_blocks)),
    "restricted at most": _matroid(_restricted(lambda shape, fraction: AtMost(PerRow(fraction))), equal_size=False),
    "restricted at most blocks": _matroid(
        _restricted(lambda shape, fraction: AtMost(_blocks(shape, fraction))), equal_size=False
    ),
    "whole columns": _whole_units(lambda _, fraction: Columns(fraction)),
    "whole rows": _whole_units(lambda _, fraction: Rows(fraction)),
    "units": _whole_units(_units),
    "vectors": _whole_units(lambda shape, fraction: Units(PerRow(fraction), (1, _divisor(shape[1], (2, 3, 1))))),
    "at most units": _whole_units(
        lambda shape, fraction: Units(AtMost(_units(shape, fraction).base), _units(shape, fraction).unit),
        equal_size=False,
    ),
    "restricted columns": _whole_units(_restricted(lambda _, fraction: Columns(fraction))),
    "product": SetEntry(_product, _members_of_product, equal_size=True, integral=True),
    "restricted product": SetEntry(_restricted(_product), _members_of_product, equal_size=True, integral=True),
    "transposable": SetEntry(_transposable, keeps_lines, equal_size=True, integral=True),
    "restricted transposable": SetEntry(_restricted(_transposable), keeps_lines, equal_size=True, integral=True),
    "budget": SetEntry(_budget, costs_little, down_closed=True),
    "bytes": SetEntry(
        lambda shape, fraction: Budget(torch.full(shape, 0.75), round(fraction * shape[0] * shape[1] * 2) * 0.375),
        costs_little,
        down_closed=True,
    ),
    # It defines constraints and membership only: all other methods are defaults of `MaskSet`.
    "few columns": SetEntry(
        lambda shape, fraction: FewColumns(round(fraction * shape[0] * shape[1]), (shape[1] + 1) // 2),
        uses_few_columns,
        down_closed=True,
    ),
    **registered_elsewhere("SETS"),
}

MEMBERS: dict[type, Callable[..., Tensor]] = {
    type(entry.make((4, 4), 0.5)): entry.member for entry in SET_ENTRIES.values() if entry.member is not None
}
"""Membership by the definition, for each class of sets."""


def _named(where: Callable[[SetEntry], bool]) -> list[str]:
    return [name for name, entry in SET_ENTRIES.items() if where(entry)]


def _free_of(kind: str) -> Callable[[SetEntry], bool]:
    """Whether a set has no fixed entries of this kind, "protected" or "forbidden"."""
    return lambda entry: getattr(entry.make((4, 4), 0.5), kind) is None


ALL_SETS: dict[str, Callable[[Shape, float], MaskSet]] = {name: entry.make for name, entry in SET_ENTRIES.items()}
MATROIDS = _named(lambda entry: entry.matroid)
EQUAL_SETS = _named(lambda entry: entry.equal_size)
INTEGRAL_SETS = _named(lambda entry: entry.integral)
DOWN_CLOSED_SETS = _named(lambda entry: entry.down_closed)
# Partition matroids whose groups keep a fixed number of entries, none of them forbidden: every solver takes them.
SETS = {
    name: ALL_SETS[name]
    for name in _named(lambda entry: entry.matroid and entry.equal_size and _free_of("forbidden")(entry))
}
FREE_SETS = [name for name in SETS if _free_of("protected")(SET_ENTRIES[name])]


# Solvers

_SCORE = {"iterative": False, "sees_tiny_rows": True}
_ITERATIVE = {"sees_tiny_rows": False}
SOLVER_ENTRIES: dict[str, SolverEntry] = {
    "magnitude": SolverEntry(Magnitude(), **_SCORE),
    "wanda": SolverEntry(Wanda(), **_SCORE),
    "ria": SolverEntry(RIA(), **_SCORE),
    "sparsefw": SolverEntry(SparseFW(iterations=40), bounded=True, **_ITERATIVE),
    "sparsefw alpha": SolverEntry(SparseFW(iterations=40, alpha=0.5), bounded=True, keeps_start=False, **_ITERATIVE),
    "one-swap": SolverEntry(OneSwap(), swap_optimal=True, sees_tiny_rows=True),
    "continuation": SolverEntry(ContinuationFrankWolfe(iterations=40), swap_optimal=True, **_ITERATIVE),
    "continuation alone": SolverEntry(
        ContinuationFrankWolfe(iterations=30, second=0.0, polish=False), sees_small_channels=False, **_ITERATIVE
    ),
    **registered_elsewhere("SOLVERS"),
}
SOLVERS: dict[str, Solver] = {name: entry.solver for name, entry in SOLVER_ENTRIES.items()}
ITERATIVE = [name for name, entry in SOLVER_ENTRIES.items() if entry.iterative]
SWAPPED = [name for name, entry in SOLVER_ENTRIES.items() if entry.swap_optimal]

# Tested against each other and enumeration in tests/properties/test_exact.py and test_branch_and_bound.py.
EXACT: dict[str, Solver] = {"brute-force": BruteForce(), "scip": Scip(), "branch-and-bound": BranchAndBound()}
FRANK_WOLFE: dict[str, Solver] = {name: FrankWolfe(direction=name, iterations=25) for name in DIRECTIONS}
