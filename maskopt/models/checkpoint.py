"""Checks of the files of a saved model before transformers reads them: missing, damaged or of another kind."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from maskopt.errors import MaskoptError
from maskopt.files import reason

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
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OLD = ("pytorch_model.bin", "pytorch_model.bin.index.json")
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
    config = _object(folder / "config.json")
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
            _object(folder / name)
    for file in _weight_files(folder):
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


def _object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MaskoptError(f"The file {file} cannot be read: {reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise MaskoptError(f"The file {file} is damaged: it is no JSON.") from error
    if not isinstance(content, dict):
        raise MaskoptError(f"The file {file} is damaged: it holds no JSON object.")
    return content


def _weight_files(folder: Path) -> Iterator[Path]:
    """Yield the safetensors files of a model, those that an index names among them."""
    if (folder / _WHOLE).is_file():
        yield folder / _WHOLE
        return
    index = folder / _INDEX
    if not index.is_file():
        if not any((folder / name).is_file() for name in _OLD):
            raise MaskoptError(f"The folder {folder} holds no weights (such as model.safetensors).")
        return
    shards = _object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise MaskoptError(f"The file {index} is damaged: its weight_map does not name a file for each tensor.")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise MaskoptError(f"The file {index} names {name!r}, which does not lie beside it.")
        if not (folder / name).is_file():
            raise MaskoptError(f"The folder {folder} lacks {name}, which {_INDEX} names.")
        yield folder / name


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
