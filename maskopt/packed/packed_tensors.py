"""Reads the tensors of packed folders.

maskopt writes a copy of this file into every packed folder, where it needs nothing of maskopt.

A tensor lies in up to three parts, vectors of bytes that are padded to multiples of eight, little-endian:

- none: the tensor lies under its own name as it is;
- ``values``: its nonzero entries in row-major order, or all entries where there is no mask;
- ``mask``: a bit for each entry (numpy.packbits, big-endian), 1 where it is not zero;
- ``signs``: where some zeros are negative, a bit for each zero, 1 where it is.

A part with ``zstd`` is one Zstandard frame; values in it are split into planes: the first byte of every value, then the
second one, and so on.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

FORMAT = 1
MODEL_TYPE = "maskopt-packed"
SHRUNK_TYPE = "maskopt-shrunk"  # of models whose blocks have different widths
MANIFEST = "packed.json"
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
)
AUTO_MAP = {
    "AutoConfig": "maskopt_reader.PackedConfig",
    **{name: f"maskopt_reader.Packed{name}" for name in AUTO_CLASSES},
}
"""What config.json says of the code beside it."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class PackedError(ValueError):
    """A packed folder cannot be loaded: one sentence."""


def part_name(name: str, part: str) -> str:
    """Return under which name a part of a tensor lies."""
    return f"{name}:{part}"


def words_of(size: int) -> Any:
    """Return the numpy type of signed whole numbers of a size in bytes."""
    return np.dtype(f"<i{size}")


def as_bytes(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor's entries, row-major, as numpy uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def crc32(data: Any) -> int:
    """Return the CRC-32 of a vector of bytes."""
    return zlib.crc32(data.data)


def decompressed(data: bytes, size: int) -> bytes:
    """Return the content of a Zstandard frame, of a known size in bytes."""
    module = zstandard()
    if module is None:
        raise PackedError(
            "The packed folder is compressed, and no Zstandard is installed to read it: pip install zstandard, or use "
            "Python 3.14 or newer."
        )
    whole = module.decompress(data) if module.__name__ == "compression.zstd" else _frame(module, data, size)
    return bytes(whole)


def _frame(module: Any, data: bytes, size: int) -> bytes:
    return bytes(module.ZstdDecompressor().decompress(data, max_output_size=size))


def zstandard() -> Any:
    """Return the module of Zstandard: Python's own from 3.14 on, else the package of that name; None without either."""
    for name in ("compression.zstd", "zstandard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


class Packed:
    """The tensors of a packed folder.

    Parameters
    ----------
    folder : path-like

    Attributes
    ----------
    manifest : dict
        The content of ``packed.json``.
    tensors : dict
        Its entries of tensors by name.

    Raises
    ------
    PackedError
        If the folder is damaged, or of a later format.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            version = self.manifest["format"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise PackedError(f"The packed folder {self.folder} is damaged: {MANIFEST} cannot be read.") from error
        if version != FORMAT:
            raise PackedError(
                f"The packed folder {self.folder} has format {version!r}, and this reader knows {FORMAT}; read it with "
                f"the version of maskopt that wrote it."
            )
        wrong = _wrong_entry(self.manifest)
        if wrong is not None:
            raise PackedError(
                f"The packed folder {self.folder} is damaged: the entry of {wrong} in {MANIFEST} is wrong."
            )
        self.tensors: dict[str, Any] = self.manifest["tensors"]
        self._files: dict[str, Any] = {}

    def _stored(self, entry: Any, name: str) -> Any:
        if entry["file"] not in self._files:
            self._files[entry["file"]] = safe_open(str(self.folder / entry["file"]), framework="pt")
        return self._files[entry["file"]].get_tensor(name)

    def _part(self, name: str, entry: Any, part: str, size: int) -> Any:
        """Return a part as bytes: numpy uint8, `size` of them."""
        stored = self._stored(entry, part_name(name, part)).numpy()
        form = entry["parts"][part]
        if not form["zstd"]:
            return stored[:size]
        return np.frombuffer(decompressed(stored[: form["bytes"]].tobytes(), size), np.uint8)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, bit by bit as it was packed.

        Raises
        ------
        PackedError
            If it is damaged.
        """
        entry = self.tensors[name]
        try:
            if entry["parts"]:
                tensor = torch.from_numpy(self._words(name, entry)).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            else:
                tensor = self._stored(entry, name)
            right = crc32(as_bytes(tensor)) == entry["crc32"] and list(tensor.shape) == entry["shape"]
        except PackedError:
            raise
        except Exception as error:  # whatever a damaged file makes numpy, torch, safetensors or Zstandard say
            raise self._damaged(name) from error
        if not right:
            raise self._damaged(name)
        return tensor

    def _words(self, name: str, entry: Any) -> Any:
        """Return the entries of a tensor as whole numbers with the same bits."""
        count, kept = math.prod(entry["shape"]), entry["kept"]
        dtype = DTYPES[entry["dtype"]]
        kind = words_of(dtype.itemsize)
        values = self._part(name, entry, "values", kept * kind.itemsize)
        if entry["parts"]["values"]["zstd"]:
            values = np.ascontiguousarray(values.reshape(kind.itemsize, kept).T).reshape(-1)
        values = values.view(kind)
        if "mask" not in entry["parts"]:
            return values.copy()
        mask = np.unpackbits(self._part(name, entry, "mask", (count + 7) // 8), count=count).view(np.bool_)
        words = np.zeros(count, kind)
        words[mask] = values
        if "signs" in entry["parts"]:
            signs = self._part(name, entry, "signs", (count - kept + 7) // 8)
            words[~mask] = np.unpackbits(signs, count=count - kept).astype(kind) << (8 * kind.itemsize - 1)
        return words

    def _damaged(self, name: str) -> PackedError:
        file = self.folder / self.tensors[name]["file"]
        return PackedError(f"The file {file} is damaged: {name} is not what was packed.")


_ENTRY = {
    "source": str,
    "file": str,
    "dtype": str,
    "shape": list,
    "bytes": int,
    "kept": int,
    "zeros": int,
    "crc32": int,
    "parts": dict,
}


def _wrong_entry(manifest: dict[str, Any]) -> str | None:
    """Return the name of an entry that has not what entries have; None if all are right."""
    for table in ("weights", "tensors"):
        if not isinstance(manifest.get(table), dict):
            return table
    for name, entry in manifest["tensors"].items():
        if not isinstance(entry, dict) or any(not isinstance(entry.get(key), kind) for key, kind in _ENTRY.items()):
            return str(name)
        counts = [*entry["shape"], entry["bytes"], entry["kept"], entry["zeros"]]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return str(name)
        if Path(entry["file"]).name != entry["file"] or entry["source"] not in manifest["weights"]:
            return str(name)
        for form in entry["parts"].values():
            if not isinstance(form, dict) or not isinstance(form.get("bytes"), int) or "zstd" not in form:
                return str(name)
    wrong = (name for name, about in manifest["weights"].items() if Path(name).name != name or type(about) is not dict)
    return next(wrong, None)
