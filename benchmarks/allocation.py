"""Perplexity of pruned language models at one mean sparsity, with every rule for the sparsity of layers.

    python benchmarks/allocation.py [MODEL,CALIBRATION,TEXT ...] [--sparsities 0.6,0.7] [--methods best,wanda]
    python benchmarks/allocation.py [...] --rules uniform,owl,dlp,alpha,lsa,atp,evo,kl,fisher,auto --seeds 0,1

Without models the shipped demo model, calibrated and evaluated on this Python's standard library. A method is a
solver (`wanda`), with a method of updating weights behind a plus (`wanda+sparsegpt`), or the latter alone (`best`).
All rules see the same calibration windows and prune with all of them; a seed draws other windows. Writes
benchmarks/results/NAME.{md,json} after every cell; --resume goes on where an interrupted run ended.
"""

import argparse
import copy
import re
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import report
from perplexity import Job
from study import Opened, Record, carry_out, fractions, parse, words

from maskopt.cli.solvers import parse_weights
from maskopt.models import CORRECTION, RULES, allocate, calibration_batches, prune
from maskopt.oracles import parse_masks
from maskopt.solvers import Solver


def key(record: Record) -> tuple[Any, ...]:
    """Return model, seed, method, sparsity and rule of a record."""
    return record["model"], record["seed"], record["method"], record["sparsity"], record["rule"]


def solver_of(method: str) -> Solver:
    """Return the solver of a method, such as best, wanda or wanda+sparsegpt."""
    solver, plus, weights = method.partition("+")
    if plus:
        return parse_weights(weights, solver, ())
    joint = solver in ("best", "sparsegpt", "admm", "alps", "fista")
    return parse_weights(solver, None, ()) if joint else parse_weights("keep", solver, ())


