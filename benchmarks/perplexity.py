"""Perplexity of pruned language models, every solver and set side by side.

    python benchmarks/perplexity.py [MODEL,CALIBRATION,TEXT ...] [--seeds 0,1,2]

Without arguments the shipped demo model, calibrated and evaluated on this Python's standard library. Every solver
sees the same calibration windows; a seed draws other windows. Writes benchmarks/results/perplexity.{md,json}.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import report
from rich.progress import Progress

from maskopt.demo.corpus import held_out_text, training_text
from maskopt.demo.run import MODEL
from maskopt.models import calibration_batches, default_seqlen, load_model, perplexity, prune
from maskopt.oracles import parse_masks
from maskopt.solvers import SOLVERS, make_solver

SETS = "per-row:0.5,per-row:0.6,per-row:0.7,2:4,4:8,unstructured:0.6"


def cells(name: str, model_path: str | Path, calibration: str | Path, text: str | Path, options: Any) -> Iterator[dict]:
    """Yield one record per set, solver and seed."""
    dense, tokenizer = load_model(model_path)
    dense.float()
    seqlen = default_seqlen(dense, tokenizer, at_most=512)
    before = perplexity(dense, tokenizer, text, seqlen=seqlen)
    for pattern, sparsity in options.sets:
        masks = parse_masks(pattern, sparsity)
        label = pattern if sparsity is None else f"{pattern} {100 * sparsity:g} %"
        for seed in options.seeds:
            batches = calibration_batches(tokenizer, calibration, samples=options.samples, seqlen=seqlen, seed=seed)
            for solver in options.solvers:
                pruned = copy.deepcopy(dense)
                result = prune(pruned, batches, masks, make_solver(solver))
                yield {
                    "model": name,
                    "masks": label,
                    "seed": seed,
                    "solver": solver,
                    "perplexity": perplexity(pruned, tokenizer, text, seqlen=seqlen).perplexity,
                    "dense_perplexity": before.perplexity,
                    "tokens": before.tokens,
                    "calibration": {**batches.to_json(), "source": Path(batches.source).name},
                    "mean_relative_error": result.mean_relative_error,
                    "solve_seconds": result.solve_seconds,
                }


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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL,CALIBRATION,TEXT")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--solvers", type=lambda text: text.split(","), default=list(SOLVERS))
    parser.add_argument("--sets", type=parse_sets, default=SETS)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    jobs: list[tuple[str, str | Path, str | Path, str | Path]] = [
        ("demo model", MODEL, training_text(800_000), held_out_text(120_000))
    ]
    for triple in options.models:
        folder, calibration, text = triple.split(",")
        jobs.append((Path(folder).name, folder, Path(calibration), Path(text)))
    records = []
    with Progress() as bar:
        task = bar.add_task(
            "perplexity", total=len(jobs) * len(options.sets) * len(options.seeds) * len(options.solvers)
        )
        for job in jobs:
            for record in cells(*job, options):
                records.append(record)
                bar.update(task, advance=1, description=f"{record['model']}, {record['masks']}, {record['solver']}")
    settings = f"{options.samples} calibration windows, seeds {options.seeds}, pruned activations propagated."
    text = (
        "Perplexity on text the model was not calibrated with (lower is better), masks only, no weight updates; the "
        f"best of each row in bold. {settings}\n\n{summary(records, options.solvers)}"
    )
    report.write("perplexity", "Perplexity of pruned language models", text, {"records": records})


if __name__ == "__main__":
    main()
