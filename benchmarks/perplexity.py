"""Perplexity of pruned language models, every solver and set side by side.

    python benchmarks/perplexity.py [MODEL,CALIBRATION,TEXT ...] [--seeds 0,1,2]
    python benchmarks/perplexity.py [...] --name weights --solvers continuation --weights keep,lsq,alps,best

Without models the shipped demo model, calibrated and evaluated on this Python's standard library. Every solver
has the same calibration windows; a seed draws other windows. Where the surviving weights are updated (--weights),
errors before and after are recorded. --propagate lists the states on which blocks are calibrated; "default" is each
method's default. Writes benchmarks/results/NAME.{md,json}, and where weights are updated NAME.svg.
"""

import argparse
import copy
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import joblib
import report
import torch
from rich.progress import Progress

from maskopt.cli.solvers import parse_comparison
from maskopt.cli.words import set_words
from maskopt.demo.corpus import held_out_text, training_text
from maskopt.demo.run import MODEL
from maskopt.errors import MaskoptError
from maskopt.models import calibration_batches, default_seqlen, load_model, perplexity, prune, select_layers
from maskopt.oracles import parse_masks

SETS = "per-row:0.5,per-row:0.6,per-row:0.7,2:4,4:8,unstructured:0.6"


Job = tuple[str, str | Path, str | Path, str | Path]


def cell(job: Job, pattern: str, sparsity: float | None, seed: int, options: argparse.Namespace) -> list[dict]:
    """Return one record per method for a model, a set and a seed; none where the set does not fit the model."""
    torch.set_num_threads(1)
    name, model_path, calibration, source = job
    dense, tokenizer = load_model(model_path)
    dense.float()
    try:
        for layer in select_layers(dense).layers:
            parse_masks(pattern, sparsity).check(layer.shape)
    except MaskoptError as misfit:
        print(f"{name}: {misfit}")
        return []
    seqlen = default_seqlen(dense, tokenizer, at_most=512)
    text = source.read_text() if isinstance(source, Path) else source
    text = text[: options.characters]
    before = perplexity(dense, tokenizer, text, seqlen=seqlen)
    batches = calibration_batches(tokenizer, calibration, samples=options.samples, seqlen=seqlen, seed=seed)
    methods = parse_comparison(options.solvers, options.weights)
    records: dict[tuple[str, str], dict] = {}
    for propagate, method in itertools.product(options.propagate, methods):
        asked = None if propagate == "default" else propagate
        if (method, propagate) in records:  # the default, already measured
            continue
        pruned = copy.deepcopy(dense)
        result = prune(pruned, batches, parse_masks(pattern, sparsity), methods[method], propagate=asked)
        used = result.settings["propagate"]
        records[method, used] = {
            "model": name,
            "masks": set_words(pattern, sparsity),
            "seed": seed,
            "solver": method if options.weights == "keep" else f"{method}, {used}",
            "propagate": used,
            "default": asked is None,
            "perplexity": perplexity(pruned, tokenizer, text, seqlen=seqlen).perplexity,
            "dense_perplexity": before.perplexity,
            "tokens": before.tokens,
            "calibration": {**batches.to_json(), "source": Path(batches.source).name},
            "mean_relative_error": result.mean_relative_error,
            "mean_kept_error": fmean(layer.kept_error for layer in result.layers),
            "solve_seconds": result.solve_seconds,
            "calibration_seconds": result.calibration_seconds,
        }
    return list(records.values())


def parse_sets(text: str) -> list[tuple[str, float | None]]:
    """Read "per-row:0.5,2:4" as [("per-row", 0.5), ("2:4", None)]."""
    sets: list[tuple[str, float | None]] = []
    for word in text.split(","):
        pattern, _, sparsity = word.rpartition(":")
        sets.append((word, None) if pattern.isdecimal() else (pattern, float(sparsity)))
    return sets


def summary(records: Sequence[dict], solvers: Sequence[str]) -> str:
    """Return a Markdown table: mean perplexity over the seeds, and the spread where there are several."""
    rows = []
    for model, masks in dict.fromkeys((record["model"], record["masks"]) for record in records):
        here = [record for record in records if (record["model"], record["masks"]) == (model, masks)]
        values = {solver: [r["perplexity"] for r in here if r["solver"] == solver] for solver in solvers}
        best = min(values, key=lambda solver: fmean(values[solver]))
        entries = []
        for solver, found in values.items():
            spread = f" ({min(found):.2f}-{max(found):.2f})" if len(found) > 1 else ""
            entry = f"{fmean(found):.2f}"
            entries.append((f"**{entry}**" if solver == best else entry) + spread)
        rows.append([f"{model}, {masks}", f"{here[0]['dense_perplexity']:.2f}", *entries])
    return report.table(["model, masks", "dense", *solvers], rows)


