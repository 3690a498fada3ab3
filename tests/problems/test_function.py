"""Objectives given as torch callables: gradients, parts, shifts, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import PerRow
from maskopt.problems import Function, Problem
from maskopt.solvers import FrankWolfe, GapKind, solve
from tests.helpers import examples
from tests.loop_runs import CONVEX, WAVY, function_case, normal, random

SHAPE = (3, 5)
KINDS = [*CONVEX, *WAVY]


def difference(problem: Problem, x: Tensor, size: float = 1e-6) -> Tensor:
    """Return central differences of the sum over rows, entry by entry."""
    slopes = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[index] = size
        ahead, behind = (problem.value(problem.evaluate(y)).sum() for y in (x + step, x - step))
        slopes[index] = (ahead - behind) / (2 * size)
    return slopes


@pytest.mark.parametrize("shift", [0.0, 0.7, -2.0])
@pytest.mark.parametrize("coupled", [False, True], ids=["rows apart", "rows together"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind: str, coupled: bool, shift: float) -> None:
    for seed in range(3):
        problem = function_case(kind, SHAPE, seed, coupled=coupled, shift=shift).problem
        x = 0.1 + 0.8 * random(*SHAPE, seed=seed)
        point = problem.evaluate(x.clone())
        gradient = problem.gradient(point)
        torch.testing.assert_close(
            gradient, difference(problem, x), rtol=1e-5, atol=1e-5 * float(1 + gradient.abs().max())
        )
        assert torch.equal(point.x, x)
        assert problem.coupled == coupled


@given(st.sampled_from(KINDS), st.booleans(), st.sampled_from([0.0, 0.7, -2.0]), st.integers(0, 99), st.floats(0, 1))
@examples(100)
def test_change_slope_and_advance_agree_with_evaluation(
    kind: str, coupled: bool, shift: float, seed: int, size: float
) -> None:
    problem = function_case(kind, SHAPE, seed, coupled=coupled, shift=shift).problem
    x, search = random(*SHAPE, seed=seed), normal(*SHAPE, seed=seed + 1) * 0.1
    step_size = torch.full((3,), size, dtype=torch.float64) * (
        1.0 if coupled else torch.tensor([1.0, 0.5, 0.0]).double()
    )
    point, direction = problem.evaluate(x.clone()), problem.hvp(search.clone())
    there = problem.evaluate(x + step_size.unsqueeze(1) * search)
    change = problem.change(point, direction, step_size)
    torch.testing.assert_close(change, problem.value(there) - problem.value(point))
    slope = problem.slope(point, direction, step_size)
    torch.testing.assert_close(slope, (problem.gradient(there) * search).sum(1))
    problem.advance(point, direction, step_size.unsqueeze(1))
    torch.testing.assert_close(point.x, there.x)
    torch.testing.assert_close(problem.gradient(point), problem.gradient(there))
    assert torch.equal(direction.vector, search)


@given(st.sampled_from(KINDS), st.sampled_from([0.0, 0.7, -2.0]), st.integers(0, 99))
@examples(80)
def test_masks_see_no_shift_and_values_agree(kind: str, shift: float, seed: int) -> None:
    for coupled in (False, True):
        case = function_case(kind, SHAPE, seed, coupled=coupled, shift=shift)
        problem, mask = case.problem, random(*SHAPE, seed=seed) < 0.5
        objective = problem.objective(mask)
        assert objective.dtype == torch.float64
        expected = case.errors(mask.unsqueeze(0))[0]
        if coupled:
            assert objective.tolist() == [float(objective[0])] * 3
            objective = objective.sum().view(1)
        torch.testing.assert_close(objective, expected)
        torch.testing.assert_close(problem.value(problem.evaluate(mask.double())), problem.objective(mask))
        torch.testing.assert_close(problem.scale(), problem.objective(torch.zeros_like(mask)))
        assert problem.unshifted().objective(mask).tolist() == problem.objective(mask).tolist()


@given(st.sampled_from(KINDS), st.sampled_from([0.0, 0.7]), st.integers(0, 99), st.data())
@examples(80)
def test_rows_of_a_function_are_slices(kind: str, shift: float, seed: int, data: st.DataObject) -> None:
    whole = function_case(kind, (5, 4), seed, shift=shift).problem
    chosen = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
    index = data.draw(st.sampled_from([torch.tensor(chosen), slice(min(chosen), max(chosen) + 1)]))
    part, x = whole.rows(index), random(5, 4, seed=seed)
    assert part.shape == tuple(x[index].shape)
    torch.testing.assert_close(part.value(part.evaluate(x[index])), whole.value(whole.evaluate(x))[index])
    torch.testing.assert_close(part.gradient(part.evaluate(x[index])), whole.gradient(whole.evaluate(x))[index])
    mask = x < 0.5
    assert torch.equal(part.objective(mask[index]), whole.objective(mask)[index])
    assert torch.equal(part.scale(), whole.scale()[index])
    again, last = part.rows(slice(0, 1)), part.rows(torch.tensor([part.shape[0] - 1]))
    torch.testing.assert_close(again.objective(mask[index][:1]), part.objective(mask[index])[:1])
    torch.testing.assert_close(last.objective(mask[index][-1:]), part.objective(mask[index])[-1:])


def test_coupled_rows_cannot_be_taken_apart() -> None:
    with pytest.raises(ValueError, match="no rows to solve apart"):
        function_case("root", SHAPE, coupled=True).problem.rows(slice(0, 1))


def test_a_vector_of_length_one_is_not_coupled() -> None:
    """A vector of length one is one number per row; a number couples rows, if only one."""
    by_row = Function(lambda x: (x * x).sum(1), (1, 3))
    in_all = Function(lambda x: (x * x).sum(), (1, 3))
    assert (by_row.coupled, in_all.coupled) == (False, True)
    assert by_row.objective(torch.ones(1, 3, dtype=torch.bool)).tolist() == [3.0]
    assert in_all.objective(torch.ones(1, 3, dtype=torch.bool)).tolist() == [3.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_calls_have_the_type_they_were_given(dtype: torch.dtype) -> None:
    seen = set()

    def call(x: Tensor) -> Tensor:
        seen.add((x.dtype, tuple(x.shape), x.device.type))
        assert bool(((x >= 0) & (x <= 1)).all())
        return x.square().sum(1)

    problem = Function(call, SHAPE, dtype=dtype, convex=True)
    assert (problem.shape, problem.dtype, problem.device) == (SHAPE, dtype, torch.device("cpu"))
    result = solve(problem, PerRow(2), FrankWolfe(iterations=20))
    assert seen == {(dtype, SHAPE, "cpu")}
    assert result.gap_kind is (GapKind.PROVEN if dtype == torch.float64 else GapKind.STATIONARY)
    assert problem.double() is problem


def test_gradients_are_computed_under_no_grad() -> None:
    problem = Function(lambda x: x.square().sum(1), SHAPE)
    with torch.no_grad():
        x = random(*SHAPE)
        assert torch.equal(problem.evaluate(x).gradient, 2 * x)
    assert not problem.value(problem.evaluate(x)).requires_grad


def test_module_parameters_get_no_gradients() -> None:
    layer = torch.nn.Linear(5, 2).double()
    problem = Function(lambda x: layer(x).square().sum(1), SHAPE)
    solve(problem, PerRow(2), FrankWolfe(iterations=5))
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: x, r"must return one number or one for each of the 3 rows; it returned shape \(3, 5\)\."),
        (lambda x: x.sum(0), r"one for each of the 3 rows; it returned shape \(5,\)\."),
        (lambda x: x.sum(1, keepdim=True), r"shape \(3, 1\)\."),
        (lambda x: x.sum(1)[:2], r"shape \(2,\)\."),
        (lambda x: x.detach().sum(), "must depend on the relaxed mask through torch operations with gradients"),
        (lambda x: (x > 0.5).double().sum(1), "must depend on the relaxed mask"),
        (lambda _: torch.tensor(1.0), "must depend on the relaxed mask"),
        (lambda x: (1 - x).log().sum(), "must be finite on the unit cube; keeping all gives -inf"),
        (lambda x: (x - 2).sqrt().sum(1), "must be finite on the unit cube"),
    ],
)
def test_bad_functions_are_refused(call: object, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        Function(call, SHAPE)


@pytest.mark.parametrize("coupled", [False, True], ids=["rows apart", "rows together"])
@pytest.mark.parametrize(
    "term",
    [lambda x: (x - 0.5).log(), lambda x: (x - 0.7).sqrt(), lambda x: 1 / (x - 0.4)],
    ids=["log", "root", "pole"],
)
def test_functions_that_are_not_finite_inside_are_refused(term: object, coupled: bool) -> None:
    """They are finite at the mask that keeps all, which is checked first; the error comes later, with every rule."""
    problem = Function(lambda x: term(x).sum() if coupled else term(x).sum(1), SHAPE)
    for direction in ("vanilla", "away", "dicg"):
        with pytest.raises(MaskoptError, match="must be finite on the unit cube"):
            solve(problem, PerRow(2), FrankWolfe(direction=direction, iterations=5))
