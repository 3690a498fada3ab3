"""The `maskopt` program: its commands, and what failures look like."""

import errno
from typing import Annotated, Any, NoReturn

import torch
import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from maskopt import __version__
from maskopt.cli.compare import compare
from maskopt.cli.demo import demo
from maskopt.cli.evaluate import evaluate
from maskopt.cli.output import stderr
from maskopt.cli.prune import prune
from maskopt.cli.solve import solve
from maskopt.cli.trace import trace
from maskopt.errors import MaskoptError

__all__ = ["app", "main"]


class _Guarded(TyperGroup):
    """Turns what may go wrong into one sentence and an exit code; a traceback means a bug.

    2: something the user can put right. 1: the machine (disk, memory). 130: interrupted.
    """

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer < 0.20 declares click's Context
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                raise
            _explain(error)


def _explain(error: BaseException) -> NoReturn:
    """Print a failure and leave; raise it again if it is none that users should see.

    Raises
    ------
    typer.Exit
        With the exit code.
    """
    if isinstance(error, KeyboardInterrupt):
        _leave("Interrupted; nothing was written.", 130)
    if isinstance(error, MaskoptError):
        _leave(str(error), 1 if _is_disk_failure(error.__cause__) else 2)
    # The reader of our output may leave early (`| head`): typer ends quietly then.
    if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, BrokenPipeError):
        _leave(f"The machine failed: {error}; nothing was written.", 1)
    if _is_memory_failure(error):
        _leave("The memory does not suffice; try a smaller --memory or fewer and shorter samples.", 1)
    raise error


def _leave(sentence: str, code: int) -> NoReturn:
    stderr().print(sentence, style="bold red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _is_disk_failure(cause: BaseException | None) -> bool:
    if isinstance(cause, OSError):
        return cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    # Its writer keeps the system's error as text only.
    return isinstance(cause, SafetensorError) and "os error" in str(cause)


def _is_memory_failure(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


app = typer.Typer(
    cls=_Guarded,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with:  maskopt demo",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"maskopt {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of any failure.")] = False,
) -> None:
    """Choose which weights of a network may go, so that its outputs change least."""


_INSTANCE = "layer.safetensors"
app.command(
    epilog=f"Example:  maskopt solve {_INSTANCE} --pattern per-row --sparsity 0.6 --out mask.safetensors --json -"
)(solve)
app.command(
    epilog=f"Example:  maskopt compare {_INSTANCE} --pattern per-row --pattern 2:4 --sparsity 0.5 --sparsity 0.6 "
    "--solvers 'wanda,sparsefw:iterations=500;alpha=0.5,one-swap,continuation'"
)(compare)
app.command(
    epilog=f"Example:  maskopt trace {_INSTANCE} --sparsity 0.5 --solvers away,pairwise,dicg --out trace.png "
    "--csv trace.csv"
)(trace)
app.command(
    epilog="Example:  maskopt prune Qwen/Qwen3-0.6B pruned --calibration text.txt --pattern 2:4 --evaluate held-out.txt"
)(prune)
app.command(epilog="Example:  maskopt evaluate pruned --text held-out.txt")(evaluate)
app.command(epilog="Example:  maskopt demo --json demo.json")(demo)


def main() -> None:
    """Run the program on the arguments of the process."""
    app(prog_name="maskopt")
