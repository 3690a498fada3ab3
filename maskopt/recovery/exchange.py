"""Masks that move by exchanges: weights that cost least are dropped, and those that promise most are grown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import check_settings, real, whole
from maskopt.recovery.base import Masked, MovingRule, MovingState

__all__ = ["DropAndGrow"]

_HALVINGS = 20


@dataclass(frozen=True)
class DropAndGrow(MovingRule):
    """Exchanges a falling fraction of the kept weights a few times.

    Dropping w_j costs w_j^2 c_j^2, c_j^2 the variance of input j given the others; growing it from zero promises
    (g_j / c_j)^2, times one factor for all, where g_j is the mean gradient since the last exchange: the minimum of the
    quadratic model in that entry. The factor is the one at which the mask of least cost exchanges the wanted fraction.
    Grown weights begin at zero.

    Parameters
    ----------
    fraction : float
        Of the kept weights in the first exchange; it falls with a half cosine.
    exchanges : int
        Number of exchanges.
    until : float
        Fraction of the steps after which masks stay, in (0, 1].

    References
    ----------
    U. Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020 (arXiv 1911.11134), section 3: drop by
    size, grow by the gradient. The second-order costs are those of optimal brain surgeons.

    Examples
    --------
    >>> from maskopt.recovery import DropAndGrow
    >>> DropAndGrow(exchanges=4).moves
    True
    """

    fraction: float = 0.05
    exchanges: int = 8

    numbers: ClassVar[float] = 2.0  # values of pruned entries, and sums of gradients

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, fraction=real(0, 1), exchanges=whole(1))

    def begin(self, weights: Sequence[Masked], steps: int) -> MovingState:
        return _Exchanges(weights, steps, self)


class _Exchanges(MovingState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: DropAndGrow) -> None:
        super().__init__(weights, steps, rule)
        self._fraction = rule.fraction
        last = rule.until * steps
        self._times = {max(1, round(last * (index + 1) / rule.exchanges)) for index in range(rule.exchanges)}
        self._sums: dict[int, Tensor] = {}

    def free(self, weight: Masked) -> None:
        gradient = weight.master.grad
        assert gradient is not None
        self._sums.setdefault(id(weight), torch.zeros_like(gradient)).add_(gradient)
        weight.scale_gradient(0.0)

    def move(self, step: int) -> None:
        if step not in self._times:
            return
        wanted = self._fraction * (1.0 + math.cos(math.pi * (1.0 - self.left(step)))) / 2.0
        for weight in self.weights:
            sums = self._sums.pop(id(weight), None)
            if sums is not None and wanted > 0.0:
                self._exchange(weight, sums, wanted)

    def stay(self) -> None:
        super().stay()
        self._sums.clear()

    @staticmethod
    def _exchange(weight: Masked, gradient: Tensor, wanted: float) -> None:
        before, kept = weight.mask, max(1, int(weight.mask.sum()))
        cost = weight.cost(weight.master.detach())
        promise = weight.promise(gradient)
        largest = float(promise.max())
        if largest <= 0.0 or not math.isfinite(largest):
            return
        promise.div_(largest)
        low, high = -60.0, 60.0  # of the exponent of the factor
        size = max(float(cost.max()), torch.finfo(cost.dtype).tiny)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            weight.select_by(torch.where(before, cost, size * 2.0**middle * promise))
            if int((weight.mask & ~before).sum()) > wanted * kept:
                high = middle
            else:
                low = middle
        weight.select_by(torch.where(before, cost, size * 2.0**low * promise))
        with torch.no_grad():
            weight.master.masked_fill_(~(weight.mask & before), 0.0)
