"""Small pruned models, dense and packed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from maskopt.packed.folder import pack
from tests.models.conftest import ARCHITECTURES, MIXTURES, Architecture

MODELS: dict[str, Architecture] = {**ARCHITECTURES, **MIXTURES}


def pruned(name: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> PreTrainedModel:
    """A model half of whose weights are zero, some of them negative zeros."""
    model = MODELS[name].build(**changes).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.5)
    return model


def both(path: Path, model: PreTrainedModel, name: str = "model") -> tuple[Path, Path]:
    """Save a model in several files and pack it; the dense and the packed folder."""
    dense, packed = path / name, path / f"{name}-packed"
    model.save_pretrained(dense, max_shard_size="10KB")
    pack(dense, packed)
    return dense, packed
