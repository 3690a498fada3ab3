"""Direction rules: directions inside the hull, combinations of atoms, faces, angles, and certified gaps."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import vecdot

from maskopt.oracles import PartitionMatroid
from maskopt.problems import Direction, Problem, QuadraticForm
from maskopt.solvers import (
    DIRECTIONS,
    Away,
    BlendedPairwise,
    BlockCoordinate,
    Boosted,
    BruteForce,
    Conjugate,
    DirectionRule,
    ExactStep,
    FrankWolfe,
    FullyCorrective,
    InFace,
    IterationState,
    Lazy,
    Momentum,
    Monitor,
    OpenLoopStep,
    Pairwise,
    RowBlocks,
    SearchDirection,
    StepRule,
    Stochastic,
    Vanilla,
    solve,
)
from maskopt.solvers.atoms import Atoms
from tests.helpers import ALL_SETS, FREE_SETS, SETS, Layer, combinations, every_mask, examples, layers
from tests.loop_runs import (
    CPU,
    Bowl,
    Diary,
    Hull,
    function_case,
    normal,
    plain_layer,
    random,
    run_loop,
    starts,
    state_at,
)

SHAPE = (4, 8)
OPEN_LOOP = ["momentum", "stochastic"]
ACTIVE = ["away", "pairwise", "blended-pairwise", "fully-corrective"]


def step_for(name: str) -> StepRule:
    return OpenLoopStep() if name in OPEN_LOOP else ExactStep()


def fits(name: str, masks: object) -> bool:
    return all(isinstance(masks, kind) for kind in DIRECTIONS[name]().requires.masks)


def problems(seed: int, shape: tuple[int, int] = SHAPE) -> list[Problem]:
    base = plain_layer(seed, shape).problem()
    return [base, base.shifted(base.diagonal(), -0.5), base.shifted(base.diagonal(), 2.0)]


# Directions


@combinations(3, name=DIRECTIONS, set_name=ALL_SETS)
def test_points_stay_in_the_hull_up_to_the_maximal_step(name: str, set_name: str) -> None:
    masks = ALL_SETS[set_name](SHAPE, 0.5)
    if not fits(name, masks):
        pytest.skip("the set lacks methods of the rule")
    hull = Hull(masks, SHAPE)
    for problem in problems(3):
        diary = Diary(DIRECTIONS[name]())
        end = run_loop(problem, masks, diary, step_for(name), 15).point
        assert len(diary.events) == 15
        for event in diary.events:
            assert hull.holds(event.x)
            assert bool((event.max_step >= 0).all())
            far = event.max_step.clamp(max=1e3).unsqueeze(1) * event.search
            assert hull.holds(event.x + far, 1e-8)
        assert hull.holds(end.x)


@pytest.mark.parametrize("name", ["dicg", "blended-dicg"])
def test_the_maximal_step_ends_at_the_boundary(name: str) -> None:
    """A step slightly longer leaves the hull."""
    masks, tight = SETS["per-row"](SHAPE, 0.5), 0
    for seed in range(3):
        diary = Diary(DIRECTIONS[name]())
        run_loop(plain_layer(seed).problem(), masks, diary, ExactStep(), 25)
        for event in diary.events:
            for row in range(SHAPE[0]):
                search, max_step = event.search[row], float(event.max_step[row])
                if float(search.abs().max()) > 1e-6 and max_step > 1e-9:
                    outside = event.x[row] + search * (max_step * 1.001 + 1e-6)
                    assert float(outside.min()) < -1e-9 or float(outside.max()) > 1 + 1e-9
                    tight += 1
    assert tight > 50


@pytest.mark.parametrize("set_name", ["per-row", "unstructured", "n:m", "protected blocks"])
@pytest.mark.parametrize("name", [name for name in DIRECTIONS if name not in OPEN_LOOP])
def test_directions_descend_while_the_gap_is_positive(name: str, set_name: str) -> None:
    masks = SETS[set_name](SHAPE, 0.5)
    for problem in problems(1)[:2]:
        diary = Diary(DIRECTIONS[name]())
        run_loop(problem, masks, diary, ExactStep(), 30)
        row_blocks = RowBlocks(masks.row_block(SHAPE))
        for t, event in enumerate(diary.events):
            slope = row_blocks(vecdot(event.gradient, event.search))
            gap = row_blocks(vecdot(event.gradient, event.x - masks.lmo(event.gradient)))
            scale = 1e-9 * float(event.gradient.abs().sum())
            if name == "block-coordinate":
                continue
            assert bool((slope[gap > scale] < 0).all()), t


# Atoms


class AtomsChecked(Diary):
    """Also compares the point with its atoms after every iteration."""

    def __init__(self, rule: DirectionRule) -> None:
        super().__init__(rule)
        self.ends: list[tuple[Tensor, Tensor, Atoms]] = []

    def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
        super().update(state, direction, step_size, max_step)
        atoms = self.rule.atoms
        assert bool((atoms.weight >= 0).all())
        torch.testing.assert_close(atoms.weight.sum(1), torch.ones_like(atoms.weight[:, 0]), rtol=0, atol=1e-12)
        combined = atoms.combined(atoms.weight, torch.float64)
        torch.testing.assert_close(combined, state.row_blocks.flat(state.x), rtol=0, atol=1e-9)
        for slot in range(atoms.weight.shape[1] if state.iteration % 4 == 3 else 0):
            dense = atoms.dense(torch.full((atoms.blocks,), slot), torch.float64).reshape(state.x.shape)
            used = (atoms.weight[:, slot] > 0).repeat_interleave(state.row_blocks.row_block)
            full = torch.where(used.unsqueeze(1), dense, state.vertex)
            assert state.masks.contains(full.bool())
        self.ends.append((state.point.x.clone(), atoms.active.clone(), atoms.take(torch.arange(atoms.blocks))))


@combinations(3, name=ACTIVE, set_name=ALL_SETS)
def test_points_are_combinations_of_their_atoms(name: str, set_name: str) -> None:
    masks = ALL_SETS[set_name](SHAPE, 0.5)
    for problem in problems(2):
        checked_run = AtomsChecked(DIRECTIONS[name]())
        run_loop(problem, masks, checked_run, ExactStep(), 24)
        assert len(checked_run.ends) == 24


@given(layers(rows=(1, 4), d=(1, 8)), st.sampled_from(sorted(SETS)), st.floats(0, 1), st.sampled_from([0.0, -1.0, 2.0]))
@pytest.mark.parametrize("name", ACTIVE)
@examples(40)
def test_edge_case_combinations(name: str, layer: Layer, set_name: str, fraction: float, amount: float) -> None:
    base = layer.problem()
    problem, masks = base.shifted(base.diagonal(), amount), SETS[set_name](layer.shape, fraction)
    checked_run = AtomsChecked(DIRECTIONS[name]())
    run_loop(problem, masks, checked_run, ExactStep(), 12)


@pytest.mark.parametrize("name", ["away", "pairwise", "blended-pairwise"])
def test_points_of_functions_are_combinations_of_their_atoms(name: str) -> None:
    for coupled in (False, True):
        problem = function_case("logistic", SHAPE, coupled=coupled).problem
        checked_run = AtomsChecked(DIRECTIONS[name]())
        run_loop(problem, SETS["n:m"](SHAPE, 0.5), checked_run, OpenLoopStep(), 30)


@pytest.mark.parametrize("set_name", ["per-row", "unstructured", "blocks", "protected rows"])
def test_fully_corrective_points_are_the_best_of_their_atoms(set_name: str) -> None:
    """The variational inequality: at the minimiser over a hull all vertices in use have the slope of the point."""
    masks = SETS[set_name](SHAPE, 0.5)
    for seed in range(4):
        for problem in problems(seed)[:2]:
            checked_run = AtomsChecked(FullyCorrective())
            run_loop(problem, masks, checked_run, ExactStep(), 15)
            for x, active, atoms in checked_run.ends:
                gradient = problem.gradient(problem.evaluate(x.clone()))
                row_blocks = RowBlocks(masks.row_block(SHAPE))
                flat = row_blocks.flat(gradient)
                here = vecdot(flat, row_blocks.flat(x))
                scores = torch.where(atoms.weight > 0, atoms.scores(flat), here.unsqueeze(1))
                scale = 1e-9 * float(problem.gradient(problem.evaluate(torch.zeros_like(x))).abs().sum())
                assert float((scores - here.unsqueeze(1)).abs().max()) <= scale
                assert bool((active >= 1).all())


@given(
    layers(rows=(1, 3), d=(1, 8)),
    st.sampled_from(sorted(SETS)),
    st.floats(0, 1),
    st.sampled_from([0.0, -1.0, 1.0, 3.0]),
)
@examples(120)
def test_fully_corrective_never_increases_the_objective(
    layer: Layer, set_name: str, fraction: float, amount: float
) -> None:
    """Also if the objective is flat or concave in some directions, and from any mask."""
    base = layer.problem()
    problem, masks = base.shifted(base.diagonal(), amount), SETS[set_name](layer.shape, fraction)
    start = masks.lmo(normal(*layer.shape, seed=5))
    diary = Diary(FullyCorrective())
    end = run_loop(problem, masks, diary, ExactStep(), 10, start=start).point.x
    row_blocks = RowBlocks(masks.row_block(layer.shape))
    points = [event.x for event in diary.events] + [end]
    values = torch.stack([row_blocks(problem.value(problem.evaluate(x.clone()))) for x in points])
    size = float(base.scale().sum() / base.unit + base.diagonal().abs().sum()) * (1 + abs(amount))
    assert bool((values.diff(dim=0) <= 1e-9 * size).all())


def test_fully_corrective_solves_linear_objectives() -> None:
    masks = SETS["n:m"](SHAPE, 0.5)
    for seed in range(5):
        problem = Bowl(torch.zeros(8, 8, dtype=torch.float64), normal(*SHAPE, seed=seed))
        start = masks.lmo(normal(*SHAPE, seed=seed + 10))
        x = run_loop(problem, masks, FullyCorrective(), ExactStep(), 3, start=start).point.x
        torch.testing.assert_close(x, masks.lmo(problem.linear), rtol=0, atol=1e-12)


def test_away_leaves_the_worst_atom() -> None:
    """Every direction of a run against the definition: the atoms are read slot by slot."""
    masks, seen = SETS["per-row"](SHAPE, 0.5), Counter()

    class Checked(AtomsChecked):
        def search_direction(self, state: IterationState) -> SearchDirection:
            atoms = self.rule.atoms
            slots = range(atoms.weight.shape[1])
            dense = [atoms.dense(torch.full((atoms.blocks,), slot), torch.float64) for slot in slots]
            weight = atoms.weight.clone()
            search = super().search_direction(state)
            for row in range(SHAPE[0]):
                gradient = state.gradient[row]
                scores = {s: float(dense[s][row] @ gradient) for s in slots if weight[row, s] > 0}
                worst = max(scores.values())
                here, minimum = float(state.x[row] @ gradient), float(state.vertex[row] @ gradient)
                rounding = 1e-9 * float(gradient.abs().sum())
                if here - minimum < rounding or abs(worst - here - (here - minimum)) < rounding:
                    continue  # nothing to gain, or equal gains: rounding decides
                # An exact step makes slopes equal: any of the worst atoms is right.
                directions = [(state.vertex[row] - state.x[row], 1.0, "toward")]
                tied = [s for s, score in scores.items() if score >= worst - rounding]
                if isinstance(self.checked, Pairwise):
                    directions = [(state.vertex[row] - dense[s][row], float(weight[row, s]), "pair") for s in tied]
                elif worst - here > here - minimum and len(scores) > 1:
                    own = {s: float(weight[row, s]) for s in tied}
                    directions = [(state.x[row] - dense[s][row], own[s] / (1 - own[s]), "away") for s in tied]
                seen[directions[0][2]] += 1
                assert any(
                    torch.allclose(search.vector[row], x, rtol=0, atol=1e-12)
                    and float(search.max_step[row]) == pytest.approx(max_step, rel=1e-9)
                    for x, max_step, _ in directions
                )
            return search

    for rule in (Away(), Pairwise()):
        for seed in range(2):
            problem = plain_layer(seed).problem()
            checked = Checked(rule)
            checked.checked = rule
            run_loop(problem, masks, checked, ExactStep(), 40)
    assert seen["away"] > 20
    assert seen["toward"] > 20
    assert seen["pair"] > 40


def test_blended_pairwise_keeps_the_fewest_atoms() -> None:
    masks = SETS["per-row"]((8, 24), 0.5)
    most = {}
    for rule in (Away(), Pairwise(), BlendedPairwise()):
        problem = plain_layer(0, (8, 24)).problem()
        checked_run = AtomsChecked(rule)
        run_loop(problem, masks, checked_run, ExactStep(), 120)
        most[type(rule).__name__] = float(checked_run.ends[-1][1].double().mean())
    assert most["BlendedPairwise"] <= most["Pairwise"]
    assert most["BlendedPairwise"] <= most["Away"]


# Faces


@pytest.mark.parametrize("set_name", [name for name in SETS if hasattr(SETS[name](SHAPE, 0.5), "inface")])
def test_away_vertices_lie_on_the_face(set_name: str) -> None:
    """Of all masks that agree with x where it is 0 or 1, by enumeration, the away vertex is the worst."""
    shape = (2, 6)
    masks, checked = SETS[set_name](shape, 0.5), 0
    members = every_mask(masks, shape).double()
    for seed in range(3):
        problem = plain_layer(seed, shape).problem()
        diary = Diary(InFace())
        run_loop(problem, masks, diary, ExactStep(), 20)
        row_blocks = RowBlocks(masks.row_block(shape))
        for event in diary.events:
            away = masks.lmo(event.gradient) - event.search
            fixed = (event.x < 1e-14) | (event.x > 1 - 1e-14)
            assert torch.equal(away[fixed], event.x.round()[fixed])
            assert masks.contains(away.round().bool())
            torch.testing.assert_close(away, away.round(), rtol=0, atol=1e-12)
            on_face = members[((members - event.x).abs() * fixed).flatten(1).amax(1) < 1e-12]
            worst = (on_face * event.gradient).flatten(1).sum(1).max()
            assert float(row_blocks.first(row_blocks(vecdot(away, event.gradient))).sum()) == pytest.approx(
                float(worst), abs=1e-9
            )
            checked += 1
    assert checked == 60


# Angles


@given(st.integers(0, 999), st.sampled_from(["per-row", "unstructured", "n:m", "blocks"]), st.integers(0, 12))
@examples(60)
def test_boosted_directions_are_no_worse_aligned_than_vanilla_ones(seed: int, set_name: str, iterations: int) -> None:
    masks, problem = SETS[set_name](SHAPE, 0.5), plain_layer(seed).problem()
    x = run_loop(problem, masks, Vanilla(), ExactStep(), iterations).point.x
    state = state_at(problem, masks, x)
    cosines = []
    for rule in (Boosted(), Vanilla()):
        search = rule.begin(state).search_direction(state).vector
        lengths = state.dot(search, search).sqrt() * state.dot(state.gradient, state.gradient).sqrt()
        cosines.append((-state.dot(search, state.gradient) / lengths).nan_to_num(0.0))  # nan if the row is solved
    assert bool((cosines[0] >= cosines[1] - 1e-12).all())


def test_more_boosting_rounds_improve_the_alignment() -> None:
    masks, problem, better = SETS["per-row"](SHAPE, 0.5), plain_layer(0).problem(), 0
    x = run_loop(problem, masks, Vanilla(), ExactStep(), 3).point.x
    state = state_at(problem, masks, x)
    one, many = (Boosted(rounds=rounds).search_direction(state).vector for rounds in (1, 30))
    torch.testing.assert_close(one, state.vertex - state.x, rtol=0, atol=1e-12)

    def cosine(search: Tensor) -> Tensor:
        return -vecdot(search, state.gradient) / (search.norm(dim=1) * state.gradient.norm(dim=1))

    better = cosine(many) - cosine(one)
    assert bool((better >= -1e-12).all())
    assert float(better.max()) > 0.05


# Conjugate directions


@pytest.mark.parametrize("together", [False, True], ids=["rows apart", "rows together"])
@given(st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.2, 0.9]))
@examples(200)
def test_corrected_directions_are_conjugate(together: bool, seed: int, amount: float, slack: float) -> None:
    base = plain_layer(seed).problem()
    problem, row_blocks = base.shifted(base.diagonal(), amount), RowBlocks(SHAPE[0] if together else 1)
    one, two = 2 * random(*SHAPE, seed=seed) - 1, 2 * random(*SHAPE, seed=seed + 1000) - 1
    state = state_at(problem, SETS["per-row"](SHAPE, 0.5), random(*SHAPE), row_block=row_blocks.row_block)
    rule, still = Conjugate(slack).begin(state), torch.zeros(SHAPE[0], dtype=torch.float64)
    rule.update(state, problem.hvp(one.clone()), still, still + 1)  # after a zero step all of it remains
    vertex, previous = problem.hvp(two.clone()), problem.hvp(one.clone())
    chosen = rule.correct(state, vertex)
    # The direction is (1 - a) vertex + a previous, with one a for each row, or for all.
    a = vecdot(chosen.vector - two, one - two) / vecdot(one - two, one - two)
    torch.testing.assert_close(chosen.vector, torch.lerp(two, one, a.unsqueeze(1)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chosen.product, problem.hvp(chosen.vector.clone()).product, rtol=1e-9, atol=1e-9)
    assert bool(((a >= -1e-12) & (a <= 1 - slack + 1e-12)).all())
    if together:
        torch.testing.assert_close(a, a[:1].expand_as(a), rtol=1e-9, atol=1e-9)
    product = problem.hessian(previous)
    cross, size = row_blocks(vecdot(product, chosen.vector)), row_blocks((product.abs() * chosen.vector.abs()).sum(1))
    inside = (a > 1e-9) & (a < 1 - slack - 1e-9)
    assert bool((cross.abs() <= 1e-9 * size)[inside].all())
    # At an end of the range of a, no inner value makes them conjugate.
    ahead, back = row_blocks(vecdot(product, one)), row_blocks(vecdot(product, two))
    at_zero, root = a <= 1e-9, back / (back - ahead)
    assert bool(((root <= 1e-6) | (root >= 1 - slack - 1e-6))[at_zero | ~inside].all())


def test_the_first_conjugate_direction_is_vanilla() -> None:
    problem, masks = plain_layer(3).problem(), SETS["per-row"](SHAPE, 0.5)
    state = state_at(problem, masks, random(*SHAPE))
    rule = Conjugate().begin(state)
    assert torch.equal(rule.search_direction(state).vector, Vanilla().search_direction(state).vector)
    direction = problem.hvp(random(*SHAPE))
    before = direction.vector.clone()
    assert rule.correct(state, direction) is direction
    assert torch.equal(direction.vector, before)


def test_after_a_full_step_nothing_is_corrected() -> None:
    problem, masks = plain_layer(3).problem(), SETS["per-row"](SHAPE, 0.5)
    state = state_at(problem, masks, random(*SHAPE))
    rule, ones = Conjugate().begin(state), torch.ones(SHAPE[0], dtype=torch.float64)
    rule.update(state, problem.hvp(random(*SHAPE)), ones, ones)  # a full step: nothing of the direction remains
    direction = problem.hvp(random(*SHAPE))
    before = direction.vector.clone()
    assert torch.equal(rule.correct(state, direction).vector, before)


@pytest.mark.parametrize("set_name", FREE_SETS)
def test_the_previous_direction_ends_where_its_full_step_would_have(set_name: str) -> None:
    """Points stay in the hull: from the new point, the previous direction ends where its full step would have ended."""
    masks, ends = SETS[set_name](SHAPE, 0.4), []

    class Spy(Diary):
        def correct(self, state: IterationState, direction: Direction) -> Direction:
            past = self.rule.previous
            ends.append(None if past is None else state.x + past.vector)
            return super().correct(state, direction)

    diary = Spy(Conjugate())
    run_loop(plain_layer(1).problem(), masks, diary, ExactStep(), 40)
    for t, end in enumerate(ends):
        if t:
            before = diary.events[t - 1]
            torch.testing.assert_close(end, before.x + before.search, rtol=0, atol=1e-9)
        else:
            assert end is None


# Lazy


class Counted(PartitionMatroid):
    """A set that records every cost its oracle was called with."""

    def __init__(self, masks: PartitionMatroid) -> None:
        super().__init__(masks.keep, masks.tile, masks.name)
        self.asked: list[Tensor] = []

    def rows(self, index: slice | Tensor, shape: tuple[int, int]) -> PartitionMatroid:
        part = Counted(super().rows(index, shape))
        part.asked = self.asked
        return part

    def lmo(self, cost: Tensor) -> Tensor:
        self.asked.append(cost.clone())
        return super().lmo(cost)


@pytest.mark.parametrize("set_name", ["per-row", "unstructured", "blocks"])
def test_lazy_calls_the_oracle_less_often(set_name: str) -> None:
    masks, problem = Counted(SETS[set_name](SHAPE, 0.5)), plain_layer(0).problem()
    end = run_loop(problem, masks, Lazy(), ExactStep(), 2000)
    rows = sum(len(cost) for cost in masks.asked)
    assert rows < 0.8 * 2000 * SHAPE[0]
    gradient = problem.gradient(problem.evaluate(end.point.x.clone()))
    gap = float((gradient * (end.point.x - masks.lmo(gradient))).sum())
    assert gap <= 2e-3 * float(problem.scale().sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lazy_converges_when_the_first_gap_is_zero(dtype: torch.dtype) -> None:
    """If all entries are kept or a row is zero, the first gap is zero, or slightly negative by rounding."""
    weight = normal(*SHAPE)
    weight[1] = 0.0
    problem = Layer(weight, normal(8, 20), "").problem(dtype)
    for keep in (8, 0):
        assert run_loop(problem, SETS["per-row"](SHAPE, keep / 8), Lazy(), ExactStep(), 50, tolerance=0.0).converged
    one = problem.rows(torch.tensor([1]))
    assert run_loop(one, SETS["per-row"]((1, 8), 0.5), Lazy(), ExactStep(), 50, tolerance=0.0).converged


def test_lazy_forgets_when_its_memory_is_full() -> None:
    problem, masks = plain_layer(0, (1, 24)).problem(), SETS["per-row"]((1, 24), 0.5)
    sizes = []

    class Spy(Diary):
        def update(self, state: IterationState, direction: Direction, step_size: Tensor, max_step: Tensor) -> None:
            super().update(state, direction, step_size, max_step)
            sizes.append(int(self.rule.atoms.active.max()))

    run_loop(problem, masks, Spy(Lazy(remember=5)), ExactStep(), 400)
    assert max(sizes) == 5
    assert 1 in sizes[50:]


# Block-coordinate


@pytest.mark.parametrize("set_name", ["n:m", "blocks", "columns", "block counts", "per-row", "unstructured"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 100])
def test_block_coordinate_changes_each_group_once_per_round(blocks: int, set_name: str) -> None:
    masks, problem = SETS[set_name](SHAPE, 0.5), plain_layer(1).problem()
    diary = Diary(BlockCoordinate(blocks=blocks))
    run_loop(problem, masks, diary, OpenLoopStep(), 12)
    within = masks.groups(torch.zeros(SHAPE)).shape[0] * masks.row_block(SHAPE) // SHAPE[0]  # groups of one row block
    turns = min(blocks, within)
    rounds = []
    for event in diary.events:
        whole = masks.groups(masks.lmo(event.gradient) - event.x)
        groups = masks.groups(event.search)
        changed = groups.abs().amax(1) > 0
        assert torch.equal(groups[changed], whole[changed])
        still = (whole.abs().amax(1) == 0) & ~changed
        rounds.append((changed.view(-1, within), still.view(-1, within)))
        assert bool((rounds[-1][0].sum(1) <= -(-within // turns)).all())
    # In any round of turns every group changes once, unless it is at its vertex already.
    for first in range(0, 12 - turns + 1, turns):
        changed, still = (torch.stack(part).sum(0) for part in zip(*rounds[first : first + turns], strict=True))
        assert bool((changed <= 1).all())
        assert bool(((changed == 1) | (still > 0)).all())


# Certified gaps


@pytest.mark.parametrize("name", OPEN_LOOP)
def test_certified_gaps_use_true_gradients(name: str) -> None:
    """Every gap that a rule reports is that of the gradient at its point, recomputed."""
    masks, problem = SETS["n:m"](SHAPE, 0.5), plain_layer(0).problem()
    rule, certified = {"momentum": Momentum(check=4), "stochastic": Stochastic(check=4)}[name], []

    class Spy(Diary):
        def search_direction(self, state: IterationState) -> SearchDirection:
            search = super().search_direction(state)
            gap = state.certified_gap()
            if gap is not None:
                true = problem.gradient(problem.evaluate(state.x.clone()))
                expected = vecdot(true, state.x - masks.lmo(true))
                torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-9 * float(true.abs().sum()))
                certified.append(state.iteration)
            return search

    run_loop(problem, masks, Spy(rule), OpenLoopStep(), 21, tolerance=1e-30)
    assert certified == [0, 4, 8, 12, 16, 20]


@pytest.mark.parametrize("name", DIRECTIONS)
def test_certified_gaps_are_never_below_the_gap(name: str) -> None:
    """For every rule: the gap that ends the loop is no less than the true gap (up to rounding)."""
    problem, certified = plain_layer(4).problem(), []
    for set_name in ("per-row", "unstructured", "n:m"):
        masks = SETS[set_name](SHAPE, 0.5)
        row_blocks = RowBlocks(masks.row_block(SHAPE))

        class Spy(Diary):
            def search_direction(self, state: IterationState) -> SearchDirection:
                search = super().search_direction(state)
                gap = state.certified_gap()
                if gap is not None:
                    true = problem.gradient(problem.evaluate(state.x.clone()))
                    expected = row_blocks(vecdot(true, state.x - masks.lmo(true)))  # noqa: B023
                    assert bool((gap >= expected - 1e-9 * float(true.abs().sum())).all())
                    certified.append(gap)
                return search

        run_loop(problem, masks, Spy(DIRECTIONS[name]()), step_for(name), 40)
    assert len(certified) >= 3


def test_samples_have_the_gradient_as_their_mean() -> None:
    random_ = torch.Generator().manual_seed(0)
    base = plain_layer(0).problem()
    for problem in (base, base.shifted(base.diagonal(), 0.7)):
        x = random(*SHAPE)
        mean = torch.stack([problem.sampled(x, 0.25, random_) for _ in range(4000)])
        true = problem.gradient(problem.evaluate(x.clone()))
        error = mean.std(0) / 4000**0.5
        assert bool(((mean.mean(0) - true).abs() <= 5 * error + 1e-9).all())
        assert torch.allclose(problem.sampled(x, 1.0, random_), true, rtol=1e-9, atol=1e-9)


def test_momentum_averages_gradients_by_the_recurrence() -> None:
    """By the recurrence: a_t = a_{t-1} + 2 / (t + 2) (g_t - a_{t-1}), and the direction ends at its vertex."""
    masks, diary = SETS["per-row"](SHAPE, 0.5), Diary(Momentum())
    run_loop(plain_layer(0).problem(), masks, diary, OpenLoopStep(), 25)
    average = torch.zeros(SHAPE, dtype=torch.float64)
    for t, event in enumerate(diary.events):
        average = average + 2 / (t + 2) * (event.gradient - average)
        torch.testing.assert_close(event.x + event.search, masks.lmo(average), rtol=0, atol=1e-12)


def test_equal_seeds_give_equal_stochastic_runs() -> None:
    masks, problem = SETS["per-row"](SHAPE, 0.5), plain_layer(0).problem()
    ends = [run_loop(problem, masks, Stochastic(seed=seed), OpenLoopStep(), 20).point.x for seed in (0, 0, 1)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# All rules


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_rule_forgets_its_last_run(name: str) -> None:
    rule, masks, ends = DIRECTIONS[name](), SETS["n:m"](SHAPE, 0.5), []
    for seed in (0, 1, 0):
        ends.append(run_loop(plain_layer(seed).problem(), masks, rule, step_for(name), 20).point.x)
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[1])
    assert rule == DIRECTIONS[name]()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_set_of_one_mask_leaves_the_point_unchanged(name: str) -> None:
    """If the set has one mask, the direction is zero and the point does not change."""
    for keep in (0.0, 1.0):
        masks = SETS["per-row"](SHAPE, keep)
        for problem in (plain_layer(0).problem(), Layer(torch.zeros(SHAPE), torch.ones(8, 2), "").problem()):
            end = run_loop(problem, masks, DIRECTIONS[name](), step_for(name), 6).point.x
            assert torch.equal(end, masks.center(SHAPE, problem.dtype, CPU))


def test_active_set_rules_start_at_vertices() -> None:
    problem, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)
    for name, rule in DIRECTIONS.items():
        assert rule().from_vertex == (name in ACTIVE)
        assert rule().exact == (name != "stochastic")
        if name in ACTIVE:
            assert masks.contains(starts(problem, masks, rule()).bool())
    for rule in (Lazy(), Away(), Momentum(), Stochastic()):
        with pytest.raises(NotImplementedError, match="must define search_direction"):
            rule.search_direction(state_at(problem, masks, random(*SHAPE)))


def test_oracle_calls_and_products_are_counted() -> None:
    """Oracle calls and products of ten iterations, gradients carried."""
    problem, masks = plain_layer(0).problem(), SETS["per-row"](SHAPE, 0.5)
    expected = {
        "vanilla": (10, 10), "conjugate": (10, 10), "away": (10, 10), "pairwise": (10, 10),
        "blended-pairwise": (10, 10), "dicg": (10, 10), "blended-dicg": (10, 10), "block-coordinate": (10, 10),
        "momentum": (11, 10), "fully-corrective": (10, 21),
    }  # fmt: skip
    for name, (oracle, products) in expected.items():
        monitor = Monitor("test", None, None)
        run_loop(problem, masks, DIRECTIONS[name](), step_for(name), 10, monitor=monitor)
        assert (monitor.counters["lmo"], monitor.counters["products"]) == (oracle, products), name


def test_weights_that_an_ill_conditioned_system_does_not_give_stay() -> None:
    quadratic = torch.tensor(
        [
            [-2.9683, 0.6847, -0.0436, 2.9469, 0.5874],
            [0.6847, -2.1172, 1.6884, 1.6679, -1.2664],
            [-0.0436, 1.6884, 3.6394, -3.8683, -2.9519],
            [2.9469, 1.6679, -3.8683, 3.3132, 2.2981],
            [0.5874, -1.2664, -2.9519, 2.2981, -1.8671],
        ],
        dtype=torch.float64,
    )
    linear = torch.tensor(
        [[1.408, 2.56, -3.201e-08, -4.372e-09, 1.884e4], [-1e5, -7.589e9, 1e5, 0.6159, 0.464]], dtype=torch.float64
    )
    solver = FrankWolfe("fully-corrective", iterations=12, gap=0.0, relative_gap=0.0, polish=False)
    problem = QuadraticForm(quadratic, linear)
    masks = PartitionMatroid(0.5, (2, None))
    result = solve(problem, masks, solver)
    assert result.lower_bound is not None
    least = solve(problem, masks, BruteForce()).total
    assert -1e10 < float(result.lower_bound) <= least
