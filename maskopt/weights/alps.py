"""ALPS: operator splitting for mask and weights, then conjugate gradients on the mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, reals, whole
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Status
from maskopt.threads import factor_threads
from maskopt.weights.base import Joint, System
from maskopt.weights.least_squares import polish

__all__ = ["ALPS"]


@dataclass(frozen=True)
class ALPS(Joint):
    """ADMM on weights b and sparse copies d = b, with a penalty that grows until the mask no longer changes.

    In inputs of unit variance, with one eigendecomposition of H, an iteration is

        b = argmin (w - b)^T H (w - b) / 2 + dual^T (b - d) + penalty / 2 ||b - d||^2
        d = the point of the set nearest to b + dual / penalty
        dual += penalty * (b - d)

    The weights are d, improved by conjugate gradients on the last mask. An iteration is two matrix products. The
    paper keeps a fixed number of entries of the whole matrix or N of M; here any set works.

    Parameters
    ----------
    ridge : float
        See `System.of`.
    penalty : float
        Its value in the first iterations.
    growth : (float, float, float)
        Factors of the penalty where, since the last check, at least a tenth of the kept entries changed, at least
        one in 200, or fewer.
    every : int
        Iterations from one check of the mask to the next.
    iterations : int
        At most; the method ends when the mask has not changed between two checks.
    polish : int
        Steps of conjugate gradients at the end.

    References
    ----------
    X. Meng, K. Behdin, H. Wang and R. Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
    Large Language Models", arXiv 2406.07831, algorithm 1 (section 3.2) for the mask and algorithm 2 (section 3.3)
    for the weights on it.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=8, d=32).problem()
    >>> result = maskopt.solve(layer, maskopt.NM(keep=2, group=4), ALPS())
    >>> result.status.name, result.sparsity
    ('COMPLETED', 0.5)
    >>> result.relative_error < 0.5 * result.kept_error  # after and before the update of the weights
    True
    """

    penalty: float = 0.1
    growth: tuple[float, float, float] = (1.3, 1.2, 1.1)
    every: int = 3
    iterations: int = 300
    polish: int = 10

    row_wise: ClassVar[bool] = False  # one penalty and one stopping test for all rows

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            self,
            penalty=real(0, above=True),
            growth=reals(3, real(1, 100, below=True)),
            every=whole(1),
            iterations=whole(1),
            polish=whole(0),
        )

    def run(self, problem: LayerReconstruction, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        system = System.of(problem, self.ridge)
        w = system.weight
        with factor_threads(problem.shape[1]):
            values, vectors = torch.linalg.eigh(system.gram)
        values.clamp_(min=0.0)
        target = w @ system.gram
        mask = masks.lmo(w.square().neg_()) if start is None else start.to(w.dtype)
        seen, d = mask, w * mask
        dual, b, near, cost = (torch.zeros_like(w) for _ in range(4))
        penalty, done = self.penalty, 0
        status = Status.ITERATION_LIMIT
        # The planned number is an upper limit that is rarely reached.
        while done < self.iterations and not monitor.stops(problem, masks, done, self.iterations):
            torch.sub(target, dual, out=near).add_(d, alpha=penalty)
            torch.mm(near, vectors, out=b).div_(values + penalty)
            torch.mm(b, vectors.T, out=near)
            b, near = near, b
            torch.add(b, dual, alpha=1.0 / penalty, out=near)
            mask = masks.lmo(torch.mul(near, near, out=cost).neg_())
            torch.mul(near, mask, out=d)
            # dual / penalty + b - d is `near` - d.
            torch.sub(near, d, out=dual).mul_(penalty)
            done += 1
            monitor.counters["products"] += 2
            if done % self.every == 0:
                changed, kept = int((mask != seen).sum()) / 2, float(mask.sum(dtype=torch.float64))
                if changed == 0:
                    status = Status.COMPLETED
                    break
                seen = mask
                penalty *= self.growth[0 if changed >= 0.1 * kept else 1 if changed >= 0.005 * kept else 2]
        if monitor.ended is None:
            d = polish(problem, masks, system, mask, d, self.polish, monitor, done)
        return Outcome(mask.bool(), status, done, weight=system.finish(problem, d))
