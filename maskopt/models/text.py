"""From text files to one stream of tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maskopt.errors import MaskoptError

__all__ = ["TokenStream", "tokenize"]


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A tokenised text.

    Parameters
    ----------
    ids : Tensor
        Token ids, int64, shape (tokens,).
    source : str
        Where the text came from, for messages.
    sha256 : str
        Hash of the bytes of the file (or of the text in UTF-8).
    """

    ids: Tensor
    source: str
    sha256: str

    def require(self, needed: int) -> None:
        """Insist on a number of tokens.

        Raises
        ------
        MaskoptError
            If there are fewer.
        """
        if len(self.ids) < needed:
            raise MaskoptError(
                f"{self.source} holds {len(self.ids)} tokens, but at least {needed} are needed; give more text or a "
                f"shorter sequence length."
            )


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str | Path) -> TokenStream:
    """Tokenise a whole text at once, as the pruning literature does.

    The tokenizer adds the special tokens it adds by itself (most: one at the very beginning). A file whose name
    ends in ``.jsonl`` holds one JSON object per line, whose field "text" is a document: documents are tokenised one by
    one and joined, with an end-of-text token after each where the tokenizer marks their bounds by no token of its own.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's.
    text : str or Path
        The text itself, or the path of a file in UTF-8.

    Raises
    ------
    MaskoptError
        If the file cannot be read or holds no text.
    """
    if isinstance(text, str):
        source, raw = "The text", text.encode()
    else:
        source, raw = str(text), _read(text)
    try:
        content = raw.decode()
    except UnicodeDecodeError as error:
        raise MaskoptError(f"{source} is not text in UTF-8 (byte {error.start} is {raw[error.start]:#04x}).") from error
    if not content.strip():
        raise MaskoptError(f"{source} is empty.")
    if isinstance(text, Path) and text.suffix == ".jsonl":
        unmarked = not tokenizer.num_special_tokens_to_add() and tokenizer.eos_token_id is not None
        end = [tokenizer.eos_token_id] if unmarked else []
        pieces = [_ids(tokenizer, document) + end for document in _documents(source, content)]
    else:
        pieces = [_ids(tokenizer, content)]
    ids = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
    return TokenStream(ids, source, sha256(raw).hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MaskoptError(f"The text file {path} cannot be read: {error.strerror}.") from error


def _documents(source: str, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, TypeError, KeyError) as error:
            raise MaskoptError(f'{source}, line {number}: not a JSON object with the field "text".') from error
        if not isinstance(documents[-1], str):
            raise MaskoptError(f'{source}, line {number}: the field "text" is not a string.')
    return documents


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: the text is longer than the model's context on purpose.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids
