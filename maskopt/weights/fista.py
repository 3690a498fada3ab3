"""FISTAPruner: least squares with an l1 penalty on the weights, a convex relaxation of the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, whole
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Status
from maskopt.threads import factor_threads
from maskopt.weights.base import Joint
from maskopt.weights.sparsegpt import SparseGPT

__all__ = ["FISTAPruner"]

_SMALLEST = 1e-8  # penalty tried, as a fraction of the one that prunes everything


@dataclass(frozen=True)
class FISTAPruner(Joint):
    """FISTA on an l1 penalty, then rounding; bisection finds the penalty.

    A round minimises 1/2 ||(W - V) X||^2 + penalty * sum |V_ij| from the best weights so far and rounds V to the
    nearest member R of the set. Where ||(R - V) X|| is a large fraction of ||(R - W) X||, V was not sparse enough and
    the penalty grows; else it shrinks. The result is the best R; its weights stay as the penalty has shrunk them.

    Choices that the paper leaves open: bisection is geometric, between the penalty that prunes everything and 1e-8
    of it, and all rounds are run. The pruned layer gets the same inputs X as the dense one.

    Parameters
    ----------
    ridge : float
        Of `SparseGPT`, whose weights are the first. Where it does not work on the set, or a `start` is given, the first
        are the dense ones on the mask. The problem itself has no ridge.
    threshold : float
        The fraction above which the penalty grows.
    rounds : int
        Of bisection.
    iterations : int
        Of FISTA in each round, one matrix product each.

    References
    ----------
    P. Zhao et al., "A Convex-optimization-based Layer-wise Post-training Pruner for Large Language Models", arXiv
    2408.03728. A. Beck and M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse
    Problems", SIAM Journal on Imaging Sciences 2, 2009, section 4: FISTA with constant step size.
    """

    threshold: float = 0.3
    rounds: int = 20
    iterations: int = 20

    row_wise: ClassVar[bool] = False  # one penalty for all rows
    corrects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, threshold=real(0, 1, above=True, below=True), rounds=whole(1), iterations=whole(1))

    def run(self, problem: LayerReconstruction, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        w = problem.scaled_target
        gram = problem.scaled_gram
        done, planned = 0, self.rounds * self.iterations

        def stops(iteration: int) -> bool:
            return monitor.stops(problem, masks, done + iteration, planned)

        mask, v = self._first(problem, masks, start, lambda _: stops(0))
        minimum, best = _energy(w - v, gram), v
        # A little more than the largest eigenvalue, which is rounded.
        with factor_threads(len(gram)):
            steepness = 1.001 * float(torch.linalg.eigvalsh(gram)[-1])
        target = w @ gram
        low, high = (math.log(fraction) for fraction in (_SMALLEST, 1.0))
        most = float(target.abs().max())
        while done < planned and minimum > 0 and steepness > 0 and not stops(0):
            middle = (low + high) / 2
            v, taken = self._proximal(best, gram, target, steepness, math.exp(middle) * most, stops)
            done += taken
            chosen = masks.lmo(v.square().neg_())
            rounded = v * chosen
            error, loss = _energy(w - rounded, gram), _energy(v - rounded, gram)
            monitor.counters["products"] += taken + 2
            if loss > self.threshold**2 * error:
                low = middle
            else:
                high = middle
            if error < minimum:
                minimum, best, mask = error, rounded, chosen.bool()
        weight = (best * problem.weight_unit).mul_(mask)
        return Outcome(mask, Status.COMPLETED, done, weight=weight)

    def _first(
        self, problem: LayerReconstruction, masks: MaskSet, start: Tensor | None, stops: Callable[[int], bool]
    ) -> tuple[Tensor, Tensor]:
        """Return the mask and the scaled weights to start from."""
        if start is None and isinstance(masks, PartitionMatroid):
            mask, weight = SparseGPT(self.ridge).one_pass(problem, masks, stops)
            return mask, weight / problem.weight_unit
        mask = masks.lmo_mask(problem.diagonal().neg()) if start is None else start
        return mask, problem.scaled_weight * mask

    def _proximal(
        self,
        v: Tensor,
        gram: Tensor,
        target: Tensor,
        steepness: float,
        penalty: float,
        stops: Callable[[int], bool],
    ) -> tuple[Tensor, int]:
        """Return the weights after one round of FISTA from v, and the number of its iterations."""
        ahead, free, momentum, limit = v.clone(), torch.empty_like(v), 1.0, penalty / steepness
        for iteration in range(self.iterations):
            # The caller has checked before the first iteration.
            if iteration > 0 and stops(iteration):
                return v, iteration
            torch.addmm(ahead, ahead, gram, alpha=-1.0 / steepness, out=free)
            free.add_(target, alpha=1.0 / steepness)
            # Soft thresholding.
            new = free - free.clamp(-limit, limit)
            following = (1.0 + math.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
            torch.lerp(v, new, 1.0 + (momentum - 1.0) / following, out=ahead)
            v, momentum = new, following
        return v, self.iterations


def _energy(residual: Tensor, gram: Tensor) -> float:
    """Return the error of a layer whose weights differ by `residual`, shape (rows, d), in scaled units."""
    return float((residual @ gram).mul_(residual).sum(dtype=torch.float64))
