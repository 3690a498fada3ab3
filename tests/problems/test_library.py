"""The library of solved instances: what is stored agrees with what can be computed."""

from pathlib import Path

import pytest
import torch

from maskopt.errors import MaskoptError
from maskopt.oracles import PartitionMatroid, parse_masks
from maskopt.problems import SolvedInstance, library
from maskopt.solvers import BranchAndBound, Wanda, solve
from tests.helpers import errors_of, every_mask, feasible

INSTANCES = library()


def test_the_library_covers_many_sizes_and_patterns() -> None:
    assert len(INSTANCES) >= 60
    assert {one.mask.shape[1] for one in INSTANCES} >= {12, 24, 32, 48, 64, 96}
    assert len({(one.pattern, one.sparsity) for one in INSTANCES}) >= 4
    assert len({one.name for one in INSTANCES}) == len(INSTANCES)
    assert sum(one.solved for one in INSTANCES) >= 0.9 * len(INSTANCES)


@pytest.mark.parametrize("one", INSTANCES, ids=lambda one: one.name)
def test_stored_errors_and_bounds_are_true(one: SolvedInstance) -> None:
    problem, masks = one.problem(), parse_masks(one.pattern, one.sparsity)
    assert isinstance(masks, PartitionMatroid)
    assert feasible(masks, one.mask)
    scale = float(problem.scale().sum())
    assert abs(float(problem.objective(one.mask).sum()) - one.error) <= 1e-9 * one.error + 1e-13 * scale
    assert 0.0 <= one.bound <= one.error * (1 + 1e-9) + 1e-13 * scale
    assert one.instance.metadata["origin"]
    if one.mask.shape[1] <= 12:  # small enough for enumeration
        errors = errors_of(problem.weight, problem.gram, every_mask(masks, problem.shape)).sum(1)
        assert one.error <= float(errors.min()) * (1 + 1e-6) + 1e-12 * scale
        assert one.bound <= float(errors.min()) + 1e-13 * scale


MIDDLE = [one for one in INSTANCES if one.mask.shape[1] in (24, 32)]


@pytest.mark.parametrize("one", MIDDLE[::4], ids=lambda one: one.name)
def test_optima_are_proven_again_from_a_worse_start(one: SolvedInstance) -> None:
    masks = parse_masks(one.pattern, one.sparsity)
    result = solve(one.problem(), masks, BranchAndBound(start=Wanda()))
    assert result.total <= one.error * (1 + 1e-6)
    assert torch.equal(result.mask, one.mask) or result.total >= one.bound * (1 - 1e-9)


def test_a_missing_library_is_named() -> None:
    with pytest.raises(MaskoptError, match=r"nowhere.safetensors is missing; benchmarks/make_library.py makes it"):
        library(Path("nowhere.safetensors"))
