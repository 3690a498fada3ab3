"""Signals and closed streams: an interrupt leaves no partial output and is reported in one sentence."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from maskopt.launch import first_rank

__all__ = [
    "CODES",
    "Ended",
    "begin",
    "finish",
    "handled",
    "open_standard_streams",
    "outcome",
    "shield",
    "speaks",
    "what_was_written",
]

CODES = {number: 128 + number for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))}
"""Exit codes by the signals that end the program in an orderly manner."""

_ENDINGS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}


NOTHING = "nothing was written"
SIGINT = signal.SIGINT


class Ended(BaseException):
    """A signal asked the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_arrived: list[int] = []
"""Signals received."""

_shields = 0
"""Number of open `shield` blocks."""

_first = 0
"""Number of outputs that were complete when the command began."""


def begin() -> None:
    """Begin a command: outputs written before are not reported as its own."""
    from maskopt import files

    global _first
    _first, files.shielded, files.resumable = files.renamed(), shield, None


def _handle(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    if _shields:
        return
    if _is_importing(frame):
        # Imports swallow exceptions or turn them into others, and have no output to clean up.
        _leave_at_once(number)
    raise Ended(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _leave_at_once(number: int) -> None:
    files = sys.modules.get("maskopt.files")
    if files is not None and hasattr(files, "discard_unfinished"):
        files.discard_unfinished()
    with contextlib.suppress(OSError):
        if not speaks():
            os._exit(CODES.get(number, 128 + number))
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar may have hidden it
        os.write(2, f"{cursor}{outcome(number)}\n".encode(errors="backslashreplace"))
    os._exit(CODES.get(number, 128 + number))


def speaks() -> bool:
    """Return whether this process tells how the command failed; one of several ranks does, the first that asks."""
    ranks = sys.modules.get("maskopt.models.ranks")
    ask = getattr(ranks, "first_to_tell", None)  # missing while the module is imported
    return first_rank() if ask is None else bool(ask())


def outcome(number: int) -> str:
    """Return the sentence that reports a signal and the outputs written before it."""
    return f"{_ENDINGS.get(number, 'Ended')}; {what_was_written()}."  # type: ignore[call-overload]


def what_was_written() -> str:
    """Return a clause that says which outputs are complete."""
    files = sys.modules.get("maskopt.files")
    complete = files.written_since(_first) if files is not None and hasattr(files, "written_since") else []
    resumable = None if files is None else vars(files).get("resumable")
    if not complete and resumable is not None and (kept := resumable()):
        return str(kept)
    if not complete:
        return NOTHING
    return (
        f"{' and '.join(map(str, complete))} {'is' if len(complete) == 1 else 'are'} complete, nothing else was written"
    )


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Make signals raise `Ended` inside the block, and print one sentence for it."""
    try:
        for number in CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored on purpose
                signal.signal(number, _handle)
        sys.unraisablehook = _raise_later
        yield
    except Ended as ended:
        with shield():
            _leave_at_once(ended.number)
    except KeyboardInterrupt:
        _leave_at_once(signal.SIGINT)


def _raise_later(unraisable: sys.UnraisableHookArgs) -> None:
    """Raise the signal again where Python had to swallow the exception, as in callbacks of weak references."""
    if not isinstance(unraisable.exc_value, Ended):
        sys.__unraisablehook__(unraisable)
        return
    later = threading.Timer(0.01, _thread.interrupt_main, [unraisable.exc_value.number])
    later.daemon = True
    with contextlib.suppress(RuntimeError):  # too late for threads: the program ends by itself
        later.start()


def finish() -> None:
    """Ignore signals from here on, because the program is about to exit."""
    for number in CODES:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def shield() -> Iterator[None]:
    """Delay signals until the end of the block."""
    global _shields
    before = len(_arrived)
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
        if not _shields and len(_arrived) > before:
            raise Ended(_arrived[-1])


def open_standard_streams() -> None:
    """Open closed standard streams on the null device, and exit if standard output was closed.

    Otherwise the next file opened would have the stream's number, and printed text would be written into it.
    """
    closed = sys.stdout is None
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process lives
    if closed:
        sys.stderr.write("Standard output is closed, so nothing could be printed; redirect it to a file instead.\n")
        sys.exit(2)
