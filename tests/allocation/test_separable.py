"""The separable problem, solved exactly: against HiGHS, against enumeration in whole numbers, and its bounds."""

import heapq
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from maskopt.allocation import Choice, Levels, allocate_levels, joined
from maskopt.errors import MaskoptError
from tests.helpers import examples

STATES = "maskopt.allocation.separable._MOST_STATES"
ROUNDING = Fraction(1, 10**12)  # of the sum of the sizes of the losses that are added


def chosen(layers: Sequence[Levels], levels: Sequence[int]) -> list[float]:
    return [layer.losses[level] for layer, level in zip(layers, levels, strict=True)]


def price(layers: Sequence[Levels], levels: Sequence[int]) -> int:
    return sum(layer.costs[level] for layer, level in zip(layers, levels, strict=True))


def exact(losses: Sequence[float]) -> Fraction:
    return sum(map(Fraction, losses), Fraction())


def rounding(losses: Sequence[float]) -> Fraction:
    return ROUNDING * exact([abs(loss) for loss in losses])


def enumerated(layers: Sequence[Levels], budget: int) -> list[float]:
    """Return the losses of the best choice."""
    choices = itertools.product(*(range(len(layer.costs)) for layer in layers))
    return chosen(
        layers,
        min(
            (levels for levels in choices if price(layers, levels) <= budget),
            key=lambda levels: exact(chosen(layers, levels)),
        ),
    )


def lagrangian(layers: Sequence[Levels], budget: int, multiplier: Fraction) -> Fraction:
    least = [
        min(Fraction(loss) + multiplier * cost for cost, loss in zip(layer.costs, layer.losses, strict=True))
        for layer in layers
    ]
    return sum(least) - multiplier * budget


def best_bound(layers: Sequence[Levels], budget: int) -> Fraction:
    """Return the greatest Lagrangian bound. It is concave and linear between slopes of pairs of levels."""
    slopes = {Fraction(0)}
    for layer in layers:
        for (cost, loss), (more, less) in itertools.permutations(zip(layer.costs, layer.losses, strict=True), 2):
            if more > cost and less < loss:
                slopes.add((Fraction(loss) - Fraction(less)) / (more - cost))
    return max(lagrangian(layers, budget, slope) for slope in slopes)


def consistent(layers: Sequence[Levels], budget: int, choice: Choice) -> None:
    """Check what a choice says about itself."""
    assert len(choice.levels) == len(layers)
    assert all(type(level) is int for level in choice.levels)
    assert min(choice.levels) >= 0
    assert choice.cost == price(layers, choice.levels) <= budget
    assert choice.loss == math.fsum(chosen(layers, choice.levels))
    assert choice.gap == choice.loss - choice.lower_bound >= 0
    assert choice.multiplier >= 0
    assert choice.lower_bound == choice.loss or not choice.optimal


# Instances

whole_losses = st.integers(-6, 12).map(float)
scaled_losses = st.builds(
    lambda size, scale: size * scale,
    st.one_of(st.integers(0, 9).map(float), st.floats(0.0, 1.0)),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e5, 1e12]),
)


@st.composite
def levels(draw: st.DrawFn, losses: st.SearchStrategy[float], most: int, name: str = "layer") -> Levels:
    number = draw(st.integers(1, most))
    costs = st.integers(0, draw(st.sampled_from([1, 6, 40, 10**6])))
    lists = [draw(st.lists(each, min_size=number, max_size=number)) for each in (costs, losses)]
    if draw(st.booleans()):  # otherwise losses need not fall as costs rise
        lists = [sorted(lists[0]), sorted(lists[1], reverse=True)]
    return Levels(name, tuple(lists[0]), tuple(lists[1]))


@st.composite
def instances(
    draw: st.DrawFn, losses: st.SearchStrategy[float] = whole_losses, most: int = 4
) -> tuple[list[Levels], int]:
    layers = draw(st.lists(levels(losses, most), min_size=1, max_size=4))
    least, full = (sum(end(layer.costs) for layer in layers) for end in (min, max))
    return layers, draw(st.one_of(st.integers(least, full), st.sampled_from([least, full, full + 7])))


