"""Tokenising a long text in pieces: the tokens of the whole text, in a fraction of the memory.

A tokenizer takes hundreds of bytes for each character of what it is given at once. A piece begins within the one before
it, and the two are joined where both have the same tokens at the same places of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["token_ids"]

_PIECE = 2**17  # characters of the text in a piece
_MARGIN = 2**12  # characters that pieces have on both sides of the edge between them
_AGREE = 32  # tokens on both sides of a joint that have to be the same
_DIFFERENT = 4  # different ones among them, at least


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the token ids of a text, int64, shape (tokens,), with the special tokens that the tokenizer adds.

    They are those of the text as a whole. A tokenizer that does not say where its tokens lie gets the text at once, and
    so does a unigram model, which compares sums of scores that begin far before a token.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    text : str
    """
    if len(text) > _PIECE + _MARGIN and _is_local(tokenizer):
        around = _special_tokens(tokenizer)
        inner = None if around is None else _joined(tokenizer, text)
        if around is not None and inner is not None:
            return torch.cat([around[0], *inner, around[1]])
    # verbose=False: the text is longer than the model's context on purpose.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _is_local(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ != "Unigram"


@dataclass(frozen=True, eq=False)
class _Piece:
    """Token ids of a part of the text, and where in the text each token begins."""

    ids: Tensor
    starts: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str, first: int, last: int) -> _Piece:
        """Tokenise the characters from `first` to before `last`, without special tokens."""
        made = tokenizer(text[first:last], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = torch.tensor([start for start, _ in made["offset_mapping"]], dtype=torch.int64)
        return cls(torch.tensor(made["input_ids"], dtype=torch.int64), starts + first)

    def agrees(self, joint: int, other: _Piece, at: int) -> bool:
        """Whether the tokens around a joint are the same, at the same places, as those around one of another piece.

        Where there are hardly any different ones, they may be those of a longer run by chance.
        """
        if min(joint, at) < _AGREE:
            return False
        mine, theirs = slice(joint - _AGREE, joint + _AGREE), slice(at - _AGREE, at + _AGREE)
        ids = self.ids[mine]
        if len(ids) < 2 * _AGREE or len(set(ids.tolist())) < _DIFFERENT:
            return False
        return torch.equal(ids, other.ids[theirs]) and torch.equal(self.starts[mine], other.starts[theirs])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor] | None:
    """Return what the tokenizer puts before and after a text; None where it does something else with it."""
    marked, bare = (
        torch.tensor(tokenizer("a", add_special_tokens=special)["input_ids"], dtype=torch.int64)
        for special in (True, False)
    )
    for first in range(len(marked) - len(bare) + 1 if len(bare) else 0):
        if torch.equal(marked[first : first + len(bare)], bare):
            return marked[:first], marked[first + len(bare) :]
    return None


def _joined(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Tensor] | None:
    """Return the ids of the pieces, each without what the one before it has; None where that cannot be found."""
    first, begin, edge, found = 0, 0, _PIECE, list[Tensor]()
    piece = _Piece.of(tokenizer, text, first, edge + _MARGIN)
    while edge < len(text) - _MARGIN:
        after = _Piece.of(tokenizer, text, edge - _MARGIN, min(len(text), edge + _PIECE + _MARGIN))
        joints = _joints(piece, after, edge)
        if joints is None:  # a long run of one character, for instance: there is no edge here
            edge += edge - first
            longer = _Piece.of(tokenizer, text, first, min(len(text), edge + _MARGIN))
            if begin and not longer.agrees(begin, piece, begin):
                return None
            piece = longer
        else:
            found.append(piece.ids[begin : joints[0]])
            first, piece, begin = edge - _MARGIN, after, joints[1]
            edge += _PIECE
    return [*found, piece.ids[begin:]]


def _joints(one: _Piece, two: _Piece, edge: int) -> tuple[int, int] | None:
    """Return the numbers of a token in both pieces around which they agree, as near to the edge as there is one."""
    distance = (one.starts - edge).abs()
    near = (distance < _MARGIN // 2).nonzero().flatten()
    near = near[distance[near].argsort(stable=True)]
    others = torch.searchsorted(two.starts, one.starts[near])
    pairs = zip(near.tolist(), others.tolist(), strict=True)
    return next(((joint, other) for joint, other in pairs if one.agrees(joint, two, other)), None)
