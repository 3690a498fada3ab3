"""`maskopt solve`: choose the mask of one layer."""

from pathlib import Path
from typing import Annotated, Any

import typer

from maskopt.cli.layer import load_layer
from maskopt.cli.mask_file import load_mask, mask_bytes
from maskopt.cli.options import (
    WEIGHTS_HELP,
    DeviceOption,
    InstanceArgument,
    JsonOption,
    MemoryOption,
    PatternOption,
    QuietOption,
    SettingsOption,
    SolverOption,
    SparsityOption,
    check_device,
    parse_masks,
    parse_memory,
)
from maskopt.cli.output import Bar, check_outputs, environment, facts, json_output, tables
from maskopt.cli.solvers import parse_weights
from maskopt.cli.words import masks_words, solver_words
from maskopt.errors import MaskoptError
from maskopt.files import atomic_path

__all__ = ["solve"]


def solve(
    instance: InstanceArgument,
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    solver: SolverOption = None,
    weights: Annotated[str, typer.Option("--weights", help=WEIGHTS_HELP)] = "keep",
    option: SettingsOption = None,
    start: Annotated[
        Path | None, typer.Option("--start", help="Mask file to start from, for solvers that improve a given mask.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Write the mask, and the weights where they are updated, to a new safetensors file."
        ),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", help="Seconds after which the solver returns its best mask so far.")
    ] = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Choose the mask of one layer, and update the surviving weights if --weights says so."""
    check_outputs(json, out)
    from maskopt.solvers import solve as solve_problem

    name = solver or ("continuation" if weights.startswith("keep") else weights)
    masks, method = parse_masks(pattern, sparsity), parse_weights(weights, solver, option or ())
    if start is not None and method.start is None:
        raise MaskoptError(f"The solver {name} does not start from a mask; leave --start out.")
    first = None if start is None else load_mask(start)
    working = parse_memory(memory)
    layer, problem = load_layer(instance, check_device(device))
    with Bar(quiet) as bar:
        result = solve_problem(
            problem,
            masks,
            method,
            start=first,
            callback=bar.step(name),
            time_limit=time_limit,
            memory=working,
        )
    settings = {
        "instance": str(instance),
        "metadata": dict(layer.metadata),
        "rows": problem.shape[0],
        "columns": problem.shape[1],
        "pattern": pattern,
        "masks": repr(masks),
        "solver": repr(method),
        "weights": weights,
        "start": None if start is None else str(start),
        "time_limit": time_limit,
        "device": device,
        "memory": working,
    }
    figures = {**result.to_dict(), "settings": settings, "versions": environment()}
    with json_output(json, figures):
        if out is not None:
            with atomic_path(out) as aside:
                aside.write_bytes(mask_bytes(result.mask, figures, result.weight))
    words = {"masks": masks_words(pattern, sparsity, masks, [problem.shape]), "solver": solver_words(method)}
    tables(json).print(facts(_lines(figures, words, out)))


def _lines(figures: dict[str, Any], words: dict[str, str], out: Path | None) -> dict[str, str]:
    settings, bound = figures["settings"], figures["lower_bound"]
    lines = {
        "layer": f"{settings['instance']}, {settings['rows']} x {settings['columns']}",
        **words,
        "relative error": _errors(figures),
        "objective": f"{figures['objective']:.6g}",
        "lower bound": "none" if bound is None else f"{bound:.6g} ({figures['gap_kind'].lower()})",
        "sparsity": f"{figures['sparsity']:.4f}",
        "time": f"{figures['seconds']:.2f} s, {figures['iterations']} iterations",
        "status": figures["status_text"],
    }
    return lines if out is None else {**lines, "mask": str(out)}


def _errors(figures: dict[str, Any]) -> str:
    after, before = figures["relative_error"], figures["kept_error"]
    updated = figures["settings"]["weights"] != "keep"
    return f"{after:.6g}" + (f" ({before:.6g} with the weights as they were)" if updated else "")
