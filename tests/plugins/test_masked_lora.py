"""LoRA by peft whose merge keeps every zero and computes what was trained."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from maskopt.errors import MaskoptError
from maskopt.plugins.masked_lora import MaskedLora, masked_lora

# peft asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def configuration(**settings):
    return masked_lora(LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings))


def fitted(model, windows, steps=40, rate=1e-2, autocast=False):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_a_merge_keeps_zeros_and_predictions(pruned, windows, loss, zeros, autocast):
    before, first = zeros(pruned), loss(pruned)
    model = fitted(get_peft_model(pruned, configuration()), windows, autocast=autocast)
    reached = loss(model)
    assert reached < 0.97 * first
    with torch.no_grad():
        predictions = model(input_ids=windows).logits
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=windows).logits, predictions, rtol=1e-3, atol=1e-4)
    assert loss(merged) == pytest.approx(reached, rel=1e-4)
    after = zeros(merged)
    for name, zero in before.items():
        assert torch.equal(zero, after[name])


def test_without_it_zeros_are_lost(pruned_llama, windows, zeros):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    merged = fitted(get_peft_model(copy.deepcopy(pruned_llama), config), windows, steps=2).merge_and_unload()
    assert sum(int(zero.sum()) for zero in zeros(merged).values()) < 100


def test_adapters_are_saved_and_loaded(pruned, windows, tmp_path, loss):
    dense = copy.deepcopy(pruned)
    model = fitted(get_peft_model(pruned, configuration()), windows, steps=3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(dense, tmp_path, config=masked_lora(LoraConfig.from_pretrained(tmp_path)))
    assert sum(isinstance(module, MaskedLora) for module in again.modules()) > 0
    assert loss(again) == loss(model)
    with again.disable_adapter():
        assert loss(again) != loss(model)
    again.merge_adapter()
    assert loss(again) == pytest.approx(loss(model), rel=1e-5)
    again.unmerge_adapter()
    assert loss(again) == pytest.approx(loss(model), rel=1e-5)


def test_variants_that_would_move_zeros_are_refused(pruned):
    with pytest.raises(MaskoptError, match="does not support use_dora"):
        get_peft_model(pruned, configuration(use_dora=True))
