"""What the suites share: registries of sets and solvers, ugly inputs, and slow independent answers.

A new set of masks is covered by one line in `SETS` (or in `OTHER_SETS`, if its groups do not keep a fixed number each),
a new solver by one line in `SOLVERS`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from maskopt.oracles import (
    NM,
    AtMost,
    Budget,
    Columns,
    MaskSet,
    PartitionMatroid,
    PerRow,
    Protected,
    Rows,
    TransposableNM,
    Units,
    Unstructured,
)
from maskopt.problems import LayerReconstruction
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

Shape = tuple[int, int]


# `make test` must give the same answer twice, so examples are derived from the tests. To look for new ones:
# MASKOPT_EXPLORE=10 python -m pytest tests/properties     (random ones, ten times as many)
_EXPLORE = int(os.environ.get("MASKOPT_EXPLORE", "0"))
_HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def examples(count: int) -> settings:
    """Run a property on `count` examples."""
    if _EXPLORE:
        return settings(max_examples=count * _EXPLORE, deadline=None, suppress_health_check=_HEALTH, print_blob=True)
    return settings(max_examples=count, deadline=None, suppress_health_check=_HEALTH, derandomize=True, database=None)


# Registries


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


# Name: (shape of the weight, share to keep) -> a set that fits the shape.
SETS: dict[str, Callable[[Shape, float], PartitionMatroid]] = {
    "unstructured": lambda shape, fraction: Unstructured(fraction),
    "per-row": lambda shape, fraction: PerRow(fraction),
    "n:m": _nm,
    "blocks": _blocks,
    "columns": _columns,
    "row blocks": _row_blocks_set,
    "row counts": _row_counts,
    "block counts": _block_counts,
    "protected rows": _protected(lambda shape, fraction: PerRow(fraction)),
    "protected matrix": _protected(lambda shape, fraction: Unstructured(fraction)),
    "protected blocks": _protected(_blocks),
}
FREE_SETS = [name for name in SETS if not name.startswith("protected")]
PROTECTED_SETS = [name for name in SETS if name.startswith("protected")]


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


# Sets of other kinds: their groups may keep fewer, entries are pruned in advance, or there are no groups.
OTHER_SETS: dict[str, Callable[[Shape, float], MaskSet]] = {
    "at most rows": lambda shape, fraction: AtMost(PerRow(fraction)),
    "at most matrix": lambda shape, fraction: AtMost(Unstructured(fraction)),
    "at most n:m": lambda shape, fraction: AtMost(_nm(shape, fraction)),
    "at most counts": lambda shape, fraction: AtMost(_block_counts(shape, fraction)),
    "restricted rows": _restricted(lambda shape, fraction: PerRow(fraction)),
    "restricted blocks": _restricted(_blocks),
    "restricted at most": _restricted(lambda shape, fraction: AtMost(PerRow(fraction))),
    "restricted at most blocks": _restricted(lambda shape, fraction: AtMost(_blocks(shape, fraction))),
    "whole columns": lambda _, fraction: Columns(fraction),
    "whole rows": lambda _, fraction: Rows(fraction),
    "units": _units,
    "vectors": lambda shape, fraction: Units(PerRow(fraction), (1, _divisor(shape[1], (2, 3, 1)))),
    "at most units": lambda shape, fraction: Units(AtMost(_units(shape, fraction).base), _units(shape, fraction).unit),
    "restricted columns": _restricted(lambda _, fraction: Columns(fraction)),
    "transposable": _transposable,
    "restricted transposable": _restricted(_transposable),
    "budget": _budget,
    "bytes": lambda shape, fraction: Budget(torch.full(shape, 0.75), round(fraction * shape[0] * shape[1] * 2) * 0.375),
}
ALL_SETS: dict[str, Callable[[Shape, float], MaskSet]] = {**SETS, **OTHER_SETS}
MATROIDS = [name for name in ALL_SETS if isinstance(ALL_SETS[name]((4, 4), 0.5), PartitionMatroid)]
# Members have one size, so that a constant in the cost changes nothing.
EQUAL_SETS = [name for name in ALL_SETS if "at most" not in name and name not in ("budget", "bytes")]
# The LP formulation's vertices are masks.
INTEGRAL_SETS = [name for name in ALL_SETS if name not in ("budget", "bytes")]

# Few iterations, so that everything can be tried with everything.
SOLVERS: dict[str, Solver] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": RIA(),
    "sparsefw": SparseFW(iterations=40),
    "sparsefw alpha": SparseFW(iterations=40, alpha=0.5),
    "one-swap": OneSwap(),
    "continuation": ContinuationFrankWolfe(iterations=40),
    "continuation alone": ContinuationFrankWolfe(iterations=30, second=0.0, polish=False),
}
# Tested against each other and enumeration in tests/properties/test_exact.py and test_branch_and_bound.py.
EXACT: dict[str, Solver] = {"brute-force": BruteForce(), "scip": Scip(), "branch-and-bound": BranchAndBound()}

FRANK_WOLFE: dict[str, Solver] = {name: FrankWolfe(direction=name, iterations=25) for name in DIRECTIONS}
ITERATIVE = [name for name in SOLVERS if name not in ("magnitude", "wanda", "ria")]
SWAPPED = ["one-swap", "continuation"]  # these promise a 1-swap optimum


# Independent answers: loops and enumeration, nothing of the package but a set's definition.


def groups_of(masks: PartitionMatroid, shape: Shape) -> list[list[int]]:
    """Return the flat indices of every group."""
    rows, columns = shape
    height, width = masks.tile[0] or rows, masks.tile[1] or columns
    return [
        [r * columns + c for r in range(top, top + height) for c in range(left, left + width)]
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def counts_of(masks: PartitionMatroid, shape: Shape) -> list[int]:
    groups = groups_of(masks, shape)
    if isinstance(masks.keep, Tensor):
        return masks.keep.tolist()
    if isinstance(masks.keep, float):
        # Exact, but for the twelfth digit: 1 - 0.7 is meant to be 0.3.
        fraction = Fraction(masks.keep) * (1 - Fraction(1, 10**12))
        return [math.ceil(fraction * len(group)) for group in groups]
    return [masks.keep] * len(groups)


def _places(entries: Tensor | None) -> set[int]:
    return set() if entries is None else set(entries.flatten().nonzero().flatten().tolist())


def held_of(masks: MaskSet) -> set[int]:
    """Return the flat indices of protected entries."""
    return _places(masks.protected)


def banned_of(masks: MaskSet) -> set[int]:
    """Return the flat indices of forbidden entries."""
    return _places(masks.forbidden)


def belong(masks: MaskSet, patterns: Tensor) -> Tensor:
    """Return which boolean matrices, shape (number, rows, d), are members, by the definition of the set."""
    shape = (patterns.shape[1], patterns.shape[2])
    flat = patterns.flatten(1)
    member = torch.ones(len(patterns), dtype=torch.bool)
    for index in held_of(masks):
        member &= flat[:, index]
    for index in banned_of(masks):
        member &= ~flat[:, index]
    if isinstance(masks, Units):
        height, width = masks.unit[0] or shape[0], masks.unit[1] or shape[1]
        units = patterns[:, ::height, ::width]
        for row in range(shape[0]):
            for column in range(shape[1]):
                member &= patterns[:, row, column] == units[:, row // height, column // width]
        return member & belong(masks.base, units)
    if isinstance(masks, TransposableNM):
        size = masks.group
        for top in range(0, shape[0], size):
            for left in range(0, shape[1], size):
                tile = patterns[:, top : top + size, left : left + size]
                for line in range(size):
                    member &= (tile[:, line].sum(1) == masks.keep) & (tile[:, :, line].sum(1) == masks.keep)
        return member
    if isinstance(masks, Budget):
        # Floats are fractions of a power of two: multiplied by it, they are whole and add up exactly.
        prices = [Fraction(price) for price in masks.price.flatten().tolist()]
        unit = math.lcm(*(price.denominator for price in prices), Fraction(masks.budget).denominator)
        whole = np.array([int(price * unit) for price in prices], dtype=object)
        return torch.from_numpy((flat.numpy() @ whole <= int(Fraction(masks.budget) * unit)).astype(bool))
    assert isinstance(masks, PartitionMatroid)
    for group, keep in zip(groups_of(masks, shape), counts_of(masks, shape), strict=True):
        kept = flat[:, group].sum(1)
        member &= (kept <= keep) if masks.at_most else (kept == keep)
    return member


def feasible(masks: MaskSet, mask: Tensor) -> bool:
    return mask.dtype == torch.bool and bool(belong(masks, mask.unsqueeze(0)))


def cheapest(masks: PartitionMatroid, cost: Tensor) -> Tensor:
    """Return the member of least cost, ties to the lower index, by sorting."""
    shape = (cost.shape[0], cost.shape[1])
    held, banned = held_of(masks), banned_of(masks)
    if held or banned:  # where entries are fixed, infinity is the largest number
        cost = cost.clamp(torch.finfo(cost.dtype).min, torch.finfo(cost.dtype).max)
    costs = cost.flatten().tolist()
    mask = torch.zeros(cost.numel(), dtype=torch.bool)
    for group, keep in zip(groups_of(masks, shape), counts_of(masks, shape), strict=True):
        order = sorted(group, key=lambda index: (index not in held, index in banned, costs[index], index))
        if masks.at_most:
            order = [index for index in order if index in held or (costs[index] < 0 and index not in banned)]
        mask[order[:keep]] = True
    return mask.view(shape)


@functools.cache
def _patterns(size: int) -> Tensor:
    return (torch.arange(2**size).unsqueeze(1) >> torch.arange(size)) % 2 == 1


def every_mask(masks: MaskSet, shape: Shape) -> Tensor:
    """Return all members, shape (number, rows, d): those of the 2^(rows d) patterns that belong."""
    patterns = _patterns(shape[0] * shape[1]).view(-1, *shape)
    return patterns[belong(masks, patterns)]


def errors_of(weight: Tensor, gram: Tensor, chosen: Tensor) -> Tensor:
    """Return each row's error for masks of shape (number, rows, d), float64, shape (number, rows)."""
    pruned = torch.where(chosen, 0.0, weight.double())
    return torch.einsum("nri,ij,nrj->nr", pruned, gram.double(), pruned)


