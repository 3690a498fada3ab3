"""Counts within a budget of kept weights, and losses between measured levels."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskopt.allocation.budget import apportioned, budget_of, filled, interpolated, levels_of, separable_levels
from maskopt.errors import MaskoptError
from maskopt.oracles import Counts
from tests.helpers import examples, fractions

PATTERNS = ["per-row", "unstructured", "columns", "rows", "2:8", "blocks-2x4"]

Layers = dict[str, Counts]


@st.composite
def models(draw: st.DrawFn) -> Layers:
    """Some layers of one pattern, of shapes that it fits."""
    pattern = draw(st.sampled_from(PATTERNS))
    shapes = st.tuples(st.integers(1, 9).map(lambda n: 2 * n), st.integers(1, 9).map(lambda n: 8 * n))
    wide = st.sampled_from([(2, 2048), (256, 512), (512, 256), (1024, 8)])
    found = draw(st.lists(shapes | wide, min_size=1, max_size=6))
    return {f"layer {index}": Counts(pattern, shape) for index, shape in enumerate(found)}


def total(counts: Layers) -> int:
    return sum(each.shape[0] * each.shape[1] for each in counts.values())


def kept(counts: Layers, found: dict[str, int]) -> int:
    return sum(counts[name].step * count for name, count in found.items())


def met(counts: Layers, found: dict[str, int], budget: int) -> None:
    """Check that counts keep as much of a budget as they can: it has no room for a step of any layer."""
    assert list(found) == list(counts)
    for name, each in counts.items():
        assert type(found[name]) is int
        assert 0 <= found[name] <= each.most
    left = budget - kept(counts, found)
    assert left >= 0
    assert [name for name, each in counts.items() if found[name] < each.most and each.step <= left] == []


# Budgets


@given(models(), fractions)
@examples(200)
def test_what_is_pruned_is_rounded_down(counts: Layers, sparsity: float) -> None:
    budget = budget_of(counts, sparsity)
    pruned = total(counts) - budget
    assert 0 <= pruned <= total(counts)
    assert pruned - Fraction(sparsity) * total(counts) <= Fraction(1, 10**6)
    assert Fraction(sparsity) * total(counts) - pruned < 1


@pytest.mark.parametrize(
    ("sparsity", "budget"),
    [(0.0, 40), (0, 40), (1.0, 0), (1, 0), (0.5, 20), (0.51, 20), (0.7, 12), (0.024, 40), (0.026, 39)],
)
def test_budgets_by_hand(sparsity: float, budget: int) -> None:
    assert budget_of({"a": Counts("per-row", (2, 8)), "b": Counts("per-row", (3, 8))}, sparsity) == budget


def test_decimal_fractions_prune_what_they_say() -> None:
    counts = {"a": Counts("unstructured", (10, 100))}
    for thousandths in range(1001):
        assert budget_of(counts, thousandths / 1000) == 1000 - thousandths
        assert budget_of(counts, 1 - thousandths / 1000) == thousandths


# Counts


@given(models(), fractions)
@examples(400)
def test_one_sparsity_meets_its_budget(counts: Layers, sparsity: float) -> None:
    budget = budget_of(counts, sparsity)
    found = apportioned(counts, dict.fromkeys(counts, sparsity), budget)
    met(counts, found, budget)
    # Near to the wish: at most a step below, and what others could not use above.
    for name, each in counts.items():
        assert found[name] > (1 - sparsity) * each.most - 1 - 1e-6


@given(st.data(), models())
@examples(400)
def test_wishes_meet_the_budget_of_their_mean(data: st.DataObject, counts: Layers) -> None:
    wishes = {name: data.draw(fractions) for name in counts}
    mean = sum(Fraction(wishes[name]) * each.step * each.most for name, each in counts.items()) / total(counts)
    budget = budget_of(counts, float(mean))
    found = apportioned(counts, wishes, budget)
    met(counts, found, budget)
    for name, each in counts.items():
        assert found[name] > (1 - wishes[name]) * each.most - 1 - 1e-6


@given(st.data(), models())
@examples(300)
def test_budgets_above_the_wishes_are_spent(data: st.DataObject, counts: Layers) -> None:
    wishes = {name: data.draw(fractions) for name in counts}
    least = sum(each.step * math.floor((1 - wishes[name]) * each.most) for name, each in counts.items())
    budget = data.draw(st.integers(least + max(each.step for each in counts.values()), 2 * total(counts)))
    met(counts, apportioned(counts, wishes, budget), budget)


@given(st.data(), models())
@examples(300)
def test_what_is_left_is_spent(data: st.DataObject, counts: Layers) -> None:
    chosen = {name: data.draw(st.integers(0, each.most)) for name, each in counts.items()}
    before = dict(chosen)
    left = data.draw(st.one_of(st.integers(0, 300), st.integers(0, total(counts))))
    found = filled(counts, chosen, left)
    assert chosen == before
    assert all(found[name] >= chosen[name] for name in counts)
    assert kept(counts, found) - kept(counts, chosen) <= left
    met(counts, found, kept(counts, chosen) + left)


def test_the_layers_that_lost_most_get_what_is_left() -> None:
    counts = {"a": Counts("per-row", (10, 10)), "b": Counts("per-row", (10, 10)), "c": Counts("per-row", (10, 10))}
    # Wishes 5.2, 5.5 and 5.3 of 10: 160 weights.
    wishes = {"a": 0.48, "b": 0.45, "c": 0.47}
    assert apportioned(counts, wishes, 160) == {"a": 5, "b": 6, "c": 5}
    assert apportioned(counts, wishes, 159) == {"a": 5, "b": 5, "c": 5}
    assert apportioned(counts, wishes, 179) == {"a": 5, "b": 6, "c": 6}
    assert apportioned(counts, wishes, 300) == {"a": 10, "b": 10, "c": 10}


def test_small_layers_fill_what_no_large_one_can_use() -> None:
    counts = {"large": Counts("per-row", (60, 2)), "small": Counts("per-row", (1, 120))}
    # Wishes 0.5 of 2 and 60 of 120. The large layer has no half step, so that 30 are left.
    assert apportioned(counts, {"large": 0.75, "small": 0.5}, 90) == {"large": 0, "small": 90}
    met(counts, filled(counts, {"large": 0, "small": 60}, 100), 160)


def test_wishes_above_the_budget_are_refused() -> None:
    counts = {"a": Counts("per-row", (4, 8)), "b": Counts("per-row", (2, 8))}
    with pytest.raises(MaskoptError, match="The sparsities keep 1 weights more than the budget of 23 allows"):
        apportioned(counts, {"a": 0.5, "b": 0.5}, 23)
    assert apportioned(counts, {"a": 0.5, "b": 0.5}, 24) == {"a": 4, "b": 4}


@given(st.integers(0, 5000), st.integers(0, 5000))
@examples(300)
def test_levels_are_spread_evenly(one: int, other: int) -> None:
    low, high = sorted([one, other])
    found = levels_of(low, high).tolist()
    assert found[0] == low
    assert found[-1] == high
    assert len(found) == min(200, high - low + 1)
    steps = [after - before for before, after in pairwise(found)]
    assert min(steps, default=1) >= 1
    assert max(steps, default=0) - min(steps, default=0) <= 1


def test_costs_are_weights() -> None:
    counts = Counts("per-row", (6, 8))
    levels = separable_levels("a", counts, np.array([2, 5]), np.array([0.5, 0.25]))
    assert (levels.name, levels.costs, levels.losses) == ("a", (12, 30), (0.5, 0.25))


# Losses between levels


@st.composite
def curves(draw: st.DrawFn, losses: st.SearchStrategy[float], least: int = 1) -> tuple[list[int], list[float]]:
    counts = sorted(draw(st.sets(st.integers(0, 10**5), min_size=least, max_size=9)))
    return counts, draw(st.lists(losses, min_size=len(counts), max_size=len(counts)))


def between(counts: list[int]) -> np.ndarray:
    return np.unique(np.concatenate([counts, np.linspace(counts[0], counts[-1], 301)]))


positive = st.builds(lambda size, power: size * 10.0**power, st.floats(1.0, 9.0), st.integers(-4, 4))


@given(curves(positive), st.sampled_from([1e-30, 1.0, 1e30]))
@examples(300)
def test_monotone_losses_are_passed_through(curve: tuple[list[int], list[float]], scale: float) -> None:
    counts, losses = curve
    losses = [loss * scale for loss in sorted(losses, reverse=True)]
    np.testing.assert_allclose(
        interpolated(counts, losses, np.array(counts), positive=True), losses, rtol=1e-12, atol=0
    )


@given(curves(st.one_of(positive, st.just(0.0), st.floats(-1.0, 1.0)), least=2))
@examples(300)
def test_positive_losses_fall_with_the_count(curve: tuple[list[int], list[float]]) -> None:
    counts, losses = curve
    at = between(counts)
    found = interpolated(counts, losses, at, positive=True)
    assert found.shape == at.shape
    assert (found > 0).all()
    assert (np.diff(found) <= 1e-12 * found[:-1]).all()
    # Noise does not reward pruning: of a level, what it or any level of more weights loses counts.
    exact = interpolated(counts, losses, np.array(counts), positive=True)
    for index in range(len(counts)):
        assert exact[index] == pytest.approx(max(max(losses[index:]), 1e-9 * max(losses), 1e-39), rel=1e-12, abs=0.0)


@pytest.mark.parametrize("middle", [1.0, 0.0])
def test_positive_losses_grow_geometrically(middle: float) -> None:
    at = np.arange(0, 41)
    np.testing.assert_allclose(
        interpolated([0, 10, 20, 40], [16.0, 8.0, 4.0, 1.0], at, positive=True), 2.0 ** (4 - at / 10), rtol=1e-12
    )
    # A loss of nothing counts as 1e-9 of the greatest.
    found = interpolated([0, 10, 20], [1.0, middle, 0.0], np.array([0, 10, 20]), positive=True)
    np.testing.assert_allclose(found, [1.0, max(middle, 1e-9), 1e-9], rtol=1e-12)


def test_positive_losses_have_no_kinks() -> None:
    logs = np.log(interpolated([0, 1000, 2000], [1e4, 1e2, 10.0], np.array([999, 1000, 1001]), positive=True))
    before, after = np.diff(logs)
    assert math.log(1e-2) / 1000 < before < math.log(1e-1) / 1000  # the slopes of both sides
    assert before == pytest.approx(after, rel=0.01)


@given(curves(st.floats(-1e6, 1e6)))
@examples(200)
def test_other_losses_are_linear(curve: tuple[list[int], list[float]]) -> None:
    counts, losses = curve
    at = between(counts)
    found = interpolated(counts, losses, at, positive=False)
    size = max(map(abs, losses)) + 1e-300
    for count, value in zip(at, found, strict=True):
        after = next(index for index, each in enumerate(counts) if each >= count)
        if counts[after] == count:
            assert value == losses[after]
            continue
        part = (count - counts[after - 1]) / (counts[after] - counts[after - 1])
        expected = losses[after - 1] + part * (losses[after] - losses[after - 1])
        assert value == pytest.approx(expected, rel=0.0, abs=1e-12 * size)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("loss", [2.5, 1e-12])
def test_one_level_has_one_loss(positive: bool, loss: float) -> None:
    assert interpolated([7], [loss], np.array([7, 7]), positive=positive).tolist() == [loss, loss]


# NaN

COUNTS = {"a": Counts("per-row", (4, 8)), "b": Counts("per-row", (2, 8))}


@pytest.mark.parametrize(
    "call",
    [
        lambda: budget_of(COUNTS, math.nan),
        lambda: apportioned(COUNTS, {"a": 0.5, "b": math.nan}, 24),
        lambda: apportioned(COUNTS, {"a": math.nan, "b": 0.5}, 48),
    ],
    ids=["budget", "wish", "wish within a large budget"],
)
def test_sparsities_that_are_no_numbers_are_errors(call: Callable[[], Any]) -> None:
    with pytest.raises((MaskoptError, ValueError)):
        call()


@pytest.mark.parametrize(
    ("wrong", "positive"),
    [(math.nan, True), (math.nan, False), (math.inf, True), (math.inf, False), (-math.inf, False)],
)
@pytest.mark.parametrize("counts", [[8], [0, 8], [0, 3, 8], [0, 3, 5, 8]], ids=len)
def test_losses_that_are_no_numbers_reach_no_levels(counts: list[int], wrong: float, positive: bool) -> None:
    layer = Counts("per-row", (4, 8))
    for index in range(len(counts)):
        losses = [float(9 - count) for count in counts]
        losses[index] = wrong
        at = levels_of(counts[0], counts[-1])
        with pytest.raises((MaskoptError, ValueError)):
            separable_levels("a", layer, at, interpolated(counts, losses, at, positive=positive))
