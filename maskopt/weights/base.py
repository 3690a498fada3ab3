"""What methods that move the surviving weights share: the damped, scaled least-squares problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.problems import LayerReconstruction, Problem
from maskopt.solvers.base import Solver

__all__ = ["Joint", "System"]


@dataclass(frozen=True)
class System:
    """min over supports S and weights v on S of (w - v)^T H (w - v), one term per row, in scaled inputs.

    H = D^-1 (G + ridge I) D^-1 has a unit diagonal and w stands for w D: layers with outlier channels are no worse
    conditioned than others, and supports are the same.

    Attributes
    ----------
    weight : Tensor
        Scaled weight, shape (rows, d).
    gram : Tensor
        H, shape (d, d), symmetric with unit diagonal, positive definite for a positive ridge.
    size : Tensor
        The diagonal of D, in units of the problem's `scaled_gram`, shape (d,).
    """

    weight: Tensor
    gram: Tensor
    size: Tensor

    @classmethod
    def of(cls, problem: Problem, ridge: float) -> System:
        """Return the system of a layer.

        Parameters
        ----------
        problem : LayerReconstruction
        ridge : float
            Added to the diagonal of the Gram, as a share of its mean: keeps rank-deficient layers well-posed, draws
            weights towards the dense ones.
        """
        assert isinstance(problem, LayerReconstruction)
        # A float32 Gram may be asymmetric in its last digits, which factorisations and their users see differently.
        gram = (problem.scaled_gram + problem.scaled_gram.T).mul_(0.5)
        diagonal = gram.diagonal()
        diagonal.clamp_(min=0.0).add_(ridge * float(diagonal.mean()))
        # Inputs that are always zero: any positive number will do, their weights do not matter.
        diagonal.masked_fill_(diagonal <= 0, 1.0)
        size = diagonal.sqrt()
        gram.div_(size).div_(size.unsqueeze(1))
        diagonal.fill_(1.0)
        return cls(problem.scaled_weight * size, gram, size)

    def finish(self, problem: LayerReconstruction, scaled: Tensor) -> Tensor:
        """Return scaled weights in the units of the layer's own."""
        return (scaled / self.size * problem.weight_unit).to(problem.dtype)


@dataclass(frozen=True)
class Joint(Solver):
    """Base of the methods that choose weights together with the mask.

    Parameters
    ----------
    ridge : float
        See `System.of`.
    """

    ridge: float = 0.01

    requires: ClassVar[tuple[str, ...]] = ("weight", "gram")
    arrays: ClassVar[float] = 12.0

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise MaskoptError(f"{self.name} needs a ridge >= 0; got {self.ridge}.")
