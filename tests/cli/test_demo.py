from __future__ import annotations

import json

import pytest

from maskopt.demo import run as demo


@pytest.fixture
def small(monkeypatch, model):
    """A demo of two quick solvers on a tiny model and little text."""
    monkeypatch.setattr(demo, "MODEL", model)
    monkeypatch.setattr(demo, "SOLVERS", {"magnitude": 1, "wanda": 1})
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
    assert [(row["masks"], row["solver"]) for row in first["rows"]] == [
        (masks, solver) for masks in ("per-row 60 %", "2:4") for solver in ("magnitude", "wanda")
    ]
    assert [row["error_ratio"] for row in first["rows"] if row["solver"] == "wanda"] == [1.0, 1.0]
    assert first["settings"]["calibration"]["sha256"] != first["settings"]["evaluation"]["sha256"]
    assert "per-row 60 %" in result.stdout
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


@pytest.mark.slow
@pytest.mark.skipif(not demo.MODEL.is_dir(), reason="this checkout has no trained demo model")
def test_better_solvers_reach_lower_perplexity_on_the_shipped_model(monkeypatch):
    monkeypatch.setattr(demo, "SETS", (("per-row", 0.6),))
    monkeypatch.setattr(demo, "SOLVERS", {"magnitude": 1, "wanda": 1, "continuation": 1})
    monkeypatch.setattr(demo, "_WINDOWS", 8)
    monkeypatch.setattr(demo, "_EVALUATION_CHARACTERS", 20_000)
    result = demo.run_demo()
    perplexities = {row.solver: row.perplexity for row in result.rows}
    assert result.dense_perplexity < perplexities["continuation"] < perplexities["wanda"] < perplexities["magnitude"]
