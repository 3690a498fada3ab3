"""Branch and bound against enumeration, and fixing that never cuts off an optimum."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from maskopt.errors import MaskoptError
from maskopt.oracles import AtMost, PartitionMatroid, PerRow, Restricted
from maskopt.problems import LayerReconstruction, QuadraticForm
from maskopt.solvers import (
    BranchAndBound,
    BruteForce,
    Magnitude,
    Scip,
    Solver,
    Status,
    Stop,
    Wanda,
    branch_and_bound,
    solve,
)
from maskopt.solvers.fixing import fixable
from tests.helpers import (
    ALL_SETS,
    MATROIDS,
    Layer,
    banned_of,
    errors_of,
    every_mask,
    examples,
    feasible,
    fractions,
    held_of,
    layers,
    magnitudes,
)

SMALL = BranchAndBound(start=Wanda(), batch=7, iterations=6)


def optimum(layer: Layer, masks: PartitionMatroid) -> float:
    return float(errors_of(layer.weight, layer.gram, every_mask(masks, layer.shape)).sum(1).min())


@given(layers(rows=(1, 3), d=(1, 8)), fractions)
@pytest.mark.parametrize("name", MATROIDS)
@examples(20)
def test_proves_the_optimum(name: str, layer: Layer, fraction: float) -> None:
    assume(layer.weight.numel() <= 14)
    masks = ALL_SETS[name](layer.shape, fraction)
    problem = layer.problem()
    result = solve(problem, masks, SMALL)
    assert result.status is Status.OPTIMAL
    assert feasible(masks, result.mask)
    best, size = optimum(layer, masks), float(magnitudes(layer.weight, layer.gram).sum())
    assert abs(result.total - best) <= 1e-8 * best + 1e-10 * size
    assert result.lower_bound is not None
    assert float(result.lower_bound.sum()) <= best + 1e-14 * size
    assert float(result.lower_bound.sum()) >= best * (1 - 1e-7) - 1e-9 * size


@given(
    layers(rows=(1, 3), d=(1, 8)), fractions, st.integers(0, 2**16), st.sampled_from([1e-9, 0.1, 0.5, 1.0, 1e3, 1e9])
)
@pytest.mark.parametrize("name", MATROIDS)
@examples(25)
def test_proves_the_optimum_for_other_targets(
    name: str, layer: Layer, fraction: float, seed: int, distance: float
) -> None:
    """The mask of least error towards weights at some distance, by exact enumeration; no bound lies above it."""
    assume(layer.weight.numel() <= 14)
    masks = ALL_SETS[name](layer.shape, fraction)
    away = torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = layer.weight.double() + distance * layer.weight.double().abs().mean() * away
    problem = LayerReconstruction(layer.weight.double(), layer.gram.double(), target=target)
    members = every_mask(masks, layer.shape)
    assume(len(members) > 0)
    best = min(sum(problem.exact_objective(mask)) for mask in members)
    for solver in (SMALL, BranchAndBound(start=Magnitude())):
        result = solve(problem, masks, solver)
        assert feasible(masks, result.mask)
        assert result.lower_bound is not None
        # Grams are indefinite by rounding: an error below zero counts as zero.
        assert float(result.lower_bound.sum()) <= max(0.0, float(best)) * (1 + 1e-14)
        found = sum(problem.exact_objective(result.mask))
        if result.status is Status.OPTIMAL:
            assert float(found - best) <= 2e-9 * abs(float(found))
        else:
            assert result.status is Status.COMPLETED


@pytest.mark.parametrize("solver", [BranchAndBound(), BranchAndBound(start=Wanda()), Scip()], ids=str)
def test_a_target_that_made_up_for_kept_entries_is_counted(solver: Solver) -> None:
    """Once the error towards W decided which entries every better mask keeps, whatever the target was."""
    weight, size = torch.ones(1, 4, dtype=torch.float64), torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    target = torch.tensor([[0.9577, 0.8054, 1.0030, 0.5600]], dtype=torch.float64)
    problem = LayerReconstruction(weight, size.unsqueeze(1) * size, target=target)
    masks = AtMost(PerRow(4))
    best = min(float(problem.objective(mask)) for mask in every_mask(masks, (1, 4)))
    result = solve(problem, masks, solver)
    assert result.total == pytest.approx(best, rel=1e-9)
    assert float(result.lower_bound.sum()) <= best


@given(layers(rows=(1, 2), d=(4, 8)), fractions, st.integers(0, 6))
@examples(200)
def test_bounds_hold_whenever_it_is_stopped(layer: Layer, fraction: float, batches: int) -> None:
    masks = ALL_SETS["per-row"](layer.shape, fraction)
    seen = 0

    def stop(_: object) -> Stop | None:
        nonlocal seen
        seen += 1
        return Stop.STOP if seen > batches else None

    result = solve(layer.problem(), masks, BranchAndBound(start=Wanda(), batch=1, iterations=2), callback=stop)
    best, size = optimum(layer, masks), float(magnitudes(layer.weight, layer.gram).sum())
    assert result.lower_bound is not None
    assert float(result.lower_bound.sum()) <= best + 1e-14 * size
    assert result.total >= best - 1e-14 * size
    assert feasible(masks, result.mask)


@given(st.data(), st.integers(0, 2**16), st.sampled_from([0.0, 1.0, -1e3, 1e6]))
@pytest.mark.parametrize("name", MATROIDS)
@examples(60)
def test_fixing_never_cuts_off_an_optimum(name: str, data: st.DataObject, seed: int, constant: float) -> None:
    """The bound is the linear model of a convex quadratic at a random point; a constant is added to its linear term."""
    shape = data.draw(st.sampled_from([(1, 6), (2, 4), (2, 6), (1, 9), (3, 4)]))
    masks = ALL_SETS[name](shape, data.draw(fractions))
    members = every_mask(masks, shape)
    assume(len(members) > 0)
    random = torch.Generator().manual_seed(seed)
    factor = torch.randn(shape[1], shape[1] + 2, generator=random, dtype=torch.float64)
    linear = torch.randn(shape, generator=random, dtype=torch.float64) * data.draw(st.sampled_from([0.0, 1.0, 10.0]))
    problem = QuadraticForm(factor @ factor.T, linear + constant)
    chosen = members[torch.randint(len(members), (3,), generator=random)].double()
    x = torch.einsum("n,nrd->rd", torch.rand(3, generator=random, dtype=torch.float64).softmax(0), chosen)
    height = masks.row_block(shape)

    def per_block(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(-1, height).sum(1)

    free = PartitionMatroid(masks.keep, masks.tile, at_most=masks.at_most)
    fixed = Restricted(free, *(torch.zeros(shape, dtype=torch.bool) for _ in range(2)))
    for place in held_of(masks):
        assert fixed.protected is not None
        fixed.protected.view(-1)[place] = True
    for place in banned_of(masks):
        assert fixed.forbidden is not None
        fixed.forbidden.view(-1)[place] = True
    fixed = Restricted(free, fixed.protected, fixed.forbidden)
    point = problem.evaluate(x)
    gradient = problem.gradient(point)
    vertex = fixed.lmo(gradient)
    bound = per_block(problem.value(point) + (gradient * (vertex - x)).sum(1))
    every = members.double()
    values = torch.einsum("nri,ij,nrj->nr", every, problem.quadratic, every) + (every * problem.linear).sum(2)
    errors = values.view(len(members), -1, height).sum(2)
    best = errors.amin(0)
    # The incumbent may have any error between the optimum and the worst mask.
    known = best + data.draw(st.sampled_from([0.0, 0.1, 1.0])) * (errors.amax(0) - best)
    slack = (known - bound).repeat_interleave(height)
    keep, prune = fixable(free, gradient, vertex, fixed, slack)
    # Values are rounded by this much: only masks clearly as good as the incumbent must survive.
    size = 1e-12 * (1 + abs(constant)) * shape[0] * shape[1] * (1 + float(errors.abs().max()))
    for row_block in range(len(best)):
        rows = slice(row_block * height, (row_block + 1) * height)
        good = members[errors[:, row_block] <= known[row_block] - size][:, rows]
        assert bool((good | ~keep[rows]).all())
        assert not bool((good & prune[rows]).any())


def test_fixing_does_not_depend_on_a_constant() -> None:
    masks = PartitionMatroid(2, (1, None))
    gradient = torch.tensor([[3.0, -1.0, 0.5, 2.0, -4.0]], dtype=torch.float64)
    fixed = Restricted(masks, torch.zeros(1, 5, dtype=torch.bool))
    vertex = fixed.lmo(gradient)
    for slack, kept, pruned in ((0.4, [1, 4], [0, 2, 3]), (2.0, [4], [0, 3]), (9.0, [], [])):
        for constant in (0.0, 100.0, -1e6):
            keep, prune = fixable(masks, gradient + constant, vertex, fixed, torch.tensor([slack]).double())
            assert keep[0].nonzero().flatten().tolist() == kept
            assert prune[0].nonzero().flatten().tolist() == pruned


def test_the_node_limit_ends_the_search_and_logs_are_monotone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    x += 3 * torch.randn(1, 60, generator=generator, dtype=torch.float64)
    layer = Layer(torch.randn(2, 40, generator=generator, dtype=torch.float64), x, "normal")
    logs = []
    masks = ALL_SETS["per-row"](layer.shape, 0.5)
    solver = BranchAndBound(start=Wanda(), nodes=20, batch=8, log=logs.append)
    result = solve(layer.problem(), masks, solver)
    assert result.status is Status.ITERATION_LIMIT
    assert {entry.row_block for entry in logs} == {0, 1}
    assert result.counters["nodes"] <= 2 * (20 + 8)
    for row_block in (0, 1):
        mine = [entry for entry in logs if entry.row_block == row_block]
        assert all(a.bound <= b.bound + 1e-9 and a.incumbent >= b.incumbent for a, b in pairwise(mine))
        assert mine[-1].bound <= mine[-1].incumbent
        assert 0.0 <= mine[-1].gap <= 1.0
    assert result.lower_bound is not None
    assert result.gap is not None
    assert result.gap > 0


def test_sets_without_groups_are_refused() -> None:
    layer = Layer(torch.ones(2, 4).double(), torch.eye(4).double(), "")
    with pytest.raises(MaskoptError, match="it must be a PartitionMatroid; it is a Budget"):
        solve(layer.problem(), ALL_SETS["budget"](layer.shape, 0.5), SMALL)


def outlier_layer(seed: int, kind: str, size: float) -> LayerReconstruction:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    x += 2 * torch.randn(1, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 10, generator=generator, dtype=torch.float64)
    if kind == "weight":
        weight[0, 0] = size
    elif kind == "input":
        x[3] *= size
    elif kind == "several":
        weight[0, [1, 4, 7]] = torch.tensor([size, -size / 3, size**0.5], dtype=torch.float64)
    else:  # two that cancel
        x[6] = x[2]
        weight[0, 2], weight[0, 6] = size, -size
    return LayerReconstruction(weight, x @ x.T)


@pytest.mark.parametrize("size", [1e4, 1e7, 1e10, 1e12])
@pytest.mark.parametrize("kind", ["weight", "input", "several", "cancelling"])
def test_weights_far_larger_than_the_others_hide_no_optimum(kind: str, size: float) -> None:
    masks = PerRow(5)
    for seed in range(4):
        problem = outlier_layer(seed, kind, size)
        best = solve(problem, masks, BruteForce()).total
        for start in (Magnitude(), Wanda()):
            result = solve(problem, masks, BranchAndBound(start=start))
            assert result.status is Status.OPTIMAL
            assert result.total <= best * (1 + 1e-9)
            assert result.lower_bound is not None
            assert result.total * (1 - 1e-9) <= float(result.lower_bound) <= best


def test_what_rounding_hides_is_not_called_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nodes within rounding of the target are too many to branch on, the bound is what is proven of them."""
    monkeypatch.setattr(branch_and_bound, "_DOUBTS", 0)
    seen = set()
    for seed in range(8):
        problem = outlier_layer(seed, "cancelling", 1e10)
        best = solve(problem, PerRow(5), BruteForce()).total
        result = solve(problem, PerRow(5), BranchAndBound(start=Magnitude()))
        assert result.lower_bound is not None
        assert float(result.lower_bound) <= best
        proven = result.total - float(result.lower_bound) <= 1e-9 * result.total
        assert proven == (result.status is Status.OPTIMAL)
        seen.add(result.status)
    assert Status.COMPLETED in seen


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-3, 0.5])
def test_optimal_means_within_the_gap_that_was_asked_for(gap: float) -> None:
    for seed in range(6):
        problem = outlier_layer(seed, "weight", 3.0)
        result = solve(problem, PerRow(5), BranchAndBound(start=Magnitude(), gap=gap))
        best = solve(problem, PerRow(5), BruteForce()).total
        assert result.lower_bound is not None
        assert float(result.lower_bound) <= best * (1 + 1e-15)
        if result.status is Status.OPTIMAL:
            assert result.total - float(result.lower_bound) <= gap * result.total
        assert result.total * (1 - gap) <= best * (1 + 1e-15)
