"""Lower bounds on the errors of a model's layers whatever units they keep, within one time limit for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from maskopt.bounds import column_bound
from maskopt.bounds.work import TimeShares
from maskopt.checks import check_time_limit
from maskopt.models.layers import Layer
from maskopt.problems import ColumnSubset, LayerReconstruction
from maskopt.shrinking.units import Site
from maskopt.solvers import Result, Status

__all__ = ["UnitProof", "UnitProver"]

_ROUNDING = 1e-9  # of an error that was enumerated
_LEAST = 1e-3  # seconds of a proof


@dataclass(frozen=True)
class UnitProof:
    """What is proven about the units that a layer keeps.

    The problem is the layer's as it was solved: its inputs and its target at that time, the ridge of the method, and
    as many units. No choice of them, with any weights on them, has an error below the bound. Fits that come later
    change inputs and weights of other layers as well; of them nothing is proven.

    Attributes
    ----------
    error : float
        With the ridge, over that of removing everything, of the units and weights that were chosen.
    bound : float
        Likewise, of any others.
    finished : bool
        Whether the method ended by itself; where the time limit ended it, more time could have raised the bound.
    """

    error: float
    bound: float
    finished: bool

    @property
    def share(self) -> float:
        """The bound over the error: 1 if no choice is better."""
        return min(1.0, self.bound / self.error) if self.error > 0 else 1.0


class UnitProver:
    """An `Observer` that proves bounds; divides the time left in proportion to the layers' cost.

    Parameters
    ----------
    counts : mapping of Site to int
        Units that stay.
    ridge : float
        That of the method.
    seconds : float, optional
        For all layers together.
    tell : callable, optional
        Called with a layer's name, the number of layers proven, their total, and the fraction of the present proof.
    """

    def __init__(
        self,
        counts: Mapping[Site, int],
        ridge: float,
        seconds: float | None,
        tell: Callable[[str, int, int, float], object] | None,
    ) -> None:
        check_time_limit(seconds, "time for certify")
        self._sites = {layer.name: site for site in counts for layer in site.layers}
        self._counts, self._ridge, self._tell = counts, ridge, tell
        self._time = TimeShares(seconds, sum(self._cost_of(site) for site in self._sites.values()))
        self._found: dict[str, tuple[float, float, float, bool]] = {}  # error, bound, scale, finished

    @staticmethod
    def _cost_of(site: Site) -> float:
        return float(site.role.number * site.role.width) ** 3

    def __call__(self, layer: Layer, problem: LayerReconstruction, result: Result) -> None:
        """Prove a bound for a layer that loses units."""
        site = self._sites.get(layer.name)
        if site is None:
            return
        with self._time.share(self._cost_of(site)) as limit:
            self._found[layer.name] = self._proven(layer, problem, result, site, limit)

    def _proven(
        self, layer: Layer, problem: LayerReconstruction, result: Result, site: Site, limit: float | None
    ) -> tuple[float, float, float, bool]:
        report = None if self._tell is None else self._report(layer, self._tell)
        if report is not None:
            report(0.0)
        units = torch.arange(problem.shape[1], device=problem.device) // site.role.width
        subset = ColumnSubset.of(problem, units, ridge=self._ridge)
        weight = problem.weight * result.mask if result.weight is None else result.weight
        rest = subset.target - weight.double()
        error = float((rest * (rest @ subset.gram)).sum().clamp_min(0.0))
        if result.status is Status.OPTIMAL:
            bound, finished = error * (1.0 - _ROUNDING), True
        else:
            seconds = None if limit is None else max(_LEAST, limit)
            found = column_bound(subset, self._counts[site], seconds=seconds, progress=report)
            bound, finished = found.bound, found.finished
        return error, bound, float(subset.scale()), finished

    def _report(self, layer: Layer, tell: Callable[[str, int, int, float], object]) -> Callable[[float], object]:
        return lambda fraction: tell(layer.name, len(self._found), len(self._sites), fraction)

    def proof(self, names: Sequence[str]) -> UnitProof | None:
        """Return what is proven about a layer, of experts together; None where nothing was asked for."""
        found = [self._found[name] for name in names if name in self._found]
        scale = sum(each[2] for each in found)
        if not found:
            return None
        error, bound = (sum(each[part] for each in found) / (scale if scale > 0 else 1.0) for part in (0, 1))
        return UnitProof(error, bound, all(each[3] for each in found))
