"""One model for SCIP: rows of an objective, a set of masks, a first incumbent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from maskopt.oracles import MilpFormulation
from maskopt.problems import Quadratic
from maskopt.problems.convexity import eigenvalue_floor
from maskopt.solvers.base import Status

__all__ = ["STATUSES", "Form", "Model", "Row", "row_of"]

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
class Row:
    """One row's objective p^T Q p + <linear, p> + constant of the pruned indicator p, float64, on the CPU."""

    quadratic: Tensor
    linear: Tensor
    constant: float

    def without(self, kept: Tensor) -> Row:
        """Return the objective for masks that keep some entries."""
        if not bool(kept.any()):
            return self
        free = (~kept).double()
        return Row(self.quadratic * free * free.unsqueeze(1), self.linear * free, self.constant)


def row_of(problem: Quadratic, row: int) -> Row:
    """Return a row's objective, read off gradients."""
    d = problem.shape[1]
    # Row i of the Hessian is the change of the gradient by unit vector i: d copies of the row, one for each.
    copies = problem.rows(torch.full((d,), row, device=problem.device))
    hessian = copies.hessian(copies.hvp(torch.eye(d, dtype=torch.float64, device=problem.device))).cpu()
    alone = problem.rows(slice(row, row + 1))
    kept = alone.evaluate(torch.ones((1, d), dtype=torch.float64, device=problem.device))
    return Row((hessian + hessian.T) / 4, -alone.gradient(kept)[0].cpu(), float(alone.value(kept)))


def _shift(matrix: Tensor) -> Tensor:
    """Return a diagonal D, shape (d,), such that the matrix less Diag(D) is positive semidefinite, proven.

    The stronger D is, the tighter is SCIP's relaxation; whatever diagonal is aimed at here is made safe below.
    """
    largest = float(matrix.abs().amax())
    if largest == 0.0:
        return torch.zeros(len(matrix), dtype=torch.float64)
    # The smallest eigenvalue of the matrix with unit diagonal is free of the channels' scales.
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


def _shifted(row: Row) -> Row:
    """Return the same objective of masks, with a convex quadratic part."""
    shift = _shift(row.quadratic)
    return Row(row.quadratic - torch.diag(shift), row.linear + shift, row.constant)


@dataclass(frozen=True)
class Answer:
    """What SCIP says about a row block, in the problem's unit; `bound` is its own, `margin` what it may be wrong by."""

    mask: Tensor | None
    bound: float
    margin: float
    status: Status
    nodes: int


