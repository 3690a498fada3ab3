"""Layers solved at several levels of sparsity, so that models can be composed of them without solving again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from maskopt.files import open_tensors
from maskopt.models.layers import Layer, swapped
from maskopt.models.store import replaced
from maskopt.oracles import Counts
from maskopt.problems import LayerReconstruction
from maskopt.solvers import Result, Solver, solve_sets

__all__ = ["Database"]

_FILE = "layers.safetensors"


@dataclass(frozen=True, eq=False)
class _Pruned:
    """A pruned weight: one bit for each entry, and the values of those that are kept where they have changed."""

    bits: np.ndarray
    values: Tensor | None

    def weight(self, dense: Tensor) -> Tensor:
        """Return the weight, as the dense one is stored."""
        kept = (
            torch.from_numpy(np.unpackbits(self.bits, count=dense.numel()))
            .view(dense.shape)
            .to(dense.device, torch.bool)
        )
        if self.values is None:
            return dense.masked_fill(~kept, 0.0)
        return torch.zeros_like(dense).masked_scatter_(kept, self.values.to(dense.device))


class Database:
    """Pruned weights of layers at levels, in the main memory.

    A level takes a bit for each weight, and the kept values in the layer's own type where the solver changes them.

    Parameters
    ----------
    counts : mapping of Layer to Counts
        What each layer can keep.
    levels : mapping of Layer to sequence of int
        Counts to solve for, by layer.
    dense : mapping of Layer to Tensor
        The weights before pruning, as the layers store them.
    solver : Solver
    memory : int
        Bytes of working memory of the solver.

    Attributes
    ----------
    errors : dict
        ||W X - V X||^2 of the layers by count.
    """

    def __init__(
        self,
        counts: Mapping[Layer, Counts],
        levels: Mapping[Layer, Sequence[int]],
        dense: Mapping[Layer, Tensor],
        solver: Solver,
        memory: int,
    ) -> None:
        self.counts, self.levels, self.dense = counts, levels, dense
        self._solver, self._memory = solver, memory
        self._stored: dict[Layer, dict[int, _Pruned]] = {layer: {} for layer in counts}
        self.errors: dict[Layer, dict[int, float]] = {layer: {} for layer in counts}

    def observe(self, layer: Layer, problem: LayerReconstruction, result: Result) -> None:
        """Store a result, and solve the layer's problem at its other levels; an `Observer`."""
        counts = self.counts[layer]
        done = int(result.mask.sum()) // counts.step
        others = sorted({*self.levels[layer]} - {done}, reverse=True)
        found = solve_sets(problem, [counts.masks(count) for count in others], self._solver, memory=self._memory)
        for count, solved in zip((done, *others), (result, *found), strict=True):
            if count == counts.most:
                continue
            mask = layer.oriented(solved.mask).cpu().contiguous()
            values = None
            if solved.weight is not None:
                new = layer.oriented(solved.weight).to(self.dense[layer].dtype)
                values = new.cpu().masked_select(mask)
            self._stored[layer][count] = _Pruned(np.packbits(mask.numpy()), values)
            self.errors[layer][count] = solved.total

    def weight(self, layer: Layer, count: int) -> Tensor:
        """Return a layer's weight with a count of entries, one of its levels or all."""
        dense = self.dense[layer].to(layer.weight.device)
        return dense if count == self.counts[layer].most else self._stored[layer][count].weight(dense)

    def measured(self, layer: Layer) -> list[int]:
        """Return the counts of a layer that are stored, ascending."""
        return sorted(self._stored[layer])

    def composed(self, counts: Mapping[Layer, int]) -> AbstractContextManager[None]:
        """Give layers the weights of a count each inside the block."""
        return swapped((layer, self.weight(layer, count)) for layer, count in counts.items())

    def save(self, folder: Path) -> None:
        """Write the database to a file in a folder."""
        tensors: dict[str, Tensor] = {}
        for layer, levels in self._stored.items():
            for count, pruned in levels.items():
                tensors[f"{layer.name} {count} bits"] = torch.from_numpy(pruned.bits)
                if pruned.values is not None:
                    tensors[f"{layer.name} {count} values"] = pruned.values
        errors = {
            layer.name: {str(count): error for count, error in found.items()} for layer, found in self.errors.items()
        }
        with replaced(folder / _FILE) as aside:
            save_file(tensors, aside, metadata={"errors": json.dumps(errors)})

    def load(self, folder: Path) -> bool:
        """Read what `save` wrote; False if there is no such file."""
        file = folder / _FILE
        if not file.is_file():
            return False
        layers = {layer.name: layer for layer in self.counts}
        with open_tensors("solved layers", file) as content:
            errors = json.loads((content.metadata() or {})["errors"])
            names = set(content.keys())
            for name, found in errors.items():
                for count, error in found.items():
                    key = f"{name} {count}"
                    values = content.get_tensor(f"{key} values") if f"{key} values" in names else None
                    bits = content.get_tensor(f"{key} bits").numpy()
                    self._stored[layers[name]][int(count)] = _Pruned(bits, values)
                    self.errors[layers[name]][int(count)] = error
        return True
