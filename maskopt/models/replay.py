"""Running a model one block at a time, for any architecture.

Blocks take arguments (masks, rotary embeddings, position biases, states of an encoder) that differ by architecture, by
layer and by version of transformers. So no argument is captured: the model's own forward runs, every block before the
current one returns the stored output of the latest one at once, and the forward ends as soon as the current block has
run.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import MaskoptError, is_memory_failure
from maskopt.files import first_line
from maskopt.models.batches import Batch, Purpose, opening
from maskopt.models.blocks import Block
from maskopt.models.layers import Layer, is_linear
from maskopt.models.residual import Lost, writers
from maskopt.models.reuse import Course, Reuse, answering
from maskopt.models.states import States, Storage, copied, first_tensor
from maskopt.precision import without_autocast
from maskopt.threads import sized_threads

__all__ = ["Replay", "evaluation_mode", "run_model"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; restore every module's mode afterwards.

    A caller's autocast is off inside: the model computes in its own type, and Gram matrices in float32.

    Parameters
    ----------
    model : nn.Module
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    devices = {"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"}
    try:
        with ExitStack() as undo:
            undo.enter_context(without_autocast(devices))
            # A caller's inference mode would forbid changing the weights in place.
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_model(model: nn.Module, where: str, inputs: Mapping[str, Any], *, predict: bool = True) -> Any:
    """Return a model's output, computed without a cache of keys and values.

    Parameters
    ----------
    model : nn.Module
    where : str
        What messages call the inputs.
    inputs : mapping of str to object
        Keyword arguments of the model's forward.
    predict : bool
        Whether the predictions matter; without, a language model makes only that of the last position.

    Returns
    -------
    object
        Of the model's type.

    Raises
    ------
    MaskoptError
        With `where`, if the model cannot be run on them. Exceptions about memory are raised as they are.
    """
    inputs = dict(inputs)
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    if not predict and "logits_to_keep" in known:
        inputs["logits_to_keep"] = 1
    try:
        return model(**inputs)
    except (MaskoptError, _Reached):
        raise
    except Exception as error:
        if is_memory_failure(error):
            raise
        raise MaskoptError(
            f"The {type(model).__name__} cannot be run on {where}: {first_line(error)} ({type(error).__name__})."
        ) from error


class Replay:
    """Runs a model on batches block by block, in the order in which the model executes its blocks.

    One forward of two sequences finds that order. A test run checks that running the blocks one by one gives the
    model's own states. Where it does not (blocks that run several times, states passed outside the blocks' outputs),
    `shortcut` is False and all blocks before the current one run again: slower, but correct for any model.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, gradients off.
    blocks : sequence of Block
        The blocks of all stacks.
    batches : sequence of Batch
        Non-empty.
    storage : Storage, optional
        Where the states of all batches are kept; on the device by default.
    own : range, optional
        Indices of the batches that run in this process (`share`); all by default.
    writing : bool
        Whether to find the layers that add to the residual stream, by a few runs of each kind of block.

    Attributes
    ----------
    own : range
    order : list of Block
        In the order of execution; blocks that the first batch does not reach are missing.
    course : Course
        When the blocks' modules ran on the first sequences.
    shortcut : bool
        Whether blocks can be run one at a time.
    growth : float
        Positions in this process's batches over those with which the sizes in `course` were measured.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        storage: Storage | None = None,
        own: Sequence[int] | None = None,
        *,
        writing: bool = False,
    ) -> None:
        self._model, self._writing = model, writing
        # Which blocks run, and when, two sequences tell as well as many.
        self._batches: Sequence[Batch] = [opening(batch) for batch in batches[:2]]
        self.own: Sequence[int] = range(len(self._batches))
        self._size = sum(weight.numel() for weight in model.parameters())
        self.storage = Storage(0, "device") if storage is None else storage
        self._states = States()  # by stack and batch: what the latest block of the stack returned
        self.course = Course()
        self.order, self._calls, finals = self._trace(blocks)
        self.shortcut = all(calls == 1 for calls in self._calls.values())
        self.shortcut = self.shortcut and self._reproduces(finals)
        traced = math.prod(self._batches[0].shape)
        self._batches, self.own = batches, range(len(batches)) if own is None else own
        self.growth = sum(math.prod(batches[index].shape) for index in self.own) / traced
        stacks = {block.stack: self.course.outputs[block.module] for block in self.order}
        device = next((final.device for final in finals.values()), torch.device("cpu"))
        self._needed = round(2 * sum(stacks.values()) * self.growth), device  # two streams
        self._states = self.storage.states(*self._needed)

    def dense_copy(self) -> Replay:
        """Return a replay of the same model on the same batches with its own states; nothing is run."""
        other = copy.copy(self)
        other._states = self.storage.states(*self._needed)
        return other

    def reuse(self, position: int, turns: Sequence[Sequence[Layer]]) -> Reuse | None:
        """Return what keeps final outputs inside a block; None where the block has to run as a whole.

        Parameters
        ----------
        position : int
            Of the block in the order of execution.
        turns : sequence of sequence of Layer
            Layers that are chosen one after the other.
        """
        block = self.order[position]
        parameters = list(block.module.named_parameters(remove_duplicate=False))
        # A weight of two modules may change after the one that runs first.
        shared = len({id(parameter) for _, parameter in parameters}) < len(parameters)
        if shared or not self.shortcut:
            return None
        reuse = Reuse(block, self.course)
        reuse.states = self.keeping(reuse.size(turns))
        return reuse

    def lost(self, position: int, layers: Sequence[Layer]) -> Lost | None:
        """Return what collects the losses of the residual stream inside a block; None where no layer aims at them.

        Parameters
        ----------
        position : int
            Of the block in the order of execution.
        layers : sequence of Layer
            Those of the block that are chosen.
        """
        if not self.shortcut or not any(layer.module in self.course.writers for layer in layers):
            return None
        block = self.order[position]
        lost = Lost(block, self.course, layers)
        lost.states = self.keeping(lost.tensors * self.course.outputs[block.module])
        return lost

    def keeping(self, size: int) -> States:
        """Return a place for tensors of all batches.

        Parameters
        ----------
        size : int
            Bytes of those in the run that `course` has recorded.
        """
        return self.storage.states(round(size * self.growth), self._needed[1])

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @property
    def parts(self) -> range:
        """The parts of this process's batches that are `seen`."""
        parts = [self._batches[index].part for index in self.seen]
        return range(min(parts), max(parts) + 1) if parts else range(0)

    def purpose(self, index: int) -> Purpose:
        """Return what the batch of an index is for."""
        return self._batches[index].purpose

    @property
    def seen(self) -> list[int]:
        """Indices of this process's batches on which layers are solved, or their errors measured."""
        return [index for index in self.own if self.purpose(index) != "recovery"]

    def run(
        self,
        position: int | None,
        *,
        store: bool = False,
        before: Callable[[Batch], None] | None = None,
        indices: Iterable[int] | None = None,
        until: Sequence[Layer] = (),
    ) -> None:
        """Run the block ``order[position]`` on every batch, or with None everything outside the blocks.

        Parameters
        ----------
        position : int, optional
            The blocks before it must have been stored, in order.
        store : bool
            Keep the outputs, to become the inputs of the next block.
        before : callable, optional
            Called with each batch before it runs.
        indices : iterable of int, optional
            Which batches; all of this process's by default.
        until : sequence of Layer
            Layers whose inputs are all that is wanted: a batch ends before the last of them runs. Nothing is stored.
        """
        current = None if position is None else self.order[position]
        ends = self._ends(until) if self.shortcut and current is not None and not store else ()
        for index in self.own if indices is None else indices:
            batch = self._batches[index]
            if before is not None:
                before(batch)
            with self._passed(position, index), _ending_before(ends):
                output = self._forward(index, current)
            if store and self.shortcut and current is not None:
                self._states.put((current.stack, index), output)

    def output(self, position: int, index: int, *, whole: bool = False) -> Any:
        """Return the output of a block on a batch; gradients flow where they are on.

        Parameters
        ----------
        position : int
            Of the block in the order of execution; those before it must have been stored, in order.
        index : int
            Of the batch.
        whole : bool
            Return the model's output instead, computed from the block onwards.
        """
        with self._passed(position, index):
            return self._forward(index, None if whole else self.order[position])

    def state(self, position: int, index: int) -> Tensor:
        """Return the hidden states that a block returned on a batch, as stored by the latest `run` of its stack."""
        return first_tensor(self._states.get((self.order[position].stack, index)))

    @contextmanager
    def _passed(self, position: int | None, index: int) -> Iterator[None]:
        """Let the blocks before a position return their stored states of a batch."""
        with ExitStack() as undo:
            latest: dict[str, Any] = {}
            others: dict[str, Any] = {}
            for block in reversed(self.order[:position] if self.shortcut else []):
                # Copies, because a model may add to its hidden states in place.
                if block.stack not in latest:
                    answer = latest[block.stack] = self._states.get((block.stack, index), copy=True)
                else:
                    if block.stack not in others:
                        others[block.stack] = copied(latest[block.stack])
                    answer = others[block.stack]  # reaches no block that is computed
                undo.enter_context(answering(block.module, partial(_returned, answer)))
            yield

    def _ends(self, layers: Sequence[Layer]) -> tuple[nn.Module, ...]:
        """Return the modules of layers that end a run; none where a layer is not called exactly once."""
        modules = tuple(dict.fromkeys(layer.module for layer in layers))
        once = all(is_linear(module) and self.course.calls.get(module) == 1 for module in modules)
        return modules if once else ()

    def run_whole(self, index: int) -> None:
        """Run the whole model on a batch, without stored states."""
        self._forward(index, predict=False)

    def _forward(self, index: int, until: Block | None = None, *, predict: bool = True) -> Any:
        """Run the model on a batch; with `until`, stop after that block's last call and return its output."""
        inputs, where = self._batches[index].inputs, f"calibration batch {index}"
        if until is None:
            with sized_threads(self._size):
                return run_model(self._model, where, inputs, predict=predict)
        calls = 0

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == self._calls[until]:
                raise _Reached(output)

        hook = until.module.register_forward_hook(leave)
        try:
            with sized_threads(self._size):
                run_model(self._model, where, inputs)
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise RuntimeError(f"{until.name} was reached {calls} times, not {self._calls[until]}")

    def _trace(self, blocks: Sequence[Block]) -> tuple[list[Block], dict[Block, int], dict[str, Tensor]]:
        """Return the blocks in order of execution, how often each runs, and the last state of each stack."""
        calls: dict[Block, int] = {}
        finals: dict[str, Tensor] = {}

        def monitor(block: Block) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                calls[block] = calls.get(block, 0) + 1
                finals[block.stack] = first_tensor(output).clone()

            return hook

        with ExitStack() as undo:
            for block in blocks:
                undo.callback(block.module.register_forward_hook(monitor(block)).remove)
            undo.enter_context(self.course.recording(blocks))
            self._forward(0, predict=False)
        return list(calls), calls, finals

    def _reproduces(self, finals: dict[str, Tensor]) -> bool:
        """Whether running the blocks one by one ends in the states of the model's own forward.

        Where layers that add to the residual stream are wanted, they are found on the way: blocks have their inputs.
        """
        try:
            known: dict[object, dict[str, float]] = {}
            for position in range(len(self.order)):
                if self._writing:
                    self._find_writers(position, known)
                # The second batch overwrites states that a model may have kept of the first one.
                self.run(position, store=True)
            return all(_close(first_tensor(self._states.get((stack, 0))), final) for stack, final in finals.items())
        except Exception:
            # A model that fails when blocks are skipped is run without skipping.
            return False
        finally:
            self._states.clear()

    def _find_writers(self, position: int, known: dict[object, dict[str, float]]) -> None:
        """Record the layers that add to the residual stream; blocks of one kind have those of the first one."""
        block = self.order[position]
        modules = dict(block.module.named_modules())
        names = {module: name for name, module in modules.items()}
        kind = type(block.module), tuple(name for name, module in modules.items() if is_linear(module))
        if kind not in known:
            found = writers(block, lambda: first_tensor(self.output(position, 0)))
            known[kind] = {names[module]: factor for module, factor in found.items()}
        for name, factor in known[kind].items():
            if self.course.calls.get(modules[name]) == 1:
                self.course.writers[modules[name]] = factor


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Ends a model's forward once the current block has run."""

    def __init__(self, output: Any) -> None:
        self.output = output


@contextmanager
def _ending_before(modules: Sequence[nn.Module]) -> Iterator[None]:
    """End a model's forward before the last of some modules runs, each of which is called once."""
    seen: set[nn.Module] = set()

    def stop(module: nn.Module, args: Any) -> None:
        seen.add(module)
        if len(seen) == len(modules):
            raise _Reached(None)

    with ExitStack() as undo:
        for module in modules:
            undo.callback(module.register_forward_pre_hook(stop).remove)
        yield


def _returned(answer: Any, *args: Any, **kwargs: Any) -> Any:
    return answer


def _close(state: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    size = expected.float().nan_to_num(0.0, 0.0, 0.0).abs().max()
    return torch.allclose(state.float(), expected.float(), rtol=0.0, atol=tolerance * float(size), equal_nan=True)
