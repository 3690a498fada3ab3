"""Budgets: exact if small, bounded otherwise, never exceeded."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, milp
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import Budget, CanProject, HasFaces
from tests.helpers import every_mask, examples, feasible


def made(kind: str, shape: tuple[int, int], seed: int, fraction: float) -> tuple[Budget, Tensor]:
    random = np.random.default_rng(seed)
    price = {
        "whole": lambda: random.integers(0, 9, shape),
        "float": lambda: random.random(shape),
        "tenths": lambda: random.integers(0, 9, shape) / 10,
        "wide": lambda: np.exp(random.standard_normal(shape) * 6),
        "equal": lambda: np.full(shape, 0.1),
    }[kind]()
    price = torch.from_numpy(np.asarray(price)).double()
    masks = Budget(price, fraction * float(price.sum()))
    cost = torch.from_numpy(random.standard_normal(shape) - 0.3) * (price + 0.1) ** random.choice([0.0, 0.5, 1.0])
    return masks, cost


KINDS = ["whole", "float", "tenths", "wide", "equal"]


@given(st.sampled_from(KINDS), st.integers(0, 2**16), st.floats(0, 1))
@examples(100)
def test_small_budgets_are_exact(kind: str, seed: int, fraction: float) -> None:
    masks, cost = made(kind, (3, 4), seed, fraction)
    assert masks.exact
    chosen = masks.lmo_mask(cost)
    assert feasible(masks, chosen)
    best = (every_mask(masks, (3, 4)).double() * cost).sum((1, 2)).min()
    torch.testing.assert_close((cost * chosen).sum(), best, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masks.lmo_bound(cost), best.view(1), rtol=1e-12, atol=1e-12)


@given(st.sampled_from(KINDS), st.integers(0, 2**16), st.floats(0, 1))
@examples(60)
def test_large_budgets_are_bounded(kind: str, seed: int, fraction: float) -> None:
    masks, cost = made(kind, (20, 30), seed, fraction)
    able = masks.price <= masks.budget
    assert masks.exact == (kind == "equal" or int((able & (masks.price > 0)).sum()) <= 20)
    chosen = masks.lmo_mask(cost)
    assert masks.contains(chosen)
    kept = sum(map(Fraction, masks.price[chosen].tolist()))
    assert kept <= Fraction(masks.budget)
    value, bound = float((cost * chosen).sum()), float(masks.lmo_bound(cost))
    scale = max(1.0, float(cost.abs().sum()))
    # The relaxation fills the budget by cost per price and takes a part of the last entry.
    left, relaxed = masks.budget, 0.0
    pairs = zip(torch.where(able, cost, 0.0).flatten().tolist(), masks.price.flatten().tolist(), strict=True)
    for worth, price in sorted(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else -math.inf):
        part = 1.0 if price <= left else left / price
        if worth < 0:
            relaxed, left = relaxed + part * worth, left - part * price
    assert relaxed == pytest.approx(bound, abs=1e-9 * scale) or masks.exact
    assert bound <= value + 1e-12 * scale
    # At most the cost of one entry.
    assert value - relaxed <= -float(torch.where(able, cost, 0.0).min()) + 1e-9 * scale


def test_a_big_budget_agrees_with_integer_programming() -> None:
    masks, cost = made("whole", (10, 12), 5, 0.3)
    answer = milp(
        cost.flatten().numpy(),
        constraints=masks.milp_constraints((10, 12)),
        integrality=np.ones(120),
        bounds=Bounds(0, 1),
    )
    assert not masks.exact
    value = float((cost * masks.lmo_mask(cost)).sum())
    assert float(masks.lmo_bound(cost)) <= answer.fun <= value
    assert value == pytest.approx(answer.fun, rel=0.02)


def test_equal_prices_spend_the_last_bit() -> None:
    for number in (30, 47):
        masks = Budget(torch.full((10, 10), 0.75), 0.75 * number)
        assert int(masks.lmo_mask(torch.full((10, 10), -1.0)).sum()) == number
    masks = Budget(torch.tensor([[0.25, 0.5] * 30]), 7.75)
    assert float(masks.price[masks.lmo_mask(-masks.price)].sum()) == 7.75


def test_the_oracle_gives_known_answers() -> None:
    price = torch.tensor([[4.0, 3.0, 3.0, 0.0], [9.0, 0.0, 1.0, 2.0]])
    masks = Budget(price, 6.0)
    cost = torch.tensor([[-5.0, -3.0, -3.0, -0.1], [-99.0, 0.1, 2.0, 0.0]])
    assert masks.lmo_mask(cost).int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]
    assert masks.lmo_mask(torch.tensor([[-math.inf, -3.0, -3.0, 0.0], [0.0] * 4])).int().tolist()[0] == [1, 0, 0, 0]
    assert Budget(price, 0.0).lmo_mask(cost).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert Budget(price, 1e308).lmo_mask(cost).int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_everything_affordable_is_the_cube() -> None:
    masks = Budget(torch.ones(2, 3), 6.0)
    assert masks.count((2, 3)) == 64
    assert torch.equal(masks.center((2, 3), torch.float64, torch.device("cpu")), torch.full((2, 3), 0.5).double())


def test_faces_are_not_offered() -> None:
    masks = Budget(torch.ones(2, 3), 2.0)
    assert not isinstance(masks, HasFaces)
    assert not isinstance(masks, CanProject)
    assert "Budget(2 of 6, weight 2 x 3)" in repr(masks)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Budget(-torch.ones(2, 2), 1.0), "finite and not negative"),
        (lambda: Budget(torch.full((2, 2), math.inf), 1.0), "finite and not negative"),
        (lambda: Budget(torch.full((2, 2), math.nan), 1.0), "finite and not negative"),
        (lambda: Budget(torch.ones(4), 1.0), "Prices are a matrix"),
        (lambda: Budget(torch.ones(2, 2), -1.0), "The budget must be finite"),
        (lambda: Budget(torch.ones(2, 2), math.nan), "The budget must be finite"),
        (lambda: Budget(torch.ones(2, 2), 1.0).check((2, 3)), r"has prices for a weight of shape \(2, 2\); got"),
        (
            lambda: Budget(torch.ones(2, 2), 1.0).lmo_mask(torch.ones(3, 2)),
            r"has prices for a weight of shape \(2, 2\); got",
        ),
    ],
)
def test_bad_budgets_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        make()


def test_subnormal_costs() -> None:
    masks = Budget(torch.tensor([[3.0, 2.0, 2.0]]), 4.0)
    assert masks.lmo_mask(-5e-324 * torch.tensor([[1.0, 2.0, 1.0]], dtype=torch.float64)).int().tolist() == [[0, 1, 1]]
    assert masks.lmo_mask(-1e-45 * torch.tensor([[9.0, 2.0, 2.0]])).int().tolist() == [[1, 0, 0]]
    assert Budget(5e-324 * torch.tensor([[3.0, 2.0, 2.0]]).double(), 2e-323).lmo_mask(-torch.ones(1, 3)).tolist() == [
        [False, True, True]
    ]


@given(st.integers(0, 2**16), st.sampled_from(["large", "all", "huge", "subnormal"]), st.booleans())
@examples(120)
def test_small_ones_are_exact_over_any_scale(seed: int, kind: str, prices: bool) -> None:
    """Against all patterns in rational numbers; both the mask and the bound."""
    random = np.random.default_rng(seed)
    price, cost = random.random((1, 7)) + 0.1, random.standard_normal((1, 7)) - 0.5
    wide = price if prices else cost
    if kind == "large":
        wide.flat[random.integers(7, size=2)] *= [1e10, 1e-12]
    elif kind == "all":
        wide *= 10.0 ** random.integers(-12, 13, 7)
    else:
        wide[:] = np.round(8 * wide) * (1e300 if kind == "huge" else 5e-324)
    budget = float(price[0, random.random(7) < 0.5].sum())
    masks = Budget(torch.from_numpy(price), budget)
    chosen = masks.lmo_mask(torch.from_numpy(cost))
    exact = [[Fraction(value) for value in row[0].tolist()] for row in (price, cost)]
    patterns = [[pattern >> place & 1 for place in range(7)] for pattern in range(2**7)]
    affordable = [p for p in patterns if sum(a * b for a, b in zip(p, exact[0], strict=True)) <= Fraction(budget)]
    totals = [sum((a * b for a, b in zip(p, exact[1], strict=True)), Fraction(0)) for p in affordable]
    assert chosen[0].int().tolist() in affordable
    assert totals[affordable.index(chosen[0].int().tolist())] == min(totals)
    assert Fraction(float(masks.lmo_bound(torch.from_numpy(cost)))) <= min(totals)
