"""Layers on a GPU, where there is one: the quality that the CPU gets, and proofs that hold.

Products are rounded differently there, so that single weights of a mask may differ; its error hardly does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maskopt.bounds import BoundKind, column_bound, mask_bound
from maskopt.models.sums import add_product, add_square, mirror, multipliable
from maskopt.oracles import MaskSet, PerRow, Units, Unstructured
from maskopt.precision import full_precision
from maskopt.problems import ColumnSubset, LayerReconstruction, Problem, QuadraticForm, Saliency, synthetic
from maskopt.solvers import FrankWolfe, Solver, Status, make_solver, solve
from maskopt.structured import STRUCTURED, make_structured
from maskopt.weights import WEIGHTS, make_weights
from tests.devices.gpu import CUDA, needs_gpu
from tests.devices.test_solvers import elsewhere, pairs
from tests.helpers import ALL_SETS, EXACT, FRANK_WOLFE, SOLVERS
from tests.products import allowed, matmul_settings

__all__ = ["allowed"]

pytestmark = needs_gpu

SHAPE, TINY = (12, 24), (2, 6)
LAYER = synthetic("correlated", *SHAPE, seed=3).problem()
METHODS: dict[str, Solver] = {**SOLVERS, **{name: make_weights(name) for name in WEIGHTS if name != "keep"}}


def there(layer: LayerReconstruction) -> LayerReconstruction:
    return elsewhere(layer, CUDA)


def compare(layer: LayerReconstruction, masks: MaskSet, solver: Solver, within: float = 0.02) -> None:
    """Check that a solver finds an equally good mask on both devices, and says where."""
    here, found = solve(layer, masks, solver), solve(there(layer), masks, solver)
    assert found.mask.device == found.objective.device == CUDA
    assert found.weight is None or found.weight.device == CUDA
    assert masks.contains(found.mask)
    assert found.total == pytest.approx(here.total, rel=within)


@pytest.mark.parametrize(("name", "kind"), pairs(METHODS, list(ALL_SETS), LAYER))
def test_methods_agree_with_the_cpu(name: str, kind: str) -> None:
    compare(LAYER, ALL_SETS[kind](SHAPE, 0.5), METHODS[name])


@pytest.mark.parametrize(("name", "kind"), pairs(FRANK_WOLFE, ["per-row", "unstructured", "units"], LAYER))
def test_directions_agree_with_the_cpu(name: str, kind: str) -> None:
    compare(LAYER, ALL_SETS[kind](SHAPE, 0.5), replace(FRANK_WOLFE[name], iterations=60))


@pytest.mark.parametrize(
    ("name", "kind"), pairs(EXACT, ["per-row", "restricted at most blocks"], synthetic(rows=2, d=6).problem())
)
def test_exact_solvers_find_the_same_optimum(name: str, kind: str) -> None:
    compare(synthetic("correlated", *TINY, seed=2).problem(), ALL_SETS[kind](TINY, 0.5), EXACT[name], within=1e-5)


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("width", [1, 4])
def test_units_agree_with_the_cpu(name: str, width: int) -> None:
    compare(LAYER, Units(Unstructured(12 // width), (None, width)), make_structured(name))


@pytest.mark.parametrize("name", ["continuation", "best"])
def test_targets_of_pruned_predecessors_agree_with_the_cpu(name: str) -> None:
    noise = torch.randn(LAYER.gram.shape, generator=torch.Generator().manual_seed(0))
    cross = LAYER.gram + 0.1 * noise * LAYER.gram.diagonal().mean()
    data = (LAYER.weight, LAYER.gram, cross)
    here = solve(LayerReconstruction.towards(*data), PerRow(0.5), METHODS[name])
    found = solve(LayerReconstruction.towards(*(part.to(CUDA) for part in data)), PerRow(0.5), METHODS[name])
    assert found.total == pytest.approx(here.total, rel=0.02)


def _problems(device: torch.device) -> dict[str, Problem]:
    weight, gram = LAYER.weight.to(device), LAYER.gram.to(device)
    return {
        "quadratic form": QuadraticForm(gram, weight),
        "saliency": Saliency.wanda(weight, gram),
        "float64": LayerReconstruction(weight.double(), gram.double()),
        "columns": ColumnSubset.of(LayerReconstruction(weight, gram)),
    }


@pytest.mark.parametrize("name", _problems(torch.device("cpu")))
def test_other_objectives_agree_with_the_cpu(name: str) -> None:
    # Gradients with respect to columns come from a factorisation for each evaluation.
    masks = PerRow(12)
    here = solve(_problems(torch.device("cpu"))[name], masks, FrankWolfe(iterations=40))
    found = solve(_problems(CUDA)[name], masks, FrankWolfe(iterations=40))
    assert found.mask.device == CUDA
    assert found.total == pytest.approx(here.total, rel=0.02)


# What is proven on the GPU is compared with optima in float64 on the CPU.


def _scaled(seed: int, input_scale: float, weight_scale: float) -> LayerReconstruction:
    """Return a tiny layer, one input and one weight of which are many times the others."""
    made = synthetic("correlated", *TINY, seed=seed)
    scale = torch.ones(TINY[1], dtype=torch.float64)
    scale[seed % TINY[1]] = input_scale
    gram = made.gram.double() * scale * scale.unsqueeze(1)
    weight = made.weight.double()
    weight[0, (seed + 1) % TINY[1]] *= weight_scale
    return LayerReconstruction(weight.float(), gram.float())


SCALES = [(1.0, 1.0), (1e3, 1.0), (1e6, 1e-3), (1e-6, 1e6), (1.0, 1e9), (1e9, 1.0), (1e-9, 1e9)]


@pytest.mark.parametrize("kind", ["shift", "sdp", "cuts"])
@pytest.mark.parametrize(("inputs", "weights"), SCALES)
def test_no_bound_is_above_the_optimum(kind: BoundKind, inputs: float, weights: float) -> None:
    masks = PerRow(0.5)
    for seed in range(6):
        layer = _scaled(seed, inputs, weights)
        optimum = solve(layer.double(), masks, EXACT["brute-force"]).objective
        bound = mask_bound(there(layer), masks, kind)
        assert (bound.cpu() <= optimum * (1 + 1e-13)).all(), seed


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("inputs", "weights"), SCALES)
def test_what_is_called_optimal_is(name: str, inputs: float, weights: float) -> None:
    for seed in range(3):
        layer = _scaled(seed, inputs, weights)
        optimum = solve(layer.double(), PerRow(0.5), EXACT["brute-force"]).objective
        found = solve(there(layer), PerRow(0.5), EXACT[name])
        if found.lower_bound is not None:
            assert (found.lower_bound.cpu() <= optimum * (1 + 1e-13)).all(), seed
        if found.status is Status.OPTIMAL:
            errors = layer.double().objective(found.mask.cpu())
            assert (errors <= optimum * (1 + 1e-6)).all(), seed


@pytest.mark.parametrize("kind", ["plain", "diagonal", "forms"])
def test_bounds_on_columns_agree_with_the_cpu(kind: str) -> None:
    here = column_bound(ColumnSubset.of(LAYER), 12, kind)  # type: ignore[arg-type]
    found = column_bound(ColumnSubset.of(there(LAYER)), 12, kind)  # type: ignore[arg-type]
    best = solve(LAYER, Units(Unstructured(12), (None, 1)), make_structured("best")).total
    assert found.bound == pytest.approx(here.bound, rel=0.01)
    assert found.bound <= best


# Products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 1000])
def test_products_are_summed_in_float32_whatever_the_caller_allows(
    allowed: list[object], dtype: torch.dtype, size: int
) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(4096, size, generator=random)
    rows[:, 1::4] *= 2.0**-10  # smaller inputs keep their digits
    rows = rows.to(dtype)
    exact = rows.double().T @ rows.double()
    scale = exact.diagonal().sqrt()
    total, cross = torch.zeros(size, size, device=CUDA), torch.zeros(size, size, device=CUDA)
    with full_precision():
        add_square(total, multipliable(rows.to(CUDA)))
        add_product(cross, multipliable(rows.to(CUDA)), multipliable(rows.to(CUDA)))
    assert matmul_settings() == allowed
    mirror(total)
    assert torch.equal(total, total.T)
    # Tensor cores add 8 or 16 products at a time and cut the sum off: at most 2^-23 of a sum, each time that they do.
    cut = 2**-23 * 2048 / 8
    within = 2e-6 if dtype == torch.float32 else cut
    for matrix in (total, cross):
        assert ((matrix.cpu().double() - exact).abs() / scale / scale.unsqueeze(1)).max() < within


def test_a_solver_computes_in_float32_whatever_the_caller_allows(allowed: list[object]) -> None:
    layer = there(synthetic("correlated", rows=128, d=256, seed=0).problem())
    with torch.autocast("cuda", torch.bfloat16):
        found = solve(layer, PerRow(0.5), make_solver("continuation"))
    assert matmul_settings() == allowed
    with full_precision():
        expected = solve(layer, PerRow(0.5), make_solver("continuation"))
    assert torch.equal(found.mask, expected.mask)
    assert found.total == expected.total


@pytest.mark.parametrize("name", ["continuation", "best", "alps", "sparsegpt", "one-swap"])
def test_a_repetition_gives_the_same_bits(name: str) -> None:
    layer = there(synthetic("correlated", rows=256, d=512, seed=0).problem())
    one, other = (solve(layer, PerRow(0.5), METHODS[name]) for _ in range(2))
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.objective, other.objective)
    assert one.weight is None or torch.equal(one.weight, other.weight)
