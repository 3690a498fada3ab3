from __future__ import annotations

import re
from statistics import median

import pytest

from maskopt import ContinuationFrankWolfe, OneSwap, SparseFW, Wanda, load_instance, save_instance, solve, synthetic
from maskopt.oracles import parse_masks
from maskopt.weights import ALPS, ConditionalADMM, LeastSquares

SOLVERS = {
    "wanda": Wanda(),
    "sparsefw:iterations=30;alpha=0.5": SparseFW(iterations=30, alpha=0.5),
    "one-swap": OneSwap(),
    "continuation:iterations=30": ContinuationFrankWolfe(iterations=30),
}


@pytest.fixture
def layers(tmp_path):
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for seed, path in enumerate(paths):
        save_instance(path, synthetic(rows=8, d=16, seed=seed))
    return paths


def test_ratios_are_those_of_separate_solves(run, layers, tmp_path, read):
    sets = ("--pattern", "per-row", "--pattern", "2:4", "--sparsity", 0.5, "--sparsity", 0.75)
    result = run("compare", *layers, *sets, "--solvers", ",".join(SOLVERS), "--json", tmp_path / "f.json")
    figures = read(tmp_path / "f.json")
    cells = [(row["instance"], row["pattern"], row["sparsity"]) for row in figures["rows"]]
    assert cells == [
        (str(path), *one) for path in layers for one in (("per-row", 0.5), ("per-row", 0.75), ("2:4", None))
    ]
    for row in figures["rows"]:
        problem = load_instance(row["instance"]).problem()
        errors = {
            spec: solve(problem, parse_masks(row["pattern"], row["sparsity"]), solver).relative_error
            for spec, solver in SOLVERS.items()
        }
        assert list(row["results"]) == list(SOLVERS)
        for spec, cell in row["results"].items():
            assert cell["relative_error"] == errors[spec]
            assert cell["error_ratio"] == pytest.approx(errors[spec] / errors["wanda"])
            assert f"{cell['error_ratio']:.3f}" in result.stdout
    for spec in SOLVERS:
        ratios = [row["results"][spec]["error_ratio"] for row in figures["rows"]]
        summary = figures["summary"][spec]["wanda"]
        assert summary["median_error_ratio"] == pytest.approx(median(ratios))
        assert summary["largest_error_ratio"] == pytest.approx(max(ratios))
        seconds = [row["results"][spec]["seconds"] / row["results"]["wanda"]["seconds"] for row in figures["rows"]]
        assert summary["median_seconds_ratio"] == pytest.approx(median(seconds))
    assert figures["settings"]["solvers"]["one-swap"] == repr(OneSwap())
    assert figures["versions"]["threads"] >= 1


def test_weights_are_kept_refitted_and_chosen_together(run, layers, tmp_path, read):
    methods = {
        "wanda": Wanda(),
        "one-swap": OneSwap(),
        "wanda + lsq": LeastSquares(solver=Wanda()),
        "one-swap + lsq": LeastSquares(solver=OneSwap()),
        "alps:iterations=9;polish=1": ALPS(iterations=9, polish=1),
        "wanda + lsq:method=cg;steps=2": LeastSquares(solver=Wanda(), method="cg", steps=2),
        "best": ConditionalADMM(),
    }
    weights = "keep, lsq,alps:iterations=9;polish=1,lsq:method=cg;steps=2,best"
    command = ("compare", *layers, "-s", 0.5, "--solvers", "wanda,one-swap", "--weights", weights)
    result = run(*command, "--json", tmp_path / "f.json")
    figures = read(tmp_path / "f.json")
    expected = [*list(methods)[:5], *(f"{name} + lsq:method=cg;steps=2" for name in ("wanda", "one-swap")), "best"]
    assert list(figures["summary"]) == list(figures["settings"]["solvers"]) == expected
    assert figures["settings"]["weights"] == weights
    assert "wanda + lsq" in result.stdout
    for row in figures["rows"]:
        problem = load_instance(row["instance"]).problem()
        assert list(row["results"]) == expected
        for name, method in methods.items():
            cell, alone = row["results"][name], solve(problem, parse_masks("per-row", 0.5), method)
            assert cell["solver"] == repr(method)
            assert (cell["relative_error"], cell["kept_error"]) == (alone.relative_error, alone.kept_error)
            assert f"{cell['error_ratio']:.3f}" in result.stdout
            both = f"{cell['kept_error']:.4f} > {cell['relative_error']:.4f}"
            assert (both in result.stdout) == (name not in ("wanda", "one-swap"))
        cells = row["results"]
        assert cells["wanda + lsq"]["kept_error"] == cells["wanda"]["relative_error"] == cells["wanda"]["kept_error"]
        assert cells["best"]["relative_error"] < cells["wanda + lsq"]["relative_error"] < 1.0