def random_instance(seed: int) -> tuple[list[Levels], int]:
    random = np.random.default_rng(seed)
    largest = random.choice([5, 50, 10**6])
    spread = random.choice([0.0, 2.0, 12.0])  # decimal powers between the scales of layers
    layers = []
    for index in range(random.integers(1, 13)):
        number = random.integers(1, 9)
        costs = random.integers(0, largest + 1, number) * (random.random(number) < 0.8)
        kind = random.choice(["uniform", "ties", "negative", "falling", "convex"])
        if kind == "uniform":
            losses = random.random(number)
        elif kind == "ties":
            losses = random.integers(0, 3, number) / 2
        elif kind == "negative":
            losses = random.standard_normal(number)
        else:
            costs = np.sort(costs)
            steps = np.sort(random.random(number))[::-1] if kind == "convex" else random.random(number)
            losses = steps[::-1].cumsum()[::-1]
        if random.random() < 0.3:
            copied = random.integers(0, number)
            costs, losses = np.append(costs, costs[copied]), np.append(losses, losses[copied])
        losses = losses * 10.0 ** random.uniform(-spread, spread)
        layers.append(Levels(f"layer {index}", tuple(map(int, costs[:8])), tuple(map(float, losses[:8]))))
    if not spread:
        scale = 10.0 ** random.uniform(-12, 12)
        layers = [Levels(layer.name, layer.costs, tuple(loss * scale for loss in layer.losses)) for layer in layers]
    least, full = (sum(end(layer.costs) for layer in layers) for end in (min, max))
    return layers, int(random.choice([least, full, *random.integers(least, full + 1, 6)]))


def choice_of_highs(layers: Sequence[Levels], budget: int) -> list[int]:
    number = [len(layer.costs) for layer in layers]
    losses = np.concatenate([np.array(layer.losses) - min(layer.losses) for layer in layers])
    rows = np.repeat(np.arange(len(layers)), number) == np.arange(len(layers))[:, None]
    found = milp(
        losses * (1e6 / max(losses.max(), 1e-300)),  # HiGHS stops at a gap of 1e-6
        constraints=[
            LinearConstraint(rows.astype(float), 1, 1),
            LinearConstraint(np.concatenate([layer.costs for layer in layers])[None].astype(float), ub=budget),
        ],
        integrality=np.ones(len(losses)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    return [int(part.argmax()) for part in np.split(found.x, np.cumsum(number)[:-1])]


# Optimality


def test_no_choice_of_highs_is_better() -> None:
    within = 0
    for seed in range(1000):
        layers, budget = random_instance(seed)
        choice = allocate_levels(layers, budget)
        consistent(layers, budget, choice)
        assert choice.optimal, seed
        other = choice_of_highs(layers, budget)
        if price(layers, other) > budget:  # HiGHS takes 1 - 1e-6 for 1
            continue
        within += 1
        ours, losses = exact(chosen(layers, choice.levels)), chosen(layers, other)
        assert ours <= exact(losses) + rounding(losses), seed
        largest = max(max(layer.losses) - min(layer.losses) for layer in layers)
        assert exact(losses) <= ours + Fraction(largest) / 10**10, seed
    assert within >= 990


@given(instances())
@examples(600)
def test_whole_losses_are_least(instance: tuple[list[Levels], int]) -> None:
    layers, budget = instance
    choice = allocate_levels(layers, budget)
    consistent(layers, budget, choice)
    assert choice.optimal
    assert choice.loss == choice.lower_bound == math.fsum(enumerated(layers, budget))


@given(instances(scaled_losses))
@examples(600)
def test_losses_of_any_scales_are_least_up_to_rounding(instance: tuple[list[Levels], int]) -> None:
    layers, budget = instance
    choice = allocate_levels(layers, budget)
    consistent(layers, budget, choice)
    assert choice.optimal
    best = enumerated(layers, budget)
    assert exact(chosen(layers, choice.levels)) <= exact(best) + rounding(best)


SMALL = [Levels("a", (0, 2), (3.0, 0.0)), Levels("b", (0, 3), (4.4, 0.0)), Levels("c", (0, 2), (1.3999, 0.0))]
"""At 4 greedy buys a, of the best ratio, and c, and loses 4.4; to buy b alone loses 4.3999."""


@pytest.mark.parametrize("budget", range(8))
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e9, 1e12, 1e15])
def test_large_losses_hide_no_small_ones(scale: float, budget: int) -> None:
    best = math.fsum(enumerated(SMALL, budget))
    choice = allocate_levels([Levels("large", (0, 1), (scale * 10, 0.0)), *SMALL], budget + 1)
    assert choice.loss == choice.lower_bound == best
    assert choice.levels[0] == 1


