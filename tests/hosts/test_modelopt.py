"""ModelOpt by its own entry points."""

import copy

import modelopt.torch.opt as mto
import modelopt.torch.sparsity as mts
import pytest
import torch

import maskopt
from maskopt.plugins.modelopt import MODE
from maskopt.plugins.torch_prune import observing, reconstruct


def layers(model):
    return {name: each for name, each in model.named_modules() if name.endswith("_proj")}


def sparsified(model, windows, **config):
    def run(network):
        for window in windows:
            network(input_ids=window[None])

    return mts.sparsify(copy.deepcopy(model), mode=MODE, config={"forward_loop": run, "verbose": False, **config})


@pytest.mark.parametrize(
    ("masks", "solver"),
    [(maskopt.PerRow(0.25), maskopt.ConditionalADMM()), (maskopt.NM(keep=2, group=4), maskopt.Wanda())],
)
def test_it_prunes_as_the_other_adapters_do(model, windows, masks, solver):
    found = sparsified(model, windows, masks=masks, solver=solver)
    expected = copy.deepcopy(model)
    with torch.no_grad(), observing(expected) as moments:
        for window in windows:
            expected(input_ids=window[None])
    for name, module in layers(expected).items():
        reconstruct(module, "weight", masks, moments[name], solver)
        assert torch.equal(layers(found)[name].weight, module.weight)
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)


def test_zeros_survive_training_saving_and_export(model, windows, tmp_path):
    found = sparsified(model, windows, masks=maskopt.PerRow(0.5))
    zeros = {name: each.weight == 0 for name, each in layers(found).items()}
    assert all((zero.sum(1) == zero.shape[1] // 2).all() for zero in zeros.values())
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        found(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    assert all(torch.equal(each.weight == 0, zeros[name]) for name, each in layers(found).items())
    mto.save(found, tmp_path / "saved.pt")
    restored = mto.restore(copy.deepcopy(model), tmp_path / "saved.pt")
    with torch.no_grad():
        assert torch.equal(restored(input_ids=windows).logits, found(input_ids=windows).logits)
    exported = mts.export(found)
    assert all(torch.equal(each.weight == 0, zeros[name]) for name, each in layers(exported).items())
    assert type(layers(exported)["model.layers.0.mlp.up_proj"]) is torch.nn.Linear


def test_no_data_says_so(model):
    with pytest.raises(maskopt.MaskoptError, match="give the config a forward_loop"):
        mts.sparsify(model, mode=MODE, config={"verbose": False})
