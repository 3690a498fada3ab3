"""The rate at which losses fade, against the sums that it is to give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskopt.allocation.attenuation import attenuation


@given(
    losses=st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=8),
    rate=st.floats(0.0, 3.0),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_the_rate_of_attenuation_is_found_again(losses, rate, scale):
    values, behind = scale * np.array(losses), np.linspace(1.0, 0.0, len(losses))
    left = float((values * np.exp(-rate * behind)).sum() / values.sum())
    found = attenuation(values, behind, left)
    assert 0 <= found <= 3
    assert float((values * np.exp(-found * behind)).sum() / values.sum()) == pytest.approx(left, rel=1e-9)


def test_the_rate_of_attenuation_is_bounded():
    losses, behind = np.array([2.0, 1.0]), np.array([1.0, 0.0])
    assert attenuation(losses, behind, 1.0) == attenuation(losses, behind, 1.7) == 0.0
    assert attenuation(losses, behind, 0.1) == attenuation(losses, behind, 0.0) == 3.0
    assert attenuation(np.zeros(2), behind, 0.5) == 0.0
    assert attenuation(losses, np.zeros(2), 0.5) == 3.0  # one block: the rate has no effect
