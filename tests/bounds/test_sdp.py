"""Semidefinite bounds against enumeration, at every stop; they attain the value of the relaxation."""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from maskopt import MaskoptError, PerRow, solve, synthetic
from maskopt.bounds import bound_forms, convex_part, sdp_bound
from maskopt.oracles import NM
from maskopt.problems import FAMILIES, LayerReconstruction
from maskopt.solvers import FrankWolfe
from tests.helpers import Layer, examples, layers
from tests.problems.test_eigenvalue_floor import below_every_eigenvalue


def indicators(d: int, s: int, group: int | None = None) -> Tensor:
    """Return all p with s ones, equally many in each group, shape (number, d)."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=d)), dtype=torch.float64).view(-1, d)
    parts = every.view(len(every), -1, group or d).sum(2)
    return every[(parts == s * (group or d) / d).all(1)]


def minimum_error(problem: LayerReconstruction, row: int, s: int, group: int | None = None) -> float:
    """Return the smallest error of a row of which s entries are pruned, summed in long doubles."""
    pruned = indicators(problem.shape[1], s, group).numpy().astype(np.longdouble)
    vectors = pruned * problem.weight[row].double().numpy().astype(np.longdouble)
    gram = problem.gram.double().numpy().astype(np.longdouble)
    return float(((vectors @ gram) * vectors).sum(1).min())


def slack(problem: LayerReconstruction) -> float:
    """Return by how much the rounding of the float32 Gram may reduce an error of zero."""
    return 1e-12 * float(problem.double().scale().max())


class Countdown:
    """Stop before iteration `steps`."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@given(layers(d=(1, 8)), st.integers(0, 12), st.integers(0, 8))
@examples(250)
def test_bounds_hold_at_every_stop(layer: Layer, steps: int, first: int) -> None:
    problem = layer.problem()
    rows, d = problem.shape
    keep = (first + torch.arange(rows)) % (d + 1)
    found = sdp_bound(problem, keep, accuracy=1e-9, stop=Countdown(steps))
    assert (found.bound >= 0.0).all()
    assert (found.iterations <= steps).all()
    for row in range(rows):
        assert found.bound[row] <= minimum_error(problem, row, d - int(keep[row])) * (1 + 1e-13)


class Exact:
    """A symmetric matrix of fractions, with the tensor methods that the exact check needs."""

    def __init__(self, rows: list[list[Fraction]]) -> None:
        self.rows = rows

    @property
    def T(self) -> "Exact":  # noqa: N802
        return self

    def tolist(self) -> list[list[Fraction]]:
        return self.rows


@given(layers(d=(2, 6)), st.integers(1, 5), st.integers(1, 25), st.booleans())
@examples(120)
def test_multipliers_prove_the_bound_in_rational_numbers(layer: Layer, pruned: int, steps: int, offset: bool) -> None:
    weight, gram = layer.weight.double(), layer.gram.double()
    rows, d = weight.shape
    s = min(pruned, d - 1)
    forms = weight.unsqueeze(2) * gram * weight.unsqueeze(1)
    forms = (forms + forms.mT) / 2 + (1e9 * float(forms.abs().max()) if offset else 0.0)
    found = bound_forms(forms, torch.full((rows,), s), accuracy=0.0, iterations=steps)
    for row in range(rows):
        if not math.isfinite(found.bound[row]):
            continue
        y = [Fraction(value) for value in found.tilt[row].tolist()]
        slack = [[Fraction(q) for q in line] for line in forms[row].tolist()]
        for i, j in itertools.product(range(d), repeat=2):
            slack[i][j] += (y[i] + y[j]) / (2 * s) - (y[i] if i == j else 0)
        assert below_every_eigenvalue(Exact(slack), Fraction(float(found.bound[row])) / s)


@given(layers(d=(1, 8)), st.integers(0, 60), st.integers(0, 8), st.integers(1, 30))
@examples(150)
def test_bounds_with_cuts_hold_at_every_stop(layer: Layer, steps: int, first: int, cuts: int) -> None:
    problem = layer.problem()
    rows, d = problem.shape
    keep = (first + torch.arange(rows)) % (d + 1)
    found = sdp_bound(problem, keep, cuts=cuts, stop=Countdown(steps))
    assert (found.bound >= found.shifted).all()
    for row in range(rows):
        assert found.bound[row] <= minimum_error(problem, row, d - int(keep[row])) * (1 + 1e-13)


