"""Every solver on every set against enumeration, on hard layers."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.oracles import PartitionMatroid, PerRow
from maskopt.solvers import GapKind, OneSwap, Result, SparseFW, Wanda, solve
from tests.helpers import (
    SETS,
    SOLVERS,
    SWAPPED,
    Layer,
    best_swaps,
    examples,
    feasible,
    layers,
    magnitudes,
    minimum_errors,
    sets,
)
from tests.loop_runs import layer_case

DTYPES = [torch.float64, torch.float32]
# What rounding may cost, as a fraction of the sum of all terms' sizes.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-13}  # objectives are always evaluated in float64


def total_size(layer: Layer, masks: PartitionMatroid) -> Tensor:
    size = magnitudes(layer.weight, layer.gram)
    return size if masks.separable else size.sum().view(1)


def errors(result: Result, masks: PartitionMatroid) -> Tensor:
    return result.objective if masks.separable else result.objective.sum().view(1)


def checked(layer: Layer, masks: PartitionMatroid, result: Result, dtype: torch.dtype) -> None:
    problem = layer.problem(dtype)
    assert feasible(masks, result.mask)
    assert torch.equal(result.objective, problem.objective(result.mask))
    assert torch.equal(result.scale, problem.scale())
    size = magnitudes(layer.weight, problem.gram)
    explicit = torch.where(result.mask, 0.0, problem.weight.double()) @ problem.gram.double()
    explicit = (explicit * torch.where(result.mask, 0.0, problem.weight.double())).sum(1)
    assert bool(((result.objective - explicit).abs() <= 1e-13 * size).all())
    assert result.total >= 0.0
    assert result.relative_error >= 0.0
    assert result.sparsity == 1.0 - float(result.mask.double().mean())
    assert (result.lower_bound is None) == (result.gap_kind == GapKind.NONE) == (result.gap is None)


@given(st.data(), layers())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
@examples(12)
def test_feasible_evaluated_and_never_below_the_optimum(
    name: str, dtype: torch.dtype, data: st.DataObject, layer: Layer
) -> None:
    assume(layer.weight.numel() <= 14)
    masks = data.draw(sets(layer.shape))
    problem = layer.problem(dtype)
    weight, gram = problem.weight.clone(), problem.gram.clone()
    result = solve(problem, masks, SOLVERS[name])
    checked(layer, masks, result, dtype)
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.gram, gram)
    best, size = layer_case(layer, dtype=dtype).minimum(masks)
    assert bool((result.objective.view(len(best), -1).sum(1) >= best - 1e-13 * size).all())
    if result.lower_bound is not None:
        assert result.lower_bound.shape == best.shape
        assert result.lower_bound.dtype == torch.float64
        assert bool((result.lower_bound >= 0).all())
        assert bool((result.lower_bound <= best + 1e-14 * size).all())
        assert result.gap >= -1e-13 * float(total_size(layer, masks).sum())


@given(layers(rows=(16, 16), d=(2, 8)), st.floats(0, 1), st.sampled_from([1, 7, 60]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(60)
def test_bounds_are_below_the_optimum_of_every_row(
    dtype: torch.dtype, layer: Layer, fraction: float, iterations: int
) -> None:
    masks, problem = SETS["per-row"](layer.shape, fraction), layer.problem(dtype)
    result = solve(problem, masks, SparseFW(iterations=iterations))
    assert result.gap_kind is GapKind.PROVEN
    best = minimum_errors(problem.weight, problem.gram, masks)
    assert bool((result.lower_bound <= best + 1e-14 * magnitudes(layer.weight, layer.gram)).all())


@given(layers(rows=(8, 8), d=(2, 8), exact=True), st.floats(0, 1), st.sampled_from([1, 7, 60]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(60)
def test_proven_bounds_need_no_tolerance(dtype: torch.dtype, layer: Layer, fraction: float, iterations: int) -> None:
    """With integers the optimum is exact, so bounds must hold without a tolerance."""
    masks, problem = SETS["per-row"](layer.shape, fraction), layer.problem(dtype)
    result = solve(problem, masks, SparseFW(iterations=iterations))
    best = minimum_errors(problem.weight, problem.gram, masks)
    assert bool((result.lower_bound <= best).all()), float((result.lower_bound - best).max())


@given(st.data(), layers(rows=(1, 6), d=(1, 24)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SWAPPED)
@examples(20)
def test_never_worse_than_wanda(name: str, dtype: torch.dtype, data: st.DataObject, layer: Layer) -> None:
    masks, problem = data.draw(sets(layer.shape)), layer.problem(dtype)
    result, wanda = solve(problem, masks, SOLVERS[name]), solve(problem, masks, Wanda())
    size = 1e-13 * total_size(layer, masks)
    assert bool((errors(result, masks) <= errors(wanda, masks) + size).all())


@given(st.data(), layers(rows=(1, 6), d=(1, 40)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SWAPPED)
@examples(20)
def test_no_swap_improves(name: str, dtype: torch.dtype, data: st.DataObject, layer: Layer) -> None:
    masks, problem = data.draw(sets(layer.shape)), layer.problem(dtype)
    result = solve(problem, masks, SOLVERS[name])
    assert result.status.name == "LOCAL_OPTIMUM"
    within, across = best_swaps(problem, masks, result.mask)
    # The documented margin, a millionth of the error, and what the type rounds off.
    rounding = 64 * torch.finfo(dtype).eps * magnitudes(layer.weight, layer.gram)
    assert bool((within >= -2e-6 * result.objective - rounding).all()), (within, result.objective)
    assert across >= -2e-6 * result.total - 2 * float(rounding.max())


@given(st.data(), layers(rows=(1, 5), d=(1, 24)), st.integers(0, 999))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(60)
def test_swaps_never_increase_the_error(dtype: torch.dtype, data: st.DataObject, layer: Layer, seed: int) -> None:
    masks, problem = data.draw(sets(layer.shape)), layer.problem(dtype)
    start = masks.lmo_mask(torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed)))
    before, copy = problem.objective(start), start.clone()
    previous = before
    for steps in (0, 1, 3, None):
        result = solve(problem, masks, OneSwap(max_steps=steps), start=start)
        now = result.objective
        if not masks.separable:
            now, previous = now.sum(), previous.sum()
        assert bool((now <= previous).all())
        previous = result.objective
    assert torch.equal(start, copy)


@given(st.data(), st.integers(2, 6), st.integers(2, 20), st.integers(0, 999))
@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].solves_rows_apart(PerRow(0.5))])
@examples(8)
def test_a_batch_is_a_loop_over_rows(name: str, data: st.DataObject, rows: int, d: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)  # without ties, so that rounding cannot matter
    weight, x = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((rows, d), (d, 2 * d)))
    layer = Layer(weight, x, "normal")
    masks, problem = data.draw(sets(layer.shape, ["per-row", "n:m", "row counts", "protected rows"])), layer.problem()
    together = solve(problem, masks, SOLVERS[name])
    for row in range(rows):
        index = slice(row, row + 1)
        alone = solve(problem.rows(index), masks.rows(index, layer.shape), SOLVERS[name])
        assert torch.equal(alone.mask, together.mask[index])
        torch.testing.assert_close(alone.objective, together.objective[index], rtol=1e-12, atol=1e-15)
        if together.lower_bound is not None:
            bounds = alone.lower_bound, together.lower_bound[index]
            torch.testing.assert_close(*bounds, rtol=1e-9, atol=1e-12 * float(together.scale.max()))


@given(st.data(), layers(rows=(1, 4), d=(1, 12)))
@pytest.mark.parametrize("name", SOLVERS)
@examples(8)
def test_solvers_are_deterministic(name: str, data: st.DataObject, layer: Layer) -> None:
    masks = data.draw(sets(layer.shape))
    for dtype in DTYPES:
        one, two = (solve(layer.problem(dtype), masks, SOLVERS[name]) for _ in range(2))
        assert torch.equal(one.mask, two.mask)
        assert torch.equal(one.objective, two.objective)
        assert one.iterations == two.iterations
        assert one.counters == two.counters