@pytest.mark.parametrize("budget", range(8))
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e9, 1e12, 1e15])
def test_a_level_above_the_budget_hides_nothing(scale: float, budget: int) -> None:
    best = math.fsum(enumerated(SMALL, budget))
    assert allocate_levels([*SMALL, Levels("dear", (0, 1000), (0.0, -scale))], budget).loss == best
    assert allocate_levels([*SMALL, Levels("bad", (0, 10**6), (0.0, scale))], budget).loss == best


@pytest.mark.parametrize(
    ("budget", "levels", "loss", "multiplier"),
    [
        (3, (0, 1, 0), 4.3999, 4.4 / 3),
        (4, (0, 1, 0), 4.3999, 4.4 / 3),
        (5, (1, 1, 0), 1.3999, 1.3999 / 2),
        (7, (1, 1, 1), 0.0, 0.0),
    ],
)
def test_figures_by_hand(budget: int, levels: tuple[int, ...], loss: float, multiplier: float) -> None:
    choice = allocate_levels(SMALL, budget)
    assert choice.levels == levels
    assert choice.loss == pytest.approx(loss, rel=1e-15)
    assert choice.multiplier == pytest.approx(multiplier, rel=1e-15)
    assert choice.optimal
    assert choice.gap == 0.0


@given(instances())
@examples(150)
def test_a_greater_budget_never_loses_more(instance: tuple[list[Levels], int]) -> None:
    layers, budget = instance
    least, full = (sum(end(layer.costs) for layer in layers) for end in (min, max))
    steps = sorted({least, *range(budget, min(full, budget + 30) + 1), (least + full) // 2, full, full + 1})
    losses = [allocate_levels(layers, step).loss for step in steps]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == sum(min(layer.losses) for layer in layers)


@given(st.data(), instances())
@examples(200)
def test_the_order_of_layers_and_of_levels_does_not_matter(data: st.DataObject, instance: tuple[Any, int]) -> None:
    layers, budget = instance
    other = []
    for layer in data.draw(st.permutations(layers)):
        order = data.draw(st.permutations(range(len(layer.costs))))
        other.append(Levels("", *(tuple(row[i] for i in order) for row in (layer.costs, layer.losses))))
    assert allocate_levels(other, budget).loss == allocate_levels(layers, budget).loss


@given(instances(scaled_losses), st.integers(-60, 60), st.integers(1, 9))
@examples(200)
def test_units_do_not_matter(instance: tuple[list[Levels], int], power: int, times: int) -> None:
    layers, budget = instance
    scaled = [
        Levels("", tuple(times * cost for cost in layer.costs), tuple(loss * 2.0**power for loss in layer.losses))
        for layer in layers
    ]
    one, other = allocate_levels(layers, budget), allocate_levels(scaled, times * budget + times - 1)
    assert other.loss == pytest.approx(one.loss * 2.0**power, rel=1e-12, abs=0.0)


rows = st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True)


@given(st.lists(rows, min_size=1, max_size=6), st.integers(0, 40))
@examples(200)
def test_greedy_is_optimal_for_convex_losses(gains: list[list[int]], budget: int) -> None:
    """Steps cost 1 each, and of a layer each gains less than the one before."""
    gains = [sorted(row, reverse=True) for row in gains]
    layers = [
        Levels("", tuple(range(len(row) + 1)), tuple(float(sum(row[step:])) for step in range(len(row) + 1)))
        for row in gains
    ]
    taken = heapq.nlargest(budget, itertools.chain(*gains))
    choice = allocate_levels(layers, budget)
    assert choice.optimal
    assert choice.loss == sum(map(sum, gains)) - sum(taken)
    # The bound of the multiplier alone is tight, too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STATES, 0)
        bound = allocate_levels(layers, budget)
    assert bound.loss == bound.lower_bound == choice.loss


# Bounds


@given(instances())
@examples(200)
def test_the_multiplier_gives_the_best_lagrangian_bound(instance: tuple[list[Levels], int]) -> None:
    layers, budget = instance
    choice = allocate_levels(layers, budget)
    # Levels that no choice can pay may be left out, which gives a greater bound.
    room = budget - sum(min(layer.costs) for layer in layers)
    paid = []
    for layer in layers:
        fit = [index for index, cost in enumerate(layer.costs) if cost - min(layer.costs) <= room]
        paid.append(Levels("", *(tuple(row[index] for index in fit) for row in (layer.costs, layer.losses))))
    best, multiplier = best_bound(layers, budget), Fraction(choice.multiplier)
    bound = lagrangian(paid, budget, multiplier)
    assert best - ROUNDING * (abs(best) + multiplier * budget) <= bound <= Fraction(choice.loss)


@pytest.mark.parametrize("states", [0, 1, 3])
@given(instances(most=6))
@examples(150)
def test_too_many_states_leave_a_valid_choice_and_bound(states: int, instance: tuple[list[Levels], int]) -> None:
    layers, budget = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STATES, states)
        choice = allocate_levels(layers, budget)
    consistent(layers, budget, choice)
    best = math.fsum(enumerated(layers, budget))
    assert choice.loss == best if choice.optimal else choice.loss >= best
    # A bound that is not the loss is the Lagrangian's, computed in float64.
    rounding = 1e-12 * (sum(max(map(abs, layer.losses)) for layer in layers) + choice.multiplier * budget)
    assert choice.lower_bound <= best + (0.0 if choice.optimal else rounding)
    assert choice.lower_bound >= float(best_bound(layers, budget)) - rounding


