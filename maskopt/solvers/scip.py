"""SCIP (Bestuzheva et al., ACM Transactions on Mathematical Software 49, 2023) as an exact solver, band by band."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array
from torch import Tensor

from maskopt.checks import check_settings, choice, instance_of, real, whole
from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet
from maskopt.problems import Problem, Quadratic
from maskopt.problems.layer import eigenvalue_floor
from maskopt.solvers.base import Outcome, Solver, Status, Watch, band_of
from maskopt.solvers.continuation import ContinuationFrankWolfe
from maskopt.solvers.one_swap import better_of

__all__ = ["STATUSES", "Scip"]

Form = Literal["convex", "raw"]

STATUSES = {
    "optimal": Status.OPTIMAL,
    "gaplimit": Status.WITHIN_GAP,
    "timelimit": Status.TIME_LIMIT,
    "nodelimit": Status.ITERATION_LIMIT,
    "userinterrupt": Status.STOPPED,
}
"""What SCIP may answer to the limits that are set; anything else is a failure."""

_FEASIBLE = 1e-6  # SCIP's tolerance of constraints
_RANGE = 2.0**10  # of the objective's coefficients over the error sought


@dataclass(frozen=True)
class Scip(Solver):
    """Branch and cut on p = 1 - m, one model for each independent band of rows.

    The objective is moved into t >= quadratic part. `raw` hands SCIP p^T Q p as it is; SCIP replaces the products of
    binaries by linear relaxations, which are weak. `convex` writes Q - Diag(D) = R^T R with the largest D of the form
    share * diag(Q) that leaves it semidefinite, z = R p, and t >= sum z_i^2 (quadratic convex reformulation, Billionnet
    and Elloumi, Mathematical Programming 109, 2007); without z, SCIP would undo the shift, as p_i^2 = p_i.

    SCIP works in floating point to tolerances: optimal means that no mask is better by more than about a
    hundred-thousandth of the first incumbent's error (or 1e-8 of the size of the data, where that is more). Lower
    bounds are lowered by as much; masks are evaluated from scratch.

    Parameters
    ----------
    form : {"convex", "raw"}
        Formulation.
    time_limit : float, optional
        Seconds for each band; a time limit of the whole solve is shared evenly by the bands that are left.
    gap : float
        Stop when (error - bound) / bound is at most this.
    nodes : int, optional
        Nodes of each band's tree at most.
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

    requires: ClassVar[tuple[str, ...]] = ("hessian",)
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

    def run(self, problem: Problem, masks: MaskSet, start: Tensor | None, watch: Watch) -> Outcome:
        assert isinstance(problem, Quadratic)
        assert start is not None
        rows, d = problem.shape
        band, exact = band_of(problem, masks), problem.double()
        assert isinstance(exact, Quadratic)
        number = rows // band
        found, bounds = start.clone(), torch.full((number,), -math.inf, dtype=torch.float64)
        margins, statuses = torch.zeros_like(bounds), []
        nodes = 0
        for one in range(number):
            if watch.stops(problem, masks, one, number):
                break
            index = slice(one * band, (one + 1) * band)
            part = masks if number == 1 else masks.rows(index, (rows, d))
            model = _Model(self, [_row(exact, row) for row in range(index.start, index.stop)], start[index].cpu())
            model.choose_from(part.milp_constraints((band, d)))
            limit = min(watch.left / (number - one), math.inf if self.time_limit is None else self.time_limit)
            answer = model.solve(limit, lambda one=one: watch.stops(problem, masks, one, number))  # type: ignore[misc]
            nodes += answer.nodes
            statuses.append(answer.status)
            bounds[one], margins[one] = answer.bound, answer.margin
            if answer.mask is not None and part.contains(mask := answer.mask.to(problem.device)):
                found[index] = mask
        watch.counters["nodes"] += nodes
        best, _ = better_of(problem, masks, start, found)
        status = max(statuses, key=list(Status).index, default=Status.STOPPED)
        bounds, margins = bounds * problem.unit, margins * problem.unit
        error = problem.objective(best).view(number, band).sum(1).cpu()
        if status is Status.OPTIMAL and bool((error > bounds + margins).any()):
            # What SCIP calls feasible, it seems, is no mask of the set, or its sums went wrong.
            status = Status.COMPLETED
        proven = (bounds - margins).clamp_min(problem.lowest).to(problem.device)
        return Outcome(best, watch.ended or status, nodes, proven if bool(proven.isfinite().all()) else None)


@dataclass(frozen=True)
class _Row:
    """One row's objective p^T Q p + <linear, p> + constant of the pruned indicator p, float64, on the CPU."""

    quadratic: Tensor
    linear: Tensor
    constant: float


