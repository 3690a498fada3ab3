"""Time of branch and bound to prove the best mask of a row, and the distance of the default solver from it.

    python benchmarks/exact.py INSTANCE [INSTANCE ...] [--rows 8] [--inputs 32 48 64 96] [--seconds 300]

First rows of each layer, cut to their first inputs, half kept, one thread. Writes benchmarks/results/exact.{md,json}.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import report
import torch

from maskopt import ContinuationFrankWolfe, LayerReconstruction, PerRow, load_instance, solve
from maskopt.solvers import BranchAndBound


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instances", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--inputs", type=int, nargs="+", default=[32, 48, 64, 96])
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: list[list[str]] = []
    for path in options.instances:
        whole = load_instance(path)
        for d in options.inputs:
            seconds, nodes, proven, optimal, above = [], [], 0, 0, 1.0
            for row in range(options.rows):
                problem = LayerReconstruction(whole.weight[row : row + 1, :d], whole.gram[:d, :d])
                heuristic = solve(problem, PerRow(0.5), ContinuationFrankWolfe()).total
                began = time.perf_counter()
                result = solve(problem, PerRow(0.5), BranchAndBound(row_block_seconds=options.seconds))
                seconds.append(time.perf_counter() - began)
                nodes.append(result.counters["nodes"])
                assert result.lower_bound is not None
                proven += float(result.lower_bound) >= result.total * (1 - 1e-6)
                optimal += heuristic <= result.total * (1 + 1e-6)
                above = max(above, heuristic / result.total)
            table.append(
                [
                    f"{path.stem}, d = {d}",
                    f"{proven} of {options.rows}",
                    f"{median(seconds):.2f}",
                    f"{max(seconds):.2f}",
                    f"{median(nodes):.0f}",
                    f"{optimal} of {options.rows}",
                    f"{above:.3f}",
                ]
            )
            print(*table[-1], flush=True)
    head = ["rows", "proven", "median seconds", "most", "median nodes", "continuation optimal", "worst, of the optimum"]
    report.write("exact", "Branch and bound", "Half of each row kept.\n\n" + report.table(head, table), {"rows": table})


if __name__ == "__main__":
    main()
