"""What is fitted, the weights with their masks, and the interface of rules that say how masks move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from maskopt.checks import check_settings, real
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.solvers.requirements import Requirements

__all__ = ["MaskRule", "MaskState", "Masked", "MovingRule", "MovingState", "Objective"]


class Objective(ABC):
    """A loss of a module, in micro-batches, and the same loss on data that is held out.

    The module computes with its own parameters, which `fit` changes. Several processes may fit one module together,
    each with micro-batches of its own: then all of them call the same methods in the same order.
    """

    @property
    @abstractmethod
    def batches(self) -> int:
        """Number of micro-batches to fit; of several processes, the largest one."""

    @property
    def spread(self) -> bool:
        """Whether several processes have micro-batches, so that gradients are means over them (`averaged`)."""
        return False

    def averaged(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Return means of tensors over all processes, which may change them in place; here the tensors themselves.

        Parameters
        ----------
        tensors : sequence of Tensor or None
            None counts as zeros; where it is None everywhere, so is the mean.
        like : sequence of Tensor
            Of the same shapes, and on the same device.
        """
        return list(tensors)

    @abstractmethod
    def loss(self, index: int) -> Tensor:
        """Return the mean loss on a micro-batch, a scalar with gradients."""

    @abstractmethod
    def held_out(self) -> Tensor:
        """Return the loss of each sequence that is held out, of all processes, float64, shape (sequences,)."""


class Masked:
    """A pruned weight while it is fitted.

    Parameters
    ----------
    parameter : nn.Parameter
        What the module computes with.
    mask : Tensor
        Boolean, as the parameter is stored, True = kept.
    masks : MaskSet or sequence of MaskSet or None
        The set of masks of the weight as a (rows, d) matrix; a rule that moves masks stays in it. For a parameter of E
        stacked matrices, its first or its first two axes, one for each; the mask of a matrix with None stays.
    deviation : Tensor, optional
        Standard deviation of each input given the others, shape (d,) or (E, 1, d): how much a weight of it matters.
        Ones by default.
    transposed : bool
        Whether the matrices are stored as (d, rows).

    Attributes
    ----------
    master : Tensor
        The values that the optimizer changes, float32 or float64; the parameter itself where nothing else is needed.
    pruned : float
        What pruned entries count: the module computes with master * (mask + pruned * (1 - mask)).
    relaxed : Tensor or None
        What each entry counts, in place of mask and `pruned`.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        mask: Tensor,
        masks: MaskSet | Sequence[MaskSet | None],
        deviation: Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        self.parameter, self.mask, self.masks, self.transposed = parameter, mask, masks, transposed
        self.deviation = deviation
        self.master: Tensor = parameter.data
        self.pruned = 0.0
        self.relaxed: Tensor | None = None

    @property
    def settled(self) -> bool:
        """Whether the module computes with the mask."""
        return self.pruned == 0.0 and self.relaxed is None

    def settle(self, mask: Tensor, values: Tensor) -> None:
        """Let the module compute with a mask and values of which nothing else is kept."""
        self.mask, self.master, self.pruned, self.relaxed = mask, values, 0.0, None

    def oriented(self, tensor: Tensor) -> Tensor:
        """Turn a tensor from the shape of the parameter to (rows, d), or (E, rows, d); a view."""
        if not isinstance(self.masks, MaskSet):
            tensor = tensor.view(len(self.masks), -1, tensor.shape[-1])
        return tensor.mT if self.transposed else tensor

    def stored(self, tensor: Tensor) -> Tensor:
        """Turn a tensor back to the shape of the parameter."""
        return (tensor.mT if self.transposed else tensor).reshape(self.parameter.shape)

    def cost(self, values: Tensor) -> Tensor:
        """Return what pruning values costs while other weights compensate: their squares times those of deviations.

        Parameters
        ----------
        values : Tensor
            Stored as the parameter is, and so is the result.
        """
        size = self.oriented(values)
        return self.stored(size.square() if self.deviation is None else (size * self.deviation).square_())

    def curved(self, values: Tensor) -> Tensor:
        """Return half the gradient of the summed `cost`: values times the squares of deviations.

        Parameters
        ----------
        values : Tensor
            Stored as the parameter is, and so is the result.
        """
        size = self.oriented(values)
        return self.stored(size.clone() if self.deviation is None else size * self.deviation.square())

    def promise(self, gradient: Tensor) -> Tensor:
        """Return in proportion to what the loss falls by an entry alone: gradient squared over variance.

        Parameters
        ----------
        gradient : Tensor
            Stored as the parameter is, and so is the result.
        """
        size = self.oriented(gradient)
        if self.deviation is not None:
            least = 1e-6 * self.deviation.amax(-1, keepdim=True)
            size = size / self.deviation.maximum(least.clamp_min(torch.finfo(size.dtype).tiny ** 0.25))
        return self.stored(size.square())

    def select_by(self, values: Tensor) -> None:
        """Select the mask of the set that keeps the largest sum of values, which are stored as the parameter is."""
        costs = self.oriented(-values)
        if isinstance(self.masks, MaskSet):
            mask = self.masks.lmo_mask(costs)
        else:
            parts = zip(self.masks, self.oriented(self.mask), costs, strict=True)
            mask = torch.stack([before if each is None else each.lmo_mask(cost) for each, before, cost in parts])
        self.mask = self.stored(mask).contiguous()

    def select(self, values: Tensor) -> None:
        """Select the mask of the set whose pruned values cost least."""
        self.select_by(self.cost(values))

    def reselect(self) -> None:
        """Select the mask of the set whose pruned weights cost least."""
        self.select(self.master.detach())

    def scale_gradient(self, factor: float) -> None:
        """Multiply the master's gradient of pruned entries by a factor."""
        gradient = self.master.grad
        assert gradient is not None
        if factor == 0.0:
            gradient.masked_fill_(~self.mask, 0.0)
        elif factor != 1.0:
            gradient.copy_(torch.where(self.mask, gradient, factor * gradient))

    def write(self) -> None:
        """Let the module compute with the master's values under the mask."""
        target = self.parameter.data
        if self.master.data_ptr() != target.data_ptr():
            target.copy_(self.master.detach())
        if self.relaxed is not None:
            target.mul_(self.relaxed)
        elif self.pruned == 0.0:
            target.masked_fill_(~self.mask, 0.0)
        elif self.pruned != 1.0:
            target.copy_(torch.where(self.mask, target, self.pruned * target))


