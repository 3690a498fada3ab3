"""The damped, scaled least-squares problem that all methods solve which update the surviving weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from maskopt.checks import check_settings, real
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Solver, run_each
from maskopt.solvers.chunks import Chunk
from maskopt.solvers.requirements import Requirements

__all__ = ["Factor", "Factored", "Joint", "System"]

_LEAST = 1e-3  # second moment of an input that a ridge assumes at least, of the mean input's


@dataclass(frozen=True)
class System:
    """min over supports S and weights v on S of (w - v)^T H (w - v), one term per row, in scaled inputs.

    H = D^-1 (G + ridge I) D^-1 has a unit diagonal and w stands for w D. The scaling leaves supports as they are and
    conditions layers with outlier channels like others.

    Attributes
    ----------
    weight : Tensor
        Scaled weight w D, shape (rows, d).
    gram : Tensor
        H, shape (d, d), symmetric with unit diagonal, positive definite for a positive ridge.
    size : Tensor
        The diagonal of D, in units of the problem's `scaled_gram`, shape (d,).
    """

    weight: Tensor
    gram: Tensor
    size: Tensor

    @classmethod
    def of(cls, problem: LayerReconstruction, ridge: float, *, each: bool = False) -> System:
        """Return the system of a layer.

        Parameters
        ----------
        problem : LayerReconstruction
        ridge : float
            Added to the diagonal of the Gram, as a fraction of its mean. It makes rank-deficient layers well-posed
            and draws the weights towards the dense ones.
        each : bool
            Whether the ridge is a fraction of each input's own second moment instead of the mean, which outlier
            channels dominate. An input is then taken for at least a thousandth (in square) of the mean input, so that
            inputs which are almost zero get no huge weights.

        Returns
        -------
        System
        """
        gram = problem.scaled_gram.clone()  # changed in place below
        diagonal = gram.diagonal()
        mean = float(diagonal.clamp_(min=0.0).mean())
        dead = diagonal <= 0
        if each:
            # The square of the mean size: unlike the mean of squares, no single channel decides it.
            least = _LEAST * float(diagonal.sqrt().mean()) ** 2
            diagonal.mul_(1.0 + ridge).add_(ridge * least)
        else:
            diagonal.add_(ridge * mean)
            dead = diagonal <= 0
        # Inputs that are always zero: their weights do not matter, so they must not be kept for their size.
        diagonal.masked_fill_(dead, mean * 2.0**-40 if mean > 0 else 1.0)
        size = diagonal.sqrt()
        inverse = size.reciprocal().masked_fill_(dead, 0.0)
        gram.mul_(inverse).mul_(inverse.unsqueeze(1))
        # No correlation exceeds one; those of inputs that are almost zero may, by rounding.
        gram.clamp_(-1.0, 1.0).diagonal().fill_(1.0)
        return cls(problem.scaled_target * size, gram, size)

    def of_rows(self, problem: LayerReconstruction) -> System:
        """Return the system of other rows of the same layer, which has the same Gram."""
        return replace(self, weight=problem.scaled_target * self.size)

    def finish(self, problem: LayerReconstruction, scaled: Tensor) -> Tensor:
        """Return scaled weights, shape (rows, d), in the units and type of the layer's weight."""
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

    requires: ClassVar[Requirements] = Requirements((LayerReconstruction,))
    arrays: ClassVar[float] = 12.0

    def __post_init__(self) -> None:
        check_settings(self, ridge=real(0))


@dataclass(frozen=True)
class Factored(Joint):
    """Base of the methods that factorise the Gram once, for all rows."""

    def run(self, problem: LayerReconstruction, masks: Any, start: Tensor | None, monitor: Monitor) -> Outcome:
        return self.run_factored(problem, masks, start, monitor, self.factorise(problem))

    def run_chunks(self, chunks: Sequence[Chunk], monitor: Monitor) -> list[Outcome]:
        factor = self.factorise(chunks[0].problem)
        return run_each(chunks, monitor, partial(self.run_factored, factor=factor))

    @abstractmethod
    def factorise(self, problem: LayerReconstruction) -> Factor:
        """Return what depends on the Gram only."""

    @abstractmethod
    def run_factored(
        self, problem: LayerReconstruction, masks: Any, start: Tensor | None, monitor: Monitor, factor: Factor
    ) -> Outcome:
        """Solve one chunk of rows, as `Solver.run` does."""


@dataclass(frozen=True)
class Factor:
    """A Gram in scaled inputs, and what was factorised of it.

    Parameters
    ----------
    system : System
        Of some rows; `System.of_rows` returns that of others.
    matrix : Tensor
        An inverse, or a factor, shape (d, d).
    """

    system: System
    matrix: Tensor
