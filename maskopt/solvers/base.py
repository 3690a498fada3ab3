"""What every solver is and returns, and the one function that runs it."""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import CanProject, CanRestrict, CanSwap, HasFaces, HasGroups, MaskSet
from maskopt.problems import LayerReconstruction, Point, Problem
from maskopt.threads import sized_threads

if TYPE_CHECKING:
    from maskopt.solvers.history import Record, Recorder

__all__ = [
    "Callback",
    "GapKind",
    "Monitor",
    "Outcome",
    "Result",
    "Solver",
    "State",
    "Status",
    "Stop",
    "check_compatible",
    "row_block_of",
    "solve",
]


class Status(Enum):
    """Why a solver stopped, each member with the sentence users read; later members are weaker claims."""

    OPTIMAL = "The mask is proven optimal."
    WITHIN_GAP = "The mask is proven to lie within the requested gap of the optimum."
    CONVERGED = "The relaxation was solved to the requested gap."
    LOCAL_OPTIMUM = "No single swap of a kept against a pruned entry lowers the error."
    COMPLETED = "All planned iterations were run; nothing is claimed about optimality."
    GREEDY = "The mask is optimal for its scores; nothing is claimed about the error."
    ITERATION_LIMIT = "The iteration limit was reached before the stopping test held."
    TIME_LIMIT = "The time limit was reached; the mask is the best found until then."
    STOPPED = "The callback asked to stop; the mask is the best found until then."


class GapKind(Enum):
    """What the reported gap certifies."""

    PROVEN = "No feasible mask has an objective below the lower bound."
    STATIONARY = "The relaxation is not known to be convex; its gap measures stationarity and bounds nothing."
    NONE = "No lower bound is known."


class Stop(Enum):
    """What a callback returns to end the solve; None continues."""

    STOP = "stop"


@dataclass(frozen=True)
class State:
    """What a callback sees; read only.

    Attributes
    ----------
    solver : str
        Name of the solver.
    iteration, iterations : int
        Work done and planned (an upper estimate for descent methods) in the current block of rows.
    fraction : float
        Fraction of the whole solve that is done, in [0, 1]; an estimate.
    seconds : float
        Since the start.
    problem, masks
        What is being solved (the current block of rows).
    """

    solver: str
    iteration: int
    iterations: int
    fraction: float
    seconds: float
    problem: Problem
    masks: MaskSet
    _point: Callable[[], Point] | None

    @property
    def point(self) -> Point | None:
        """The relaxed mask; `problem.value(point)` is its objective. None for methods without one.

        It changes after the callback returns.
        """
        return None if self._point is None else self._point()


Callback = Callable[[State], Stop | None]


