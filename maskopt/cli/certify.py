"""`maskopt certify`: a proven bound on the distance of a mask from the optimum."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from maskopt.cli.certify_report import certificate, certify_report, show_certificates
from maskopt.cli.layer import load_layer
from maskopt.cli.mask_file import load_mask
from maskopt.cli.options import (
    DeviceOption,
    InstanceArgument,
    JsonOption,
    MemoryOption,
    PatternOption,
    QuietOption,
    SparsityOption,
    check_device,
    parse_masks,
    parse_memory,
)
from maskopt.cli.output import Bar, check_outputs, environment, json_output, tables
from maskopt.cli.part import RowsOption, check_row_blocks, parse_rows, part_settings
from maskopt.cli.pool import Backend, BackendOption, JobsOption, on_workers, open_workers
from maskopt.errors import MaskoptError
from maskopt.files import content_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from maskopt.bounds import BoundKind
    from maskopt.bounds.work import Progress
    from maskopt.cli.pool import Workers
    from maskopt.oracles import MaskSet
    from maskopt.problems import LayerReconstruction

__all__ = ["certify"]

Figures = dict[str, Any]

_PIECES: dict[str, int | None] = {"gap": 64, "shift": None, "sdp": 32, "cuts": 32}
"""Rows that are bounded together, by kind of lower bound: the Frank-Wolfe gap, and those of `mask_bounds`.

Enough for products to be fast, and few enough for many jobs. One shift for all rows is nearly all the work of "shift".
"""

_WHOLE = ("gap",)
"""Bounds that are computed for whole pieces even where only some of their rows are asked for.

