"""llm-compressor: masks and weights of any set by any method, as one of its modifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskopt.errors import MaskoptError
from maskopt.oracles import NM, MaskSet, parse_masks
from maskopt.plugins.moments import InputMoments
from maskopt.solvers import SOLVERS, Solver, make_solver
from maskopt.weights import WEIGHTS, make_weights

try:
    from compressed_tensors.offload import update_offload_parameter
    from llmcompressor.modifiers import ModifierFactory
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
    from pydantic import Field, PrivateAttr
except ImportError as error:
    raise MaskoptError(
        "This adapter needs llm-compressor, which is not installed: pip install 'maskopt[llmcompressor]' in an "
        "environment of its own."
    ) from error

__all__ = ["MaskoptModifier"]


class MaskoptModifier(SparsityModifierBase):  # type: ignore[misc]  # llm-compressor has no types
    """Prunes layers so that their outputs on calibration data change least, and updates the surviving weights.

    Block after block, as llm-compressor runs the model: all layers of a block see what the pruned blocks before it give
    out. Embeddings, and an output layer, are left dense. Padded positions count, as for its other modifiers; so prefer
    samples without padding.

    Parameters
    ----------
    sparsity : float, or list of float
        Fraction that is pruned, of all layers or of each target.
    mask_structure : str
        As for its other modifiers, "2:4" prunes two of four; "0:0" leaves the choice to `pattern`.
    pattern : str
        As for `maskopt prune`: "per-row", "unstructured", "2:4" (which keeps two of four) ...
    method : str
        "best" (ours), "sparsegpt", "admm", "alps", or a method that chooses masks only: "continuation", "wanda" ...
    options : dict
        Settings of the method.
    targets, ignore
        As for its other modifiers.

    Examples
    --------
    In a recipe, once this module was imported::

        pruning_stage:
          pruning_modifiers:
            MaskoptModifier:
              sparsity: 0.5
              pattern: per-row
              targets: ["LlamaDecoderLayer"]
    """

    pattern: str = "per-row"
    method: str = "best"
    options: dict[str, Any] = Field(default_factory=dict)

    _moments: dict[Any, InputMoments] = PrivateAttr(default_factory=dict)
    _left: set[Any] = PrivateAttr(default_factory=set)

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Check the settings, and find what is left dense."""
        self._solver()
        self._masks(self.sparsity[0] if isinstance(self.sparsity, list) else self.sparsity)
        # An output layer often is the embeddings' own weight.
        find = getattr(state.model, "get_output_embeddings", None)
        output = None if find is None else find()
        self._left = set() if output is None else {output}
        initialized: bool = super().on_initialize(state, **kwargs)
        return initialized

    def calibrate_module(self, module: Any, args: tuple[Tensor, ...], _output: Tensor) -> None:
        """Add a module's inputs."""
        if module not in self._left:
            if module not in self._moments:
                self._moments[module] = InputMoments(module)
            self._moments[module].add(args[0])

    def compress_modules(self) -> None:
        """Prune all modules that have seen data."""
        for module in list(self._moments):
            weight = module.weight
            masks = self._masks(self._module_sparsities[module])
            mask, updated, _ = self._moments.pop(module).solve(weight, masks, self._solver())
            with torch.no_grad():
                pruned = (weight if updated is None else updated).masked_fill(~mask, 0.0)
            update_offload_parameter(module, "weight", pruned)

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        """Release what is left."""
        if not self.ended_:
            self.on_end(state, None)
        for held in (self._moments, self._left, self._module_names, self._module_sparsities):
            held.clear()
        return True

    def _solver(self) -> Solver:
        if self.method in WEIGHTS:
            return make_weights(self.method, **self.options)
        if self.method in SOLVERS:
            return make_solver(self.method, **self.options)
        raise MaskoptError(f"There is no method {self.method!r}; choose one of {', '.join([*WEIGHTS, *SOLVERS])}.")

    def _masks(self, sparsity: Any) -> MaskSet:
        if self._prune_m:
            return NM(keep=self._prune_m - self._prune_n, group=self._prune_m)
        return parse_masks(self.pattern, None if ":" in self.pattern else float(sparsity))


ModifierFactory.register("MaskoptModifier", MaskoptModifier)
