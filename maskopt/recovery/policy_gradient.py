"""Masks that move by policy gradient: probabilities learned from the losses of masks drawn from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskopt.checks import SEEDS, check_settings, real, whole
from maskopt.oracles import CanProject, MaskSet
from maskopt.recovery.base import Masked, MovingRule, MovingState
from maskopt.solvers.requirements import Requirements

__all__ = ["PolicyGradient"]

_LEAST = 0.02  # of a probability, and of one minus it, where the gradient of the logarithm divides by it


@dataclass(frozen=True)
class PolicyGradient(MovingRule):
    """Draws masks from probabilities, one for each entry, and moves these by the losses alone.

    Each entry is kept with its own probability p, independently, and p lies in the convex hull of the set, so that the
    expected mask has what the set asks for: in a partition matroid the probabilities of a tile add up to the number it
    keeps. The gradient of the expected loss E L(m) is E (L(m) - b) (m - p) / (p (1 - p)) for any baseline b
    (REINFORCE), here the moving average of the losses. A mask m is drawn for every step; its loss, less b and over the
    moving standard deviation of the losses, moves p, which is then projected onto the hull. Weights are fitted to the
    masks that are drawn. At the end the mask is the one of the set with the largest sum of probabilities.

    Parameters
    ----------
    until : float
        Fraction of the steps after which masks stay, in (0, 1].
    spread : float
        Fraction of the way from the mask to the centre of the hull where probabilities start, in (0, 1].
    step : float
        Change of the probabilities, as a root mean square, by a loss that is one standard deviation off.
    memory : float
        Weight of the earlier losses in the averages, in [0, 1).
    seed : int
        Of the masks that are drawn.

    References
    ----------
    Y. Gao et al., "Bypass back-propagation: optimization-based structural pruning for large language models via policy
    gradient", ACL 2025 (arXiv 2406.10576), section 3: Bernoulli masks, projected probabilities, the moving average.
    There structures are pruned and weights stay. The scale of a step is this project's.

    Examples
    --------
    >>> from maskopt.recovery import PolicyGradient
    >>> PolicyGradient(spread=0.1).moves
    True
    """

    spread: float = 0.02
    step: float = 0.01
    memory: float = 0.9
    seed: int = 0

    numbers: ClassVar[float] = 3.0  # values of pruned entries, probabilities, and the mask that is drawn
    requires: ClassVar[Requirements] = Requirements(masks=(CanProject,))
    stacks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            self,
            spread=real(0, 1, above=True),
            step=real(0, above=True),
            memory=real(0, 1, below=True),
            seed=whole(*SEEDS),
        )

    def begin(self, weights: Sequence[Masked], steps: int) -> MovingState:
        return _Policy(weights, steps, self)


class _Policy(MovingState):
    def __init__(self, weights: Sequence[Masked], steps: int, rule: PolicyGradient) -> None:
        super().__init__(weights, steps, rule)
        self._rule = rule
        self._generator = torch.Generator().manual_seed(rule.seed)
        self._mean, self._square, self._advantage, self._losses = 0.0, 0.0, 0.0, 0
        self._chances = [_start(weight, rule.spread) for weight in weights]
        self._draw()

    def observed(self, loss: float) -> None:
        # Averages of the losses before this one, without the bias of their start.
        self._advantage = 0.0
        if self._losses > 1:
            known = 1.0 - self._rule.memory**self._losses
            mean = self._mean / known
            spread = math.sqrt(max(0.0, self._square / known - mean * mean))
            self._advantage = max(-3.0, min(3.0, (loss - mean) / spread)) if spread > 0.0 else 0.0
        self._mean += (1.0 - self._rule.memory) * (loss - self._mean)
        self._square += (1.0 - self._rule.memory) * (loss * loss - self._square)
        self._losses += 1

    def free(self, weight: Masked) -> None:
        gradient, drawn = weight.master.grad, weight.relaxed
        assert gradient is not None
        assert drawn is not None
        gradient.mul_(drawn)

    def move(self, step: int) -> None:
        for weight, chances in zip(self.weights, self._chances, strict=True):
            drawn = weight.relaxed
            assert drawn is not None
            if self._advantage != 0.0:
                slope = score_function(drawn, chances)
                size = float(slope.square().mean().sqrt())
                if size > 0.0:
                    chances.sub_(slope, alpha=self._rule.step * self._advantage / size)
                    chances.copy_(_projected(weight, chances))
            weight.select_by(chances)
        self._draw()

    def stay(self) -> None:
        super().stay()
        self._chances = []

    def _draw(self) -> None:
        for weight, chances in zip(self.weights, self._chances, strict=True):
            uniform = torch.rand(chances.shape, generator=self._generator, dtype=torch.float32).to(chances.device)
            weight.relaxed = (uniform < chances).to(weight.master.dtype)


def score_function(drawn: Tensor, chances: Tensor) -> Tensor:
    """Return the gradient of the logarithm of a drawn mask's probability by the chance of each entry.

    Entries whose chance is 0 or 1 have none; near these ends the divisor is bounded.

    Parameters
    ----------
    drawn, chances : Tensor
        Of one shape; `drawn` of zeros and ones.

    Examples
    --------
    >>> score_function(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, 0.2, 1.0]))
    tensor([ 2.0000, -1.2500,  0.0000])
    """
    return (drawn - chances) / (chances * (1.0 - chances)).clamp_min(_LEAST * (1.0 - _LEAST))


def _start(weight: Masked, spread: float) -> Tensor:
    """Return probabilities of a point between mask and centre."""
    assert isinstance(weight.masks, MaskSet), "a rule without stacks"
    mask = weight.oriented(weight.mask)
    chances = mask.to(weight.master.dtype)
    centre = weight.masks.center(mask.shape, chances.dtype, chances.device)
    return weight.stored(chances.lerp(centre, spread)).contiguous()


def _projected(weight: Masked, chances: Tensor) -> Tensor:
    assert isinstance(weight.masks, CanProject)
    return weight.stored(weight.masks.project(weight.oriented(chances).contiguous())).clamp(0.0, 1.0)
