"""Choices of whole units on the pretend device: the CPU's results, on the device."""

from __future__ import annotations

import pytest
import torch

from maskopt.bounds import column_bound
from maskopt.oracles import MaskSet, PerRow, Units, Unstructured
from maskopt.problems import ColumnSubset, synthetic
from maskopt.solvers import FrankWolfe, solve
from maskopt.structured import STRUCTURED, ExactSwaps, Structured, make_structured
from tests.devices.pretend import DEVICE, pretend_device
from tests.devices.test_solvers import LAYER, assert_same, compare, elsewhere

WIDE = synthetic("correlated", 4, 16, seed=3).problem()
SOLVERS: dict[str, Structured] = {
    **{name: make_structured(name) for name in STRUCTURED},
    "swaps": ExactSwaps(enumerate=0),
}


def fixed(masks: MaskSet) -> MaskSet:
    some = torch.zeros(WIDE.shape, dtype=torch.bool)
    return masks.restrict(kept=some.index_fill(1, torch.tensor([0]), True))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("width", [1, 2])
def test_methods_agree_with_the_cpu(name: str, width: int) -> None:
    compare(WIDE, Units(Unstructured(8 // width), (None, width)), SOLVERS[name])
    compare(WIDE, fixed(Units(Unstructured(8 // width), (None, width))), SOLVERS[name])


def test_the_problem_agrees_with_the_cpu() -> None:
    solver = FrankWolfe(iterations=10)
    here = solve(ColumnSubset.of(LAYER), PerRow(4), solver)
    with pretend_device():
        assert_same(here, solve(ColumnSubset.of(elsewhere(LAYER)), PerRow(4), solver))


@pytest.mark.parametrize("kind", ["plain", "diagonal", "forms"])
def test_bounds_agree_with_the_cpu(kind: str) -> None:
    here = column_bound(ColumnSubset.of(LAYER), 4, kind)  # type: ignore[arg-type]
    with pretend_device():
        there = column_bound(ColumnSubset.of(elsewhere(LAYER)), 4, kind)  # type: ignore[arg-type]
        assert there.x.device == there.diagonal.device == DEVICE
        assert there.bound == here.bound
        assert torch.equal(there.x.cpu(), here.x)
