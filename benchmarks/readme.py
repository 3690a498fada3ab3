"""Put the figures of benchmarks/results into README's tables of layer errors and perplexities.

    python benchmarks/readme.py

Sentences with figures are not rewritten; tests/test_readme.py says which do not agree with the results any more.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import report
from grids import GRIDS

README = Path(__file__).parent.parent / "README.md"
LAYERS = {
    "l1_attn_query": "attention query",
    "l1_attn_output": "attention output",
    "l1_intermediate": "MLP up",
    "l1_output": "MLP down",
}
Rows = dict[str, dict[str, tuple[float, str]]]
"""Figures and the settings that were chosen for them, by the first column of a table and by method."""


def layer_errors(name: str) -> Rows:
    """Return the errors of the layers of the sentence encoder."""
    rows = {(Path(row["instance"]).stem, row["label"]): row for row in figures(name)["rows"]}
    found: Rows = {}
    for (layer, label), row in sorted(rows.items(), key=lambda item: [*LAYERS, item[0][0]].index(item[0][0])):
        if layer in LAYERS:
            # Results without a setting are those of the published default.
            errors = {
                method: (one["relative_error"], one.get("setting", GRIDS.get(method, ("",))[0]))
                for method, one in row["results"].items()
            }
            found[f"{LAYERS[layer]} {row['rows']} x {row['columns']}, {label}"] = errors
    return found


def perplexities(name: str, title: str = "{model}, {masks}") -> Rows:
    """Return mean perplexities over the seeds, and those of the dense models."""
    found: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for record in figures(name)["records"]:
        model = record["model"].removesuffix("-llama")
        row = found.setdefault(title.format(model=model, masks=record["masks"]), {})
        row.setdefault("dense", []).append((record["dense_perplexity"], ""))
        row.setdefault(record["solver"], []).append((record["perplexity"], record.get("setting", "")))
    return {
        row: {method: (fmean(value for value, _ in values), values[0][1]) for method, values in own.items()}
        for row, own in found.items()
    }


def allocations() -> Rows:
    """Return mean perplexities by the rule for the sparsity of layers, and those of the dense models."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in figures("allocation")["records"]:
        model = record["model"].removesuffix("-llama")
        row = found.setdefault(f"{model}, {record['method']}, {100 * record['sparsity']:g} %", {})
        row.setdefault("dense", []).append(record["dense"])
        row.setdefault(record["rule"], []).append(record["perplexity"])
    return {
        row: {rule: (fmean(values), "") for rule, values in found[row].items()}
        for row in sorted(found, key=lambda row: (row.split(", ")[1:], list(found).index(row)))
    }


def recoveries() -> Rows:
    """Return median perplexities by recovery, and those of the dense models."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in figures("recovery")["records"]:
        pattern, _, sparsity = record["pattern"].partition(":")
        masks = f"{pattern} {100 * float(sparsity):g} %" if pattern == "per-row" else record["pattern"]
        row = found.setdefault(f"{record['model'].removesuffix('-llama')}, {masks}", {})
        row.setdefault("dense", []).append(record["dense"])
        row.setdefault(record["recovery"], []).append(record["perplexity"])
    return {row: {name: (median(values), "") for name, values in own.items()} for row, own in found.items()}


def figures(name: str) -> dict[str, Any]:
    """Return the contents of results/NAME.json."""
    contents: dict[str, Any] = json.loads((report.RESULTS / f"{name}.json").read_text())
    return contents


TABLES: list[tuple[str, Mapping[str, str], str, Callable[[], Rows]]] = [
    (
        "layer, masks",
        {"Wanda": "wanda", "SparseFW (alpha)": "sparsefw", "1-swap from Wanda": "one-swap", "maskopt": "continuation"},
        ".4f",
        lambda: layer_errors("layers"),
    ),
    (
        "layer, masks",
        {
            "mask alone": "continuation",
            "+ least squares": "continuation + lsq",
            "SparseGPT": "sparsegpt",
            "ADMM": "admm",
            "FISTAPruner": "fista",
            "ALPS": "alps",
            "best": "best",
        },
        ".4f",
        lambda: layer_errors("joint"),
    ),
    (
        "model, masks",
        {
            "dense": "dense",
            "Wanda": "wanda",
            "SparseFW (alpha)": "sparsefw",
            "1-swap from Wanda": "one-swap",
            "maskopt": "continuation",
        },
        ".2f",
        lambda: perplexities("perplexity"),
    ),
    (
        "model, masks",
        {
            "dense": "dense",
            "SparseGPT": "sparsegpt, pruned",
            "ADMM": "admm, pruned",
            "FISTAPruner": "fista, corrected",
            "ALPS": "alps, pruned",
            "best": "best, corrected",
            "ALPS, corrected": "alps, corrected",
        },
        ".2f",
        lambda: perplexities("weights"),
    ),
    (
        "SmolLM2-135M, masks",
        {
            "dense": "dense",
            "Wanda": "wanda, pruned",
            "SparseGPT": "sparsegpt, pruned",
            "ALPS": "alps, pruned",
            "best": "best, corrected",
        },
        ".2f",
        lambda: perplexities("smollm2", "{masks}"),
    ),
    (
        "model, method, mean sparsity",
        {
            "dense": "dense",
            "uniform": "uniform",
            "OWL": "owl",
            "DLP": "dlp",
            "auto": "auto",
        },
        ".2f",
        allocations,
    ),
    (
        "model, masks",
        {
            "dense": "dense",
            "`best`": "none",
            "block, masks fixed": "block:fixed",
            "--recover block": "block",
            "--recover model": "model",
        },
        ".2f",
        recoveries,
    ),
]
OURS = ("maskopt", "best", "auto", "--recover block", "--recover model")


def table(first: str, columns: Mapping[str, str], form: str, rows: Rows) -> str:
    """Return a table whose lowest figures, but for the dense model's, are bold; settings that heads name are shown.

    Rows in which not every method was run are left out.
    """
    lines = []
    for row, values in rows.items():
        if not values.keys() >= set(columns.values()):
            continue
        lowest = min((name for name in columns if name != "dense"), key=lambda name: values[columns[name]][0])
        entries = {name: entry(*values[method], form, setting="(" in name) for name, method in columns.items()}
        lines.append([row, *(f"**{text}**" if name == lowest else text for name, text in entries.items())])
    return report.table([first, *(f"**{name}**" if name in OURS else name for name in columns)], lines) + "\n"


def entry(value: float, chosen: str, form: str, *, setting: bool) -> str:
    """Return a figure, and in brackets the value of the setting that it was found with."""
    return f"{value:{form}} ({chosen.partition('=')[2]})" if setting else f"{value:{form}}"


def main() -> None:
    """Rewrite README's tables."""
    text = README.read_text()
    for first, columns, form, rows in TABLES:
        fresh = table(first, columns, form, rows())
        head = re.escape(fresh.splitlines()[0])
        text, count = re.subn(rf"^{head}\n(?:\|.*\n)+", fresh.replace("\\", r"\\"), text, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"README has {count} tables with the head {fresh.splitlines()[0]}; there should be one.")
    README.write_text(text)


if __name__ == "__main__":
    main()
