"""Projection onto capped simplices of large rows, against bisection."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.oracles import PerRow, Unstructured
from tests.helpers import examples


def bisected(y: np.ndarray, keep: int) -> np.ndarray:
    low, high = -y.max() - 1, 1 - y.min() + 1
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(y + middle, 0, 1).sum() < keep:
            low = middle
        else:
            high = middle
    return np.clip(y + high, 0, 1)


@given(
    st.integers(0, 2**16),
    st.integers(1, 400),
    st.sampled_from([0.01, 1.0, 30.0, 1e3]),
    st.sampled_from([None, 0.25, 1.0]),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@examples(100)
def test_projection_agrees_with_bisection(
    dtype: torch.dtype, seed: int, size: int, scale: float, grid: float | None
) -> None:
    random = np.random.default_rng(seed)
    y = random.standard_normal((5, size)) * scale
    y = torch.from_numpy(y if grid is None else np.round(y / grid) * grid).to(dtype)
    keep = torch.from_numpy(random.integers(0, size + 1, 5))
    nearest = PerRow(keep).project(y)
    assert nearest.dtype == dtype
    for row in range(5):
        expected = torch.from_numpy(bisected(y[row].double().numpy(), int(keep[row])))
        torch.testing.assert_close(
            nearest[row].double(), expected, rtol=0, atol=torch.finfo(dtype).eps * (8 * scale + size)
        )


def test_a_big_matrix_sums_to_its_count() -> None:
    y = torch.randn(700, 900, generator=torch.Generator().manual_seed(0)) * 3
    nearest = Unstructured(0.4).project(y)
    assert abs(float(nearest.double().sum()) - 0.4 * y.numel()) < 0.02
    assert float(nearest.min()) == 0.0
    assert float(nearest.max()) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_points_are_projected(dtype: torch.dtype) -> None:
    nearest = PerRow(2).project(torch.tensor([[3.0, 0.5, 0.5, -7.0]], dtype=dtype))
    assert nearest.dtype == dtype
    assert nearest.tolist() == [[1.0, 0.5, 0.5, 0.0]]
