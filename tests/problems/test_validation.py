"""Data that a layer refuses, in one sentence, and data that it accepts."""

import math

import pytest
import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.problems import LayerReconstruction


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram_of(d: int, tokens: int, seed: int = 0) -> Tensor:
    x = normal(d, tokens, seed=seed)
    return x @ x.T


def broken(matrix: Tensor, row: int, column: int, value: float) -> Tensor:
    matrix = matrix.clone()
    matrix[row, column] = value
    return matrix


@pytest.mark.parametrize(
    ("weight", "gram", "sentence"),
    [
        (torch.empty(0, 3), gram_of(3, 9), r"non-empty weight .* got shapes \(0, 3\) and \(3, 3\)"),
        (torch.empty(3, 0), torch.empty(0, 0), r"non-empty weight .* got shapes \(3, 0\) and \(0, 0\)"),
        (torch.ones(3), gram_of(3, 9), r"got shapes \(3,\) and \(3, 3\)"),
        (torch.ones(2, 3, 4), gram_of(4, 9), r"got shapes \(2, 3, 4\)"),
        (torch.ones(2, 3), torch.ones(3), r"got shapes \(2, 3\) and \(3,\)"),
        (torch.ones(2, 3), gram_of(4, 9), r"weight has 3 input features but the Gram has shape \(4, 4\); .* \(3, 3\)"),
        (torch.ones(3, 2), gram_of(3, 9), "weight has 2 input features"),
        (torch.ones(2, 3), gram_of(4, 9)[:3], "weight has 3 input features"),
        (
            torch.ones(2, 3, dtype=torch.int64),
            gram_of(3, 9),
            "weight must be floating point, .*; got torch.int64",
        ),
        (torch.ones(2, 3), gram_of(3, 9).long(), "Gram must be floating point, of 16, 32 or 64 bits; got torch.int64"),
        (torch.ones(2, 3, dtype=torch.bool), gram_of(3, 9), "must be floating point"),
        (torch.ones(2, 3, dtype=torch.complex64), gram_of(3, 9), "must be floating point"),
        (torch.ones(2, 3), gram_of(3, 9).to("meta"), "The Gram lies on the meta device, where tensors have no data"),
        (broken(torch.ones(2, 3), 1, 2, math.nan), gram_of(3, 9), r"weight must be finite, but entry \(1, 2\) is nan"),
        (broken(torch.ones(2, 3), 0, 1, math.inf), gram_of(3, 9), r"weight must be finite, but entry \(0, 1\) is inf"),
        (torch.ones(2, 3), broken(gram_of(3, 9), 2, 0, math.nan), r"Gram must be finite, but entry \(2, 0\) is nan"),
        (torch.ones(2, 3), broken(gram_of(3, 9), 1, 1, -math.inf), r"Gram must be finite, but entry \(1, 1\) is -inf"),
        (torch.ones(2, 3), gram_of(3, 9).triu(), "Gram must be symmetric, but it differs from its transpose by"),
        (torch.ones(2, 3), broken(gram_of(3, 9), 0, 1, 0.0), "Gram must be symmetric"),
        (torch.ones(2, 3), -gram_of(3, 9), "Gram must be positive semidefinite, but diagonal entry"),
        (torch.ones(2, 3), torch.diag(torch.tensor([1.0, -0.5, 2.0])), "semidefinite, but diagonal entry 1 is -0.5"),
        (torch.ones(1, 1), -torch.ones(1, 1), "diagonal entry 0 is -1"),
        (torch.ones(1, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "but it is indefinite, smallest eigenvalue -1; is"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own warning, about complex to real
def test_bad_layers_are_refused(weight: Tensor, gram: Tensor, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        LayerReconstruction(weight, gram)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("d", [2, 3, 5, 16, 64, 300])
def test_indefinite_grams_are_refused(d: int, size: float) -> None:
    basis = torch.linalg.qr(normal(d, d, dtype=torch.float64)).Q
    eigenvalues = torch.linspace(0.1, 1.0, d, dtype=torch.float64)
    eigenvalues[0] = -1e-3 * d**0.5
    gram = (basis * eigenvalues) @ basis.T * size
    with pytest.raises(MaskoptError, match="positive semidefinite"):
        LayerReconstruction(torch.ones(2, d, dtype=torch.float64), (gram + gram.T) / 2)
    with pytest.raises(MaskoptError, match="positive semidefinite"):
        LayerReconstruction(torch.ones(2, d), ((gram + gram.T) / 2).float())


@pytest.mark.parametrize("spread", [1.0, 1e3])
@pytest.mark.parametrize(("d", "tokens"), [(2, 1), (3, 1), (17, 4), (64, 1), (64, 63), (200, 20), (512, 8), (512, 300)])
def test_rank_deficient_grams_are_accepted(d: int, tokens: int, spread: float) -> None:
    """Fewer tokens than inputs, summed in float32 in pieces, with channels of unlike size."""
    for seed in range(4):
        x = normal(d, tokens, seed=seed) * spread ** normal(d, 1, seed=seed + 100).clamp(-2, 2)
        gram = torch.zeros(d, d)
        for piece in x.split(3, 1):
            gram += piece @ piece.T
        LayerReconstruction(torch.ones(1, d), gram)
        LayerReconstruction(torch.ones(1, d), gram.double())


def test_a_long_float32_sum_is_accepted() -> None:
    d, gram = 48, torch.zeros(48, 48)
    basis = normal(d, 3)
    for seed in range(400):
        x = basis @ normal(3, 64, seed=seed) + 100.0
        gram += x @ x.T
    LayerReconstruction(torch.ones(1, d), gram)


@pytest.mark.parametrize("d", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_zero_layers_are_accepted(d: int, dtype: torch.dtype) -> None:
    problem = LayerReconstruction(torch.zeros(2, d, dtype=dtype), torch.zeros(d, d, dtype=dtype))
    assert problem.objective(torch.zeros(2, d, dtype=torch.bool)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("weight", "gram", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_half_precision_is_widened(weight: torch.dtype, gram: torch.dtype, expected: torch.dtype) -> None:
    w, g = normal(3, 4).to(weight), (torch.eye(4) * 3 + 1).to(gram)
    problem = LayerReconstruction(w, g)
    assert problem.dtype == problem.weight.dtype == problem.gram.dtype == expected
    assert torch.equal(problem.weight, w.to(expected))  # widening changes no value
    point = problem.evaluate(torch.zeros(3, 4, dtype=expected))
    assert problem.gradient(point).dtype == expected
    assert problem.objective(torch.zeros(3, 4, dtype=torch.bool)).dtype == torch.float64


def test_parameters_are_accepted() -> None:
    weight = torch.nn.Parameter(normal(3, 4))
    problem = LayerReconstruction(weight, gram_of(4, 9))
    assert not problem.weight.requires_grad
    assert not problem.objective(torch.zeros(3, 4, dtype=torch.bool)).requires_grad


def test_unchecked_data_are_not_validated() -> None:
    LayerReconstruction(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), check=False)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-12, 1e12, 1e30, 1e38])
def test_sizes_at_the_ends_of_float32_are_accepted(size: float) -> None:
    weight, gram = normal(3, 4), gram_of(4, 9)
    plain = LayerReconstruction(weight, gram)
    mask = torch.eye(3, 4, dtype=torch.bool)
    for w, g, factor in (
        (weight * size / 4, gram, (size / 4) ** 2),
        (weight, gram * (size / 64), size / 64),
    ):
        problem = LayerReconstruction(w, g)
        torch.testing.assert_close(problem.objective(mask), plain.objective(mask) * factor, rtol=1e-5, atol=0.0)
        assert bool(torch.isfinite(problem.evaluate(torch.zeros(3, 4)).gradient).all())


def test_errors_beyond_float64_are_refused() -> None:
    weight, gram = normal(2, 3, dtype=torch.float64), gram_of(3, 9).double()
    with pytest.raises(MaskoptError, match="exceeds float64; scale them down"):
        LayerReconstruction(weight * 1e200, gram)
    problem = LayerReconstruction(weight * 1e100, gram * 1e-100)
    assert bool(torch.isfinite(problem.scale()).all())
