"""Optional methods of sets: faces, steps, projections, restrictions and neighbours, against enumeration."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import (
    AtMost,
    CanProject,
    CanRestrict,
    CanSwap,
    HasFaces,
    HasGroups,
    MaskSet,
    PerRow,
)
from tests.helpers import (
    ALL_SETS,
    INTEGRAL_SETS,
    MATROIDS,
    Shape,
    banned_of,
    costs,
    every_mask,
    examples,
    groups_of,
    held_of,
    sets,
    shapes,
)

FLOATS = [torch.float64, torch.float32]


def able(method: str) -> list[str]:
    return [name for name in ALL_SETS if hasattr(ALL_SETS[name]((4, 4), 0.5), method)]


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[MaskSet, Shape, Tensor]:
    """A set, a shape, and all its members."""
    shape = draw(shapes(3, 4))
    masks = draw(sets(shape, [name]))
    return masks, shape, every_mask(masks, shape)


@st.composite
def points(draw: st.DrawFn, members: Tensor) -> Tensor:
    """Means of a few members, float64: exact vertices, points of low faces, and inner ones."""
    chosen = draw(st.lists(st.integers(0, len(members) - 1), min_size=1, max_size=4))
    return members[chosen * (4 // len(chosen)) if len(chosen) != 3 else [*chosen, chosen[0]]].double().mean(0)


def limits(masks: MaskSet, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return A and b with hull = {x : A x <= b}, from the LP formulation, which is integral for these sets."""
    formulation = masks.formulation(shape)
    assert formulation.auxiliary == 0
    rule, size = formulation.constraints, shape[0] * shape[1]
    left = np.vstack((rule.A.toarray(), -rule.A.toarray(), np.eye(size), -np.eye(size)))
    right = np.concatenate((rule.ub, -rule.lb, np.ones(size), np.zeros(size)))
    some = np.isfinite(right)
    return left[some], right[some]


def small_costs(data: st.DataObject, shape: Shape) -> Tensor:
    size = shape[0] * shape[1]
    return torch.tensor(data.draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size))).double().view(shape)


@pytest.mark.parametrize("name", sorted({*able("inface"), *able("project")}))
def test_sets_with_faces_or_projections_are_registered_as_integral(name: str) -> None:
    """Their tests take the hull from the formulation."""
    assert name in INTEGRAL_SETS


def test_protocols_tell_the_sets_apart() -> None:
    masks = ALL_SETS["per-row"]((4, 4), 0.5)
    for protocol in (HasFaces, CanProject, CanRestrict, CanSwap, HasGroups):
        assert isinstance(masks, protocol)