def means(records: Sequence[dict], columns: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """Return each cell's mean perplexity over the seeds, by model and masks."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for key in dict.fromkeys((record["model"], record["masks"]) for record in records):
        here = [record for record in records if (record["model"], record["masks"]) == key]
        cells[key] = {name: fmean(r["perplexity"] for r in here if r["solver"] == name) for name in columns}
    return cells


def standings(records: Sequence[dict], columns: Sequence[str]) -> str:
    """Return a Markdown table: how often each method is lowest, how far behind the lowest it is, and its errors."""
    found = means(records, columns).values()
    rows = []
    for name in columns:
        behind = [cell[name] / min(cell.values()) - 1.0 for cell in found]
        own = [record for record in records if record["solver"] == name]
        figures = ("mean_relative_error", "mean_kept_error", "solve_seconds")
        error, kept, seconds = (fmean(record[figure] for record in own) for figure in figures)
        rows.append(
            [
                name,
                f"{sum(gap == 0 for gap in behind)} of {len(behind)}",
                f"{100 * median(behind):.1f} %",
                f"{100 * max(behind):.1f} %",
                f"{error:.4f}",
                f"{kept:.4f}",
                f"{seconds:.1f}",
            ]
        )
    head = ["method", "lowest in", "behind: median", "most", "mean layer error", "before the update", "seconds"]
    return report.table(head, rows)


def plot(records: Sequence[dict], columns: Sequence[str], path: Path) -> None:
    """Draw each cell's perplexities relative to the lowest."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same file from the same figures
    from matplotlib import pyplot

    cells = means(records, columns)
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(cells) + 1.2), layout="constrained")
    labels = [f"{model}, {masks}" for model, masks in cells]
    for index, name in enumerate(columns):
        ratios = [cell[name] / min(cell.values()) for cell in cells.values()]
        axes.scatter(ratios, labels, s=28, marker="osD^vPX<>*"[index % 10], alpha=0.85, label=name)
    axes.set_xscale("log")
    axes.set_xticks([1.0, 1.1, 1.25, 1.5, 2.0, 3.0], labels=["1", "1.1", "1.25", "1.5", "2", "3"])
    axes.minorticks_off()
    axes.set_xlabel("perplexity over the lowest of the row")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL,CALIBRATION,TEXT")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--solvers", default="magnitude,wanda,ria,sparsefw,one-swap,continuation")
    parser.add_argument("--weights", default="keep")
    parser.add_argument("--propagate", type=lambda text: text.split(","), default=["pruned"])
    parser.add_argument("--name", default="perplexity")
    parser.add_argument("--characters", type=int, help="length of each evaluation text; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--update", action="store_true", help="keep the records of other methods in results/NAME.json")
    parser.add_argument("--only-models", action="store_true", help="leave the demo model out")
    parser.add_argument("--sets", type=parse_sets, default=SETS)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    jobs: list[Job] = []
    if not options.only_models:
        jobs.append(("demo model", MODEL, training_text(800_000), held_out_text(120_000)))
    for triple in options.models:
        folder, calibration, text = triple.split(",")
        jobs.append((Path(folder).name, folder, Path(calibration), Path(text)))
    tasks = [
        joblib.delayed(cell)(job, pattern, sparsity, seed, options)
        for job in jobs
        for pattern, sparsity in options.sets
        for seed in options.seeds
    ]
    records: list[dict] = []
    with Progress() as bar:
        task = bar.add_task("perplexity", total=len(tasks))
        for found in joblib.Parallel(n_jobs=options.jobs, return_as="generator")(tasks):
            records += found
            bar.update(task, advance=1)
    if options.update:

        def key(record: dict) -> tuple:
            return tuple(record[name] for name in ("model", "masks", "seed", "solver"))

        before = json.loads((report.RESULTS / f"{options.name}.json").read_text())["records"]
        fresh = {key(record): record for record in records}
        records = [fresh.pop(key(record), record) for record in before] + list(fresh.values())
    columns = list(dict.fromkeys(record["solver"] for record in records))
    updates = "masks only, no weight updates" if options.weights == "keep" else "surviving weights updated"
    settings = f"{options.samples} calibration windows, seeds {options.seeds}, propagate {options.propagate}."
    text = (
        f"Perplexity on text the model was not calibrated with (lower is better), {updates}; mean over the seeds "
        f"(smallest-largest), the best of each row in bold. {settings}\n\n{summary(records, columns)}\n\n"
        f"{standings(records, columns)}"
    )
    report.write(options.name, "Perplexity of pruned language models", text, {"records": records})
    if options.weights != "keep":
        plot(records, columns, report.RESULTS / f"{options.name}.svg")


if __name__ == "__main__":
    main()
