"""Tokenised text, calibration windows and perplexity."""

import json
import math
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskopt.errors import MaskoptError
from maskopt.models import calibration_batches, context_length, default_seqlen, perplexity, read_text, tokenize

TEXT = "The quick brown fox jumps over the lazy dog.\nIt was not amused, and said so.\n" * 4


@pytest.fixture
def unmarked(tokenizer):
    """The tokenizer without its begin-of-text token."""
    copy = tokenizer.__class__(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    )
    copy.add_special_tokens({"eos_token": "</s>"})
    copy.backend_tokenizer.post_processor = None
    return copy


def test_text_is_tokenised_at_once_with_its_hash(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    stream = tokenize(tokenizer, file)
    assert stream.ids.tolist() == [1, *(tokenizer.convert_tokens_to_ids(letter) for letter in TEXT)]
    assert stream.ids.dtype == torch.int64
    assert stream.sha256 == sha256(TEXT.encode()).hexdigest()
    assert stream.source == str(file)
    assert torch.equal(tokenize(tokenizer, TEXT).ids, stream.ids)
    assert tokenize(tokenizer, TEXT).sha256 == stream.sha256


def test_documents_are_tokenised_one_by_one(tokenizer, unmarked, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"id": 7, "text": text}) + "\n\n" for text in ("ab", "c")))
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert tokenize(tokenizer, file).ids.tolist() == [1, a, b, 1, c]
    assert tokenize(unmarked, file).ids.tolist() == [a, b, 2, c, 2]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("text.txt", b"", "text.txt is empty"),
        ("text.txt", b" \n ", "text.txt is empty"),
        ("text.txt", b"abc\xff", "text.txt is not text in UTF-8 .byte 3 is 0xff"),
        ("text.jsonl", b"", "text.jsonl is empty"),
        ("text.jsonl", b'{"text": "a"}\nabc\n', "text.jsonl, line 2: not a JSON object with the field"),
        ("text.jsonl", b'\n{"content": "a"}\n', "text.jsonl, line 2: not a JSON object"),
        ("text.jsonl", b"[1]\n", "text.jsonl, line 1: not a JSON object"),
        ("text.jsonl", b'{"text": 3}\n', 'line 1: the field "text" is not a string'),
        ("text.jsonl", b'{"text": {"text": "a"}}\n', 'line 1: the field "text" is not a string'),
        ("text.jsonl", b'{"a": {"text": "a"}}\n', "line 1: not a JSON object with the field"),
        ("text.jsonl", b'{"text": "a\\ud800"}\n', "line 1: the text holds half of a surrogate pair"),
        ("text.jsonl", b"[" * 100000, "line 1: not a JSON object with the field"),
        ("text.jsonl", b'{"text": "", "n": ' + b"1" * 5000 + b"}", "line 1: not a JSON object with the field"),
        ("text.jsonl", b'{"text": " "}\n{"text": ""}', "is empty: none of its documents holds text"),
        ("text.JSONL", b"plain text\n", "text.JSONL, line 1: not a JSON object with the field"),
        ("text.Json", b"plain text\n", "text.Json, line 1: not a JSON object with the field"),
        ("text.json", b'{\n"text": "a"\n}', "text.json, line 1: not a JSON object with the field"),
        ("text.json", b'["a", 3]', 'text.json, item 2: not a JSON object with the field "text"'),
        ("text.json", b'["a", ', "is no JSON list of strings, or of objects"),
        ("text.json", b"[]", "is empty: none of its documents holds text"),
        ("text.txt", b"\xef\xbb\xbfabc\xff", "text.txt is not text in UTF-8 .byte 6 is 0xff"),
        ("text.txt", b"\xff\xfea\x00", "text.txt is not text in UTF-8 .byte 0 is 0xff"),
        ("text.txt", b"\xef\xbb\xbf\r\n", "text.txt is empty"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else repr(value)[:20],
)
def test_bad_text_files_are_refused(tokenizer, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MaskoptError, match=sentence):
        tokenize(tokenizer, tmp_path / name)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks_are_no_tokens(tokenizer, llama, tmp_path, end, mark):
    """Wherever a text is read: calibration, evaluation, the figure on its beginning."""
    file = tmp_path / "text.txt"
    file.write_bytes(mark + TEXT.replace("\n", end).encode())
    plain, read = tokenize(tokenizer, TEXT), tokenize(tokenizer, file)
    assert torch.equal(read.ids, plain.ids)
    assert read.sha256 == sha256(file.read_bytes()).hexdigest()
    assert perplexity(llama, tokenizer, file).nll == perplexity(llama, tokenizer, TEXT).nll
    one, two = (calibration_batches(tokenizer, text, 4, 8) for text in (file, TEXT))
    assert torch.equal(torch.cat(one.batches), torch.cat(two.batches))
    assert read_text(file).opening(50).documents == (TEXT[:50],)
    assert torch.equal(tokenize(tokenizer, TEXT.replace("\n", end)).ids, plain.ids)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.Json"])
