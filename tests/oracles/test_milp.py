"""Formulations with and without auxiliary variables, and the sets that say nothing else, against enumeration."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import AtMost, MaskSet, MilpFormulation, PerRow, Unstructured
from tests.helpers import every_mask, examples
from tests.made import FewColumns

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stated(MaskSet):
    """A set that says its constraints, row by row, and nothing else."""

    most: int
    separable = True

    def milp_constraints(self, shape: tuple[int, int]) -> LinearConstraint:
        return LinearConstraint(np.kron(np.eye(shape[0]), np.ones((1, shape[1]))), 0, self.most)


@dataclass(frozen=True)
class Empty(MaskSet):
    """Constraints that nothing fulfils."""

    def milp_constraints(self, shape: tuple[int, int]) -> LinearConstraint:
        return LinearConstraint(np.ones((1, shape[0] * shape[1])), shape[0] * shape[1] + 1, np.inf)


def exactly(cost: Tensor, mask: Tensor) -> Fraction:
    return sum((Fraction(value) for value in cost[mask].tolist()), Fraction(0))


# One entry, a row or everything may be larger or smaller than the rest by any of these.
RATIOS = [1e-300, 1e-12, 1e-6, 1.0, 1e6, 1e12, 1e150]
KINDS = [FewColumns(3, 2), FewColumns(0, 1), FewColumns(12, 1), Stated(2), AtMost(Unstructured(5)), PerRow(2)]


@given(st.integers(0, 2**16), st.sampled_from(KINDS), st.sampled_from(RATIOS), st.sampled_from(RATIOS), st.booleans())
@examples(100)
def test_no_mask_costs_less_than_the_bound_at_any_scale(
    seed: int, masks: MaskSet, ratio: float, whole: float, ties: bool
) -> None:
    shape, random = (3, 4), torch.Generator().manual_seed(seed)
    cost = torch.randn(shape, generator=random, dtype=torch.float64)
    cost = cost.mul(2).round() if ties else cost
    cost[seed % 3, seed % 4] *= ratio
    cost *= whole
    members = every_mask(masks, shape)
    best = min(exactly(cost, member) for member in members)
    bound = masks.formulation(shape).lower_bound(cost.flatten().numpy())
    assert Fraction(bound) <= best
    size = float(cost.abs().sum())
    if not isinstance(masks, FewColumns):  # the other formulations are integral
        assert bound >= float(best) - 1e-6 * size


@given(st.integers(0, 2**16), st.floats(0, 9))
@examples(12)
def test_auxiliary_variables_may_be_fractional(seed: int, limit: float) -> None:
    """|sum of a random sign pattern| <= limit, by a continuous variable of its own."""
    random = np.random.default_rng(seed)
    signs = random.integers(-3, 4, (1, 6)).astype(float)
    matrix = np.vstack((np.hstack((signs, [[-1.0]])), np.hstack((-signs, [[-1.0]]))))
    formulation = MilpFormulation(LinearConstraint(matrix, -np.inf, 0), 1, integrality=0, upper=round(limit, 3))
    masks = (np.arange(64)[:, None] >> np.arange(6)) % 2 == 1
    inside = abs(masks @ signs[0]) <= round(limit, 3)
    assert formulation.members(masks).tolist() == inside.tolist()
    cost = random.integers(-5, 6, 6).astype(float)
    chosen = formulation.cheapest(cost)
    assert chosen is not None
    assert cost @ chosen == (masks[inside] @ cost).min()


@pytest.mark.parametrize("kind", [np.asarray, csr_array, np.ndarray.tolist], ids=["dense", "sparse", "lists"])
def test_dense_and_sparse_matrices_are_one_formulation(kind: object) -> None:
    rows = np.array([[1.0, 0.0, 1.0, -1.0], [0.0, 2.0, 0.0, -1.0]])
    given_ = kind(rows)
    formulation = MilpFormulation(LinearConstraint(given_, -np.inf, [0, 1]), auxiliary=1)
    assert formulation.matrix.toarray().tolist() == rows.tolist()
    assert formulation.entries == 3
    assert formulation.extras == [(True, 0.0, 1.0)]
    assert formulation.constraints.ub.tolist() == [0, 1]
    assert formulation.cheapest(np.array([-1.0, -1.0, -1.0])).tolist() == [True, True, False]


def test_the_callers_matrix_stays_as_it_is() -> None:
    matrix = csr_array((np.ones(3), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))  # entry 0 twice
    formulation = MilpFormulation(LinearConstraint(matrix, 0, 2))
    assert formulation.matrix.toarray().tolist() == [[2.0, 1.0]]
    assert matrix.nnz == 3


def test_infinite_costs_outweigh_all_finite_ones() -> None:
    cost = torch.tensor([[-torch.inf, -9.0, -9.0, -9.0], [torch.inf, -9.0, 1.0, -8.0]])
    assert Stated(1).lmo(cost).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_constraints_are_enough_for_a_set() -> None:
    masks, plain = Stated(2), AtMost(PerRow(2))
    assert not masks.exact
    assert repr(masks) == "Stated(most=2)"
    assert masks.row_block((6, 5)) == 1
    masks.check((3, 4))
    cost = torch.randn((3, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(masks.lmo_mask(cost), plain.lmo_mask(cost))
    assert masks.lmo(cost).dtype == cost.dtype
    torch.testing.assert_close(masks.lmo_bound(cost), plain.lmo_bound(cost), rtol=1e-9, atol=0.0)
    assert masks.count((2, 3)) == plain.count((2, 3))
    center = masks.center((3, 4), torch.float64, CPU)
    assert bool((center == center[0]).all())  # no row depends on the others
    assert bool(((center > 0) & (center < 1)).all())


def test_where_a_set_says_more_its_own_methods_count() -> None:
    class Faster(Stated):
        exact = True

        def lmo(self, cost: Tensor) -> Tensor:
            return AtMost(PerRow(self.most)).lmo(cost)

    assert Faster(2).exact
    cost = torch.tensor([[-1.0, -3.0, -2.0, 4.0]])
    assert Faster(2).lmo_bound(cost).tolist() == [-5.0]


def test_a_set_without_masks_is_refused() -> None:
    for call in (lambda: Empty().check((2, 3)), lambda: Empty().lmo(torch.zeros(2, 3))):
        with pytest.raises(MaskoptError, match=r"^Empty\(\) has no mask of shape \(2, 3\)\.$"):
            call()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MilpFormulation(LinearConstraint([[1, 1]], 0, 1), 3), "2 columns cannot have 3 auxiliary"),
        (lambda: MilpFormulation(LinearConstraint([[1, 1]], 0, 1), 1, upper=np.inf), "need finite bounds"),
        (
            lambda: MilpFormulation(LinearConstraint([[1, 1]], 0, 1), 1, lower=[0, 0]),
            "1 auxiliary .* 2 values of lower",
        ),
        (lambda: Stated(1).formulation((2, 3)).contains(np.zeros(5)), "formulation of 6 entries; got 5"),
    ],
)
def test_malformed_formulations_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(MaskoptError, match=sentence):
        make()


def test_columns_that_do_not_fit_the_weight_are_refused() -> None:
    class Wrong(Stated):
        def milp_constraints(self, shape: tuple[int, int]) -> LinearConstraint:
            return LinearConstraint(np.ones((1, shape[1])), 0, 1)

    with pytest.raises(MaskoptError, match=r"Wrong\(most=1\) have 3 columns .* shape \(2, 3\) has 6 entries"):
        Wrong(1).formulation((2, 3))
