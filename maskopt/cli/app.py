"""The `maskopt` program: its commands, and the messages and exit codes of failures."""

import errno
import os
import re
import select
import sys
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from maskopt import __version__, files
from maskopt.cli import signals
from maskopt.cli.allocate import allocate
from maskopt.cli.certify import certify
from maskopt.cli.compare import compare
from maskopt.cli.demo import demo
from maskopt.cli.doctor import doctor
from maskopt.cli.evaluate import evaluate
from maskopt.cli.merge import merge
from maskopt.cli.output import stderr
from maskopt.cli.pack import pack, unpack
from maskopt.cli.prune import prune
from maskopt.cli.recover import recover
from maskopt.cli.report import report
from maskopt.cli.scale import scale
from maskopt.cli.shrink import shrink
from maskopt.cli.solve import solve
from maskopt.cli.trace import trace
from maskopt.cli.verify import verify
from maskopt.errors import MaskoptError, RankLostError, is_memory_failure
from maskopt.launch import launched

__all__ = ["app"]

_LONG = 300  # letters without a space; longer words are shortened in messages
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EROFS)


class _Guarded(TyperGroup):
    """Turns failures into one sentence and an exit code; a traceback means a bug.

    Exit codes: 2 for errors that the user can correct, 1 for failures of the machine (disk, memory), 128 + n where
    signal n ended the program.
    """

    def main(self, args: Any = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """Run the program and exit with its code; without `standalone_mode` return the code."""
        debug = "--debug" in (sys.argv[1:] if args is None else args)
        try:
            signals.begin()
            _check_standard_output()
            code = super().main(args, standalone_mode=False, **extra)
            sys.stdout.flush()
            signals.finish()
        except (Exception, KeyboardInterrupt, signals.Ended) as error:
            if debug and not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.message, end="")  # type: ignore[union-attr]  # older versions have printed it
                sys.exit(2)
            signals.finish()
            sentence, code = _explain(error)
            files.discard_unfinished()
            _tell(sentence)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer < 0.20 declares click's Context
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would exit without a message
            raise signals.Ended(signals.SIGINT) from error


def _check_standard_output() -> None:
    """Check, before any work, that standard output can be written to; escape characters it cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # no file, such as what tests capture
        return
    try:
        os.write(number, b"")  # a full device refuses even that
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(number, select.POLLERR)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    except OSError as error:
        raise MaskoptError(f"Standard output cannot be written to: {files.reason(error)}.") from error


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the sentence and the exit code of a failure; raise it again if it is a bug."""
    if isinstance(error, KeyboardInterrupt):
        error = signals.Ended(signals.SIGINT)
    if isinstance(error, signals.Ended):
        return signals.outcome(error.number), signals.CODES[error.number]
    if isinstance(error, MaskoptError):
        failed = _is_disk_failure(error.__cause__) or isinstance(error, RankLostError)
        return _with_what_was_written(str(error)), 1 if failed else 2
    if hasattr(error, "format_message"):  # of whichever copy of click typer uses
        context = getattr(error, "ctx", None)
        path = "maskopt" if context is None else context.command_path
        return f"{' '.join(error.format_message().split()).rstrip('.')}; see {path} --help.", 2
    if isinstance(error, OSError) and _standard_output_fails():
        return f"Standard output cannot be written to: {files.reason(error)}; {signals.what_was_written()}.", 1
    if is_memory_failure(error):
        return f"The memory does not suffice; {signals.what_was_written()}; {_LESS}.", 1
    if isinstance(error, OSError):
        named = "" if error.filename is None else f" ({error.filename})"
        return f"The machine failed: {files.reason(error)}{named}; {signals.what_was_written()}.", 1
    if isinstance(error, SafetensorError):
        return f"The machine failed: {files.reason(error)}; {signals.what_was_written()}.", 1
    if isinstance(error, UnicodeError):
        return f"Some text is not what its encoding allows: {files.reason(error)}; {signals.what_was_written()}.", 2
    if isinstance(error, OverflowError):
        return f"A number is too large: {files.reason(error)}; {signals.what_was_written()}.", 2
    if isinstance(error, ImportError):
        return f"A part of the installation is missing or broken: {files.reason(error)}.", 2
    raise error


