"""What belongs to an expert of a block, and what the configuration says of their number.

No architecture is known by name: a model without data is made whose configuration says one expert less, and what is
smaller there holds the experts. That routers then choose among those that stay is checked with random weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from maskopt.models.blocks import Block
from maskopt.models.experts import Stack, stacks
from maskopt.models.replay import Replay
from maskopt.models.states import first_tensor
from maskopt.shrinking.configuration import Fields, Skeletons, block_of
from maskopt.shrinking.dependence import BlockCall, Owned, Probe, agree
from maskopt.shrinking.units import Role, Site, signature

__all__ = ["Mixture", "Mixtures"]

_SHORT = 16  # tokens with random weights
_NEVER = -1e4  # of a router's row, with inputs that are positive: the expert is never chosen

_Make = Callable[[str, int], nn.Module | None]


class Mixture:
    """The experts of a block.

    Parameters
    ----------
    block : Block
    role : Role
        An expert is a unit of it.
    make : callable
        Returns a model without data with an entry of the configuration changed; None where its class refuses.

    Attributes
    ----------
    path, name : str
        Of the module that has the router and the experts, in the block and in the model.
    """

    def __init__(self, block: Block, role: Role, make: _Make) -> None:
        self.block, self.role, self._make = block, role, make
        names = [role.consumer, *(each.name for each in (*role.owned, *role.buffers))]
        parts = [name.split(".")[:-1] for name in names]
        shared = [same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False))]
        self.path = ".".join(shared)
        self.name = f"{block.name}.{self.path}".rstrip(".")
        self._matrices = {stack.name for stack in stacks(block.module)}
        own = (
            stack for stack in stacks(block.module, block.name) if stack.name.removeprefix(f"{block.name}.") in names
        )
        self.stack: Stack = min(own, key=lambda stack: stack.parameter.numel())

    @property
    def module(self) -> nn.Module:
        """What has the router and the experts."""
        return self.block.module.get_submodule(self.path)

    @property
    def number(self) -> int:
        """Experts that there are."""
        return self.role.number

    @property
    def site(self) -> Site:
        """For `cut_model`."""
        return Site(self.block, self.role, tuple(self.stack.layers()))

    def twin(self, count: int) -> nn.Module | None:
        """Return the module without data for a number of experts; None where the model's class refuses it."""
        whole = self._make(self.role.entries[0], count)
        block = None if whole is None else block_of(whole, self.block.name)
        return None if block is None else block.get_submodule(self.path)

    def without(self, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """Return tensors of the module for those experts that stay.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            All parameters and buffers of the module, by name within it.
        kept : Tensor
            Boolean, shape (experts,).
        """
        whole = self._outside(tensors)
        changed = self.role.cut(whole, kept) | self.role.cut_buffers(whole, kept)
        return {**tensors, **self._inside(changed)}

    def works(self, call: BlockCall, count: int, groups: int) -> bool:
        """Whether the module computes with fewer experts what it does when the others are never chosen.

        Parameters
        ----------
        call : BlockCall
            A call of the module.
        count : int
            Experts that stay.
        groups : int
            Of experts beside each other, of which as many stay: the last ones of each go here.
        """
        twin = self.twin(count)
        if twin is None:
            return False
        probe = Probe(self.module, _short(call), positive=True)
        kept = (torch.arange(self.number) % (self.number // groups)) < count // groups
        tensors = {**probe.parameters, **probe.buffers}
        never = self._outside(tensors)
        for each in (*self.role.owned, *self.role.buffers):
            if never[each.name].ndim < 3 and each.name not in self._matrices:
                index = (~kept)[each.owner].nonzero().flatten()
                never[each.name] = never[each.name].index_fill(each.axis, index, _NEVER)
        # Nothing is found where more are chosen than there are.
        found = probe.tried(twin, self.without(tensors, kept))
        return agree(found, probe.tried(parameters=self._inside(never)))

    def _outside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{self.path}.{name}" if self.path else name: each for name, each in tensors.items()}

    def _inside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(f"{self.path}.") if self.path else name: each for name, each in tensors.items()}


class Mixtures:
    """Finds the experts of a model's blocks.

    Parameters
    ----------
    model : PreTrainedModel
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._skeletons = Skeletons(model)
        self._known: dict[tuple[object, ...], tuple[str, int] | None] = {}

        @cache
        def make(entry: str, value: int) -> nn.Module | None:
            return self._skeletons.make({entry: value})

        self._make: _Make = make

    @property
    def unsaid(self) -> str:
        """A reason where nothing is found."""
        return f"{self._skeletons.unsaid} fewer experts".replace("the configuration", "The configuration", 1)

    def of(self, replay: Replay, position: int, keep: Callable[[int], int]) -> tuple[Mixture, int] | None:
        """Return the experts of a block, and the number of groups of which as many have to stay; None without experts.

        Parameters
        ----------
        replay : Replay
            At the block.
        position : int
            Of the block.
        keep : callable
            Returns how many of a number of experts stay.
        """
        block = replay.order[position]
        kind, candidates = signature(block), self._candidates(block)
        if kind not in self._known:
            calls = _calls(candidates, replay, position)
            working = (
                (each.role.entries[0], groups)
                for each, call in zip(candidates, calls, strict=True)
                for groups in _groups(each.number, keep(each.number))
                if call is not None and each.works(call, keep(each.number), groups)
            )
            self._known[kind] = next(working, None)
        known = self._known[kind]
        if known is None:
            return None
        return next((each, known[1]) for each in candidates if each.role.entries[0] == known[0])

    def _candidates(self, block: Block) -> Sequence[Mixture]:
        names = {stack.name: stack.number for stack in stacks(block.module) if stack.number > 1}
        numbers, found = set(names.values()), []
        for entry, value in self._skeletons.values(block.name).items():
            if type(value) is not int or value not in numbers:
                continue
            whole = self._make(entry, value - 1)
            twin = None if whole is None else block_of(whole, block.name)
            if twin is None:
                continue
            parameters = _owned(dict(block.module.named_parameters()), dict(twin.named_parameters()), value)
            buffers = _owned(dict(block.module.named_buffers()), dict(twin.named_buffers()), value)
            consumer = next((each for each in parameters or () if each.name in names), None)
            # Beside the matrices there must be something that chooses between them.
            if parameters is None or buffers is None or consumer is None or all(x.name in names for x in parameters):
                continue
            others = tuple(each for each in parameters if each is not consumer)
            fields = Fields({entry: Fraction(1)})
            role = Role(
                consumer.name, "experts", consumer.axis, consumer.owner, others, value, 0, fields, tuple(buffers)
            )
            found.append(Mixture(block, role, self._make))
        return found


def _groups(number: int, keep: int) -> Sequence[int]:
    """Return how many groups of experts there may be, of which as many stay."""
    return [groups for groups in range(1, keep + 1) if number % groups == keep % groups == 0]


def _owned(old: Mapping[str, Tensor], new: Mapping[str, Tensor], number: int) -> list[Owned] | None:
    """Return the slices of an expert in tensors that are smaller with one expert less; None where others differ."""
    if old.keys() != new.keys():
        return None
    found = []
    for name, tensor in old.items():
        pairs = list(zip(tensor.shape, new[name].shape, strict=False))
        axes = [axis for axis, (before, after) in enumerate(pairs) if before != after]
        if tensor.ndim != new[name].ndim or len(axes) > 1:
            return None
        for axis in axes:
            before, after = pairs[axis]
            if before % number or after * number != before * (number - 1):
                return None
            found.append(Owned(name, axis, torch.arange(before) // (before // number)))
    return found


def _calls(candidates: Sequence[Mixture], replay: Replay, position: int) -> list[BlockCall | None]:
    """Return a call of each candidate's module in a run of the block on the first batch."""
    calls: list[BlockCall | None] = [None] * len(candidates)

    def watch(number: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            calls[number] = BlockCall(args, kwargs)

        return see

    with ExitStack() as undo:
        for number, each in enumerate(candidates):
            undo.callback(each.module.register_forward_pre_hook(watch(number), with_kwargs=True).remove)
        if candidates:
            replay.output(position, 0)
    return calls


def _short(call: BlockCall) -> BlockCall:
    """Return a call with a few of the tokens."""
    first = first_tensor((call.args, call.kwargs))

    def cut(value: object) -> object:
        if not isinstance(value, Tensor) or value.shape[: first.ndim - 1] != first.shape[:-1]:
            return value
        return value[:_SHORT] if first.ndim == 2 else value[:1, :_SHORT]

    return BlockCall(*tree_map(cut, (call.args, call.kwargs)))
