"""Every causal language model that transformers knows: a small random one is pruned, or refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from maskopt import PerRow, Wanda
from maskopt.errors import MaskoptError
from maskopt.models import prune
from maskopt.models.selection import select_layers
from tests.models.conftest import VOCABULARY
from tests.models.families import NOT_BUILT, OWN, build, families

pytestmark = pytest.mark.slow

_NEVER = "The calibration batches never call"

# Refused by design, each in a sentence that says which layers to exclude.
_REFUSED = {
    # Decoders of translation models, without an encoder's output to attend to.
    **dict.fromkeys(["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"], _NEVER),
    **dict.fromkeys(["musicgen", "pegasus", "plbart", "prophetnet", "trocr", "whisper"], _NEVER),
    # A weight that the model reads and multiplies by itself.
    **dict.fromkeys(["falcon_mamba", "jamba", "mamba", "zamba2"], _NEVER),
    "deepseek_v4": "which does more than multiply its input by its weight",
    "xlnet": "in which their inputs cannot be told apart",
    "zamba": "in which their inputs cannot be told apart",
    "zaya": "have the same input in one calibration batch and different ones in another",
}


def test_the_tables_name_families() -> None:
    # Where a version of transformers has fewer, that is no error of ours; most are old.
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(known & {*OWN, *_REFUSED}) > 0.8 * len({*OWN, *_REFUSED})
    assert not set(NOT_BUILT) & {*OWN, *_REFUSED}


@pytest.mark.parametrize("family", [family for family in families() if family not in NOT_BUILT])
def test_a_family_is_pruned_or_refused_in_a_sentence(family: str) -> None:
    model = build(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(3, VOCABULARY, (2, 2, 24), generator=torch.Generator().manual_seed(1))
    batches = [*ids]
    if family in _REFUSED:
        with pytest.raises(MaskoptError, match=_REFUSED[family]):
            prune(model, batches, PerRow(0.5), Wanda(), propagate="pruned")
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        return
    report = prune(model, batches, PerRow(0.5), Wanda(), propagate="pruned")
    assert len({layer.name for layer in report.layers}) == len(report.layers) >= 4
    layers = {layer.name: layer for layer in select_layers(model).layers}
    left = {each.name for each in report.left_dense}
    touched = set()
    for name, mask in report.masks.items():
        assert not bool(layers[name].weight[~mask].any())
        assert 2 * int(mask.sum()) == mask.numel()
        touched.add(id(layers[name].parameter))
    for name, parameter in model.named_parameters():
        if id(parameter) not in touched:
            assert torch.equal(parameter, before[name])
            assert parameter.squeeze().ndim < 2 or name in left
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=ids[0], use_cache=False)[0]).all())
