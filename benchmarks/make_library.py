"""Make or extend the library of solved instances, and count the optima that each solver finds.

    python benchmarks/make_library.py [--seconds 30] [--fresh]

Rows of the demo model's layers (with the inputs of the dense model) and of synthetic layers, cut to their first d
inputs, d = 12 ... 96, with several sets. Branch and bound proves their optima, or a bound within the time given; masks
and bounds in the library are kept unless better ones are found. Writes problems/library.safetensors and
benchmarks/results/library.{md,json}.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
import torch
from layers import demo_layers
from safetensors.torch import save_file
from torch import Tensor

from maskopt.files import atomic_path
from maskopt.oracles import parse_masks
from maskopt.problems import FAMILIES, Instance, LayerReconstruction, load_instance, synthetic
from maskopt.problems.library import LIBRARY, SolvedInstance, library
from maskopt.solvers import BranchAndBound, ContinuationFrankWolfe, FrankWolfe, OneSwap, SparseFW, Wanda, solve

SIZES = (12, 24, 32, 48, 64, 96)
SETS: tuple[tuple[str, float | None], ...] = (("per-row", 0.5), ("2:4", None), ("per-row", 0.7), ("per-row", 0.3))
HEURISTICS = {
    "continuation + swaps": ContinuationFrankWolfe(),
    "1-swap from Wanda": OneSwap(),
    "SparseFW": SparseFW(),
    "Frank-Wolfe, fully-corrective + swaps": FrankWolfe("fully-corrective", iterations=100),
    "Wanda": Wanda(),
}


def sources() -> Iterator[tuple[str, Instance]]:
    """Yield layers by name."""
    with tempfile.TemporaryDirectory() as folder:
        for path in demo_layers(Path(folder)):
            yield path.stem.replace("_", "-"), load_instance(path)
    for family in FAMILIES:
        yield family, synthetic(family, rows=len(SIZES) * 2, d=96, seed=1)


def cuts() -> Iterator[tuple[str, Instance, str, float | None]]:
    """Yield every instance: two sets for each size of each layer, another row each time."""
    for place, (source, layer) in enumerate(sources()):
        for number, d in enumerate(SIZES):
            for turn in range(2):
                pattern, sparsity = SETS[(place + number + 2 * turn) % len(SETS)]
                row = (2 * number + turn) % len(layer.weight)
                origin = f"{layer.metadata.get('origin', source)}, row {row}, first {d} inputs"
                part = Instance(
                    layer.weight[row : row + 1, :d].float().clone(),
                    layer.gram[:d, :d].float().clone(),
                    {"origin": origin},
                )
                yield (
                    f"{source}-{d}-{pattern}-{'' if sparsity is None else f'{sparsity:g}-'}{row}",
                    part,
                    pattern,
                    sparsity,
                )


def proven(name: str, part: Instance, pattern: str, sparsity: float | None, seconds: float) -> SolvedInstance:
    """Solve an instance within the time given."""
    problem, masks = part.problem(), parse_masks(pattern, sparsity)
    result = solve(problem, masks, BranchAndBound(row_block_seconds=seconds))
    assert result.lower_bound is not None
    bound = float(result.lower_bound)
    return SolvedInstance(name, part, pattern, sparsity, result.mask, result.total, bound, "branch and bound")


def better(one: SolvedInstance, other: SolvedInstance) -> SolvedInstance:
    """Return the better mask and the better bound of two records."""
    mask = one if one.error <= other.error else other
    bound = one if one.bound >= other.bound else other
    return SolvedInstance(
        one.name, one.instance, one.pattern, one.sparsity, mask.mask, mask.error, bound.bound, bound.prover
    )


def write(instances: list[SolvedInstance]) -> None:
    """Write the library atomically."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for one in instances:
        tensors[f"{one.name}.weight"], tensors[f"{one.name}.gram"] = one.instance.weight, one.instance.gram
        tensors[f"{one.name}.mask"] = one.mask
        facts[one.name] = {
            "pattern": one.pattern,
            "sparsity": one.sparsity,
            "error": one.error,
            "bound": one.bound,
            "prover": one.prover,
            "origin": one.instance.metadata["origin"],
        }
    LIBRARY.unlink(missing_ok=True)
    with atomic_path(LIBRARY) as aside:
        save_file(tensors, aside, metadata={"instances": json.dumps(facts)})


def main() -> None:
    """Make, extend, count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--fresh", action="store_true", help="ignore the existing library")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {} if options.fresh or not LIBRARY.is_file() else {one.name: one for one in library()}
    instances: list[SolvedInstance] = []
    for name, part, pattern, sparsity in cuts():
        old = known.get(name)
        new = old if old is not None and old.solved else proven(name, part, pattern, sparsity, options.seconds)
        instances.append(new if old is None else better(old, new))
        print(f"{name}: {new.error:.6g}, proven {new.bound / new.error if new.error else 1.0:.6f}", flush=True)
    figures = {name: count(solver, instances) for name, solver in HEURISTICS.items()}
    write(instances)
    solved = sum(one.solved for one in instances)
    head = ["solver", "optimum found", "median error over optimum", "worst"]
    lines = [
        [name, f"{one['found']} of {solved}", f"{one['median']:.4f}", f"{one['worst']:.3f}"]
        for name, one in figures.items()
    ]
    text = f"{len(instances)} rows of 12 to 96 inputs, {solved} of them proven optimal.\n\n" + report.table(head, lines)
    report.write(
        "library", "Solved instances", text, {"solvers": figures, "solved": solved, "instances": len(instances)}
    )


def count(solver: Any, instances: list[SolvedInstance]) -> dict[str, Any]:
    """Return how often a heuristic finds the proven optimum, and its errors over the optima that are not zero."""
    found, ratios = 0, []
    for one in instances:
        if not one.solved:
            continue
        problem: LayerReconstruction = one.problem()
        error = solve(problem, parse_masks(one.pattern, one.sparsity), solver).total
        found += error <= one.error * (1 + 1e-6) + 1e-12 * float(problem.scale().sum())
        if one.error > 1e-9 * float(problem.scale().sum()):
            ratios.append(error / one.error)
    ordered = sorted(ratios)
    return {"found": int(found), "median": ordered[len(ordered) // 2], "worst": ordered[-1], "ratios": ratios}


if __name__ == "__main__":
    main()
