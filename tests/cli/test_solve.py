from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import maskopt
from maskopt.solvers import ContinuationFrankWolfe, SparseFW, Wanda
from maskopt.weights import ADMM, ALPS, WEIGHTS, ConditionalADMM, LeastSquares, SparseGPT, make_weights


def test_json_holds_every_figure_and_the_mask_reproduces_it(run, layer, tmp_path, read):
    out, figures_file = tmp_path / "mask.safetensors", tmp_path / "figures.json"
    result = run("solve", layer, "--sparsity", 0.5, "--out", out, "--json", figures_file)
    figures = read(figures_file)
    assert set(figures) >= {
        "relative_error",
        "kept_error",
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
def test_patterns_give_their_sparsity(run, layer, pattern, tmp_path, read):
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


def test_a_time_limit_ends_the_solver(run, layer, tmp_path, read):
    arguments = ("--solver", "sparsefw", "-o", "iterations=1000000", "--time-limit", 0.05)
    run("solve", layer, "--sparsity", 0.5, *arguments, "--json", tmp_path / "f.json")
    assert read(tmp_path / "f.json")["status"] == "TIME_LIMIT"


@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_updated_weights_are_written_and_reproduce_the_error(run, layer, tmp_path, read, weights):
    out, figures_file = tmp_path / "out.safetensors", tmp_path / "f.json"
    result = run("solve", layer, "-s", 0.5, "--weights", weights, "--out", out, "--json", figures_file)
    figures = read(figures_file)
    problem = maskopt.load_instance(layer).problem()
    with safe_open(out, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        assert json.loads(file.metadata()["maskopt"]) == figures
    mask = tensors["mask"]
    scale = float(problem.scale().sum())
    assert figures["settings"]["weights"] == weights
    assert figures["settings"]["solver"] == figures["solver"] == repr(make_weights(weights))
    assert figures["sparsity"] == 0.5
    assert figures["kept_error"] == float(problem.objective(mask).sum()) / scale
    if weights == "keep":
        assert set(tensors) == {"mask"}
        assert figures["relative_error"] == figures["kept_error"]
        assert "with the weights as they were" not in result.stdout
        return
    assert set(tensors) == {"mask", "weight"}
    assert tensors["weight"].dtype == problem.dtype
    assert not tensors["weight"][~mask].any()
    assert figures["objective"] == float(problem.error(tensors["weight"]).sum())
    assert figures["relative_error"] == figures["objective"] / scale < figures["kept_error"]
    line = f"{figures['relative_error']:.6g} ({figures['kept_error']:.6g} with the weights as they were)"
    assert line in " ".join(result.stdout.split())
    # The mask written can be used as a start.
    run("solve", layer, "-s", 0.5, "--solver", "one-swap", "--start", out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--weights", "lsq"), LeastSquares()),
        (("--weights", "lsq", "--solver", "wanda"), LeastSquares(solver=Wanda())),
        (
            ("--weights", "lsq:method=cg;steps=5", "--solver", "sparsefw:iterations=9", "-o", "alpha=0.5"),
            LeastSquares(solver=SparseFW(iterations=9, alpha=0.5), method="cg", steps=5),
        ),
        (("--weights", "lsq:ridge=0", "-o", "iterations=4"), LeastSquares(0.0, ContinuationFrankWolfe(iterations=4))),
        (("--weights", "keep", "-o", "iterations=4"), ContinuationFrankWolfe(iterations=4)),
        (("--weights", "alps:iterations=5"), ALPS(iterations=5)),
        (("--weights", "alps:iterations=5;polish=2", "-o", "iterations=6"), ALPS(iterations=6, polish=2)),
        (("--weights", "admm:gradual=no", "-o", "penalty=2"), ADMM(penalty=2.0, gradual=False)),
        (("--weights", "sparsegpt", "-o", "block=4"), SparseGPT(block=4)),
        (("--weights", "best:penalty=0.5/2;stages=2"), ConditionalADMM(penalty=(0.5, 2.0), stages=2)),
    ],
)
def test_settings_go_where_the_help_says(run, layer, tmp_path, read, arguments, expected):
    run("solve", layer, "-s", 0.5, *arguments, "--json", tmp_path / "f.json")
    assert read(tmp_path / "f.json")["solver"] == repr(expected)


def test_least_squares_starts_where_its_solver_does(run, layer, tmp_path, read, fails):
    start = tmp_path / "start.safetensors"
    run("solve", layer, "-s", 0.5, "--solver", "magnitude", "--out", start)
    command = ("solve", layer, "-s", 0.5, "--weights", "lsq", "--start", start)
    run(*command, "--solver", "one-swap", "-o", "max_steps=0", "--json", tmp_path / "f.json")
    run("solve", layer, "-s", 0.5, "--solver", "magnitude", "--json", tmp_path / "m.json")
    assert read(tmp_path / "f.json")["kept_error"] == read(tmp_path / "m.json")["relative_error"]
    assert "does not start from a mask" in fails(*command, "--solver", "wanda")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "obs"), "There is no method 'obs' for weights; choose one of keep, lsq, sparsegpt, admm, alps"),
        (("--weights", "obs", "--solver", "wanda"), "There is no method 'obs'"),
        (("--weights", "obs:x=1", "-o", "x=1"), "There is no method 'obs'"),
        (("--weights", ""), "There is no method ''"),
        (("--weights", "best", "--solver", "wanda"), "The method best chooses the mask itself; leave the solver out"),
        (("--weights", "alps:iterations=5", "--solver", "wanda"), "The method alps chooses the mask itself"),
        (("--weights", "lsq", "--solver", "alps"), "no solver 'alps'"),
        (("--weights", "lsq:solver=wanda"), "The method lsq has no setting 'solver'; it has ridge, method, steps"),
        (("--weights", "lsq:method=qr"), "The setting method of lsq takes auto or cholesky or cg; got 'qr'"),
        (("--weights", "lsq", "--solver", "wanda", "-o", "steps=3"), "The solver wanda has no setting 'steps'"),
        (("--weights", "keep:steps=3"), "Weights that are kept have no setting 'steps=3'"),
        (("--weights", "best:steps=3"), "The method best has no setting 'steps'; it has ridge, penalty"),
        (("--weights", "best", "-o", "steps=3"), "The method best has no setting 'steps'"),
        (("--weights", "best:penalty=1"), "The setting penalty of best takes 2 numbers with / between them; got '1'"),
        (("--weights", "best:penalty=1/x"), "The setting penalty of best takes a number; got '1/x'"),
        (("--weights", "best:penalty=2/1"), "ConditionalADMM needs 0 < penalty[0] <= penalty[1]"),
        (("--weights", "alps:growth=1/1"), "The setting growth of alps takes 3 numbers with / between them"),
        (("--weights", "alps:iterations"), "A setting has the form key=value; got 'iterations'"),
        (("--weights", "alps:iterations=many"), "takes a whole number; got 'many'"),
        (("--weights", "admm:ridge=-1"), "ADMM needs a finite ridge >= 0; got -1.0"),
        (
            ("--weights", "sparsegpt", "-p", "columns"),
            "with SparseGPT: it must be a PartitionMatroid",
        ),
    ],
)
def test_bad_weights_are_refused_in_one_sentence(fails, layer, tmp_path, arguments, words):
    assert words in fails("solve", layer, "-s", 0.5, *arguments, "--out", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [layer]