class MaskState:
    """What a rule does in one fit. By default masks stay.

    Parameters
    ----------
    weights : sequence of Masked
    steps : int
        Of the fit.
    """

    def __init__(self, weights: Sequence[Masked], steps: int) -> None:
        self.weights, self.steps = weights, steps

    def observed(self, loss: float) -> None:
        """Take the training loss of the coming step into account.

        Parameters
        ----------
        loss : float
            With the weights and masks that the module computes with.
        """

    def gradient(self, weight: Masked, step: int) -> None:
        """Change the gradient of a weight's master before the optimizer's step; by default only kept entries have one.

        Parameters
        ----------
        weight : Masked
            One of the weights.
        step : int
            Steps that are done.
        """
        weight.scale_gradient(0.0)

    def stepped(self, step: int) -> None:
        """Change masks, and what pruned entries count, after an optimizer's step.

        Parameters
        ----------
        step : int
            Steps that are done.
        """


@dataclass(frozen=True)
class MaskRule(ABC):
    """Says how masks change while weights are fitted; settings only.

    Class attributes
    ----------------
    moves : bool
        Whether masks change; values of pruned entries are then kept beside the parameter.
    numbers : float
        How many numbers for each entry of a weight the rule keeps beside the optimizer's, for estimates of memory.
    requires : Requirements
        What the set of each weight must have.
    stacks : bool
        Whether masks of matrices that are stacked in one parameter can move.
    """

    moves: ClassVar[bool] = False
    numbers: ClassVar[float] = 0.0
    requires: ClassVar[Requirements] = Requirements()
    stacks: ClassVar[bool] = True

    def check(self, masks: MaskSet | Sequence[MaskSet | None]) -> None:
        """Check that masks of a weight can change by this rule.

        Parameters
        ----------
        masks : MaskSet or sequence of MaskSet or None
            As of `Masked`.

        Raises
        ------
        MaskoptError
            With what is missing, if they cannot.
        """
        name = type(self).__name__
        if not isinstance(masks, MaskSet) and not self.stacks:
            raise MaskoptError(
                f"{name} moves masks of single matrices only, not of those stacked in one parameter, such as experts; "
                f"choose another rule, or exclude them."
            )
        for each in (masks,) if isinstance(masks, MaskSet) else filter(None, masks):
            self.requires.check_set(each, name)

    @abstractmethod
    def begin(self, weights: Sequence[Masked], steps: int) -> MaskState:
        """Return the state of one fit.

        Parameters
        ----------
        weights : sequence of Masked
        steps : int
            Of the fit; at its end every entry counts 0 or 1.
        """


@dataclass(frozen=True)
class MovingRule(MaskRule):
    """A rule that moves masks during the first part of a fit.

    Parameters
    ----------
    until : float
        Fraction of the steps after which masks stay, in (0, 1].
    """

    until: float = 0.6

    moves: ClassVar[bool] = True
    numbers: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_settings(self, until=real(0, 1, above=True))


class MovingState(MaskState, ABC):
    """What a rule that moves masks does in one fit: `free` and `move` while masks move, then `stay`.

    Parameters
    ----------
    weights : sequence of Masked
    steps : int
        Of the fit.
    rule : MovingRule
    """

    def __init__(self, weights: Sequence[Masked], steps: int, rule: MovingRule) -> None:
        super().__init__(weights, steps)
        self._last = rule.until * steps

    def left(self, step: int) -> float:
        """Return which fraction of the time in which masks move is left after a number of steps."""
        return max(0.0, 1.0 - step / self._last)

    def gradient(self, weight: Masked, step: int) -> None:
        if step < self._last:
            self.free(weight)
        else:
            super().gradient(weight, step)

    def stepped(self, step: int) -> None:
        if step - 1 < self._last:
            self.move(step)
            if step >= self._last:
                self.stay()

    def free(self, weight: Masked) -> None:
        """Change the gradient of a weight's master while masks move; by default it is that of all entries."""

    @abstractmethod
    def move(self, step: int) -> None:
        """Change masks after an optimizer's step; the last call sees `left(step)` = 0.

        Parameters
        ----------
        step : int
            Steps that are done.
        """

    def stay(self) -> None:
        """Let the module compute with the masks, which stay from here on."""
        for weight in self.weights:
            weight.pruned, weight.relaxed = 0.0, None
