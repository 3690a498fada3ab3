"""Packing a model's folder and unpacking it, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, open_tensors, require_absent
from maskopt.packed import packed_tensors
from maskopt.packed.encoding import Part, encode, require_zstandard
from maskopt.packed.layout import (
    INDEX,
    TensorWriter,
    json_object,
    read_header,
    require_equal_widths,
    weight_files,
)
from maskopt.packed.packed_tensors import (
    AUTO_MAP,
    FORMAT,
    MANIFEST,
    MODEL_TYPE,
    Packed,
    PackedError,
    as_bytes,
    crc32,
    part_name,
)

__all__ = ["Kind", "PackReport", "is_packed", "pack", "packed_files", "unpack", "write_packed"]

Progress = Callable[[str, float], None]
"""Is told the tensor that comes next, and which part of all bytes is done."""

_CONFIG = "config.json"
_CODE = {"reader.py": "maskopt_reader.py", "packed_tensors.py": "packed_tensors.py"}
"""Modules of this package whose copies lie in packed folders, and their names there."""
_TORCH = "pytorch_model"  # the beginning of files with the same weights, which torch wrote


@dataclass
class Kind:
    """Tensors that are stored alike: how many, and their bytes in the dense folder and in the packed one."""

    tensors: int = 0
    dense: int = 0
    packed: int = 0


@dataclass
class PackReport:
    """What packing or unpacking a folder did.

    Attributes
    ----------
    kinds : dict of str to Kind
        By how tensors are stored: "mask and values", "compressed", "as they are".
    other_files : int
        Bytes of the files that hold no weights: the same in both folders.
    seconds : float
    """

    kinds: dict[str, Kind] = field(default_factory=dict)
    other_files: int = 0
    seconds: float = 0.0

    @property
    def dense(self) -> int:
        """Bytes of all tensors in the dense folder."""
        return sum(kind.dense for kind in self.kinds.values())

    @property
    def packed(self) -> int:
        """Bytes of all tensors in the packed folder."""
        return sum(kind.packed for kind in self.kinds.values())

    @property
    def ratio(self) -> float:
        """`packed` in parts of `dense`."""
        return self.packed / max(1, self.dense)

    def add(self, parts: Mapping[str, Any], dense: int, packed: int) -> None:
        """Count a tensor, stored in some parts."""
        name = "mask and values" if "mask" in parts else "compressed" if parts else "as they are"
        kind = self.kinds.setdefault(name, Kind())
        kind.tensors += 1
        kind.dense += dense
        kind.packed += packed

    def to_json(self) -> dict[str, Any]:
        """Return all figures."""
        kinds = {name: asdict(kind) for name, kind in self.kinds.items()}
        whole = {"dense_bytes": self.dense, "packed_bytes": self.packed, "ratio": self.ratio}
        return {**whole, "kinds": kinds, "other_files_bytes": self.other_files, "seconds": self.seconds}


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a packed one, judging by its ``config.json``; damaged ones are not.

    Parameters
    ----------
    folder : path-like
    """
    try:
        kind = json_object(Path(folder) / _CONFIG).get("model_type")
    except MaskoptError:
        return False
    return isinstance(kind, str) and kind == MODEL_TYPE


def packed_files(folder: Path) -> list[Path]:
    """Return the files that hold the tensors of a packed folder.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    MaskoptError
        If the folder is damaged, or of a later format.
    """
    with _packed_errors():
        return [folder / name for name in sorted({entry["file"] for entry in Packed(folder).tensors.values()})]