class Model:
    """One fresh SCIP model.

    Parameters
    ----------
    settings : dict
        Of SCIP's own.
    form : {"convex", "raw"}
    rows : sequence of Row
        Of one row block.
    start : Tensor
        The first incumbent, boolean, shape (rows, d).
    kept : Tensor
        Entries that are not pruned, boolean, shape (rows, d).
    """

    def __init__(self, settings: dict[str, Any], form: Form, rows: Sequence[Row], start: Tensor, kept: Tensor) -> None:
        from pyscipopt import Model as Scip
        from pyscipopt.scip import Expr, ExprCons, Term

        self._expr, self._cons, self._term = Expr, ExprCons, Term
        self._shape, self._start, pruned = start.shape, start, (~start).double()
        if form == "convex":
            rows = [_shifted(row) for row in rows]
        self._unit = _unit(rows, pruned)
        self._model = model = Scip()
        model.hideOutput()
        # Probing of SCIP 10.0 can cut off the optimum; a test has an example.
        model.setParams({"numerics/feastol": _FEASIBLE, "propagating/probing/maxprerounds": 0, **settings})
        self._first = model.createSol()
        self._pruned: list[Any] = []
        for row, chosen, fixed in zip(rows, pruned, kept, strict=True):
            self._add(row, chosen, fixed, form)
        model.addObjoffset(sum(row.constant for row in rows) / self._unit)

    def _add(self, row: Row, chosen: Tensor, kept: Tensor, form: Form) -> None:
        """Add a row's variables, its part of the objective, and their values in the first incumbent."""
        matrix, linear = row.quadratic / self._unit, row.linear / self._unit
        entries = zip(linear.tolist(), chosen.tolist(), kept.tolist(), strict=True)
        pruned = [self._variable("B", cost, value, 0.0 if fixed else 1.0) for cost, value, fixed in entries]
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
            # No lower bound: that of pyscipopt is zero, and Q need not be positive semidefinite.
            top = self._variable("C", 1.0, size)
            self._constrain({**squares, self._term(top): -1.0}, None, 0.0)

    def _variable(self, kind: str, cost: float, value: float, most: float | None = None) -> Any:
        variable = self._model.addVar(vtype=kind, lb=0.0 if kind == "B" else None, ub=most, obj=cost)
        self._model.setSolVal(self._first, variable, value)
        return variable

    def _constrain(self, terms: dict[Any, float], lower: float | None, upper: float | None) -> None:
        # From a dictionary of coefficients: sums of expressions take minutes to build.
        self._model.addCons(self._cons(self._expr(terms), lower, upper))

    def choose_from(self, masks: MilpFormulation) -> None:
        """Add the constraints of a set on the flattened mask m = 1 - p, with the auxiliary variables they need."""
        matrix, ends = masks.matrix, (masks.constraints.lb, masks.constraints.ub)
        columns, own = [*self._pruned, *self._auxiliary(masks)], masks.entries
        for line in range(matrix.shape[0]):
            part = slice(matrix.indptr[line], matrix.indptr[line + 1])
            entries, values = matrix.indices[part].tolist(), matrix.data[part].tolist()
            size = max(map(abs, values), default=0.0)
            if size == 0.0:
                continue
            pairs = list(zip(entries, values, strict=True))
            # sum_i a_i m_i = total - sum_i a_i p_i: the line is negated, auxiliary variables with it.
            total = math.fsum(value for at, value in pairs if at < own)
            lower, upper = ((total - float(side[line])) / size for side in reversed(ends))
            terms = {self._term(columns[at]): (value if at < own else -value) / size for at, value in pairs}
            self._constrain(terms, *(end if math.isfinite(end) else None for end in (lower, upper)))

    def _auxiliary(self, masks: MilpFormulation) -> list[Any]:
        """Add auxiliary variables, with values for the first incumbent: SCIP ignores incomplete solutions."""
        values = masks.completed(self._start.numpy())
        variables = []
        for number, (integer, low, high) in enumerate(masks.extras):
            variable = self._model.addVar(vtype="I" if integer else "C", lb=low, ub=high, obj=0.0)
            if values is not None:
                self._model.setSolVal(self._first, variable, float(values[number]))
            variables.append(variable)
        return variables

    def solve(self, limit: float, stops: Callable[[], bool]) -> Answer:
        """Run SCIP for so many seconds, or until `stops` says so.

        Raises
        ------
        KeyboardInterrupt
            If the user interrupted SCIP.
        RuntimeError
            If SCIP ends for a reason that its limits do not explain.
        """
        model, handler = self._model, _handler(stops)
        model.addSol(self._first)
        model.setParam("limits/time", min(limit, 1e20))
        model.includeEventhdlr(handler, "monitor", "calls back whether to stop")
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
        return Answer(
            self._mask(), bound * self._unit, slack * self._unit, STATUSES[status], int(model.getNTotalNodes())
        )

    def _mask(self) -> Tensor | None:
        """Return the incumbent, rounded."""
        if self._model.getNSols() == 0:
            return None
        best = self._model.getBestSol()
        values = [self._model.getSolVal(best, variable) for variable in self._pruned]
        return (torch.tensor(values, dtype=torch.float64) < 0.5).view(self._shape)


def _unit(rows: Sequence[Row], pruned: Tensor) -> float:
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