def test_joint_methods_alone_leave_the_solvers_out(run, layers, tmp_path, read):
    run("compare", layers[0], "-s", 0.5, "--weights", "best,admm", "--json", tmp_path / "f.json")
    assert list(read(tmp_path / "f.json")["rows"][0]["results"]) == ["best", "admm"]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("keep,keep", "The method for weights keep is listed twice"),
        (",", "At least one method for weights is needed; choose from keep, lsq"),
        ("keep,obs", "There is no method 'obs' for weights; choose one of keep, lsq"),
        ("keep:steps=1", "Weights that are kept have no setting 'steps=1'"),
        ("best:steps=1", "The method best has no setting 'steps'"),
        ("lsq:steps=-1", "LeastSquares needs steps >= 0"),
        ("lsq:solver=ria", "The method lsq has no setting 'solver'"),
    ],
)
def test_bad_weights_are_refused(fails, layers, weights, words, monkeypatch):
    monkeypatch.setattr("maskopt.solvers.solve", lambda *args, **kwargs: pytest.fail("work has begun"))
    assert words in fails("compare", layers[0], "-s", 0.5, "--solvers", "wanda", "--weights", weights)


def test_repeat_takes_the_median_time(run, layers, tmp_path, read):
    run("compare", layers[0], "-s", 0.5, "--solvers", "wanda,ria", "--repeat", 3, "--json", tmp_path / "f.json")
    for cell in read(tmp_path / "f.json")["rows"][0]["results"].values():
        assert len(cell["all_seconds"]) == 3
        assert cell["seconds"] == median(cell["all_seconds"])


def test_one_solver_needs_no_summary(run, layers):
    assert "relative to the solver on top" not in run("compare", layers[0], "-s", 0.5, "--solvers", "wanda").stdout


def test_layers_of_one_name_are_told_apart(run, layers, tmp_path):
    (tmp_path / "other").mkdir()
    dense_copy = tmp_path / "other" / "first.safetensors"
    dense_copy.write_bytes(layers[0].read_bytes())
    table = run("compare", layers[0], dense_copy, "-s", 0.5, "--solvers", "wanda").stdout
    assert re.search(rf"{re.escape(str(dense_copy))}\s", table)


def test_zero_errors_give_ratios(run, layers, tmp_path, read):
    run("compare", layers[0], "-s", 0, "--solvers", "wanda,one-swap", "--json", tmp_path / "f.json")
    results = read(tmp_path / "f.json")["rows"][0]["results"]
    assert results["one-swap"]["error_ratio"] == 1.0


def test_a_bad_layer_is_named_before_any_work(fails, layers, tmp_path, monkeypatch):
    monkeypatch.setattr("maskopt.solvers.solve", lambda *args, **kwargs: pytest.fail("work has begun"))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nonsense")
    assert str(bad) in fails("compare", layers[0], bad, "-s", 0.5)
    sentence = fails("compare", *layers, "-p", "2:4", "-p", "1:3", "-s", 0.5)
    assert str(layers[0]) in sentence
    assert "divisible by 3" in sentence


@pytest.mark.parametrize(
    ("solvers", "words"),
    [
        ("wanda,wanda", "listed twice"),
        (",", "At least one solver"),
        ("wanda,sparsegpt", "no solver 'sparsegpt'"),
        ("wanda,sparsefw:steps=3", "no setting 'steps'"),
        ("sparsefw:iterations", "key=value"),
    ],
)
def test_bad_solver_lists_are_refused(fails, layers, solvers, words):
    assert words in fails("compare", layers[0], "-s", 0.5, "--solvers", solvers)
