"""Results are the same on any number of threads, up to the size that the documentation names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from maskopt import PerRow, Result, solve, synthetic
from maskopt.problems import LayerReconstruction
from maskopt.solvers import Solver, make_solver
from maskopt.weights import LeastSquares, make_weights

METHODS = {
    "wanda": make_solver("wanda"),
    "one-swap": make_solver("one-swap", max_steps=5),
    "sparsefw": make_solver("sparsefw", iterations=20),
    "continuation": make_solver("continuation", iterations=10, polish=False),  # swaps are those of "one-swap"
    "lsq": LeastSquares(solver=make_solver("wanda")),
    "sparsegpt": make_weights("sparsegpt"),
    "admm": make_weights("admm", iterations=5),
    "alps": make_weights("alps", iterations=10),
    "best": make_weights("best", iterations=20),
}


@pytest.fixture
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if every layer were large enough for several threads; the number is restored."""
    monkeypatch.setattr("maskopt.threads.SMALL", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_masks_and_weights_do_not_depend_on_the_number_of_threads(method: Solver) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_solved(method))
    for other in results[1:]:
        assert torch.equal(results[0].mask, other.mask)
        if other.weight is not None:
            assert results[0].weight is not None
            assert torch.equal(results[0].weight, other.weight)


def _solved(method: Solver) -> Result:
    # Libraries split the sums of products that have few rows; layers on several threads have more.
    return solve(synthetic("correlated", rows=96, d=200).problem(), PerRow(0.5), method)


@pytest.mark.usefixtures("_threads")
def test_targets_do_not_depend_on_the_number_of_threads() -> None:
    instance = synthetic("correlated", rows=8, d=200)
    cross = instance.gram + 0.01 * synthetic("correlated", rows=8, d=200, seed=1).gram
    targets = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        targets.append(LayerReconstruction.towards(instance.weight, instance.gram, cross).scaled_target)
    assert torch.equal(*targets)
