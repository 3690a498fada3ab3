"""Every causal language model that transformers knows loses units, and computes what it does without them."""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from transformers import PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.shrinking import Site, cut_model, find_units
from tests.models.conftest import VOCABULARY
from tests.models.families import NOT_BUILT, build, families

pytestmark = pytest.mark.slow

_SHARED = "have the parameter .* in common"
_REFUSED = {"zamba": _SHARED, "zamba2": _SHARED}
# Nothing in their blocks serves a single unit: norms over all neurons, weights that do more than multiply.
_NOTHING = {"bitnet", "falcon_mamba", "mamba", "mamba2", "openai-gpt", "reformer"}


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False)[0]
    return found


def chosen(site: Site, random: torch.Generator) -> torch.Tensor:
    """Half of the units, in every matrix others; experts keep multiples of four, as their kernels need."""
    role = site.role
    kept = torch.ones(max(1, role.experts), role.number, dtype=torch.bool)
    for row in kept:
        row[torch.randperm(role.number, generator=random)[: 4 if role.experts else role.number // 2]] = False
    return kept if role.experts else kept[0]


# All of them with MASKOPT_EXPLORE; else those that everybody uses, and a fixed tenth of the others.
_KNOWN = {"gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "opt", "phi3", "qwen3"}
_TESTED = [
    family
    for family in families()
    if family not in NOT_BUILT
    and (family in {*_KNOWN, *_REFUSED} or "MASKOPT_EXPLORE" in os.environ or zlib.crc32(family.encode()) % 10 == 0)
]


@pytest.mark.parametrize("family", _TESTED)
def test_a_family_computes_without_units_what_it_does_with_zeros_for_them(family: str) -> None:
    model = build(family)
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    if family in _REFUSED:
        with pytest.raises(MaskoptError, match=_REFUSED[family]):
            find_units(model, {"input_ids": ids})
        return
    structure = find_units(model, {"input_ids": ids})
    assert bool(structure.sites) == (family not in _NOTHING)
    random = torch.Generator().manual_seed(0)
    kept = {site: chosen(site, random) for site in structure.sites}
    expected = 0
    for site, units in kept.items():
        weight = dict(site.block.module.named_parameters())[site.role.consumer]
        weight.data.mul_(site.role.columns(units))
        expected += site.size * int((~units).sum()) // max(1, site.role.experts)
    before, size = logits(model), model.num_parameters()
    cut_model(model, kept)
    after = logits(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    # Of a weight between two layers that both lose units, rows and columns overlap.
    assert 0.8 * expected <= size - model.num_parameters() <= expected
