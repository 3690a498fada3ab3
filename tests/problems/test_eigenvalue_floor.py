"""`eigenvalue_floor` is a proven lower bound; it is tested without tolerances, on spectra that are known exactly."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.problems import LayerReconstruction
from tests.helpers import Layer, examples, layers


def floor_of(gram: Tensor, check: bool = True) -> float:
    return LayerReconstruction(torch.ones(1, len(gram), dtype=gram.dtype), gram, check=check).eigenvalue_floor()


def below_every_eigenvalue(gram: Tensor, floor: float) -> bool:
    """Whether (gram + gram^T) / 2 - floor I is positive semidefinite, by exact elimination with rational numbers."""
    pairs = zip(gram.tolist(), gram.T.tolist(), strict=True)
    rows = [[(Fraction(a) + Fraction(b)) / 2 for a, b in zip(*pair, strict=True)] for pair in pairs]
    for i, row in enumerate(rows):
        row[i] -= Fraction(floor)
    for i, row in enumerate(rows):
        if row[i] < 0:
            return False
        if row[i] == 0:
            if any(row[i + 1 :]):
                return False
            continue
        for other in range(i + 1, len(rows)):
            factor = rows[other][i] / row[i]
            rows[other] = [a - factor * b for a, b in zip(rows[other], row, strict=True)]
    return True


def test_the_exact_check_is_right_on_small_grams() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert below_every_eigenvalue(gram, 1.0)
    assert not below_every_eigenvalue(gram, 1.0 + 2.0**-50)
    assert below_every_eigenvalue(torch.zeros(2, 2), 0.0)
    assert not below_every_eigenvalue(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 0.0)


@given(layers(d=(1, 7)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@examples(150)
def test_floor_of_edge_case_grams_is_a_tight_bound(dtype: torch.dtype, layer: Layer) -> None:
    problem = layer.problem(dtype)
    floor = problem.eigenvalue_floor()
    assert floor <= 0.0
    gram = problem.scaled_gram.double()
    assert below_every_eigenvalue(gram, floor)
    assert floor >= -1e-6 * float(torch.linalg.matrix_norm(gram)) - 1e-300  # and the bound is tight


@given(st.integers(1, 40), st.integers(-30, -6), st.integers(0, 99))
@examples(100)
def test_floor_is_below_eigenvalues_negative_by_rounding(d: int, digits: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(d, max(1, d // 2), generator=random, dtype=torch.float64)
    gram = x @ x.T
    noise = torch.randn(d, d, generator=random, dtype=torch.float64) * 10.0**digits
    gram = gram + noise + noise.T
    floor = floor_of(gram, check=False)
    unit = LayerReconstruction(torch.ones(1, d, dtype=torch.float64), gram, check=False)
    eigenvalues = torch.linalg.eigvalsh(unit.scaled_gram)
    accuracy = 4 * d * 2.0**-53 * float(eigenvalues.abs().max())  # of eigvalsh
    assert floor <= float(eigenvalues[0]) + accuracy
    assert floor <= 0.0


@pytest.mark.parametrize(
    ("gram", "lowest"),
    [
        (torch.zeros(3, 3), 0.0),
        (torch.eye(3), 0.0),
        (torch.ones(5, 5), 0.0),
        (torch.tensor([[1.0, 1.0 + 2.0**-20], [1.0 + 2.0**-20, 1.0]]), -(2.0**-20)),
        (torch.diag(torch.tensor([1.0, -(2.0**-18)])), -(2.0**-18)),
        (torch.ones(4, 4) - 2.0**-19 * torch.eye(4), -(2.0**-19)),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), -1.0),
    ],
    ids=str,
)
def test_floor_is_near_known_smallest_eigenvalues(gram: Tensor, lowest: float) -> None:
    for dtype in (torch.float64, torch.float32):
        floor = floor_of(gram.to(dtype), check=False)
        assert floor <= lowest
        assert floor >= 11 * lowest - 1e-12


def test_floor_is_shared_by_rows_and_copies() -> None:
    problem = LayerReconstruction(torch.ones(4, 6), torch.ones(6, 6))
    assert problem.eigenvalue_floor() == problem.rows(slice(1, 2)).eigenvalue_floor()
    assert problem.eigenvalue_floor() == problem.double().eigenvalue_floor()
