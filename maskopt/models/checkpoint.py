"""Checks of the files of a saved model before transformers reads them: missing, damaged or of another kind."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from maskopt.errors import MaskoptError
from maskopt.packed.folder import is_packed, packed_files
from maskopt.packed.layout import json_object, weight_files

__all__ = ["check_folder", "check_quantization"]

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
_PLAIN = ("F64", "F32", "F16", "BF16")


def check_folder(folder: Path, types: Container[str]) -> None:
    """Check that a folder is a complete, undamaged model with unquantised weights.

    Parameters
    ----------
    folder : Path
    types : container of str
        Values that ``model_type`` may have.

    Raises
    ------
    MaskoptError
        If not, with the name of the file, and in weight files of the tensor.
    """
    if not (folder / "config.json").is_file():
        raise MaskoptError(f"The folder {folder} holds no config.json, so it is not a Hugging Face model.")
    config = json_object(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise MaskoptError(f'The config.json of {folder} does not say which kind of model it is ("model_type").')
    if kind not in types:
        own = " and comes with code of its own, which is not run" if config.get("auto_map") else ""
        raise MaskoptError(f"The model {folder} is of the type {kind!r}, which transformers does not have{own}.")
    check_quantization(folder, config.get("quantization_config"))
    # Without these files transformers may make an empty tokenizer.
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise MaskoptError(f"The folder {folder} holds no tokenizer (such as tokenizer.json).")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            json_object(folder / name)
    for file in packed_files(folder) if is_packed(folder) else weight_files(folder):
        _check_weights(file)


def check_quantization(name: object, settings: Any) -> None:
    """Check that a model's weights are not quantised.

    Parameters
    ----------
    name : object
        What messages call the model.
    settings : dict, object or None
        The ``quantization_config`` of its configuration.

    Raises
    ------
    MaskoptError
        If they are, with the name of the method.
    """
    if settings is not None:
        known = isinstance(settings, dict)
        method = settings.get("quant_method") if known else getattr(settings, "quant_method", None)
        raise MaskoptError(
            f"The weights of {name} are quantised ({method or 'no method is named'}), and only plain floating-point "
            f"weights can be pruned; dequantise and save them first."
        )


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, framework="np") as content:
            for name in content.keys():  # noqa: SIM118 - it is no mapping
                kind = content.get_slice(name).get_dtype()
                # Buffers may be integers (positions) or truth values (masks).
                if kind not in _PLAIN and (kind[0] not in "IUB" or name.endswith((".weight", ".bias"))):
                    raise MaskoptError(
                        f"The file {file} holds {name} as {kind}; only plain floating-point weights ("
                        f"{', '.join(_PLAIN)}) can be pruned."
                    )
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ").rstrip(".")
        raise MaskoptError(f"The file {file} is damaged or cannot be read: {reason}.") from error
