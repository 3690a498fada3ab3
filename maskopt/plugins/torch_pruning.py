"""Torch-Pruning: which channels go by what the layers that read them lose, and those layers fitted anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskopt.checks import check_settings, real, truth
from maskopt.errors import MaskoptError
from maskopt.plugins.moments import InputMoments, observing, weight_of
from maskopt.problems import ColumnSubset, LayerReconstruction
from maskopt.problems.refit import Refit
from maskopt.structured.order import removal_scores

try:
    from torch_pruning.pruner import function
    from torch_pruning.pruner.importance import Importance
except ImportError as error:
    raise MaskoptError(
        "This adapter needs Torch-Pruning, which is not installed: pip install 'maskopt[torch-pruning]'."
    ) from error

__all__ = ["LayerImportance", "observing"]


class LayerImportance(Importance):  # type: ignore[misc]  # Torch-Pruning has no types
    """Importance of channels: what the layers that read them lose without them, on calibration data.

    Channels of a group leave one after the other, always the one whose removal adds least to the errors of all layers
    that read it: of a feed-forward layer's neurons the next layer's, of a residual stream's channels those of every
    layer that reads the stream. Errors are relative to each layer's output, so that scores can be ranked over all
    groups (`global_pruning`), and the order holds for any ratio, rounding and number of steps.

    Parameters
    ----------
    model : nn.Module
        That the pruner prunes.
    moments : mapping of str to InputMoments
        By module name, of `observing`. `prune` keeps them up to date; groups that are pruned otherwise need new ones.
    heads : mapping of nn.Module to int
        As `num_heads` of the pruner, where whole heads are to go (`prune_num_heads`): they are then scored as a whole.
    refit : bool
        Whether the layers that read are fitted anew, which `prune` does; with False, and with `pruner.step()`, their
        weights stay as they are.
    ridge : float
        Fraction of each input's second moment that is added to it.

    Examples
    --------
    >>> import torch
    >>> import torch_pruning as tp
    >>> from torch import nn
    >>> model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
    >>> with torch.no_grad(), observing(model) as moments:
    ...     _ = model(data)
    >>> importance = LayerImportance(model, moments)
    >>> pruner = tp.pruner.BasePruner(model, data[:1], importance, pruning_ratio=0.5, ignored_layers=[model[2]])
    >>> for group in pruner.step(interactive=True):
    ...     importance.prune(group)
    >>> model[0].out_features, model[2].in_features
    (8, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        moments: Mapping[str, InputMoments],
        *,
        heads: Mapping[nn.Module, int] | None = None,
        refit: bool = True,
        ridge: float = 0.01,
    ) -> None:
        self.heads, self.refit, self.ridge = dict(heads or {}), refit, ridge
        check_settings(self, refit=truth(), ridge=real(0))
        self._names = {module: name for name, module in model.named_modules()}
        missing = [name for name in moments if name not in self._names.values()]
        if missing:
            raise MaskoptError(f"The model has no module {missing[0]}, of which there are moments.")
        self._moments = {model.get_submodule(name): each for name, each in moments.items()}

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Return a score for each channel of a group, float32, shape (channels,); None if no layer reads them.

        Raises
        ------
        MaskoptError
            If layers read them of which there are no moments, or those of another width.
        """
        channels = len(group[0].idxs)
        # Of grouped queries there are more heads than of keys and values.
        number = max((self.heads[dep.layer] for dep, _ in group if dep.layer in self.heads), default=channels)
        readers = _readers(group)
        if not readers:
            return None
        unit = torch.arange(channels) * number // channels
        problems = [self._problem(module, parts, unit, number) for module, parts in readers.items()]
        known = [problem for problem in problems if problem is not None]
        if not known:
            names = ", ".join(self._names[module] for module in readers)
            raise MaskoptError(
                f"No layer that reads the channels of {self._names.get(group[0].dep.layer)} was observed ({names}); "
                f"observe one, or add the module to ignored_layers."
            )
        return removal_scores(known, refit=self.refit).float()[unit.to(known[0].device)]

    @torch.no_grad()
    def prune(self, group: Any) -> None:
        """Remove the channels of a group, as `group.prune()` does, after a fit (`refit`) of the layers that read them.

        Parameters
        ----------
        group : Group
            Of `pruner.step(interactive=True)`.
        """
        kept = {}
        for module, parts in _readers(group).items():
            moments = self._moments.get(module)
            if moments is None:
                continue
            columns = torch.cat([self._columns(module, moments, index) for index, _ in parts])
            stays = torch.ones(len(moments.gram), dtype=torch.bool, device=moments.gram.device)
            kept[module] = stays.index_fill_(0, columns, False)
            if self.refit:
                subset = ColumnSubset.of(self._layer(module, moments), ridge=self.ridge)
                weight = weight_of(module)
                weight.copy_(moments.stored(subset.refit(kept[module]).to(weight.dtype), weight))
        group.prune()
        for module, stays in kept.items():
            moments = self._moments[module]
            moments.gram = moments.gram[stays][:, stays]

    def _layer(self, module: nn.Module, moments: InputMoments) -> LayerReconstruction:
        matrix = moments.matrix(weight_of(module).detach()).float()
        if matrix.shape[1] != len(moments.gram):
            raise MaskoptError(
                f"The layer {self._names[module]} has {matrix.shape[1]} inputs, but had {len(moments.gram)} when it "
                f"was observed; observe the model again, or remove groups by LayerImportance.prune."
            )
        if moments.tokens == 0:
            raise MaskoptError(
                f"The layer {self._names[module]} saw no input; run calibration data through the model first."
            )
        return LayerReconstruction(matrix, moments.gram, moments.tokens, check=False)

    def _columns(self, module: nn.Module, moments: InputMoments, index: list[int]) -> Tensor:
        """Return the columns of some channels that a layer reads."""
        first = torch.tensor(index, dtype=torch.int64, device=moments.gram.device).unsqueeze(1) * moments.width
        return (first + torch.arange(moments.width, device=first.device)).flatten()

    def _problem(
        self, module: nn.Module, parts: list[tuple[list[int], list[int]]], unit: Tensor, number: int
    ) -> ColumnSubset | None:
        """Return the choice of units of one layer, whose other columns stay and are fitted; None without moments."""
        moments = self._moments.get(module)
        if moments is None:
            return None
        layer = self._layer(module, moments)
        columns = torch.cat([self._columns(module, moments, index) for index, _ in parts])
        roots = torch.tensor([root for _, roots in parts for root in roots], dtype=torch.int64)
        units = unit[roots].repeat_interleave(moments.width).to(columns.device)
        blocks = ColumnSubset.of(layer, ridge=self.ridge).blocks
        target, own = blocks.target[:, columns], blocks.gram[columns.unsqueeze(1), columns]
        if self.refit and len(columns) < blocks.number:
            whole = Refit(blocks, torch.arange(blocks.number, device=columns.device))
            few = whole.joined(columns, whole.additions(columns[:0]))  # the other columns stay and are fitted
            target, own = few.target, few.gram
        # Where a layer reads some channels only, the others cost it nothing.
        read = torch.zeros(number, dtype=torch.bool, device=units.device).index_fill_(0, units, True)
        unread = (~read).nonzero().flatten()
        own = nn.functional.pad(own, (0, len(unread), 0, len(unread)))
        own[len(columns) :, len(columns) :].fill_diagonal_(1.0)
        target = nn.functional.pad(target, (0, len(unread)))
        return ColumnSubset(target, own, torch.cat((units, unread)))


def _readers(group: Any) -> dict[nn.Module, list[tuple[list[int], list[int]]]]:
    """Return the channels that layers read of a group, and which of the group's they are, by layer."""
    found: dict[nn.Module, list[tuple[list[int], list[int]]]] = {}
    for item in group:
        if item.dep.pruning_fn in (function.prune_linear_in_channels, function.prune_conv_in_channels):
            found.setdefault(item.dep.layer, []).append((list(item.idxs), list(item.root_idxs)))
    return found
