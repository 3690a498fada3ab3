"""`smallest`: exactly k per row, ties to the lower index, on every code path and in every type."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from maskopt.oracles import PerRow, select, smallest

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def reference(cost: Tensor, keep: int | Tensor) -> Tensor:
    counts = keep.tolist() if isinstance(keep, Tensor) else [keep] * len(cost)
    chosen = torch.zeros_like(cost)
    for row, (values, count) in enumerate(zip(cost.tolist(), counts, strict=True)):
        order = sorted(range(len(values)), key=lambda index: (values[index], index))
        chosen[row, order[:count]] = 1
    return chosen


def ties(rows: int, size: int, dtype: torch.dtype, levels: int = 5) -> Tensor:
    random = torch.Generator().manual_seed(rows * 1000 + size)
    return torch.randint(-levels, levels, (rows, size), generator=random).to(dtype)


@pytest.fixture(params=["quickselect", "topk", "ranks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both algorithms for the k-th entry, of which the second is used on accelerators; and ranks, as of many rows."""
    if request.param == "ranks":
        monkeypatch.setattr(select, "_FEW", 0)
    if request.param == "topk":

        def forbidden(*_: object, **__: object) -> None:
            raise AssertionError("numpy is for the CPU")

        monkeypatch.setattr(select, "_kth_smallest", _topk_branch(select._kth_smallest))
        monkeypatch.setattr(np, "partition", forbidden)
    return request.param


def _topk_branch(kth: object) -> object:
    """Return the function as it runs on a device other than the CPU."""

    class Elsewhere:
        type = "cuda"

    class Disguised(Tensor):
        device = Elsewhere()

    return lambda cost, k: kth(cost.as_subclass(Disguised), k).as_subclass(Tensor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 18, 33, 257])
def test_sizes_around_the_switch_of_algorithms_are_exact(size: int, dtype: torch.dtype, path: str) -> None:
    cost = ties(7, size, dtype)
    for keep in sorted({0, 1, size // 3, size // 2, size - 1, size}):
        chosen = smallest(cost, keep)
        assert chosen.dtype == dtype
        assert torch.equal(chosen, reference(cost, keep))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 40])
def test_every_row_may_have_its_own_count(size: int, dtype: torch.dtype, path: str) -> None:
    for low, high in itertools.combinations_with_replacement(sorted({0, 1, size // 2, size}), 2):
        keep = torch.linspace(low, high, 9).round().long()
        cost = ties(9, size, dtype)
        assert torch.equal(smallest(cost, keep), reference(cost, keep))


@pytest.mark.parametrize("size", [4, 16, 17, 50])
@pytest.mark.parametrize(
    "values",
    [[0.0, -0.0], [math.inf, -math.inf], [-math.inf], [math.inf], [3.0], [1e30, -1e30, 1e-30, 0.0], [5e-324, 0.0]],
    ids=str,
)
def test_edge_case_values_are_ordered(values: list[float], size: int, path: str) -> None:
    cost = torch.tensor(values, dtype=torch.float64).repeat(size)[: 3 * size].repeat(3)[: 3 * size].view(3, size)
    for keep in (0, 1, size // 2, size - 1, size, torch.tensor([0, size // 2, size])):
        assert torch.equal(smallest(cost, keep), reference(cost, keep))


@pytest.mark.parametrize("size", [12, 16, 17, 64])
def test_strided_input_is_accepted_and_not_modified(size: int, path: str) -> None:
    wide = ties(2 * size, 12, torch.float32)
    for cost in (wide[:size].T, wide[::2, ::3].T, wide[:1, :1].expand(4, size), wide.T[:, ::2]):
        before = cost.clone()
        for keep in (size // 2, torch.arange(len(cost)) % size):
            assert torch.equal(smallest(cost, keep), reference(cost, keep))
        assert torch.equal(cost, before)


def test_costs_that_require_gradients_are_accepted() -> None:
    for size in (8, 40):
        cost = torch.randn(2, size, requires_grad=True)
        assert torch.equal(smallest(cost, 3), reference(cost.detach(), 3))


@pytest.mark.parametrize("keep", [0, 1, 123_456, 1_000_000])
def test_a_million_entries_are_selected_exactly(keep: int, path: str) -> None:
    cost = ties(1, 1_000_000, torch.float32, levels=1000)
    chosen = smallest(cost, keep)
    order = np.argsort(cost[0].numpy(), kind="stable")  # the stable order is the order by (cost, index)
    assert torch.equal(chosen[0].nonzero().flatten(), torch.from_numpy(np.sort(order[:keep])))


def test_counts_beyond_float32_are_exact() -> None:
    cost = torch.zeros(1, 2**24 + 5)
    chosen = PerRow(2**24 + 1).lmo_mask(cost)
    assert int(chosen.sum()) == 2**24 + 1
    assert bool(chosen[0, : 2**24 + 1].all())


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 4099), (torch.float16, 9001), (torch.bfloat16, 601), (torch.bfloat16, 5003)]
)
@pytest.mark.parametrize("levels", [2, 3000])
def test_half_precision_counts_are_exact(dtype: torch.dtype, size: int, levels: int) -> None:
    cost = ties(3, size, dtype, levels)
    for keep in (size // 2, size // 3, size - 7, 1):
        assert smallest(cost, keep).double().sum(1).tolist() == [keep] * 3


def test_no_rows_give_an_empty_mask() -> None:
    assert smallest(torch.empty(0, 5), 2).shape == (0, 5)
    assert smallest(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0, 5)
