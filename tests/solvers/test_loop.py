"""The loop: the points it approaches, its stopping rules, and the independence of its rows."""

import functools

import pytest
import torch
from torch import Tensor
from torch.linalg import vecdot

from maskopt.problems import Direction, LayerReconstruction, Problem
from maskopt.solvers import (
    DIRECTIONS,
    AdaptiveStep,
    Conjugate,
    ExactStep,
    FrankWolfe,
    GapKind,
    LogStep,
    Monitor,
    OpenLoopStep,
    RowBlocks,
    State,
    Status,
    StepRule,
    Stop,
    Vanilla,
    frank_wolfe,
    solve,
)
from tests.helpers import FREE_SETS, SETS, Layer, combinations
from tests.loop_runs import (
    CPU,
    Diary,
    Hull,
    Steady,
    function_case,
    normal,
    plain_layer,
    relaxed_optimum,
    run_loop,
    starts,
)

SHAPE = (4, 8)
OPEN_LOOP = ("momentum", "stochastic")


def step_for(name: str, problem: Problem | None = None) -> StepRule:
    if name in OPEN_LOOP:
        return OpenLoopStep()
    return ExactStep() if problem is None or hasattr(problem, "hessian") else AdaptiveStep()


def true_gap(problem: Problem, masks: object, x: Tensor) -> Tensor:
    """Return the gap of every row block, recomputed in float64."""
    exact = problem.double()
    gradient = exact.gradient(exact.evaluate(x.double()))
    gap = vecdot(gradient, x.double() - masks.lmo(gradient))
    return gap.view(-1, masks.row_block(x.shape)).sum(1)


