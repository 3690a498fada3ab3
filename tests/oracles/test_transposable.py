"""Transposable N:M: exact on tiles of every size, against enumeration and linear programming."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, milp
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import TransposableNM, regular
from maskopt.oracles.regular import cheapest_regular, count_regular, every_regular
from maskopt.problems import Saliency
from maskopt.solvers import FrankWolfe, solve
from tests.helpers import every_mask, examples

KINDS = ["normal", "negative", "heavy", "integers", "signs", "rank one", "tiny spread"]


def drawn(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    cost = {
        "normal": lambda: random.standard_normal(shape),
        "negative": lambda: -np.abs(random.standard_normal(shape)),
        "heavy": lambda: -(np.abs(random.standard_cauchy(shape)) ** 1.5),
        "integers": lambda: random.integers(-3, 4, shape),
        "signs": lambda: random.integers(0, 2, shape),
        "rank one": lambda: (
            random.standard_normal(shape[:1]).reshape(-1, *[1] * (len(shape) - 1)) * random.standard_normal(shape)
        ),
        "tiny spread": lambda: 1.0 + 1e-9 * random.standard_normal(shape),
    }[kind]()
    return torch.from_numpy(np.asarray(cost)).double()


def minimum(masks: TransposableNM, cost: Tensor, lower: Tensor | None = None, upper: Tensor | None = None) -> float:
    """Return the optimum of the LP formulation, with costs scaled to suit the absolute tolerances of HiGHS."""
    scale = float(cost.abs().max()) or 1.0
    low = np.zeros(cost.numel()) if lower is None else lower.flatten().double().numpy()
    high = np.ones(cost.numel()) if upper is None else upper.flatten().double().numpy()
    rule = TransposableNM(keep=masks.keep, group=masks.group).milp_constraints(tuple(cost.shape))
    answer = milp((cost / scale * 1e3).flatten().numpy(), constraints=rule, bounds=Bounds(low, high))
    assert answer.status == 0, answer.message
    return answer.fun * scale / 1e3


@given(st.sampled_from(KINDS), st.integers(0, 2**16), st.integers(1, 3), st.data())
@pytest.mark.parametrize("group", [3, 4, 5, 6, 8, 16])
@examples(25)
def test_the_oracle_is_exact_for_every_group(
    group: int, kind: str, seed: int, across: int, data: st.DataObject
) -> None:
    masks = TransposableNM(keep=data.draw(st.integers(0, group)), group=group)
    cost = drawn(kind, (group * 2, group * across), seed)
    chosen = masks.lmo_mask(cost)
    assert masks.contains(chosen)
    size = float(cost.abs().max())
    assert float((cost * chosen).sum()) == pytest.approx(minimum(masks, cost), abs=1e-7 * size)
    assert float(masks.lmo_bound(cost).sum()) == pytest.approx(float((cost * chosen).sum()), abs=1e-12 * size)
    assert masks.lmo_bound(cost).shape == (2,)


@given(st.sampled_from(KINDS), st.integers(0, 2**16), st.sampled_from([0, 1, 2, 3, 4]))
@examples(20)
def test_the_oracle_agrees_with_enumeration_of_4_by_4_tiles(kind: str, seed: int, keep: int) -> None:
    masks = TransposableNM(keep=keep, group=4)
    cost = drawn(kind, (4, 4), seed)
    totals = [math.fsum(cost[member].tolist()) for member in every_mask(masks, (4, 4))]
    assert math.fsum(cost[masks.lmo_mask(cost)].tolist()) == pytest.approx(
        min(totals), abs=1e-14 * float(cost.abs().sum())
    )


@given(st.sampled_from(KINDS), st.integers(0, 2**16), st.integers(0, 4))
@examples(60)
def test_table_and_exchanges_agree(kind: str, seed: int, keep: int) -> None:
    cost = drawn(kind, (40, 4, 4), seed)
    listed = cheapest_regular(cost, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regular, "regular_table", lambda *_: None)
        exchanged = cheapest_regular(cost, keep)
    assert bool((exchanged.sum(1) == keep).all() & (exchanged.sum(2) == keep).all())
    totals = [(cost * chosen).sum((1, 2)) for chosen in (listed, exchanged)]
    torch.testing.assert_close(*totals, rtol=0, atol=1e-13 * float(cost.abs().max()))


@pytest.mark.parametrize("block", [1, 1000])
def test_tiles_are_solved_apart(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = drawn("heavy", (24, 40), 3)
    for keep, group in ((2, 4), (3, 8)):
        masks = TransposableNM(keep=keep, group=group)
        whole = masks.lmo_mask(cost)
        for top in range(0, 24, group):
            for left in range(0, 40, group):
                tile = slice(top, top + group), slice(left, left + group)
                assert torch.equal(whole[tile], masks.lmo_mask(cost[tile]))
        monkeypatch.setattr(regular, "_BLOCK", block)
        assert torch.equal(masks.lmo_mask(cost), whole)
        assert torch.equal(masks.lmo_mask(cost.float()), masks.lmo_mask(cost.float().double()))


@given(st.sampled_from(KINDS), st.integers(0, 2**16), st.floats(0, 1), st.data())
@pytest.mark.parametrize("group", [4, 6, 8])
@examples(25)
def test_larger_tiles_with_fixed_entries_are_exact(
    group: int, kind: str, seed: int, fraction: float, data: st.DataObject
) -> None:
    masks = TransposableNM(keep=data.draw(st.integers(0, group)), group=group)
    cost = drawn(kind, (group, group * 2), seed)
    member = masks.lmo_mask(drawn("normal", (group, group * 2), seed + 1))
    some = torch.from_numpy(np.random.default_rng(seed).random(member.shape) < fraction)
    part = masks.restrict(member & some, ~member & some)
    chosen = part.lmo_mask(cost)
    assert part.contains(chosen)
    best = minimum(masks, cost, member & some, member | ~some)
    assert float((cost * chosen).sum()) == pytest.approx(best, abs=1e-7 * float(cost.abs().max()))
    # The smallest face that holds half of each of two members.
    other = masks.lmo_mask(drawn("normal", (group, group * 2), seed + 2))
    at = (member.double() + other.double()) / 2 + torch.finfo(torch.float64).eps * (1 - 2 * member.double())
    vertex = masks.inface(cost, at).bool()
    assert masks.contains(vertex)
    best = minimum(masks, cost, member & other, member | other)
    assert float((cost * vertex).sum()) == pytest.approx(best, abs=1e-7 * float(cost.abs().max()))


@pytest.mark.parametrize("group", [4, 5, 8])
def test_infinite_costs_decide_their_entries(group: int) -> None:
    masks = TransposableNM(keep=2, group=group)
    cost = drawn("normal", (group, group), 0)
    good, bad = cost.clone(), cost.clone()
    member = masks.lmo_mask(drawn("normal", (group, group), 1))
    good[member], bad[~member] = -math.inf, math.inf
    assert torch.equal(masks.lmo_mask(good), member)
    assert torch.equal(masks.lmo_mask(bad), member)
    # Fixed entries take precedence over infinite costs.
    other = masks.lmo_mask(-member.double())
    assert torch.equal(masks.restrict(kept=~member & other).lmo_mask(good) & other, other)


def test_ties_go_to_the_first_matrix() -> None:
    for value in (0.0, 1.0, -2.5):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            chosen = TransposableNM(keep=2, group=4).lmo_mask(torch.full((4, 4), value, dtype=dtype))
            assert chosen.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("size", "keep", "number"),
    [(2, 1, 2), (3, 1, 6), (4, 1, 24), (4, 2, 90), (5, 2, 2040), (6, 3, 297200), (8, 4, 116963796250), (7, 7, 1)],
)
def test_counts_are_those_of_regular_matrices(size: int, keep: int, number: int) -> None:
    assert count_regular(size, keep) == number
    assert count_regular(size, size - keep) == number
    assert TransposableNM(keep=keep, group=size).count((2 * size, size)) == number**2
    if number < 3000:
        listed = list(every_regular(size, keep))
        assert listed == sorted(set(listed))
        assert len(listed) == number


@pytest.mark.parametrize("group", [4, 5, 6])
def test_the_center_of_fixed_tiles_is_in_the_relative_interior(group: int) -> None:
    masks = TransposableNM(keep=2, group=group)
    shape = (group, group)
    kept, pruned = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    kept[0, 1] = pruned[2, 2] = pruned[2, 3] = kept[3, 0] = True
    part = masks.restrict(kept, pruned)
    mean = torch.stack(list(part.enumerate(shape))).double().mean(0)
    assert part.count(shape) == len(list(part.enumerate(shape)))
    center = part.center(shape, torch.float64, kept.device)
    for line in (0, 1):
        torch.testing.assert_close(center.sum(line), torch.full((group,), 2.0, dtype=torch.float64))
    assert torch.equal(center > 1e-9, mean > 0)
    assert torch.equal(center < 1 - 1e-9, mean < 1)
    assert masks.restrict() is masks


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TransposableNM(keep=5, group=4), "needs 0 <= keep <= group"),
        (lambda: TransposableNM(keep=0, group=0), "1 <= group"),
        (lambda: TransposableNM(keep=2.0, group=4), "counts entries"),
        (lambda: TransposableNM(keep=True, group=4), "counts entries"),
        (lambda: TransposableNM(keep=2, group=4).check((6, 8)), "needs rows and columns divisible by 4"),
        (lambda: TransposableNM(keep=2, group=4).lmo(torch.zeros(4, 6)), "needs rows and columns divisible by 4"),
        (lambda: TransposableNM(keep=1, group=2).restrict(torch.ones(2, 2) > 0), r"the tile of entry \(0, "),
        (lambda: TransposableNM(keep=1, group=2).restrict(torch.eye(2) > 0).check((4, 4)), "fixes entries of shape"),
    ],
)
def test_impossible_sets_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        make()


def test_transposable_takes_keywords_only() -> None:
    with pytest.raises(TypeError):
        TransposableNM(2, 4)


def whole(cost: Tensor) -> np.ndarray:
    """Return the costs as integers, all times one power of two."""
    ratios = [Fraction(value) for value in cost.flatten().tolist()]
    largest = max(ratio.denominator for ratio in ratios)
    found = np.empty(len(ratios), dtype=object)
    found[:] = [int(ratio * largest) for ratio in ratios]
    return found


SCALES = {
    "one large": lambda random, cost: cost.flat.__setitem__(random.integers(cost.size), 1e10),
    "some large": lambda random, cost: cost.flat.__setitem__(random.integers(cost.size, size=3), [1e8, -1e8, 1e12]),
    "all": lambda random, cost: np.multiply(cost, 10.0 ** random.integers(-12, 13, cost.shape), out=cost),
    "subnormal": lambda random, cost: np.multiply(np.round(3 * cost), 5e-324, out=cost),
    "tiny differences": lambda random, cost: np.add(1e8, cost, out=cost),
    "ties": lambda random, cost: np.copyto(cost, np.round(cost) * 0.1),
}


@given(st.integers(0, 2**16), st.sampled_from([(3, 1), (4, 2), (4, 1), (5, 2), (5, 3)]), st.booleans(), st.booleans())
@pytest.mark.parametrize("kind", SCALES)
@examples(25)
def test_no_difference_is_too_small(kind: str, seed: int, size: tuple[int, int], fixed: bool, face: bool) -> None:
    """Against all matrices in whole numbers: free, with fixed entries that cost most, and on faces."""
    group, keep = size
    random = np.random.default_rng(seed)
    cost = random.standard_normal((group, group))
    SCALES[kind](random, cost)
    table = np.zeros((count_regular(group, keep), group * group), dtype=object)
    for row, ones in enumerate(every_regular(group, keep)):
        table[row, list(ones)] = 1
    masks, allowed = TransposableNM(keep=keep, group=group), np.ones(len(table), dtype=bool)
    one, other = (table[random.integers(len(table))].astype(bool) for _ in range(2))
    kept, pruned = one & (random.random(len(one)) < 0.5), ~one & (random.random(len(one)) < 0.5)
    if fixed:
        allowed = (table[:, kept] == 1).all(1) & (table[:, pruned] == 0).all(1)
        masks = masks.restrict(*(torch.from_numpy(part.reshape(group, group)) for part in (kept, pruned)))
        cost.flat[np.flatnonzero(kept)[:1]] = 1e12
    if face:
        kept, pruned = one & other, ~one & ~other
        allowed = (table[:, kept] == 1).all(1) & (table[:, pruned] == 0).all(1)
        at = torch.from_numpy((one.astype(float) + other).reshape(group, group) / 2)
        chosen = TransposableNM(keep=keep, group=group).inface(torch.from_numpy(cost), at)
    else:
        chosen = masks.lmo(torch.from_numpy(cost))
    totals = table @ whole(torch.from_numpy(cost))
    place = np.flatnonzero((table == chosen.flatten().int().tolist()).all(1))
    assert len(place) == 1
    assert allowed[place[0]]
    assert totals[place[0]] == totals[allowed].min()
    if count_regular(group, keep) <= 128:  # of equal matrices the first
        assert place[0] == np.flatnonzero(allowed & (totals == totals[allowed].min()))[0]
    if not face:
        assert Fraction(float(masks.lmo_bound(torch.from_numpy(cost)))) <= sum(
            (Fraction(value) for value in cost[chosen.bool().numpy()].tolist()), Fraction(0)
        )


@pytest.mark.parametrize("size", [1e8, 1e10, 1e15])
@pytest.mark.parametrize("group", [6, 8])
def test_a_large_score_does_not_hide_the_others(size: float, group: int) -> None:
    """Against scipy's MILP, in which the large score is fixed."""
    for seed in range(4):
        score = np.random.default_rng(seed).random((group, group))
        score[0, 0] = size
        kept = torch.zeros((group, group), dtype=torch.bool)
        kept[1, 1] = True
        plain = TransposableNM(keep=group // 2, group=group)
        lower = kept.clone()
        lower[0, 0] = True
        small = score.copy()
        small[0, 0] = 0.0
        best = minimum(plain, torch.from_numpy(-small), lower)
        for masks in (plain.restrict(kept), plain.restrict(lower)):
            chosen = masks.lmo_mask(torch.from_numpy(-score))
            assert bool(chosen[0, 0])
            assert -float(small[chosen.numpy()].sum()) == pytest.approx(best, abs=1e-9)
        other = plain.lmo_mask(torch.from_numpy(np.random.default_rng(seed + 50).random((group, group))))
        at = (plain.lmo_mask(torch.from_numpy(-score)).double() + other) / 2
        inface = plain.inface(torch.from_numpy(-score), at)
        lower[1, 1] = False
        best = minimum(plain, torch.from_numpy(-small), (at == 1) | lower, at > 0)
        assert bool(inface[0, 0])
        assert -float(small[inface.bool().numpy()].sum()) == pytest.approx(best, abs=1e-9)


def test_proofs_of_large_scores() -> None:
    for seed in range(3):
        scores = np.random.default_rng(seed).random((8, 8))
        scores[0, 0] = 1e8
        kept = torch.zeros(8, 8, dtype=torch.bool)
        kept[1, 1] = True
        masks = TransposableNM(keep=4, group=8)
        result = solve(Saliency(torch.from_numpy(scores)), masks.restrict(kept), FrankWolfe(iterations=5, polish=False))
        lower = kept.clone()
        lower[0, 0] = True
        small = torch.from_numpy(np.where(lower.numpy() & ~kept.numpy(), 0.0, scores))
        best = float(small.sum()) + minimum(masks, -small, lower)
        assert result.lower_bound is not None
        assert float(result.lower_bound.sum()) <= best * (1 + 1e-12)
        assert result.total == pytest.approx(best, rel=1e-9)