def least_errors(weight: Tensor, gram: Tensor, masks: PartitionMatroid) -> Tensor:
    """Return the optimum by enumeration: of each row where rows are independent, else one entry."""
    rows, d = weight.shape
    if masks.tile[0] != 1:
        return errors_of(weight, gram, every_mask(masks, (rows, d))).sum(1).min().view(1)
    best = []
    for row in range(rows):
        one = masks.rows(slice(row, row + 1), (rows, d))
        best.append(errors_of(weight[row : row + 1], gram, every_mask(one, (1, d))).min())
    return torch.stack(best)


def magnitudes(weight: Tensor, gram: Tensor) -> Tensor:
    """Return |w| |G| |w| of each row: the size of the terms an error is summed from, float64."""
    size = weight.double().abs()
    return ((size @ gram.double().abs()) * size).sum(1)


def best_swaps(problem: LayerReconstruction, masks: PartitionMatroid, mask: Tensor) -> tuple[Tensor, float]:
    """Return each row's best change by a swap within it, and the best change by a swap across two rows.

    Every pair is tried, and every change is the difference of two whole errors.
    """
    weight, gram, kept = problem.weight.double().numpy(), problem.gram.double().numpy(), mask.numpy()
    rows, d = weight.shape
    group_of = np.empty(rows * d, dtype=int)
    for number, group in enumerate(groups_of(masks, (rows, d))):
        group_of[group] = number
    group_of = group_of.reshape(rows, d)
    movable = kept.copy()
    movable.flat[sorted(held_of(masks))] = False
    pruned, steps = np.where(kept, 0.0, weight), np.eye(d)

    def error(vectors: np.ndarray) -> np.ndarray:
        return np.einsum("...i,ij,...j->...", vectors, gram, vectors)

    within = np.full(rows, np.inf)
    add, drop = np.full((rows, d), np.inf), np.full((rows, d), np.inf)
    for row in range(rows):
        base, current = pruned[row], error(pruned[row])
        change = steps * weight[row][:, None]
        back, out = np.flatnonzero(~kept[row]), np.flatnonzero(movable[row])
        add[row, back] = error(base - change[back]) - current
        drop[row, out] = error(base + change[out]) - current
        pairs = error(base - change[back][:, None] + change[out][None, :]) - current
        allowed = group_of[row][back][:, None] == group_of[row][out][None, :]
        within[row] = pairs[allowed].min(initial=np.inf)
    across = np.inf
    for number in np.unique(group_of):
        inside = group_of == number
        gain, loss = np.where(inside, add, np.inf).min(1), np.where(inside, drop, np.inf).min(1)
        both = gain[:, None] + loss[None, :]
        np.fill_diagonal(both, np.inf)
        across = min(across, both.min())
    return torch.from_numpy(within), float(across)


