"""Common to the suites of the Frank-Wolfe loop: objectives with an independent evaluation, and recorded runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp, minimize
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Direction, Function, Point, Problem, Quadratic
from maskopt.problems.base import shift_convexity_error
from maskopt.solvers import (
    DirectionRule,
    IterationState,
    LoopResult,
    Monitor,
    RowBlocks,
    SearchDirection,
    StepRule,
    frank_wolfe,
)
from maskopt.solvers.rules import row_block_of
from tests.helpers import Layer, errors_of, every_mask, magnitudes

Shape = tuple[int, int]
CPU = torch.device("cpu")


class Bowl(Quadratic):
    """x^T Q x / 2 + c^T x for every row x: the smallest class that defines an objective.

    Q has shape (d, d), or (rows, d, d) where each row has its own.
    """

    def __init__(self, matrix: Tensor, linear: Tensor) -> None:
        self.matrix, self.linear = matrix, linear

    @property
    def shape(self) -> Shape:
        return self.linear.shape[0], self.linear.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.dtype

    @property
    def device(self) -> torch.device:
        return self.linear.device

    def evaluate(self, x: Tensor) -> Point:
        return Point(x, self._product(x) + self.linear)

    def hvp(self, x: Tensor) -> Direction:
        return Direction(x, self._product(x))

    def _product(self, x: Tensor) -> Tensor:
        return x @ self.matrix if self.matrix.ndim == 2 else (x.unsqueeze(1) @ self.matrix).squeeze(1)

    def value(self, point: Point) -> Tensor:
        return ((point.gradient + self.linear) * point.x).sum(1, dtype=torch.float64) / 2

    def diagonal(self) -> Tensor:
        return (self.matrix.diagonal(dim1=-2, dim2=-1) / 2).expand(self.shape).clone()

    def smoothness(self) -> Tensor:
        return torch.linalg.eigvalsh(self.matrix)[..., -1].expand(len(self.linear)) * 1.0001

    def rows(self, index: slice | Tensor) -> Bowl:
        return type(self)(self.matrix if self.matrix.ndim == 2 else self.matrix[index], self.linear[index])

    def objective(self, mask: Tensor) -> Tensor:
        exact = self.double()
        return exact.value(exact.evaluate(mask.double()))

    def scale(self) -> Tensor:
        return torch.zeros(len(self.linear), dtype=torch.float64)

    def double(self) -> Bowl:
        return Bowl(self.matrix.double(), self.linear.double())

    def convexity_error(self, point: Point, shift: Tensor | None = None) -> Tensor:
        size = self.matrix.double().abs().sum((-2, -1)) + self.linear.double().abs().sum(1)
        return 1e-13 * size + shift_convexity_error(point, shift)


class Steady(Bowl):
    """A bowl whose rows do not depend on the batch: the rounding of a matrix product depends on its shape."""

    def _product(self, x: Tensor) -> Tensor:
        return torch.stack([row.unsqueeze(1).mul(self.matrix).sum(0) for row in x])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_layer(seed: int, shape: Shape = (4, 8)) -> Layer:
    """Return a layer without ties, of ordinary condition."""
    mixing = normal(shape[1], shape[1], seed=seed)
    return Layer(normal(*shape, seed=seed + 1000), mixing @ normal(shape[1], 2 * shape[1], seed=seed + 2000), "normal")


@dataclass(frozen=True)
class Case:
    """A problem and its objective evaluated by other means.

    Attributes
    ----------
    problem : Problem
    errors : callable
        Each row's objective (in full) of masks of shape (number, rows, d), float64; one column if rows are coupled.
    size : Tensor
        The size of the terms of each row's sum: tolerances for rounding are relative to it.
    bounded : bool
        Whether solvers must prove bounds for it.
    """

    problem: Problem
    errors: Callable[[Tensor], Tensor]
    size: Tensor
    bounded: bool

    def minimum(self, masks: MaskSet) -> tuple[Tensor, Tensor]:
        """Return the optimum of every row block by enumeration, and the size of what was added up."""
        rows, d = self.problem.shape
        row_block = row_block_of(self.problem, masks)
        best = []
        for first in range(0, rows, row_block):
            part = masks if row_block == rows else masks.rows(slice(first, first + row_block), (rows, d))
            chosen = every_mask(part, (row_block, d))
            errors = self.errors(_at_rows(chosen, first, rows))
            mine = errors.sum(1) if self.problem.coupled else errors[:, first : first + row_block].sum(1)
            best.append(mine.min())
        return torch.stack(best), self.size.view(-1, row_block).sum(1)


def _at_rows(chosen: Tensor, first: int, rows: int) -> Tensor:
    """Return masks of all rows that are `chosen` from row `first` on; the other rows are arbitrary."""
    whole = torch.ones((len(chosen), rows, chosen.shape[2]), dtype=torch.bool)
    whole[:, first : first + chosen.shape[1]] = chosen
    return whole


def layer_case(layer: Layer, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> Case:
    problem = base = layer.problem(dtype)
    if shift:
        problem = base.shifted(base.diagonal(), shift)

    def errors(chosen: Tensor) -> Tensor:
        return errors_of(base.weight, base.gram, chosen)

    return Case(problem, errors, magnitudes(base.weight, base.gram), True)


# (rowwise terms in torch, the same in numpy), of z = x A + b, shape (..., k).
_TERMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[np.ndarray], np.ndarray]]] = {
    "softplus": (
        lambda z: torch.nn.functional.softplus(z, threshold=1e9).sum(-1),
        lambda z: np.logaddexp(0.0, z).sum(-1),
    ),
    "logistic": (lambda z: -torch.nn.functional.logsigmoid(-z).sum(-1), lambda z: np.logaddexp(0.0, z).sum(-1)),
    "powers": (lambda z: z.pow(4).sum(-1), lambda z: (z**4).sum(-1)),
    "root": (lambda z: (z.square() + 0.25).sqrt().sum(-1), lambda z: np.hypot(z, 0.5).sum(-1)),
    "log-sum-exp": (lambda z: torch.logsumexp(z, -1), lambda z: np.log(np.exp(z - z.max()).sum(-1)) + z.max()),
    "waves": (lambda z: z.sin().sum(-1), lambda z: np.sin(z).sum(-1)),
    "bumps": (lambda z: torch.sigmoid(z).sum(-1), lambda z: (1.0 / (1.0 + np.exp(-z))).sum(-1)),
}
CONVEX = ["softplus", "logistic", "powers", "root", "log-sum-exp"]
WAVY = ["waves", "bumps"]


def function_case(
    kind: str,
    shape: Shape,
    seed: int = 0,
    *,
    coupled: bool = False,
    declared: bool = True,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Return a torch callable of linear maps of the mask; if it is declared convex, solvers must prove bounds."""
    call, reference = _TERMS[kind]
    rows, d = shape
    maps, offset = normal(rows, d, 3, seed=seed), normal(rows, 1, 3, seed=seed + 1)
    maps, offset = maps.to(dtype), offset.to(dtype)

    def function(x: Tensor) -> Tensor:
        z = torch.bmm(x.unsqueeze(1), maps.to(x.dtype)) + offset.to(x.dtype)
        return call(z.flatten() if coupled else z.squeeze(1))

    def errors(chosen: Tensor) -> Tensor:
        z = np.einsum("nrd,rdk->nrk", chosen.double().numpy(), maps.double().numpy()) + offset.double().numpy()[:, 0]
        values = (
            reference(z.reshape(len(z), -1))[:, None]
            if coupled
            else np.stack([reference(z[:, r]) for r in range(rows)], 1)
        )
        return torch.from_numpy(values)

    problem: Problem = Function(function, shape, convex=declared and kind in CONVEX, dtype=dtype)
    if shift:
        problem = problem.shifted((0.5 + random(*shape, seed=seed + 2)).to(dtype), shift)
    size = (1 + maps.double().abs().sum((1, 2)) + offset.double().abs().sum((1, 2))) ** (4 if kind == "powers" else 1)
    return Case(problem, errors, size, declared and kind in CONVEX and dtype == torch.float64)


