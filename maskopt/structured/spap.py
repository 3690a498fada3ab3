"""SPAP: a growing penalty on the weights of the units to remove, minimised in turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, whole
from maskopt.problems.checks import ridged_factor
from maskopt.solvers.base import Status
from maskopt.structured.base import Selection, Structured

__all__ = ["SPAP"]

_GROWING = 0.7  # of the turns, in which the number of removed units grows


@dataclass(frozen=True)
class SPAP(Structured):
    """Penalised alternating minimisation over weights V and an indicator s of the units to remove.

    The problem min tr((T - V) K (T - V)^T) with V diag(s) = 0 and 1^T s the number removed is penalised:
    + rho sum_j s_j g_j |V_j|^2. For fixed V the objective is linear in s, and the best one marks the units with the
    smallest sum of g_j |V_j|^2; for fixed s the best V is T K (K + rho diag(s g))^-1. rho grows from turn to turn.

    The paper's schedule is not public. Chosen here, by the errors on nine layers of three small models, at two
    counts each: with all units at once, alternation ends in its first choice, so the number
    of units that s marks grows from turn to turn too, and is final for the last three tenths of them; g_j is the
    variance of input j that the others leave unexplained under the present penalty, so that in the first turn g_j
    |V_j|^2 is what removing j alone costs; rho grows geometrically.

    Parameters
    ----------
    ridge, refit
        See `Structured`.
    turns : int
    first, last : float
        rho in the first and in the last turn.

    References
    ----------
    H. Hu et al., "SPAP: Structured Pruning via Alternating Optimization and Penalty Methods", arXiv 2505.03373.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=8, d=32).problem()
    >>> maskopt.solve(layer, maskopt.Columns(16), SPAP()).status.name
    'COMPLETED'
    """

    turns: int = 30
    first: float = 1.0
    last: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = real(0, above=True)
        check_settings(self, turns=whole(1), first=positive, last=positive)

    def choose(self, selection: Selection) -> tuple[Tensor, Status]:
        blocks, number = selection.subset.blocks, len(selection.must)
        penalty = torch.zeros_like(blocks.sizes)  # rho s_j g_j
        for turn in range(self.turns):
            stopped = turn > 0 and selection.stops(turn, self.turns)
            matrix = blocks.gram.clone()
            matrix.diagonal().add_(penalty)
            factor = ridged_factor(matrix)
            weight = torch.cholesky_solve(blocks.product.T, factor)
            # What is left of an input given the others, without the input's own penalty.
            own = torch.cholesky_inverse(factor).diagonal().reciprocal().sub_(penalty).clamp_min_(2.0**-40)
            grown = 1.0 if stopped else min(1.0, (turn + 1) / max(1.0, _GROWING * self.turns))
            scores = (own * weight.square().sum(1)).view(number, -1).sum(1)
            kept = selection.largest(scores, number - round(grown * (number - selection.keep)))
            selection.monitor.counters["factorisations"] += 1
            if stopped:
                break
            rho = self.first * (self.last / self.first) ** (turn / max(1, self.turns - 1))
            penalty = rho * own * (~kept).repeat_interleave(blocks.width)
        return kept, Status.COMPLETED
