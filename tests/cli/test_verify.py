"""`maskopt verify`: its verdicts against brute force, and refused arguments."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maskopt import LayerReconstruction, Unstructured, load_instance, solve
from maskopt.cli.part import parse_rows
from maskopt.cli.solvers import parse_solver
from maskopt.errors import MaskoptError
from maskopt.oracles import parse_masks
from maskopt.problems import Instance, save_instance
from maskopt.solvers import BruteForce, Wanda

Run = Callable[..., Any]


def cut(path: Path, rows: slice, columns: int) -> LayerReconstruction:
    whole = load_instance(path).problem()
    return LayerReconstruction(whole.weight[rows, :columns], whole.gram[:columns, :columns])


@pytest.mark.parametrize("solver", ["wanda", "continuation"])
@pytest.mark.parametrize("exact", ["scip", "brute-force"])
def test_verdicts_agree_with_brute_force(
    run: Run, layer: Path, read: Any, tmp_path: Path, solver: str, exact: str
) -> None:
    out = tmp_path / "v.json"
    arguments = ("--rows", "2:6", "--columns", 10, "-s", 0.5, "--solver", solver, "--exact", exact)
    text = run("verify", layer, *arguments, "--json", out).stdout
    problem, masks = cut(layer, slice(2, 6), 10), parse_masks("per-row", 0.5)
    best = solve(problem, masks, BruteForce()).objective / problem.scale()
    error = solve(problem, masks, parse_solver(solver)).objective / problem.scale()
    figures = read(out)
    for number, row in enumerate(figures["rows"]):
        assert row["row"] == number + 2
        assert row["heuristic"] == pytest.approx(float(error[number]), rel=1e-12)
        assert row["best"] == pytest.approx(float(best[number]), rel=1e-9)
        assert row["bound"] <= float(best[number])
        assert row["bound"] == pytest.approx(float(best[number]), rel=1e-4)
        assert 0.0 <= row["gap"] < 1e-4
        excess = float(error[number] / best[number]) - 1.0
        assert row["excess"] == pytest.approx(excess if excess > 1e-9 else 0.0, rel=1e-6)
        expected = f"not optimal by {100 * excess:.3g} %" if excess > 1e-9 else "proven optimal"
        assert row["verdict"] == expected
        assert expected in text
    verdicts = [row["verdict"] for row in figures["rows"]]
    assert len(verdicts) == 4
    assert {verdict.split()[0] for verdict in verdicts} == {"proven", "not"}
    assert figures["summary"]["proven_optimal"] == verdicts.count("proven optimal")
    assert figures["summary"]["not_optimal"] == 4 - verdicts.count("proven optimal")
    assert figures["settings"]["columns"] == 10
    assert figures["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_rows_in_processes_are_the_same(run: Run, layer: Path, read: Any, tmp_path: Path) -> None:
    figures = []
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.json"
        arguments = ("--rows", ":3", "--columns", 12, "-p", "2:4", "--exact", "brute-force", "--jobs", jobs)
        run("verify", layer, *arguments, "--json", out)
        figures.append([{**row, "seconds": 0.0} for row in read(out)["rows"]])
    assert figures[0] == figures[1]


def test_rows_that_the_set_couples_are_one(run: Run, layer: Path) -> None:
    arguments = ("--rows", "1:4", "--columns", 5, "-p", "unstructured", "-s", 0.4, "--exact", "scip", "--json", "-")
    (row,) = json.loads(run("verify", layer, *arguments).stdout)["rows"]
    problem = cut(layer, slice(1, 4), 5)
    best = solve(problem, Unstructured(0.6), BruteForce()).total / float(problem.scale().sum())
    assert (row["row"], row["rows"]) == (1, 3)
    assert row["best"] == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("pattern", "exact"), [("per-row", "BranchAndBound"), ("transposable-2:4", "Scip")])
def test_the_exact_solver_is_branch_and_bound_where_the_set_allows_it(
    run: Run, layer: Path, pattern: str, exact: str
) -> None:
    arguments = ("--rows", "0:4", "--columns", 8, "-p", pattern, *(("-s", 0.5) if pattern == "per-row" else ()))
    figures = json.loads(run("verify", layer, *arguments, "--json", "-").stdout)
    assert figures["settings"]["exact"].startswith(exact)
    assert {row["verdict"].split()[0] for row in figures["rows"]} <= {"proven", "not"}


@pytest.mark.parametrize(("iterations", "word"), [(1, "unknown"), (500, "within")])
def test_without_a_proof_none_is_claimed(run: Run, layer: Path, iterations: int, word: str) -> None:
    """A weak reference solver: its bound is loose, and its own mask is worse."""
    settings = ("--exact", "sparsefw", "-o", f"iterations={iterations}")
    arguments: tuple[object, ...] = ("--rows", "0:4", "-s", 0.5, *settings, "--json", "-")
    for row in json.loads(run("verify", layer, *arguments).stdout)["rows"]:
        within = 100 * (row["heuristic"] / row["bound"] - 1) if row["bound"] else math.inf
        assert row["verdict"] == (f"within {within:.3g} %" if row["bound"] else "unknown")
        assert row["gap"] == pytest.approx(1 - row["bound"] / row["best"], rel=1e-12)
        assert row["verdict"].split()[0] == word


@pytest.mark.parametrize("exact", ["wanda", "magnitude", "ria", "one-swap", "continuation"])
def test_what_proves_nothing_cannot_be_exact(fails: Callable[..., str], layer: Path, exact: str) -> None:
    assert f"needs a solver that proves bounds, such as branch-and-bound, scip or brute-force; got {exact}" in fails(
        "verify", layer, "-s", 0.5, "--exact", exact
    )


def test_zero_rows_are_proven_optimal(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "zero.safetensors"
    save_instance(path, Instance(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.eye(2)))
    rows = json.loads(run("verify", path, "--rows", ":", "-s", 0.5, "--json", "-").stdout)["rows"]
    assert [row["verdict"] for row in rows] == ["proven optimal"] * 2
    assert (rows[0]["best"], rows[0]["scale"]) == (0.0, 0.0)


@pytest.mark.parametrize("rows", [1, 5, 8, 9])
def test_the_first_eight_rows_are_verified_or_all(run: Run, tmp_path: Path, rows: int) -> None:
    path = tmp_path / "layer.safetensors"
    save_instance(path, Instance(torch.arange(1.0, 1.0 + 2 * rows).view(rows, 2), torch.eye(2)))
    found = json.loads(run("verify", path, "-s", 0.5, "--json", "-").stdout)["rows"]
    assert [row["row"] for row in found] == list(range(min(8, rows)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rows", "8:13", "-s", 0.5), "0:12"),
        (("--rows", "3:3", "-s", 0.5), "0:12"),
        (("--rows", "a:b", "-s", 0.5), "form A:B"),
        (("--columns", 25, "-s", 0.5), "24 columns"),
        (("--columns", 10, "-p", "2:4"), "divisible by 4"),
        (("-s", 0.5, "--exact", "oracle"), "no solver 'oracle'"),
        (("-s", 0.5, "-o", "presolve=3"), "branch-and-bound has no setting 'presolve'"),
        *((("-s", 0.5, "--time-limit", limit), "must be a positive") for limit in (0, -1, "nan")),
        (("-s", 0.5, "--exact", "brute-force", "-o", "limit=10"), "at most 10 masks"),
        ((), "needs a sparsity"),
    ],
)
def test_bad_arguments_are_refused(fails: Callable[..., str], layer: Path, arguments: Any, words: str) -> None:
    assert words in fails("verify", layer, *arguments)


def test_outputs_are_refused_before_any_work(fails: Callable[..., str], layer: Path, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    assert "exists already" in fails("verify", layer, "-s", 0.5, "--json", tmp_path / "there.json")


def test_interrupts_leave_nothing(fails: Callable[..., str], layer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Wanda, "run", interrupted)
    out = tmp_path / "v.json"
    assert "Interrupted" in fails("verify", layer, "-s", 0.5, "--solver", "wanda", "--json", out, code=130)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "rows"), [("2:6", (2, 6)), (":6", (0, 6)), ("2:", (2, 9)), (":", (0, 9)), ("8", (8, 9)), (" 0 ", (0, 1))]
)
def test_row_ranges_are_parsed(text: str, rows: tuple[int, int]) -> None:
    assert parse_rows(text, 9) == slice(*rows)


@pytest.mark.parametrize("text", ["", "9", "4:2", "0:10", "-1", "-1:", "1:2:3", "1.5", "x"])
def test_bad_row_ranges_are_refused(text: str) -> None:
    with pytest.raises(MaskoptError):
        parse_rows(text, 9)
