"""Matrices that are stacked in one parameter, such as those of experts, and the products in which models use them.

Parameters of shape (E, p, q) hold E matrices that no module stands for, so that no hook sees their inputs. Here the
products themselves are observed, one level below the model's code: whatever a matrix is multiplied by is its input,
in any architecture that multiplies by views of the parameter.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models.layers import Layer, is_linear
from maskopt.models.offload import changes

__all__ = ["Products", "Stack", "StackedLayer", "eager_experts", "in_groups", "matrices_in", "refuse_use", "stacks"]


class Stack:
    """A parameter of shape (E, p, q), or (E p, q), that holds E matrices.

    Parameters
    ----------
    name : str
        Full name of the parameter, such as ``model.layers.0.mlp.experts.gate_up_proj``.
    module : nn.Module
        The module that has it.

    Attributes
    ----------
    number : int
        E.
    transposed : bool
        Whether the matrices are stored as (in, out). What the module says (`is_transposed`), or what follows from the
        shapes of two stacks of which the second reads what the first writes; where a product of the model shows
        otherwise, it is right (`Products`).
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.key = name.rpartition(".")[2]
        self.number = matrices_in(module, self.parameter)
        self.transposed = _is_transposed(module)

    @property
    def owner(self) -> str:
        """Full name of the module."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> Tensor:
        """The parameter, as the module has it now."""
        parameter = self.module._parameters[self.key]
        assert parameter is not None
        return parameter

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, p, q)."""
        *_, columns = self.parameter.shape
        return self.number, self.parameter.numel() // (self.number * columns), columns

    def layers(self) -> list[StackedLayer]:
        """Return its matrices."""
        return [StackedLayer(f"{self.name}.{i}", self.module, self, i) for i in range(self.number)]


@dataclass(frozen=True, eq=False)
class StackedLayer(Layer):
    """One matrix of a stack.

    Parameters
    ----------
    name : str
        That of the parameter, and the number of the matrix: ``model.layers.0.mlp.experts.gate_up_proj.3``.
    module : nn.Module
        The module that has the parameter.
    stack : Stack
    index : int
        Of the matrix.
    """

    stack: Stack
    index: int

    @property
    def parameter(self) -> Tensor:
        return self.stack.parameter

    @property
    def transposed(self) -> bool:
        return self.stack.transposed

    @property
    def weight(self) -> Tensor:
        return self.part(self.parameter.detach())

    @property
    def identity(self) -> tuple[int, int]:
        return id(self.parameter), self.index

    def part(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.stack.shape)[self.index]

    def swap(self, weight: Tensor) -> Tensor:
        own = self.weight
        before = own.clone()
        own.copy_(weight)
        return before


def stacks(module: nn.Module, name: str = "") -> Iterator[Stack]:
    """Yield the parameters in a module that may be stacked matrices, each once, in order.

    Whether a model multiplies by them shows when it runs (`Products`).

    Parameters
    ----------
    module : nn.Module
    name : str
        Full name of the module; empty for a whole model.

    Yields
    ------
    Stack
    """
    for inner, child in module.named_modules(prefix=name):
        for key, parameter in child.named_parameters(recurse=False):
            if matrices_in(child, parameter):
                yield Stack(f"{inner}.{key}" if inner else key, child)


