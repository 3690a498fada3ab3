"""ModelOpt: masks and weights of any set by any method, as one of its sparsity modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskopt.errors import MaskoptError
from maskopt.oracles import PerRow
from maskopt.plugins.moments import InputMoments
from maskopt.weights import ConditionalADMM

try:
    from modelopt.torch.sparsity.weight_sparsity.mode import SparseMagnitudeModeDescriptor, SparsityModeRegistry
    from modelopt.torch.sparsity.weight_sparsity.searcher import BaseSparseSearcher
except ImportError as error:
    raise MaskoptError(
        "This adapter needs ModelOpt, which is not installed: pip install 'maskopt[modelopt]' in an environment of its "
        "own."
    ) from error

__all__ = ["MODE", "MaskoptMode", "MaskoptSearcher"]

MODE = "maskopt"
"""Name of the mode, for `modelopt.torch.sparsity.sparsify(model, mode=MODE, config={...})`."""


class MaskoptSearcher(BaseSparseSearcher):  # type: ignore[misc]  # ModelOpt has no types
    """Chooses masks, and updates weights, so that layers' outputs on calibration data change least.

    All layers see what the dense model passes on. Settings, in the `config` of `sparsify`:

    - `forward_loop`, or `data_loader` and `collect_func`: run the calibration data, as for its other modes;
    - `masks`: any set for weights as (out, in); `PerRow(0.5)` by default. ModelOpt's own modes know 2:4 only;
    - `solver`: `ConditionalADMM()` by default.

    Examples
    --------
    ::

        import modelopt.torch.sparsity as mts
        from maskopt.plugins.modelopt import MODE

        mts.sparsify(model, mode=MODE, config={"forward_loop": run_data, "masks": maskopt.NM(keep=2, group=4)})
    """

    @property
    def default_search_config(self) -> dict[str, Any]:
        """Settings of ModelOpt, and ours."""
        return {**super().default_search_config, "masks": PerRow(0.5), "solver": ConditionalADMM()}

    def sanitize_search_config(self, config: dict[str, Any] | None) -> dict[str, Any]:
        """Complete the settings; ModelOpt would admit the pattern 2:4 only."""
        return {**self.default_search_config, **(config or {})}

    def before_search(self) -> None:
        """Run the calibration data and add up what the layers see."""
        super().before_search()
        if self.forward_loop is None:
            raise MaskoptError("Pruning needs data: give the config a forward_loop, or data_loader and collect_func.")
        self._moments: dict[nn.Module, InputMoments] = {}
        hooks = []
        for _, module in self._named_sparsifiable_modules():
            moments = self._moments[module] = InputMoments(module)
            hooks.append(moments.watch(module))
        try:
            with torch.no_grad():
                self.forward_loop(self.model)
        finally:
            for hook in hooks:
                hook.remove()

    def after_search(self) -> None:
        """Release the moments."""
        super().after_search()
        self._moments = {}

    def _check_weight_size(self, weight: Tensor, mod_name: str) -> bool:
        return weight.ndim == 2  # convolutions stay dense

    def _compute_mask(self, module: Any) -> Tensor:
        mask, updated, _ = self._moments[module].solve(module.weight, self.config["masks"], self.config["solver"])
        if updated is not None:
            # The attribute `weight` is the product with the mask.
            with torch.no_grad():
                dict(module.named_parameters(recurse=False))["weight"].copy_(updated)
        return mask


@SparsityModeRegistry.register_mode
class MaskoptMode(SparseMagnitudeModeDescriptor):  # type: ignore[misc]
    """The mode; its rules, which say what is pruned, are those of ModelOpt's other modes."""

    @property
    def name(self) -> str:
        """Its name."""
        return MODE

    @property
    def search_algorithm(self) -> type[MaskoptSearcher]:
        """What chooses the masks."""
        return MaskoptSearcher
