"""Every direction on every set and objective: against enumeration at every iteration, and invariances."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import MaskSet, PerRow
from maskopt.problems import Direction, Problem, Saliency
from maskopt.solvers import (
    DIRECTIONS,
    STEPS,
    DirectionRule,
    FrankWolfe,
    GapKind,
    IterationState,
    SearchDirection,
    Status,
    check_compatible,
    solve,
)
from maskopt.solvers.rules import row_block_of
from tests.helpers import (
    ALL_SETS,
    FRANK_WOLFE,
    SETS,
    SOLVERS,
    Layer,
    cheapest,
    combinations,
    examples,
    feasible,
    layers,
    sets,
)
from tests.loop_runs import CONVEX, WAVY, Bowl, Case, Diary, Steady, function_case, layer_case, normal, plain_layer

SHAPE = (4, 8)
ACTIVE = ["away", "pairwise", "blended-pairwise", "fully-corrective"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
EVERY = pytest.mark.parametrize("name", DIRECTIONS)

# The requirements of each rule, listed by hand.
NEEDS_OF_SET = {
    "dicg": ["inface", "max_step"],
    "blended-dicg": ["inface", "max_step"],
    "block-coordinate": ["groups", "ungroup"],
}
NEEDS_OF_PROBLEM = {
    "conjugate": ["hessian"],
    "fully-corrective": ["hessian"],
    "exact": ["hessian"],
    "short": ["smoothness"],
}


@functools.cache
def cases(shape: tuple[int, int] = SHAPE) -> dict[str, Case]:
    layer = plain_layer(0, shape)
    return {
        "layer": layer_case(layer),
        "shifted convex": layer_case(layer, -0.5),
        "shifted concave": layer_case(layer, 2.0),
        "function of rows": function_case("softplus", shape),
        "coupled function": function_case("root", shape, coupled=True),
        "shifted function": function_case("log-sum-exp", shape, shift=0.3),
    }


def member(masks: MaskSet, mask: Tensor) -> bool:
    """By the set's registered definition, and by its MILP formulation."""
    formulation = masks.formulation((mask.shape[0], mask.shape[1]))
    return formulation.contains(mask.numpy()) and feasible(masks, mask)


# All combinations