# States and runs of the loop


def state_at(
    problem: Problem, masks: MaskSet, x: Tensor, iteration: int = 0, row_block: int | None = None
) -> IterationState:
    row_blocks = RowBlocks(row_block_of(problem, masks) if row_block is None else row_block)
    return IterationState(problem, masks, row_blocks, iteration, problem.evaluate(x), Counter())


@dataclass
class Event:
    """One iteration of a run: its point, gradient, search direction, maximal step and step size."""

    x: Tensor
    gradient: Tensor
    search: Tensor
    max_step: Tensor
    step_size: Tensor


class Diary(DirectionRule):
    """A direction rule that records what another rule, `rule`, does."""

    def __init__(self, rule: DirectionRule, events: list[Event] | None = None) -> None:
        self.rule, self.events = rule, [] if events is None else events
        self.requires = rule.requires
        self.from_vertex, self.exact = rule.from_vertex, rule.exact

    def begin(self, state: IterationState) -> DirectionRule:
        self.rule = self.rule.begin(state)
        return self

    def search_direction(self, state: IterationState) -> SearchDirection:
        search = self.rule.search_direction(state)
        max_step = torch.ones(len(state.x), dtype=state.x.dtype) if search.max_step is None else search.max_step
        event = Event(
            state.x.clone(), state.gradient.clone(), search.vector.clone(), max_step.clone(), torch.zeros_like(max_step)
        )
        self.events.append(event)
        return search

    def correct(self, state: IterationState, direction: Direction) -> Direction:
        corrected = self.rule.correct(state, direction)
        self.events[-1].search = corrected.vector.clone()
        return corrected

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        self.events[-1].step_size = step_size.clone()
        self.rule.update(state, direction, step_size, max_step)

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        return Diary(self.rule.take(rows, blocks), self.events)


