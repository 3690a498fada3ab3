"""Outputs that are written completely or not at all and overwrite nothing; readable errors for damaged inputs."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from maskopt.errors import MaskoptError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no such locks; no folder counts as stale there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_path",
    "content_hash",
    "discard_unfinished",
    "first_line",
    "locked",
    "open_tensors",
    "reason",
    "remove_stale",
    "renamed",
    "require_absent",
    "resumable",
    "shielded",
    "temporary_folder",
    "written_since",
]

_HIDDEN = re.compile(r"\..{1,40}\.[0-9a-f]{16}\.tmp", re.DOTALL)
_YOUNG = 60.0  # seconds within which a folder without a lock may still get one

_unfinished: set[Path] = set()
"""Hidden folders of this process: those that exist and those about to be made."""

_renamed: list[tuple[Path, tuple[int, int]]] = []
"""Outputs that were renamed or about to be, with device and inode, which identify them."""

resumable: Callable[[], str] | None = None
"""Returns what an interrupted command has kept for another one to go on, as a clause; empty where there is nothing."""

shielded: Callable[[], Any] | None = None
"""Returns a context in which signals are deferred; set by the command line, which turns signals into exceptions."""


def reason(error: BaseException) -> str:
    """Return the text of an exception in one line without a full stop, for use inside a sentence.

    Parameters
    ----------
    error : BaseException

    Examples
    --------
    >>> reason(FileNotFoundError(2, "No such file or directory"))
    'No such file or directory'
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text without a full stop, or the name of its type.

    Parameters
    ----------
    error : BaseException
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__).rstrip(".")


def content_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, 64 hexadecimal digits.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_absent(path: str | os.PathLike[str]) -> Path:
    """Check that an output can be written at `path`: nothing exists there, and files can be made in its folder.

    Temporary files that killed processes left in the folder are removed.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    Path

    Raises
    ------
    MaskoptError
        If something exists at `path`, the parent is not a folder that can be written to, or the name is empty.
    """
    path = _checked(path)
    # Read-only and full file systems are detected only by writing.
    with _private_folder(path):
        return path


def _checked(path: str | os.PathLike[str]) -> Path:
    """Check all that `require_absent` checks, except that files can really be made."""
    if os.fspath(path) == "":
        raise MaskoptError("An output needs a name; got an empty one.")
    path = Path(path)
    _require_free(path)
    folder = path.absolute().parent
    if any("\ud800" <= letter <= "\udfff" for letter in str(folder / path.name)):
        # What writes weights takes no other names, and says so after the work.
        raise MaskoptError(f"The output {path} cannot be written: its name is not text in UTF-8.")
    if not folder.is_dir():
        raise _no_folder(path)
    if not os.access(folder, os.W_OK):
        raise MaskoptError(f"The output {path} cannot be written because the folder {path.parent} is read-only.")
    remove_stale(folder)
    return path


def _require_free(path: Path) -> None:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise _no_folder(path) from error
    except (OSError, ValueError) as error:  # too long, a loop of links, a folder that may not be read, a null byte
        raise MaskoptError(f"The output {path} cannot be written: {reason(error)}.") from error
    raise MaskoptError(f"The output {path} exists already; choose another name or move it away first.")