def test_json_lines_are_read_whatever_the_case_of_the_name(tokenizer, tmp_path, name):
    records = [{"text": "ab\r\nc", "id": 1}, {"text": "d"}]
    a, b, c, d, end = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d", "\n"])
    for joint, mark in (("\n", ""), ("\r\n", "\ufeff")):
        (tmp_path / name).write_bytes((mark + joint.join(map(json.dumps, records))).encode())
        assert tokenize(tokenizer, tmp_path / name).ids.tolist() == [1, a, b, end, c, 1, d]


@pytest.mark.parametrize("items", [["ab", "c"], [{"text": "ab"}, {"text": "c", "n": 1}], [{"text": "ab"}, "c"]])
def test_json_lists_are_documents(tokenizer, tmp_path, items):
    (tmp_path / "a.json").write_text(json.dumps(items, indent=1))
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert tokenize(tokenizer, tmp_path / "a.json").ids.tolist() == [1, a, b, 1, c]


def test_the_beginning_of_documents_is_tokenised_like_all_of_them(unmarked, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cd", "e")))
    text = read_text(file)
    assert text.opening(3).documents == ("ab", "cd")
    assert text.opening(5) is text
    assert text.opening(3).source == f"the first 2 documents of {file}"
    assert text.opening(3).sha256 != text.sha256
    whole = tokenize(unmarked, file).ids
    assert torch.equal(tokenize(unmarked, text.opening(3)).ids, whole[:6])
    assert read_text("abc").opening(2).documents == ("ab",)


def test_texts_with_half_a_surrogate_pair_are_refused(tokenizer):
    with pytest.raises(MaskoptError, match="The text holds half of a surrogate pair at character 2"):
        tokenize(tokenizer, "ab\ud800")


def test_files_that_cannot_be_read_are_refused(tokenizer, tmp_path):
    with pytest.raises(MaskoptError, match=r"none.txt cannot be read: No such file"):
        tokenize(tokenizer, tmp_path / "none.txt")
    with pytest.raises(MaskoptError, match="cannot be read: Is a directory"):
        tokenize(tokenizer, tmp_path)
    with pytest.raises(MaskoptError, match="The text is empty"):
        tokenize(tokenizer, "")


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(1, 9), seqlen=st.integers(1, len(TEXT) + 1), size=st.integers(1, 10), seed=st.integers(0, 2**40)
)
def test_windows_are_pieces_of_the_text(tokenizer, samples, seqlen, size, seed):
    calibration = calibration_batches(tokenizer, TEXT, samples, seqlen, size, seed)
    ids = tokenize(tokenizer, TEXT).ids
    pieces = {tuple(piece) for piece in ids.unfold(0, seqlen, 1).tolist()}
    windows = [tuple(window) for batch in calibration for window in batch.tolist()]
    assert len(windows) == samples
    assert set(windows) <= pieces
    assert len(calibration) == math.ceil(samples / size)
    assert all(len(batch) <= size for batch in calibration)
    again = calibration_batches(tokenizer, TEXT, samples, seqlen, samples, seed)
    assert torch.equal(torch.cat(again.batches), torch.cat(calibration.batches))


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 3), windows=st.integers(1, 4), seqlen=st.integers(1, 9), seed=st.integers(0, 99))
def test_windows_apart_share_no_token_where_the_text_is_long_enough(tokenizer, samples, windows, seqlen, seed):
    calibration = calibration_batches(tokenizer, TEXT, samples, seqlen, 2, seed)
    others = calibration.apart(windows)
    assert (others.samples, others.seqlen, others.source) == (windows, seqlen, calibration.source)
    assert torch.equal(torch.cat(others.batches), others.text_ids.unfold(0, seqlen, 1)[others.starts])
    taken = [set(range(start, start + seqlen)) for start in (*calibration.starts.tolist(), *others.starts.tolist())]
    # Each window rules out at most 2 * seqlen - 1 places for the next.
    if (samples + windows) * (2 * seqlen - 1) < len(TEXT) - seqlen:
        for index in range(samples, len(taken)):
            assert not any(taken[index] & before for before in taken[:index])


def test_windows_apart_of_a_short_text_overlap_least(tokenizer):
    text = "abcdefghij"
    calibration = calibration_batches(tokenizer, text, samples=1, seqlen=6, seed=1)
    (start,), (other,) = calibration.starts.tolist(), calibration.apart(1).starts.tolist()
    places = range(calibration.text_tokens - 5)
    assert abs(start - other) == max(abs(start - place) for place in places)


