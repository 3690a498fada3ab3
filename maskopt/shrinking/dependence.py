"""Which slices of a block's parameters serve single units of a layer's input: neurons, or attention heads.

A unit is a group of inputs of one layer, its *consumer*. Removing it removes columns of the consumer's weight and
whatever computes those inputs alone. What that is shows in gradients, whatever the architecture is called: with the
columns of some units set to zero, a slice of another parameter that serves a single unit has a gradient if and only if
that unit is among the others. Units are told apart by the binary digits of their numbers, so that a few gradients of
one block, with random weights, find all owners.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from maskopt.models.states import first_tensor

__all__ = ["BlockCall", "Owned", "Probe", "agree", "skeleton_copy"]

_TOLERANCE = 1e-3  # relative, of float32 sums in another order, with random weights
_ROUNDING = 1e-5  # relative, of float32 sums
_DRAWS = 8  # of weights and inputs: neurons of a ReLU that never fire have no gradient in one of them


@dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    Parameters
    ----------
    args : tuple
    kwargs : dict
    """

    args: tuple[object, ...]
    kwargs: dict[str, object]


@dataclass(frozen=True, eq=False)
class Owned:
    """The slices of one parameter, along one axis, that serve a unit each.

    Attributes
    ----------
    name : str
        Of the parameter, within the block.
    axis : int
    owner : Tensor
        The unit of every slice, int64, shape (slices,); -1 for those that serve several, such as the keys that all
        heads have in common. Every unit has as many slices.
    """

    name: str
    axis: int
    owner: Tensor


