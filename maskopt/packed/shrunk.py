"""Loads folders of models whose blocks have different widths: `AutoModelForCausalLM.from_pretrained(FOLDER)`.

maskopt writes a copy of this file into such a folder, as ``maskopt_shrunk.py``, beside ``reader.py`` and
``packed_tensors.py``. They need nothing of maskopt, and `trust_remote_code=True` lets transformers use them; after
`import maskopt` that is not needed.

The weights lie in plain safetensors files. What transformers lacks is a configuration that gives every block its own
number of neurons and heads: here each block is made from the configuration with the block's own entries.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from .packed_tensors import AUTO_CLASSES, SHRUNK_TYPE, PackedError
from .reader import Loader, PackedConfig

WIDTHS = "block_widths"
"""Entry of the model's own configuration: by name of a block ``entries`` of the configuration for this block, and by
name of a parameter its ``shapes`` where no entry says them."""
AUTO_MAP = {
    "AutoConfig": "maskopt_shrunk.ShrunkConfig",
    **{name: f"maskopt_shrunk.Shrunk{name}" for name in AUTO_CLASSES},
}
_CODE = {"shrunk.py": "maskopt_shrunk.py", "reader.py": "reader.py", "packed_tensors.py": "packed_tensors.py"}


_CLASSES: dict[Any, Any] = {}  # that `shrunk_class` made, by transformers' class


def shrunk_class(kind: Any) -> Any:
    """Return the class of models of a class whose blocks have the widths that their configuration lists.

    Parameters
    ----------
    kind : type of PreTrainedModel

    Returns
    -------
    type of PreTrainedModel
        Of the same name; it loads and saves folders as every class of transformers does.
    """
    if getattr(kind, "is_shrunk", False):
        return kind
    if kind not in _CLASSES:
        _CLASSES[kind] = _class_of(kind)
    return _CLASSES[kind]


def _class_of(kind: Any) -> Any:
    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        kind.__init__(self, config, *args, **options)
        narrow(self, lambda own: kind(own, *args, **options))

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **options: Any) -> None:
        kind.save_pretrained(self, save_directory, *args, **options)
        write_shrunk(Path(save_directory))

    def set_attn_implementation(self: Any, *args: Any, **options: Any) -> None:
        kind.set_attn_implementation(self, *args, **options)
        _spread_implementations(self)

    def set_experts_implementation(self: Any, *args: Any, **options: Any) -> None:
        kind.set_experts_implementation(self, *args, **options)
        _spread_implementations(self)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        _, _, *state = kind.__reduce_ex__(self, protocol)
        return (_without_state, (kind,), *state)

    own = (__init__, __reduce_ex__, save_pretrained, set_attn_implementation, set_experts_implementation)
    members = {function.__name__: function for function in own}
    about = {"is_shrunk": True, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), {**members, **about})


def _without_state(kind: Any) -> Any:
    """Return a model of `shrunk_class` that has nothing yet: pickles cannot name a class that is made when needed."""
    own = shrunk_class(kind)
    return own.__new__(own)


def _spread_implementations(model: Any) -> None:
    """Let blocks, whose configurations are copies, compute attention and experts as the model's configuration says."""
    text = model.config.get_text_config()
    for name in listed_widths(model)[0]:
        for module in model.get_submodule(name).modules():
            config = getattr(module, "config", None)
            if config is not None and config is not text:
                copy_implementations(text, config)


def copy_implementations(source: Any, config: Any) -> None:
    """Let a configuration say what another one says of how attention and experts are computed, which is in no file.

    Parameters
    ----------
    source, config : PreTrainedConfig
    """
    for entry in ("_attn_implementation_internal", "_experts_implementation_internal"):
        if hasattr(source, entry):
            setattr(config, entry, getattr(source, entry))


def narrow(model: Any, make: Any) -> None:
    """Give a new model the blocks that its configuration lists.

    Parameters
    ----------
    model : PreTrainedModel
        Without weights, or with random ones.
    make : callable
        Makes a model of another configuration.
    """
    made: dict[str, Any] = {}
    try:
        entries, shapes = listed_widths(model)
        for name, own in entries.items():
            key = json.dumps(own, sort_keys=True)
            if key not in made:
                config = copy.deepcopy(model.config)
                for entry, value in own.items():
                    setattr(config.get_text_config(), entry, value)
                with torch.device("meta"):
                    made[key] = make(config)
            place_block(model, name, _like(made[key].get_submodule(name), model.get_submodule(name)))
        for name, shape in shapes.items():
            before = model.get_parameter(name)
            set_parameter(model, name, torch.empty(shape, device=before.device, dtype=before.dtype))
    except AttributeError as error:  # of get_submodule and get_parameter
        raise PackedError(f"The {WIDTHS} in config.json name a part that the model does not have: {error}.") from error
    _begin(model, {*entries, *(name.rpartition(".")[0] for name in shapes)})


def _begin(model: Any, names: set[str]) -> None:
    """Give new parts of a model the weights that training begins with, unless it has no data, as while it is loaded."""
    for name in sorted(names):
        for module in model.get_submodule(name).modules():
            if not any(each.is_meta for each in module.parameters()):
                model._init_weights(module)


