"""A long text has the same tokens in pieces as at once, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from maskopt.demo.run import MODEL
from maskopt.models import pieces, tokenize

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [(Path(__file__).parents[2] / "README.md").read_text(), Path(__file__).read_text()]


def trained(model: Any, trainer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(CORPUS, trainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def around(text: str) -> Any:
    return processors.TemplateProcessing(single=text, special_tokens=[("<s>", 1), ("</s>", 2)])


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "the demo model's": lambda: AutoTokenizer.from_pretrained(MODEL),
    "bytes": lambda: trained(
        models.BPE(), trainers.BpeTrainer, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    # As Llama's: a space is put in front, and merges may go across words.
    "the text as one word": lambda: trained(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer,
        normalizer=normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")]),
        pre_tokenizer=pre_tokenizers.Split("\n", "merged_with_previous"),
        post_processor=around("<s> $A"),
    ),
    "unigrams": lambda: trained(
        models.Unigram(),
        lambda **options: trainers.UnigramTrainer(unk_token="<unk>", **options),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        post_processor=around("$A </s>"),
    ),
    "words": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        post_processor=around("<s> $A </s>"),
    ),
}


@cache
def made(name: str) -> PreTrainedTokenizerBase:
    """Not before a test needs it: the trainers take a second."""
    return TOKENIZERS[name]()


LETTERS = st.sampled_from([" ", "\n", "-", "a", "0", "é", "漢", "🙂"])
WORDS = st.one_of(
    st.sampled_from(CORPUS[0].split(" ")),
    st.text(max_size=12),
    st.builds(lambda letter, number: letter * number, LETTERS, st.integers(1, 700)),
)


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_PIECE", 400)
        patch.setattr(pieces, "_MARGIN", 200)
        patch.setattr(pieces, "_AGREE", 8)
        yield


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words=st.lists(WORDS, max_size=400), between=st.sampled_from([" ", "", "\n"]))
def test_pieces_have_the_tokens_of_the_whole_text(name: str, words: list[str], between: str) -> None:
    tokenizer, text = made(name), between.join(words)
    assert pieces.token_ids(tokenizer, text).tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "unigrams"])
def test_only_pieces_are_tokenised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text, sizes = made(name), "\n".join(CORPUS), list[int]()
    whole = tokenizer(text)["input_ids"]
    call = type(tokenizer).__call__

    def seen(self: Any, part: str, **options: Any) -> Any:
        sizes.append(len(part))
        return call(self, part, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", seen)
    assert tokenize(tokenizer, text).ids.tolist() == whole
    assert len(sizes) > 40
    assert max(sizes) <= 400 + 3 * 400  # where there is no edge, pieces are longer


def test_a_run_without_an_edge_is_one_piece() -> None:
    tokenizer = made("bytes")
    text = "a b " * 200 + "=" * 5000 + " c d" * 300
    assert tokenize(tokenizer, text).ids.tolist() == tokenizer(text)["input_ids"]


def test_tokenizers_that_do_not_say_where_tokens_lie_get_the_text_at_once(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            assert "return_offsets_mapping" not in options
            return dict(tokenizer(text, **options))

    text = "the quick brown fox. " * 100
    assert torch.equal(pieces.token_ids(Slow(), text), tokenize(tokenizer, text).ids)  # type: ignore[arg-type]
