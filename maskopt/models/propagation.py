"""The states on which blocks are calibrated: the dense model's, the pruned model's, or both."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from maskopt.models.calls import CallOrder
from maskopt.models.edits import Edits
from maskopt.models.experts import in_groups
from maskopt.models.gram import DenseInputs, GramCollector
from maskopt.models.layers import Layer, swapped
from maskopt.models.replay import Replay
from maskopt.models.residual import Lost
from maskopt.models.reuse import Reuse

__all__ = ["Accompanied", "Corrected", "Dense", "Propagation", "Pruned", "Stage", "last_uses"]


@dataclass(frozen=True)
class Stage:
    """One part of the work: a block, or everything outside the blocks.

    Attributes
    ----------
    position : int or None
        Of the block in the order of execution; None for everything outside the blocks.
    name : str
        Of the block.
    layers : tuple of Layer
        Layers to prune.
    """

    position: int | None
    name: str
    layers: tuple[Layer, ...]


class Propagation(ABC):
    """Runs the blocks, stage by stage, and applies the chosen masks and weights to the model.

    Order of calls: for each stage `turns`, then `collect` and `chosen` for each turn, then `leave`; `finish` at the
    end.

    Parameters
    ----------
    replay : Replay
        Of the model.
    edits : Edits
        Masks and weights that are chosen.
    memory : int
        Bytes of the Gram matrices of stacked layers in one turn (`in_groups`).

    Attributes
    ----------
    seconds : float
        Time spent running the model.
    before_batch : callable or None
        Called with the stage before a block runs on a batch, to count progress.
    """

    def __init__(self, replay: Replay, edits: Edits, memory: int) -> None:
        self._replay = replay
        self._edits = edits
        self._memory = memory
        self._turns: list[tuple[Layer, ...]] = []
        self._waiting: list[Layer] = []
        self.seconds = 0.0
        self.before_batch: Callable[[Stage], None] | None = None
        self.means = False  # whether means of the inputs are wanted

    def turns(self, stage: Stage) -> list[tuple[Layer, ...]]:
        """Return the layers of a stage in turns; those of one turn are calibrated on the same run of the block."""
        self._turns = in_groups([stage.layers] if stage.layers else [], self._memory)
        return self._turns

    @abstractmethod
    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        """Run the stage's block and return the second moments of the inputs of a turn's layers."""

    @abstractmethod
    def repeat(self, stage: Stage) -> None:
        """Run what has to run before a stage's layers change, where they were chosen in an earlier process."""

    @abstractmethod
    def chosen(self, layers: Sequence[Layer]) -> None:
        """Apply, or queue, the edits of a turn's layers, which have been chosen."""

    @abstractmethod
    def leave(self, stage: Stage) -> None:
        """Compute the inputs of the next block; called for all stages but the last."""

    def dense_outputs(self, stage: Stage) -> Callable[[int], Tensor]:
        """Return a function of a batch's index: what the dense block returned, after all turns of a stage."""
        raise NotImplementedError(f"{type(self).__name__} does not know the dense model's states")

    def finish(self) -> None:
        """Apply the edits that are still queued."""
        self._edits.apply(self._waiting)

    def _run(self, replay: Replay, stage: Stage, indices: Iterable[int] | None = None, **options: Any) -> None:
        began = time.perf_counter()
        for index in replay.own if indices is None else indices:
            if self.before_batch is not None:
                self.before_batch(stage)
            replay.run(stage.position, indices=[index], **options)
        self.seconds += time.perf_counter() - began

    def _collect(self, stage: Stage, layers: Sequence[Layer], *, store: bool) -> GramCollector:
        with GramCollector(layers, parts=self._replay.parts, total=self.means) as grams:
            self._run(self._replay, stage, self._replay.seen, store=store, before=grams.begin, until=layers)
        return grams


