"""Loading models, and the sentences where that fails."""

import json
import math
import re
from logging import getLogger
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel
from transformers.utils import logging

from maskopt.errors import MaskoptError
from maskopt.models import load_model


@pytest.fixture
def folder(llama, tokenizer, tmp_path):
    """A complete model folder."""
    llama.bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_loaded_as_it_was_saved(folder, llama):
    for name in (folder, str(folder)):
        model, tokenizer = load_model(name, device="cpu")
        assert type(model) is type(llama)
        assert model.dtype == torch.bfloat16
        assert not model.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), llama.parameters(), strict=True))
        assert tokenizer("a")["input_ids"] == [1, 4]


@pytest.mark.parametrize(
    ("architectures", "sentence"),
    [
        (None, "does not say which class the model is"),
        ([], "does not say which class the model is"),
        (["LlamaForFortuneTelling"], "is a 'LlamaForFortuneTelling', which is no model that transformers .* has"),
        (["pipeline"], "is a 'pipeline', which is no model"),
        (["AutoModel"], "is a 'AutoModel', which is no model"),
        (["PreTrainedModel"], "is a 'PreTrainedModel', which is no model"),
        (["logging"], "is a 'logging', which is no model"),
        (["__class__"], "is a '__class__', which is no model"),
        ([""], "is a '', which is no model"),
        ("LlamaForCausalLM", '"architectures" in .* must be a list of names; it is .LlamaForCausalLM'),
        ([3], r'"architectures" in .* must be a list of names; it is \[3\]'),
        ({"a": 1}, '"architectures" in .* must be a list of names'),
        (["GPT2LMHeadModel"], "contradicts itself: a GPT2LMHeadModel is not of the type 'llama'"),
    ],
)
def test_the_class_must_be_known(folder, architectures, sentence):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = architectures
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MaskoptError, match=sentence):
        load_model(folder)


def test_loading_shows_no_progress_bar(folder, capfd):
    assert logging.is_progress_bar_enabled()
    load_model(folder)
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_missing_folders_are_refused(folder):
    with pytest.raises(MaskoptError, match=r"There is no model folder .*none"):
        load_model(folder.parent / "none")
    with pytest.raises(MaskoptError, match=r"There is no model folder \./none"):
        load_model("./none")
    with pytest.raises(MaskoptError, match=r"config.json is a file; a model is a folder"):
        load_model(folder / "config.json")


def test_a_folder_without_configuration_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(MaskoptError, match=r"holds no config.json"):
        load_model(folder)


def test_a_folder_without_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(MaskoptError, match="holds no tokenizer"):
        load_model(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(MaskoptError, match=r"holds no weights \(such as model.safetensors\)"):
        load_model(folder)


def test_damaged_weights_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for content in (b"", b"abc", whole[:-7], whole[:40], b"\xff" * 500):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(
            MaskoptError, match=r"^The file .*model.safetensors is damaged or cannot be read: [^\n]*\.$"
        ):
            load_model(folder)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "perceptron9000"}, "is of the type 'perceptron9000', which transformers does not have.$"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}, "'mine', .* and comes with code of its own, which"),
        ({"model_type": 3}, "does not say which kind of model it is"),
        ({}, 'does not say which kind of model it is ."model_type".'),
        ({"model_type": "t5"}, "is an encoder-decoder"),
    ],
)
def test_unknown_architectures_are_refused(folder, config, sentence):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MaskoptError, match=sentence) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_broken_configuration_is_refused(folder):
    for content in (b"{", b"", b"[]", b"3", b"\xff\xfe", b"[" * 10**5):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(
            MaskoptError, match=r"^The file .*config.json is damaged: it (is no JSON|holds no JSON object)"
        ):
            load_model(folder)


@pytest.fixture
def change(folder):
    """Rewrite the weights, or the configuration, of the folder."""

    def apply(weights=None, drop=(), **settings):
        tensors = {**load_file(folder / "model.safetensors"), **(weights or {})}
        kept = {name: tensor for name, tensor in tensors.items() if name not in drop}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))

    return apply


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_missing_weights_are_named(folder, change, name):
    change(drop=[name])
    with pytest.raises(MaskoptError, match=f"lack 1 tensors, such as {name}"):
        load_model(folder)


def test_a_tied_head_may_be_missing_but_not_what_it_is_tied_to(build, tokenizer, tmp_path):
    model, folder = build("llama", tie_word_embeddings=True), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded, _ = load_model(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MaskoptError, match=r"lack . tensors, such as"):
        load_model(folder)


def test_weights_of_another_shape_than_the_configuration_says_are_refused(folder, change):
    change({"model.norm.weight": torch.ones(15)})
    with pytest.raises(
        MaskoptError, match=r"do not fit .*: model.norm.weight has shape \(15,\), not \(16,\) \(one of 1"
    ):
        load_model(folder)
    change({"model.norm.weight": torch.ones(16)}, vocab_size=80)
    with pytest.raises(
        MaskoptError, match=r"do not fit its config.json: lm_head.weight has shape \(61, 16\), not \(80, 16"
    ):
        load_model(folder)