def _row(problem: Quadratic, row: int) -> _Row:
    d = problem.shape[1]
    # Row i of the Hessian is the change of the gradient along unit vector i: d copies of the row, one for each.
    copies = problem.rows(torch.full((d,), row, device=problem.device))
    hessian = copies.hessian(copies.along(torch.eye(d, dtype=torch.float64, device=problem.device))).cpu()
    alone = problem.rows(slice(row, row + 1))
    kept = alone.at(torch.ones((1, d), dtype=torch.float64, device=problem.device))
    return _Row((hessian + hessian.T) / 4, -alone.gradient(kept)[0].cpu(), float(alone.value(kept)))


def _shift(matrix: Tensor) -> Tensor:
    """Return a diagonal D, shape (d,), such that the matrix less Diag(D) is positive semidefinite, proven.

    The stronger D is, the tighter is SCIP's relaxation; whatever diagonal is aimed at here is made safe below.
    """
    largest = float(matrix.abs().amax())
    if largest == 0.0:
        return torch.zeros(len(matrix), dtype=torch.float64)
    # The least eigenvalue of the matrix with unit diagonal is free of the channels' scales.
    size = matrix.diagonal().clone()
    small = size <= 2.0**-40 * largest
    size[small] = matrix.abs().sum(1)[small].clamp_min(2.0**-40 * largest)
    root = size.rsqrt()
    diagonal: Tensor = size * torch.linalg.eigvalsh(root.unsqueeze(1) * matrix * root)[0]
    # What is left may be nothing but the rounding of these lines.
    diagonal -= len(matrix) * 2.0**-48 * float(diagonal.abs().amax() + largest)
    floor = eigenvalue_floor(matrix - torch.diag(diagonal))
    assert floor is not None
    return diagonal + floor


def _shifted(row: _Row) -> _Row:
    """Return the same objective of masks, with a convex quadratic part."""
    shift = _shift(row.quadratic)
    return _Row(row.quadratic - torch.diag(shift), row.linear + shift, row.constant)


@dataclass(frozen=True)
class _Answer:
    """What SCIP says about a band, in the problem's unit; `bound` is its own, `margin` what it may be wrong by."""

    mask: Tensor | None
    bound: float
    margin: float
    status: Status
    nodes: int


