"""`solve`: starts, callbacks, limits, chunks of rows, reports and error messages."""

import json
import math
import time

import pytest
import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, PartitionMatroid, PerRow, Unstructured
from maskopt.problems import LayerReconstruction, Point, Saliency, synthetic
from maskopt.solvers import (
    DIRECTIONS,
    RIA,
    ContinuationFrankWolfe,
    FrankWolfe,
    GapKind,
    Magnitude,
    OneSwap,
    Result,
    SparseFW,
    State,
    Status,
    Stop,
    Wanda,
    make_solver,
    solve,
    solve_parts,
    solve_sets,
)
from maskopt.solvers import (
    SOLVERS as NAMES,
)
from tests.helpers import EXACT, FRANK_WOLFE, ITERATIVE, SETS, SOLVER_ENTRIES, SOLVERS, combinations, feasible, thinned

SHAPE = (6, 24)
STARTED = [name for name in ITERATIVE if SOLVERS[name].start is not None and SOLVER_ENTRIES[name].keeps_start]


def layer(rows: int = SHAPE[0], d: int = SHAPE[1], seed: int = 0, family: str = "correlated") -> LayerReconstruction:
    return synthetic(family, rows, d, seed=seed).problem()


def any_member(masks: PartitionMatroid, shape: tuple[int, int] = SHAPE) -> Tensor:
    return masks.lmo_mask(torch.rand(shape, generator=torch.Generator().manual_seed(3)))


def test_every_named_solver_is_tested() -> None:
    tested = {type(solver) for registry in (SOLVERS, FRANK_WOLFE, EXACT) for solver in registry.values()}
    assert {type(make()) for make in NAMES.values()} <= tested
    directions = {make().direction for make in NAMES.values() if isinstance(make(), FrankWolfe)}
    assert directions == set(FRANK_WOLFE) == set(DIRECTIONS)


def test_the_default_is_continuation() -> None:
    problem, masks = layer(), PerRow(0.5)
    default, named = solve(problem, masks), solve(problem, masks, ContinuationFrankWolfe())
    assert torch.equal(default.mask, named.mask)
    assert default.solver == repr(ContinuationFrankWolfe())


