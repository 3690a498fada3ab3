"""Neurons and attention heads that a block can lose, and what its configuration has to say then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models.blocks import Block, find_blocks
from maskopt.models.experts import StackedLayer, eager_experts, stacks
from maskopt.models.layers import Layer, linear_layers
from maskopt.shrinking.configuration import Fields, Skeletons, fields_for, fields_together, works_narrower
from maskopt.shrinking.dependence import BlockCall, Owned, Probe

__all__ = ["Kind", "Refused", "Role", "Site", "Structure", "find_units", "signature"]

Kind = Literal["neurons", "heads", "experts"]
_POSITIONS = 16  # of the call that shows what depends on what


@dataclass(frozen=True, eq=False)
class Role:
    """What consumers of the same name in equal blocks have in common.

    Attributes
    ----------
    consumer : str
        Name of the consumer's weight within the block.
    kind : {"neurons", "heads", "experts"}
        Whole experts (`drop_experts`) are no inputs of a consumer; theirs is one of the parameters that hold them.
    column_axis : int
        The axis of the weight that its inputs are on.
    units : Tensor
        The unit of every input, int64, shape (inputs,).
    owned : tuple of Owned
        Slices of other parameters that go with a unit.
    number : int
        Units.
    experts : int
        Matrices in the consumer's weight, each with units of its own; 0 where it is a matrix.
    fields : Fields or None
        What the configuration says about the number of units; None where it cannot, and the block's modules compute
        with narrower weights all the same.
    buffers : tuple of Owned
        Slices of buffers that go with a unit.
    """

    consumer: str
    kind: Kind
    column_axis: int
    units: Tensor
    owned: tuple[Owned, ...]
    number: int
    experts: int
    fields: Fields | None = None
    buffers: tuple[Owned, ...] = ()

    @property
    def width(self) -> int:
        """Inputs of the consumer for each unit."""
        return len(self.units) // self.number

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of the configuration that count the units."""
        return () if self.fields is None else tuple(self.fields.scaled)

    def parameters(self, shapes: Mapping[str, torch.Size]) -> int:
        """Return how many parameters of a block go with one unit (of every expert)."""
        total = shapes[self.consumer].numel() // self.number
        for each in self.owned:
            total += shapes[each.name].numel() // len(each.owner) * int((each.owner == 0).sum())
        return total

    def cut(self, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """Return the narrower tensors of a block.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            By name within the block; those of the consumer and of its owned slices, at least.
        kept : Tensor
            Units that stay, boolean, shape (units,), or (experts, units) with as many in every row.

        Returns
        -------
        dict of str to Tensor
            Those that change.
        """
        found = {self.consumer: _selected(tensors[self.consumer], self.column_axis, kept[..., self.units])}
        return found | _slices(tensors, self.owned, kept)

    def cut_buffers(self, buffers: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """Return the narrower buffers of a block, those that change, as `cut` does of parameters."""
        return _slices(buffers, self.buffers, kept)

    def columns(self, kept: Tensor) -> Tensor:
        """Return which columns of the consumer stay, boolean, of a shape that broadcasts to the weight's.

        Parameters
        ----------
        kept : Tensor
            As for `cut`.
        """
        stays = kept[..., self.units]
        axes = 3 if self.experts else 2
        return stays.unsqueeze(axes - 1 if self.column_axis < axes - 1 else axes - 2)


def _slices(tensors: Mapping[str, Tensor], owned: Iterable[Owned], kept: Tensor) -> dict[str, Tensor]:
    """Return tensors without the slices of units that go."""
    return {
        each.name: _selected(tensors[each.name], each.axis, kept[..., each.owner.clamp_min(0)] | (each.owner < 0))
        for each in owned
    }


def _selected(tensor: Tensor, axis: int, stays: Tensor) -> Tensor:
    """Return the slices along an axis that stay, boolean, shape (slices,) or (experts, slices)."""
    stays = stays.to(tensor.device)
    if stays.ndim == 1:
        return tensor.index_select(axis, stays.nonzero().flatten())
    rows = [_selected(matrix, axis - 1, each) for matrix, each in zip(tensor, stays, strict=True)]
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Site:
    """A consumer in one block.

    Attributes
    ----------
    block : Block
    role : Role
    layers : tuple of Layer
        The consumer, or its matrices where it has several.
    """

    block: Block
    role: Role
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """Full name of the consumer."""
        first = self.layers[0]
        return first.stack.name if isinstance(first, StackedLayer) else first.name

    @property
    def size(self) -> int:
        """Parameters that go with one unit (of every expert)."""
        return self.role.parameters({name: each.shape for name, each in self.block.module.named_parameters()})


@dataclass(frozen=True)
class Refused:
    """A layer whose inputs cannot be removed, and why.

    Attributes
    ----------
    name : str
    kind : {"neurons", "heads"}
    reason : str
    """

    name: str
    kind: Kind
    reason: str


@dataclass
class Structure:
    """What a model can lose.

    Attributes
    ----------
    sites : list of Site
        In the order of the model.
    refused : list of Refused
    unsaid : str
        How a reason begins why something is refused.
    """

    sites: list[Site] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    unsaid: str = ""

    def of(self, kind: Kind) -> list[Site]:
        """Return the sites of a kind."""
        return [site for site in self.sites if site.role.kind == kind]


def find_units(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Structure:
    """Find the neurons and attention heads that a model's blocks can lose so that its configuration can say it.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode. Each kind of block is copied once, with random weights, to the CPU.
    inputs : mapping of str to object
        Keyword arguments of the model's forward; the beginning of the first sequence is used.

    Returns
    -------
    Structure

    Raises
    ------
    MaskoptError
        If blocks share parameters with each other, or no block is called.
    """
    blocks = find_blocks(model)
    _check_apart(blocks)
    layers = [layer for block in blocks for stack in stacks(block.module, block.name) for layer in stack.layers()]
    with eager_experts(model, layers):
        calls = _calls(model, blocks, inputs)
        skeletons = Skeletons(model)
        known: dict[tuple[object, ...], list[Role | Refused]] = {}
        structure = Structure(unsaid=skeletons.unsaid)
        for block in blocks:
            if block not in calls:
                continue
            key = (signature(block), tuple(sorted(skeletons.own.get(block.name, {}).items())))
            if key not in known:
                known[key] = list(_roles(block, calls[block], skeletons))
            for found in known[key]:
                if isinstance(found, Role):
                    structure.sites.append(Site(block, found, _consumers(block, found)))
                else:
                    structure.refused.append(
                        Refused(f"{block.name}.{found.name}".rstrip("."), found.kind, found.reason)
                    )
    return structure


def _roles(block: Block, call: BlockCall, skeletons: Skeletons) -> Iterator[Role | Refused]:
    """Yield what a block can lose."""
    heads = [skeletons.value(block.name, name) for name in ("num_key_value_heads", "num_attention_heads")]
    try:
        probe = Probe(block.module, call)
        roles = [
            role
            for consumer, axis, inputs, experts in _candidates(block)
            if (role := _role(heads, probe, consumer, axis, inputs, experts)) is not None
        ]
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        # Whatever a module does with weights that are not its own: nothing is known of it then.
        yield Refused("", "neurons", f"the block cannot be run by itself ({type(error).__name__})")
        return
    known = [fields_for(skeletons, probe, block, role) for role in roles]
    unknown = [number for number, fields in enumerate(known) if fields is None]
    together = fields_together(skeletons, probe, block, [roles[number] for number in unknown])
    for number, fields in zip(unknown, together, strict=True):
        known[number] = fields
    for role, fields in zip(roles, known, strict=True):
        if fields is not None:
            yield replace(role, fields=fields)
        elif works_narrower(skeletons, probe, block, role):
            yield role
        else:
            yield Refused(role.consumer.removesuffix(".weight"), role.kind, f"{skeletons.unsaid} fewer {role.kind}")


def _role(heads: Sequence[Any], probe: Probe, consumer: str, axis: int, inputs: int, experts: int) -> Role | None:
    """Return what a weight consumes: the units that most parameters go with, single inputs rather than groups."""
    best: Role | None = None
    for kind, units in _partitions(heads, inputs):
        owned = tuple(probe.owned(consumer, axis, units))
        if not owned or not all(_of_each(probe.shapes[each.name], each.axis, experts) for each in owned):
            continue
        role = Role(consumer, kind, axis, units, owned, int(units.max()) + 1, experts)
        if best is None or role.number * role.parameters(probe.shapes) > best.number * best.parameters(probe.shapes):
            best = role
        if probe.all_owned(consumer, owned):
            break  # larger units own no more
    if best is not None and best.kind == "neurons" and probe.is_linear(best.consumer, best.owned):
        return None  # a matrix in two factors of low rank
    return best


def _of_each(shape: torch.Size, axis: int, experts: int) -> bool:
    """Whether every expert has slices of its own along an axis of a parameter; True where there are no experts."""
    return not experts or (shape[0] == experts and axis > 0)


def _candidates(block: Block) -> Iterator[tuple[str, int, int, int]]:
    """Yield the weights of a block that may be consumers: name, axis of the inputs, inputs, matrices."""
    for layer in linear_layers(block.module):
        yield f"{layer.name}.weight", 0 if layer.transposed else 1, layer.shape[1], 0
    for stack in stacks(block.module):
        if stack.parameter.ndim == 3:
            axis = 1 if stack.transposed else 2
            yield stack.name, axis, stack.parameter.shape[axis], stack.number


def _partitions(heads: Sequence[Any], inputs: int) -> Iterator[tuple[Kind, Tensor]]:
    """Yield the units that a layer's inputs may consist of: single ones, groups of heads with the same keys, heads."""
    yield "neurons", torch.arange(inputs)
    tried = set()
    for number in heads:
        if isinstance(number, int) and 1 < number < inputs and inputs % number == 0 and number not in tried:
            tried.add(number)
            yield "heads", torch.arange(inputs) // (inputs // number)


def _consumers(block: Block, role: Role) -> tuple[Layer, ...]:
    if role.experts:
        stack = next(each for each in stacks(block.module, block.name) if each.name == f"{block.name}.{role.consumer}")
        return tuple(stack.layers())
    name = f"{block.name}.{role.consumer}".removesuffix(".weight")
    return (next(layer for layer in linear_layers(block.module, block.name) if layer.name == name),)


def signature(block: Block) -> tuple[object, ...]:
    """Return what blocks that are built alike have in common.

    Parameters
    ----------
    block : Block
    """
    parameters = tuple((name, tuple(each.shape)) for name, each in block.module.named_parameters())
    return (type(block.module), parameters)


def _check_apart(blocks: Sequence[Block]) -> None:
    owner: dict[int, Block] = {}
    for block in blocks:
        for name, parameter in block.module.named_parameters():
            other = owner.setdefault(id(parameter), block)
            if other.module is not block.module:
                raise MaskoptError(
                    f"The blocks {other.name} and {block.name} have the parameter {name} in common, so that they "
                    f"cannot lose units of their own."
                )


def _calls(model: PreTrainedModel, blocks: Iterable[Block], inputs: Mapping[str, Any]) -> dict[Block, BlockCall]:
    """Return the arguments of the first call of each kind of block, for all blocks that are called."""
    calls: dict[Block, BlockCall] = {}
    by_kind: dict[tuple[object, ...], BlockCall] = {}

    def watch(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            calls.setdefault(block, by_kind.setdefault(signature(block), BlockCall(args, dict(kwargs))))

        return hook

    hooks = [block.module.register_forward_pre_hook(watch(block), with_kwargs=True) for block in blocks]
    short = {
        key: value[:1, :_POSITIONS] if isinstance(value, Tensor) and value.ndim == 2 else value
        for key, value in inputs.items()
    }
    try:
        with torch.no_grad():
            model(**short, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise MaskoptError("The calibration data call no block of the model.")
    return calls
