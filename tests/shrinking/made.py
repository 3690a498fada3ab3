"""Small random models that lose units, and what they compute, kept for other processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import maskopt
from maskopt.shrinking import ShrinkReport
from tests.models.conftest import VOCABULARY
from tests.models.families import build

NEURONS = 80
"""Of each feed-forward part; without 30 % they are a multiple of eight, which experts need."""

_SIZES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": NEURONS, "word_embed_proj_dim": 16},
    "gpt2": {"n_inner": NEURONS},
    "qwen3_moe": {"moe_intermediate_size": NEURONS},
    "bloom": {},
}


def made(family: str, **changes: Any) -> PreTrainedModel:
    """A random model with 80 neurons in each feed-forward part, whose biases and norms are random as well."""
    model = build(family, **{**_SIZES.get(family, {"intermediate_size": NEURONS}), **changes})
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def data(count: int = 4, length: int = 16, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of two sequences."""
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (2, length), generator=random)} for _ in range(count)]


def shrunk(family: str, **options: Any) -> tuple[PreTrainedModel, ShrinkReport]:
    """A random model and the report of what it lost."""
    model = made(family)
    options = {"refit": "units", **options}
    return model, maskopt.shrink(model, data(), **options)


@torch.no_grad()
def computed(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a model computes: logits, and what it writes."""
    ids = data(1, 12, seed=2)[0]["input_ids"]
    return {
        "ids": ids,
        "logits": model(input_ids=ids, use_cache=False).logits,
        "written": model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False),
    }


def keep(folder: Path, model: PreTrainedModel, parameters: int) -> None:
    """Save a model with what it computes and how many parameters it should have, for `fresh.py`."""
    model.save_pretrained(folder)
    save_file(computed(model), folder / "expected.safetensors")
    (folder / "parameters.json").write_text(json.dumps(parameters))
