"""`maskopt prune`: a whole language model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from maskopt.cli.evaluate import measure
from maskopt.cli.options import (
    WEIGHTS_HELP,
    BatchOption,
    DeviceOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    PatternOption,
    QuietOption,
    SeqlenOption,
    SettingsOption,
    SolverOption,
    SparsityOption,
    check_device,
    check_seqlen,
    parse_memory,
    require_file,
    require_transformers,
)
from maskopt.cli.output import Bar, check_outputs, environment, facts, finite, json_output, tables
from maskopt.cli.solvers import parse_weights
from maskopt.oracles import parse_masks

__all__ = ["prune"]


class Propagate(StrEnum):
    """What later blocks are calibrated on."""

    CORRECTED = "corrected"
    PRUNED = "pruned"
    DENSE = "dense"


class Certify(StrEnum):
    """Which lower bound."""

    SHIFT = "shift"
    SDP = "sdp"
    CUTS = "cuts"


def prune(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make, for model, masks and report.")],
    calibration: Annotated[Path, typer.Option("--calibration", help="Text, or JSONL with a field `text`.")],
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    solver: SolverOption = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help=WEIGHTS_HELP, show_default="best, or keep where --solver is given")
    ] = None,
    option: SettingsOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")] = 128,
    seqlen: SeqlenOption = None,
    batch_size: BatchOption = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of calibration windows.")] = 0,
    propagate: Annotated[
        Propagate | None,
        typer.Option(
            "--propagate",
            help="Calibrate on the pruned or the dense model's states, or aim at the latter on the former.",
            show_default="corrected for continuation, lsq, fista and best, else pruned",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="Prune only layers of such names; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Leave such layers dense; may be repeated.")
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option("--evaluate", help="Text to measure perplexity on before and after.")
    ] = None,
    certify: Annotated[
        Certify | None,
        typer.Option("--certify", help="Prove how good any mask could be, layer by layer; takes longer than pruning."),
    ] = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Prune a language model and save it."""
    check_outputs(json, out)
    treatment = weights or ("best" if solver is None and certify is None else "keep")
    method = parse_weights(treatment, solver, option or ())
    masks, working = parse_masks(pattern, sparsity), parse_memory(memory)
    require_file("calibration text", calibration)
    if evaluate is not None:
        require_file("evaluation text", evaluate)
    check_device(device)
    require_transformers()
    from maskopt import models

    with Bar(quiet, "loading the model") as bar:
        corpus = models.read_text(calibration)
        texts = {} if evaluate is None else {"evaluation": models.read_text(evaluate)}
        network, tokenizer = models.load_model(model, device=device)
        length = check_seqlen(network, tokenizer, seqlen)
        batches = models.calibration_batches(tokenizer, corpus, samples, length, batch_size, seed)
        if network.can_generate():
            # As much text as is calibrated on, at four characters a token, and surely one window.
            texts["calibration"] = corpus.opening(max(4 * samples, 32) * length)

        def perplexities(when: str) -> dict[str, models.Perplexity]:
            return {
                name: measure(bar, f"{when} perplexity, {name} text", network, tokenizer, part, length)
                for name, part in texts.items()
            }

        def show(at: models.Progress) -> None:
            bar.tell(f"{at.stage} {at.name}", (at.done + at.fraction) / at.total)

        dense = perplexities("dense")
        bar.stage("calibrate")
        report = models.prune(
            network,
            batches,
            masks,
            method,
            propagate=None if propagate is None else propagate.value,
            include=include or (),
            exclude=exclude or (),
            certify=None if certify is None else certify.value,
            memory=working,
            progress=show if bar.visible else None,
            on_error="keep",  # the program discards the model
        )
        pruned = perplexities("pruned")
    extra = {
        "calibration": batches.to_json(),
        "perplexity": {name: {"dense": dense[name].to_json(), "pruned": pruned[name].to_json()} for name in texts},
        "command": {
            "model": model,
            "out": str(out),
            "pattern": pattern,
            "sparsity": sparsity,
            "weights": treatment,
            "batch_size": batch_size,
            "device": device,
            "memory": working,
        },
        "versions": environment(),
    }
    figures = {**report.to_json(), **extra}
    with json_output(json, figures):
        models.save_pruned(out, network, tokenizer, report, finite(extra))
    console = tables(json)
    console.print(_layers(figures["layers"]))
    console.print(facts(_summary(figures, out)))


def _layers(layers: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer")
    moved = any(layer["kept_error"] != layer["relative_error"] for layer in layers)
    certified = any(layer["lower_bound"] is not None for layer in layers)
    for name in (
        "shape",
        "sparsity",
        *(("before",) if moved else ()),
        "relative error",
        *(("proven",) if certified else ()),
        "seconds",
        "status",
    ):
        table.add_column(name, justify="right")
    for layer in layers:
        table.add_row(
            Text(layer["name"]),
            f"{layer['rows']} x {layer['columns']}",
            f"{layer['sparsity']:.3f}",
            *((f"{layer['kept_error']:.5f}",) if moved else ()),
            f"{layer['relative_error']:.5f}",
            *((_proven(layer),) if certified else ()),
            f"{layer['seconds']:.2f}",
            layer["status"].lower().replace("_", " "),
        )
    return table


def _proven(layer: dict[str, Any]) -> str:
    """Return which fraction of a layer's error no mask can avoid."""
    if layer["lower_bound"] is None:
        return ""
    return f"{layer['lower_bound'] / layer['objective']:.3f}" if layer["objective"] > 0 else "1.000"


def _summary(figures: dict[str, Any], out: Path) -> dict[str, str]:
    fraction = f"{100 * figures['sparsity']:.2f} %"
    lines = {
        "pruned": f"{fraction} of {figures['weights']} weights in {len(figures['layers'])} layers",
        "relative error": f"median {figures['median_relative_error']:.5f}, mean {figures['mean_relative_error']:.5f}",
        "time": f"{figures['calibration_seconds']:.1f} s calibrating, {figures['solve_seconds']:.1f} s solving",
    }
    for name, values in figures["perplexity"].items():
        dense, pruned = values["dense"], values["pruned"]
        lines[f"perplexity, {name} text"] = (
            f"{dense['perplexity']:.3f} dense, {pruned['perplexity']:.3f} pruned ({dense['tokens']} tokens)"
        )
    return {**lines, "saved in": str(out)}
