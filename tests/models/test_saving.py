"""Pruned models survive a round trip, and no partial output is left behind."""

import json
import resource

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file as save_arrays
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
    # A saved model can be pruned further, from its own masks.
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


def test_files_that_hold_no_masks_are_refused(tmp_path):
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


def test_damaged_masks_are_refused(tmp_path):
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


def tampered(change):
    """The manifest and the arrays of a good file after a change."""
    masks = {"a.b": torch.eye(4, 6).bool(), "a.c": torch.ones(3, 3).bool()}
    arrays = {name: np.packbits(mask.numpy()) for name, mask in masks.items()}
    layers = {name: {"shape": list(mask.shape), "kept": int(mask.sum())} for name, mask in masks.items()}
    manifest = {"version": 1, "bits": "numpy.packbits, big-endian, row-major", "layers": layers}
    return change(manifest, arrays) or (json.dumps(manifest), arrays)


def entry(**changes):
    return lambda manifest, arrays: manifest["layers"]["a.b"].update(changes)


def renamed(name):
    def change(manifest, arrays):
        manifest["layers"][name] = manifest["layers"].pop("a.b")
        arrays[name] = arrays.pop("a.b")

    return change


def stored(bits):
    return lambda manifest, arrays: arrays.update({"a.b": bits})


def text(manifest):
    return lambda _, arrays: (manifest, arrays)


TAMPERED = {
    "no JSON": text("{"),
    "nested without end": text("[" * 100_000),
    "a list": text("[1]"),
    "a number": text("3"),
    "nothing": text("null"),
    "long number": text("9" * 5000),
    "no version": lambda manifest, arrays: manifest.pop("version") and None,
    "version 2": lambda manifest, arrays: manifest.update(version=2),
    "version true": lambda manifest, arrays: manifest.update(version=True),
    "no layers": lambda manifest, arrays: manifest.pop("layers") and None,
    "layers a list": lambda manifest, arrays: manifest.update(layers=[1]),
    "layers a word": lambda manifest, arrays: manifest.update(layers="a.b"),
    "layer missing": lambda manifest, arrays: manifest["layers"].pop("a.b") and None,
    "bits missing": lambda manifest, arrays: arrays.pop("a.b") is None or None,
    "entry a list": lambda manifest, arrays: manifest["layers"].update({"a.b": [4, 6]}),
    "entry nothing": lambda manifest, arrays: manifest["layers"].update({"a.b": None}),
    "no shape": lambda manifest, arrays: manifest["layers"]["a.b"].pop("shape") and None,
    "no kept": lambda manifest, arrays: manifest["layers"]["a.b"].pop("kept") and None,
    "more than shape and kept": entry(dtype="bool"),
    "shape a word": entry(shape="46"),
    "shape of words": entry(shape=["4", "6"]),
    "shape of one": entry(shape=[24]),
    "shape of three": entry(shape=[2, 2, 6]),
    "shape negative": entry(shape=[-4, -6]),
    "shape zero": entry(shape=[0, 6]),
    "shape fractions": entry(shape=[4.0, 6.0]),
    "shape truths": entry(shape=[True, 24]),
    "shape too large": entry(shape=[4, 8]),
    "shape huge": entry(shape=[2**40, 2**40]),
    "shape nothing": entry(shape=None),
    "kept wrong": entry(kept=5),
    "kept a word": entry(kept="4"),
    "kept a fraction": entry(kept=4.0),
    "kept nothing": entry(kept=None),
    "kept true": entry(kept=True),
    "other type": stored(np.packbits(np.eye(4, 6, dtype=bool)).astype(np.int64)),
    "signed bytes": stored(np.packbits(np.eye(4, 6, dtype=bool)).astype(np.int8)),
    "floats": stored(np.ones(3, dtype=np.float32)),
    "a matrix": stored(np.packbits(np.eye(4, 6, dtype=bool))[None]),
    "a number of bits": stored(np.array(1, dtype=np.uint8)),
    "too few bits": stored(np.zeros(2, dtype=np.uint8)),
    "too many bits": stored(np.zeros(4, dtype=np.uint8)),
    "bits beyond the end": lambda manifest, arrays: arrays.update({"a.c": np.array([255, 255], dtype=np.uint8)}),
    "name twice": lambda manifest, arrays: (
        json.dumps(manifest).replace('"layers": {', '"layers": {"a.b": {"shape": [4, 6], "kept": 4}, '),
        arrays,
    ),
    "name within another": renamed("a.c.d"),
    **{
        f"name {name!r}": renamed(name)
        for name in ("", ".", "..", "../x", "/etc/x", "a/b", "a\\b", "a..b", "a.", "x\ny")
    },
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_tampered_masks_are_refused_in_one_sentence(tmp_path, change):
    file = tmp_path / "masks.safetensors"
    manifest, arrays = tampered(change)
    save_arrays(arrays, file, metadata={"maskopt.masks": manifest})
    with pytest.raises(MaskoptError, match=r"^The (mask )?file [^\n]*\.$") as caught:
        load_masks(file)
    assert len(str(caught.value)) < 400 + len(str(file))


def test_what_was_not_tampered_with_is_read(tmp_path):
    manifest, arrays = tampered(lambda manifest, arrays: None)
    save_arrays(arrays, tmp_path / "masks.safetensors", metadata={"maskopt.masks": manifest})
    masks = load_masks(tmp_path)
    assert torch.equal(masks["a.b"], torch.eye(4, 6).bool())
    assert torch.equal(masks["a.c"], torch.ones(3, 3).bool())


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
    """The weights are written by native code, whose errors are of another class."""
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