@combinations(6, name=DIRECTIONS, set_name=ALL_SETS, kind=cases())
def test_every_direction_runs_or_is_refused_on_every_set_and_objective(name: str, set_name: str, kind: str) -> None:
    case, masks, solver = cases()[kind], ALL_SETS[set_name](SHAPE, 0.5), FrankWolfe(direction=name, iterations=3)
    for seen, needs in ((case.problem, NEEDS_OF_PROBLEM), (masks, NEEDS_OF_SET)):
        missing = [method for method in needs.get(name, []) if not hasattr(seen, method)]
        if missing:
            with pytest.raises(MaskoptError) as error:
                solve(case.problem, masks, solver)
            lacks = "it must be a Quadratic" if needs is NEEDS_OF_PROBLEM else f"missing: {', '.join(missing)}"
            assert lacks in str(error.value)
            assert "is not compatible with FrankWolfe with" in str(error.value)
            assert str(error.value).count(".") == str(error.value).rstrip(".").count(".") + 1
            return
    result = solve(case.problem, masks, solver, record=1)
    assert member(masks, result.mask)
    assert torch.equal(result.objective, case.problem.objective(result.mask))
    scratch = case.errors(result.mask.unsqueeze(0))[0]
    if case.problem.coupled:
        assert result.total == pytest.approx(float(scratch.sum()), rel=1e-12)
    else:
        torch.testing.assert_close(result.objective, scratch, rtol=1e-12, atol=1e-13 * float(case.size.max()))
    assert torch.equal(result.scale, case.problem.scale())
    assert result.gap_kind is (GapKind.PROVEN if case.bounded else GapKind.STATIONARY)
    assert result.lower_bound.shape == (SHAPE[0] // row_block_of(case.problem, masks),)
    assert result.gap >= -1e-12 * float(case.size.sum())


@pytest.mark.parametrize("step", STEPS)
@EVERY
def test_every_step_runs_or_is_refused_with_every_direction(name: str, step: str) -> None:
    """The two tables decide which are compatible; the only other refusal is of stale gradients."""
    if name == "stochastic" and step not in ("open-loop", "log"):
        with pytest.raises(MaskoptError, match=r"keeps no gradient for .*Step.* to look at; choose an open-loop step"):
            FrankWolfe(direction=name, step=step)
        return
    solver = FrankWolfe(direction=name, step=step, iterations=4)
    for kind, case in cases().items():
        missing = [
            method
            for method in (*NEEDS_OF_PROBLEM.get(name, []), *NEEDS_OF_PROBLEM.get(step, []))
            if not hasattr(case.problem, method)
        ]
        masks = SETS["n:m" if len(kind) % 2 else "unstructured"](SHAPE, 0.5)
        if missing:
            with pytest.raises(MaskoptError, match=r"it must be a Quadratic; it is a (Function|Shifted)"):
                check_compatible(case.problem, masks, solver)
            continue
        result = solve(case.problem, masks, solver)
        assert member(masks, result.mask), kind
        if case.bounded:
            assert result.gap >= -1e-12 * float(case.size.sum())


def test_sentences_of_sets_name_the_protocol() -> None:
    class Bare(MaskSet):
        """A set with only the methods that every set has."""

        def __init__(self) -> None:
            self.inner = PerRow(0.5)

        def __repr__(self) -> str:
            return "Bare()"

        def check(self, shape: tuple[int, int]) -> None:
            self.inner.check(shape)

        def lmo(self, cost: Tensor) -> Tensor:
            return self.inner.lmo(cost)

        def contains(self, mask: Tensor) -> bool:
            return self.inner.contains(mask)

        def center(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
            return self.inner.center(shape, dtype, device)

        def milp_constraints(self, shape: tuple[int, int]) -> object:
            return self.inner.milp_constraints(shape)

    problem = plain_layer(0).problem()
    for name in DIRECTIONS:
        solver = FrankWolfe(direction=name, iterations=5)
        if name not in NEEDS_OF_SET:
            result = solve(problem, Bare(), solver)  # rows are then taken to be coupled, and there are no swaps
            assert PerRow(0.5).contains(result.mask)
            assert result.lower_bound.shape == (1,)
            continue
        methods = ", ".join(NEEDS_OF_SET[name])
        kind = "HasGroups" if name == "block-coordinate" else "HasFaces"
        with pytest.raises(MaskoptError) as error:
            solve(problem, Bare(), solver)
        assert str(error.value) == (
            f"Bare() is not compatible with FrankWolfe with {DIRECTIONS[name]()}: it must implement {methods}; "
            f"missing: {methods} (see maskopt.oracles.{kind})."
        )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"direction": "sideways"}, "There is no direction 'sideways'; choose one of vanilla, conjugate"),
        ({"step": "giant"}, "There is no step 'giant'; choose one of open-loop"),
        ({"iterations": 0}, "FrankWolfe needs iterations >= 1, a whole number; got 0"),
        ({"gap": -1.0}, "gap >= 0"),
        ({"gap": math.nan}, "gap >= 0"),
        ({"relative_gap": -1e-9}, "relative_gap >= 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        FrankWolfe(**settings)


# Against enumeration


def checked_history(case: Case, masks: MaskSet, solver: FrankWolfe, tolerance: float) -> None:
    """Compare every iteration with the optimum; `tolerance` times the size bounds the rounding of the enumeration."""
    result = solve(case.problem, masks, solver, record=1)
    best, size = case.minimum(masks)
    total, slack = float(best.sum()), tolerance * size
    history = result.history
    for bound, rounded, incumbent in zip(history["bound"], history["rounded"], history["incumbent"], strict=True):
        assert rounded >= total - float(slack.sum())
        assert incumbent >= total - float(slack.sum())
        assert math.isnan(bound) or bound <= total + float(slack.sum()), (bound, total)
    assert all(b <= a for a, b in itertools.pairwise(history["incumbent"]))
    assert all(not b < a for a, b in itertools.pairwise(history["bound"]))
    if case.bounded:
        assert result.gap_kind is GapKind.PROVEN
        assert result.lower_bound.dtype == torch.float64
        assert bool((result.lower_bound <= best + slack).all()), (result.lower_bound - best).max()
    else:
        assert result.gap_kind is GapKind.STATIONARY
        assert result.lower_bound is None
        assert all(map(math.isnan, history["bound"]))
    assert result.total >= total - float(slack.sum())
    assert member(masks, result.mask)


@DTYPES
@EVERY
@given(
    st.data(), layers(rows=(1, 3), d=(1, 6), exact=True), st.sampled_from([0.0, 0.0, 0.3, 1.0, 4.0, -0.5, -3.0, -1e7])
)
@examples(15)
def test_bounds_hold_at_every_iteration(
    name: str, dtype: torch.dtype, data: st.DataObject, layer: Layer, shift: float
) -> None:
    """With integers the optimum is exact, so bounds must hold without a tolerance."""
    assume(layer.weight.numel() <= 12)
    masks = data.draw(sets(layer.shape))
    checked_history(layer_case(layer, shift, dtype), masks, FrankWolfe(direction=name, iterations=9), 0.0)


@DTYPES
@EVERY
@given(st.data(), layers(rows=(1, 3), d=(1, 6), exact=False), st.sampled_from([0.0, 0.0, 0.3, 1.0, -0.5, -1e4]))
@examples(12)
def test_bounds_hold_at_every_iteration_on_real_data(
    name: str, dtype: torch.dtype, data: st.DataObject, layer: Layer, shift: float
) -> None:
    assume(layer.weight.numel() <= 12)
    masks = data.draw(sets(layer.shape))
    solver = FrankWolfe(direction=name, iterations=9, relative_gap=0.0)
    checked_history(layer_case(layer, shift, dtype), masks, solver, 1e-15 * sum(layer.shape))


@pytest.mark.parametrize("name", [name for name in DIRECTIONS if name not in NEEDS_OF_PROBLEM])
@given(
    st.data(),
    st.sampled_from([*CONVEX, *WAVY]),
    st.tuples(st.integers(1, 3), st.integers(1, 6)),
    st.booleans(),
    st.sampled_from([0.0, 0.0, 0.4, -0.4, -1e6]),
    st.sampled_from([True, True, False]),
    st.integers(0, 9999),
)
@examples(18)
def test_bounds_of_functions_hold_at_every_iteration(
    name: str,
    data: st.DataObject,
    kind: str,
    shape: tuple[int, int],
    coupled: bool,
    shift: float,
    declared: bool,
    seed: int,
) -> None:
    assume(shape[0] * shape[1] <= 12)
    masks = data.draw(sets(shape))
    case = function_case(kind, shape, seed, coupled=coupled, declared=declared, shift=shift)
    # The bound accounts for the rounding of the function; the enumeration rounds by a few units of its terms.
    checked_history(case, masks, FrankWolfe(direction=name, iterations=7), 2e-15)


@given(st.sampled_from(CONVEX), st.integers(0, 99), st.booleans())
@examples(30)
def test_float32_functions_prove_nothing(kind: str, seed: int, coupled: bool) -> None:
    case = function_case(kind, (2, 5), seed, coupled=coupled, dtype=torch.float32)
    checked_history(case, SETS["per-row"]((2, 5), 0.5), FrankWolfe(iterations=6), 1e-6)


@given(st.data(), st.integers(0, 999), st.sampled_from([0.0, 0.5, -0.5]))
@EVERY
@examples(15)
def test_bounds_of_a_user_defined_quadratic_hold_at_every_iteration(
    name: str, data: st.DataObject, seed: int, shift: float
) -> None:
    """A class of a few lines works with every direction, and its bounds hold."""
    masks, root = data.draw(sets((2, 6))), normal(6, 6, seed=seed)
    bowl = Bowl(root @ root.T, normal(2, 6, seed=seed + 1))

    def errors(chosen: Tensor) -> Tensor:
        x = chosen.double()
        return torch.einsum("nri,ij,nrj->nr", x, bowl.matrix, x) / 2 + (x * bowl.linear).sum(2)

    problem: Problem = bowl.shifted(bowl.diagonal(), shift) if shift else bowl
    size = bowl.matrix.abs().sum() + bowl.linear.abs().sum(1)
    checked_history(Case(problem, errors, size, True), masks, FrankWolfe(direction=name, iterations=8), 1e-15)


@EVERY
def test_scores_are_solved_at_once(name: str) -> None:
    """For a linear objective the first vertex is optimal, and the bound is tight."""
    for seed in range(3):
        problem, masks = Saliency(normal(*SHAPE, seed=seed)), SETS["n:m"](SHAPE, 0.5)
        for start in (None, masks.lmo_mask(normal(*SHAPE, seed=seed + 9))):
            result = solve(problem, masks, FrankWolfe(direction=name, iterations=60), start=start)
            assert torch.equal(result.mask, cheapest(masks, -problem.scores))
            assert result.gap == pytest.approx(0.0, abs=1e-9)


# Invariances

# Exact steps make the slopes of two vertices, or entries, equal, and rounding then decides which is next. Runs are
# compared only as long as rounding has decided nothing.
SENSITIVE = {"pairwise": 1, "blended-pairwise": 1, "dicg": 1, "blended-dicg": 1}


@EVERY
@given(st.integers(0, 999), st.floats(-50, 50), st.sampled_from(["per-row", "unstructured", "n:m", "blocks"]))
@examples(12)
def test_a_constant_in_the_gradient_shifts_values_and_bounds(
    name: str, seed: int, constant: float, set_name: str
) -> None:
    """c * sum(x) is c times the number kept: same masks, and values and bounds that much larger."""
    if name == "boosted":
        return  # it approximates the negative gradient itself, which contains the constant
    root, linear, masks = normal(8, 8, seed=seed), normal(*SHAPE, seed=seed + 1), SETS[set_name](SHAPE, 0.5)
    solver = FrankWolfe(direction=name, iterations=SENSITIVE.get(name, 2), gap=1e-9)
    results = [
        solve(Bowl(root @ root.T, linear + c), masks, solver, record=1) for c in (0.0, round(constant * 16) / 16)
    ]
    more = round(constant * 16) / 16 * SHAPE[1] / 2 * SHAPE[0]
    for column in ("value", "bound", "rounded", "incumbent"):
        one, two = (torch.tensor(result.history[column], dtype=torch.float64)[:-1] for result in results)
        torch.testing.assert_close(two, one + more, rtol=1e-8, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(*(torch.tensor(r.history["gap"][:-1]) for r in results), rtol=1e-6, atol=1e-5)
    assert torch.equal(results[0].mask, results[1].mask)


@EVERY
@given(st.integers(0, 999), st.sampled_from(["per-row", "n:m", "row counts", "protected rows"]))
@examples(6)
def test_reordering_rows_reorders_the_mask(name: str, seed: int, set_name: str) -> None:
    masks, order = SETS[set_name](SHAPE, 0.5), torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    root = normal(8, 8, seed=seed)
    problem = Steady(root @ root.T, normal(*SHAPE, seed=seed + 1))
    solver = FrankWolfe(direction=name, iterations=15, gap=1e-2)
    plain, turned = solve(problem, masks, solver), solve(problem.rows(order), masks.rows(order, SHAPE), solver)
    assert torch.equal(turned.mask, plain.mask[order])
    torch.testing.assert_close(turned.lower_bound, plain.lower_bound[order], rtol=1e-9, atol=1e-9)
    assert turned.status is plain.status


@pytest.mark.parametrize("name", [name for name in DIRECTIONS if name not in ("block-coordinate", "stochastic")])
@given(st.integers(0, 999))
@examples(10)
def test_reordering_groups_reorders_the_mask(name: str, seed: int) -> None:
    """Inputs permuted by whole groups (block-coordinate takes turns by position, samples are of columns)."""
    masks = SETS["n:m"](SHAPE, 0.5)
    layer = plain_layer(seed)
    order = torch.cat((torch.arange(4, 8), torch.arange(4)))
    turned_layer = Layer(layer.weight[:, order], layer.x[order], "")
    solver = FrankWolfe(direction=name, iterations=SENSITIVE.get(name, 2), polish=False)
    plain, turned = (solve(part.problem(), masks, solver) for part in (layer, turned_layer))
    assert torch.equal(turned.mask, plain.mask[:, order])
    torch.testing.assert_close(turned.lower_bound, plain.lower_bound, rtol=1e-6, atol=1e-6 * float(plain.scale.max()))


@DTYPES
@EVERY
@given(st.integers(0, 999), st.integers(-12, 12), st.sampled_from(["per-row", "unstructured", "n:m"]))
@examples(4)
def test_powers_of_two_scale_everything(name: str, dtype: torch.dtype, seed: int, power: int, set_name: str) -> None:
    """Every column scales exactly."""
    layer, masks = plain_layer(seed), SETS[set_name](SHAPE, 0.5)
    big = Layer(layer.weight * 2.0**power, layer.x, "")
    solver = FrankWolfe(direction=name, iterations=8)
    plain, scaled = (solve(part.problem(dtype), masks, solver, record=1) for part in (layer, big))
    assert torch.equal(plain.mask, scaled.mask)
    assert torch.equal(plain.lower_bound * 4.0**power, scaled.lower_bound)
    assert plain.history["iteration"] == scaled.history["iteration"]
    for column in ("value", "gap", "bound", "rounded", "incumbent"):
        one, two = (torch.tensor(result.history[column], dtype=torch.float64) for result in (plain, scaled))
        torch.testing.assert_close(one * 4.0**power, two, rtol=0, atol=0, equal_nan=True)
    assert plain.counters == scaled.counters


@given(st.data(), layers(rows=(1, 4), d=(1, 10)))
@EVERY
@examples(4)
def test_runs_are_deterministic(name: str, data: st.DataObject, layer: Layer) -> None:
    masks = data.draw(sets(layer.shape))
    for dtype in (torch.float64, torch.float32):
        one, two = (solve(layer.problem(dtype), masks, FRANK_WOLFE[name]) for _ in range(2))
        assert torch.equal(one.mask, two.mask)
        assert torch.equal(one.lower_bound, two.lower_bound)
        assert (one.iterations, one.status, one.counters) == (two.iterations, two.status, two.counters)
        assert one.sources == two.sources


@EVERY
def test_inputs_are_not_modified(name: str) -> None:
    layer = plain_layer(0)
    problem = layer.problem()
    weight, gram = problem.weight.clone(), problem.gram.clone()
    diagonal = problem.diagonal()
    for set_name in ("per-row", "unstructured", "protected blocks"):
        masks = SETS[set_name](SHAPE, 0.5)
        start = masks.lmo_mask(normal(*SHAPE))
        before = start.clone()
        solve(problem.shifted(diagonal, 0.5), masks, FRANK_WOLFE[name], start=start)
        assert torch.equal(start, before)
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.gram, gram)
    assert torch.equal(diagonal, problem.diagonal())


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_shifted_problems(name: str) -> None:
    """Shifts keep the errors of masks: solvers without a relaxation return the same mask, the others one as good."""
    problem, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)
    solver = SOLVERS[name]
    for amount in (0.7, -3.0):
        plain, shifted = (solve(p, masks, solver) for p in (problem, problem.shifted(problem.diagonal(), amount)))
        assert member(masks, shifted.mask)
        assert torch.equal(shifted.objective, problem.objective(shifted.mask))
        if not solver.relaxes:
            assert torch.equal(plain.mask, shifted.mask)
        if shifted.lower_bound is not None:
            best, size = layer_case(plain_layer(0)).minimum(masks)
            assert bool((shifted.lower_bound <= best + 1e-14 * size).all())


