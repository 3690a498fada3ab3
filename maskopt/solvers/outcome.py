"""Why a solver stopped, what it hands back for some rows, and what `solve` returns for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

__all__ = ["GapKind", "Outcome", "Result", "Status", "weakest"]


class Status(Enum):
    """Why a solver stopped, each member with the sentence users read; later members are weaker claims.

    Attributes
    ----------
    value : str
        The sentence.
    """

    OPTIMAL = "The mask is proven optimal."
    WITHIN_GAP = "The mask is proven to lie within the requested gap of the optimum."
    CONVERGED = "The relaxation was solved to the requested gap."
    LOCAL_OPTIMUM = "No single swap of a kept against a pruned entry lowers the error."
    COMPLETED = "All planned iterations were run; nothing is claimed about optimality."
    GREEDY = "The mask is optimal for its scores; nothing is claimed about the error."
    ITERATION_LIMIT = "The iteration limit was reached before the stopping test held."
    TIME_LIMIT = "The time limit was reached; the mask is the best found until then."
    STOPPED = "The callback asked to stop; the mask is the best found until then."


def weakest(statuses: Sequence[Status]) -> Status:
    """Return the status that claims least, of parts of a solve."""
    return max(statuses, key=list(Status).index)


class GapKind(Enum):
    """What the reported gap certifies.

    Attributes
    ----------
    value : str
        The sentence users read.
    """

    PROVEN = "No feasible mask has an objective below the lower bound."
    STATIONARY = "The relaxation is not known to be convex; its gap measures stationarity and bounds nothing."
    NONE = "No lower bound is known."


@dataclass(frozen=True)
class Outcome:
    """What a solver hands back for a chunk of rows.

    Attributes
    ----------
    mask : Tensor
        Boolean, shape (rows, d), a member of the set.
    status : Status
    iterations : int
    lower_bound : Tensor or None
        Proven bound of each row block, float64, in full (not in the problem's unit).
    source : str
        Where the mask came from, for `Result.sources`.
    weight : Tensor or None
        The surviving weights, zero where pruned, shape (rows, d), where the solver updates them.
    """

    mask: Tensor
    status: Status
    iterations: int
    lower_bound: Tensor | None = None
    source: str = "solver"
    weight: Tensor | None = None


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
        Proven bound, float64: one entry for each row block, which is independent of the others (each row, or the whole
        matrix).
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
        updates them (`maskopt.weights`); None: they stay as they were.
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
        """Relative error of the mask with the weights as they were, before any update."""
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

    @classmethod
    def joined(cls, parts: Sequence[Result]) -> Result:
        """Return the result for all rows of solves of consecutive rows, which were independent; histories are left out.

        Parameters
        ----------
        parts : sequence of Result
            In the order of the rows; seconds add up, and the status is the weakest.
        """
        if len(parts) == 1:
            return parts[0]
        return replace(
            parts[0],
            mask=torch.cat([part.mask for part in parts]),
            objective=torch.cat([part.objective for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            status=weakest([part.status for part in parts]),
            gap_kind=max((part.gap_kind for part in parts), key=list(GapKind).index),
            lower_bound=_cat([part.lower_bound for part in parts]),
            iterations=max(part.iterations for part in parts),
            seconds=sum(part.seconds for part in parts),
            counters=dict(sum((Counter(part.counters) for part in parts), Counter[str]())),
            history={},
            sources=dict(sum((Counter(part.sources) for part in parts), Counter[str]())),
            weight=_cat([part.weight for part in parts]),
            kept_objective=_cat([part.kept_objective for part in parts]),
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


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None
