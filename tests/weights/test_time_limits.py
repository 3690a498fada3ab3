"""Time limits hold inside weight updates with all settings, and the best weights so far are returned."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from maskopt.oracles import PerRow, Unstructured
from maskopt.problems import LayerReconstruction, synthetic
from maskopt.solvers import Solver, Status, Stop, Wanda, solve
from maskopt.solvers.base import Monitor
from maskopt.weights import ADMM, ALPS, ConditionalADMM, FISTAPruner, LeastSquares, SparseGPT
from maskopt.weights.least_squares import exact_weights

MANY = 5000
# Each spends almost all its time in a different loop.
LONG: dict[str, Solver] = {
    "admm": ADMM(iterations=MANY),
    "alps": ALPS(iterations=MANY, every=MANY),
    "alps, polish": ALPS(iterations=1, polish=MANY),
    "best": ConditionalADMM(iterations=MANY),
    "best, stages": ConditionalADMM(iterations=MANY, stages=MANY),
    "best, polish": ConditionalADMM(iterations=4, polish=MANY),
    "fista, rounds": FISTAPruner(rounds=MANY, iterations=1),
    "fista, iterations": FISTAPruner(rounds=1, iterations=MANY),
    "lsq": LeastSquares(solver=Wanda(), method="cg", steps=MANY),
}
SETTINGS = pytest.mark.parametrize("method", LONG.values(), ids=LONG)


def problem(rows: int = 6, d: int = 24) -> LayerReconstruction:
    return synthetic(rows=rows, d=d, seed=2).problem()


class Clock:
    """A clock that advances by a second at every call."""

    now = 0

    def look(self, _: object) -> float:
        self.now += 1
        return float(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all solves."""
    clock = Clock()
    monkeypatch.setattr(Monitor, "seconds", property(clock.look))
    return clock


@SETTINGS
@pytest.mark.parametrize("masks", [PerRow(0.5), Unstructured(0.4)], ids=repr)
@pytest.mark.parametrize("limit", [1, 10, 40])
def test_the_limit_ends_the_loop_it_falls_into(clock: Clock, method: Solver, masks: PerRow, limit: float) -> None:
    layer = problem()
    result = solve(layer, masks, method, time_limit=limit)
    assert result.status is Status.TIME_LIMIT
    assert clock.now <= limit + 12
    assert result.counters.get("products", 0) <= 3 * limit + 12
    assert masks.contains(result.mask)
    assert result.weight is not None
    assert not bool(result.weight[~result.mask].any())
    assert bool((result.objective <= layer.objective(result.mask)).all())


@SETTINGS
def test_callbacks_stop_the_same_loops(method: Solver) -> None:
    calls = []

    def stop(state: object) -> Stop | None:
        calls.append(state)
        return Stop.STOP if len(calls) == 20 else None

    result = solve(problem(), PerRow(0.5), method, callback=stop)
    assert result.status is Status.STOPPED
    assert len(calls) == 20


@pytest.mark.parametrize("name", ["alps, polish", "best, polish", "lsq"])
def test_more_time_for_polishing_is_never_worse(clock: Clock, name: str) -> None:
    method = replace(LONG[name], ridge=0.0)  # every step of conjugate gradients lowers the objective
    errors = []
    for limit in (8, 16, 24, 32, 64):
        clock.now = 0
        errors.append(solve(problem(), PerRow(0.4), method, time_limit=limit).total)
    assert errors[-1] < errors[0]
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-5)


def test_factorisations_end_when_time_is_up(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    import maskopt.weights.conditional as conditional

    factorised, plain = [], conditional.definite_inverse
    monkeypatch.setattr(conditional, "definite_inverse", lambda matrix: (factorised.append(None), plain(matrix))[1])
    solve(problem(), PerRow(0.5), LONG["best, stages"], time_limit=5)
    assert len(factorised) <= 8


@pytest.mark.parametrize("block", [4, 24])
@pytest.mark.parametrize("limit", [1, 6, 11])
def test_sparsegpt_stops_between_inputs(clock: Clock, block: int, limit: float) -> None:
    layer = problem()
    result = solve(layer, PerRow(0.5), SparseGPT(block=block), time_limit=limit)
    assert result.status is Status.TIME_LIMIT
    assert clock.now <= limit + 4
    assert PerRow(0.5).contains(result.mask)


def test_sparsegpt_stopped_midway_has_corrected_for_what_it_pruned() -> None:
    """Stopped after k inputs, the weights are those of a pass that prunes the first k inputs only."""
    layer = synthetic(rows=3, d=12, seed=5).problem()
    masks = PerRow(0.5)
    method = SparseGPT(ridge=0.0, block=12)
    mask, _ = method.one_pass(layer, masks, lambda _: False)
    for done in range(1, 12):
        stopped, weight = method.one_pass(layer, masks, lambda column, done=done: column >= done)
        assert torch.equal(stopped, mask)  # a single span: it is chosen before the first input
        # The later inputs minimise the error given the first ones, in exact arithmetic.
        w, gram = layer.weight.double(), layer.gram.double()
        lost = (w * ~mask)[:, :done]
        v = weight.double()
        kept_early = v[:, :done]
        change = kept_early - w[:, :done]
        best = w[:, done:] - change @ gram[:done, done:] @ torch.linalg.inv(gram[done:, done:])
        assert lost.shape == change.shape
        torch.testing.assert_close(v[:, done:], best * mask[:, done:], rtol=1e-3, atol=1e-4)


def test_rows_that_least_squares_did_not_reach_keep_their_weights() -> None:
    from maskopt.weights import System

    layer = problem(rows=8)
    system, mask = System.of(layer, 0.01), solve(layer, PerRow(0.5), Wanda()).mask
    whole = exact_weights(system, mask, memory=1)
    seen: list[int] = []

    def stops(solved: int) -> bool:
        seen.append(solved)
        return solved == 3

    part = exact_weights(system, mask, 1, stops)
    assert seen == [0, 1, 2, 3]
    solved = (part == whole).all(1)
    assert int(solved.sum()) == 3
    torch.testing.assert_close(part[~solved], (system.weight * mask)[~solved])
