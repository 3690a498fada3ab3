"""How long a sequence may be."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["context_length", "default_seqlen"]

_UNLIMITED = 10**9  # tokenizers without a limit say 10^30


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Return how many tokens the model (and the tokenizer, if given) can take at once, None if there is no limit."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    if tokenizer is not None:
        # RoBERTa's kin spend positions on padding, which only the tokenizer's limit tells.
        limits.append(tokenizer.model_max_length)
    known = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < _UNLIMITED]
    return min(known, default=None)


def default_seqlen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, at_most: int = 2048
) -> int:
    """Return the literature's sequence length, 2048, or what the model can take if that is less."""
    return min(at_most, context_length(model, tokenizer) or at_most)
