"""Shrinking a model: choose neurons and attention heads, refit the weights, and cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskopt.allocation import Plan
from maskopt.checks import SEEDS, check_time_limit, choice, real, shown, whole
from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, prepare_batches
from maskopt.models.checks import check_model, move_model
from maskopt.models.layers import Layer
from maskopt.models.offload import offload_of
from maskopt.models.prune import CORRECTION, Progress, prune_layers
from maskopt.models.replay import evaluation_mode
from maskopt.models.report import PruneReport
from maskopt.models.selection import select_layers
from maskopt.models.solving import Observer
from maskopt.models.states import Place
from maskopt.models.trials import AllocationProgress
from maskopt.oracles import Columns, MaskSet
from maskopt.problems import LayerReconstruction
from maskopt.recovery import FixedMasks, Recovery
from maskopt.shrinking.attempts import Attempt, better_of
from maskopt.shrinking.biases import BiasChanges
from maskopt.shrinking.counts import counts_of_budget, counts_of_fractions, counts_of_plan, usable
from maskopt.shrinking.cut import check_cut, cut_model
from maskopt.shrinking.proofs import UnitProver
from maskopt.shrinking.report import ShrinkReport, Width
from maskopt.shrinking.speed import cache_bytes
from maskopt.shrinking.units import Site, find_units
from maskopt.shrinking.widths import free_widths
from maskopt.solvers import Result, Solver
from maskopt.structured import ExactSwaps, Structured, make_structured

__all__ = ["STEPS", "Refit", "Widths", "check_arguments", "shrink"]

Widths = Literal["uniform", "free"]
Refit = Literal["units", "layers", "block", "model"]
STEPS: tuple[Literal["block"], Literal["model"]] = ("block", "model")
"""What is fitted by gradient steps."""
_BOTH: tuple[Widths, Widths] = ("uniform", "free")


def shrink(
    model: PreTrainedModel,
    batches: Iterable[Any],
    *,
    neurons: float = 0.0,
    heads: float = 0.0,
    params: float | None = None,
    method: str | Solver = "best",
    widths: Widths | Plan = "uniform",
    round_to: int = 1,
    refit: Refit | None = None,
    epochs: float | None = None,
    correction: float = CORRECTION,
    certify: bool = False,
    certify_seconds: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: int = 2**30,
    states: Place | None = None,
    progress: Callable[[Progress | AllocationProgress], object] | None = None,
    held_out: Iterable[Any] | None = None,
    further: Iterable[Any] | None = None,
) -> ShrinkReport:
    """Remove neurons and attention heads from a model's blocks, in place, so that its matrices become smaller.

    Which parameters compute a unit is found by gradients of a copy of the block with random weights, whatever the
    architecture is called, and so is what the configuration has to say. Units are chosen one layer after the other: of
    the layer that reads their outputs, those are kept with which refitted weights give the least error of its output
    (column subset selection). Heads that have keys and values in common stand or fall together.

    Parameters
    ----------
    model : PreTrainedModel
        **It is modified**: its blocks and its configuration. After an error before the cut it is as it was.
    batches : iterable of dict or Tensor
        Calibration data as for `prune`.
    neurons, heads : float
        Fraction to remove of the neurons of each feed-forward part (of each expert), and of the attention heads of each
        block, in [0, 1); at least one unit stays.
    params : float, optional
        Fraction of the blocks' parameters to remove, in place of both: about as large a fraction of the heads as of the
        neurons.
    method : str or Solver
        A name in `maskopt.structured.STRUCTURED`: "best", "osscar", "fasp", "spap", "newton", "flap", "magnitude" or
        "random"; or a solver for sets of whole columns. With "flap", biases make up for the mean of what goes.
    widths : {"uniform", "free"} or Plan
        "uniform": every block loses as many, and the folder loads with transformers alone. "free": blocks lose
        different numbers, at equal parameters in all, where the model's predictions on calibration sequences set aside
        are clearly closer to the dense model's, and those of the fitted model, too: both are made. Needs three
        sequences at least. Or the fraction of its units that each layer loses, such as ``report.plan`` of an earlier
        call, in place of `neurons`, `heads` and `params`.
    round_to : int
        The number of neurons that stay is a multiple of it, which may suit the hardware; of experts always of 8, too,
        which their kernels need in half precision.
    refit : {"units", "layers", "block", "model"}, optional
        What is fitted anew. "units": the layers that read the remaining units. "layers": all linear layers of the
        blocks, by least squares, each on its inputs in the shrunk model. "block": these, and then all parameters of
        each block by gradient steps, towards the dense block's output. "model": these, and then the whole model towards
        the dense model's predictions. Fits are kept where they help on held-out sequences. By default "block" with
        "best", and "units", as published, with other methods.
    epochs : float, optional
        Passes over the data for each block, and for the model, see `maskopt.recovery.Recovery`.
    correction : float
        As for `prune`, where layers are refitted.
    certify : bool
        Prove, for every layer that loses units, a lower bound on the error of any choice of as many units with any
        weights, in the layer's problem as it is solved, see `maskopt.bounds.column_bound` and `UnitProof`.
    certify_seconds : float, optional
        Time for the proofs of all layers together, divided in proportion to their cost.
    seed : int
        Of the method "random", of fits and of free widths.
    device, memory, states
        As for `prune`.
    progress : callable, optional
        Called with an `AllocationProgress` while widths are chosen, and then with a `Progress`.
    held_out, further : iterable of dict or Tensor, optional
        As for `prune`: what errors are measured on, and what blocks and the model are fitted to by gradient steps.

    Returns
    -------
    ShrinkReport

    Raises
    ------
    MaskoptError
        If an argument is wrong, there is nothing to remove, or no block's neurons or heads can be removed.

    References
    ----------
    Column subset selection with refit: FASP (arXiv 2501.09412), OSSCAR (2403.12983), SPAP (2505.03373).

    Examples
    --------
    >>> import maskopt
    >>> from maskopt.models import calibration_batches, load_model
    >>> model, tokenizer = load_model("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> batches = calibration_batches(tokenizer, "The calibration text ...", samples=128)  # doctest: +SKIP
    >>> report = maskopt.shrink(model, batches, neurons=0.3, heads=0.25)  # doctest: +SKIP
    >>> model.save_pretrained("smaller")  # doctest: +SKIP
    """
    began = time.perf_counter()
    solver, refit = check_arguments(neurons, heads, params, method, widths, round_to, refit, epochs, seed, progress)
    if not isinstance(certify, bool):
        raise MaskoptError(f"certify must be True or False; got {shown(certify)}.")
    if certify_seconds is not None and not certify:
        raise MaskoptError("certify_seconds limits the time of the proofs that certify asks for; give both.")
    check_time_limit(certify_seconds, "time for certify")
    check_model(model)
    if offload_of(model) is not None and (widths == "free" or refit == "model"):
        raise MaskoptError(
            "Free widths and fitting the whole model need all its weights in memory; load it without offload."
        )
    if device is not None:
        move_model(model, device)
    prepared = prepare_batches(model, batches)
    measured = None if held_out is None else prepare_batches(model, held_out, "held-out")
    fitted = None if further is None else prepare_batches(model, further, "further")
    with evaluation_mode(model):
        structure = usable(find_units(model, prepared[0].inputs), widths == "uniform")
        plan = widths if isinstance(widths, Plan) else None
        uniform: Mapping[Site, int] | None = None
        if plan is not None:
            counts = counts_of_plan(structure, plan, round_to)
        elif params is not None:
            counts = counts_of_budget(model, structure, params, round_to)
        else:
            counts = counts_of_fractions(structure, {"neurons": neurons, "heads": heads}, round_to)
        if widths == "free":
            uniform = counts
            plan = free_widths(model, prepared, counts, solver, memory=memory, seed=seed, progress=progress)
            counts = counts_of_plan(structure, plan, round_to)
    check_cut(model, counts)
    before = model.num_parameters(), cache_bytes(model)

    def attempt(wanted: Mapping[Site, int]) -> Attempt:
        prover = UnitProver(wanted, solver.ridge, certify_seconds, _told(progress)) if certify else None
        biases = BiasChanges(wanted if solver.needs_mean else ())
        try:
            report = _pruned(
                model,
                prepared,
                wanted,
                solver,
                refit,
                epochs,
                seed,
                correction=correction,
                memory=memory,
                states=states,
                progress=progress,
                held_out=measured,
                further=fitted,
                observe=_observing(*((prover,) if prover else ()), *((biases,) if solver.needs_mean else ())),
            )
        except BaseException:
            biases.undo()
            raise
        return Attempt(wanted, report, prover, biases)

    if plan is None or uniform is None or uniform == counts:
        done = attempt(counts)
    else:
        judged = prepared[-max(1, len(prepared) // 8) :] if measured is None else measured
        best, done, losses = better_of(model, judged, [partial(attempt, uniform), partial(attempt, counts)])
        plan = _made(plan, done, _BOTH[best], dict(zip(_BOTH, losses, strict=True)))
    report, prover, biases = done.report, done.prover, done.biases
    kept = {site: _kept(site, report.masks) for site in done.counts}
    removed = {site: _width(site, count, report, prover) for site, count in done.counts.items()}
    cut = cut_model(model, kept)
    caches = before[1], cache_bytes(model)
    named = "by a plan" if isinstance(widths, Plan) else widths
    # What is said of each layer there is said by the widths.
    settings = {name: value for name, value in report.settings.items() if name not in ("masks", "include")}
    report.settings = {**settings, "widths": named, "refit": refit, "round_to": round_to}
    return ShrinkReport(
        [width for width in removed.values() if width.after < width.before],
        structure.refused,
        (before[0], model.num_parameters()),
        None if caches[0] is None or caches[1] is None else (caches[0], caches[1]),
        cut,
        replace(report, masks={}, plan=None),
        {site.name: units for site, units in kept.items()},
        plan,
        biases={"changed": biases.changed, "without": biases.without} if solver.needs_mean else None,
        seconds=time.perf_counter() - began,
    )


def check_arguments(
    neurons: object,
    heads: object,
    params: object,
    method: str | Solver,
    widths: object,
    round_to: object,
    refit: Refit | None,
    epochs: float | None,
    seed: object,
    progress: object = None,
) -> tuple[Structured, Refit]:
    """Return the solver and what is fitted, after a check of the arguments of `shrink`.

    Raises
    ------
    MaskoptError
        If one is wrong, or says nothing beside the others.
    """
    for name, value in (("neurons", neurons), ("heads", heads), ("params", params)):
        if not real(0, 1, below=True, optional=name == "params").fits(value):
            raise MaskoptError(f"{name} must be a fraction from 0 to below 1; got {shown(value)}.")
    if params is not None and (neurons or heads):
        raise MaskoptError("params says how much to remove of neurons and heads together; leave those out.")
    planned = isinstance(widths, Plan)
    if planned and (params or neurons or heads):
        raise MaskoptError("The plan says how much each layer loses; leave neurons, heads and params out.")
    if not (params or neurons or heads or planned):
        raise MaskoptError("There is nothing to remove: give a fraction of the neurons, the heads or the params.")
    named = "uniform" if planned else widths
    for name, value, options in (("widths", named, get_args(Widths)), ("refit", refit, get_args(Refit))):
        if not choice(options, optional=name == "refit").fits(value):
            raise MaskoptError(f"{name} must be one of {', '.join(options)}; got {shown(value)}.")
    if not whole(1).fits(round_to):
        raise MaskoptError(f"round_to must be a whole number of at least 1; got {shown(round_to)}.")
    if not whole(*SEEDS).fits(seed):
        raise MaskoptError(f"The seed must be an integer of at most 64 bits; got {shown(seed)}.")
    if progress is not None and not callable(progress):
        raise MaskoptError(f"progress must be a function of one argument; got {shown(progress)}.")
    if isinstance(method, str):
        solver: Structured = make_structured(method, **({"seed": seed} if method == "random" else {}))
    elif isinstance(method, Structured):
        solver = method
    else:
        raise MaskoptError(
            f"method must be a name or a solver for whole units, such as ExactSwaps(); got {shown(method)}."
        )
    found: Refit = refit or ("block" if isinstance(solver, ExactSwaps) else "units")
    if epochs is not None:
        if found not in STEPS:
            raise MaskoptError(
                f"Epochs are passes of gradient steps, which fit blocks and models, not {found}; leave them out."
            )
        Recovery(found, epochs=epochs)
    return solver, found


def _pruned(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    counts: Mapping[Site, int],
    solver: Solver,
    refit: Refit,
    epochs: float | None,
    seed: int,
    held_out: Sequence[Batch] | None,
    further: Sequence[Batch] | None,
    **options: Any,
) -> PruneReport:
    """Choose the units and fit the weights; units that go have zeros in the layer that reads them."""
    masks: dict[str, MaskSet] = {}
    for site, count in counts.items():
        units = Columns(count, site.role.width)
        masks.update((layer.name, units) for layer in site.layers)
    if refit != "units":
        everything = Columns(1.0)
        for layer in select_layers(model).layers:
            masks.setdefault(layer.name, everything)
    recover = None
    if refit in STEPS:
        recover = Recovery(refit, epochs=epochs, rule=FixedMasks(), seed=seed)
    return prune_layers(
        model,
        _inputs(batches),
        masks,
        solver,
        propagate="pruned" if refit == "units" else None,
        include=list(masks),
        recover=recover,
        held_out=None if held_out is None else _inputs(held_out),
        further=None if further is None else _inputs(further),
        **options,
    )


def _inputs(batches: Sequence[Batch]) -> list[Mapping[str, Any]]:
    return [batch.inputs for batch in batches]


def _made(plan: Plan, done: Attempt, widths: Widths, losses: Mapping[str, float]) -> Plan:
    """Return the plan of the widths that a model has in the end."""
    lost = {layer.name: 1 - count / site.role.number for site, count in done.counts.items() for layer in site.layers}
    chosen = {"chosen": widths} if widths == "uniform" else {}
    return replace(
        plan,
        sparsities={name: lost.get(name, 0.0) for name in plan.sparsities},
        details={**plan.details, **chosen, "final divergence": dict(losses)},
    )


def _kept(site: Site, masks: Mapping[str, Tensor]) -> Tensor:
    """Return the units that stay, from the masks of a site's layers."""
    rows = [
        layer.oriented(masks[layer.name]).any(0).view(site.role.number, site.role.width).any(1) for layer in site.layers
    ]
    return torch.stack(rows) if site.role.experts else rows[0]


def _observing(*observers: Observer) -> Observer | None:
    """Return one observer for all."""

    def observe(layer: Layer, problem: LayerReconstruction, result: Result) -> None:
        for each in observers:
            each(layer, problem, result)

    return observe if observers else None


def _told(
    progress: Callable[[Progress | AllocationProgress], object] | None,
) -> Callable[[str, int, int, float], object] | None:
    if progress is None:
        return None
    return lambda name, done, total, fraction: progress(Progress("certify", name, done, total, fraction))


def _width(site: Site, count: int, report: PruneReport, prover: UnitProver | None) -> Width:
    names = [layer.name for layer in site.layers]
    errors = [record.relative_error for record in report.layers if record.name in names]
    gone = (site.role.number - count) * max(1, site.role.experts)
    each = site.size // max(1, site.role.experts)
    proof = None if prover is None else prover.proof(names)
    return Width(site.name, site.role.kind, site.role.number, count, gone * each, sum(errors) / len(errors), proof)