# Ugly inputs


@dataclass(frozen=True)
class Layer:
    """A weight and the inputs its Gram is made from, float64; `name` says what is ugly about them."""

    weight: Tensor
    x: Tensor
    name: str

    @property
    def gram(self) -> Tensor:
        return self.x @ self.x.T

    @property
    def shape(self) -> Shape:
        return self.weight.shape[0], self.weight.shape[1]

    def problem(self, dtype: torch.dtype = torch.float64) -> LayerReconstruction:
        return LayerReconstruction(self.weight.to(dtype), self.gram.to(dtype))

    def __repr__(self) -> str:
        return f"Layer({self.name}, weight={self.weight.tolist()}, x={self.x.tolist()})"


def _kill(weight: Tensor, x: Tensor) -> None:
    x[len(x) // 2] = 0.0


def _kill_all(weight: Tensor, x: Tensor) -> None:
    x.zero_()


def _copy(weight: Tensor, x: Tensor) -> None:
    x[-1] = x[0]


def _cancel(weight: Tensor, x: Tensor) -> None:
    x[-1] = x[0]
    weight[:, -1] = -weight[:, 0]


def _outlier(weight: Tensor, x: Tensor) -> None:
    x[0] *= 1024.0


def _flat(weight: Tensor, x: Tensor) -> None:
    weight.fill_(1.0)


def _zero_row(weight: Tensor, x: Tensor) -> None:
    weight[0] = 0.0


def _one_token(weight: Tensor, x: Tensor) -> None:
    x[:, 1:] = 0.0


EDGE_CASES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "dead column": _kill,
    "all columns dead": _kill_all,
    "duplicate columns": _copy,
    "cancelling columns": _cancel,
    "outlier channel": _outlier,
    "equal weights": _flat,
    "zero row": _zero_row,
    "one token": _one_token,
}


