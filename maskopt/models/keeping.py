"""Blocks that come into memory for their stage, and are written when they are finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from maskopt.models.edits import Edits
from maskopt.models.journal import Finished, Journal
from maskopt.models.offload import Offload
from maskopt.models.propagation import Propagation, Stage
from maskopt.models.ranks import Ranks
from maskopt.models.replay import Replay
from maskopt.models.report import PruneReport

__all__ = ["Keeping"]

_SECONDS = ("calibration_seconds", "solve_seconds", "certify_seconds", "recovery_seconds")


class Keeping:
    """The blocks of an offloaded model during `prune`; does nothing for a model in memory.

    Parameters
    ----------
    model : nn.Module
    replay : Replay
        Of the model.
    offload : Offload or None
        Of the model.
    edits : Edits
        Chosen masks and weights.
    report : PruneReport
        Of all stages up to now.
    propagation : Propagation
        Knows the time of running the model.
    ranks : Ranks
        The processes that share the work; the first one writes.
    """

    def __init__(
        self,
        model: nn.Module,
        replay: Replay,
        offload: Offload | None,
        edits: Edits,
        report: PruneReport,
        propagation: Propagation,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._replay, self._offload, self._edits, self._report = replay, offload, edits, report
        self._propagation, self._ranks = propagation, ranks
        self._journal = None if offload is None else Journal.inside(offload.folder)
        self._recovered = 0
        self._earlier: dict[str, float] = {}

    def begin(self, settings: Callable[[], Mapping[str, Any]]) -> None:
        """Begin a run, or go on with one; `settings`, which hash the data, are asked for where they are needed."""
        if self._journal is not None and self._offload is not None:
            if self._ranks.first:
                self._journal.begin({**settings(), "weight files": self._offload.files})
            self._ranks.barrier()

    def enter(self, stage: Stage, number: int) -> Finished | None:
        """Bring the block of a stage into memory, and return what is known if it is finished."""
        if self._offload is None or self._journal is None:
            return None
        self._offload.hold(None if stage.position is None else self._replay.order[stage.position])
        return self._journal.read(number)

    def repeat(self, stage: Stage, number: int, finished: Finished) -> dict[str, Tensor]:
        """Queue the edits of a finished stage's layers, add it to the report, and return its parameters' values."""
        assert self._journal is not None, "only a journal knows finished stages"
        values = self._journal.tensors(number)
        names = _names(self._parameters(stage))
        for layer in stage.layers:
            value = layer.part(values[names[id(layer.parameter)]])
            self._edits.choose(layer, finished.masks[layer.name], value)
        self._report.layers += finished.layers
        self._report.recovery += finished.recovery
        self._recovered = len(self._report.recovery)
        self._report.masks.update(finished.masks)
        self._earlier = finished.seconds
        return values

    def complete(self, stage: Stage, values: Mapping[str, Tensor]) -> None:
        """Give all parameters of a finished stage their values, but those with edits that are still queued."""
        waiting = {id(layer.parameter) for layer in stage.layers if self._edits.queued(layer) is not None}
        parameters = self._parameters(stage)
        for name, value in values.items():
            if id(parameters[name]) not in waiting:
                parameters[name].data.copy_(value)

    def leave(self, stage: Stage, number: int, finished: Finished | None) -> None:
        """Write a stage whose layers are pruned, where it is not written yet; its block is read from there."""
        if self._offload is None or self._journal is None:
            return
        if finished is None:
            if self._ranks.first:
                self._write(stage, number, self._journal)
            self._ranks.barrier()
        if stage.position is not None:
            self._offload.written(self._replay.order[stage.position], self._journal.weights(number))

    def _write(self, stage: Stage, number: int, journal: Journal) -> None:
        parameters = self._parameters(stage)
        values, names = {name: parameter.data for name, parameter in parameters.items()}, _names(parameters)
        for layer in stage.layers:
            queued = self._edits.queued(layer)
            if queued is not None:
                name = names[id(layer.parameter)]
                values[name] = values[name].clone()
                layer.part(values[name]).copy_(queued)
        chosen = {layer.name for layer in stage.layers}
        layers = [record for record in self._report.layers if record.name in chosen]
        masks = {record.name: self._report.masks[record.name] for record in layers}
        recovery = self._report.recovery[self._recovered :]
        self._recovered = len(self._report.recovery)
        finished = Finished(stage.name, layers, masks, recovery, self._seconds())
        journal.write(number, finished, values)

    def end(self) -> None:
        """Release the last block, and count the time of earlier processes and of running the model."""
        if self._offload is not None:
            self._offload.hold(None)
        for name, seconds in self._seconds().items():
            setattr(self._report, name, seconds)

    def _seconds(self) -> dict[str, float]:
        """Return the time of all processes, by kind of work."""
        seconds = {name: getattr(self._report, name) + self._earlier.get(name, 0.0) for name in _SECONDS}
        seconds["calibration_seconds"] += self._propagation.seconds
        return seconds

    def _parameters(self, stage: Stage) -> dict[str, nn.Parameter]:
        """Return all parameters of a stage by full name."""
        if stage.position is None:
            wanted = {id(layer.parameter) for layer in stage.layers}
            named = self._model.named_parameters()
            return {name: parameter for name, parameter in named if id(parameter) in wanted}
        block = self._replay.order[stage.position]
        return dict(block.module.named_parameters(prefix=block.name))


def _names(parameters: Mapping[str, nn.Parameter]) -> dict[int, str]:
    return {id(parameter): name for name, parameter in parameters.items()}
