"""Sums without rounding, against rational numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.exact import (
    ExactMatrix,
    exact_difference,
    floor_of_sum,
    fraction,
    integers,
    nearest_float,
    summable,
    summed,
)
from tests.helpers import examples

numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-4, 4).map(float),
    st.sampled_from([0.0, 5e-324, -5e-324, 1e300, -1e300, 0.1, 1e-300]),
)


@given(st.lists(numbers, min_size=1, max_size=8))
@examples(200)
def test_floats_are_whole_numbers_times_a_power_of_two(values: list[float]) -> None:
    whole, exponent = integers(np.array(values))
    assert [fraction(number, exponent) for number in whole] == [Fraction(value) for value in values]
    assert summed(torch.tensor(values, dtype=torch.float64)) == sum(map(Fraction, values))


@given(st.lists(numbers.filter(lambda value: abs(value) < 1e300), min_size=1, max_size=8))
@examples(200)
def test_sums_are_rounded_down(values: list[float]) -> None:
    truth = sum(map(Fraction, values))
    found = floor_of_sum(torch.tensor(values, dtype=torch.float64))
    assert Fraction(found) <= truth < Fraction(math.nextafter(found, math.inf))


@given(st.lists(numbers.filter(lambda value: abs(value) < 1e300), min_size=2, max_size=6))
@examples(300)
def test_rows_called_summable_add_up_exactly(values: list[float]) -> None:
    if not bool(summable(torch.tensor([values], dtype=torch.float64))):
        return
    for pattern in range(2 ** len(values)):
        some = [value for place, value in enumerate(values) if pattern >> place & 1]
        total = 0.0
        for value in some:
            total += value
        assert Fraction(total) == sum(map(Fraction, some))


def test_ordinary_float32_costs_are_summable() -> None:
    costs = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    assert bool(summable(costs.double()).all())
    assert not bool(summable(costs.double() + 1e-9).any())
    assert not bool(summable(torch.tensor([[1e10, 1.0, 0.3]], dtype=torch.float64)))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e12])
def test_forms_that_cancel(size: float) -> None:
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-50]], dtype=torch.float64)
    one = torch.tensor([[1.0 + size, size]], dtype=torch.float64)
    off, exponent = exact_difference(one, torch.tensor([[0.0, 2 * size]], dtype=torch.float64))
    vector = [Fraction(1) + Fraction(size), -Fraction(size)]
    truth = sum(vector[i] * vector[j] * Fraction(float(gram[i, j])) for i in range(2) for j in range(2))
    assert ExactMatrix(gram).forms(off, exponent) == [truth]


def test_numbers_beyond_float64() -> None:
    assert nearest_float(Fraction(10) ** 400) == math.inf
    assert nearest_float(-(Fraction(10) ** 400)) == -math.inf
    assert nearest_float(Fraction(1, 3)) == 1 / 3
