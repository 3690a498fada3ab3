"""`maskopt trace`: the figures in its outputs, the plot, and refused arguments."""

import csv
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskopt import PerRow, load_instance, save_instance, solve, synthetic
from maskopt.problems import Instance
from maskopt.solvers import COLUMNS, FrankWolfe, Wanda


def test_csv_json_and_result_agree(run: Callable[..., Any], read: Any, layer: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "trace.csv", tmp_path / "trace.json"
    run("trace", layer, "-s", 0.5, "--solvers", "dicg,one-swap,wanda", "--every", 1, "--csv", table, "--json", out)
    problem = load_instance(layer).problem()
    result = solve(problem, PerRow(0.5), FrankWolfe("dicg"), record=1)
    scale = float(problem.scale().sum())
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["solver", *COLUMNS]
    figures = read(out)["traces"]
    assert list(figures) == ["dicg", "one-swap", "wanda"]
    for spec, history in figures.items():
        mine = [line for line in lines if line["solver"] == spec]
        for name in COLUMNS:
            # JSON has null where the table has nan.
            written = [float(line[name]) for line in mine]
            assert [None if number != number else number for number in written] == history[name]
    for name in ("value", "gap", "bound", "rounded", "incumbent"):
        expected = [figure / scale for figure in result.history[name]]
        assert [None if number != number else number for number in expected] == figures["dicg"][name]
    assert figures["dicg"]["incumbent"][-1] == pytest.approx(result.relative_error, rel=1e-12)
    assert figures["one-swap"]["value"] == [None] * len(figures["one-swap"]["value"])
    assert len(figures["wanda"]["iteration"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_plots_are_written_in_every_format(
    run: Callable[..., Any], layer: Path, tmp_path: Path, kind: str, magic: bytes
) -> None:
    out = tmp_path / f"trace.{kind}"
    run("trace", layer, "-s", 0.5, "--solvers", "away,wanda", "--rows", ":3", "--out", out)
    assert out.read_bytes().startswith(magic)


def test_svg_shows_every_solver(run: Callable[..., Any], layer: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.svg"
    run("trace", layer, "-p", "2:4", "--solvers", "away,pairwise:step=short;iterations=9", "--out", out)
    text = out.read_text()
    ET.fromstring(text)
    # matplotlib writes the text of a path of glyphs as a comment.
    for label in ("away", "pairwise:step=short;iterations=9", "proven bound", "seconds", "iterations"):
        assert f"<!-- {label} -->" in text


def test_the_default_interval_of_records_doubles(
    run: Callable[..., Any], read: Any, layer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    run("trace", layer, "-s", 0.5, "--solvers", "vanilla:iterations=20", "--json", out, code=2)
    run("trace", layer, "-s", 0.5, "--solvers", "frank-wolfe:iterations=20;relative_gap=0;polish=no", "--json", out)
    (history,) = read(out)["traces"].values()
    assert history["iteration"][:6] == [0, 1, 2, 4, 8, 16]


@pytest.mark.parametrize(("rows", "index"), [("2:5", slice(2, 5)), (":3", slice(0, 3)), ("10:", slice(10, 12))])
def test_rows_mean_what_they_mean_in_other_commands(
    run: Callable[..., Any], read: Any, layer: Path, tmp_path: Path, rows: str, index: slice
) -> None:
    out = tmp_path / "trace.json"
    run("trace", layer, "-s", 0.5, "--solvers", "wanda", "--rows", rows, "--json", out)
    problem = load_instance(layer).problem().rows(index)
    figures = read(out)
    assert figures["traces"]["wanda"]["incumbent"] == [
        pytest.approx(solve(problem, PerRow(0.5), Wanda()).relative_error)
    ]
    assert figures["settings"]["rows"] == f"{index.start}:{index.stop}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "trace.jpg"], "A figure is a .png, .svg or .pdf file; got trace.jpg."),
        (["--rows", "8:13"], "which are 0:12"),
        (["--solvers", "nothing"], "There is no solver 'nothing'"),
        (["--solvers", "dicg:step=long"], "The setting step of dicg takes "),
        (["--solvers", "stochastic:step=exact"], "choose an open-loop step"),
    ],
)
def test_bad_arguments_are_refused(fails: Callable[..., str], layer: Path, arguments: list[str], sentence: str) -> None:
    assert sentence in fails("trace", layer, "-s", 0.5, *arguments)


def test_zero_layers_are_refused(fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "zero.safetensors"
    save_instance(path, Instance(synthetic().weight * 0, synthetic().gram))
    assert "has no output to lose" in fails("trace", path, "-s", 0.5)


def test_outputs_are_not_overwritten(fails: Callable[..., str], layer: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.csv"
    out.write_text("mine")
    assert "exists" in fails("trace", layer, "-s", 0.5, "--csv", out)
    assert out.read_text() == "mine"
