"""Classes of transformers that compute the same as another one, and whose configuration allows more.

`LlamaConfig` demands a hidden size that is a multiple of the number of heads, although the size of a head is written
out; `MistralConfig` does not, and without a sliding window the models are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from maskopt.models.quiet import without_bars

__all__ = ["allowed", "sibling_of"]

_SIBLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("MistralForCausalLM", {"sliding_window": None})
}
"""By class: one that may compute the same, and the entries of its configuration that make it."""
_TOKENS = 64
_SMALL = {"vocab_size": _TOKENS, "num_hidden_layers": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
_TOLERANCE = 1e-5  # relative, of logits in float32


def allowed(config: Any, entries: Mapping[str, int]) -> bool:
    """Whether a configuration can be saved and read again with other entries.

    Parameters
    ----------
    config : PreTrainedConfig
    entries : mapping of str to int
        Of the part that reads text.
    """
    try:
        changed = _changed(config, entries)
        type(changed).from_dict(changed.to_dict())
    except Exception:  # whatever a configuration checks
        return False
    return True


def sibling_of(
    kind: type[PreTrainedModel], config: Any, entries: Mapping[str, int]
) -> tuple[type[PreTrainedModel], Any] | None:
    """Return a class that computes the same as another one, and its configuration, where that allows the entries.

    Small models of both classes with the same random weights are compared.

    Parameters
    ----------
    kind : type of PreTrainedModel
    config : PreTrainedConfig
        Of that class.
    entries : mapping of str to int

    Returns
    -------
    (type of PreTrainedModel, PreTrainedConfig) or None
    """
    if kind.__name__ not in _SIBLINGS:
        return None
    name, own = _SIBLINGS[kind.__name__]
    other: Any = getattr(transformers, name)
    try:
        known = _changed(config, entries).to_dict()
        known.pop("model_type", None)
        found = other.config_class.from_dict({**known, **own, "architectures": [name]})
        same = _computes_the_same(kind, _changed(config, {**entries, **_SMALL}), other, _changed(found, _SMALL))
    except Exception:  # a class that does not know an entry, or cannot be made so small
        return None
    return (other, found) if same else None


def _changed(config: Any, entries: Mapping[str, Any]) -> Any:
    changed = copy.deepcopy(config)
    for name, value in entries.items():
        setattr(changed.get_text_config(), name, value)
    return changed


def _computes_the_same(kind: Any, config: Any, other: Any, others: Any) -> bool:
    random = torch.Generator().manual_seed(0)
    with without_bars():
        first, second = (each(each_config).float().eval() for each, each_config in ((kind, config), (other, others)))
    weights = {name: torch.randn(each.shape, generator=random) * 0.2 for name, each in first.state_dict().items()}
    first.load_state_dict(weights)
    second.load_state_dict(weights)
    ids = torch.randint(0, _TOKENS, (2, 16), generator=random)
    with torch.no_grad():
        before, after = (model(input_ids=ids, use_cache=False).logits for model in (first, second))
    return bool((before - after).norm() <= _TOLERANCE * before.norm())
