"""Units by scores: random, magnitude, FASP, FLAP, and a Newton step; then the refit."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import SEEDS, check_settings, whole
from maskopt.problems import LayerReconstruction
from maskopt.problems.checks import ridged_factor
from maskopt.solvers.base import Status
from maskopt.structured.base import Selection, Structured

__all__ = ["FASP", "FLAP", "ColumnMagnitude", "NewtonColumns", "RandomColumns"]


@dataclass(frozen=True)
class _Scored(Structured):
    """Keep the units of highest score; subclasses say which score."""

    @abstractmethod
    def scores(self, selection: Selection) -> Tensor:
        """Return the score of each unit, shape (units,)."""

    def choose(self, selection: Selection) -> tuple[Tensor, Status]:
        return selection.largest(self.scores(selection)), Status.GREEDY


@dataclass(frozen=True)
class RandomColumns(_Scored):
    """Keep random units: what every other method has to beat.

    Parameters
    ----------
    ridge, refit
        See `Structured`.
    seed : int
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, seed=whole(*SEEDS))

    def scores(self, selection: Selection) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(len(selection.must), generator=generator, dtype=torch.float64)
        return drawn.to(selection.layer.device)


@dataclass(frozen=True)
class ColumnMagnitude(_Scored):
    """Keep the units of largest weights, by the sum of squares of their columns.

    Parameters
    ----------
    ridge, refit
        See `Structured`.
    """

    def scores(self, selection: Selection) -> Tensor:
        return selection.per_unit(selection.layer.scaled_weight.double().square().sum(0))


@dataclass(frozen=True)
class FASP(_Scored):
    """Keep the units of largest sum_i |W_ij| ||X_j||, Wanda's score summed over the rows, then refit.

    Parameters
    ----------
    ridge, refit
        See `Structured`.

    References
    ----------
    H. Hu et al., "FASP: Fast and Accurate Structured Pruning of Large Language Models", arXiv 2501.09412, section 3.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=8, d=32).problem()
    >>> result = maskopt.solve(layer, maskopt.Columns(16), FASP())
    >>> result.relative_error < result.kept_error  # after and before the refit
    True
    """

    def scores(self, selection: Selection) -> Tensor:
        layer = selection.layer
        norms = layer.scaled_gram.diagonal().double().clamp_min(0.0).sqrt()
        return selection.per_unit(layer.scaled_weight.double().abs().sum(0) * norms)


@dataclass(frozen=True)
class FLAP(_Scored):
    """Keep the units of largest Var(X_j) |W_j|^2, the fluctuation that a constant bias does not make up for.

    The bias that goes with it is `bias_change`. Where the problem does not know the means of the inputs or the number
    of tokens, second moments stand for variances.

    Parameters
    ----------
    ridge, refit
        See `Structured`. As published, weights are not fitted anew.

    References
    ----------
    Y. An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, arXiv
    2312.11983, section 3.
    """

    refit: bool = False

    needs_mean: ClassVar[bool] = True

    def scores(self, selection: Selection) -> Tensor:
        layer = selection.layer
        return selection.per_unit(layer.scaled_weight.double().square().sum(0) * _variances(layer))


@dataclass(frozen=True)
class NewtonColumns(_Scored):
    """Keep the units to which one Newton step on the relaxed mask gives the largest entries, then refit.

    Without a refit the error of removing the units p is p^T H p, with H the Gram times W^T W elementwise, summed over
    units. Under the equation sum p = s its stationary point, one Newton step from anywhere, is s H^-1 1 / (1^T H^-1 1);
    units with the smallest entries are kept. The published method takes such steps with a schedule of its own.

    Parameters
    ----------
    ridge, refit
        See `Structured`; the ridge is part of H too.

    References
    ----------
    X. Shen et al., "Numerical Pruning for Efficient Autoregressive Models", AAAI 2025, arXiv 2412.12441, section 3.
    """

    def scores(self, selection: Selection) -> Tensor:
        blocks, number = selection.subset.blocks, len(selection.must)
        hessian = (blocks.gram * (blocks.target.T @ blocks.target)).view(number, blocks.width, number, -1).sum((1, 3))
        size = hessian.diagonal().clamp_min(0.0).sqrt()
        size = torch.where(size > 0, size, 1.0)
        scaled = hessian / size / size.unsqueeze(1)
        scaled.diagonal().fill_(1.0)
        step = torch.cholesky_solve(size.reciprocal().unsqueeze(1), ridged_factor(scaled))[:, 0] / size
        # Units without weights cost nothing; they go first.
        return torch.where(hessian.diagonal() > 0, -step, -torch.inf)


def _variances(layer: LayerReconstruction) -> Tensor:
    """Return each input's variance up to a common factor, its second moment where the mean is not known, shape (d,)."""
    moments = layer.gram.diagonal().double().clamp_min(0.0)
    if layer.mean is not None and layer.tokens is not None:
        moments = (moments - layer.tokens * layer.mean.double().square()).clamp_min(0.0)
    largest = moments.max()
    return moments / largest if float(largest) > 0 else moments
