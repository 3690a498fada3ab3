"""Saving a pruned model: a Hugging Face folder, its masks bit-packed beside the weights, and the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.errors import MaskoptError
from maskopt.files import atomic_path, reason, require_absent
from maskopt.models.masks import load_masks, save_masks
from maskopt.models.offload import offload_of
from maskopt.models.quiet import without_bars
from maskopt.models.report import PruneReport, RecoveryReport
from maskopt.models.shards import save_blockwise

__all__ = ["check_output", "load_masks", "save_masks", "save_pruned"]

check_output = require_absent


def save_pruned(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: PruneReport | RecoveryReport,
    extra: Mapping[str, Any] | None = None,
    page: str | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads, with ``masks.safetensors`` and ``report.json``.

    The folder is written under a temporary name and renamed at the end, so that a full disk or an interrupt leaves no
    partial output.

    Parameters
    ----------
    path : path-like
        The folder to make; must not exist (`check_output` checks that before the work starts).
    model : PreTrainedModel
        The pruned model.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    report : PruneReport or RecoveryReport
        What `prune` or `recover` returned.
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
        try:
            aside.mkdir()
            offload = offload_of(model)
            if offload is None:
                with without_bars():
                    model.save_pretrained(aside)
            else:
                save_blockwise(aside, model, offload)
            tokenizer.save_pretrained(aside)
            save_masks(aside / "masks.safetensors", report.masks)
            text = json.dumps({**report.to_json(), **(extra or {})}, indent=2)
            (aside / "report.json").write_text(text + "\n", encoding="utf-8")
            if page is not None:
                (aside / "report.html").write_text(page, encoding="utf-8")
        except (SafetensorError, ValueError) as error:
            # ValueError: transformers refuses generation settings that contradict each other.
            raise MaskoptError(f"The output {path} could not be written: {reason(error)}.") from error