_LESS = "try a smaller --memory or fewer and shorter samples"


def _with_what_was_written(sentence: str) -> str:
    if signals.what_was_written() == signals.NOTHING:
        return sentence
    return f"{sentence.rstrip('.')}; {signals.what_was_written()}."


def _tell(sentence: str) -> None:
    """Print a sentence in one line, with unprintable characters escaped and very long words shortened."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in sentence)
    line = re.sub(rf"\S{{{_LONG},}}", lambda word: f"{word[0][:100]}...{word[0][-100:]}", line)
    if not signals.speaks():
        return
    try:
        stderr().print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
    except OSError:
        _give_up(sys.stderr)


def _standard_output_fails() -> bool:
    """Whether buffered standard output cannot be written; it is then discarded."""
    try:
        sys.stdout.flush()
    except OSError:
        _give_up(sys.stdout)
        return True
    return False


def _give_up(stream: Any) -> None:
    """Discard the rest of a stream, about which Python would otherwise complain at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError, AttributeError):
        return


def _is_disk_failure(cause: BaseException | None) -> bool:
    if isinstance(cause, MaskoptError):
        return _is_disk_failure(cause.__cause__)
    if isinstance(cause, OSError):
        return cause.errno in _FULL
    # safetensors keeps the system's error as text only.
    return isinstance(cause, SafetensorError) and "os error" in str(cause)


app = typer.Typer(
    cls=_Guarded,
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


_TOGETHER = ("prune", "recover")
"""Commands that several processes carry out together."""


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
) -> None:
    """Prune neural networks: choose the weights to remove so that the layers' outputs change as little as possible."""
    if launched() > 1 and context.invoked_subcommand not in _TOGETHER:
        raise MaskoptError(
            f"The command {context.invoked_subcommand} runs in one process, and torchrun has started "
            f"{launched()}; start it without torchrun, which serves {' and '.join(_TOGETHER)}."
        )


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
    epilog=f"Example:  maskopt verify {_INSTANCE} --rows 0:8 --columns 48 --sparsity 0.5 --exact scip --time-limit 60"
)(verify)
app.command(epilog=f"Example:  maskopt certify {_INSTANCE} --mask mask.safetensors --pattern per-row --sparsity 0.5")(
    certify
)
app.command(epilog="Example:  maskopt merge part-*.json --json layer.json")(merge)
app.command(
    epilog="Example:  maskopt prune Qwen/Qwen3-0.6B pruned --calibration text.txt --pattern 2:4 --evaluate held-out.txt"
)(prune)
app.command(
    epilog="Example:  maskopt allocate Qwen/Qwen3-0.6B --calibration text.txt --sparsity 0.6 --out plan.json "
    "--plot plan.svg"
)(allocate)
app.command(
    epilog="Example:  maskopt recover pruned recovered --against Qwen/Qwen3-0.6B --calibration text.txt --recover model"
)(recover)
app.command(
    epilog="Example:  maskopt shrink Qwen/Qwen3-0.6B smaller --calibration text.txt --neurons 0.3 --heads 0.25 "
    "--evaluate held-out.txt"
)(shrink)
app.command(
    epilog="Example:  maskopt evaluate pruned --against Qwen/Qwen3-0.6B --text held-out.txt --tasks arc_easy,piqa"
)(evaluate)
app.command(epilog="Example:  maskopt pack pruned packed --compress --json sizes.json")(pack)
app.command(epilog="Example:  maskopt unpack packed pruned --json -")(unpack)
app.command(epilog="Example:  maskopt scale meta-llama/Llama-3.1-70B --samples 128 --speed 60e12")(scale)
app.command(epilog="Example:  maskopt demo --json demo.json")(demo)
app.command(epilog="Example:  maskopt report compare.json --html compare.html")(report)
app.command(epilog="Example:  maskopt doctor --json -")(doctor)