def easy_and_hard(rows: int = 8, d: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> LayerReconstruction:
    """Rows of which some are solved at once (one weight only, or none) and some take long."""
    layer = plain_layer(seed, (rows, d))
    layer.weight[1] = 0.0
    layer.weight[2, 1:] = 0.0
    layer.weight[5] *= torch.where(torch.arange(d) < d // 2, 1.0, 1e-3)
    layer.weight[7] *= 1e-3
    return layer.problem(dtype)


@functools.cache
def best_of_layer(seed: int, set_name: str) -> float:
    return relaxed_optimum(plain_layer(seed).problem(), SETS[set_name](SHAPE, 0.5))


@functools.cache
def best_of_function(kind: str, set_name: str, coupled: bool) -> float:
    return relaxed_optimum(function_case(kind, SHAPE, coupled=coupled).problem, SETS[set_name](SHAPE, 0.5))


# Points


@combinations(2, name=DIRECTIONS, set_name=["per-row", "unstructured", "n:m", "blocks"])
def test_every_direction_approaches_the_relaxed_optimum(name: str, set_name: str) -> None:
    accuracy = {"momentum": 1e-2, "stochastic": 6e-2, "vanilla": 3e-3, "lazy": 3e-3, "boosted": 2e-3}
    problem, masks = plain_layer(1).problem(), SETS[set_name](SHAPE, 0.5)
    best, scale = best_of_layer(1, set_name), float(problem.scale().sum())
    hull = Hull(masks, SHAPE)
    point = run_loop(problem, masks, DIRECTIONS[name](), step_for(name), 400).point
    value = float(problem.value(problem.evaluate(point.x)).sum())
    assert hull.holds(point.x)
    assert value >= best - 1e-6 * scale
    assert value <= best + accuracy.get(name, 1e-3) * scale
    if name != "stochastic":
        fresh = problem.evaluate(point.x)
        size = 1e-8 * float(fresh.gradient.abs().max())
        torch.testing.assert_close(point.gradient, fresh.gradient, rtol=1e-6, atol=size)


@pytest.mark.parametrize("step", [OpenLoopStep(), LogStep()], ids=repr)
def test_open_loops_approach_the_relaxed_optimum(step: StepRule) -> None:
    for set_name in ("per-row", "unstructured", "n:m"):
        problem, masks = plain_layer(0).problem(), SETS[set_name](SHAPE, 0.5)
        best, scale = relaxed_optimum(problem, masks), float(problem.scale().sum())
        x = run_loop(problem, masks, Vanilla(), step, 1500).point.x
        assert abs(float(problem.value(problem.evaluate(x)).sum()) - best) <= 2e-3 * scale


@pytest.mark.parametrize("coupled", [False, True], ids=["rows apart", "rows together"])
@pytest.mark.parametrize("name", [name for name in DIRECTIONS if not DIRECTIONS[name]().requires.problem])
def test_functions_approach_the_relaxed_optimum(name: str, coupled: bool) -> None:
    for kind, set_name, accuracy in (("softplus", "n:m", 5e-3), ("root", "per-row", 3e-2)):
        problem, masks = function_case(kind, SHAPE, coupled=coupled).problem, SETS[set_name](SHAPE, 0.5)
        best = best_of_function(kind, set_name, coupled)
        x = run_loop(problem, masks, DIRECTIONS[name](), step_for(name, problem), 120).point.x
        value = float(problem.value(problem.evaluate(x)).sum())
        if name in ("away", "pairwise", "blended-pairwise", "dicg", "blended-dicg") and kind == "softplus":
            accuracy = 1e-4
        elif name in (*OPEN_LOOP, "block-coordinate"):
            accuracy *= 2
        assert value >= best - 1e-6 * abs(best)
        assert value <= best + accuracy * abs(best)


@pytest.mark.parametrize("set_name", FREE_SETS)
@pytest.mark.parametrize("name", ["vanilla", "conjugate", "away", "dicg", "fully-corrective", "boosted"])
def test_exact_steps_never_increase_the_objective(name: str, set_name: str) -> None:
    problem, masks = plain_layer(5).problem(), SETS[set_name](SHAPE, 0.4)
    diary = Diary(DIRECTIONS[name]())
    run_loop(problem, masks, diary, ExactStep(), 60)
    row_blocks = RowBlocks(masks.row_block(SHAPE))
    values = torch.stack([row_blocks(problem.value(problem.evaluate(event.x))) for event in diary.events])
    assert len(values) == 60
    assert bool((values.diff(dim=0) <= 1e-12 * values[:-1] + 1e-14 * float(problem.scale().sum())).all())


def test_open_loop_forgets_its_start() -> None:
    """The first step has length one, so only the first gradient depends on the start."""
    problem, masks = plain_layer(2).problem(), SETS["per-row"](SHAPE, 0.5)
    center = masks.center(SHAPE, torch.float64, CPU)
    after = run_loop(problem, masks, Vanilla(), OpenLoopStep(), 1, start=center).point.x
    assert torch.equal(after.bool(), masks.lmo_mask(problem.gradient(problem.evaluate(center))))
    assert float((after - after.round()).abs().max()) <= 1e-15


def test_steps_are_exact_for_a_schedule_of_shifts() -> None:
    """Each step is exact for the objective of its iteration."""
    base, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)
    shifts = [base.shifted(base.diagonal(), t / 20) for t in range(20)]
    diary = Diary(Conjugate())
    end = frank_wolfe(
        shifts.__getitem__,
        masks,
        masks.center(SHAPE, torch.float64, CPU),
        direction=diary,
        step=ExactStep(),
        iterations=20,
        monitor=Monitor("test", None, None),
    )
    assert end.iterations == 20
    assert not end.converged
    for problem, event in zip(shifts, diary.events, strict=True):
        torch.testing.assert_close(event.gradient, problem.gradient(problem.evaluate(event.x)), rtol=1e-9, atol=1e-9)
        values = [
            problem.value(problem.evaluate(event.x + s.unsqueeze(1) * event.search))
            for s in (event.step_size, event.step_size * 0.99, (event.step_size * 1.01).clamp(max=1.0))
        ]
        assert bool((values[0] <= torch.minimum(values[1], values[2]) + 1e-12).all())


def test_refreshing_makes_gradients_more_accurate() -> None:
    problem, masks = plain_layer(0).problem(torch.float32), SETS["per-row"](SHAPE, 0.5)
    ends = [run_loop(problem, masks, Vanilla(), OpenLoopStep(), 301, refresh=refresh).point for refresh in (0, 100)]
    errors = [float((end.gradient - problem.evaluate(end.x).gradient).abs().max()) for end in ends]
    assert 0 < errors[1] < errors[0]


# Stopping


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("set_name", ["per-row", "unstructured", "blocks"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_converged_means_a_small_gap(name: str, set_name: str, dtype: torch.dtype) -> None:
    """The gap of every row block is recomputed in float64."""
    masks, stopped, seen = SETS[set_name](SHAPE, 0.5), 0, []
    for seed in range(2):
        problem = plain_layer(seed).problem(dtype)
        relative = 5e-2 if name in (*OPEN_LOOP, "vanilla", "block-coordinate") else 1e-2

        def keep(state: State) -> None:
            seen[:] = [state.point.x.clone()]

        solver = FrankWolfe(direction=name, relative_gap=relative, iterations=600, polish=False)
        result = solve(problem, masks, solver, callback=keep, record=0)
        if result.status is Status.CONVERGED:
            stopped += 1
            assert result.iterations < 600
            scale = problem.scale().view(-1, masks.row_block(SHAPE)).sum(1)
            gap = true_gap(problem, masks, seen[0]) * problem.unit
            assert bool((gap <= relative * scale * (1 + (1e-4 if dtype == torch.float32 else 1e-9))).all())
        else:
            assert result.status is Status.ITERATION_LIMIT
            assert result.iterations == 600
    assert stopped >= (0 if name == "stochastic" else 1)


def test_without_a_tolerance_all_iterations_run() -> None:
    problem = plain_layer(0).problem()
    for name in ("vanilla", "away", "dicg"):
        result = solve(
            problem, SETS["per-row"](SHAPE, 0.5), FrankWolfe(direction=name, relative_gap=0.0, iterations=30)
        )
        assert result.status is Status.ITERATION_LIMIT
        assert result.iterations == 30


def test_absolute_gaps_are_those_of_the_objective() -> None:
    """The gap is in the units of the data: scaled data end at the same iteration."""
    layer, iterations = plain_layer(0), []
    for power in (0, 30):
        problem = Layer(layer.weight * 2.0**power, layer.x, "").problem()
        result = solve(problem, SETS["per-row"](SHAPE, 0.5), FrankWolfe(relative_gap=0.0, gap=1.0 * 4.0**power))
        assert result.status is Status.CONVERGED
        iterations.append(result.iterations)
    assert iterations[0] == iterations[1] > 3


@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_callbacks_and_time_limits_end_the_loop(name: str, after: int) -> None:
    calls = []

    def stop(state: State) -> Stop | None:
        calls.append(state.iteration)
        return Stop.STOP if len(calls) > after else None

    problem, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)
    monitor = Monitor("test", stop, None)
    end = run_loop(problem, masks, DIRECTIONS[name](), step_for(name), 50, monitor=monitor)
    assert (end.iterations, end.converged, monitor.ended) == (after, False, Status.STOPPED)
    assert calls == list(range(after + 1))
    result = solve(problem, masks, FrankWolfe(direction=name), time_limit=1e-9)
    assert result.status is Status.TIME_LIMIT
    assert masks.contains(result.mask)


# Rows


class Spying(LayerReconstruction):
    """A layer that records the number of rows of each product."""

    seen: list[int]

    @classmethod
    def of(cls, problem: LayerReconstruction) -> "Spying":
        part = object.__new__(cls)
        part.__dict__.update(problem.__dict__)
        part.seen = []
        return part

    def hvp(self, x: Tensor) -> Direction:
        self.seen.append(len(x))
        return super().hvp(x)

    def rows(self, index: slice | Tensor) -> LayerReconstruction:
        part = Spying.of(super().rows(index))
        part.seen = self.seen
        return part


EXACT = [name for name in DIRECTIONS if name != "stochastic"]


@pytest.mark.parametrize("name", EXACT)
def test_finished_rows_leave_the_batch(name: str) -> None:
    problem, masks, points = Spying.of(easy_and_hard()), SETS["per-row"]((8, 12), 0.5), []
    hull = Hull(masks, (8, 12))
    tolerance = 1e-3 * problem.scale()
    monitor = Monitor("test", lambda state: points.append(state.point.x.clone()), None)
    run_loop(problem, masks, DIRECTIONS[name](), step_for(name), 400, tolerance=tolerance, monitor=monitor)
    sizes = [size for size in problem.seen if size <= 8]
    assert sizes[0] == 8
    assert min(sizes) <= 4
    assert sizes == sorted(sizes, reverse=True)
    assert all(x.shape == (8, 12) for x in points)  # callbacks see all rows
    for x in points:
        assert hull.holds(x)


def steady(seed: int = 0) -> Steady:
    """Rows of many sizes, computed bit for bit as they would be alone: equal slopes stay equal."""
    root, linear = normal(12, 12, seed=seed), normal(8, 12, seed=seed + 1)
    return Steady(
        root @ root.T / 12, linear * torch.tensor([[1.0], [0.0], [100.0], [1.0], [1.0], [10.0], [1.0], [0.1]])
    )


def alone(problem: Problem, masks: object, blocks: int, row_block: int) -> list[tuple[Problem, object, slice]]:
    parts = []
    for number in range(blocks):
        index = slice(number * row_block, number * row_block + row_block)
        parts.append((problem.rows(index), masks.rows(index, problem.shape), index))
    return parts


@combinations(2, name=DIRECTIONS, set_name=["per-row", "n:m", "blocks", "row blocks", "protected rows"])
def test_a_batch_gives_the_points_of_its_rows_alone(name: str, set_name: str) -> None:
    """Row blocks stop independently, do not change from then on, and leave the batch."""
    problem, masks = steady(), SETS[set_name]((8, 12), 0.5)
    row_block, iterations = masks.row_block((8, 12)), 120
    tolerance = torch.full((8,), 0.03 * row_block, dtype=torch.float64)
    together = run_loop(problem, masks, DIRECTIONS[name](), step_for(name), iterations, tolerance=tolerance)
    converged = []
    for part, part_masks, index in alone(problem, masks, 8 // row_block, row_block):
        one = run_loop(part, part_masks, DIRECTIONS[name](), step_for(name), iterations, tolerance=tolerance[index])
        torch.testing.assert_close(one.point.x, together.point.x[index], rtol=0, atol=1e-12)
        converged.append(one.converged)
    assert together.converged == all(converged)
    assert any(converged)


@combinations(2, name=["vanilla", "conjugate", "pairwise"], set_name=["per-row", "row blocks", "protected rows"])
def test_chosen_rows_go_on_and_others_stay(name: str, set_name: str) -> None:
    problem, masks = steady(), SETS[set_name]((8, 12), 0.5)
    row_block = masks.row_block((8, 12))
    chosen = torch.arange(8).view(-1, row_block)[::2].flatten()
    others = torch.arange(8).view(-1, row_block)[1::2].flatten()
    start = starts(problem, masks, DIRECTIONS[name]())
    every = run_loop(problem, masks, DIRECTIONS[name](), step_for(name), 30, start=start).point.x
    found = run_loop(problem, masks, DIRECTIONS[name](), step_for(name), 30, start=start, rows=chosen).point.x
    torch.testing.assert_close(found[chosen], every[chosen], rtol=0, atol=1e-12)
    assert torch.equal(found[others], start[others])
    assert not torch.equal(found, start)


@pytest.mark.parametrize("kind", ["softplus", "powers"])
def test_a_batch_of_functions_gives_the_points_of_its_rows_alone(kind: str) -> None:
    problem, masks = function_case(kind, (6, 8)).problem, SETS["n:m"]((6, 8), 0.5)
    tolerance = torch.full((6,), 1e-3, dtype=torch.float64) * 10.0 ** torch.arange(6).double().neg().add(3)
    for name in ("vanilla", "pairwise", "dicg", "lazy", "momentum", "block-coordinate"):
        step = step_for(name, problem)
        together = run_loop(problem, masks, DIRECTIONS[name](), step, 60, tolerance=tolerance)
        for part, part_masks, index in alone(problem, masks, 6, 1):
            one = run_loop(part, part_masks, DIRECTIONS[name](), step, 60, tolerance=tolerance[index])
            torch.testing.assert_close(one.point.x, together.point.x[index], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_finished_rows_do_not_change(name: str) -> None:
    """A row does not change after the first iteration at which its gap is within the tolerance."""
    problem, masks, points = easy_and_hard(), SETS["per-row"]((8, 12), 0.5), []
    tolerance = 2e-2 * problem.scale()
    monitor = Monitor("test", lambda state: points.append(state.point.x.clone()), None)
    run_loop(problem, masks, DIRECTIONS[name](), step_for(name), 120, tolerance=tolerance, monitor=monitor)
    stopped = 0
    for row in range(8):
        changes = [t for t in range(1, len(points)) if not torch.equal(points[t][row], points[t - 1][row])]
        last = max(changes, default=0)
        if last < len(points) - (12 if len(points) > 40 else 3):  # it stopped well before the others
            stopped += 1
            gap = true_gap(problem.rows(slice(row, row + 1)), masks, points[last][row : row + 1])
            assert float(gap) <= float(tolerance[row]) * (1 + 1e-9)
    assert stopped >= 2


@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_memory_limit_changes_no_result(name: str) -> None:
    """The memory limit decides how many rows are solved at a time."""
    problem, shape = steady(), (8, 12)
    for set_name in ("per-row", "n:m", "blocks"):
        masks = SETS[set_name](shape, 0.5)
        solver = FrankWolfe(direction=name, iterations=25, gap=0.03)
        whole, parts = solve(problem, masks, solver), solve(problem, masks, solver, memory=1)
        assert torch.equal(whole.mask, parts.mask)
        assert whole.status is parts.status
        assert whole.gap_kind is parts.gap_kind is GapKind.PROVEN
        torch.testing.assert_close(whole.lower_bound, parts.lower_bound, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("set_name", ["per-row", "unstructured", "blocks"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_loop_starts_at_the_given_mask(name: str, set_name: str) -> None:
    problem, masks, first = plain_layer(0).problem(), SETS[set_name](SHAPE, 0.5), []
    mask = masks.lmo_mask(normal(*SHAPE, seed=4))

    def look(state: State) -> None:
        if state.iteration == 0 and state.point is not None:
            first.append(state.point.x.clone())

    result = solve(problem, masks, FrankWolfe(direction=name, iterations=3, polish=False), start=mask, callback=look)
    assert torch.equal(first[0], mask.double())
    assert result.total <= float(problem.objective(mask).sum())  # the start is among the candidates
    first.clear()
    solve(problem, masks, FrankWolfe(direction=name, iterations=1), callback=look)
    assert torch.equal(first[0], starts(problem, masks, DIRECTIONS[name]()))
