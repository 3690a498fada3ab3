"""Calibration windows of a recovery: those that are fitted, and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, Purpose, gathered, sequences

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
        Those that only layers are solved on, if any, then those that are fitted, then those that are held out.
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

    @property
    def alone(self) -> Data:
        """The same windows without those that only layers are solved on."""
        first = self.fitted.start
        fitted, held_out = (range(each.start - first, each.stop - first) for each in (self.fitted, self.held_out))
        return Data(self.batches[first:], fitted, held_out)


def divided(batches: Sequence[Batch]) -> Data:
    """Divide calibration windows into micro-batches: to fit are those for the recovery, or all where there are none.

    Unless batches are held out already, an eighth of the windows to fit is: those that have the fewest tokens in common
    with others, because windows drawn at random from a text may overlap; among equals the last ones.

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
    purpose: Purpose = "recovery" if any(batch.purpose == "recovery" for batch in single) else "layers"
    others = [batch for batch in single if batch.purpose not in (purpose, "held out")]
    single = [batch for batch in single if batch.purpose in (purpose, "held out")]
    number = len(single)
    if number < 2:
        raise MaskoptError("Recovery needs at least two calibration windows, because one of them is held out.")
    out = {index for index, batch in enumerate(single) if batch.held_out}
    if not out:
        count = max(min(2, number // 2), number // _HELD)
        overlap = _overlaps(single)
        out = set(sorted(range(number), key=lambda index: (overlap[index], -index))[:count])
    held = [replace(batch, purpose="held out") for index, batch in enumerate(single) if index in out]
    size = max(1, min(_TOKENS // single[0].shape[1], number // _STEPS))
    parts = [others, [batch for index, batch in enumerate(single) if index not in out], held]
    before, fitted, measured = (gathered(part, size) for part in parts)
    first, last = len(before), len(before) + len(fitted)
    return Data([*before, *fitted, *measured], range(first, last), range(last, last + len(measured)))


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
