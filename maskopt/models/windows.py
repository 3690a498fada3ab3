"""Calibration windows of a recovery: those that are fitted, and those that are held out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from maskopt.errors import MaskoptError
from maskopt.models.batches import Batch, Purpose, gathered, in_parts, sequences
from maskopt.models.sums import PARTS

__all__ = ["FURTHER", "Data", "divided"]

FURTHER = 2
"""Windows that the commands draw to fit blocks and the model to, for each that layers are solved on."""

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
        In parts; those that only layers are solved on, if any, then those that are fitted, then those held out.
    fitted, held_out : sequence of int
        Indices of the micro-batches to fit and of those that are held out.
    """

    batches: list[Batch]
    fitted: Sequence[int]
    held_out: Sequence[int]

    @property
    def tokens(self) -> int:
        """Tokens to fit."""
        return sum(self.batches[index].tokens for index in self.fitted)

    @property
    def alone(self) -> Data:
        """The windows that are fitted or held out, without others."""
        number, count = len(self.fitted), len(self.fitted) + len(self.held_out)
        batches = [self.batches[index] for index in (*self.fitted, *self.held_out)]
        return Data(batches, range(number), range(number, count))

    def among(self, own: Collection[int]) -> Data:
        """Return what one of several processes fits and measures.

        Parameters
        ----------
        own : collection of int
            Indices of the micro-batches that it runs, of all the same ones.
        """
        fitted, held_out = ([index for index in each if index in own] for each in (self.fitted, self.held_out))
        return Data(self.batches, fitted, held_out)


def divided(batches: Sequence[Batch], ranks: int = 1) -> Data:
    """Divide calibration windows into micro-batches: to fit are those for the recovery, or all where there are none.

    Unless batches are held out already, an eighth of the windows to fit is: those that have the fewest tokens in common
    with others, because windows drawn at random from a text may overlap; among equals the last ones.

    Parameters
    ----------
    batches : sequence of Batch
    ranks : int
        Processes that fit together. Each step takes a micro-batch of every one of them, so that these are smaller where
        they have several windows.

    Returns
    -------
    Data

    Raises
    ------
    MaskoptError
        If there is a single window, or a process would have no micro-batch to fit.
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
    sizes = size, max(1, size // ranks), size
    before, fitted, measured = (gathered(part, each) for part, each in zip(parts, sizes, strict=True))
    most = min(len(fitted), PARTS)
    if most < ranks:
        raise MaskoptError(
            f"Recovery on {ranks} ranks needs a window to fit for each of them, and {PARTS} ranks can have some; with "
            f"{len(fitted)} windows to fit use {most} ranks or fewer."
        )
    first, last = len(before), len(before) + len(fitted)
    batches = in_parts([*before, *fitted, *measured])
    return Data(batches, range(first, last), range(last, len(batches)))


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
