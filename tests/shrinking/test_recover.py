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
from maskopt.models.objectives import BlockOutput
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


@pytest.mark.parametrize("widths", ["uniform", "free"])
def test_blocks_are_fitted_to_further_windows_and_units_chosen_without(
    monkeypatch: pytest.MonkeyPatch, widths: Any
) -> None:
    squared: set[tuple[int, ...]] = set()
    errors = BlockOutput._losses

    def measured(self: BlockOutput, index: int) -> Tensor:
        squared.update(rows(self._data.batches[index].inputs["input_ids"]))
        return errors(self, index)

    def rows(ids: Tensor) -> list[tuple[int, ...]]:
        return [tuple(row) for row in ids.tolist()]

    monkeypatch.setattr(BlockOutput, "_losses", measured)
    own, further, held_out = windows()[:8], windows()[8:20], windows()[20:]
    options: dict[str, Any] = {"neurons": 0.5, "widths": widths}
    fitted = shrink(
        made("llama"), own, refit="block", epochs=1, held_out=iter(held_out), further=iter(further), **options
    )
    assert squared == {row for ids in (*further, *held_out) for row in rows(ids)}
    if widths == "uniform":  # others depend on the finished models
        alone = shrink(made("llama"), own, refit="layers", held_out=held_out, **options)
        name = "model.layers.0.mlp.down_proj"
        assert torch.equal(fitted.kept[name], alone.kept[name])
        assert fitted.pruning.layers[0].relative_error == alone.pruning.layers[0].relative_error


@pytest.mark.parametrize("changes", [{"hidden_size": 8}, {"num_hidden_layers": 1}, {"intermediate_size": 96}], ids=str)
def test_models_that_differ_in_more_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(MaskoptError, match="do not belong together"):
        maskopt.recover(build("llama", **changes), build("llama"), windows())