class Monitor:
    """Clock, callback and counters of one solve, handed to the solver."""

    def __init__(self, solver: str, callback: Callback | None, time_limit: float | None, memory: int = 2**30) -> None:
        self.memory = memory  # bytes of working memory
        self.counters: Counter[str] = Counter()
        self.ended: Status | None = None
        self._solver, self._callback, self._limit = solver, callback, time_limit
        self._began = time.perf_counter()
        self._paused = 0.0
        self._window = (0.0, 1.0)
        self._fraction = 0.0
        self.recorder: Recorder | None = None

    @property
    def seconds(self) -> float:
        """Since the start, without the time that recording took."""
        return time.perf_counter() - self._began - self._paused

    @property
    def left(self) -> float:
        """Seconds until the time limit, infinite without one."""
        return math.inf if self._limit is None else max(0.0, self._limit - self.seconds)

    def block(self, start: float, end: float, recorder: Recorder | None) -> None:
        """Say which fraction of the whole solve the coming work is, and who records it."""
        self._window = (start, end)
        self.recorder = recorder
        self._block_began = self.seconds

    def stops(
        self,
        problem: Problem,
        masks: MaskSet,
        iteration: int,
        iterations: int,
        point: Callable[[], Point] | None = None,
        mask: Tensor | None = None,
    ) -> bool:
        """Report an iteration, with the relaxed point or the mask it has; True if the solver has to return."""
        if self.recorder is not None and self.recorder.due():
            self._record(self.recorder, problem, point, mask)
        if self.ended is None and self._limit is not None and self.seconds > self._limit:
            self.ended = Status.TIME_LIMIT
        if self.ended is None and self._callback is not None:
            start, end = self._window
            fraction = start + (end - start) * min(1.0, iteration / max(1, iterations))
            # A later stage of a method may know better how much is left, but progress does not go back.
            self._fraction = fraction = max(self._fraction, fraction)
            state = State(self._solver, iteration, iterations, fraction, self.seconds, problem, masks, point)
            if self._callback(state) is not None:
                self.ended = Status.STOPPED
        return self.ended is not None

    def _record(
        self,
        recorder: Recorder,
        problem: Problem,
        point: Callable[[], Point] | None,
        mask: Tensor | None,
    ) -> None:
        since, now = self.seconds - self._block_began, time.perf_counter()
        if point is not None:
            recorder.relaxed(problem, point().x, since)
        elif mask is not None:
            recorder.whole(mask, since, "swap")
        self._paused += time.perf_counter() - now

    def last(self, problem: Problem, point: Point) -> None:
        """Record where a method ended, whether or not it is that iteration's turn."""
        if self.recorder is not None:
            self._record(self.recorder, problem, lambda: point, None)

    def finish(self, outcome: Outcome) -> Outcome:
        """Return the outcome with the best mask and bound that were seen in its block."""
        recorder = self.recorder
        if recorder is None or outcome.weight is not None:  # masks are compared with their weights as they were
            return outcome
        recorder.whole(outcome.mask, self.seconds - self._block_began, outcome.source)
        bound = outcome.lower_bound
        if recorder.bound is not None:
            bound = recorder.bound if bound is None else torch.maximum(bound, recorder.bound)
        return replace(outcome, mask=recorder.mask, lower_bound=bound)


@dataclass(frozen=True)
class Outcome:
    """What a solver hands back for a block of rows."""

    mask: Tensor
    status: Status
    iterations: int
    lower_bound: Tensor | None = None
    source: str = "solver"
    weight: Tensor | None = None
    """The surviving weights, zero where pruned, shape (rows, d), where the solver moves them."""


class Solver(ABC):
    """An algorithm with its settings; stateless, so one object serves many solves.

    Class attributes
    ----------------
    requires : tuple of str
        Verbs a problem must have beyond `Problem`'s.
    asks : tuple of str
        Verbs a set must have beyond `MaskSet`'s.
    relaxes : bool
        Whether it sees the relaxation: others get the problem without shifts, which is the same on masks.
    bandwise : bool
        Whether row blocks of rows that the set couples may be solved apart.
    record : int or "doubling"
        What is recorded where the caller does not say.
    row_wise : bool
        Whether the answer for a row depends on that row alone when the set allows it.
    arrays : float
        Working memory in arrays of shape (rows, d), from which `solve` sizes blocks of rows.
    corrects : bool
        Whether it is meant to make up for errors upstream: what `maskopt.models.prune` does by default.
    start : Solver or None
        Makes the mask to start from where the caller gives none.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    asks: ClassVar[tuple[str, ...]] = ()
    relaxes: ClassVar[bool] = False
    blockwise: ClassVar[bool] = False
    record: ClassVar[Record] = 0
    row_wise: ClassVar[bool] = True
    arrays: ClassVar[float] = 4.0
    corrects: ClassVar[bool] = False
    start: Solver | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def needs(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the verbs it needs of the problem and of the set: `requires` and `asks`, or what settings imply."""
        return self.requires, self.asks

    @abstractmethod
    def run(self, problem: Problem, masks: MaskSet, start: Tensor | None, monitor: Monitor) -> Outcome:
        """Solve one block of rows from the feasible mask `start`."""

    def solves_rows_apart(self, masks: MaskSet) -> bool:
        """Whether any rows with the same Gram may be solved together or apart with the same result."""
        return self.row_wise and masks.separable and (self.start is None or self.start.row_wise)