def cells(job: Job, options: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Return seed, method, sparsity and rule of what is run of a model."""
    return [
        (job.name, seed, method, sparsity, rule)
        for seed in options.seeds
        for method in options.methods
        for sparsity in options.sparsities
        for rule in options.rules
    ]


def run(job: Job, todo: Sequence[tuple[Any, ...]], options: argparse.Namespace, finished: Any) -> None:
    """Measure cells of one model; call `finished` with the record of each."""
    data = Opened.of(job, options.characters)
    dense, tokenizer, seqlen = data.model, data.tokenizer, data.seqlen
    before = data.perplexity(dense)
    draws = {
        seed: calibration_batches(
            tokenizer, job.calibration, options.samples, seqlen, batch_size=options.batch_size, seed=seed
        )
        for seed in dict.fromkeys(seed for _, seed, *_ in todo)
    }
    for _, seed, method, sparsity, rule in todo:
        batches = draws[seed]
        solver = solver_of(method)
        began = time.process_time()
        how = {"correction": options.correction}
        plan = (
            None if rule == "uniform" else allocate(dense, batches, options.pattern, sparsity, solver, rule=rule, **how)
        )
        allocated = time.process_time() - began
        model = copy.deepcopy(dense)
        began = time.process_time()
        done = prune(model, batches, parse_masks(options.pattern, sparsity) if plan is None else plan, solver, **how)
        pruned = time.process_time() - began
        finished(
            {
                "model": job.name,
                "seed": seed,
                "method": method,
                "sparsity": sparsity,
                "rule": rule,
                "samples": options.samples,
                "seqlen": seqlen,
                "reached": done.sparsity,
                "dense": before,
                "perplexity": data.perplexity(model),
                "allocation_seconds": allocated,
                "pruning_seconds": pruned,
                "details": {} if plan is None else dict(plan.details),
                "sparsities": {} if plan is None else dict(plan.sparsities),
            }
        )


def summary(records: Sequence[Record], rules: Sequence[str]) -> str:
    """Return a table of perplexities over uniform's, a row for each model, method and sparsity."""
    groups: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for record in records:
        key = record["model"], record["method"], record["sparsity"], record["dense"]
        groups.setdefault(key, {}).setdefault(record["rule"], []).append(record["perplexity"])
    rows = []
    for (model, method, sparsity, dense), values in groups.items():
        least = min(fmean(found) for found in values.values())
        row = [f"{model}, {method}, {100 * sparsity:g} %", f"{dense:.2f}"]
        for rule in rules:
            found = values.get(rule)
            cell = "" if found is None else f"{fmean(found):.2f}"
            row.append(f"**{cell}**" if found is not None and fmean(found) == least else cell)
        rows.append(row)
    return report.table(["model, method, mean sparsity", "dense", *rules], rows)


def ratios(records: Sequence[Record], rules: Sequence[str]) -> str:
    """Return, for each method and sparsity, each rule's median perplexity over uniform's, and the largest."""
    pairs: dict[tuple[str, float, str], list[float]] = {}
    by_place = {(r["model"], r["seed"], r["method"], r["sparsity"], r["rule"]): r["perplexity"] for r in records}
    for (model, seed, method, sparsity, rule), value in by_place.items():
        base = by_place.get((model, seed, method, sparsity, "uniform"))
        if base is not None and rule != "uniform":
            pairs.setdefault((method, sparsity, rule), []).append(value / base)
    lines = list(dict.fromkeys((method, sparsity) for method, sparsity, _ in pairs))
    rows = []
    for method, sparsity in lines:
        row = [f"{method}, {100 * sparsity:g} %"]
        for rule in rules[1:]:
            found = pairs.get((method, sparsity, rule))
            row.append("" if not found else f"{median(found):.3f} ({max(found):.3f})")
        rows.append(row)
    return report.table(["method, mean sparsity", *rules[1:]], rows)


def costs(records: Sequence[Record], rules: Sequence[str]) -> str:
    """Return the median time of allocating over that of pruning with uniform sparsity, for each model and method."""
    base = {
        (r["model"], r["seed"], r["method"], r["sparsity"]): r["pruning_seconds"]
        for r in records
        if r["rule"] == "uniform"
    }
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for r in records:
        whole = base.get((r["model"], r["seed"], r["method"], r["sparsity"]))
        if whole is not None and r["rule"] != "uniform":
            line = found.setdefault((r["model"], r["method"]), {})
            line.setdefault(r["rule"], []).append(r["allocation_seconds"] / whole)
    rows = [
        [f"{model}, {method}", *(f"{median(values[rule]):.2f}" if rule in values else "" for rule in rules[1:])]
        for (model, method), values in found.items()
    ]
    return report.table(["model, method", *rules[1:]], rows)


def depths(records: Sequence[Record], rules: Sequence[str]) -> str:
    """Return how much sparser than the mean each rule makes the first and the last third of the blocks, in points."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        blocks: dict[int, list[float]] = {}
        for name, sparsity in record["sparsities"].items():
            number = re.search(r"\.(\d+)\.", name)
            if number:
                blocks.setdefault(int(number[1]), []).append(sparsity - record["sparsity"])
        if blocks:
            means = [fmean(blocks[index]) for index in sorted(blocks)]
            third = max(1, len(means) // 3)
            line = found.setdefault(record["method"], {})
            line.setdefault(record["rule"], []).append((fmean(means[:third]), fmean(means[-third:])))
    rows = []
    for method, values in found.items():
        row = [method]
        for rule in rules[1:]:
            ends = values.get(rule)
            first, last = ([100 * fmean(part) for part in zip(*ends, strict=True)]) if ends else (0.0, 0.0)
            row.append(f"{first:+.1f} / {last:+.1f}" if ends else "")
        rows.append(row)
    return report.table(["method", *rules[1:]], rows)


def write(records: Sequence[Record], options: argparse.Namespace, left: int) -> None:
    """Write the results."""
    rules: list[str] = [rule for rule in RULES if any(record["rule"] == rule for record in records)]
    rules = ["uniform", *(rule for rule in rules if rule not in ("uniform", "auto")), *(["auto"] * ("auto" in rules))]
    parts = [
        "Perplexity on text the model was not calibrated with (lower is better), the mean over seeds; best of each row "
        f"in bold. Masks {options.pattern}, {options.samples} calibration windows, seeds {options.seeds}."
    ]
    if left:
        parts.append(f"Unfinished: {left} cells are still to be run.")
    parts += [summary(records, rules), "Over uniform sparsity: median over models and seeds (largest)."]
    parts += [
        ratios(records, rules),
        "Processor time of the allocation over that of pruning, median.",
        costs(records, rules),
        "Sparsity of the first and of the last third of the blocks, less the mean, in percentage points.",
        depths(records, rules),
    ]
    report.write(options.name, "How sparse each layer should be", "\n\n".join(parts), {"records": list(records)})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=fractions, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--methods", type=words, default=["best", "wanda"])
    parser.add_argument("--rules", type=words, default=list(RULES))
    parser.add_argument("--pattern", default="per-row")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of at most 512 tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--correction", type=float, default=CORRECTION, help="strength, where errors are corrected")
    carry_out("allocation", parse(parser, "allocation"), cells, run, write, key)


if __name__ == "__main__":
    main()
