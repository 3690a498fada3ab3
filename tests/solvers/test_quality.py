"""How good the masks are: against enumeration, against swaps, and whole matrices against rows."""

import pytest
import torch

from maskopt.oracles import NM, PartitionMatroid, PerRow, Unstructured
from maskopt.problems import FAMILIES, LayerReconstruction, synthetic
from maskopt.solvers import ContinuationFrankWolfe, OneSwap, Wanda, solve
from tests.helpers import minimum_errors

SEEDS = range(12)


def hits(solver: object, family: str, masks: PartitionMatroid, d: int = 12, rows: int = 32) -> tuple[float, float]:
    """Return the fraction of rows solved to optimality, and the total error over the total optimum."""
    found, error, optimum = 0, 0.0, 0.0
    for seed in SEEDS:
        instance = synthetic(family, rows, d, seed=seed)
        problem = LayerReconstruction(instance.weight.double(), instance.gram.double())
        best = minimum_errors(problem.weight, problem.gram, masks)
        result = solve(problem, masks, solver)
        found += int((result.objective <= best * (1 + 1e-9) + 1e-12 * problem.scale()).sum())
        error, optimum = error + result.total, optimum + float(best.sum())
    return found / (rows * len(SEEDS)), error / optimum


@pytest.mark.parametrize("masks", [PerRow(0.5), NM(keep=2, group=4)], ids=repr)
@pytest.mark.parametrize("family", ["independent", "correlated", "outliers", "dead"])
def test_continuation_mostly_finds_the_optimum(family: str, masks: PartitionMatroid) -> None:
    """384 rows of 12 inputs: of the families' and sets' optima 0.927 to 0.997 are found, 1.014 of the error at most."""
    rate, ratio = hits(ContinuationFrankWolfe(), family, masks)
    swap_rate, swap_ratio = hits(OneSwap(), family, masks)
    print(f"{family} {masks}: continuation {rate:.3f} {ratio:.4f}, one-swap {swap_rate:.3f} {swap_ratio:.4f}")
    assert rate >= 0.88
    assert ratio <= 1.02
    assert rate >= swap_rate
    assert ratio <= swap_ratio


@pytest.mark.parametrize("masks", [PerRow(0.5), PerRow(0.3), NM(keep=2, group=4)], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_continuation_beats_swaps_in_total(family: str, masks: PartitionMatroid) -> None:
    ours, swaps, wanda = 0.0, 0.0, 0.0
    for seed in SEEDS[:6]:
        problem = synthetic(family, 16, 32, seed=seed).problem()
        ours += solve(problem, masks, ContinuationFrankWolfe(iterations=100)).relative_error
        swaps += solve(problem, masks, OneSwap()).relative_error
        wanda += solve(problem, masks, Wanda()).relative_error
    print(f"{family} {masks}: continuation {ours:.4f}, one-swap {swaps:.4f}, Wanda {wanda:.4f}")
    assert ours <= swaps <= wanda


@pytest.mark.parametrize("keep", [0.3, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_matrix_is_no_worse_than_per_row(family: str, keep: float) -> None:
    for seed in range(2):
        problem = synthetic(family, 24, 40, seed=seed).problem()
        whole = solve(problem, Unstructured(keep))
        rows = solve(problem, PerRow(keep))
        assert int(whole.mask.sum()) == int(rows.mask.sum())
        assert whole.total <= rows.total


@pytest.mark.parametrize("family", FAMILIES)
def test_larger_tiles_are_no_worse_than_smaller_ones(family: str) -> None:
    """The sets are nested: 2:4 within 4:8 within per row; the solver's masks in the larger are no worse."""
    small, middle, large = 0.0, 0.0, 0.0
    for seed in range(2):
        problem = synthetic(family, 24, 40, seed=seed).problem()
        small += solve(problem, NM(keep=2, group=4)).relative_error
        middle += solve(problem, NM(keep=4, group=8)).relative_error
        large += solve(problem, PerRow(0.5)).relative_error
    assert large <= middle <= small


def test_more_iterations_help_in_total() -> None:
    errors = []
    for iterations in (5, 25, 200):
        total = 0.0
        for seed in range(6):
            problem = synthetic("correlated", 24, 48, seed=seed).problem()
            total += solve(problem, PerRow(0.4), ContinuationFrankWolfe(iterations=iterations)).relative_error
        errors.append(total)
    assert errors == sorted(errors, reverse=True)


def ill_conditioned(rows: int, d: int) -> LayerReconstruction:
    """A layer whose inputs have variances that fall by their number to the power of 1.5, in a random basis."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    inputs = torch.randn(8 * d, d, generator=generator, dtype=torch.float64) * torch.arange(1, d + 1) ** -0.75
    x = inputs @ basis + 0.02 * torch.randn(d, generator=generator, dtype=torch.float64)
    return LayerReconstruction(torch.randn(rows, d, generator=generator, dtype=torch.float64), x.T @ x)


@pytest.mark.parametrize("masks", [PerRow(0.4), NM(keep=2, group=4)], ids=repr)
def test_rows_that_do_not_arrive_get_more_iterations(masks: PartitionMatroid) -> None:
    problem = ill_conditioned(12, 256)
    # So few iterations that runs end far from any mask.
    short, doubled, long = (
        solve(problem, masks, ContinuationFrankWolfe(iterations=iterations, doublings=doublings, polish=False))
        for iterations, doublings in ((60, 0), (60, 2), (240, 0))
    )
    assert doubled.total < 0.9 * short.total
    assert doubled.total < 1.03 * long.total
    # Each row has its own pace, whatever rows are solved beside it (in float64, see the docstring).
    for index in (slice(0, 1), slice(5, 9)):
        alone = solve(problem.rows(index), masks, ContinuationFrankWolfe(iterations=60, doublings=2, polish=False))
        assert torch.equal(alone.mask, doubled.mask[index])


def test_iterations_that_gain_nothing_are_not_doubled() -> None:
    easy, hard = (synthetic(family, 16, 48).problem() for family in ("independent", "correlated"))
    assert solve(easy, PerRow(0.4), ContinuationFrankWolfe(doublings=6)).iterations == 420
    few, many = (solve(hard, PerRow(0.4), ContinuationFrankWolfe(doublings=number)) for number in (2, 6))
    assert few.iterations == many.iterations


@pytest.mark.parametrize(
    ("weight", "x", "optimum"),
    [
        ([3.0, 3.0, -3.0, 2.0], [[0.0, 2.0, -2.0], [1.0, -2.0, 1.0], [1.0, 0.0, -1.0], [2.0, 1.0, -1.0]], 6.0),
        ([1.0, 2.0, 1.0, -2.0], [[2.0, 0.0, 2.0], [-1.0, 2.0, 2.0], [-2.0, -1.0, -2.0], [-1.0, 1.0, 1.0]], 1.0),
    ],
)
def test_continuation_is_no_worse_than_its_start(weight: list[float], x: list[list[float]], optimum: float) -> None:
    inputs = torch.tensor(x, dtype=torch.float64)
    problem, masks = LayerReconstruction(torch.tensor([weight]).double(), inputs @ inputs.T), PerRow(0.5)
    assert minimum_errors(problem.weight, problem.gram, masks).tolist() == [optimum]
    assert solve(problem, masks, Wanda()).total == optimum
    assert solve(problem, masks).total == optimum
