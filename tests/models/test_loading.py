"""Loading models, and the sentences where that fails."""

import json

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
        (["LlamaForFortuneTelling"], "is a LlamaForFortuneTelling, which transformers .* does not have"),
    ],
)
def test_the_class_must_be_known(folder, architectures, sentence):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = architectures
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MaskoptError, match=sentence):
        load_model(folder)


def test_no_progress_bar_is_left_in_the_way(folder, capfd):
    assert logging.is_progress_bar_enabled()
    load_model(folder)
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_missing_folders(folder):
    with pytest.raises(MaskoptError, match=r"There is no model folder .*none"):
        load_model(folder.parent / "none")
    with pytest.raises(MaskoptError, match=r"There is no model folder \./none"):
        load_model("./none")
    with pytest.raises(MaskoptError, match=r"config.json is a file; a model is a folder"):
        load_model(folder / "config.json")


def test_a_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(MaskoptError, match=r"holds no config.json"):
        load_model(folder)


def test_a_folder_without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(MaskoptError, match="holds no tokenizer"):
        load_model(folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(MaskoptError, match=r"its weights failed: .*model.safetensors"):
        load_model(folder)


def test_damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(MaskoptError, match="its weights failed"):
        load_model(folder)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "perceptron9000"}, "its configuration failed: .*perceptron9000"),
        ({}, "its configuration failed: .*model_type"),
        ({"model_type": "t5"}, "is an encoder-decoder"),
    ],
)
def test_unknown_architectures(folder, config, sentence):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MaskoptError, match=sentence) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_broken_configuration(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(MaskoptError, match="its configuration failed"):
        load_model(folder)


def test_weights_missing_from_a_block(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MaskoptError, match=r"lack 1 tensors of its blocks, such as model.layers.1.mlp.up_proj.weight"):
        load_model(folder)


def test_models_of_another_kind_still_load(tokenizer, tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(MaskoptError, match="holds no tokenizer"):
        load_model(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert type(load_model(tmp_path / "model")[0]) is ViTModel