@dataclass(frozen=True)
class Result:
    """A mask and what is known about it.

    Attributes
    ----------
    mask : Tensor
        Boolean, shape (rows, d); True is kept.
    objective : Tensor
        Error of each row, float64, evaluated from scratch on the final mask and weights.
    scale : Tensor
        Error of pruning the whole row, float64: what relative errors divide by.
    status : Status
    gap_kind : GapKind
    lower_bound : Tensor or None
        Proven bound, float64: one entry for each row block of rows that are independent of the others (each row, or the
        whole matrix).
    iterations : int
    seconds : float
    counters : dict of str to int
        Matrix products, oracle calls, swaps.
    solver : str
        Name and settings.
    history : dict of str to list of float
        Columns `maskopt.solvers.COLUMNS`, where the solve was recorded.
    sources : dict of str to int
        In how many row blocks the mask came from rounding, a vertex, ..., where the solve was recorded.
    weight : Tensor or None
        The weights that go with the mask, zero where pruned, shape (rows, d) in the problem's type, where the solver
        moves them (`maskopt.weights`); None: they stay as they were.
    kept_objective : Tensor or None
        Error of each row, float64, of the same mask with the weights as they were; None where they still are.
    """

    mask: Tensor
    objective: Tensor
    scale: Tensor
    status: Status
    gap_kind: GapKind
    lower_bound: Tensor | None
    iterations: int
    seconds: float
    counters: dict[str, int] = field(default_factory=dict)
    solver: str = ""
    history: dict[str, list[float]] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    weight: Tensor | None = None
    kept_objective: Tensor | None = None

    @property
    def total(self) -> float:
        """Error of the layer: the sum over its rows."""
        return float(self.objective.sum())

    @property
    def relative_error(self) -> float:
        """Error of the layer over that of pruning everything; 0 where both vanish."""
        return self._relative(self.objective)

    @property
    def kept_error(self) -> float:
        """Relative error of the mask with the weights as they were: before they moved, if they did."""
        return self._relative(self.objective if self.kept_objective is None else self.kept_objective)

    def _relative(self, objective: Tensor) -> float:
        scale = float(self.scale.sum())
        return float(objective.sum()) / scale if scale > 0 else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of pruned entries."""
        return 1.0 - float(self.mask.sum()) / self.mask.numel()

    @property
    def gap(self) -> float | None:
        """Error minus lower bound, None where there is no bound."""
        return None if self.lower_bound is None else self.total - float(self.lower_bound.sum())

    def part(self, index: slice) -> Result:
        """Return the result for some rows of a solve in which rows were independent; seconds by fraction of rows."""
        mask = self.mask[index]
        return replace(
            self,
            mask=mask,
            objective=self.objective[index],
            scale=self.scale[index],
            lower_bound=None if self.lower_bound is None else self.lower_bound[index],
            weight=None if self.weight is None else self.weight[index],
            kept_objective=None if self.kept_objective is None else self.kept_objective[index],
            seconds=self.seconds * len(mask) / len(self.mask),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain numbers and strings for JSON."""
        return {
            "relative_error": self.relative_error,
            "kept_error": self.kept_error,
            "objective": self.total,
            "sparsity": self.sparsity,
            "seconds": self.seconds,
            "iterations": self.iterations,
            "status": self.status.name,
            "status_text": self.status.value,
            "gap_kind": self.gap_kind.name,
            "lower_bound": None if self.lower_bound is None else float(self.lower_bound.sum()),
            "gap": self.gap,
            "counters": dict(self.counters),
            "sources": dict(self.sources),
            "solver": self.solver,
        }


