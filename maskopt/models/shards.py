"""Files of a model's weights, written block by block."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from maskopt.models.offload import Offload
from maskopt.models.quiet import without_bars
from maskopt.packed.layout import INDEX, WHOLE, read_header

__all__ = ["save_blockwise"]

_LARGEST = 5 * 10**9  # bytes of a file, as transformers writes them


def save_blockwise(folder: Path, model: PreTrainedModel, offload: Offload) -> None:
    """Write an offloaded model as a folder that `from_pretrained` loads; one block is in memory at a time.

    Parameters
    ----------
    folder : Path
        Exists.
    model : PreTrainedModel
    offload : Offload
        Of the model.
    """
    inside = tuple(f"{block.name}." for block in offload.blocks)
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    with without_bars():
        model.save_pretrained(folder, state_dict=rest)
    parts = [folder / "part-0.safetensors"]
    (folder / WHOLE).rename(parts[0])
    for number, block in enumerate(offload.blocks, 1):
        # In the form of the checkpoint, which for experts is another one than the model's.
        tensors = revert_weight_conversion(model, offload.tensors(block))
        parts.append(folder / f"part-{number}.safetensors")
        save_file(_storable(tensors), parts[-1], metadata={"format": "pt"})
    _join(folder, parts, model.num_parameters())


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors each with memory of its own, each once where several names have the same."""
    seen: set[tuple[object, ...]] = set()
    found = {}
    for name, tensor in tensors.items():
        key = tensor.data_ptr(), tensor.shape, tensor.stride()
        if key not in seen or tensor.numel() == 0:
            seen.add(key)
            found[name] = tensor.contiguous()
    return found


def _join(folder: Path, parts: Sequence[Path], parameters: int) -> None:
    """Put consecutive files together up to a size, and write an index where there are several."""
    groups: list[list[Path]] = [[]]
    size = 0
    for part in parts:
        length = part.stat().st_size - read_header(part)[2]
        # Types of up to eight bytes must begin at a multiple of their size, and files have no gaps.
        if groups[-1] and (size + length > _LARGEST or size % 8):
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += length
    many = len(groups) > 1
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)] if many else [WHOLE]
    places: dict[str, str] = {}
    size = 0
    for name, group in zip(names, groups, strict=True):
        header = _concatenate(group, folder / name)
        places.update(dict.fromkeys(header, name))
        size += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    if many:
        index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _concatenate(parts: Sequence[Path], target: Path) -> dict[str, Any]:
    """Write the tensors of several safetensors files into one, remove these files, and return the new header."""
    header: dict[str, Any] = {}
    begins = []
    offset = 0
    for part in parts:
        entries, _, begin = read_header(part)
        begins.append(begin)
        for name, entry in entries.items():
            header[name] = {**entry, "data_offsets": [offset + place for place in entry["data_offsets"]]}
        offset += part.stat().st_size - begins[-1]
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part, begin in zip(parts, begins, strict=True):
            with part.open("rb") as source:
                source.seek(begin)
                shutil.copyfileobj(source, file, 2**24)
            part.unlink()
    return header
