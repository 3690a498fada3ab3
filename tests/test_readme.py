"""The examples of the README and the contributing guide are run here, so that they stay correct."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from typer.testing import CliRunner

import maskopt
from maskopt.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    result, better, wanda = (names[name] for name in ("result", "better", "wanda"))
    assert isinstance(result, maskopt.Result)
    assert isinstance(better, maskopt.Result)
    assert isinstance(wanda, maskopt.Result)
    assert result.total < wanda.total
    assert better.total <= wanda.total
    assert "LOCAL" not in capsys.readouterr().out  # the sentence, not the name


def test_contributing_example_is_what_the_class_takes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    names: dict[str, object] = {"PartitionMatroid": maskopt.PartitionMatroid}
    exec(block[1], names)
    per_column = names["PerColumn"]
    assert callable(per_column)
    assert per_column(2).count((4, 3)) == 6**3


def _commands() -> list[list[str]]:
    joined = README.replace("\\\n", " ")
    return [line.split() for line in re.findall(r"^    \.venv/bin/maskopt (.*)$", joined, re.MULTILINE)]


def test_commands_exist_with_their_options() -> None:
    commands = _commands()
    assert {words[0] for words in commands} == {
        "prune",
        "evaluate",
        "solve",
        "compare",
        "trace",
        "verify",
        "certify",
        "recover",
        "shrink",
    }
    for words in commands:
        shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"})
        assert shown.exit_code == 0
        for option in words:
            if option.startswith("--"):
                assert option in shown.output, f"{words[0]} has no {option}"


@pytest.mark.slow
def test_layer_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maskopt.save_instance(tmp_path / "layer.safetensors", maskopt.synthetic(rows=8, d=16))
    monkeypatch.chdir(tmp_path)
    for words in _commands():
        if words[0] in ("solve", "compare", "trace"):
            words = ["layer.safetensors" if "*" in word else word for word in words]
            done = CliRunner().invoke(app, [*words, "--json", f"{words[0]}.json"])
            assert done.exit_code == 0, done.output
    assert (tmp_path / "mask.safetensors").is_file()
    assert (
        len(json.loads((tmp_path / "compare.json").read_text())["rows"][0]["results"]) == 4 * 2 + 2
    )  # kept and refitted, and joint methods


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


RESULTS = ROOT / "benchmarks" / "results"
LAYERS = {
    "attention query": "l1_attn_query",
    "attention output": "l1_attn_output",
    "MLP up": "l1_intermediate",
    "MLP down": "l1_output",
}


@dataclass(frozen=True)
class Table:
    """A table of the README: its rows, each with its entries by heading, without bold letters."""

    head: list[str]
    rows: dict[str, dict[str, str]]
    bold: dict[str, set[str]]
    """By row, the headings whose entries are bold."""


def _table(*head: str) -> Table:
    """Return the one table of the README whose head starts like this."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        lines = [[entry.strip() for entry in line.strip("|").split("|")] for line in block.splitlines()]
        names = [entry.strip("*") for entry in lines[0]]
        if tuple(names[: len(head)]) == head:
            found.append((names, lines[2:]))
    assert len(found) == 1, head
    names, lines = found[0]
    entries = {line[0]: dict(zip(names[1:], line[1:], strict=True)) for line in lines}
    return Table(
        names,
        {row: {name: text.replace("*", "") for name, text in cells.items()} for row, cells in entries.items()},
        {row: {name for name, text in cells.items() if text.startswith("**")} for row, cells in entries.items()},
    )


