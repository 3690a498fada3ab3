"""Exact solvers against enumeration of all patterns, on every set and on edge-case layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.oracles import MaskSet
from maskopt.problems import Function, Problem, QuadraticForm
from maskopt.solvers import BruteForce, Result, Scip, Status, Wanda, solve
from tests.helpers import (
    ALL_SETS,
    Layer,
    errors_of,
    every_mask,
    examples,
    feasible,
    fractions,
    layers,
    magnitudes,
    sets,
    shapes,
)

FORMS = ["convex", "raw"]
# Sets whose groups are in row-major order, so that brute force enumerates masks in the order of their flat entries.
ORDERED = ["per-row", "n:m", "unstructured", "row counts", "protected rows", "at most rows", "restricted at most"]
SMALL = 12  # entries, all patterns of which are tried


def minima(values: Tensor, row_block: int) -> Tensor:
    """Return the minimum of each row block, given those of every member and row, shape (members, rows)."""
    return values.view(len(values), -1, row_block).sum(2).amin(0)


def sizes(layer: Layer, gram: Tensor, row_block: int) -> Tensor:
    return magnitudes(layer.weight, gram).view(-1, row_block).sum(1)


def holds(problem: Problem, masks: MaskSet, result: Result, best: Tensor, loss: Tensor) -> None:
    """Check for a member that is optimal up to `loss` in each row block, and on a bound below the optimum."""
    assert result.status is Status.OPTIMAL
    assert feasible(masks, result.mask)
    assert torch.equal(result.objective, problem.objective(result.mask))
    found = result.objective.view(len(best), -1).sum(1)
    assert bool((found <= best + loss).all()), (found - best, loss)
    assert result.lower_bound is not None
    assert result.lower_bound.shape == best.shape
    assert bool((result.lower_bound <= best).all()), result.lower_bound - best
    assert bool((result.lower_bound >= best - 3 * loss).all()), (best - result.lower_bound, loss)


@given(st.data(), layers(rows=(1, 4), d=(1, 6)), fractions, st.sampled_from([torch.float64, torch.float32]))
@pytest.mark.parametrize("name", ALL_SETS)
@examples(12)
def test_brute_force_finds_the_optimum(
    name: str, data: st.DataObject, layer: Layer, fraction: float, dtype: torch.dtype
) -> None:
    assume(layer.weight.numel() <= SMALL)
    masks, problem = ALL_SETS[name](layer.shape, fraction), layer.problem(dtype)
    row_block = masks.row_block(layer.shape)
    best = minima(errors_of(problem.weight, problem.gram, every_mask(masks, layer.shape)), row_block)
    holds(problem, masks, solve(problem, masks, BruteForce()), best, 1e-12 * sizes(layer, problem.gram, row_block))


@given(st.data(), layers(rows=(1, 3), d=(1, 6), exact=True))
@pytest.mark.parametrize("name", ORDERED)
@examples(20)
def test_of_equal_masks_brute_force_takes_the_one_with_lower_indices(
    name: str, data: st.DataObject, layer: Layer
) -> None:
    assume(layer.weight.numel() <= SMALL)
    masks, problem = data.draw(sets(layer.shape, [name])), layer.problem()
    every = every_mask(masks, layer.shape)
    errors = errors_of(layer.weight, layer.gram, every).sum(1)  # integers: exact
    optimal = every[errors == errors.min()].flatten(1).int().tolist()
    assert solve(problem, masks, BruteForce()).mask.flatten().int().tolist() == max(optimal)


@given(st.data(), layers(rows=(1, 2), d=(1, 7)), fractions)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL_SETS)
@examples(6)
def test_scip_finds_the_optimum(name: str, form: str, data: st.DataObject, layer: Layer, fraction: float) -> None:
    assume(layer.weight.numel() <= SMALL)
    masks, problem = ALL_SETS[name](layer.shape, fraction), layer.problem()
    row_block = masks.row_block(layer.shape)
    best = minima(errors_of(layer.weight, layer.gram, every_mask(masks, layer.shape)), row_block)
    start = solve(problem, masks, Wanda())
    # The documented tolerance: of the first error, and of the size of the data.
    loss = 2e-5 * start.objective.view(-1, row_block).sum(1) + 1e-7 * sizes(layer, layer.gram, row_block)
    holds(problem, masks, solve(problem, masks, Scip(form=form), start=start.mask), best, loss)  # type: ignore[arg-type]


@given(shapes(2, 5), fractions, st.integers(0, 999), st.sampled_from([-1.0, 0.0, 1.0]))
@pytest.mark.parametrize("form", FORMS)
@examples(12)
def test_exact_solvers_take_quadratic_forms_of_any_curvature(
    form: str, shape: tuple[int, int], fraction: float, seed: int, curvature: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn((shape[1], shape[1]), generator=random, dtype=torch.float64)
    quadratic = matrix + matrix.T if curvature == 0.0 else curvature * matrix @ matrix.T
    problem = QuadraticForm(quadratic, torch.randn(shape, generator=random, dtype=torch.float64))
    masks = ALL_SETS["at most rows"](shape, fraction)
    every = every_mask(masks, shape)
    x = every.double()
    values = torch.einsum("nri,ij,nrj->nr", x, quadratic, x) + (x * problem.linear).sum(2)
    best, size = values.amin(0), problem.scale()
    holds(problem, masks, solve(problem, masks, BruteForce()), best, 1e-12 * size)
    start = masks.lmo_mask(torch.zeros(shape))
    holds(problem, masks, solve(problem, masks, Scip(form=form), start=start), best, 1e-4 * size)  # type: ignore[arg-type]


@given(st.data(), layers(rows=(1, 3), d=(1, 6)), st.booleans())
@pytest.mark.parametrize("name", ["per-row", "unstructured", "at most n:m", "units"])
@examples(10)
def test_brute_force_takes_any_function(name: str, data: st.DataObject, layer: Layer, coupled: bool) -> None:
    assume(layer.weight.numel() <= SMALL)

    def call(x: Tensor) -> Tensor:
        lost = ((1 - x) * layer.weight).sum(1).sin() + (x * layer.weight).square().sum(1)
        return lost.sum().square() if coupled else lost

    problem, masks = Function(call, layer.shape), data.draw(sets(layer.shape, [name]))
    every = every_mask(masks, layer.shape)
    rows, row_block = layer.shape[0], layer.shape[0] if coupled else masks.row_block(layer.shape)
    values = torch.stack([call(mask.double()).expand(rows) / (rows if coupled else 1) for mask in every])
    best = minima(values, row_block)
    holds(problem, masks, solve(problem, masks, BruteForce()), best, torch.full_like(best, 1e-9) + 1e-11 * best.abs())
