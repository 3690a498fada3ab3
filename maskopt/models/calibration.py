"""Calibration data: windows from random positions of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maskopt.checks import SEEDS, shown, whole
from maskopt.errors import MaskoptError
from maskopt.models.checks import require_positive
from maskopt.models.text import Text, tokenize

__all__ = ["Calibration", "calibration_batches"]

_DRAWS = 64  # places that are tried for a window before all are looked at


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of a text, in batches of token ids; iterating yields the batches.

    Parameters
    ----------
    seqlen, batch_size, seed : int
        Arguments of `calibration_batches`.
    source, sha256 : str
        The text and the hash of its bytes.
    text_ids : Tensor
        The whole tokenised text, int64, shape (text_tokens,).
    starts : Tensor
        Where in it each window begins, shape (samples,).
    """

    seqlen: int
    batch_size: int
    seed: int
    source: str
    sha256: str
    text_ids: Tensor = field(repr=False)
    starts: Tensor = field(repr=False)

    @cached_property
    def batches(self) -> list[Tensor]:
        """Token ids, int64, each of shape (at most batch_size, seqlen)."""
        return list(torch.split(self.text_ids.unfold(0, self.seqlen, 1)[self.starts], self.batch_size))

    @property
    def samples(self) -> int:
        """Number of windows."""
        return len(self.starts)

    @property
    def text_tokens(self) -> int:
        """Length of the whole tokenised text."""
        return len(self.text_ids)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def tokens(self) -> int:
        """Tokens in all batches together."""
        return self.samples * self.seqlen

    def apart(self, windows: int) -> Calibration:
        """Return further windows of the text, which share no token with these where the text is long enough.

        Parameters
        ----------
        windows : int
            Number of windows, at least one. Each begins at random where the fewest tokens are taken, by these windows
            and by those drawn before it.

        Returns
        -------
        Calibration

        Raises
        ------
        MaskoptError
            If the number is not positive.
        """
        require_positive(windows=windows)
        generator = torch.Generator().manual_seed(self.seed)
        starts: list[int] = self.starts.tolist()
        for _ in range(windows):
            starts.append(self._free(starts, generator))
        return self.at(torch.tensor(starts[self.samples :]))

    def _free(self, starts: list[int], generator: torch.Generator) -> int:
        """Return a random beginning of a window that shares as few tokens as possible with others."""
        places, others = self.text_tokens - self.seqlen + 1, torch.tensor(starts)
        for start in torch.randint(places, (_DRAWS,), generator=generator).tolist():
            if int((others - start).abs().min()) >= self.seqlen:
                return int(start)
        # The text is short, so that looking at all of it takes no time.
        taken = torch.zeros(self.text_tokens + 1, dtype=torch.int64)
        for start in starts:
            taken[start + 1 : start + 1 + self.seqlen] += 1
        sums = taken.cumsum(0)
        shared = sums[self.seqlen :] - sums[: -self.seqlen]
        fewest = (shared == shared.min()).nonzero().flatten()
        return int(fewest[torch.randint(len(fewest), (1,), generator=generator)])

    def at(self, starts: Tensor) -> Calibration:
        """Return windows of the text that begin at given tokens.

        Parameters
        ----------
        starts : Tensor
            Integers, shape (windows,).

        Returns
        -------
        Calibration
        """
        return replace(self, starts=starts)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the batches as a dictionary that `json.dump` takes."""
        names = ("samples", "seqlen", "tokens", "seed", "source", "sha256", "text_tokens")
        return {name: getattr(self, name) for name in names}


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Text,
    samples: int = 128,
    seqlen: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
) -> Calibration:
    """Draw windows from a text at random, the protocol of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695).

    The text is tokenised once. Every window starts at a token drawn uniformly, so windows may overlap.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's.
    text : str, Path or Text
        The text itself, or the path of a text or ``.jsonl`` file, see `read_text`.
    samples : int
        Number of windows.
    seqlen : int
        Tokens per window; `default_seqlen` returns what a model can take.
    batch_size : int
        Windows per batch.
    seed : int
        Of the draw, in [-2^63, 2^64).

    Returns
    -------
    Calibration

    Raises
    ------
    MaskoptError
        If a number is not positive, the seed is out of range, or the text cannot be read, is empty, or has fewer than
        `seqlen` tokens.
    """
    require_positive(samples=samples, seqlen=seqlen, batch_size=batch_size)
    if not isinstance(seed, int) or not whole(*SEEDS).fits(seed):
        raise MaskoptError(f"The seed must be an integer of at most 64 bits; got {shown(seed)}.")
    stream = tokenize(tokenizer, text)
    stream.require(seqlen)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream.ids) - seqlen + 1, (samples,), generator=generator)
    return Calibration(seqlen, batch_size, seed, stream.source, stream.sha256, stream.ids, starts)
