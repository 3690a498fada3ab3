"""What blocks are calibrated on: the dense model's states, those of what is pruned, or both."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from maskopt.models.edits import Edits
from maskopt.models.gram import CallOrder, DenseInputs, GramCollector
from maskopt.models.layers import Layer
from maskopt.models.replay import Replay

__all__ = ["Corrected", "Dense", "Propagation", "Pruned", "Stage", "last_uses"]


@dataclass(frozen=True)
class Stage:
    """One part of the work: a block by its position in the order of execution, or (None) all that lies outside."""

    position: int | None
    name: str
    layers: tuple[Layer, ...]


class Propagation(ABC):
    """Runs the blocks, stage by stage, and says when what was chosen goes into the model.

    For each stage: `turns`, then `collect` and `chosen` for each turn, then `leave`. At the end: `finish`.

    Parameters
    ----------
    replay : Replay
        Of the model.
    edits : Edits
        What is chosen.
    """

    def __init__(self, replay: Replay, edits: Edits) -> None:
        self._replay = replay
        self._edits = edits
        self._waiting: list[Layer] = []
        self.seconds = 0.0
        """Time spent running the model."""
        self.before_batch: Callable[[Stage], None] | None = None
        """Called before a block runs on a batch: progress is counted by it."""

    def turns(self, stage: Stage) -> list[tuple[Layer, ...]]:
        """Return the layers of a stage, together where they are solved on the same run of the block."""
        return [stage.layers] if stage.layers else []

    @abstractmethod
    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        """Run the stage's block and return the second moments of what the layers of a turn see."""

    @abstractmethod
    def chosen(self, layers: Sequence[Layer]) -> None:
        """Take note that the edits hold what was chosen for the layers of a turn."""

    @abstractmethod
    def leave(self, stage: Stage) -> None:
        """Make the inputs of the next block; called for all stages but the last."""

    def finish(self) -> None:
        """Apply what waits for the end."""
        self._edits.apply(self._waiting)

    def _run(self, replay: Replay, stage: Stage, indices: Iterable[int] | None = None, **options: Any) -> None:
        began = time.perf_counter()
        for index in range(replay.batches) if indices is None else indices:
            if self.before_batch is not None:
                self.before_batch(stage)
            replay.run(stage.position, indices=[index], **options)
        self.seconds += time.perf_counter() - began

    def _collect(self, stage: Stage, layers: Sequence[Layer], *, store: bool) -> GramCollector:
        with GramCollector(layers) as grams:
            self._run(self._replay, stage, store=store, before=grams.begin)
        return grams


class Dense(Propagation):
    """Every block sees the states of the dense model, which is pruned at the end."""

    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        return self._collect(stage, layers, store=True)

    def chosen(self, layers: Sequence[Layer]) -> None:
        self._waiting += layers

    def leave(self, stage: Stage) -> None:
        if not stage.layers:  # the others have been stored when they were calibrated
            self._run(self._replay, stage, store=True)


class Pruned(Propagation):
    """Every block sees what the pruned blocks before it give out."""

    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        return self._collect(stage, layers, store=False)

    def chosen(self, layers: Sequence[Layer]) -> None:
        self._edits.apply(layers)

    def leave(self, stage: Stage) -> None:
        self._run(self._replay, stage, store=True)