class Dense(Propagation):
    """Calibrates every block on the states of the dense model; it is pruned once no later block needs its weights.

    Parameters
    ----------
    replay, edits, memory
        See `Propagation`.
    uses : mapping of Layer to int
        See `Corrected`.
    """

    def __init__(self, replay: Replay, edits: Edits, uses: Mapping[Layer, int], memory: int) -> None:
        super().__init__(replay, edits, memory)
        self._uses = uses

    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        # Only the last run may store the outputs, because the block's inputs are then gone.
        return self._collect(stage, layers, store=layers is self._turns[-1])

    def repeat(self, stage: Stage) -> None:
        if stage.layers:
            self._run(self._replay, stage, store=True)

    def chosen(self, layers: Sequence[Layer]) -> None:
        self._waiting += layers

    def leave(self, stage: Stage) -> None:
        if not stage.layers:  # `collect` has stored the outputs of stages with layers
            self._run(self._replay, stage, store=True)
        if self._replay.shortcut:
            done = [layer for layer in self._waiting if layer not in self._uses]
            self._waiting = [layer for layer in self._waiting if layer in self._uses]
            self._edits.apply(done)


class Pruned(Propagation):
    """Calibrates every block on the outputs of the pruned blocks before it.

    Parameters
    ----------
    replay, edits, memory
        See `Propagation`.

    Class attributes
    ----------------
    apart : bool
        Whether a turn is calibrated behind the pruned layers of the turns before it.
    """

    apart: ClassVar[bool] = False

    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        return self._collect(stage, layers, store=False)

    def repeat(self, stage: Stage) -> None:
        pass  # the block runs once its layers are pruned

    def chosen(self, layers: Sequence[Layer]) -> None:
        self._waiting += layers
        if self.apart or layers is self._turns[-1]:
            self._edits.apply(self._waiting)
            self._waiting.clear()

    def leave(self, stage: Stage) -> None:
        self._run(self._replay, stage, store=True)


class Corrected(Pruned):
    """Calibrates every layer on its inputs behind all pruned layers, with its inputs in the dense model as target.

    Two streams of states run through the blocks: the pruned model's and the dense model's. The layers of a block have
    turns in the order of their calls, so that the inputs of later layers contain the errors of earlier ones, which the
    later layers can compensate.

    Parameters
    ----------
    replay, edits, memory
        See `Propagation`.
    order : CallOrder
        Of the layers.
    uses : mapping of Layer to int
        The position of the last stage that uses a layer's weight, where that is later than the layer's own.
    """

    apart: ClassVar[bool] = True

    def __init__(self, replay: Replay, edits: Edits, order: CallOrder, uses: Mapping[Layer, int], memory: int) -> None:
        super().__init__(replay, edits, memory)
        self._dense = replay.dense_copy()
        self._order, self._uses = order, uses
        self._originals: dict[Layer, Tensor] = {}
        """Dense weights of pruned layers that the dense stream still needs."""
        self._inputs = DenseInputs(())
        self._reuse: Reuse | None = None
        self._lost: Lost | None = None

    def turns(self, stage: Stage) -> list[tuple[Layer, ...]]:
        """Return a stage's layers in the order of their calls; one turn has those with one input or of one kind.

        Layers are of one kind where their names differ in numbers only, such as experts: with a turn for each, the
        block would run as many times.
        """
        turns: dict[str, list[Layer]] = {}
        for group in self._order.groups(stage.layers):
            kind = re.sub(r"\d+", "#", group[0].name)
            turns.setdefault(kind, []).extend(group)
        self._turns = in_groups(turns.values(), self._memory)
        return self._turns

    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        turn = self._turns.index(tuple(layers))
        if turn == 0:
            self._inputs = DenseInputs(stage.layers, self._replay.keeping(self._order.size(stage.layers)))
            self._reuse = self._lost = None
            if stage.position is not None:
                self._reuse = self._replay.reuse(stage.position, self._turns)
                self._lost = self._replay.lost(stage.position, stage.layers)
        later = [layer for others in self._turns[turn + 1 :] for layer in others]
        grams = GramCollector(layers, self._inputs, self._replay.parts, total=self.means, lost=self._lost)
        for index in self._replay.own:
            if turn == 0:  # the first turn's inputs need not wait
                self._run_dense(stage, index)
            if self._replay.purpose(index) == "recovery":
                continue  # it waits for the block to be complete
            self._inputs.begin(index)
            losing = nullcontext() if self._lost is None else self._lost.pruned(index, layers, first=turn == 0)
            with grams, self._reusing(index, layers, later), losing:
                self._run(self._replay, stage, before=grams.begin, indices=[index], until=layers)
        return grams

    def repeat(self, stage: Stage) -> None:
        if stage.layers and stage.position is not None:
            self._pass_dense(stage)

    def chosen(self, layers: Sequence[Layer]) -> None:
        # The dense block has run, but others may use the same weights.
        self._originals.update((layer, layer.weight.data.clone()) for layer in layers if layer in self._uses)
        super().chosen(layers)

    def leave(self, stage: Stage) -> None:
        for index in self._replay.own:
            with self._reusing(index):
                self._run(self._replay, stage, store=True, indices=[index])
        if not stage.layers:
            self._pass_dense(stage)
        self._reuse = self._lost = None
        self._inputs = DenseInputs(())
        assert stage.position is not None, "the stage outside the blocks is the last"
        position = stage.position
        self._originals = {
            layer: weight for layer, weight in self._originals.items() if self._uses.get(layer, -1) > position
        }

    def dense_outputs(self, stage: Stage) -> Callable[[int], Tensor]:
        position = stage.position
        assert position is not None, "only blocks have outputs"
        self._reuse = None  # what is fitted to the outputs changes layers that had their turn
        return lambda index: self._dense.state(position, index)

    def _reusing(
        self, index: int, turn: Sequence[Layer] = (), later: Sequence[Layer] = ()
    ) -> AbstractContextManager[None]:
        return nullcontext() if self._reuse is None else self._reuse.on(index, turn, later)

    def _run_dense(self, stage: Stage, index: int) -> None:
        """Run the dense block on a batch, and keep its output and the inputs of its layers."""
        self._inputs.begin(index)
        with ExitStack() as undo:
            undo.enter_context(self._as_it_was())
            if self._replay.purpose(index) == "layers":  # of others no cross terms are summed
                undo.enter_context(self._inputs)
                if self._lost is not None:
                    undo.enter_context(self._lost.dense(index))
            self._run(self._dense, stage, store=True, indices=[index])

    def _pass_dense(self, stage: Stage) -> None:
        """Run the dense block on all batches, and keep its output."""
        with self._as_it_was():
            self._run(self._dense, stage, store=True)

    def _as_it_was(self) -> AbstractContextManager[None]:
        """Give pruned layers their dense weights inside the block, for modules that use the same parameters."""
        return swapped(self._originals.items())


