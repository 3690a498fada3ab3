"""Models whose blocks have different widths: their class, their folders, and what is said of damaged ones."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.models import load_packed
from maskopt.packed.folder import pack
from maskopt.packed.packed_tensors import PackedError
from maskopt.packed.shrunk import shrunk_class
from maskopt.shrinking import cut_model, find_units
from tests.models.conftest import weights_of
from tests.shrinking.made import computed, data, made


def widths_of(model: PreTrainedModel) -> list[int]:
    return [block.mlp.down_proj.in_features for block in model.model.layers]


@pytest.fixture
def model() -> PreTrainedModel:
    """A Llama whose blocks have 10 and 30 neurons."""
    dense = made("llama")
    sites = find_units(dense, data()[0]).of("neurons")
    counts = (10, 30)
    kept = {site: torch.arange(site.role.number) < count for site, count in zip(sites, counts, strict=True)}
    cut_model(dense, kept)
    return dense


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    path = tmp_path / "shrunk"
    model.save_pretrained(path)
    return path


def test_the_class_is_one_and_a_subclass_of_the_same_name(model: PreTrainedModel, folder: Path) -> None:
    kind = transformers.LlamaForCausalLM
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert type(found) is type(model) is shrunk_class(kind) is shrunk_class(shrunk_class(kind))
    assert isinstance(found, kind)
    assert type(found).__name__ == kind.__name__
    assert json.loads((folder / "config.json").read_text())["dense_config"]["architectures"] == [kind.__name__]
    assert type(pickle.loads(pickle.dumps(found))) is type(found)
    assert widths_of(found) == [10, 30]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_what_is_shrunk_again_keeps_what_it_lost_before(family: str, tmp_path: Path) -> None:
    """First heads and neurons of the first block, then neurons and then heads of all."""
    smaller = made(family, num_attention_heads=4, num_key_value_heads=4)
    first = find_units(smaller, data()[0]).sites[0].block.name
    for step, kinds in enumerate((("neurons", "heads"), ("neurons",), ("heads",))):
        sites = [site for site in find_units(smaller, data()[0]).sites if site.role.kind in kinds]
        assert {site.role.kind for site in sites} == set(kinds)
        kept = {}
        for site in sites:
            number = site.role.number - 8 if site.role.kind == "neurons" else site.role.number // 2
            if step or site.block.name == first:
                units = torch.arange(site.role.number) < number
                kept[site] = units.expand(site.role.experts, -1) if site.role.experts else units
        assert not cut_model(smaller, kept).uniform
        expected = computed(smaller)
        smaller.save_pretrained(tmp_path / f"{step}")
        smaller = AutoModelForCausalLM.from_pretrained(tmp_path / f"{step}")
        found = computed(smaller)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    sites = find_units(smaller, data()[0]).sites
    blocks = {site.block.name for site in sites}
    neurons = [site.role.number for site in sites if site.role.kind == "neurons"]
    assert neurons == [80 - 16, *[80 - 8] * (len(blocks) - 1)]
    heads = [site.role.number for site in sites if site.role.kind == "heads"]
    # A single head cannot go; where no entry counts heads, it is not known how wide they are a second time.
    assert heads == ([] if family == "gpt_neox" else [2] * (len(blocks) - 1))


def test_a_class_that_one_names_is_loaded_or_refused(model: PreTrainedModel, folder: Path) -> None:
    found = load_packed(transformers.LlamaForCausalLM, folder, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert widths_of(found) == [10, 30]
    whole = weights_of(model)
    assert all(torch.equal(value.bfloat16(), weights_of(found)[name]) for name, value in whole.items())
    with pytest.raises(MaskoptError, match="of the type llama, which GPT2LMHeadModel is not for"):
        load_packed(transformers.GPT2LMHeadModel, folder)
    # Without its head: another class, and other names in the file.
    body = AutoModel.from_pretrained(folder)
    ids = data()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(body(input_ids=ids)[0], model.model(input_ids=ids)[0])


def test_models_that_are_not_loaded_have_the_widths_and_weights_of_fresh_ones(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(config)
    assert widths_of(fresh) == [10, 30]
    for name, weight in weights_of(fresh).items():
        if weight.ndim > 1:
            assert float(weight.std()) == pytest.approx(config.dense.initializer_range, rel=0.4), name
        else:
            assert bool((weight == 1).all()), name


def test_the_widths_stay_with_the_model(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = computed(model)
    model.save_pretrained(tmp_path / "one", max_shard_size="5KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "one")  # where it was loaded from
    found = computed(AutoModelForCausalLM.from_pretrained(tmp_path / "one"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def change(block: str, **entries: Any) -> Any:
    def apply(config: dict[str, Any]) -> None:
        config["dense_config"]["block_widths"]["entries"].setdefault(block, {}).update(entries)

    return apply


def lists(**lists: Any) -> Any:
    return lambda config: config["dense_config"]["block_widths"].update(lists)


DAMAGED = {
    "no configuration": (lambda config: config.pop("dense_config"), "it has no dense_config"),
    "a type of nobody": (
        lambda config: config["dense_config"].update(model_type="x"),
        "a model of the type 'x', which",
    ),
    "no mapping": (lambda config: config["dense_config"].update(block_widths=[1]), "block_widths .* are damaged"),
    "no entries": (lists(entries=[1]), "block_widths .* are damaged"),
    "no widths": (lists(entries={"model.layers.0": "x"}), "block_widths .* are damaged"),
    "a word": (change("model.layers.0", intermediate_size="x"), "block_widths .* are damaged"),
    "less than nothing": (change("model.layers.0", intermediate_size=-1), "block_widths .* are damaged"),
    "no block": (change("model.layers.7", intermediate_size=1), "a part that the model does not have"),
    "no parameter": (lists(shapes={"model.nothing": [1]}), "a part that the model does not have"),
    "no shape": (lists(shapes={"model.norm.weight": ["x"]}), "block_widths .* are damaged"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_configuration_is_refused_in_a_sentence(folder: Path, damage: Any, words: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    damage(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackedError, match=words) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(caught.value).count(". ") == 0


def test_widths_that_are_not_those_of_the_weights_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change("model.layers.0", intermediate_size=11)(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_different_widths_cannot_be_packed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskoptError, match="different widths, and only models of equal widths can be packed"):
        pack(folder, tmp_path / "packed")
    shutil.rmtree(folder)
