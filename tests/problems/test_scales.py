"""Layers whose data are of very different sizes, nearly symmetric, or both."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.bounds import mask_bound
from maskopt.errors import MaskoptError
from maskopt.oracles import PartitionMatroid, PerRow, Unstructured
from maskopt.problems import LayerReconstruction, QuadraticForm
from maskopt.problems.convexity import diagonal_floor, entry_sizes
from maskopt.solvers import BranchAndBound, BruteForce, FrankWolfe, Wanda, solve
from tests.helpers import Layer, examples, layers
from tests.problems.test_eigenvalue_floor import below_every_eigenvalue


def asymmetric(gram: Tensor, size: float, seed: int) -> Tensor:
    noise = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, tuple(gram.shape)))
    return gram + size * float(gram.abs().max()) * (noise - noise.T) / 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5, 9e-5])
def test_a_gram_is_symmetrised_once(dtype: torch.dtype, size: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 9)))
    given_ = asymmetric(x @ x.T, size, 1).to(dtype)
    problem = LayerReconstruction(torch.ones(2, 5, dtype=dtype), given_)
    assert torch.equal(problem.gram, problem.gram.T)
    torch.testing.assert_close(
        problem.gram, (given_ + given_.T) / 2, rtol=1e-6 if dtype == torch.float32 else 1e-15, atol=0
    )
    for gram in (problem.scaled_gram, problem.double().gram, problem.symmetric_gram(), problem.rows(slice(1)).gram):
        assert torch.equal(gram.double(), problem.gram.double())
    form = QuadraticForm(given_ * 1.0, torch.ones(2, 5, dtype=dtype)) if size <= 1e-6 else None
    assert form is None or torch.equal(form.quadratic, form.quadratic.T)


def test_a_symmetric_gram_is_not_copied() -> None:
    gram = torch.eye(4)
    assert LayerReconstruction(torch.ones(2, 4), gram).gram.data_ptr() == gram.data_ptr()
    assert QuadraticForm(gram, torch.ones(2, 4)).quadratic.data_ptr() == gram.data_ptr()


def test_more_than_rounding_is_refused() -> None:
    gram = torch.eye(3)
    gram[0, 1] = 3e-4
    with pytest.raises(MaskoptError, match="must be symmetric"):
        LayerReconstruction(torch.ones(1, 3), gram)


@given(st.integers(0, 2**16), st.sampled_from([1e-8, 1e-7, 1e-6, 1e-5, 9e-5]))
@examples(40)
def test_bounds_hold_on_grams_that_are_not_quite_symmetric(seed: int, size: float) -> None:
    random = np.random.default_rng(seed)
    diagonal = torch.diag(torch.from_numpy(random.uniform(1, 5, 4))) * 10.0 ** -float(random.integers(1, 6))
    gram = asymmetric(torch.ones(4, 4, dtype=torch.float64) + diagonal, size, seed)
    weight = torch.from_numpy(random.choice([1.0, -1.0, 0.7], (1, 4)))
    problem = LayerReconstruction(weight, gram)
    # The error of a mask is that of the Gram as it was given: z^T G z does not see the skew part.
    rows = [[Fraction(value) for value in row] for row in gram.tolist()]
    errors = []
    for mask in PerRow(2).enumerate((1, 4)):
        z = [Fraction(value) for value in weight.masked_fill(mask, 0.0)[0].tolist()]
        errors.append(sum(z[i] * rows[i][j] * z[j] for i in range(4) for j in range(4)))
    best = min(errors)
    room = best * Fraction(1, 2**48) + Fraction(1, 2**50)  # of the mean of two entries, rounded
    for solver in (
        FrankWolfe("conjugate", relative_gap=0.0, iterations=60),
        BranchAndBound(start=Wanda()),
        BruteForce(),
    ):
        result = solve(problem, PerRow(2), solver)
        assert result.lower_bound is not None
        assert Fraction(float(result.lower_bound)) <= best + room
        assert Fraction(result.total) >= best - room
    for kind in ("shift", "sdp"):
        assert Fraction(float(mask_bound(problem, PerRow(2), kind))) <= best + room  # type: ignore[arg-type]


@given(st.integers(2, 6), st.integers(0, 2**16), st.sampled_from([0, 3, 6, 10]))
@examples(150)
def test_the_floor_that_knows_each_input_is_proven(d: int, seed: int, digits: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((d, int(random.integers(1, d + 3)))) * 10.0 ** random.integers(
        -digits, digits + 1, (d, 1)
    )
    x[random.integers(d)] *= random.integers(2)
    gram = torch.from_numpy(x @ x.T).to(torch.float32 if seed % 2 else torch.float64).double()
    gram = (gram + gram.T) / 2
    sizes = entry_sizes(gram)
    pairs = [[Fraction(a) * Fraction(b) for b in sizes.tolist()] for a in sizes.tolist()]
    assert all(abs(Fraction(float(gram[i, j]))) <= pairs[i][j] for i in range(d) for j in range(d))
    lacking = diagonal_floor(gram, sizes)
    assert 0.0 <= lacking <= 1e-5
    raised = gram + torch.diag(sizes.square() * lacking * (1 + 1e-15))
    assert below_every_eigenvalue(raised, -float(sizes.square().sum()) * 2.0**-51)


@given(layers(d=(2, 7)), st.integers(0, 2**16))
@examples(60)
def test_errors_that_cancel_are_exact(layer: Layer, seed: int) -> None:
    """Two large weights on one input cancel; what is left has all its digits."""
    random = np.random.default_rng(seed)
    weight, x = layer.weight.clone(), layer.x.clone()
    one, two = random.choice(layer.shape[1], 2, replace=False)
    x[two] = x[one]
    weight[:, one] *= 10.0 ** float(random.integers(3, 13))
    weight[:, two] = -weight[:, one]
    problem = LayerReconstruction(weight, x @ x.T)
    mask = torch.from_numpy(random.random(layer.shape) < 0.4)
    mask[:, [one, two]] = False
    gram = [[Fraction(value) for value in row] for row in problem.gram.tolist()]
    for row, found in zip(weight.masked_fill(mask, 0.0).tolist(), problem.objective(mask).tolist(), strict=True):
        z = [Fraction(value) for value in row]
        truth = max(Fraction(0), sum(z[i] * gram[i][j] * z[j] for i in range(len(z)) for j in range(len(z))))
        assert abs(Fraction(found) - truth) <= truth * Fraction(1, 10**10)


@pytest.mark.parametrize("masks", [PerRow(2), Unstructured(0.5)], ids=str)
def test_targets_keep_their_digits_beside_large_weights(masks: PartitionMatroid) -> None:
    """T - W is not rounded to T's size before the weight is pruned."""
    weight = torch.tensor([[1e7, 1.0, -2.0, 0.5]])
    target = torch.tensor([[0.3, 1.5, -2.0, 0.25]])
    problem = LayerReconstruction(weight, torch.eye(4), target=target)
    best = solve(problem, PerRow(1), BruteForce())
    pruned = torch.zeros(1, 4, dtype=torch.bool)
    assert float(problem.objective(pruned)) == pytest.approx(float(target.double().square().sum()), rel=1e-12)
    assert best.mask.tolist() == [[False, False, True, False]]
    assert (
        float(solve(problem, masks, FrankWolfe(iterations=50)).lower_bound.sum())
        <= solve(problem, masks, BruteForce()).total
    )


