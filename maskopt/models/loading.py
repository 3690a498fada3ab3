"""Models and tokenizers from a folder or the hub, with errors a person can act on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from maskopt.errors import MaskoptError
from maskopt.models.blocks import find_blocks
from maskopt.models.quiet import without_bars

__all__ = ["load_model"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load_model(
    name: str | os.PathLike[str], *, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in the dtype of its checkpoint, and its tokenizer.

    The class is the one the checkpoint names, so that saving the pruned model loses no head.

    Parameters
    ----------
    name : str or path-like
        A folder, or the id of a model on the hub.
    device : str, optional
        Where to put the model.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.

    Raises
    ------
    MaskoptError
        If there is no such model, its folder lacks config.json, weights or tokenizer, its architecture is unknown or
        has no blocks to prune, or some of its blocks' weights are missing.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists():
        raise MaskoptError(f"{name} is a file; a model is a folder with config.json, weights and a tokenizer.")
    elif len(folder.parts) > 2 or str(name).startswith((".", "/", "~")):
        raise MaskoptError(f"There is no model folder {name}.")
    config = _try(name, "its configuration", AutoConfig.from_pretrained, name)
    if config.is_encoder_decoder:
        raise MaskoptError(
            f"The model {name} is an encoder-decoder, which text alone cannot calibrate; load it with "
            f"transformers and hand maskopt.prune batches with decoder_input_ids."
        )
    tokenizer = _try(name, "its tokenizer", AutoTokenizer.from_pretrained, name)
    kind = _class_of(name, config)
    model, info = _try(name, "its weights", kind.from_pretrained, name, dtype="auto", output_loading_info=True)
    blocks = tuple(f"{block.name}." for block in find_blocks(model))
    missing = sorted(key for key in info["missing_keys"] if key.startswith(blocks))
    if missing:
        raise MaskoptError(f"The weights of {name} lack {len(missing)} tensors of its blocks, such as {missing[0]}.")
    return model.to(device) if device is not None else model, tokenizer


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise MaskoptError(f"The folder {folder} holds no config.json, so it is not a Hugging Face model.")
    # Without files transformers may make up an empty tokenizer.
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise MaskoptError(f"The folder {folder} holds no tokenizer (such as tokenizer.json).")


def _class_of(name: object, config: Any) -> Any:
    """Return the class the checkpoint names: any other might drop its head or make one up."""
    architecture = (config.architectures or [None])[0]
    if architecture is None:
        raise MaskoptError(f'The config.json of {name} does not say which class the model is ("architectures").')
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise MaskoptError(
            f"The model {name} is a {architecture}, which transformers {transformers.__version__} does not have."
        )
    return kind


def _try(name: object, what: str, load: Any, *args: Any, **options: Any) -> Any:
    """Call a transformers loader; its many exceptions become one sentence."""
    try:
        with without_bars():
            return load(*args, **options)
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MaskoptError(f"The model {name} cannot be loaded, {what} failed: {reason.rstrip('.')}.") from error
