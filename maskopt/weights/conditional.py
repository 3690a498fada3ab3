"""The default joint method: ADMM in the metric of conditional variances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, reals, whole
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.solvers.base import Monitor, Outcome, Status
from maskopt.solvers.chunks import Chunk
from maskopt.weights.base import Joint, System
from maskopt.weights.least_squares import definite_inverse, polish

__all__ = ["ConditionalADMM", "conditional_deviations"]


@dataclass(frozen=True)
class ConditionalADMM(Joint):
    """ADMM whose penalty weighs each input by its variance given the other inputs.

    ADMM on v = z, z in the set, chooses entries by |v| in the metric of its penalty. ADMM and ALPS use inputs of
    unit variance. Where inputs are correlated, that metric is wrong: removing w_j costs w_j^2 times the variance of
    input j given the other inputs, while these are kept and their weights can compensate. Here the penalty is
    rho * sum_j c_j (v_j - z_j)^2 with c_j = 1 / (H + tau I)^-1_jj - tau, the variance of input j given the others, up
    to noise tau. In this metric removing w_j costs w_j^2 in every layer, so masks settle near rho = 1 and a few
    stages of a growing rho suffice.

    A stage has one factorisation, and an iteration one matrix product (ALPS: two, and an eigendecomposition). With
    x = v + dual / rho an iteration is one of Douglas-Rachford splitting: z is the point of the set nearest to x, and
    x changes by `relaxation` times v - z. Rows are independent where the set allows it, and a stage's factorisation
    serves all chunks of rows. Conjugate gradients on the last mask follow.

    Beside one matrix of the weight's shape, and those of a chunk of rows, the memory is that of five float32 arrays of
    d x d: the problem's Gram, the scaled one, and three during a factorisation.

    Parameters
    ----------
    ridge : float
        Added to the diagonal of the Gram, as a fraction of each input's own second moment.
    penalty : (float, float)
        rho in the first and in the last stage. Where inputs are independent, masks keep changing while rho < 1.
    noise : float
        tau, in inputs of unit variance.
    stages : int
        Values of rho, a geometric sequence.
    iterations : int
        In all stages together.
    relaxation : float
        In (0, 1].
    polish : int
        Steps of conjugate gradients at the end.

    References
    ----------
    The metric is this project's own. J. Eckstein and D. P. Bertsekas, "On the Douglas-Rachford splitting method and
    the proximal point algorithm for maximal monotone operators", Mathematical Programming 55, 1992: ADMM as
    Douglas-Rachford splitting, with relaxation.

    Examples
    --------
    >>> import maskopt
    >>> layer = maskopt.synthetic("correlated", rows=8, d=32).problem()
    >>> result = maskopt.solve(layer, maskopt.PerRow(0.5), ConditionalADMM())
    >>> result.status.name, result.iterations, tuple(result.weight.shape)
    ('COMPLETED', 52, (8, 32))
    >>> result.relative_error < 0.5 * result.kept_error  # after and before the update of the weights
    True
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
        return self.run_chunks([Chunk(problem, masks, start)], monitor)[0]

    def run_chunks(self, chunks: Sequence[Chunk], monitor: Monitor) -> list[Outcome]:
        system = System.of(chunks[0].problem, self.ridge, each=True)
        metric = _deviations(system.gram, self.noise)
        parts = [_Rows(chunk, system.of_rows(chunk.problem).weight.mul_(metric)) for chunk in chunks]
        stages = min(self.stages, self.iterations)
        ends = [self.iterations * stage // stages for stage in range(stages + 1)]
        before = self.penalty[0]
        # A factorisation costs as many products as d rows need: it serves all chunks before the next one is made.
        for stage, (first, last) in enumerate(pairwise(ends)):
            if monitor.ended is not None:
                break
            rho = self.penalty[0] * (self.penalty[1] / self.penalty[0]) ** (stage / max(1, stages - 1))
            inverse = definite_inverse(_in_metric(system.gram, metric, rho)).mul_(rho)
            for number, part in enumerate(parts):
                self._tell(monitor, part, (first, last), number / len(parts))
                weight = system.of_rows(part.chunk.problem).weight.mul_(metric)
                self._iterate(part, weight, inverse, before / rho, last, monitor)
            before = rho
        outcomes = list[Outcome]()
        while parts:
            before = len(outcomes) / len(chunks)
            part = parts.pop(0)  # its x is not needed beside its weights
            self._tell(monitor, part, (self.iterations, self.iterations + self.polish), before)
            outcomes.append(self._finish(part, system, metric, monitor))
        return outcomes

    def _tell(self, monitor: Monitor, part: _Rows, span: tuple[int, int], before: float) -> None:
        """Say which fraction of the solve some iterations of a chunk are, after a fraction of all chunks had them."""
        start, end = part.chunk.span
        planned = self.iterations + self.polish
        first = (span[0] + before * (span[1] - span[0])) / planned
        # `stops` is told the iterations of this chunk, and planned ones of all stages.
        begin = first - (end - start) * span[0] / planned
        monitor.chunk(begin, begin + end - start, part.chunk.recorder)

    def _iterate(
        self, part: _Rows, weight: Tensor, inverse: Tensor, rescaled: float, last: int, monitor: Monitor
    ) -> None:
        """Run a stage's iterations, up to the last one, with `inverse` = rho (H + rho I)^-1, on some rows.

        `rescaled` is the penalty before over the present one.
        """
        x = part.x
        problem, masks = part.chunk.problem, part.chunk.masks
        constant = torch.addmm(weight, weight, inverse, alpha=-1.0)  # (H + rho I)^-1 H w
        near, reflected, cost = weight, torch.empty_like(x), torch.empty_like(x)
        while part.done < last and not monitor.stops(problem, masks, part.done, self.iterations + self.polish):
            mask = part.mask(cost)
            torch.mul(x, mask, out=near)
            x.sub_(near)  # dual / rho, of the penalty that it was made with
            if rescaled != 1.0:
                x.mul_(rescaled)
                rescaled = 1.0
            torch.sub(near, x, out=reflected)
            torch.addmm(constant, reflected, inverse, out=cost)  # v
            x.add_(near)
            # x + relaxation * (v + dual / rho - x), and x - dual / rho is z.
            x.add_(cost.sub_(near), alpha=self.relaxation)
            part.done += 1
            monitor.counters["products"] += 1

    def _finish(self, part: _Rows, system: System, metric: Tensor, monitor: Monitor) -> Outcome:
        """Return the mask of some rows, and its weights after a few conjugate gradients."""
        problem, masks = part.chunk.problem, part.chunk.masks
        mask = part.mask(torch.empty_like(part.x))
        v = part.x.mul_(mask).div_(metric)
        if monitor.ended is None:
            v = polish(problem, masks, system.of_rows(problem), mask, v, self.polish, monitor, part.done)
        return Outcome(mask.bool(), Status.COMPLETED, part.done, weight=system.finish(problem, v))


@dataclass
class _Rows:
    """What is kept of some rows between the stages.

    Parameters
    ----------
    chunk : Chunk
    x : Tensor
        v + dual / rho in the metric, shape (rows, d).
    done : int
        Iterations.
    """

    chunk: Chunk
    x: Tensor
    done: int = 0

    def mask(self, cost: Tensor) -> Tensor:
        """Return the mask of the point nearest to x, 0 or 1, or the one to start with; `cost` is overwritten."""
        if self.done == 0 and self.chunk.start is not None:
            return self.chunk.start.to(self.x.dtype)
        mask: Tensor = self.chunk.masks.lmo(torch.mul(self.x, self.x, out=cost).neg_())
        return mask


def _in_metric(gram: Tensor, metric: Tensor, rho: float = 0.0) -> Tensor:
    """Return M^-1 H M^-1 + rho I for the diagonal matrix M of a metric, shape (d, d)."""
    matrix = (gram / metric).div_(metric.unsqueeze(1))
    matrix.diagonal().add_(rho)
    return matrix


def conditional_deviations(gram: Tensor, noise: float = 0.03) -> Tensor:
    """Return the standard deviation of each input given the others.

    Parameters
    ----------
    gram : Tensor
        Second moments of the inputs, shape (d, d).
    noise : float
        Added to every input's variance, as a fraction of its second moment.

    Returns
    -------
    Tensor
        Shape (d,), in the units of the inputs times the square root of the number of tokens.

    Examples
    --------
    >>> import torch
    >>> [round(size, 4) for size in conditional_deviations(torch.diag(torch.tensor([4.0, 9.0]))).tolist()]
    [2.0, 3.0]
    """
    size = gram.diagonal().clamp_min(0.0).sqrt()
    inverse = size.reciprocal().nan_to_num_(posinf=0.0)
    scaled = (gram * inverse).mul_(inverse.unsqueeze(1)).clamp_(-1.0, 1.0)
    scaled.diagonal().fill_(1.0)
    return _deviations(scaled, noise).mul_(size)


def _deviations(gram: Tensor, noise: float) -> Tensor:
    """Return the standard deviation of each input of unit variance given the others, up to noise, shape (d,)."""
    noisy = gram.clone()
    noisy.diagonal().add_(noise)
    unexplained = definite_inverse(noisy).diagonal().reciprocal().sub_(noise)
    # A variance far below the noise is raised to a fraction of it: float32 could not hold the range of the metric.
    return unexplained.clamp_(min=noise / 32).sqrt_()
