"""Calls of layers: what observes the inputs of modules and of stacked matrices, and the order of the first calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from maskopt.errors import MaskoptError
from maskopt.models.blocks import Block
from maskopt.models.experts import Products, Stack, StackedLayer, refuse_use
from maskopt.models.layers import Layer, LinearLayer

__all__ = ["CallOrder", "Inputs", "identity"]


class Inputs(ABC):
    """Context manager that observes layers and passes their inputs on, call by call.

    Those of modules go to `_see`, those of stacked matrices to `_see_stacked`, whether or not all matrices of a stack
    are among the layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._hooks: list[RemovableHandle] = []
        self._modules = [layer for layer in layers if isinstance(layer, LinearLayer)]
        self._stacked: dict[Stack, dict[int, StackedLayer]] = {}
        for layer in layers:
            if isinstance(layer, StackedLayer):
                self._stacked.setdefault(layer.stack, {})[layer.index] = layer
        self._products: Products | None = None

    @abstractmethod
    def _see(self, layer: Layer, x: Tensor) -> None: ...

    def _see_stacked(self, stack: Stack, index: int, x: Tensor) -> None:  # noqa: B027 - not all observe stacks
        """Take the inputs of a matrix of a stack, shape (tokens, d)."""

    def _observe(self) -> Products | None:
        """Return what observes the stacks; nothing by default."""
        return None

    def __enter__(self) -> Self:
        self._products = self._observe()
        for layer in self._modules:

            def hook(module: Any, args: Any, kwargs: Any, layer: Layer = layer) -> None:
                self._see(layer, args[0] if args else next(iter(kwargs.values())))

            self._hooks.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        if self._products is not None:
            self._products.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._products is not None:
            self._products.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
            self._products = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._release()

    @abstractmethod
    def _release(self) -> None:
        """Drop references to tensors that only serve while the hooks are in place."""


class CallOrder(Inputs):
    """Context manager that records in which order layers are first called, and which have the same input tensor.

    It computes nothing from the inputs, except to compare the outputs of subclasses of nn.Linear (`check`). All
    matrices of a stack count as called with the first of them: a router may leave any of them out.

    Parameters
    ----------
    blocks : mapping of Block to sequence of Layer
        The layers of each block; only layers of one block are grouped by their input.
    outside : sequence of Layer
        Layers outside the blocks.
    """

    def __init__(self, blocks: Mapping[Block, Sequence[Layer]], outside: Sequence[Layer] = ()) -> None:
        super().__init__([layer for layers in (*blocks.values(), outside) for layer in layers])
        self._block_of = {layer: block for block, layers in blocks.items() for layer in layers}
        self._current: Block | None = None
        self._groups: dict[Layer, list[Layer]] = {}
        self._sizes: dict[int, int] = {}
        self._nonlinear: Layer | None = None  # the first that does more than multiply
        self._multiplied: set[Stack] = set()
        self.elsewise: dict[Stack, str] = {}
        """Parameters that are stacked matrices by their shape only, and the elementwise operation that uses them."""
        # The references keep the addresses of a block's tensors from being used again.
        self._seen: dict[tuple[object, ...], tuple[Tensor, list[Layer]]] = {}

    def _release(self) -> None:
        self._seen.clear()

    def _see(self, layer: Layer, x: Tensor) -> None:
        block = self._block_of.get(layer)
        if block is not self._current:
            self._current = block
            self._seen.clear()
        if layer not in self._groups:
            _, group = self._seen.setdefault(identity(x), (x, []))
            group.append(layer)
            self._groups[layer] = group
            self._sizes[id(group)] = x.numel() * x.element_size()

    def _observe(self) -> Products | None:
        return Products(self._stacked, self._see_stacked, self._unused) if self._stacked else None

    def _see_stacked(self, stack: Stack, index: int, x: Tensor) -> None:
        if stack in self._multiplied:
            return
        self._multiplied.add(stack)
        for layer in self._stacked[stack].values():
            self._groups[layer] = [layer]
            self._sizes[id(self._groups[layer])] = 0  # no inputs of the dense model are kept

    def _unused(self, stack: Stack, operation: str) -> None:
        self.elsewise.setdefault(stack, operation)

    def __enter__(self) -> Self:
        super().__enter__()
        for layer in self._modules:
            if type(layer.module).forward not in (nn.Linear.forward, Conv1D.forward):
                hook = partial(self._compare, layer)
                self._hooks.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def _compare(self, layer: Layer, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Record a subclass of nn.Linear whose output is not its weight times its input."""
        if self._nonlinear is not None or not isinstance(output, Tensor):
            return  # routers return choices made from the product
        x = args[0] if args else next(iter(kwargs.values()))
        weight, bias = layer.oriented(layer.weight), getattr(layer.module, "bias", None)
        if x.dtype == weight.dtype:
            product = nn.functional.linear(x, weight, bias)
            size = float(product.float().nan_to_num().abs().amax()) if product.numel() else 0.0
            rounding = 1e-4 if x.dtype in (torch.float32, torch.float64) else 2e-2
            if output.shape == product.shape and torch.allclose(
                output.float(), product.float(), rtol=0.0, atol=rounding * size, equal_nan=True
            ):
                return
        self._nonlinear = layer

    def check(self) -> None:
        """Check that outputs of layers are their weights times their inputs, as reconstruction from a Gram assumes.

        Raises
        ------
        MaskoptError
            With the name of the first layer for which they are not.
        """
        for stack in self._multiplied & self.elsewise.keys():
            refuse_use(stack, self.elsewise[stack])
        layer = self._nonlinear
        if layer is not None:
            raise MaskoptError(
                f"The layer {layer.name} is a {type(layer.module).__name__}, which does more than multiply its "
                f"input by its weight; exclude it to leave it dense."
            )

    def __contains__(self, layer: Layer) -> bool:
        return layer in self._groups

    def groups(self, layers: Iterable[Layer]) -> list[list[Layer]]:
        """Return the called ones of some layers, in order, grouped where they have the same input tensor."""
        wanted = set(layers)
        groups = {id(group): group for group in self._groups.values()}
        chosen = ([layer for layer in group if layer in wanted] for group in groups.values())
        return [group for group in chosen if group]

    def size(self, layers: Iterable[Layer]) -> int:
        """Return the bytes of some layers' input tensors in their first calls, each tensor once."""
        return sum(self._sizes[group] for group in {id(self._groups[layer]) for layer in layers})


def identity(x: Tensor) -> tuple[object, ...]:
    """Return a key that two tensors have in common only if they are the same, as long as both exist.

    Parameters
    ----------
    x : Tensor
    """
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version
