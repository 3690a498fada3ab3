"""`maskopt prune --recover` and `maskopt recover`."""

from __future__ import annotations

import sys

import pytest
import torch

from maskopt.cli.recover_options import further_windows
from maskopt.models import calibration_batches, load_masks, load_model
from maskopt.models.windows import divided
from maskopt.oracles import NM, PerRow

DATA = ("--samples", 24, "--seqlen", 32)


@pytest.fixture
def pruned(run, model, text, tmp_path):
    """A folder that `maskopt prune` wrote."""
    out = tmp_path / "pruned"
    run("prune", model, out, "--calibration", text, "-s", 0.5, "--solver", "wanda", *DATA)
    return out


def test_fits_have_windows_of_their_own(model, text):
    _, tokenizer = load_model(model)
    layers = calibration_batches(tokenizer, text, 6, 16)
    held_out, further = further_windows(layers, None, fits=True)
    starts = [start for windows in (layers, held_out, further) for start in windows.starts.tolist()]
    assert [windows.samples for windows in (layers, held_out, further)] == [6, 1, 12]
    assert min(abs(one - other) for one in starts[6:] for other in starts[:6]) >= 16
    assert further_windows(layers, 0, fits=False) == (None, None)


def test_recover_draws_the_windows_that_prune_fits_to(run, model, text, pruned, tmp_path, read, monkeypatch):
    fitted = []

    def divided_and_seen(batches, ranks):
        data = divided(batches)
        fitted.append(torch.cat([data.batches[index].inputs["input_ids"] for index in data.fitted]))
        return data

    for module in ("prune", "recover"):
        monkeypatch.setattr(sys.modules[f"maskopt.models.{module}"], "divided", divided_and_seen)
    options = ("--calibration", text, *DATA, "--recover", "block", "--recover-tokens", 64)
    run("prune", model, tmp_path / "one", "-s", 0.5, *options)
    run("recover", pruned, tmp_path / "two", "--against", model, *options)
    assert len(fitted) == 2
    assert torch.equal(*fitted)
    assert len(fitted[0]) == 48
    assert read(tmp_path / "two" / "report.json")["calibration"]["samples"] == 48


@pytest.mark.parametrize("level", ["block", "model"])
def test_prune_recovers(run, model, text, tmp_path, read, level):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    command = ("prune", model, out, "--calibration", text, "--pattern", "2:4", *DATA)
    result = run(*command, "--recover", level, "--recover-epochs", 2, "--json", figures)
    report = read(out / "report.json")
    records = report["recovery"]
    assert report["command"]["recover"] == level
    assert read(figures)["recovery"] == records
    assert [record["level"] for record in records].count("model") == (level == "model")
    assert all(record["after"] <= record["before"] for record in records)
    assert "recovery, blocks" in result.stdout
    assert ("recovery, model" in result.stdout) == (level == "model")
    assert report["recovery_seconds"] > 0
    network, _ = load_model(out)
    for name, mask in load_masks(out).items():
        assert NM(keep=2, group=4).contains(mask)
        assert not bool(network.get_submodule(name).weight[~mask].any())


def test_recover_goes_on_from_a_pruned_folder(run, model, text, pruned, tmp_path, read):
    out = tmp_path / "recovered"
    command = ("recover", pruned, out, "--against", model, "--calibration", text, *DATA)
    result = run(*command, "--recover-tokens", 2000, "--recover-checkpointing", "--evaluate", text)
    report = read(out / "report.json")
    assert report["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert [record["level"] for record in report["recovery"]][-1] == "model"
    assert set(report["perplexity"]) == {"dense", "before", "after"}
    for record in report["recovery"]:
        assert record["name"] in result.stdout
        assert record["after"] <= record["before"]
    masks = load_masks(out)
    network, _ = load_model(out)
    for name, mask in masks.items():
        kept = int(load_masks(pruned)[name][0].sum())
        assert PerRow(kept).contains(mask)
        assert not bool(network.get_submodule(name).weight[~mask].any())


def test_checkpoints_of_others_are_recovered_by_their_zeros(run, model, text, pruned, tmp_path, read):
    (pruned / "masks.safetensors").unlink()
    (pruned / "report.json").unlink()
    out = tmp_path / "recovered"
    command = ("recover", pruned, out, "--against", model, "--calibration", text, *DATA)
    run(*command, "--recover-tokens", 500, "--recover-masks", "fixed", "--recover", "block")
    before, _ = load_model(pruned)
    after, _ = load_model(out)
    for name in load_masks(out):
        zero = before.get_submodule(name).weight == 0
        assert not bool(after.get_submodule(name).weight[zero].any())
        assert int(zero.sum()) > 0.4 * zero.numel()


def test_outputs_are_not_overwritten_and_options_are_checked(fails, model, text, pruned, tmp_path):
    def refused(*options: object) -> str:
        return fails("recover", pruned, tmp_path / "new", "--against", model, "--calibration", text, *options)

    assert "exists" in fails("recover", pruned, pruned, "--against", model, "--calibration", text)
    assert "none" in refused("--recover", "none")
    assert "layer" in refused("--recover", "layer")
    assert "epochs" in refused("--recover-epochs", 0)
    assert "lottery" in refused("--recover-masks", "lottery")
    assert "PartitionMatroid" in fails(
        "prune",
        model,
        tmp_path / "new",
        "--calibration",
        text,
        *DATA,
        "-p",
        "columns",
        "-s",
        0.5,
        "--recover",
        "block",
        "--recover-masks",
        "gumbel",
    )
    assert "parameters" in refused("--recover-parameters", "biases")
    assert "No layer" in fails("recover", model, tmp_path / "new", "--against", model, "--calibration", text)
    command = ("prune", model, tmp_path / "new", "--calibration", text, "-s", 0.5)
    assert "layer" in fails(*command, "--recover", "layer")
    assert not (tmp_path / "new").exists()


def test_one_window_is_enough_beside_those_held_out(run, model, text, tmp_path, read):
    command = ("prune", model, tmp_path / "out", "--calibration", text, "-s", 0.5, "--samples", 1, "--seqlen", 32)
    run(*command, "--recover", "model", "--recover-tokens", 64, "--json", tmp_path / "figures.json")
    figures = read(tmp_path / "figures.json")
    assert figures["settings"]["held_out_sequences"] == 1
    assert figures["command"]["recovery_bytes"] > 0
    assert figures["recovery"]


def test_two_runs_are_identical(run, model, text, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        command = ("prune", model, out, "--calibration", text, "-s", 0.5, *DATA)
        run(*command, "--recover", "model", "--recover-tokens", 1000)
    first, second = (load_model(out)[0].state_dict() for out in outs)
    assert all(torch.equal(first[name], second[name]) for name in first)
