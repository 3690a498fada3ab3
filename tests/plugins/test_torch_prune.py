"""torch.nn.utils.prune by its own entry points."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import maskopt
from maskopt.errors import MaskoptError
from maskopt.plugins import torch_prune
from maskopt.plugins.moments import InputMoments
from maskopt.plugins.torch_prune import Reconstruction, observing, reconstruct


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), Conv1D(4, 8)).eval()


@pytest.fixture
def model():
    return network()


@pytest.fixture
def moments(model):
    with torch.no_grad(), observing(model) as found:
        for _ in range(3):
            model(torch.randn(5, 7, 16))
    return found


def test_moments_are_those_of_the_inputs(model):
    x = torch.randn(5, 7, 16)
    with torch.no_grad(), observing(model, include=["2"]) as found:
        model(x)
        inner = model[1](model[0](x)).flatten(0, 1)
    assert list(found) == ["2"]
    assert found["2"].tokens == 35
    torch.testing.assert_close(found["2"].gram, inner.T @ inner)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("solver", [None, maskopt.Wanda(), maskopt.ConditionalADMM()])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_layer_is_pruned_as_solve_does(model, moments, solver, index):
    module = model[index]
    dense = module.weight.detach().clone()
    oriented = dense.T if index == 4 else dense
    problem = maskopt.LayerReconstruction(
        oriented.clone(), moments[str(index)].gram.clone(), moments[str(index)].tokens
    )
    expected = maskopt.solve(problem, maskopt.NM(keep=2, group=4), solver)
    assert reconstruct(module, "weight", maskopt.NM(keep=2, group=4), moments[str(index)], solver) is module
    assert prune.is_pruned(model)
    kept = expected.mask.T if index == 4 else expected.mask
    assert torch.equal(module.weight_mask, kept.float())
    prune.remove(module, "weight")
    wanted = oriented * expected.mask if expected.weight is None else expected.weight
    assert torch.equal(module.weight.detach(), wanted.T if index == 4 else wanted)
    assert torch.isfinite(model(torch.randn(2, 16))).all()


@pytest.mark.parametrize("masks", [maskopt.NM(keep=2, group=4), maskopt.PerRow(0.5), maskopt.Unstructured(0.5)])
def test_a_convolution_is_pruned_as_the_linear_map_of_its_patches(masks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 2))
    images = nn.functional.avg_pool2d(torch.randn(8, 4, 16, 16), 5, 1)
    dense = model[0](images).detach()
    with torch.no_grad(), observing(model) as found:
        model(images)
    errors = []
    for solver in (maskopt.Wanda(), maskopt.ConditionalADMM()):
        pruned = copy.deepcopy(model[0])
        reconstruct(pruned, "weight", masks, found["0"], solver)
        prune.remove(pruned, "weight")
        assert masks.contains(pruned.weight.detach().flatten(1) != 0)
        errors.append(float((pruned(images).detach() - dense).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_later_prunings_stay_within_earlier_ones(model, moments):
    module = model[0]
    prune.random_unstructured(module, "weight", 0.3)
    earlier = module.weight_mask.bool()
    reconstruct(module, "weight", maskopt.PerRow(0.5), moments["0"], maskopt.ConditionalADMM())
    later = module.weight_mask.bool()
    assert not bool((later & ~earlier).any())
    assert torch.equal(later.sum(1), earlier.sum(1).clamp(max=8))
    torch.testing.assert_close(module.weight, module.weight_orig * later)
    reconstruct(module, "weight", maskopt.PerRow(0.25), moments["0"])
    assert not bool((module.weight_mask.bool() & ~later).any())
    assert module.weight_mask.sum(1).max() == 4


def test_the_class_is_used_like_those_of_torch(model, moments):
    Reconstruction.apply(model[0], "weight", maskopt.PerRow(0.5), moments["0"], solver=maskopt.Wanda())
    assert (model[0].weight != 0).sum(1).tolist() == [8] * 12
    restored = network(1)
    prune.identity(restored[0], "weight")
    restored.load_state_dict(model.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(restored(x), model(x))


def test_masks_are_handed_over(model):
    masks = {"0": torch.rand(12, 16) > 0.5, "4": torch.rand(8, 4) > 0.5}
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    assert torch_prune.apply(model, masks) == ["0", "4"]
    for name, mask in masks.items():
        module = model.get_submodule(name)
        assert torch.equal(module.weight, weights[name] * mask)
        prune.remove(module, "weight")
        assert torch.equal(module.weight, weights[name] * mask)


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"0": torch.ones(12, 16), "x": torch.ones(1)}, "no module x with a weight"),
        ({"0": torch.ones(12, 16), "1": torch.ones(1)}, "no module 1 with a weight"),
        ({"0": torch.full((12, 16), 0.5)}, "must be boolean, or 0 and 1"),
        ({"0": torch.full((12, 16), torch.nan)}, "must be boolean, or 0 and 1"),
        ({"0": torch.ones(16, 12)}, r"has shape \(16, 12\), but its weight \(12, 16\)"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(model, masks, said):
    with pytest.raises(MaskoptError, match=said):
        torch_prune.apply(model, masks)
    assert not prune.is_pruned(model)


def test_what_cannot_be_pruned_says_so(model, moments):
    with pytest.raises(MaskoptError, match="A Tanh cannot be pruned by its inputs"):
        InputMoments(model[1])
    with pytest.raises(MaskoptError, match="saw no input"):
        reconstruct(model[0], "weight", maskopt.PerRow(0.5), InputMoments(model[0]))
    with pytest.raises(MaskoptError, match=r"Only the parameter weight can be pruned .* got 'bias'"):
        reconstruct(model[0], "bias", maskopt.PerRow(0.5), moments["0"])
    with pytest.raises(MaskoptError, match="have 3 features, but the module has 16 inputs"):
        moments["0"].add(torch.ones(2, 3))
    moments["0"].add(torch.full((1, 16), 1e30))
    with pytest.raises(MaskoptError, match="not finite, or too large"):
        reconstruct(model[0], "weight", maskopt.PerRow(0.5), moments["0"])
    with pytest.raises(MaskoptError, match="No linear module of the model has a name like x"), observing(model, ["x"]):
        pass
    assert not prune.is_pruned(model)