KINDS = ["strided", "tracked", "half", "integers in float"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_solve_does_not_modify_its_inputs(name: str, kind: str) -> None:
    instance = synthetic(rows=SHAPE[0], d=SHAPE[1])
    weight, gram = instance.weight, instance.gram
    if kind == "strided":  # as GPT-2 stores its layers
        weight, gram = weight.T.contiguous().T, gram.repeat(2, 2)[::2, ::2].contiguous().repeat(2, 1)[: SHAPE[1]].T.T
    elif kind == "tracked":
        weight = torch.nn.Parameter(weight)
    elif kind == "half":
        weight = weight.bfloat16()
    else:
        weight = weight.mul(8).round()
    before = weight.detach().clone(), gram.clone()
    for _, set_name in (pair for pair in thinned(2, KINDS, SETS) if pair[0] == kind):
        masks = SETS[set_name](SHAPE, 0.5)
        keep = masks.keep.clone() if isinstance(masks.keep, Tensor) else masks.keep
        start = any_member(masks)
        start_before = start.clone()
        # The same kind of Gram, but for the strides and a digit that integers do not have.
        result = solve(
            LayerReconstruction(weight, gram if kind != "strided" else instance.gram.T), masks, SOLVERS[name]
        )
        solve(LayerReconstruction(weight, instance.gram), masks, SOLVERS[name], start=start)
        assert feasible(masks, result.mask)
        assert torch.equal(weight, before[0])
        assert torch.equal(gram, before[1])
        assert torch.equal(start, start_before)
        assert torch.equal(torch.as_tensor(masks.keep), torch.as_tensor(keep))


@pytest.mark.parametrize("name", SOLVERS)
def test_strides_change_nothing(name: str) -> None:
    instance = synthetic(rows=SHAPE[0], d=SHAPE[1])
    for set_name in SETS:
        masks = SETS[set_name](SHAPE, 0.5)
        plain = solve(LayerReconstruction(instance.weight, instance.gram), masks, SOLVERS[name])
        wide = torch.zeros(SHAPE[1], 3 * SHAPE[0])
        wide[:, ::3] = instance.weight.T
        strided = solve(LayerReconstruction(wide[:, ::3].T, instance.gram.T), masks, SOLVERS[name])
        assert torch.equal(plain.mask, strided.mask)


# Starts


@pytest.mark.parametrize("set_name", SETS)
@pytest.mark.parametrize("name", ITERATIVE)
def test_every_iterative_solver_starts_from_a_mask(name: str, set_name: str) -> None:
    problem, masks = layer(), SETS[set_name](SHAPE, 0.5)
    start = any_member(masks)
    for given in (start, start.T.contiguous().T):
        result = solve(problem, masks, SOLVERS[name], start=given)
        assert feasible(masks, result.mask)
        if name == "one-swap":
            assert result.total <= float(problem.objective(start).sum())


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("start", [Magnitude(), RIA(), Wanda(), OneSwap()], ids=repr)
def test_a_solver_as_start_equals_its_mask_as_start(name: str, start: object) -> None:
    problem, masks = layer(), PerRow(0.5)
    by_solver = solve(problem, masks, SOLVERS[name], start=start)
    by_mask = solve(problem, masks, SOLVERS[name], start=solve(problem, masks, start).mask)
    assert torch.equal(by_solver.mask, by_mask.mask)


def test_one_swap_without_steps_returns_its_start() -> None:
    problem, masks = layer(), PerRow(0.5)
    bad = solve(problem, masks, OneSwap(max_steps=0), start=any_member(masks))
    assert torch.equal(bad.mask, any_member(masks))
    assert bad.status is Status.ITERATION_LIMIT
    assert torch.equal(solve(problem, masks, OneSwap(max_steps=0)).mask, solve(problem, masks, Wanda()).mask)
    from_ria = solve(problem, masks, OneSwap(max_steps=0, start=RIA())).mask
    assert torch.equal(from_ria, solve(problem, masks, RIA()).mask)


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (torch.ones(SHAPE, dtype=torch.bool), r"boolean mask of shape \(6, 24\) in PerRow.* that is not in the set"),
        (torch.zeros(SHAPE, dtype=torch.bool), "that is not in the set"),
        (PerRow(0.5).lmo_mask(torch.zeros(SHAPE)).float(), "got a torch.float32 tensor of shape .* not in the set"),
        (PerRow(0.5).lmo_mask(torch.zeros(SHAPE)).int(), "got a torch.int32 tensor"),
        (torch.ones(24, 6, dtype=torch.bool), r"got a torch.bool tensor of shape \(24, 6\)\."),
        (torch.ones(24, dtype=torch.bool), r"of shape \(24,\)\."),
    ],
)
def test_infeasible_starts_are_refused(name: str, start: Tensor, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        solve(layer(), PerRow(0.5), SOLVERS[name], start=start)


# Callbacks and limits


@pytest.mark.parametrize("set_name", ["per-row", "unstructured", "n:m", "blocks"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_callbacks_see_the_state(name: str, set_name: str) -> None:
    problem, masks, seen = layer(), SETS[set_name](SHAPE, 0.5), []

    def look(state: State) -> None:
        seen.append((state.iteration, state.iterations, state.seconds))
        assert state.solver == type(SOLVERS[name]).__name__
        assert state.iteration >= 0
        assert state.iterations > 0
        assert 0.0 <= state.fraction <= 1.0
        assert state.seconds >= 0.0
        assert state.masks.kept_per_group(state.problem.shape).numel() > 0
        if state.point is not None:
            assert isinstance(state.point, Point)
            x = state.point.x
            assert x.shape == state.problem.shape
            assert float(x.min()) >= -1e-5
            assert float(x.max()) <= 1 + 1e-5
            assert bool(torch.isfinite(state.problem.value(state.point)).all())
        with pytest.raises(AttributeError):  # read only
            state.iteration = 3

    plain, observed = solve(problem, masks, SOLVERS[name]), solve(problem, masks, SOLVERS[name], callback=look)
    assert len(seen) >= max(3, observed.iterations)
    assert [s[2] for s in seen] == sorted(s[2] for s in seen)
    assert torch.equal(plain.mask, observed.mask)
    assert observed.status is plain.status


@pytest.mark.parametrize("memory", [2**30, 1])
@pytest.mark.parametrize("set_name", ["per-row", "unstructured"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_progress_never_decreases(name: str, set_name: str, memory: int) -> None:
    fractions: list[float] = []
    masks = SETS[set_name](SHAPE, 0.5)
    solve(layer(), masks, SOLVERS[name], callback=lambda state: fractions.append(state.fraction), memory=memory)
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0


@pytest.mark.parametrize("after", [0, 1, 5, 45])
@pytest.mark.parametrize("set_name", ["per-row", "unstructured", "n:m", "blocks"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_a_callback_stops_every_iterative_solver(name: str, set_name: str, after: int) -> None:
    problem, masks, calls = layer(), SETS[set_name](SHAPE, 0.5), []

    def stop(_: State) -> Stop | None:
        calls.append(None)
        return Stop.STOP if len(calls) > after else None

    result = solve(problem, masks, SOLVERS[name], callback=stop)
    assert feasible(masks, result.mask)
    assert torch.equal(result.objective, problem.objective(result.mask))
    if len(calls) > after:
        assert result.status is Status.STOPPED
        assert len(calls) == after + 1  # it is not called again
    if result.lower_bound is not None:
        assert float(result.lower_bound.sum()) <= result.total


@pytest.mark.parametrize("limit", [1e-300, 1e-9])
@pytest.mark.parametrize("memory", [2**30, 1])
@pytest.mark.parametrize("set_name", SETS)
@pytest.mark.parametrize("name", ITERATIVE)
def test_a_time_limit_of_zero_gives_a_member(name: str, set_name: str, memory: int, limit: float) -> None:
    masks = SETS[set_name](SHAPE, 0.5)
    result = solve(layer(), masks, SOLVERS[name], time_limit=limit, memory=memory)
    assert result.status is Status.TIME_LIMIT
    assert feasible(masks, result.mask)


@pytest.mark.parametrize("set_name", SETS)
@pytest.mark.parametrize("name", STARTED)
def test_stopped_at_once_is_no_worse_than_the_start(name: str, set_name: str) -> None:
    masks, problem = SETS[set_name](SHAPE, 0.5), layer(seed=1)
    start = solve(problem, masks, SOLVERS[name].start)
    assert solve(problem, masks, SOLVERS[name], time_limit=1e-9).total <= start.total


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("set_name", ["per-row", "unstructured"])
def test_iterations_are_those_that_were_run(name: str, set_name: str) -> None:
    calls = []

    def stop(state: State) -> Stop | None:
        calls.append(state)
        return Stop.STOP if len(calls) > 5 else None

    result = solve(layer(), SETS[set_name](SHAPE, 0.5), SOLVERS[name], callback=stop)
    assert result.iterations <= 6


def test_time_limits_are_kept() -> None:
    began = time.perf_counter()
    result = solve(layer(48, 96), PerRow(0.5), SparseFW(iterations=10**6), time_limit=0.3)
    assert result.status is Status.TIME_LIMIT
    assert time.perf_counter() - began < 5.0


def test_an_exception_in_a_callback_comes_out() -> None:
    def broken(_: State) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(layer(), PerRow(0.5), SOLVERS["sparsefw"], callback=broken)


# Chunks of rows


@combinations(2, name=SOLVERS, set_name=["per-row", "n:m", "row counts", "protected rows"])
def test_solving_in_chunks_gives_the_same(name: str, set_name: str) -> None:
    shape = (11, 24)
    problem, masks = layer(*shape), SETS[set_name](shape, 0.5)
    start, whole = any_member(masks, shape), solve(problem, masks, SOLVERS[name])
    started = solve(problem, masks, SOLVERS[name], start=start)
    for memory in (1, 24 * 4 * 4 * 20, 24 * 4 * 60):
        parts = solve(problem, masks, SOLVERS[name], memory=memory)
        assert torch.equal(whole.mask, parts.mask)
        torch.testing.assert_close(whole.objective, parts.objective, rtol=1e-12, atol=0.0)
        assert whole.status is parts.status
        if whole.lower_bound is not None:
            scale = float(whole.scale.max())
            torch.testing.assert_close(whole.lower_bound, parts.lower_bound, rtol=1e-6, atol=1e-6 * scale)
        assert torch.equal(solve(problem, masks, SOLVERS[name], start=start, memory=memory).mask, started.mask)


def test_solving_in_chunks_gives_the_same_for_scores_that_couple_rows() -> None:
    problem, masks, solver = layer(40, 24), PerRow(0.5), SparseFW(iterations=40, alpha=0.8, start=RIA())
    whole, parts = solve(problem, masks, solver), solve(problem, masks, solver, memory=1)
    assert torch.equal(whole.mask, parts.mask)


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].solves_rows_apart(PerRow(0.5))])
def test_parts_are_what_they_are_alone(name: str) -> None:
    problem, solver = layer(40, 24), SOLVERS[name]
    spans = [slice(7, 23), slice(30, 40), slice(0, 7)]
    for memory in (24 * 4 * 60, 2**30):
        parts = solve_parts(problem, PerRow(0.5), solver, spans, memory=memory)
        for span, part in zip(spans, parts, strict=True):
            alone = solve(problem.rows(span), PerRow(0.5), solver, memory=memory)
            assert torch.equal(part.mask, alone.mask)
            assert torch.equal(part.objective, alone.objective)
            assert part.weight is None or torch.equal(part.weight, alone.weight)
            assert (part.status, part.iterations) == (alone.status, alone.iterations)
        joined = Result.joined(parts)
        assert torch.equal(joined.mask[16:26], parts[1].mask)
        assert joined.counters == parts[0].counters


@pytest.mark.parametrize("name", SOLVERS)
def test_several_sets_are_solved_as_each_alone(name: str) -> None:
    problem, solver = layer(24, 24), SOLVERS[name]
    sets = [PerRow(0.25), NM(keep=2, group=4), PerRow(0.5)]
    for memory in (24 * 24 * 4 * 2 * 2, 2**30):  # two of them at a time, and all
        results = solve_sets(problem, sets, solver, memory=memory)
        for masks, result in zip(sets, results, strict=True):
            alone = solve(problem, masks, solver, memory=memory)
            assert torch.equal(result.mask, alone.mask)
            assert result.weight is None or torch.equal(result.weight, alone.weight)
            assert (result.status, result.iterations) == (alone.status, alone.iterations)
            torch.testing.assert_close(result.objective, alone.objective, rtol=0, atol=0)


def test_each_of_several_sets_has_to_fit() -> None:
    assert solve_sets(layer(4, 6), []) == []
    with pytest.raises(MaskoptError, match="divisible by 4"):
        solve_sets(layer(4, 6), [PerRow(0.5), NM(keep=2, group=4)])


def test_many_rows_take_little_memory_each() -> None:
    problem, seen = layer(64, 16), set()
    solve(
        problem,
        PerRow(0.5),
        SparseFW(iterations=1),
        callback=lambda s: seen.add(s.problem.shape),
        memory=9 * 16 * 4 * 10,
    )
    assert max(rows for rows, _ in seen) <= 10


def test_solvers_know_which_sets_they_solve_row_by_row() -> None:
    rows, whole = PerRow(0.5), Unstructured(0.5)
    assert Wanda().solves_rows_apart(rows)
    assert ContinuationFrankWolfe().solves_rows_apart(NM(keep=2, group=4))
    assert not ContinuationFrankWolfe().solves_rows_apart(whole)
    assert not RIA().solves_rows_apart(rows)
    assert not SparseFW(start=RIA()).solves_rows_apart(rows)
    assert not OneSwap(start=RIA()).solves_rows_apart(rows)


@pytest.mark.parametrize("name", SOLVERS)
def test_part_gives_the_result_of_some_rows(name: str) -> None:
    problem, masks, index = layer(), PerRow(0.5), slice(2, 5)
    result = solve(problem, masks, SOLVERS[name])
    part = result.part(index)
    assert torch.equal(part.mask, result.mask[index])
    assert torch.equal(part.objective, problem.rows(index).objective(part.mask))
    assert torch.equal(part.scale, problem.rows(index).scale())
    assert part.seconds == pytest.approx(result.seconds / 2)
    assert part.status is result.status
    assert (part.lower_bound is None) == (result.lower_bound is None)
    assert part.gap is None or part.gap >= 0


# Reports


@pytest.mark.parametrize("name", SOLVERS)
def test_reports_are_json_with_the_figures_of_the_result(name: str) -> None:
    result = solve(layer(), PerRow(0.5), SOLVERS[name])
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["objective"] == result.total == pytest.approx(float(result.objective.sum()))
    assert report["relative_error"] == result.relative_error == pytest.approx(result.total / float(result.scale.sum()))
    assert report["sparsity"] == result.sparsity == 0.5
    assert report["status"] == result.status.name
    assert report["status_text"] == result.status.value
    assert report["gap_kind"] == result.gap_kind.name
    assert report["solver"] == repr(SOLVERS[name])
    assert report["seconds"] > 0.0
    assert report["iterations"] >= 1
    assert (report["lower_bound"] is None) == (not SOLVER_ENTRIES[name].bounded)
    assert 0.0 <= report["relative_error"] <= 1.0


@pytest.mark.parametrize("family", [Status, GapKind])
def test_members_of_enums_are_sentences(family: type) -> None:
    for member in family:
        assert member.value[0].isupper()
        assert member.value.endswith(".")
        assert len(member.value.split()) >= 4
    assert len({member.value for member in family}) == len(family)


def test_zero_weights_have_zero_error() -> None:
    problem = LayerReconstruction(torch.zeros(2, 8), torch.eye(8))
    for name, solver in SOLVERS.items():
        result = solve(problem, PerRow(0.5), solver)
        assert (result.total, result.relative_error) == (0.0, 0.0), name
        assert math.isfinite(result.relative_error)


@pytest.mark.parametrize("keep", [0, 1.0])
@pytest.mark.parametrize("d", [1, 4, 16, 17, 20, 64])
@pytest.mark.parametrize("name", SOLVERS)
def test_keeping_nothing_or_all_gives_the_only_mask(name: str, d: int, keep: float) -> None:
    for rows in (1, 5):
        for masks in (PerRow(keep), Unstructured(keep)):
            result = solve(layer(rows, d), masks, SOLVERS[name])
            assert result.sparsity == 1.0 - keep
            assert result.relative_error == pytest.approx(1.0 - keep)


@pytest.mark.parametrize("name", ["one-swap", "continuation"])
def test_wanda_is_optimal_on_inputs_without_correlation(name: str) -> None:
    """Every solver returns the mask of Wanda, which is optimal."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    problem = LayerReconstruction(weight, torch.eye(32))
    result = solve(problem, PerRow(0.5), SOLVERS[name])
    assert torch.equal(result.mask, PerRow(0.5).lmo_mask(-weight.abs()))


@pytest.mark.parametrize("name", ["one-swap", "continuation"])
def test_a_diagonal_negative_by_rounding_is_accepted(name: str) -> None:
    instance = synthetic(rows=4, d=32)
    gram = instance.gram.clone()
    gram[3], gram[:, 3] = 0.0, 0.0
    gram[3, 3] = -1e-7 * gram.max()
    problem, masks = LayerReconstruction(instance.weight, gram), PerRow(0.5)
    result = solve(problem, masks, SOLVERS[name])
    assert feasible(masks, result.mask)
    assert result.total <= solve(problem, masks, Wanda()).total


# Error messages


@pytest.mark.parametrize("name", SOLVERS)
def test_what_a_problem_lacks_is_named(name: str) -> None:
    problem, refusing = Saliency(torch.ones(2, 4)), SOLVERS[name]
    while refusing is not None and not refusing.requirements.problem:
        refusing = refusing.start  # it takes any objective, but not all solvers that make its first mask do
    if refusing is None:
        assert feasible(PerRow(0.5), solve(problem, PerRow(0.5), SOLVERS[name]).mask)
        return
    needed = refusing.requirements.problem[0].__name__
    with pytest.raises(MaskoptError) as error:
        solve(problem, PerRow(0.5), SOLVERS[name])
    sentence = f"Saliency is not compatible with {refusing.name}: it must be a {needed}; it is a Saliency."
    assert str(error.value) == sentence


@pytest.mark.parametrize("name", SOLVERS)
def test_sets_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(MaskoptError, match="divisible by 5; this weight has 24"):
        solve(layer(), NM(keep=2, group=5), SOLVERS[name])
    with pytest.raises(MaskoptError, match="wants 25 entries of a group that has 24"):
        solve(layer(), PerRow(25), SOLVERS[name])


def test_make_solver_makes_every_named_solver() -> None:
    assert make_solver("sparsefw", iterations=7, alpha=0.5) == SparseFW(iterations=7, alpha=0.5)
    assert make_solver("continuation") == ContinuationFrankWolfe()
    for name in NAMES:
        assert isinstance(solve(layer(2, 4), PerRow(0.5), make_solver(name)), Result)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: make_solver("gurobi"), "There is no solver 'gurobi'; choose one of magnitude, wanda"),
        (lambda: make_solver("Wanda"), "There is no solver 'Wanda'"),
        (lambda: make_solver("wanda", iterations=3), "The solver wanda has no setting .iterations.; it has none"),
        (lambda: make_solver("sparsefw", alpha=1.5), r"SparseFW needs alpha in \[0, 1\].* got 1.5"),
        (lambda: make_solver("sparsefw", alpha=math.nan), r"SparseFW needs alpha in \[0, 1\]"),
        (lambda: make_solver("sparsefw", iterations=0), "iterations >= 1"),
        (lambda: make_solver("one-swap", max_steps=-1), "OneSwap needs max_steps >= 0, .*; got -1"),
        (lambda: make_solver("continuation", iterations=0), "needs iterations >= 1"),
        (lambda: make_solver("continuation", second=2.0), r"needs second in \[0, 1\]"),
        (lambda: make_solver("continuation", relinks=-1), "relinks >= 0"),
        (lambda: make_solver("continuation", relink=-0.1), r"relink in \[0, 1\]"),
    ],
)
def test_bad_settings_are_refused(call: object, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        call()


@pytest.mark.parametrize("settings", [{"relinks": 0}, {"relink": 0.0}, {"second": 0.0}, {"iterations": 1}], ids=str)
def test_continuation_runs_with_extreme_settings(settings: dict[str, float]) -> None:
    for masks in (PerRow(0.5), Unstructured(0.5)):
        solver = ContinuationFrankWolfe(**{"iterations": 20, **settings})
        assert feasible(masks, solve(layer(), masks, solver).mask)