Its iterations are in float32, where a row's last bits depend on how many others a product has, and digits of the bound
on these. The other bounds of a row differ by rounding in float64.
"""

_LEAST = 1e-9  # seconds: a time limit must be positive

_BOUND_HELP = (
    "Lower bound, from fast to tight: gap (duality gap of Frank-Wolfe), shift (relaxation with a diagonal shift), sdp "
    "(semidefinite relaxation), cuts (sdp with the constraints Z >= 0)."
)


def certify(
    instance: InstanceArgument,
    mask: Annotated[Path, typer.Option("--mask", help="Mask file, as written by `maskopt solve --out`.")],
    pattern: PatternOption = "per-row",
    sparsity: SparsityOption = None,
    bound: Annotated[str, typer.Option("--bound", help=_BOUND_HELP)] = "gap",
    rows: RowsOption = ":",
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", help="Seconds for the proof; the bounds proven by then are reported."),
    ] = None,
    jobs: JobsOption = None,
    backend: BackendOption = Backend.LOKY,
    json: JsonOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = "1G",
    quiet: QuietOption = False,
) -> None:
    """Prove a lower bound on the error of every mask in a set, and report how close a given mask comes to it.

    With --rows, parts of a layer can be certified by several commands, whose JSON files maskopt merge puts together.
    """
    check_outputs(json)
    if bound not in _PIECES:
        raise MaskoptError(f"There is no bound {bound!r}; choose one of {', '.join(_PIECES)}.")
    from maskopt.bounds import check_bound
    from maskopt.checks import check_time_limit

    check_time_limit(time_limit)
    masks, working, chosen = parse_masks(pattern, sparsity), parse_memory(memory), load_mask(mask)
    _, layer = load_layer(instance, check_device(device))
    masks.check(layer.shape)
    if chosen.shape != layer.shape:
        raise MaskoptError(f"The mask {mask} has shape {tuple(chosen.shape)}, the weight {layer.shape}.")
    chosen = chosen.to(layer.device)
    if not masks.contains(chosen):
        raise MaskoptError(f"The mask {mask} does not belong to {masks}; give the pattern it was made for.")
    index = parse_rows(rows, layer.shape[0])
    settings = part_settings(instance, index, layer.shape, pattern, sparsity, masks)
    check_row_blocks(masks, index, settings["row_block"])
    if bound != "gap":
        check_bound(masks, bound)
    began = time.perf_counter()
    with Bar(quiet) as bar, open_workers(backend, jobs) as workers:
        certificates = _certificates(layer, masks, chosen, index, bound, working, time_limit, workers, bar)
    settings |= {
        "mask": str(mask),
        "mask_sha256": content_hash(mask),
        "bound": bound,
        "time_limit": time_limit,
        "device": device,
        "memory": working,
        "jobs": workers.count,
        "backend": backend.value,
    }
    report = certify_report(certificates, time.perf_counter() - began, settings, environment())
    with json_output(json, report):
        show_certificates(tables(json), report)


def _certificates(
    layer: LayerReconstruction,
    masks: MaskSet,
    chosen: Tensor,
    rows: slice,
    kind: str,
    memory: int,
    time_limit: float | None,
    workers: Workers,
    bar: Bar,
) -> list[Figures]:
    """Return what is proven of every row block among some rows."""
    from maskopt.bounds.work import within

    of, row_block = layer.shape[0], masks.row_block(layer.shape)
    pieces = _pieces(rows, of, row_block, kind)
    elsewhere = not workers.here(len(pieces))
    rounds = -(-len(pieces) // workers.count) if elsewhere else len(pieces)
    began = time.perf_counter()

    def left(number: int) -> float | None:
        """Return the seconds for a piece that begins now: all pieces get as many, and what earlier ones left."""
        if time_limit is None:
            return None
        turn = number // workers.count if elsewhere else number
        return max(_LEAST, time_limit * (turn + 1) / rounds - (time.perf_counter() - began))

    def tell(fraction: float) -> None:
        passed = 0.0 if time_limit is None else (time.perf_counter() - began) / time_limit
        bar.tell(kind, min(1.0, max(fraction, passed)))

    tell(0.0)
    parts = [piece.computed for piece in pieces]
    sets = [masks if part == slice(0, of) else masks.rows(part, layer.shape) for part in parts]
    found: list[list[tuple[float, float, bool]]] = []
    if elsewhere:
        weight, gram, device = layer.weight.cpu().numpy(), layer.gram.cpu().numpy(), str(layer.device)
        kept = chosen.cpu().numpy()
        tasks = (
            (weight[part], gram, kept[part], device, own, row_block, kind, memory, left(number), workers.check)
            for number, (part, own) in enumerate(zip(parts, sets, strict=True))
        )
        found = on_workers(_prove_elsewhere, tasks, workers, lambda done: tell(done / len(pieces)))
    else:
        for number, (part, own) in enumerate(zip(parts, sets, strict=True)):
            progress = within(tell if bar.visible else None, number / len(pieces), (number + 1) / len(pieces))
            found.append(_prove(layer.rows(part), own, chosen[part], row_block, kind, memory, left(number), progress))
    return [
        certificate(row, row_block, *proven[(row - piece.computed.start) // row_block])
        for piece, proven in zip(pieces, found, strict=True)
        for row in range(piece.wanted.start, piece.wanted.stop, row_block)
    ]


@dataclass(frozen=True)
class _Piece:
    """Rows that are computed together, and those of them that are asked for."""

    computed: slice
    wanted: slice


def _pieces(rows: slice, of: int, row_block: int, kind: str) -> list[_Piece]:
    """Cut rows of a layer of `of` rows into pieces of whole row blocks, at places that depend on the layer alone."""
    size = _PIECES[kind]
    if size is None:
        return [_Piece(rows, rows)]
    size = max(1, size // row_block) * row_block
    edges = [rows.start, *range((rows.start // size + 1) * size, rows.stop, size), rows.stop]
    wanted = [slice(a, b) for a, b in itertools.pairwise(edges)]
    if kind not in _WHOLE:
        return [_Piece(piece, piece) for piece in wanted]
    starts = [piece.start // size * size for piece in wanted]
    return [_Piece(slice(a, min(a + size, of)), piece) for a, piece in zip(starts, wanted, strict=True)]


def _prove_elsewhere(
    weight: NDArray[Any], gram: NDArray[Any], chosen: NDArray[Any], device: str, masks: MaskSet, *settings: Any
) -> list[tuple[float, float, bool]]:
    """Call `_prove` for data that were sent to a worker."""
    import torch

    from maskopt.problems import LayerReconstruction

    # Copies, because joblib may have mapped the arrays into memory that cannot be written to.
    weights, grams, mask = (torch.tensor(array, device=device) for array in (weight, gram, chosen))
    return _prove(LayerReconstruction(weights, grams, check=False), masks, mask, *settings)


def _prove(
    problem: LayerReconstruction,
    masks: MaskSet,
    chosen: Tensor,
    row_block: int,
    kind: str,
    memory: int,
    time_limit: float | None,
    progress: Progress | None = None,
) -> list[tuple[float, float, bool]]:
    """Return a mask's error, the proven bound, and whether no time limit has cut it short, for each row block."""
    import torch

    from maskopt.bounds import mask_bounds, stop_after
    from maskopt.solvers import FrankWolfe, State, Status, solve

    errors = problem.objective(chosen).view(-1, row_block).sum(1)
    if kind == "gap":

        def tell(state: State) -> None:
            if progress is not None:
                progress(state.fraction)

        method = FrankWolfe("conjugate", polish=False)
        result = solve(
            problem, masks, method, callback=None if progress is None else tell, time_limit=time_limit, memory=memory
        )
        assert result.lower_bound is not None  # layers are convex
        bound, finished = (
            result.lower_bound,
            torch.full_like(result.lower_bound, result.status is not Status.TIME_LIMIT),
        )
    else:
        of_rows = cast("BoundKind", kind)
        found = mask_bounds(problem, masks, of_rows, memory=memory, stop=stop_after(time_limit), progress=progress)
        bound, finished = found.bound, found.finished
    return list(zip(errors.tolist(), bound.tolist(), finished.bool().tolist(), strict=True))
