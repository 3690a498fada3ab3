"""peft: LoRA adapters whose merge keeps every zero of a pruned model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from maskopt.errors import MaskoptError

try:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear
except ImportError as error:
    raise MaskoptError("Masked LoRA needs peft, which is not installed: pip install 'maskopt[peft]'.") from error

__all__ = ["MaskedLora", "masked_lora"]

_VARIANTS = ("use_dora", "lora_bias", "arrow_config", "use_bdlora", "alora_invocation_tokens")


class MaskedLora(LoraLinear):  # type: ignore[misc]  # peft has no types
    """A LoRA layer that changes only weights which are not zero: W + mask * (scaling B A).

    Merging adds the same product, so the merged model has the zeros of the pruned one, and computes what was trained.
    The product is formed at every call; that costs as much as one more token for each of the rank's columns of W.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # The weight of a Conv1D is stored as (in, out); peft sets this only for layers of its own.
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        weight = self.get_base_layer().weight
        self.register_buffer("kept", weight.detach() != 0, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what merging adds to the weight, zero where that is."""
        delta: Tensor = super().get_delta_weight(adapter) * self.kept
        return delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute with the masked sum of the weight and its active adapters."""
        if self.disable_adapters or self.merged:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        base = self.get_base_layer()
        result: Tensor = base(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            delta = self.get_delta_weight(adapter)
            inputs = self.lora_dropout[adapter](x).to(delta.dtype)
            result = result + nn.functional.linear(inputs, delta.T if self.fan_in_fan_out else delta).to(result.dtype)
        return result


def masked_lora(config: LoraConfig) -> LoraConfig:
    """Let a configuration of LoRA make adapters that keep the zeros of the model's linear layers.

    Parameters
    ----------
    config : peft.LoraConfig

    Returns
    -------
    peft.LoraConfig
        The same object, for `peft.get_peft_model(pruned_model, config)`. It is what peft calls dynamic registration of
        custom layers, which an adapter's file does not hold: load it with the configuration made the same way.

    Raises
    ------
    MaskoptError
        If the configuration asks for a variant of LoRA that computes something else, such as DoRA.

    Examples
    --------
    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight[:, ::2].zero_()
    >>> adapted = get_peft_model(model, masked_lora(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)))
    >>> merged = adapted.merge_and_unload()
    >>> (merged[0].weight == 0).tolist()
    [[True, False, True, False], [True, False, True, False]]
    """
    for name in _VARIANTS:
        if getattr(config, name, None):
            raise MaskoptError(f"Masked LoRA does not support {name}; leave it out of the configuration.")
    config._register_custom_module({nn.Linear: MaskedLora, Conv1D: MaskedLora})
    return config
