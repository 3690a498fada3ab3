"""Common to all suites: edge-case inputs, numbers of examples, and the names of tests.registry and tests.answers."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from maskopt.oracles import PartitionMatroid
from maskopt.problems import LayerReconstruction
from tests.answers import (
    Shape,
    banned_of,
    best_swaps,
    cheapest,
    counts_of,
    errors_of,
    groups_of,
    held_of,
    magnitudes,
)
from tests.members import belong, every_mask, feasible, minimum_errors
from tests.registry import (
    ALL_SETS,
    DOWN_CLOSED_SETS,
    EQUAL_SETS,
    EXACT,
    FRANK_WOLFE,
    FREE_SETS,
    INTEGRAL_SETS,
    ITERATIVE,
    MATROIDS,
    SET_ENTRIES,
    SETS,
    SOLVER_ENTRIES,
    SOLVERS,
    SWAPPED,
)

__all__ = [
    "ALL_SETS",
    "DOWN_CLOSED_SETS",
    "EQUAL_SETS",
    "EXACT",
    "FRANK_WOLFE",
    "FREE_SETS",
    "INTEGRAL_SETS",
    "ITERATIVE",
    "MATROIDS",
    "SETS",
    "SET_ENTRIES",
    "SOLVERS",
    "SOLVER_ENTRIES",
    "SWAPPED",
    "Layer",
    "Shape",
    "banned_of",
    "belong",
    "best_swaps",
    "cheapest",
    "combinations",
    "costs",
    "counts_of",
    "errors_of",
    "every_mask",
    "examples",
    "feasible",
    "fractions",
    "groups_of",
    "held_of",
    "layers",
    "magnitudes",
    "minimum_errors",
    "sets",
    "shapes",
    "thinned",
    "without_seconds",
]


# `make test` must give the same answer twice, so examples are derived from the tests. To look for new ones:
# MASKOPT_EXPLORE=10 python -m pytest tests/properties     (random ones, ten times as many, in all combinations)
_EXPLORE = int(os.environ.get("MASKOPT_EXPLORE", "0"))
_QUICK = "MASKOPT_QUICK" in os.environ  # `make quick`
_HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def examples(count: int) -> settings:
    """Run a property on `count` examples, on a few in `make quick`."""
    if _QUICK:
        count = min(count, 3)
    if _EXPLORE:
        return settings(max_examples=count * _EXPLORE, deadline=None, suppress_health_check=_HEALTH, print_blob=True)
    return settings(max_examples=count, deadline=None, suppress_health_check=_HEALTH, derandomize=True, database=None)


def thinned(one_in: int, *values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return one in `one_in` of all combinations of values, all of them with MASKOPT_EXPLORE.

    They are those whose positions add up to a multiple of `one_in`: a value of one list meets one in `one_in` of those
    of another, and of three lists every two values meet if the third has that many.
    """
    places = itertools.product(*map(enumerate, values))
    return [
        tuple(value for _, value in place)
        for place in places
        if _EXPLORE or sum(position for position, _ in place) % one_in == 0
    ]


def combinations(
    one_in: int, *, ids: Callable[[Any], str] | None = None, **values: Iterable[Any]
) -> pytest.MarkDecorator:
    """Run a test on the `thinned` combinations of its parameters."""
    return pytest.mark.parametrize(tuple(values), thinned(one_in, *values.values()), ids=ids)


# Edge-case inputs


@dataclass(frozen=True)
class Layer:
    """A weight and the inputs its Gram is made from, float64; `name` says which edge cases they contain."""

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


@functools.cache
def shapes(rows: int = 4, columns: int = 6) -> st.SearchStrategy[Shape]:
    return st.tuples(st.integers(1, rows), st.integers(1, columns))


fractions = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1 / 3, 0.29]), st.floats(0.0, 1.0))


def sets(shape: Shape, names: list[str] | None = None) -> st.SearchStrategy[PartitionMatroid]:
    """Sets that fit a shape, of the kinds named (by default those of `SETS`) and any fraction."""
    return st.builds(
        lambda name, fraction: ALL_SETS[name](shape, fraction), st.sampled_from(names or list(SETS)), fractions
    )


_SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, 1e30, -1e30, 1e-30, -1e-30]


@functools.cache
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


def without_seconds(figures: object) -> object:
    """Return what a command's JSON holds apart from times."""
    if isinstance(figures, dict):
        return {key: without_seconds(item) for key, item in figures.items() if key != "seconds"}
    return [without_seconds(item) for item in figures] if isinstance(figures, list) else figures