@contextmanager
def _packed_errors() -> Iterator[None]:
    """Turn errors of the reader, which knows nothing of maskopt, into MaskoptError."""
    try:
        yield
    except PackedError as error:
        raise MaskoptError(str(error)) from error


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    compress: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Write a packed folder of a model's folder.

    Every tensor is stored in the form that takes fewest bytes, so weights without zeros stay as they are. One tensor
    is in memory at a time. The folder appears as a whole or not at all.

    Parameters
    ----------
    source : path-like
        A Hugging Face folder with weights in safetensors files that are not quantised.
    target : path-like
        The folder to make; must not exist.
    compress : bool
        Compress what becomes smaller by it with Zstandard; loading takes longer.
    progress : callable, optional
        Is told the next tensor and which part of all bytes is done.

    Returns
    -------
    PackReport

    Raises
    ------
    MaskoptError
        If `source` is no such folder or damaged, `target` exists or cannot be written, or Zstandard is missing.
    """
    require_absent(target)
    with atomic_path(target) as aside:
        aside.mkdir()
        return write_packed(Path(source), aside, compress, progress)


def write_packed(folder: Path, target: Path, compress: bool, progress: Progress | None = None) -> PackReport:
    """Write what `pack` writes into an empty folder."""
    began = time.perf_counter()
    if compress:
        require_zstandard()
    config, files = _dense(folder)
    report = PackReport()
    tensors: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    whole = sum(file.stat().st_size for file in files)
    done = 0
    for number, file in enumerate(files, 1):
        stored = f"packed-{number:05}-of-{len(files):05}.safetensors"
        with open_tensors("weights", file):  # which checks the file
            entries, metadata, begin = read_header(file)
        weights[file.name] = {"metadata": metadata}
        names = {name: len(entry["shape"]) for name, entry in entries.items()}
        names |= {part_name(name, part): 1 for name in entries for part in ("mask", "values", "signs")}
        # Types of up to eight bytes must begin at a multiple of their size; what would disturb that comes last.
        for entry in entries.values():
            begins, ends = entry.pop("data_offsets")
            entry |= {"bytes": ends - begins, "begin": begin + begins}
        last = {name for name, entry in entries.items() if entry["bytes"] % 8}
        order = [name for name in entries if name not in last]
        order += sorted(last, key=lambda name: -_item_size(entries[name]))
        waiting: list[str] = []
        with TensorWriter(target / stored, names, {"format": "pt"}) as writer:
            for name in order:
                if progress is not None:
                    progress(name, done / max(1, whole))
                entry = entries[name]
                data = _read(file, entry)
                parts, kept, zeros = encode(data, entry["dtype"], compress)
                tensors[name] = {
                    "source": file.name,
                    "file": stored,
                    "dtype": entry["dtype"],
                    "shape": entry["shape"],
                    "bytes": entry["bytes"],
                    "kept": kept,
                    "zeros": zeros,
                    "crc32": crc32(data),
                    "parts": {key: {"zstd": part.zstd, "bytes": len(part.data)} for key, part in parts.items()},
                }
                if parts or name not in last:
                    _write(writer, name, entry, data, parts)
                else:
                    waiting.append(name)
                packed = sum(_padded(len(part.data)) for part in parts.values()) if parts else entry["bytes"]
                report.add(parts, entry["bytes"], packed)
                done += entry["bytes"]
            for name in waiting:
                _write(writer, name, entries[name], _read(file, entries[name]), {})
    report.other_files = _copy_others(folder, target, {_CONFIG, INDEX, *(file.name for file in files)})
    manifest = {
        "format": FORMAT,
        "index": json_object(folder / INDEX).get("metadata", {}) if (folder / INDEX).is_file() else None,
        "weights": weights,
        "tensors": tensors,
    }
    _write_json(target / MANIFEST, manifest, indent=None)
    _write_json(
        target / _CONFIG,
        {"model_type": MODEL_TYPE, "auto_map": AUTO_MAP, "dense_config": config},
    )
    for name, copy in _CODE.items():
        shutil.copyfile(Path(packed_tensors.__file__).with_name(name), target / copy)
    report.seconds = time.perf_counter() - began
    return report


def unpack(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: Progress | None = None
) -> PackReport:
    """Write the dense folder that a packed one was made of, its weights bit by bit as they were.

    Parameters
    ----------
    source : path-like
        A packed folder.
    target : path-like
        The folder to make; must not exist.
    progress : callable, optional
        Is told the next tensor and which part of all bytes is done.

    Returns
    -------
    PackReport

    Raises
    ------
    MaskoptError
        If `source` is no packed folder or damaged, or `target` exists or cannot be written.
    """
    began = time.perf_counter()
    folder = Path(source)
    require_absent(target)
    if not is_packed(folder):
        raise MaskoptError(f"The folder {folder} is not packed: it has no config.json of the type {MODEL_TYPE}.")
    config = json_object(folder / _CONFIG).get("dense_config")
    if not isinstance(config, dict):
        raise MaskoptError(f"The config.json of the packed folder {folder} is damaged: it has no dense_config.")
    report = PackReport()
    with atomic_path(target) as aside, _packed_errors():
        aside.mkdir()
        packed = Packed(folder)
        stored = [file.name for file in packed_files(folder)]
        for entry in packed.tensors.values():
            parts = entry["parts"]
            size = sum(_padded(part["bytes"]) for part in parts.values()) if parts else entry["bytes"]
            report.add(parts, entry["bytes"], size)
        done = 0
        for file, about in packed.manifest["weights"].items():
            names = [name for name, entry in packed.tensors.items() if entry["source"] == file]
            names.sort(key=lambda name: -_item_size(packed.tensors[name]))
            axes = {name: len(packed.tensors[name]["shape"]) for name in names}
            with TensorWriter(aside / Path(file).name, axes, about.get("metadata") or {}) as writer:
                for name in names:
                    if progress is not None:
                        progress(name, done / max(1, report.dense))
                    entry = packed.tensors[name]
                    data = as_bytes(packed.read(name))
                    writer.write(name, entry["dtype"], entry["shape"], data.data)
                    done += data.size
        if packed.manifest.get("index") is not None:
            places = {name: entry["source"] for name, entry in packed.tensors.items()}
            _write_json(aside / INDEX, {"metadata": packed.manifest["index"], "weight_map": places})
        report.other_files = _copy_others(folder, aside, {_CONFIG, MANIFEST, *_CODE.values(), *stored})
        _write_json(aside / _CONFIG, config)
    report.seconds = time.perf_counter() - began
    return report


def _dense(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return the configuration and the files of weights of a folder that can be packed."""
    if not (folder / _CONFIG).is_file():
        raise MaskoptError(f"The folder {folder} holds no config.json, so it is not a Hugging Face model.")
    config = json_object(folder / _CONFIG)
    if config.get("model_type") == MODEL_TYPE:
        raise MaskoptError(f"The folder {folder} is packed already.")
    if not isinstance(config.get("model_type"), str):
        raise MaskoptError(f'The config.json of {folder} does not say which kind of model it is ("model_type").')
    require_equal_widths(folder, config)
    if config.get("auto_map"):
        raise MaskoptError(
            f"The model {folder} comes with code of its own, and only models of transformers' classes can be packed."
        )
    if config.get("quantization_config") is not None:
        raise MaskoptError(f"The weights of {folder} are quantised, and only plain ones can be packed.")
    files = list(weight_files(folder))
    if not files:
        raise MaskoptError(
            f"The weights of {folder} are in a file of torch, and only safetensors files can be packed; load the model "
            f"and save it with save_pretrained first."
        )
    return config, files