@pytest.mark.parametrize(("states", "optimal", "loss"), [(0, False, 4.4), (1, False, 4.4), (200_000, True, 4.3999)])
def test_the_dynamic_programme_says_when_it_gives_up(
    monkeypatch: pytest.MonkeyPatch, states: int, optimal: bool, loss: float
) -> None:
    monkeypatch.setattr(STATES, states)
    choice = allocate_levels(SMALL, 4)
    assert choice.optimal == optimal
    assert choice.loss == pytest.approx(loss, rel=1e-15)
    # Of the relaxation: two thirds of b are bought.
    assert choice.lower_bound == (choice.loss if optimal else pytest.approx(1.3999 + 4.4 / 3, rel=1e-14))
    assert choice.gap == pytest.approx(0.0 if optimal else 4.4 - 1.3999 - 4.4 / 3, rel=1e-14)


# Groups


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[list[Levels]], int]:
    """Some groups of layers, the levels of each group equal in number."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(1, 4))
        costs, losses = (
            st.lists(each, min_size=number, max_size=number).map(tuple) for each in (st.integers(0, 20), whole_losses)
        )
        found.append(draw(st.lists(st.builds(Levels, st.just("layer"), costs, losses), min_size=1, max_size=3)))
    least, full = (
        sum(end(map(sum, zip(*(layer.costs for layer in group), strict=True))) for group in found) for end in (min, max)
    )
    return found, draw(st.integers(least, full))


@given(groups())
@examples(200)
def test_layers_that_must_agree(case: tuple[list[list[Levels]], int]) -> None:
    found, budget = case
    layers = [layer for group in found for layer in group]
    best = math.inf
    for levels in itertools.product(*(range(len(layer.costs)) for layer in layers)):
        of_groups = iter(levels)
        agreed = all(len({next(of_groups) for _ in group}) == 1 for group in found)
        if agreed and price(layers, levels) <= budget:
            best = min(best, math.fsum(chosen(layers, levels)))
    choice = allocate_levels([joined("group", group) for group in found], budget)
    spread = [level for level, group in zip(choice.levels, found, strict=True) for _ in group]
    assert choice.loss == best == math.fsum(chosen(layers, spread))
    assert choice.cost == price(layers, spread) <= budget


def test_joined_levels_are_sums() -> None:
    parts = [Levels("a", (1, 5), (2.0**53, 4.0)), Levels("b", (0, 7), (1.0, 0.5)), Levels("c", (2, 2), (1.0, 0.0))]
    assert joined("all", parts) == Levels("all", (3, 14), (2.0**53 + 2.0, 4.5))  # one after the other: 2.0**53
    assert joined("one", parts[:1]) == Levels("one", (1, 5), (2.0**53, 4.0))


# Errors


@pytest.mark.parametrize(
    ("costs", "losses", "sentence"),
    [
        ((), (), "q needs a cost and a loss for each of its levels; got 0 costs and 0 losses"),
        ((1, 2), (0.0,), "q needs a cost and a loss for each of its levels; got 2 costs and 1 losses"),
        ((1,), (0.0, 1.0), "got 1 costs and 2 losses"),
        ((1, -1), (0.0, 1.0), "Costs of q must be whole numbers of at least 0; got -1"),
        ((1.0,), (0.0,), r"Costs of q must be whole numbers of at least 0; got 1\.0"),
        ((True,), (0.0,), "Costs of q must be whole numbers of at least 0; got True"),
        (("1",), (0.0,), "Costs of q must be whole numbers of at least 0; got '1'"),
        ((10**17,), (0.0,), "Costs of q must be whole numbers of at least 0; got 10{17}"),
        ((1, 2), (0.0, math.nan), "Losses of q must be finite; got nan"),
        ((1, 2), (math.inf, 0.0), "Losses of q must be finite; got inf"),
        ((1,), (-math.inf,), "Losses of q must be finite; got -inf"),
    ],
)
def test_bad_levels_are_refused(costs: tuple[Any, ...], losses: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        Levels("q", costs, losses)


@pytest.mark.parametrize("budget", [6, 0])
def test_budgets_below_the_cheapest_levels_are_refused(budget: int) -> None:
    layers = [Levels("a", (3, 9), (1.0, 0.0)), Levels("b", (8, 4), (0.0, 1.0))]
    with pytest.raises(MaskoptError, match=f"The budget {budget} is less than the cheapest levels cost, 7"):
        allocate_levels(layers, budget)
    assert allocate_levels(layers, 7).levels == (0, 1)


@pytest.mark.parametrize("budget", [-1, 7.5, math.nan, "7", None, True])
def test_budgets_that_are_no_whole_numbers_are_refused(budget: Any) -> None:
    with pytest.raises(MaskoptError, match="The budget must be a whole number of at least 0"):
        allocate_levels([Levels("a", (0,), (1.0,))], budget)


def test_no_layers_are_refused() -> None:
    with pytest.raises(MaskoptError, match="There is no layer to choose a level for"):
        allocate_levels([], 5)


@pytest.mark.parametrize(("numbers", "shown"), [((1, 2), "1, 2"), ((3, 3, 2), "2, 3"), ((), "")])
def test_groups_of_unequal_layers_are_refused(numbers: tuple[int, ...], shown: str) -> None:
    parts = [Levels("part", tuple(range(number)), (0.0,) * number) for number in numbers]
    sentence = rf"The layers of q must have equal numbers of levels; they have \[{shown}\]"
    with pytest.raises(MaskoptError, match=sentence):
        joined("q", parts)
