"""Oracles against sorting, enumeration and scipy, on hard costs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from maskopt.oracles import NM, MaskSet, PartitionMatroid, PerRow, Unstructured
from tests.helpers import (
    ALL_SETS,
    DOWN_CLOSED_SETS,
    EQUAL_SETS,
    FREE_SETS,
    INTEGRAL_SETS,
    MATROIDS,
    banned_of,
    cheapest,
    costs,
    counts_of,
    every_mask,
    examples,
    feasible,
    fractions,
    groups_of,
    held_of,
    sets,
    shapes,
)

EVERY = list(ALL_SETS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def problems(
    draw: st.DrawFn,
    names: list[str] | None = None,
    dtype: torch.dtype = torch.float64,
    rows: int = 4,
    columns: int = 6,
    infinite: bool = False,
) -> tuple[MaskSet, Tensor]:
    shape = draw(shapes(rows, columns))
    return draw(sets(shape, names)), draw(costs(shape, dtype, infinite))


@given(st.data())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATROIDS)
@examples(12)
def test_lmo_is_the_sorted_answer(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    masks, cost = data.draw(problems([name], dtype, rows=6, columns=24, infinite=True))
    chosen = masks.lmo_mask(cost)
    assert torch.equal(chosen, cheapest(masks, cost))
    assert feasible(masks, chosen)
    assert masks.contains(chosen)
    vertex = masks.lmo(cost)
    assert vertex.dtype == cost.dtype
    assert torch.equal(vertex, chosen.to(cost.dtype))


@given(st.data())
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@examples(40)
def test_lmo_accepts_integers(kind: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(shapes(4, 20))
    masks = data.draw(sets(shape))
    entries = st.lists(st.integers(0, 3), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    cost = torch.tensor(data.draw(entries)).view(shape).to(kind)
    assert torch.equal(masks.lmo_mask(cost), cheapest(masks, cost.double()))


def ranked(cost: Tensor) -> Tensor:
    """Return small integers of the same order and signs, so that sums are exact."""
    sizes = torch.unique(cost.abs(), return_inverse=True)[1].view(cost.shape) + (0 if bool((cost == 0).any()) else 1)
    return (sizes * cost.sign()).double()


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(20)
def test_lmo_against_enumeration(name: str, data: st.DataObject) -> None:
    masks, cost = data.draw(problems([name], rows=3, columns=4))
    if name not in MATROIDS:
        cost = ranked(cost)
    members = every_mask(masks, tuple(cost.shape))
    best = min(math.fsum(cost[member].tolist()) for member in members)
    chosen = masks.lmo_mask(cost)
    assert feasible(masks, chosen)
    if masks.exact:
        assert math.fsum(cost[chosen].tolist()) == best
    if name not in MATROIDS:  # whose sums of costs of unlike size are rounded
        assert math.fsum(masks.lmo_bound(cost).tolist()) <= best


@given(st.data())
@pytest.mark.parametrize("name", INTEGRAL_SETS)
@examples(12)
def test_lmo_against_linear_programming(name: str, data: st.DataObject) -> None:
    masks, cost = data.draw(problems([name]))
    # HiGHS has absolute tolerances, so costs are ranked: numbers stay ordinary, ties stay ties.
    cost = ranked(cost)
    answer = masks.formulation(tuple(cost.shape)).solve(cost.flatten().numpy(), relaxed=True)
    assert answer.status == 0, answer.message
    assert float(cost[masks.lmo_mask(cost)].sum()) == pytest.approx(answer.fun, abs=1e-9)
    assert float(masks.lmo_bound(cost).sum()) == pytest.approx(answer.fun, abs=1e-9)


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(10)
def test_lmo_against_integer_programming(name: str, data: st.DataObject) -> None:
    masks, cost = data.draw(problems([name]))
    cost = ranked(cost)
    answer = masks.formulation(tuple(cost.shape)).solve(cost.flatten().numpy())
    assert answer.status == 0, answer.message
    minimum = float(masks.lmo_bound(cost).sum())
    assert minimum <= answer.fun + 1e-9
    if masks.exact:
        assert float(cost[masks.lmo_mask(cost)].sum()) == pytest.approx(answer.fun, abs=1e-9)
        assert minimum == pytest.approx(answer.fun, abs=1e-9)
    assert masks.contains(torch.from_numpy(answer.x[: cost.numel()].round().astype(bool)).view(cost.shape))


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(12)
def test_formulation_has_the_same_members(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(3, 4))
    masks = data.draw(sets(shape, [name]))
    formulation = masks.formulation(shape)
    patterns = every_mask(Unstructured(data.draw(st.integers(0, shape[0] * shape[1]))), shape)
    for pattern in patterns[:: max(1, len(patterns) // 20)]:
        assert formulation.contains(pattern.numpy()) == masks.contains(pattern) == feasible(masks, pattern)


@given(problems(EQUAL_SETS), st.sampled_from([1.0, -3.0, 1024.0]))
@examples(100)
def test_a_constant_in_the_cost_changes_nothing(case: tuple[PartitionMatroid, Tensor], constant: float) -> None:
    masks, cost = case
    cost = cost.clamp(-8, 8).mul(4).round()  # so that adding is exact
    assert torch.equal(masks.lmo_mask(cost), masks.lmo_mask(cost + constant))


@given(problems(EVERY), st.sampled_from([2.0**-90, 2.0, 2.0**90]))
@examples(100)
def test_the_unit_of_the_cost_changes_nothing(case: tuple[PartitionMatroid, Tensor], unit: float) -> None:
    masks, cost = case
    assert torch.equal(masks.lmo_mask(cost), masks.lmo_mask(cost * unit))


@given(st.data(), st.integers(0, 2**16))
@pytest.mark.parametrize("name", ["unstructured", "per-row", "n:m", "columns"])
@examples(40)
def test_permuted_rows_permute_the_answer(name: str, data: st.DataObject, seed: int) -> None:
    shape = data.draw(shapes(6, 20))
    masks = data.draw(sets(shape, [name]))
    random = torch.Generator().manual_seed(seed)
    cost = torch.randperm(shape[0] * shape[1], generator=random).view(shape).double()  # no ties
    order = torch.randperm(shape[0], generator=random)
    assert torch.equal(masks.lmo_mask(cost[order]), masks.lmo_mask(cost)[order])


@given(st.data(), st.integers(0, 2**16))
@pytest.mark.parametrize("name", FREE_SETS)
@examples(40)
def test_strided_costs_are_no_different(name: str, data: st.DataObject, seed: int) -> None:
    shape = data.draw(shapes(6, 40))
    masks = data.draw(sets(shape, [name]))
    wide = torch.randint(0, 9, (shape[1] * 2, shape[0] * 3), generator=torch.Generator().manual_seed(seed)).float()
    for cost in (wide[::2, ::3].T, wide[: shape[1], : shape[0]].T, wide[:1, :1].expand(shape)):
        before = cost.clone()
        assert torch.equal(masks.lmo_mask(cost), cheapest(masks, cost))
        assert torch.equal(cost, before)


@given(problems([name for name in EQUAL_SETS if name in MATROIDS]))
@examples(150)
def test_round_keeps_the_largest(case: tuple[PartitionMatroid, Tensor]) -> None:
    masks, x = case
    before = x.clone()
    assert torch.equal(masks.round(x), cheapest(masks, -x))
    assert torch.equal(x, before)


@given(problems(EVERY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@examples(40)
def test_round_is_the_identity_on_masks(dtype: torch.dtype, case: tuple[PartitionMatroid, Tensor]) -> None:
    masks, cost = case
    mask = masks.lmo_mask(cost)
    assert torch.equal(masks.round(mask), mask)
    assert torch.equal(masks.round(mask.to(dtype)), mask)


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(15)
def test_round_is_the_projection(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(3, 4))
    masks = data.draw(sets(shape, [name]))
    size = shape[0] * shape[1]
    x = torch.tensor(data.draw(st.lists(st.integers(0, 16), min_size=size, max_size=size))).view(shape).double() / 16
    distance = (every_mask(masks, shape).double() - x).square().sum((1, 2))
    rounded = masks.round(x)
    # Protected entries are kept whatever their value in x; among members the nearest is chosen.
    assert feasible(masks, rounded)
    if masks.exact:
        assert float((rounded.double() - x).square().sum()) == float(distance.min())


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(16)
def test_contains_agrees_with_enumeration(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(3, 5))
    masks = data.draw(sets(shape, [name]))
    near = masks.lmo_mask(data.draw(costs(shape, infinite=False))).contiguous()
    for flip in data.draw(st.lists(st.integers(0, shape[0] * shape[1] - 1), max_size=2)):
        near.view(-1)[flip] ^= True
    assert masks.contains(near) == feasible(masks, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_contains_refuses_other_types_than_bool(name: str, dtype: torch.dtype) -> None:
    masks = ALL_SETS[name]((4, 8), 0.5)
    mask = masks.lmo_mask(torch.ones(4, 8))
    assert masks.contains(mask)
    assert not masks.contains(mask.to(dtype))


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(12)
def test_enumerate_and_count_agree_with_all_patterns(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(3, 4))
    masks = data.draw(sets(shape, [name]))
    listed = list(masks.enumerate(shape))
    assert masks.count(shape) == len(listed)
    assert {tuple(mask.flatten().tolist()) for mask in listed} == {
        tuple(mask.flatten().tolist()) for mask in every_mask(masks, shape)
    }
    assert len({tuple(mask.flatten().tolist()) for mask in listed}) == len(listed)
    assert all(mask.shape == torch.Size(shape) and mask.dtype == torch.bool for mask in listed)


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(15)
def test_members_are_as_registered(name: str, data: st.DataObject) -> None:
    """Members are of one size, or closed under pruning, if the registry claims it."""
    shape = data.draw(shapes(3, 4))
    members = every_mask(data.draw(sets(shape, [name])), shape).flatten(1)
    if name in EQUAL_SETS:
        assert len(members.sum(1).unique()) == 1
    if name in DOWN_CLOSED_SETS:
        known = {tuple(member.tolist()) for member in members}
        for member in members[:: max(1, len(members) // 50)]:
            for entry in member.nonzero().flatten().tolist():
                less = member.clone()
                less[entry] = False
                assert tuple(less.tolist()) in known


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(12)
def test_center_is_in_the_relative_interior(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(3, 3))
    masks = data.draw(sets(shape, [name]))
    members = every_mask(masks, shape).flatten(1).double().numpy()
    center = masks.center(shape, torch.float64, torch.device("cpu")).flatten().numpy()
    # The largest step past the point, from the mean of all members: t > 0 unless the point is the mean.
    mean = members.mean(0)
    ahead = center - mean
    weights = np.vstack((members.T, np.ones(len(members))))
    equations = np.hstack((weights, np.append(-ahead, 0.0)[:, None]))
    answer = linprog(
        np.append(np.zeros(len(members)), -1.0), A_eq=equations, b_eq=np.append(center, 1.0), bounds=(0, 1)
    )
    assert answer.status == 0, answer.message
    assert -answer.fun > 1e-6


@given(st.data())
@pytest.mark.parametrize("name", MATROIDS)
@examples(20)
def test_center_is_the_mean_of_all_masks(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(3, 4))
    masks = data.draw(sets(shape, [name]))
    center = masks.center(shape, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(center, every_mask(masks, shape).double().mean(0), rtol=1e-12, atol=1e-12)
    center[0, 0] = 7.0  # the center is a new tensor
    assert float((center == 7.0).sum()) == 1.0


@given(st.data())
@pytest.mark.parametrize("name", FREE_SETS)
@examples(30)
def test_ungroup_inverts_groups(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(9, 12))
    masks = data.draw(sets(shape, [name]))
    matrix = torch.arange(shape[0] * shape[1]).view(shape)
    assert masks.groups(matrix).tolist() == groups_of(masks, shape)
    assert torch.equal(masks.ungroup(masks.groups(matrix), shape), matrix)
    assert masks.kept_per_group(shape).tolist() == counts_of(masks, shape)


@given(st.data())
@pytest.mark.parametrize("name", EVERY)
@examples(12)
def test_rows_are_slices(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(6, 5))
    masks = data.draw(sets(shape, [name]))
    cost = data.draw(costs(shape, infinite=False))
    row_block = masks.row_block(shape)
    assert shape[0] % row_block == 0
    assert row_block == 1 or not masks.separable
    start = data.draw(st.integers(0, shape[0] // row_block - 1)) * row_block
    index = slice(start, data.draw(st.integers(start // row_block + 1, shape[0] // row_block)) * row_block)
    cpu, some = torch.device("cpu"), (index.stop - index.start, shape[1])
    for rows in (index, torch.arange(index.start, index.stop)):
        part = masks.rows(rows, shape)
        part.check(some)
        assert torch.equal(part.lmo_mask(cost[index]), masks.lmo_mask(cost)[index])
        assert torch.equal(part.center(some, torch.float64, cpu), masks.center(shape, torch.float64, cpu)[index])
        for mine, all_rows in ((part.protected, masks.protected), (part.forbidden, masks.forbidden)):
            assert (mine is None) == (all_rows is None)
            assert mine is None or torch.equal(mine, all_rows[index])
    if name in MATROIDS:
        assert counts_of(part, some) == part.kept_per_group(some).tolist()


@given(st.data())
@examples(200)
def test_rowwise_is_a_separable_subset(data: st.DataObject) -> None:
    shape = data.draw(shapes(6, 6))
    masks = data.draw(sets(shape, MATROIDS))
    member = masks.lmo_mask(data.draw(costs(shape, infinite=False)))
    even, like = masks.rowwise(shape), masks.rowwise(shape, member)
    assert like.contains(member)
    for part in (even, like):
        assert part.separable
        chosen = part.lmo_mask(data.draw(costs(shape, infinite=False)))
        assert feasible(masks, chosen)
        assert held_of(part) == held_of(masks)
        assert banned_of(part) == banned_of(masks)
    width = masks.tile[1] or shape[1]
    assert like.kept_per_group(shape).tolist() == member.view(shape[0], -1, width).sum(2).flatten().tolist()


@given(st.data())
@pytest.mark.parametrize("name", FREE_SETS)
@examples(40)
def test_rowwise_spreads_evenly(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(6, 6))
    masks = data.draw(sets(shape, [name]))
    height, width = masks.tile[0] or shape[0], masks.tile[1] or shape[1]
    counts = masks.rowwise(shape).kept_per_group(shape).view(shape[0] // height, height, shape[1] // width)
    assert int((counts.amax(1) - counts.amin(1)).max()) <= 1
    assert counts.sum(1).flatten().tolist() == counts_of(masks, shape)


@given(st.integers(1, 5000), fractions)
@examples(300)
def test_fraction_of_a_row_is_exact(d: int, keep: float) -> None:
    # Fractions are rounded to twelve digits: 1 - 0.7 is 0.3.
    (count,) = PerRow(keep).kept_per_group((1, d)).tolist()
    assert count - 1 < keep * d <= count + 1e-9
    assert 0 <= count <= d


@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 4))
@examples(40)
def test_nm_is_per_row_within_groups(group: int, keep: int, number: int) -> None:
    keep = min(keep, group)
    masks = NM(keep=keep, group=group)
    cost = torch.arange(group * number * 2).view(2, -1).double().mul(37).remainder(11)
    pieces = [PerRow(keep).lmo_mask(piece) for piece in cost.split(group, 1)]
    assert torch.equal(masks.lmo_mask(cost), torch.cat(pieces, 1))
