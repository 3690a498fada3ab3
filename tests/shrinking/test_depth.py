"""Whole blocks dropped: the model computes what it does without them, reloads, and generates the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from maskopt.errors import MaskoptError
from maskopt.models.blocks import find_blocks
from maskopt.shrinking import drop_blocks
from tests.models.conftest import _T5, VOCABULARY
from tests.models.families import build

FAMILIES = {
    "llama": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "opt": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "gpt_neox": {"num_hidden_layers": 4},
    "mixtral": {"num_hidden_layers": 4},
}


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))


def deep(family: str) -> PreTrainedModel:
    """A model of four blocks."""
    small = build(family)
    config = copy.deepcopy(small.config)
    for name, value in FAMILIES[family].items():
        setattr(config, name, value)
    torch.manual_seed(3)
    model: PreTrainedModel = type(small)(config).eval()
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=tokens(), use_cache=False).logits
    return found


@torch.no_grad()
def without(model: PreTrainedModel, names: list[str]) -> Tensor:
    """Logits where some blocks return the states that they are given."""
    changed = copy.deepcopy(model)
    for block in find_blocks(changed):
        if block.name in names:
            block.module.register_forward_hook(
                lambda _, args, options, output: (
                    (args[0] if args else options["hidden_states"])
                    if isinstance(output, Tensor)
                    else ((args[0] if args else options["hidden_states"]), *output[1:])
                ),
                with_kwargs=True,
            )
    return logits(changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_reload_and_generate_without_blocks(family: str, tmp_path: Path) -> None:
    model = deep(family)
    dense = copy.deepcopy(model)
    size = sum(each.numel() for each in find_blocks(model)[0].module.parameters())
    report = drop_blocks(model, [tokens()], 2)
    assert len(set(report.dropped)) == 2
    assert len(find_blocks(model)) == 2
    assert report.parameters[0] - report.parameters[1] == 2 * size
    after = logits(model)
    torch.testing.assert_close(after, without(dense, report.dropped), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "short")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "short").eval()
    torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY + 1}
    prompt = tokens()[:, :6]
    cached = model.generate(prompt, **settings)
    assert torch.equal(cached, again.generate(prompt, **settings))
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


def test_the_first_block_to_go_is_the_one_that_matters_least() -> None:
    model = deep("llama")
    dense = logits(model).log_softmax(-1)
    losses = {}
    for block in find_blocks(model):
        other = without(model, [block.name]).log_softmax(-1)
        losses[block.name] = float((dense.exp() * (dense - other)).sum(-1).mean())
    report = drop_blocks(model, [tokens()], 1)
    assert report.dropped == [min(losses, key=lambda name: losses[name])]
    assert report.divergence[0] == pytest.approx(min(losses.values()), rel=1e-3)


def test_wrong_arguments_are_refused() -> None:
    model = deep("llama")
    for number in (0, 4, 1.5):
        with pytest.raises(MaskoptError, match=r"number of blocks to drop must lie in 1 ... 3"):
            drop_blocks(model, [tokens()], number)  # type: ignore[arg-type]
    with pytest.raises(MaskoptError, match="several stacks"):
        drop_blocks(T5ForConditionalGeneration(T5Config(**_T5)), [tokens()], 1)
