"""The residual stream inside a block: which layers add to it, and what it has lost behind pruned layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from maskopt.models.blocks import Block
from maskopt.models.layers import Layer, is_linear
from maskopt.models.reuse import Course
from maskopt.models.states import States, first_tensor

__all__ = ["Lost", "Target", "writers"]

Target = Literal["stream", "layer"]

_ROUNDINGS = 4  # of the largest summand, that an output may differ from the sum by
_LEAST = 1e-3  # factor


def writers(block: Block, run: Callable[[], Tensor]) -> dict[nn.Module, float]:
    """Return the linear layers of a block whose output is added to the block's input, and with which factor.

    While everything as wide as the stream that linear layers and experts return is zero, a block with a residual stream
    returns its input, and a layer that adds to the stream and returns some numbers instead has it return their sum.
    What is normed on its way to the stream (Gemma 3) or weighed token by token (experts), and a stream that is normed
    itself (BERT), is not found.

    Parameters
    ----------
    block : Block
    run : callable
        Runs the block, always with the same input, and returns its hidden states.
    """
    modules = list(block.module.modules())
    shapes: dict[nn.Module, torch.Size] = {}
    state = numbers = torch.empty(0)
    tried: nn.Module | None = None

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal state
        state = first_tensor((args, kwargs)).clone()

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if module is tried:
            return numbers.view(output.shape)
        if isinstance(output, Tensor):
            shapes[module] = output.shape
        width = state.shape[-1:]
        return tree_map_only(Tensor, lambda leaf: torch.zeros_like(leaf) if leaf.shape[-1:] == width else leaf, output)

    with ExitStack() as undo:
        undo.callback(block.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for module in [m for m in modules if is_linear(m) or _has_stacks(m)]:
            undo.callback(module.register_forward_hook(leave).remove)
        try:
            base = run()
            if base.shape != state.shape or not torch.equal(base, state):
                return {}
            numbers = _numbers_like(state)
            found = {}
            for tried in [m for m in modules if is_linear(m) and _fits(shapes.get(m), state.shape)]:
                factor = _factor(run(), state, numbers)
                if factor is not None:
                    found[tried] = factor
            return found
        except Exception:
            return {}  # a block that cannot be run with zeros is calibrated without


class Lost:
    """What the pruned model's residual stream lacks of the dense model's where a layer adds to it, batch by batch.

    At a block's start it is the difference of both models' states. Each layer that adds to the stream changes it by the
    difference of its outputs, once all layers before it have been chosen.

    Parameters
    ----------
    block : Block
    course : Course
        Its `writers` are all of the block's.
    layers : sequence of Layer
        Those that are chosen; one of them at least adds to the stream.
    """

    def __init__(self, block: Block, course: Course, layers: Sequence[Layer]) -> None:
        self._block, self._course = block.module, course
        own = {module: course.writers[module] for module in block.module.modules() if module in course.writers}
        self._aiming = {layer: own[layer.module] for layer in layers if layer.module in own}
        last = max(course.entered[layer.module] for layer in self._aiming)
        self._factors = {module: factor for module, factor in own.items() if course.left[module] < last}
        self._names = {module: name for name, module in block.module.named_modules()}
        self.states = States()
        self._index = 0

    def __contains__(self, layer: Layer) -> bool:
        """Whether a layer that is chosen adds to the stream."""
        return layer in self._aiming

    @property
    def tensors(self) -> int:
        """Number of hidden states that are kept of each batch, at most."""
        return 1 + len(self._factors)

    @contextmanager
    def dense(self, index: int) -> Iterator[None]:
        """Keep the dense model's part while its block runs on a batch."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.states.put(("stream", index), first_tensor((args, kwargs)), copy=True)

        def leave(module: nn.Module, args: Any, output: Tensor) -> None:
            self.states.put((self._names[module], index), output, copy=True)

        with ExitStack() as undo:
            undo.callback(self._block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module in self._factors:
                undo.callback(module.register_forward_hook(leave).remove)
            yield

    @contextmanager
    def pruned(self, index: int, turn: Sequence[Layer], *, first: bool) -> Iterator[None]:
        """Keep what is lost while the pruned model's block runs on a batch.

        Parameters
        ----------
        index : int
            Of the batch; one that the dense block did not run on is passed over.
        turn : sequence of Layer
            Layers that are calibrated by this run.
        first : bool
            Whether it is the block's first.
        """
        self._index = index
        if ("stream", index) not in self.states:
            yield
            return

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._add(index, first_tensor((args, kwargs)), -1.0)

        def leave(module: nn.Module, args: Any, output: Tensor) -> None:
            own = self.states.pop((self._names[module], index))
            self._add(index, own - output, self._factors[module])

        begins = min(self._course.entered.get(layer.module, 0) for layer in turn)  # an expert may not have been called
        with ExitStack() as undo:
            if first:
                undo.callback(self._block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module in self._factors:
                # Before the turn's layers all have been chosen, so that this output is final.
                if self._course.left[module] < begins and (self._names[module], index) in self.states:
                    undo.callback(module.register_forward_hook(leave).remove)
            yield

    def before(self, layer: Layer) -> Tensor | None:
        """Return what a layer would have to add to make up for all that was lost before it, in the batch that runs.

        Parameters
        ----------
        layer : Layer
            One that adds to the stream.

        Returns
        -------
        Tensor or None
            Of the shape of the block's hidden states; None where the dense block did not run on the batch.
        """
        key = "stream", self._index
        if key not in self.states:
            return None
        lost: Tensor = self.states.get(key)
        factor = self._aiming[layer]
        return lost if factor == 1.0 else lost / factor

    def _add(self, index: int, change: Tensor, factor: float) -> None:
        key = "stream", index
        before: Tensor = self.states.get(key)
        self.states.put(key, before + factor * change.view(before.shape))


def _has_stacks(module: nn.Module) -> bool:
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def _fits(shape: torch.Size | None, states: torch.Size) -> bool:
    return shape is not None and shape.numel() == states.numel() and shape[-1] == states[-1]


def _numbers_like(states: Tensor) -> Tensor:
    """Return random numbers of about the size of hidden states, none close to zero, and of tokens of several sizes."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.rand(states.shape, generator=random) + 1.0
    signs = torch.randint(0, 2, states.shape, generator=random) * 2 - 1
    # What is normed would make tokens equally large.
    tokens = 2.0 ** (torch.arange(states.shape[:-1].numel()) % 4).view(*states.shape[:-1], 1)
    size = float(states.float().square().mean().sqrt()) or 1.0
    return (drawn * signs * tokens * size).to(states)


def _factor(output: Tensor, states: Tensor, numbers: Tensor) -> float | None:
    """Return c where an output is the states plus c times some numbers, up to rounding; None where there is none."""
    change, wide = output.double() - states.double(), numbers.double()
    factor = float((change * wide).sum() / wide.square().sum())
    if not abs(factor) > _LEAST:
        return None
    size = torch.maximum(states.double().abs(), output.double().abs()) + abs(factor) * wide.abs()
    precise = bool(((change - factor * wide).abs() <= _ROUNDINGS * torch.finfo(states.dtype).eps * size).all())
    if not precise:
        return None
    return 1.0 if abs(factor - 1.0) <= torch.finfo(states.dtype).eps else factor
