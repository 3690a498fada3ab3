"""Our joint method: alternating directions in the metric of conditional variances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, reals, whole
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Status
from maskopt.weights.base import Joint, System
from maskopt.weights.least_squares import definite_inverse, polish

__all__ = ["ConditionalADMM"]


@dataclass(frozen=True)
class ConditionalADMM(Joint):
    """ADMM whose penalty weighs each input by what the other inputs cannot make up for.

    ADMM on v = z, z in the set, chooses by |v| in the metric of its penalty, and the supports that it settles on are
    stable in that metric only. Inputs of unit variance, which ADMM pruning and ALPS use, are the wrong measure where
    inputs are correlated: removing one costs w_j^2 times its variance given the others, as long as these are there to
    make up for it. So the penalty is rho * sum_j c_j (v_j - z_j)^2 with c_j = 1 / (H + tau I)^-1_jj - tau, the
    variance of input j that the others leave unexplained up to noise tau. In this metric rho has a natural scale:
    removing w_j costs w_j^2, so supports form around rho = 1 whatever the layer, and a few stages suffice.

    Each stage has one factorisation, so that an iteration is one matrix product (ALPS: two, and an
    eigendecomposition). With x = v + dual / rho, an iteration is Douglas-Rachford's: z is the part of x in the set,
    and x changes by `relaxation` times v - z. Rows are independent where the set lets them. Conjugate gradients on the
    last mask end it.

    Parameters
    ----------
    ridge : float
        Added to the diagonal of the Gram, as a fraction of each input's own second moment.
    penalty : (float, float)
        rho at the start and at the end. Where inputs are independent, no mask stands still below one.
    noise : float
        tau, in inputs of unit variance.
    stages : int
        Values of the penalty.
    iterations : int
        In all stages together.
    relaxation : float
        In (0, 1].
    polish : int
        Steps of conjugate gradients at the end.
    """

    penalty: tuple[float, float] = (0.8, 2.0)
    noise: float = 0.03
    stages: int = 4
    iterations: int = 52
    relaxation: float = 0.8
    polish: int = 6

    corrects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            self,
            penalty=reals(2, real(0, above=True)),
            noise=real(0, 1e6, above=True, below=True),
            iterations=whole(1),
            stages=whole(1),
            polish=whole(0),
            relaxation=real(0, 1, above=True),
        )
        if self.penalty[0] > self.penalty[1]:
            raise MaskoptError(f"ConditionalADMM needs 0 < penalty[0] <= penalty[1]; got {self.penalty}.")

    def run(self, problem: LayerReconstruction, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        system = System.of(problem, self.ridge, each=True)
        metric = _conditional_deviations(system.gram, self.noise)
        gram = system.gram / metric / metric.unsqueeze(1)
        w = system.weight * metric
        target = w @ gram
        x, near, pulled, cost = w.clone(), *(torch.empty_like(w) for _ in range(3))
        mask = None if start is None else start.to(w.dtype)
        rho, done = self.penalty[0], 0
        stages = min(self.stages, self.iterations)
        for stage in range(stages):
            # A factorisation costs more than many iterations.
            if monitor.ended is not None:
                break
            before, rho = rho, self.penalty[0] * (self.penalty[1] / self.penalty[0]) ** (stage / max(1, stages - 1))
            matrix = gram.clone()
            matrix.diagonal().add_(rho)
            inverse = definite_inverse(matrix)
            constant = target @ inverse
            inverse.mul_(rho)
            end = self.iterations * (stage + 1) // stages
            while done < end and not monitor.stops(problem, masks, done, self.iterations):
                if mask is None or done > 0:
                    mask = masks.lmo(torch.mul(x, x, out=cost).neg_())
                torch.mul(x, mask, out=near)
                x.sub_(near)  # dual / rho, of the penalty that it was made with
                if before != rho:
                    x.mul_(before / rho)
                    before = rho
                torch.sub(near, x, out=pulled)
                torch.addmm(constant, pulled, inverse, out=cost)  # v
                x.add_(near)
                # x + relaxation * (v + dual / rho - x), and x - dual / rho is z.
                x.add_(cost.sub_(near), alpha=self.relaxation)
                done += 1
                monitor.counters["products"] += 1
        if mask is None or done > 0:
            mask = masks.lmo(torch.mul(x, x, out=cost).neg_())
        v = x.mul_(mask).div_(metric)
        if monitor.ended is None:
            v = polish(problem, masks, system, mask, v, self.polish, monitor, done)
        return Outcome(mask.bool(), Status.COMPLETED, done, weight=system.finish(problem, v))


def _conditional_deviations(gram: Tensor, noise: float) -> Tensor:
    """Return the standard deviation of each input that the others leave unexplained up to noise, shape (d,)."""
    noisy = gram.clone()
    noisy.diagonal().add_(noise)
    unexplained = definite_inverse(noisy).diagonal().reciprocal().sub_(noise)
    # What is explained but for a trace of the noise keeps that, or float32 could not hold the metric and the rest.
    return unexplained.clamp_(min=noise / 32).sqrt_()
