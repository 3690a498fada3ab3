"""What commands print and write: tables, progress bars, JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
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

__all__ = ["Bar", "check_outputs", "environment", "facts", "finite", "json_output", "stderr", "tables"]

_FILE_WIDTH = 200  # columns where no terminal says how wide it is; tables are as wide as they need


class _Console(Console):
    """A console that says so when its reader is gone, instead of leaving in silence."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def stderr() -> Console:
    """Return the console of messages and progress."""
    return _Console(stderr=True)


def tables(json_target: str | None) -> Console:
    """Return the console of tables: standard output, unless the JSON goes there."""
    to_stderr = json_target == "-"
    stream = sys.stderr if to_stderr else sys.stdout
    return _Console(stderr=to_stderr, width=None if stream.isatty() else _FILE_WIDTH, highlight=False)


def facts(lines: Mapping[str, str]) -> Table:
    """Return names and values as a table without borders."""
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


class _TimeLeft(TimeRemainingColumn):
    """What the command says is left; without that, what the speed of the last minute says."""

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
        What is being done first.
    steps : int
        How often `step` will be called.
    """

    def __init__(self, quiet: bool, what: str = "", steps: int = 1) -> None:
        self.visible = not quiet and sys.stderr.isatty()
        self._steps, self._begun = steps, 0
        console = stderr()
        # Percent and times need 28 columns, and are what a narrow terminal shows in any case.
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
        """Show what is being done, which fraction of everything is done, and the seconds left if the command knows."""
        self._progress.update(self._task, description=what, total=1.0, completed=fraction, left=left)

    def stage(self, what: str) -> None:
        """Begin something else at zero."""
        self._progress.reset(self._task, description=what)

    def step(self, what: str) -> Callback | None:
        """Begin the next step and return the callback that shows a solver's progress in it, None where unseen."""
        done = self._begun
        self._begun += 1
        self.tell(what, done / self._steps)

        def tell(state: State) -> None:
            self.tell(what, (done + state.fraction) / self._steps)

        return tell if self.visible else None


def check_outputs(json: str | None, *targets: str | Path | None) -> None:
    """Refuse, before any work, outputs that could not be written after it.

    Parameters
    ----------
    json : str, optional
        Where figures go; "-" is standard output.
    *targets : path-like, optional
        Where everything else goes.

    Raises
    ------
    MaskoptError
        If one exists, cannot be made, or two are the same.
    """
    if "-" in map(str, targets):
        raise MaskoptError("Only --json writes to standard output for a -; give other outputs names.")
    named = [target for target in (None if json == "-" else json, *targets) if target is not None]
    paths = [require_absent(target) for target in named]
    places = [path.absolute().parent.resolve() / path.name for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise MaskoptError(f"Two outputs have the same name {paths[number]}; give them different ones.")


@contextmanager
def json_output(target: str | None, figures: Mapping[str, Any]) -> Iterator[None]:
    """Write figures aside, run the body (other outputs), then let the JSON file take its name.

    A number that is not finite becomes null: JSON has none.

    Parameters
    ----------
    target : str, optional
        A path that does not exist, "-" for standard output, None for nothing.
    figures : mapping
        What to write.
    """
    text = json.dumps(finite(figures), indent=2, allow_nan=False) + "\n"
    if target is None or target == "-":
        yield
        if target == "-":
            sys.stdout.write(text)
        return
    with atomic_path(target) as aside:
        aside.write_text(text, encoding="utf-8")
        yield


def finite(value: Any) -> Any:
    """Return figures with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Return versions and circumstances that figures depend on."""
    import torch

    versions = {
        "maskopt": maskopt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    transformers = sys.modules.get("transformers")  # never imported for its version's sake
    return versions if transformers is None else {**versions, "transformers": transformers.__version__}