class Accompanied(Corrected):
    """Calibrates as `Pruned` does, and runs the dense model's states beside, for what is fitted to them.

    Parameters
    ----------
    replay, edits, order, uses
        See `Corrected`.
    """

    apart: ClassVar[bool] = False

    def turns(self, stage: Stage) -> list[tuple[Layer, ...]]:
        return Propagation.turns(self, stage)

    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        if stage.position is not None and layers is self._turns[0]:
            self._pass_dense(stage)
        return self._collect(stage, layers, store=False)


def last_uses(model: nn.Module, replay: Replay, stages: Sequence[Stage]) -> dict[Layer, int]:
    """Return the position of the last stage that uses a layer's weight, for layers whose own stage is an earlier one.

    Parameters
    ----------
    model : nn.Module
    replay : Replay
        Of the model.
    stages : sequence of Stage

    Returns
    -------
    dict of Layer to int
        Positions in the order of execution; the modules outside the blocks have the one after the last block.
    """
    last: dict[int, int] = {}
    for position, block in enumerate(replay.order):
        last.update((id(parameter), position) for parameter in block.module.parameters())
    tied = {id(p) for module in _outside(model, replay) for p in module.parameters(recurse=False)} & last.keys()
    last.update(dict.fromkeys(tied, len(replay.order)))
    return {
        layer: last[id(layer.parameter)]
        for stage in stages
        if stage.position is not None
        for layer in stage.layers
        if last[id(layer.parameter)] > stage.position
    }


def _outside(model: nn.Module, replay: Replay) -> Iterator[nn.Module]:
    inside = {module for block in replay.order for module in block.module.modules()}
    return (module for module in model.modules() if module not in inside)
