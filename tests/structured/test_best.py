"""Exact removal and exact swaps against enumeration, one-by-one removal and every single swap."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskopt
from maskopt.problems import ColumnSubset, LayerReconstruction
from maskopt.problems.refit import Refit
from maskopt.solvers import Status
from maskopt.structured import ExactSwaps, backward, swaps
from maskopt.structured.backward import remove_cheapest, remove_units
from tests.helpers import Layer, examples, layers
from tests.subsets import Case, cases, choices


def ridged(layer: LayerReconstruction, width: int = 1, ridge: float = 0.01) -> ColumnSubset:
    """The problem that the methods for units solve."""
    return ColumnSubset.of(layer, torch.arange(layer.shape[1]) // width, ridge=ridge)


def kept_units(result: maskopt.Result, width: int = 1) -> torch.Tensor:
    assert bool((result.mask == result.mask[0]).all())
    return result.mask[0, ::width]


def random_layer(seed: int, rows: int, d: int, dtype: torch.dtype = torch.float64) -> LayerReconstruction:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(d, d, generator=random) @ torch.randn(d, 3 * d, generator=random)
    return LayerReconstruction(torch.randn(rows, d, generator=random).to(dtype), (x @ x.T).to(dtype))


@given(st.data(), layers(rows=(1, 4), d=(1, 7)))
@examples(100)
def test_few_choices_are_enumerated(data: st.DataObject, layer: Layer) -> None:
    keep = data.draw(st.integers(0, layer.shape[1]))
    problem = layer.problem()
    result = maskopt.solve(problem, maskopt.Columns(keep), ExactSwaps())
    assert result.status is Status.OPTIMAL
    subset, every = ridged(problem), choices(layer.shape[1], keep)
    errors = subset.rows(torch.zeros(len(every), dtype=torch.long)).objective(every)
    found = subset.objective(kept_units(result).unsqueeze(0))
    assert float(found) <= float(errors.min()) * (1 + 1e-9) + 1e-14 * float(subset.scale())


@pytest.mark.parametrize("side", [1, 3, 256])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_no_swap_of_a_local_optimum_lowers_the_error(
    width: int, seed: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swaps, "_SIDE", side * width)  # of small problems that are a part of the layer, or all of it
    layer = random_layer(seed, 5, 12 * width)
    masks = maskopt.Units(maskopt.Unstructured(5), (None, width))
    result = maskopt.solve(layer, masks, ExactSwaps(enumerate=0))
    assert result.status is Status.LOCAL_OPTIMUM
    subset, kept = ridged(layer, width), kept_units(result, width)
    error = float(subset.objective(kept.unsqueeze(0)))
    swapped = []
    for one, two in itertools.product(kept.nonzero().flatten(), (~kept).nonzero().flatten()):
        other = kept.clone()
        other[one], other[two] = False, True
        swapped.append(float(subset.objective(other.unsqueeze(0))))
    assert min(swapped) >= error * (1 - 1e-8)


@pytest.mark.parametrize("width", [1, 2])
def test_swaps_improve_what_removal_leaves(width: int) -> None:
    gains = []
    for seed in range(8):
        layer = random_layer(seed, 3, 16 * width)
        masks = maskopt.Units(maskopt.Unstructured(6), (None, width))
        greedy, swapped = (maskopt.solve(layer, masks, ExactSwaps(enumerate=0, rounds=n)) for n in (0, 100))
        subset = ridged(layer, width)
        before, after = (float(subset.objective(kept_units(r, width).unsqueeze(0))) for r in (greedy, swapped))
        assert greedy.status is Status.ITERATION_LIMIT
        assert after <= before * (1 + 1e-12)
        gains.append(after < before * (1 - 1e-6))
    assert any(gains)


@given(st.data(), cases(d=9))
@examples(100)
def test_removal_is_one_by_one(data: st.DataObject, case: Case) -> None:
    problem = case.problem()
    number = data.draw(st.integers(0, case.number))
    must = torch.zeros(case.number, dtype=torch.bool)
    state = Refit(problem.blocks, torch.arange(case.number))
    remove_cheapest(state, number, must)
    kept = torch.ones(case.number, dtype=torch.bool)
    # The removals that were chosen cost the least at every step, but for ties and rounding.
    gone = [unit for unit in range(case.number) if unit not in state.kept.tolist()]
    assert len(gone) == number
    for _ in range(number):
        costs = problem.removal_costs(kept)
        allowed = torch.tensor([float(costs[unit]) for unit in gone if kept[unit]])
        least = float(costs[kept].min())
        assert float(allowed.min()) <= least * (1 + 1e-6) + 1e-12 * case.scale
        kept[[unit for unit in gone if kept[unit]][int(allowed.argmin())]] = False


@given(st.data(), cases(d=9))
@examples(100)
def test_errors_of_a_small_problem_are_those_of_the_whole(data: st.DataObject, case: Case) -> None:
    problem = case.problem()
    order = torch.randperm(case.number, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    kept = order[: data.draw(st.integers(0, case.number))]
    others = order[len(kept) :]
    places = torch.arange(data.draw(st.integers(0, len(kept))))
    added = others[: data.draw(st.integers(0, len(others)))]
    if len(places) + len(added) == 0:
        return
    state = Refit(problem.blocks, kept)
    few = state.joined(places, state.additions(added))
    units = torch.cat((kept[places], added))
    everything = torch.zeros(case.number, dtype=torch.bool)
    everything[kept], everything[added] = True, True
    least = float(problem.objective(everything.unsqueeze(0)))
    for stay in choices(len(units), len(units) // 2):
        choice = everything.clone()
        choice[units] = stay
        error = float(problem.objective(choice.unsqueeze(0)))
        found = float(Refit(few, stay.nonzero().flatten()).loss()) * few.unit * problem.unit
        assert found + least == pytest.approx(error, rel=1e-6, abs=1e-10 * case.scale)


@pytest.mark.parametrize("choice", [384, 70])
def test_many_removals_follow_the_cheapest(choice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "_CHOICE", choice)
    subset = ridged(random_layer(5, 6, 200))
    state = Refit(subset.blocks, torch.arange(200))
    remove_cheapest(state, 150, torch.zeros(200, dtype=torch.bool))
    inverse, weight, kept = torch.linalg.inv(subset.blocks.gram), subset.blocks.target, list(range(200))
    for _ in range(150):  # one by one, by the definition
        place = int((weight.square().sum(0) / inverse.diagonal()).argmin())
        stay = [each for each in range(len(kept)) if each != place]
        column = inverse[:, place] / inverse[place, place]
        weight = (weight - torch.outer(weight[:, place], column))[:, stay]
        inverse = (inverse - torch.outer(column, inverse[place]))[stay][:, stay]
        kept = [kept[each] for each in stay]
    one_by_one = Refit(subset.blocks, torch.tensor(kept))
    if choice >= 200:  # all are candidates at every step
        assert state.kept.sort().values.tolist() == kept
    assert float(state.loss()) <= 1.02 * float(one_by_one.loss())


@pytest.mark.parametrize("width", [1, 3])
def test_downdates_are_fresh_factorisations(width: int) -> None:
    layer = random_layer(4, 6, 150 * width)
    subset = ridged(layer, width)
    state = Refit(subset.blocks, torch.arange(150))
    remove_cheapest(state, 90, torch.zeros(150, dtype=torch.bool))  # more than are collected for one product
    fresh = Refit(subset.blocks, state.kept)
    torch.testing.assert_close(state.inverse, fresh.inverse, rtol=1e-9, atol=1e-9 * float(fresh.inverse.abs().max()))
    torch.testing.assert_close(state.weight, fresh.weight, rtol=1e-8, atol=1e-9 * float(fresh.weight.abs().max()))
    remove_units(state, torch.tensor([3, 5, 40]))
    fresh = Refit(subset.blocks, state.kept)
    torch.testing.assert_close(state.inverse, fresh.inverse, rtol=1e-9, atol=1e-9 * float(fresh.inverse.abs().max()))
    unit = torch.tensor([next(unit for unit in range(150) if unit not in state.kept.tolist())])
    state.exchange(7, state.additions(unit))
    fresh = Refit(subset.blocks, state.kept)
    assert state.kept[7] == unit
    torch.testing.assert_close(state.inverse, fresh.inverse, rtol=1e-9, atol=1e-9 * float(fresh.inverse.abs().max()))
    torch.testing.assert_close(state.weight, fresh.weight, rtol=1e-8, atol=1e-9 * float(fresh.weight.abs().max()))


def test_swaps_reach_the_optimum_of_most_small_layers() -> None:
    close = 0
    for seed in range(20):
        layer = random_layer(seed, 4, 10)
        best, swapped = (maskopt.solve(layer, maskopt.Columns(5), ExactSwaps(enumerate=n)) for n in (5000, 0))
        subset = ridged(layer)
        optimum, found = (float(subset.objective(kept_units(r).unsqueeze(0))) for r in (best, swapped))
        assert optimum <= found * (1 + 1e-9)
        close += found <= optimum * (1 + 1e-9)
    assert close >= 14
