"""The evolutionary search: the optimum of small instances by enumeration, the budget, and how it selects."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskopt.allocation.evolution import Evolved, evolve
from maskopt.errors import MaskoptError
from tests.helpers import examples

Choice = tuple[int, ...]


def separable(cost: Sequence[Sequence[float]]) -> Callable[[list[Choice], int], list[float]]:
    def evaluate(choices: list[Choice], step: int) -> list[float]:
        return [math.fsum(row[level] for row, level in zip(cost, choice, strict=True)) for choice in choices]

    return evaluate


def budgets(choice: Sequence[int], sizes: Sequence[int]) -> dict[int, int]:
    return {size: sum(c for c, s in zip(choice, sizes, strict=True) if s == size) for size in set(sizes)}


def every_choice(levels: Sequence[int], sizes: Sequence[int], start: Sequence[int]) -> list[Choice]:
    every = itertools.product(*map(range, levels))
    return [choice for choice in every if budgets(choice, sizes) == budgets(start, sizes)]


@st.composite
def instances(draw: st.DrawFn, convex: bool = False) -> tuple[list[int], list[int], list[int], list[list[float]]]:
    count = draw(st.integers(1, 5))
    levels = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    sizes = draw(st.lists(st.sampled_from([8, 12]), min_size=count, max_size=count))
    start = [draw(st.integers(0, level - 1)) for level in levels]
    cost = [draw(st.lists(st.integers(-9, 9).map(float), min_size=level, max_size=level)) for level in levels]
    if convex:  # then any choice that is not the best has a single switch that improves it
        cost = [list(itertools.accumulate(sorted(row))) for row in cost]
    return levels, sizes, start, cost


@examples(60)
@given(instances(convex=True), st.integers(0, 99))
def test_finds_the_optimum_of_separable_instances(
    instance: tuple[list[int], list[int], list[int], list[list[float]]], seed: int
) -> None:
    levels, sizes, start, cost = instance
    evaluate = separable(cost)
    found = evolve(levels, sizes, start, evaluate, generations=25, seed=seed)
    assert found.value == min(evaluate(every_choice(levels, sizes, start), 0))
    assert [found.value] == evaluate([found.choice], 0)


def test_finds_the_optimum_by_hand() -> None:
    # Layers 0 and 1 share 2, layers 2, 3 and 4 share 3: of the first 2 + 0 costs 1, of the others 0 + 2 + 1 costs 0.
    cost = [[9.0, 4.0, 1.0], [0.0, 3.0, 9.0], [0.0, 5.0, 9.0], [4.0, 2.0, 0.0], [5.0, 0.0, 7.0]]
    found = evolve([3] * 5, [8, 8, 12, 12, 12], [1, 1, 1, 1, 1], separable(cost), generations=10)
    assert found.choice == (2, 0, 0, 2, 1)
    assert found.value == 1.0
    assert len(found.history) == 10
    assert found.history[-1] == found.value


@examples(60)
@given(instances(), st.integers(0, 99))
def test_budget_levels_and_selection_at_every_step(
    instance: tuple[list[int], list[int], list[int], list[list[float]]], seed: int
) -> None:
    levels, sizes, start, cost = instance
    survivors, offspring, generations = (5, 2, 1), 12, 6
    value = separable(cost)
    calls: list[tuple[int, list[Choice]]] = []
    parents: list[Choice] = [tuple(start)]

    def evaluate(choices: list[Choice], step: int) -> list[float]:
        calls.append((step, list(choices)))
        values = value(choices, step)
        if step == 2:
            assert parents[-1] == choices[-1]
            parents.append(choices[values.index(min(values))])
        return values

    found = evolve(
        levels, sizes, start, evaluate, generations=generations, offspring=offspring, survivors=survivors, seed=seed
    )
    assert found.choice == parents[-1]
    assert len(parents) == generations + 1
    for step, choices in calls:
        assert len(choices) <= (offspring, survivors[0], survivors[1] + 1)[step]
        assert len(set(choices)) == len(choices)
        for choice in choices:
            assert budgets(choice, sizes) == budgets(start, sizes)
            assert all(0 <= level < count for level, count in zip(choice, levels, strict=True))
    for (step, before), (later, after) in itertools.pairwise(calls):
        if later == step + 1:  # those of least value go on
            assert set(after[: survivors[step]]) <= {*before, *parents}
            kept = value(after[: survivors[step]], 0) if step < 1 else value(after[:-1], 0)
            assert sorted(kept) == sorted(value(before, 0))[: len(kept)]
    assert all(first >= second for first, second in itertools.pairwise(found.history))


def test_mutations_are_of_one_to_three_switches_and_mostly_of_one() -> None:
    start = tuple([5] * 40)
    distances: list[int] = []

    def evaluate(choices: list[Choice], step: int) -> list[float]:
        if step == 0:
            distances.extend(sum(abs(a - b) for a, b in zip(choice, start, strict=True)) // 2 for choice in choices)
        return [float(choice != start) for choice in choices]  # the start stays the best

    found = evolve([11] * 40, [8] * 40, start, evaluate, generations=20)
    assert found.choice == start
    assert len(distances) == 20 * 64
    assert set(distances) == {1, 2, 3}
    # The lesser of two draws from 1 to 3 is 1, 2, 3 in 5, 3, 1 of 9 cases; switches rarely cancel among 40 layers.
    for switches, share in ((1, 5 / 9), (2, 3 / 9), (3, 1 / 9)):
        assert distances.count(switches) / len(distances) == pytest.approx(share, abs=0.06)


def test_sizes_of_more_layers_change_more_often() -> None:
    start = tuple([5] * 40)
    changed = [0, 0]

    def evaluate(choices: list[Choice], step: int) -> list[float]:
        for choice in choices if step == 0 else []:
            changed[0] += sum(level != 5 for level in choice[:30])
            changed[1] += sum(level != 5 for level in choice[30:])
        return [float(choice != start) for choice in choices]

    evolve([11] * 40, [8] * 30 + [9] * 10, start, evaluate, generations=20)
    assert changed[0] / sum(changed) == pytest.approx(30 / 40, abs=0.06)


def test_is_a_function_of_the_seed() -> None:
    cost = [[float((7 * i + 3 * j) % 11) for j in range(6)] for i in range(8)]

    def run(seed: int) -> tuple[Evolved, list[list[Choice]]]:
        calls: list[list[Choice]] = []

        def evaluate(choices: list[Choice], step: int) -> list[float]:
            calls.append(choices)
            return separable(cost)(choices, step)

        return evolve([6] * 8, [8] * 8, [3] * 8, evaluate, generations=3, seed=seed), calls

    assert run(5) == run(5)
    assert run(5)[1] != run(6)[1]


def test_layers_without_a_partner_never_change() -> None:
    start = (1, 1, 1, 0)  # the last two are of equal size, the first two of none other's; level 2 is out of reach

    def evaluate(choices: list[Choice], step: int) -> list[float]:
        assert all(choice[:2] == start[:2] for choice in choices)
        return [float(-choice[3]) for choice in choices]

    found = evolve([3, 3, 3, 3], [8, 9, 10, 10], start, evaluate, generations=5)
    assert found == Evolved((1, 1, 0, 1), -1.0, (-1.0,) * 5)


@pytest.mark.parametrize(
    ("levels", "sizes", "start"),
    [
        ([5], [8], [2]),
        ([3, 3], [8, 9], [1, 1]),
        ([3, 3], [8, 8], [0, 0]),
        ([3, 2], [8, 8], [2, 1]),
        ([1, 3], [8, 8], [0, 1]),
    ],
)
def test_where_nothing_can_change_the_start_is_measured(levels: list[int], sizes: list[int], start: list[int]) -> None:
    seen: list[tuple[list[Choice], int]] = []

    def evaluate(choices: list[Choice], step: int) -> list[float]:
        seen.append((choices, step))
        return [4.0]

    assert evolve(levels, sizes, start, evaluate, generations=2) == Evolved(tuple(start), 4.0, (4.0, 4.0))
    assert seen == [([tuple(start)], 2)] * 2


def test_ties_move_on_and_nan_loses() -> None:
    found = evolve([3, 3], [8, 8], [1, 1], lambda choices, step: [0.0] * len(choices), generations=1)
    assert found.choice in {(0, 2), (2, 0)}
    nan = evolve(
        [3, 3], [8, 8], [1, 1], lambda choices, step: [7.0 if c == (1, 1) else math.nan for c in choices], generations=3
    )
    assert nan == Evolved((1, 1), 7.0, (7.0,) * 3)
    none = evolve([3, 3], [8, 8], [1, 1], lambda choices, step: [math.nan] * len(choices), generations=1)
    assert none.value == math.inf


def test_one_step_and_progress() -> None:
    told: list[tuple[int, int]] = []
    found = evolve(
        [3, 3],
        [8, 8],
        [1, 1],
        separable([[0.0, 5.0, 9.0], [0.0, 1.0, 3.0]]),
        generations=3,
        survivors=[1],
        progress=lambda done, total: told.append((done, total)),
    )
    assert (found.choice, found.value) == ((0, 2), 3.0)
    assert told == [(1, 3), (2, 3), (3, 3)]


GOOD: dict[str, object] = {"levels": [3, 3], "sizes": [8, 8], "start": [1, 1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": []}, "levels must be a list"),
        ({"levels": 3}, "levels must be a list.*got 3"),
        ({"sizes": [8]}, "sizes must be as many as the levels, 2; got 1"),
        ({"start": [1, 1, 1]}, "start must be as many as the levels, 2; got 3"),
        ({"start": [1, 3]}, "Layer 1 cannot start at level 3; its levels are 0 to 2"),
        ({"start": [-1, 1]}, "needs each of the start >= 0"),
        ({"start": [0.5, 1]}, "got 0.5"),
        ({"sizes": [8, 0]}, "needs each of the sizes >= 1"),
        ({"generations": 0}, "needs generations >= 1"),
        ({"offspring": 0}, "needs offspring >= 1"),
        ({"seed": 0.5}, "seed"),
        ({"survivors": []}, "survivors must be a list"),
        ({"survivors": [4, 2]}, "end with 1"),
        ({"survivors": [2, 4, 1]}, "must not increase"),
        ({"evaluate": 3}, "evaluate must be a function; got 3"),
        ({"progress": 3}, "progress must be a function; got 3"),
        ({"evaluate": lambda choices, step: [0.0]}, "one number for each of 2 choices"),
        ({"evaluate": lambda choices, step: [None] * len(choices)}, "one number for each"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], message: str) -> None:
    arguments = GOOD | {"evaluate": lambda choices, step: [0.0] * len(choices)} | changes
    with pytest.raises(MaskoptError, match=message):
        evolve(**arguments)  # type: ignore[arg-type]
