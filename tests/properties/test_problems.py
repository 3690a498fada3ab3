"""Objectives against the inputs they come from, finite differences and each other, on edge-case layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskopt.problems import Point, Problem, Saliency
from tests.helpers import Layer, examples, layers, magnitudes

AMOUNTS = st.sampled_from([0.0, 1.0, 0.37, -2.0, 1e6])


def close(actual: Tensor, expected: Tensor, size: Tensor | float) -> None:
    """Compare to twelve digits of `size`, the sum of what is added up; exactly where that vanishes."""
    size = torch.as_tensor(size, dtype=torch.float64).expand_as(expected)
    assert actual.shape == expected.shape
    assert bool(((actual.double() - expected.double()).abs() <= 1e-12 * size).all()), (actual, expected)


def relaxed(data: st.DataObject, shape: tuple[int, int], label: str = "x") -> Tensor:
    kind, seed = (
        data.draw(st.sampled_from(["mask", "inside", "outside", "ends"]), label),
        data.draw(st.integers(0, 999)),
    )
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "mask":
        return (x < 0.5).double()
    if kind == "ends":
        return torch.full_like(x, float(seed % 2))
    return 3 * x - 1 if kind == "outside" else x


def problem_of(data: st.DataObject, layer: Layer) -> tuple[Problem, Tensor]:
    """Return one of the problems made of a layer, and the size of what its rows sum up."""
    problem, size = layer.problem(), magnitudes(layer.weight, layer.gram)
    kind = data.draw(st.sampled_from(["layer", "shifted", "shifted by another", "saliency", "shifted saliency"]))
    if kind == "layer":
        return problem, size / problem.unit
    if kind == "shifted":
        amount = data.draw(AMOUNTS)
        return problem.shifted(problem.diagonal(), amount), size / problem.unit * (1 + abs(amount))
    diagonal = (torch.arange(layer.weight.numel()).view(layer.shape) % 5 - 2).double()
    if kind == "shifted by another":
        amount = data.draw(AMOUNTS)
        return problem.shifted(diagonal, amount), size / problem.unit + (1 + abs(amount)) * 2 * layer.shape[1]
    saliency = Saliency.wanda(problem.scaled_weight, problem.scaled_gram)
    size = saliency.scores.sum(1) + 2 * layer.shape[1]
    return (saliency if kind == "saliency" else saliency.shifted(diagonal, 0.5)), size


@given(layers(), st.integers(0, 999))
@examples(300)
def test_objective_is_the_output_error(layer: Layer, seed: int) -> None:
    mask = torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    problem = layer.problem()
    outputs = layer.weight @ layer.x - (mask * layer.weight) @ layer.x
    error, size = outputs.square().sum(1), magnitudes(layer.weight, layer.gram)
    close(problem.objective(mask), error, size)
    close(problem.value(problem.evaluate(mask.double())) * problem.unit, error, size)
    close(problem.scale(), (layer.weight @ layer.x).square().sum(1), size)
    assert bool((problem.objective(mask) >= 0).all())
    assert torch.equal(problem.objective(torch.ones_like(mask)), torch.zeros(layer.shape[0], dtype=torch.float64))
    assert torch.equal(problem.objective(torch.zeros_like(mask)), problem.scale())


@given(layers(exact=True), st.integers(0, 999))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@examples(100)
def test_integers_give_exact_objectives(dtype: torch.dtype, layer: Layer, seed: int) -> None:
    mask = torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    problem = layer.problem(dtype)
    outputs = layer.weight @ layer.x - (mask * layer.weight) @ layer.x
    assert torch.equal(problem.objective(mask), outputs.square().sum(1))


@given(st.data(), layers())
@examples(200)
def test_gradient_is_the_finite_difference(data: st.DataObject, layer: Layer) -> None:
    problem, size = problem_of(data, layer)
    x = relaxed(data, layer.shape)
    gradient = problem.gradient(problem.evaluate(x.clone()))
    for column in range(layer.shape[1]):
        step = torch.zeros_like(x)
        step[:, column] = 0.5  # central differences of a quadratic are exact for any step
        ahead, behind = problem.value(problem.evaluate(x + step)), problem.value(problem.evaluate(x - step))
        close(gradient[:, column], ahead - behind, 20 * size)
        curvature = ahead + behind - 2 * problem.value(problem.evaluate(x))
        close(problem.diagonal()[:, column] * 0.5, curvature, 20 * size)


@given(st.data(), layers())
@examples(200)
def test_hessian_is_the_change_of_the_gradient(data: st.DataObject, layer: Layer) -> None:
    problem, size = problem_of(data, layer)
    a, b = relaxed(data, layer.shape), relaxed(data, layer.shape)
    change = problem.gradient(problem.evaluate(b)) - problem.gradient(problem.evaluate(a))
    direction = problem.hvp(b - a)
    assert torch.equal(direction.vector, b - a)
    close(problem.hessian(direction), change, 20 * size.unsqueeze(1))


@given(st.data(), layers(), st.floats(-1, 2))
@examples(200)
def test_a_line_is_a_quadratic(data: st.DataObject, layer: Layer, step_size: float) -> None:
    problem, size = problem_of(data, layer)
    a, b = relaxed(data, layer.shape), relaxed(data, layer.shape)
    point = problem.evaluate(a.clone())
    direction = problem.hvp(b - a)
    slope = (problem.gradient(point) * direction.vector).sum(1)
    curvature = (problem.hessian(direction) * direction.vector).sum(1)
    expected = problem.value(point) + step_size * slope + 0.5 * step_size**2 * curvature
    close(problem.value(problem.evaluate(a + step_size * (b - a))), expected, 100 * size)


@given(st.data(), layers())
@examples(150)
def test_carried_points_are_the_points(data: st.DataObject, layer: Layer) -> None:
    problem, size = problem_of(data, layer)
    a, b, c = (relaxed(data, layer.shape) for _ in range(3))
    fractions = torch.linspace(0, 1, layer.shape[0], dtype=torch.float64).unsqueeze(1)
    point = problem.evaluate(a.clone())
    direction = problem.hvp(b - a)
    direction.blend_(problem.hvp(c - a), fractions)
    direction.scale_(fractions * 0.75)
    problem.advance(point, direction, 1 - fractions)
    there = a + (1 - fractions) * fractions * 0.75 * ((1 - fractions) * (b - a) + fractions * (c - a))
    close(point.x, there, 10.0)
    fresh = problem.evaluate(there)
    close(problem.gradient(point), problem.gradient(fresh), 100 * size.unsqueeze(1))
    close(problem.value(point), problem.value(fresh), 100 * size)


@given(layers(), AMOUNTS, st.integers(0, 999))
@examples(200)
def test_no_mask_sees_the_shift(layer: Layer, amount: float, seed: int) -> None:
    mask = torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    problem = layer.problem()
    for diagonal in (problem.diagonal(), -problem.diagonal(), torch.full_like(problem.weight, 1e9)):
        shifted = problem.shifted(diagonal, amount)
        point = problem.evaluate(mask.double())
        assert torch.equal(shifted.objective(mask), problem.objective(mask))
        assert torch.equal(shifted.value(point), problem.value(point))
        assert torch.equal(shifted.shifted(diagonal, amount).value(point), problem.value(point))
        assert torch.equal(shifted.scale(), problem.scale())
        assert (shifted.shape, shifted.dtype, shifted.device) == (problem.shape, problem.dtype, problem.device)


@given(layers())
@examples(60)
def test_a_full_shift_removes_the_diagonal(layer: Layer) -> None:
    problem = layer.problem()
    assert torch.equal(problem.shifted(problem.diagonal()).diagonal(), torch.zeros(layer.shape, dtype=torch.float64))


@given(st.data(), layers(rows=(1, 6)))
@examples(150)
def test_rows_are_slices(data: st.DataObject, layer: Layer) -> None:
    problem, size = problem_of(data, layer)
    index = data.draw(st.slices(layer.shape[0]).filter(lambda s: (s.step or 1) > 0 and range(layer.shape[0])[s]))
    part, size = problem.rows(index), size[index]
    x = relaxed(data, layer.shape)
    point, inside = problem.evaluate(x.clone()), part.evaluate(x[index].clone())
    assert part.shape == tuple(x[index].shape)
    product = part.hessian(part.hvp(x[index].clone()))
    close(product, problem.hessian(problem.hvp(x.clone()))[index], 10 * size.unsqueeze(1))
    close(part.value(inside), problem.value(point)[index], size)
    close(part.gradient(inside), problem.gradient(point)[index], 10 * size.unsqueeze(1))
    assert torch.equal(part.diagonal(), problem.diagonal()[index])
    mask = x > 0.5
    unit = getattr(layer.problem(), "unit", 1.0)
    close(part.objective(mask[index]), problem.objective(mask)[index], size * max(1.0, unit))
    close(part.scale(), problem.scale()[index], size * max(1.0, unit))


@given(layers(), st.integers(-90, 90), st.integers(-40, 40), st.integers(0, 999))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@examples(100)
def test_units_multiply_the_objective(
    dtype: torch.dtype, layer: Layer, weight_unit: int, x_unit: int, seed: int
) -> None:
    mask = torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    big = Layer(layer.weight * 2.0**weight_unit, layer.x * 2.0**x_unit, layer.name)
    plain, scaled = layer.problem(dtype), big.problem(dtype)
    factor = 2.0 ** (2 * (weight_unit + x_unit))
    assert torch.equal(scaled.objective(mask), plain.objective(mask) * factor)
    assert torch.equal(scaled.scale(), plain.scale() * factor)
    # Scaled data are of ordinary size: no overflow, and no underflow of relevant entries.
    gradient = scaled.gradient(scaled.evaluate(mask.to(dtype)))
    assert bool(torch.isfinite(gradient).all())
    ratio = plain.unit / scaled.unit * factor
    torch.testing.assert_close(gradient.double(), plain.gradient(plain.evaluate(mask.to(dtype))).double() * ratio)


@given(layers())
@examples(100)
def test_float32_is_close_to_float64(layer: Layer) -> None:
    narrow, wide = layer.problem(torch.float32), layer.problem()
    mask = torch.arange(layer.weight.numel()).view(layer.shape) % 3 == 0
    size = magnitudes(layer.weight, layer.gram)
    assert bool(((narrow.objective(mask) - wide.objective(mask)).abs() <= 1e-6 * size).all())
    point = narrow.double().evaluate(mask.double())
    close(narrow.double().value(point) * narrow.unit, narrow.objective(mask), 10 * size)
    assert narrow.double().dtype == torch.float64


@given(layers(rows=(1, 5), d=(1, 7)))
@examples(150)
def test_wanda_is_the_error_of_one_entry(layer: Layer) -> None:
    scores = Saliency.wanda(layer.weight, layer.gram).scores
    problem = layer.problem()
    for column in range(layer.shape[1]):
        mask = torch.ones(layer.shape, dtype=torch.bool)
        mask[:, column] = False
        close(scores[:, column].square(), problem.objective(mask), 10 * magnitudes(layer.weight, layer.gram))


@given(layers(rows=(1, 5), d=(1, 7)))
@examples(100)
def test_ria_agrees_with_loops(layer: Layer) -> None:
    scores = Saliency.ria(layer.weight, layer.gram, power=0.5).scores
    size = layer.weight.abs().tolist()
    for i, row in enumerate(size):
        for j, entry in enumerate(row):
            column = sum(other[j] for other in size)
            relative = (entry / sum(row) + entry / column) if entry else 0.0
            expected = relative * float(layer.x[j].square().sum().sqrt()) ** 0.5
            assert float(scores[i, j]) == pytest.approx(expected, rel=1e-12, abs=0.0)


@given(layers())
@examples(60)
def test_saliency_is_linear(layer: Layer) -> None:
    problem = Saliency.magnitude(layer.weight)
    mask = torch.arange(layer.weight.numel()).view(layer.shape) % 2 == 0
    point = problem.evaluate(mask.double())
    assert isinstance(point, Point)
    size = layer.weight.abs().sum(1)
    close(problem.value(point), problem.objective(mask), size)
    close(problem.objective(mask), (layer.weight.abs() * ~mask).sum(1), size)
    close(problem.scale(), size, size)
    assert not problem.diagonal().any()
