"""Objectives that span layers: values and gradients against direct evaluation and finite differences."""

import copy

import pytest
import torch
from torch import nn

import maskopt
from maskopt.errors import MaskoptError
from maskopt.oracles import NM, PerRow, Product, Unstructured
from maskopt.problems import BlockReconstruction, ModelDivergence, NetworkObjective
from maskopt.solvers import DIRECTIONS, FrankWolfe

NAMES = ["0.weight", "2.weight"]


def network(dtype=torch.float64, unit=1.0):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).to(dtype)
    module[2].weight.data *= unit
    return module


def inputs(count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def objective(kind, module, xs):
    batches = [((x,), {}) for x in xs]
    if kind == "block":
        # Targets that the dense module does not reach, as behind pruned blocks.
        return BlockReconstruction(module, NAMES, batches, [module(1.1 * x).detach() for x in xs])
    return ModelDivergence(module, NAMES, batches)


def directly(kind, module, xs, masks):
    """The loss of the module with masked weights, written out."""
    pruned = copy.deepcopy(module)
    for name, mask in masks.items():
        pruned.get_parameter(name).data.mul_(mask)
    with torch.no_grad():
        if kind == "block":
            targets = [module(1.1 * x) for x in xs]
            errors = [((pruned(x) - y) ** 2).sum() for x, y in zip(xs, targets, strict=True)]
            return float(sum(errors) / sum((y**2).sum() for y in targets))
        losses = []
        for x in xs:
            dense, now = module(x).log_softmax(-1), pruned(x).log_softmax(-1)
            losses.append(nn.functional.kl_div(now, dense, log_target=True, reduction="batchmean"))
        return float(sum(losses) / len(losses))


@pytest.mark.parametrize("kind", ["block", "model"])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e3])
def test_values_are_those_of_masked_modules(kind, unit):
    module, xs = network(unit=unit), inputs()
    problem = objective(kind, module, xs)
    before = copy.deepcopy(module.state_dict())
    sets = Product([(PerRow(0.5), problem.shapes[0]), (NM(keep=2, group=4), problem.shapes[1])])
    mask = sets.lmo_mask(torch.rand(problem.shape, generator=torch.Generator().manual_seed(2)))
    expected = directly(kind, module, xs, problem.masks(mask))
    assert float(problem.objective(mask)) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert torch.equal(problem.join(problem.masks(mask)), mask)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("kind", ["block", "model"])
@pytest.mark.parametrize("unit", [1e-2, 1.0, 1e3])
def test_gradients_are_those_of_finite_differences(kind, unit):
    problem = objective(kind, network(unit=unit), inputs())
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(problem.shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(problem.shape, generator=generator, dtype=torch.float64)
    step = 1e-6
    slopes = [float(problem.value(problem.evaluate(x + sign * step * direction))) for sign in (1, -1)]
    along = float((problem.evaluate(x).gradient * direction).sum())
    size = float(problem.value(problem.evaluate(x)))
    assert along == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-5, abs=1e-8 * size / step * 1e-2)


@pytest.mark.parametrize("kind", ["block", "model"])
def test_sampled_gradients_have_the_true_gradient_as_mean(kind):
    problem = objective(kind, network(), inputs(4))
    x = torch.full(problem.shape, 0.6, dtype=torch.float64)
    random = torch.Generator().manual_seed(4)
    draws = torch.stack([problem.sampled(x, 0.25, random) for _ in range(400)])
    each = {tuple(draw.flatten()[:3].tolist()) for draw in draws}
    assert len(each) == 4  # one batch each time
    singles = torch.stack([objective_of(problem, index, x) for index in range(4)])
    torch.testing.assert_close(singles.mean(0), problem.evaluate(x).gradient)
    error = (draws.mean(0) - problem.evaluate(x).gradient).norm() / problem.evaluate(x).gradient.norm()
    assert float(error) < 0.2


def objective_of(problem, index, x):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.of_batch(leaf, index), leaf)
    return gradient


@pytest.mark.parametrize("rule", ["vanilla", "away", "dicg", "momentum", "stochastic"])
def test_frank_wolfe_runs_on_them(rule):
    problem = objective("block", network(), inputs())
    masks = Product([(PerRow(0.5), problem.shapes[0]), (Unstructured(0.5), problem.shapes[1])])
    result = maskopt.solve(problem, masks, FrankWolfe(direction=DIRECTIONS[rule](), iterations=100))
    assert masks.contains(result.mask)
    assert result.lower_bound is None
    scores = torch.cat([problem._weights[name].abs().flatten() for name in NAMES]).unsqueeze(0)
    magnitude = masks.lmo_mask(-scores)
    assert float(result.total) < float(problem.objective(magnitude))


def test_transposed_weights_have_masks_in_rows_and_inputs():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(network()[0].weight.detach().T.contiguous())

        def forward(self, x):
            return x @ self.weight

    module, xs = Transposed(), inputs()
    batches = [((x,), {}) for x in xs]
    problem = BlockReconstruction(module, ["weight"], batches, [module(x) for x in xs], transposed=["weight"])
    assert problem.shapes == [(8, 6)]
    mask = PerRow(2).lmo_mask(torch.rand(8, 6))
    weight = module.weight.detach()
    expected = sum(((x @ (weight * ~mask.T)) ** 2).sum() for x in xs) / sum(((x @ weight) ** 2).sum() for x in xs)
    assert float(problem.objective(mask.reshape(1, -1))) == pytest.approx(float(expected), rel=1e-9)


def test_errors_say_what_is_wrong():
    module, xs = network(), inputs()
    batches = [((x,), {}) for x in xs]
    targets = [module(x) for x in xs]
    cases = [
        (lambda: BlockReconstruction(module, ["1.weight"], batches, targets), "no parameter '1.weight'"),
        (lambda: BlockReconstruction(module, [], batches, targets), "no parameter to mask"),
        (lambda: BlockReconstruction(module, ["0.bias"], batches, targets), "matrices"),
        (lambda: BlockReconstruction(module, NAMES, batches, targets[:1]), "1 targets"),
        (lambda: BlockReconstruction(module, NAMES, [], []), "no batches"),
        (lambda: NetworkObjective(module, NAMES, batches, lambda output, index: output), "must be one number"),
        (lambda: Product([]), "at least one"),
        (lambda: Product([(PerRow(0.5), (2, 3)), (NM(keep=2, group=4), (2, 6))]), "divisible by 4"),
        (lambda: Product([(PerRow(0.5), (2, 3))]).lmo(torch.zeros(1, 7)), "6 entries"),
        (lambda: Product([(PerRow(0.5), (2, 3))]).check((1, 7)), "6 entries"),
    ]
    for call, words in cases:
        with pytest.raises(MaskoptError, match=words):
            call()
