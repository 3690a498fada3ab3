"""llm-compressor by its own entry point."""

import copy

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import maskopt
from maskopt.plugins.llm_compressor import MaskoptModifier
from maskopt.weights import ConditionalADMM, SparseGPT


def pruned(model, windows, recipe):
    model = copy.deepcopy(model)
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    words = {f"w{number}": number for number in range(64)}
    processor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w1")), pad_token="w0")
    oneshot(
        model=model,
        processor=processor,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=24,
    )
    return model


def layers(model):
    return {name: each.weight for name, each in model.named_modules() if name.endswith("_proj")}


@pytest.mark.parametrize(
    ("settings", "masks", "solver"),
    [
        ({"method": "best"}, maskopt.PerRow(0.5), ConditionalADMM()),
        ({"method": "sparsegpt", "options": {"ridge": 0.05}}, maskopt.PerRow(0.5), SparseGPT(ridge=0.05)),
        ({"method": "wanda", "pattern": "2:4"}, maskopt.NM(keep=2, group=4), maskopt.Wanda()),
        ({"method": "wanda", "mask_structure": "3:4"}, maskopt.NM(keep=1, group=4), maskopt.Wanda()),
    ],
)
@pytest.mark.parametrize("targets", [["LlamaDecoderLayer"], ["Linear"]])
def test_it_prunes_as_our_pipeline_does(model, windows, settings, masks, solver, targets):
    found = pruned(model, windows, [MaskoptModifier(sparsity=0.5, targets=targets, **settings)])
    expected = copy.deepcopy(model)
    # Its batches have one window each, and blocks are pruned on what the pruned blocks before them give out.
    maskopt.prune(expected, [window[None] for window in windows], masks, solver, propagate="pruned")
    for name, weight in layers(found).items():
        wanted = layers(expected)[name]
        assert ((weight != 0) == (wanted != 0)).float().mean() > 0.995
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert torch.equal(found.model.embed_tokens.weight, model.lm_head.weight)


def test_a_recipe_in_a_file_names_it(model, windows, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "pruning_stage:\n  pruning_modifiers:\n    MaskoptModifier:\n      sparsity: 0.5\n      pattern: per-row\n"
        '      targets: ["LlamaDecoderLayer"]\n'
    )
    found = pruned(model, windows, str(recipe))
    for weight in layers(found).values():
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
    found.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(weight, layers(again)[name]) for name, weight in layers(found).items())


def test_each_target_has_its_sparsity(model, windows):
    found = pruned(model, windows, [MaskoptModifier(sparsity=[0.25, 0.5], targets=["LlamaDecoderLayer"])])
    for name, weight in layers(found).items():
        share = 0.25 if ".layers.0." in name else 0.5
        assert ((weight == 0).sum(1) == int(share * weight.shape[1])).all()


def test_wrong_settings_say_so(model, windows):
    with pytest.raises(maskopt.MaskoptError, match="There is no method 'x'"):
        pruned(model, windows, [MaskoptModifier(sparsity=0.5, method="x", targets=["LlamaDecoderLayer"])])
