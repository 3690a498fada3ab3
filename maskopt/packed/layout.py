"""Files of a model's folder: which hold its weights, how headers are read, how files are written in one pass."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from maskopt.errors import MaskoptError
from maskopt.files import reason
from maskopt.packed.packed_tensors import SHRUNK_TYPE

__all__ = ["INDEX", "WHOLE", "TensorWriter", "json_object", "read_header", "require_equal_widths", "weight_files"]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OLD = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OFFSET = 10**15  # more bytes than a file has, to reserve room for its header


def json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Parameters
    ----------
    file : Path

    Raises
    ------
    MaskoptError
        If it cannot be read or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MaskoptError(f"The file {file} cannot be read: {reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise MaskoptError(f"The file {file} is damaged: it is no JSON.") from error
    if not isinstance(content, dict):
        raise MaskoptError(f"The file {file} is damaged: it holds no JSON object.")
    return content


def weight_files(folder: Path) -> Iterator[Path]:
    """Yield the safetensors files of a model, those that an index names among them.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    MaskoptError
        If one of them is missing, or all are; weights in files of torch are no reason.
    """
    if (folder / WHOLE).is_file():
        yield folder / WHOLE
        return
    index = folder / INDEX
    if not index.is_file():
        if not any((folder / name).is_file() for name in _OLD):
            raise MaskoptError(f"The folder {folder} holds no weights (such as model.safetensors).")
        return
    shards = json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise MaskoptError(f"The file {index} is damaged: its weight_map does not name a file for each tensor.")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise MaskoptError(f"The file {index} names {name!r}, which does not lie beside it.")
        if not (folder / name).is_file():
            raise MaskoptError(f"The folder {folder} lacks {name}, which {INDEX} names.")
        yield folder / name


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return the entries of a safetensors file by tensor, its metadata, and where the data begin.

    A file is the length of its header (8 bytes, little-endian), the header as JSON, padded with spaces to a multiple
    of eight, and the data, at offsets that the header says.

    Parameters
    ----------
    file : Path
        A valid file; `maskopt.files.open_tensors` checks that.
    """
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        entries: dict[str, Any] = json.loads(content.read(length))
    return entries, entries.pop("__metadata__", None) or {}, 8 + length


class TensorWriter:
    """A safetensors file that is written tensor by tensor, none of which stays in memory.

    The header comes first in the file and is known only at the end, so room for it is reserved; spaces fill the rest.

    Parameters
    ----------
    file : Path
        Does not exist.
    names : mapping of str to int
        Tensors that may be written, and the number of their axes.
    metadata : mapping of str to str
    """

    def __init__(self, file: Path, names: Mapping[str, int], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._metadata = dict(metadata)
        largest = {
            name: {"dtype": "F8_E8M0FNU", "shape": [_OFFSET] * axes, "data_offsets": [_OFFSET, _OFFSET]}
            for name, axes in names.items()
        }
        self._room = len(self._header(largest))
        self._entries: dict[str, Any] = {}
        self._size = 0

    def _header(self, entries: Mapping[str, Any]) -> bytes:
        metadata = {"__metadata__": self._metadata} if self._metadata else {}
        text = json.dumps({**metadata, **entries}, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    def __enter__(self) -> Self:
        self._content = self._file.open("xb")
        self._content.write(struct.pack("<Q", self._room) + b" " * self._room)
        return self

    def write(self, name: str, dtype: str, shape: list[int], data: bytes | memoryview) -> None:
        """Append a tensor.

        Parameters
        ----------
        name : str
        dtype : str
            As safetensors calls it. Offsets must be multiples of its size, so whoever writes types of several sizes
            begins with the largest, or writes multiples of eight bytes.
        shape : list of int
        data : bytes or memoryview
        """
        length = len(data) if isinstance(data, bytes) else data.nbytes
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self._size, self._size + length]}
        self._content.write(data)
        self._size += length

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._content:
            if error is None:
                self._content.seek(8)
                self._content.write(self._header(self._entries).ljust(self._room))


def require_equal_widths(folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Check that a folder does not hold a model whose blocks have different widths.

    Parameters
    ----------
    folder : Path
        One that is no folder passes.
    config : mapping, optional
        The content of its ``config.json``, where that is known.

    Raises
    ------
    MaskoptError
        If it does.
    """
    if config is None and (folder / "config.json").is_file():
        config = json_object(folder / "config.json")
    if config is not None and config.get("model_type") == SHRUNK_TYPE:
        raise MaskoptError(
            f"The blocks of {folder} have different widths, and only models of equal widths can be packed; "
            f"shrink it with --widths uniform."
        )