class _Model:
    """One fresh SCIP model.

    Parameters
    ----------
    settings : Scip
    rows : sequence of _Row
        Of one band.
    start : Tensor
        The first incumbent, boolean, shape (rows, d).
    """

    def __init__(self, settings: Scip, rows: Sequence[_Row], start: Tensor) -> None:
        from pyscipopt import Model
        from pyscipopt.scip import Expr, ExprCons, Term

        self._expr, self._cons, self._term = Expr, ExprCons, Term
        self._shape, pruned = start.shape, (~start).double()
        if settings.form == "convex":
            rows = [_shifted(row) for row in rows]
        self._unit = _unit(rows, pruned)
        self._model = model = Model()
        model.hideOutput()
        model.setParams(
            {
                "limits/gap": min(settings.gap, 1e20),
                "limits/nodes": -1 if settings.nodes is None else settings.nodes,
                "numerics/feastol": _FEASIBLE,
                # Probing of SCIP 10.0 can cut off the optimum; a test has an example.
                "propagating/probing/maxprerounds": 0,
                "randomization/randomseedshift": settings.seed,
            }
        )
        self._first = model.createSol()
        self._pruned: list[Any] = []
        for row, chosen in zip(rows, pruned, strict=True):
            self._add(row, chosen, settings.form)
        model.addObjoffset(sum(row.constant for row in rows) / self._unit)

    def _add(self, row: _Row, chosen: Tensor, form: Form) -> None:
        """Add a row's variables, its part of the objective, and their values in the first incumbent."""
        matrix, linear = row.quadratic / self._unit, row.linear / self._unit
        pairs = zip(linear.tolist(), chosen.tolist(), strict=True)
        pruned = [self._variable("B", cost, value) for cost, value in pairs]
        self._pruned += pruned
        if form == "convex":
            values, vectors = torch.linalg.eigh(matrix)
            # Squares left out only lower the relaxation, and all of these together by less than the tolerance.
            some = values > _FEASIBLE / 1000
            parts = (vectors[:, some] * values[some].sqrt()).T
            images = (parts @ chosen).tolist()
            squares = {}
            for part, image in zip(parts.tolist(), images, strict=True):
                z = self._variable("C", 0.0, image)
                terms = {self._term(p): coefficient for p, coefficient in zip(pruned, part, strict=True)}
                self._constrain({**terms, self._term(z): -1.0}, 0.0, 0.0)
                squares[self._term(z, z)] = 1.0
            size = sum(image * image for image in images)
        else:
            lower = torch.tril(matrix) + torch.tril(matrix, -1)  # each pair once
            squares = {self._term(pruned[i], pruned[j]): float(lower[i, j]) for i, j in lower.nonzero().tolist()}
            size = float(chosen @ matrix @ chosen)
        if squares:
            # No lower bound: that of pyscipopt is nought, and Q need not be positive semidefinite.
            top = self._variable("C", 1.0, size)
            self._constrain({**squares, self._term(top): -1.0}, None, 0.0)

    def _variable(self, kind: str, cost: float, value: float) -> Any:
        variable = self._model.addVar(vtype=kind, lb=0.0 if kind == "B" else None, obj=cost)
        self._model.setSolVal(self._first, variable, value)
        return variable

    def _constrain(self, terms: dict[Any, float], lower: float | None, upper: float | None) -> None:
        # From a dictionary of coefficients: sums of expressions take minutes to build.
        self._model.addCons(self._cons(self._expr(terms), lower, upper))

    def choose_from(self, masks: LinearConstraint) -> None:
        """Add the constraints of a set on the flattened mask m = 1 - p."""
        matrix = csr_array(masks.A)
        ends = [np.broadcast_to(side, matrix.shape[0]) for side in (masks.lb, masks.ub)]
        for line in range(matrix.shape[0]):
            part = slice(matrix.indptr[line], matrix.indptr[line + 1])
            entries, values = matrix.indices[part].tolist(), matrix.data[part].tolist()
            size = max(map(abs, values), default=0.0)
            if size == 0.0:
                continue
            whole = math.fsum(values)
            lower, upper = ((whole - float(side[line])) / size for side in reversed(ends))
            terms = {self._term(self._pruned[at]): value / size for at, value in zip(entries, values, strict=True)}
            self._constrain(terms, *(end if math.isfinite(end) else None for end in (lower, upper)))

    def solve(self, limit: float, stops: Callable[[], bool]) -> _Answer:
        """Run SCIP for so many seconds, or until `stops` says so.

        Raises
        ------
        KeyboardInterrupt
            If the user interrupted SCIP.
        RuntimeError
            If SCIP ends in a way that its limits do not explain.
        """
        model, handler = self._model, _handler(stops)
        model.addSol(self._first)
        model.setParam("limits/time", min(limit, 1e20))
        model.includeEventhdlr(handler, "watch", "asks whether to stop")
        model.optimizeNogil()
        if handler.error is not None:
            raise handler.error
        status = model.getStatus()
        if status == "userinterrupt" and not handler.stopped:
            raise KeyboardInterrupt
        if status == "memlimit":
            raise MemoryError("SCIP ran out of memory.")
        if status not in STATUSES:
            raise RuntimeError(f"SCIP ended with {status!r} on a feasible model; this is a bug.")
        bound = float(model.getDualbound())
        bound = bound if abs(bound) < model.infinity() else -math.inf
        # Constraints, of which there is one for each entry and more, may be violated a little each.
        slack = 2.0 * _FEASIBLE * (1.0 + len(self._pruned) + abs(bound)) if math.isfinite(bound) else 0.0
        return _Answer(
            self._mask(), bound * self._unit, slack * self._unit, STATUSES[status], int(model.getNTotalNodes())
        )

    def _mask(self) -> Tensor | None:
        """Return the incumbent, rounded."""
        if self._model.getNSols() == 0:
            return None
        best = self._model.getBestSol()
        values = [self._model.getSolVal(best, variable) for variable in self._pruned]
        return (torch.tensor(values, dtype=torch.float64) < 0.5).view(self._shape)


def _unit(rows: Sequence[_Row], pruned: Tensor) -> float:
    """Return the power of two by which the objective is divided, so that SCIP's tolerances are small beside it.

    The first incumbent's error is then about the number of entries, unless coefficients would become too large.
    """
    error = sum(float(p @ row.quadratic @ p + row.linear @ p) for row, p in zip(rows, pruned, strict=True))
    size = sum(float(row.quadratic.diagonal().abs().sum() + row.linear.abs().sum()) for row in rows)
    size = max(size, *(float(row.quadratic.abs().amax()) for row in rows)) / _RANGE
    aim = max(abs(error), size) / pruned.numel()
    return 2.0 ** math.ceil(math.log2(aim)) if aim > 0.0 else 1.0


def _handler(stops: Callable[[], bool]) -> Any:
    """Return an event handler that asks whether to stop; `stopped` and `error` say what came of it."""
    from pyscipopt import SCIP_EVENTTYPE, Eventhdlr

    events = (SCIP_EVENTTYPE.NODESOLVED, SCIP_EVENTTYPE.LPSOLVED, SCIP_EVENTTYPE.PRESOLVEROUND)

    class Handler(Eventhdlr):  # type: ignore[misc]
        stopped = False
        error: BaseException | None = None

        def eventinit(self) -> None:
            for event in events:
                self.model.catchEvent(event, self)

        def eventexec(self, event: object) -> None:
            if self.stopped or self.error is not None:
                return
            try:
                self.stopped = stops()
            except BaseException as error:  # it must not pass through SCIP
                self.error = error
            if self.stopped or self.error is not None:
                self.model.interruptSolve()

    return Handler()
