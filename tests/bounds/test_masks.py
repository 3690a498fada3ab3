"""Bounds by name: whenever they are stopped they hold, and they say how far they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt import PerRow, synthetic
from maskopt.bounds import BoundKind, mask_bound, mask_bounds
from maskopt.oracles import NM, MaskSet
from tests.bounds.test_sdp import Countdown, minimum_error
from tests.helpers import Layer, examples, layers

KINDS: tuple[BoundKind, ...] = ("shift", "sdp", "cuts")


@given(layers(d=(2, 8)), st.sampled_from(KINDS), st.integers(0, 400), st.integers(0, 8))
@examples(80)
def test_no_mask_is_better_whenever_the_proof_is_stopped(layer: Layer, kind: BoundKind, steps: int, keep: int) -> None:
    problem = layer.problem()
    d = problem.shape[1]
    keep = min(keep, d)
    found = mask_bounds(problem, PerRow(keep), kind, stop=Countdown(steps))
    assert (found.bound >= 0.0).all()
    for row in range(problem.shape[0]):
        assert found.bound[row] <= minimum_error(problem, row, d - keep) * (1 + 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks", [PerRow(6), NM(keep=2, group=4)])
def test_rows_that_were_not_stopped_have_the_whole_bound(kind: BoundKind, masks: MaskSet) -> None:
    problem = synthetic("correlated", rows=5, d=12, seed=1).problem()
    whole = mask_bound(problem, masks, kind, memory=1)
    finished, previous = set(), torch.zeros(5, dtype=torch.float64)
    each = {"shift": 1000, "sdp": 6, "cuts": 60}[kind]
    for steps in (0, 100, *range(301, 301 + 11 * each, 2 * each), 10**6):
        # So little memory that rows are worked on one after the other.
        found = mask_bounds(problem, masks, kind, memory=1, stop=Countdown(steps))
        assert torch.equal(found.bound[found.finished], torch.maximum(whole, found.bound)[found.finished])
        assert (found.bound >= previous).all()
        previous = found.bound
        finished.add(int(found.finished.sum()))
    assert {0, 5} <= finished
    if kind != "shift":
        assert len(finished) > 2  # some rows were done, others were not


def test_rows_that_are_not_reached_have_the_bound_of_the_plain_relaxation() -> None:
    problem = synthetic("correlated", rows=4, d=12, seed=1).problem()
    found = mask_bounds(problem, PerRow(6), "sdp", memory=1, stop=Countdown(301))
    assert not found.finished.any()
    assert (found.bound > 0.0).all()
    assert (found.bound <= mask_bound(problem, PerRow(6), "sdp")).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("stops", [False, True])
def test_progress_moves_within_a_row_and_never_falls(kind: BoundKind, rows: int, stops: bool) -> None:
    problem = synthetic("correlated", rows=rows, d=16, seed=2).problem()
    told: list[float] = []
    stop = (lambda: False) if stops else None
    mask_bounds(problem, PerRow(8), kind, memory=1, stop=stop, progress=told.append)
    assert told == sorted(told)
    assert 0.0 <= told[0] < 0.3 / rows
    assert 0.85 < told[-1] <= 1.0
    # Many steps for each row; a shift is found for all rows at once.
    assert len(set(told)) >= 5 * (1 if kind == "shift" else rows)
    assert max(b - a for a, b in itertools.pairwise(told)) < 0.7 / (1 if kind == "shift" else rows)
