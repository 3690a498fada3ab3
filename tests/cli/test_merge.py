"""`maskopt merge`: what one command gives, from the parts of several; and parts that do not belong together."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from maskopt import LayerReconstruction, PerRow, load_instance, save_instance, solve, synthetic
from maskopt.problems import Instance
from tests.helpers import without_seconds

Run = Callable[..., Any]
Fails = Callable[..., str]

BRUTE = ("--exact", "brute-force", "--columns", 8)


def without_times(text: str) -> str:
    """Remove the seconds at the ends of lines."""
    return re.sub(r"\d+\.\d+( s)? *$", "", text, flags=re.MULTILINE)


@pytest.fixture
def mask(run: Run, layer: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mask.safetensors"
    run("solve", layer, "-s", 0.5, "--solver", "wanda", "--out", path)
    return path


@pytest.fixture
def part(run: Run, layer: Path, tmp_path: Path) -> Callable[..., Path]:
    """Verify some rows, and return the JSON file."""

    def make(rows: str, *arguments: object, name: str = "part", of: Path = layer) -> Path:
        out = tmp_path / f"{name}-{rows.replace(':', '-')}.json"
        chosen = arguments or ("-s", 0.5, *BRUTE)
        run("verify", of, "--rows", rows, *chosen, "--json", out)
        return out

    return make


def change(path: Path, edit: Callable[[Any], object]) -> Path:
    """Write the JSON after an edit to another file."""
    figures = json.loads(path.read_text())
    edit(figures)
    out = path.with_name(f"changed-{path.name}")
    out.write_text(json.dumps(figures))
    return out


@pytest.mark.parametrize("pattern", [("-s", 0.5), ("-p", "2:4"), ("-p", "blocks-2x2", "-s", 0.5)])
@pytest.mark.parametrize("edges", [[0, 2, 12], [0, 4, 6, 8, 10, 12]])
def test_parts_of_verify_give_what_one_command_gives(
    run: Run, layer: Path, read: Any, tmp_path: Path, part: Any, pattern: Any, edges: list[int]
) -> None:
    arguments = (*pattern, *BRUTE, "--solver", "magnitude")
    out, merged = tmp_path / "one.json", tmp_path / "merged.json"
    shown = run("verify", layer, "--rows", ":", *arguments, "--json", out).stdout
    parts = [part(f"{a}:{b}", *arguments) for a, b in pairwise(edges)]
    random.Random(0).shuffle(parts)
    text = run("merge", *parts, "--json", merged).stdout
    assert without_seconds(read(merged)) == without_seconds(read(out))
    assert list(read(merged)) == list(read(out))
    assert without_times(text) == without_times(shown)
    seconds = [row["seconds"] for path in parts for row in read(path)["rows"]]
    assert read(merged)["summary"]["seconds"] == pytest.approx(sum(seconds))


@pytest.mark.parametrize(("kind", "edges"), [("gap", [0, 3, 70, 130]), ("sdp", [0, 64, 130])])
def test_parts_of_certify_give_what_one_command_gives(
    run: Run, read: Any, tmp_path: Path, kind: str, edges: list[int]
) -> None:
    """Bit for bit; more rows than the table lists."""
    layer, mask, out, merged = (tmp_path / name for name in ("layer", "mask", "one.json", "merged.json"))
    save_instance(layer, synthetic(rows=130, d=16))
    run("solve", layer, "-s", 0.5, "--solver", "wanda", "--out", mask)
    arguments = ("certify", layer, "--mask", mask, "-s", 0.5, "--bound", kind)
    shown = run(*arguments, "--json", out).stdout
    parts = []
    for a, b in pairwise(edges):
        parts.append(tmp_path / f"{a}.json")
        run(*arguments, "--rows", f"{a}:{b}", "--json", parts[-1])
    text = run("merge", *reversed(parts), "--json", merged).stdout
    assert without_seconds(read(merged)) == without_seconds(read(out))
    assert without_times(text) == without_times(shown)
    assert read(merged)["seconds"] == pytest.approx(sum(read(path)["seconds"] for path in parts))


@pytest.mark.parametrize("kind", ["shift", "cuts"])
def test_parts_at_any_rows_prove_the_same_up_to_rounding(
    run: Run, layer: Path, mask: Path, read: Any, tmp_path: Path, kind: str
) -> None:
    arguments = ("certify", layer, "--mask", mask, "-s", 0.5, "--bound", kind)
    run(*arguments, "--json", tmp_path / "one.json")
    for number, rows in enumerate((":5", "5:7", "7:")):
        run(*arguments, "--rows", rows, "--json", tmp_path / f"part{number}")
    run("merge", *tmp_path.glob("part?"), "--json", tmp_path / "merged.json")
    one, merged = read(tmp_path / "one.json"), read(tmp_path / "merged.json")
    assert [row["row"] for row in merged["rows"]] == list(range(12))
    for a, b in zip([*one["rows"], one["layer"]], [*merged["rows"], merged["layer"]], strict=True):
        assert a["error"] == pytest.approx(b["error"], rel=1e-12)
        assert a["bound"] == pytest.approx(b["bound"], rel=1e-9)


def test_a_part_says_what_it_is(read: Any, layer: Path, part: Any) -> None:
    figures = read(part("2:4"))
    copy = layer.with_name("copy.safetensors")
    copy.write_bytes(layer.read_bytes())
    settings = figures["settings"]
    assert (figures["command"], settings["rows"], settings["layer_rows"], settings["sparsity"]) == (
        "verify",
        "2:4",
        12,
        0.5,
    )
    assert settings["instance_sha256"] == read(part("4:6", of=copy))["settings"]["instance_sha256"]
    save_instance(layer.with_name("other.safetensors"), synthetic(rows=12, d=24, seed=1))
    other = read(part("6:8", of=layer.with_name("other.safetensors")))
    assert settings["instance_sha256"] != other["settings"]["instance_sha256"]


def test_some_rows_of_a_layer_can_be_merged(run: Run, read: Any, tmp_path: Path, part: Any) -> None:
    parts = [part("2:4"), part("4:8")]
    run("merge", *parts, "--rows", "2:8", "--json", tmp_path / "merged.json")
    assert read(tmp_path / "merged.json")["settings"]["rows"] == "2:8"
    whole = part("0:12")
    assert json.loads(run("merge", whole, "--json", "-").stdout) == read(whole)


def test_missing_and_repeated_rows_are_named(fails: Fails, part: Any) -> None:
    begin, middle, end = part("0:2"), part("4:6"), part("5:11")
    assert "Of the rows 0:12, 2:4, 6:12 are in no part" in fails("merge", begin, middle)
    assert "0:4, 6:12 are in no part" in fails("merge", middle)
    assert "rows 5:6 are in" in fails("merge", end, begin, middle)
    assert "rows 0:2 are in" in fails("merge", begin, begin)
    assert "holds the rows 4:6, which are not within 0:5" in fails("merge", begin, middle, "--rows", ":5")
    assert "0:12" in fails("merge", begin, "--rows", "2:13")
    sparse = [part(f"{row}") for row in (1, 3, 7, 9, 11)]
    assert "0:1, 2:3, 4:7, 8:9 and 1 more ranges are in no part" in fails("merge", *sparse)


def test_parts_that_differ_are_refused(
    run: Run, fails: Fails, layer: Path, mask: Path, tmp_path: Path, part: Any
) -> None:
    first, other = part("0:6"), tmp_path / "other.safetensors"
    save_instance(other, synthetic(rows=12, d=24, seed=1))
    assert "sparsity is 0.5 in the one and 0.25" in fails("merge", first, part("6:12", "-s", 0.25, *BRUTE, name="s"))
    assert "instance_sha256 is" in fails("merge", first, part("6:12", of=other, name="o"))
    assert "columns is 8" in fails("merge", first, part("6:12", "-s", 0.5, "--exact", "brute-force", "--columns", 9))
    solver = part("6:12", "-s", 0.5, *BRUTE, "--solver", "wanda", name="w")
    assert "solver is 'ContinuationFrankWolfe" in fails("merge", first, solver)
    run("certify", layer, "--mask", mask, "-s", 0.5, "--rows", "6:", "--json", tmp_path / "c")
    assert "command is 'verify' in the one and 'certify'" in fails("merge", first, tmp_path / "c")
    second = part("6:12", name="second")
    old = change(second, lambda figures: figures["versions"].update(maskopt="0.0.1"))
    assert "version of maskopt is" in fails("merge", first, old)
    run("solve", layer, "-s", 0.5, "--solver", "magnitude", "--out", tmp_path / "magnitude")
    run("certify", layer, "--mask", tmp_path / "magnitude", "-s", 0.5, "--rows", ":6", "--json", tmp_path / "d")
    assert "mask_sha256 is" in fails("merge", tmp_path / "c", tmp_path / "d")


def test_where_and_how_fast_parts_ran_may_differ(run: Run, read: Any, tmp_path: Path, part: Any) -> None:
    first, second = part("0:6"), part("6:12", "-s", 0.5, *BRUTE, "--jobs", 2, "--backend", "threading")
    moved = change(second, lambda figures: figures["settings"].update(instance="/elsewhere/layer.safetensors"))
    run("merge", moved, first, "--json", tmp_path / "merged.json")
    settings = read(tmp_path / "merged.json")["settings"]
    assert (settings["jobs"], settings["backend"]) == ([1, 2], ["loky", "threading"])
    assert settings["instance"] == [read(first)["settings"]["instance"], "/elsewhere/layer.safetensors"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda figures: figures.pop("command"), "no JSON of this version's maskopt"),
        (lambda figures: figures.update(command=["verify"]), "no JSON of this version's maskopt"),
        (lambda figures: figures.pop("title"), "damaged"),
        (lambda figures: figures["rows"].pop(), "does not hold the results of its rows 0:2"),
        (lambda figures: figures["rows"].reverse(), "does not hold the results"),
        (lambda figures: figures["rows"][0].pop("bound"), "damaged"),
        (lambda figures: figures["rows"][0].update(best="1"), "damaged"),
        (lambda figures: figures["settings"].update(rows="0:20"), "damaged"),
        (lambda figures: figures["settings"].update(layer_rows=0), "damaged"),
        (lambda figures: figures.update(rows=None), "damaged"),
    ],
)
def test_damaged_parts_are_refused(fails: Fails, part: Any, edit: Any, words: str) -> None:
    changed = change(part("0:2"), edit)
    said = fails("merge", changed, "--rows", ":2")
    assert words in said
    assert changed.name in said


def test_files_that_are_no_parts_are_refused(fails: Fails, run: Run, layer: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("{")
    (tmp_path / "empty").write_text("")
    run("solve", layer, "-s", 0.5, "--solver", "wanda", "--json", tmp_path / "solve.json")
    assert "no readable JSON" in fails("merge", tmp_path / "text")
    assert "no readable JSON" in fails("merge", layer)
    assert "is empty" in fails("merge", tmp_path / "empty")
    assert "does not exist" in fails("merge", tmp_path / "none")
    assert "no JSON of this version's maskopt verify or certify" in fails("merge", tmp_path / "solve.json")
    assert "PART" in fails("merge")


def test_parts_of_coupled_rows_are_no_parts_of_the_layer(run: Run, fails: Fails, layer: Path, tmp_path: Path) -> None:
    arguments = ("--columns", 4, "--exact", "scip", "-s", 0.5, "-p", "unstructured")
    out = tmp_path / "part.json"
    text = run("verify", layer, "--rows", "0:3", *arguments, "--json", out).stdout
    assert "0:3 as a layer of their own: the set couples all 12 rows" in text
    assert "couples 12 rows, and its rows 0:3 were verified as a layer of their own" in fails("merge", out)
    assert "couples 4 rows at a time, so --rows must begin and end at a multiple of 4; got 2:8" in fails(
        "verify", layer, "--rows", "2:8", "-p", "transposable-2:4"
    )


def test_an_infinite_excess_survives(run: Run, read: Any, tmp_path: Path) -> None:
    """A mask that loses something where another one loses nothing."""
    layer, out = tmp_path / "layer.safetensors", tmp_path / "one.json"
    # The two inputs are the same, and so large weights of opposite signs can go together.
    gram = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1e-6]])
    save_instance(layer, Instance(torch.tensor([[2.0, -2, 1]] * 2), gram))
    arguments = ("-s", 0.67, "--exact", "brute-force", "--solver", "magnitude")
    run("verify", layer, "--rows", ":", *arguments, "--json", out)
    assert [row["excess"] for row in read(out)["rows"]] == [None, None]
    shown = run("verify", layer, "--rows", ":", *arguments).stdout
    parts = []
    for rows in ("0:1", "1:2"):
        parts.append(tmp_path / rows.replace(":", "-"))
        run("verify", layer, "--rows", rows, *arguments, "--json", parts[-1])
    text = run("merge", *parts, "--json", tmp_path / "merged.json").stdout
    assert "all of it" in text
    assert without_times(text) == without_times(shown)
    assert without_seconds(read(tmp_path / "merged.json")) == without_seconds(read(out))


def test_outputs_are_never_overwritten(run: Run, fails: Fails, tmp_path: Path, part: Any) -> None:
    parts = [part("0:6"), part("6:12")]
    before = parts[0].read_text()
    assert "exists already" in fails("merge", *parts, "--json", parts[0])
    assert parts[0].read_text() == before
    assert "in no part" in fails("merge", parts[0], "--json", tmp_path / "merged.json")
    assert not (tmp_path / "merged.json").exists()
    figures = json.loads(run("merge", *parts, "--json", "-", "--quiet").stdout)
    assert len(figures["rows"]) == 12


def test_the_heuristic_of_a_row_does_not_depend_on_the_others(layer: Path, part: Any, read: Any) -> None:
    whole = load_instance(layer).problem()
    first = LayerReconstruction(whole.weight[:6, :8], whole.gram[:8, :8])
    together = solve(first, PerRow(0.5)).objective / first.scale()
    apart = [row["heuristic"] for row in read(part("0:6"))["rows"]]
    assert apart == pytest.approx(together.tolist(), rel=1e-12)
