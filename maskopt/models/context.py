"""The longest sequence that a model can take."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["context_length", "default_seqlen"]

_UNLIMITED = 10**9  # tokenizers without a limit say 10^30


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Return how many tokens a model can take at once.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase, optional
        Its limit counts, too.

    Returns
    -------
    int or None
        None if there is no limit.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    if tokenizer is not None:
        # Models such as RoBERTa reserve positions for padding, which only the tokenizer's limit accounts for.
        limits.append(tokenizer.model_max_length)
    known = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < _UNLIMITED]
    return min(known, default=None)


def default_seqlen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, at_most: int = 2048
) -> int:
    """Return the literature's sequence length, 2048, or what the model can take if that is less.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase, optional
        Its limit counts, too.
    at_most : int
        Instead of 2048.

    Returns
    -------
    int
        Tokens.
    """
    return min(at_most, context_length(model, tokenizer) or at_most)
