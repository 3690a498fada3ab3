from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import maskopt


def test_json_holds_every_figure_and_the_mask_reproduces_it(run, layer, tmp_path, read):
    out, figures_file = tmp_path / "mask.safetensors", tmp_path / "figures.json"
    result = run("solve", layer, "--sparsity", 0.5, "--out", out, "--json", figures_file)
    figures = read(figures_file)
    assert set(figures) >= {
        "relative_error",
        "objective",
        "sparsity",
        "seconds",
        "iterations",
        "status",
        "gap_kind",
        "lower_bound",
        "settings",
        "versions",
    }
    assert figures["lower_bound"] is None
    assert figures["gap_kind"] == "NONE"
    assert figures["status"] == "LOCAL_OPTIMUM"
    assert figures["sparsity"] == 0.5
    assert figures["settings"]["solver"].startswith("ContinuationFrankWolfe(")
    assert figures["versions"]["torch"] == torch.__version__
    with safe_open(out, framework="pt") as file:
        mask = file.get_tensor("mask")
        assert json.loads(file.metadata()["maskopt"]) == figures
    assert mask.dtype == torch.bool
    problem = maskopt.load_instance(layer).problem()
    assert float(problem.objective(mask).sum()) == figures["objective"]
    assert f"{figures['relative_error']:.6g}" in result.stdout


def test_json_on_standard_output_is_alone_there(run, layer):
    result = run("solve", layer, "--pattern", "2:4", "--solver", "sparsefw", "--option", "iterations=20", "--json", "-")
    figures = json.loads(result.stdout)
    assert figures["gap_kind"] == "PROVEN"
    assert 0 <= figures["lower_bound"] <= figures["objective"]
    assert "relative error" in result.stderr


@pytest.mark.parametrize("pattern", ["per-row", "unstructured", "2:4", "1:8"])
def test_patterns(run, layer, pattern, tmp_path, read):
    sparsity = () if ":" in pattern else ("--sparsity", 0.75)
    run("solve", layer, "--pattern", pattern, *sparsity, "--solver", "wanda", "--json", tmp_path / "f.json")
    assert read(tmp_path / "f.json")["sparsity"] == {"2:4": 0.5, "1:8": 0.875}.get(pattern, 0.75)


def test_start_is_a_mask_written_before(run, layer, tmp_path, read, fails):
    first, again = tmp_path / "first.safetensors", tmp_path / "again.json"
    run("solve", layer, "--sparsity", 0.5, "--solver", "one-swap", "--out", first)
    run("solve", layer, "--sparsity", 0.5, "--solver", "one-swap", "--start", first, "--json", again)
    assert read(again)["iterations"] == 0  # a 1-swap optimum has no improving swap
    assert "does not start from a mask" in fails(
        "solve", layer, "--sparsity", 0.5, "--solver", "wanda", "--start", first
    )
    assert "not in the set" in fails("solve", layer, "--sparsity", 0.75, "--start", first)


def test_start_of_zeros_and_ones_is_read_and_others_are_refused(run, layer, tmp_path, fails):
    mask = torch.tensor([1, 0], dtype=torch.uint8).repeat(12, 12)
    good, wrong, foreign = (tmp_path / f"{name}.safetensors" for name in ("good", "wrong", "foreign"))
    save_file({"mask": mask}, good)
    save_file({"mask": 2 * mask}, wrong)
    save_file({"weight": mask}, foreign)
    run("solve", layer, "--sparsity", 0.5, "--solver", "one-swap", "--start", good)
    assert "zeros and ones" in fails("solve", layer, "--sparsity", 0.5, "--start", wrong)
    assert "no tensor named `mask`" in fails("solve", layer, "--sparsity", 0.5, "--start", foreign)
    assert "does not exist" in fails("solve", layer, "--sparsity", 0.5, "--start", tmp_path / "missing")


def test_options_reach_the_solver(run, layer, tmp_path, read):
    options = ("--option", "iterations=7", "-o", "start=ria", "-o", "alpha=0.25")
    run("solve", layer, "--sparsity", 0.5, "--solver", "sparsefw", *options, "--json", tmp_path / "f.json")
    figures = read(tmp_path / "f.json")
    assert figures["iterations"] == 7
    assert figures["solver"] == "SparseFW(iterations=7, alpha=0.25, start=RIA(power=0.5))"


def test_time_limit(run, layer, tmp_path, read):
    arguments = ("--solver", "sparsefw", "-o", "iterations=1000000", "--time-limit", 0.05)
    run("solve", layer, "--sparsity", 0.5, *arguments, "--json", tmp_path / "f.json")
    assert read(tmp_path / "f.json")["status"] == "TIME_LIMIT"
