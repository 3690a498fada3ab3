"""Pruned models survive a round trip, and nothing half-written is left behind."""

import json
import resource

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from maskopt.errors import MaskoptError
from maskopt.models import check_output, load_masks, load_model, prune, save_masks, save_pruned, select_layers
from maskopt.oracles import PerRow
from maskopt.solvers import Wanda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_weights_are_equal_bit_by_bit(architecture, make_batches, tokenizer, tmp_path, dtype):
    model = architecture.build().to(dtype)
    report = prune(model, make_batches(), PerRow(0.5), Wanda())
    save_pruned(tmp_path / "out", model, tokenizer, report, extra={"perplexity": {"dense": 7.0}})

    again, info = type(model).from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, reloaded = model.state_dict(), again.state_dict()
    assert state.keys() == reloaded.keys()
    assert all(torch.equal(state[name], reloaded[name]) and state[name].dtype == reloaded[name].dtype for name in state)
    assert (again.get_output_embeddings() is None) == (model.get_output_embeddings() is None)
    if model.config.tie_word_embeddings and again.get_output_embeddings() is not None:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight

    masks = load_masks(tmp_path / "out")
    assert masks.keys() == report.masks.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, report.masks[name])
        assert not again.get_submodule(name).weight[~mask].any()
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["perplexity"] == {"dense": 7.0}
    assert [layer["name"] for layer in content["layers"]] == list(masks)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_whole_checkpoint_survives(build, make_batches, tokenizer, tmp_path):
    model = build("llama")
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    save_pruned(tmp_path / "out", model, tokenizer, prune(model, make_batches(), PerRow(0.5), Wanda()))
    again, words = load_model(tmp_path / "out")
    assert type(again) is type(model)
    assert again.generation_config.temperature == 0.7
    assert words("Hello, fox")["input_ids"] == tokenizer("Hello, fox")["input_ids"]
    # What was saved can be pruned further, from its own masks.
    more = prune(again, make_batches(), PerRow(0.5), Wanda(), start=load_masks(tmp_path / "out"))
    assert more.sparsity == 0.5


def test_published_generation_settings_survive_even_odd_ones(build, make_batches, tokenizer, tmp_path):
    build("llama").save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    # As published with several well-known models: a temperature without sampling.
    (tmp_path / "in" / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    model, words = load_model(tmp_path / "in")
    report = prune(model, make_batches(), PerRow(0.5), Wanda())
    save_pruned(tmp_path / "out", model, words, report)
    assert load_model(tmp_path / "out")[0].generation_config.top_p == 0.9
    model.generation_config.temperature = 0.7
    with pytest.raises(MaskoptError, match=r"other could not be written: GenerationConfig is invalid: .*temperature"):
        save_pruned(tmp_path / "other", model, words, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_masks_of_any_shape_round_trip(tmp_path_factory, data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    masks = {f"layer.{i}": torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)}
    file = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    save_masks(file, masks)
    again = load_masks(file)
    assert again.keys() == masks.keys()
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


def test_masks_take_one_bit_per_weight(tmp_path):
    save_masks(tmp_path / "masks.safetensors", {"layer": torch.ones(256, 512).bool()})
    assert (tmp_path / "masks.safetensors").stat().st_size < 256 * 512 / 8 + 600


def test_files_that_hold_no_masks(tmp_path):
    with pytest.raises(MaskoptError, match=r"There is no mask file .*none"):
        load_masks(tmp_path / "none")
    with pytest.raises(MaskoptError, match=r"no mask file .*masks.safetensors"):
        load_masks(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MaskoptError, match="holds no masks that this version"):
        load_masks(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"abc")
    with pytest.raises(MaskoptError, match=r"broken.safetensors is not a readable safetensors file"):
        load_masks(tmp_path / "broken.safetensors")


def test_damaged_masks_are_noticed(tmp_path):
    file = tmp_path / "masks.safetensors"
    save_masks(file, {"layer": torch.ones(16, 16).bool()})
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(MaskoptError, match="layer keeps 255 weights, not 256"):
        load_masks(file)
    file.write_bytes(bytes(content).replace(b"[16, 16]", b"[16, 17]").replace(b'\\"shape', b'\\"shape'))
    with pytest.raises(MaskoptError, match="layer has 32 bytes for 272 weights"):
        load_masks(file)


@pytest.fixture
def pruned(llama, make_batches):
    """A pruned model and its report."""
    return llama, prune(llama, make_batches(), PerRow(0.5), Wanda())


def test_an_existing_output_is_never_touched(pruned, tokenizer, tmp_path):
    for path, make in (("folder", lambda p: p.mkdir()), ("file", lambda p: p.write_text("mine"))):
        make(tmp_path / path)
        with pytest.raises(MaskoptError, match=f"{path} exists already"):
            check_output(tmp_path / path)
        with pytest.raises(MaskoptError, match=f"{path} exists already"):
            save_pruned(tmp_path / path, pruned[0], tokenizer, pruned[1])
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    with pytest.raises(MaskoptError, match="does not exist"):
        check_output(tmp_path / "none" / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing(pruned, tokenizer, tmp_path, monkeypatch, error):
    def fail(folder):
        (folder / "half").write_text("half")
        raise error

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    expected = MaskoptError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left on device" if isinstance(error, OSError) else None):
        save_pruned(tmp_path / "out", pruned[0], tokenizer, pruned[1])
    assert not list(tmp_path.iterdir())


def test_a_file_size_limit_while_the_weights_are_written_leaves_nothing(pruned, tokenizer, tmp_path):
    """The weights are written by native code, whose errors are of another kind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(MaskoptError, match=r"out could not be written: .*large"):
            save_pruned(tmp_path / "out", pruned[0], tokenizer, pruned[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_heads_are_kept_by_loading_and_saving(make_batches, tokenizer, tmp_path):
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=5,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    model, words = load_model(tmp_path / "in")
    before = model.classifier.weight.detach().clone()
    report = prune(model, make_batches(padded=True), PerRow(0.5), Wanda())
    assert len(report.layers) == len(select_layers(model).layers) == 12
    save_pruned(tmp_path / "out", model, words, report)
    again, _ = load_model(tmp_path / "out")
    assert type(again) is transformers.BertForSequenceClassification
    assert torch.equal(again.classifier.weight, before)
