"""Scores of known layers."""

import torch

from maskopt.problems import Saliency

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
GRAM = torch.tensor([[4.0, 1.0], [1.0, 16.0]])


def test_magnitude_scores_are_absolute_weights() -> None:
    assert Saliency.magnitude(WEIGHT).scores.tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_wanda_scores_are_weights_times_input_norms() -> None:
    assert Saliency.wanda(WEIGHT, GRAM).scores.tolist() == [[2.0, 8.0], [6.0, 0.0]]


def test_ria_scores_follow_the_formula() -> None:
    # |w| over row sums 3, 3 and column sums 4, 2; times the roots of the norms 2 and 4.
    expected = torch.tensor([[1 / 3 + 1 / 4, 2 / 3 + 2 / 2], [3 / 3 + 3 / 4, 0.0]]) * torch.tensor([2.0, 4.0]).sqrt()
    torch.testing.assert_close(Saliency.ria(WEIGHT, GRAM).scores, expected)
    plain = torch.tensor([[1 / 3 + 1 / 4, 2 / 3 + 2 / 2], [3 / 3 + 3 / 4, 0.0]])
    torch.testing.assert_close(Saliency.ria(WEIGHT, GRAM, power=0.0).scores, plain)


def test_rows_and_columns_of_zeros_score_zero() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    gram = torch.diag(torch.tensor([1.0, 0.0, 1.0]))
    scores = Saliency.ria(weight, gram).scores
    assert scores[0].tolist() == [0.0, 0.0, 0.0]
    assert scores[1, 0] == 0.0
    assert scores[1, 1] == 0.0  # a dead channel
    assert bool(torch.isfinite(scores).all())


def test_a_diagonal_negative_by_rounding_scores_zero() -> None:
    gram = torch.diag(torch.tensor([1.0, -1e-9]))
    for scores in (Saliency.wanda(WEIGHT, gram).scores, Saliency.ria(WEIGHT, gram).scores):
        assert bool(torch.isfinite(scores).all())
        assert scores[:, 1].tolist() == [0.0, 0.0]


def test_inputs_are_not_modified() -> None:
    weight, gram = WEIGHT.clone(), GRAM.clone()
    problem = Saliency.ria(weight, gram)
    problem.evaluate(torch.zeros(2, 2))
    problem.objective(torch.zeros(2, 2, dtype=torch.bool))
    assert torch.equal(weight, WEIGHT)
    assert torch.equal(gram, GRAM)
