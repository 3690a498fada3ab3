"""Frank-Wolfe directions side by side: iterations, vertices and seconds to a given gap.

    python benchmarks/directions.py [INSTANCE ...] [--seeds 12] [--rows 96] [--limit 2000]

Two tables. The experiment of the literature: one row of n = 60, k = 24, f(x) = x^T Q x + <c, x> with 2 Q = A^T A / n,
A and c standard normal, exact steps, until the gap is 1e-8. And the relaxation of layers (a synthetic one and all
instances given, first rows), per row 50 %, until every row's gap is 1e-4 of its error of pruning everything. Writes
benchmarks/results/directions.{md,json}.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import report
import torch

from maskopt.oracles import PerRow
from maskopt.problems import Problem, QuadraticForm, load_instance, synthetic
from maskopt.solvers import DIRECTIONS, DirectionRule, ExactStep, FrankWolfe, IterationState, Status, frank_wolfe, solve
from maskopt.solvers.base import Monitor
from maskopt.solvers.frank_wolfe import DirectionName

N, KEEP, GAP, LIMIT = 60, 24, 1e-8, 6000


def instance(seed: int) -> QuadraticForm:
    """Return the random convex quadratic of a seed."""
    random = np.random.default_rng(seed)
    factor, linear = random.standard_normal((N, N)), random.standard_normal((1, N))
    return QuadraticForm(torch.from_numpy(factor.T @ factor / (2 * N)), torch.from_numpy(linear))


def experiment(name: DirectionName, problem: Problem) -> dict[str, Any]:
    """Run one direction rule until its gap is `GAP`."""
    masks, rule = PerRow(KEEP), DIRECTIONS[name]()
    start = masks.center(problem.shape, problem.dtype, problem.device)
    if rule.from_vertex:
        start = masks.lmo(problem.evaluate(start).gradient)
    runs: list[DirectionRule] = []

    class Recorded(type(rule)):  # type: ignore[misc]
        """The rule, with a reference to its run, whose vertices are counted."""

        def begin(self, state: IterationState) -> DirectionRule:
            runs.append(super().begin(state))
            return runs[0]

    began = time.perf_counter()
    loop_result = frank_wolfe(
        lambda _: problem,
        masks,
        start,
        direction=Recorded(**vars(rule)),
        step=ExactStep(),
        iterations=LIMIT,
        monitor=Monitor("benchmark", None, None),
        tolerance=torch.full((1,), GAP, dtype=torch.float64),
        refresh=100,
    )
    atoms = getattr(runs[0], "atoms", None)
    return {
        "iterations": loop_result.iterations,
        "converged": loop_result.converged,
        "vertices": None if atoms is None else int(atoms.active),
        "seconds": time.perf_counter() - began,
    }


def relaxation(name: DirectionName, problem: Problem, limit: int) -> dict[str, Any]:
    """Solve a layer's relaxation with one direction rule."""
    solver = FrankWolfe(name, iterations=limit, relative_gap=1e-4, polish=False)
    result = solve(problem, PerRow(0.5), solver)
    scale = float(result.scale.sum())
    assert result.lower_bound is not None
    return {
        "converged": result.status is Status.CONVERGED,
        "iterations": result.iterations,
        "seconds": result.seconds,
        "bound": float(result.lower_bound.sum()) / scale,
        "rounded": result.total / scale,
    }


def main() -> None:
    """Run both tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instances", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--limit", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    exact = [name for name in DIRECTIONS if name not in ("momentum", "stochastic")]  # the others need open-loop steps
    runs = {name: [experiment(name, instance(seed)) for seed in range(options.seeds)] for name in exact}
    head = ["direction", "solved", "median iterations", "most", "vertices", "ms per iteration"]
    lines = []
    for name, all_runs in runs.items():
        counts = [run["iterations"] for run in all_runs]
        vertices = [run["vertices"] for run in all_runs if run["vertices"] is not None]
        each = median(1e3 * run["seconds"] / max(1, run["iterations"]) for run in all_runs)
        lines.append(
            [
                name,
                f"{sum(run['converged'] for run in all_runs)} of {len(all_runs)}",
                f"{median(counts):.0f}",
                str(max(counts)),
                f"{median(vertices):.0f}" if vertices and name != "lazy" else "",
                f"{each:.2f}",
            ]
        )
    text = f"n = {N}, k = {KEEP}, gap {GAP:g}, at most {LIMIT} iterations, {options.seeds} seeds\n\n"
    text += report.table(head, lines)
    problems = {"synthetic correlated": synthetic("correlated", rows=options.rows, d=256).problem()}
    for path in options.instances:
        problems[path.stem] = load_instance(path).problem().rows(slice(0, options.rows))
    layers: dict[str, dict[str, Any]] = {}
    for label, problem in problems.items():
        print(f"{label}: {problem.shape[0]} x {problem.shape[1]}")
        layers[label] = {name: relaxation(name, problem, options.limit) for name in DIRECTIONS}
        head = ["direction", "all rows solved", "iterations", "seconds", "proven bound", "best mask found"]
        lines = [
            [
                name,
                "yes" if run["converged"] else "no",
                str(run["iterations"]),
                f"{run['seconds']:.2f}",
                f"{run['bound']:.5f}",
                f"{run['rounded']:.5f}",
            ]
            for name, run in layers[label].items()
        ]
        text += f"\n\n## {label}, {problem.shape[0]} x {problem.shape[1]}, per row 50 %, float32\n\n"
        text += report.table(head, lines)
    report.write("directions", "Frank-Wolfe directions", text, {"experiment": runs, "layers": layers})


if __name__ == "__main__":
    main()
