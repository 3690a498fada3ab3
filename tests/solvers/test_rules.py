"""Directions, steps and the loop, against grids, definitions and scipy."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize
from torch import Tensor
from torch.linalg import vecdot

from maskopt.oracles import PartitionMatroid
from maskopt.problems import Move, Problem
from maskopt.solvers.base import State, Watch
from maskopt.solvers.loop import frank_wolfe
from maskopt.solvers.rules import Conjugate, ExactStep, OpenLoopStep, Pool, Vanilla
from tests.helpers import FREE_SETS, SETS, Layer, examples, layers, magnitudes

SHAPE = (4, 8)


def each(per_row: Tensor) -> Tensor:
    return per_row


def together(per_row: Tensor) -> Tensor:
    return per_row.sum().expand_as(per_row)


POOLS = pytest.mark.parametrize("pool", [each, together], ids=["rows apart", "rows together"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int, shape: tuple[int, int] = SHAPE) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(shape[1], 2 * shape[1], generator=generator, dtype=torch.float64)
    return Layer(torch.randn(shape, generator=generator, dtype=torch.float64), x, "normal")


# Steps


@POOLS
@given(layers(rows=(1, 4), d=(1, 6)), st.sampled_from([0.0, 0.4, 1.0, 3.0, -1.0]), st.integers(0, 99))
@examples(200)
def test_exact_step_is_the_best_of_the_segment(pool: Pool, problem_layer: Layer, amount: float, seed: int) -> None:
    base = problem_layer.problem()
    problem = base.shifted(base.diagonal(), amount)  # convex, in between, concave
    point, end = problem.at(random(*base.shape, seed=seed)), random(*base.shape, seed=seed + 100)
    move = problem.along(end - point.x)
    share = ExactStep().share(0, problem, problem.gradient(point), move, pool)
    assert share.shape == (base.shape[0],)
    assert bool(((share >= 0) & (share <= 1)).all())
    if pool is together:
        assert bool((share == share[0]).all())

    def value(shares: Tensor) -> Tensor:
        return pool(problem.value(problem.at(point.x + shares.unsqueeze(1) * move.x)))

    grid = torch.stack([value(torch.full_like(share, at)) for at in np.linspace(0, 1, 101)])
    size = pool(magnitudes(base.scaled_weight, base.scaled_gram)) * (1 + abs(amount))
    assert bool((value(share) <= grid.amin(0) + 1e-12 * size).all())


@POOLS
def test_exact_step_where_nothing_changes(pool: Pool) -> None:
    problem = layer(0).problem()
    point = problem.at(random(*SHAPE))
    still = problem.along(torch.zeros(SHAPE, dtype=torch.float64))
    assert ExactStep().share(0, problem, problem.gradient(point), still, pool).tolist() == [0.0] * 4


def test_exact_step_of_a_linear_objective_goes_all_the_way() -> None:
    problem = Layer(torch.ones(3, 4).double(), torch.zeros(4, 5).double(), "").problem()
    problem = problem.shifted(torch.ones(3, 4).double(), 0.0)
    gradient = torch.ones(3, 4).double()
    move = problem.along(-gradient)
    assert ExactStep().share(0, problem, gradient, move, each).tolist() == [1.0] * 3
    uphill = problem.along(gradient.clone())
    assert ExactStep().share(0, problem, gradient, uphill, each).tolist() == [0.0] * 3


def test_open_loop_step() -> None:
    problem = layer(0).problem()
    move = problem.along(random(*SHAPE))
    shares = [OpenLoopStep().share(t, problem, move.gradient, move, each) for t in range(5)]
    assert [s.tolist() for s in shares] == [[2 / (t + 2)] * 4 for t in range(5)]
    assert OpenLoopStep(offset=4).share(0, problem, move.gradient, move, each).tolist() == [0.5] * 4


# Directions


@POOLS
@given(st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.2, 0.9]))
@examples(300)
def test_conjugate_moves_are_conjugate(pool: Pool, seed: int, amount: float, slack: float) -> None:
    base = layer(seed).problem()
    problem = base.shifted(base.diagonal(), amount)
    one, two = 2 * random(*SHAPE, seed=seed) - 1, 2 * random(*SHAPE, seed=seed + 1000) - 1
    previous, vertex = problem.along(one.clone()), problem.along(two.clone())
    chosen = Conjugate(slack).choose(problem, vertex, previous, pool)
    # The move is (1 - a) vertex + a previous, with one a for each row, or for all.
    a = vecdot(chosen.x - two, one - two) / vecdot(one - two, one - two)
    torch.testing.assert_close(chosen.x, torch.lerp(two, one, a.unsqueeze(1)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chosen.gradient, problem.along(chosen.x.clone()).gradient, rtol=1e-9, atol=1e-9)
    assert bool(((a >= -1e-12) & (a <= 1 - slack + 1e-12)).all())
    if pool is together:
        torch.testing.assert_close(a, a[:1].expand_as(a), rtol=1e-9, atol=1e-9)
    bent = problem.hessian(previous)
    cross, size = pool(vecdot(bent, chosen.x)), pool((bent.abs() * chosen.x.abs()).sum(1))
    inside = (a > 1e-9) & (a < 1 - slack - 1e-9)
    assert bool((cross.abs() <= 1e-9 * size)[inside].all())
    # At an end of the range, no inner share would have made them conjugate.
    ahead, back = pool(vecdot(bent, one)), pool(vecdot(bent, two))
    at_zero, root = a <= 1e-9, back / (back - ahead)
    assert bool(((root <= 1e-6) | (root >= 1 - slack - 1e-6))[at_zero | ~inside].all())


def test_conjugate_without_a_past_is_vanilla() -> None:
    problem = layer(3).problem()
    move = problem.along(random(*SHAPE))
    before = move.x.clone()
    for rule in (Conjugate(), Vanilla()):
        assert rule.choose(problem, move, None, each) is move
        assert torch.equal(move.x, before)


def test_conjugate_of_a_past_that_stood_still() -> None:
    problem = layer(3).problem()
    still, move = problem.along(torch.zeros(SHAPE, dtype=torch.float64)), problem.along(random(*SHAPE))
    before = move.x.clone()
    assert torch.equal(Conjugate().choose(problem, move, still, each).x, before)


# The loop


def run(
    problem: Problem,
    masks: PartitionMatroid,
    direction: object,
    step: object,
    iterations: int,
    start: Tensor | None = None,
) -> Tensor:
    if start is None:
        start = masks.center(problem.shape, problem.dtype, problem.device)
    before = start.clone()
    point, done = frank_wolfe(
        lambda _: problem,
        masks,
        start,
        direction=direction,
        step=step,
        iterations=iterations,
        watch=Watch("test", None, None),
    )
    assert done == iterations
    assert torch.equal(start, before)
    fresh = problem.at(point.x)
    torch.testing.assert_close(point.gradient, fresh.gradient, rtol=1e-6, atol=1e-8 * float(fresh.gradient.abs().max()))
    return point.x


def relaxed_optimum(problem: Problem, masks: PartitionMatroid) -> float:
    """Solve min f(x), A x = keep, 0 <= x <= 1 by an interior-point method that knows nothing of Frank-Wolfe."""
    shape = problem.shape
    rule = masks.milp_constraints(shape)

    def value(flat: np.ndarray) -> float:
        return float(problem.value(problem.at(torch.from_numpy(flat).view(shape))).sum())

    def gradient(flat: np.ndarray) -> np.ndarray:
        return problem.gradient(problem.at(torch.from_numpy(flat).view(shape))).flatten().numpy()

    size = shape[0] * shape[1]
    start = masks.center(shape, torch.float64, torch.device("cpu")).flatten().numpy()
    answer = minimize(
        value,
        start,
        jac=gradient,
        method="SLSQP",
        bounds=[(0, 1)] * size,
        constraints=[LinearConstraint(rule.A.toarray(), rule.lb, rule.ub)],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return float(answer.fun)


@pytest.mark.parametrize("name", ["per-row", "unstructured", "n:m", "blocks", "columns", "row counts"])
@pytest.mark.parametrize(
    ("direction", "step", "accuracy"),
    [
        (Vanilla(), OpenLoopStep(), 2e-3),
        (Vanilla(), ExactStep(), 2e-3),
        (Conjugate(), ExactStep(), 1e-3),
    ],
    ids=["open loop", "exact", "conjugate"],
)
def test_loop_approaches_the_relaxed_optimum(name: str, direction: object, step: object, accuracy: float) -> None:
    for seed in range(2):
        problem, masks = layer(seed).problem(), SETS[name](SHAPE, 0.5)
        best, scale = relaxed_optimum(problem, masks), float(problem.scale().sum())
        x = run(problem, masks, direction, step, 1500)
        value = float(problem.value(problem.at(x)).sum())
        assert value >= best - 1e-6 * scale
        assert value <= best + accuracy * scale


@pytest.mark.parametrize("name", FREE_SETS)
@pytest.mark.parametrize("direction", [Vanilla(), Conjugate()], ids=repr)
def test_exact_steps_never_climb(name: str, direction: object) -> None:
    problem, masks, values = layer(5).problem(), SETS[name](SHAPE, 0.4), []

    def record(state: State) -> None:
        values.append(problem.value(state.point).clone())

    frank_wolfe(
        lambda _: problem,
        masks,
        masks.center(SHAPE, torch.float64, torch.device("cpu")),
        direction=direction,
        step=ExactStep(),
        iterations=60,
        watch=Watch("test", record, None),
    )
    steps = torch.stack(values)
    if not masks.separable:
        steps = steps.sum(1, keepdim=True)
    assert len(values) == 60
    assert bool((steps.diff(dim=0) <= 1e-12 * steps[:-1]).all())


class Spy:
    """Conjugate directions that remember what they were given."""

    remembers: ClassVar[bool] = True

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def choose(self, objective: Problem, move: Move, previous: Move | None, pool: Pool) -> Move:
        chosen = Conjugate().choose(objective, move, previous, pool)
        self.seen.append((chosen.x.clone(), None if previous is None else previous.x.clone()))
        return chosen


@pytest.mark.parametrize("name", FREE_SETS)
def test_the_past_points_to_where_it_would_have_ended(name: str) -> None:
    """Points stay in the hull because the previous way, from here on, ends where it would have ended at full length."""
    problem, masks, spy, points = layer(1).problem(), SETS[name](SHAPE, 0.4), Spy(), []
    watch = Watch("test", lambda state: points.append(state.point.x.clone()), None)
    center = masks.center(SHAPE, torch.float64, torch.device("cpu"))
    frank_wolfe(lambda _: problem, masks, center, direction=spy, step=ExactStep(), iterations=40, watch=watch)
    assert len(points) == len(spy.seen) == 40
    counts = masks.kept_per_group(SHAPE).double()
    for t, (chosen, previous) in enumerate(spy.seen):
        for x in (points[t], points[t] + chosen):
            assert float(x.min()) >= -1e-9
            assert float(x.max()) <= 1 + 1e-9
            torch.testing.assert_close(masks.groups(x).sum(1), counts, rtol=0, atol=1e-9)
        if t:
            torch.testing.assert_close(points[t] + previous, points[t - 1] + spy.seen[t - 1][0], rtol=0, atol=1e-9)
        else:
            assert previous is None


def test_the_loop_counts_its_work() -> None:
    problem, masks, watch = layer(0).problem(), SETS["per-row"](SHAPE, 0.5), Watch("test", None, None)
    center = masks.center(SHAPE, torch.float64, torch.device("cpu"))
    frank_wolfe(lambda _: problem, masks, center, direction=Vanilla(), step=ExactStep(), iterations=9, watch=watch)
    assert watch.counters["lmo"] == 9


def test_open_loop_forgets_its_start() -> None:
    """The first step has length one, so only the first gradient depends on the start."""
    problem, masks = layer(2).problem(), SETS["per-row"](SHAPE, 0.5)
    center = masks.center(SHAPE, torch.float64, torch.device("cpu"))
    after = run(problem, masks, Vanilla(), OpenLoopStep(), 1, center)
    assert torch.equal(after.bool(), masks.lmo(problem.gradient(problem.at(center))))
    assert float((after - after.round()).abs().max()) <= 1e-15