@pytest.mark.parametrize(("group", "fraction"), [(None, 0.4), (4, 0.7), (2, 0.85)])
def test_cuts_close_much_of_the_gap(group: int | None, fraction: float) -> None:
    problem = synthetic("correlated", rows=8, d=12, seed=1).problem()
    keep = torch.full((8,), 6)
    found = sdp_bound(problem, keep, group=group, accuracy=1e-5, cuts=100)
    best = torch.tensor([minimum_error(problem, row, 6, group) for row in range(8)], dtype=torch.float64)
    assert (found.bound <= best).all()
    assert float((found.bound - found.shifted).sum()) > fraction * float((best - found.shifted).sum())


def test_cuts_prove_something_where_the_relaxation_proves_nothing() -> None:
    # The value of the semidefinite relaxation of a singular Gram is often zero.
    problem = synthetic("rank-deficient", rows=24, d=9, seed=0).problem()
    keep = torch.full((24,), 6)
    found = sdp_bound(problem, keep, accuracy=1e-5, cuts=100)
    minimum = torch.tensor([minimum_error(problem, row, 3) for row in range(24)], dtype=torch.float64)
    nothing = found.shifted < 1e-6 * minimum
    assert nothing.any()
    assert (found.bound[nothing] > 0.02 * minimum[nothing]).any()
    assert (found.bound <= minimum + slack(problem)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("d", "group"), [(2, None), (7, None), (10, None), (8, 4), (8, 2), (9, 3)])
