"""Units of entries that are kept or pruned together: known answers and error messages."""

import pytest
import torch

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, CanSwap, Columns, HasFaces, PerRow, Rows, Units, Unstructured

COST = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 9.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("masks", "kept"),
    [
        (Columns(2), [[1, 0, 0, 1], [1, 0, 0, 1]]),
        (Columns(0.25), [[0, 0, 0, 1], [0, 0, 0, 1]]),
        (Rows(1), [[1, 1, 1, 1], [0, 0, 0, 0]]),
        (Units(PerRow(1), (1, 2)), [[0, 0, 1, 1], [0, 0, 1, 1]]),
        (Units(NM(keep=1, group=2), (2, 2)), [[0, 0, 1, 1], [0, 0, 1, 1]]),
        (Units(Unstructured(1), (2, 2)), [[0, 0, 1, 1], [0, 0, 1, 1]]),
    ],
    ids=str,
)
def test_the_oracle_gives_known_answers(masks: Units, kept: list[list[int]]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        chosen = masks.lmo(COST.to(dtype))
        assert chosen.dtype == dtype
        assert chosen.int().tolist() == kept
    assert masks.lmo_mask(COST.int()).int().tolist() == kept


def test_half_precision_sums_do_not_lose_entries() -> None:
    cost = torch.ones(2000, 2, dtype=torch.bfloat16)
    cost[-1, 0] = 2.0
    assert Columns(1).lmo_mask(cost)[0].tolist() == [False, True]


def test_single_entries_cannot_be_exchanged() -> None:
    assert not isinstance(Columns(2), CanSwap)
    assert isinstance(Columns(2), HasFaces)


def test_reprs_name_the_units() -> None:
    assert "columns" in repr(Columns(2))
    assert "rows" in repr(Rows(2))
    assert "2 x all" in repr(Units(PerRow(1), (2, None)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Units(PerRow(1), (0, 1)), "A unit needs at least one row and one column"),
        (lambda: Units(PerRow(1).restrict(torch.ones(2, 4) < 0), (1, 1)), "Units restrict themselves"),
        (lambda: Columns(5).check((2, 4)), "wants 5 entries of a group that has 4"),
        (lambda: Units(PerRow(1), (3, 1)).check((2, 4)), "needs a number of rows divisible by 3; this weight has 2"),
        (lambda: Units(PerRow(1), (1, 3)).check((2, 4)), "needs a number of input features divisible by 3"),
        (lambda: Columns(2).restrict(torch.eye(2, 4) > 0, torch.eye(2, 4).flip(0) > 0), r"Unit \(0, 0\) holds"),
        (lambda: Columns(2).restrict(torch.eye(2, 4) > 0).check((3, 4)), r"fixes entries of shape \(2, 4\); got"),
        (lambda: Columns(1).restrict(torch.eye(2, 4) > 0), "protects 1 more entries"),
    ],
)
def test_units_that_do_not_fit_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        make()
