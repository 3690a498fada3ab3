"""Packed and shrunk folders as models of a class that one names, where auto classes choose another one or none."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from transformers import AutoConfig, PreTrainedModel

from maskopt.errors import MaskoptError
from maskopt.packed.packed_tensors import PackedError
from maskopt.packed.reader import PackedConfig, load
from maskopt.packed.shrunk import ShrunkConfig, shrunk_class

__all__ = ["load_packed"]

Model = TypeVar("Model", bound=PreTrainedModel)


def load_packed(kind: type[Model], folder: str | os.PathLike[str], **options: Any) -> Model:
    """Load a packed folder as a model of a class, as `kind.from_pretrained` loads a dense one.

    A class's own `from_pretrained` looks for files of weights only under names that packed folders avoid, so that it
    fails, and fills no weight at random; auto classes load packed folders by themselves.

    Parameters
    ----------
    kind : type of PreTrainedModel
        Such as ``LlamaForCausalLM``.
    folder : path-like
        The packed folder, or one whose blocks have different widths, or an id on the hub.
    **options
        Of `from_pretrained`.

    Returns
    -------
    PreTrainedModel
        Of that class, or of a subclass of the same name where blocks have different widths; with
        ``output_loading_info=True`` also what `from_pretrained` tells of loading.

    Raises
    ------
    MaskoptError
        If the folder is not packed, is damaged, or holds a model of another type.

    Examples
    --------
    >>> from transformers import LlamaForCausalLM
    >>> from maskopt.models import load_packed
    >>> model = load_packed(LlamaForCausalLM, "packed")  # doctest: +SKIP
    """
    try:
        config, rest = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
        if not isinstance(config, PackedConfig):
            raise MaskoptError(f"{folder} is not a packed folder; load it with {kind.__name__}.from_pretrained.")
        if not isinstance(config.dense, kind.config_class):
            raise MaskoptError(
                f"The packed folder {folder} holds a model of the type {config.model_type}, which "
                f"{kind.__name__} is not for."
            )
        if isinstance(config, ShrunkConfig):
            shrunk: Model = shrunk_class(kind).from_pretrained(folder, config=config.dense, **rest)
            return shrunk
        model: Model = load(kind, folder, config.dense, **rest)
    except PackedError as error:
        raise MaskoptError(str(error)) from error
    return model