# The experiment of the literature


def hard_bowls(seeds: int, n: int = 60) -> Bowl:
    """Return one quadratic per seed, as the rows of one problem."""
    matrices, linear = [], []
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        root = random.standard_normal((n, n))
        matrices.append(torch.from_numpy(root.T @ root / n))
        linear.append(torch.from_numpy(random.standard_normal(n)))
    return Bowl(torch.stack(matrices), torch.stack(linear))


class Counting(Diary):
    """Counts the iterations that changed every row, and its active vertices after the last one."""

    def begin(self, state: IterationState) -> DirectionRule:
        self.ids = torch.arange(len(state.x))
        self.changes, self.active = torch.zeros(len(state.x)), torch.zeros(len(state.x), dtype=torch.int64)
        return super().begin(state)

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        self.rule.update(state, direction, step_size, max_step)
        self.changes[self.ids] += (step_size > 0).float()
        if hasattr(self.rule, "atoms"):
            self.active[self.ids] = self.rule.atoms.active

    def search_direction(self, state: IterationState) -> SearchDirection:
        return self.rule.search_direction(state)

    def correct(self, state: IterationState, direction: Direction) -> Direction:
        return self.rule.correct(state, direction)

    def take(self, rows: Tensor, blocks: Tensor) -> DirectionRule:
        self.rule, self.ids = self.rule.take(rows, blocks), self.ids[rows]
        return self


@pytest.mark.parametrize(
    ("name", "most"),
    [("dicg", 250), ("pairwise", 450), ("away", 800), ("blended-pairwise", 850), ("fully-corrective", 60)],
)
def test_linearly_convergent_directions_reach_a_gap_of_1e_8(name: str, most: int) -> None:
    """Keep 24 of 60 at random convex quadratics with exact steps: linear convergence at the expected rate."""
    counting = Counting(DIRECTIONS[name]())
    solver = FrankWolfe(direction=counting, step="exact", gap=1e-8, relative_gap=0.0, iterations=6000)
    result = solve(hard_bowls(12), PerRow(24), solver, record=0)
    assert result.status is Status.CONVERGED
    assert 10 <= float(counting.changes.quantile(0.5)) <= most
    assert result.iterations >= float(counting.changes.max())
    if name == "blended-pairwise":
        assert float(counting.active.double().quantile(0.5)) <= 40


def test_vanilla_does_not_reach_a_gap_of_1e_8() -> None:
    solver = FrankWolfe(step="exact", gap=1e-8, relative_gap=0.0, iterations=6000)
    assert solve(hard_bowls(1), PerRow(24), solver, record=0).status is Status.ITERATION_LIMIT
