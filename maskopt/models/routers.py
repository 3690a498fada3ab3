"""Layers that choose: routers of experts, gates of shared experts, choices between inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from maskopt.models.layers import LinearLayer, is_linear

__all__ = ["find_routers"]

_ROUTER = re.compile(r"router", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"Router|TopK\w*Gat(e|ing)$")
_GATE = re.compile(r"(^|_)(gate|gating|wg|switch)$")  # of experts where these lie beside it
_EXPERT = re.compile(r"expert", re.IGNORECASE)


def find_routers(module: nn.Module, name: str = "") -> dict[str, str]:
    """Return the linear layers in a module whose outputs choose between experts or weigh them.

    They are found by role: layers whose name, or the name or class of a module around them, contains "router"; and,
    in modules that hold experts (``experts``, ``shared_expert`` ...), layers that are called a gate or have one output
    for each expert. The gate of a gated MLP (``gate_proj``) multiplies features and is no router.

    Parameters
    ----------
    module : nn.Module
        Usually a block.
    name : str
        Its full name.

    Returns
    -------
    dict of str to str
        By full layer name: the part of the name that a pattern of `select_layers` must contain.
    """
    return dict(_search(module, name, None))


def _search(module: nn.Module, path: str, inside: str | None) -> Iterator[tuple[str, str]]:
    """Yield routers; `inside` is the name of the enclosing router module, if there is one."""
    experts = _experts(module)
    for key, child in module.named_children():
        full = f"{path}.{key}" if path else key
        named = inside
        if named is None and _decides(key, child, experts):
            named = key
        if is_linear(child):
            if named is not None:
                yield full, named
        else:
            yield from _search(child, full, named)


def _decides(key: str, child: nn.Module, experts: set[int] | None) -> bool:
    if _ROUTER.search(key) or _ROUTER_CLASS.search(type(child).__name__):
        return True
    if experts is None:
        return False
    if _GATE.search(key):
        return True
    return not _EXPERT.search(key) and is_linear(child) and LinearLayer(key, child).shape[0] in experts


def _experts(module: nn.Module) -> set[int] | None:
    """Return the numbers of experts that a module holds, None if there are none."""
    found: set[int] | None = None
    for key, child in module.named_children():
        if not _EXPERT.search(key) or _GATE.search(key) or is_linear(child):
            continue
        found = found or set()
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found.add(len(child))
        number = getattr(child, "num_experts", None)
        if isinstance(number, int):
            found.add(number)
    return found
