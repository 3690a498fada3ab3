"""Which layers are pruned: name patterns, and a list of everything that stays dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from maskopt.errors import MaskoptError
from maskopt.models.blocks import Block, find_blocks
from maskopt.models.layers import Layer, is_linear, linear_layers
from maskopt.models.routers import find_routers

__all__ = ["LeftDense", "Selection", "select_layers"]

_STACKED = "stacked matrices"


@dataclass(frozen=True)
class LeftDense:
    """A weight of two or more dimensions that is not pruned.

    Attributes
    ----------
    name : str
        Full parameter name.
    shape : tuple of int
    reason : str
        Why it is not pruned.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Selection:
    """A decision about every weight of two or more dimensions.

    Parameters
    ----------
    blocks : mapping of Block to tuple of Layer
        All blocks, in the order of the model's modules, and the layers to prune in them.
    outside : tuple of Layer
        Layers outside the blocks (lm_head, pooler) that a pattern selects.
    left_dense : tuple of LeftDense
        All other weights.
    """

    blocks: Mapping[Block, tuple[Layer, ...]]
    outside: tuple[Layer, ...]
    left_dense: tuple[LeftDense, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer to prune."""
        return (*(layer for layers in self.blocks.values() for layer in layers), *self.outside)


def select_layers(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Selection:
    """Decide for each weight of a model whether it is pruned.

    Without `include`, every linear layer inside a block is pruned and nothing outside (embeddings, lm_head, pooler,
    classifier). With `include`, exactly the linear layers whose full name matches one of its patterns are, inside
    the blocks or not. `exclude` wins over `include`. Patterns are those of `fnmatch`, case-sensitive, and must match
    the full name (``model.layers.0.mlp.up_proj``); ``*`` also matches dots. Weights that several modules have in
    common are pruned once, where they come first.

    Layers that choose between experts or weigh them (routers, gates of shared experts: `find_routers`) stay dense,
    because they are small and their errors change which experts run. A pattern of `include` prunes them if it contains
    the part of the name that marks the router: ``*.router``, ``*.mlp.gate``, ``*shared_expert_gate``, but not ``*`` or
    ``*.mlp.*``.

    Parameters
    ----------
    model : nn.Module
        Usually a transformers model.
    include, exclude : sequence of str
        Patterns.

    Returns
    -------
    Selection

    Raises
    ------
    MaskoptError
        If there are no blocks, nothing is left to prune, a pattern matches nothing, a block holds expert weights
        (parameters of three dimensions) that are not excluded, or a weight cannot be pruned in place.
    """
    patterns = _Patterns(include, exclude)
    found = find_blocks(model)
    routers = {name: part for block in found for name, part in find_routers(block.module, block.name).items()}
    taken: set[int] = set()

    def choose(candidates: Iterable[Layer], inside: bool) -> tuple[Layer, ...]:
        chosen = []
        for layer in candidates:
            selected = patterns.select(layer.name, inside=inside)
            if layer.name in routers:
                selected = selected and patterns.calls(layer.name, routers[layer.name])
            if selected and id(layer.weight) not in taken:
                taken.add(id(layer.weight))
                chosen.append(layer)
        return tuple(chosen)

    blocks = {block: choose(linear_layers(block.module, block.name), True) for block in found}
    prefixes = tuple(f"{block.name}." for block in blocks)
    others = (layer for layer in linear_layers(model) if not layer.name.startswith(prefixes))
    outside = choose(others, False)
    left_dense = tuple(_left_dense(model, prefixes, taken, patterns, routers))
    stacked = [weight.name for weight in left_dense if weight.reason == _STACKED]
    if stacked:
        owners = sorted({name.split(".")[-2] for name in stacked})
        raise MaskoptError(
            f"{stacked[0]} (one of {len(stacked)}) stacks several matrices, such as experts, in one parameter, which "
            f"cannot be pruned yet; leave them dense by excluding {' and '.join(f'*.{owner}*' for owner in owners)}."
        )
    patterns.require_used(model)
    selection = Selection(blocks, outside, left_dense)
    if not selection.layers:
        raise MaskoptError("The include and exclude patterns leave no layer to prune.")
    for layer in selection.layers:
        layer.check_prunable()
    return selection


class _Patterns:
    """Include and exclude patterns, and which of them have matched."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        for name, value in (("include", include), ("exclude", exclude)):
            if isinstance(value, str):
                raise MaskoptError(f"{name} is a sequence of patterns; write {name}=[{value!r}].")
            if not isinstance(value, Sequence) or not all(isinstance(pattern, str) for pattern in value):
                raise MaskoptError(f"{name} must be a sequence of strings; got {value!r}.")
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.used: set[str] = set()

    def select(self, *names: str, inside: bool) -> bool:
        """Whether a weight with any of these names is pruned; `inside` says whether it is in a block."""
        excluded = self._match(self.exclude, names)
        return (self._match(self.include, names) if self.include else inside) and not excluded

    def calls(self, name: str, part: str) -> bool:
        """Whether a pattern of `include` matches a name and contains this part of it."""
        return any(part in pattern and fnmatchcase(name, pattern) for pattern in self.include)

    def reason(self, *names: str) -> str:
        """Why something inside a block is not selected."""
        return "excluded by a pattern" if self._match(self.exclude, names) else "matched by no include pattern"

    def require_used(self, model: nn.Module) -> None:
        """Check that every pattern has matched; one that has not is probably misspelt."""
        for pattern in (*self.include, *self.exclude):
            if pattern not in self.used:
                sample = next(linear_layers(model)).name
                raise MaskoptError(f"The pattern {pattern!r} matches no layer; full names look like {sample!r}.")

    def _match(self, patterns: tuple[str, ...], names: tuple[str, ...]) -> bool:
        hits = {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)}
        self.used |= hits
        return bool(hits)


def _left_dense(
    model: nn.Module,
    prefixes: tuple[str, ...],
    taken: set[int],
    patterns: _Patterns,
    routers: Mapping[str, str],
) -> Iterator[LeftDense]:
    """Yield every weight of two or more dimensions that is not pruned."""
    for name, parameter in model.named_parameters():
        owner_name = name.rpartition(".")[0]
        owner = model.get_submodule(owner_name)
        # Parameters that are vectors up to axes of length one; the weight of a layer with one output is a matrix.
        vector = parameter.numel() == max(parameter.shape, default=1)
        if (vector and not (parameter.ndim == 2 and is_linear(owner))) or id(parameter) in taken:
            continue
        if not name.startswith(prefixes):
            reason = "outside the blocks"
        elif owner_name in routers and patterns.select(owner_name, inside=True):
            reason = f"decides between experts or inputs; name {routers[owner_name]} in include to prune it"
        elif is_linear(owner):
            reason = patterns.reason(owner_name)
        elif _stacks_matrices(owner, parameter):
            selected = patterns.select(name, owner_name, inside=True)
            reason = _STACKED if selected else f"stacked matrices, {patterns.reason(name, owner_name)}"
        else:
            reason = f"a parameter of {type(owner).__name__}, which is neither nn.Linear nor Conv1D"
        yield LeftDense(name, tuple(parameter.shape), reason)


def _stacks_matrices(owner: nn.Module, parameter: Tensor) -> bool:
    return parameter.ndim >= 3 and min(parameter.shape) > 1 and not isinstance(owner, _ConvNd)
