"""Which layers are pruned: name patterns, and a list of everything that stays dense."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from maskopt.errors import MaskoptError
from maskopt.models.blocks import Block, find_blocks
from maskopt.models.experts import Stack, StackedLayer, matrices_in, stacks
from maskopt.models.layers import Layer, is_linear, linear_layers
from maskopt.models.routers import find_routers

__all__ = ["LeftDense", "Selection", "select_layers"]


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

    def without(self, elsewise: Mapping[Stack, str]) -> Selection:
        """Return the selection without parameters that turned out to be no stacks of matrices.

        Parameters
        ----------
        elsewise : mapping of Stack to str
            The operation that uses each.

        Returns
        -------
        Selection

        Raises
        ------
        MaskoptError
            If no layer is left.
        """
        if not elsewise:
            return self

        def remaining(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
            return tuple(one for one in layers if not isinstance(one, StackedLayer) or one.stack not in elsewise)

        found = [
            LeftDense(stack.name, tuple(stack.parameter.shape), f"no matrices: used by {operation} alone")
            for stack, operation in elsewise.items()
        ]
        blocks = {block: remaining(layers) for block, layers in self.blocks.items()}
        selection = Selection(blocks, self.outside, (*self.left_dense, *found))
        if not selection.layers:
            raise MaskoptError("The include and exclude patterns leave no layer to prune.")
        return selection


def select_layers(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Selection:
    """Decide for each weight of a model whether it is pruned.

    Without `include`, every linear layer inside a block is pruned and nothing outside (embeddings, lm_head, pooler,
    classifier). Matrices stacked in one parameter inside a block, such as those of experts, are layers like any other:
    ``model.layers.0.mlp.experts.gate_up_proj.3``; patterns may also match the name of the parameter, or of the module
    that has it. With `include`, exactly the linear layers whose full name matches one of its patterns are, inside
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
        If there are no blocks, nothing is left to prune, a pattern matches nothing, or a weight cannot be pruned in
        place.
    """
    patterns = _Patterns(include, exclude)
    found = find_blocks(model)
    routers = {name: part for block in found for name, part in find_routers(block.module, block.name).items()}
    taken: set[tuple[int, ...]] = set()

    def choose(candidates: Iterable[Layer], inside: bool) -> tuple[Layer, ...]:
        chosen = []
        for layer in candidates:
            selected = patterns.select(*_names(layer), inside=inside)
            if layer.name in routers:
                selected = selected and patterns.calls(layer.name, routers[layer.name])
            if selected and layer.identity not in taken:
                taken.add(layer.identity)
                chosen.append(layer)
        return tuple(chosen)

    def inside(block: Block) -> Iterator[Layer]:
        yield from linear_layers(block.module, block.name)
        for stack in stacks(block.module, block.name):
            yield from stack.layers()

    blocks = {block: choose(inside(block), True) for block in found}
    prefixes = tuple(f"{block.name}." for block in blocks)
    others = (layer for layer in linear_layers(model) if not layer.name.startswith(prefixes))
    outside = choose(others, False)
    left_dense = tuple(_left_dense(model, prefixes, taken, patterns, routers))
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
        self.include, self.exclude = _Names(include), _Names(exclude)
        self.used: set[str] = set()

    def select(self, *names: str, inside: bool) -> bool:
        """Whether a weight with any of these names is pruned; `inside` says whether it is in a block."""
        excluded = self._match(self.exclude, names)
        return (self._match(self.include, names) if self.include.all else inside) and not excluded

    def calls(self, name: str, part: str) -> bool:
        """Whether a pattern of `include` matches a name and contains this part of it."""
        return any(part in pattern for pattern in self.include.matching((name,)))

    def reason(self, *names: str) -> str:
        """Why something inside a block is not selected."""
        return "excluded by a pattern" if self._match(self.exclude, names) else "matched by no include pattern"

    def require_used(self, model: nn.Module) -> None:
        """Check that every pattern has matched; one that has not is probably misspelt."""
        for pattern in (*self.include.all, *self.exclude.all):
            if pattern not in self.used:
                sample = next(linear_layers(model)).name
                raise MaskoptError(f"The pattern {pattern!r} matches no layer; full names look like {sample!r}.")

    def _match(self, patterns: _Names, names: tuple[str, ...]) -> bool:
        hits = patterns.matching(names)
        self.used |= hits
        return bool(hits)


class _Names:
    """Patterns of names; those without wildcards, of which there may be one for every expert, are looked up."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.all = tuple(patterns)
        self._wild = [pattern for pattern in self.all if any(sign in pattern for sign in "*?[")]
        self._plain = set(self.all).difference(self._wild)

    def matching(self, names: tuple[str, ...]) -> set[str]:
        """Return the patterns that match one of some names."""
        wild = {pattern for pattern in self._wild if any(fnmatchcase(name, pattern) for name in names)}
        return wild | self._plain.intersection(names)


def _left_dense(
    model: nn.Module,
    prefixes: tuple[str, ...],
    taken: Container[tuple[int, ...]],
    patterns: _Patterns,
    routers: Mapping[str, str],
) -> Iterator[LeftDense]:
    """Yield every weight of two or more dimensions that is not pruned."""
    for name, parameter in model.named_parameters():
        owner_name = name.rpartition(".")[0]
        owner = model.get_submodule(owner_name)
        # Parameters that are vectors up to axes of length one; the weight of a layer with one output is a matrix.
        vector = parameter.numel() == max(parameter.shape, default=1)
        if (vector and not (parameter.ndim == 2 and is_linear(owner))) or (id(parameter),) in taken:
            continue
        if name.startswith(prefixes) and matrices_in(owner, parameter):
            yield from _left_of_stack(Stack(name, owner), taken, patterns)
            continue
        if not name.startswith(prefixes):
            reason = "outside the blocks"
        elif owner_name in routers and patterns.select(owner_name, inside=True):
            reason = f"decides between experts or inputs; name {routers[owner_name]} in include to prune it"
        elif is_linear(owner):
            reason = patterns.reason(owner_name)
        else:
            reason = f"a parameter of {type(owner).__name__}, which is neither nn.Linear nor Conv1D"
        yield LeftDense(name, tuple(parameter.shape), reason)


def _left_of_stack(stack: Stack, taken: Container[tuple[int, ...]], patterns: _Patterns) -> Iterator[LeftDense]:
    """Yield the matrices of a stack that are not pruned, or the whole parameter if none is."""
    left = [layer for layer in stack.layers() if layer.identity not in taken]
    if left and len(left) == stack.number:
        reason = patterns.reason(*_names(left[0]))
        yield LeftDense(stack.name, tuple(stack.parameter.shape), f"stacked matrices, {reason}")
    else:
        for layer in left:
            yield LeftDense(layer.name, tuple(layer.weight.shape), patterns.reason(*_names(layer)))


def _names(layer: Layer) -> tuple[str, ...]:
    """Return the names that patterns may match."""
    return (layer.name, layer.stack.name, layer.stack.owner) if isinstance(layer, StackedLayer) else (layer.name,)