def _item_size(entry: Mapping[str, Any]) -> int:
    count: int = max(1, math.prod(entry["shape"]))
    return int(entry["bytes"]) // count


def _padded(length: int) -> int:
    return length + -length % 8


def _read(file: Path, entry: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor."""
    return np.fromfile(file, np.uint8, entry["bytes"], offset=entry["begin"])


def _write(
    writer: TensorWriter, name: str, entry: Mapping[str, Any], data: np.ndarray[Any, Any], parts: Mapping[str, Part]
) -> None:
    """Write a tensor as it is, or its parts."""
    if not parts:
        writer.write(name, entry["dtype"], entry["shape"], data.data)
    for key, part in parts.items():
        padded = part.data.ljust(_padded(len(part.data)), b"\0")
        writer.write(part_name(name, key), "U8", [len(padded)], padded)


def _copy_others(folder: Path, target: Path, without: Container[str]) -> int:
    """Copy what holds no weights, and return its size in bytes."""
    copied: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name in without or path.name.startswith((_TORCH, "__pycache__")):
            continue
        if path.name in (*_CODE.values(), MANIFEST):
            raise MaskoptError(f"The file {path} has the name of a file of packed folders; move it away first.")
        copied.append(target / path.name)
        if path.is_dir():
            shutil.copytree(path, copied[-1])
            copied += copied[-1].rglob("*")
        else:
            shutil.copyfile(path, copied[-1])
    return sum(path.stat().st_size for path in copied if path.is_file())


def _write_json(file: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    file.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