def _no_folder(path: Path) -> MaskoptError:
    return MaskoptError(f"The output {path} cannot be written because the folder {path.parent} does not exist.")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which is renamed to `path` when the block ends.

    The caller makes a file or a folder at the yielded path. If the block raises (a full disk, an interrupt), it is
    removed, and nothing appears at `path`. If the process is killed, the next process that writes to the same folder
    removes it.

    Parameters
    ----------
    path : path-like
        The final name; must not exist.

    Yields
    ------
    Path
        A name inside a private temporary folder on the same file system.

    Raises
    ------
    MaskoptError
        If `path` exists before or after the writing, or cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_path(Path(folder) / "note.txt") as aside:
    ...         count = aside.write_text("complete")
    ...     (Path(folder) / "note.txt").read_text()
    'complete'
    """
    path = _checked(path)
    with _private_folder(path) as folder:
        aside = folder / path.name
        try:
            yield aside
            # A file that has appeared at `path` meanwhile is not overwritten.
            _require_free(path)
            _open_up(folder)
            with _shield():
                there = os.lstat(aside)
                _renamed.append((path.absolute(), (there.st_dev, there.st_ino)))
                os.rename(aside, path)
        except OSError as error:
            raise MaskoptError(f"The output {path} could not be written: {reason(error)}.") from error


@contextmanager
def temporary_folder(folder: Path, name: str) -> Iterator[Path]:
    """Yield a new folder for files that are needed during the block only, and remove it afterwards.

    If the process is killed, the next process that makes one in the same place removes it.

    Parameters
    ----------
    folder : Path
        The hidden folder around it is made here.
    name : str
        Part of the name of the hidden folder.

    Raises
    ------
    MaskoptError
        If it cannot be made.
    """
    remove_stale(folder)
    with _private_folder(folder / name, f"Temporary files in {folder}") as found:
        yield found


@contextmanager
def _private_folder(path: Path, what: str = "") -> Iterator[Path]:
    """Yield a new folder in a hidden one next to `path`, which is locked during the block and removed afterwards."""
    hidden = path.absolute().parent / f".{path.name[:40]}.{os.urandom(8).hex()}.tmp"
    lock = None
    _unfinished.add(hidden)
    try:
        try:
            hidden.mkdir(mode=0o700)
            lock = _locked(hidden / "lock")
            (hidden / "new").mkdir()
        except (OSError, ValueError) as error:
            raise MaskoptError(f"{what or f'The output {path}'} cannot be written: {reason(error)}.") from error
        yield hidden / "new"
    finally:
        with _shield():
            if lock is not None:
                lock.close()
            shutil.rmtree(hidden, ignore_errors=True)
            _unfinished.discard(hidden)


def locked(path: Path) -> IO[str] | None:
    """Lock a file until it is closed or the process ends for any reason; None if another process has locked it.

    Parameters
    ----------
    path : Path
        Made if it is not there.
    """
    file = path.open("a", encoding="ascii")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass  # a file system without locks
    return file


def _locked(path: Path) -> IO[str]:
    """Make a file that is locked until it is closed or the process ends for any reason."""
    file = path.open("w", encoding="ascii")
    with suppress(OSError):  # a file system without locks: other processes get none either
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
    # From now on other processes may conclude from a free lock that this process has ended.
    file.write("locked")
    file.flush()
    return file


def remove_stale(folder: Path) -> None:
    """Remove the hidden folders that ended processes left in a folder.

    Parameters
    ----------
    folder : Path
    """
    try:
        found = [Path(entry.path) for entry in os.scandir(folder) if _HIDDEN.fullmatch(entry.name)]
    except OSError:
        return
    for hidden in found:
        if hidden not in _unfinished and _is_stale(hidden):
            shutil.rmtree(hidden, ignore_errors=True)


def _is_stale(hidden: Path) -> bool:
    """Whether the process that made a hidden folder has ended, judging by its lock."""
    if fcntl is None or hidden.is_symlink():
        return False
    try:
        with (hidden / "lock").open("r+", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock.read() == "locked"
    except FileNotFoundError:
        # The process was killed before it made the lock, or is about to make it.
        with suppress(OSError):
            return time.time() - hidden.stat().st_mtime > _YOUNG and not os.listdir(hidden)
        return False
    except (OSError, UnicodeError):  # locked, or not a lock of this module
        return False


def discard_unfinished() -> None:
    """Remove the hidden folders of this process, for exits at which the blocks that own them are not unwound."""
    for folder in list(_unfinished):
        shutil.rmtree(folder, ignore_errors=True)
        _unfinished.discard(folder)


def renamed() -> int:
    """Return how many outputs this process has completed."""
    return len(_renamed)


def written_since(start: int) -> list[Path]:
    """Return the outputs that this process completed after its first `start` ones and that still exist.

    Parameters
    ----------
    start : int
        A number returned by `renamed`.
    """
    complete = []
    for path, identity in _renamed[start:]:
        try:
            there = os.lstat(path)
        except OSError:
            continue
        if (there.st_dev, there.st_ino) == identity:
            complete.append(path)
    return complete


@contextmanager
def _shield() -> Iterator[None]:
    if shielded is None:
        yield
    else:
        with shielded():
            yield


def _open_up(folder: Path) -> None:
    """Give files written as private (safetensors does) the mode that new files have here."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | (0o666 & ~umask))


@contextmanager
def open_tensors(what: str, path: str | os.PathLike[str], framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file; all its errors, including those of tensors read in the block, become MaskoptError.

    Parameters
    ----------
    what : str
        What the file should hold, for messages: "instance", "mask".
    path : path-like
    framework : {"pt", "np"}
        The type of tensors: torch or numpy.

    Yields
    ------
    safe_open

    Raises
    ------
    MaskoptError
        If there is no such file, it cannot be read, is damaged, or holds a type that the framework lacks.
    """
    if not os.path.isfile(path):  # false for every name that cannot be one
        raise MaskoptError(f"The {what} {path} does not exist or is not a file.")
    try:
        with safe_open(os.fspath(path), framework=framework) as file:
            yield file
    except MaskoptError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        # A type the framework lacks is an error of any of these kinds.
        raise MaskoptError(f"The {what} {path} is not a readable safetensors file: {reason(error)}.") from error
