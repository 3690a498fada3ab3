from __future__ import annotations

import json
import shlex

import pytest
import torch

from maskopt import models
from maskopt.models import load_masks, load_model, perplexity
from maskopt.oracles import PerRow
from maskopt.solvers import ContinuationFrankWolfe, Wanda
from maskopt.weights import ALPS, ConditionalADMM, LeastSquares


@pytest.fixture
def pruned(run, model, text, tmp_path):
    """The result of a run at 50 %, its folder, and its JSON."""
    out, figures = tmp_path / "pruned", tmp_path / "figures.json"
    command = ("prune", model, out, "--calibration", text, "-s", 0.5, "--samples", 8, "--seed", 3)
    command += ("-o", "iterations=20", "--calibration-perplexity")
    return run(*command, "--evaluate", text, "--json", figures), out, figures


def test_the_folder_loads_and_its_report_is_true(pruned, model, text, read):
    result, out, figures_file = pruned
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    report = read(out / "report.json")
    assert report == read(figures_file)
    network, tokenizer = load_model(out)
    masks = load_masks(out)
    assert [layer["name"] for layer in report["layers"]] == list(masks)
    assert len(masks) == 14
    for name, mask in masks.items():
        assert torch.equal(network.get_submodule(name).weight != 0, mask)
        assert name in result.stdout
    for name, measured in (("calibration", text.read_text()[: 32 * 32]), ("evaluation", text)):
        after = report["perplexity"][name]["pruned"]
        assert after["perplexity"] == pytest.approx(perplexity(network, tokenizer, measured).perplexity, rel=1e-5)
        assert f"{after['perplexity']:.3f}" in result.stdout
    dense = perplexity(*load_model(model), text).to_json()
    assert report["perplexity"]["evaluation"]["dense"]["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    assert report["calibration"]["seqlen"] == 32  # what the model can take
    assert report["calibration"]["sha256"] == dense["sha256"]
    assert report["calibration"]["seed"] == 3
    assert report["sparsity"] == 0.5
    assert report["settings"]["solver"] == repr(ConditionalADMM(iterations=20))
    assert report["command"]["weights"] == "best"
    assert all(layer["relative_error"] < layer["kept_error"] for layer in report["layers"])
    for layer in report["layers"]:
        assert f"{layer['kept_error']:.5f}" in result.stdout
        assert f"{layer['relative_error']:.5f}" in result.stdout
    assert report["command"]["model"] == str(model)
    assert {"maskopt", "torch", "transformers", "threads"} <= set(report["versions"])


def test_the_saved_weights_are_those_of_the_same_run_in_python(pruned, model, text):
    _, out, _ = pruned
    network, tokenizer = load_model(model)
    dense = {name: parameter.clone() for name, parameter in network.named_parameters()}
    batches = models.calibration_batches(tokenizer, text, 8, 32, 8, 3)
    report = models.prune(network, batches, PerRow(0.5), ConditionalADMM(iterations=20))
    saved, masks = load_model(out)[0], load_masks(out)
    assert all(torch.equal(report.masks[name], mask) for name, mask in masks.items())
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, network.get_parameter(name))
        mask = masks.get(name.removesuffix(".weight"))
        if mask is None:
            assert torch.equal(parameter, dense[name])
        else:
            assert torch.equal(parameter != 0, mask)
            assert not torch.equal(parameter, dense[name] * mask)


