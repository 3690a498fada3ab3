"""The output of commands: tables, progress bars, JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

import maskopt
from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, require_absent

if TYPE_CHECKING:
    from maskopt.solvers import Callback, State

__all__ = [
    "BESIDE_THE_MODEL",
    "Bar",
    "check_outputs",
    "environment",
    "facts",
    "finite",
    "json_output",
    "show_evaluation",
    "stderr",
    "tables",
    "tell_memory",
]

BESIDE_THE_MODEL = "beside the model and its states"
_FILE_WIDTH = 200  # columns at most where output is no terminal


class _Console(Console):
    """A console that raises an error when its reader has closed the pipe, where rich exits silently."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def stderr() -> Console:
    """Return the console of messages and progress."""
    return _Console(stderr=True)


def tables(json_target: str | None) -> Console:
    """Return the console of tables: standard output, or standard error where the JSON is printed."""
    to_stderr = json_target == "-"
    stream = sys.stderr if to_stderr else sys.stdout
    return _Console(stderr=to_stderr, width=None if stream.isatty() else _FILE_WIDTH, highlight=False)


def facts(lines: Mapping[str, str]) -> Table:
    """Return a table of names and values, without borders."""
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def show_evaluation(console: Console, out: Path, text: Path | None) -> None:
    """Print the command that measures a saved model's perplexity, without line breaks, so that it can be copied.

    Parameters
    ----------
    console : Console
    out : Path
        The model's folder.
    text : Path or None
        What it was evaluated on; None if on nothing yet.
    """
    words = ["maskopt", "evaluate", str(out), "--text", "TEXT" if text is None else str(text)]
    console.print(f"Next: {shlex.join(words)}", markup=False, soft_wrap=True)


class _TimeLeft(TimeRemainingColumn):
    """The time left as the command estimates it, else from the speed of the last minute."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        if left is None:
            return super().render(task)
        minutes, seconds = divmod(int(left), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}", style="progress.remaining")


class Bar:
    """A progress bar with the time left on standard error, invisible with --quiet or without a terminal.

    Parameters
    ----------
    quiet : bool
        Whether to stay invisible.
    what : str
        Description of the first work.
    steps : int
        Number of calls of `step` to come.

    Attributes
    ----------
    visible : bool
        Whether the bar is shown.
    """

    def __init__(self, quiet: bool, what: str = "", steps: int = 1) -> None:
        self.visible = not quiet and sys.stderr.isatty()
        self._steps, self._begun = steps, 0
        console = stderr()
        # Percentage and times need 28 columns, which even a narrow terminal reserves.
        words = max(12, min(44, console.width - 40))
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(max_width=words, no_wrap=True)),
            BarColumn(max(4, min(40, console.width - words - 30))),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            _TimeLeft(),
            console=console,
            transient=True,
            disable=not self.visible,
            refresh_per_second=4,
            speed_estimate_period=60,
        )
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def tell(self, what: str, fraction: float, left: float | None = None) -> None:
        """Show a description of the work, the fraction of everything that is done, and the seconds left if known."""
        self._progress.update(self._task, description=what, total=1.0, completed=fraction, left=left)

    def stage(self, what: str) -> None:
        """Begin other work, at zero."""
        self._progress.reset(self._task, description=what)

    def step(self, what: str) -> Callback | None:
        """Begin the next step and return the callback that shows a solver's progress; None if the bar is invisible."""
        done = self._begun
        self._begun += 1
        self.tell(what, done / self._steps)

        def tell(state: State) -> None:
            self.tell(what, (done + state.fraction) / self._steps)

        return tell if self.visible else None


def tell_memory(what: str, needed: int, where: str, bar: Bar) -> None:
    """Say, before the work, how much memory something takes, if there is a bar."""
    if bar.visible:
        stderr().print(f"{what} takes about {needed / 1e9:.2g} GB {where}.", highlight=False)


def check_outputs(json: str | None, *targets: str | Path | None) -> None:
    """Check, before any work, that all outputs can be written.

    Parameters
    ----------
    json : str, optional
        File of the JSON; "-" is standard output.
    *targets : path-like, optional
        Other outputs.

    Raises
    ------
    MaskoptError
        If one exists or cannot be made, or two are the same.
    """
    if "-" in map(str, targets):
        raise MaskoptError("Only --json accepts - for standard output; give other outputs file names.")
    named = [target for target in (None if json == "-" else json, *targets) if target is not None]
    paths = [require_absent(target) for target in named]
    places = [path.absolute().parent.resolve() / path.name for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise MaskoptError(f"Two outputs have the same name {paths[number]}; give them different ones.")


@contextmanager
def json_output(target: str | None, figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Write figures to a temporary file, run the body (other outputs), then rename the file.

    What is known only after the body goes into the dictionary that is yielded, and then beside the figures.

    Numbers that are not finite become null, because JSON has none.

    Parameters
    ----------
    target : str, optional
        A path that does not exist, "-" for standard output, None for nothing.
    figures : mapping
        Content of the JSON.
    """
    further: dict[str, Any] = {}
    text = _dumped(figures)
    if target is None or target == "-":
        yield further
        if target == "-":
            sys.stdout.write(_dumped({**figures, **further}))
        return
    with atomic_path(target) as aside:
        aside.write_text(text, encoding="utf-8")
        yield further
        if further:
            aside.write_text(_dumped({**figures, **further}), encoding="utf-8")


def _dumped(figures: Mapping[str, Any]) -> str:
    return json.dumps(finite(figures), indent=2, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return figures with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Return the versions, platform and threads on which results depend."""
    import torch

    versions = {
        "maskopt": maskopt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    transformers = sys.modules.get("transformers")  # not imported only to read its version
    return versions if transformers is None else {**versions, "transformers": transformers.__version__}
