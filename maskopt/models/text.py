"""Reading text files, and tokenising them into one stream."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maskopt.checks import shown
from maskopt.errors import MaskoptError
from maskopt.files import reason
from maskopt.models.checks import check_tokenizer
from maskopt.models.heap import trim
from maskopt.models.pieces import token_ids

__all__ = ["Text", "TokenStream", "read_text", "tokenize"]


@dataclass(frozen=True)
class Text:
    """The content of a text file.

    Parameters
    ----------
    documents : tuple of str
        With line feeds as line ends and without a byte-order mark.
    separate : bool
        Whether documents are tokenised one by one, with marked bounds (JSON lines); plain text is one document.
    source : str
        What messages call the text.
    sha256 : str
        Hash of the bytes of the file (or of the text in UTF-8).
    """

    documents: tuple[str, ...]
    separate: bool
    source: str
    sha256: str

    def opening(self, characters: int) -> Text:
        """Return the beginning: a number of characters of plain text, or the first documents with at least as many.

        Where the text has no more, it is returned itself.
        """
        taken, length = [], 0
        for document in self.documents:
            taken.append(document if self.separate else document[:characters])
            length += len(document)
            if length >= characters:
                break
        if tuple(taken) == self.documents:
            return self
        part = f"the first {len(taken)} documents" if self.separate else f"the first {characters} characters"
        digest = sha256("\n\n".join(taken).encode()).hexdigest()
        return replace(self, documents=tuple(taken), source=f"{part} of {self.source}", sha256=digest)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A tokenised text.

    Parameters
    ----------
    ids : Tensor
        Token ids, int64, shape (tokens,).
    source : str
        What messages call the text.
    sha256 : str
        Hash of the bytes of the file (or of the text in UTF-8).
    """

    ids: Tensor
    source: str
    sha256: str

    def require(self, needed: int) -> None:
        """Check that there are enough tokens.

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


def read_text(text: str | Path | Text) -> Text:
    """Read a text.

    Files are in UTF-8; a byte-order mark is dropped, and carriage returns become line feeds. The format follows from
    the suffix, in upper or lower case: ``.jsonl`` (``.ndjson``) has one JSON object per line, whose field "text" is a
    document; ``.json`` the same, or one list of such objects or of strings; every other file is plain text.

    Parameters
    ----------
    text : str, Path or Text
        The text itself, or the path of a file.

    Returns
    -------
    Text

    Raises
    ------
    MaskoptError
        If the file cannot be read or holds no text.
    """
    if isinstance(text, Text):
        return text
    if not isinstance(text, (str, Path)):
        raise MaskoptError(f"The text must be a string, or the pathlib.Path of a file; got {shown(text)}.")
    source, raw = ("The text", _encoded(text)) if isinstance(text, str) else (str(text), _read(text))
    mark = len(BOM_UTF8) if raw.startswith(BOM_UTF8) else 0
    try:
        content = _plain(raw[mark:].decode())
    except UnicodeDecodeError as error:
        at = mark + error.start
        raise MaskoptError(f"{source} is not text in UTF-8 (byte {at} is {raw[at]:#04x}).") from error
    kind = text.suffix.lower() if isinstance(text, Path) else ""
    if not content.strip():
        raise MaskoptError(f"{source} is empty.")
    if kind == ".json" and content.lstrip().startswith("["):
        documents = _items(source, content)
    elif kind in (".jsonl", ".ndjson", ".json"):
        documents = _lines(source, content)
    else:
        return Text((content,), False, source, sha256(raw).hexdigest())
    if not any(document.strip() for document in documents):
        raise MaskoptError(f"{source} is empty: none of its documents holds text.")
    return Text(tuple(map(_plain, documents)), True, source, sha256(raw).hexdigest())


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str | Path | Text) -> TokenStream:
    """Tokenise a text as a whole, as the pruning literature does; long ones in pieces, which have the same tokens.

    The tokenizer adds its default special tokens (most: one at the very beginning). Documents of JSON files (see
    `read_text`) are tokenised one by one and joined; where the tokenizer adds no special tokens, an end-of-text token
    follows each document.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's.
    text : str, Path or Text
        The text itself, the path of a file, or what `read_text` returned.

    Returns
    -------
    TokenStream

    Raises
    ------
    MaskoptError
        If the file cannot be read or holds no text.
    """
    check_tokenizer(tokenizer)
    content = read_text(text)
    end: list[int] = []
    if content.separate and not tokenizer.num_special_tokens_to_add() and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    after = torch.tensor(end, dtype=torch.int64)
    ids = [part for document in content.documents for part in (token_ids(tokenizer, document), after)]
    trim()  # a tokenizer takes a hundred times the memory of what it is given
    return TokenStream(torch.cat(ids), content.source, content.sha256)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise MaskoptError(f"The text file {path} cannot be read: {reason(error)}.") from error


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise MaskoptError(f"The text holds half of a surrogate pair at character {error.start}.") from error


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(source: str, content: str) -> list[str]:
    """Return the documents of JSON lines."""
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            documents.append(_document(where, _parsed(line, f'{where}: not a JSON object with the field "text".')))
    return documents


def _items(source: str, content: str) -> list[str]:
    """Return the documents of a JSON list."""
    values = _parsed(content, f'{source} is no JSON list of strings, or of objects with the field "text".')
    return [
        _document(f"{source}, item {number}", {"text": value} if isinstance(value, str) else value)
        for number, value in enumerate(values, start=1)
    ]


def _parsed(content: str, sentence: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested lists
        raise MaskoptError(sentence) from error


def _document(where: str, record: Any) -> str:
    if not isinstance(record, dict) or "text" not in record:
        raise MaskoptError(f'{where}: not a JSON object with the field "text".')
    text = record["text"]
    if not isinstance(text, str):
        raise MaskoptError(f'{where}: the field "text" is not a string.')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MaskoptError(f"{where}: the text holds half of a surrogate pair, which is no character.") from error
    return text
