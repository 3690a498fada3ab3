"""SCIP (Bestuzheva et al., ACM Transactions on Mathematical Software 49, 2023) as an exact solver of row blocks."""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from maskopt.checks import check_settings, choice, instance_of, real, whole
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.problems import LayerReconstruction, Quadratic
from maskopt.solvers.base import Monitor, Outcome, Solver, Status
from maskopt.solvers.blocks import better_of
from maskopt.solvers.brute_force import enumerated, number_tried
from maskopt.solvers.continuation import ContinuationFrankWolfe
from maskopt.solvers.nodes import always_kept
from maskopt.solvers.outcome import weakest
from maskopt.solvers.requirements import Requirements
from maskopt.solvers.rules import row_block_of
from maskopt.solvers.scip_model import STATUSES, Form, row_of
from maskopt.solvers.scip_model import Model as _Model

__all__ = ["STATUSES", "Scip"]

_TOLERANCE = 1e-4  # of the error: what bounds may lack for SCIP's own tolerances in a claim
_FEW = 12  # binary digits of the number of masks that are looked at one by one where SCIP's tolerances hide the best
_MODELS = 4  # for one row block: each starts from the mask that the one before has found


@dataclass(frozen=True)
class Scip(Solver):
    """Branch and cut on p = 1 - m, one model for each independent row block.

    The objective becomes t >= quadratic part. `raw` hands SCIP p^T Q p as it is; SCIP replaces the products of
    binaries by linear relaxations, which are weak. `convex` writes Q - Diag(D) = R^T R with the largest D of the form
    fraction * diag(Q) that leaves it semidefinite, z = R p, and t >= sum z_i^2 (quadratic convex reformulation,
    Billionnet and Elloumi, Mathematical Programming 109, 2007); without z, SCIP would undo the shift, as p_i^2 = p_i.

    SCIP works in floating point to tolerances, about a hundred-thousandth of the first incumbent's error (or 1e-8 of
    the size of the data, where that is more). Lower bounds are lowered by as much, and masks are evaluated from
    scratch: optimal means that the bound that is left is within a ten-thousandth of the error. Entries that every
    better mask keeps are fixed beforehand, so that they do not make the tolerances larger; where the first incumbent
    was far from the best mask, SCIP is asked again; a few thousand masks are compared one by one if that does not help.

    Parameters
    ----------
    form : {"convex", "raw"}
        Formulation.
    time_limit : float, optional
        Seconds for each row block; a time limit of the whole solve is shared evenly by the row blocks that are left.
    gap : float
        Stop when (error - bound) / bound is at most this.
    nodes : int, optional
        Nodes of each row block's tree at most.
    seed : int
        Of SCIP's pseudo-random choices.
    start : Solver
        Makes the first incumbent.

    Raises
    ------
    MaskoptError
        If a setting is out of range or pyscipopt is not installed.
    """

    form: Form = "convex"
    time_limit: float | None = None
    gap: float = 0.0
    nodes: int | None = None
    seed: int = 0
    start: Solver = field(default_factory=ContinuationFrankWolfe)

    requires: ClassVar[Requirements] = Requirements((Quadratic,))
    needs_start: ClassVar[bool] = True
    proves: ClassVar[bool] = True
    arrays: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.form, str) and self.form not in get_args(Form):
            raise MaskoptError(f"Scip has no form {self.form!r}; choose one of {', '.join(get_args(Form))}.")
        check_settings(
            self,
            form=choice(get_args(Form)),
            time_limit=real(0, above=True, infinite=True, optional=True),
            gap=real(0, infinite=True),
            nodes=whole(1, 2**31 - 1, optional=True),
            seed=whole(0, 2**31 - 1),
            start=instance_of(Solver, example="Wanda()"),
        )
        if importlib.util.find_spec("pyscipopt") is None:
            raise MaskoptError('Scip needs pyscipopt, which is missing: pip install "maskopt[mip]".')

    @property
    def parameters(self) -> dict[str, Any]:
        """What SCIP calls the settings."""
        return {
            "limits/gap": min(self.gap, 1e20),
            "limits/nodes": -1 if self.nodes is None else self.nodes,
            "randomization/randomseedshift": self.seed,
        }

    def run(self, problem: Quadratic, masks: MaskSet, start: Tensor, monitor: Monitor) -> Outcome:
        rows, d = problem.shape
        row_block, exact = row_block_of(problem, masks), problem.double()
        number = rows // row_block
        found, bounds = start.clone(), torch.full((number,), -math.inf, dtype=torch.float64)
        statuses, nodes = [], 0
        for one in range(number):
            if monitor.stops(problem, masks, one, number):
                break
            index = slice(one * row_block, (one + 1) * row_block)
            part = masks if number == 1 else masks.rows(index, (rows, d))
            limit = min(monitor.left / (number - one), math.inf if self.time_limit is None else self.time_limit)
            stops = functools.partial(monitor.stops, problem, masks, one, number)
            block = _RowBlock(self, exact.rows(index), part, limit, stops)
            found[index], bounds[one], status = block.solve(found[index])
            nodes += block.nodes
            statuses.append(status)
        monitor.counters["nodes"] += nodes
        status = weakest(statuses or [Status.STOPPED])
        proven = bounds.clamp_min(problem.lowest).to(problem.device)
        return Outcome(found, monitor.ended or status, nodes, proven if bool(proven.isfinite().all()) else None)