@st.composite
def layers(draw: st.DrawFn, rows: Shape = (1, 4), d: Shape = (1, 8), exact: bool | None = None) -> Layer:
    """Small layers; with `exact` all data are small integers, so that float64 sums are exact."""
    shape = draw(st.integers(*rows)), draw(st.integers(*d))
    tokens = draw(st.integers(1, 2 * shape[1]))
    whole = draw(st.booleans()) if exact is None else exact
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    if whole:
        weight, x = random.integers(-3, 4, shape), random.integers(-2, 3, (shape[1], tokens))
    else:
        mixing = random.standard_normal((shape[1], shape[1])) * draw(st.sampled_from([0.0, 0.3, 3.0]))
        weight = random.standard_normal(shape)
        x = (np.eye(shape[1]) + mixing) @ random.standard_normal((shape[1], tokens))
    weight, x = torch.from_numpy(weight).double(), torch.from_numpy(x).double()
    edge = draw(st.lists(st.sampled_from(sorted(EDGE_CASES)), max_size=2, unique=True))
    for name in edge:
        EDGE_CASES[name](weight, x)
    return Layer(weight, x, ", ".join(["integers" if whole else "normal", *edge]))


def shapes(rows: int = 4, columns: int = 6) -> st.SearchStrategy[Shape]:
    return st.tuples(st.integers(1, rows), st.integers(1, columns))


fractions = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1 / 3, 0.29]), st.floats(0.0, 1.0))


def sets(shape: Shape, names: list[str] | None = None) -> st.SearchStrategy[PartitionMatroid]:
    """Sets that fit a shape, of the kinds named (by default those of `SETS`) and any share."""
    return st.builds(
        lambda name, fraction: ALL_SETS[name](shape, fraction), st.sampled_from(names or list(SETS)), fractions
    )


_SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, 1e30, -1e30, 1e-30, -1e-30]


def costs(shape: Shape, dtype: torch.dtype = torch.float64, infinite: bool = True) -> st.SearchStrategy[Tensor]:
    """Costs with ties, signed zeros, huge and tiny sizes and infinities, without NaN."""
    special = [*_SPECIAL, math.inf, -math.inf] if infinite else _SPECIAL
    entry = st.one_of(
        st.sampled_from(special),
        st.integers(-3, 3).map(float),
        st.floats(-(2.0**100), 2.0**100, width=32) if not infinite else st.floats(allow_nan=False, width=32),
    )
    values = st.lists(entry, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    same = entry.map(lambda value: [value] * (shape[0] * shape[1]))
    return st.one_of(values, values, values, same).map(lambda flat: torch.tensor(flat).to(dtype).view(shape))