def listed_widths(model: Any) -> tuple[dict[str, dict[str, int]], dict[str, list[int]]]:
    """Return the entries of blocks and the shapes of parameters that a model's configuration lists.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    (dict of str to dict, dict of str to list)
        By name in this model, which may have another head than the one that was saved, or none.

    Raises
    ------
    PackedError
        If it lists something else.
    """
    widths = getattr(model.config, WIDTHS, None) or {}
    entries: Any = widths.get("entries") or {} if isinstance(widths, dict) else None
    shapes: Any = widths.get("shapes") or {} if isinstance(widths, dict) else None
    sound = (
        isinstance(entries, dict)
        and isinstance(shapes, dict)
        and all(isinstance(own, dict) and all(map(_is_size, own.values())) for own in entries.values())
        and all(isinstance(shape, list) and all(map(_is_size, shape)) for shape in shapes.values())
    )
    if not sound:
        raise PackedError(f"The {WIDTHS} in config.json are damaged: they must list whole numbers by block and entry.")
    return {_own(model, n): each for n, each in entries.items()}, {_own(model, n): each for n, each in shapes.items()}


def _own(model: Any, name: str) -> str:
    """Return the name that a part of another model of the same configuration, with a head or without, has in this."""
    first = name.partition(".")[0]
    prefix = f"{model.base_model_prefix}."
    if first in model._modules:
        return name
    return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _like(block: Any, old: Any) -> Any:
    """Return a block without data with parameters on the device of another one, and its buffers."""
    first = next(old.parameters())
    block = copy.deepcopy(block)
    for name, parameter in list(block.named_parameters()):
        set_parameter(block, name, torch.empty(parameter.shape, device=first.device, dtype=parameter.dtype))
    misfit = take_buffers(block, dict(old.named_buffers()))
    if misfit is not None:
        raise PackedError(f"The shrunk model cannot be made: its blocks have buffers ({misfit}) of another shape.")
    return block


def take_buffers(block: Any, buffers: Any) -> str | None:
    """Give a block buffers by name within it; return the name of the first that does not fit, if there is one."""
    for name, buffer in list(block.named_buffers()):
        owner, _, key = name.rpartition(".")
        if name not in buffers or buffers[name].shape != buffer.shape:
            return str(name)
        block.get_submodule(owner)._buffers[key] = buffers[name]
    return None


def place_block(model: Any, name: str, block: Any) -> None:
    """Put a block in the place of the one that a model has under a name."""
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, block)


def set_parameter(model: Any, name: str, value: torch.Tensor, requires_grad: bool | None = None) -> None:
    """Let a module have another tensor for a parameter, of whatever shape; by default with gradients as before."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    if requires_grad is None:
        requires_grad = module._parameters[key].requires_grad
    module._parameters[key] = torch.nn.Parameter(value, requires_grad=requires_grad)
    if key == "weight" and isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = value.shape


def write_shrunk(folder: Path) -> None:
    """Turn a folder that a shrunk model was saved in into one that auto classes load.

    Parameters
    ----------
    folder : Path
        With the model's own ``config.json``.
    """
    path = folder / "config.json"
    own = json.loads(path.read_text(encoding="utf-8"))
    if own.get("model_type") != SHRUNK_TYPE:
        own.pop("auto_map", None)
        text = json.dumps({"model_type": SHRUNK_TYPE, "auto_map": AUTO_MAP, "dense_config": own}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
    here = Path(__file__)
    for name, copied in _CODE.items():
        source = here if name == "shrunk.py" else here.with_name(name)
        if (folder / copied).resolve() != source.resolve():
            shutil.copyfile(source, folder / copied)


class ShrunkConfig(PackedConfig):
    """The configuration of a shrunk folder; `dense` is the model's own one, of transformers."""

    model_type = SHRUNK_TYPE
    folder_kind = "shrunk"


class _ShrunkLoader(Loader):
    """What an auto class loads shrunk folders with."""

    config_class = ShrunkConfig

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        with torch.device("meta"):
            kind = type(super()._from_config(config))
        return shrunk_class(kind)._from_config(config.dense, **options)

    @classmethod
    def _load(cls, kind: Any, name: Any, config: Any, options: dict[str, Any]) -> Any:
        for unused in ("_commit_hash", "_from_auto", "adapter_kwargs", "code_revision"):
            options.pop(unused, None)
        return shrunk_class(kind).from_pretrained(name, config=config.dense, **options)


LOADERS = {name: type(f"Shrunk{name}", (_ShrunkLoader,), {"auto_class": name}) for name in AUTO_CLASSES}
globals().update({loader.__name__: loader for loader in LOADERS.values()})  # where transformers looks for them


def register_config() -> None:
    """Let `AutoConfig` read shrunk folders."""
    transformers.AutoConfig.register(SHRUNK_TYPE, ShrunkConfig, exist_ok=True)


def register_models() -> None:
    """Let the auto classes of models load shrunk folders."""
    register_config()
    for name, loader in LOADERS.items():
        getattr(transformers, name).register(ShrunkConfig, loader, exist_ok=True)
