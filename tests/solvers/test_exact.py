"""Results of exact solvers that are stopped, and refused problems."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from maskopt import NM, Function, LayerReconstruction, MaskoptError, PerRow, Unstructured, solve
from maskopt.solvers import BruteForce, GapKind, Scip, State, Status, Stop, Wanda
from maskopt.solvers import scip as scip_module
from maskopt.solvers.base import Monitor

FORMS = ["convex", "raw"]


def problem(rows: int = 2, d: int = 20, seed: int = 0) -> LayerReconstruction:
    """A layer with correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    weight, mixing, x = (
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((rows, d), (d, d), (d, d))
    )
    inputs = (torch.eye(d, dtype=torch.float64) + mixing) @ x
    return LayerReconstruction(weight, inputs @ inputs.T)


@pytest.fixture(scope="module")
def optimum() -> float:
    """The optimum of `problem()`, half of every row kept."""
    return solve(problem(), PerRow(0.5), BruteForce()).total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, Status.OPTIMAL),
        ({"time_limit": 1e-9}, Status.TIME_LIMIT),
        ({"nodes": 1}, Status.ITERATION_LIMIT),
        ({"gap": 10.0}, Status.WITHIN_GAP),
    ],
)
def test_scip_ends_with_the_expected_status_and_a_valid_bound(
    form: Any, settings: dict[str, Any], status: Status, optimum: float
) -> None:
    solver = Scip(form=form, start=Wanda(), **settings)
    result = solve(problem(), PerRow(0.5), solver)
    assert result.status in (status, *([Status.OPTIMAL] if form == "raw" and status is Status.WITHIN_GAP else []))
    assert result.gap_kind is GapKind.PROVEN
    assert PerRow(0.5).contains(result.mask)
    assert result.lower_bound is not None
    assert 0.0 <= float(result.lower_bound.sum()) <= optimum <= result.total * (1 + 1e-12)
    assert result.total <= solve(problem(), PerRow(0.5), Wanda()).total
    if status is Status.OPTIMAL:
        assert result.total == pytest.approx(optimum, rel=1e-5)
        assert float(result.lower_bound.sum()) == pytest.approx(optimum, rel=1e-4)
    if status is Status.WITHIN_GAP:
        assert result.total <= 11 * float(result.lower_bound.sum()) * (1 + 1e-4)


def test_convex_form_proves_more_at_the_root() -> None:
    bounds = [
        solve(problem(), PerRow(0.5), Scip(form=form, nodes=1)).lower_bound.sum()  # type: ignore[arg-type, union-attr]
        for form in FORMS
    ]
    assert bounds[0] > 1.5 * bounds[1]


@pytest.mark.parametrize("solver", [Scip(start=Wanda()), BruteForce()])
def test_a_tiny_time_limit_gives_a_member_and_a_valid_bound(solver: Any, optimum: float) -> None:
    result = solve(problem(), PerRow(0.5), solver, time_limit=1e-9)
    assert result.status is Status.TIME_LIMIT
    assert PerRow(0.5).contains(result.mask)
    assert result.lower_bound is not None
    assert float(result.lower_bound.sum()) <= optimum <= result.total * (1 + 1e-12)


def test_row_blocks_divide_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, left = [], iter([8.0, 6.0, 4.0, 1.0])
    plain = scip_module._Model.solve
    monkeypatch.setattr(Monitor, "left", property(lambda _: next(left)))
    monkeypatch.setattr(
        scip_module._Model, "solve", lambda self, limit, stops: (limits.append(limit), plain(self, 60.0, stops))[1]
    )
    solve(problem(rows=4, d=4), PerRow(0.5), Scip(time_limit=1.5))
    assert limits == [1.5, 1.5, 1.5, 1.0]


def test_the_monitor_knows_the_remaining_time() -> None:
    assert Monitor("solver", None, None).left == float("inf")
    assert 0.0 < Monitor("solver", None, 100.0).left <= 100.0
    assert Monitor("solver", None, 0.0).left == 0.0


@pytest.mark.parametrize("solver", [Scip(start=Wanda()), BruteForce()])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_callback_stops_exact_solvers(solver: Any, calls: int, optimum: float) -> None:
    seen: list[State] = []

    def stop(state: State) -> Stop | None:
        seen.append(state)
        return Stop.STOP if len(seen) == calls else None

    result = solve(problem(), PerRow(0.5), solver, callback=stop)
    assert result.status is Status.STOPPED
    assert len(seen) == calls
    assert [state.fraction for state in seen] == sorted(state.fraction for state in seen)
    assert PerRow(0.5).contains(result.mask)
    assert result.lower_bound is not None
    assert 0.0 <= float(result.lower_bound.sum()) <= optimum <= result.total * (1 + 1e-12)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError])
