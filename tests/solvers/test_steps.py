"""Step rules against grids, scipy, formulas and each other."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from maskopt.problems import Direction, Function, Problem
from maskopt.solvers import (
    STEPS,
    AdaptiveStep,
    ExactStep,
    IterationState,
    LogStep,
    MonotoneStep,
    OpenLoopStep,
    RowBlocks,
    SecantStep,
    ShortStep,
    StepRule,
    Vanilla,
)
from tests.helpers import SETS, Layer, examples, layers, magnitudes
from tests.loop_runs import CONVEX, WAVY, Bowl, function_case, normal, plain_layer, random, run_loop

SHAPE = (4, 8)
TOGETHER = pytest.mark.parametrize("together", [False, True], ids=["rows apart", "rows together"])
AMOUNTS = st.sampled_from([0.0, 0.4, 1.0, 3.0, -1.0])


def state_of(problem: Problem, x: Tensor, together: bool, iteration: int = 0) -> IterationState:
    row_block = problem.shape[0] if together else 1
    return IterationState(
        problem, SETS["per-row"](problem.shape, 0.5), RowBlocks(row_block), iteration, problem.evaluate(x), Counter()
    )


def value_after(problem: Problem, x: Tensor, step_size: Tensor, search: Tensor, together: bool) -> Tensor:
    """Return the objective of every row block after steps of the given sizes."""
    value = problem.value(problem.evaluate(x + step_size.unsqueeze(1) * search))
    return value.sum().expand_as(value) if together else value


def grid(problem: Problem, x: Tensor, max_step: Tensor, search: Tensor, together: bool) -> Tensor:
    return torch.stack([value_after(problem, x, max_step * at, search, together) for at in np.linspace(0, 1, 101)])


def step_size_of(
    step: StepRule, problem: Problem, x: Tensor, search: Tensor, max_step: Tensor, together: bool = False
) -> Tensor:
    """Return the first step size of a rule; the rule must not modify its inputs."""
    state = state_of(problem, x.clone(), together)
    direction = problem.hvp(search.clone())
    step_size = step.begin(state).step_size(state, direction, max_step)
    assert step_size.shape == (problem.shape[0],)
    assert step_size.dtype == problem.dtype
    assert bool(((step_size >= 0) & (step_size <= max_step)).all())
    assert torch.equal(state.point.x, x)
    assert torch.equal(direction.vector, search)
    if together:
        assert bool((step_size == step_size[0]).all())
    return step_size


@TOGETHER
@given(layers(rows=(1, 4), d=(1, 6)), AMOUNTS, st.integers(0, 99), st.sampled_from([1.0, 0.3, 2.5, 0.0]))
@examples(200)
def test_exact_step_is_the_best_of_the_segment(
    together: bool, layer: Layer, amount: float, seed: int, most: float
) -> None:
    base = layer.problem()
    problem = base.shifted(base.diagonal(), amount)  # convex, in between, concave
    x = random(*base.shape, seed=seed)
    search = random(*base.shape, seed=seed + 100) - x
    max_step = torch.full((base.shape[0],), most, dtype=torch.float64)
    step_size = step_size_of(ExactStep(), problem, x, search, max_step, together)
    size = magnitudes(base.scaled_weight, base.scaled_gram) * (1 + abs(amount)) * (1 + most) ** 2
    size = size.sum() if together else size
    best = grid(problem, x, max_step, search, together).amin(0)
    assert bool((value_after(problem, x, step_size, search, together) <= best + 1e-12 * size).all())


@TOGETHER
@given(layers(rows=(1, 4), d=(1, 6)), AMOUNTS, st.integers(0, 99))
@examples(150)
def test_short_step_lowers_what_it_promises(together: bool, layer: Layer, amount: float, seed: int) -> None:
    """f(x + s d) <= f(x) + s <g, d> + s^2 L |d|^2 / 2, and the short step minimises the right-hand side."""
    base = layer.problem()
    problem = base.shifted(base.diagonal(), amount)
    x = random(*base.shape, seed=seed)
    search = random(*base.shape, seed=seed + 100) - x
    max_step = torch.ones(base.shape[0], dtype=torch.float64)
    step_size = step_size_of(ShortStep(), problem, x, search, max_step, together)
    smoothness = problem.smoothness()
    slope, square = (problem.gradient(problem.evaluate(x.clone())) * search).sum(1), search.square().sum(1)
    if together:
        smoothness, slope, square = (v.expand(len(x)) for v in (smoothness.max(), slope.sum(), square.sum()))
    model = step_size * slope + 0.5 * step_size**2 * smoothness * square
    size = magnitudes(base.scaled_weight, base.scaled_gram) * (1 + abs(amount)) * 10
    size = size.sum() if together else size
    change = value_after(problem, x, step_size, search, together) - value_after(
        problem, x, 0 * step_size, search, together
    )
    assert bool((change <= model + 1e-12 * size).all())
    for other in np.linspace(0, 1, 41):
        assert bool((model <= other * slope + 0.5 * other**2 * smoothness * square + 1e-12 * size).all())


@given(layers(rows=(1, 4), d=(1, 7)), AMOUNTS)
@examples(150)
def test_smoothness_bounds_every_curvature(layer: Layer, amount: float) -> None:
    base = layer.problem()
    problem = base.shifted(base.diagonal(), amount)
    for row, bound in enumerate(problem.smoothness().tolist()):
        weight = base.scaled_weight[row]
        matrix = 2 * weight.unsqueeze(1) * base.scaled_gram * weight - 2 * amount * torch.diag(base.diagonal()[row])
        assert float(torch.linalg.eigvalsh(matrix).abs().max()) <= bound * (1 + 1e-12) + 1e-300


@TOGETHER
@pytest.mark.parametrize("name", STEPS)
def test_a_zero_direction_has_a_zero_step(name: str, together: bool) -> None:
    nothing = torch.zeros(SHAPE, dtype=torch.float64)
    for problem in (plain_layer(0).problem(), function_case("softplus", SHAPE).problem):
        if name in ("exact", "short") and isinstance(problem, Function):
            continue
        for most in (1.0, math.inf, 0.0):
            max_step = torch.full((4,), most, dtype=torch.float64)
            step_size = step_size_of(STEPS[name](), problem, random(*SHAPE), nothing, max_step, together)
            assert bool(torch.isfinite(step_size).all())
            if name not in ("open-loop", "log"):
                assert step_size.tolist() == [0.0] * 4


@TOGETHER
@pytest.mark.parametrize("name", STEPS)
def test_a_maximal_step_of_zero_gives_a_zero_step(name: str, together: bool) -> None:
    x, search = random(*SHAPE), normal(*SHAPE)
    for problem in (plain_layer(0).problem(), function_case("softplus", SHAPE).problem):
        if name in ("exact", "short") and isinstance(problem, Function):
            continue
        step_size = step_size_of(STEPS[name](), problem, x, search, torch.zeros(4, dtype=torch.float64), together)
        assert step_size.tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["exact", "short", "secant", "adaptive", "monotone"])
def test_ascent_directions_have_a_zero_step(name: str) -> None:
    max_step = torch.ones(4, dtype=torch.float64)
    for seed in range(5):
        for problem in (plain_layer(seed).problem(), function_case("softplus", SHAPE, seed).problem):
            if name in ("exact", "short") and isinstance(problem, Function):
                continue
            x = random(*SHAPE, seed=seed)
            search = 0.1 * problem.gradient(problem.evaluate(x.clone()))
            assert step_size_of(STEPS[name](), problem, x, search, max_step).tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["exact", "short", "secant", "adaptive"])
def test_linear_objectives_take_the_maximal_step(name: str) -> None:
    problem = Bowl(torch.zeros(8, 8, dtype=torch.float64), normal(*SHAPE))
    max_step = torch.tensor([1.0, 0.25, 0.0, 3.0], dtype=torch.float64)
    step_size = step_size_of(STEPS[name](), problem, random(*SHAPE), -problem.linear, max_step)
    assert torch.equal(step_size, max_step)
    assert step_size_of(STEPS[name](), problem, random(*SHAPE), problem.linear.clone(), max_step).tolist() == [0.0] * 4


def test_open_loop_steps_follow_the_formula() -> None:
    problem = plain_layer(0).problem()
    x, direction = random(*SHAPE), problem.hvp(random(*SHAPE))
    max_step = torch.tensor([1.0, 0.6, 0.1, 0.0], dtype=torch.float64)
    for iteration in (0, 1, 2, 5, 1000):
        state = state_of(problem, x, False, iteration)
        expected = [min(2 / (iteration + 2), most) for most in max_step.tolist()]
        assert OpenLoopStep().step_size(state, direction, max_step).tolist() == expected
        expected = [min(2 / (iteration + 4), most) for most in max_step.tolist()]
        assert OpenLoopStep(offset=4).step_size(state, direction, max_step).tolist() == expected


def test_log_steps_follow_the_formula() -> None:
    problem = plain_layer(0).problem()
    x, direction, max_step = random(*SHAPE), problem.hvp(random(*SHAPE)), torch.tensor([1.0, 0.6, 0.1, 0.0])
    for t in (0, 1, 2, 5, 1000):
        size = (2 + math.log(t + 1)) / (t + 2 + math.log(t + 1))
        step_size = LogStep().step_size(state_of(problem, x, False, t), direction, max_step.double())
        assert step_size.tolist() == pytest.approx([min(size, most) for most in max_step.double().tolist()], rel=1e-15)
        assert size <= 1


@TOGETHER
@pytest.mark.parametrize("kind", CONVEX)
def test_secant_step_finds_the_minimum(kind: str, together: bool) -> None:
    for seed in range(6):
        for coupled in (False, True) if together else (False,):
            problem = function_case(kind, SHAPE, seed, coupled=coupled).problem
            x = random(*SHAPE, seed=seed)
            search = random(*SHAPE, seed=seed + 50) - x
            most = [1.0, 0.4, 0.05][seed % 3]
            max_step = torch.full((4,), most, dtype=torch.float64)
            step_size = step_size_of(SecantStep(evaluations=40), problem, x, search, max_step, together)
            for row in range(1 if together else 4):

                def value(
                    at: float, row: int = row, line: tuple[Problem, Tensor, Tensor] = (problem, x, search)
                ) -> float:
                    step_size = torch.full((4,), at, dtype=torch.float64)
                    return float(value_after(line[0], line[1], step_size, line[2], together)[row])

                best = minimize_scalar(value, bounds=(0, most), method="bounded", options={"xatol": 1e-12})
                ends = min(best.fun, value(0.0), value(most))
                assert value(float(step_size[row])) <= ends + 1e-10 * (1 + abs(ends))


@TOGETHER
@given(layers(rows=(1, 4), d=(1, 6)), st.sampled_from([0.0, 0.4, -1.0]), st.integers(0, 99))
@examples(80)
def test_secant_is_exact_for_convex_quadratics(together: bool, layer: Layer, amount: float, seed: int) -> None:
    base = layer.problem()
    problem = base.shifted(base.diagonal(), amount) if amount <= 0 else base
    x = random(*base.shape, seed=seed)
    search = random(*base.shape, seed=seed + 100) - x
    max_step = torch.ones(base.shape[0], dtype=torch.float64)
    values = [
        value_after(problem, x, step_size_of(step, problem, x, search, max_step, together), search, together)
        for step in (SecantStep(), ExactStep())
    ]
    size = magnitudes(base.scaled_weight, base.scaled_gram) * 2
    size = size.sum() if together else size
    torch.testing.assert_close(
        values[0] / size.clamp_min(1e-300), values[1] / size.clamp_min(1e-300), rtol=0, atol=1e-10
    )


@TOGETHER
@pytest.mark.parametrize("name", ["secant", "adaptive", "monotone"])
@pytest.mark.parametrize("kind", [*CONVEX, "layer", "concave"])
def test_steps_with_evaluations_never_increase_the_objective(kind: str, name: str, together: bool) -> None:
    """One rule over several directions, as its memory affects later steps; the default number of evaluations."""
    for seed in range(4):
        if kind in CONVEX:
            problem = function_case(kind, SHAPE, seed, coupled=together).problem
        else:
            base = plain_layer(seed).problem()
            problem = base.shifted(base.diagonal(), 4.0) if kind == "concave" else base
        x = random(*SHAPE, seed=seed)
        state = state_of(problem, x.clone(), together)
        rule = STEPS[name]().begin(state)
        first = value_after(problem, x, torch.zeros(4).double(), x, together)
        positive = 0
        for iteration in range(12):
            state = IterationState(
                problem, state.masks, state.row_blocks, iteration, problem.evaluate(x.clone()), Counter()
            )
            search = random(*SHAPE, seed=100 * seed + iteration) - x
            slope = (state.gradient * search).sum(1, keepdim=True)
            search = -search * torch.sign(slope.sum() if together else slope)
            max_step = torch.full((4,), [1.0, 0.2][iteration % 2], dtype=torch.float64)
            step_size = rule.step_size(state, problem.hvp(search.clone()), max_step)
            assert bool(((step_size >= 0) & (step_size <= max_step)).all())
            before, after = (value_after(problem, x, s, search, together) for s in (0 * step_size, step_size))
            assert bool((after <= before + 1e-12 * first.abs().clamp_min(1.0)).all())
            positive += int((step_size > 0).sum())
            x = x + step_size.unsqueeze(1) * search
        assert positive >= 40


@pytest.mark.parametrize("kind", WAVY)
@pytest.mark.parametrize("name", ["secant", "adaptive", "monotone"])
def test_steps_are_positive_on_functions_that_are_not_convex(kind: str, name: str) -> None:
    """Where the curvature is negative first and positive later, descent directions have positive steps."""
    positive = 0
    for seed in range(10):
        problem = function_case(kind, SHAPE, seed).problem
        x = random(*SHAPE, seed=seed)
        gradient = problem.gradient(problem.evaluate(x.clone()))
        search = -gradient / gradient.norm(dim=1, keepdim=True)
        step_size = step_size_of(STEPS[name](), problem, x, search, torch.full((4,), 3.0, dtype=torch.float64))
        assert bool((step_size > 0).all())
        positive += 4
    assert positive == 40


def test_adaptive_steps_recover_from_any_estimate() -> None:
    """Many maximal steps lower the estimate of the smoothness; a steep direction still has a positive step."""
    problem = function_case("root", SHAPE).problem
    x, max_step = random(*SHAPE), torch.full((4,), 1e-3, dtype=torch.float64)
    state = state_of(problem, x, False)
    rule = AdaptiveStep().begin(state)
    downhill = -problem.gradient(state.point)
    for _ in range(500):
        assert torch.equal(rule.step_size(state, problem.hvp(downhill), max_step), max_step)
    step_size = rule.step_size(state, problem.hvp(1e4 * downhill), torch.ones(4, dtype=torch.float64))
    assert bool((step_size > 0).all())


@pytest.mark.parametrize("kind", ["softplus", "powers", "waves"])
@pytest.mark.parametrize("name", ["secant", "adaptive", "monotone"])
def test_steps_evaluate_points_of_the_segment_only(kind: str, name: str) -> None:
    """However small the maximal step, no point outside the segment from x to x + max_step * search is evaluated."""
    case = function_case(kind, SHAPE)
    x = random(*SHAPE)
    search = 1000.0 * normal(*SHAPE)
    slopes = (case.problem.gradient(case.problem.evaluate(x.clone())) * search).sum(1, keepdim=True)
    search = -search * torch.sign(slopes)
    max_step = torch.tensor([0.0, 1e-6, 1e-4, 1e-5], dtype=torch.float64)
    ends = x + max_step.unsqueeze(1) * search
    low, high, seen = torch.minimum(x, ends) - 1e-12, torch.maximum(x, ends) + 1e-12, []

    def guarded(inside: Tensor) -> Tensor:
        seen.append(bool(((inside >= low) & (inside <= high)).all()))
        return case.problem.call(inside)

    problem = Function(guarded, SHAPE)
    seen.clear()
    step_size_of(STEPS[name](), problem, x, search, max_step)
    assert len(seen) >= 2
    assert all(seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_rule_forgets_its_last_run(name: str, dtype: torch.dtype) -> None:
    step, masks = STEPS[name](), SETS["per-row"](SHAPE, 0.5)
    ends = []
    for seed in (0, 1, 0):
        problem = plain_layer(seed).problem(dtype)
        ends.append(run_loop(problem, masks, Vanilla(), step, 15).point.x)
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[1])
    assert step == STEPS[name]()


@pytest.mark.parametrize("name", ["short", "adaptive", "monotone"])
def test_taken_rows_keep_the_estimates_of_their_rule(name: str) -> None:
    """Two iterations, then some rows are taken: the third step is that of these rows run alone."""
    problem, rows = plain_layer(3).problem(), torch.tensor([3, 1])
    alone = problem.rows(rows)
    masks, row_blocks = SETS["per-row"](SHAPE, 0.5), RowBlocks(1)
    x, max_step = random(*SHAPE), torch.ones(4, dtype=torch.float64)
    states = [
        IterationState(p, masks, row_blocks, 0, p.evaluate(y), Counter()) for p, y in ((problem, x), (alone, x[rows]))
    ]
    rules = [STEPS[name]().begin(state) for state in states]
    for turn in range(2):
        search = random(*SHAPE, seed=turn) - x
        rules[0].step_size(states[0], problem.hvp(search), max_step)
        rules[1].step_size(states[1], alone.hvp(search[rows]), max_step[:2])
    search = random(*SHAPE, seed=7)[rows] - x[rows]
    taken = rules[0].take(rows, rows)
    step_sizes = [rule.step_size(states[1], alone.hvp(search), max_step[:2]) for rule in (taken, rules[1])]
    torch.testing.assert_close(*step_sizes, rtol=1e-12, atol=0)


def test_monotone_steps_stay_halved() -> None:
    """f = x^2 / 2 from x = 1 along -4: half of the open-loop step overshoots, a quarter does not."""
    problem = Bowl(torch.eye(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    state = state_of(problem, torch.ones(1, 1, dtype=torch.float64), False)
    rule = MonotoneStep().begin(state)
    direction, max_step = (
        Direction(torch.full((1, 1), -4.0).double(), torch.full((1, 1), -4.0).double()),
        torch.ones(1).double(),
    )
    assert rule.step_size(state, direction, max_step).tolist() == [0.5]  # f(-1) = f(1) is no increase
    longer = Direction(direction.vector * 1.5, direction.product * 1.5)
    assert rule.step_size(state, longer, max_step).tolist() == [0.25]
    assert rule.step_size(state, direction, max_step).tolist() == [0.25]
