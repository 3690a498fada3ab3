"""Models and tokenizers from a folder or the hub; errors say what to change."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from maskopt.checks import shown
from maskopt.errors import MaskoptError, is_memory_failure
from maskopt.models.blocks import find_blocks
from maskopt.models.checkpoint import check_folder, check_quantization
from maskopt.models.checks import check_model, move_model
from maskopt.models.offload import Offload, Stored
from maskopt.models.quiet import without_bars
from maskopt.models.ranks import current
from maskopt.packed.packed_tensors import PackedError
from maskopt.packed.reader import PackedConfig
from maskopt.packed.reader import load as load_packed
from maskopt.packed.shrunk import ShrunkConfig, shrunk_class

__all__ = ["load_model", "model_class"]

_ADVICE = re.compile(
    r"https?:|internet|connection|pip3? |install |weights_only|trust_remote|ignore_mismatched|report|github|please|"
    r"make sure|you (can|should|want)|pass |try |checkout",
    re.IGNORECASE,
)


def load_model(
    name: str | os.PathLike[str], *, device: str | None = None, offload: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in the dtype of its checkpoint, and its tokenizer.

    The class is the one the checkpoint names, so that the saved pruned model has all heads.

    Parameters
    ----------
    name : str or path-like
        A folder, or the id of a model on the hub.
    device : str, optional
        Where to put the model.
    offload : Path, optional
        Leave the weights of the blocks on disk, and have them in memory only while a block runs, see `Offload`. In this
        folder `prune` writes finished blocks, with which a later `prune` of the same model on the same data goes on;
        weights are stored there, too, that the model has in another form than the checkpoint, such as stacked experts
        and all those of packed folders.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.

    Raises
    ------
    MaskoptError
        If there is no such model, its files are missing or damaged, its weights are incomplete, of other shapes than
        its configuration says, quantised or not finite, or its architecture is unknown or has no blocks to prune.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise MaskoptError(f"The model must be a folder or an id on the hub; got {shown(name)}.")
    folder = Path(name)
    if _lies_there(folder):
        if not folder.is_dir():
            raise MaskoptError(f"{name} is a file; a model is a folder with config.json, weights and a tokenizer.")
        check_folder(folder, CONFIG_MAPPING)
    elif len(folder.parts) > 2 or str(name).startswith((".", "/", "~")):
        raise MaskoptError(f"There is no model folder {name}.")
    else:
        _check_hub_name(str(name))
    config = _try(name, "its configuration", AutoConfig.from_pretrained, name, trust_remote_code=False)
    packed, shrunk = type(config) is PackedConfig, isinstance(config, ShrunkConfig)
    if packed or shrunk:
        config = config.dense
    check_quantization(name, getattr(config, "quantization_config", None))
    if config.is_encoder_decoder:
        raise MaskoptError(
            f"The model {name} is an encoder-decoder, which text alone cannot calibrate; load it with "
            f"transformers and hand maskopt.prune batches with decoder_input_ids."
        )
    kind = shrunk_class(_class_of(name, config)) if shrunk else _class_of(name, config)
    tokenizer = _try(name, "its tokenizer", AutoTokenizer.from_pretrained, name, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise MaskoptError(f"The tokenizer of {name} is none of transformers' tokenizers.")
    options = {
        "dtype": "auto",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "trust_remote_code": False,
    }
    if offload is not None:
        place = torch.device("cpu" if device is None else device)
        own = offload / f"weights-{current().number}"  # ranks may write the same files
        options |= {"device_map": _device_map(name, kind, config, place), "offload_folder": own}
    load = partial(load_packed, kind, config=config) if packed else kind.from_pretrained
    model, info = _try(name, "its weights", load, name, **options)
    _check_complete(name, model, info)
    check_model(model) if offload is None else Offload(model, _stored(model), place, offload)
    return move_model(model, device) if device is not None and offload is None else model, tokenizer


def _device_map(name: object, kind: type[PreTrainedModel], config: Any, device: torch.device) -> dict[str, str]:
    """Return where transformers loads each part of a model to: the blocks nowhere, everything else to a device."""
    with torch.device("meta"):
        skeleton = _try(name, "its configuration", kind, config)
    places = {block.name: "disk" for block in find_blocks(skeleton)}

    def place(module: nn.Module, path: str) -> None:
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        places.update((f"{path}{key}", str(device)) for key, _ in own)
        for key, child in module.named_children():
            if f"{path}{key}" in places:
                continue
            if any(block.startswith(f"{path}{key}.") for block in places):
                place(child, f"{path}{key}.")
            else:
                places[f"{path}{key}"] = str(device)

    place(skeleton, "")
    return places


def _stored(model: PreTrainedModel) -> dict[str, Stored]:
    """Return where the parameters lie that were not loaded, and take the hooks away that would load them."""
    index: Mapping[str, Mapping[str, str]] = {}
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            index = weights.dataset.index
            break
    remove_hook_from_submodules(model)
    del model.hf_device_map  # what saves the model would look for the hooks
    return {name: Stored(Path(entry["safetensors_file"]), entry["weight_name"]) for name, entry in index.items()}


def model_class(name: str | os.PathLike[str]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class of a model and its configuration; its weights need not be there.

    Parameters
    ----------
    name : str or path-like
        A folder with ``config.json``, such a file, or the id of a model on the hub.

    Returns
    -------
    kind : type of PreTrainedModel
    config : PreTrainedConfig

    Raises
    ------
    MaskoptError
        If there is no such configuration, or transformers does not know the class.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise MaskoptError(f"The model must be a folder, a config.json or an id on the hub; got {shown(name)}.")
    if not _lies_there(Path(name)):
        _check_hub_name(str(name))
    config = _try(name, "its configuration", AutoConfig.from_pretrained, name, trust_remote_code=False)
    if isinstance(config, PackedConfig):  # or that of a shrunk folder
        config = config.dense
    return _class_of(name, config), config


def _check_hub_name(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise MaskoptError(f"There is no model folder {name!r}, and no model on the hub can have that name.")


def _lies_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # too long a name, a null character
        raise MaskoptError(f"There is no model folder {str(path)[:200]!r}.") from error


def _check_complete(name: object, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that the loader initialised no weights itself and left none unused."""
    mismatched = sorted(info.get("mismatched_keys", ()))
    if mismatched:
        key, found, expected = mismatched[0]
        raise MaskoptError(
            f"The weights of {name} do not fit its config.json: {key} has shape {tuple(found)}, not {tuple(expected)} "
            f"(one of {len(mismatched)})."
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise MaskoptError(f"The weights of {name} lack {len(missing)} tensors, such as {missing[0]}.")
    known = model.state_dict().keys()
    stacks = tuple({f"{block.stack}." for block in find_blocks(model)})
    unused = sorted(
        key
        for key in info.get("unexpected_keys", ())
        if key.startswith(stacks) and (key.endswith(".weight") or key.removesuffix("bias") + "weight" in known)
    )
    if unused:
        raise MaskoptError(
            f"The weights of {name} hold {len(unused)} tensors of blocks that its config.json does not know of, such "
            f"as {unused[0]}."
        )


def _class_of(name: object, config: Any) -> type[PreTrainedModel]:
    """Return the class the checkpoint names; another one might drop or initialise a head."""
    names = config.architectures
    if not names:
        raise MaskoptError(f'The config.json of {name} does not say which class the model is ("architectures").')
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise MaskoptError(
            f'The "architectures" in the config.json of {name} must be a list of names; it is {names!r}.'
        )
    kind: Any = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    settings = getattr(kind, "config_class", None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel) or settings is None:
        raise MaskoptError(
            f"The model {name} is a {names[0]!r}, which is no model that transformers {transformers.__version__} has."
        )
    if not isinstance(config, settings):
        raise MaskoptError(
            f"The config.json of {name} contradicts itself: a {names[0]} is not of the type {config.model_type!r}."
        )
    named: type[PreTrainedModel] = kind
    return named


def _try(name: object, what: str, load: Any, *args: Any, **options: Any) -> Any:
    """Call a transformers loader; turn its exceptions into a MaskoptError of one sentence."""
    loggers = [getLogger(library) for library in ("transformers", "huggingface_hub", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(ERROR)
    try:
        with without_bars(), warnings.catch_warnings(action="ignore"):
            return load(*args, **options)
    except Exception as error:
        if is_memory_failure(error):
            raise
        if isinstance(error, PackedError):  # a sentence already
            raise MaskoptError(str(error)) from error
        raise MaskoptError(f"The model {name} cannot be loaded, {what} failed: {_reason(name, error)}.") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(name: object, error: Exception) -> str:
    """Return an exception's first sentence, without advice for callers of transformers."""
    text = str(error)
    if "weights_only" in text:
        return "the file holds other things than tensors"
    if "custom code" in text:
        return "it comes with code of its own, which is not run"
    if isinstance(error, OSError) and not Path(str(name)).is_dir():
        return "there is no such folder, and the Hugging Face hub gives no such model"
    lines = [line.strip() for line in text.replace("`", "'").splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text) if part and not _ADVICE.search(part)]
    reason = sentences[0].rstrip(".!: ,")[:300] if sentences else ""
    if isinstance(error, (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError)) or not reason:
        return f"its files contradict each other ({type(error).__name__}{': ' if reason else ''}{reason})"
    return reason