def test_towards_takes_any_gram() -> None:
    """Inputs that are copies of each other, or dead, with an indefinite rounding error: the ridge is raised."""
    random = np.random.default_rng(0)
    for size in (1.0, 1e8):
        x = random.standard_normal((6, 3))
        x[1] = x[0]
        x[2] = 0.0
        x[3] *= size
        gram = torch.from_numpy(x @ x.T) - 1e-6 * size**2 * torch.eye(6, dtype=torch.float64)
        problem = LayerReconstruction.towards(torch.ones(2, 6), gram.float(), gram.float(), ridge=0.0)
        assert bool(problem.target.isfinite().all())
    with pytest.raises(MaskoptError, match="cross term must be finite"):
        LayerReconstruction.towards(torch.ones(1, 2), torch.eye(2), torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


@pytest.mark.parametrize(
    ("weight", "gram", "error"),
    [(1e154, 1e-200, 5e108), (1e200, 1e-300, 5e100), (1e-160, 1.0, 5e-320), (5e-324, 5e-324, 0.0), (1e7, 1e290, 5e304)],
)
def test_units_neither_overflow_nor_underflow(weight: float, gram: float, error: float) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    problem = LayerReconstruction(values * weight, torch.eye(3, dtype=torch.float64) * gram)
    result = solve(problem, PerRow(1), BruteForce())
    assert result.total == pytest.approx(error, rel=1e-3)
    bound = solve(problem, PerRow(1), FrankWolfe(iterations=3)).lower_bound
    assert bound is not None
    assert 0.0 <= float(bound) <= result.total


@pytest.mark.parametrize(("weight", "gram"), [(1e7, 1e300), (1e150, 1e8), (1e150, 1e300)])
def test_errors_beyond_float64_are_refused(weight: float, gram: float) -> None:
    with pytest.raises(MaskoptError, match="exceeds float64; scale them down"):
        LayerReconstruction(torch.full((1, 3), weight, dtype=torch.float64), torch.eye(3, dtype=torch.float64) * gram)