class Probe:
    """A copy of a block with random weights, and a call of it, to see what depends on what.

    Parameters
    ----------
    block : nn.Module
        In evaluation mode; it is not changed. Parameters may be on the meta device.
    call : BlockCall
        Its first tensor argument is replaced by random numbers.
    seed : int
    positive : bool
        Whether the random numbers that replace the argument are positive.
    """

    def __init__(self, block: nn.Module, call: BlockCall, seed: int = 0, *, positive: bool = False) -> None:
        self._positive = positive
        self._generator = torch.Generator().manual_seed(seed)
        self._block = skeleton_copy(block)
        self._shapes = {name: parameter.shape for name, parameter in self._block.named_parameters()}
        self._call = call
        self._parameters: dict[str, Tensor] = {}
        self._args: Any = ()
        self._kwargs: Any = {}
        self._weighting: Tensor | None = None
        self._known: dict[str, list[str]] = {}
        self.draw()

    def draw(self) -> None:
        """Draw other weights and inputs."""
        self._weighting = None
        self._parameters = {name: self._drawn_weight(name, shape) for name, shape in self._shapes.items()}
        replaced = False

        def prepare(value: object) -> object:
            nonlocal replaced
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return value.cpu()
            if not replaced:
                replaced = True
                return self._normal(value.shape).abs() if self._positive else self._normal(value.shape)
            return value.detach().float().cpu()

        self._args, self._kwargs = tree_map(prepare, (self._call.args, self._call.kwargs))

    def _drawn_weight(self, name: str, shape: torch.Size) -> Tensor:
        if len(shape) > 1:
            return self._normal(shape) / math.sqrt(shape[-1])
        centre = 0.0 if name.endswith("bias") else 1.0
        return self._normal(shape) * 0.3 + centre

    def _normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of all parameters, by name within the block."""
        return self._shapes

    def output(self, block: nn.Module | None = None, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the first tensor of the output, with gradients.

        Parameters
        ----------
        block : nn.Module, optional
            Another block than this one, which takes the same arguments.
        parameters : mapping of str to Tensor, optional
            Its weights; by default the random ones of this block.
        """
        used = dict(self._parameters if parameters is None else parameters)
        found = functional_call(self._block if block is None else block, used, self._args, self._kwargs)
        return first_tensor(found)

    def tried(self, block: nn.Module | None = None, parameters: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """Return what `output` does, or None where the block cannot compute with such weights.

        Parameters
        ----------
        block, parameters
            As for `output`.
        """
        try:
            return self.output(block, parameters)
        except (RuntimeError, ValueError, IndexError, TypeError):  # shapes that fit nothing
            return None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The random weights, by name within the block."""
        return dict(self._parameters)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Copies of the block's buffers, by name within it."""
        return dict(self._block.named_buffers())

    def owned(self, consumer: str, column_axis: int, units: Tensor) -> list[Owned]:
        """Return the slices of parameters that serve single units of a consumer's input.

        Parameters
        ----------
        consumer : str
            Name of the consumer's weight within the block.
        column_axis : int
            The axis of the weight that its inputs are on.
        units : Tensor
            The unit of every input, int64, shape (inputs,).

        Returns
        -------
        list of Owned
            Of parameters that have no other use than this consumer; nothing where no matrix is among them.
        """
        private = self._private(consumer, column_axis, len(units))
        matrices = {name for name in private if len(self._shapes[name]) > 1}
        if not matrices:
            return []
        served = _Served(units)
        found: list[Owned] = []
        for draw in range(_DRAWS):
            if draw:
                self.draw()
            for columns in served.trials:
                served.add(self._gradients(consumer, column_axis, columns, private))
            found = served.owned()
            if matrices <= {each.name for each in found} or not any(map(served.undecided, matrices)):
                break
        return found if matrices & {each.name for each in found} else []

    def all_owned(self, consumer: str, owned: Sequence[Owned]) -> bool:
        """Whether all slices of the matrices that have no other use than a consumer serve single units.

        Parameters
        ----------
        consumer : str
            For which `owned` was called.
        owned : sequence of Owned
            What it returned.
        """
        whole = {each.name for each in owned if bool((each.owner >= 0).all())}
        return all(name in whole for name in self._known[consumer] if len(self._shapes[name]) > 1)

    def is_linear(self, consumer: str, owned: Sequence[Owned]) -> bool:
        """Whether nothing but a product lies between the slices of units and their consumer.

        The block then computes the same with the signs of both changed.

        Parameters
        ----------
        consumer : str
        owned : sequence of Owned
        """
        changed = {name: -self._parameters[name] for name in (consumer, *(each.name for each in owned))}
        before, after = self.output(), self.output(parameters={**self._parameters, **changed})
        return bool((after - before).norm() <= _ROUNDING * before.norm())

    def _private(self, consumer: str, column_axis: int, inputs: int) -> list[str]:
        """Return the parameters that have no other use than a consumer's input."""
        if consumer not in self._known:
            others = [name for name in self._shapes if name != consumer]
            whole = self._gradients(consumer, column_axis, torch.ones(inputs), others)
            nothing = self._gradients(consumer, column_axis, torch.zeros(inputs), others)
            self._known[consumer] = [
                name for name in others if bool(whole[name].any()) and not bool(nothing[name].any())
            ]
        return self._known[consumer]

    def _gradients(self, consumer: str, column_axis: int, columns: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradients of a random function of the block's output, with columns of the consumer scaled."""
        shape = [1] * len(self._shapes[consumer])
        shape[column_axis] = -1
        leaves = {name: self._parameters[name].detach().requires_grad_() for name in wanted}
        used = {**self._parameters, **leaves, consumer: self._parameters[consumer] * columns.view(shape)}
        with torch.enable_grad():
            output = self.output(parameters=used)
            if self._weighting is None:
                self._weighting = self._normal(output.shape)
            value = (output * self._weighting).sum()
            if not value.requires_grad:  # none of them is used
                return {name: torch.zeros(self._shapes[name]) for name in wanted}
            gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros(self._shapes[name]) if gradient is None else gradient
            for name, gradient in zip(leaves, gradients, strict=True)
        }


class _Served:
    """Which slices have gradients when the units whose number has a certain binary digit are there.

    Parameters
    ----------
    units : Tensor
        The unit of every input, int64, shape (inputs,).

    Attributes
    ----------
    trials : list of Tensor
        The inputs that are there, 1 or 0, for each digit's values 0 and 1.
    """

    def __init__(self, units: Tensor) -> None:
        self._number = int(units.max()) + 1
        digits = range(max(1, (self._number - 1).bit_length()))
        self.trials = [(((units >> digit) & 1) == value).float() for digit in digits for value in (0, 1)]
        self._hits: dict[tuple[str, int], list[Tensor]] = {}
        self._next = 0

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Take the gradients of the next trial; after the last one, those of the first with other weights."""
        for name, gradient in gradients.items():
            for axis in range(gradient.ndim):
                hit = _along(gradient, axis)
                known = self._hits.setdefault((name, axis), [torch.zeros_like(hit) for _ in self.trials])
                known[self._next] |= hit
        self._next = (self._next + 1) % len(self.trials)

    def undecided(self, name: str) -> bool:
        """Whether a parameter may have a slice of its own for every unit.

        No other weights change that a slice serves several units; that it serves none they may.
        """
        for (each, _), hits in self._hits.items():
            several = torch.zeros_like(hits[0])
            for zero, one in zip(hits[::2], hits[1::2], strict=True):
                several |= zero & one
            if each == name and int((~several).sum()) >= self._number:
                return True
        return False

    def owned(self) -> list[Owned]:
        """Return the slices that serve a single unit each, of parameters of which every unit has as many."""
        found: dict[str, Owned] = {}
        for (name, axis), hits in self._hits.items():
            owner = torch.zeros(len(hits[0]), dtype=torch.int64)
            single = torch.ones(len(owner), dtype=torch.bool)
            for digit, (zero, one) in enumerate(zip(hits[::2], hits[1::2], strict=True)):
                single &= zero ^ one
                owner += one.long() << digit
            owner[~single] = -1
            counts = torch.bincount(owner[single], minlength=self._number)
            if len(counts) == self._number and int(counts.min()) == int(counts.max()) > 0:
                found.setdefault(name, Owned(name, axis, owner))
        return list(found.values())


def _along(gradient: Tensor, axis: int) -> Tensor:
    """Whether each slice along an axis has a gradient."""
    others = [each for each in range(gradient.ndim) if each != axis]
    return (gradient != 0).any(dim=others) if others else gradient != 0


def agree(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether outputs of blocks with random weights are there and the same.

    Parameters
    ----------
    found, expected : Tensor or None
        See `Probe.tried`.
    """
    if found is None or expected is None or found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm())


def skeleton_copy(block: nn.Module) -> nn.Module:
    """Return a copy of a block on the CPU, with its buffers in float32, and without data of its parameters.

    Parameters
    ----------
    block : nn.Module
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)
        for parameter in block.parameters()
    }
    twin = copy.deepcopy(block, memo)
    vars(twin).pop("forward", None)  # that of the class, where another one reads the weights first
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.cpu().float() if buffer.is_floating_point() else buffer.cpu()
    return twin.eval()
