"""Outputs that are never half-written and never overwritten."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskopt.errors import MaskoptError

__all__ = ["atomic_path", "require_absent"]


def require_absent(path: str | os.PathLike[str]) -> Path:
    """Return `path` if nothing lies there yet and its parent folder exists.

    Raises
    ------
    MaskoptError
        If something exists at `path`, or the parent is not a folder.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise MaskoptError(f"The output {path} exists already; choose another name or move it away first.")
    if not path.absolute().parent.is_dir():
        raise MaskoptError(f"The output {path} cannot be written because the folder {path.parent} does not exist.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise MaskoptError(f"The output {path} cannot be written because the folder {path.parent} is read-only.")
    return path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write aside, then rename: yield a fresh path next to `path` that takes its name on success.

    The caller makes a file or a folder at the yielded path. If the block raises (a full disk, an interrupt),
    what was written is removed and nothing appears at `path`.

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
    """
    path = require_absent(path)
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.absolute().parent))
    except OSError as error:
        raise MaskoptError(f"The output {path} cannot be written: {error.strerror or error}.") from error
    try:
        yield aside / path.name
        # An empty private folder plus a last look keeps a file that appeared meanwhile.
        require_absent(path)
        _open_up(aside)
        os.rename(aside / path.name, path)
    except OSError as error:
        raise MaskoptError(f"The output {path} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Give files written as private (safetensors does) the mode that new files have here."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | (0o666 & ~umask))
