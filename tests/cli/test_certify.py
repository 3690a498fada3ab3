"""`maskopt certify`: figures against the library's, and refused arguments."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from maskopt import FrankWolfe, PerRow, Wanda, load_instance, solve, synthetic
from maskopt.solvers import Scip

Run = Callable[..., Any]


@functools.cache
def _optimum() -> list[float]:
    """The least error of each row of `layer`, by SCIP."""
    return solve(synthetic(rows=12, d=24).problem(), PerRow(0.5), Scip()).objective.tolist()


@pytest.fixture
def mask(run: Run, layer: Path, tmp_path: Path) -> Path:
    """A mask of the layer that keeps half of every row."""
    path = tmp_path / "mask.safetensors"
    run("solve", layer, "-s", 0.5, "--solver", "wanda", "--out", path)
    return path


@pytest.mark.parametrize("rows", [":", "3:7"])
def test_figures_agree_with_the_library(
    run: Run, layer: Path, mask: Path, read: Any, tmp_path: Path, rows: str
) -> None:
    out = tmp_path / "c.json"
    text = run("certify", layer, "--mask", mask, "-s", 0.5, "--rows", rows, "--json", out).stdout
    index = slice(0, 12) if rows == ":" else slice(3, 7)
    problem = load_instance(layer).problem().rows(index)
    errors = solve(load_instance(layer).problem(), PerRow(0.5), Wanda()).objective[index].tolist()
    whole = solve(load_instance(layer).problem(), PerRow(0.5), FrankWolfe("conjugate", polish=False)).lower_bound
    assert whole is not None
    bounds = whole[index].tolist()
    best = solve(problem.rows(slice(0, 1)), PerRow(0.5), Scip()).total
    figures = read(out)
    assert [row["row"] for row in figures["rows"]] == list(range(index.start, index.stop))
    assert [row["error"] for row in figures["rows"]] == pytest.approx(errors, rel=1e-12)
    assert [row["bound"] for row in figures["rows"]] == pytest.approx(bounds, rel=1e-9)
    assert 0.0 < figures["rows"][0]["bound"] <= best
    for row in (*figures["rows"], figures["layer"]):
        assert row["gap"] == row["error"] - row["bound"]
        assert row["proven_fraction"] == row["bound"] / row["error"]
    assert figures["layer"]["error"] == pytest.approx(sum(errors), rel=1e-12)
    assert figures["layer"]["bound"] == pytest.approx(sum(bounds), rel=1e-9)
    assert f"{figures['layer']['proven_fraction']:.4f}" in text
    assert figures["settings"]["bound"] == "gap"


def test_coupled_rows_have_one_bound(run: Run, layer: Path, read: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "mask.safetensors", tmp_path / "c.json"
    run("solve", layer, "-p", "blocks-4x4", "-s", 0.5, "--solver", "one-swap", "--out", path)
    run("certify", layer, "--mask", path, "-p", "blocks-4x4", "-s", 0.5, "--rows", "4:12", "--json", out)
    assert [(row["row"], row["rows"]) for row in read(out)["rows"]] == [(4, 4), (8, 4)]


def test_what_keeps_everything_is_proven(run: Run, layer: Path, read: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "mask.safetensors", tmp_path / "c.json"
    save_file({"mask": torch.ones((12, 24), dtype=torch.bool)}, path)
    run("certify", layer, "--mask", path, "-s", 0, "--json", out)
    assert read(out)["layer"]["proven_fraction"] == 1.0


@pytest.mark.parametrize("bound", ["shift", "sdp", "cuts"])
def test_a_time_limit_yields_what_is_proven_by_then(
    run: Run, layer: Path, mask: Path, read: Any, tmp_path: Path, bound: str
) -> None:
    found = {}
    for limit in (1e-9, 3600):
        out = tmp_path / f"{limit}.json"
        arguments = ("--mask", mask, "-s", 0.5, "--bound", bound, "--time-limit", limit, "--json", out)
        text = run("certify", layer, *arguments).stdout
        figures = read(out)
        found[limit] = [row["bound"] for row in figures["rows"]]
        assert {row["finished"] for row in figures["rows"]} == {limit == 3600}
        assert figures["layer"]["finished"] == (limit == 3600)
        assert ("time limit" in text) == (limit != 3600)
    for short, long, error in zip(found[1e-9], found[3600], _optimum(), strict=True):
        assert 0.0 <= short <= long <= error * (1 + 1e-12)
    assert sum(found[1e-9]) < sum(found[3600])


def test_bad_arguments_are_refused(fails: Callable[..., str], layer: Path, mask: Path, tmp_path: Path) -> None:
    def words(*arguments: object) -> str:
        return fails("certify", layer, *arguments)

    assert "does not belong to PerRow" in words("--mask", mask, "-s", 0.75)
    assert "does not belong to NM" in words("--mask", mask, "-p", "2:4")
    assert "choose one of gap" in words("--mask", mask, "-s", 0.5, "--bound", "guess")
    assert "must be a positive" in words("--mask", mask, "-s", 0.5, "--time-limit", "nan")
    assert "0:12" in words("--mask", mask, "-s", 0.5, "--rows", "12")
    assert "couples 12 rows" in words("--mask", mask, "-p", "unstructured", "-s", 0.5, "--rows", "0:4")
    assert "does not exist" in words("--mask", tmp_path / "none", "-s", 0.5)
    small = tmp_path / "small.safetensors"
    save_file({"mask": torch.ones((12, 8), dtype=torch.bool)}, small)
    assert "has shape (12, 8)" in words("--mask", small, "-s", 0.5)
