"""The object that scripts of the SparseGPT and Wanda family expect."""

import pytest
import torch
from torch import nn

import maskopt
from maskopt.errors import MaskoptError
from maskopt.plugins.scripts import LayerPruner


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(16, 12)


def seen(layer, solver=None):
    pruner = LayerPruner(layer, solver)
    hook = layer.register_forward_hook(lambda _, inputs, output: pruner.add_batch(inputs[0].data, output.data))
    for _ in range(2):
        layer(torch.randn(3, 9, 16))
    hook.remove()
    return pruner


def test_a_fraction_of_each_row_or_n_of_m_is_pruned(layer):
    dense = layer.weight.detach().clone()
    pruner = seen(layer)
    error = pruner.fasterprune(0.25, prune_n=0, prune_m=0, percdamp=0.01, blocksize=128)
    assert (layer.weight != 0).sum(1).tolist() == [12] * 12
    assert error == pruner.result.relative_error < pruner.result.kept_error
    with torch.no_grad():
        layer.weight.copy_(dense)
    pruner.fasterprune(0.5, 3, 4)  # three of four are pruned
    assert ((layer.weight != 0).view(-1, 4).sum(1) == 1).all()
    pruner.free()
    with pytest.raises(MaskoptError, match=r"released by free\(\)"):
        pruner.fasterprune(0.5)


def test_masks_alone_leave_the_other_weights(layer):
    dense = layer.weight.detach().clone()
    seen(layer, maskopt.Wanda()).fasterprune(maskopt.Unstructured(0.5))
    kept = layer.weight != 0
    assert kept.sum() == kept.numel() // 2
    assert torch.equal(layer.weight[kept], dense[kept])


def test_half_precision_layers_are_pruned():
    layer = nn.Linear(16, 12).to(torch.bfloat16)
    pruner = LayerPruner(layer)
    pruner.add_batch(torch.randn(50, 16, dtype=torch.bfloat16))
    assert 0 < pruner.fasterprune(0.5) < 1
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.weight != 0).sum(1).tolist() == [8] * 12


def test_no_inputs_is_a_sentence(layer):
    with pytest.raises(MaskoptError, match="saw no input"):
        LayerPruner(layer).fasterprune(0.5)
