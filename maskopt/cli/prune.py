"""`maskopt prune`: prune a whole language model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from maskopt.cli.allocate import divergence_lines, mean_sparsity, read_plan, show_allocation
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
    ResumeOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    SettingsOption,
    SolverOption,
    SparsityOption,
    StatesOption,
    Target,
    TargetOption,
    TogetherOption,
    WeightsOption,
    check_correction,
    check_device,
    check_proof_time,
    check_seqlen,
    check_unused,
    parse_fixed,
    parse_masks,
    parse_memory,
    parse_together,
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
from maskopt.cli.prune_progress import PruneProgress
from maskopt.cli.prune_tables import layer_table, summary, times
from maskopt.cli.recover import recovery_lines
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
from maskopt.cli.solvers import parse_weights
from maskopt.cli.words import masks_words, solver_words
from maskopt.cli.work_folder import WorkFolder, tell_complete
from maskopt.errors import MaskoptError
from maskopt.launch import launched

if TYPE_CHECKING:
    from maskopt.models import PruneReport

__all__ = ["prune"]


class Certify(StrEnum):
    """Kind of lower bound."""

    SHIFT = "shift"
    SDP = "sdp"
    CUTS = "cuts"


def prune(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="New folder for the pruned model, its masks and the report.")
    ],
    calibration: CalibrationOption,
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    solver: SolverOption = None,
    weights: WeightsOption = None,
    option: SettingsOption = None,
    allocation: Annotated[
        str,
        typer.Option(
            "--allocation",
            metavar="RULE|PLAN",
            help="How sparse each layer becomes: the file of a plan, as `maskopt allocate` writes, or one of "
            f"{', '.join(RULE_NAMES)}.",
        ),
    ] = "uniform",
    sparsity_of: FixedOption = None,
    together: TogetherOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = None,
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    held_out: HeldOutOption = None,
    propagate: PropagateOption = None,
    correction: CorrectionOption = CORRECTION,
    target: TargetOption = Target.STREAM,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    evaluate: Annotated[
        Path | None, typer.Option("--evaluate", help="Text file on which perplexity is measured before and after.")
    ] = None,
    calibration_perplexity: Annotated[
        bool,
        typer.Option(
            "--calibration-perplexity", help="Measure perplexity on the beginning of the calibration text, too."
        ),
    ] = False,
    certify: Annotated[
        Certify | None,
        typer.Option(
            "--certify",
            help="Prove a lower bound on the error of every mask, layer by layer; takes longer than pruning. The masks "
            "are then chosen for weights that stay (--weights keep).",
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit", help="Seconds for all proofs of --certify together; the bounds proven by then are reported."
        ),
    ] = None,
    recover: Annotated[
        str,
        typer.Option(
            "--recover",
            metavar="none|block|model",
            help="Fit weights and masks beyond the layer: block by block to the dense blocks' outputs, then (model) "
            "the whole model to the dense model's predictions. Kept where it helps on held-out windows.",
        ),
    ] = "none",
    recover_epochs: RecoverEpochsOption = None,
    recover_tokens: RecoverTokensOption = None,
    recover_masks: RecoverMasksOption = None,
    recover_parameters: RecoverParametersOption = "all",
    recover_rank: RecoverRankOption = RANK,
    recover_checkpointing: RecoverCheckpointingOption = False,
    plot: PlotOption = None,
    cache: CacheOption = None,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    states: StatesOption = None,
    packed: PackedOption = False,
    compress: CompressOption = False,
    resume: ResumeOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prune a language model and save it."""
    began = time.perf_counter()
    treatment = weights or ("best" if solver is None and certify is None else "keep")
    fixed, groups, working = parse_fixed(sparsity_of), parse_together(together), parse_memory(memory)
    command: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "pattern": pattern,
        "sparsity": sparsity,
        "solver": solver,
        "weights": treatment,
        "options": list(option or ()),
        "calibration": str(calibration),
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "held_out": held_out,
        "propagate": None if propagate is None else propagate.value,
        "correction": correction,
        "target": target.value,
        "include": list(include or ()),
        "exclude": list(exclude or ()),
        "allocation": allocation,
        "sparsity_of": fixed,
        "together": groups,
        "batch_size": batch_size,
        "time_limit": time_limit,
        "recover": recover,
        "device": device,
        "memory": working,
        "packed": packed,
        "compress": compress,
    }
    # What looks at the whole model at once needs it in memory.
    uniform = not fixed and (allocation == "uniform" or allocation not in RULE_NAMES)
    work = WorkFolder(out, resume, uniform and recover != "model")
    earlier = work.completed_before(command)
    if earlier is not None:
        tell_complete(json, earlier, out)
        return
    check_outputs(json, out, plot)
    check_proof_time(time_limit, certify is not None)
    check_packing(packed, compress, model)
    method = parse_weights(treatment, solver, option or ())
    recovery = parse_recovery(
        recover,
        recover_epochs,
        recover_tokens,
        recover_masks,
        recover_parameters,
        seed,
        recover_rank,
        recover_checkpointing,
    )
    given = read_plan(allocation, pattern, sparsity, fixed)
    masks = given or (parse_masks(pattern, sparsity) if allocation == "uniform" and not fixed else None)
    mean = 0.0 if masks is not None else mean_sparsity(pattern, sparsity)
    check_correction(propagate, method.corrects, correction, target)
    if masks is not None:
        check_unused(
            {"--cache": cache is not None}, "keeps what a rule of --allocation measures, and none is asked for"
        )
        check_unused({"--together": bool(groups)}, "is for the rules of --allocation, and none is asked for")
    _check_files(calibration, evaluate, plot)
    require_transformers()
    from maskopt import models
    from maskopt.models import ranks as several

    _check_ranks(launched(), uniform and certify is None)
    place = several.local_device(device)

    with several.joined(place, check_device) as ranks, work.among(ranks):
        with Bar(quiet or not ranks.first, "loading the model") as bar:
            corpus = models.read_text(calibration)
            texts = {} if evaluate is None else {"evaluation": models.read_text(evaluate)}
            network, tokenizer = models.load_model(model, device=place, offload=work.path)
            length = check_seqlen(network, tokenizer, seqlen)
            batches = models.calibration_batches(tokenizer, corpus, samples, length, batch_size, seed)
            others, further = further_windows(batches, held_out, fits=recovery is not None)
            if calibration_perplexity:
                # As much text as the calibration uses, at four characters a token, and at least one window.
                texts["calibration"] = corpus.opening(max(4 * samples, 32) * length)

            if masks is None:
                masks = models.allocate(
                    network,
                    batches,
                    pattern,
                    mean,
                    method,
                    rule=allocation,  # type: ignore[arg-type]  # checked by read_plan
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
                bar.stage("calibration")
            selection = models.select_layers(network, include or (), exclude or ())
            whole = PruneProgress(
                bar, network, selection, batches, certify is not None, 2 * len(texts), recovery, others, further
            )

            def perplexities(when: str) -> dict[str, models.Perplexity]:
                return {
                    name: models.perplexity(
                        network,
                        tokenizer,
                        part,
                        seqlen=length,
                        progress=whole.perplexity(f"{when} perplexity, {name} text"),
                    )
                    for name, part in texts.items()
                }

            estimated = None
            if work.path is not None:
                tokens = sum(windows.tokens for windows in (batches, others, further) if windows is not None)
                estimated = models.pruning_bytes(network, selection.layers, tokens, working)
                tell_memory("Pruning", estimated, "of memory at most", bar)
            needed = None
            if recovery is not None:
                needed = models.recovery_bytes(
                    network,
                    batches,
                    recovery,
                    include=include or (),
                    exclude=exclude or (),
                    held_out=others,
                    further=further,
                )
                tell_memory("Recovery", needed, BESIDE_THE_MODEL, bar)
            dense = perplexities("dense")
            report = models.prune(
                network,
                batches,
                masks,
                method,
                propagate=None if propagate is None else propagate.value,
                correction=correction,
                target=target.value,
                include=include or (),
                exclude=exclude or (),
                certify=None if certify is None else certify.value,
                certify_seconds=time_limit,
                memory=working,
                states=None if states is None else states.value,
                on_error="keep",  # the program ends after an error, so the model need not be restored
                progress=whole.prune if bar.visible else None,
                recover=recovery,
                held_out=others,
                further=further,
            )
            if not ranks.first:
                return
            pruned = perplexities("pruned")
        extra: dict[str, Any] = {
            "memory_bytes": {"estimated": estimated, "peak": models.peak_bytes(place)},
            "calibration": batches.to_json(),
            "perplexity": {name: {"dense": dense[name].to_json(), "pruned": pruned[name].to_json()} for name in texts},
            "command": {**command, "recovery_bytes": needed},
            "versions": environment(),
        }
        extra["seconds"] = time.perf_counter() - began
        figures = {**report.to_json(), **extra}
        with json_output(json, figures) as later:
            if plot is not None:
                draw_plan({layer.name: layer.sparsity for layer in report.layers}, plot, f"{model}: {pattern}")
            page = page_beside(finite(figures), str(out))
            sizes = models.save_pruned(
                out, network, tokenizer, report, finite(extra), page, packed=packed, compress=compress
            )
            later |= {} if sizes is None else {"packed": sizes.to_json()}
    console = tables(json)
    shapes = dict.fromkeys((layer.rows, layer.columns) for layer in report.layers)
    if report.plan is None:
        words = masks_words(pattern, sparsity, parse_masks(pattern, sparsity), shapes)
    else:
        words = f"{report.plan.patterns}, sparsity of each layer by the plan ({report.plan.rule})"
    more = {"solver": solver_words(method), "time": times(report, time.perf_counter() - began)}
    more |= {} if sizes is None else pack_lines(sizes)
    _show(console, report, figures, words, more)
    if network.can_generate():
        show_evaluation(console, out, evaluate)


def _show(console: Console, report: PruneReport, figures: dict[str, Any], masks: str, more: Mapping[str, str]) -> None:
    """Print the table of layers and what there is to say of all."""
    console.print(layer_table(figures["layers"], console.width))
    lines = summary(figures, masks)
    if report.plan is not None:
        lines |= divergence_lines(report.plan)
    lines |= {**recovery_lines(report.recovery), **more}
    peak = figures["memory_bytes"]["peak"]
    if peak is not None:
        lines["memory"] = f"{peak / 1e9:.3g} GB at most"
    lines["saved in"] = figures["command"]["out"]
    console.print(facts(lines))


def _check_files(calibration: Path, evaluate: Path | None, plot: Path | None) -> None:
    if plot is not None:
        check_figure(plot)
    require_file("calibration text", calibration)
    if evaluate is not None:
        require_file("evaluation text", evaluate)


def _check_ranks(ranks: int, apart: bool) -> None:
    """Check that several ranks are asked only for what works layer by layer.

    Raises
    ------
    MaskoptError
        If they are not.
    """
    if ranks > 1 and not apart:
        raise MaskoptError(
            "Several ranks prune layer by layer; --certify and allocating sparsities need one process, without "
            "torchrun."
        )
