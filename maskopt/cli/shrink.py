"""`maskopt shrink`: make a language model smaller by removing neurons and attention heads."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.options import (
    BatchOption,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    QuietOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    check_device,
    check_seqlen,
    parse_memory,
    require_file,
    require_transformers,
)
from maskopt.cli.output import (
    Bar,
    check_outputs,
    environment,
    facts,
    finite,
    json_output,
    show_evaluation,
    tables,
)
from maskopt.cli.recover import recovery_lines
from maskopt.cli.recover_options import HeldOutOption, further_windows
from maskopt.cli.words import duration, named_table

if TYPE_CHECKING:
    from maskopt.models import Perplexity
    from maskopt.shrinking import ShrinkReport

__all__ = ["shrink"]

METHODS = ("best", "osscar", "fasp", "spap", "newton", "flap", "magnitude", "random")
"""Names of `maskopt.structured.STRUCTURED`, written out because its import takes seconds."""
_BATCHES = (1, 16)  # of which the speed is measured


def shrink(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the smaller model and the report.")],
    calibration: CalibrationOption,
    neurons: Annotated[
        float, typer.Option("--neurons", help="Fraction of the neurons of feed-forward parts to remove.")
    ] = 0.0,
    heads: Annotated[
        float,
        typer.Option("--heads", help="Fraction of the attention heads to remove; those with common keys go together."),
    ] = 0.0,
    params: Annotated[
        float | None,
        typer.Option("--params", help="Fraction of the blocks' parameters to remove, in place of both."),
    ] = None,
    method: Annotated[str, typer.Option("--method", help=f"Chooses what goes; one of {', '.join(METHODS)}.")] = "best",
    widths: Annotated[
        str,
        typer.Option(
            "--widths",
            metavar="uniform|free",
            help="uniform: all blocks lose as many. free: blocks differ, at as many parameters, where that is better; "
            "the folder then loads after import maskopt, or with trust_remote_code.",
        ),
    ] = "uniform",
    round_to: Annotated[
        int, typer.Option("--round-to", min=1, help="The number of neurons that stay is a multiple of it.")
    ] = 1,
    refit: Annotated[
        str | None,
        typer.Option(
            "--refit",
            metavar="units|layers|block|model",
            help="What is fitted anew: the layers that read the remaining units; all linear layers; each block, too, "
            "by gradient steps; or the whole model.",
            show_default="block with --method best, else units",
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            "--refit-epochs",
            metavar="N",
            help="Passes over the calibration windows for each block, and for the model.",
            show_default="4 for blocks, 2 for the model",
        ),
    ] = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    held_out: HeldOutOption = None,
    evaluate: Annotated[
        list[Path] | None,
        typer.Option("--evaluate", metavar="FILE", help="Text on which perplexity is measured; repeatable."),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option("--speed/--no-speed", help="Measure tokens per second, before and after."),
    ] = True,
    report: Annotated[bool, typer.Option("--report", help="Print every layer.")] = False,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Remove neurons and attention heads from a language model, refit what stays, and save a smaller dense model."""
    began = time.perf_counter()
    check_outputs(json, out)
    working = parse_memory(memory)
    require_file("calibration text", calibration)
    for text in evaluate or ():
        require_file("evaluation text", text)
    check_device(device)
    require_transformers()
    from maskopt import models, shrinking
    from maskopt.shrinking.shrink import check_arguments
    from maskopt.shrinking.speed import is_causal

    check_arguments(
        neurons,
        heads,
        params,
        method,
        widths,
        round_to,
        refit,  # type: ignore[arg-type]  # checked inside
        epochs,
        seed,
    )

    with Bar(quiet, "loading the model") as bar:
        corpus = models.read_text(calibration)
        texts = {str(text): models.read_text(text) for text in evaluate or ()}
        network, tokenizer = models.load_model(model, device=device)
        length = check_seqlen(network, tokenizer, seqlen)
        batches = models.calibration_batches(tokenizer, corpus, samples, length, batch_size, seed)
        others, _ = further_windows(batches, held_out, None)

        def perplexities(when: str) -> dict[str, Perplexity]:
            found = {}
            for name, text in texts.items():
                bar.stage(f"perplexity {when}")
                found[name] = models.perplexity(
                    network,
                    tokenizer,
                    text,
                    seqlen=length,
                    progress=lambda done, total: bar.tell(f"perplexity {when}", done / total),
                )
            return found

        def speeds(when: str) -> dict[str, shrinking.Speed]:
            if not speed or not is_causal(network):
                return {}
            bar.stage(f"speed {when}")
            return {f"batch {batch}": shrinking.measure_speed(network, batch) for batch in _BATCHES}

        dense, fast = perplexities("before"), speeds("before")
        bar.stage("what depends on what")

        def show(event: Any) -> None:
            if isinstance(event, models.AllocationProgress):
                bar.tell(f"widths: {event.stage}", event.fraction)
            else:
                layer = event.fraction if event.stage in ("solve", "recover") else 0.0
                bar.tell(f"{event.stage} {event.name}", (event.done + layer) / max(1, event.total))

        result = shrinking.shrink(
            network,
            batches,
            neurons=neurons,
            heads=heads,
            params=params,
            method=method,
            widths=widths,  # type: ignore[arg-type]  # checked inside
            round_to=round_to,
            refit=refit,  # type: ignore[arg-type]
            epochs=epochs,
            seed=seed,
            memory=working,
            progress=show if bar.visible else None,
            held_out=others,
        )
        after, faster = perplexities("after"), speeds("after")
        result.speeds = {batch: {"before": fast[batch], "after": faster[batch]} for batch in fast}
    extra: dict[str, Any] = {
        "perplexity": {name: {"before": dense[name].to_json(), "after": after[name].to_json()} for name in texts},
        "calibration": batches.to_json(),
        "command": {
            "model": model,
            "out": str(out),
            "calibration": str(calibration),
            "neurons": neurons,
            "heads": heads,
            "params": params,
            "method": method,
            "widths": widths,
            "round_to": round_to,
            "refit": refit,
            "samples": samples,
            "seqlen": length,
            "batch_size": batch_size,
            "seed": seed,
            "held_out": held_out,
            "device": device,
            "memory": working,
        },
        "memory_bytes": {"peak": models.peak_bytes(device)},
        "versions": environment(),
        "total_seconds": time.perf_counter() - began,
    }
    with json_output(json, {**result.to_json(), **extra}):
        shrinking.save_shrunk(out, network, tokenizer, result, finite(extra))
    console = tables(json)
    console.print(_table(result, console.width, every=report))
    console.print(facts({**_lines(result, dense, after), "saved in": str(out)}))
    if network.can_generate():
        show_evaluation(console, out, evaluate[0] if evaluate else None)


