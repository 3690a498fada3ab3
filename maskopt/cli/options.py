"""Options common to several commands, and the words behind them."""

import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from maskopt.oracles import MaskSet

__all__ = [
    "PATTERN_HELP",
    "SOLVER_NAMES",
    "WEIGHTS_HELP",
    "BatchOption",
    "DeviceOption",
    "JsonOption",
    "MemoryOption",
    "ModelArgument",
    "PatternOption",
    "QuietOption",
    "SeqlenOption",
    "SettingsOption",
    "SolverOption",
    "SparsityOption",
    "check_device",
    "check_seqlen",
    "parse_masks",
    "parse_memory",
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
"""Names of `maskopt.solvers.SOLVERS`, which takes seconds to import."""

PATTERN_HELP = (
    "per-row, unstructured (whole matrix), columns, rows, blocks-HxW, n:m such as 2:4, which keeps 2 of every 4 "
    "inputs, or transposable-n:m."
)

PatternOption = Annotated[str, typer.Option("--pattern", "-p", help=PATTERN_HELP)]
SparsityOption = Annotated[
    float | None, typer.Option("--sparsity", "-s", help="Fraction of the weights to prune, 0 to 1; not needed by n:m.")
]
SolverOption = Annotated[
    str | None, typer.Option("--solver", help=f"One of {', '.join(SOLVER_NAMES)}.", show_default="continuation")
]
WEIGHTS_HELP = (
    "What becomes of the surviving weights: keep, lsq (least squares on the solver's mask), or a method that chooses "
    "mask and weights together: sparsegpt, admm, alps, fista, best."
)
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="Change a setting of the solver (of the method where --weights chooses the mask); may be repeated.",
    ),
]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write every figure as JSON to a new file; - prints it.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1 ...")]
MemoryOption = Annotated[str, typer.Option("--memory", help="Working memory of the solver, such as 500M or 2G.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or an id on the Hugging Face hub.")]
SeqlenOption = Annotated[
    int | None,
    typer.Option("--seqlen", min=2, help="Tokens per window; by default 2048 or what the model can take."),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Windows run through the model at a time.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def parse_memory(text: str) -> int:
    """Return the number of bytes meant by "2G", "500M", "1.5GiB" or a plain number.

    Raises
    ------
    MaskoptError
        If it is none of these.
    """
    match = re.fullmatch(
        r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE | re.ASCII
    )
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not 1 <= size < 2**63:
        raise MaskoptError(f"The memory must be a size such as 500M or 2G; got {text!r}.")
    return size


def parse_masks(pattern: str, sparsity: float | None) -> "MaskSet":
    """Return the set named by a pattern and the fraction of weights to prune, as `maskopt.oracles.parse_masks` does."""
    from maskopt.oracles import parse_masks as parse  # takes seconds, which no help should take

    return parse(pattern, sparsity)


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
    except Exception as error:  # torch has many for devices that this build, or this machine, lacks
        said = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise MaskoptError(f"The device {name!r} cannot be used: {said or type(error).__name__}.") from error
    return name


def check_seqlen(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", wanted: int | None) -> int:
    """Return the window length to use.

    Raises
    ------
    MaskoptError
        If the one asked for is longer than the model can take.
    """
    from maskopt.models import context_length, default_seqlen

    longest = context_length(model, tokenizer)
    if wanted is not None and longest is not None and wanted > longest:
        raise MaskoptError(f"The model takes at most {longest} tokens at a time, so --seqlen {wanted} is too long.")
    return default_seqlen(model, tokenizer) if wanted is None else wanted


def require_file(what: str, path: Path) -> Path:
    """Return `path` if a non-empty file lies there, before anything slow is started.

    Raises
    ------
    MaskoptError
        If not.
    """
    if not os.path.isfile(path):  # false for every name that cannot be one
        raise MaskoptError(f"The {what} {path} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise MaskoptError(f"The {what} {path} is empty.")
    return path


def require_transformers() -> None:
    """Insist on the optional dependency that language models need.

    Raises
    ------
    MaskoptError
        If it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MaskoptError('Language models need transformers, which is missing: pip install "maskopt[hf]".')
