"""Text for the demo model: the Python standard library's own source files, read from the running interpreter.

No text is shipped.  The files are found where the interpreter keeps its standard library and are split *by module*
into a training part and a held-out part.  The split depends on nothing but the name of the top-level module, so a
module that is held out on one machine or Python version is held out on all of them.
"""

from __future__ import annotations

import random
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from maskopt.errors import MaskoptError

__all__ = [
    "DOCUMENT_SEPARATOR",
    "CorpusError",
    "SourceFile",
    "held_out_files",
    "held_out_text",
    "is_held_out",
    "join_documents",
    "module_group",
    "source_files",
    "training_files",
    "training_text",
]

#: Marks the start of every document.  The demo tokenizer maps it to one special token, so that a plain call of the
#: tokenizer on the joined text gives the token stream that the model was trained on.
DOCUMENT_SEPARATOR = "<|endoftext|>"

# About one top-level module in fourteen is held out.  The residue was chosen for a varied set that Python 3.11 to
# 3.14 share (ast, dataclasses, mailbox, optparse, smtplib, sqlite3, subprocess, typing, venv, ...).
_SPLIT_MODULUS = 14
_SPLIT_RESIDUE = 13

# Tests are missing from many installs; encodings and pydoc_data are generated tables; the rest is not part of the
# library (third-party packages) or is example code.
_EXCLUDED_DIRECTORIES = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# Written per machine when the interpreter is built: they would make the text depend on the install.
_EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")
_EXCLUDED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})
_MINIMUM_CHARACTERS = 1000
# Fewer files than this means that something else than a full standard library was found.
_MINIMUM_FILES = 50

# Modules that share long passages with each other and therefore must be on the same side of the split.
_GROUPS = {
    "annotationlib": "typing",
    "ast_unparse": "ast",
    "asynchat": "asyncore",
    "chunk": "aifc",
    "cProfile": "profile",
    "genericpath": "pathlib",
    "imp": "importlib",
    "ntpath": "pathlib",
    "nturl2path": "pathlib",
    "opcode": "dis",
    "pkgutil": "importlib",
    "posixpath": "pathlib",
    "profiling": "profile",
    "pstats": "profile",
    "runpy": "importlib",
    "smtpd": "asyncore",
    "sre_compile": "re",
    "sre_constants": "re",
    "sre_parse": "re",
    "sunau": "aifc",
    "threading_local": "threading",
    "wave": "aifc",
    "zipimport": "importlib",
}


class CorpusError(MaskoptError):
    """The source files of the standard library cannot be read on this machine."""


@dataclass(frozen=True)
class SourceFile:
    """One source file of the standard library.

    Attributes
    ----------
    path : str
        Path below the standard library's directory, with forward slashes.
    text : str
        Contents, with line ends normalised to a single line feed.
    """

    path: str
    text: str


def module_group(path: str) -> str:
    """Return the name by which a file is assigned to a side of the split.

    It is the top-level module or package without a leading underscore (so that ``decimal`` and ``_pydecimal`` stay
    together); modules known to share long passages have one common name.

    Parameters
    ----------
    path : str
        Path below the standard library's directory, with forward slashes.

    Returns
    -------
    str
        Name of the group.
    """
    name = PurePosixPath(path).parts[0].removesuffix(".py")
    if name.startswith("_py"):
        name = name.removeprefix("_py")
    name = name.lstrip("_")
    return _GROUPS.get(name, name)


def is_held_out(path: str) -> bool:
    """Tell whether a file belongs to the held-out side of the split.

    Parameters
    ----------
    path : str
        Path below the standard library's directory, with forward slashes.

    Returns
    -------
    bool
        True for held-out files, False for training files.
    """
    return zlib.crc32(module_group(path).encode("utf-8")) % _SPLIT_MODULUS == _SPLIT_RESIDUE