def test_calibration_records_its_source(tokenizer):
    calibration = calibration_batches(tokenizer, TEXT, samples=5, seqlen=16, seed=3)
    other = calibration_batches(tokenizer, TEXT, samples=5, seqlen=16, seed=4)
    assert not torch.equal(calibration.batches[0], other.batches[0])
    assert json.loads(json.dumps(calibration.to_json())) == {
        "samples": 5,
        "seqlen": 16,
        "tokens": 80,
        "seed": 3,
        "source": "The text",
        "sha256": sha256(TEXT.encode()).hexdigest(),
        "text_tokens": len(TEXT) + 1,
    }


def test_text_that_is_too_short_is_refused(tokenizer, llama):
    with pytest.raises(MaskoptError, match="The text holds 4 tokens, but at least 16 are needed"):
        calibration_batches(tokenizer, "abc", seqlen=16)
    with pytest.raises(MaskoptError, match="The text holds 4 tokens, but at least 32 are needed"):
        perplexity(llama, tokenizer, "abc")


@pytest.mark.parametrize("name", ["samples", "seqlen", "batch_size"])
def test_numbers_must_be_positive(tokenizer, name):
    with pytest.raises(MaskoptError, match=f"{name} must be an integer of at least 1; got 0"):
        calibration_batches(tokenizer, TEXT, **{"seqlen": 4, name: 0})


def test_the_sequence_length_follows_the_model(llama, build, tokenizer):
    assert context_length(llama) == default_seqlen(llama) == default_seqlen(llama, tokenizer) == 32
    assert default_seqlen(llama, at_most=8) == 8
    assert context_length(build("t5")) is None
    assert default_seqlen(build("t5")) == 2048
    tokenizer.model_max_length, before = 20, tokenizer.model_max_length
    try:
        assert default_seqlen(llama, tokenizer) == 20
    finally:
        tokenizer.model_max_length = before


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("seqlen", [2, 9, None])
def test_perplexity_is_that_of_a_loop_over_windows(llama, tokenizer, batch_size, seqlen):
    llama.train()
    steps = []
    measured = perplexity(
        llama, tokenizer, TEXT, seqlen=seqlen, batch_size=batch_size, progress=lambda *step: steps.append(step)
    )
    assert llama.training
    llama.eval()
    ids, length = tokenize(tokenizer, TEXT).ids, seqlen or 32
    means = []
    for start in range(0, len(ids) - length + 1, length):
        window = ids[start : start + length]
        with torch.no_grad():
            chances = llama(window[None]).logits[0].double().log_softmax(-1)
        means.append(-sum(float(chances[i, window[i + 1]]) for i in range(length - 1)) / (length - 1))
    assert measured.nll == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(measured.nll))
    assert (measured.windows, measured.seqlen, measured.tokens) == (len(means), length, len(means) * length)
    assert steps[-1] == (len(means), len(means))
    assert measured.to_json()["sha256"] == sha256(TEXT.encode()).hexdigest()


def test_perplexity_of_half_precision_is_summed_in_float32(build, tokenizer):
    exact = perplexity(build("llama"), tokenizer, TEXT).nll
    assert perplexity(build("llama").bfloat16(), tokenizer, TEXT).nll == pytest.approx(exact, rel=0.02)


def test_a_perplexity_that_is_not_finite_is_an_error(build, tokenizer):
    model = build("llama")
    model.lm_head.weight.data *= 1e6
    with pytest.raises(MaskoptError, match=r"^The perplexity of the LlamaForCausalLM on The text is e\^.*, which no"):
        perplexity(model, tokenizer, TEXT)
    model = build("llama").half()
    model.model.norm.weight.data *= 3e4  # finite, but not its products
    with pytest.raises(MaskoptError, match=r"is not a number, which no usable .* torch.float16, are out of range"):
        perplexity(model, tokenizer, TEXT)
    model = build("llama")
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(MaskoptError, match=r"^The model's model.norm.weight has NaN or infinite entries"):
        perplexity(model, tokenizer, TEXT)


def test_perplexity_needs_a_causal_language_model(build, tokenizer):
    for name, kind in (("bert", "BertModel"), ("t5", "T5ForConditionalGeneration")):
        with pytest.raises(MaskoptError, match=f"needs a causal language model; this is a {kind}"):
            perplexity(build(name), tokenizer, TEXT)


def test_perplexity_refuses_what_it_cannot_measure(llama, build, tokenizer):
    with pytest.raises(MaskoptError, match="seqlen must be at least 2"):
        perplexity(llama, tokenizer, TEXT, seqlen=1)
    with pytest.raises(MaskoptError, match="batch_size must be an integer of at least 1"):
        perplexity(llama, tokenizer, TEXT, batch_size=0)
    with pytest.raises(MaskoptError, match="The text has sequences of 40 tokens, but the model takes at most 32"):
        perplexity(llama, tokenizer, TEXT, seqlen=40)
    with pytest.raises(MaskoptError, match=r"The text holds token id .* another tokenizer"):
        perplexity(build("llama", vocab_size=20), tokenizer, TEXT)
