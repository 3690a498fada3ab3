"""Saving a shrunk model: a folder that transformers loads, the units that stayed, and the report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.files import atomic_path
from maskopt.models.saving import write_model, write_report
from maskopt.shrinking.report import ShrinkReport

__all__ = ["save_shrunk"]

UNITS = "units.safetensors"


def save_shrunk(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: ShrinkReport,
    extra: Mapping[str, Any] | None = None,
    page: str | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads, with ``units.safetensors`` and ``report.json``.

    ``units.safetensors`` holds for every layer that lost units which of the dense model's stayed, boolean, shape
    (units,) or (experts, units). The folder is written under a temporary name and renamed at the end.

    Parameters
    ----------
    path : path-like
        The folder to make; must not exist.
    model : PreTrainedModel
        The shrunk model.
    tokenizer : PreTrainedTokenizerBase
    report : ShrinkReport
        What `shrink` returned.
    extra : mapping, optional
        More entries for ``report.json``, such as perplexities.
    page : str, optional
        Content of ``report.html``, the report for people.

    Raises
    ------
    MaskoptError
        If `path` exists or cannot be written.
    """
    with atomic_path(path) as aside:
        write_model(aside, model, tokenizer, path)
        save_file({name: units.contiguous() for name, units in report.kept.items()}, aside / UNITS)
        write_report(aside, {**report.to_json(), **(extra or {})}, page)
