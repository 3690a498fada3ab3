"""Bounds on choices of units against enumeration, on edge cases and any scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.bounds import column_bound
from maskopt.bounds.column_forms import _form, _multipliers, _upper_inverse
from maskopt.errors import MaskoptError
from maskopt.problems import ColumnSubset, synthetic
from tests.helpers import examples
from tests.subsets import Case, cases, choices

KINDS = ("plain", "diagonal", "forms")


def least(problem: ColumnSubset, keep: int) -> float:
    every = choices(problem.shape[1], keep)
    return float(problem.rows(torch.zeros(len(every), dtype=torch.long)).objective(every).min())


@given(st.data(), cases(ridges=(0.01, 1e-4, 1e-9, 1.0)))
@examples(120)
def test_bounds_hold(data: st.DataObject, case: Case) -> None:
    keep, problem = data.draw(st.integers(0, case.number)), case.problem()
    optimum = least(problem, keep)
    bounds = [column_bound(problem, keep, kind).bound for kind in KINDS]
    assert 0.0 <= bounds[0] * (1 - 3e-3) <= bounds[1] <= bounds[2]  # up to the accuracy asked for
    assert all(bound <= optimum * (1 + 1e-12) for bound in bounds)
    # What the problem calls an error is one of the inputs themselves, to the digits of a regression.
    from_inputs = min(case.error(kept) for kept in choices(case.number, keep))
    assert bounds[2] <= from_inputs * (1 + 1e-9) + 1e-12 * case.scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 1e6, 1e12])
def test_weights_on_inputs_that_are_always_zero_prove_nothing(kind: str, size: float) -> None:
    random = torch.Generator().manual_seed(0)
    x, target = torch.randn(8, 30, generator=random).double(), torch.randn(3, 8, generator=random).double()
    x[[1, 4]] = 0.0
    target[:, [1, 4]] *= size
    case = Case(target, x, torch.arange(8))
    optimum = min(case.error(kept) for kept in choices(8, 3))
    assert 0.5 * optimum <= column_bound(case.problem(), 3, kind).bound <= optimum * (1 + 1e-9)  # type: ignore[arg-type]


@given(st.data(), cases(), st.integers(0, 99))
@examples(60)
def test_bounds_hold_for_inputs_of_any_size(data: st.DataObject, case: Case, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    size, weights = (10.0 ** torch.randint(-6, 13, case.x.shape[:1], generator=random).double() for _ in range(2))
    keep = data.draw(st.integers(0, case.number))
    problem = Case(case.target * weights, case.x * size.unsqueeze(1), case.units).problem()
    assert column_bound(problem, keep).bound <= least(problem, keep) * (1 + 1e-12)


@given(st.data(), cases(d=6), st.integers(0, 999))
@examples(80)
def test_forms_of_any_multipliers_bound_every_choice(data: st.DataObject, case: Case, seed: int) -> None:
    problem, random = case.problem(), torch.Generator().manual_seed(seed)
    blocks = problem.blocks
    inverse = _upper_inverse(blocks)
    assert inverse is not None
    multipliers = torch.randn(blocks.target.shape, generator=random, dtype=torch.float64)
    if data.draw(st.booleans()):
        removed = torch.rand(case.number, generator=random, dtype=torch.float64).clamp(0.01, 0.99)
        point = torch.outer(removed, removed)
        point.diagonal().copy_(removed)
        multipliers = _multipliers(blocks, inverse, point)
    for kept in choices(case.number):
        size = int((~kept).sum())
        if size == 0:
            continue
        form, error = _form(blocks, inverse, multipliers, size)
        value = float((~kept).double() @ form @ (~kept).double()) - error
        assert value * problem.unit <= float(problem.objective(kept.unsqueeze(0))) * (1 + 1e-12)


@given(cases(ridges=(0.01, 1e-4)))
@examples(60)
def test_upper_inverses_exceed_the_inverse(case: Case) -> None:
    blocks = case.problem().blocks
    inverse = _upper_inverse(blocks)
    assert inverse is not None
    # A exceeds K^-1 if and only if K exceeds A^-1; K A K - K is the same without an inverse.
    excess = torch.linalg.eigvalsh(blocks.gram @ inverse @ blocks.gram - blocks.gram)
    size = float(torch.linalg.matrix_norm(inverse) * torch.linalg.matrix_norm(blocks.gram).square())
    assert float(excess.min()) >= -1e-15 * size
    assert float(excess.max()) <= 1e-7 * size


def test_every_kind_proves_more_than_the_one_before() -> None:
    problem = ColumnSubset.of(synthetic("correlated", rows=6, d=24, seed=2).problem())
    plain, diagonal, forms = (column_bound(problem, 12, kind).bound for kind in KINDS)
    assert 0.0 < plain < diagonal < forms


@pytest.mark.parametrize("family", ["correlated", "independent"])
def test_most_of_the_optimum_is_proven(family: str) -> None:
    problem = ColumnSubset.of(synthetic(family, rows=5, d=12, seed=1).problem())
    assert column_bound(problem, 6).bound >= 0.8 * least(problem, 6)


def test_wide_units() -> None:
    layer = synthetic("correlated", rows=6, d=24, seed=3).problem()
    problem = ColumnSubset.of(layer, torch.arange(24) // 4)
    optimum = least(problem, 3)
    assert 0.7 * optimum <= column_bound(problem, 3).bound <= optimum


def test_stopped_bounds_are_bounds() -> None:
    problem = ColumnSubset.of(synthetic("correlated", rows=5, d=12, seed=1).problem())
    for calls in (0, 1, 3, 20):
        left = iter(range(calls))
        found = column_bound(problem, 6, stop=lambda left=left: next(left, None) is None)
        assert not found.finished
        assert 0.0 <= found.bound <= least(problem, 6)


@pytest.mark.parametrize("seconds", [1e-6, 30.0])
def test_bounds_with_a_time_limit_are_bounds(seconds: float) -> None:
    problem = ColumnSubset.of(synthetic("correlated", rows=5, d=12, seed=1).problem())
    found, optimum = column_bound(problem, 6, seconds=seconds), least(problem, 6)
    assert found.finished == (seconds > 1)
    assert (0.8 if found.finished else 0.0) * optimum <= found.bound <= optimum
    # A condition of the caller's own ends it too.
    assert not column_bound(problem, 6, seconds=seconds, stop=lambda: True).finished


def test_progress_rises_to_one() -> None:
    problem, seen = ColumnSubset.of(synthetic("correlated", rows=5, d=12, seed=1).problem()), list[float]()
    column_bound(problem, 6, progress=seen.append)
    assert seen == sorted(seen)
    assert 0.0 <= seen[0] <= seen[-1] <= 1.0


def test_wrong_arguments_are_refused() -> None:
    problem = ColumnSubset(torch.ones(1, 2), torch.eye(2))
    with pytest.raises(MaskoptError, match=r"keep must lie in 0 ... 2, the number of units; got 3"):
        column_bound(problem, 3)
    with pytest.raises(MaskoptError, match="no bound 'sharp'; choose one of plain, diagonal, forms"):
        column_bound(problem, 1, "sharp")  # type: ignore[arg-type]
    with pytest.raises(MaskoptError, match="time for a bound must be a positive number of seconds"):
        column_bound(problem, 1, seconds=-1.0)
