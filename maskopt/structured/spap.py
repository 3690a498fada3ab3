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


@dataclass(frozen=True)
class SPAP(Structured):
    """Penalised alternating minimisation over weights V and a relaxed indicator s of the units to remove.

    The problem min tr((T - V) K (T - V)^T) with V diag(s) = 0 and 1^T s the number removed is penalised:
    + rho sum_j s_j g_j |V_j|^2, g_j = K_jj. For fixed V the indicator of the units with the smallest g_j |V_j|^2 is the
    best s; for fixed s the best V is T K (K + rho diag(s g))^-1. rho grows from turn to turn.

    The paper's schedule is not public. Chosen here: s starts with equal entries and moves a part of the way to the
    best indicator in every turn, because the minimum over V is concave in s and whole moves end in the first choice;
    rho grows geometrically. The final choice is the indicator of the last turn.

    Parameters
    ----------
    ridge, refit
        See `Structured`.
    turns : int
    first, last : float
        rho in the first and in the last turn.
    step : float
        Part of the way that s moves in a turn.

    References
    ----------
    H. Hu et al., "SPAP: Structured Pruning via Alternating Optimization and Penalty Methods", arXiv 2505.03373.
    """

    turns: int = 30
    first: float = 0.01
    last: float = 10.0
    step: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = real(0, above=True)
        check_settings(self, turns=whole(1), first=positive, last=positive, step=real(0, 1, above=True))

    def choose(self, selection: Selection) -> tuple[Tensor, Status]:
        blocks, number = selection.subset.blocks, len(selection.must)
        sizes = blocks.gram.diagonal()
        removed = torch.full((number,), 1.0 - selection.keep / number, dtype=torch.float64, device=sizes.device)
        kept = selection.largest(-removed)
        for turn in range(self.turns):
            if turn and selection.stops(turn, self.turns):
                break
            penalty = self.first * (self.last / self.first) ** (turn / max(1, self.turns - 1))
            matrix = blocks.gram.clone()
            matrix.diagonal().add_(penalty * removed.repeat_interleave(blocks.width) * sizes)
            weight = torch.cholesky_solve(blocks.product.T, ridged_factor(matrix)).T
            kept = selection.largest((weight.square().sum(0) * sizes).view(number, -1).sum(1))
            removed = torch.lerp(removed, (~kept).double(), self.step)
            selection.monitor.counters["factorisations"] += 1
        return kept, Status.COMPLETED
