"""Patterns of the command line."""

import math

import pytest

from maskopt.errors import MaskoptError
from maskopt.oracles import PartitionMatroid, parse_masks


@pytest.mark.parametrize(
    ("pattern", "sparsity", "kept"),
    [
        ("per-row", 0.5, [4, 4, 4]),
        ("per-row", 0.7, [3, 3, 3]),
        ("per-row", 0.0, [8, 8, 8]),
        ("per-row", 1.0, [0, 0, 0]),
        ("per-row", 1, [0, 0, 0]),
        ("per-row", 1 / 3, [6, 6, 6]),
        ("unstructured", 0.5, [12]),
        ("unstructured", 0.29, [18]),
        ("2:4", None, [2] * 6),
        ("2:4", 0.5, [2] * 6),
        ("3:4", 0.25, [3] * 6),
        ("1:4", 0.75, [1] * 6),
        ("4:8", None, [4] * 3),
        ("0:4", None, [0] * 6),
        ("4:4", 0.0, [4] * 6),
        ("1:1", None, [1] * 24),
        ("04:08", None, [4] * 3),
        ("blocks-3x2", 0.5, [3] * 4),
        ("blocks-1x8", 0.75, [2] * 3),
        ("at-most-per-row", 0.5, [4, 4, 4]),
        ("at-most-unstructured", 0.5, [12]),
        ("at-most-blocks-3x4", 0.25, [9, 9]),
        ("at-most-2:4", None, [2] * 6),
    ],
)
def test_patterns_give_their_counts(pattern: str, sparsity: float | None, kept: list[int]) -> None:
    masks = parse_masks(pattern, sparsity)
    assert isinstance(masks, PartitionMatroid)
    assert masks.kept_per_group((3, 8)).tolist() == kept
    assert masks.at_most == pattern.startswith("at-most")


@pytest.mark.parametrize(
    ("pattern", "sparsity", "number"),
    [
        ("columns", 0.5, math.comb(8, 4)),
        ("columns", 0.3, math.comb(8, 6)),
        ("rows", 0.5, math.comb(4, 2)),
        ("transposable-2:4", None, 90**2),
        ("transposable-1:4", 0.75, 24**2),
        ("transposable-1:2", None, 2**8),
    ],
)
def test_patterns_of_other_sets_are_parsed(pattern: str, sparsity: float | None, number: int) -> None:
    assert parse_masks(pattern, sparsity).count((4, 8)) == number


@pytest.mark.parametrize("third", ["1:3", "2:3", "3:7"])
def test_decimal_sparsities_of_a_pattern_are_accepted(third: str) -> None:
    keep, group = map(int, third.split(":"))
    assert parse_masks(third, 1 - keep / group).kept_per_group((1, group)).tolist() == [keep]


@pytest.mark.parametrize(
    ("pattern", "sparsity", "sentence"),
    [
        ("per-row", None, "The pattern per-row needs a sparsity between 0 and 1"),
        ("unstructured", None, "The pattern unstructured needs a sparsity"),
        ("per-row", 1.5, "The sparsity must lie between 0 and 1; got 1.5"),
        ("per-row", -0.1, "The sparsity must lie between 0 and 1; got -0.1"),
        ("per-row", math.nan, "The sparsity must lie between 0 and 1; got nan"),
        ("2:4", 50, "The sparsity must lie between 0 and 1; got 50"),
        ("2:4", 0.6, "The pattern 2:4 keeps 2 of every 4, a sparsity of 0.5, not 0.6"),
        ("1:4", 0.25, "keeps 1 of every 4, a sparsity of 0.75, not 0.25"),
        ("5:4", None, "The pattern 5:4 keeps 5 of every 4, which is impossible"),
        ("0:0", None, "impossible"),
        ("1:0", None, "impossible"),
        ("", 0.5, "There is no pattern ''; choose per-row, unstructured, columns, columns-W such as columns-64, rows"),
        ("columns", None, "The pattern columns needs a sparsity"),
        ("rows", None, "The pattern rows needs a sparsity"),
        ("blocks-4x4", None, "The pattern blocks-4x4 needs a sparsity"),
        ("blocks-0x4", 0.5, "A tile needs at least one row and one column"),
        ("blocks-4", 0.5, "There is no pattern 'blocks-4'"),
        ("blocks-4x", 0.5, "There is no pattern 'blocks-4x'"),
        ("blocks", 0.5, "There is no pattern 'blocks'"),
        ("transposable-5:4", None, "keeps 5 of every 4, which is impossible"),
        ("transposable-2:4", 0.6, "a sparsity of 0.5, not 0.6"),
        ("transposable", None, "There is no pattern 'transposable'"),
        ("at-most-columns", 0.5, "at-most- goes before sets of single entries"),
        ("at-most-transposable-2:4", None, "at-most- goes before sets of single entries"),
        ("at-most-", 0.5, "There is no pattern ''"),
        ("\u0662:\u0664", None, "There is no pattern"),
        ("perrow", 0.5, "There is no pattern 'perrow'"),
        ("Per-Row", 0.5, "There is no pattern 'Per-Row'"),
        (" 2:4", None, "There is no pattern"),
        ("2:4\n", None, "There is no pattern"),
        ("2:4:8", None, "There is no pattern"),
        ("-2:4", None, "There is no pattern"),
        ("2.0:4", None, "There is no pattern"),
        ("2/4", None, "There is no pattern"),
        (":", None, "There is no pattern"),
    ],
)
def test_bad_patterns_are_refused(pattern: str, sparsity: float | None, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        parse_masks(pattern, sparsity)
