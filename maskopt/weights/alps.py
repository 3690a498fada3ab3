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

_BARS = 0.2, 0.01  # entries that differ, of those kept: a change of the mask makes two
_READ = 10  # iterations at least from one reading of a GPU's numbers to the next


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
        d = w * mask
        dual, b, near, cost = (torch.zeros_like(w) for _ in range(4))
        checks, done = _Checks(self, mask), 0
        status = Status.ITERATION_LIMIT
        # The planned number is an upper limit that is rarely reached.
        while done < self.iterations and not monitor.stops(problem, masks, done, self.iterations):
            torch.sub(target, dual, out=near).addcmul_(d, checks.penalty)
            torch.mm(near, vectors, out=b).div_(values + checks.penalty)
            torch.mm(b, vectors.T, out=near)
            b, near = near, b
            torch.addcmul(b, dual, checks.inverse, out=near)
            mask = masks.lmo(torch.mul(near, near, out=cost).neg_())
            torch.mul(near, mask, out=d)
            # dual / penalty + b - d is `near` - d.
            torch.sub(near, d, out=dual).mul_(checks.penalty)
            done += 1
            monitor.counters["products"] += 2
            if done % self.every == 0 and checks.settled(mask, d):
                break
        if checks.read():
            status, (mask, d, done) = Status.COMPLETED, checks.answer
        if monitor.ended is None:
            d = polish(problem, masks, system, mask, d, self.polish, monitor, done)
        return Outcome(mask.bool(), status, done, weight=system.finish(problem, d))


class _Checks:
    """The checks of the mask, which raise the penalty and end the method, without the host waiting for what they find.

    All that they decide stays on the device. The host reads it once in ten iterations at most, and on a CPU, where that
    takes no time, at every check. Iterations after the one that the method ends with change nothing in the answer.

    Attributes
    ----------
    penalty, inverse : Tensor
        The present penalty and 1 / penalty, scalars in the type of the weights.
    """

    def __init__(self, settings: ALPS, mask: Tensor) -> None:
        self._every, self._seen, self._answer = settings.every, mask, (mask, mask)
        self._stride = 1 if mask.device.type == "cpu" else -(-_READ // settings.every)  # checks from reading to reading
        self._penalty, self._growth, self._bars, self._changing = (
            torch.tensor(numbers, dtype=torch.float64, device=mask.device)
            for numbers in (settings.penalty, settings.growth, _BARS, 0.0)
        )
        self._made = self._known = 0  # checks, and those whose outcome the host knows
        self._last: int | None = None  # the number of the check that found no change
        self._round()

    def _round(self) -> None:
        self.penalty, self.inverse = (one.to(self._seen.dtype) for one in (self._penalty, self._penalty.reciprocal()))

    def settled(self, mask: Tensor, d: Tensor) -> bool:
        """Compare the mask with that of the last check; return whether the host knows that it has settled."""
        changed, kept = (mask != self._seen).sum(dtype=torch.float64), mask.sum(dtype=torch.float64)
        self._penalty *= self._growth.take((changed < kept * self._bars).sum())
        self._seen = mask
        self._round()
        if self._stride == 1:
            self._changing += changed > 0
        else:
            # If an earlier check was the last one, its answer stays. The next iterations overwrite d.
            ended = self._changing < self._made
            pairs = zip(self._answer, (mask, d), strict=True)
            mask, d = (torch.where(ended, old, new) for old, new in pairs)
            self._changing += (changed > 0) & ~ended
        self._answer, self._made = (mask, d), self._made + 1
        return self._made - self._known >= self._stride and self.read()

    def read(self) -> bool:
        """Whether a check found no change; `answer` is what there was then."""
        if self._last is None and self._known < self._made:
            changing, self._known = int(self._changing), self._made
            self._last = changing + 1 if changing < self._made else None
        return self._last is not None

    @property
    def answer(self) -> tuple[Tensor, Tensor, int]:
        """Mask, sparse weights and number of iterations at the check that found no change."""
        assert self._last is not None
        return *self._answer, self._last * self._every