def solve(
    problem: Problem,
    masks: MaskSet,
    solver: Solver | None = None,
    *,
    start: Tensor | Solver | None = None,
    callback: Callback | None = None,
    time_limit: float | None = None,
    memory: int = 2**30,
    record: Record | None = None,
) -> Result:
    """Choose a mask.

    Parameters
    ----------
    problem : Problem
        Usually a `LayerReconstruction`.
    masks : PartitionMatroid
        The feasible set: `PerRow(0.5)`, `NM(keep=2, group=4)`, `Unstructured(0.4)` ...
    solver : Solver, optional
        `ContinuationFrankWolfe()` by default.
    start : Tensor or Solver, optional
        A feasible boolean mask, or the solver that makes one, instead of the solver's own choice.
    callback : callable, optional
        Called with a `State` about once per iteration; returning `Stop.STOP` ends the solve early.
    time_limit : float, optional
        Seconds after which the best mask so far is returned, with status TIME_LIMIT.
    memory : int
        Bytes of working memory; where rows are independent they are solved in blocks that fit.
    record : int or "doubling", optional
        Iterations at which values, bounds and rounded errors are evaluated in float64 for `Result.history`: every so
        many, or 0, 1, 2, 4, 8 ...; by default the solver's own choice. The result is the best mask seen.

    Returns
    -------
    Result

    Raises
    ------
    MaskoptError
        If the set does not fit the weight, the start is infeasible, or problem and solver do not go together.
    """
    if solver is None:
        from maskopt.solvers.continuation import ContinuationFrankWolfe

        solver = ContinuationFrankWolfe()
    check_compatible(problem, masks, solver)
    masks.check(problem.shape)  # raises here, before any work, where the set does not fit
    monitor = Monitor(type(solver).__name__, callback, time_limit, memory)
    rows, columns = problem.shape
    with sized_threads(rows * columns * columns):
        return _solve(problem, masks, solver, start, monitor, memory, solver.record if record is None else record)


def row_block_of(problem: Problem, masks: MaskSet) -> int:
    """Return how many consecutive rows are coupled by the set or the objective."""
    return problem.shape[0] if problem.coupled else masks.row_block(problem.shape)


_PROVIDERS = {
    verb: kind
    for kind, verbs in {
        HasFaces: ("inface", "max_step"),
        CanProject: ("project",),
        CanRestrict: ("restrict",),
        CanSwap: ("swap_tile", "neighbours"),
        HasGroups: ("groups", "ungroup"),
    }.items()
    for verb in verbs
}


def check_compatible(problem: Problem, masks: MaskSet, solver: Solver) -> None:
    """Raise MaskoptError, with the missing verbs, if problem, set and solver do not go together."""
    seen = problem if solver.relaxes else problem.unshifted()
    requires, asks = solver.needs()
    missing = [verb for verb in requires if not hasattr(seen, verb)]
    if missing:
        raise MaskoptError(
            f"{type(seen).__name__} is not compatible with {solver.name}: it must implement "
            f"{', '.join(requires)}; missing: {', '.join(missing)}."
        )
    missing = [verb for verb in asks if not hasattr(masks, verb)]
    if missing:
        kinds = sorted({_PROVIDERS[verb].__name__ for verb in missing if verb in _PROVIDERS})
        raise MaskoptError(
            f"{masks} is not compatible with {solver.name}: it must implement {', '.join(asks)}; "
            f"missing: {', '.join(missing)} (see maskopt.oracles.{', '.join(kinds)})."
        )