def _table(result: ShrinkReport, width: int, *, every: bool) -> Table:
    """Return the table of units: one row for every layer, or for all layers of a name but for the block's number."""
    groups: dict[str, list[Any]] = {}
    for each in result.widths:
        stem = each.name if every else ".".join("*" if part.isdecimal() else part for part in each.name.split("."))
        groups.setdefault(stem, []).append(each)
    columns = {
        "units": [found[0].kind for found in groups.values()],
        "before": [_range([each.before for each in found]) for found in groups.values()],
        "after": [_range([each.after for each in found]) for found in groups.values()],
        "parameters": [f"-{sum(each.parameters for each in found)}" for found in groups.values()],
        "error": [f"{fmean(each.error for each in found):.5f}" for found in groups.values()],
    }
    return named_table("", "layer", list(groups), columns, width)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _lines(result: ShrinkReport, dense: Mapping[str, Perplexity], after: Mapping[str, Perplexity]) -> dict[str, str]:
    """Return what became of the model, for a table of facts."""
    before, now = result.parameters
    lines = {"parameters": f"{before} before, {now} after ({100 * (1 - now / before):.1f} % less)"}
    if result.cache_bytes is not None:
        old, new = result.cache_bytes
        lines["KV cache"] = f"{old:g} bytes a token before, {new:g} after"
    for batch, found in result.speeds.items():
        old_speed, new_speed = found["before"], found["after"]
        lines[f"tokens a second, {batch}"] = (
            f"prefill {old_speed.prefill:.0f} before, {new_speed.prefill:.0f} after "
            f"({new_speed.prefill / old_speed.prefill:.2f}x); decode {old_speed.decode:.1f} before, "
            f"{new_speed.decode:.1f} after ({new_speed.decode / old_speed.decode:.2f}x); {new_speed.threads} threads"
        )
    for name in dense:
        lines[f"perplexity, {name}"] = f"{dense[name].perplexity:.3f} before, {after[name].perplexity:.3f} after"
    lines |= recovery_lines(result.pruning.recovery)
    if result.plan is not None:
        tried = result.plan.details.get("divergence") or {}
        lines["widths"] = f"{result.plan.details.get('chosen')}; divergence " + ", ".join(
            f"{loss:.4f} {name}" for name, loss in tried.items()
        )
    reasons: dict[str, int] = {}
    for each in result.refused:
        reasons[f"{each.kind}: {each.reason}"] = reasons.get(f"{each.kind}: {each.reason}", 0) + 1
    for reason, count in reasons.items():
        lines[f"left alone, {count} layers"] = reason
    lines |= {"loads with": result.loads_with, "time": duration(result.seconds)}
    return lines
