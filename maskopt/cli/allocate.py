"""`maskopt allocate`: how sparse each layer of a language model should be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskopt.cli.figure import check_figure, draw_plan
from maskopt.cli.options import (
    CORRECTION,
    RULE_NAMES,
    BatchOption,
    CacheOption,
    CalibrationOption,
    CorrectionOption,
    DeviceOption,
    ExcludeOption,
    FixedOption,
    IncludeOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    PatternOption,
    PlotOption,
    PropagateOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    SettingsOption,
    SolverOption,
    SparsityOption,
    Target,
    TargetOption,
    TogetherOption,
    WeightsOption,
    check_correction,
    check_device,
    check_seqlen,
    parse_fixed,
    parse_masks,
    parse_memory,
    parse_together,
    require_file,
    require_transformers,
)
from maskopt.cli.output import Bar, check_outputs, environment, facts, json_output, tables
from maskopt.cli.solvers import parse_weights
from maskopt.cli.words import duration, named_table
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from rich.table import Table

    from maskopt.allocation import Plan
    from maskopt.models import AllocationProgress

__all__ = ["allocate", "divergence_lines", "mean_sparsity", "read_plan", "show_allocation"]


def allocate(
    model: ModelArgument,
    calibration: CalibrationOption,
    out: Annotated[Path, typer.Option("--out", metavar="PLAN", help="New JSON file: the sparsity of each layer.")],
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    allocation: Annotated[
        str, typer.Option("--allocation", metavar="RULE", help=f"One of {', '.join(RULE_NAMES)}.")
    ] = "auto",
    sparsity_of: FixedOption = None,
    together: TogetherOption = None,
    solver: SolverOption = None,
    weights: WeightsOption = None,
    option: SettingsOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    propagate: PropagateOption = None,
    correction: CorrectionOption = CORRECTION,
    target: TargetOption = Target.STREAM,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    plot: PlotOption = None,
    cache: CacheOption = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Choose how sparse each layer shall be, for `prune --allocation PLAN`, and leave the model as it is."""
    began = time.perf_counter()
    check_outputs(json, out, plot)
    if plot is not None:
        check_figure(plot)
    if allocation not in RULE_NAMES:
        raise MaskoptError(f"There is no rule {allocation!r}; choose one of {', '.join(RULE_NAMES)}.")
    method = parse_weights(weights or ("best" if solver is None else "keep"), solver, option or ())
    check_correction(propagate, method.corrects, correction, target)
    mean, fixed, working = mean_sparsity(pattern, sparsity), parse_fixed(sparsity_of), parse_memory(memory)
    groups = parse_together(together)
    require_file("calibration text", calibration)
    check_device(device)
    require_transformers()
    from maskopt import models

    with Bar(quiet, "loading the model") as bar:
        corpus = models.read_text(calibration)
        network, tokenizer = models.load_model(model, device=device)
        length = check_seqlen(network, tokenizer, seqlen)
        batches = models.calibration_batches(tokenizer, corpus, samples, length, batch_size, seed)
        shapes = {
            layer.name: layer.shape for layer in models.select_layers(network, include or (), exclude or ()).layers
        }
        plan = models.allocate(
            network,
            batches,
            pattern,
            mean,
            method,
            rule=allocation,  # type: ignore[arg-type]  # checked above
            fixed=fixed,
            together=groups,
            propagate=None if propagate is None else propagate.value,
            correction=correction,
            target=target.value,
            include=include or (),
            exclude=exclude or (),
            seed=seed,
            memory=working,
            progress=show_allocation(bar),
            cache=cache,
        )
    seconds = time.perf_counter() - began
    figures: dict[str, Any] = {
        **plan.to_json(),
        "sparsity": plan.sparsity(shapes),
        "weights": sum(rows * columns for rows, columns in shapes.values()),
        "kept": plan.kept(shapes),
        "calibration": batches.to_json(),
        "seconds": seconds,
        "versions": environment(),
    }
    with json_output(json, figures):
        if plot is not None:
            draw_plan(dict(plan.sparsities), plot, f"{model}: {plan.rule}, {pattern}")
        plan.save(out)
    console = tables(json)
    console.print(plan_table(plan, shapes, console.width))
    lines = {
        "pruned": f"{100 * figures['sparsity']:.4f} % of {figures['weights']} weights in {len(shapes)} layers",
        "rule": plan.rule + (f", chosen: {plan.details['chosen']}" if "chosen" in plan.details else ""),
        **divergence_lines(plan),
        "time": duration(seconds),
        "saved in": str(out),
    }
    console.print(facts(lines))


def mean_sparsity(pattern: str, sparsity: float | None) -> float:
    """Return the fraction of all weights to prune: what the user says, or else what the pattern n:m says.

    Of n:m every layer gets its own n, so that the mean may be another.

    Raises
    ------
    MaskoptError
        If there is no such pattern, or nothing says the sparsity.
    """
    parse_masks(pattern, None if ":" in pattern else sparsity)
    if sparsity is not None:
        return sparsity
    keep, group = pattern.rpartition("-")[2].split(":")
    return 1 - int(keep) / int(group)


def show_allocation(bar: Bar) -> Any:
    """Return a function that shows an `AllocationProgress` on a bar; None where the bar is invisible."""
    if not bar.visible:
        return None

    def show(event: AllocationProgress) -> None:
        bar.tell(event.stage, event.fraction)

    return show


def divergence_lines(plan: Plan) -> dict[str, str]:
    """Return a line with what the candidates of a plan lost in trials, if there were any."""
    losses = plan.details.get("divergence")
    if not losses:
        return {}
    words = ", ".join(f"{loss:.4f} {name}" for name, loss in losses.items())
    return {"divergence in trials": f"{words} (nats per token, other sequences)"}


def plan_table(plan: Plan, shapes: dict[str, tuple[int, int]], width: int) -> Table:
    """Return a table of layers and their sparsities."""
    names: Sequence[str] = list(shapes)
    columns = {
        "shape": [f"{rows} x {columns}" for rows, columns in shapes.values()],
        "sparsity": [f"{plan.sparsities[name]:.4f}" for name in names],
    }
    return named_table("", "layer", names, columns, width)


def read_plan(allocation: str, pattern: str, sparsity: float | None, fixed: dict[str, float]) -> Plan | None:
    """Return the plan of a file; None where `allocation` is a rule.

    Raises
    ------
    MaskoptError
        If it is neither, or other options say what the plan says.
    """
    if allocation in RULE_NAMES:
        return None
    if not Path(allocation).is_file():
        raise MaskoptError(
            f"--allocation {allocation} is neither a file nor a rule; the rules are {', '.join(RULE_NAMES)}."
        )
    from maskopt.allocation import load_plan

    plan = load_plan(allocation)
    if sparsity is not None or fixed:
        raise MaskoptError(f"The plan {allocation} says the sparsities; leave --sparsity and --sparsity-of out.")
    if pattern not in ("per-row", plan.pattern):
        raise MaskoptError(f"The plan {allocation} is for {plan.patterns}, not {pattern}; leave --pattern out.")
    return plan
