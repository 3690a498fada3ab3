"""What every solver is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from maskopt.oracles import MaskSet
from maskopt.solvers.chunks import Chunk
from maskopt.solvers.history import Record
from maskopt.solvers.monitor import Monitor
from maskopt.solvers.outcome import Outcome, Status
from maskopt.solvers.requirements import Requirements

__all__ = ["Monitor", "Outcome", "Solver", "Status", "run_each"]


class Solver(ABC):
    """An algorithm with its settings; stateless, so one object serves many solves.

    Class attributes
    ----------------
    requires : Requirements
        Types that problem and set must have; `solve` checks them before any work.
    needs_start : bool
        Whether `run` must be given a mask to start from.
    relaxes : bool
        Whether it sees the relaxation: others get the problem without shifts, which is the same on masks.
    blockwise : bool
        Whether row blocks, which the set couples, may be solved apart.
    record : int or "doubling"
        What is recorded where the caller does not say.
    proves : bool
        Whether it proves lower bounds, at least where the objective is convex.
    row_wise : bool
        Whether the answer for a row depends on that row alone when the set allows it.
    arrays : float
        Working memory in arrays of shape (rows, d), from which `solve` sizes chunks of rows.
    corrects : bool
        Whether it is meant to make up for errors upstream, so that `maskopt.models.prune` lets it by default.
    needs_mean : bool
        Whether it uses the means of a layer's inputs, so that `maskopt.models.prune` collects them.
    start : Solver or None
        Makes the mask to start from where the caller gives none.
    """

    requires: ClassVar[Requirements] = Requirements()
    needs_start: ClassVar[bool] = False
    relaxes: ClassVar[bool] = False
    blockwise: ClassVar[bool] = False
    record: ClassVar[Record] = 0
    proves: ClassVar[bool] = False
    row_wise: ClassVar[bool] = True
    arrays: ClassVar[float] = 4.0
    corrects: ClassVar[bool] = False
    needs_mean: ClassVar[bool] = False
    start: Solver | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @property
    def requirements(self) -> Requirements:
        """What it needs of problem and set with these settings: `requires`, unless settings imply more."""
        return self.requires

    @abstractmethod
    def run(self, problem: Any, masks: Any, start: Any, monitor: Monitor) -> Outcome:
        """Solve one chunk of rows.

        Parameters
        ----------
        problem : Problem
            Of the types that `requirements` name.
        masks : MaskSet
            Likewise.
        start : Tensor or None
            A mask of the set, boolean, shape (rows, d); never None where `needs_start`.
        monitor : Monitor
            Its `stops` is to be called about once per iteration.
        """

    def run_chunks(self, chunks: Sequence[Chunk], monitor: Monitor) -> list[Outcome]:
        """Solve all chunks of rows, one after the other; methods that have work in common for them override it.

        Parameters
        ----------
        chunks : sequence of Chunk
        monitor : Monitor
        """
        return run_each(chunks, monitor, self.run)

    def solves_rows_apart(self, masks: MaskSet) -> bool:
        """Whether any rows with the same Gram may be solved together or apart with the same result."""
        return self.row_wise and masks.separable and (self.start is None or self.start.row_wise)


def run_each(
    chunks: Sequence[Chunk], monitor: Monitor, run: Callable[[Any, Any, Any, Monitor], Outcome]
) -> list[Outcome]:
    """Solve chunks of rows one after the other by a function that takes what `Solver.run` takes."""
    outcomes = []
    for chunk in chunks:
        monitor.chunk(*chunk.span, chunk.recorder)
        outcomes.append(monitor.finish(run(chunk.problem, chunk.masks, chunk.start, monitor)))
    return outcomes