def _figures(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _check_layers(table: Table, columns: dict[str, str], name: str) -> None:
    rows = {(Path(row["instance"]).stem, row["label"]): row["results"] for row in _figures(name)["rows"]}
    assert len(table.rows) == 4 * 4
    assert list(columns) == table.head[1:]
    for row, entries in table.rows.items():
        words = re.fullmatch(r"(.*) \d+ x \d+, (.*)", row)
        assert words is not None, row
        results = rows[LAYERS[words[1]], words[2]]
        errors = {column: results[method]["relative_error"] for column, method in columns.items()}
        shown = {column: f"{error:.4f}" for column, error in errors.items()}
        for column in errors:
            if "(" in column:
                setting = results[columns[column]].get("setting", "alpha=0")  # the default
                shown[column] += f" ({setting.partition('=')[2]})"
        assert entries == shown, row
        assert table.bold[row] == {min(errors, key=lambda column: errors[column])}, row


def test_layer_errors_are_those_of_the_results() -> None:
    columns = {
        "Wanda": "wanda",
        "SparseFW (alpha)": "sparsefw",
        "1-swap from Wanda": "one-swap",
        "maskopt": "continuation",
    }
    _check_layers(_table("layer, masks", "Wanda"), columns, "layers")


def test_layer_errors_of_updated_weights_are_those_of_the_results() -> None:
    columns = {
        "mask alone": "continuation",
        "+ least squares": "continuation + lsq",
        "SparseGPT": "sparsegpt",
        "ADMM": "admm",
        "FISTAPruner": "fista",
        "ALPS": "alps",
        "best": "best",
    }
    _check_layers(_table("layer, masks", "mask alone"), columns, "joint")


def _perplexities(name: str) -> dict[tuple[str, str], dict[str, float]]:
    """Return the mean perplexity over the seeds, by model and masks and by method, and that of the dense model."""
    records = _figures(name)["records"]
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in records:
        cell = cells.setdefault((record["model"].removesuffix("-llama"), record["masks"]), {})
        cell.setdefault(record["solver"], []).append(record["perplexity"])
        cell.setdefault("dense", []).append(record["dense_perplexity"])
    return {key: {method: fmean(values) for method, values in cell.items()} for key, cell in cells.items()}


def _check_perplexities(table: Table, columns: Mapping[str, str], name: str) -> None:
    """Compare a table, whose rows name model and masks (or only the masks of the one model), with results."""
    cells = {", ".join(key): cell for key, cell in _perplexities(name).items()}
    if table.head[0] != "model, masks":
        models = {key.partition(", ")[0] for key in cells}
        assert len(models) == 1
        cells = {key.partition(", ")[2]: cell for key, cell in cells.items()}
    assert len(table.rows) == len(cells)
    for row, entries in table.rows.items():
        cell = cells[row]
        values = {column: cell[method] for column, method in columns.items()}
        shown = {column: f"{value:.2f}" for column, value in values.items()}
        for column, method in columns.items():
            if "(" in column:
                shown[column] += f" ({_setting(name, row, method)})"
        assert entries == shown, row
        pruned = {column: value for column, value in values.items() if column != "dense"}
        assert table.bold[row] == {min(pruned, key=lambda column: pruned[column])}, row


def _setting(name: str, row: str, method: str) -> str:
    """Return the value of the setting that a method's records of a row have in common."""
    values = {
        record["setting"].partition("=")[2]
        for record in _figures(name)["records"]
        if record["solver"] == method
        and row in (record["masks"], f"{record['model'].removesuffix('-llama')}, {record['masks']}")
    }
    assert len(values) == 1
    return values.pop()


def test_perplexities_of_masks_alone_are_those_of_the_results() -> None:
    columns = {
        "dense": "dense",
        "Wanda": "wanda",
        "SparseFW (alpha)": "sparsefw",
        "1-swap from Wanda": "one-swap",
        "maskopt": "continuation",
    }
    _check_perplexities(_table("model, masks", "dense", "Wanda"), columns, "perplexity")


def test_perplexities_of_a_larger_model_are_those_of_the_results() -> None:
    columns = {
        "dense": "dense",
        "Wanda": "wanda, pruned",
        "SparseGPT": "sparsegpt, pruned",
        "ALPS": "alps, pruned",
        "best": "best, corrected",
    }
    _check_perplexities(_table("SmolLM2-135M, masks"), columns, "smollm2")


def test_the_larger_model_has_less_perplexity_than_with_alps() -> None:
    values = {(r["masks"], r["method"]): r["perplexity"] for r in _figures("smollm2")["records"]}
    below = [100 * (1 - values[masks, "best"] / values[masks, "alps"]) for masks in ("per-row 50 %", "2:4")]
    assert f"It is {below[0]:.1f} and {below[1]:.1f} %\nbelow ALPS" in README


def test_perplexities_of_updated_weights_are_those_of_the_results() -> None:
    columns = {
        "dense": "dense",
        "SparseGPT": "sparsegpt, pruned",
        "ADMM": "admm, pruned",
        "FISTAPruner": "fista, corrected",
        "ALPS": "alps, pruned",
        "best": "best, corrected",
        "ALPS, corrected": "alps, corrected",
    }
    _check_perplexities(_table("model, masks", "dense", "SparseGPT"), columns, "weights")


def test_perplexities_by_allocation_are_those_of_the_results() -> None:
    columns = {
        "dense": "dense",
        "uniform": "uniform",
        "OWL": "owl",
        "DLP": "dlp",
        "auto": "auto",
    }
    found = _table("model, method, mean sparsity")
    records = _figures("allocation")["records"]
    # The cells of all these rules; where some of them were not run, only the text speaks of `auto`.
    places = {(r["model"], r["method"], r["sparsity"]) for r in records if r["rule"] == "dlp"}
    assert len(found.rows) == len(places)
    for model, method, sparsity in places:
        own = [r for r in records if (r["model"], r["method"], r["sparsity"]) == (model, method, sparsity)]
        shown = found.rows[f"{model.removesuffix('-llama')}, {method}, {100 * sparsity:g} %"]
        for column, rule in columns.items():
            values = [r["dense"] if rule == "dense" else r["perplexity"] for r in own if rule in ("dense", r["rule"])]
            assert shown[column] == f"{fmean(values):.2f}", (model, method, sparsity, column)


def test_the_stream_as_a_target_lowers_perplexity() -> None:
    records = _figures("correction")["records"]
    cells = {(r["model"], r["seed"], r["samples"], r["pattern"], r["correction"]): r["perplexity"] for r in records}
    own = [cell[:4] for cell in cells if cell[4] == "layer:0.7"]
    ratios = [cells[*cell, "stream:0.7"] / cells[*cell, "layer:0.7"] for cell in own]
    falls = [100 * (1 - ratio) for ratio in ratios]
    text = " ".join(README.split())
    assert (
        f"Over {len(own)} models, patterns and amounts of data that lowers perplexity by {median(falls):.1f} % in the "
        f"median and by up to {max(falls):.1f} %, and raises it by {-min(falls):.1f} % at most" in text
    )


def test_what_allocation_gives_the_larger_model() -> None:
    found = {record["rule"]: record for record in _figures("allocation-smollm2")["records"]}
    assert found["auto"]["details"]["chosen"] == "fisher"  # the name of expanded losses
    before, after = (f"{found[rule]['perplexity']:.2f}" for rule in ("uniform", "auto"))
    assert f"lowers the perplexity from {before} to {after}" in " ".join(README.split())


def test_what_the_larger_model_loses_with_its_units() -> None:
    records = _figures("shrinking-smollm2")["records"]
    values = {(record["loss"], record["arm"]): f"{record['perplexity']:.1f}" for record in records}
    one, both = ([values[loss, arm] for arm in ("best:block", "fasp", "osscar")] for loss in ("0.3/0", "0.3/0.25"))
    text = " ".join(README.split())
    assert f"perplexity {records[0]['dense']:.1f} when dense" in text
    assert f"30 % of its neurons: {one[0]}, with FASP {one[1]}, with OSSCAR {one[2]};" in text
    assert f"a third of its heads, too: {both[0]}, {both[1]} and {both[2]}" in text


def test_what_allocation_gives_at_each_sparsity() -> None:
    values = {
        (r["model"], r["sparsity"], r["rule"]): r["perplexity"]
        for r in _figures("allocation")["records"]
        if r["method"] == "best"
    }
    medians = []
    for sparsity in (0.5, 0.6, 0.7, 0.8):
        ratios = [v / values[m, s, "uniform"] for (m, s, rule), v in values.items() if (rule, s) == ("auto", sparsity)]
        assert len(ratios) == 4
        assert max(ratios) < 1
        medians.append(f"{median(ratios):.2f}"[1:])
    text = " ".join(README.split())
    assert f"at 50, 60, 70 and 80 % it is {', '.join(medians[:3])} and {medians[3]} of uniform sparsity's" in text


def test_rules_for_masks_alone_lose_where_weights_move() -> None:
    """What the README says of them with `best`: in the median above uniform, and with denser first blocks."""
    records = _figures("allocation")["records"]
    values = {(r["model"], r["sparsity"], r["rule"]): r["perplexity"] for r in records if r["method"] == "best"}
    for rule in ("owl", "dlp"):
        ratios = [
            value / values[model, sparsity, "uniform"]
            for (model, sparsity, own), value in values.items()
            if own == rule
        ]
        assert median(ratios) > 1, rule
    first = {"auto": 0.0, "owl": 0.0, "dlp": 0.0}
    for record in records:
        if record["method"] == "best" and record["rule"] in first:
            first[record["rule"]] += fmean(
                sparsity - record["sparsity"]
                for name, sparsity in record["sparsities"].items()
                if re.search(r"\.[01]\.", name)
            )
    assert first["owl"] < 0
    assert first["dlp"] < 0
    assert first["auto"] > 0


def test_perplexities_after_recovery_are_those_of_the_results() -> None:
    """The table, and what the text below it says."""
    columns = {
        "dense": "dense",
        "`best`": "none",
        "block, masks fixed": "block:fixed",
        "--recover block": "block",
        "--recover model": "model",
    }
    found = _table("model, masks", "dense", "`best`")
    records = _figures("recovery")["records"]
    cells = {(r["model"].removesuffix("-llama"), r["pattern"], r["recovery"]): r for r in records}
    places = {(model, pattern) for model, pattern, _ in cells}
    assert len(found.rows) == len(places)
    for model, pattern in places:
        masks = pattern.replace("per-row:0.6", "per-row 60 %")
        for column, name in columns.items():
            record = cells[model, pattern, "none" if name == "dense" else name]
            value = record["dense" if name == "dense" else "perplexity"]
            assert found.rows[f"{model}, {masks}"][column] == f"{value:.2f}", (model, pattern, name)

    def over(figure: str, name: str, base: str) -> list[float]:
        return [cells[*place, name][figure] / cells[*place, base][figure] for place in sorted(places)]

    text = " ".join(README.split())
    block, model = (median(over("perplexity", name, "none")) for name in ("block", "model"))
    moving = over("perplexity", "block", "block:fixed")
    assert f"to {block:.2f} of `best` alone in the median and recovered models to {model:.2f}" in text
    assert f"to {median(moving):.2f} of those with fixed ones (at most {max(moving):.2f})" in text
    times = [ratio for name in ("block", "model") for ratio in over("seconds", name, "none")]
    assert f"takes {min(times):.0f} to {max(times):.0f} times the time of pruning alone" in text
    fits = [fit for record in records for fit in record["fits"]]
    assert all(fit["after"] <= fit["before"] for fit in fits)
    assert "no fit is worse than before on held-out windows" in text


def test_what_is_said_of_recovery_from_other_starts_is_what_was_measured() -> None:
    records = _figures("recovery-starts")["records"]
    found: dict[str, list[float]] = {}
    for record in records:
        (best,) = (
            other["perplexity"]
            for other in records
            if other["method"] == "best" and all(other[key] == record[key] for key in ("model", "seed", "recovery"))
        )
        if record["method"] != "best":
            found.setdefault(record["recovery"], []).append(record["perplexity"] / best)
    text = " ".join(README.split())
    for name, form in {
        "none": "Layers by Wanda, SparseGPT and ALPS give {:.1f} to {:.1f} times the perplexity of those by `best`",
        "block": "when the blocks are recovered it is {:.2f} to {:.2f} times",
        "model": "when the model is, {:.2f} to {:.2f} times",
    }.items():
        assert form.format(min(found[name]), max(found[name])) in text, name


def test_ratios_in_the_text_are_those_of_the_results() -> None:
    def rows(name: str, only: str = "") -> list[dict[str, Any]]:
        return [row["results"] for row in _figures(name)["rows"] if row["instance"].startswith(only)]

    def ratios(results: list[dict[str, Any]], one: str, other: str, figure: str) -> list[float]:
        return [row[one][figure] / row[other][figure] for row in results]

    text = " ".join(README.split())
    ours = rows("layers", "l1_")
    errors = [
        median(ratios(ours, "continuation", other, "relative_error")) for other in ("wanda", "sparsefw", "one-swap")
    ]
    assert (
        "median error is {:.2f} of Wanda's, {:.2f} of SparseFW's and {:.2f} of that of a proven 1-swap optimum, in "
        "{:.2f} of SparseFW's time".format(*errors, median(ratios(ours, "continuation", "sparsefw", "seconds")))
    ) in text
    best, every = (ratios(rows("joint", only), "best", "alps", "relative_error") for only in ("l1_", ""))
    seconds = median(ratios(rows("joint", "l1_"), "best", "alps", "seconds"))
    assert f"errors are {min(best):.2f} to {max(best):.2f} of ALPS's (median {median(best):.3f})" in text
    assert f"in {seconds:.2f} of its time" in text
    assert f"over all {len(every)} cases" in text
    assert f"{min(every):.2f} to {max(every):.2f} (median {median(every):.3f})" in text


def test_what_the_text_says_of_best_is_so_in_the_results() -> None:
    cells = _perplexities("weights")
    published = ["sparsegpt, pruned", "admm, pruned", "fista, corrected", "alps, pruned"]
    behind = [min(cell[name] for name in published) / cell["best, corrected"] - 1 for cell in cells.values()]
    text = " ".join(README.split())
    assert f"`best` is lowest in {sum(gap > 0 for gap in behind)} of {len(cells)} cases" in text
    assert f"the best of them being {100 * min(behind):.1f} to {100 * max(behind):.0f} % behind" in text
    cells = {key: _pruned(cell) for key, cell in cells.items()}
    gaps = sorted(cell["best, corrected"] / min(cell.values()) - 1 for cell in cells.values())
    lowest = [min(cell, key=lambda name: cell[name]) for cell in cells.values()]
    counts = f"{lowest.count('best, corrected')} and ALPS in {lowest.count('alps, corrected')}"
    largest = f"{100 * gaps[-1]:.1f} %, the next {100 * gaps[-2]:.1f} %"
    assert f"lowest in {counts}; the largest gap to the lowest is {largest}" in text


def _pruned(cell: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in cell.items() if name != "dense"}


def test_solved_instances_are_those_of_the_results() -> None:
    figures = _figures("library")
    table = _table("solver", "optimum found")
    names = ("continuation + swaps", "Frank-Wolfe, fully-corrective + swaps", "1-swap from Wanda", "SparseFW", "Wanda")
    assert len(table.rows) == len(figures["solvers"]) == len(names)
    for entries, name in zip(table.rows.values(), names, strict=True):
        found, middle, worst = (figures["solvers"][name][key] for key in ("found", "median", "worst"))
        assert list(entries.values()) == [f"{found} of {figures['solved']}", f"{middle:.4f}", f"{worst:.3f}"], name


def test_bounds_are_those_of_the_results() -> None:
    fractions = {row[0]: row[1] for row in _figures("bounds")["rows"]}
    table = _table("layer", "Frank-Wolfe gap")
    assert len(table.rows) == 3
    for layer, entries in table.rows.items():
        methods = ("Frank-Wolfe gap", "semidefinite", "+ Z >= 0, 100 steps")
        assert list(entries.values()) == [fractions[f"{LAYERS[layer]}, d = 384, {method}"] for method in methods], layer


def test_iterations_of_directions_are_those_of_the_results() -> None:
    runs = _figures("directions")["experiment"]
    for words, entries in _table("direction", "median iterations").rows.items():
        for name in words.split(", "):
            own = runs[{"lazified": "lazy"}.get(name, name.lower().replace(" ", "-"))]
            if not all(run["converged"] for run in own):
                assert entries["median iterations"] == "not in 6000"
                continue
            iterations = [run["iterations"] for run in own]
            vertices = [run["vertices"] for run in own if run["vertices"] is not None]
            assert entries["median iterations"] == f"{median(iterations):.0f}", name
            assert entries["most"] == str(max(iterations)), name
            assert entries["vertices kept"] == (f"{median(vertices):.0f}" if vertices else "none"), name


def test_packed_sizes_are_those_measured() -> None:
    found = re.search(
        r"([0-9.]+) of the bytes of\nSmolLM2-135M's pruned layers at 50 % \(([0-9.]+) of all its weights\), ([0-9.]+) "
        r"\(([0-9.]+)\) with `--compress`",
        README,
    )
    assert found is not None
    (one,) = (
        result
        for result in _figures("packing")["results"]
        if "smollm2" in result["model"] and result["sparsity"] == 0.5
    )
    measured = []
    for form in ("plain", "compressed"):
        layers = one[form]["kinds"]["mask and values"]
        measured += [layers["packed"] / layers["dense"], one[form]["ratio"]]
    assert [float(text) for text in found.groups()] == [round(value, 2) for value in measured]
