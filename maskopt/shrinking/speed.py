"""How fast a language model reads and writes, and what it remembers of each token."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from maskopt.models.batches import vocabulary_size
from maskopt.models.checks import is_causal
from maskopt.models.context import context_length
from maskopt.models.replay import evaluation_mode

__all__ = ["Speed", "cache_bytes", "measure_speed"]

_TOKENS = 8  # of the text whose cache is measured
_PROMPT, _NEW = 128, 16
_REPEATS, _SECONDS = 3, 2.0  # at least, and about


@dataclass(frozen=True)
class Speed:
    """How fast a model is; the best of several runs, because others only add to the time.

    Attributes
    ----------
    prefill, decode : float
        Tokens per second of all sequences together: reading a prompt, and writing one token after the other.
    prompt, new : int
        Tokens of the prompt, and written.
    threads : int
        Of torch.
    """

    prefill: float
    decode: float
    prompt: int
    new: int
    threads: int


def measure_speed(model: PreTrainedModel, batch: int, *, prompt: int = _PROMPT, new: int = _NEW) -> Speed:
    """Measure how fast a causal language model is on random tokens.

    Parameters
    ----------
    model : PreTrainedModel
    batch : int
        Sequences.
    prompt, new : int
        Tokens to read and to write; fewer where the model's context is shorter.

    Returns
    -------
    Speed
    """
    most = context_length(model) or prompt + new
    new = max(1, min(new, most // 4))
    prompt = max(1, min(prompt, most - new))
    ids = _tokens(model, batch, prompt + new)
    reading = writing = float("inf")
    began, runs = time.perf_counter(), 0
    with evaluation_mode(model):
        while runs < _REPEATS or time.perf_counter() - began < _SECONDS:
            start = _now(model)
            output = model(input_ids=ids[:, :prompt], use_cache=True)
            middle = _now(model)
            cache = output.past_key_values
            for position in range(prompt, prompt + new):
                output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
            end = _now(model)
            reading, writing, runs = min(reading, middle - start), min(writing, end - middle), runs + 1
    return Speed(batch * prompt / reading, batch * new / writing, prompt, new, torch.get_num_threads())


def cache_bytes(model: PreTrainedModel) -> float | None:
    """Return how many bytes of keys and values a causal language model keeps for a token; None where it keeps none.

    Parameters
    ----------
    model : PreTrainedModel
        Of any kind; models that do not generate, and those with an encoder, give None.
    """
    if not is_causal(model):
        return None
    with evaluation_mode(model):
        try:
            output = model(input_ids=_tokens(model, 1, _TOKENS), use_cache=True)
        except Exception:  # some classes keep nothing with some configurations, and fail if they are asked to
            return None
    cache: Any = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    content = cache if layers is None else [(getattr(x, "keys", None), getattr(x, "values", None)) for x in layers]
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors) / _TOKENS if tensors else None


def _tokens(model: PreTrainedModel, batch: int, number: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary_size(model) or 2, (batch, number), generator=random).to(model.device)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
