"""Linear objectives: the scores of greedy pruning, which one oracle call minimises."""

from fractions import Fraction

import torch
from torch import Tensor

from maskopt.checks import matrix
from maskopt.errors import MaskoptError
from maskopt.exact import condition, nearest_float, summed
from maskopt.problems.base import Direction, Point, Quadratic, shift_convexity_error

__all__ = ["Saliency"]


class Saliency(Quadratic):
    """The total score of the pruned entries, a linear function of the mask.

    Parameters
    ----------
    scores : Tensor
        Importance of each entry, shape (rows, d), no NaN; entries of larger score are kept first.

    Raises
    ------
    MaskoptError
        If the scores are no matrix or have a NaN.

    Examples
    --------
    >>> import torch
    >>> from maskopt.problems import Saliency
    >>> scores = Saliency.wanda(torch.tensor([[2.0, -1.0]]), gram=torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
    >>> scores.scores
    tensor([[2., 3.]])
    >>> scores.objective(torch.tensor([[False, True]]))
    tensor([2.], dtype=torch.float64)
    """

    def __init__(self, scores: Tensor) -> None:
        scores = matrix("scores", scores)
        if scores.ndim != 2 or 0 in scores.shape:
            raise MaskoptError(f"Scores are a matrix (rows, d), not empty; got shape {tuple(scores.shape)}.")
        if bool(scores.isnan().any()):
            row, column = scores.isnan().nonzero()[0].tolist()
            raise MaskoptError(f"Scores must be numbers, but entry ({row}, {column}) is NaN.")
        self.scores = scores

    @classmethod
    def magnitude(cls, weight: Tensor) -> "Saliency":
        """Return the scores |w_ij|.

        Parameters
        ----------
        weight : Tensor
            Shape (rows, d).
        """
        return cls(weight.abs())

    @classmethod
    def wanda(cls, weight: Tensor, gram: Tensor) -> "Saliency":
        """Return the scores |w_ij| ||x_j||, the square root of the error by pruning that entry alone.

        (Wanda: Sun et al., A simple and effective pruning approach for large language models, ICLR 2024, section 3.)

        Parameters
        ----------
        weight : Tensor
            Shape (rows, d).
        gram : Tensor
            Sum of x x^T over the calibration tokens, shape (d, d); only its diagonal ||x_j||^2 is used.
        """
        return cls(weight.abs() * gram.diagonal().clamp_min(0).sqrt())

    @classmethod
    def ria(cls, weight: Tensor, gram: Tensor, power: float = 0.5) -> "Saliency":
        """Return the scores (|w_ij| / sum_k |w_ik| + |w_ij| / sum_k |w_kj|) ||x_j||^power.

        (Relative importance and activations, RIA: Zhang et al., Plug-and-play: an efficient post-training pruning
        method for large language models, ICLR 2024.) Rows or columns of zeros have the score zero.

        Parameters
        ----------
        weight : Tensor
            Shape (rows, d).
        gram : Tensor
            As for `wanda`.
        power : float
            0.5 in the paper's experiments and code.
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
        return self._with(self.scores.double())

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor:
        rounding = self.scores.double().abs().sum(1).mul_((self.shape[1] + 8) * 2.0**-50)
        return rounding + shift_convexity_error(point, shift)

    def rows(self, index: slice | Tensor) -> "Saliency":
        return self._with(self.scores[index])

    def _with(self, scores: Tensor) -> "Saliency":
        part = object.__new__(Saliency)
        part.scores = scores
        return part

    def objective(self, mask: Tensor) -> Tensor:
        lost = self.scores.double().masked_fill(mask, 0.0)
        values = lost.sum(1)
        # Scores of both signs may cancel; then the sum is repeated in exact arithmetic.
        index = (values.abs() * condition(self.shape[1]) < lost.abs().sum(1)).nonzero().flatten()
        if len(index):
            values[index] = torch.tensor([nearest_float(summed(row)) for row in lost[index]], dtype=torch.float64).to(
                values
            )
        return values

    def exact_objective(self, mask: Tensor) -> list[Fraction]:
        return [summed(row) for row in self.scores.masked_fill(mask, 0.0)]

    def scale(self) -> Tensor:
        return self.scores.sum(1, dtype=torch.float64)
