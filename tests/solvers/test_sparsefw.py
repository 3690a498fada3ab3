"""SparseFW: fixed entries, bounds, its defaults, and the scores it starts from."""

import functools

import pytest
import torch

from maskopt.oracles import NM, PartitionMatroid, PerRow, Unstructured
from maskopt.problems import Saliency, synthetic
from maskopt.solvers import RIA, ContinuationFrankWolfe, GapKind, Magnitude, SparseFW, Status, Wanda, solve
from tests.helpers import groups_of

SHAPE = (8, 24)
SET = pytest.mark.parametrize(
    "masks", [PerRow(0.5), Unstructured(0.4), NM(keep=2, group=4), PartitionMatroid(6, (4, 3))], ids=repr
)


@functools.cache
def errors_of_continuation(masks: PartitionMatroid) -> torch.Tensor:
    return solve(synthetic(rows=SHAPE[0], d=SHAPE[1]).problem(), masks, ContinuationFrankWolfe()).objective


@SET
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("start", [Wanda(), RIA(), Magnitude()], ids=repr)
def test_fixed_entries_stay(masks: PartitionMatroid, alpha: float, start: object) -> None:
    problem = synthetic(rows=SHAPE[0], d=SHAPE[1]).problem()
    result = solve(problem, masks, SparseFW(iterations=30, alpha=alpha, start=start))
    scores = {
        "Wanda": Saliency.wanda(problem.weight, problem.gram),
        "RIA": Saliency.ria(problem.weight, problem.gram),
        "Magnitude": Saliency.magnitude(problem.weight),
    }[type(start).__name__].scores.flatten()
    kept = result.mask.flatten()
    counts = masks.kept_per_group(SHAPE).tolist()
    for group, count in zip(groups_of(masks, SHAPE), counts, strict=True):
        best = sorted(group, key=lambda index: -float(scores[index]))[: int(alpha * count + 1e-9)]
        assert kept[best].all()
    # Fixed entries restrict the search only: the bound is that of the whole set.
    assert result.gap_kind is GapKind.PROVEN
    free = errors_of_continuation(masks)
    assert bool((result.lower_bound <= free.view(len(result.lower_bound), -1).sum(1)).all())
    if alpha == 1.0:
        assert torch.equal(result.mask, solve(problem, masks, start).mask)


@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_fixing_needs_the_start_to_keep_them(alpha: float) -> None:
    """A start that prunes entries to be fixed takes precedence: its mask must be feasible."""
    problem, masks = synthetic(rows=SHAPE[0], d=SHAPE[1]).problem(), PerRow(0.5)
    against = masks.lmo_mask(Saliency.wanda(problem.weight, problem.gram).scores)  # keeps the worst
    result = solve(problem, masks, SparseFW(iterations=30, alpha=alpha), start=against)
    assert masks.contains(result.mask)


@SET
def test_gap_shrinks_with_iterations(masks: PartitionMatroid) -> None:
    problem = synthetic(rows=SHAPE[0], d=SHAPE[1]).problem()
    bounds = []
    for iterations in (1, 20, 400):
        result = solve(problem, masks, SparseFW(iterations=iterations))
        assert result.gap_kind is GapKind.PROVEN
        assert result.status is Status.COMPLETED
        assert result.lower_bound.shape == (SHAPE[0] // masks.row_block(SHAPE),)
        bounds.append(float(result.lower_bound.sum()))
        assert 0 <= bounds[-1] <= result.total
        assert result.gap == result.total - bounds[-1]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 0.2 * result.total  # and it is not the trivial bound


def test_no_solver_is_below_the_bound() -> None:
    """No mask has an error below the bound that SparseFW proves."""
    for seed in range(5):
        problem = synthetic("rank-deficient", *SHAPE, seed=seed).problem()
        for masks in (PerRow(0.5), Unstructured(0.5)):
            bound = solve(problem, masks, SparseFW(iterations=200)).lower_bound
            error = solve(problem, masks).objective
            assert bool(((error if masks.separable else error.sum()) >= bound).all())


@SET
def test_it_improves_on_its_start_in_total(masks: PartitionMatroid) -> None:
    ours, wanda = 0.0, 0.0
    for seed in range(5):
        problem = synthetic(rows=SHAPE[0], d=SHAPE[1], seed=seed).problem()
        ours += solve(problem, masks, SparseFW(iterations=300)).relative_error
        wanda += solve(problem, masks, Wanda()).relative_error
    assert ours < wanda


@SET
@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), RIA(), RIA(power=1.0)], ids=repr)
def test_scores_keep_the_largest_of_every_group(masks: PartitionMatroid, solver: object) -> None:
    problem = synthetic("outliers", *SHAPE).problem()
    result = solve(problem, masks, solver)
    scores = {
        "Wanda": lambda: problem.weight.abs() * problem.gram.diagonal().sqrt(),
        "Magnitude": lambda: problem.weight.abs(),
        "RIA": lambda: (
            (
                (problem.weight.abs() / problem.weight.abs().sum(1, keepdim=True))
                + problem.weight.abs() / problem.weight.abs().sum(0)
            )
            * problem.gram.diagonal().sqrt() ** solver.power
        ),
    }[type(solver).__name__]()
    flat, kept = scores.flatten(), result.mask.flatten()
    for group in groups_of(masks, SHAPE):
        inside, outside = flat[group][kept[group]], flat[group][~kept[group]]
        assert float(inside.min()) >= float(outside.max()) * (1 - 1e-6)
    assert result.status is Status.GREEDY
    assert result.iterations == 1
