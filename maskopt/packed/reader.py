"""Loads packed folders with transformers: `AutoModelForCausalLM.from_pretrained(FOLDER)`.

maskopt writes a copy of this file into every packed folder, as ``maskopt_reader.py``, beside one of
``packed_tensors.py``. They need nothing of maskopt, and `trust_remote_code=True` lets transformers use them; after
`import maskopt` that is not needed.

The model's type in ``config.json`` is known to no version of transformers, and its weights have names that none looks
for: without a reader the folder fails to load. With one, tensors are handed over as a state dict, one at a time, and
what arrives in the model is compared with what was read.
"""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from .packed_tensors import AUTO_CLASSES, DTYPES, MODEL_TYPE, Packed, PackedError

_SAMPLES = 256  # entries of every tensor that are compared after loading
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_UNUSED = ("_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "proxies", "subfolder")


class Lazy:
    """A tensor that is read when it is looked into, as transformers does with slices of safetensors files."""

    def __init__(self, packed: Packed, name: str) -> None:
        self._packed, self._name = packed, name
        entry = packed.tensors[name]
        self._kind, self.zeros, self.shape = entry["dtype"], entry["zeros"], torch.Size(entry["shape"])
        self.dtype, self.ndim = DTYPES.get(entry["dtype"]), len(self.shape)
        self.samples: torch.Tensor | None = None
        self.error: PackedError | None = None

    def get_shape(self) -> list[int]:
        """Return the shape, as slices do."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the name of the type, as slices do."""
        return str(self._kind)

    def is_floating_point(self) -> bool:
        """Whether entries are floating-point numbers."""
        return self.dtype is not None and self.dtype.is_floating_point

    def numel(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            tensor = self._packed.read(self._name)
        except PackedError as error:
            self.error = error  # some versions of transformers only log it
            raise
        self.samples = _sample(tensor)
        return tensor if index is Ellipsis else tensor[index]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return a few entries of a tensor, in a copy."""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, max(0, flat.numel() - 1), min(flat.numel(), _SAMPLES), dtype=torch.float64).long()
    return flat[places.to(flat.device)].cpu().clone()


def locate(name: str | os.PathLike[str], **options: Any) -> Path:
    """Return the folder of a name: itself, or the copy that huggingface_hub keeps of a repository."""
    folder = Path(name)
    if folder.is_dir():
        return folder / (options.get("subfolder") or "")
    hub = importlib.import_module("huggingface_hub")
    kept = {key: value for key, value in options.items() if key in _HUB and value is not None}
    return Path(hub.snapshot_download(str(name), **kept)) / (options.get("subfolder") or "")


def load(kind: Any, name: str | os.PathLike[str], config: Any, **options: Any) -> Any:
    """Load a packed folder as a model of a class.

    Parameters
    ----------
    kind : type of PreTrainedModel
    name : path-like
        The folder, or an id on the hub.
    config : PreTrainedConfig
        The model's own configuration.
    **options
        Of `from_pretrained`.

    Returns
    -------
    PreTrainedModel
        As `from_pretrained` would load the dense folder; with ``output_loading_info`` also that.

    Raises
    ------
    PackedError
        If the folder is damaged, or the model does not hold its weights afterwards.
    """
    _check_version()
    folder = locate(name, **options)
    packed = Packed(folder)
    told = options.pop("output_loading_info", False)
    wanted = {key: value for key, value in options.items() if key not in (*_HUB, *_UNUSED)}
    tensors = {key: Lazy(packed, key) for key in packed.tensors}
    try:
        model, info = kind.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **wanted)
    finally:
        for tensor in tensors.values():
            if tensor.error is not None:
                raise tensor.error
    _check_loaded(folder, model, info, tensors)
    model.config.name_or_path = model.name_or_path = str(name)
    if model.can_generate() and (folder / "generation_config.json").is_file() and "generation_config" not in wanted:
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return (model, info) if told else model


def _check_version() -> None:
    major = transformers.__version__.partition(".")[0]
    if major != "5":
        raise PackedError(
            f"Packed folders are read by transformers 5, and this is {transformers.__version__}; install another "
            f"version, or unpack the folder with maskopt unpack."
        )


def _check_loaded(folder: Path, model: Any, info: Any, tensors: dict[str, Lazy]) -> None:
    """Check that the model holds the weights of the folder and no random ones, whatever transformers did.

    Raises
    ------
    PackedError
        If it does not.
    """
    named = model.config.architectures or ()
    wrong = "" if type(model).__name__ not in named else next(iter(sorted(info["missing_keys"])), "")
    ignored = set(info["unexpected_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    state = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    used, hidden = 0, 0
    for name, tensor in tensors.items():
        if name in ignored or tensor.numel() == 0:
            continue
        used += 1
        # A model without its head, or with another one, has the same names without or with a prefix.
        place = next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in state), None)
        if tensor.samples is None:
            # Of tied weights one is read; the other one must be the same parameter.
            wrong = wrong or ("" if _is_tied(model, name) else name)
        elif place is None:
            hidden += tensor.zeros
        else:
            value = state.pop(place)
            if _is_here(value) and value.shape == tensor.shape:
                wrong = wrong or ("" if _same(_sample(value), tensor.samples) else name)
    # Tensors that transformers renames or stacks, such as experts, are compared by what packing is about: their zeros.
    if hidden and all(map(_is_here, state.values())) and sum(map(_zeros, state.values())) < hidden:
        wrong = wrong or "a tensor that has another name in the model"
    if wrong or not used:
        raise PackedError(
            f"transformers {transformers.__version__} does not load the packed folder {folder} correctly: "
            f"{wrong or 'every tensor'} does not have the weights that are stored; unpack it with maskopt unpack."
        )


def _is_here(value: torch.Tensor) -> bool:
    """Whether a tensor is in memory as a whole, and not in parts of several processes or in a file until it is used."""
    return type(value) is torch.Tensor and not value.is_meta


def _same(found: torch.Tensor, stored: torch.Tensor) -> bool:
    stored = stored.to(found.dtype)
    return bool(((found == stored) | ((found != found) & (stored != stored))).all())  # NaN is not NaN


def _zeros(value: torch.Tensor) -> int:
    return value.numel() - int(torch.count_nonzero(value))


def _is_tied(model: Any, name: str) -> bool:
    return any(name in pair for pair in getattr(model, "all_tied_weights_keys", {}).items())


class PackedConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers has no types
    """The configuration of a packed folder; `dense` is the model's own one, of transformers."""

    model_type = MODEL_TYPE
    folder_kind = "packed"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Make a configuration of the content of a packed ``config.json``; options change the model's own one."""
        own = config_dict.get("dense_config")
        own = dict(own) if isinstance(own, dict) else {}
        kind = own.pop("model_type", None)
        if not isinstance(kind, str):
            raise PackedError(f"The config.json of the {cls.folder_kind} folder is damaged: it has no dense_config.")
        unused = options.pop("return_unused_kwargs", False)
        try:
            known = transformers.CONFIG_MAPPING[kind]
        except KeyError as error:
            raise PackedError(
                f"The {cls.folder_kind} folder holds a model of the type {kind!r}, which transformers "
                f"{transformers.__version__} does not have."
            ) from error
        dense, rest = known.from_dict(own, return_unused_kwargs=True, **options)
        config = cls()
        # Tokenizers are chosen by the type, so it is that of the model.
        config.dense, config.model_type = dense, kind
        config.auto_map = config_dict.get("auto_map") or {}
        config.name_or_path = config_dict.get("_name_or_path", "")
        return (config, rest) if unused else config


class Loader:
    """What an auto class loads packed folders with; it makes models of transformers' own classes."""

    auto_class = ""
    config_class = PackedConfig

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: saved models are plain ones, which need no code."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        """Load a packed folder as the class that the auto class would choose for the dense one."""
        options.pop("trust_remote_code", None)
        if not hasattr(config, "dense"):
            raise PackedError(f"The folder {name} is loaded by transformers.{cls.auto_class} only.")
        with torch.device("meta"):
            kind = type(cls._from_config(config))
        return cls._load(kind, name, config, options)

    @classmethod
    def _load(cls, kind: Any, name: Any, config: Any, options: dict[str, Any]) -> Any:
        return load(kind, name, config.dense, **options)

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        """Make a model with weights that have not been loaded, as `from_config` of an auto class does."""
        return getattr(transformers, cls.auto_class).from_config(config.dense, **options)


LOADERS = {name: type(f"Packed{name}", (Loader,), {"auto_class": name}) for name in AUTO_CLASSES}
globals().update({loader.__name__: loader for loader in LOADERS.values()})  # where transformers looks for them


def register_config() -> None:
    """Let `AutoConfig` read packed folders."""
    transformers.AutoConfig.register(MODEL_TYPE, PackedConfig, exist_ok=True)


def register_models() -> None:
    """Let the auto classes of models load packed folders."""
    register_config()
    for name, loader in LOADERS.items():
        getattr(transformers, name).register(PackedConfig, loader, exist_ok=True)
