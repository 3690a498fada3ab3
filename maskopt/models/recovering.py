"""The recovery that belongs to `prune`: what follows the pruning of each block, and of all."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from maskopt.models.edits import Edits
from maskopt.models.propagation import Stage
from maskopt.models.recovery import Recoverer, predictions
from maskopt.models.replay import Replay
from maskopt.models.solving import Work
from maskopt.models.windows import Data
from maskopt.recovery import Recovery

__all__ = ["RecoveryOfRun"]


class RecoveryOfRun:
    """What follows the pruning of each block, and of all.

    Parameters
    ----------
    model, replay, data
        See `Recoverer`.
    settings : Recovery
    work : Work
        The pruning; it has pruned nothing yet.
    edits : Edits
        Remembers parameters.
    memory : int
        Bytes for the dense model's predictions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        replay: Replay,
        data: Data,
        settings: Recovery,
        work: Work,
        edits: Edits,
        memory: int,
    ) -> None:
        self._replay, self._work, self._edits = replay, work, edits
        tell = None if work.progress is None else work.recovering
        self._recoverer = Recoverer(model, replay, data, settings, work.masks, work.report.masks, tell, work.ranks)
        self._dense = predictions(model, data, memory) if settings.level == "model" else None
        self._records = work.report.recovery

    def block(self, stage: Stage, outputs: Callable[[int], Tensor]) -> None:
        """Fit a block."""
        assert stage.position is not None
        self._edits.remember(self._recoverer.parameters(self._replay.order[stage.position]))
        self._records.extend(self._recoverer.fit_block(stage.position, stage.layers, outputs))

    def model(self) -> None:
        """Fit the model, where that is asked for."""
        if self._dense is not None:
            began = time.perf_counter()
            self._edits.remember(self._recoverer.all_parameters())
            self._records.extend(self._recoverer.fit_model(self._dense))
            self._work.report.recovery_seconds += time.perf_counter() - began
