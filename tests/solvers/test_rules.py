"""What rules see: bands, and views that ask the oracle no sooner than needed."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.solvers import DIRECTIONS, STEPS, Pool, View, Way
from tests.helpers import SETS, examples
from tests.walks import normal, plain_layer, random, view_at

SHAPE = (4, 8)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
@examples(60)
def test_pools_by_loops(bands: int, band: int, d: int, seed: int) -> None:
    pool, values = Pool(band), normal(bands * band, seed=seed)
    sums, leasts = pool(values), pool.least(values)
    for row, value in enumerate(values.tolist()):
        own = values[row // band * band : row // band * band + band].tolist()
        assert float(sums[row]) == pytest.approx(sum(own), abs=1e-12)
        assert float(leasts[row]) == min(own)
        assert band > 1 or float(sums[row]) == value
    per_band = pool.first(sums)
    assert per_band.shape == (bands,)
    assert torch.equal(pool.spread(per_band), sums)
    matrix = normal(bands * band, d, seed=seed)
    assert torch.equal(pool.flat(matrix), matrix.reshape(bands, band * d))
    chosen = torch.randperm(bands, generator=torch.Generator().manual_seed(seed))[: 1 + seed % bands]
    expected = [number * band + within for number in chosen.tolist() for within in range(band)]
    assert pool.rows_of(chosen).tolist() == expected


def test_pools_of_float32_add_in_float64() -> None:
    values = torch.tensor([2.0**24, 1.0, 1.0, 1.0, 1.0, -(2.0**24)])
    assert Pool(6)(values).tolist() == [4.0] * 6
    assert Pool(6)(values).dtype == torch.float32


def test_views_ask_when_they_have_to() -> None:
    masks, problem = SETS["per-row"](SHAPE, 0.5), plain_layer(0).problem()
    view = view_at(problem, masks, random(*SHAPE))
    assert view.certified_gap() is None
    assert view.counters["lmo"] == 0
    gap = view.gap
    assert view.counters["lmo"] == 1
    expected = (view.gradient * (view.x - masks.vertex(view.gradient))).sum(1)
    torch.testing.assert_close(gap, expected)
    assert view.certified_gap() is gap
    assert torch.equal(view.vertex, masks.vertex(view.gradient))
    assert view.counters["lmo"] == 1
    view.renew()
    assert view.certified_gap() is None
    rows = torch.tensor([2, 0])
    assert torch.equal(view.ask_rows(rows), masks.vertex(problem.gradient(view.point))[rows])
    assert view.counters == Counter(lmo=2)


def test_views_of_coupled_rows_add_up() -> None:
    masks, problem = SETS["unstructured"](SHAPE, 0.5), plain_layer(0).problem()
    view = view_at(problem, masks, random(*SHAPE))
    assert view.pool.band == 4
    total = float((view.gradient * (view.x - view.vertex)).sum())
    assert view.gap.tolist() == pytest.approx([total] * 4)


def test_parts_of_a_way() -> None:
    x, limit, rows = random(*SHAPE), random(4), torch.tensor([3, 1])
    part = Way(x, limit, best=True).take(rows)
    assert torch.equal(part.x, x[rows])
    assert torch.equal(part.limit, limit[rows])
    assert part.best
    assert Way(x).take(rows).limit is None


def test_rules_are_settings() -> None:
    """Equal settings, equal rules: they can be compared, hashed and printed."""
    for registry in (DIRECTIONS, STEPS):
        for make in registry.values():
            assert make() == make()
            assert hash(make()) == hash(make())
            assert repr(make()) == f"{type(make()).__name__}({repr(make()).split('(', 1)[1]}"
            with pytest.raises(AttributeError):
                make().something = 1


def test_a_view_reads_the_shifted_gradient() -> None:
    base = plain_layer(0).problem()
    problem, x = base.shifted(base.diagonal(), 0.7), random(*SHAPE)
    view = View(problem, SETS["per-row"](SHAPE, 0.5), Pool(1), 0, problem.at(x), Counter())
    expected = base.at(x).gradient + 0.7 * base.diagonal() * (1 - 2 * x)
    torch.testing.assert_close(view.gradient, expected)
