"""Options common to several commands, and the functions that read them."""

import importlib.util
import os
import re
import warnings
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from maskopt.oracles import MaskSet

__all__ = [
    "CORRECTION",
    "INSTANCE_HELP",
    "PATTERN_HELP",
    "RULE_NAMES",
    "SOLVER_NAMES",
    "SPARSITY_HELP",
    "WEIGHTS_HELP",
    "BatchOption",
    "CacheOption",
    "CalibrationOption",
    "CorrectionOption",
    "DeviceOption",
    "ExcludeOption",
    "FixedOption",
    "IncludeOption",
    "InstanceArgument",
    "JsonOption",
    "MemoryOption",
    "ModelArgument",
    "PatternOption",
    "Place",
    "PlotOption",
    "Propagate",
    "PropagateOption",
    "QuietOption",
    "ResumeOption",
    "SamplesOption",
    "SeedOption",
    "SeqlenOption",
    "SettingsOption",
    "SolverOption",
    "SparsityOption",
    "StatesOption",
    "Target",
    "TargetOption",
    "WeightsOption",
    "check_correction",
    "check_device",
    "check_proof_time",
    "check_seqlen",
    "check_unused",
    "parse_fixed",
    "parse_masks",
    "parse_memory",
    "parse_together",
    "require_file",
    "require_transformers",
]

SOLVER_NAMES = (
    "magnitude",
    "wanda",
    "ria",
    "sparsefw",
    "one-swap",
    "branch-and-bound",
    "continuation",
    "frank-wolfe",
    "conjugate",
    "away",
    "pairwise",
    "blended-pairwise",
    "dicg",
    "blended-dicg",
    "boosted",
    "momentum",
    "stochastic",
    "lazy",
    "block-coordinate",
    "fully-corrective",
    "brute-force",
    "scip",
)
"""Names of `maskopt.solvers.SOLVERS`, written out because its import takes seconds."""

INSTANCE_HELP = (
    "Safetensors file of a layer: the matrices `weight` (outputs x inputs) and `gram` (X X^T of its calibration inputs "
    "X, inputs x inputs)."
)
InstanceArgument = Annotated[Path, typer.Argument(metavar="INSTANCE", help=INSTANCE_HELP)]

PATTERN_HELP = (
    "Groups in which a fixed number of weights is kept: per-row, unstructured (the whole matrix), n:m such as 2:4 "
    "(keeps 2 of every 4 inputs), transposable-n:m; or whole units: columns, rows, blocks-HxW."
)

PatternOption = Annotated[str, typer.Option("--pattern", "-p", help=PATTERN_HELP)]
SPARSITY_HELP = "Fraction of the weights to prune, 0 to 1; required unless the pattern is n:m."
SparsityOption = Annotated[float | None, typer.Option("--sparsity", "-s", help=SPARSITY_HELP)]
SolverOption = Annotated[
    str | None,
    typer.Option("--solver", help=f"Chooses the mask; one of {', '.join(SOLVER_NAMES)}.", show_default="continuation"),
]
WEIGHTS_HELP = (
    "Update of the surviving weights: keep (none), lsq (least squares on the solver's mask), or a method that chooses "
    "mask and weights together: sparsegpt, admm, alps, fista, best."
)
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help=WEIGHTS_HELP, show_default="best, or keep where --solver is given")
]
CalibrationOption = Annotated[Path, typer.Option("--calibration", help="Text file, or JSON lines with a field `text`.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="Setting of the solver, or of the --weights method where that chooses the mask; may be repeated.",
    ),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Write all results as JSON to a new file; - prints them to standard output."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Device of the computation: cpu, cuda, cuda:1 ...")]
MemoryOption = Annotated[str, typer.Option("--memory", help="Working memory of the solver, such as 500M or 2G.")]


