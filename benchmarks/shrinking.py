"""Perplexity and size of language models that lose neurons and attention heads, by several methods side by side.

    python benchmarks/shrinking.py [MODEL,CALIBRATION,TEXT ...] [--losses 0.2/0,0.3/0.25] [--arms fasp,best:block:free]

Without models the shipped demo model, calibrated and evaluated on this Python's standard library. A loss is a fraction
of the neurons and one of the heads. An arm is a method of maskopt.structured, behind a colon what is fitted anew
(units, layers, block or model), and behind a second one the widths (uniform or free). Every cell shrinks the dense
model anew with the same windows, drawn as by `maskopt shrink`; times are processor time. Writes
benchmarks/results/NAME.{md,json} after every cell; --resume goes on where an interrupted run ended.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import report
from perplexity import Job
from study import Opened, Record, carry_out, parse, words

from maskopt.cli.recover_options import further_windows
from maskopt.models import calibration_batches
from maskopt.shrinking import shrink

ARMS = ["fasp:units", "osscar:units", "best:units", "best:layers", "fasp:block", "best:block", "best:units:free"]
ARMS += ["best:block:free"]

Cell = tuple[str, int, str, str]


def key(record: Record) -> Cell:
    """Return model, seed, loss and arm of a record."""
    return record["model"], record["seed"], record["loss"], record["arm"]


def cells(job: Job, options: argparse.Namespace) -> list[Cell]:
    """Return what is run of a model."""
    return [(job.name, seed, loss, arm) for loss in options.losses for seed in options.seeds for arm in options.arms]


def run(job: Job, todo: Sequence[Cell], options: argparse.Namespace, finished: Any) -> None:
    """Measure cells of one model; call `finished` with the record of each."""
    data = Opened.of(job, options.characters)
    texts = data.texts(options.foreign, options.characters)
    before = {name: data.perplexity(data.model, part) for name, part in texts.items()}
    for name, seed, loss, arm in todo:
        batches = calibration_batches(data.tokenizer, job.calibration, options.samples, data.seqlen, seed=seed)
        method, refit, widths = (*arm.split(":"), "", "")[:3]
        neurons, heads = map(float, loss.split("/"))
        held_out, further = further_windows(batches, None, fits=True)  # used where blocks are fitted
        model = copy.deepcopy(data.model)
        began = time.process_time()
        done = shrink(
            model,
            batches,
            neurons=neurons,
            heads=heads,
            method=method,
            refit=refit or None,  # type: ignore[arg-type]  # checked by it
            widths=widths or "uniform",  # type: ignore[arg-type]
            seed=seed,
            held_out=held_out,
            further=further,
        )
        seconds = time.process_time() - began
        finished(
            {
                "model": name,
                "seed": seed,
                "loss": loss,
                "arm": arm,
                "samples": options.samples,
                "seqlen": data.seqlen,
                "dense": before["perplexity"],
                "dense_foreign": before.get("foreign"),
                **{what: data.perplexity(model, part) for what, part in texts.items()},
                "parameters": done.parameters,
                "cache_bytes": done.cache_bytes,
                "seconds": seconds,
                "chosen": None if done.plan is None else done.plan.details.get("chosen"),
            }
        )


def summary(records: Sequence[Record], arms: Sequence[str], what: str) -> str:
    """Return a table of perplexities, a row for each model and loss."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for record in records:
        groups.setdefault((record["model"], record["loss"]), {}).setdefault(record["arm"], []).append(record)
    rows = []
    for (model, loss), found in groups.items():
        first = next(iter(found.values()))[0]
        size = first["parameters"][1] / first["parameters"][0]
        dense = first["dense" if what == "perplexity" else "dense_foreign"]
        medians = [f"{median(r[what] for r in found[arm]):.3f}" if arm in found else "" for arm in arms]
        rows.append([f"{model}, {loss}", f"{size:.3f}", f"{dense:.3f}", *medians])
    return report.table(["model, neurons/heads", "parameters", "dense", *arms], rows)


def ratios(records: Sequence[Record], arms: Sequence[str], bases: Sequence[str]) -> str:
    """Return the perplexity of each arm over others in the same cells: the median, the largest, and how many."""
    by_cell = {key(record): record["perplexity"] for record in records}

    def over(arm: str, base: str) -> str:
        pairs = [(value, by_cell.get((*cell[:3], base))) for cell, value in by_cell.items() if cell[3] == arm]
        found = [value / other for value, other in pairs if other is not None]
        return f"{median(found):.3f} ({max(found):.3f}, {len(found)})" if found and arm != base else ""

    return report.table(
        ["arm", *(f"over {base}" for base in bases)], [[arm, *(over(arm, b) for b in bases)] for arm in arms]
    )


def write(records: Sequence[Record], options: argparse.Namespace, left: int) -> None:
    """Write the results."""
    arms = [arm for arm in options.arms if any(record["arm"] == arm for record in records)]
    bases = [arm for arm in arms if "free" not in arm]
    parts = [
        "Perplexity on text the model was not calibrated with (lower is better), the median over seeds "
        f"{options.seeds}; {options.samples} windows of at most 512 tokens. Behind a colon what is fitted: units, the "
        "layers that read the remaining units, is what fasp and osscar do as published; blocks, to twice as many other "
        "windows; and *free* widths at equal parameters."
    ]
    if left:
        parts.append(f"Unfinished: {left} cells are still to be run.")
    parts += [summary(records, arms, "perplexity"), "Ratios of perplexities: median over cells (largest, cells)."]
    parts.append(ratios(records, arms, bases))
    if any("foreign" in record for record in records):
        foreign = [record for record in records if "foreign" in record]
        parts += ["Perplexity on text of another kind than the calibration's.", summary(foreign, arms, "foreign")]
    seconds = [
        [model, *(f"{median(found):.0f}" if found else "" for found in (_seconds(records, model, arm) for arm in arms))]
        for model in dict.fromkeys(record["model"] for record in records)
    ]
    parts += ["Seconds of processor time, median.", report.table(["model", *arms], seconds)]
    report.write(options.name, "Smaller dense models", "\n\n".join(parts), {"records": list(records)})


def _seconds(records: Sequence[Record], model: str, arm: str) -> list[float]:
    return [record["seconds"] for record in records if record["model"] == model and record["arm"] == arm]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="number of calibration windows")
    parser.add_argument("--losses", type=words, default=["0.2/0", "0.3/0", "0.5/0", "0.3/0.25"])
    parser.add_argument("--arms", type=words, default=ARMS)
    parser.add_argument("--foreign", type=Path, help="another text on which perplexity is measured")
    carry_out("shrinking", parse(parser, "shrinking"), cells, run, write, key)


if __name__ == "__main__":
    main()
