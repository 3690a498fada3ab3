"""Scales, types and rounding."""

import pytest
import torch

from maskopt.oracles import NM, PerRow, Unstructured
from maskopt.problems import FAMILIES, LayerReconstruction, synthetic
from maskopt.solvers import solve
from tests.helpers import SETS, SOLVER_ENTRIES, SOLVERS, combinations, feasible

SHAPE = (6, 24)


UNITS = [(1e20, 1.0), (1e-20, 1.0), (1.0, 1e25), (1.0, 1e-25), (1e30, 1e30), (1e-30, 1e-30), (1e-30, 1e30), (3.7, 0.2)]


@combinations(2, name=SOLVERS, dtype=[torch.float32, torch.float64], units=UNITS, ids=str)
def test_units_change_no_mask(name: str, dtype: torch.dtype, units: tuple[float, float]) -> None:
    weight_unit, gram_unit = units
    instance = synthetic(rows=SHAPE[0], d=SHAPE[1])
    weight, gram = instance.weight.double(), instance.gram.double()
    plain = LayerReconstruction(weight.to(dtype), gram.to(dtype))
    scaled = LayerReconstruction((weight * weight_unit).to(dtype), (gram * gram_unit).to(dtype))
    for masks in (PerRow(0.5), NM(keep=2, group=4), Unstructured(0.5)):
        one, two = solve(plain, masks, SOLVERS[name]), solve(scaled, masks, SOLVERS[name])
        assert torch.equal(one.mask, two.mask)
        factor = weight_unit**2 * gram_unit
        torch.testing.assert_close(two.objective, one.objective * factor, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(two.scale, one.scale * factor, rtol=1e-5, atol=0.0)
        assert two.relative_error == pytest.approx(one.relative_error, rel=1e-5)
        if one.lower_bound is not None:
            bounds = two.lower_bound / factor, one.lower_bound
            torch.testing.assert_close(*bounds, rtol=1e-3, atol=1e-5 * float(one.scale.max()))


@pytest.mark.parametrize("powers", [(60, -100), (-60, 100), (1, 0), (-100, -20), (61, 5)])
@pytest.mark.parametrize("name", SOLVERS)
def test_powers_of_two_change_no_digit(name: str, powers: tuple[int, int]) -> None:
    # Data of ordinary size are not rescaled: for equal arithmetic both sizes are far from it. Objectives scale anyway.
    instance = synthetic(rows=SHAPE[0], d=SHAPE[1])
    plain = instance.problem()
    scaled = LayerReconstruction(instance.weight * 2.0 ** powers[0], instance.gram * 2.0 ** powers[1])
    one, two = solve(plain, PerRow(0.5), SOLVERS[name]), solve(scaled, PerRow(0.5), SOLVERS[name])
    assert torch.equal(one.mask, two.mask)
    assert torch.equal(one.objective * 2.0 ** (2 * powers[0] + powers[1]), two.objective)


def relative_errors(name: str, exponent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's relative error, and the same where half of the rows are of another size."""
    instance = synthetic(rows=SHAPE[0], d=SHAPE[1])
    weight = instance.weight.clone()
    weight[3:] *= 10.0**exponent
    one = solve(instance.problem(), PerRow(0.5), SOLVERS[name])
    two = solve(LayerReconstruction(weight, instance.gram), PerRow(0.5), SOLVERS[name])
    return one.objective / one.scale, two.objective / two.scale


APART = [name for name in SOLVERS if SOLVERS[name].solves_rows_apart(PerRow(0.5))]


@pytest.mark.parametrize("exponent", [-6, -12, -18])
@pytest.mark.parametrize("name", APART)
def test_rows_of_unlike_size_do_not_disturb_each_other(name: str, exponent: int) -> None:
    torch.testing.assert_close(*relative_errors(name, exponent), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("name", [name for name in APART if SOLVER_ENTRIES[name].sees_tiny_rows is not None])
def test_rows_whose_squares_underflow_are_solved(name: str, request: pytest.FixtureRequest) -> None:
    if not SOLVER_ENTRIES[name].sees_tiny_rows:
        reason = "one unit for the whole weight: squares of rows 1e-25 times the largest underflow in float32"
        request.applymarker(pytest.mark.xfail(reason=reason))
    torch.testing.assert_close(*relative_errors(name, -25), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("size", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("name", SOLVERS)
def test_float32_is_as_good_as_float64_on_outlier_channels(
    name: str, size: float, request: pytest.FixtureRequest
) -> None:
    if size == 1e15 and not SOLVER_ENTRIES[name].sees_small_channels:
        reason = "float32 sums do not see channels 1e-15 times the largest"
        request.applymarker(pytest.mark.xfail(reason=reason))
    instance = synthetic(rows=SHAPE[0], d=SHAPE[1])
    scale = torch.ones(SHAPE[1], dtype=torch.float64)
    scale[[3, 11]] = size
    gram = instance.gram.double() * scale * scale.unsqueeze(1)
    for set_name in ("per-row", "unstructured", "n:m", "blocks"):
        masks = SETS[set_name](SHAPE, 0.5)
        narrow = solve(LayerReconstruction(instance.weight, gram.float()), masks, SOLVERS[name])
        wide = solve(LayerReconstruction(instance.weight.double(), gram), masks, SOLVERS[name])
        assert feasible(masks, narrow.mask)
        assert narrow.total <= 1.2 * wide.total


@combinations(2, name=SOLVERS, family=FAMILIES, set_name=["per-row", "unstructured", "n:m", "blocks", "columns"])
def test_float32_is_as_good_as_float64(name: str, family: str, set_name: str) -> None:
    instance, masks = synthetic(family, *SHAPE, seed=3), SETS[set_name](SHAPE, 0.5)
    narrow = solve(instance.problem(), masks, SOLVERS[name])
    wide = solve(LayerReconstruction(instance.weight.double(), instance.gram.double()), masks, SOLVERS[name])
    # Masks may differ where the data nearly tie, which singular Grams do; in total they are as good.
    ties = family in ("dead", "rank-deficient") or SOLVER_ENTRIES[name].chaotic
    assert narrow.relative_error == pytest.approx(wide.relative_error, rel=0.1 if ties else 0.02, abs=1e-9)
    if torch.equal(narrow.mask, wide.mask):
        torch.testing.assert_close(narrow.objective, wide.objective, rtol=1e-9, atol=1e-12)
    if narrow.lower_bound is not None:
        bounds = float(narrow.lower_bound.sum()), float(wide.lower_bound.sum())
        assert bounds[0] == pytest.approx(bounds[1], rel=0.02, abs=1e-3 * float(wide.scale.sum()))


@pytest.mark.parametrize("name", SOLVERS)
def test_half_precision_weights_give_the_masks_of_float32(name: str) -> None:
    instance = synthetic(rows=SHAPE[0], d=SHAPE[1])
    for dtype in (torch.bfloat16, torch.float16):
        weight = instance.weight.to(dtype)
        half = solve(LayerReconstruction(weight, instance.gram), PerRow(0.5), SOLVERS[name])
        full = solve(LayerReconstruction(weight.float(), instance.gram), PerRow(0.5), SOLVERS[name])
        assert torch.equal(half.mask, full.mask)
        assert torch.equal(half.objective, full.objective)
