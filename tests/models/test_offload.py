"""Models whose blocks lie on disk are pruned as those in memory, and interrupted runs go on."""

import json
import shutil

import pytest
import torch

from maskopt import NM, MaskoptError, PerRow, Wanda, prune
from maskopt.models import load_masks, load_model, peak_bytes, pruning_bytes, save_pruned, select_layers
from maskopt.models import shards as shard_files
from maskopt.models.heap import resident_bytes
from maskopt.models.masks import PackedMasks
from maskopt.models.offload import offload_of
from maskopt.recovery import Recovery
from maskopt.weights import ConditionalADMM

SOLVER = ConditionalADMM(iterations=8)


@pytest.fixture
def saved(build, tokenizer, tmp_path):
    """A function that saves a tiny model of a kind and returns its folder."""

    def save(name="llama", **changes):
        folder = tmp_path / name
        build(name, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def run(folder, batches, out, offload, *, masks=None, solver=SOLVER, stop=None, **options):
    """Prune a model, up to `stop` layers, and save it; return its reloaded weights, the masks and the report."""
    model, tokenizer = load_model(folder, offload=offload)

    def look(event):
        if stop is not None and event.done >= stop:
            raise KeyboardInterrupt

    report = prune(model, batches, masks or NM(keep=2, group=4), solver, on_error="keep", progress=look, **options)
    save_pruned(out, model, tokenizer, report)
    assert {parameter.device.type for parameter in model.parameters()} >= {"cpu"}
    again, _ = load_model(out)
    return dict(again.named_parameters()), load_masks(out), report


def same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(weight, other[0][name]) for name, weight in one[0].items())
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(mask, other[1][name]) for name, mask in one[1].items())


@pytest.mark.parametrize("propagate", ["corrected", "pruned", "dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_results_are_those_of_a_model_in_memory(saved, make_batches, tmp_path, name, propagate):
    folder, batches = saved(name), make_batches()
    expected = run(folder, batches, tmp_path / "a", None, propagate=propagate)
    same(run(folder, batches, tmp_path / "b", tmp_path / "work", propagate=propagate), expected)


@pytest.mark.parametrize(
    "options", [{}, {"propagate": "pruned"}, {"propagate": "dense"}, {"recover": Recovery("block")}]
)
def test_an_interrupted_run_goes_on_to_the_same_result(saved, make_batches, tmp_path, options):
    folder, batches, work = saved(), make_batches(), tmp_path / "work"
    expected = run(folder, batches, tmp_path / "whole", None, **options)
    for stop in (3, 8, 8, 15):
        with pytest.raises(KeyboardInterrupt):
            run(folder, batches, tmp_path / "never", work, stop=stop, **options)
    assert len(list((work / "blocks").glob("0*"))) == 2
    found = run(folder, batches, tmp_path / "resumed", work, **options)
    same(found, expected)
    assert [layer.name for layer in found[2].layers] == [layer.name for layer in expected[2].layers]
    assert [layer.objective for layer in found[2].layers] == [layer.objective for layer in expected[2].layers]
    assert len(found[2].recovery) == len(expected[2].recovery)


def test_layers_outside_the_blocks_are_part_of_it(saved, make_batches, tmp_path):
    folder, batches, work = saved(), make_batches(), tmp_path / "work"
    options = {"include": ["model.layers.*", "lm_head"], "masks": PerRow(0.5)}
    expected = run(folder, batches, tmp_path / "whole", None, **options)
    with pytest.raises(KeyboardInterrupt):
        run(folder, batches, tmp_path / "never", work, stop=21, **options)
    same(run(folder, batches, tmp_path / "resumed", work, **options), expected)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"masks": PerRow(0.5)}, "masks"),
        ({"solver": Wanda(), "propagate": "corrected"}, "solver"),
        ({"correction": 0.5}, "correction"),
        ({"memory": 2**20}, "memory"),
        ({}, "data"),
    ],
)
def test_other_settings_or_data_are_refused(saved, make_batches, tmp_path, options, what):
    folder, batches, work = saved(), make_batches(), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        run(folder, batches, tmp_path / "never", work, stop=8)
    if what == "data":
        batches[0]["input_ids"][0, 0] = 1 + batches[0]["input_ids"][0, 0] % 7
    with pytest.raises(MaskoptError, match=f"had another {what} "):
        run(folder, batches, tmp_path / "never", work, **options)


def test_another_model_is_refused(saved, make_batches, tmp_path):
    folder, batches, work = saved(), make_batches(), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        run(folder, batches, tmp_path / "never", work, stop=8)
    (folder / "model.safetensors").touch()
    with pytest.raises(MaskoptError, match="weight files"):
        run(folder, batches, tmp_path / "never", work)