def test_bounds_grow_and_end_near_the_relaxation(family: str, d: int, group: int | None) -> None:
    problem = synthetic(family, rows=6, d=d, seed=d).problem()
    unit = d // (group or d)
    keep = torch.arange(6) % (d // unit + 1) * unit
    best = torch.zeros(6, dtype=torch.float64)
    for iterations in (*range(12), 50):
        found = sdp_bound(problem, keep, group=group, accuracy=1e-5, iterations=iterations)
        assert (found.bound >= best).all()
        best = found.bound
        for row in range(6):
            assert found.bound[row] <= minimum_error(problem, row, d - int(keep[row]), group) + slack(problem)
    scale = problem.scale()
    assert (found.primal - found.bound <= 1.1e-5 * found.primal + 1e-6 * scale).all()


def relaxation(Q: Tensor, s: int) -> float:
    """Return max over y of s lambda_min(Q - sum y_i A_i) by a quasi-Newton method on a smoothed eigenvalue."""
    d = len(Q)
    form = Q.numpy() / float(Q.trace())

    def shifted(y: np.ndarray) -> np.ndarray:
        return form - np.diag(y) + (y[:, None] + y[None]) / (2 * s)

    def smooth(y: np.ndarray, sharp: float) -> tuple[float, np.ndarray]:
        values, vectors = np.linalg.eigh(shifted(y))
        weights = np.exp(-sharp * (values - values[0]))
        total = weights.sum()
        Z = (vectors * (weights / total)) @ vectors.T
        return -(values[0] - np.log(total) / sharp), np.diag(Z) - Z.sum(1) / s

    y = np.zeros(d)
    for sharp in (1e1, 1e2, 1e3, 1e4, 1e5, 1e6):
        y = minimize(smooth, y, args=(sharp,), jac=True, method="BFGS", options={"maxiter": 500}).x
    return float(s * np.linalg.eigvalsh(shifted(y))[0] * float(Q.trace()))


@pytest.mark.parametrize("d", [3, 6, 9])
@pytest.mark.parametrize("family", ["independent", "correlated"])
def test_the_bound_attains_the_value_of_the_relaxation(family: str, d: int) -> None:
    problem = synthetic(family, rows=3, d=d, seed=2).problem().double()
    keep = torch.tensor([d // 2, 1, d - 1])
    found = sdp_bound(problem, keep, accuracy=1e-6)
    for row in range(3):
        weight = problem.weight[row]
        other = relaxation(weight.unsqueeze(1) * problem.gram * weight, d - int(keep[row]))
        assert float(found.bound[row]) >= other * (1 - 2e-6)
        assert float(found.bound[row]) <= other * (1 + 1e-3)


def test_the_bound_is_stronger_than_that_of_frank_wolfe() -> None:
    problem = synthetic("correlated", rows=4, d=24, seed=0).problem()
    found = sdp_bound(problem, torch.full((4,), 12))
    relaxed = solve(problem, PerRow(12), FrankWolfe("conjugate", iterations=300)).lower_bound
    assert relaxed is not None
    assert float(found.bound.sum()) > 1.2 * float(relaxed.sum())


@given(layers(d=(2, 6)), st.integers(1, 5), st.sampled_from([0, 3]))
@examples(80)
def test_the_shifted_form_is_convex_and_equal_on_masks(layer: Layer, kept: int, cuts: int) -> None:
    problem = layer.problem()
    rows, d = problem.shape
    keep = torch.full((rows,), min(kept, d - 1))
    s = d - int(keep[0])
    found = sdp_bound(problem, keep, cuts=cuts)
    pruned = indicators(d, s)
    for row in range(rows):
        C = convex_part(problem, keep, found, row)
        weight = problem.weight[row].double()
        Q = weight.unsqueeze(1) * problem.gram.double() * weight
        size = float(C.abs().max() + Q.abs().max())
        assert float(torch.linalg.eigvalsh(C)[0]) >= -1e-13 * d * d * size
        error = torch.einsum("pi,ij,pj->p", pruned, Q, pruned)
        there = torch.einsum("pi,ij,pj->p", pruned, C, pruned) + found.shifted[row]
        torch.testing.assert_close(there, error, rtol=1e-11, atol=1e-12 * d * d * size + 1e-300)
        # The diagonal form of the same, convex in directions that are differences of masks.
        product = (
            torch.einsum("pi,ij,pj->p", pruned, Q - torch.diag(found.shift[row]), pruned) + pruned @ found.shift[row]
        )
        torch.testing.assert_close(product, error, rtol=1e-11, atol=1e-12 * d * d * size + 1e-300)


def four() -> Iterator[tuple[LayerReconstruction, Tensor]]:
    for family in ("correlated", "dead"):
        yield synthetic(family, rows=5, d=12, seed=1).problem().double(), torch.tensor([6, 3, 9, 1, 6])


@pytest.mark.parametrize("factor", [2.0**-300, 2.0**-40, 3.0, 1e30])
def test_the_bound_scales_with_the_data(factor: float) -> None:
    for problem, keep in four():
        plain = sdp_bound(problem, keep)
        scaled = LayerReconstruction(problem.weight * factor, problem.gram / factor)
        found = sdp_bound(scaled, keep)
        torch.testing.assert_close(found.bound / factor, plain.bound, rtol=1e-6, atol=1e-9)
        power = LayerReconstruction(problem.weight * 2.0**-90, problem.gram)
        assert torch.equal(sdp_bound(power, keep).bound, plain.bound * 2.0**-180)


def test_rows_of_different_scales_do_not_disturb_each_other() -> None:
    for problem, keep in four():
        plain = sdp_bound(problem, keep)
        factors = 2.0 ** torch.tensor([[-200.0], [0.0], [150.0], [-3.0], [70.0]], dtype=torch.float64)
        found = sdp_bound(LayerReconstruction(problem.weight * factors, problem.gram), keep)
        torch.testing.assert_close(found.bound / factors[:, 0].square(), plain.bound, rtol=1e-9, atol=0.0)


def test_order_of_inputs_and_signs_do_not_matter() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    sign = torch.tensor([1.0, -1.0]).repeat(6).double()
    for problem, keep in four():
        plain = sdp_bound(problem, keep, accuracy=1e-7)
        turned = LayerReconstruction(
            (problem.weight * sign)[:, order], (problem.gram * sign * sign.unsqueeze(1))[order][:, order]
        )
        found = sdp_bound(turned, keep, accuracy=1e-7)
        torch.testing.assert_close(found.bound, plain.bound, rtol=1e-6, atol=1e-6)


def test_bounds_do_not_depend_on_the_memory() -> None:
    for problem, keep in four():
        plain, single = sdp_bound(problem, keep), sdp_bound(problem, keep, memory=1)
        torch.testing.assert_close(single.bound, plain.bound, rtol=1e-9, atol=0.0)
        torch.testing.assert_close(single.shift, plain.shift, rtol=1e-6, atol=1e-9)


def test_rows_stop_when_the_target_is_settled() -> None:
    problem = synthetic("correlated", rows=6, d=16, seed=1).problem()
    keep = torch.full((6,), 8)
    plain = sdp_bound(problem, keep, accuracy=1e-6)
    for factor in (0.5, 0.9, 1.1, 2.0):
        target = plain.bound * factor
        found = sdp_bound(problem, keep, accuracy=1e-6, target=target)
        assert torch.equal(found.bound >= target, torch.full((6,), factor < 1.0))
        assert (found.bound <= plain.primal).all()
        assert (found.iterations < plain.iterations).all()
    # Cuts may prove what the relaxation alone cannot.
    target = plain.bound * 1.02
    found = sdp_bound(problem, keep, target=target, cuts=50)
    assert (found.bound >= target).sum() >= 3
    assert all(found.bound[row] <= minimum_error(problem, row, 8) for row in range(6))


def test_bounds_of_rows_with_one_mask_are_exact() -> None:
    problem = synthetic("correlated", rows=3, d=8).problem()
    found = sdp_bound(problem, torch.tensor([8, 0, 0]))
    assert found.bound[0] == 0.0
    assert torch.equal(found.point, (torch.arange(3) > 0).double().unsqueeze(1).expand(3, 8))
    torch.testing.assert_close(found.bound[1:], problem.scale()[1:], rtol=1e-10, atol=0.0)
    assert (found.bound[1:] <= problem.scale()[1:]).all()
    assert not found.shift.any()
    assert not found.iterations.any()


def test_bounds_of_zero_layers_are_zero() -> None:
    for weight, gram in ((torch.zeros(2, 4), torch.eye(4)), (torch.ones(2, 4), torch.zeros(4, 4))):
        found = sdp_bound(LayerReconstruction(weight, gram), torch.tensor([2, 1]))
        assert not found.bound.any()


def test_one_group_is_a_row_and_groups_are_stronger() -> None:
    problem = synthetic("correlated", rows=4, d=12, seed=5).problem()
    keep = torch.full((4,), 6)
    row = sdp_bound(problem, keep, accuracy=1e-6)
    assert torch.equal(sdp_bound(problem, keep, group=12, accuracy=1e-6).bound, row.bound)
    grouped = sdp_bound(problem, keep, group=4, accuracy=1e-6)
    assert (grouped.bound >= row.bound * (1 - 2e-6)).all()
    best = solve(problem, NM(keep=2, group=4))
    assert float(grouped.bound.sum()) <= best.total


def test_bounds_hold_for_indefinite_forms_with_linear_terms() -> None:
    random = torch.Generator().manual_seed(0)
    d, s = 8, 3
    forms = torch.randn(30, d, d, generator=random, dtype=torch.float64)
    forms = forms + forms.mT
    linear = torch.randn(30, d, generator=random, dtype=torch.float64)
    product = forms + (linear.unsqueeze(1) + linear.unsqueeze(2)) / (2 * s)
    found = bound_forms(product, torch.full((30,), s), accuracy=1e-5)
    p = indicators(d, s)
    minimum = (torch.einsum("pi,bij,pj->bp", p, forms, p) + linear @ p.T).amin(1)
    assert (found.bound <= minimum).all()
    assert (found.primal - found.bound <= 2e-5 * found.primal.abs().clamp_min(1e-2)).all()
    # The values are about -10: the largest gap may be 3, and several bounds are tight.
    assert (minimum - found.bound).median() < 1.0
    assert (minimum - found.bound < 1e-3).sum() >= 5


@pytest.mark.parametrize(
    ("keep", "group", "words"),
    [
        (torch.tensor([1.0, 1.0]), None, "count for each of 2 rows"),
        (torch.tensor([1]), None, "count for each of 2 rows"),
        (torch.tensor([1, 5]), None, r"0 ... 4; got 1 ... 5"),
        (torch.tensor([-1, 2]), None, "0 ... 4"),
        (torch.tensor([2, 2]), 3, "Groups of 3"),
        (torch.tensor([2, 3]), 2, "equally many"),
    ],
    ids=str,
)
def test_impossible_counts_and_groups_are_refused(keep: Tensor, group: int | None, words: str) -> None:
    with pytest.raises(MaskoptError, match=words):
        sdp_bound(LayerReconstruction(torch.ones(2, 4), torch.eye(4)), keep, group=group)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group", [None, 4])
def test_cuda_agrees_with_cpu(group: int | None) -> None:
    instance = synthetic("correlated", rows=6, d=32, seed=3)
    on_cpu = sdp_bound(instance.problem(), torch.full((6,), 16), group=group)
    on_cuda = sdp_bound(instance.problem("cuda"), torch.full((6,), 16), group=group)
    assert on_cuda.bound.device.type == "cuda"
    torch.testing.assert_close(on_cuda.bound.cpu(), on_cpu.bound, rtol=1e-3, atol=0.0)
