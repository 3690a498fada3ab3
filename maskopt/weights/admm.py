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
from maskopt.weights.base import Factor, Factored, System
from maskopt.weights.least_squares import definite_inverse

__all__ = ["ADMM"]


@dataclass(frozen=True)
class ADMM(Factored):
    """Alternating directions between least squares and the mask, one factorisation for all iterations.

    In inputs of unit variance, with u the scaled dual variable, an iteration is

        z = (v + u) where the mask keeps, else 0
        u = v + u - z
        v = argmin (w - v)^T (H + ridge I) (w - v) + penalty ||v - z + u||^2

    In iteration t = 0, ..., n - 1, n = `selections`, the mask is chosen again by |v + u|. It prunes a fraction
    1 - (1 - (t+1) / n)^3 of the entries that the final mask prunes. Any set works: while t < n - 1 the mask is the
    nearest member of the set and, in each row block, the largest of the other entries. The authors' code counts
    these over the whole matrix for N:M.

    Parameters
    ----------
    ridge : float
        Added to the unit diagonal: a fraction of each input's own second moment, unlike in `System.of`.
    penalty : float
        Of the augmented Lagrangian, in inputs of unit variance.
    iterations : int
        In all; each is one matrix product.
    selections : int
        Iterations that choose the mask; it is fixed afterwards.
    gradual : bool
        Whether sparsity grows over these; False is what the authors' code does for masks of the whole matrix.

    References
    ----------
    V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938: the weight update
    on a fixed mask and its gradual choice. S. Boyd et al., "Distributed Optimization and Statistical Learning via
    the Alternating Direction Method of Multipliers", 2011, section 3.1.1: the scaled form.
    """

    ridge: float = 0.1
    penalty: float = 1.0
    iterations: int = 20
    selections: int = 15
    gradual: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, penalty=real(0, above=True), iterations=whole(1), selections=whole(1), gradual=truth())

    def factorise(self, problem: LayerReconstruction) -> Factor:
        system = System.of(problem, 0.0)
        gram = system.gram  # not used elsewhere, so it may be overwritten
        gram.diagonal().add_(self.ridge + self.penalty)
        return Factor(system, definite_inverse(gram).mul_(self.penalty))

    def run_factored(
        self, problem: LayerReconstruction, masks: MaskSet, start: Tensor | None, monitor: Monitor, factor: Factor
    ) -> Outcome:
        system, solution = factor.system.of_rows(problem), factor.matrix
        w = system.weight
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
            torch.addmm(w, v, solution, out=near)
            v, near = near, v
            done += 1
            monitor.counters["products"] += 1
        if done < selections:
            mask = masks.lmo(v.add_(u).square().neg_())
        mask = mask.bool()
        return Outcome(mask, Status.COMPLETED, done, weight=system.finish(problem, v.mul_(mask)))


def _loosened(masks: MaskSet, cost: Tensor, fraction: float) -> Tensor:
    """Return the cheapest mask with each row block's cheapest pruned entries added, so that a fraction stays pruned."""
    chosen = masks.lmo(cost)
    if fraction == 1.0:
        return chosen
    row_block = masks.row_block(cost.shape)
    first = chosen.reshape(len(cost) // row_block, -1)
    pruned = ((first.shape[1] - first.sum(1, dtype=torch.float64)) * fraction).long()
    cost = cost.masked_fill_(chosen.bool(), -torch.inf).view_as(first)
    loose = smallest(cost, first.shape[1] - pruned).view_as(chosen)
    if masks.forbidden is None:
        return loose
    # In the shape of the set: a product's is one row that holds all weights.
    return loose.masked_fill_(masks.forbidden.to(loose.device).view_as(loose), 0.0)
