"""Dependent rounding has the promised means, correlations, counts and orders."""

import math

import pytest
import torch
from scipy.optimize import LinearConstraint
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, MaskSet, PartitionMatroid, PerRow, Protected, Unstructured
from maskopt.oracles.base import Shape
from maskopt.problems import synthetic
from maskopt.solvers import rounding
from tests.helpers import feasible, groups_of

FAILURE = 1e-10  # for all comparisons of a test together


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def width(draws: int, comparisons: int) -> float:
    """Return how far a mean of draws in [0, 1] may be from its expectation (Hoeffding, both sides)."""
    return math.sqrt(math.log(2 * comparisons / FAILURE) / (2 * draws))


def hull(masks: MaskSet, shape: tuple[int, int], seed: int) -> Tensor:
    cost = torch.randn((6, *shape), generator=seeded(seed), dtype=torch.float64)
    fraction = torch.rand(6, generator=seeded(seed), dtype=torch.float64)
    return sum(s * masks.lmo(c) for s, c in zip(fraction / fraction.sum(), cost, strict=True))


def check_moments(x: Tensor, drawn: Tensor, groups: list[list[int]]) -> None:
    """Check that draws (number, entries) have mean x and that no pair of a group is positively correlated."""
    near = width(len(drawn), x.numel() + sum(len(group) ** 2 for group in groups))
    assert float((drawn.double().mean(0) - x.flatten()).abs().max()) <= near
    for group in groups:
        kept = drawn[:, group].double()
        fraction = x.flatten()[group]
        excess = kept.T @ kept / len(drawn) - fraction.unsqueeze(1) * fraction
        excess.fill_diagonal_(0.0)
        assert float(excess.max()) <= near
        pruned = 1 - kept
        excess = pruned.T @ pruned / len(drawn) - (1 - fraction).unsqueeze(1) * (1 - fraction)
        excess.fill_diagonal_(0.0)
        assert float(excess.max()) <= near


HELD = torch.tensor([[True, False, False, False, True, False], [False, False, False, True, False, False]])
SMALL = [
    Unstructured(5),
    PerRow(0.5),
    NM(keep=2, group=3),
    PartitionMatroid(3, (2, 3), "Blocks"),
    PartitionMatroid(1, (None, 1), "Columns"),
    PerRow(torch.tensor([1, 4])),
    Protected(PerRow(3), HELD),
    Protected(Unstructured(7), HELD),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("masks", SMALL, ids=repr)
def test_dependent_rounding_has_the_promised_means_and_correlations(masks: PartitionMatroid, seed: int) -> None:
    x = hull(masks, (2, 6), seed)
    order = None if seed else torch.randn(2, 6, generator=seeded(9))
    drawn = rounding.dependent(masks, x, seeded(seed), samples=6000, order=order)
    assert drawn.shape == (6000, 2, 6)
    assert all(feasible(masks, mask) for mask in drawn[:50])
    check_moments(x, drawn.flatten(1), groups_of(masks, (2, 6)))


@pytest.mark.parametrize("keep", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_are_drawn_independently(keep: int, dtype: torch.dtype) -> None:
    """200 000 equal rows, drawn independently, give narrow confidence intervals."""
    masks = PerRow(keep)
    one = hull(masks, (1, 7), keep).to(dtype)
    drawn = rounding.dependent(masks, one.expand(200_000, -1), seeded(keep))
    assert bool((drawn.sum(1) == keep).all())
    check_moments(one.double(), drawn, [list(range(7))])
    # Rows are independent of each other.
    both = (drawn[::2] & drawn[1::2]).double().mean(0)
    assert float((both - one[0].double() ** 2).abs().max()) <= width(100_000, 7)


def test_every_mask_has_positive_probability() -> None:
    masks = PerRow(2)
    drawn = rounding.dependent(masks, masks.center((5000, 4), torch.float32, torch.device("cpu")), seeded(0))
    assert len(drawn.unique(dim=0)) == 6


@pytest.mark.parametrize("d", [2, 5, 8, 33])
def test_neighbours_in_a_given_order_are_paired_first(d: int) -> None:
    masks, order = Unstructured(0.5), torch.randperm(2 * d, generator=seeded(d)).view(2, d)
    x = torch.full((2, d), 0.5)
    for mask in rounding.dependent(masks, x, seeded(1), samples=20, order=order):
        kept = mask.flatten()[order.flatten().argsort()].view(d, 2)
        assert bool((kept.sum(1) == 1).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_groups_with_inexact_sums_give_members(dtype: torch.dtype) -> None:
    masks = Unstructured(0.37)
    x = hull(masks, (300, 400), 0).to(dtype)
    mask = rounding.dependent(masks, x, seeded(0))
    assert feasible(masks, mask)
    # Hoeffding's interval for independent entries holds for negatively correlated ones.
    by_rows = (mask.double() - x.double()).sum(1).abs()
    assert float(by_rows.max()) <= 400 * width(400, 300)


def test_an_inexact_sum_keeps_the_largest_entries() -> None:
    x = torch.tensor([[0.0, 1.0, 0.0, 0.4, 0.0, 1.0, 1.0, 0.0]])
    drawn = rounding.dependent(PerRow(5), x, seeded(0), samples=50)
    assert bool(drawn[:, 0, [1, 3, 5, 6]].all())
    drawn = rounding.dependent(PerRow(2), x, seeded(0), samples=50)
    assert not bool(drawn[:, 0, [0, 2, 3, 4, 7]].any())
    x = torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.5, 0.5]])
    assert not bool(rounding.dependent(PerRow(4), x, seeded(0), samples=50)[:, 0, 0].any())


