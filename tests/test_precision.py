"""Callers may allow products in fewer digits, in each of the ways that torch has; what is computed here does not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from maskopt.oracles import PerRow
from maskopt.precision import full_precision
from maskopt.problems import synthetic
from maskopt.solvers import make_solver, solve
from maskopt.weights import make_weights
from tests.products import allowed, matmul_settings

__all__ = ["allowed"]


def _product() -> torch.Tensor:
    """A product large enough for the CPU's faster formats."""
    factor = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    return factor @ factor


PRODUCT = _product()


def test_products_inside_are_exact_and_settings_come_back(allowed: list[object]) -> None:
    with full_precision():
        assert torch.equal(_product(), PRODUCT)
        assert (
            torch.backends.cuda.matmul.allow_tf32 is False
        )  # torch raises here where its two settings disagree, as it does for products
        with full_precision():
            assert torch.equal(_product(), PRODUCT)
        assert torch.equal(_product(), PRODUCT)
    assert matmul_settings() == allowed


@pytest.mark.parametrize("name", ["continuation", "best", "sparsegpt", "one-swap"])
def test_answers_are_the_same(allowed: list[object], name: str) -> None:
    problem = synthetic("outliers", rows=64, d=256, seed=1).problem()
    solver = make_solver(name) if name in ("continuation", "one-swap") else make_weights(name)
    found = solve(problem, PerRow(0.5), solver)
    assert matmul_settings() == allowed
    with full_precision():
        expected = solve(problem, PerRow(0.5), solver)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.objective, expected.objective)


def test_settings_stay_while_any_thread_needs_them(allowed: list[object]) -> None:
    entered, left = Barrier(2), Barrier(2)

    def first() -> None:
        with full_precision():
            entered.wait()
        left.wait()

    def second() -> torch.Tensor:
        with full_precision():
            entered.wait()
            left.wait()  # the other one has left
            return _product()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(first)
        assert torch.equal(pool.submit(second).result(), PRODUCT)
    assert matmul_settings() == allowed
