"""Partition matroids: known answers, counts from fractions, and every error message."""

import math
from fractions import Fraction

import pytest
import torch

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, AtMost, Blocks, PartitionMatroid, PerRow, Unstructured
from tests.helpers import SETS, feasible, groups_of

COST = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 9.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("masks", "kept"),
    [
        (Unstructured(3), [[0, 1, 0, 1], [1, 0, 0, 0]]),
        (Unstructured(4), [[0, 1, 0, 1], [1, 0, 1, 0]]),  # the tie goes to the lower index
        (PerRow(2), [[0, 1, 0, 1], [1, 0, 1, 0]]),
        (PerRow(torch.tensor([1, 3])), [[0, 1, 0, 0], [1, 0, 1, 1]]),
        (NM(keep=1, group=2), [[0, 1, 0, 1], [1, 0, 1, 0]]),
        (PartitionMatroid(2, (2, 2)), [[0, 1, 0, 1], [1, 0, 1, 0]]),
        (PartitionMatroid(torch.tensor([3, 1]), (2, 2)), [[1, 1, 0, 1], [1, 0, 0, 0]]),
        (PartitionMatroid(1, (None, 1)), [[0, 1, 0, 1], [1, 0, 1, 0]]),
        (Unstructured(0), [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (Unstructured(1.0), [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (Blocks(2, (2, 2)), [[0, 1, 0, 1], [1, 0, 1, 0]]),
        (AtMost(PerRow(2)), [[0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
    ids=repr,
)
def test_the_oracle_gives_known_answers(masks: PartitionMatroid, kept: list[list[int]]) -> None:
    assert masks.lmo_mask(COST).int().tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_all_costs_equal_keep_the_first(name: str, dtype: torch.dtype) -> None:
    shape = (6, 20)
    masks = SETS[name](shape, 0.4)
    for value in (0, 1, -7):
        chosen = masks.lmo_mask(torch.full(shape, value, dtype=dtype))
        assert feasible(masks, chosen)
        if name in ("unstructured", "per-row", "n:m", "blocks", "columns", "row blocks"):
            for group in groups_of(masks, shape):
                kept = chosen.flatten()[group].tolist()
                assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize(
    "sparsity",
    ["0", "0.1", "0.2", "0.25", "0.29", "0.3", "0.5", "0.57", "0.58", "0.6", "0.7", "0.75", "0.9", "0.95", "0.99", "1"],
)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 10, 48, 100, 128, 384, 768, 1000, 4096, 11008, 14336])
def test_prunes_floor_of_sparsity_times_d(sparsity: str, d: int) -> None:
    # The decimal number is meant, not the binary one: 0.29 of 100 is 29 although int(0.29 * 100) is 28.
    pruned = math.floor(Fraction(sparsity) * d)
    for masks, rows in ((PerRow(1 - float(sparsity)), 1), (PerRow(1 - float(sparsity)), 3)):
        assert masks.kept_per_group((rows, d)).tolist() == [d - pruned] * rows
    assert Unstructured(1 - float(sparsity)).kept_per_group((1, d)).tolist() == [d - pruned]


@pytest.mark.parametrize("d", range(1, 60))
def test_thirds_and_sevenths_are_pruned_exactly(d: int) -> None:
    for numerator, denominator in ((1, 3), (2, 3), (1, 7), (5, 7)):
        pruned = d * numerator // denominator
        assert PerRow(1 - numerator / denominator).kept_per_group((1, d)).tolist() == [d - pruned]


def test_tiny_fractions_keep_one_entry() -> None:
    assert PerRow(1e-9).kept_per_group((1, 10)).tolist() == [1]
    assert PerRow(1 - 1e-9).kept_per_group((1, 10)).tolist() == [10]
    assert Unstructured(0.5 + 1e-8).kept_per_group((4096, 4096)).tolist() == [2**23 + 1]


def test_counts_are_exact_for_big_sets() -> None:
    assert PerRow(50).count((2, 100)) == math.comb(100, 50) ** 2
    assert Unstructured(0).count((5, 5)) == Unstructured(25).count((5, 5)) == 1


def test_enumeration_is_lexicographic() -> None:
    kept = [mask.flatten().nonzero().flatten().tolist() for mask in PerRow(2).enumerate((1, 4))]
    assert kept == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_center_has_the_type_asked_for(name: str, dtype: torch.dtype) -> None:
    center = SETS[name]((4, 12), 0.5).center((4, 12), dtype, torch.device("cpu"))
    assert center.dtype == dtype
    assert center.shape == (4, 12)


def test_sets_with_tiles_of_one_row_are_separable() -> None:
    assert PerRow(0.5).separable
    assert NM(keep=2, group=4).separable
    assert not Unstructured(0.5).separable
    assert not PartitionMatroid(2, (2, 2)).separable
    assert not PartitionMatroid(2, (None, 1)).separable


def test_reprs_show_the_settings() -> None:
    assert repr(PerRow(0.5)) == "PerRow(keep=0.5)"
    assert repr(NM(keep=2, group=4)) == "NM(keep=2, group=4)"
    assert repr(PerRow(torch.tensor([1, 2, 3]))) == "PerRow(keep=3 counts)"


# Error messages


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PerRow(1.5), r"keep as a fraction must lie in \[0, 1\]; got 1\.5"),
        (lambda: PerRow(-0.1), r"keep as a fraction must lie in \[0, 1\]; got -0\.1"),
        (lambda: PerRow(math.nan), r"keep as a fraction must lie in \[0, 1\]; got nan"),
        (lambda: PerRow(math.inf), r"must lie in \[0, 1\]"),
        (lambda: Unstructured(-1), "keep as a count must not be negative; got -1"),
        (lambda: PerRow(True), r"keep must be a fraction \(float\) or a count \(int\); got True"),
        (lambda: PerRow("0.5"), r"keep must be a fraction \(float\) or a count \(int\); got '0.5'"),
        (lambda: PerRow(None), "keep must be a fraction"),
        (lambda: PerRow([1, 2]), "keep must be a fraction"),
        (lambda: PerRow(torch.tensor([1, -2])), "keep must not be negative; group 1 has -2"),
        (lambda: PerRow(torch.tensor([0.5, 0.5])), "keep must be a vector of counts; got a torch.float32 tensor"),
        (lambda: PerRow(torch.tensor([[1]])), "keep must be a vector of counts"),
        (lambda: PerRow(torch.tensor([True])), "keep must be a vector of counts"),
        (lambda: PerRow(torch.tensor(3)), "keep must be a vector of counts"),
        (lambda: PartitionMatroid(1, (0, 4)), "A tile needs at least one row and one column"),
        (lambda: PartitionMatroid(1, (None, -1)), "A tile needs at least one row and one column"),
        (lambda: NM(keep=5, group=4), "NM needs 0 <= keep <= group; got keep=5, group=4"),
        (lambda: NM(keep=-1, group=4), "NM needs 0 <= keep <= group"),
        (lambda: NM(keep=0, group=0), "at least one"),
        (lambda: NM(keep=True, group=4), "got keep=True"),
    ],
)
def test_impossible_sets_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("masks", "shape", "sentence"),
    [
        (NM(keep=2, group=4), (3, 10), r"NM\(keep=2, group=4\) needs a number of input features divisible by 4; .* 10"),
        (PartitionMatroid(2, (2, 4)), (3, 8), "needs a number of rows divisible by 2; this weight has 3"),
        (PerRow(11), (3, 10), "wants 11 entries of a group that has 10"),
        (Unstructured(31), (3, 10), "wants 31 entries of a group that has 30"),
        (PerRow(torch.tensor([1, 11, 2])), (3, 10), "wants 11 entries of a group that has 10"),
        (PerRow(torch.tensor([1, 2])), (3, 10), "has counts for 2 groups; this weight has 3"),
        (PartitionMatroid(torch.tensor([1, 2, 3]), (3, 5)), (3, 10), "has counts for 3 groups; this weight has 2"),
    ],
    ids=str,
)
def test_sets_that_do_not_fit_are_refused(masks: PartitionMatroid, shape: tuple[int, int], sentence: str) -> None:
    cpu = torch.device("cpu")
    for call in (
        lambda: masks.lmo_mask(torch.zeros(shape)),
        lambda: masks.lmo(torch.zeros(shape)),
        lambda: masks.round(torch.zeros(shape)),
        lambda: masks.contains(torch.zeros(shape, dtype=torch.bool)),
        lambda: masks.kept_per_group(shape),
        lambda: masks.center(shape, torch.float32, cpu),
        lambda: masks.count(shape),
        lambda: next(masks.enumerate(shape)),
        lambda: masks.milp_constraints(shape),
        lambda: masks.rowwise(shape),
    ):
        with pytest.raises(MaskoptError, match=sentence):
            call()


def test_nm_takes_keywords_only() -> None:
    with pytest.raises(TypeError):
        NM(2, 4)


def test_nm_refuses_fractions() -> None:
    for keep, group in ((0.5, 4), (1.0, 4), (2.0, 4), (2, 4.0)):
        with pytest.raises(MaskoptError, match="NM needs whole numbers"):
            NM(keep=keep, group=group)


def test_at_most_keeps_entries_of_negative_cost_only() -> None:
    cost = torch.tensor([[-3.0, 1.0, 0.0, -1.0], [-1.0, -1.0, -1.0, -2.0]])
    assert AtMost(PerRow(2)).lmo_mask(cost).int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1]]
    assert AtMost(Unstructured(1)).lmo_mask(cost).int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


def test_at_most_counts_and_averages() -> None:
    masks = AtMost(PerRow(50))
    assert masks.count((2, 100)) == sum(math.comb(100, kept) for kept in range(51)) ** 2
    assert "AtMost(PerRow(keep=50))" in repr(masks)
    for size, keep in ((100, 50), (100, 3), (1001, 400), (7, 7)):
        weights = [math.comb(size, kept) for kept in range(keep + 1)]
        mean = Fraction(sum(kept * weight for kept, weight in enumerate(weights)), sum(weights) * size)
        center = AtMost(PerRow(keep)).center((1, size), torch.float64, torch.device("cpu"))
        torch.testing.assert_close(center, torch.full_like(center, float(mean)), rtol=1e-10, atol=0)


def test_the_center_of_a_big_matrix_is_near_one_half() -> None:
    fraction = AtMost(Unstructured(0.5)).center((2048, 2048), torch.float64, torch.device("cpu"))[0, 0]
    assert 0.4995 < float(fraction) < 0.5