def test_entries_within_rounding_of_zero_and_one_are_decided() -> None:
    """Two million rows: entries drawn with their own probability would be wrong in some of them."""
    x = torch.tensor([[1 - 1.8e-6, 1.8e-6, 0.5, 0.5]]).expand(2_000_000, -1)
    drawn = rounding.dependent(PerRow(2), x, seeded(0))
    assert bool(drawn[:, 0].all())
    assert not bool(drawn[:, 1].any())


class AtMost(MaskSet):
    """At most `keep` entries of each row, with only the methods that dependent rounding needs."""

    at_most = True

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def check(self, shape: Shape) -> None: ...

    def lmo(self, cost: Tensor) -> Tensor:
        ranks = cost.argsort(dim=1, stable=True).argsort(1)
        return ((ranks < self.keep) & (cost < 0)).to(cost.dtype)

    def contains(self, mask: Tensor) -> bool:
        return bool((mask.sum(1) <= self.keep).all())

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, self.keep / (2 * shape[1]), dtype=dtype, device=device)

    def milp_constraints(self, shape: Shape) -> LinearConstraint:
        raise NotImplementedError

    def row_block(self, shape: Shape) -> int:
        return 1


class AtMostInGroups(AtMost):
    def groups(self, matrix: Tensor) -> Tensor:
        return matrix

    def ungroup(self, groups: Tensor, shape: Shape) -> Tensor:
        return groups


@pytest.mark.parametrize(
    "one", [[0.5, 0.25, 0.125, 0.0], [0.75, 0.75, 1.0, 0.25], [0.75, 0.75, 0.75, 0.75], [0.0, 0.0, 0.0, 0.0]]
)
def test_groups_below_their_count_are_rounded(one: list[float]) -> None:
    x, masks = torch.tensor([one], dtype=torch.float64), AtMostInGroups(3)
    drawn = rounding.dependent(masks, x.expand(100_000, -1), seeded(3))
    assert masks.contains(drawn)
    counts = drawn.sum(1)
    assert int(counts.min()) == math.floor(sum(one))
    assert int(counts.max()) == math.ceil(sum(one))
    check_moments(x, drawn, [list(range(4))])
    # Rounding may make the sum of a full group too large; such a mask is no member.
    assert masks.contains(rounding.dependent(masks, (x + 0.1).expand(1000, -1), seeded(4)))


def test_sets_without_groups_are_refused_with_what_is_missing() -> None:
    with pytest.raises(MaskoptError, match=r"dependent rounding: it must implement groups, ungroup"):
        rounding.dependent(AtMost(2), torch.full((2, 4), 0.5), seeded(0))


def test_draws_differ_and_follow_the_seed() -> None:
    masks = PerRow(0.5)
    x = torch.full((16, 32), 0.5)
    generator = seeded(0)
    one, two = rounding.dependent(masks, x, generator), rounding.dependent(masks, x, generator)
    assert not torch.equal(one, two)
    assert torch.equal(one, rounding.dependent(masks, x, seeded(0)))
    many = rounding.dependent(masks, x, seeded(0), samples=2)
    assert not torch.equal(many[0], many[1])
    assert rounding.dependent(masks, x, seeded(0), samples=1).shape == (1, 16, 32)


def test_more_samples_are_never_worse() -> None:
    problem = synthetic(rows=12, d=32).problem()
    masks = PerRow(0.5)
    x = hull(masks, (12, 32), 0).float()
    nearest = problem.objective(rounding.top_k(masks, x))
    assert torch.equal(rounding.best_of(problem, masks, x, 0, seeded(0)), rounding.top_k(masks, x))
    few, many = (problem.objective(rounding.best_of(problem, masks, x, samples, seeded(0))) for samples in (8, 64))
    assert bool((few <= nearest).all())
    assert bool((many <= few).all())  # the larger sample contains the smaller
    assert float(many.sum()) < float(nearest.sum())


def test_gradient_aware_rounding_keeps_the_costliest_entries() -> None:
    """Two of three equal entries are kept; the gradient tells which removal costs most."""
    x = torch.tensor([[2 / 3, 2 / 3, 2 / 3, 0.0], [1.0, 0.5, 0.0, 0.5]])
    gradient = torch.tensor([[-1.0, -5.0, -3.0, -100.0], [50.0, 1.0, -50.0, 0.0]])
    mask = rounding.gradient_aware(PerRow(2), x, gradient)
    assert mask.tolist() == [[False, True, True, False], [True, False, False, True]]