class Place(StrEnum):
    """Where tensors wait."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


StatesOption = Annotated[
    Place | None,
    typer.Option(
        "--states",
        help="Where the states of all windows wait between blocks; by default on the device up to an eighth of "
        "--memory (a sixth of what is free on a GPU), beyond that in the main memory (of a GPU) or in temporary files.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run of the same command; otherwise begin one.")
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, or the id of a model on the Hugging Face hub.")
]
SeqlenOption = Annotated[
    int | None,
    typer.Option(
        "--seqlen", min=2, help="Tokens per window; by default 2048, or the model's context length if shorter."
    ),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Windows per forward pass of the model.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Number of calibration windows.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the random choice of calibration windows.")]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Prune only layers whose full name matches; may be repeated."),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="GLOB", help="Leave layers dense whose full name matches; may be repeated."),
]
FixedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sparsity-of",
        metavar="GLOB=SPARSITY",
        help="Sparsity of the layers whose full name matches, such as '*.down_proj=0.4'; --sparsity is then that "
        "of all others together. May be repeated; the last one that matches decides.",
    ),
]
TogetherOption = Annotated[
    list[str] | None,
    typer.Option(
        "--together",
        metavar="GLOB,GLOB",
        help="Layers of a block whose full names match one of these patterns get the same sparsity, such as "
        "'*.q_proj,*.k_proj,*.v_proj' for kernels that fuse them. May be repeated.",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the sparsity by depth and kind of layer: .png, .svg or .pdf."),
]

CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="FOLDER",
        help="Keep what the allocation measures in this folder, made if it is not there: the same command goes on "
        "where an interrupted one ended.",
    ),
]


class Propagate(StrEnum):
    """States on which later blocks are calibrated."""

    CORRECTED = "corrected"
    PRUNED = "pruned"
    DENSE = "dense"


PropagateOption = Annotated[
    Propagate | None,
    typer.Option(
        "--propagate",
        help="Inputs on which a layer is calibrated: those in the pruned model, those in the dense one, or "
        "corrected: inputs in the pruned model, with the dense model's outputs as target.",
        show_default="corrected for continuation, lsq, fista and best, else pruned",
    ),
]
CorrectionOption = Annotated[
    float,
    typer.Option(
        "--correction",
        metavar="S",
        help="With corrected: how far the target moves from the layer's own output (0) to the dense model's (1).",
    ),
]


class Target(StrEnum):
    """What layers that add to the residual stream aim at."""

    STREAM = "stream"
    LAYER = "layer"


TargetOption = Annotated[
    Target,
    typer.Option(
        "--target",
        help="With corrected, what layers aim at whose output is added to the residual stream: the dense model's "
        "stream behind them, or their own outputs alone.",
    ),
]
CORRECTION = 0.7
"""Of `maskopt.models`, written out because its import takes seconds."""
RULE_NAMES = ("uniform", "auto", "owl", "dlp", "alpha", "lsa", "atp", "evo", "kl", "fisher")
"""Names of `maskopt.models.RULES`, written out because its import takes seconds."""


def parse_memory(text: str) -> int:
    """Return the number of bytes in a size such as "2G", "500M", "1.5GiB" or a plain number.

    Raises
    ------
    MaskoptError
        If it is no such size.
    """
    match = re.fullmatch(
        r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE | re.ASCII
    )
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not 1 <= size < 2**63:
        raise MaskoptError(f"The memory must be a size such as 500M or 2G; got {text!r}.")
    return size


def parse_masks(pattern: str, sparsity: float | None) -> "MaskSet":
    """Return the set of a pattern and a fraction of weights to prune; see `maskopt.oracles.parse_masks`."""
    from maskopt.oracles import parse_masks as parse  # takes seconds, too long for --help

    return parse(pattern, sparsity)


def parse_together(items: list[str] | None) -> list[list[str]]:
    """Return groups of patterns of names, from "GLOB,GLOB".

    Raises
    ------
    MaskoptError
        If a pattern is empty.
    """
    groups = [[part.strip() for part in item.split(",")] for item in items or ()]
    for item, group in zip(items or (), groups, strict=True):
        if not all(group):
            raise MaskoptError(
                "--together takes patterns of names with commas between them, such as '*.q_proj,*.k_proj'; "
                f"got {item!r}."
            )
    return groups


def parse_fixed(items: list[str] | None) -> dict[str, float]:
    """Return sparsities by pattern of names, from "GLOB=SPARSITY".

    Raises
    ------
    MaskoptError
        If an item has no such form.
    """
    found: dict[str, float] = {}
    for item in items or ():
        glob, sign, value = item.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not glob or not sign or not 0 <= number <= 1:
            raise MaskoptError(
                "--sparsity-of takes a pattern of names and a sparsity between 0 and 1, such as '*.down_proj=0.4'; "
                f"got {item!r}."
            )
        found.pop(glob, None)
        found[glob] = number
    return found


def check_unused(given: Mapping[str, bool], why: str) -> None:
    """Refuse an option that would have no effect.

    Parameters
    ----------
    given : mapping of str to bool
        Whether each option is given, by its name.
    why : str
        What it does, and what it needs for that: a predicate.

    Raises
    ------
    MaskoptError
        If one is given.
    """
    for name, there in given.items():
        if there:
            raise MaskoptError(f"{name} {why}; leave it out.")


def check_correction(propagate: Propagate | None, corrects: bool, correction: float, target: Target) -> None:
    """Refuse settings of the correction where nothing is corrected.

    Parameters
    ----------
    propagate : Propagate, optional
    corrects : bool
        Whether the solver corrects errors upstream by default.
    correction : float
    target : Target

    Raises
    ------
    MaskoptError
        If they are given and nothing is corrected.
    """
    if propagate is Propagate.CORRECTED or (propagate is None and corrects):
        return
    given = {"--correction": correction != CORRECTION, "--target": target is not Target.STREAM}
    check_unused(given, "says how errors upstream are corrected, and only --propagate corrected corrects them here")


def check_proof_time(time_limit: float | None, certify: bool) -> None:
    """Check a time limit for the proofs of --certify.

    Raises
    ------
    MaskoptError
        If it is no time, or nothing is to be proven.
    """
    from maskopt.checks import check_time_limit

    check_time_limit(time_limit)
    if time_limit is not None and not certify:
        raise MaskoptError("--time-limit applies to the proofs of --certify; give both, or leave it out.")


def check_device(name: str) -> str:
    """Return `name` if torch can compute there.

    Raises
    ------
    MaskoptError
        If it cannot.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros((), device=name, dtype=torch.float64).item()
    except Exception as error:  # torch raises many kinds for missing devices
        said = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise MaskoptError(f"The device {name!r} cannot be used: {said or type(error).__name__}.") from error
    return name


def check_seqlen(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", wanted: int | None) -> int:
    """Return the window length to use.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    wanted : int or None
        Tokens asked for; None for the default.

    Raises
    ------
    MaskoptError
        If it is longer than the model can take.
    """
    from maskopt.models import context_length, default_seqlen

    longest = context_length(model, tokenizer)
    if wanted is not None and longest is not None and wanted > longest:
        raise MaskoptError(f"The model takes at most {longest} tokens at a time, so --seqlen {wanted} is too long.")
    return default_seqlen(model, tokenizer) if wanted is None else wanted


def require_file(what: str, path: Path) -> Path:
    """Return a path after a check that it is a non-empty file.

    Parameters
    ----------
    what : str
        What messages call it.
    path : Path

    Raises
    ------
    MaskoptError
        If it is not.
    """
    if not os.path.isfile(path):  # false, and no exception, for invalid names
        raise MaskoptError(f"The {what} {path} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise MaskoptError(f"The {what} {path} is empty.")
    return path


def require_transformers() -> None:
    """Check that transformers and accelerate, optional dependencies, are installed.

    Raises
    ------
    MaskoptError
        If one is not installed.
    """
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MaskoptError(f'Language models need {package}, which is missing: pip install "maskopt[hf]".')