@given(st.data())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", able("inface"))
@examples(15)
def test_inface_is_the_best_of_the_smallest_face(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    masks, shape, members = data.draw(cases(name))
    at = data.draw(st.one_of(points(members), st.just(masks.center(shape, torch.float64, torch.device("cpu")))))
    left, right = limits(masks, shape)
    tight = np.abs(left @ at.flatten().numpy() - right) < 1e-9
    flat = members.flatten(1).double().numpy()
    face = members[torch.from_numpy((np.abs(left[tight] @ flat.T - right[tight, None]) < 1e-9).all(0))]
    cost = small_costs(data, shape)
    # Within the tolerance, and of either sign; equal in each unit.
    sign = masks.lmo(small_costs(data, shape)).mul(2).sub(1)
    noise = data.draw(st.sampled_from([0.0, 1.0])) * sign * torch.finfo(dtype).eps
    vertex = masks.inface(cost.to(dtype), (at + noise).clamp(0, 1).to(dtype))
    assert vertex.dtype == dtype
    assert bool((face == vertex.bool()).flatten(1).all(1).any())
    assert float((cost * vertex.double()).sum()) == float((face.double() * cost).sum((1, 2)).min())


@given(st.data())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", able("max_step"))
@examples(15)
def test_max_step_goes_to_the_boundary(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    masks, shape, members = data.draw(cases(name))
    at = data.draw(points(members)).to(dtype)
    away = masks.inface(small_costs(data, shape).to(dtype), at)
    toward = masks.lmo(small_costs(data, shape).to(dtype))
    direction = data.draw(st.sampled_from([at - away, toward - at, toward - away]))
    direction = direction * data.draw(st.sampled_from([1.0, 2.0**-10, 4.0]))
    step = masks.max_step(at, direction)
    assert step.shape == (shape[0],)
    assert step.dtype == dtype
    left, right = limits(masks, shape)
    slope = left @ direction.double().flatten().numpy()
    slack = right - left @ at.double().flatten().numpy()
    limiting = slope > 1e-5 * float(direction.abs().max())
    if not limiting.any():
        assert bool(torch.isinf(step).all())
        return
    expected = float((np.maximum(slack[limiting], 0.0) / slope[limiting]).min())
    assert float(step.min()) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_full_groups_stay_full_through_many_steps(dtype: torch.dtype, sign: float) -> None:
    """Rounding changes the sum of a group; it must not be taken for slack or for a violated constraint."""
    random = torch.Generator().manual_seed(0)
    masks, small = AtMost(PerRow(300)), torch.finfo(dtype).eps
    at = torch.stack([masks.lmo(torch.rand((4, 700), generator=random).to(dtype) - 2) for _ in range(8)]).mean(0)
    at *= 1.0 + sign * 2 * small
    assert bool((sign * (at.double().sum(1) - 300) > 0).all())
    for _ in range(50):
        # Random costs are positive: only full groups have vertices of full size here.
        away, toward = (masks.inface(torch.rand((4, 700), generator=random).to(dtype), at) for _ in range(2))
        assert away.sum(1).tolist() == toward.sum(1).tolist() == [300] * 4
        for direction in (toward - at, at - away, toward - away):
            step = masks.max_step(at, direction)
            assert torch.equal(step, PerRow(300).max_step(at, direction))
        at = at + (0.5 * step).unsqueeze(1) * direction  # the last one, which magnifies no error


def _matrix(data: st.DataObject, shape: Shape) -> Tensor:
    size = shape[0] * shape[1]
    near, any_size = st.integers(-8, 12).map(lambda i: i / 4), st.floats(-1.5, 2.5, width=32)
    kinds = [near, any_size, st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1e4, 1e4, width=32)]
    entry = data.draw(st.sampled_from(kinds))
    return torch.tensor(data.draw(st.lists(entry, min_size=size, max_size=size))).double().view(shape)


@given(st.data())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", able("project"))
@examples(18)
def test_projection_is_the_nearest_point(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    masks, shape, members = data.draw(cases(name))
    x = _matrix(data, shape).to(dtype)
    before = x.clone()
    nearest = masks.project(x)
    assert torch.equal(x, before)
    assert nearest.dtype == dtype
    small = 32 * torch.finfo(dtype).eps * x.numel()
    left, right = limits(masks, shape)
    point, x = nearest.double(), x.double()
    assert bool((left @ point.flatten().numpy() <= right + small).all())
    # Nearest in a convex set: no member lies further in the direction of x.
    further = ((x - point) * (members.double() - point)).sum((1, 2))
    assert float(further.max()) <= small * (1.0 + float(x.abs().max()))


@given(st.data())
@pytest.mark.parametrize("name", able("project"))
@examples(12)
def test_projection_of_points_of_the_hull_is_the_identity(name: str, data: st.DataObject) -> None:
    masks, _, members = data.draw(cases(name))
    at = data.draw(points(members))
    torch.testing.assert_close(masks.project(at), at, rtol=0, atol=1e-14)


@given(st.data())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", able("project"))
@examples(10)
def test_projection_of_huge_points_is_feasible(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    masks, shape, _ = data.draw(cases(name))
    point = masks.project(data.draw(costs(shape, dtype, infinite=False)))
    left, right = limits(masks, shape)
    assert bool((left @ point.double().flatten().numpy() <= right + 1e-5).all())


@given(st.data())
@pytest.mark.parametrize("name", able("restrict"))
@examples(20)
def test_restrict_keeps_the_members_that_fit(name: str, data: st.DataObject) -> None:
    masks, shape, members = data.draw(cases(name))
    size = shape[0] * shape[1]
    wish = torch.tensor(data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=size, max_size=size)))
    if data.draw(st.booleans()):  # mostly something possible
        member = members[data.draw(st.integers(0, len(members) - 1))].flatten()
        wish = torch.where(wish > 0, torch.where(member, 1, 2), 0)
    kept, pruned = (wish == 1).view(shape), (wish == 2).view(shape)
    fits = members[((members | ~kept) & ~(members & pruned)).flatten(1).all(1)]
    if len(fits) == 0:
        with pytest.raises(MaskoptError):
            masks.restrict(kept, pruned)
        return
    some = masks.restrict(kept, pruned)
    twice = masks.restrict(kept=kept).restrict(pruned=pruned)
    for part in (some, twice):
        listed = {tuple(mask.flatten().tolist()) for mask in part.enumerate(shape)}
        assert listed == {tuple(mask.flatten().tolist()) for mask in fits}
        assert part.count(shape) == len(fits)
        assert held_of(part) >= set(kept.flatten().nonzero().flatten().tolist())
        assert banned_of(part) >= set(pruned.flatten().nonzero().flatten().tolist())
        cost = small_costs(data, shape)
        chosen = part.lmo_mask(cost)
        assert part.contains(chosen)
        assert float(cost[chosen].sum()) == float((fits.double() * cost).sum((1, 2)).min())
        assert all(part.contains(mask) == (tuple(mask.flatten().tolist()) in listed) for mask in members[:20])


@pytest.mark.parametrize("name", able("restrict"))
def test_an_entry_cannot_be_kept_and_pruned(name: str) -> None:
    masks = ALL_SETS[name]((4, 4), 0.5)
    entry = torch.zeros((4, 4), dtype=torch.bool)
    entry[3, 3] = True
    with pytest.raises(MaskoptError, match="both kept and pruned"):
        masks.restrict(entry, entry)
    with pytest.raises(MaskoptError, match="boolean matrix"):
        masks.restrict(entry.int())
    with pytest.raises(MaskoptError, match="shape"):
        masks.restrict(entry, entry[:2])


def _counts(masks: MaskSet, mask: Tensor) -> list[int]:
    """Return how many entries, or units, every group keeps."""
    group = _groups(masks, (mask.shape[0], mask.shape[1]))
    return [int(mask[group == number].sum()) for number in range(int(group.max()) + 1)]


def _groups(masks: MaskSet, shape: Shape) -> Tensor:
    """Return the group of each entry, by loops over tiles or units."""
    base, height, width = masks, 1, 1
    if hasattr(masks, "unit"):
        base, height, width = masks.base, masks.unit[0] or shape[0], masks.unit[1] or shape[1]
    small = (shape[0] // height, shape[1] // width)
    group = torch.full(small, -1)
    for number, entries in enumerate(groups_of(base, small)):
        group.view(-1)[entries] = number
    return group.repeat_interleave(height, 0).repeat_interleave(width, 1)


@given(st.data())
@pytest.mark.parametrize(
    "name", [name for name in able("neighbours") if name in MATROIDS or hasattr(ALL_SETS[name]((4, 4), 0.5), "unit")]
)
@examples(30)
def test_neighbours_are_one_exchange_away(name: str, data: st.DataObject) -> None:
    masks, shape, members = data.draw(cases(name))
    mask = members[data.draw(st.integers(0, len(members) - 1))]
    listed = [tuple(other.flatten().tolist()) for other in masks.neighbours(mask)]
    apart = (members ^ mask).flatten(1).sum(1)
    unit = getattr(masks, "unit", (1, 1))
    size = (unit[0] or shape[0]) * (unit[1] or shape[1])
    near = members[apart == 2 * size]
    expected = {tuple(m.flatten().tolist()) for m in near if _counts(masks, m) == _counts(masks, mask)}
    assert set(listed) == expected
    assert len(listed) == len(expected)


@given(st.data())
@pytest.mark.parametrize("name", able("swap_groups"))
@examples(30)
def test_entries_of_a_swap_group_may_be_exchanged(name: str, data: st.DataObject) -> None:
    masks, shape, members = data.draw(cases(name))
    group, height = masks.swap_groups(shape), masks.row_block(shape)
    assert group.shape == shape
    for number in set(group[group >= 0].tolist()):
        rows = (group == number).nonzero()[:, 0]
        assert int(rows.min()) // height == int(rows.max()) // height  # it lies in one row block
    mask = members[data.draw(st.integers(0, len(members) - 1))].flatten()
    known, group = {tuple(member.tolist()) for member in members.flatten(1)}, group.flatten()
    kept, pruned = ((wanted & (group >= 0)).nonzero().flatten().tolist() for wanted in (mask, ~mask))
    for old in kept:
        for new in pruned:
            if group[old] == group[new]:
                other = mask.clone()
                other[old], other[new] = False, True
                assert tuple(other.tolist()) in known
