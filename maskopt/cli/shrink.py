"""`maskopt shrink`: make a language model smaller by removing neurons, attention heads, experts and blocks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskopt.cli.options import (
    BatchOption,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    QuietOption,
    ResumeOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    StatesOption,
    check_device,
    check_proof_time,
    check_seqlen,
    check_unused,
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
    stderr,
    tables,
)
from maskopt.cli.page import page_beside
from maskopt.cli.recover_options import HeldOutOption, further_windows
from maskopt.cli.shrink_tables import summary, unit_table
from maskopt.cli.work_folder import WorkFolder, tell_complete
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.allocation import Plan
    from maskopt.models import Perplexity

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
    experts: Annotated[
        float,
        typer.Option(
            "--experts",
            help="Fraction of each block's experts to drop whole, before units of those that stay go.",
        ),
    ] = 0.0,
    drop_blocks: Annotated[
        int,
        typer.Option(
            "--drop-blocks",
            min=0,
            metavar="N",
            help="Whole blocks to drop first, one after the other, each time the one without which predictions change "
            "least.",
        ),
    ] = 0,
    method: Annotated[str, typer.Option("--method", help=f"Chooses what goes; one of {', '.join(METHODS)}.")] = "best",
    widths: Annotated[
        str,
        typer.Option(
            "--widths",
            metavar="uniform|free|PLAN",
            help="uniform: all blocks lose as many. free: blocks differ, at as many parameters, where that is better; "
            "the folder then loads after import maskopt, or with trust_remote_code. Or the plan in the report.json of "
            "an earlier run, in place of --neurons, --heads and --params.",
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
            help="Passes over further windows, twice --samples, for each block, and for the model.",
            show_default="4 for blocks, 2 for the model",
        ),
    ] = None,
    certify: Annotated[
        bool,
        typer.Option(
            "--certify",
            help="Prove a lower bound on the error of any choice of as many units, layer by layer; takes longer than "
            "shrinking.",
        ),
    ] = False,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit", help="Seconds for all proofs of --certify together; the bounds proven by then are reported."
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
        typer.Option(
            "--speed/--no-speed", help="Measure tokens per second before and after, where the weights fit --memory."
        ),
    ] = True,
    report: Annotated[bool, typer.Option("--report", help="Print every layer; report.html has them anyway.")] = False,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    states: StatesOption = None,
    resume: ResumeOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove neurons and attention heads from a language model, refit what stays, and save a smaller dense model."""
    began = time.perf_counter()
    working = parse_memory(memory)
    command: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "calibration": str(calibration),
        "neurons": neurons,
        "heads": heads,
        "params": params,
        "experts": experts,
        "drop_blocks": drop_blocks,
        "method": method,
        "widths": widths,
        "round_to": round_to,
        "refit": refit,
        "refit_epochs": epochs,
        "certify": certify,
        "time_limit": time_limit,
        "samples": samples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "seed": seed,
        "held_out": held_out,
        "device": device,
        "memory": working,
    }
    # What looks at the whole model at once needs it in memory; proofs and biases (flap) are not kept for a later run.
    first = bool(experts or drop_blocks)
    whole = widths == "free" or refit == "model" or first or certify or method == "flap"
    work = WorkFolder(out, resume, not whole)
    earlier = work.completed_before(command)
    if earlier is not None:
        tell_complete(json, earlier, out)
        return
    check_outputs(json, out)
    plan = None if widths in ("uniform", "free") else _plan(widths)
    units = bool(neurons or heads or params or plan) or not first
    require_file("calibration text", calibration)
    for text in evaluate or ():
        require_file("evaluation text", text)
    check_device(device)
    require_transformers()
    from maskopt import models, shrinking
    from maskopt.models.checks import is_causal
    from maskopt.shrinking.experts import check_fraction
    from maskopt.shrinking.shrink import STEPS, check_arguments

    if experts:
        check_fraction(experts)
    if not units:
        given = {
            "--method": method != "best",
            "--widths": widths != "uniform",
            "--round-to": round_to != 1,
            "--refit": refit is not None,
            "--refit-epochs": epochs is not None,
            "--certify": certify,
        }
        check_unused(given, "is for units that go by --neurons, --heads or --params, and none do")
    if heads and not (neurons or params or plan):
        check_unused({"--round-to": round_to != 1}, "is for numbers of neurons, and no neurons go")
    check_proof_time(time_limit, certify)
    fitted = None
    if units:
        _, fitted = check_arguments(
            neurons,
            heads,
            params,
            method,
            plan or widths,
            round_to,
            refit,  # type: ignore[arg-type]  # checked inside
            epochs,
            seed,
        )

    with work, Bar(quiet, "loading the model") as bar:
        corpus = models.read_text(calibration)
        texts = {str(text): models.read_text(text) for text in evaluate or ()}
        network, tokenizer = models.load_model(model, device=device, offload=work.path)
        length = check_seqlen(network, tokenizer, seqlen)
        batches = models.calibration_batches(tokenizer, corpus, samples, length, batch_size, seed)
        others, further = further_windows(batches, held_out, fits=fitted in STEPS)

        size = sum(each.numel() * each.element_size() for each in network.parameters())
        measured = speed and (work.path is None or size <= working)
        if speed and not measured and bar.visible:
            stderr().print(f"The weights take {size / 1e9:.2g} GB, more than --memory: the speed is not measured.")

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
            if not measured or not is_causal(network):
                return {}
            bar.stage(f"speed {when}")
            with models.resident(network):
                return {f"batch {batch}": shrinking.measure_speed(network, batch) for batch in _BATCHES}

        dense, fast = perplexities("before"), speeds("before")
        bar.stage("what depends on what")

        def show(event: Any) -> None:
            if isinstance(event, models.AllocationProgress):
                bar.tell(f"widths: {event.stage}", event.fraction)
            else:
                layer = event.fraction if event.stage in ("solve", "certify", "recover") else 0.0
                bar.tell(f"{event.stage} {event.name}", (event.done + layer) / max(1, event.total))

        depth, fewer, caches = None, None, shrinking.cache_bytes(network) if first else None
        if drop_blocks:
            depth = shrinking.drop_blocks(
                network, batches, drop_blocks, progress=lambda name, done: bar.tell(f"depth: {name}", done)
            )
        if experts:
            fewer = shrinking.drop_experts(
                network,
                batches,
                experts,
                method="random" if method == "random" else "best",
                seed=seed,
                progress=lambda name, done: bar.tell(f"experts: {name}", done),
            )
        result = None
        if units:
            result = shrinking.shrink(
                network,
                batches,
                neurons=neurons,
                heads=heads,
                params=params,
                method=method,
                widths=plan or widths,  # type: ignore[arg-type]
                round_to=round_to,
                refit=refit,  # type: ignore[arg-type]
                epochs=epochs,
                certify=certify,
                certify_seconds=time_limit,
                seed=seed,
                memory=working,
                states=None if states is None else states.value,
                progress=show if bar.visible else None,
                held_out=others,
                further=further,
            )
        if first:
            now = shrinking.cache_bytes(network)
            both = None if caches is None or now is None else (caches, now)
            result = shrinking.ShrinkReport.of_steps(depth, fewer, both, result)
        assert result is not None
        after, faster = perplexities("after"), speeds("after")
        result.speeds = {batch: {"before": fast[batch], "after": faster[batch]} for batch in fast}
        extra: dict[str, Any] = {
            "perplexity": {name: {"before": dense[name].to_json(), "after": after[name].to_json()} for name in texts},
            "calibration": batches.to_json(),
            "command": command,
            "memory_bytes": {"peak": models.peak_bytes(device)},
            "versions": environment(),
            "total_seconds": time.perf_counter() - began,
        }
        with json_output(json, {**result.to_json(), **extra}):
            page = page_beside(finite({**result.to_json(), **extra}), str(out))
            shrinking.save_shrunk(out, network, tokenizer, result, finite(extra), page)
    console = tables(json)
    if result.widths:
        console.print(unit_table(result, console.width, every=report))
    console.print(facts({**summary(result, dense, after), "saved in": str(out)}))
    if network.can_generate():
        show_evaluation(console, out, evaluate[0] if evaluate else None)


def _plan(path: str) -> Plan:
    if not Path(path).is_file():
        raise MaskoptError(f"--widths must be uniform, free or the file of a plan; there is no file {path!r}.")
    from maskopt.allocation import load_plan

    return load_plan(path)
