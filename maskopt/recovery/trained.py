"""What the optimizer changes for a parameter: its own values, or the factors of a masked product that is added."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from maskopt.recovery.base import Masked

__all__ = ["Product", "Trained", "Values"]

_SPREAD = 2.0  # root mean square of entries over their median, at most; 1.5 where they are normal
# Few factors need larger steps than many weights: of 0.5, 1.5 and 4 times a weight's size, blocks preferred the second.
_FACTORS = 3.0


class Trained(ABC):
    """A parameter of the module, and tensors of the optimizer's that it is made of.

    Parameters
    ----------
    parameter : nn.Parameter
        Its values are those from before.

    Attributes
    ----------
    tensors : list of Tensor
        Leaves that the optimizer changes; made by `begin`.
    sizes : list of float
        A step of which size in each of them changes outputs alike.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.tensors: list[Tensor] = []
        self.sizes: list[float] = []

    @abstractmethod
    def begin(self, *, apart: bool) -> None:
        """Make new tensors, which stand for the best state; `apart` from the parameter if a rule needs that."""

    @abstractmethod
    def receive(self, gradient: Tensor) -> None:
        """Give each tensor its gradient, times its size, from the parameter's."""

    @abstractmethod
    def write(self) -> None:
        """Let the module compute with the tensors."""

    @abstractmethod
    def save(self) -> None:
        """Remember the current state as the best one."""

    @abstractmethod
    def restore(self) -> None:
        """Let the module compute with the best state."""


class Values(Trained):
    """A parameter whose values the optimizer changes.

    Parameters
    ----------
    parameter : nn.Parameter
    weight : Masked, optional
        The pruned weight whose parameter it is.
    """

    def __init__(self, parameter: nn.Parameter, weight: Masked | None = None) -> None:
        super().__init__(parameter)
        self._weight = weight
        self._saved = parameter.data.clone()
        inputs = parameter.shape[-1] if weight is None else weight.oriented(parameter).shape[-1]
        self.sizes = [_size(parameter) / math.sqrt(inputs)]

    def begin(self, *, apart: bool) -> None:
        exact = self.parameter.dtype in (torch.float32, torch.float64)
        values = self.parameter.data if exact else self.parameter.data.float()
        apart = apart and exact and self._weight is not None
        self.tensors = [(values.clone() if apart else values).detach().requires_grad_(True)]
        if self._weight is not None:
            self._weight.master = self.tensors[0]

    def receive(self, gradient: Tensor) -> None:
        # Of the relative size: what Adam takes for zero must not depend on the units of a weight.
        self.tensors[0].grad = gradient.to(self.tensors[0].dtype).mul_(self.sizes[0])

    def write(self) -> None:
        if self._weight is not None:
            self._weight.write()
        elif self.tensors[0].data_ptr() != self.parameter.data_ptr():
            self.parameter.data.copy_(self.tensors[0].detach())

    def save(self) -> None:
        self._saved.copy_(self.parameter.data)

    def restore(self) -> None:
        self.parameter.data.copy_(self._saved)


class Product(Trained):
    """A pruned weight W that becomes W + M * (B A), M its mask: zeros stay zeros, and B A is of low rank.

    A, shape (rank, d), starts with normal entries of variance 1 / rank, so that a step of B changes entries of W by
    its own size; B, shape (rows, rank), starts at zero, so that the first state is that from before. With G the
    gradient by W, (M * G) A^T and B^T (M * G) are those by B and A. The optimizer's memory is that of the factors;
    beside them there is one copy of W. Each of several stacked matrices has factors of its own.

    Parameters
    ----------
    weight : Masked
        Its mask stays.
    rank : int
    seed : int
        Of A.

    References
    ----------
    M. Zimmer et al., "PERP: rethinking the prune-retrain paradigm in the era of LLMs", 2023 (arXiv 2312.15230),
    section 3: MaskLoRA.
    """

    def __init__(self, weight: Masked, rank: int, seed: int) -> None:
        super().__init__(weight.parameter)
        self._weight, self._seed = weight, seed
        self._base = weight.parameter.data.clone()
        *_, rows, inputs = weight.oriented(weight.parameter).shape
        self._rank = min(rank, rows, inputs)
        self.sizes = [
            _FACTORS * size
            for size in (_size(weight.parameter) / math.sqrt(inputs), 1.0 / math.sqrt(self._rank * inputs))
        ]
        self._best: list[Tensor] | None = None

    def begin(self, *, apart: bool) -> None:
        *stack, rows, inputs = self._weight.oriented(self.parameter).shape
        kind = torch.float64 if self.parameter.dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(self._seed)
        right = torch.randn(*stack, self._rank, inputs, generator=generator, dtype=torch.float64)
        right.div_(math.sqrt(self._rank))
        left = torch.zeros(*stack, rows, self._rank)
        starts = [left, right] if self._best is None else self._best
        self.tensors = [
            start.to(kind).to(self.parameter.device, copy=True).detach().requires_grad_(True) for start in starts
        ]

    def receive(self, gradient: Tensor) -> None:
        left, right = self.tensors
        kept = self._weight.oriented(gradient.masked_fill(~self._weight.mask, 0.0)).to(left.dtype)
        with torch.no_grad():
            left.grad = (kept @ right.mT).mul_(self.sizes[0])
            right.grad = (left.mT @ kept).mul_(self.sizes[1])

    def write(self) -> None:
        self._write(self.tensors)

    def _write(self, factors: list[Tensor]) -> None:
        left, right = (factor.detach() for factor in factors)
        change = self._weight.stored(left @ right)
        values = self._base.to(left.dtype) + change.masked_fill_(~self._weight.mask, 0.0)
        self.parameter.data.copy_(values)

    def save(self) -> None:
        self._best = [factor.detach().clone() for factor in self.tensors]

    def restore(self) -> None:
        if self._best is None:
            self.parameter.data.copy_(self._base)
        else:
            self._write(self._best)


def _size(parameter: nn.Parameter) -> float:
    """Return the root mean square of the nonzero entries.

    At most twice the median size stands for it: a few huge entries must not set the step of all.
    """
    values = parameter.data.float()
    values = values[values != 0].abs()
    if not len(values):
        return 0.0
    return min(float(values.square().mean().sqrt()), _SPREAD * float(values.median()))