def test_failures_of_callbacks_pass_through_scip(failure: type[BaseException]) -> None:
    calls: list[State] = []

    def fail(state: State) -> None:
        calls.append(state)
        if len(calls) == 3:
            raise failure

    with pytest.raises(failure):
        solve(problem(), PerRow(0.5), Scip(), callback=fail)


def test_interrupts_end_scip() -> None:
    calls: list[State] = []

    def interrupt(state: State) -> None:
        calls.append(state)
        if len(calls) == 3:  # SCIP is running and handles the signal
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        solve(problem(), PerRow(0.5), Scip(), callback=interrupt)


def test_unknown_answers_of_scip_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(scip_module.STATUSES, "optimal")
    with pytest.raises(RuntimeError, match="'optimal'"):
        solve(problem(d=4), PerRow(0.5), Scip())


def test_infeasible_masks_of_scip_are_ignored(monkeypatch: pytest.MonkeyPatch, optimum: float) -> None:
    monkeypatch.setattr(scip_module._Model, "_mask", lambda self: torch.ones(self._shape, dtype=torch.bool))
    wanda = solve(problem(), PerRow(0.5), Wanda())
    result = solve(problem(), PerRow(0.5), Scip(start=Wanda()))
    assert result.status is Status.COMPLETED
    assert torch.equal(result.mask, wanda.mask)
    assert result.lower_bound is not None
    assert float(result.lower_bound.sum()) <= optimum


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exponents", [(0, 0), (300, -200), (-300, 100), (0, 400)])
def test_sizes_of_the_data_do_not_matter(form: Any, exponents: tuple[int, int]) -> None:
    plain = problem(rows=1, d=10)
    weight, gram = plain.weight * 2.0 ** exponents[0], plain.gram * 2.0 ** exponents[1]
    one, two = (
        solve(layer, NM(keep=1, group=2), Scip(form=form)) for layer in (plain, LayerReconstruction(weight, gram))
    )
    assert torch.equal(one.mask, two.mask)
    assert two.status is Status.OPTIMAL
    assert one.lower_bound is not None
    assert two.lower_bound is not None
    factor = 2.0 ** (2 * exponents[0] + exponents[1])
    assert float(two.lower_bound) == pytest.approx(factor * float(one.lower_bound), rel=1e-9)


def test_scip_is_optimal_on_channels_of_very_different_sizes() -> None:
    plain = problem(rows=1, d=12)
    size = 2.0 ** torch.arange(-12, 12, 2, dtype=torch.float64)
    layer = LayerReconstruction(plain.weight, size.unsqueeze(1) * plain.gram * size)
    best = solve(layer, PerRow(0.25), BruteForce())
    result = solve(layer, PerRow(0.25), Scip())
    assert result.total == pytest.approx(best.total, rel=1e-5)
    assert result.lower_bound is not None
    assert float(result.lower_bound) <= best.total


@pytest.mark.parametrize("form", FORMS)
def test_scip_finds_an_optimum_that_its_probing_would_cut_off(form: Any) -> None:
    random = torch.Generator().manual_seed(470)
    weight, x = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((1, 6), (6, 1)))
    layer = LayerReconstruction(weight, 4 * x @ x.T)
    best, result = solve(layer, PerRow(0.5), BruteForce()), solve(layer, PerRow(0.5), Scip(form=form, start=Wanda()))
    assert torch.equal(result.mask, best.mask)
    assert float(result.lower_bound) <= best.total  # type: ignore[arg-type]


def test_scip_is_deterministic() -> None:
    one, two = (solve(problem(rows=1), PerRow(0.5), Scip()) for _ in range(2))
    assert torch.equal(one.mask, two.mask)
    assert one.iterations == two.iterations
    assert torch.equal(one.lower_bound, two.lower_bound)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"form": "conic"}, {"time_limit": -1.0}, {"gap": float("nan")}, {"nodes": 0}, {"seed": -1}]
)
def test_bad_scip_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MaskoptError, match="Scip"):
        Scip(**settings)


def test_problems_beyond_exact_solvers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MaskoptError, match="limit >= 1"):
        BruteForce(limit=0)
    with pytest.raises(MaskoptError, match=r"at most 1000 masks .* has 3003 on 1 x 14"):
        solve(problem(d=14), PerRow(8), BruteForce(limit=1000))
    with pytest.raises(MaskoptError, match=r"has 10\^8\.2 on 2 x 15"):
        solve(problem(d=15), Unstructured(0.5), BruteForce())
    with pytest.raises(MaskoptError, match="must be a Quadratic"):
        solve(Function(lambda x: x.sum(1), (1, 4)), PerRow(0.5), Scip())
    restricted = PerRow(2)
    with pytest.raises(MaskoptError, match="protects 1 more"):
        solve(problem(rows=1, d=4), restricted.restrict(torch.tensor([[True, True, True, False]])), Scip())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MaskoptError, match=r'pip install "maskopt\[mip\]"'):
        Scip()
