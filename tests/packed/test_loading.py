"""transformers loads packed folders bit by bit as the dense ones, or says in a sentence that it cannot."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import maskopt.packed.reader as reading
from maskopt.errors import MaskoptError
from maskopt.packed.classes import load_packed
from maskopt.packed.folder import pack
from maskopt.packed.packed_tensors import AUTO_MAP, PackedError, as_bytes
from maskopt.packed.reader import PackedConfig, load, locate
from tests.packed.made import MODELS, both, pruned
from tests.processes import outcomes_of

ROOT = Path(__file__).parent.parent.parent
FRESH = Path(__file__).with_name("fresh.py")


def same(one, two):
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and (as_bytes(first[name]) == as_bytes(second[name])).all()
        for name in first
    )


def settings(config):
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_bit_is_loaded_and_saving_makes_a_plain_folder(tmp_path, name, dtype):
    model = pruned(name, dtype)
    dense, packed = both(tmp_path, model)
    assert len([*dense.glob("model-*.safetensors")]) > 1
    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    expected, found = auto.from_pretrained(dense), auto.from_pretrained(packed)
    assert type(found) is type(expected) is type(model)
    assert same(found, expected)
    assert any((torch.signbit(value) & (value == 0)).any() for value in found.state_dict().values())
    assert not found.training
    assert settings(found.config) == settings(expected.config)
    if model.config.tie_word_embeddings and found.get_output_embeddings() is not None:
        assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    found.save_pretrained(tmp_path / "again")
    content = json.loads((tmp_path / "again" / "config.json").read_text())
    assert content == json.loads((dense / "config.json").read_text())
    assert {path.suffix for path in (tmp_path / "again").iterdir()} == {".json", ".safetensors"}
    names = set()
    for file in dense.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= set(weights.keys())
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == names  # experts one by one, as in the dense folder
    assert same(auto.from_pretrained(tmp_path / "again"), expected)


def test_experts_are_stacked_and_half_zero(tmp_path):
    _, packed = both(tmp_path, pruned("mixtral"))
    stored = json.loads((packed / "packed.json").read_text())["tensors"]
    assert any(".experts.3." in name and "mask" in entry["parts"] for name, entry in stored.items())
    stack = AutoModelForCausalLM.from_pretrained(packed).model.layers[0].mlp.experts.gate_up_proj
    assert stack.ndim == 3
    assert (stack == 0).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_another_type_and_the_bare_model_are_those_of_the_dense_folder(tmp_path, name, dtype):
    dense, packed = both(tmp_path, pruned(name))
    for auto in (AutoModelForCausalLM, AutoModel):
        one, two = (auto.from_pretrained(folder, dtype=dtype) for folder in (dense, packed))
        assert two.dtype == dtype
        assert same(one, two)


def test_options_of_from_pretrained_reach_the_model(tmp_path):
    model = pruned("llama")
    model.generation_config.max_new_tokens = 7
    _, packed = both(tmp_path, model)
    found, info = AutoModelForCausalLM.from_pretrained(
        packed,
        attn_implementation="eager",
        use_cache=False,
        device_map="cpu",
        output_loading_info=True,
    )
    assert found.config._attn_implementation == "eager"
    assert found.config.use_cache is False
    assert found.generation_config.max_new_tokens == 7
    assert not info["missing_keys"]
    assert found.name_or_path == found.config.name_or_path == str(packed)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_blocks_may_wait_in_files(tmp_path, name):
    dense, packed = both(tmp_path, pruned(name))
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    ids = torch.arange(12)[None]
    expected = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(packed, device_map=places, offload_folder=tmp_path / "disk")
    assert found.model.layers[0].self_attn.q_proj.weight.is_meta
    assert torch.equal(found(ids).logits, expected)


def test_numbers_that_are_not_finite_are_weights_like_any_other(tmp_path):
    model = pruned("llama")
    for parameter in model.parameters():
        parameter.data.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    dense, packed = both(tmp_path, model)
    assert same(AutoModelForCausalLM.from_pretrained(packed), AutoModelForCausalLM.from_pretrained(dense))


def test_without_a_type_in_the_configuration_it_is_that_of_the_weights(tmp_path):
    dense, _ = both(tmp_path, pruned("llama"))
    content = json.loads((dense / "config.json").read_text())
    del content["dtype"]
    (dense / "config.json").write_text(json.dumps(content))
    pack(dense, tmp_path / "packed")
    one, two = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, tmp_path / "packed"))
    assert two.dtype == torch.bfloat16
    assert same(one, two)


def test_a_new_head_is_made_as_for_the_dense_folder(tmp_path):
    dense, packed = both(tmp_path, pruned("llama"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = transformers.AutoModelForSequenceClassification.from_pretrained(dense, num_labels=3)
        torch.manual_seed(0)
        found = transformers.AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3)
    assert found.score.weight.shape == (3, 16)
    assert same(expected.model, found.model)


def test_the_configuration_is_that_of_the_model(tmp_path):
    dense, packed = both(tmp_path, pruned("gpt2"))
    config = AutoConfig.from_pretrained(packed)
    assert isinstance(config, PackedConfig)
    assert config.model_type == "gpt2"  # by which tokenizers are chosen
    with torch.device("meta"):
        assert type(AutoModelForCausalLM.from_config(config)) is transformers.GPT2LMHeadModel
    assert settings(config.dense) == settings(AutoConfig.from_pretrained(dense))
    assert json.loads((packed / "config.json").read_text())["auto_map"] == AUTO_MAP
    for path in AUTO_MAP.values():
        assert hasattr(reading, path.partition(".")[2])


def test_the_tokenizer_is_loaded_as_from_the_dense_folder(tmp_path):
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "fox": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    for name in ("llama", "gpt2"):
        dense, packed = tmp_path / name, tmp_path / f"{name}-packed"
        pruned(name).save_pretrained(dense)
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(dense)
        pack(dense, packed)
        one, two = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(packed)
        assert type(one) is type(two)
        assert one("a fox or a dog")["input_ids"] == two("a fox or a dog")["input_ids"] == [1, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("dense", "words"),
    [
        ({"model_type": "nothing"}, "of the type 'nothing', which transformers"),
        ({}, "has no dense_config"),
        (3, "has no"),
    ],
)
def test_a_configuration_that_says_nothing_of_the_model_is_refused(tmp_path, dense, words):
    _, packed = both(tmp_path, pruned("gpt2"))
    content = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**content, "dense_config": dense}))
    with pytest.raises(PackedError, match=rf"^The [^\n]*packed folder [^\n]*{words}[^\n]*\.$"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_the_code_in_the_folder_is_not_needed_beside_maskopt(tmp_path, monkeypatch):
    model = pruned("gpt2")
    _, packed = both(tmp_path, model)
    (packed / "maskopt_reader.py").write_text("raise RuntimeError('not to be run')")
    assert same(AutoModelForCausalLM.from_pretrained(packed), model)
    assert same(AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True), model)


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_other_versions_of_transformers_are_refused(tmp_path, monkeypatch, version):
    _, packed = both(tmp_path, pruned("gpt2"))
    config = AutoConfig.from_pretrained(packed).dense
    monkeypatch.setattr(reading.transformers, "__version__", version)
    with pytest.raises(PackedError, match=rf"^Packed folders are read by transformers 5, and this is {version}; .*\.$"):
        load(transformers.GPT2LMHeadModel, packed, config)


def ignores_the_weights(kind, config, tensors):
    return kind(config), {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


def misses_them(kind, config, tensors):
    names = set(kind(config).state_dict())
    return kind(config), {"missing_keys": names, "unexpected_keys": set(tensors), "mismatched_keys": set()}


def initialises_one_afterwards(kind, config, tensors):
    model, info = kind.original(None, config=config, state_dict=tensors, output_loading_info=True)
    parameter = next(value for name, value in model.named_parameters() if name.endswith("o_proj.weight"))
    torch.nn.init.normal_(parameter)
    return model, info


def initialises_experts_afterwards(kind, config, tensors):
    model, info = kind.original(None, config=config, state_dict=tensors, output_loading_info=True)
    torch.nn.init.normal_(model.model.layers[1].mlp.experts.down_proj)
    return model, info


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "broken", [ignores_the_weights, misses_them, initialises_one_afterwards, initialises_experts_afterwards]
)
def test_random_weights_are_refused_whatever_transformers_does(tmp_path, monkeypatch, name, broken):
    if name == "llama" and broken is initialises_experts_afterwards:
        name = "qwen3_moe"
    model = pruned(name)
    _, packed = both(tmp_path, model)
    kind = type(model)
    monkeypatch.setattr(kind, "original", kind.from_pretrained, raising=False)
    assert same(AutoModelForCausalLM.from_pretrained(packed), model)

    def from_pretrained(cls, name, config, state_dict, **options):
        return broken(cls, config, state_dict)

    monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))
    with pytest.raises(PackedError, match=r"^transformers \S+ does not load the packed folder \S+ correctly: .*\.$"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_random_weights_are_refused_without_the_head_too(tmp_path, monkeypatch):
    _, packed = both(tmp_path, pruned("llama"))
    original = transformers.LlamaModel.from_pretrained

    def from_pretrained(name, **options):
        model, info = original(name, **options)
        torch.nn.init.normal_(model.norm.weight)  # which has no zeros, and another name in the folder
        return model, info

    assert AutoModel.from_pretrained(packed).norm.weight.ndim == 1
    monkeypatch.setattr(transformers.LlamaModel, "from_pretrained", from_pretrained)
    with pytest.raises(PackedError, match=r"correctly: model\.norm\.weight does not have the weights that are stored"):
        AutoModel.from_pretrained(packed)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_damage_is_found_while_loading(tmp_path, name):
    _, packed = both(tmp_path, pruned(name))
    tensors = json.loads((packed / "packed.json").read_text())["tensors"]
    part = next(key for key in tensors if key.endswith(("o_proj.weight", "experts.1.w2.weight")))
    file = packed / tensors[part]["file"]
    with safe_open(file, "np") as content:
        values = content.get_tensor(f"{part}:values").tobytes()
    data = file.read_bytes()
    assert data.count(values) == 1
    file.write_bytes(data.replace(values, bytes([values[0] ^ 1]) + values[1:]))
    with pytest.raises(PackedError, match=rf"^The file \S+ is damaged: {re.escape(part)} is not what was packed\.$"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_another_class_does_not_find_weights_in_the_folder(tmp_path):
    """Whoever names the class, or knows neither type nor reader, gets no random weights."""
    _, packed = both(tmp_path, pruned("llama"))
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(packed)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(packed, config=AutoConfig.from_pretrained(packed).dense)
    with pytest.raises(PackedError, match=r"is loaded by transformers.AutoModel only"):
        reading.LOADERS["AutoModel"].from_pretrained(packed)


def test_a_repository_of_the_hub_is_fetched(tmp_path, monkeypatch):
    _, packed = both(tmp_path, pruned("llama"))
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(packed)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = AutoConfig.from_pretrained(packed).dense
    model = load(transformers.LlamaForCausalLM, "someone/packed", config, revision="main", dtype="auto", token=None)
    assert same(model, pruned("llama"))
    assert asked == [("someone/packed", {"revision": "main"})]
    assert locate(packed) == packed
    assert len(asked) == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense and packed folders of models of several kinds."""
    path = tmp_path_factory.mktemp("fresh")
    for name in ("gpt2", "llama", "mixtral", "qwen3_moe"):
        both(path, pruned(name), name)
    return path


