"""The folder beside an output in which commands keep what an interrupted run needs to go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from maskopt import files
from maskopt.cli.output import json_output, stderr
from maskopt.errors import MaskoptError
from maskopt.launch import first_rank

if TYPE_CHECKING:
    from maskopt.models.ranks import Ranks

__all__ = ["WorkFolder", "tell_complete"]


class WorkFolder:
    """OUT.unfinished, as long as OUT is not complete; a context manager.

    The folder is locked by the process that works in it. An exception leaves it there if a block is finished, and the
    program's message says so.

    Parameters
    ----------
    out : Path
        The output.
    resume : bool
        Whether to go on with an interrupted run.
    needed : bool
        Whether the command keeps anything; without, there is no folder.

    Attributes
    ----------
    path : Path or None

    Raises
    ------
    MaskoptError
        If `resume` is asked for a command that keeps nothing.
    """

    def __init__(self, out: Path, resume: bool, needed: bool) -> None:
        self._folder = out.with_name(f"{out.name}.unfinished")
        self.path = self._folder if needed else None
        self._out, self._resume = out, resume
        self._lock: IO[str] | None = None
        if resume and not needed:
            raise MaskoptError(
                "--resume goes on with commands that work block by block; allocating sparsities (first `maskopt "
                "allocate --cache`, then --allocation PLAN) or widths, and fitting the whole model, need it at once."
            )

    def completed_before(self, command: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the report of the output if an earlier process completed it; None if it is not there.

        Parameters
        ----------
        command : mapping
            What the report says of a command that is the same.

        Raises
        ------
        MaskoptError
            If the output is that of another command.
        """
        if not self._resume or not self._out.exists():
            return None
        try:
            report: dict[str, Any] = json.loads((self._out / "report.json").read_text(encoding="utf-8"))
            known = report["command"]
            differing = [name for name, value in command.items() if known.get(name) != value]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            differing = ["command"]
        if differing:
            raise MaskoptError(
                f"The output {self._out} is there already, and another {differing[0]} made it; choose another name."
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        return report

    @contextmanager
    def among(self, ranks: Ranks) -> Iterator[None]:
        """Work in the folder with other processes, the first of which makes, locks and removes it.

        Parameters
        ----------
        ranks : Ranks
        """
        if ranks.first:
            with self:
                ranks.barrier()
                yield
            return
        # From the beginning: a signal that arrives during an import ends the process without passing here again.
        files.resumable = self._kept
        ranks.barrier()
        yield

    def __enter__(self) -> Self:
        if not self._resume and self._number():
            raise MaskoptError(
                f"An interrupted run of {self._out} is kept in {self._folder}, with {self._finished()}; add --resume "
                f"to go on, or remove that folder to start anew."
            )
        if self.path is None:
            return self
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = files.locked(self.path / "lock")
        except OSError as error:
            raise MaskoptError(f"The folder {self.path} cannot be written: {files.reason(error)}.") from error
        if self._lock is None:
            raise MaskoptError(f"Another process is working in {self.path}; wait for it, or write another output.")
        files.resumable = self._kept
        # What an earlier process, or each of several, needed for itself.
        for own in self.path.glob("weights-*"):
            shutil.rmtree(own, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        self._lock.close()
        if error is None or not self._kept():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kept(self) -> str:
        """Return what there is to go on with, as a clause; empty where there is nothing."""
        if not self._number() or self._out.exists():
            return ""
        return f"{self._finished()} kept in {self._folder}, add --resume to the command to go on"

    def _number(self) -> int:
        from maskopt.models.journal import Journal

        return Journal.inside(self._folder).stages if self._folder.is_dir() else 0

    def _finished(self) -> str:
        number = self._number()
        return f"{number} finished block{'' if number == 1 else 's'}"


def tell_complete(json: str | None, report: dict[str, Any], out: Path) -> None:
    """Give out the report of an output that is there already."""
    if first_rank():
        with json_output(json, report):
            stderr().print(f"{out} is complete already.", highlight=False, soft_wrap=True)