def test_blocks_beyond_the_configuration_are_refused(folder, change):
    change(num_hidden_layers=2)
    with pytest.raises(MaskoptError, match=r"hold 9 tensors of blocks that .* not know of, such as model.layers.2"):
        load_model(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_refused(folder, change, name, value):
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[3] = value
    change({name: tensor})
    with pytest.raises(MaskoptError, match=f"^The model's {name} has NaN or infinite entries"):
        load_model(folder)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_weights_that_are_no_plain_numbers_are_refused(folder, change, dtype):
    tensor = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    change({"model.layers.1.mlp.up_proj.weight": tensor.to(dtype)})
    with pytest.raises(MaskoptError, match=r"holds model.layers.1.mlp.up_proj.weight as .*; only plain floating-point"):
        load_model(folder)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "nope"}, {}, "x"])
def test_quantised_models_are_refused(folder, change, settings):
    change(quantization_config=settings)
    with pytest.raises(MaskoptError, match=r"are quantised .*; dequantise and save them first"):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (
            {"weight_map": {"a": "model-1.safetensors"}},
            "lacks model-1.safetensors, which model.safetensors.index.json names",
        ),
        ({"weight_map": {"a": "../x.safetensors"}}, "names '../x.safetensors', which does not lie beside it"),
        ({"weight_map": {"a": 3}}, "its weight_map does not name a file for each tensor"),
        ({"weight_map": {}}, "its weight_map does not name a file for each tensor"),
        ({"weight_map": [1]}, "its weight_map does not name a file for each tensor"),
        ({}, "its weight_map does not name a file for each tensor"),
        ([], "it holds no JSON object"),
    ],
)
def test_a_broken_index_is_refused(folder, index, sentence):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MaskoptError, match=sentence):
        load_model(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "null", "", '{"added_tokens": 3, "tokenizer_class": 3}'])
def test_damaged_tokenizers_are_refused(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(MaskoptError, match=r"^[^\n]*\.$"):
        load_model(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": "16"},
        {"hidden_act": "nope"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"dtype": "nope"},
        {"dtype": "int8"},
        {"vocab_size": -1},
        {"attn_implementation": "nope"},
        {"layer_types": ["x"]},
        {"rope_parameters": {"rope_type": "nope"}},
    ],
    ids=str,
)
def test_configurations_with_odd_values_are_refused(folder, change, settings):
    change(**settings)
    with pytest.raises(
        MaskoptError, match=r"^The model .* cannot be loaded, its (configuration|weights) failed: .*\.$"
    ) as caught:
        load_model(folder)
    assert not ADVICE.search(str(caught.value))
    assert "\n" not in str(caught.value)


ADVICE = re.compile(r"http|pip|weights_only|trust_remote|internet|ignore_mismatched|report|please", re.IGNORECASE)


def test_pickles_are_refused_without_advice_to_run_them(folder, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    (folder / "model.safetensors").unlink()
    for content in ({"a": Touch()}, [Touch()]):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(
            MaskoptError, match="its weights failed: the file holds other things than tensors"
        ) as caught:
            load_model(folder)
        assert not ADVICE.search(str(caught.value))
    assert not (tmp_path / "touched").exists()


def test_loggers_of_the_loaders_are_quiet_meanwhile_only(folder, change, capfd):
    levels = [getLogger(name).level for name in ("transformers", "huggingface_hub")]
    change(drop=["model.norm.weight"])  # transformers logs a table of it
    with pytest.raises(MaskoptError, match="lack 1 tensors"):
        load_model(folder)
    assert capfd.readouterr().err == ""
    assert [getLogger(name).level for name in ("transformers", "huggingface_hub")] == levels


@pytest.mark.parametrize("name", [None, 3, "", b"model", ["model"]])
def test_names_of_the_wrong_type_are_refused(name):
    with pytest.raises(MaskoptError, match="must be a folder or an id on the hub; got"):
        load_model(name)


@pytest.mark.parametrize("name", ["a b", "model?", "x" * 5000, "a\0b", "Qwen/Qwen3 0.6B"])
def test_impossible_names_are_refused(name):
    with pytest.raises(MaskoptError, match=r"^There is no model folder [^\n]*\.$"):
        load_model(name)


def test_unknown_devices_are_refused(folder):
    for device in ("nope", "cuda:99", "meta", 3.5):
        with pytest.raises(MaskoptError, match=r"^The model cannot be moved to the device"):
            load_model(folder, device=device)


def test_models_of_another_kind_still_load(tokenizer, tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(MaskoptError, match="holds no tokenizer"):
        load_model(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert type(load_model(tmp_path / "model")[0]) is ViTModel
