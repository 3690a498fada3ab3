"""Masks that move by logits of which noisy relaxed masks are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import SEEDS, check_settings, real, whole
from maskopt.oracles import MaskSet, PartitionMatroid
from maskopt.recovery.base import Masked, MovingRule, MovingState
from maskopt.solvers.requirements import Requirements

__all__ = ["GumbelMasks", "relaxed_top"]

_CANDIDATES = 70  # 4 of 8; with more masks for a group, each entry has a logit instead
_HALVINGS = 50  # of the bracket of a threshold
_FIXED = 1e4  # logit of an entry that every mask keeps


@dataclass(frozen=True)
class GumbelMasks(MovingRule):
    """Learns logits by gradients through relaxed masks that are drawn with Gumbel noise of falling temperature.

    N:M masks (MaskLLM): each of the C = M over N candidates S_i of a group has a logit a_i. With Gumbel noise z, the
    group's relaxed mask is x = sum_i y_i S_i, y = softmax((a + z) / t), and the module computes with x * w. Other
    partition matroids, and N:M with more than 70 candidates: each entry has a logit, and x_j =
    sigmoid((a_j + z_j - c) / t), with one threshold c for each group at which the x_j add up to the number it keeps.
    Softmax and sigmoids are alike: the points of the simplex, and of the capped simplex, with the largest sum of noisy
    logits plus t times an entropy; for t -> 0 they are masks. Logits follow the gradient of the loss through x, with
    steps of Adam. t falls geometrically from `hot` to `cold`. Logits start from the mask: `prior` times what a
    candidate has in common with it, less the mean.

    Weights have the gradient of what the module computes with, x * g, so that pruned ones grow from zero in proportion
    to how much they count; in MaskLLM weights stay. `regularity` draws logits to large weights as MaskLLM's sparse
    weight regularization does, by the gradient of -|x * w|^2, whose size is given relative to that of the loss.

    Parameters
    ----------
    until : float
        Fraction of the steps after which masks stay, in (0, 1].
    hot, cold : float
        Temperature at the beginning and at that time.
    prior : float
        Initial logit of an entry in common with the mask.
    step : float
        Of the logits.
    regularity : float
        Size of the gradient towards large weights relative to the loss's.
    seed : int
        Of the noise.

    References
    ----------
    G. Fang et al., "MaskLLM: learnable semi-structured sparsity for large language models", NeurIPS 2024
    (arXiv 2409.17481), section 3. W. Kool et al., "Stochastic beams and where to find them", ICML 2019
    (arXiv 1903.06059): the k largest of logits with Gumbel noise are a sample without replacement. B. Amos et al.,
    "The limited multi-label projection layer", 2019 (arXiv 1906.08707): sigmoids that add up to k.

    Examples
    --------
    >>> from maskopt.recovery import GumbelMasks
    >>> GumbelMasks(prior=3.0).moves
    True
    """

    hot: float = 4.0
    cold: float = 0.1
    prior: float = 10.0
    step: float = 1.0
    regularity: float = 0.0
    seed: int = 0

    numbers: ClassVar[float] = 6.5  # values of pruned entries, x, and 1.5 logits for each entry with two moments
    requires: ClassVar[Requirements] = Requirements(masks=(PartitionMatroid,))
    stacks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            self,
            hot=real(0, above=True),
            cold=real(0, above=True),
            prior=real(0),
            step=real(0, above=True),
            regularity=real(0),
            seed=whole(*SEEDS),
        )

    def begin(self, weights: Sequence[Masked], steps: int) -> MovingState:
        return _Sampled(weights, steps, self)


class _Sampled(MovingState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: GumbelMasks) -> None:
        super().__init__(weights, steps, rule)
        self._rule = rule
        self._generator = torch.Generator().manual_seed(rule.seed)
        self._logits = {id(weight): _logits(weight, rule.prior) for weight in weights}
        self._optimizers = {
            key: torch.optim.Adam([logits.values], lr=rule.step, betas=(0.9, 0.95), eps=1e-30)
            for key, logits in self._logits.items()
        }
        self._temperature = rule.hot
        for weight in weights:
            self._draw(weight)

    def _draw(self, weight: Masked) -> None:
        logits = self._logits[id(weight)]
        noise = torch.rand(logits.values.shape, generator=self._generator, dtype=torch.float32)
        noise = -(-noise.clamp_(1e-12, 1.0 - 1e-7).log_()).log_()
        weight.relaxed = weight.stored(logits.draw(noise.to(logits.values), self._temperature)).contiguous()

    def free(self, weight: Masked) -> None:
        gradient, x = weight.master.grad, weight.relaxed
        assert gradient is not None
        assert x is not None
        values = weight.master.detach()
        slope = gradient * values
        gradient.mul_(x)
        if self._rule.regularity > 0.0:
            large = x * values.square()
            size = float(large.norm())
            if size > 0.0:
                slope.sub_(large, alpha=self._rule.regularity * float(slope.norm()) / size)
        logits = self._logits[id(weight)]
        logits.values.grad = logits.slope(weight.oriented(slope), self._temperature)
        with torch.no_grad():
            self._optimizers[id(weight)].step()
        logits.values.grad = None

    def move(self, step: int) -> None:
        rule = self._rule
        self._temperature = rule.hot * (rule.cold / rule.hot) ** (1.0 - self.left(step))
        for weight in self.weights:
            weight.select_by(weight.stored(self._logits[id(weight)].entries()))
            if self.left(step) > 0.0:
                self._draw(weight)

    def stay(self) -> None:
        super().stay()
        self._logits.clear()
        self._optimizers.clear()


class _Logits(ABC):
    """Logits of the masks of one weight, and the relaxed mask that was drawn last."""

    def __init__(self, masks: PartitionMatroid, shape: tuple[int, int], values: Tensor) -> None:
        self._masks, self._shape, self.values = masks, shape, values

    @abstractmethod
    def draw(self, noise: Tensor, temperature: float) -> Tensor:
        """Return a relaxed mask, shape (rows, d)."""

    @abstractmethod
    def slope(self, gradient: Tensor, temperature: float) -> Tensor:
        """Return the gradient by the logits, given that by the relaxed mask, shape (rows, d)."""

    @abstractmethod
    def entries(self) -> Tensor:
        """Return what each entry counts without noise, shape (rows, d)."""


class _Candidates(_Logits):
    """A logit for each mask of a group."""

    def __init__(self, masks: PartitionMatroid, mask: Tensor, keep: int, prior: float, kind: torch.dtype) -> None:
        groups = masks.groups(mask).to(kind)
        size = groups.shape[1]
        chosen = torch.tensor(list(combinations(range(size), keep)), device=mask.device).reshape(-1, keep)
        self._table = torch.zeros(len(chosen), size, dtype=kind, device=mask.device).scatter_(1, chosen, 1.0)
        common = groups @ self._table.T
        super().__init__(masks, (mask.shape[0], mask.shape[1]), prior * (common - common.mean(1, keepdim=True)))
        self._drawn = self.values

    def draw(self, noise: Tensor, temperature: float) -> Tensor:
        self._drawn = torch.softmax((self.values + noise) / temperature, 1)
        return self._masks.ungroup(self._drawn @ self._table, self._shape)

    def slope(self, gradient: Tensor, temperature: float) -> Tensor:
        by_candidate = self._masks.groups(gradient) @ self._table.T
        mean = (self._drawn * by_candidate).sum(1, keepdim=True)
        return self._drawn * (by_candidate - mean) / temperature

    def entries(self) -> Tensor:
        return self._masks.ungroup(self._table[self.values.argmax(1)], self._shape)


class _Entries(_Logits):
    """A logit for each entry."""

    def __init__(self, masks: PartitionMatroid, mask: Tensor, prior: float, kind: torch.dtype) -> None:
        values = prior * mask.to(kind)
        for fixed, size in ((masks.protected, _FIXED), (masks.forbidden, -_FIXED)):
            if fixed is not None:
                values = values.masked_fill(fixed.to(mask.device), size)
        super().__init__(masks, (mask.shape[0], mask.shape[1]), masks.groups(values).clone())
        self._keep = masks.kept_per_group(self._shape).to(mask.device)
        self._drawn = self.values

    def draw(self, noise: Tensor, temperature: float) -> Tensor:
        self._drawn = relaxed_top((self.values + noise) / temperature, self._keep)
        return self._masks.ungroup(self._drawn, self._shape)

    def slope(self, gradient: Tensor, temperature: float) -> Tensor:
        by_entry, free = self._masks.groups(gradient), self._drawn * (1.0 - self._drawn)
        mean = (free * by_entry).sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp_min(1e-30)
        return free * (by_entry - mean) / temperature

    def entries(self) -> Tensor:
        return self._masks.ungroup(self.values, self._shape)


def _logits(weight: Masked, prior: float) -> _Logits:
    assert isinstance(weight.masks, MaskSet), "a rule without stacks"
    masks, mask, kind = weight.masks, weight.oriented(weight.mask), weight.master.dtype
    assert isinstance(masks, PartitionMatroid)
    keep = masks.kept_per_group(mask.shape)
    size, count = masks.groups(mask).shape[1], int(keep[0]) if len(keep) else 0
    alike = bool((keep == count).all()) and bool((masks.groups(mask).sum(1) == count).all())
    plain = masks.protected is None and masks.forbidden is None and alike
    if plain and comb(size, count) <= _CANDIDATES:
        return _Candidates(masks, mask, count, prior, kind)
    return _Entries(masks, mask, prior, kind)


def relaxed_top(values: Tensor, keep: Tensor) -> Tensor:
    """Return sigmoid(values - c), with one threshold c for each row at which the entries add up to a number.

    Parameters
    ----------
    values : Tensor
        Finite, shape (groups, size).
    keep : Tensor
        The sums, int64, shape (groups,); at most `size`.

    Examples
    --------
    >>> relaxed_top(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([1]))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    wanted = keep.to(values.device).unsqueeze(1)
    size = values.shape[1]
    low, high = values.amin(1, keepdim=True) - 40.0, values.amax(1, keepdim=True) + 40.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        above = torch.sigmoid(values - middle).sum(1, keepdim=True) > wanted
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    x = torch.sigmoid(values - 0.5 * (low + high))
    return x.masked_fill(wanted == 0, 0.0).masked_fill(wanted == size, 1.0)