def _solve(
    problem: Problem,
    masks: MaskSet,
    solver: Solver,
    start: Tensor | Solver | None,
    monitor: Monitor,
    memory: int,
    record: Record,
) -> Result:
    from maskopt.solvers.history import Recorder, merged
    from maskopt.solvers.rules import RowBlocks

    first = _start_mask(problem, masks, solver.start if start is None else start)
    seen = problem if solver.relaxes else problem.unshifted()
    row_block = row_block_of(problem, masks)
    apart = solver.solves_rows_apart(masks) or (solver.row_wise and solver.blockwise)
    outcomes, recorders = [], list[Recorder]()
    for index in _blocks(seen, solver.arrays, memory, row_block) if apart else [slice(0, problem.shape[0])]:
        whole = index == slice(0, problem.shape[0])
        part = seen if whole else seen.rows(index)
        part_masks = masks if whole else masks.rows(index, problem.shape)
        recorder = None if record == 0 else Recorder(part, part_masks, RowBlocks(row_block), record)
        monitor.block(index.start / problem.shape[0], index.stop / problem.shape[0], recorder)
        recorders += [] if recorder is None else [recorder]
        outcomes.append(monitor.finish(solver.run(part, part_masks, None if first is None else first[index], monitor)))
    mask = torch.cat([outcome.mask for outcome in outcomes])
    if not masks.contains(mask):
        raise RuntimeError(f"{type(solver).__name__} returned a mask outside {masks}; this is a bug in the solver.")
    bounds = [outcome.lower_bound for outcome in outcomes]
    proven = all(bound is not None for bound in bounds)
    nothing = GapKind.NONE if all(recorder.convex for recorder in recorders) else GapKind.STATIONARY
    weakest = max((outcome.status for outcome in outcomes), key=list(Status).index)
    weight, before, objective = None, None, problem.objective(mask)
    if all(outcome.weight is not None for outcome in outcomes):
        assert isinstance(seen, LayerReconstruction), "only layers have weights"
        weight = torch.cat([outcome.weight for outcome in outcomes if outcome.weight is not None])
        if bool((weight != 0).logical_and(~mask).any()):
            raise RuntimeError(
                f"{type(solver).__name__} returned weights outside its mask; this is a bug in the solver."
            )
        before, objective = objective, seen.error(weight)
        # What a ridge or rounding made worse than it was stays as it was.
        worse = ~(objective <= before)
        weight = torch.where(worse.unsqueeze(1), seen.weight * mask, weight)
        objective = torch.where(worse, before, objective)
    bound = torch.cat([bound for bound in bounds if bound is not None]) if proven else None
    optimal = bound is not None and bool((objective.view(len(bound), -1).sum(1) <= bound).all())
    return Result(
        mask=mask,
        objective=objective,
        scale=problem.scale(),
        status=Status.OPTIMAL if optimal else monitor.ended or weakest,
        gap_kind=GapKind.PROVEN if proven else nothing,
        lower_bound=bound,
        iterations=max(outcome.iterations for outcome in outcomes),
        seconds=monitor.seconds,
        counters=dict(monitor.counters),
        solver=repr(solver),
        history=merged([recorder.history for recorder in recorders]),
        sources=dict(sum((Counter(recorder.sources) for recorder in recorders), Counter())),
        weight=weight,
        kept_objective=before,
    )


def _start_mask(problem: Problem, masks: MaskSet, start: Tensor | Solver | None) -> Tensor | None:
    if start is None:
        return None
    if isinstance(start, Solver):
        return solve(problem, masks, start).mask
    if start.shape != problem.shape or not masks.contains(start.to(problem.device)):
        raise MaskoptError(
            f"The start must be a boolean mask of shape {tuple(problem.shape)} in {masks}; got a {start.dtype} tensor "
            f"of shape {tuple(start.shape)}{'' if start.shape != problem.shape else ' that is not in the set'}."
        )
    return start.to(problem.device)


def _blocks(problem: Problem, arrays: float, memory: int, row_block: int) -> Iterator[slice]:
    rows, columns = problem.shape[0] // row_block, problem.shape[1] * row_block
    per_row = arrays * columns * torch.finfo(problem.dtype).bits / 8
    # Equal blocks: a last block of a few rows would waste the matrix products' efficiency.
    number = -(-rows // max(1, int(memory / per_row)))
    edges = [rows * i // number * row_block for i in range(number + 1)]
    return (slice(a, b) for a, b in itertools.pairwise(edges))
