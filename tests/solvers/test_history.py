"""Recorded histories: columns, the best mask and its source, and histories of chunks added up."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from maskopt.problems import Function
from maskopt.solvers import (
    COLUMNS,
    ContinuationFrankWolfe,
    FrankWolfe,
    GapKind,
    OneSwap,
    RowBlocks,
    SparseFW,
    Status,
    Wanda,
    solve,
)
from maskopt.solvers.certificate import dual_bound
from maskopt.solvers.history import Recorder, merged
from tests.helpers import SETS
from tests.loop_runs import function_case, layer_case, normal, plain_layer, random

SHAPE = (4, 8)


def falls(column: list[float]) -> bool:
    return all(b <= a for a, b in itertools.pairwise(column))


@pytest.mark.parametrize("set_name", ["per-row", "unstructured", "n:m", "blocks", "protected rows"])
@pytest.mark.parametrize("record", [1, 3, "doubling"])
@pytest.mark.parametrize("memory", [2**30, 1])
def test_history_columns_are_consistent(set_name: str, record: object, memory: int) -> None:
    problem, masks = plain_layer(1).problem(), SETS[set_name](SHAPE, 0.5)
    solver = FrankWolfe(direction="conjugate", iterations=20, relative_gap=0.0)
    result = solve(problem, masks, solver, record=record, memory=memory)
    history = result.history
    assert tuple(history) == COLUMNS
    assert len({len(column) for column in history.values()}) == 1
    planned = {1: list(range(20)), 3: list(range(0, 20, 3)), "doubling": [0, 1, 2, 4, 8, 16]}[record]
    planned = [t for t in planned if t < result.iterations]
    assert history["iteration"] == sorted(history["iteration"])
    assert set(history["iteration"]) >= set(planned)
    late = {t for t in history["iteration"] if t < result.iterations - 1} - set(planned)
    assert memory == 1 or not late  # the last rows are the last point, the swaps and the answer
    assert falls([-t for t in history["seconds"]])
    assert falls(history["incumbent"])
    assert falls([-bound for bound in history["bound"]])
    assert history["incumbent"][-1] == pytest.approx(result.total, rel=1e-12)
    assert history["bound"][-1] == pytest.approx(float(result.lower_bound.sum()), rel=1e-12)
    assert all(a <= b for a, b in zip(history["incumbent"], history["rounded"], strict=True))
    assert sum(result.sources.values()) == SHAPE[0] // masks.row_block(SHAPE)
    assert set(result.sources) <= {"round", "vertex", "gradient", "swap", "polish"}


def test_figures_of_a_point_are_those_of_its_linear_model() -> None:
    problem, masks = plain_layer(1).problem(torch.float32), SETS["blocks"](SHAPE, 0.5)
    row_blocks = RowBlocks(masks.row_block(SHAPE))
    recorder = Recorder(problem, masks, row_blocks, 1)
    points = [masks.center(SHAPE, torch.float32, torch.device("cpu")), masks.lmo(normal(*SHAPE)).float()]
    best = math.inf
    for number, x in enumerate(points):
        assert recorder.due()
        recorder.relaxed(problem, x, 0.5 * number)
        exact = problem.double()
        point = exact.evaluate(x.double())
        gap = (point.gradient * (x.double() - masks.lmo(point.gradient))).sum()
        row = {name: column[-1] for name, column in recorder.history.items()}
        assert row["iteration"] == number
        assert row["seconds"] == 0.5 * number
        assert row["value"] == pytest.approx(float(exact.value(point).sum()), rel=1e-12)
        assert row["gap"] == pytest.approx(float(gap), rel=1e-9)
        assert row["rounded"] == pytest.approx(float(problem.objective(masks.round(x)).sum()), rel=1e-12)
        best = min(best, row["rounded"])
        assert row["incumbent"] <= best
    assert recorder.bound is not None
    single = [dual_bound(problem.double(), masks, row_blocks, x.double()).bound for x in points]
    assert torch.equal(recorder.bound, torch.maximum(*single))


def test_the_incumbent_is_the_best_of_every_row_block() -> None:
    """Offered masks are mixed row block by row block, and each row block remembers its source."""
    case, masks = layer_case(plain_layer(2, (6, 4))), SETS["row blocks"]((6, 4), 0.5)
    row_blocks = RowBlocks(masks.row_block((6, 4)))
    recorder = Recorder(case.problem, masks, row_blocks, 1)
    offered = [masks.lmo_mask(random(6, 4, seed=seed)) for seed in range(8)]
    totals = torch.stack([case.problem.objective(mask).view(3, 2).sum(1) for mask in offered])
    for number, mask in enumerate(offered):
        assert recorder.offer(mask, "odd" if number % 2 else "even") == pytest.approx(float(totals[number].sum()))
        assert torch.equal(recorder.error, totals[: number + 1].amin(0))
        assert masks.contains(recorder.mask)
        assert torch.equal(case.problem.objective(recorder.mask).view(3, 2).sum(1), recorder.error)
    best = totals.argmin(0).tolist()
    assert recorder.sources == Counter("odd" if number % 2 else "even" for number in best)


def test_of_equal_masks_the_first_is_kept() -> None:
    problem, masks = Function(lambda x: 0 * x.sum(1), (2, 4)), SETS["per-row"]((2, 4), 0.5)
    recorder = Recorder(problem, masks, RowBlocks(1), 1)
    first, second = masks.lmo_mask(normal(2, 4)), masks.lmo_mask(-normal(2, 4))
    recorder.offer(first, "first")
    recorder.offer(second, "second")
    assert torch.equal(recorder.mask, first)
    assert recorder.sources == {"first": 2}


def test_iterations_are_recorded_as_planned() -> None:
    problem, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)

    def due(record: object) -> list[int]:
        recorder = Recorder(problem, masks, RowBlocks(1), record)
        return [t for t in range(20) if recorder.due()]

    assert due("doubling") == [0, 1, 2, 4, 8, 16]
    assert due(0) == []
    assert due(1) == list(range(20))
    assert due(6) == [0, 6, 12, 18]


def test_without_a_record_there_is_no_history() -> None:
    problem, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)
    result = solve(problem, masks, FrankWolfe(iterations=10, polish=False), record=0)
    assert (result.history, result.sources, result.lower_bound) == ({}, {}, None)
    assert result.gap_kind is GapKind.NONE
    default = solve(problem, masks, FrankWolfe(iterations=10))
    assert default.history["iteration"][:5] == [0, 1, 2, 4, 8]
    assert solve(problem, masks, SparseFW(iterations=10)).history == {}


@pytest.mark.parametrize("memory", [2**30, 1])
@pytest.mark.parametrize("set_name", ["per-row", "unstructured"])
@pytest.mark.parametrize(
    "solver", [SparseFW(iterations=12), OneSwap(), ContinuationFrankWolfe(iterations=20)], ids=repr
)
def test_any_iterative_solver_can_be_recorded(solver: object, set_name: str, memory: int) -> None:
    """The result is the best mask seen, no worse than without recording; bounds also hold for shifted objectives."""
    case, masks = layer_case(plain_layer(3, (2, 6))), SETS[set_name]((2, 6), 0.5)
    plain = solve(case.problem, masks, solver, memory=memory)
    result = solve(case.problem, masks, solver, record=1, memory=memory)
    best, size = case.minimum(masks)
    assert result.total <= plain.total
    assert result.status is plain.status
    history = result.history
    assert history["iteration"] == sorted(history["iteration"])
    assert falls(history["incumbent"])
    assert history["incumbent"][-1] == pytest.approx(result.total, rel=1e-12)
    if not isinstance(solver, OneSwap):
        assert result.gap_kind is GapKind.PROVEN
        assert bool((result.lower_bound <= best + 1e-14 * size).all())
    else:
        assert all(map(math.isnan, history["value"] + history["gap"] + history["bound"]))


def test_greedy_solvers_have_one_row() -> None:
    problem, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)
    result = solve(problem, masks, Wanda(), record=1)
    assert result.history["incumbent"] == [result.total]
    assert result.sources == {"solver": 4}


def test_recording_does_not_use_up_the_time_limit() -> None:
    """The time that recording takes does not count."""
    problem, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)
    result = solve(problem, masks, FrankWolfe(iterations=50, relative_gap=0.0), record=1, time_limit=60)
    assert result.status is not Status.TIME_LIMIT
    assert result.history["seconds"][-1] <= result.seconds


def test_merged_histories_add_up() -> None:
    def history(iterations: list[int], incumbents: list[float]) -> dict[str, list[float]]:
        columns: dict[str, list[float]] = {name: [1.0] * len(iterations) for name in COLUMNS}
        return columns | {"iteration": list(map(float, iterations)), "incumbent": incumbents}

    one, two = history([0, 1, 2, 2], [9.0, 7.0, 6.0, 5.0]), history([0, 1, 2, 4, 5], [4.0, 4.0, 3.0, 2.0, 1.0])
    both = merged([one, two])
    assert both["iteration"] == [0, 1, 2, 4, 5]
    assert both["incumbent"] == [13.0, 11.0, 8.0, 7.0, 6.0]
    assert both["value"] == [2.0] * 5
    assert merged([one]) is one


@pytest.mark.parametrize("declared", [True, False])
def test_functions_have_bounds_only_where_declared_convex(declared: bool) -> None:
    for coupled in (False, True):
        case = function_case("softplus", SHAPE, coupled=coupled, declared=declared)
        for set_name in ("per-row", "unstructured"):
            result = solve(case.problem, SETS[set_name](SHAPE, 0.5), FrankWolfe(iterations=10))
            assert result.gap_kind is (GapKind.PROVEN if declared else GapKind.STATIONARY)
            assert (result.lower_bound is not None) == declared
            assert any(map(math.isnan, result.history["bound"])) != declared
            assert not any(map(math.isnan, result.history["gap"][:-1]))


def test_recording_does_not_change_the_run() -> None:
    """The last point is the same with and without recording."""
    problem, masks, ends = plain_layer(0).problem(), SETS["n:m"](SHAPE, 0.5), []
    for record in (0, 1):
        last: list[Tensor] = []
        solve(
            problem,
            masks,
            FrankWolfe(direction="pairwise", iterations=30),
            record=record,
            callback=lambda state, last=last: last.append(state.point.x.clone()) if state.point else None,
        )
        ends.append(last[-1])
    assert torch.equal(*ends)
