"""Parts of a block that need not run again in a later turn, because nothing before them changes any more.

Layers of a block are chosen in turns, in the order of their calls. Once all layers up to a point are chosen, the output
of every module that returns before that point is final: it is computed once for each batch, kept, and given back in
later turns. Where a module returns the output of its last linear layer (attention: of its output projection), the
input of that layer is kept in the turn in which the layer is chosen, and the module's final output is one product.
So a block with turns runs about once, not once for each turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from maskopt.models.blocks import Block
from maskopt.models.calls import identity
from maskopt.models.layers import Layer, is_linear
from maskopt.models.states import States, tensor_bytes

__all__ = ["Course", "Reuse", "answering"]


@dataclass
class Course:
    """When the modules of blocks ran in a forward of the model.

    Attributes
    ----------
    entered, left : dict of Module to int
        Times of the first call and of the return from the last one.
    calls : dict of Module to int
    inputs, outputs : dict of Module to int
        Bytes of tensors in positional arguments, and in what was returned.
    ends : dict of Module to Module
        The linear layer whose output a module returned as it was.
    writers : dict of Module to float
        Linear layers whose output is added to the residual stream, and the factor, see `residual.writers`.
    """

    entered: dict[nn.Module, int] = field(default_factory=dict)
    left: dict[nn.Module, int] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    inputs: dict[nn.Module, int] = field(default_factory=dict)
    outputs: dict[nn.Module, int] = field(default_factory=dict)
    ends: dict[nn.Module, nn.Module] = field(default_factory=dict)
    writers: dict[nn.Module, float] = field(default_factory=dict)
    _shapes: dict[nn.Module, Callable[[Tensor], Any]] = field(default_factory=dict)

    @contextmanager
    def recording(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Record what runs inside the context.

        Parameters
        ----------
        blocks : sequence of Block
        """
        now = 0
        latest: tuple[nn.Module, object, Tensor] | None = None  # a linear layer, the identity of its output, the output

        def enter(module: nn.Module, args: Any) -> None:
            nonlocal now
            now += 1
            self.entered.setdefault(module, now)
            self.calls[module] = self.calls.get(module, 0) + 1
            self.inputs[module] = tensor_bytes(args)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal now, latest
            now += 1
            self.left[module] = now
            self.outputs[module] = tensor_bytes(output)
            if is_linear(module):
                # The reference keeps the address of the tensor from being used again.
                latest = (module, identity(output), output) if isinstance(output, Tensor) else None
                return
            self.ends.pop(module, None)
            leaves, structure = tree_flatten(output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            others = [leaf for leaf in leaves if leaf is not None]
            if latest is not None and len(tensors) == len(others) == 1 and identity(tensors[0]) == latest[1]:
                self.ends[module] = latest[0]
                place = next(i for i, leaf in enumerate(leaves) if leaf is not None)
                self._shapes[module] = partial(_filled, structure, place, len(leaves))

        with ExitStack() as undo:
            for module in {module for block in blocks for module in block.module.modules()}:
                undo.callback(module.register_forward_pre_hook(enter).remove)
                undo.callback(module.register_forward_hook(leave).remove)
            yield

    def wrapped(self, module: nn.Module, output: Tensor) -> Any:
        """Return what a module returns whose last layer returned `output`.

        Parameters
        ----------
        module : nn.Module
            One of `ends`.
        output : Tensor
        """
        return self._shapes[module](output)


class Reuse:
    """What modules of one block return on every batch, as far as it is final.

    Parameters
    ----------
    block : Block
    course : Course
        Of the first batch.

    Attributes
    ----------
    states : States
        Where outputs are kept.
    """

    def __init__(self, block: Block, course: Course) -> None:
        self._course, self.states = course, States()
        self._block = block.module
        self._names = {module: name for name, module in block.module.named_modules()}
        # Modules without layers are cheap; where a module runs several times, or not at all, outputs differ by call.
        self._modules = {
            module
            for module in self._names
            if module is not block.module and course.calls.get(module) == 1 and _has_layers(module)
        }

    def size(self, turns: Sequence[Sequence[Layer]]) -> int:
        """Return the most bytes that are kept at a time of the first batch.

        Parameters
        ----------
        turns : sequence of sequence of Layer
            In order.
        """
        most, kept = 0, dict[nn.Module, int]()
        for index, turn in enumerate(turns):
            later = [layer for other in turns[index + 1 :] for layer in other]
            ended = self._ended(turn, later)
            for module in self._outermost(self._block, self._first([*turn, *later])):
                parts = set(module.modules())
                kept = {other: size for other, size in kept.items() if other not in parts}
                if not _inside(module, ended):
                    kept[module] = self._course.outputs[module]
            kept |= {module: self._course.inputs[end] for module, end in ended.items()}
            most = max(most, sum(kept.values()))
        return most

    @contextmanager
    def on(self, index: int, turn: Sequence[Layer] = (), later: Sequence[Layer] = ()) -> Iterator[None]:
        """Let modules with a final output return it while the block runs on a batch, and keep what becomes final.

        Parameters
        ----------
        index : int
            Of the batch.
        turn : sequence of Layer
            Layers that are calibrated by this run.
        later : sequence of Layer
            Layers of later turns; with neither, this is the block's last run.
        """
        ended = self._ended(turn, later)
        last = not turn and not later
        with ExitStack() as undo:
            for module in self._outermost(self._block, self._first([*turn, *later])):
                if self._answer(undo, module, index, last):
                    continue
                for part in self._outermost(module, math.inf):
                    self._answer(undo, part, index, last)
                if not last and not _inside(module, ended):
                    undo.callback(module.register_forward_hook(self._keep_output(index)).remove)
            for module, end in ended.items():
                hook = self._keep_input(self._key(module, "input", index))
                undo.callback(end.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _first(self, layers: Sequence[Layer]) -> float:
        """Return the time of the first call of some layers; nothing is final with one that was not called."""
        return min((self._course.entered.get(layer.module, 0) for layer in layers), default=math.inf)

    def _outermost(self, module: nn.Module, until: float) -> Iterator[nn.Module]:
        """Yield the outermost modules inside a module that return before a time."""
        for child in module.children():
            if child in self._modules and self._course.left[child] < until:
                yield child
            else:
                yield from self._outermost(child, until)

    def _ended(self, turn: Sequence[Layer], later: Sequence[Layer]) -> dict[nn.Module, nn.Module]:
        """Return the modules that are final after a turn and return the output of one of its layers, with the layer."""
        chosen = {layer.module for layer in turn}
        ends = ((m, self._course.ends.get(m)) for m in self._outermost(self._block, self._first(later)))
        return {m: end for m, end in ends if end is not None and end in chosen and end in self._modules}

    def _key(self, module: nn.Module, what: str, index: int) -> tuple[str, str, int]:
        return self._names[module], what, index

    def _answer(self, undo: ExitStack, module: nn.Module, index: int, last: bool) -> bool:
        """Let a module return what is kept, or is computed from a kept input; False if there is neither."""
        key, before = self._key(module, "output", index), self._key(module, "input", index)
        if key in self.states:
            take = self.states.pop if last else partial(self.states.get, copy=True)
            undo.enter_context(answering(module, lambda *args, **kwargs: take(key)))
            return True
        if before not in self.states:
            return False
        end = self._course.ends[module]

        def multiply(*args: Any, **kwargs: Any) -> Any:
            output = self._course.wrapped(module, end(self.states.pop(before)))
            if not last:
                self.states.put(key, output, copy=True)
            return output

        undo.enter_context(answering(module, multiply))
        return True

    def _keep_output(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for part in module.modules():
                if part is not module:
                    self.states.drop(self._key(part, "output", index))
            self.states.put(self._key(module, "output", index), output, copy=True)

        return hook

    def _keep_input(self, key: tuple[str, str, int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.states.put(key, args[0] if args else next(iter(kwargs.values())), copy=True)

        return hook


def _filled(structure: TreeSpec, place: int, leaves: int, tensor: Tensor) -> Any:
    return tree_unflatten([tensor if index == place else None for index in range(leaves)], structure)


def _inside(module: nn.Module, others: Iterable[nn.Module]) -> bool:
    return any(module is part for other in others for part in other.modules())


def _has_layers(module: nn.Module) -> bool:
    return any(is_linear(part) for part in module.modules())


@contextmanager
def answering(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let every call of a module run another forward.

    Parameters
    ----------
    module : nn.Module
    forward : callable
    """
    own = module.__dict__.get("forward")  # an instance's forward, as accelerate sets it
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