def fresh(mode, folder, path, tmp_path):
    """Run `fresh.py` where maskopt can be imported from `path` only, or nowhere."""
    return outcomes_of(FRESH, mode, folder, path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["maskopt", "late"])
def test_a_fresh_process_with_maskopt_loads_the_same_bits(folders, mode, tmp_path):
    assert set(fresh(mode, folders, str(ROOT), tmp_path).values()) == {"the same bits"}


@pytest.mark.slow
def test_a_fresh_process_without_maskopt_loads_the_same_bits_or_nothing(folders, tmp_path):
    # An installed maskopt must not be found, so one that refuses to be imported comes first.
    (tmp_path / "maskopt.py").write_text("raise ImportError('maskopt is not installed here')\n")
    outcomes = fresh("code", folders, str(tmp_path), tmp_path)
    assert set(outcomes.values()) == {"the same bits"}
    assert len(outcomes) == 4
    for outcome in fresh("nobody", folders, str(tmp_path), tmp_path).values():
        assert outcome.startswith("ValueError: ")
        assert "trust_remote_code=True" in outcome


@pytest.mark.slow
def test_a_folder_whose_code_was_taken_away_is_refused(folders, tmp_path):
    for name in ("gpt2", "gpt2-packed"):
        shutil.copytree(folders / name, tmp_path / "folders" / name)
    packed = tmp_path / "folders" / "gpt2-packed"
    content = json.loads((packed / "config.json").read_text())
    del content["auto_map"]
    (packed / "config.json").write_text(json.dumps(content))
    (tmp_path / "maskopt.py").write_text("raise ImportError('maskopt is not installed here')\n")
    outcome = fresh("code", tmp_path / "folders", str(tmp_path), tmp_path)["gpt2"]
    assert outcome.startswith("ValueError: ")
    assert "maskopt-packed" in outcome


def test_a_class_that_one_names_is_loaded_or_refused_and_never_random(tmp_path):
    model = pruned("llama", torch.bfloat16)
    dense, packed = both(tmp_path, model)
    kind = type(model)
    with pytest.raises(OSError, match="no file named"):
        kind.from_pretrained(packed)
    found = load_packed(kind, packed, dtype=torch.float32, attn_implementation="eager", use_cache=False)
    expected = kind.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager", use_cache=False)
    assert type(found) is kind
    assert same(found, expected)
    assert settings(found.config) == settings(expected.config)
    assert found.config._attn_implementation == "eager"
    _, info = load_packed(kind, packed, output_loading_info=True)
    assert not info["missing_keys"]

    with pytest.raises(MaskoptError, match="is not a packed folder; load it with LlamaForCausalLM"):
        load_packed(kind, dense)
    with pytest.raises(MaskoptError, match="holds a model of the type llama, which GPT2LMHeadModel is not for"):
        load_packed(transformers.GPT2LMHeadModel, packed)
    for file in packed.glob("packed-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(MaskoptError, match="is damaged"):
        load_packed(kind, packed)
