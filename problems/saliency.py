"""Linear scores: the criteria of greedy pruning, whose LMO value is the whole answer."""

from fractions import Fraction

import torch
from torch import Tensor

from maskopt.exact import condition, rounded, summed
from maskopt.problems.base import Direction, Point, Quadratic, shift_convexity_error

__all__ = ["Saliency"]


class Saliency(Quadratic):
    """Minimise the total score of the pruned entries.

    Parameters
    ----------
    scores : Tensor
        Importance of each entry, shape (rows, d); larger is kept first.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    @classmethod
    def magnitude(cls, weight: Tensor) -> "Saliency":
        """Score |w|."""
        return cls(weight.abs())

    @classmethod
    def wanda(cls, weight: Tensor, gram: Tensor) -> "Saliency":
        """Score |w_ij| ||x_j||, the root of the error of pruning that entry alone (Wanda, arXiv 2306.11695)."""
        return cls(weight.abs() * gram.diagonal().clamp_min(0).sqrt())

    @classmethod
    def ria(cls, weight: Tensor, gram: Tensor, power: float = 0.5) -> "Saliency":
        """Relative importance and activations: (|w|/row sum + |w|/column sum) ||x_j||^power.

        `power` is 0.5 in the paper's experiments and code (RIA, ICLR 2024). Rows or columns that are all
        zero score zero.
        """
        size = weight.abs()
        tiny = torch.finfo(size.dtype).tiny
        relative = size / size.sum(1, keepdim=True).clamp_min(tiny) + size / size.sum(0).clamp_min(tiny)
        return cls(relative * gram.diagonal().clamp_min(0).sqrt() ** power)

    @property
    def shape(self) -> tuple[int, int]:
        return self.scores.shape[0], self.scores.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.scores.dtype

    @property
    def device(self) -> torch.device:
        return self.scores.device

    def evaluate(self, x: Tensor) -> Point:
        return Point(x, -self.scores)

    def hvp(self, x: Tensor) -> Direction:
        return Direction(x, torch.zeros_like(x))

    def value(self, point: Point) -> Tensor:
        return (self.scores * (1 - point.x)).sum(1, dtype=torch.float64)

    def diagonal(self) -> Tensor:
        return torch.zeros_like(self.scores)

    def smoothness(self) -> Tensor:
        return self.scores.new_zeros(len(self.scores))

    def double(self) -> "Saliency":
        return Saliency(self.scores.double())

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor:
        rounding = self.scores.double().abs().sum(1).mul_((self.shape[1] + 8) * 2.0**-50)
        return rounding + shift_convexity_error(point, shift)

    def rows(self, index: slice | Tensor) -> "Saliency":
        return Saliency(self.scores[index])

    def objective(self, mask: Tensor) -> Tensor:
        lost = self.scores.double().masked_fill(mask, 0.0)
        values = lost.sum(1)
        # Scores of both signs may cancel; then the sum is repeated without rounding.
        index = (values.abs() * condition(self.shape[1]) < lost.abs().sum(1)).nonzero().flatten()
        if len(index):
            values[index] = torch.tensor([rounded(summed(row)) for row in lost[index]], dtype=torch.float64).to(values)
        return values

    def exact_objective(self, mask: Tensor) -> list[Fraction]:
        return [summed(row) for row in self.scores.masked_fill(mask, 0.0)]

    def scale(self) -> Tensor:
        return self.scores.sum(1, dtype=torch.float64)
