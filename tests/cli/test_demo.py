from __future__ import annotations

import json

import pytest

from maskopt.demo import run as demo


@pytest.fixture
def small(monkeypatch, model):
    """A demo of a few quick methods on a tiny model and little text."""
    monkeypatch.setattr(demo, "MODEL", model)
    monkeypatch.setattr(demo, "WEIGHTS", {"best": 1})
    monkeypatch.setattr(demo, "SOLVERS", {"wanda": 1, "magnitude": 1})
    monkeypatch.setattr(demo, "LEFT_OUT", {("2:4", "magnitude")})
    monkeypatch.setattr(demo, "_WINDOWS", 1)
    monkeypatch.setattr(demo, "_CALIBRATION_CHARACTERS", 20_000)
    monkeypatch.setattr(demo, "_EVALUATION_CHARACTERS", 4_000)


@pytest.mark.usefixtures("small")
def test_demo_is_deterministic_and_complete(run, tmp_path, read):
    result = run("demo", "--json", tmp_path / "first.json")
    first, second = read(tmp_path / "first.json"), json.loads(run("demo", "--json", "-").stdout)
    assert first["dense_perplexity"] == second["dense_perplexity"]
    for figures in (first, second):
        for row in figures["rows"]:
            row.pop("seconds")
    assert first["rows"] == second["rows"]
    assert [(row["masks"], row["solver"], row["weights"]) for row in first["rows"]] == [
        ("per-row 60 %", "best", "updated"),
        ("per-row 60 %", "wanda", "kept"),
        ("per-row 60 %", "magnitude", "kept"),
        ("2:4", "best", "updated"),
        ("2:4", "wanda", "kept"),
    ]
    assert [row["error_ratio"] for row in first["rows"] if row["solver"] == "wanda"] == [1.0, 1.0]
    assert first["settings"]["calibration"]["sha256"] != first["settings"]["evaluation"]["sha256"]
    assert "per-row 60 %" in result.stdout
    assert "best (prune's default)" in result.stdout
    assert f"{first['dense_perplexity']:.2f}" in result.stdout


@pytest.mark.usefixtures("small")
def test_progress_counts_up_to_the_end():
    seen = []
    demo.run_demo(lambda what, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)


def test_a_missing_model_is_named(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MODEL", tmp_path / "model")
    assert str(tmp_path / "model") in fails("demo")


@pytest.mark.usefixtures("small")
def test_the_default_method_is_run_as_prune_runs_it(run, tmp_path, read, model):
    """Same texts, same options: `maskopt prune` reaches the demo's first figure."""
    row = demo.run_demo().rows[0]
    training, held_out = tmp_path / "training.txt", tmp_path / "held-out.txt"
    training.write_text(demo.training_text(20_000))
    held_out.write_text(demo.held_out_text(4_000))
    texts = ("--calibration", training, "--evaluate", held_out)
    run("prune", model, tmp_path / "out", *texts, "-s", 0.6, "--samples", 16, "--seqlen", 32)
    figures = read(tmp_path / "out" / "report.json")["perplexity"]["evaluation"]["pruned"]
    assert (row.solver, row.masks) == ("best", "per-row 60 %")
    assert row.perplexity == pytest.approx(figures["perplexity"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not demo.MODEL.is_dir(), reason="this checkout has no trained demo model")
def test_better_solvers_reach_lower_perplexity_on_the_shipped_model(monkeypatch):
    monkeypatch.setattr(demo, "SETS", (("per-row", 0.6),))
    monkeypatch.setattr(demo, "WEIGHTS", {"best": 1, "alps": 1})
    monkeypatch.setattr(demo, "SOLVERS", {"magnitude": 1, "wanda": 1, "continuation": 1})
    monkeypatch.setattr(demo, "_WINDOWS", 4)
    monkeypatch.setattr(demo, "_EVALUATION_CHARACTERS", 10_000)
    result = demo.run_demo()
    perplexities = {row.solver: row.perplexity for row in result.rows}
    assert result.dense_perplexity < perplexities["best"] < perplexities["alps"] < perplexities["continuation"]
    assert perplexities["continuation"] < perplexities["wanda"] < perplexities["magnitude"]