class Corrected(Pruned):
    """Every layer sees what all pruned layers before it give out, and is told what it saw in the dense model.

    Two streams of states run through the blocks. The layers of a block have turns in the order of their calls, so that
    errors of the first are in the inputs of the next, which can make up for them.

    Parameters
    ----------
    replay, edits
        As for all.
    order : CallOrder
        Of the layers.
    uses : mapping of Layer to int
        The position of the last stage that uses a layer's weight, where later ones than its own do.
    memory : int
        Bytes up to which the dense model's inputs of a block's layers are kept from one turn to the next; beyond, the
        dense block runs again for every turn.
    """

    def __init__(self, replay: Replay, edits: Edits, order: CallOrder, uses: Mapping[Layer, int], memory: int) -> None:
        super().__init__(replay, edits)
        self._dense = replay.dense_copy()
        self._order, self._uses, self._memory = order, uses, memory
        self._originals: dict[Layer, Tensor] = {}
        """Dense weights of pruned layers that the dense stream still needs."""
        self._turns: list[tuple[Layer, ...]] = []
        self._kept: DenseInputs | None = None

    def turns(self, stage: Stage) -> list[tuple[Layer, ...]]:
        """Return a stage's layers in the order of their calls, together where they see the same or are of one kind.

        Layers of one kind are those whose names differ in numbers only, such as experts: turns of their own would take
        as many runs.
        """
        turns: dict[str, list[Layer]] = {}
        for group in self._order.groups(stage.layers):
            kind = re.sub(r"\d+", "#", group[0].name)
            turns.setdefault(kind, []).extend(group)
        self._turns = [tuple(turn) for turn in turns.values()]
        return self._turns

    def collect(self, stage: Stage, layers: Sequence[Layer]) -> GramCollector:
        if layers is self._turns[0] and len(self._turns) > 1:
            self._kept = self._all_inputs(stage)
        inputs = DenseInputs(layers) if self._kept is None else self._kept
        grams = GramCollector(layers, inputs)
        for index in range(self._replay.batches):
            inputs.begin(index)
            if self._kept is None:
                self._run_dense(stage, inputs, index, store=layers is self._turns[-1])
            with grams:
                self._run(self._replay, stage, before=grams.begin, indices=[index])
            if self._kept is None:
                inputs.forget(index)
        return grams

    def chosen(self, layers: Sequence[Layer]) -> None:
        self._originals.update((layer, layer.weight.data.clone()) for layer in layers)
        super().chosen(layers)

    def leave(self, stage: Stage) -> None:
        super().leave(stage)
        self._kept = None
        if not stage.layers:
            for index in range(self._dense.batches):
                self._run_dense(stage, None, index, store=True)
        assert stage.position is not None, "what lies outside the blocks comes last"
        position = stage.position
        self._originals = {
            layer: weight for layer, weight in self._originals.items() if self._uses.get(layer, -1) > position
        }

    def _all_inputs(self, stage: Stage) -> DenseInputs | None:
        """Run the dense block once for all turns and return what its layers see; None where memory is short."""
        if self._order.size(stage.layers) * self._replay.growth > self._memory:
            return None
        inputs = DenseInputs(stage.layers)
        for index in range(self._replay.batches):
            inputs.begin(index)
            self._run_dense(stage, inputs, index, store=True)
        return inputs

    def _run_dense(self, stage: Stage, inputs: DenseInputs | None, index: int, *, store: bool) -> None:
        with self._as_it_was():
            if inputs is None:
                self._run(self._dense, stage, store=store, indices=[index])
            else:
                with inputs:
                    self._run(self._dense, stage, store=store, indices=[index])

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Give pruned layers their dense weights for a while, wherever else these are used."""
        pruned = {layer: layer.weight.data for layer in self._originals}
        try:
            for layer, weight in self._originals.items():
                layer.weight.data = weight
            yield
        finally:
            for layer, weight in pruned.items():
                layer.weight.data = weight


def last_uses(model: nn.Module, replay: Replay, stages: Sequence[Stage]) -> dict[Layer, int]:
    """Return the position of the last block that uses a layer's weight, where that is not its own stage alone.

    What lies outside the blocks counts as one more at the end.
    """
    last: dict[int, int] = {}
    for position, block in enumerate(replay.order):
        last.update((id(parameter), position) for parameter in block.module.parameters())
    inside = {id(parameter) for block in replay.order for parameter in block.module.parameters()}
    shared = {id(p) for module in _outside(model, replay) for p in module.parameters(recurse=False)} & inside
    last.update(dict.fromkeys(shared, len(replay.order)))
    return {
        layer: last[id(layer.weight)]
        for stage in stages
        if stage.position is not None
        for layer in stage.layers
        if last[id(layer.weight)] > stage.position
    }


def _outside(model: nn.Module, replay: Replay) -> Iterator[nn.Module]:
    inside = {module for block in replay.order for module in block.module.modules()}
    return (module for module in model.modules() if module not in inside)