def test_damaged_records_are_refused(saved, make_batches, tmp_path):
    folder, batches, work = saved(), make_batches(), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        run(folder, batches, tmp_path / "never", work, stop=8)
    (work / "blocks" / "00000" / "record.json").write_text("{")
    with pytest.raises(MaskoptError, match="cannot be read"):
        run(folder, batches, tmp_path / "never", work)


def test_only_blocks_in_use_are_in_memory(saved, make_batches, tmp_path):
    model, _ = load_model(saved(num_hidden_layers=5), offload=tmp_path / "work")
    most, names = [0], []

    def look(event):
        names.append(event.name)
        loaded = {name.split(".")[2] for name, p in model.named_parameters() if "layers." in name and not p.is_meta}
        most[0] = max(most[0], len(loaded))

    prune(model, make_batches(), NM(keep=2, group=4), SOLVER, progress=look)
    assert 1 <= most[0] <= 2
    assert all(p.is_meta for name, p in model.named_parameters() if "layers." in name and "layers.4" not in name)


def test_weights_that_are_not_finite_are_found_before_the_first_block_is_pruned(saved, make_batches, tmp_path, build):
    model = build("llama")
    model.model.layers[2].mlp.up_proj.weight.data[1, 1] = float("nan")
    folder = saved()
    model.save_pretrained(folder)
    with pytest.raises(MaskoptError, match=r"layers\.2\.mlp\.up_proj\.weight has NaN"):
        run(folder, make_batches(), tmp_path / "never", tmp_path / "work")
    assert not list((tmp_path / "work").glob("blocks/0*"))


def test_a_failure_leaves_the_model_as_it_was(saved, make_batches, tmp_path):
    folder = saved()
    dense, _ = load_model(folder)
    model, _ = load_model(folder, offload=tmp_path / "work")

    def fail(event):
        if event.done >= 10:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        prune(model, make_batches(), NM(keep=2, group=4), SOLVER, progress=fail)
    batch = make_batches()[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense(**batch).logits)


def test_fitting_the_whole_model_needs_it_in_memory(saved, make_batches, tmp_path):
    model, _ = load_model(saved(), offload=tmp_path / "work")
    with pytest.raises(MaskoptError, match="without offload"):
        prune(model, make_batches(), NM(keep=2, group=4), SOLVER, recover=Recovery("model"))


def test_weights_shared_by_blocks_stay_in_memory(build, tokenizer, tmp_path, make_batches):
    model = build("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    loaded, _ = load_model(tmp_path / "tied", offload=tmp_path / "work")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.lm_head.weight.is_meta
    batch = make_batches()[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_files_are_cut_at_a_size_and_indexed(saved, make_batches, tmp_path, monkeypatch):
    folder, batches = saved(num_hidden_layers=4), make_batches()
    whole = run(folder, batches, tmp_path / "whole", tmp_path / "work1", solver=Wanda())
    monkeypatch.setattr(shard_files, "_LARGEST", 20_000)
    cut = run(folder, batches, tmp_path / "cut", tmp_path / "work2", solver=Wanda())
    same(cut, whole)
    files = sorted(path.name for path in (tmp_path / "cut").glob("model*"))
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files) - {"model.safetensors.index.json"}
    assert not list((tmp_path / "cut").glob("part*"))


def test_an_offloaded_model_stays_on_its_device(saved, make_batches, tmp_path):
    model, _ = load_model(saved(), offload=tmp_path / "work")
    with pytest.raises(MaskoptError, match="stays on its device"):
        prune(model, make_batches(), NM(keep=2, group=4), SOLVER, device="meta")
    assert offload_of(model) is not None


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8)])
def test_packed_masks_are_masks(shape):
    mask = torch.rand(shape) < 0.5
    masks = PackedMasks({"a": mask})
    masks["b"] = ~mask
    assert torch.equal(masks["a"], mask)
    assert list(masks) == ["a", "b"]
    del masks["a"]
    assert len(masks) == 1
    assert masks.bits("b").nbytes == -(-mask.numel() // 8)
    assert repr(masks) == "PackedMasks of 1 layers"


def test_memory_is_estimated_before_and_does_not_grow_with_depth(saved, tmp_path):
    estimates = []
    for depth in (2, 6):
        model, _ = load_model(saved(num_hidden_layers=depth), offload=tmp_path / f"work{depth}")
        before = resident_bytes()
        estimates.append(pruning_bytes(model, select_layers(model).layers, 1000, 2**20) - before)
        shutil.rmtree(tmp_path / "llama")
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert all(estimate > 2**20 + block for estimate in estimates)
    assert abs(estimates[1] - estimates[0]) < 2**22  # what the process has now may change by a few pages
    assert min(peak_bytes(), resident_bytes()) > 2**20
