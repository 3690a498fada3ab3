"""Greedy pruning by scores: one oracle call on a linear objective."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from maskopt.checks import check_settings, real
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction, Saliency
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.requirements import Requirements

__all__ = ["RIA", "Magnitude", "Wanda"]


@dataclass(frozen=True)
class _Score(Solver):
    """Keep the entries of highest score; subclasses say which score."""

    requires: ClassVar[Requirements] = Requirements(problem=(LayerReconstruction,))

    def score(self, problem: LayerReconstruction) -> Tensor:
        """Return the score of each entry, shape (rows, d)."""
        raise NotImplementedError

    def run(self, problem: LayerReconstruction, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        monitor.counters["lmo"] += 1
        return Outcome(masks.lmo_mask(-self.score(problem)), Status.GREEDY, 1)


@dataclass(frozen=True)
class Magnitude(_Score):
    """Keep the largest |w|: magnitude pruning, the baseline of Han et al. (NeurIPS 2015).

    The mask is optimal for its scores; nothing is claimed about the layer's error.
    """

    def score(self, problem: LayerReconstruction) -> Tensor:
        return Saliency.magnitude(problem.scaled_weight).scores


@dataclass(frozen=True)
class Wanda(_Score):
    """Keep the largest |w_ij| ||x_j||, the root of the error of pruning that entry alone.

    References
    ----------
    Sun et al., "A simple and effective pruning approach for large language models", arXiv 2306.11695.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic(rows=2, d=8).problem()
    >>> maskopt.solve(layer, maskopt.NM(keep=2, group=4), maskopt.Wanda()).mask.sum(1).tolist()
    [4, 4]
    """

    def score(self, problem: LayerReconstruction) -> Tensor:
        return Saliency.wanda(problem.scaled_weight, problem.scaled_gram).scores


@dataclass(frozen=True)
class RIA(_Score):
    """Keep the largest relative importance times activation norm (Zhang et al., ICLR 2024).

    Parameters
    ----------
    power : float
        Exponent of the activation norm.
    """

    power: float = 0.5

    row_wise: ClassVar[bool] = False  # column sums are over all rows

    def __post_init__(self) -> None:
        check_settings(self, power=real(0, 8))

    def score(self, problem: LayerReconstruction) -> Tensor:
        return Saliency.ria(problem.scaled_weight, problem.scaled_gram, self.power).scores
