"""How many weights the masks of a pattern can keep, against the masks themselves."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskopt.errors import MaskoptError
from maskopt.oracles import Counts, MaskSet, parse_masks
from tests.helpers import Shape, examples, fractions

# On a weight of 4 x 8: the step and the count that keeps all.
PATTERNS = {
    "per-row": (4, 8),
    "unstructured": (1, 32),
    "columns": (4, 8),
    "rows": (8, 4),
    "blocks-2x4": (4, 8),
    "blocks-1x1": (32, 1),
    "blocks-4x8": (1, 32),
    "2:4": (8, 4),
    "0:8": (4, 8),
    "1:1": (32, 1),
    "transposable-2:4": (8, 4),
    "transposable-1:2": (16, 2),
    "at-most-per-row": (4, 8),
    "at-most-unstructured": (1, 32),
    "at-most-blocks-2x2": (8, 4),
    "at-most-2:8": (4, 8),
}
SHAPE = 4, 8
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def kept(masks: MaskSet, shape: Shape, seed: int, sign: int = -1) -> int:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    mask = masks.lmo_mask(sign * scores)
    assert masks.contains(mask)
    return int(mask.sum())


def of_sparsity(pattern: str, sparsity: float, most: int) -> MaskSet:
    """Return the set that `parse_masks` makes; of "n:m", n is what a row of m inputs keeps."""
    head, colon, _ = pattern.rpartition(":")
    if not colon:
        return parse_masks(pattern, sparsity)
    row = parse_masks("per-row", sparsity).kept_per_group((1, most))
    return parse_masks(f"{head.rstrip('0123456789')}{int(row)}:{most}")


@each_pattern
def test_steps(pattern: str) -> None:
    counts = Counts(pattern, SHAPE)
    assert (counts.step, counts.most) == PATTERNS[pattern]


@each_pattern
def test_masks_keep_the_count(pattern: str) -> None:
    counts = Counts(pattern, SHAPE)
    for count in range(counts.most + 1):
        masks = counts.masks(count)
        assert kept(masks, SHAPE, count) == count * counts.step
        # Where every entry costs something, only sets of at most so many keep none.
        assert kept(masks, SHAPE, count, sign=1) == (0 if pattern.startswith("at-most-") else count * counts.step)
        assert counts.sparsity(count) == pytest.approx(1 - count * counts.step / 32, rel=0.0, abs=1e-15)
        assert counts.of(counts.sparsity(count)) == count
    assert kept(counts.masks(counts.most), SHAPE, 0) == 32


@each_pattern
def test_sets_of_a_count_are_those_of_the_pattern(pattern: str) -> None:
    counts = Counts(pattern, SHAPE)
    named = of_sparsity(pattern, 0.5, counts.most)
    masks = counts.masks(counts.of(0.5))
    assert type(masks) is type(named)
    assert masks.count(SHAPE) == named.count(SHAPE)
    assert masks.separable == named.separable
    assert masks.row_block(SHAPE) == named.row_block(SHAPE)


@pytest.mark.parametrize("sparsity", [index / 40 for index in range(41)] + [1 / 3, 2 / 3, 1e-15, 1 - 1e-15, 0.7, 0.29])
@each_pattern
def test_counts_of_sparsities_are_those_of_the_pattern(pattern: str, sparsity: float) -> None:
    counts = Counts(pattern, SHAPE)
    named = of_sparsity(pattern, sparsity, counts.most)
    assert counts.of(sparsity) * counts.step == kept(named, SHAPE, 0)


@st.composite
def fitting(draw: st.DrawFn) -> tuple[str, Shape]:
    """A pattern and a shape that it fits."""
    height, width, down, across = (draw(st.integers(1, 5)) for _ in range(4))
    patterns = {
        f"blocks-{height}x{width}": (height * down, width * across),
        f"{draw(st.integers(0, width))}:{width}": (down, width * across),
        f"transposable-{draw(st.integers(0, width))}:{width}": (width * down, width * across),
        **dict.fromkeys(["per-row", "unstructured", "columns", "rows"], (height * down, width * across)),
    }
    pattern, shape = draw(st.sampled_from(sorted(patterns.items())))
    limited = pattern not in ("columns", "rows") and "transposable" not in pattern and draw(st.booleans())
    return "at-most-" * limited + pattern, shape


@given(fitting(), fractions, st.integers(0, 99))
@examples(300)
def test_counts_and_masks_agree_on_any_shape(case: tuple[str, Shape], sparsity: float, seed: int) -> None:
    pattern, shape = case
    counts = Counts(pattern, shape)
    assert counts.step * counts.most == shape[0] * shape[1]
    count = counts.of(sparsity)
    assert kept(counts.masks(count), shape, seed) == counts.step * count
    assert kept(of_sparsity(pattern, sparsity, counts.most), shape, seed) == counts.step * count
    # What is kept is rounded up: one less would prune more than asked.
    assert counts.sparsity(count) <= sparsity + 1e-9
    assert count == 0 or counts.sparsity(count - 1) > sparsity


@pytest.mark.parametrize("columns", [11008, 14336, 99991])
def test_large_layers_round_as_the_pattern_does(columns: int) -> None:
    counts = Counts("per-row", (1, columns))
    for sparsity in (0.7, 0.29, 1 / 3, 0.1, 1 - 1e-6, *(1 - count / columns for count in range(0, columns, 97))):
        assert counts.of(sparsity) == int(parse_masks("per-row", sparsity).kept_per_group((1, columns))), sparsity
    for count in range(0, columns + 1, 7):
        assert counts.of(counts.sparsity(count)) == count
    assert counts.of(0.0) == counts.most == columns


@pytest.mark.parametrize(
    ("pattern", "shape", "sentence"),
    [
        ("2:4", (4, 6), "needs a number of input features divisible by 4; this weight has 6"),
        ("at-most-2:4", (4, 6), "needs a number of input features divisible by 4; this weight has 6"),
        ("transposable-2:4", (4, 6), "divisible by 4"),
        ("transposable-2:4", (6, 4), "divisible by 4"),
        ("blocks-3x2", (4, 6), "needs a number of rows divisible by 3; this weight has 4"),
        ("blocks-2x4", (4, 6), "needs a number of input features divisible by 4; this weight has 6"),
        ("at-most-blocks-2x4", (4, 6), "needs a number of input features divisible by 4"),
        ("blocks-0x2", (4, 6), "A tile needs at least one row and one column"),
        ("blocks-2", (4, 6), "There is no pattern 'blocks-2'"),
        ("perrow", (4, 6), "There is no pattern 'perrow'"),
        ("", (4, 6), "There is no pattern ''"),
        (":", (4, 6), "There is no pattern ':'"),
        ("2:4:8", (4, 8), "There is no pattern '2:4:8'"),
        ("5:4", (4, 8), "keeps 5 of every 4, which is impossible"),
        ("0:0", (4, 8), "impossible"),
        ("at-most-", (4, 6), "There is no pattern ''"),
        ("at-most-columns", (4, 6), "at-most- goes before sets of single entries"),
        ("at-most-rows", (4, 6), "at-most- goes before sets of single entries"),
        ("at-most-transposable-2:4", (4, 8), "at-most- goes before sets of single entries"),
        (None, (4, 6), "A pattern is a word such as per-row or 2:4; got None"),
    ],
)
def test_patterns_that_do_not_exist_or_fit_are_refused(pattern: Any, shape: Shape, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        Counts(pattern, shape)


def test_a_pattern_that_is_parsed_has_counts() -> None:
    pattern = "at-most-at-most-per-row"
    assert parse_masks(pattern, 0.5).count((1, 4)) == 11
    assert Counts(pattern, (1, 4)).masks(2).count((1, 4)) == 11
