"""The published rules: figures worked out by hand, and what must hold for any statistics at any scale."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.allocation.rules import alpha_pruning, atp, atp_slopes, dlp, hill_exponent, lsa, outlier_share, owl
from maskopt.errors import MaskoptError
from tests.helpers import examples

Rule = Callable[..., list[float]]

# Whether a larger statistic makes a block sparser.
RULES: dict[str, tuple[Rule, bool]] = {
    "owl": (owl, False),
    "dlp": (dlp, True),
    "alpha": (alpha_pruning, True),
    "lsa": (lsa, True),
}
each_rule = pytest.mark.parametrize(("rule", "rising"), RULES.values(), ids=RULES)

scales = st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30])
statistics = st.lists(st.tuples(st.floats(0.0, 1.0), scales), min_size=1, max_size=9).map(
    lambda pairs: [number * scale for number, scale in pairs]
)
targets = st.one_of(st.sampled_from([0.0, 0.01, 0.5, 0.99]), st.floats(0.0, 0.999))


def mean(sparsities: list[float], sizes: list[int]) -> float:
    return math.fsum(s * n for s, n in zip(sparsities, sizes, strict=True)) / sum(sizes)


# Figures by hand


def test_owl() -> None:
    # (D - 1) / (5 - 1) * 2 * .08 = 0, .16, .04, of mean .0666...; .7 + .0666... minus these.
    expected = [0.7666666667, 0.6066666667, 0.7266666667]
    assert owl([0.01, 0.05, 0.02], [10, 10, 10], 0.7) == pytest.approx(expected, abs=1e-9)


def test_owl_weights_the_mean_by_size() -> None:
    # 0, .16 of mean (3 * 0 + 1 * .16) / 4 = .04.
    assert owl([1.0, 2.0], [30, 10], 0.7) == pytest.approx([0.74, 0.58], abs=1e-12)


def test_dlp_is_its_formula() -> None:
    # Importances 1 - m / 8: 7/8, 5/8, 4/8; scaled by 8/3 * .3: .3, .1, 0, of mean .4 / 3; .7 + .4 / 3 minus these.
    expected = [0.5333333333, 0.7333333333, 0.8333333333]
    assert dlp([1.0, 3.0, 4.0], [10, 10, 10], 0.7) == pytest.approx(expected, abs=1e-9)


def test_alpha_pruning_is_scaled_not_shifted() -> None:
    # .7 + .6 * (0, 1, 1/4) = .7, 1.3, .85 of sum 2.85; times .5 * 3 / 2.85.
    expected = [0.7 * 1.5 / 2.85, 1.3 * 1.5 / 2.85, 0.85 * 1.5 / 2.85]
    assert alpha_pruning([2.0, 6.0, 3.0], [10, 10, 10], 0.5) == pytest.approx(expected, abs=1e-12)
    # Of sizes 30 and 10: (30 * .7 + 10 * 1.3) = 34; times .5 * 40 / 34.
    assert alpha_pruning([2.0, 6.0], [30, 10], 0.5) == pytest.approx([0.7 * 20 / 34, 1.3 * 20 / 34], abs=1e-12)


def test_lsa() -> None:
    # (e - 2) / 8 * .14 = 0, .14, .035 of mean .175 / 3.
    expected = [0.7 - 0.175 / 3, 0.84 - 0.175 / 3, 0.735 - 0.175 / 3]
    assert lsa([2.0, 10.0, 4.0], [10, 10, 10], 0.7) == pytest.approx(expected, abs=1e-12)


def test_atp() -> None:
    assert atp(4, [10] * 4, 0.7, 0.1) == pytest.approx([0.55, 0.65, 0.75, 0.85], abs=1e-12)
    assert atp(1, [10], 0.7, 0.1) == pytest.approx([0.7], abs=1e-12)


def test_atp_slopes_are_those_of_the_paper() -> None:
    # 2 * .3 / 31 = .01935, so .002, ..., .018: nine of them.
    assert atp_slopes(0.7, 32) == pytest.approx([0.002 * k for k in range(1, 10)])
    assert atp_slopes(0.5, 11) == pytest.approx([0.002 * k for k in range(1, 51)])  # up to .1 itself
    assert len(atp_slopes(0.3, 4)) == 100  # up to .2, though .6 / 3 / .002 is less than 100 in floating point
    assert atp_slopes(0.25, 3, step=0.1) == pytest.approx([0.1, 0.2])
    assert atp_slopes(0.0, 32) == atp_slopes(0.5, 1) == []


def test_what_leaves_the_range_is_cut_off_and_made_up_for() -> None:
    # (0, .4, .8) is shifted by .4 for a mean of .8, but .8 + .4 is cut off to 1, so the others share 1.4: .5, .9.
    assert lsa([0.0, 1.0, 2.0], [10, 10, 10], 0.8, spread=0.4) == pytest.approx([0.5, 0.9, 1.0], abs=1e-12)
    # For a mean of .2 by -.2: the first is cut off to 0, so the others share .6: .1, .5.
    assert lsa([0.0, 1.0, 2.0], [10, 10, 10], 0.2, spread=0.4) == pytest.approx([0.0, 0.1, 0.5], abs=1e-12)
    # Factors .5, 1, 1.5 for a mean of .8: 1.5 * .8 is cut off, the others share 1.4 as 1 to 2.
    expected = [1.4 / 3, 2.8 / 3, 1.0]
    assert alpha_pruning([0.0, 1.0, 2.0], [10, 10, 10], 0.8, spread=0.5) == pytest.approx(expected, abs=1e-12)


def test_outlier_share() -> None:
    # Mean (16 * 1 + 40 + 24) / 18 = 4.44..., five times that is 22.22...
    scores = torch.cat([torch.ones(16), torch.tensor([40.0, 24.0])]).view(2, 9)
    assert outlier_share(scores) == 2 / 18
    # The mean is over both matrices: that of the second alone, 32, has none above five times it.
    assert outlier_share([torch.ones(2, 8), torch.tensor([[40.0, 24.0]])]) == 2 / 18
    assert outlier_share(scores, threshold=6.0) == 1 / 18  # 26.66...
    assert outlier_share(torch.zeros(2, 3)) == 0.0
    assert outlier_share(torch.ones(2, 3), threshold=1.0) == 0.0  # strictly above


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_outlier_share_of_many_scores(dtype: torch.dtype) -> None:
    # Sums in half precision would end at 2048 or overflow.
    scores = torch.ones(300, 300, dtype=dtype)
    scores[:3] = 64.0  # mean 1 + 63 / 100
    assert outlier_share(scores) == 0.01
    # 5 * (404 + 5.0625) / 405 = 5.0502, which bfloat16 rounds to 5.0625.
    scores = torch.ones(405, dtype=dtype)
    scores[7] = 5.0625
    assert outlier_share(scores) == 1 / 405


def test_hill_exponent() -> None:
    # Squared singular values 1, 4, 16, 64, 256; the median upwards 16, 64, 256: 1 + 3 / (log 4 + log 16).
    weight = torch.diag(torch.tensor([4.0, 16.0, 1.0, 8.0, 2.0], dtype=torch.float64))
    expected = 1 + 3 / (math.log(4) + math.log(16))
    assert hill_exponent(weight) == pytest.approx(expected, rel=1e-12)
    wide = torch.cat([weight, torch.zeros(5, 3, dtype=torch.float64)], 1)  # W^T W has three zero eigenvalues more
    assert hill_exponent(wide) == pytest.approx(expected, rel=1e-12)
    assert hill_exponent(wide.T) == pytest.approx(expected, rel=1e-12)
    # Of an even number, 1, 4, 16, 64, the two from the middle: 1 + 2 / log 4.
    even = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64))
    assert hill_exponent(even) == pytest.approx(1 + 2 / math.log(4), rel=1e-12)
    # Zero singular values, exact or by rounding, are left out.
    dead = torch.zeros(9, 9, dtype=torch.float64)
    dead[:5, :5] = weight
    assert hill_exponent(dead) == pytest.approx(expected, rel=1e-12)
    left, right = torch.linalg.qr(torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0)).double())[0]
    assert hill_exponent(left @ dead @ right) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_hill_exponent_is_of_any_scale_and_basis(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    squares = torch.linalg.eigvalsh(weight @ weight.T)
    expected = 1 + 6 / float((squares[6:] / squares[6]).log().sum())
    assert hill_exponent(weight) == pytest.approx(expected, rel=1e-9)
    assert hill_exponent(weight * scale) == pytest.approx(expected, rel=1e-9)


def test_heavier_tails_have_smaller_exponents() -> None:
    light, heavy = (torch.diag(torch.arange(1.0, 33.0).pow(power)) for power in (0.25, 2.0))
    assert 1 < hill_exponent(heavy) < hill_exponent(light)


# Properties


@each_rule
@examples(200)
@given(st.data(), statistics, targets, st.floats(0.0, 0.99))
def test_mean_range_and_order(
    rule: Rule, rising: bool, data: st.DataObject, statistic: list[float], target: float, spread: float
) -> None:
    sizes = [data.draw(st.integers(1, 10**9)) for _ in statistic]
    found = rule(statistic, sizes, target, spread=spread)
    assert mean(found, sizes) == pytest.approx(target, abs=1e-9)
    assert all(0.0 <= sparsity <= 1.0 for sparsity in found)
    ordered = sorted(zip(statistic, found, strict=True), reverse=not rising)
    assert all(first[1] <= second[1] + 1e-12 for first, second in pairwise(ordered))
    # Equal statistics, equal sparsities.
    assert all(first[1] == second[1] for first, second in pairwise(ordered) if first[0] == second[0])
    same = rule(torch.tensor(statistic, dtype=torch.float64), torch.tensor(sizes), target, spread=spread)
    assert same == found


@each_rule
@examples(100)
@given(statistics, scales, st.floats(0.3, 0.7))
def test_scale_does_not_matter_and_the_spread_does(
    rule: Rule, rising: bool, statistic: list[float], scale: float, target: float
) -> None:
    sizes = [64] * len(statistic)
    found = rule(statistic, sizes, target, spread=0.1)
    assert rule([number * scale for number in statistic], sizes, target, spread=0.1) == pytest.approx(found, abs=1e-9)
    if min(statistic) == max(statistic):
        assert found == pytest.approx([target] * len(statistic), abs=1e-12)
    elif rule is alpha_pruning:
        assert max(found) / min(found) == pytest.approx(1.1 / 0.9)
    else:
        assert max(found) - min(found) == pytest.approx(0.2)


@examples(200)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), targets, st.floats(0.0, 1.0))
def test_atp_rises_and_keeps_the_mean(sizes: list[int], target: float, slope: float) -> None:
    found = atp(len(sizes), sizes, target, slope)
    assert mean(found, sizes) == pytest.approx(target, abs=1e-9)
    assert all(0.0 <= sparsity <= 1.0 for sparsity in found)
    assert all(first <= second for first, second in pairwise(found))


@examples(100)
@given(st.integers(2, 80), st.floats(0.05, 0.95))
def test_slopes_are_feasible_and_the_next_is_not(blocks: int, target: float) -> None:
    slopes = atp_slopes(target, blocks)
    for slope in slopes:  # not cut off: a progression to its ends
        found = torch.tensor(atp(blocks, [64] * blocks, target, slope), dtype=torch.float64)
        assert torch.allclose(found.diff(), torch.full((blocks - 1,), slope, dtype=torch.float64), rtol=0, atol=1e-9)
    half = 0.002 * (len(slopes) + 1) * (blocks - 1) / 2
    assert half > min(target, 1 - target) - 1e-9


@pytest.mark.parametrize("statistic", [[5e-324, 1e-323, 0.0], [1e308, 1e307, 0.0], [1.0, 1.0 + 2**-52, 1.0]])
@each_rule
def test_least_and_largest_numbers(rule: Rule, rising: bool, statistic: list[float]) -> None:
    found = rule(statistic, [3, 2, 1], 0.5)
    assert mean(found, [3, 2, 1]) == pytest.approx(0.5, abs=1e-9)
    assert all(0.0 <= sparsity <= 1.0 for sparsity in found)


def test_many_matrices_of_experts_fit() -> None:
    count = 20_000  # a table of all against all would take 3 GB
    found = lsa(torch.arange(float(count)), [64] * count, 0.9, spread=0.2)
    assert mean(found, [64] * count) == pytest.approx(0.9, abs=1e-9)
    assert max(found) == 1.0


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 0.5), "must be a list of numbers"),
        ((3.0, [1], 0.5), "must be a list of numbers.*got 3.0"),
        (("abc", [1], 0.5), "must be a list of numbers.*got 'abc'"),
        ((None, [1], 0.5), "must be a list of numbers.*got None"),
        (([[1.0]], [1], 0.5), "must be a list of numbers"),
        (([1.0, 2.0], [1], 0.5), "one size for each of the 2 .*got 1 sizes"),
        (([1.0, math.nan], [1, 1], 0.5), "need .*number.*; block 1 has nan"),
        (([1.0, math.inf], [1, 1], 0.5), "need .*number.*; block 1 has inf"),
        (([1.0, 2.0], [1, 0], 0.5), "sizes need .*number >= 1; block 1 has 0"),
        (([1.0, 2.0], [], 0.5), "sizes must be a list"),
        (([1.0], [1], 1.0), r"need sparsity in \[0, 1\); got 1.0"),
        (([1.0], [1], -0.1), r"need sparsity in \[0, 1\); got -0.1"),
        (([1.0], [1], math.nan), r"need sparsity in \[0, 1\); got nan"),
        (([1.0], [1], 0.5, 1.5), r"need spread in \[0, 1.*got 1.5"),
        (([1.0], [1], 0.5, -0.5), r"need spread in \[0, 1.*got -0.5"),
    ],
)
@each_rule
def test_wrong_arguments(rule: Rule, rising: bool, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(MaskoptError, match=message) as caught:
        rule(*arguments)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", [owl, dlp, lsa, alpha_pruning])
def test_negative_statistics(rule: Rule) -> None:
    with pytest.raises(MaskoptError, match="number >= 0; block 0 has -1"):
        rule([-1.0, 1.0], [1, 1], 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: atp(3, [1, 1], 0.5, 0.1), "one size for each of the 3 depths; got 2 sizes"),
        (lambda: atp(0, [], 0.5, 0.1), "blocks from 1"),
        (lambda: atp(2, [1, 1], 0.5, -0.1), "slope"),
        (lambda: atp_slopes(1.0, 3), "sparsity"),
        (lambda: atp_slopes(0.5, 0), "blocks >= 1"),
        (lambda: atp_slopes(0.5, 3, step=0.0), "step"),
        (lambda: alpha_pruning([1.0, 2.0], [1, 1], 0.5, spread=1.0), r"spread in \[0, 1\)"),
        (lambda: outlier_share([]), "without scores"),
        (lambda: outlier_share(torch.ones(0, 3)), "without scores"),
        (lambda: outlier_share(torch.tensor([1.0, -1.0])), "not negative"),
        (lambda: outlier_share(torch.tensor([1.0, math.nan])), "finite"),
        (lambda: outlier_share(torch.ones(3), threshold=-1.0), "threshold"),
        (lambda: outlier_share(None), "must be a torch tensor"),  # type: ignore[arg-type]
        (lambda: hill_exponent(torch.ones(3)), "finite matrix"),
        (lambda: hill_exponent(torch.ones(0, 3)), "finite matrix"),
        (lambda: hill_exponent(torch.full((2, 2), math.nan)), "finite matrix"),
        (lambda: hill_exponent(torch.zeros(3, 3)), "no tail"),
        (lambda: hill_exponent(torch.eye(3)), "no tail"),
        (lambda: hill_exponent(torch.ones(1, 7)), "no tail"),
    ],
)
def test_wrong_arguments_of_the_others(call: Callable[[], object], message: str) -> None:
    with pytest.raises(MaskoptError, match=message):
        call()


def test_arguments_are_left_alone() -> None:
    values: Tensor = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    scores = torch.rand(4, 4, dtype=torch.float64)
    before = values.clone(), scores.clone()
    for rule, _ in RULES.values():
        rule(values, [1, 2, 3], 0.5)
    outlier_share(scores)
    hill_exponent(scores)
    assert torch.equal(values, before[0])
    assert torch.equal(scores, before[1])
