"""Layer errors and seconds, every solver and set side by side, through `maskopt compare`.

    python benchmarks/layers.py [INSTANCE ...] [--solvers ...]
    python benchmarks/layers.py [INSTANCE ...] --name joint --solvers continuation --weights keep,lsq,alps,best

Without arguments: layers of the shipped demo model and synthetic ones, 50, 60 and 70 % per row and 2:4. Instances given
are added. Methods of --tune run with every setting of their grid, and the one of lowest error counts, case by case: the
error is what they minimise. Writes benchmarks/results/NAME.{md,json}; the last method is compared with all others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import report
from grids import parse_tuned, specs
from torch import Tensor

from maskopt.demo.corpus import training_text
from maskopt.demo.run import MODEL
from maskopt.models import calibration_batches, load_model, prune
from maskopt.oracles import PartitionMatroid, PerRow
from maskopt.problems import FAMILIES, Instance, LayerReconstruction, Problem, save_instance, synthetic
from maskopt.solvers import Wanda
from maskopt.solvers.base import Monitor, Outcome, Solver, Status

SETS = ["--pattern", "per-row", "--pattern", "2:4", "--sparsity", "0.5", "--sparsity", "0.6", "--sparsity", "0.7"]


@dataclass(frozen=True)
class Recorder(Solver):
    """Records the problems of a model's layers; its masks are Wanda's."""

    row_wise = False
    seen: list[LayerReconstruction] = field(default_factory=list)

    def run(self, problem: Problem, masks: PartitionMatroid, start: Tensor | None, monitor: Monitor) -> Outcome:
        """Record the problem and return Wanda's mask."""
        assert isinstance(problem, LayerReconstruction)
        self.seen.append(problem)
        return Outcome(Wanda().run(problem, masks, start, monitor).mask, Status.GREEDY, 1)


def demo_layers(folder: Path) -> list[Path]:
    """Write the layers of the demo model's fourth block as instances, with the inputs of the dense model."""
    model, tokenizer = load_model(MODEL)
    model.float()
    batches = calibration_batches(tokenizer, training_text(800_000), samples=64, seqlen=512)
    recorder = Recorder()
    outcome = prune(model, batches, PerRow(0.5), recorder, propagate="dense")
    paths = []
    for record, problem in zip(outcome.layers, recorder.seen, strict=True):
        if ".layers.3." in record.name:
            path = folder / f"demo_{record.name.split('.')[-1]}.safetensors"
            facts = {"tokens": str(record.tokens), "origin": f"demo model, {record.name}"}
            save_instance(path, Instance(problem.weight, problem.gram, facts))
            paths.append(path)
    return paths


def synthetic_layers(folder: Path) -> list[Path]:
    """Write one synthetic layer of each family."""
    paths = []
    for family in FAMILIES:
        path = folder / f"synthetic_{family}.safetensors"
        save_instance(path, synthetic(family, rows=192, d=256, seed=0))
        paths.append(path)
    return paths


def at_best(figures: dict[str, Any], methods: list[str], tuned: list[str]) -> None:
    """Replace the results of a method's settings by the best one under the method's name, in place."""
    for row in figures["rows"]:
        results = row["results"]
        for method in methods:
            tried = {setting: results.pop(spec) for setting, spec in specs(method, tuned).items()}
            setting = min(tried, key=lambda name: tried[name]["relative_error"])
            results[method] = tried[setting]
            if len(tried) > 1:
                results[method]["setting"] = setting
                results[method]["tried"] = {name: found["relative_error"] for name, found in tried.items()}


def choices(figures: dict[str, Any], solvers: list[str]) -> str:
    """Return a table of how often each setting is the best one."""
    rows = []
    for solver in solvers:
        found = [row["results"][solver].get("setting") for row in figures["rows"]]
        for setting in figures["rows"][0]["results"][solver].get("tried", ()):
            rows.append([f"{solver}, {setting}", f"{found.count(setting)} of {len(found)}"])
    return report.table(["method", "best in"], rows)


def tables(figures: dict[str, Any], solvers: list[str]) -> str:
    """Return the table of all cells and the summary."""
    lines = []
    for row in figures["rows"]:
        results = row["results"]
        best = min(results[solver]["relative_error"] for solver in solvers)
        entries = []
        for solver in solvers:
            error = results[solver]["relative_error"]
            text = f"**{error:.4f}**" if error == best else f"{error:.4f}"
            entries.append(f"{text} ({results[solver]['seconds']:.2f} s)")
        lines.append([f"{Path(row['instance']).stem}, {row['label']}", *entries])
    cells = report.table(["layer, masks", *solvers], lines)
    ours = solvers[-1]
    ratios = []
    for solver in solvers[:-1]:
        pairs = [(row["results"][ours], row["results"][solver]) for row in figures["rows"]]
        # Where a layer can be pruned without any error there is no ratio.
        errors = [a["relative_error"] / b["relative_error"] for a, b in pairs if b["relative_error"] > 1e-9]
        seconds = [a["seconds"] / b["seconds"] for a, b in pairs]
        ratios.append(
            [solver, f"{median(errors):.3f}", f"{max(errors):.3f}", f"{median(seconds):.2f}", f"{max(seconds):.2f}"]
        )
    head = [f"{ours} relative to", "median error", "largest", "median seconds", "largest"]
    return f"{report.table(head, ratios)}\n\nRelative error (seconds), the best of each row in bold:\n\n{cells}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instances", nargs="*")
    parser.add_argument("--solvers", default="magnitude,wanda,ria,sparsefw,one-swap,continuation")
    parser.add_argument("--weights", default="keep")
    parser.add_argument(
        "--tune", type=parse_tuned, default="ria,sparsefw", help="methods to run at their best settings"
    )
    parser.add_argument("--repeat", default="1")
    parser.add_argument("--name", default="layers")
    options = parser.parse_args()
    methods = options.solvers.split(",")
    # Weights that are fitted afterwards are a method of their own: its defaults.
    tuned = [method for method in methods if method in options.tune and options.weights == "keep"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [*map(str, options.instances), *map(str, demo_layers(folder) + synthetic_layers(folder))]
        output = folder / "figures.json"
        command = [sys.executable, "-m", "maskopt", "compare", *paths, *SETS, "--solvers"]
        command += [",".join(spec for method in methods for spec in specs(method, tuned).values())]
        command += ["--weights", options.weights, "--repeat", options.repeat]
        subprocess.run([*command, "--json", str(output)], check=True)
        figures = json.loads(output.read_text())
    if tuned:
        at_best(figures, methods, tuned)
        del figures["summary"]  # of every setting
    for row in figures["rows"]:
        row["instance"] = Path(row["instance"]).name
    solvers = list(figures["rows"][0]["results"])
    at_their_best = f", {' and '.join(tuned)} with the best of several settings for each case" if tuned else ""
    text = (
        "Relative error ||WX - VX||^2 / ||WX||^2, V = M*W where weights are kept, and seconds (the median of "
        f"{options.repeat}), all methods with their defaults (SparseFW: T = 2000){at_their_best}, one run.\n\n"
        f"{tables(figures, solvers)}"
    )
    if tuned:
        text += f"\n\nSettings:\n\n{choices(figures, solvers)}"
    report.write(options.name, "Layer errors", text, figures)


if __name__ == "__main__":
    main()