def source_files(directory: Path | None = None) -> list[SourceFile]:
    """Read the source files of the standard library, both sides of the split, in the order of their paths.

    Parameters
    ----------
    directory : pathlib.Path or None, optional
        Directory of the standard library; by default that of the running interpreter.

    Returns
    -------
    list of SourceFile
        The files that belong to the corpus.

    Raises
    ------
    CorpusError
        If the directory holds no full set of source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if directory is None else directory
    return list(_read_files(root))


def training_files(directory: Path | None = None) -> list[SourceFile]:
    """Read the files of the training side, in the order of their paths.

    Parameters
    ----------
    directory : pathlib.Path or None, optional
        Directory of the standard library; by default that of the running interpreter.

    Returns
    -------
    list of SourceFile
        The training files.
    """
    return [file for file in source_files(directory) if not is_held_out(file.path)]


def held_out_files(directory: Path | None = None) -> list[SourceFile]:
    """Read the files of the held-out side, in the order of their paths.

    Parameters
    ----------
    directory : pathlib.Path or None, optional
        Directory of the standard library; by default that of the running interpreter.

    Returns
    -------
    list of SourceFile
        The held-out files.
    """
    return [file for file in source_files(directory) if is_held_out(file.path)]


def join_documents(texts: Iterable[str]) -> str:
    """Join documents into one text in which every document starts with the separator.

    Parameters
    ----------
    texts : iterable of str
        The documents.

    Returns
    -------
    str
        The joined text.
    """
    return "".join(DOCUMENT_SEPARATOR + text for text in texts)


def training_text(
    max_characters: int | None = None,
    seed: int = 0,
    directory: Path | None = None,
    *,
    excerpt_characters: int | None = None,
) -> str:
    """Return training documents in random order as one text, for training and for calibration.

    Parameters
    ----------
    max_characters : int or None, optional
        Length at which the text is cut; by default all training files are returned.
    seed : int, optional
        Seed of the random order and of the excerpts.
    directory : pathlib.Path or None, optional
        Directory of the standard library; by default that of the running interpreter.
    excerpt_characters : int or None, optional
        Take from every file only one excerpt of at most this length, from the start of a random line.  A short text
        then covers many modules, which suits calibration.  By default files are taken whole.

    Returns
    -------
    str
        The joined documents.

    Raises
    ------
    MaskoptError
        If `max_characters` or `excerpt_characters` is not positive.
    """
    if excerpt_characters is not None and excerpt_characters <= 0:
        raise MaskoptError(f"excerpt_characters must be positive, got {excerpt_characters}.")
    generator = random.Random(seed)
    files = training_files(directory)
    generator.shuffle(files)
    if excerpt_characters is not None:
        files = [SourceFile(file.path, _excerpt(file.text, excerpt_characters, generator)) for file in files]
    return _join_up_to(files, max_characters)


def held_out_text(max_characters: int | None = None, directory: Path | None = None) -> str:
    """Return held-out documents as one text, for evaluation.

    The order is fixed: that of a hash of the path, which mixes long and short modules, so that a text cut by
    `max_characters` is a fair sample and is always the same one.

    Parameters
    ----------
    max_characters : int or None, optional
        Length at which the text is cut; by default all held-out files are returned.
    directory : pathlib.Path or None, optional
        Directory of the standard library; by default that of the running interpreter.

    Returns
    -------
    str
        The joined documents.

    Raises
    ------
    MaskoptError
        If `max_characters` is not positive.
    """
    files = sorted(held_out_files(directory), key=lambda file: (zlib.crc32(file.path.encode("utf-8")), file.path))
    return _join_up_to(files, max_characters)


def _excerpt(text: str, characters: int, generator: random.Random) -> str:
    """Return at most `characters` characters of `text` from the start of a random line."""
    if len(text) <= characters:
        return text
    # The start of the line that holds a random position, so that the excerpt always has its full length.
    start = text.rfind("\n", 0, generator.randrange(len(text) - characters + 1)) + 1
    return text[start : start + characters]


def _join_up_to(files: Sequence[SourceFile], max_characters: int | None) -> str:
    """Join the texts of `files`, cut at `max_characters`."""
    if max_characters is None:
        return join_documents(file.text for file in files)
    if max_characters <= 0:
        raise MaskoptError(f"max_characters must be positive, got {max_characters}.")
    chosen: list[str] = []
    length = 0
    for file in files:
        # A cut inside the separator would leave a broken token at the end.
        if length + len(DOCUMENT_SEPARATOR) >= max_characters:
            break
        chosen.append(file.text)
        length += len(DOCUMENT_SEPARATOR) + len(file.text)
    return join_documents(chosen)[:max_characters]


@lru_cache(maxsize=4)
def _read_files(root: Path) -> tuple[SourceFile, ...]:
    """Read the corpus files below `root`; cached, because several callers need both sides."""
    if not root.is_dir():
        raise CorpusError(
            f"The standard library's source files were not found: {root} is not a directory "
            "(is this a zipped or frozen Python?); pass a text file of your own instead."
        )
    files: list[SourceFile] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _is_candidate(relative):
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        # A separator inside a file would be read as the start of a document.
        if len(text) >= _MINIMUM_CHARACTERS and DOCUMENT_SEPARATOR not in text:
            files.append(SourceFile(relative.as_posix(), text))
    if len(files) < _MINIMUM_FILES:
        raise CorpusError(
            f"The standard library's source files were not found: {root} holds only {len(files)} usable files "
            "(is this a zipped, stripped or frozen Python?); pass a text file of your own instead."
        )
    files.sort(key=lambda file: file.path)
    return tuple(files)


def _is_candidate(relative: Path) -> bool:
    """Tell from its relative path whether a file may belong to the corpus."""
    if _EXCLUDED_DIRECTORIES.intersection(relative.parts[:-1]):
        return False
    return not relative.parts[0].startswith(_EXCLUDED_PREFIXES) and relative.name not in _EXCLUDED_FILES
