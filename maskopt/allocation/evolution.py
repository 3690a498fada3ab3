"""EvoPress: an evolutionary search over one level for each layer, at a fixed budget."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

from maskopt.checks import SEEDS, Rule, shown, whole
from maskopt.errors import MaskoptError

__all__ = ["Evolved", "evolve"]

_Choice = tuple[int, ...]  # the level of every layer

_SWITCHES = 3  # the most in one mutation, in the authors' code
_MISSES = 100  # after so many mutations in a row that are not new, the neighbourhood counts as exhausted


@dataclass(frozen=True)
class Evolved:
    """What a search found.

    Attributes
    ----------
    choice : tuple of int
        The level of every layer.
    value : float
        Its value in the last step of the last generation.
    history : tuple of float
        The value of the choice after each generation. It does not increase if the last step always measures on the
        same data.
    """

    choice: _Choice
    value: float
    history: tuple[float, ...]


def evolve(
    levels: Sequence[int],
    sizes: Sequence[int],
    start: Sequence[int],
    evaluate: Callable[[list[_Choice], int], Sequence[float]],
    *,
    generations: int = 400,
    offspring: int = 64,
    survivors: Sequence[int] = (8, 2, 1),
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Evolved:
    """Search for the levels of least value among those that the start becomes by switches.

    A switch raises one layer by a level and lowers another of the same size, so the sum of levels over the layers of
    each size never changes. A generation makes new choices out of the present one, each by as many switches as the
    lesser of two draws from 1 to 3, and selects among them in steps: fewer and fewer are measured, on more and more
    data. The present choice takes part in the last step.

    Parameters
    ----------
    levels : sequence of int
        The number of levels of each layer: its levels are 0, ..., levels - 1. For the budget to be kept, levels must
        be equally far apart, such as steps of a fixed number of weights.
    sizes : sequence of int
        The number of weights of each layer. A layer that no other equals in size keeps its level.
    start : sequence of int
        The level of each layer at first; it sets the budget.
    evaluate : callable
        Called with a list of choices and the number of the step, from 0; returns the value of each, less is better.
        NaN counts as infinite.
    generations : int
    offspring : int
        New choices for each generation; fewer if there are not so many.
    survivors : sequence of int
        How many choices each step leaves; the last must leave one.
    seed : int
        The search is a function of it and of `evaluate`.
    progress : callable, optional
        Called with (generations done, generations in all) after each.

    Returns
    -------
    Evolved

    Raises
    ------
    MaskoptError
        If the lists are empty or differ in length, a number is out of range, or `evaluate` returns anything but one
        number for each choice.

    References
    ----------
    O. Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", arXiv 2410.14649,
    section 3 and algorithm 1. The defaults are those of the authors' script for sparsity, which measures the KL
    divergence of the pruned from the dense model on 2048, 16384 and 65536 tokens.

    Examples
    --------
    >>> cost = [[0, 5, 9], [0, 1, 3]]  # of each layer at each level
    >>> def evaluate(choices, step):
    ...     return [sum(row[level] for row, level in zip(cost, choice)) for choice in choices]
    >>> evolve([3, 3], [64, 64], [1, 1], evaluate, generations=1)
    Evolved(choice=(0, 2), value=3.0, history=(3.0,))
    """
    groups = _checked(levels, sizes, start)
    for name, number, rule in (
        ("generations", generations, whole(1)),
        ("offspring", offspring, whole(1)),
        ("seed", seed, whole(*SEEDS)),
    ):
        _check(name, number, rule)
    _check_list("survivors", survivors, whole(1))
    if survivors[-1] != 1 or list(survivors) != sorted(survivors, reverse=True):
        raise MaskoptError(f"The survivors must not increase, and end with 1; got {shown(survivors)}.")
    for name, function in (("evaluate", evaluate), ("progress", progress)):
        if not callable(function) and (name == "evaluate" or function is not None):
            raise MaskoptError(f"{name} must be a function; got {shown(function)}.")
    draws = random.Random(int(seed))
    parent, history = tuple(int(level) for level in start), list[float]()
    for done in range(1, generations + 1):
        candidates = _offspring(parent, levels, groups, offspring, draws)
        for step, count in enumerate(survivors):
            if step == len(survivors) - 1:
                candidates.append(parent)  # behind the others, so a new choice wins a tie and plateaus can be crossed
            values = _measured(evaluate, candidates, step)
            best = sorted(range(len(candidates)), key=values.__getitem__)[:count]
            candidates = [candidates[index] for index in best]
        parent = candidates[0]
        history.append(values[best[0]])
        if progress is not None:
            progress(done, generations)
    return Evolved(parent, history[-1], tuple(history))


def _offspring(
    parent: _Choice, levels: Sequence[int], groups: list[list[int]], count: int, draws: random.Random
) -> list[_Choice]:
    """Return up to `count` mutations of a choice, all different from it and from each other."""
    found: dict[_Choice, None] = {}
    misses = 0
    while len(found) < count and misses < _MISSES:
        child = list(parent)
        for _ in range(min(draws.randint(1, _SWITCHES), draws.randint(1, _SWITCHES))):
            _switch(child, levels, groups, draws)
        new = tuple(child)
        misses = misses + 1 if new == parent or new in found else 0
        if not misses:
            found[new] = None
    return list(found)


def _switch(child: list[int], levels: Sequence[int], groups: list[list[int]], draws: random.Random) -> None:
    """Lower one layer and raise another of the same size, in place; do nothing where no pair can."""
    pairs = []  # of the layers of each size: those that can be lowered, those that can be raised
    for group in groups:
        lower = [layer for layer in group if child[layer] > 0]
        higher = [layer for layer in group if child[layer] < levels[layer] - 1]
        if lower and higher and not (len(lower) == 1 and lower == higher):
            pairs.append((lower, higher, len(group)))
    if not pairs:
        return
    lower, higher, _ = draws.choices(pairs, [size for _, _, size in pairs])[0]
    down = draws.choice(lower if len(higher) > 1 else [layer for layer in lower if layer != higher[0]])
    child[down] -= 1
    child[draws.choice([layer for layer in higher if layer != down])] += 1


def _measured(
    evaluate: Callable[[list[_Choice], int], Sequence[float]], candidates: list[_Choice], step: int
) -> list[float]:
    if not candidates:
        return []
    values = list(evaluate(list(candidates), step))
    if len(values) != len(candidates) or not all(isinstance(value, Real) for value in values):
        raise MaskoptError(
            f"evaluate must return one number for each of {len(candidates)} choices; got {shown(values)}."
        )
    return [math.inf if math.isnan(value) else float(value) for value in values]


def _checked(levels: Sequence[int], sizes: Sequence[int], start: Sequence[int]) -> list[list[int]]:
    """Check the layers; return those of each size that more than one layer has."""
    for name, numbers, low in (("levels", levels, 1), ("sizes", sizes, 1), ("start", start, 0)):
        _check_list(name, numbers, whole(low))
        if len(numbers) != len(levels):
            raise MaskoptError(f"The {name} must be as many as the levels, {len(levels)}; got {len(numbers)}.")
    for layer, (level, count) in enumerate(zip(start, levels, strict=True)):
        if level >= count:
            raise MaskoptError(f"Layer {layer} cannot start at level {level}; its levels are 0 to {count - 1}.")
    groups: dict[int, list[int]] = {}
    for layer, size in enumerate(sizes):
        groups.setdefault(size, []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


def _check_list(name: str, numbers: object, rule: Rule) -> None:
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or not numbers:
        raise MaskoptError(f"The {name} must be a list of whole numbers; got {shown(numbers)}.")
    for number in numbers:
        _check(f"each of the {name}", number, rule)


def _check(name: str, value: object, rule: Rule) -> None:
    if not rule.fits(value):
        raise MaskoptError(f"An evolutionary search needs {rule.words.format(name)}; got {shown(value)}.")
