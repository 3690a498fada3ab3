"""Diagonals shared by a layer: they are valid, of largest trace, and their bounds hold for every mask."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt import PerRow, solve, synthetic
from maskopt.bounds import layer_shift, mask_bound, shifted_bound, smallest_eigenvalue
from maskopt.problems import FAMILIES, LayerReconstruction
from maskopt.solvers import BruteForce, FrankWolfe
from tests.bounds.test_sdp import minimum_error
from tests.helpers import Layer, examples, layers


@given(layers(d=(1, 8)), st.integers(0, 8))
@examples(120)
def test_shifts_of_edge_case_grams_are_valid(layer: Layer, kept: int) -> None:
    problem = layer.problem()
    rows, d = problem.shape
    gram = problem.scaled_gram.double()
    size = float(gram.diagonal().sum())
    keep = torch.full((rows,), min(kept, d))
    for diagonal in (smallest_eigenvalue(problem), layer_shift(problem)):
        assert (diagonal >= 0.0).all()
        assert float(torch.linalg.eigvalsh(gram - torch.diag(diagonal))[0]) >= -1e-13 * d * d * size
        bound = shifted_bound(problem, keep, diagonal, iterations=30)
        for row in range(rows):
            assert bound[row] <= minimum_error(problem, row, d - int(keep[0])) * (1 + 1e-13)


@pytest.mark.parametrize("family", ["independent", "correlated", "outliers"])
def test_no_feasible_diagonal_is_much_larger(family: str) -> None:
    gram = synthetic(family, rows=1, d=20, seed=4).problem().double().gram
    diagonal = layer_shift(LayerReconstruction(torch.ones(1, 20, dtype=torch.float64), gram))
    # With unit diagonals: sum L <= <Diag(L), Z> <= <K, Z> for every semidefinite Z with Z_ii >= 1. The inverse of the
    # slack comes close, scaled to Z_ii = 1 where L_i > 0.
    unit = gram.diagonal().sqrt()
    K, L = gram / unit / unit.unsqueeze(1), diagonal / unit.square()
    Z = torch.linalg.inv(K - torch.diag(L))
    sizes = Z.diagonal()[L < 1e-3].clamp(max=float(Z.diagonal().median()))
    scale = Z.diagonal().clone()
    scale[L < 1e-3] = sizes
    largest = float((K * Z / scale.sqrt() / scale.sqrt().unsqueeze(1)).sum())
    assert 0.98 * largest <= float(L.sum()) <= largest


@pytest.mark.parametrize("family", FAMILIES)
def test_diagonals_strengthen_the_relaxation(family: str) -> None:
    problem = synthetic(family, rows=3, d=10, seed=1).problem()
    keep = torch.tensor([5, 2, 9])
    plain = shifted_bound(problem, keep, torch.zeros(10, dtype=torch.float64), iterations=2000)
    best = torch.tensor([minimum_error(problem, row, 10 - int(keep[row])) for row in range(3)], dtype=torch.float64)
    slack = 1e-3 * best + 1e-12 * problem.scale()
    for diagonal in (smallest_eigenvalue(problem), layer_shift(problem)):
        shifted = shifted_bound(problem, keep, diagonal, iterations=2000)
        assert (shifted >= plain - slack).all()
        assert (shifted <= best + 1e-12 * problem.scale()).all()


def test_plain_relaxation_agrees_with_the_solver() -> None:
    problem = synthetic("correlated", rows=4, d=24, seed=0).problem()
    plain = shifted_bound(problem, torch.full((4,), 12), torch.zeros(24, dtype=torch.float64), iterations=3000)
    solved = solve(problem, PerRow(12), FrankWolfe("conjugate", iterations=500)).lower_bound
    assert solved is not None
    torch.testing.assert_close(plain, solved, rtol=1e-2, atol=0.0)
    strong = shifted_bound(problem, torch.full((4,), 12), layer_shift(problem))
    assert float(strong.sum()) > 1.1 * float(plain.sum())


def test_a_zero_gram_has_zero_shifts_and_bounds() -> None:
    problem = LayerReconstruction(torch.ones(2, 3), torch.zeros(3, 3))
    assert not layer_shift(problem).any()
    assert not smallest_eigenvalue(problem).any()
    assert not shifted_bound(problem, torch.tensor([1, 2]), layer_shift(problem)).any()


SINGULAR = [
    [[1.0408483743667603, 1.174208402633667], [1.174208402633667, 1.324655294418335]],
    [
        [4.946779727935791, 2.945359706878662, 1.5517513751983643],
        [2.945359706878662, 1.7536951303482056, 0.9239275455474854],
        [1.5517513751983643, 0.9239275455474854, 0.48676764965057373],
    ],
]


@pytest.mark.parametrize("gram", SINGULAR, ids=["two inputs", "three inputs"])
def test_singular_grams_by_rounding(gram: list[list[float]]) -> None:
    problem = LayerReconstruction(torch.ones(1, len(gram)), torch.tensor(gram))
    for kind in ("shift", "sdp", "cuts"):
        bound = mask_bound(problem, PerRow(1), kind)  # type: ignore[arg-type]
        assert 0.0 <= float(bound) <= minimum_error(problem, 0, len(gram) - 1) * (1 + 1e-12)


@given(st.integers(0, 2**20))
@examples(50)
def test_no_gram_is_too_singular(seed: int) -> None:
    """Rank one, copies, dead inputs, scales apart, float32: a bound comes back, and it holds."""
    random = np.random.default_rng(seed)
    d = int(random.integers(1, 6))
    x = random.standard_normal((d, int(random.integers(1, d + 1))))
    x *= 10.0 ** random.integers(-6, 7, (d, 1)) if random.random() < 0.5 else 1.0
    x[random.integers(d)] = x[random.integers(d)] * random.choice([0.0, 1.0, 1.0 + 1e-9])
    dtype = torch.float32 if random.random() < 0.5 else torch.float64
    weight = torch.from_numpy(random.standard_normal((1, d))).to(dtype)
    problem = LayerReconstruction(weight, torch.from_numpy(x @ x.T).to(dtype))
    keep = int(random.integers(0, d + 1))
    best = solve(problem, PerRow(keep), BruteForce()).total
    shift = shifted_bound(problem, torch.tensor([keep]), layer_shift(problem), iterations=20)
    for bound in (shift, mask_bound(problem, PerRow(keep), "sdp")):
        assert 0.0 <= float(bound) <= best * (1 + 1e-12)
