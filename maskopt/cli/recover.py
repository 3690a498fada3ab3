"""`maskopt recover`: fit a pruned language model to the dense one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from maskopt.cli.options import (
    BatchOption,
    CalibrationOption,
    DeviceOption,
    ExcludeOption,
    IncludeOption,
    JsonOption,
    MemoryOption,
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
    BESIDE_THE_MODEL,
    Bar,
    check_outputs,
    environment,
    facts,
    finite,
    json_output,
    show_evaluation,
    tables,
    tell_memory,
)
from maskopt.cli.pack import CompressOption, PackedOption, check_packing, pack_lines
from maskopt.cli.page import page_beside
from maskopt.cli.recover_options import (
    RANK,
    HeldOutOption,
    RecoverCheckpointingOption,
    RecoverEpochsOption,
    RecoverMasksOption,
    RecoverParametersOption,
    RecoverRankOption,
    RecoverTokensOption,
    further_windows,
    parse_recovery,
)
from maskopt.cli.words import duration, named_table
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.models import RecoveryRecord

__all__ = ["recover", "recovery_lines"]


def recover(
    pruned: Annotated[
        str, typer.Argument(metavar="PRUNED", help="Folder of the pruned or narrower (shrink) model, ours or not.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the recovered model.")],
    against: Annotated[
        str, typer.Option("--against", metavar="DENSE", help="Folder or hub id of the model it was made of.")
    ],
    calibration: CalibrationOption,
    level: Annotated[
        str,
        typer.Option(
            "--recover",
            metavar="block|model",
            help="block: each block to the dense block's output; model: then the whole model to the dense model's "
            "predictions.",
        ),
    ] = "model",
    recover_epochs: RecoverEpochsOption = None,
    recover_tokens: RecoverTokensOption = None,
    recover_masks: RecoverMasksOption = None,
    recover_parameters: RecoverParametersOption = "all",
    recover_rank: RecoverRankOption = RANK,
    recover_checkpointing: RecoverCheckpointingOption = False,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    held_out: HeldOutOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    evaluate: Annotated[
        Path | None, typer.Option("--evaluate", help="Text file on which perplexity is measured: dense, before, after.")
    ] = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    packed: PackedOption = False,
    compress: CompressOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit a pruned or narrower language model to the dense one without losing zeros, and save it."""
    began = time.perf_counter()
    check_outputs(json, out)
    check_packing(packed, compress, pruned)
    working = parse_memory(memory)
    settings = parse_recovery(
        level,
        recover_epochs,
        recover_tokens,
        recover_masks,
        recover_parameters,
        seed,
        recover_rank,
        recover_checkpointing,
    )
    if settings is None:
        raise MaskoptError("The command recover fits blocks or the model, not none; choose block or model.")
    require_file("calibration text", calibration)
    if evaluate is not None:
        require_file("evaluation text", evaluate)
    require_transformers()
    from maskopt import models
    from maskopt.models import ranks as several

    place = several.local_device(device)
    with (
        several.joined(place, check_device) as ranks,
        Bar(quiet or not ranks.first, "loading the models") as bar,
    ):
        corpus = models.read_text(calibration)
        text = None if evaluate is None else models.read_text(evaluate)
        network, tokenizer = models.load_model(pruned, device=place)
        dense, _ = models.load_model(against, device=place)
        length = check_seqlen(network, tokenizer, seqlen)
        # Not those on which prune solves layers with the same text and seed, where these look better than they are.
        windows = models.calibration_batches(tokenizer, corpus, samples, length, batch_size, seed)
        others, batches = further_windows(windows, held_out, fits=True)
        assert batches is not None  # there is a recovery
        needed = models.recovery_bytes(
            network, batches, settings, include=include or (), exclude=exclude or (), held_out=others
        )
        tell_memory("Recovery", needed, BESIDE_THE_MODEL, bar)
        perplexities: dict[str, models.Perplexity] = {}

        def measure(when: str, model: Any) -> None:
            if text is not None:
                bar.stage(f"perplexity, {when}")
                perplexities[when] = models.perplexity(model, tokenizer, text, seqlen=length, progress=bar_share)

        def bar_share(done: int, total: int) -> None:
            bar.tell("perplexity", done / total)

        def show(name: str, fraction: float) -> None:
            bar.tell(f"recover {name}", fraction)

        measure("dense", dense)
        measure("before", network)
        masks = models.load_masks(pruned) if (Path(pruned) / "masks.safetensors").is_file() else None
        bar.stage("recovery")
        report = models.recover(
            network,
            dense,
            batches,
            settings,
            masks=masks,
            include=include or (),
            exclude=exclude or (),
            memory=working,
            progress=show,
            held_out=others,
        )
        if not ranks.first:
            return
        measure("after", network)
    extra: dict[str, Any] = {
        "calibration": batches.to_json(),
        "perplexity": {when: value.to_json() for when, value in perplexities.items()},
        "command": {
            "pruned": pruned,
            "against": against,
            "out": str(out),
            "device": device,
            "memory": working,
            "recovery_bytes": needed,
            "packed": packed,
            "compress": compress,
        },
        "versions": environment(),
        "seconds": time.perf_counter() - began,
    }
    figures = {**report.to_json(), **extra}
    with json_output(json, figures) as later:
        page = page_beside(finite(figures), str(out))
        sizes = models.save_pruned(
            out, network, tokenizer, report, finite(extra), page, packed=packed, compress=compress
        )
        later |= {} if sizes is None else {"packed": sizes.to_json()}
    console = tables(json)
    console.print(_table(report.recovery, console.width))
    lines = {"sparsity": f"{100 * report.sparsity:.2f} % in {len(report.masks)} layers"} if report.masks else {}
    lines |= recovery_lines(report.recovery)
    if perplexities:
        lines["perplexity"] = ", ".join(f"{value.perplexity:.3f} {when}" for when, value in perplexities.items())
    lines |= {} if sizes is None else pack_lines(sizes)
    lines |= {"time": duration(time.perf_counter() - began), "saved in": str(out)}
    console.print(facts(lines))
    if network.can_generate():
        show_evaluation(console, out, evaluate)


def _table(records: Sequence[RecoveryRecord], width: int) -> Table:
    columns = {
        "before": [f"{record.before:.5f}" for record in records],
        "after": [f"{record.after:.5f}" for record in records],
        "kept": ["fit" if record.accepted else "before" for record in records],
        "masks": [f"{100 * record.changed:.1f} %" for record in records],
        "step": [f"{record.step_size:g}" for record in records],
        "seconds": [f"{record.seconds:.1f}" for record in records],
    }
    return named_table("", "held-out loss", [record.name for record in records], columns, width)


def recovery_lines(records: Sequence[RecoveryRecord]) -> dict[str, str]:
    """Return what recovery changed, for a table of facts; empty without recovery.

    Parameters
    ----------
    records : sequence of RecoveryRecord
    """
    lines = {}
    blocks = [record for record in records if record.level == "block"]
    if blocks:
        before, after = (sum(values) for values in zip(*((r.before, r.after) for r in blocks), strict=True))
        lines["recovery, blocks"] = (
            f"{sum(record.accepted for record in blocks)} of {len(blocks)} fits kept; held-out relative error "
            f"{before / len(blocks):.5f} before, {after / len(blocks):.5f} after (means)"
        )
    for record in records:
        if record.level == "model":
            lines["recovery, model"] = (
                f"{'kept' if record.accepted else 'not kept'}; held-out divergence {record.before:.4f} before, "
                f"{record.after:.4f} after (nats a token)"
            )
    return lines
