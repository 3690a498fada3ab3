"""Calibration windows of a recovery: those that are fitted, and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, gathered, sequences

__all__ = ["Data", "divided"]

_TOKENS = 2048  # of a micro-batch, at most, unless a window is longer
_STEPS = 32  # micro-batches in a pass, at least, where there are so many windows
_HELD = 8  # one window of so many is held out, and at least two
_SHINGLE = 16  # tokens in a row that two windows of a text have in common only where they overlap


@dataclass(frozen=True)
class Data:
    """Calibration windows in micro-batches.

    Attributes
    ----------
    batches : list of Batch
    fitted, held_out : range
        Indices of the micro-batches to fit and of those that are held out.
    """

    batches: list[Batch]
    fitted: range
    held_out: range

    @property
    def tokens(self) -> int:
        """Tokens to fit."""
        return sum(self.batches[index].tokens for index in self.fitted)

    def instead(self, batches: Sequence[Batch]) -> Data:
        """Return other windows to fit, with the same held out."""
        held_out = [self.batches[index] for index in self.held_out]
        return divided([*batches, *held_out])


def divided(batches: Sequence[Batch]) -> Data:
    """Divide calibration windows into micro-batches, with an eighth of the windows held out unless batches are already.

    Those windows are held out that have the fewest tokens in common with others, because windows drawn at random from a
    text may overlap; among equals the last ones.

    Parameters
    ----------
    batches : sequence of Batch

    Returns
    -------
    Data

    Raises
    ------
    MaskoptError
        If there is a single window.
    """
    single = sequences(batches)
    number = len(single)
    if number < 2:
        raise MaskoptError("Recovery needs at least two calibration windows, because one of them is held out.")
    out = {index for index, batch in enumerate(single) if batch.held_out}
    if not out:
        count = max(min(2, number // 2), number // _HELD)
        overlap = _overlaps(single)
        out = set(sorted(range(number), key=lambda index: (overlap[index], -index))[:count])
    size = max(1, min(_TOKENS // single[0].shape[1], number // _STEPS))
    kept = gathered([batch for index, batch in enumerate(single) if index not in out], size)
    held = gathered([replace(batch, held_out=True) for index, batch in enumerate(single) if index in out], size)
    return Data([*kept, *held], range(len(kept)), range(len(kept), len(kept) + len(held)))


def _overlaps(single: Sequence[Batch]) -> list[int]:
    """Return how many runs of tokens each window has in common with others."""
    owners: dict[bytes, int] = {}
    shared = [0] * len(single)
    for index, batch in enumerate(single):
        ids = batch.inputs.get("input_ids")
        if ids is None:
            continue
        row = ids[0].cpu().numpy()
        for first in range(len(row) - _SHINGLE + 1):
            run = row[first : first + _SHINGLE].tobytes()
            owner = owners.setdefault(run, index)
            if owner != index:
                shared[index] += 1
                shared[owner] += 1
    return shared
