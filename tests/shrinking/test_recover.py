"""Models that became narrower are fitted to what they were made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import maskopt
from maskopt.errors import MaskoptError
from maskopt.recovery import Recovery
from maskopt.shrinking import drop_experts, shrink
from tests.models.conftest import VOCABULARY
from tests.models.families import build
from tests.shrinking.made import made


def windows() -> list[Tensor]:
    ids = torch.randint(3, VOCABULARY, (24, 2, 16), generator=torch.Generator().manual_seed(1))
    return list(ids)


@torch.no_grad()
def divergence(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    found = []
    for ids in windows():
        one, two = (each(input_ids=ids, use_cache=False).logits.log_softmax(-1) for each in (dense, model))
        found.append((one.exp() * (one - two)).sum(-1).mean())
    return float(torch.stack(found).mean())


NARROWED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "neurons and heads": ("llama", lambda model: shrink(model, windows(), neurons=0.3, heads=0.5, refit="units")),
    "experts": ("mixtral", lambda model: drop_experts(model, windows(), 0.25)),
}


@pytest.mark.parametrize(("family", "narrow"), NARROWED.values(), ids=NARROWED)
def test_narrower_models_come_nearer(family: str, narrow: Callable[[PreTrainedModel], object]) -> None:
    model = made(family)
    dense = copy.deepcopy(model)
    narrow(model)
    shapes, before = {name: each.shape for name, each in model.named_parameters()}, divergence(model, dense)
    report = maskopt.recover(model, dense, windows(), Recovery("model", epochs=2))
    assert {name: each.shape for name, each in model.named_parameters()} == shapes
    assert all(record.after <= record.before for record in report.recovery)
    assert report.recovery[-1].accepted
    assert divergence(model, dense) < before
    assert report.sparsity == 0
    assert report.to_json()["sparsity"] == 0


def test_zeros_of_a_narrower_model_stay() -> None:
    model = made("llama")
    dense = copy.deepcopy(model)
    shrink(model, windows(), neurons=0.5, refit="units")
    masks = maskopt.prune(model, windows(), maskopt.NM(keep=2, group=4)).masks
    report = maskopt.recover(model, dense, windows(), Recovery("model", epochs=1))
    assert set(report.masks) == set(masks)
    for name, mask in report.masks.items():
        assert not bool(model.get_submodule(name).weight[~mask].any())
    assert report.sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("changes", [{"hidden_size": 8}, {"num_hidden_layers": 1}, {"intermediate_size": 96}], ids=str)
def test_models_that_differ_in_more_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(MaskoptError, match="do not belong together"):
        maskopt.recover(build("llama", **changes), build("llama"), windows())
