"""Perplexity of a causal language model by the fixed-window protocol of the pruning literature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.errors import MaskoptError
from maskopt.models.batches import check_token_ids
from maskopt.models.checks import check_causal, check_tokenizer, require_positive
from maskopt.models.context import default_seqlen
from maskopt.models.replay import evaluation_mode, run_model
from maskopt.models.text import Text, tokenize
from maskopt.threads import sized_threads

__all__ = ["Perplexity", "perplexity"]

_MOST = 700.0  # e^709 is the largest float


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was measured.

    Parameters
    ----------
    perplexity : float
        exp(nll).
    nll : float
        Mean negative log-likelihood per predicted token, in nats.
    tokens : int
        Tokens in the windows; each window predicts all of its own but the first.
    windows, seqlen : int
        Number of windows and their length.
    source, sha256 : str
        The text and the hash of its bytes.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seqlen: int
    source: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary that `json.dump` takes."""
        return asdict(self)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Text,
    *,
    seqlen: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Measure the perplexity of a causal language model on a text.

    The protocol of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695): the whole text is tokenised once and cut
    into floor(n / seqlen) windows without overlap; the remaining tokens are dropped. The model reads every window by
    itself, and the mean negative log-likelihood of its tokens but the first is averaged over the windows.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model; its mode is restored.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    text : str, Path or Text
        The text itself, or the path of a text or ``.jsonl`` file, see `read_text`.
    seqlen : int, optional
        Window length; by default 2048 or what the model can take if that is less.
    batch_size : int
        Windows read at a time.
    progress : callable, optional
        Called with (windows done, windows in all) after every batch.

    Returns
    -------
    Perplexity

    Raises
    ------
    MaskoptError
        If the model is no causal language model, the text cannot be read or is shorter than one window, or the
        perplexity is not finite.
    """
    check_causal("Perplexity needs", model)
    check_tokenizer(tokenizer)
    seqlen = default_seqlen(model, tokenizer) if seqlen is None else seqlen
    require_positive(batch_size=batch_size, seqlen=seqlen)
    if seqlen < 2:
        raise MaskoptError(f"seqlen must be at least 2, because a window's first token is not predicted; got {seqlen}.")
    stream = tokenize(tokenizer, text)
    stream.require(seqlen)
    count = len(stream.ids) // seqlen
    windows = stream.ids[: count * seqlen].view(count, seqlen)
    check_token_ids(model, stream.source, windows)
    total = 0.0
    with evaluation_mode(model), sized_threads(sum(weight.numel() for weight in model.parameters())):
        for start in range(0, count, batch_size):
            batch = windows[start : start + batch_size].to(model.device)
            logits = run_model(model, stream.source, {"input_ids": batch}).logits
            # One window at a time: float32 logits of a whole batch can be larger than the model.
            for window, scores in zip(batch, logits, strict=True):
                losses = cross_entropy(scores[:-1].float(), window[1:], reduction="none")
                total += float(losses.sum(dtype=torch.float64))
            if progress is not None:
                progress(min(start + batch_size, count), count)
    nll = total / (count * (seqlen - 1))
    if not nll < _MOST:
        what = "not a number" if math.isnan(nll) else f"e^{nll:.4g}"
        raise MaskoptError(
            f"The perplexity of the {type(model).__name__} on {stream.source} is {what}, which no usable model has; "
            f"its weights, or its numbers in {model.dtype}, are out of range."
        )
    value = math.exp(nll)
    return Perplexity(value, nll, count * seqlen, count, seqlen, stream.source, stream.sha256)
