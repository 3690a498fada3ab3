"""`maskopt pack`, `unpack` and `prune --packed`, and packed folders as models of other commands."""

from __future__ import annotations

import json

import pytest
import torch

from maskopt.models import is_packed, load_masks, load_model
from maskopt.packed.encoding import zstandard

DATA = ("-s", 0.5, "--solver", "wanda", "--samples", 4, "--quiet")


@pytest.fixture
def pruned(run, model, text, tmp_path):
    """A folder that `maskopt prune` wrote."""
    out = tmp_path / "pruned"
    run("prune", model, out, "--calibration", text, *DATA)
    return out


def parameters(folder):
    return {name: value.detach() for name, value in load_model(folder)[0].named_parameters()}


def equal(one, two):
    first, second = parameters(one), parameters(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_packing_says_what_became_of_the_bytes(run, pruned, tmp_path, read):
    packed, figures = tmp_path / "packed", tmp_path / "figures.json"
    result = run("pack", pruned, packed, "--json", figures)
    report = read(figures)
    assert report["command"] == {"out": str(pruned), "packed": str(packed), "compress": False}
    stored = read(packed / "packed.json")["tensors"]
    sparse = [entry for entry in stored.values() if "mask" in entry["parts"]]
    assert report["kinds"]["mask and values"]["tensors"] == len(sparse) == 14
    assert report["kinds"]["mask and values"]["dense"] == sum(entry["bytes"] for entry in sparse)
    assert report["dense_bytes"] == sum(entry["bytes"] for entry in stored.values())
    assert report["packed_bytes"] == sum(kind["packed"] for kind in report["kinds"].values()) < report["dense_bytes"]
    assert report["ratio"] == report["packed_bytes"] / report["dense_bytes"]
    said = " ".join(result.stdout.split())
    assert "mask and values 14 tensors, " in said
    assert f" packed: {report['ratio']:.3f}" in said
    assert {"maskopt", "torch"} <= set(report["versions"])
    assert equal(pruned, packed)

    again = json.loads(run("unpack", packed, tmp_path / "again", "--json", "-", "--quiet").stdout)
    assert again["command"] == {"packed": str(packed), "out": str(tmp_path / "again")}
    assert again["kinds"] == report["kinds"]
    assert not is_packed(tmp_path / "again")
    assert equal(pruned, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in pruned.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["again", "packed", "pruned"]


def test_prune_writes_packed_folders(run, model, text, pruned, tmp_path, read):
    out = tmp_path / "packed"
    result = run("prune", model, out, "--calibration", text, *DATA, "--packed", "--json", tmp_path / "figures.json")
    assert "mask and values  14 tensors" in result.stdout
    figures = read(tmp_path / "figures.json")
    sizes = figures.pop("packed")
    assert figures == read(out / "report.json")
    run("pack", pruned, tmp_path / "later", "--json", tmp_path / "later.json")
    later = read(tmp_path / "later.json")
    assert {key: sizes[key] for key in ("kinds", "ratio")} == {key: later[key] for key in ("kinds", "ratio")}
    assert is_packed(out)
    assert equal(pruned, out)
    assert load_masks(out).keys() == load_masks(pruned).keys()
    assert read(out / "report.json")["command"]["packed"] is True
    assert not list(tmp_path.glob(".*")) + list(tmp_path.glob("*.unfinished"))
    resumed = run("prune", model, out, "--calibration", text, *DATA, "--packed", "--resume")
    assert "is complete already" in resumed.stderr


def test_experts_are_packed_one_by_one(run, mixture, text, tmp_path, read):
    out = tmp_path / "packed"
    options = ("--pattern", "2:4", "--weights", "keep", "--samples", 2, "--seqlen", 8, "--packed", "--quiet")
    run("prune", mixture, out, "--calibration", text, *options)
    stored = read(out / "packed.json")["tensors"]
    experts = [entry for name, entry in stored.items() if ".experts." in name]
    assert len(experts) == 2 * 12 * 3
    assert all("mask" in entry["parts"] and 2 * entry["kept"] == 16 * 24 for entry in experts)
    run("unpack", out, tmp_path / "dense")
    assert equal(out, tmp_path / "dense")


def test_other_commands_take_packed_folders(run, model, text, pruned, tmp_path, read):
    packed = tmp_path / "packed"
    run("pack", pruned, packed)
    figures = [json.loads(run("evaluate", folder, "--text", text, "--json", "-").stdout) for folder in (pruned, packed)]
    assert figures[0]["perplexity"] == figures[1]["perplexity"]

    more = ("--calibration", text, "-s", 0.7, "--solver", "wanda", "--samples", 4, "--quiet")
    for folder in (pruned, packed):
        run("prune", folder, tmp_path / f"{folder.name}-more", *more)
    assert equal(tmp_path / "pruned-more", tmp_path / "packed-more")
    assert not is_packed(tmp_path / "packed-more")

    fit = ("--against", model, "--calibration", text, "--recover", "block", "--recover-epochs", 1, "--samples", 4)
    for folder in (pruned, packed):
        run("recover", folder, tmp_path / f"{folder.name}-fit", *fit, "--quiet")
    assert equal(tmp_path / "pruned-fit", tmp_path / "packed-fit")
    counts = [json.loads(run("scale", folder, "--json", "-").stdout)["parameters"] for folder in (pruned, packed)]
    assert counts[0] == counts[1]


def test_what_cannot_be_done_is_refused_before_any_work(fails, model, text, pruned, tmp_path):
    (tmp_path / "there").write_text("mine")
    assert "there exists already" in fails("pack", pruned, tmp_path / "there")
    assert "is not packed" in fails("unpack", pruned, tmp_path / "out")
    assert "holds no config.json" in fails("pack", tmp_path, tmp_path / "out")
    words = fails("prune", model, tmp_path / "out", "--calibration", text, *DATA, "--compress")
    assert "--compress applies to packed folders; give --packed as well" in words
    assert "Two outputs have the same name" in fails("pack", pruned, tmp_path / "a", "--json", tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "text.txt", "there"]


def test_compression_is_used_or_refused(run, fails, model, text, pruned, tmp_path, monkeypatch):
    if zstandard() is not None:
        run("pack", pruned, tmp_path / "small", "--compress")
        run("prune", model, tmp_path / "small-too", "--calibration", text, *DATA, "--packed", "--compress")
        assert equal(pruned, tmp_path / "small")
        assert equal(pruned, tmp_path / "small-too")
    monkeypatch.setattr("maskopt.packed.encoding.zstandard", lambda: None)
    for command in (
        ("pack", pruned, tmp_path / "out"),
        ("prune", model, tmp_path / "out", "--calibration", text, *DATA, "--packed"),
    ):
        assert 'pip install "maskopt[zstd]"' in fails(*command, "--compress")
        assert not (tmp_path / "out").exists()


def test_damaged_packed_folders_are_refused_in_a_sentence(run, fails, text, pruned, tmp_path):
    packed = tmp_path / "packed"
    run("pack", pruned, packed)
    (file,) = packed.glob("packed-*.safetensors")
    whole = file.read_bytes()
    for content, words in (
        (whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:], "is not what was packed"),
        (whole[:-8], "is damaged or cannot be read"),
    ):
        # A file of its own: threads of transformers may still read the one before, which is mapped into memory.
        file.unlink()
        file.write_bytes(content)
        assert words in fails("evaluate", packed, "--text", text)
    file.unlink()
    assert f"{file.name} is damaged or cannot be read" in fails("evaluate", packed, "--text", text)
    (packed / "packed.json").write_text("{}")
    assert "packed.json cannot be read" in fails("evaluate", packed, "--text", text)
