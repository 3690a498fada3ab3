"""Rules of rounding side by side, on the relaxed solution of Frank-Wolfe.

    python benchmarks/rounding.py [INSTANCE ...] [--rows 96] [--iterations 300] [--seed 0]

Without arguments: one synthetic layer of each family. Every figure is the layer error over that of top-k rounding of
the same point, of the masks themselves and after 1-swaps.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import report
import torch
from torch import Tensor

from maskopt.oracles import NM, PartitionMatroid, PerRow
from maskopt.problems import FAMILIES, Instance, LayerReconstruction, Point, load_instance, synthetic
from maskopt.solvers import Wanda, rounding
from maskopt.solvers.base import Monitor
from maskopt.solvers.one_swap import descend

SETS = {"50 %": PerRow(0.5), "2:4": NM(keep=2, group=4)}


def relaxed(problem: LayerReconstruction, masks: PartitionMatroid, iterations: int) -> tuple[Point, list[Tensor]]:
    """Run SparseFW's iterations; return the last point and all masks that the oracle returned."""
    start = Wanda().run(problem, masks, None, Monitor("benchmark", None, None)).mask
    point, vertices = problem.evaluate(start.to(problem.dtype)), [start]
    for iteration in range(iterations):
        vertex = masks.lmo(point.gradient)
        vertices.append(vertex.bool())
        fraction = torch.full((problem.shape[0], 1), 2.0 / (iteration + 2))
        problem.advance(point, problem.hvp(vertex - point.x), fraction)
    return point, vertices


def rules(
    problem: LayerReconstruction, masks: PartitionMatroid, point: Point, vertices: list[Tensor], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield every rule's mask, top-k first."""
    x = point.x
    product = problem.shifted(problem.diagonal()).gradient(point)
    yield "top-k", rounding.top_k(masks, x)
    for name, gradient in (("gradient", point.gradient), ("curvature", product)):
        for weight in rounding.WEIGHTS[1:]:
            yield f"{name} {weight:g}", rounding.gradient_aware(masks, x, gradient, weight)
        yield f"{name}, best", rounding.best_weight(problem, masks, x, gradient)
    yield "one dependent", rounding.dependent(masks, x, torch.Generator().manual_seed(seed))
    for samples in (16, 64):
        name = f"best of {samples}"
        yield name, rounding.best_of(problem, masks, x, samples, torch.Generator().manual_seed(seed))
    yield "vertices", rounding.best(problem, masks, *vertices)[0]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instances", nargs="*", type=Path)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    layers: dict[str, Instance] = {path.stem: load_instance(path) for path in options.instances}
    layers = layers or {family: synthetic(family, rows=options.rows, d=256, seed=0) for family in FAMILIES}
    head, columns = ["rule"], []
    for layer, instance in layers.items():
        problem = instance.problem().rows(slice(0, options.rows))
        for label, masks in SETS.items():
            point, vertices = relaxed(problem, masks, options.iterations)
            before, after = {}, {}
            for name, mask in rules(problem, masks, point, vertices, options.seed):
                polished = descend(problem, masks, mask, Monitor("benchmark", None, None))[0]
                before[name] = float(problem.objective(mask).sum())
                after[name] = float(problem.objective(polished).sum())
            head += [f"{layer}, {label}", "with 1-swaps"]
            # Layers that can be pruned without any error have no ratios.
            columns += [{name: f"{e / error['top-k']:.4f}" for name, e in error.items()} for error in (before, after)]
    print(report.table(head, [[name, *(column[name] for column in columns)] for name in columns[0]]))


if __name__ == "__main__":
    main()