@pytest.mark.parametrize(
    ("options", "treatment", "solver"),
    [
        ((), "best", ConditionalADMM()),
        (("--solver", "wanda"), "keep", Wanda()),
        (("--certify", "shift", "-o", "iterations=5"), "keep", ContinuationFrankWolfe(iterations=5)),
        (("--weights", "keep", "-o", "iterations=5"), "keep", ContinuationFrankWolfe(iterations=5)),
        (("--weights", "lsq", "--solver", "wanda"), "lsq", LeastSquares(solver=Wanda())),
        (
            ("--weights", "lsq:ridge=0.1", "-o", "iterations=5"),
            "lsq:ridge=0.1",
            LeastSquares(0.1, ContinuationFrankWolfe(iterations=5)),
        ),
        (("--weights", "alps:iterations=9"), "alps:iterations=9", ALPS(iterations=9)),
    ],
)
def test_options_choose_how_weights_are_updated(run, model, text, tmp_path, read, options, treatment, solver):
    few = ("--include", "*.0.*.q_proj", "--include", "*.0.*.up_proj", "--samples", 2)
    result = run("prune", model, tmp_path / "out", "--calibration", text, "-s", 0.5, *few, *options)
    report = read(tmp_path / "out" / "report.json")
    assert report["command"]["weights"] == treatment
    assert report["settings"]["solver"] == repr(solver)
    before, after, masks = load_model(model)[0], load_model(tmp_path / "out")[0], load_masks(tmp_path / "out")
    assert len(report["layers"]) == len(masks) == 2
    for layer in report["layers"]:
        one, two = (network.get_submodule(layer["name"]).weight for network in (before, after))
        assert torch.equal(two != 0, masks[layer["name"]])
        assert torch.equal(two, one * masks[layer["name"]]) == (treatment == "keep")
        assert (layer["relative_error"] == layer["kept_error"]) == (treatment == "keep")
        assert (layer["lower_bound"] is not None) == ("--certify" in options)
    assert ("before" in result.stdout) == (treatment != "keep")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recover-epochs", 3), "--recover-epochs says how a recovery works"),
        (("--recover-tokens", 99), "--recover-tokens says how a recovery works"),
        (("--recover-masks", "gumbel"), "--recover-masks says how a recovery works"),
        (("--recover-parameters", "lora"), "--recover-parameters says how a recovery works"),
        (("--recover-rank", 4), "--recover-rank says how a recovery works"),
        (("--recover-checkpointing",), "--recover-checkpointing says how a recovery works"),
        (("--cache", "folder"), "--cache keeps what a rule of --allocation measures"),
        (("--propagate", "dense", "--correction", 0.3), "--correction says how errors upstream are corrected"),
        (("--propagate", "pruned", "--target", "layer"), "--target says how errors upstream are corrected"),
        (("--solver", "wanda", "--correction", 1), "--correction says how errors upstream are corrected"),
    ],
)
def test_options_without_effect_are_refused(fails, model, text, tmp_path, options, words):
    assert words in fails("prune", model, tmp_path / "out", "--calibration", text, "-s", 0.5, "--samples", 2, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", "obs"), "There is no method 'obs' for weights"),
        (("--weights", "best", "--solver", "wanda"), "The method best chooses the mask itself"),
        (("--weights", "keep", "-o", "polish_steps=1"), "The solver continuation has no setting 'polish_steps'"),
        (("-o", "second=0"), "The method best has no setting 'second'"),
        (("--weights", "lsq", "--certify", "shift"), "certify proves bounds on masks whose weights stay"),
        (("--weights", "best", "--certify", "shift"), "certify proves bounds on masks whose weights stay"),
        (
            ("--weights", "sparsegpt", "-p", "columns"),
            "with SparseGPT: it must be a PartitionMatroid",
        ),
    ],
)
def test_bad_weights_are_refused(fails, model, text, tmp_path, options, words):
    assert words in fails("prune", model, tmp_path / "out", "--calibration", text, "-s", 0.5, "--samples", 2, *options)
    assert not (tmp_path / "out").exists()


