"""ADMM with a fixed penalty, whose mask is chosen during the iterations at growing sparsity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, truth, whole
from maskopt.oracles import MaskSet
from maskopt.oracles.select import smallest
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Status
from maskopt.weights.base import Joint, System
from maskopt.weights.least_squares import definite_inverse

__all__ = ["ADMM"]


@dataclass(frozen=True)
class ADMM(Joint):
    """Alternating directions between least squares and the mask, one factorisation for all iterations.

    In inputs of unit diagonal, with u the scaled dual:

        z = (v + u) where the mask keeps, u = v + u - z
        v = argmin (w - v)^T (H + ridge I) (w - v) + penalty ||v - z + u||^2

    In the first `selections` iterations the mask is chosen anew by |v + u|, pruning a fraction 1 - (1 - (t+1) / n)^3 of
    what has to go in the end. Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (arXiv
    2401.02938). Any set works: until then the mask is the nearest member and, of each row block, the largest of
    the other entries. The authors' code counts these over the whole matrix for N:M.

    Parameters
    ----------
    ridge : float
        Added to the unit diagonal: a fraction of each input's own second moment, unlike in `System.of`.
    penalty : float
    iterations : int
    selections : int
        Iterations in which the mask is chosen anew.
    gradual : bool
        Whether sparsity grows over these; False is what the authors' code does for masks of the whole matrix.
    """

    ridge: float = 0.1
    penalty: float = 1.0
    iterations: int = 20
    selections: int = 15
    gradual: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, penalty=real(0, above=True), iterations=whole(1), selections=whole(1), gradual=truth())

    def run(self, problem: LayerReconstruction, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        system = System.of(problem, 0.0)
        w = system.weight
        gram = system.gram  # not used elsewhere, so it may be overwritten
        gram.diagonal().add_(self.ridge + self.penalty)
        pull = definite_inverse(gram).mul_(self.penalty)
        selections = min(self.selections, self.iterations)
        v, near, u, cost = w.clone(), torch.empty_like(w), torch.zeros_like(w), torch.empty_like(w)
        mask, done = torch.ones_like(w), 0
        while done < self.iterations and not monitor.stops(problem, masks, done, self.iterations):
            torch.add(v, u, out=near)
            if done < selections:
                fraction = 1.0 - (1.0 - (done + 1) / selections) ** 3 if self.gradual else 1.0
                mask = _loosened(masks, torch.mul(near, near, out=cost).neg_(), fraction)
            torch.mul(near, mask, out=v)  # z
            torch.sub(near, v, out=u)
            # v = (H + penalty I)^-1 (H w + penalty (z - u)), written with one product.
            v.sub_(u).sub_(w)
            torch.addmm(w, v, pull, out=near)
            v, near = near, v
            done += 1
            monitor.counters["products"] += 1
        if done < selections:
            mask = masks.lmo(v.add_(u).square().neg_())
        mask = mask.bool()
        return Outcome(mask, Status.COMPLETED, done, weight=system.finish(problem, v.mul_(mask)))


def _loosened(masks: MaskSet, cost: Tensor, fraction: float) -> Tensor:
    """Return the cheapest mask and each row block's cheapest other entries: a fraction of what it prunes is pruned."""
    chosen = masks.lmo(cost)
    if fraction == 1.0:
        return chosen
    row_block = masks.row_block(cost.shape)
    first = chosen.reshape(len(cost) // row_block, -1)
    pruned = ((first.shape[1] - first.sum(1, dtype=torch.float64)) * fraction).long()
    cost = cost.masked_fill_(chosen.bool(), -torch.inf).view_as(first)
    loose = smallest(cost, first.shape[1] - pruned).view_as(chosen)
    return loose if masks.forbidden is None else loose.masked_fill_(masks.forbidden.to(loose.device), 0.0)
