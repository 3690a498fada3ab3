"""A folder that keeps measurements, so that an interrupted search goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskopt.errors import MaskoptError
from maskopt.files import reason

__all__ = ["Store", "first_difference", "replaced"]

_SETTINGS = "settings.json"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path beside another, which it replaces at the end of the block: a file is there whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise MaskoptError(f"The file {path} could not be written: {reason(error)}.") from error
    finally:
        aside.unlink(missing_ok=True)


def first_difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the first name under which two settings that are not equal have different values.

    Parameters
    ----------
    known, wanted : mapping of str to object
    """
    return next(name for name in (*wanted, *known) if known.get(name) != wanted.get(name))


class Store:
    """Measurements by name, in JSON files of a folder that belongs to one search.

    Parameters
    ----------
    folder : path-like
        Made if it is not there.
    settings : mapping
        What the measurements depend on; anything that `json.dump` takes.

    Raises
    ------
    MaskoptError
        If the folder holds something else, or measurements with other settings.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        wanted = json.loads(json.dumps(settings))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            empty = not any(self.folder.iterdir())
        except OSError as error:
            raise MaskoptError(f"The cache {self.folder} cannot be used: {reason(error)}.") from error
        known = self.read(Path(_SETTINGS).stem)
        if known is None:
            if not empty:
                raise MaskoptError(f"The folder {self.folder} is not empty and no cache of maskopt; choose another.")
            self.write(Path(_SETTINGS).stem, wanted)
        elif known != wanted:
            other = first_difference(known, wanted)
            raise MaskoptError(
                f"The cache {self.folder} belongs to another allocation, with another value of: {other}; choose "
                f"another folder."
            )

    def read(self, name: str) -> Any:
        """Return what is stored under a name; None if nothing is.

        Raises
        ------
        MaskoptError
            If the file is damaged.
        """
        file = self.folder / f"{name}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise MaskoptError(f"The file {file} of the cache cannot be read: {reason(error)}.") from error

    def write(self, name: str, value: Any) -> None:
        """Store a value under a name."""
        with replaced(self.folder / f"{name}.json") as aside:
            aside.write_text(json.dumps(value), encoding="utf-8")