def test_evaluate_agrees_with_the_report(pruned, run, text, tmp_path, read):
    _, out, figures = pruned
    result = run("evaluate", out, "--text", text, "--json", tmp_path / "e.json", "--batch-size", 4)
    evaluation = read(tmp_path / "e.json")
    expected = read(figures)["perplexity"]["evaluation"]["pruned"]
    assert evaluation["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert (evaluation["tokens"], evaluation["windows"], evaluation["seqlen"]) == (2016, 63, 32)
    assert evaluation["settings"]["dtype"] == "torch.float32"
    assert f"{evaluation['perplexity']:.4f}" in result.stdout
    assert json.loads(run("evaluate", out, "--text", text, "--seqlen", 16, "--json", "-").stdout)["windows"] == 126


def test_options_reach_prune(run, model, text, tmp_path, read):
    options = ("--pattern", "2:4", "--solver", "wanda", "--include", "*_proj", "--exclude", "*.mlp.*")
    more = ("--propagate", "dense", "--samples", 4, "--seqlen", 16, "--batch-size", 2, "--memory", "64M")
    run("prune", model, tmp_path / "out", "--calibration", text, *options, *more)
    report = read(tmp_path / "out" / "report.json")
    assert len(report["layers"]) == 8
    assert all("self_attn" in layer["name"] for layer in report["layers"])
    assert report["settings"]["propagate"] == "dense"
    assert report["settings"]["batches"] == 2
    assert report["perplexity"] == {}


def test_experts_are_pruned_and_those_with_few_tokens_counted(run, mixture, text, tmp_path, read):
    out = tmp_path / "out"
    options = ("--pattern", "2:4", "--samples", 2, "--seqlen", 8, "--evaluate", text, "--quiet")
    result = run("prune", mixture, out, "--calibration", text, *options)
    report = read(out / "report.json")
    experts = [layer for layer in report["layers"] if ".experts." in layer["name"]]
    assert len(experts) == 2 * 2 * 12
    assert {layer["sparsity"] for layer in experts} == {0.5}
    few = sum(layer["tokens"] < layer["columns"] for layer in experts)
    assert few == sum(layer["pooled"] for layer in report["layers"]) > 0
    words = " ".join(result.stdout.split())
    assert f"{few} of {len(report['layers'])} layers saw fewer tokens than they have inputs" in words
    rows = [line for line in result.stdout.splitlines() if "12 x 16 x 24" in line or "12 x 48 x 16" in line]
    assert len(rows) == 4
    masks, (network, _) = load_masks(out), load_model(out)
    for layer in experts:
        stem, _, index = layer["name"].rpartition(".")
        assert torch.equal(network.get_parameter(stem)[int(index)] != 0, masks[layer["name"]])
    evaluated = json.loads(run("evaluate", out, "--text", text, "--seqlen", 8, "--json", "-").stdout)
    assert evaluated["perplexity"] > 1.0
    recovery = (
        "--against",
        mixture,
        "--calibration",
        text,
        "--samples",
        4,
        "--recover",
        "block",
        "--recover-epochs",
        1,
    )
    run("recover", out, tmp_path / "recovered", *recovery)
    assert load_masks(tmp_path / "recovered").keys() == masks.keys()


def test_calibration_text_is_measured_at_its_beginning_only(run, model, tmp_path, read):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a long story."}) for _ in range(1000)))
    run(
        "prune",
        model,
        tmp_path / "out",
        "--calibration",
        path,
        "-s",
        0.5,
        "--solver",
        "wanda",
        "--samples",
        4,
        "--calibration-perplexity",
    )
    assert read(tmp_path / "out" / "report.json")["perplexity"]["calibration"]["dense"]["tokens"] == 1024


def test_the_summary_ends_with_the_time_and_the_next_command(run, model, text, tmp_path):
    out = tmp_path / "a folder"
    arguments = ("--calibration", text, "-s", 0.6, "--solver", "wanda", "--samples", 2)
    lines = [line.split(maxsplit=1) for line in run("prune", model, out, *arguments).stdout.strip().splitlines()]
    said = {name: rest.strip() for name, rest in (line for line in lines[-9:] if len(line) == 2)}
    assert "s in all: " in said["time"]
    assert said["memory"].endswith(" GB at most")
    assert said["masks"] == "per-row 60 %; keeps 7 of 16, 10 of 24 per row, rounded up"
    assert said["solver"] == "Wanda"
    assert lines[-1] == ["Next:", f"maskopt evaluate '{out}' --text TEXT"]
    run(*shlex.split(lines[-1][1].replace("TEXT", str(text)))[1:])


def test_a_time_limit_ends_the_proofs_and_says_so(run, fails, model, text, tmp_path, read):
    arguments = ("--calibration", text, "-s", 0.5, "--samples", 2, "-o", "iterations=5", "--certify", "cuts")
    result = run("prune", model, tmp_path / "out", *arguments, "--time-limit", 1e-6)
    report = read(tmp_path / "out" / "report.json")
    assert all(layer["unfinished_rows"] == layer["rows"] for layer in report["layers"])
    assert all(0.0 <= layer["lower_bound"] <= layer["objective"] for layer in report["layers"])
    assert "the time limit cut" in result.stdout
    run("prune", model, tmp_path / "whole", *arguments, "--include", "*.0.*.q_proj", "--time-limit", 3600)
    (layer,) = read(tmp_path / "whole" / "report.json")["layers"]
    assert layer["unfinished_rows"] == 0
    assert report["layers"][0]["lower_bound"] < layer["lower_bound"] <= layer["objective"]
    assert "--certify" in fails("prune", model, tmp_path / "no", *arguments[:6], "--time-limit", 5)
    assert "must be a positive" in fails("prune", model, tmp_path / "no", *arguments, "--time-limit", "nan")


@pytest.mark.parametrize("width", [80, 100])
def test_layers_are_told_apart_in_narrow_tables(run, model, text, tmp_path, width, monkeypatch):
    monkeypatch.setattr("maskopt.cli.output._FILE_WIDTH", width)
    out = tmp_path / "out"
    lines = run("prune", model, out, "--calibration", text, "-s", 0.6, "--samples", 2).stdout.splitlines()
    assert all(len(line) <= width for line in lines if line.startswith("  "))
    names = [line.split()[0] for line in lines if "_proj " in line and " x " in line]
    assert len(names) == len(set(names)) == 14


def test_progress_of_a_whole_run_never_falls_and_ends_at_one(model, text, monkeypatch):
    from maskopt.cli.output import Bar
    from maskopt.cli.prune_progress import PruneProgress

    told = []
    bar = Bar(quiet=True)
    monkeypatch.setattr(bar, "tell", lambda what, fraction, left: told.append((what, fraction, left)))
    network, tokenizer = load_model(model)
    batches = models.calibration_batches(tokenizer, text, 8, 32, 2)
    whole = PruneProgress(bar, network, models.select_layers(network), batches, certify=True, measurements=1)
    perplexity(network, tokenizer, text, progress=whole.perplexity("dense perplexity"))
    models.prune(network, batches, PerRow(0.5), Wanda(), certify="sdp", progress=whole.prune)
    fractions = [fraction for _, fraction, _ in told]
    assert fractions == sorted(fractions)
    assert 0.0 <= fractions[0] < 0.5
    assert fractions[-1] == pytest.approx(1.0)  # whatever the steps took
    assert all(left >= 0.0 for *_, left in told)
    assert {what.split()[0] for what, *_ in told} == {"dense", "calibrate", "solve", "certify", "all"}


def test_an_existing_folder_is_kept(fails, model, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_bytes(b"precious")
    assert "exists already" in fails("prune", model, out, "--calibration", text, "-s", 0.5)
    assert [path.name for path in out.iterdir()] == ["precious"]
