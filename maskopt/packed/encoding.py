"""Which form of a tensor takes fewest bytes: as it is, or a mask and the values that are not zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from maskopt.errors import MaskoptError
from maskopt.packed.packed_tensors import DTYPES, words_of, zstandard

__all__ = ["Part", "encode", "require_zstandard"]

_LEVEL = 3  # entropy coding does nearly all of it; higher levels take longer and win less than a hundredth


@dataclass(frozen=True)
class Part:
    """A part of a tensor as it is stored; `maskopt.packed.packed_tensors` names the parts."""

    data: bytes
    zstd: bool


def encode(data: np.ndarray[Any, Any], dtype: str, compress: bool) -> tuple[dict[str, Part], int, int]:
    """Return the parts of a tensor, none where it is smallest as it is.

    Parameters
    ----------
    data : ndarray of uint8
        The bytes of its entries, row-major, little-endian.
    dtype : str
        The type of the entries, as safetensors calls it.
    compress : bool
        Whether parts may be compressed.

    Returns
    -------
    parts : dict of str to Part
    kept : int
        Number of entries in the part ``values``.
    zeros : int
        Number of entries that are zero, of either sign.
    """
    kind = DTYPES.get(dtype)
    if kind is None or data.size == 0:
        return {}, 0, 0
    words = data.view(words_of(kind.itemsize))
    # The sign of a zero is a bit of its own: entries that are multiplied with a mask may be negative zeros.
    mask = (words << 1 if kind.is_floating_point else words) != 0
    kept = int(np.count_nonzero(mask))
    zeros = words.size - kept
    parts = {"mask": np.packbits(mask), "values": words[mask].view(np.uint8)}
    if zeros and kind.is_floating_point:
        negative = words[~mask] != 0
        if negative.any():
            parts["signs"] = np.packbits(negative)
    if sum(part.size for part in parts.values()) >= data.size:
        parts, kept = {"values": data}, words.size
    form = {name: _smaller(part, kind.itemsize if name == "values" else 1, compress) for name, part in parts.items()}
    plain = not any(part.zstd for part in form.values())
    return ({} if plain and "mask" not in form else form), kept, zeros


def _smaller(data: np.ndarray[Any, Any], size: int, compress: bool) -> Part:
    """Return a part, compressed in planes of bytes if that is asked for and smaller."""
    if compress:
        planes = np.ascontiguousarray(data.reshape(-1, size).T).tobytes()
        packed = _compressed(planes)
        if len(packed) < data.size:
            return Part(packed, True)
    return Part(data.tobytes(), False)


def _compressed(data: bytes) -> bytes:
    module = require_zstandard()
    if module.__name__ == "compression.zstd":
        return bytes(module.compress(data, _LEVEL))
    return bytes(module.ZstdCompressor(level=_LEVEL).compress(data))


def require_zstandard() -> Any:
    """Return the module that compresses.

    Raises
    ------
    MaskoptError
        If there is none.
    """
    module = zstandard()
    if module is None:
        raise MaskoptError('--compress needs Zstandard, which is missing: pip install "maskopt[zstd]".')
    return module
