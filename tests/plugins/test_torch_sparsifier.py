"""torch.ao.pruning by its own entry points."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import maskopt
from maskopt.errors import MaskoptError
from maskopt.plugins.torch_prune import observing, reconstruct
from maskopt.plugins.torch_sparsifier import LayerSparsifier

X = torch.randn(60, 16, generator=torch.Generator().manual_seed(3))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


def prepared(solver=None, config=None):
    model, sparsifier = network(), LayerSparsifier(maskopt.PerRow(0.5), solver)
    sparsifier.prepare(model, config)
    with torch.no_grad():
        model(X)
    return model, sparsifier


@pytest.mark.parametrize("solver", [None, maskopt.Wanda(), maskopt.ConditionalADMM()])
def test_it_prunes_as_torch_prune_does(solver):
    model, sparsifier = prepared(solver)
    sparsifier.step()
    assert parametrize.is_parametrized(model[0])
    sparsifier.squash_mask()
    assert not parametrize.is_parametrized(model[0])
    assert not any(module._forward_pre_hooks for module in model.modules())
    other = network()
    with torch.no_grad(), observing(other) as moments:
        other(X)
    for index in (0, 2):
        reconstruct(other[index], "weight", maskopt.PerRow(0.5), moments[str(index)], solver)
        assert torch.equal(model[index].weight, other[index].weight)
        assert (model[index].weight != 0).sum(1).unique().tolist() == [model[index].in_features // 2]


def test_layers_have_settings_of_their_own_and_others_stay():
    config = [{"tensor_fqn": "2.weight", "masks": maskopt.NM(keep=1, group=4), "solver": maskopt.Wanda()}]
    model, sparsifier = prepared(config=config)
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(model[0].weight, network()[0].weight)
    assert ((model[2].weight != 0).view(-1, 4).sum(1) == 1).all()


def test_the_state_holds_the_masks_and_is_restored():
    model, sparsifier = prepared()
    sparsifier.step()
    state = pickle.loads(pickle.dumps(sparsifier.state_dict()))
    other, restored = network(), LayerSparsifier(maskopt.PerRow(0.5))
    restored.prepare(other, None)
    restored.load_state_dict(state)
    restored.squash_mask()
    sparsifier.squash_mask()
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[2].weight, other[2].weight)


def test_later_steps_choose_among_what_is_left():
    model, sparsifier = prepared(maskopt.ConditionalADMM())
    sparsifier.step()
    first = model[0].weight != 0
    for group in sparsifier.groups:
        group["masks"] = maskopt.PerRow(0.25)
    sparsifier.step()
    second = model[0].weight != 0
    assert second.sum(1).tolist() == [4] * 12
    assert not bool((second & ~first).any())


def test_a_step_without_data_says_so():
    model, sparsifier = network(), LayerSparsifier(maskopt.PerRow(0.5))
    sparsifier.prepare(model, None)
    with pytest.raises(MaskoptError, match="saw no input"):
        sparsifier.step()


def test_inputs_by_keyword_are_seen():
    model, sparsifier = network(), LayerSparsifier(maskopt.PerRow(0.5))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    with torch.no_grad():
        model[0](input=X)
    sparsifier.step()
    assert (model[0].weight != 0).sum(1).unique().tolist() == [8]
