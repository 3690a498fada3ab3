"""Column subset problems: refusals, given diagonals, singular Grams, and what solvers make of the relaxation."""

import pytest
import torch

import maskopt
from maskopt.errors import MaskoptError
from maskopt.problems import ColumnSubset, LayerReconstruction
from maskopt.solvers import FrankWolfe


def subset(d=6, rows=3, seed=0, **settings):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(d, 4 * d, generator=random, dtype=torch.float64)
    return ColumnSubset(torch.randn(rows, d, generator=random, dtype=torch.float64), x @ x.T, **settings)


@pytest.mark.parametrize(
    ("target", "gram", "settings", "message"),
    [
        (
            torch.ones(2, 3),
            torch.eye(2),
            {},
            r"target \(rows, d\) and a Gram \(d, d\); got shapes \(2, 3\) and \(2, 2\)",
        ),
        (torch.ones(0, 2), torch.eye(2), {}, "non-empty target"),
        (torch.full((1, 2), torch.nan), torch.eye(2), {}, r"target must be finite, but entry \(0, 0\)"),
        (torch.ones(1, 2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), {}, "must be symmetric"),
        (torch.ones(1, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), {}, "must be positive semidefinite"),
        (torch.ones(1, 2), torch.eye(2), {"units": torch.tensor([0])}, "one whole number >= 0 for each of 2 columns"),
        (torch.ones(1, 2), torch.eye(2), {"units": torch.tensor([0.0, 1.0])}, "one whole number"),
        (torch.ones(1, 2), torch.eye(2), {"units": torch.tensor([0, 2])}, "no column is of unit 1"),
        (torch.ones(1, 2), torch.eye(2), {"diagonal": torch.tensor([2.0, 0.0])}, "less the diagonal must be positive"),
        (torch.ones(1, 2), torch.eye(2), {"diagonal": torch.tensor([-1.0, 0.0])}, "2 numbers >= 0"),
        (torch.full((1, 2), 1e200, dtype=torch.float64), torch.eye(2), {}, "exceeds float64"),
    ],
)
def test_wrong_data_are_refused(target, gram, settings, message):
    with pytest.raises(MaskoptError, match=message):
        ColumnSubset(target, gram, **settings)


def test_singular_grams_get_the_least_diagonal_that_makes_them_definite():
    x = torch.ones(3, 1, dtype=torch.float64)
    problem = ColumnSubset(torch.ones(1, 3), x @ x.T)
    added = problem.gram.diagonal() - 1.0
    assert bool((added > 0).all())
    assert bool((added < 1e-10).all())
    # Any one of three equal inputs stands for all.
    assert float(problem.objective(torch.tensor([[True, False, False]]))) < 1e-9


def test_definite_grams_stay_as_they_are():
    problem = subset()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(6, 24, generator=random, dtype=torch.float64)
    assert torch.equal(problem.gram, (x @ x.T + (x @ x.T).T) / 2)


def test_better_diagonals_raise_the_relaxation_and_no_mask_sees_them():
    problem = subset()
    other = problem.with_diagonal(0.5 * problem.diagonal)
    x = torch.full((1, 6), 0.5, dtype=torch.float64)
    assert float(other.value(other.evaluate(x))) < float(problem.value(problem.evaluate(x)))
    mask = torch.tensor([[True, False, True, False, True, False]])
    torch.testing.assert_close(
        other.value(other.evaluate(mask.double())), problem.value(problem.evaluate(mask.double()))
    )
    torch.testing.assert_close(other.diagonal, 0.5 * problem.diagonal, rtol=1e-5, atol=0)


def test_a_layers_problem_has_its_target_and_a_ridge():
    random = torch.Generator().manual_seed(1)
    x, weight = torch.randn(4, 9, generator=random), torch.randn(2, 4, generator=random)
    target = torch.randn(2, 4, generator=random)
    layer = LayerReconstruction(weight, x @ x.T, target=target)
    problem = ColumnSubset.of(layer, ridge=0.1)
    torch.testing.assert_close(problem.target, target.double())
    torch.testing.assert_close(problem.gram, (x @ x.T).double() + 0.1 * torch.diag((x @ x.T).double().diagonal()))


def test_frank_wolfe_descends_on_the_relaxation():
    problem = subset(d=12, rows=4, seed=3)
    short, long = (maskopt.solve(problem, maskopt.PerRow(6), FrankWolfe(iterations=n)) for n in (1, 60))
    assert float(long.lower_bound) > float(short.lower_bound)
    assert 0.0 < float(long.lower_bound) <= long.total
