"""What rules read: row blocks, and iteration states that call the oracle only when needed."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.solvers import DIRECTIONS, STEPS, IterationState, RowBlocks, SearchDirection
from tests.helpers import SETS, examples
from tests.loop_runs import normal, plain_layer, random, state_at

SHAPE = (4, 8)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
@examples(60)
def test_row_blocks_agree_with_loops(blocks: int, row_block: int, d: int, seed: int) -> None:
    row_blocks, values = RowBlocks(row_block), normal(blocks * row_block, seed=seed)
    sums, minima = row_blocks(values), row_blocks.minimum(values)
    for row, value in enumerate(values.tolist()):
        own = values[row // row_block * row_block : row // row_block * row_block + row_block].tolist()
        assert float(sums[row]) == pytest.approx(sum(own), abs=1e-12)
        assert float(minima[row]) == min(own)
        assert row_block > 1 or float(sums[row]) == value
    per_block = row_blocks.first(sums)
    assert per_block.shape == (blocks,)
    assert torch.equal(row_blocks.spread(per_block), sums)
    matrix = normal(blocks * row_block, d, seed=seed)
    assert torch.equal(row_blocks.flat(matrix), matrix.reshape(blocks, row_block * d))
    chosen = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[: 1 + seed % blocks]
    expected = [number * row_block + within for number in chosen.tolist() for within in range(row_block)]
    assert row_blocks.rows_of(chosen).tolist() == expected


def test_row_blocks_of_float32_add_in_float64() -> None:
    values = torch.tensor([2.0**24, 1.0, 1.0, 1.0, 1.0, -(2.0**24)])
    assert RowBlocks(6)(values).tolist() == [4.0] * 6
    assert RowBlocks(6)(values).dtype == torch.float32


def test_states_call_the_oracle_only_when_needed() -> None:
    masks, problem = SETS["per-row"](SHAPE, 0.5), plain_layer(0).problem()
    state = state_at(problem, masks, random(*SHAPE))
    assert state.certified_gap() is None
    assert state.counters["lmo"] == 0
    gap = state.gap
    assert state.counters["lmo"] == 1
    expected = (state.gradient * (state.x - masks.lmo(state.gradient))).sum(1)
    torch.testing.assert_close(gap, expected)
    assert state.certified_gap() is gap
    assert torch.equal(state.vertex, masks.lmo(state.gradient))
    assert state.counters["lmo"] == 1
    state.renew()
    assert state.certified_gap() is None
    rows = torch.tensor([2, 0])
    assert torch.equal(state.ask_rows(rows), masks.lmo(problem.gradient(state.point))[rows])
    assert state.counters == Counter(lmo=2)


def test_the_gap_of_coupled_rows_is_their_sum() -> None:
    masks, problem = SETS["unstructured"](SHAPE, 0.5), plain_layer(0).problem()
    state = state_at(problem, masks, random(*SHAPE))
    assert state.row_blocks.row_block == 4
    total = float((state.gradient * (state.x - state.vertex)).sum())
    assert state.gap.tolist() == pytest.approx([total] * 4)


def test_take_selects_rows_of_a_search_direction() -> None:
    x, max_step, rows = random(*SHAPE), random(4), torch.tensor([3, 1])
    part = SearchDirection(x, max_step, best=True).take(rows)
    assert torch.equal(part.vector, x[rows])
    assert torch.equal(part.max_step, max_step[rows])
    assert part.best
    assert SearchDirection(x).take(rows).max_step is None


def test_rules_compare_hash_and_print_by_their_settings() -> None:
    """Rules with equal settings are equal; rules can be compared, hashed and printed."""
    for registry in (DIRECTIONS, STEPS):
        for make in registry.values():
            assert make() == make()
            assert hash(make()) == hash(make())
            assert repr(make()) == f"{type(make()).__name__}({repr(make()).split('(', 1)[1]}"
            with pytest.raises(AttributeError):
                make().something = 1


def test_a_state_reads_the_shifted_gradient() -> None:
    base = plain_layer(0).problem()
    problem, x = base.shifted(base.diagonal(), 0.7), random(*SHAPE)
    state = IterationState(problem, SETS["per-row"](SHAPE, 0.5), RowBlocks(1), 0, problem.evaluate(x), Counter())
    expected = base.evaluate(x).gradient + 0.7 * base.diagonal() * (1 - 2 * x)
    torch.testing.assert_close(state.gradient, expected)
