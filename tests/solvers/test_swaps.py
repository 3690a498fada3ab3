"""What solver writers are given, swaps, row blocks and random numbers, against evaluations from scratch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, Columns, PerRow, Unstructured
from maskopt.problems import LayerReconstruction, synthetic
from maskopt.solvers import SwapState, better_of, block_errors, random_per_block
from tests.helpers import SETS, Layer, examples, feasible, layers, magnitudes, sets


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.data(), layers(rows=(1, 5), d=(2, 8)), st.integers(0, 999), st.sampled_from([1.0, 2.0**60, 1e-20]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@examples(80)
def test_changes_are_those_of_whole_evaluations(
    dtype: torch.dtype, data: st.DataObject, layer: Layer, seed: int, unit: float
) -> None:
    masks = data.draw(sets(layer.shape))
    weight, gram = (layer.weight * unit).to(dtype), layer.gram.to(dtype)
    target = weight + 0.3 * weight.flip(1) if seed % 2 else None
    problem = LayerReconstruction(weight, gram, target=target)
    state, random = SwapState(problem, masks, masks.lmo_mask(layer.weight)), seeded(seed)
    size = 4 * float(magnitudes(weight, gram).sum()) + 1e-300
    for _ in range(4):
        swaps = state.random(random)
        assert len({row // masks.row_block(layer.shape) for row in swaps[0].tolist()}) == len(swaps[0])
        changes, before = state.change(*swaps), problem.objective(state.mask).sum()
        assert changes.dtype == torch.float64
        for number, change in enumerate(changes.tolist()):
            row, keep, prune_row, prune = (int(part[number]) for part in swaps)
            other = state.mask.clone()
            assert not other[row, keep]
            assert other[prune_row, prune]
            other[row, keep], other[prune_row, prune] = True, False
            assert feasible(masks, other)
            assert change == pytest.approx(float(problem.objective(other).sum() - before), abs=1e-12 * size)
        state.swap(*swaps)


def test_many_swaps_leave_no_rounding_behind() -> None:
    instance = synthetic("outliers", rows=6, d=24)
    problem, masks = instance.problem(), Unstructured(0.5)
    state, random = SwapState(problem, masks, masks.lmo_mask(-instance.weight.abs()), double=False), seeded(0)
    for _ in range(500):
        state.swap(*state.random(random))
    fresh = SwapState(problem, masks, state.mask, double=False)
    torch.testing.assert_close(state.carried, fresh.carried, rtol=1e-4, atol=1e-5 * float(fresh.carried.abs().max()))


@pytest.mark.parametrize("name", SETS)
def test_proposals_do_not_depend_on_the_other_rows(name: str) -> None:
    problem = synthetic(rows=12, d=24).problem()
    masks = SETS[name]((12, 24), 0.5)
    start, height = masks.lmo_mask(-problem.weight.abs()), masks.row_block((12, 24))
    whole = SwapState(problem, masks, start).random(seeded(3))
    assert len(whole[0]) > 0
    for first in range(0, 12, height):
        rows = slice(first, first + height)
        part = SwapState(problem.rows(rows), masks.rows(rows, (12, 24)), start[rows]).random(seeded(3))
        mine = (whole[0] >= first) & (whole[0] < first + height)
        for index, (one, two) in enumerate(zip(part, whole, strict=True)):
            assert torch.equal(one + (0 if index % 2 else first), two[mine])


def test_every_swap_of_a_row_is_proposed_at_times() -> None:
    problem, masks = synthetic(rows=1, d=6).problem(), PerRow(3)
    state, random, seen = SwapState(problem, masks, masks.lmo_mask(-problem.weight.abs())), seeded(0), set()
    for _ in range(300):
        _, keep, _, prune = state.random(random)
        seen.add((int(keep), int(prune)))
    assert len(seen) == 9


def test_nothing_is_proposed_where_nothing_can_be_swapped() -> None:
    problem = synthetic(rows=3, d=8).problem()
    for masks in (PerRow(8), PerRow(0), NM(keep=4, group=4)):
        swaps = SwapState(problem, masks, masks.lmo_mask(torch.zeros(3, 8))).random(seeded(0))
        assert [len(part) for part in swaps] == [0, 0, 0, 0]


def test_sets_without_swap_groups_are_refused() -> None:
    problem, masks = synthetic(rows=3, d=8).problem(), Columns(4)
    state = SwapState(problem, masks, masks.lmo_mask(torch.zeros(3, 8)))
    with pytest.raises(MaskoptError, match=r"Columns.* with SwapState: it must implement swap_groups"):
        state.random(seeded(0))


@given(st.data(), layers(rows=(1, 6), d=(1, 6), exact=True), st.integers(0, 999))
@examples(80)
def test_row_blocks_are_chosen_as_a_whole(data: st.DataObject, layer: Layer, seed: int) -> None:
    masks, problem = data.draw(sets(layer.shape)), layer.problem()
    one, two = (masks.lmo_mask(torch.randn(layer.shape, generator=seeded(seed + n))) for n in range(2))
    better, worse = better_of(problem, masks, one, two)
    errors = [block_errors(problem, masks, mask) for mask in (one, two)]
    height = masks.row_block(layer.shape)
    for block in range(layer.shape[0] // height):
        rows = slice(block * height, (block + 1) * height)
        sums = [float(problem.objective(mask)[rows].sum()) for mask in (one, two)]
        assert [float(error[block]) for error in errors] == sums
        best = (one, two) if sums[0] <= sums[1] else (two, one)
        assert torch.equal(better[rows], best[0][rows])
        assert torch.equal(worse[rows], best[1][rows])
    assert feasible(masks, better)
    assert feasible(masks, worse)


def test_row_blocks_get_the_same_random_numbers() -> None:
    problem = synthetic(rows=6, d=8).problem()
    rows = random_per_block(problem, PerRow(0.5), seeded(1))
    assert rows.shape == (6, 8)
    assert bool((rows == rows[0]).all())
    assert torch.equal(random_per_block(problem.rows(slice(2, 4)), PerRow(0.5), seeded(1)), rows[:2])
    assert len(random_per_block(problem, Unstructured(0.5), seeded(1)).unique()) == 48
