"""Column subset selection against regressions on the inputs, finite differences and enumeration, on edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.oracles import AtMost, PerRow
from maskopt.problems import ColumnSubset
from maskopt.solvers import DIRECTIONS, BruteForce, FrankWolfe, solve
from tests.helpers import examples
from tests.subsets import Case, cases, choices


def drawn(case: Case, data: st.DataObject) -> Tensor:
    return torch.tensor(data.draw(st.lists(st.booleans(), min_size=case.number, max_size=case.number)))


def near(case: Case, actual: float | Tensor, expected: float, others: float = 0.0) -> bool:
    """Ten digits of what is compared, and fourteen of what it is a difference of."""
    return abs(float(actual) - expected) <= 1e-9 * (abs(expected) + others) + 1e-13 * case.scale


@given(st.data(), cases())
@examples(150)
def test_objective_is_what_a_regression_leaves(data: st.DataObject, case: Case) -> None:
    kept, problem = drawn(case, data), case.problem()
    assert near(case, problem.objective(kept.unsqueeze(0))[0], case.error(kept))
    assert near(case, problem.scale()[0], case.scale)


@given(st.data(), cases(ridges=(0.01, 1.0)))
@examples(150)
def test_changes_are_differences_of_regressions(data: st.DataObject, case: Case) -> None:
    kept, problem = drawn(case, data), case.problem()
    before = case.error(kept)
    costs, gains, swaps = problem.removal_costs(kept), problem.addition_gains(kept), problem.swap_changes(kept)
    assert bool((costs[~kept] == 0).all())
    assert bool((gains[kept] == 0).all())
    for one in range(case.number):
        other = kept.clone()
        other[one] = ~kept[one]
        after = case.error(other)
        change = costs[one] if kept[one] else -gains[one]
        assert near(case, change, after - before, after + before)
        for two in range(case.number):
            if not kept[one] or kept[two]:
                assert swaps[one, two] == math.inf
                continue
            other = kept.clone()
            other[one], other[two] = False, True
            after = case.error(other)
            assert near(case, swaps[one, two], after - before, after + before)


@given(st.data(), cases())
@examples(100)
def test_refitted_weights_are_those_of_the_regression(data: st.DataObject, case: Case) -> None:
    kept, problem = drawn(case, data), case.problem()
    weight = problem.refit(kept)
    assert not weight[:, ~kept[case.units]].any()
    error = ((case.target - weight) @ case.x).square().sum()
    assert near(case, error, case.error(kept))


@given(cases())
@examples(100)
def test_relaxation_is_exact_on_masks(case: Case) -> None:
    problem = case.problem()
    for kept in choices(case.number):
        point = problem.evaluate(kept.double().unsqueeze(0))
        assert near(case, problem.value(point)[0] * problem.unit, case.error(kept))


@given(st.data(), cases())
@examples(100)
def test_gradient_is_the_finite_difference(data: st.DataObject, case: Case) -> None:
    problem = case.problem()
    seed = data.draw(st.integers(0, 999))
    x = 0.1 + 0.8 * torch.rand(problem.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradient, step = problem.evaluate(x.clone()).gradient, 1e-4
    for unit in range(case.number):
        ahead, behind = x.clone(), x.clone()
        ahead[0, unit] += step
        behind[0, unit] -= step
        change = problem.value(problem.evaluate(ahead)) - problem.value(problem.evaluate(behind))
        assert float(change) / (2 * step) == pytest.approx(
            float(gradient[0, unit]), rel=1e-5, abs=1e-8 * case.scale / problem.unit
        )


@given(st.data(), cases())
@examples(100)
def test_relaxation_is_convex_between_points(data: st.DataObject, case: Case) -> None:
    problem, random = case.problem(), torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    one, two = (torch.rand(problem.shape, generator=random, dtype=torch.float64) for _ in range(2))
    one[:, ::2] = one[:, ::2].round()  # some at the ends
    ends = [float(problem.value(problem.evaluate(x))) for x in (one, two)]
    middle = float(problem.value(problem.evaluate((one + two) / 2)))
    assert middle <= sum(ends) / 2 + 1e-12 * case.scale / problem.unit


@given(st.data(), cases())
@examples(100)
def test_linear_models_less_the_error_bound_every_choice(data: st.DataObject, case: Case) -> None:
    problem, random = case.problem().double(), torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = torch.rand(problem.shape, generator=random, dtype=torch.float64)
    x[:, ::3] = x[:, ::3].round()
    point = problem.evaluate(x)
    start, slopes = problem.bound_from(x[0])
    for kept in choices(case.number):
        model = problem.value(point) + (point.gradient * (kept.double() - x)).sum(1) - problem.convexity_error(point)
        exact = float(problem.objective(kept.unsqueeze(0)))
        assert float(model) * problem.unit <= exact * (1 + 1e-12)
        assert float(start + slopes[~kept].sum()) * problem.unit <= exact * (1 + 1e-12)


@given(cases())
@examples(60)
def test_error_of_convexity_is_rounding(case: Case) -> None:
    problem = case.problem()
    point = problem.evaluate(torch.full(problem.shape, 0.5, dtype=torch.float64))
    error = problem.convexity_error(point)
    assert float(error) <= 1e-8 * case.scale / problem.unit


@given(st.data(), cases())
@examples(60)
def test_brute_force_finds_the_least_regression(data: st.DataObject, case: Case) -> None:
    keep = data.draw(st.integers(0, case.number))
    least = min(case.error(kept) for kept in choices(case.number, keep))
    result = solve(case.problem(), PerRow(keep), BruteForce())
    assert near(case, result.total, least)
    assert result.lower_bound is not None
    assert float(result.lower_bound.sum()) <= least + 1e-9 * least + 1e-12 * case.scale


@pytest.mark.parametrize("direction", sorted(DIRECTIONS))
@given(st.data(), cases())
@examples(15)
def test_bounds_of_frank_wolfe_hold(direction: str, data: st.DataObject, case: Case) -> None:
    keep = data.draw(st.integers(0, case.number))
    masks, solver = PerRow(keep), FrankWolfe(direction=direction, iterations=25)
    problem = case.problem()
    if not solver.requirements.met(problem, masks):
        return
    result = solve(problem, masks, solver)
    least = float(
        problem.rows(torch.zeros(len(choices(case.number, keep)), dtype=torch.long))
        .objective(choices(case.number, keep))
        .min()
    )
    assert result.lower_bound is not None
    assert float(result.lower_bound.sum()) <= least * (1 + 1e-12)
    assert result.total >= least * (1 - 1e-12)


@given(st.data(), cases())
@examples(60)
def test_fewer_units_never_help(data: st.DataObject, case: Case) -> None:
    keep = data.draw(st.integers(0, case.number))
    problem = case.problem()
    if not BruteForce().requirements.met(problem, AtMost(PerRow(keep))):
        return
    one, other = (solve(problem, masks, BruteForce()) for masks in (PerRow(keep), AtMost(PerRow(keep))))
    assert near(case, one.total, other.total)


@given(st.data(), cases(), st.integers(-60, 60), st.integers(-60, 60))
@examples(60)
def test_powers_of_two_change_no_digit(data: st.DataObject, case: Case, target: int, inputs: int) -> None:
    kept = drawn(case, data)
    plain = case.problem()
    scaled = ColumnSubset(case.target * 2.0**target, case.x @ case.x.T * 4.0**inputs, case.units)
    factor = 4.0 ** (target + inputs)
    assert torch.equal(scaled.objective(kept.unsqueeze(0)), plain.objective(kept.unsqueeze(0)) * factor)
    assert torch.equal(scaled.swap_changes(kept), plain.swap_changes(kept) * factor)
    assert torch.equal(scaled.refit(kept), plain.refit(kept) * 2.0**target)


@given(st.data(), cases(ridges=(0.01, 1.0)), st.integers(0, 99))
@examples(60)
def test_inputs_of_any_size_give_the_same_errors(data: st.DataObject, case: Case, seed: int) -> None:
    kept, random = drawn(case, data), torch.Generator().manual_seed(seed)
    power = 10.0 ** torch.randint(-6, 7, case.x.shape[:1], generator=random).double()
    other = Case(case.target / power, case.x * power.unsqueeze(1), case.units).problem()
    assert near(case, other.objective(kept.unsqueeze(0))[0], case.error(kept))


@given(st.data(), cases())
@examples(40)
def test_copies_are_the_problem(data: st.DataObject, case: Case) -> None:
    problem = case.problem()
    copies = problem.rows(torch.zeros(3, dtype=torch.long))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = torch.rand(copies.shape, generator=random, dtype=torch.float64)
    point = copies.evaluate(x)
    for row in range(3):
        alone = problem.evaluate(x[row : row + 1])
        assert torch.equal(point.gradient[row : row + 1], alone.gradient)
        assert torch.equal(copies.value(point)[row : row + 1], problem.value(alone))