def matrices_in(module: nn.Module, parameter: Tensor) -> int:
    """Return how many matrices may be stacked in a parameter of a module; 0 where it is no stack.

    Stacks are the parameters of three axes, none of length one, of modules other than convolutions. Classes of experts
    may also have a single matrix, or two axes and say how many matrices lie one below the other
    (``moe_num_experts``).

    Parameters
    ----------
    module : nn.Module
    parameter : Tensor
    """
    experts = "Expert" in type(module).__name__
    if parameter.ndim == 3 and not isinstance(module, _ConvNd):
        number, *sides = parameter.shape
        return number if min(sides) > 1 and (number > 1 or experts) else 0
    if parameter.ndim == 2 and experts and not is_linear(module):
        number = next(
            (getattr(module, name, 0) for name in ("num_experts", "moe_num_experts") if name in vars(module)), 0
        )
        if number and len(parameter) % number == 0 and min(len(parameter) // number, parameter.shape[1]) > 1:
            return int(number)
    return 0


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module's stacks are stored as (in, out), as far as can be told without running it."""
    known = getattr(module, "is_transposed", None)
    if isinstance(known, bool):
        return known
    own = [tuple(p.shape) for p in module.parameters(recurse=False) if p.ndim == 3 and matrices_in(module, p)]
    # The last one reads what functions of the outputs of the first make, and writes what the first reads.
    if len(own) > 1:
        (_, first, second), (_, third, fourth) = own[0], own[-1]
        return first == fourth and second != third
    return False


@contextmanager
def eager_experts(model: PreTrainedModel, layers: Iterable[Layer]) -> Iterator[None]:
    """Let a model multiply by views of its stacks, expert by expert, inside the block.

    Other implementations of experts in transformers (grouped or batched products) copy or reorder them.

    Parameters
    ----------
    model : PreTrainedModel
    layers : iterable of Layer
        Layers to observe; where none is stacked, nothing changes.
    """
    if not any(isinstance(layer, StackedLayer) for layer in layers):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


_PRODUCTS: Mapping[Any, int] = {
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.mv: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.baddbmm: 1,
    torch.ops.aten.addmv: 1,
}
"""Where among the arguments the first factor is."""
_COPIES = frozenset((torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy, torch.ops.aten.copy_))
"""Elementwise operations that hide matrices: the model may multiply by the copy."""


@dataclass(frozen=True)
class _View:
    """A tensor that is (part of) a stack's parameter; `start` is its first entry in the flat parameter."""

    stack: Stack
    tensor: Tensor
    start: int

    def matrices(self) -> list[int] | None:
        """Return which matrix each one of the (broadcast) batch is, None if the view is not made of whole matrices."""
        _, p, q = self.stack.shape
        shape, stride = self.tensor.shape, self.tensor.stride()
        if self.flipped is None:
            return None
        steps = range(shape[0]) if len(shape) == 3 else range(1)
        starts = [self.start + (step * stride[0] if len(shape) == 3 else 0) for step in steps]
        return [start // (p * q) for start in starts] if all(start % (p * q) == 0 for start in starts) else None

    @property
    def flipped(self) -> bool | None:
        """Whether the matrices are turned against how they are stored; None if they are not whole."""
        _, p, q = self.stack.shape
        kind = *self.tensor.shape[-2:], *self.tensor.stride()[-2:]
        return {(p, q, q, 1): False, (q, p, 1, q): True}.get(kind)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that passes on what stacked matrices are multiplied by.

    Every operation of torch inside the block is looked at. A product with a matrix of a stack is a call of it: the
    other factor is its input, and the axis that is summed over is that of its inputs. In a batched product of all
    matrices, rows that are zero belong to tokens that were not routed to a matrix.

    Parameters
    ----------
    stacks : iterable of Stack
    see : callable
        Called with the stack, the index of the matrix and its inputs, shape (tokens, d).
    unused : callable
        Called with the stack and the name of an elementwise operation or a convolution, for which it may be no stack
        of matrices; by default this is refused.

    Raises
    ------
    MaskoptError
        Inside the block, where a stack is copied, multiplied in parts, or its matrices from both sides.
    """

    def __init__(
        self,
        stacks: Iterable[Stack],
        see: Callable[[Stack, int, Tensor], None],
        unused: Callable[[Stack, str], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        self._unused = refuse_use if unused is None else unused
        self._all = list(stacks)
        self._multiplied: set[Stack] = set()
        self._find()

    def _find(self) -> None:
        """Find the stacks that are in memory."""
        self._changes = changes()
        loaded = (stack for stack in self._all if not stack.parameter.is_meta)
        self._stacks = sorted(loaded, key=lambda stack: stack.parameter.data_ptr())
        for stack in self._stacks:
            if not stack.parameter.is_contiguous():
                raise MaskoptError(f"The parameter {stack.name} is not contiguous in memory; load the model again.")
        self._starts = [stack.parameter.data_ptr() for stack in self._stacks]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._changes != changes():
            self._find()
        views = [view for view in map(self._view, _tensors(args)) if view is not None]
        if views:
            first = _PRODUCTS.get(func.overloadpacket)
            if first is not None:
                self._multiply(str(func.overloadpacket), args[first], args[first + 1])
        output = func(*args, **kwargs)
        if views and first is None and not any(map(self._view, tree_leaves(output))):
            self._use(views[0].stack, func)
        return output

    def _view(self, tensor: Any) -> _View | None:
        """Return a tensor as a view of a stack, None where it is none."""
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return None
        address = tensor.data_ptr()
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        stack, distance = self._stacks[place], address - self._starts[place]
        size = stack.parameter.element_size()
        return _View(stack, tensor, distance // size) if distance < stack.parameter.numel() * size else None

    def _use(self, stack: Stack, func: Any) -> None:
        name = str(func.overloadpacket)
        elementwise = torch.Tag.pointwise in func.tags and func.overloadpacket not in _COPIES
        if elementwise or func.overloadpacket is torch.ops.aten.convolution:
            self._unused(stack, name)
        else:
            refuse_use(stack, name)

    def _multiply(self, operation: str, left: Tensor, right: Tensor) -> None:
        """Pass on the inputs of a product's matrices."""
        first, second = self._view(left), self._view(right)
        view, other = (first, right) if second is None else (second, left)
        assert view is not None
        indices = view.matrices()
        if indices is None or view.flipped is None or (first is not None and second is not None):
            refuse_use(view.stack, f"{operation} in parts")
        # The last axis of the left factor is summed over, and the last but one of the right factor.
        transposed = view.flipped is (first is not None)
        stack = view.stack
        if stack not in self._multiplied:
            self._multiplied.add(stack)
            stack.transposed = transposed
        elif stack.transposed != transposed:
            refuse_use(stack, f"{operation} from both sides")
        inputs = other.unsqueeze(-1).mT if other.ndim == 1 else other.mT if second is None else other
        if inputs.ndim == 2:
            self._see(stack, indices[0], inputs)
            return
        for index, rows in zip(indices, inputs, strict=True):
            self._see(stack, index, rows)


def refuse_use(stack: Stack, operation: str) -> NoReturn:
    """Refuse a stack whose matrices' inputs are not known.

    Parameters
    ----------
    stack : Stack
    operation : str
        What uses it.

    Raises
    ------
    MaskoptError
    """
    raise MaskoptError(
        f"The matrices stacked in {stack.name} are used by {operation.removeprefix('aten.')}, in which their inputs "
        f"cannot be told apart; exclude '*.{stack.owner.rpartition('.')[2]}*' to leave them dense."
    )


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def in_groups(turns: Iterable[Sequence[Layer]], memory: int) -> list[tuple[Layer, ...]]:
    """Cut turns so that the Gram matrices of stacked layers in one of them fit the memory, as far as one does.

    What experts are multiplied by does not depend on the other experts of the same stack, so that it does not matter
    which are pruned already.

    Parameters
    ----------
    turns : iterable of sequence of Layer
    memory : int
        Bytes.

    Returns
    -------
    list of tuple of Layer
        Layers of modules stay in the first part of their turn.
    """
    parts: list[tuple[Layer, ...]] = []
    for turn in turns:
        part = [layer for layer in turn if not isinstance(layer, StackedLayer)]
        used = 0
        for layer in turn:
            if isinstance(layer, StackedLayer):
                size = 4 * layer.shape[1] ** 2
                if used and used + size > memory:
                    parts.append(tuple(part))
                    part, used = [], 0
                part.append(layer)
                used += size
        parts.append(tuple(part))
    return parts
