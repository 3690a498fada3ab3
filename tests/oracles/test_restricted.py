"""Fixed entries: properties of the wrapper."""

import math

import pytest
import torch

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, AtMost, PartitionMatroid, PerRow, Protected, Restricted, Unstructured


def held(shape: tuple[int, int], *entries: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, column in entries:
        mask[row, column] = True
    return mask


def test_protected_entries_stay_whatever_they_cost() -> None:
    masks = Protected(PerRow(2), held((2, 4), (0, 3), (1, 0)))
    cost = torch.tensor([[0.0, 1.0, 2.0, 1e30], [math.inf, 5.0, 5.0, 4.0]])
    assert masks.lmo_mask(cost).int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1]]
    assert not masks.contains(PerRow(2).lmo_mask(cost))


def test_protecting_all_kept_entries_leaves_one_mask() -> None:
    protected = held((2, 4), (0, 1), (0, 2), (1, 0), (1, 3))
    masks = Protected(PerRow(2), protected)
    assert torch.equal(masks.lmo_mask(torch.randn(2, 4)), protected)
    assert masks.count((2, 4)) == 1
    assert torch.equal(masks.center((2, 4), torch.float32, protected.device), protected.float())


def test_nothing_protected_is_the_set_itself() -> None:
    cost = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for base in (PerRow(0.5), Unstructured(7), NM(keep=1, group=4), PartitionMatroid(2, (3, 2))):
        assert torch.equal(Protected(base, held((3, 8))).lmo_mask(cost), base.lmo_mask(cost))


@pytest.mark.parametrize(
    ("base", "entries", "sentence"),
    [
        (PerRow(1), [(1, 0), (1, 2)], "Group 1 protects 1 more entries than PerRow"),
        (Unstructured(1), [(0, 0), (1, 0), (1, 3)], "Group 0 protects 2 more entries than Unstructured"),
        (NM(keep=0, group=2), [(1, 3)], "Group 3 protects 1 more"),
        (PerRow(torch.tensor([2, 0])), [(0, 0), (1, 0)], "Group 1 protects 1 more"),
    ],
    ids=str,
)
def test_too_many_protected_entries_are_refused(
    base: PartitionMatroid, entries: list[tuple[int, int]], sentence: str
) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        Protected(base, held((2, 4), *entries))


def test_infinitely_good_entries_do_not_displace_protected_ones() -> None:
    masks = Protected(PerRow(1), held((1, 3), (0, 2)))
    assert masks.lmo_mask(torch.tensor([[-math.inf, 0.0, 5.0]])).int().tolist() == [[0, 0, 1]]


def test_protection_adds_up() -> None:
    masks = Protected(Protected(PerRow(2), held((1, 4), (0, 3))), held((1, 4), (0, 2)))
    assert masks.lmo_mask(torch.zeros(1, 4)).int().tolist() == [[0, 0, 1, 1]]


def test_rowwise_spreads_evenly() -> None:
    masks = Protected(Unstructured(8), held((4, 4), (0, 0)))
    assert masks.rowwise((4, 4)).kept_per_group((4, 4)).tolist() == [2, 2, 2, 2]


def test_the_repr_names_the_protection() -> None:
    assert "rotected" in repr(Protected(PerRow(2), held((1, 4), (0, 3))))


@pytest.mark.parametrize(
    ("base", "entries", "sentence"),
    [
        (PerRow(3), [(1, 0), (1, 2)], "Group 1 forbids 1 more entries than PerRow"),
        (Unstructured(8), [(0, 0)], "Group 0 forbids 1 more entries than Unstructured"),
        (NM(keep=1, group=2), [(1, 3), (1, 2)], "Group 3 forbids 1 more"),
    ],
    ids=str,
)
def test_too_many_forbidden_entries_are_refused(
    base: PartitionMatroid, entries: list[tuple[int, int]], sentence: str
) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        base.restrict(pruned=held((2, 4), *entries))
    assert AtMost(base).restrict(pruned=held((2, 4), *entries)).count((2, 4)) > 0


def test_a_restriction_of_nothing_is_refused() -> None:
    with pytest.raises(MaskoptError, match="got neither"):
        Restricted(PerRow(2))


def test_weights_of_another_shape_are_refused() -> None:
    masks = PerRow(2).restrict(held((2, 4), (0, 0)))
    for call in (lambda: masks.check((3, 4)), lambda: masks.lmo(torch.zeros(3, 4))):
        with pytest.raises(MaskoptError, match=r"fixes entries of a weight of shape \(2, 4\); got \(3, 4\)"):
            call()
    with pytest.raises(MaskoptError, match="divisible by 4"):
        NM(keep=2, group=4).restrict(held((2, 6), (0, 0)))


def test_at_most_of_a_restriction_stays_restricted() -> None:
    masks = AtMost(PerRow(2).restrict(held((1, 4), (0, 3)), held((1, 4), (0, 0))))
    assert masks.lmo_mask(torch.tensor([[-9.0, 1.0, -1.0, 5.0]])).int().tolist() == [[0, 0, 1, 1]]
    assert masks.count((1, 4)) == 3


def test_rowwise_counts_fixed_entries() -> None:
    masks = Unstructured(4).restrict(held((2, 4), (0, 0), (0, 1), (0, 2)), held((2, 4), (1, 3)))
    assert masks.rowwise((2, 4)).kept_per_group((2, 4)).sum() == 4
