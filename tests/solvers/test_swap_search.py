"""The search for swaps against trying every pair."""

import pytest
import torch
from torch import Tensor

from maskopt.oracles import NM, PartitionMatroid, PerRow, Unstructured
from maskopt.problems import LayerReconstruction, synthetic
from maskopt.solvers import Magnitude, OneSwap, Status, solve, swap_search
from maskopt.solvers.swap_search import SwapSearch
from tests.helpers import best_swaps, combinations, feasible
from tests.scales import improving_swap

FAMILY = ["independent", "correlated", "outliers", "rank-deficient", "dead"]
KEEP = [0.3, 0.5, 0.8]


def setting(family: str, rows: int, d: int, masks: PartitionMatroid, dtype: torch.dtype, seed: int = 0) -> tuple:
    instance = synthetic(family, rows, d, seed=seed)
    problem = LayerReconstruction(instance.weight.to(dtype), instance.gram.to(dtype))
    kept = masks.lmo_mask(torch.rand(rows, d, generator=torch.Generator().manual_seed(seed)))
    return problem, kept, problem.product(kept.to(dtype)), torch.ones(rows, dtype=torch.bool)


def changes(problem: LayerReconstruction, kept: Tensor, swaps: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return each row's change of error when all the swaps are done."""
    rows, add, drop_rows, drop = swaps
    after = kept.clone()
    assert not after[rows, add].any()
    assert after[drop_rows, drop].all()
    after[rows, add] = True
    after[drop_rows, drop] = False
    return problem.objective(after) - problem.objective(kept)


@pytest.fixture(params=["at once", "in pieces"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in pieces":
        monkeypatch.setattr(swap_search, "_BLOCK", 500)
        monkeypatch.setattr(swap_search, "_TOGETHER", 2)


@pytest.mark.usefixtures("sizes")
@combinations(
    2,
    ids=str,
    size=[(2, 2), (5, 5), (16, 16), (17, 17), (20, 20), (40, 40), (64, 64), (48, 4), (32, 16), (51, 17), (60, 20)],
    family=FAMILY,
    dtype=[torch.float64, torch.float32],
)
def test_the_best_swap_of_every_row_is_found(size: tuple[int, int], family: str, dtype: torch.dtype) -> None:
    d, width = size
    for keep in KEEP:
        masks = PerRow(keep) if width == d else NM(keep=round(keep * width), group=width)
        problem, kept, carried, dirty = setting(family, 9, d, masks, dtype)
        best, _ = best_swaps(problem, masks, kept)
        swaps = SwapSearch(problem, masks).step(kept, carried, dirty)
        rows = swaps[0]
        change = changes(problem, kept, swaps)
        tolerance = (1e-9 if dtype == torch.float64 else 1e-5) * problem.objective(kept)
        assert torch.equal(rows, swaps[2])
        assert len(rows.unique()) == len(rows)
        assert bool(((change - best)[rows].abs() <= tolerance[rows]).all())
        # Rows without a swap have no improving swap, up to a margin of a millionth of their error.
        idle = torch.ones(9, dtype=torch.bool)
        idle[rows] = False
        assert bool((best >= -3e-6 * problem.objective(kept) - tolerance)[idle].all())
        assert torch.equal(dirty, ~idle)


@pytest.mark.parametrize("family", FAMILY)
def test_rows_that_are_clean_are_left_alone(family: str) -> None:
    masks = PerRow(0.5)
    problem, kept, carried, dirty = setting(family, 8, 24, masks, torch.float64)
    dirty[::2] = False
    rows, *_ = SwapSearch(problem, masks).step(kept, carried, dirty)
    assert bool((rows % 2 == 1).all())
    assert len(rows) > 0


@pytest.mark.usefixtures("sizes")
@combinations(
    3,
    ids=lambda value: str(value.tile) if isinstance(value, PartitionMatroid) else str(value),
    masks=[
        Unstructured(0.5),
        PartitionMatroid(0.5, (2, None)),
        PartitionMatroid(0.5, (3, 8)),
        PartitionMatroid(0.5, (2, 24)),
        PartitionMatroid(0.5, (6, 1)),
        PartitionMatroid(0.5, (None, 1)),
        PartitionMatroid(1, (2, 1)),
        PartitionMatroid(0.5, (None, 24)),
    ],
    family=FAMILY,
    dtype=[torch.float64, torch.float32],
)
def test_swaps_across_rows_are_feasible_and_lower_the_error(
    masks: PartitionMatroid, family: str, dtype: torch.dtype
) -> None:
    """Every round is feasible, changes a row once and lowers the error; after the last no swap improves."""
    problem, kept, carried, dirty = setting(family, 6, 48, masks, dtype)
    search = SwapSearch(problem, masks)
    for _ in range(600):
        swaps = search.step(kept, carried, dirty)
        rows, add, drop_rows, drop = swaps
        if len(rows) == 0:
            break
        touched = torch.cat((rows, drop_rows[drop_rows != rows]))
        assert len(touched.unique()) == len(touched)
        assert bool(dirty[touched].all())
        change, total = changes(problem, kept, swaps), float(problem.objective(kept).sum())
        assert float(change.sum()) < 1e-12 * total
        kept[rows, add] = True
        kept[drop_rows, drop] = False
        assert feasible(masks, kept)
        carried = problem.product(kept.to(dtype))
    else:
        pytest.fail("no end")
    within, across = best_swaps(problem, masks, kept)
    error = problem.objective(kept)
    noise = 0.0 if dtype == torch.float64 else 1e-4
    assert bool((within >= -(2e-6 + noise) * error - 1e-12 * problem.scale()).all())
    assert across >= -(2e-6 + noise) * float(error.sum())


def test_the_first_swap_across_rows_is_the_best_if_alone() -> None:
    """Two rows: the single pair done is the best of all pairs."""
    for seed in range(20):
        masks = PartitionMatroid(0.5, (None, 1))  # every column keeps one of its two entries
        problem, kept, carried, dirty = setting("correlated", 2, 12, masks, torch.float64, seed)
        _, across = best_swaps(problem, masks, kept)
        swaps = SwapSearch(problem, masks).step(kept, carried, dirty)
        if across < -1e-6 * float(problem.objective(kept).sum()):
            assert len(swaps[0]) == 1
            assert float(changes(problem, kept, swaps).sum()) == pytest.approx(across, rel=1e-9)
        else:
            assert len(swaps[0]) == 0


def test_swaps_of_a_row_in_neither_half_are_found() -> None:
    """Whole matrices of three rows: an odd one is in neither half, yet its swaps are found in the end."""
    for seed in range(10):
        masks = Unstructured(0.4)
        problem, kept, carried, dirty = setting("correlated", 3, 10, masks, torch.float64, seed)
        search = SwapSearch(problem, masks)
        while len((swaps := search.step(kept, carried, dirty))[0]):
            rows, add, drop_rows, drop = swaps
            kept[rows, add], kept[drop_rows, drop] = True, False
            carried = problem.product(kept.double())
        within, across = best_swaps(problem, masks, kept)
        total = float(problem.objective(kept).sum())
        assert float(within.min()) >= -2e-6 * total
        assert across >= -2e-6 * total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gain", [4e-7, 1e-6, 1e-4])
def test_no_gain_is_too_small(gain: float, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 1.0 + gain, 3.0]], dtype=dtype)
    problem = LayerReconstruction(weight, torch.eye(3, dtype=dtype))
    result = solve(problem, PerRow(2), OneSwap(), start=torch.tensor([[True, False, True]]))
    assert result.status is Status.LOCAL_OPTIMUM
    assert result.mask.tolist() == [[False, True, True]]
    assert result.total == 1.0


@pytest.mark.parametrize(
    "masks",
    [
        PerRow(0.5),
        NM(keep=2, group=4),
        Unstructured(0.5),
        PartitionMatroid(0.5, (None, 1)),
        PartitionMatroid(4, (2, 4)),
    ],
    ids=lambda masks: f"{masks.name} {masks.tile}",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_local_optima_are_proven_in_whole_numbers(masks: PartitionMatroid, dtype: torch.dtype) -> None:
    """Copies, cancelling weights, scales apart: no exchange lowers the error, not even in the last digit."""
    for seed in range(12):
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 5 + seed, generator=random, dtype=torch.float64)
        weight = torch.randn(4, 8, generator=random, dtype=torch.float64)
        x[3] = x[1]
        if seed % 3 == 1:
            weight[:, 1] *= 1e7
            weight[:, 3] = -weight[:, 1]
        if seed % 3 == 2:
            weight[1] *= 1e-6
            x[5] *= 1e5
        problem = LayerReconstruction(weight.to(dtype), (x @ x.T).to(dtype))
        result = solve(problem, masks, OneSwap(start=Magnitude()))
        if result.status is Status.LOCAL_OPTIMUM:
            assert not improving_swap(problem, masks, result.mask)
        else:  # a form that is negative by rounding, in float32
            assert dtype == torch.float32