class _RowBlock:
    """One row block: its model, made anew with a smaller unit where the first incumbent was far too bad."""

    def __init__(
        self, settings: Scip, problem: Quadratic, masks: MaskSet, limit: float, stops: Callable[[], bool]
    ) -> None:
        self.settings, self.problem, self.masks, self.stops = settings, problem, masks, stops
        self.left = limit
        self.rows = [row_of(problem, row) for row in range(problem.shape[0])]
        self.formulation = masks.formulation(problem.shape)
        self.nodes = 0

    def solve(self, mask: Tensor) -> tuple[Tensor, float, Status]:
        """Return the best mask, what is proven of all masks, in full, and why SCIP stopped."""
        bound = -math.inf
        for _ in range(_MODELS):
            first = self._error(mask)
            kept = self._always_kept(mask, first)
            rows = [row.without(fixed) for row, fixed in zip(self.rows, kept, strict=True)]
            model = _Model(self.settings.parameters, self.settings.form, rows, mask.cpu(), kept)
            model.choose_from(self.formulation)
            began = time.perf_counter()
            answer = model.solve(self.left, self.stops)
            self.left = max(0.0, self.left - (time.perf_counter() - began))
            self.nodes += answer.nodes
            if answer.mask is not None and self.masks.contains(other := answer.mask.to(mask.device)):
                mask = better_of(self.problem, self.masks, mask, other)[0]
            error = self._error(mask)
            # Every mask that does not keep what is always kept is worse than the incumbent was.
            own = min((answer.bound - answer.margin) * self.problem.unit, first)
            bound = max(bound, own)
            claims = answer.status in (Status.OPTIMAL, Status.WITHIN_GAP)
            allowed = (max(self.settings.gap, 0.0) + _TOLERANCE) * abs(error)
            if not claims or error - bound <= allowed or not error < first / 4:
                break
        if not claims or error - max(bound, self.problem.lowest) <= allowed:
            return mask, bound, answer.status
        # SCIP's tolerances hide what is left. Few masks can be looked at one by one.
        if number_tried(self.masks, self.problem.shape) <= 2**_FEW:
            return *enumerated(self.problem, self.masks), answer.status
        # What SCIP calls feasible may also be no mask of the set, or its sums go wrong.
        return mask, bound, Status.COMPLETED

    def _error(self, mask: Tensor) -> float:
        return float(self.problem.objective(mask).sum())

    def _always_kept(self, mask: Tensor, error: float) -> Tensor:
        problem = self.problem
        nothing = torch.zeros_like(mask)
        if not isinstance(problem, LayerReconstruction):
            return nothing.cpu()
        return always_kept(problem, nothing, mask, error).cpu()