def starts(problem: Problem, masks: MaskSet, direction: DirectionRule) -> Tensor:
    """Return a point that a direction may start from: the hull's center or a vertex."""
    center = masks.center(problem.shape, problem.dtype, CPU)
    return masks.lmo(problem.gradient(problem.evaluate(center.clone()))) if direction.from_vertex else center


def run_loop(
    problem: Problem,
    masks: MaskSet,
    direction: DirectionRule,
    step: StepRule,
    iterations: int,
    *,
    start: Tensor | None = None,
    monitor: Monitor | None = None,
    tolerance: float | Tensor | None = None,
    refresh: int = 0,
    rows: Tensor | None = None,
) -> LoopResult:
    start = starts(problem, masks, direction) if start is None else start
    before = start.clone()
    if isinstance(tolerance, float):
        tolerance = torch.full((problem.shape[0],), tolerance, dtype=problem.dtype)
    end = frank_wolfe(
        lambda _: problem,
        masks,
        start,
        direction=direction,
        step=step,
        iterations=iterations,
        monitor=monitor or Monitor("test", None, None),
        tolerance=tolerance,
        refresh=refresh,
        rows=rows,
    )
    assert torch.equal(start, before)
    return end


class Hull:
    """The inequalities of a set's LP formulation."""

    def __init__(self, masks: MaskSet, shape: Shape) -> None:
        self.formulation = masks.formulation(shape)
        rule = self.formulation.constraints
        self.matrix, self.low, self.high = rule.A.toarray(), rule.lb, rule.ub
        self.size = 1.0 + np.abs(self.matrix).sum(1)

    def holds(self, x: Tensor, tolerance: float = 1e-9) -> bool:
        """Whether a relaxed mask satisfies them for some values of the auxiliary variables."""
        flat, entries = x.double().flatten().numpy(), self.formulation.entries
        left, margin = self.matrix[:, :entries] @ flat, tolerance * self.size
        low, high = self.low - left - margin, self.high - left + margin
        inside = flat.min() >= -tolerance and flat.max() <= 1 + tolerance
        if self.formulation.auxiliary:
            other = LinearConstraint(self.matrix[:, entries:], low, high)
            bounds = Bounds(self.formulation.lower, self.formulation.upper)
            return inside and milp(np.zeros(self.formulation.auxiliary), constraints=other, bounds=bounds).status == 0
        return inside and bool(((low <= 0) & (high >= 0)).all())


def relaxed_optimum(problem: Problem, masks: MaskSet) -> float:
    """Solve min f(x) over the set's LP formulation by SLSQP, independently of the loop."""
    shape = problem.shape
    rule = masks.formulation(shape).constraints

    def value(flat: np.ndarray) -> float:
        return float(problem.value(problem.evaluate(torch.from_numpy(flat).view(shape))).sum())

    def gradient(flat: np.ndarray) -> np.ndarray:
        return problem.gradient(problem.evaluate(torch.from_numpy(flat).view(shape))).flatten().numpy()

    answer = minimize(
        value,
        masks.center(shape, torch.float64, CPU).flatten().numpy(),
        jac=gradient,
        method="SLSQP",
        bounds=[(0, 1)] * (shape[0] * shape[1]),
        constraints=[LinearConstraint(rule.A.toarray(), rule.lb, rule.ub)],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return float(answer.fun)
